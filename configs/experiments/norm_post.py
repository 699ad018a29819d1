baseline = "configs/experiments/baseline.py"
hypothesis = "Normalising after the residual addition (2017) learns more slowly at four layers. Equal FLOPs."

norm_position = "post"
