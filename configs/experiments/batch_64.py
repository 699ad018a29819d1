baseline = "configs/experiments/baseline.py"
hypothesis = "At equal tokens, a sixteenth of the steps learn hardly anything."

batch_size = 64
max_steps = 50
warmup_steps = 3
learning_rate = 1.2e-2  # by the square root of the batch
