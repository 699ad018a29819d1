baseline = "configs/experiments/baseline.py"
hypothesis = "Twice the context sees whole stories. Equal tokens a step."

context_length = 256
batch_size = 2
