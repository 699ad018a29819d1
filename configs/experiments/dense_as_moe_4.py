baseline = "configs/experiments/baseline.py"
hypothesis = "A dense model with all the parameters of four experts is better than they are, and slower."

d_ff = 4 * 352
