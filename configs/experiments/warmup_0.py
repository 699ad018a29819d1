baseline = "configs/experiments/baseline.py"
hypothesis = "Without warmup AdamW's first steps are too large: a little worse."

warmup_steps = 0
