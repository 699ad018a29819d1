baseline = "configs/experiments/baseline.py"
hypothesis = "SiLU without a gate is as good as GELU: it is the gate that gains. Equal parameters."

ffn = "silu"
d_ff = 528
