"""Parameters, FLOPs and bytes of a model, known from its config before it is built."""

from model import ModelConfig


def count_parameters(c: ModelConfig) -> dict[str, int]:
    """Parameters by kind; `total`, and `active`: those that one token meets (an MoE skips most experts)."""
    attention = 2 * c.d_model * c.head_dim * (c.n_heads + c.n_kv_heads)
    ffn = c.d_model * c.d_ff * (3 if c.ffn in ("swiglu", "moe") else 2)
    bias = 0
    with_experts = len(c.moe_layers)
    if c.bias:
        bias = c.n_layers * (c.head_dim * (c.n_heads + 2 * c.n_kv_heads) + c.d_model)
        ffn_bias = (2 if c.ffn in ("swiglu", "moe") else 1) * c.d_ff + c.d_model
        bias += (c.n_layers - with_experts) * ffn_bias
    norm = {"rms": 1, "layer": 2, "none": 0}[c.norm] * c.d_model
    small = 2 * norm + 2 * c.head_dim * c.qk_norm + c.n_heads * c.n_sinks
    router = c.d_model * c.n_experts
    embedding = c.vocab_size * c.d_model
    counts = {
        "embedding": embedding,
        "head": 0 if c.tie_embeddings else embedding,
        "positions": c.context_length * c.d_model if c.positions == "learned" else 0,
        "attention": c.n_layers * attention,
        "ffn": (c.n_layers - with_experts) * ffn + with_experts * (c.n_experts * ffn + router),
        "norms_and_biases": bias + c.n_layers * small + norm * (c.norm_position == "pre"),
    }
    total = sum(counts.values())
    idle = with_experts * ffn * (c.n_experts - c.experts_per_token)
    return counts | {"total": total, "active": total - idle}


def estimate_flops(c: ModelConfig, context_length: int = 0) -> float:
    """FLOPs of training on one token: 6 per matrix weight it meets + 12 L H D T for attention (PaLM, appendix
    B).

    Forward is a third of it. Attention is counted over the full T x T square, as everybody does for MFU,
    although the causal half could be skipped. Linear attention reads a chunk of 64 and a D x D matrix.
    """
    n, T = count_parameters(c), context_length or c.context_length
    matrices = n["attention"] + n["ffn"] - (n["total"] - n["active"]) + c.vocab_size * c.d_model
    reads = min(T, 64) + c.head_dim if c.attention_kind == "linear" and c.sees_all else T
    return 6 * matrices + 12 * c.n_layers * c.n_heads * c.head_dim * reads


def estimate_memory(
    c: ModelConfig,
    micro_batch: int,
    context_length: int = 0,
    *,
    gradient_checkpointing: bool = False,
    bytes_per_activation: int = 2,
    muon: bool = False,
    compiled: bool = False,
    loss_chunk: int = 4096,
) -> dict[str, int]:
    """Bytes of one training step by kind, and their `peak`; report/speed.md holds it against a card.

    A layer keeps 8 d + 4 (H + K) D + 8 f + 8 + 4 H bytes a token in bfloat16: the inputs of both norms and
    what they give; queries, keys, values and outputs; gate, SiLU(gate), up and their product. Compiled, it
    also keeps what the joined projections gave, queries and keys before they were turned. Checkpointing keeps
    a layer's input alone and one layer's activations at a time; compiled, the backward pass hands over all
    gradients at its end, while those of earlier micro-batches wait to be added to. `temporary` is the larger
    of what the loss needs, 8 bytes of every logit of a chunk (4 when compiled), and what the backward pass of
    a layer does. An expert's room is that of the fullest one: a quarter more than its share is assumed.
    `workspaces` are cuBLAS's. `overhead` is no tensor: 0.55 GiB of CUDA context, and 6 % that the allocator
    loses between blocks. float32 activations are taken to be a CPU's, which has neither context nor
    workspaces, but whose RMSNorm keeps x / rms(x) as well, and attention its weights up to the diagonal.
    """
    n, d, L = count_parameters(c), c.d_model, c.n_layers
    T = context_length or c.context_length
    N = micro_batch * T
    half = bytes_per_activation == 2
    qk = (c.n_heads + c.n_kv_heads) * c.head_dim  # width of queries and keys, and of values and outputs
    units, extra = c.d_ff, 0.0
    hidden = (8 if c.ffn in ("swiglu", "moe") else 4) * c.d_ff
    if c.ffn == "moe":
        experts = c.experts_per_token * (c.capacity_factor or 1.25)
        units = c.d_ff * experts
        extra = 8 * (units - c.d_ff)  # what a layer with experts keeps beside a dense one's: their width,
        # their input, what they give, and in float32 what the router reads
        extra += 2 * d * experts + 4 * d * c.experts_per_token + 4 * d * half
        extra *= N * (1 if half else 2)
    norms = {"none": 4, "rms": 8, "layer": 12 if half else 8}[c.norm] * d  # autocast: LayerNorm in float32
    width = norms + (6 if compiled else 4) * qk + hidden + 2 * qk * c.qk_norm
    if c.norm == "rms" and not half:
        width += 4 * d + 2 * qk * c.qk_norm
    linear = c.attention_kind == "linear"
    if linear:  # elu(x) + 1 of queries and keys, sums of rows; keys and values of every query head
        width += 2 * c.head_dim * (6 * c.n_heads - 2 * c.n_kv_heads)
    layer = int(N * (width * (1 if half else 2) + 8 + 4 * c.n_heads))
    if linear and c.sees_all:  # of each chunk the weights and the D x D matrix
        layer += 4 * N * c.n_heads * (min(T, 64) + c.head_dim**2 // 64)
    elif not half and not c.n_sinks and T <= 1024:  # AttentionInBlocks; behind a mask it keeps all weights
        seen = (T + 64) // 2 if c.sees_all else T
        layer += 4 * micro_batch * c.n_heads * T * min(T, seen)
    if c.n_sinks or (linear and not c.sees_all):  # every score: as it is, as float32 weight, as weight
        layer += 3 * 4 * micro_batch * c.n_heads * T * T
    copies = 2 * (n["attention"] + n["ffn"]) if half else 0  # autocast's bfloat16 weights
    ends = 3 * bytes_per_activation * N * d  # the last norm's input, what it gives, and the gradient of that
    loss = (4 if compiled and half else 8) * c.vocab_size * min(loss_chunk, N)
    backward = int(bytes_per_activation * N * (2 * units + 2 * d))
    head = (4 + 2 * half) * c.vocab_size * d  # its float32 gradient, and its cast
    if gradient_checkpointing:
        activations = bytes_per_activation * L * N * d + ends
        activations += copies + 4 * n["total"] if compiled else copies // L
        backward += layer + int(extra)
    else:
        activations = L * layer + int(len(c.moe_layers) * extra) + ends + copies
    parts = {
        "weights": 4 * n["total"],
        "gradients": 4 * n["total"],
        "optimizer": 8 * n["total"] - (4 * (n["attention"] + n["ffn"]) if muon else 0),
        "activations": activations,
        "temporary": max(loss, backward) + head,
        "workspaces": int(0.06 * 2**30) * half,
    }
    overhead = 0.06 * sum(parts.values()) + 0.55 * 2**30 * half
    return parts | {"overhead": int(overhead), "peak": sum(parts.values()) + int(overhead)}


def kv_cache_bytes(c: ModelConfig, tokens: int, rows: int = 1, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values of `rows` sequences of `tokens` tokens."""
    return 2 * c.n_layers * c.n_kv_heads * c.head_dim * tokens * rows * bytes_per_value
