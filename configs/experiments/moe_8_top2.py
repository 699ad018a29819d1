baseline = "configs/experiments/baseline.py"
hypothesis = (
    "Eight experts of half the width, two a token: the best of the mixtures at equal active parameters."
)

ffn = "moe"
n_experts = 8
experts_per_token = 2
d_ff = 176
capacity_factor = 1.5
