"""The same model, which has read nothing: one step with a learning rate of 0."""

baseline = "configs/experiments/transfer/pretrained.py"

max_steps = 1
warmup_steps = 0
learning_rate = 0.0
min_lr = 0.0
