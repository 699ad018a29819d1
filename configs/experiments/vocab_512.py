baseline = "configs/experiments/baseline.py"
hypothesis = "Shorter tokens: fewer bytes seen for the same number of tokens, so more bits a byte."

vocab_size = 512
