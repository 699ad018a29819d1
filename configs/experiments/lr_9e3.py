baseline = "configs/experiments/baseline.py"
hypothesis = "Three times the learning rate is near the best, or just past it."

learning_rate = 9e-3
