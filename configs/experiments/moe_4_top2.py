baseline = "configs/experiments/baseline.py"
hypothesis = "Two experts of half the width a token: better than one, at equal active parameters."

ffn = "moe"
n_experts = 4
experts_per_token = 2
d_ff = 176
capacity_factor = 1.5
