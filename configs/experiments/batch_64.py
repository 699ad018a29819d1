baseline = "configs/experiments/baseline.py"
hypothesis = "At equal tokens, a quarter of the steps with four times the batch learn less."

batch_size = 64
max_steps = 50
warmup_steps = 5
learning_rate = 6e-3  # by the square root of the batch
