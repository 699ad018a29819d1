baseline = "configs/experiments/baseline.py"
hypothesis = "Centring and a bias add nothing over RMSNorm: the same loss, a slower step. Equal FLOPs."

norm = "layer"
