baseline = "configs/experiments/baseline.py"
hypothesis = (
    "Experts in every second block, one a token: worse than the dense model of equal active parameters, "
    "but by less than with experts in every block (moe_4_top1)."
)

ffn = "moe"
n_experts = 4
experts_per_token = 1
moe_every = 2
capacity_factor = 1.5
