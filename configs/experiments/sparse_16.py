baseline = "configs/experiments/baseline.py"
hypothesis = "A band of 16 tokens and every 16th before it costs no loss: two layers reach every token."

sparse_stride = 16
