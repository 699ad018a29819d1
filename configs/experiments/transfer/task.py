"""How both bases are tuned on a task: the same examples in the same order."""

method = "lm"
max_train_examples = 2000
max_eval_examples = 500
epochs = 2.0
batch_size = 16
learning_rate = 1e-3
warmup_steps = 20
eval_every = 0
save_every = 0
