baseline = "configs/experiments/baseline.py"
hypothesis = "Muon learns faster a token than AdamW; its step costs a little more."

optimizer = "muon"
learning_rate = 6e-3
