"""The largest model that a day on an RTX 3060 still teaches something: 180M parameters, 0.7B tokens.

By the plan its loss after 24 hours is behind that of max3060.py, which reads half as many tokens again.
"""

name = "max3060_180m"
corpus = "fineweb_edu"
vocab_size = 32_768
split_digits = True
context_length = 1024

n_layers = 18
d_model = 896
n_heads = 14
n_kv_heads = 2
d_ff = 2432

batch_size = 8
grad_accum_steps = 16
max_steps = 5500
learning_rate = 5e-4
min_lr = 5e-5
warmup_steps = 300
eval_every = 500
save_every = 250
eval_tokens = 2_000_000
