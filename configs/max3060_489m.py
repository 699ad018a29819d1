"""About what fits into 12 GB at most: 489M parameters with gradient checkpointing. To see that it runs, not
to learn: a day is 0.2B tokens, half a token a parameter.
"""

name = "max3060_489m"
corpus = "fineweb_edu"
vocab_size = 32_768
split_digits = True
context_length = 1024

n_layers = 26
d_model = 1280
n_heads = 20
n_kv_heads = 4
d_ff = 3456

gradient_checkpointing = True
compile = False  # a compiled backward pass holds a second copy of all gradients: 1.8 GiB
batch_size = 4
grad_accum_steps = 32
max_steps = 50
learning_rate = 3e-4
min_lr = 3e-5
warmup_steps = 10
eval_every = 0
save_every = 0
final_eval_tokens = 500_000
