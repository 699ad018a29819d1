"""Parameters, FLOPs and bytes of a model, computed from its config before it is built.

    count_parameters(config)["total"]
    estimate_memory(config, micro_batch=16)["peak"]                           # of a training step
    generation_bytes(shape_of(config), rows=256, prompt=300, new=128)         # without the weights

Tests compare these bytes with the tensors that are alive while the same shapes run, report/speed.md with a
GPU. Sizes are bytes an element: 2 for bfloat16, 4 for float32, which is taken to be a CPU's.
"""

import math
from dataclasses import dataclass

from model import ModelConfig

GIB = 2**30
CUDA_CONTEXT = 0.55 * GIB
FRAGMENTATION = 0.06  # of its bytes the CUDA allocator loses between blocks


def count_parameters(c: ModelConfig) -> dict[str, int]:
    """Parameters by kind; `total`, and `active`: those that one token meets (an MoE skips most experts)."""
    d = c.d_model
    gates = 2 if c.ffn in ("swiglu", "moe") else 1
    experts = len(c.moe_layers)
    dense = c.n_layers - experts
    ffn = (gates + 1) * d * c.d_ff
    attention = 2 * d * c.head_dim * (c.n_heads + c.n_kv_heads)
    embedding = c.vocab_size * d
    norm = {"rms": 1, "layer": 2, "none": 0}[c.norm] * d
    small = c.n_layers * (2 * norm + 2 * c.head_dim * c.qk_norm + c.n_heads * c.n_sinks)
    if c.norm_position == "pre":
        small += norm
    if c.bias:
        small += c.n_layers * (c.head_dim * (c.n_heads + 2 * c.n_kv_heads) + d) + dense * (gates * c.d_ff + d)
    counts = {
        "embedding": embedding,
        "head": 0 if c.tie_embeddings else embedding,
        "positions": c.context_length * d if c.positions == "learned" else 0,
        "attention": c.n_layers * attention,
        "ffn": dense * ffn + experts * c.n_experts * (ffn + d),  # with a router's row an expert
        "norms_and_biases": small,
    }
    total = sum(counts.values())
    skipped = experts * ffn * (c.n_experts - c.experts_per_token)
    return counts | {"total": total, "active": total - skipped}


def estimate_flops(c: ModelConfig, context_length: int = 0) -> float:
    """FLOPs of training on one token: 6 per matrix weight it meets + 12 L H D T for attention (PaLM, appendix
    B).

    Forward is a third of it. Attention is counted over the full T x T square, as everybody does for MFU,
    although the causal half could be skipped. Linear attention reads a chunk of 64 and a D x D matrix.
    """
    n = count_parameters(c)
    skipped = n["total"] - n["active"]
    matrices = n["attention"] + n["ffn"] - skipped + c.vocab_size * c.d_model
    keys = context_length or c.context_length
    if c.attention_kind == "linear" and c.sees_all:
        keys = min(keys, 64) + c.head_dim
    return 6 * matrices + 12 * c.n_layers * c.n_heads * c.head_dim * keys


# -----------------------------------------------------------------------------
# Peak memory of a training step


def kept_by_layer(c: ModelConfig, rows: int, T: int, size: int, compiled: bool, moe: bool) -> float:
    """Bytes that a layer, dense or with experts (`moe`), keeps for its backward pass.

    On a CPU LayerNorm makes no copy in float32. Compiled, a layer also keeps the joined projections' output
    and queries and keys before RoPE. Not counted: x / rms(x), which a GPU keeps too in float32, and a CPU
    not (`NormInFewPasses`).
    """
    d = c.d_model
    half = size == 2
    qk = (c.n_heads + c.n_kv_heads) * c.head_dim  # width of queries and keys, and of values and outputs
    norms = {  # inputs and outputs
        "none": 2,
        "rms": 4,
        "layer": 6 if half else 4,
    }
    width = norms[c.norm] * d  # elements of one token
    width += (3 if compiled else 2) * qk
    if c.qk_norm:
        width += qk
    if c.attention_kind == "linear":  # elu(x) + 1, sums of rows, keys and values of every head
        width += c.head_dim * (6 * c.n_heads - 2 * c.n_kv_heads)
    gated = c.ffn in ("swiglu", "moe")
    ffn = (4 if gated else 2) * c.d_ff  # gate, SiLU(gate), up, product
    if moe:  # inputs and outputs of the experts; what the router reads, in float32
        ffn *= experts_per_token(c)
        width += d * (experts_per_token(c) + 2 * c.experts_per_token + 2 * half)
    bytes_of_token = size * (width + ffn) + 8 + 4 * c.n_heads
    return rows * T * bytes_of_token + kept_scores(c, rows, T, half)


def kept_scores(c: ModelConfig, rows: int, T: int, half: bool) -> int:
    """Bytes of the attention weights that a layer keeps; fused kernels keep none."""
    of_a_key = 4 * rows * c.n_heads * T  # one key, every query, float32
    if c.attention_kind == "linear" and c.sees_all:  # of each chunk the weights and the D x D matrix
        return of_a_key * (min(T, 64) + c.head_dim**2 // 64)
    keys = 0
    if not half and not c.n_sinks and T <= 1024:  # AttentionInBlocks
        keys = min(T, (T + 128) // 2)
    if c.n_sinks or c.attention_kind == "linear":  # every score: as it is, as float32 weight, as weight
        keys += 3 * T
    return of_a_key * keys


def experts_per_token(c: ModelConfig) -> float:
    """Experts' work for a token (1 without): the fullest gets a quarter more tokens than its share."""
    return c.experts_per_token * (c.capacity_factor or 1.25) if c.ffn == "moe" else 1


def estimate_memory(
    c: ModelConfig,
    micro_batch: int,
    context_length: int = 0,
    *,
    gradient_checkpointing: bool = False,
    bytes_per_activation: int = 2,
    muon: bool = False,
    compiled: bool = False,
    trained: int | None = None,
    four_bit: bool = False,
) -> dict[str, int]:
    """Bytes of one training step by kind, and their `peak`; report/speed.md compares it with a GPU.

    `trained`: parameters of an adapter; the frozen weights then have no gradients and moments (in `four_bit`
    only the embedding stays float32). Checkpointing keeps the input of a layer alone and the activations of
    one layer at a time; compiled, the backward pass returns all gradients at its end, while those of earlier
    micro-batches wait to be added to. `temporary` is the larger of what the loss needs, 8 bytes per logit of
    a chunk of 4,096 tokens (4 when compiled), and of a layer's backward pass. `workspaces` are cuBLAS's.
    `overhead` is no tensor: the CUDA context, and what the allocator loses. A CPU has neither context nor
    workspaces.
    """
    n = count_parameters(c)
    d = c.d_model
    size = bytes_per_activation
    half = size == 2
    T = context_length or c.context_length
    N = micro_batch * T
    stream = size * N * d  # bytes of the residual stream
    matrices = n["attention"] + n["ffn"]
    kept = [kept_by_layer(c, micro_batch, T, size, compiled, i in c.moe_layers) for i in range(c.n_layers)]
    copies = 2 * matrices if half else 0  # autocast's bfloat16 weights
    backward = 2 * stream + 2 * size * N * c.d_ff * experts_per_token(c)
    if not gradient_checkpointing:
        activations = sum(kept) + copies
    else:
        activations = c.n_layers * stream
        activations += copies + 4 * n["total"] if compiled else copies // c.n_layers
        backward += max(kept)
    logits = c.vocab_size * min(4096, N)
    loss = (4 if compiled and half else 8) * logits

    learns = n["total"] if trained is None else trained
    frozen = 0 if trained is None else 4 * n["total"]
    if four_bit:
        frozen = 4 * n["embedding"] + 0.6 * (n["total"] - n["embedding"])
    head = (6 if half else 4) * c.vocab_size * d  # its float32 gradient, and its cast
    parts = {
        "weights": frozen + 4 * learns,
        "gradients": 4 * learns,
        "optimizer": 8 * learns - 4 * matrices * muon,
        "activations": activations + 3 * stream,  # the last norm's input, output and the latter's gradient
        "temporary": max(loss, backward) + head,
        "workspaces": 0.06 * GIB * half,
    }
    parts["overhead"] = CUDA_CONTEXT * half + FRAGMENTATION * sum(parts.values())
    parts = {kind: int(size) for kind, size in parts.items()}
    return parts | {"peak": sum(parts.values())}


# -----------------------------------------------------------------------------
# Peak memory of generation, and of a batch of likelihoods


@dataclass(frozen=True)
class Shape:
    """A model, as far as it determines the memory of a forward pass."""

    c: ModelConfig
    kind: str  # "causal", "seq2seq" (half of the layers are the encoder's) or "head"
    ours: bool  # True: computed by model.py; False: by transformers


def shape_of(config, kind: str = "causal") -> Shape:
    """The Shape of a ModelConfig, or of a transformers config, whose model transformers computes."""
    ours = isinstance(config, ModelConfig)
    return Shape(config if ours else config_of_hub(config), kind, ours)


def config_of_hub(config) -> ModelConfig:
    """The sizes in a transformers config, whose families name some of them differently."""
    config = config.get_text_config(decoder=True)

    def first(*names: str, default: int):
        return next((found for name in names if (found := getattr(config, name, None))), default)

    heads = first("num_attention_heads", default=1)  # Mamba has none
    return ModelConfig(
        config.vocab_size,
        n_layers=config.num_hidden_layers + first("num_decoder_layers", default=0),
        d_model=config.hidden_size,
        n_heads=heads,
        n_kv_heads=first("num_key_value_heads", default=heads),
        head_dim=first("head_dim", default=config.hidden_size // heads),
        d_ff=first("intermediate_size", "n_inner", "d_ff", default=4 * config.hidden_size),
        ffn="swiglu" if first("hidden_act", default="") == "silu" else "gelu",
        positions="none",  # whatever they are, they take no memory
    )


def kv_cache_bytes(c: ModelConfig, tokens: int, rows: int = 1, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values of `rows` sequences of `tokens` tokens."""
    return 2 * c.n_layers * c.n_kv_heads * c.head_dim * tokens * rows * bytes_per_value


def activation_bytes(s: Shape, rows: int, length: int, size: int, on_cpu: bool = False) -> int:
    """Peak bytes of one layer on (rows, length) tokens without gradients: the larger of its two sub-layers.

    Feed-forward: the layer's input, the residual stream after attention, its norm, the temporaries of width
    d_ff and the output; a transformers decoder also keeps the embeddings of tokens and positions. Attention:
    the same streams; queries, keys and values, rotated queries and keys (transformers keeps both), the output
    and its transposed copy. Fused kernels do not materialise scores. transformers also allocates a mask of
    (rows, T, T) booleans and casts it. T5 adds a position bias (rows, H, T, T) to the mask, and makes a
    transposed copy of the sum while queries, keys and values are alive.
    """
    c = s.c
    N = rows * length
    q = c.n_heads * c.head_dim
    kv = c.n_kv_heads * c.head_dim
    pairs = rows * length**2  # of a query and a key
    streams = 4 if s.ours or s.kind == "seq2seq" else 6
    gated = c.ffn in ("swiglu", "moe")
    wide = 4  # of width d_ff: gate, up, silu(gate), product; in transformers a GELU that is computed in steps
    if s.ours and not gated:
        wide = 2  # up, gelu(up)
    elif not s.ours and gated and s.kind != "seq2seq":
        wide = 3  # Llama
    ffn = streams * c.d_model + wide * c.d_ff * experts_per_token(c)  # elements of one token
    attention = (streams - 1) * c.d_model + 3 * q + 2 * kv
    scores = 0  # bytes
    if s.kind == "seq2seq":
        attention -= 2 * q
        scores = 2 * size * c.n_heads * pairs
    elif not s.ours:
        attention += q + kv
        scores = size * pairs
    elif c.n_sinks or c.attention_kind == "linear":
        if c.n_sinks or not c.sees_all:  # scores, float32 weights, weights
            scores = 3 * 4 * c.n_heads * pairs
    elif on_cpu:  # AttentionInBlocks: scores of 128 queries, their softmax, and that of the 128 before
        attention += 2 * kv
        keys = 2 * length + max(0, length - 128)
        scores = size * rows * c.n_heads * min(128, length) * keys
    mask = 0 if s.ours else pairs
    return max(size * N * ffn, size * N * attention + scores) + mask


def generation_bytes(
    s: Shape, rows: int, prompt: int, new: int, n: int = 1, size: int = 2, sampled: bool = False,
    on_cpu: bool = False,
) -> int:  # fmt: skip
    """Peak bytes, without the weights, of continuing prompts of at most `prompt` tokens by `new` tokens.

    rows: sequences, n for each prompt. The peak is the larger of the prefill and the last steps, which need
    the keys and values so far (`before`, `full`) and either a step or a copy of a layer's keys. Logits exist
    as computed and in float32; sampling adds probabilities in float32, in float64 and cumulative.

    model.py allocates its cache at once; on a CPU the n samples of a prompt share its keys, and slots for new
    tokens are added as needed. On a GPU keys are repeated, and a step is recorded as a CUDA graph, whose
    logits stay allocated. In transformers every row computes its own prompt, old and new keys are joined, and
    with GQA repeated. An encoder-decoder also stores keys and values of the prompt for every decoder layer.
    """
    c = s.c
    layers = c.n_layers // 2 if s.kind == "seq2seq" else c.n_layers
    of_token = 2 * layers * c.n_kv_heads * c.head_dim * size
    prompts = math.ceil(rows / n) if s.ours else rows
    prefill = activation_bytes(s, prompts, prompt, size, on_cpu)
    values = rows * c.vocab_size
    logits = values * (size + 4)
    if sampled:
        logits += values * (4 + 8 + 8)
    elif not s.ours:
        logits += values * 8
    step = activation_bytes(s, rows, 1, size) + logits
    if not s.ours:
        before = rows * prompt * of_token
        full = rows * (prompt + new) * of_token
        copy = full / layers * max(1, c.n_heads // c.n_kv_heads)
        if s.kind == "seq2seq":
            before = 0
            full += rows * prompt * c.d_model * size
        elif c.n_heads == c.n_kv_heads:
            copy /= 2
    else:
        slots = 8 * math.ceil((prompt + new) / 8)
        before = prompts * slots * of_token
        full = rows * slots * of_token
        if on_cpu:
            step += 4 * 4 * rows * c.n_heads * slots  # scores: as computed, masked, joined, softmax
            if c.plain_attention:  # SharedPromptCache
                before = prompts * prompt * of_token
                full = before + rows * 32 * math.ceil(new / 32) * of_token
        else:
            step += logits
        if c.n_sinks or c.attention_kind == "linear":
            # Scores, float32 weights, weights; keys or values widened to all query heads: for the linear kind
            # also elu(k) and elu(k) + 1.
            copies = 2 if c.n_sinks else 4
            step += rows * c.n_heads * slots * (copies * c.head_dim * size + 3 * 4)
        copy = full / layers
    return int(max(before + prefill, full + max(step, copy)))


def likelihood_bytes(s: Shape, rows: int, length: int, size: int = 2, on_cpu: bool = False) -> int:
    """Peak bytes, without the weights, of log-likelihoods of (rows, length) tokens.

    The logits of all tokens exist as computed, in float32, and as float32 log-probabilities. A
    classification head has none, but transformers keeps an unused cache. An encoder-decoder encodes and
    decodes `length` tokens.
    """
    c = s.c
    layer = activation_bytes(s, rows, length, size, on_cpu)
    if s.kind == "head":
        return layer + kv_cache_bytes(c, length, rows, size)
    N = rows * length
    hidden = 2 * N * c.d_model * size
    each = size + (4 if size == 4 else 8)
    logits = N * c.vocab_size * each
    if s.kind == "seq2seq":  # a decoder layer also stores the encoder's keys and values
        layer += N * (c.d_model + 2 * c.n_heads * c.head_dim) * size
    return max(layer, hidden + logits)
