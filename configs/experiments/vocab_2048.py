baseline = "configs/experiments/baseline.py"
hypothesis = "Longer tokens: more bytes seen for the same number of tokens, so fewer bits a byte."

vocab_size = 2048
