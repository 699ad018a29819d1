baseline = "configs/experiments/baseline.py"
hypothesis = (
    "One key-value head for four query heads: a quarter of the cache, a slightly worse loss. "
    "d_ff makes up for the parameters."
)

n_kv_heads = 1
d_ff = 416  # as many parameters as the baseline
