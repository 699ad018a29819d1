"""GPT-2's architecture, small enough for a minute on two cores: 0.9M parameters, 0.4M tokens of stories that
are made on the spot. No download, no GPU. The first step of an LLM lab; nano.py is the next.

    python tokenizer.py configs/gpt_tiny.py
    python train.py configs/gpt_tiny.py
    python chat.py out/gpt_tiny --prompt="Once upon a time"

LayerNorm, learned positions, GELU and biases: the run folder loads as GPT2LMHeadModel.
"""

name = "gpt_tiny"
corpus = "storyworld"
vocab_size = 1024
learn_megabytes = 5
train_megabytes = 5
context_length = 128

norm = "layer"
positions = "learned"
ffn = "gelu"
bias = True
n_layers = 4
d_model = 128
n_heads = 4

batch_size = 4  # small: at so few tokens every step counts
max_steps = 800
learning_rate = 6e-3  # nanoGPT's 1e-3 learns too slowly in a minute: configs/experiments/gpt.py
min_lr = 6e-4
warmup_steps = 80
eval_every = 200
eval_tokens = 16_384
final_eval_tokens = 65_536
save_every = 200
