"""DPO on policy for the embedded word problems: log-loss of a right answer of the model's own, and where
it also has a wrong one, DPO at the first token where the two part.
"""

name = "dpo"
model = "out/sft"
data = "arithmetic"
problems = 5000
n = 4  # answers; the verifier learns from the same ones
hypothesis = "Pairs of the model's own answers raise greedy accuracy over SFT."

beta = 0.5
nll = 30.0
epochs = 1.25
batch_size = 16
learning_rate = 3e-4
warmup_steps = 40
eval_every = 150
save_every = 150
