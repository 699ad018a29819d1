"""A day on an RTX 3060: 113M parameters, 1.1B tokens of FineWeb-Edu.

The day is bound by compute, not by memory: by the plan, the best loss after 24 hours lies at 70M to 135M
parameters.
"""

name = "max3060"
corpus = "fineweb_edu"
vocab_size = 32_768
split_digits = True
context_length = 1024
hypothesis = "A day on 12 GB buys the lowest loss at about 100M parameters."

n_layers = 14
d_model = 768
n_heads = 12
n_kv_heads = 4
d_ff = 2048

batch_size = 16
grad_accum_steps = 8
max_steps = 8500
look_back = True  # as in speedrun.py
optimizer = "normuon"
learning_rate = 2e-3  # a third lower, for wider layers
min_lr = 1e-4
embedding_rate = 3.0
beta1 = 0.8
beta2 = 0.99
warmup_steps = 400
eval_every = 500
save_every = 250
eval_tokens = 2_000_000
