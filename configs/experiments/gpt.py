baseline = "configs/experiments/baseline.py"
hypothesis = "A GPT by nanoGPT's recipe is what modern.py has to beat in time. Equal FLOPs."

norm = "layer"
positions = "learned"
ffn = "gelu"
d_ff = 528
optimizer = "adamw"
schedule = "cosine"
learning_rate = 6e-3  # nanoGPT's 1e-3 ends at 2.53 nats, 3e-3 at 1.78, this at 1.66, 1.2e-2 at 2.15
min_lr = 6e-4
warmup_steps = 80

eval_every = 40  # how far is it when?
eval_tokens = 65_536
