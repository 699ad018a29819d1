"""Parameters, FLOPs and bytes of a model, computed from its config before it is built.

    count_parameters(config)["total"]
    estimate_memory(config, micro_batch=16)["peak"]                           # of a training step
    generation_bytes(shape_of(config), rows=256, prompt=300, new=128)         # without the weights

`tests/test_memory.py` compares the bytes of generation and of likelihoods with the tensors that are alive
while the same shapes run; `tests/test_model.py` those of training with what autograd keeps; report/speed.md
both with a GPU. Sizes are bytes an element: 2 for bfloat16, 4 for float32.
"""

import math
from dataclasses import dataclass

import torch

from model import ModelConfig

GIB = 2**30
CUDA_CONTEXT = 0.55 * GIB
FRAGMENTATION = 0.06  # of its bytes the CUDA allocator loses between blocks


def count_parameters(c: ModelConfig) -> dict[str, int]:
    """Parameters by kind; `total`, and `active`: those that one token meets (an MoE skips most experts)."""
    gated = c.ffn in ("swiglu", "moe")
    experts = len(c.moe_layers)
    dense = c.n_layers - len(c.moe_layers)
    ffn = c.d_model * c.d_ff * (3 if gated else 2)
    norm = {"rms": 1, "layer": 2, "none": 0}[c.norm] * c.d_model
    small = 2 * norm + 2 * c.head_dim * c.qk_norm + c.n_heads * c.n_sinks
    bias = 0
    if c.bias:
        bias = c.n_layers * (c.head_dim * (c.n_heads + 2 * c.n_kv_heads) + c.d_model)
        bias += dense * ((2 if gated else 1) * c.d_ff + c.d_model)
    embedding = c.vocab_size * c.d_model
    counts = {
        "embedding": embedding,
        "head": 0 if c.tie_embeddings else embedding,
        "positions": c.context_length * c.d_model if c.positions == "learned" else 0,
        "attention": c.n_layers * 2 * c.d_model * c.head_dim * (c.n_heads + c.n_kv_heads),
        "ffn": dense * ffn + experts * c.n_experts * (ffn + c.d_model),  # with a router's row an expert
        "norms_and_biases": bias + c.n_layers * small + norm * (c.norm_position == "pre"),
    }
    total = sum(counts.values())
    return counts | {"total": total, "active": total - experts * ffn * (c.n_experts - c.experts_per_token)}


def estimate_flops(c: ModelConfig, context_length: int = 0) -> float:
    """FLOPs of training on one token: 6 per matrix weight it meets + 12 L H D T for attention (PaLM, appendix
    B).

    Forward is a third of it. Attention is counted over the full T x T square, as everybody does for MFU,
    although the causal half could be skipped. Linear attention reads a chunk of 64 and a D x D matrix.
    """
    n = count_parameters(c)
    T = context_length or c.context_length
    matrices = n["attention"] + n["ffn"] - (n["total"] - n["active"]) + c.vocab_size * c.d_model
    reads = min(T, 64) + c.head_dim if c.attention_kind == "linear" and c.sees_all else T
    return 6 * matrices + 12 * c.n_layers * c.n_heads * c.head_dim * reads


# -----------------------------------------------------------------------------
# Peak memory of a training step


def kept_by_layer(c: ModelConfig, rows: int, T: int, size: int, compiled: bool) -> tuple[float, float]:
    """Bytes that a dense layer keeps for its backward pass, and what one with experts keeps beside them.

    float32 (size 4) is taken to be a CPU's, where RMSNorm also keeps x / rms(x), and LayerNorm makes no copy
    in float32. Compiled, a layer also keeps the joined projections' output and queries and keys before RoPE.
    The fullest expert is taken to get a quarter more tokens than its share.
    """
    d = c.d_model
    f = c.d_ff
    half = size == 2
    N = rows * T
    qk = (c.n_heads + c.n_kv_heads) * c.head_dim  # width of queries and keys, and of values and outputs
    rms_copy = c.norm == "rms" and not half
    elements = {  # of one token
        "norms: input and output": {"none": 2, "rms": 4, "layer": 6 if half else 4}[c.norm] * d,
        "norms: x / rms(x)": 2 * d * rms_copy,
        "queries, keys, values, output": (3 if compiled else 2) * qk,
        "queries and keys before their norms": (1 + rms_copy) * qk * c.qk_norm,
        "feed-forward: gate, SiLU(gate), up, product": (4 if c.ffn in ("swiglu", "moe") else 2) * f,
        "linear attention: elu(x) + 1, sums of rows, keys and values of every head": (
            c.head_dim * (6 * c.n_heads - 2 * c.n_kv_heads) * (c.attention_kind == "linear")
        ),
    }
    dense = N * (size * sum(elements.values()) + 8 + 4 * c.n_heads) + kept_scores(c, rows, T, half)
    experts = experts_per_token(c)
    beside = {
        "width": 4 * (f * experts - f), "input": d * experts, "output": 2 * d * c.experts_per_token,
        "what the router reads, in float32": 2 * d * half,
    }  # fmt: skip
    return dense, N * size * sum(beside.values())


def kept_scores(c: ModelConfig, rows: int, T: int, half: bool) -> int:
    """Bytes of the attention weights that a layer keeps; fused kernels keep none."""
    of_a_key = 4 * rows * c.n_heads * T  # one key, every query, float32
    if c.attention_kind == "linear" and c.sees_all:  # of each chunk the weights and the D x D matrix
        return of_a_key * (min(T, 64) + c.head_dim**2 // 64)
    kept = 0
    if (
        not half and not c.n_sinks and T <= 1024
    ):  # AttentionInBlocks: up to the diagonal, but all behind a mask
        kept += of_a_key * (min(T, (T + 64) // 2) if c.sees_all else T)
    if c.n_sinks or c.attention_kind == "linear":  # every score: as it is, as float32 weight, as weight
        kept += 3 * of_a_key * T
    return kept


def experts_per_token(c: ModelConfig) -> float:
    """Experts' work for a token, with the room that the fullest expert needs (1 without experts)."""
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
    `overhead` is no tensor: the CUDA context, and what the allocator loses. A CPU (float32) has neither
    context nor workspaces.
    """
    n = count_parameters(c)
    d = c.d_model
    size = bytes_per_activation
    T = context_length or c.context_length
    N = micro_batch * T
    half = size == 2
    matrices = n["attention"] + n["ffn"]
    dense, beside = kept_by_layer(c, micro_batch, T, size, compiled)
    copies = 2 * matrices if half else 0  # autocast's bfloat16 weights
    ends = 3 * size * N * d  # the last norm's input and output, and the gradient of the latter
    backward = size * N * (2 * c.d_ff * experts_per_token(c) + 2 * d)
    loss = (4 if compiled and half else 8) * c.vocab_size * min(4096, N)
    if gradient_checkpointing:
        activations = size * c.n_layers * N * d + ends
        activations += copies + 4 * n["total"] if compiled else copies // c.n_layers
        backward += dense + (beside if c.ffn == "moe" else 0)
    else:
        activations = c.n_layers * dense + len(c.moe_layers) * beside + ends + copies
    learns = n["total"] if trained is None else trained
    frozen = 0 if trained is None else 4 * n["total"]
    if four_bit:
        frozen = 4 * n["embedding"] + 0.6 * (n["total"] - n["embedding"])
    parts = {
        "weights": frozen + 4 * learns,
        "gradients": 4 * learns,
        "optimizer": 8 * learns - (4 * matrices if muon else 0),
        "activations": activations,
        # of the head: its float32 gradient, and its cast
        "temporary": max(loss, backward) + (4 + 2 * half) * c.vocab_size * d,
        "workspaces": 0.06 * GIB * half,
        "overhead": CUDA_CONTEXT * half,
    }
    parts["overhead"] += FRAGMENTATION * (sum(parts.values()) - parts["overhead"])
    parts = {kind: int(size) for kind, size in parts.items()}
    return parts | {"peak": sum(parts.values())}


# -----------------------------------------------------------------------------
# Peak memory of generation, and of a batch of likelihoods


@dataclass(frozen=True)
class Shape:
    """The properties of a model that determine the memory of a forward pass. Widths are in elements."""

    kind: str  # "causal", "seq2seq" or "head"
    ours: bool  # True: computed by model.py; False: by transformers
    vocab_size: int
    n_layers: int  # of the decoder
    encoder_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    ffn_temporaries: int  # tensors of width d_ff that are alive together in a feed-forward layer
    all_scores: bool = False  # attention sinks or masked linear attention: a prompt's scores are materialised
    shares_prompts: bool = True  # on a CPU the samples of a prompt share its keys (SharedPromptCache)
    cache_copies: int = 0  # decoding: copies of a layer's keys or values, widened to all query heads


def shape_of(config, kind: str = "causal", ours: bool = True) -> Shape:
    """The Shape of a ModelConfig, or of a transformers config (`ours` is then False)."""
    return shape_of_ours(config, kind, ours) if hasattr(config, "n_kv_heads") else shape_of_hub(config, kind)


def shape_of_ours(c: ModelConfig, kind: str, ours: bool) -> Shape:
    """Of a ModelConfig. `ours` is False for a model of the hub that lab/plan.py describes by one: of
    FLAN-T5's layers half are the encoder's.
    """
    gated = c.ffn in ("swiglu", "moe")
    linear = c.attention_kind == "linear"
    temporaries = 4 if gated else 2  # gate, up, silu(gate), product; or up, gelu(up)
    if not ours:  # Llama; and those whose GELU is computed step by step (NewGELUActivation)
        temporaries = 3 if gated and kind != "seq2seq" else 4
    encoder = c.n_layers // 2 if kind == "seq2seq" else 0
    return Shape(
        kind, ours, c.vocab_size, c.n_layers - encoder, encoder, c.d_model, c.n_heads, c.n_kv_heads,
        c.head_dim, d_ff=math.ceil(c.d_ff * experts_per_token(c)), ffn_temporaries=temporaries,
        all_scores=c.n_sinks > 0 or (linear and not c.sees_all), shares_prompts=c.plain_attention,
        cache_copies=4 if linear else 2 if c.n_sinks else 0,  # linear: elu(k) and elu(k) + 1 too
    )  # fmt: skip


def shape_of_hub(config, kind: str) -> Shape:
    """Of a transformers config, whose families name the same numbers differently."""
    config = config.get_text_config(decoder=True)

    def first(*names: str, default=None):
        return next((getattr(config, name) for name in names if getattr(config, name, None)), default)

    d_model = first("hidden_size", "d_model")
    layers = first("num_hidden_layers", "num_layers")
    heads = first("num_attention_heads", "num_heads", default=1)  # Mamba has none
    return Shape(
        kind, False, config.vocab_size,
        n_layers=first("num_decoder_layers", default=layers),
        encoder_layers=layers if kind == "seq2seq" else 0,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=first("num_key_value_heads", default=heads),
        head_dim=first("head_dim", "d_kv", default=d_model // heads),
        d_ff=first("intermediate_size", "n_inner", "d_ff", default=4 * d_model),
        ffn_temporaries=3 if first("hidden_act", "activation_function") == "silu" else 4,
    )  # fmt: skip


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, in their present dtypes."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def kv_cache_bytes(c: ModelConfig | Shape, tokens: int, rows: int = 1, bytes_per_value: int = 2) -> int:
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
    N = rows * length
    q = s.n_heads * s.head_dim
    kv = s.n_kv_heads * s.head_dim
    streams = 4 if s.ours or s.kind == "seq2seq" else 6
    ffn = size * N * (streams * s.d_model + s.ffn_temporaries * s.d_ff)
    attention = size * N * ((streams - 1) * s.d_model + 3 * q + 2 * kv)
    pairs = rows * length**2
    if s.kind == "seq2seq":
        attention = size * N * (3 * s.d_model + q + 2 * kv) + 2 * size * s.n_heads * pairs
    elif not s.ours:
        attention += size * (N * (q + kv) + pairs)
    elif s.all_scores:  # not fused: scores, float32 weights, weights
        attention += 3 * 4 * s.n_heads * pairs
    elif on_cpu and not s.cache_copies:
        # AttentionInBlocks: the scores of 64 queries, their softmax, and that of the 64 before
        before = max(0, length - 64) if s.shares_prompts else length  # behind a mask all keys
        keys = 2 * length + before
        attention += size * rows * s.n_heads * min(64, length) * keys + 2 * size * N * kv
    ids = 16 * N
    mask = 0 if s.ours else pairs
    return max(ffn, attention) + ids + mask


def logit_bytes(s: Shape, rows: int, size: int, sampled: bool) -> int:
    """Bytes of the logits of one step: as computed, and in float32.

    Sampling adds probabilities in float32, in float64 and cumulative (`sample` in model.py). With
    transformers, `generate` in support/hub_models.py makes two more tensors of the logits' shape.
    """
    chosen = 0 if s.ours else 8
    return rows * s.vocab_size * (size + 4 + (4 + 8 + 8 if sampled else chosen))


def generation_bytes(
    s: Shape, rows: int, prompt: int, new: int, n: int = 1, size: int = 2,
    sampled: bool = False, on_cpu: bool = False,
) -> int:  # fmt: skip
    """Peak bytes, without the weights, of continuing prompts of at most `prompt` tokens by `new` tokens.

    rows: sequences, n for each prompt. The peak is the larger of the prefill and the last steps.

    model.py allocates its cache at once, for prompt + new tokens. On a CPU the n samples of a prompt share
    its keys (SharedPromptCache); on a GPU the keys are repeated. When rows finish, `KVCache.select` copies
    the keys of the others layer by layer, so one layer's old and new keys are alive together. On a GPU a step
    is recorded as a CUDA graph, whose tensors stay allocated: its logits count twice.
    The cache of transformers grows: each step concatenates old and new keys, one layer at a time. Every row
    computes its own prompt. With GQA the keys of a layer are repeated for every query head.
    An encoder-decoder encodes the prompt once and stores cross-attention keys and values for every decoder
    layer; those of one layer at a time are copied into the cache.
    """

    def cache(rows: int, tokens: int) -> int:
        return kv_cache_bytes(s, tokens, rows, size)

    prompts = math.ceil(rows / n) if s.ours else rows
    prefill = activation_bytes(s, prompts, prompt, size, on_cpu)
    step = activation_bytes(s, rows, 1, size) + logit_bytes(s, rows, size, sampled)
    if s.kind == "seq2seq":
        cross = cache(rows, prompt)
        own = cache(rows, new)
        copies = max(cross // s.n_layers, own // (2 * s.n_layers) + step)
        return max(prefill, rows * prompt * s.d_model * size + cross + own + copies)
    if not s.ours:
        full = cache(rows, prompt + new)
        groups = s.n_heads // s.n_kv_heads
        copies = full // s.n_layers * (groups if groups > 1 else 0.5)
        return max(cache(rows, prompt) + prefill, full + max(int(copies), step))
    slots = 8 * math.ceil((prompt + new) / 8)
    first = cache(prompts, slots)
    full = cache(rows, slots)  # at the prefill, and at the end
    if s.cache_copies:  # also scores, float32 weights, weights
        step += rows * s.n_heads * slots * (s.cache_copies * s.head_dim * size + 3 * 4)
    if on_cpu:
        if s.shares_prompts:
            full = first + (cache(rows, new) if n > 1 else 0)
        step += 4 * 4 * rows * s.n_heads * slots  # scores, masked scores, their concatenation, their softmax
    else:
        step += logit_bytes(s, rows, size, sampled)
    random = 4 * rows * new  # one uniform random number per token
    return max(first + prefill, full + random + max(step, full // s.n_layers))


def likelihood_bytes(
    s: Shape, rows: int, length: int, columns: int, size: int = 2, on_cpu: bool = False
) -> int:
    """Peak bytes, without the weights, of log-likelihoods of the last `columns` of `length` tokens.

    The logits of these columns exist as computed, in float32, and as float32 log-probabilities. A
    classification head has none, but transformers keeps an unused cache. An encoder-decoder encodes `length`
    tokens and decodes `columns`.
    """
    layer = activation_bytes(s, rows, length, size, on_cpu)
    if s.kind == "head":
        return layer + kv_cache_bytes(s, length, rows, size)
    hidden = 2 * rows * length * s.d_model * size
    logits = rows * columns * s.vocab_size * (size + 4 * (size < 4) + 4)
    if s.kind == "seq2seq":  # a decoder layer also stores the encoder's keys and values
        cross = rows * length * (s.d_model + 2 * s.n_heads * s.head_dim) * size
        layer = max(layer, cross + activation_bytes(s, rows, columns, size))
    return max(layer, hidden + logits)
