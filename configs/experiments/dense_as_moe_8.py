baseline = "configs/experiments/baseline.py"
hypothesis = (
    "A dense model with all the parameters of eight experts is better than they are, and much slower."
)

d_ff = 8 * 352
