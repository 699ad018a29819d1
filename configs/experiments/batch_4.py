baseline = "configs/experiments/baseline.py"
hypothesis = "At equal tokens, four times the steps with a quarter of the batch learn more."

batch_size = 4
max_steps = 800
warmup_steps = 80
learning_rate = 1.5e-3  # by the square root of the batch
