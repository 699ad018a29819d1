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
look_back = True
optimizer = "normuon"  # with look_back 900 steps without dropout end at 3.81 nats; with Muon alone at 3.98
momentum = 0.9
learning_rate = 4e-3
embedding_rate = 3.0
beta1 = 0.8
beta2 = 0.99
min_lr = 1e-4
warmup_steps = 100
eval_every = 500
save_every = 500
