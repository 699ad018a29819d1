"""Instruction tuning of the embedded base: 2,000 solved word problems and some
conversations of other kinds.

Small batches: with 16 rows a step, half the steps, 58 % of the problems were solved, with 8 rows 75 %."""

name = "sft"
model = "out/base"
data = "arithmetic@2000,instructions@600"

epochs = 4.0
batch_size = 8
learning_rate = 2e-3
warmup_steps = 80
eval_every = 100
save_every = 100
