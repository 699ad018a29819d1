baseline = "configs/experiments/baseline.py"
hypothesis = "Four experts, one a token: better than the dense model of equal active parameters."

ffn = "moe"
n_experts = 4
experts_per_token = 1
capacity_factor = 1.5
