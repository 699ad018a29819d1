"""The lab's baseline: a Llama of 0.9M parameters that reads 0.4M tokens of stories in about a minute.

Each file beside it names its hypothesis and states what it changes, nothing else; `python -m lab.experiments`
runs them.
"""

corpus = "storyworld"
vocab_size = 1024
context_length = 128

n_layers = 4
d_model = 128
n_heads = 4
d_ff = 352

batch_size = 4  # small: at so few tokens every step counts
max_steps = 800
learning_rate = 3e-3
min_lr = 0.0
warmup_steps = 40
eval_every = 200
eval_tokens = 16_384
final_eval_tokens = 65_536
save_every = 0
sample_tokens = 0
