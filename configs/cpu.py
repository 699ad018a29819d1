"""The embedded default: a story teller in minutes on any laptop, from text that is made on the spot.

Sized for two cores without matrix units: 1.6M parameters, 3.3M tokens. Muon was chosen for what it did on
TinyStories (see configs/wikitext2.py); on these stories it has not been compared with AdamW.
"""

corpus = "storyworld"
vocab_size = 2048
context_length = 256

n_layers = 4
d_model = 160
n_heads = 5

batch_size = 16
max_steps = 800
optimizer = "muon"
learning_rate = 6e-3
min_lr = 2e-4
warmup_steps = 40
eval_every = 200
save_every = 100
