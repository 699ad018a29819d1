baseline = "configs/experiments/baseline.py"
hypothesis = "Half the context loses the beginnings of stories. Equal tokens a step."

context_length = 64
batch_size = 8
