baseline = "configs/experiments/baseline.py"
hypothesis = (
    "Sixteen heads of eight dimensions are too narrow to tell tokens apart. Equal parameters and FLOPs."
)

n_heads = 16
