"""Instruction tuning of the embedded base: 2,750 solved word problems, some conversations of other kinds, and
a few stories, so that it does not forget how to tell them.
"""

name = "sft"
model = "out/base"
data = "arithmetic@2750,instructions@600,storyworld@300"

epochs = 4.0
batch_size = 8
learning_rate = 2e-3
warmup_steps = 80
eval_every = 100
save_every = 100
