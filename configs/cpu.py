"""The embedded default: a story teller for any laptop, about three minutes of two cores.

`storyworld` needs no network. The model is small enough that a CPU without matrix units trains it in minutes.
"""

corpus = "storyworld"
vocab_size = 2048
context_length = 192

n_layers = 4
d_model = 160
n_heads = 5
n_kv_heads = 5

batch_size = 32
max_steps = 600
learning_rate = 3e-3
min_lr = 1e-4
warmup_steps = 50
eval_every = 200
save_every = 200
