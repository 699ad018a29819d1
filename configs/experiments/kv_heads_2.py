baseline = "configs/experiments/baseline.py"
hypothesis = "Two key-value heads: half the cache, no loss. d_ff makes up for the parameters."

n_kv_heads = 2
d_ff = 395  # as many parameters as the baseline
