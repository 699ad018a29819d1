"""The base of the speedrun: 27.8M parameters, 328M tokens, about two hours on an RTX 3060 by the plan.

TinyStories, and a tenth of numbers (word problems told, equations solved), so that the base has seen digits
before it is asked to reason. Its own 8,192 tokens cost 1.7x fewer FLOPs a token than GPT-2's 50,257 at this
width; every digit is a token.
"""

corpus = "tinystories:0.9,numbers:0.1"
vocab_size = 8192
split_digits = True
context_length = 512
hypothesis = "A tenth of numbers among the stories is enough for SFT to teach arithmetic later."

n_layers = 8
d_model = 512
n_heads = 8
n_kv_heads = 4
d_ff = 1408

batch_size = 64
grad_accum_steps = 2
max_steps = 5000
look_back = True  # a short run on WikiText-2: 4.66 nats with it, 4.69 without (report/lab/findings.md)
optimizer = "normuon"  # other short runs: 4.64 nats with it, 5.26 with AdamW
learning_rate = 3e-3
embedding_rate = 3.0
beta1 = 0.8
beta2 = 0.99
min_lr = 1e-4
warmup_steps = 200
eval_every = 500
save_every = 500
eval_tokens = 1_000_000
