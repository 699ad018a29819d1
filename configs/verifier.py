"""A channel for the embedded word problems: the instruction-tuned model, taught to tell a problem from its
answer.
"""

name = "verifier"
model = "out/dpo"
start = "out/sft"
task = "arithmetic"
gold = 3000  # those that SFT has seen
problems = 8000
n = 4

epochs = 1.0
batch_size = 16
learning_rate = 2e-3
warmup_steps = 40
eval_every = 200
save_every = 200
