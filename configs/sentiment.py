"""The embedded stand-in for SST-2: our base learns with LoRA whether a review is good or bad."""

task = "sentiment"
model = "out/base"
lora_r = 16

epochs = 3.0
batch_size = 32
learning_rate = 3e-3  # a base of 1.6M parameters bears, and needs, ten times what GPT-2 does
warmup_steps = 20
eval_every = 125
save_every = 125
