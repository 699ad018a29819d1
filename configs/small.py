"""GPT, small: 8 layers of width 512 with GPT-2's vocabulary, 51M parameters. Everything else as in nano.

Needs what nano.py needs, and a GPU with 6 GB: by the plan 1.7 hours on an RTX 3060.
"""

baseline = "configs/nano.py"
name = "small"

n_layers = 8
d_model = 512
n_heads = 8

batch_size = 16
