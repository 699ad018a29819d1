"""An LLM-lab's GPT, nano: 30.2M parameters, of which GPT-2's vocabulary takes 19M. LayerNorm, learned
positions, GELU and biases, as GPT-2 has them; the run folder loads as GPT2LMHeadModel.

Needs TinyStories (2.2 GB to download) and a GPU with 4 GB: by the plan an hour on an RTX 3060. The same
architecture without either: gpt_tiny.py. First python tokenizer.py configs/nano.py, which serves small.py and
medium.py, too; then python train.py configs/nano.py.
"""

name = "nano"
corpus = "tinystories"
tokenizer = "gpt2"
context_length = 512

norm = "layer"
positions = "learned"
ffn = "gelu"
bias = True
n_layers = 6
d_model = 384
n_heads = 6
dropout = 0.1

batch_size = 16
grad_accum_steps = 4
max_steps = 5000
learning_rate = 6e-4
min_lr = 6e-5
warmup_steps = 200
eval_every = 500
save_every = 500
eval_tokens = 500_000
