"""A base for real tasks from real text on two CPU cores: 5.3M parameters, 8.2M tokens, about an hour.

Four fifths WikiText-2 and one fifth arithmetic; every digit is a token. About two epochs: more would want
dropout, and an hour does not hold more.
"""

name = "laptop"
corpus = "wikitext2:0.8,arithmetic:0.2"
vocab_size = 8192
split_digits = True
context_length = 512

n_layers = 4
d_model = 256
n_heads = 4

batch_size = 8
max_steps = 2000
optimizer = "muon"
learning_rate = 4e-3
min_lr = 1e-4
warmup_steps = 100
eval_every = 500
save_every = 250
eval_tokens = 100_000
