"""A verifier for GSM8K: smol_sft.py's model, taught to tell a problem from its answer.

With --kind=head it is the published baseline (Cobbe et al., 2021), taught by the same answers.
"""

name = "smol-verifier"
model = "out/smol-sft"
start = "out/smol-sft"
task = "gsm8k"
gold = 2000
first_problem = 0
problems = 600  # the same answers as DPO's
n = 8
held_n = 8
validation_problems = 150
test_problems = 50  # a first look: run_all.sh measures it on 300
hypothesis = "On real problems a channel chooses better than majority, greedy and the published head."

epochs = 1.0
batch_size = 4
grad_accum_steps = 4
context_length = 512
learning_rate = 5e-4
warmup_steps = 20
eval_every = 100
save_every = 100
