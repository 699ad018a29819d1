baseline = "configs/experiments/baseline.py"
hypothesis = "A third of the learning rate is too slow for so few steps."

learning_rate = 1e-3
