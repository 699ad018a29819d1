baseline = "configs/experiments/baseline.py"
hypothesis = "A causal mask alone tells something of order: worse than RoPE, not by much. Equal parameters."

positions = "none"
