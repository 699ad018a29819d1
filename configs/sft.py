"""Instruction tuning of the embedded base: three word problems for every conversation of other kinds."""

name = "sft"
model = "out/base"
data = "arithmetic@2000,instructions@600"

epochs = 4.0
batch_size = 8
learning_rate = 2e-3
warmup_steps = 80
eval_every = 100
save_every = 100
