"""GPT, medium: 12 layers of width 768 with GPT-2's vocabulary, GPT-2's own smallest shape.

Needs what nano.py needs, and a GPU with 8 GB: by the plan 3.2 hours on an RTX 3060.
"""

baseline = "configs/nano.py"
name = "medium"

n_layers = 12
d_model = 768
n_heads = 12

batch_size = 8
grad_accum_steps = 8
