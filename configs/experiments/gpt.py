baseline = "configs/experiments/baseline.py"
hypothesis = "A GPT by nanoGPT's recipe is what modern.py has to beat in time. Equal FLOPs."

norm = "layer"
positions = "learned"
ffn = "gelu"
d_ff = 528
optimizer = "adamw"
schedule = "cosine"
learning_rate = 6e-3  # the best of four: 2.53 nats with nanoGPT's 1e-3, 1.78 with 3e-3, 1.66, 2.15 with 1.2e-2
min_lr = 6e-4
warmup_steps = 80

eval_every = 40  # how far is it when?
eval_tokens = 65_536
