baseline = "configs/experiments/baseline.py"
hypothesis = (
    "Learned positions lose to RoPE while the tokens seen are few. Equal FLOPs, 16,384 more parameters."
)

positions = "learned"
