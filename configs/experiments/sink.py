baseline = "configs/experiments/baseline.py"
hypothesis = "One learned sink a head costs no loss, and lets a stream forget its first tokens."

n_sinks = 1
