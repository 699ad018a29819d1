"""The base of the family `transfer`: it reads stories and numbers (lab/experiments.py gives --corpus)."""

baseline = "configs/cpu.py"

max_steps = 480
warmup_steps = 48
eval_every = 0
save_every = 0
final_eval_tokens = 20_000
sample_tokens = 0
