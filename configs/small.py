"""GPT, small: 8 layers of width 512 with GPT-2's vocabulary, 51M parameters. Everything else as in nano."""

baseline = "configs/nano.py"
name = "small"

n_layers = 8
d_model = 512
n_heads = 8

batch_size = 16
