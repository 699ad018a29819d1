"""Instruction tuning of the embedded base: 2,000 solved word problems and some conversations of other kinds.

Small batches: 16 rows a step, half the steps, solved 58 % of the test problems, 8 rows 75 % (one seed each).
"""

name = "sft"
model = "out/base"
data = "arithmetic@2000,instructions@600"

epochs = 4.0
batch_size = 8
learning_rate = 2e-3
warmup_steps = 80
eval_every = 100
save_every = 100
