"""Instruction tuning of the embedded base: 3,500 solved word problems, some conversations of other kinds, and
a few stories, so that it does not forget how to tell them.

Small batches: as many tokens in batches of 8 rows left it 7 points behind (report/alignment.md).
"""

name = "sft"
model = "out/base"
data = "arithmetic@3500,instructions@600,storyworld@300"
hypothesis = "Solved problems teach the base to solve new ones; a few stories keep what it knew."

epochs = 3.0
batch_size = 4
learning_rate = 1.2e-3
warmup_steps = 80
eval_every = 400
save_every = 200
