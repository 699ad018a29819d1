baseline = "configs/experiments/baseline.py"
hypothesis = "Linear attention is worse: without softmax a head cannot single out the one token it needs."

attention_kind = "linear"
