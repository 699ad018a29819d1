baseline = "configs/experiments/baseline.py"
hypothesis = "Warmup, a constant rate and a short decay end where the cosine ends."

schedule = "wsd"
