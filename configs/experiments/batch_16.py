baseline = "configs/experiments/baseline.py"
hypothesis = "At equal tokens, a quarter of the steps with four times the batch learn less."

batch_size = 16
max_steps = 200
warmup_steps = 10
learning_rate = 6e-3  # by the square root of the batch
