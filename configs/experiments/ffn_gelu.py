baseline = "configs/experiments/baseline.py"
hypothesis = "SwiGLU beats GELU at equal parameters."

ffn = "gelu"
d_ff = 528
