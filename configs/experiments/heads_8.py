baseline = "configs/experiments/baseline.py"
hypothesis = "Twice the heads of half the width: no difference. Equal parameters and FLOPs."

n_heads = 8
