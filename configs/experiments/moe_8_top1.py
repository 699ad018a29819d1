baseline = "configs/experiments/baseline.py"
hypothesis = "Eight experts: better than four, if the router keeps them all busy."

ffn = "moe"
n_experts = 8
experts_per_token = 1
capacity_factor = 1.5
