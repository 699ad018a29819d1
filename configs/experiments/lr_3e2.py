baseline = "configs/experiments/baseline.py"
hypothesis = "Ten times the learning rate is past the edge of stability."

learning_rate = 3e-2
