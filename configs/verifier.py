"""A channel for the embedded word problems: the base trained backwards."""

name = "verifier"
model = "out/dpo"
start = "out/base"
task = "arithmetic"
gold = 2000  # those that SFT has seen
problems = 1500

epochs = 2.0
batch_size = 32
learning_rate = 2e-3
warmup_steps = 40
eval_every = 100
save_every = 100
