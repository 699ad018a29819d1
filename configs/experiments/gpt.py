baseline = "configs/experiments/baseline.py"
hypothesis = "A GPT by nanoGPT's recipe is what modern.py has to beat in time. Equal FLOPs."

norm = "layer"
positions = "learned"
ffn = "gelu"
d_ff = 528
optimizer = "adamw"
schedule = "cosine"
learning_rate = 1e-3
min_lr = 1e-4
warmup_steps = 80

eval_every = 40  # how far is it when?
eval_tokens = 65_536
