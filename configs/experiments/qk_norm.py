baseline = "configs/experiments/baseline.py"
hypothesis = "Normalised queries and keys change little at a safe learning rate. Equal parameters."

qk_norm = True
