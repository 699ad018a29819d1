baseline = "configs/experiments/baseline.py"
hypothesis = "At equal tokens small batches take more steps and learn more, at a fraction of the speed."

batch_size = 1
max_steps = 3200
warmup_steps = 160
learning_rate = 1.5e-3  # by the square root of the batch
