"""DPO on GSM8K: pairs of what smol_sft.py's model answers to its own training problems."""

name = "smol-dpo"
model = "out/smol-sft"
data = "gsm8k"
first_problem = 0
problems = 600
n = 8
hypothesis = "Pairs of the model's own answers raise greedy accuracy over SFT on real problems, too."

beta = 0.5
nll = 30.0
epochs = 3.0  # the model solves few problems: 58 of the first 400 have a right answer among eight
batch_size = 4
context_length = 512
learning_rate = 2e-4
warmup_steps = 5
eval_every = 40
save_every = 40
eval_examples = 100
