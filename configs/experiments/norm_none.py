baseline = "configs/experiments/baseline.py"
hypothesis = "Without normalisation this learning rate diverges, or a worse loss remains. Equal FLOPs."

norm = "none"
