"""A small Llama on WikiText-2, whose 2.1M words a small model still learns from.

More epochs than about ten only overfit: the run folder keeps the model of the best validation loss.
"""

name = "wikitext2"
corpus = "wikitext2"
vocab_size = 8192
context_length = 256

n_layers = 4
d_model = 256
n_heads = 4
dropout = 0.1

batch_size = 16
grad_accum_steps = 1
max_steps = 4000
optimizer = "muon"  # 120 steps on the TinyStories slice: 3.87 nats; AdamW's best of 2e-3 and 4e-3: 4.28
learning_rate = 4e-3
min_lr = 1e-4
warmup_steps = 100
eval_every = 500
save_every = 500
