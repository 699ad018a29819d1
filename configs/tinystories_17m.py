"""The course baseline: 17.6M parameters beside the input table, context 512, 328M tokens of TinyStories.

Stanford's CS336 asks for a validation loss of at most 1.45 nats a token from this shape.
"""

name = "tinystories_17m"
corpus = "tinystories"
vocab_size = 10_000
context_length = 512

n_layers = 4
d_model = 512
n_heads = 16
d_ff = 1344
tie_embeddings = False

batch_size = 64
grad_accum_steps = 2
max_steps = 5000
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 200
eval_every = 500
save_every = 500
eval_tokens = 1_000_000
