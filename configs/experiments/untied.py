baseline = "configs/experiments/baseline.py"
hypothesis = (
    "A head of its own helps little where the vocabulary is small. Equal FLOPs, 131,072 more parameters."
)

tie_embeddings = False
