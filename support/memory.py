"""Memory of generation and evaluation: bytes needed, bytes free, and how many rows of a batch fit.

    need = partial(generation_bytes, shape_of(config), prompt=300, new=128)    # rows -> bytes
    rows = rows_that_fit(need, most=1024, room=room(device))
    texts = halving(continued, prompts)        # if memory still runs out: half as many at a time

Generation stores keys and values of every token of every row; a likelihood batch stores logits, 10 bytes per
token and vocabulary entry. Both are computed from the shape of the model: the maximum over the few moments
that can be the peak. `tests/test_memory.py` compares the results with the tensors that are alive while the
same shapes run. The weights are loaded before and not included: see `weight_bytes`.
"""

import contextlib
import ctypes
import gc
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# Share of the free memory that is used. CUDA: the allocator loses about 6 % between blocks
# (report/speed.md), and kernels have workspaces. CPU: other programs need memory too, and Linux kills
# processes when none is left.
SHARE = {"cuda": 0.85, "cpu": 0.6}


# -----------------------------------------------------------------------------
# The shape of a model


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
    shares_prompts: bool = True  # on a CPU the samples of a prompt share its keys and values (KVCache.fork)
    cache_copies: int = 0  # decoding: copies of a layer's keys or values, widened to all query heads


def shape_of(config, kind: str = "causal", ours: bool = True) -> Shape:
    """The Shape of a ModelConfig, or of a transformers config (`ours` is then False).

    plan.py describes FLAN-T5 by a ModelConfig: half of its layers are the encoder's.
    """
    if hasattr(config, "n_kv_heads"):
        gated = config.ffn in ("swiglu", "moe")
        if config.ffn == "moe":  # the fullest expert gets a quarter more than its share (estimate_memory)
            experts = config.experts_per_token * (config.capacity_factor or 1.25)
        linear = config.attention_kind == "linear"
        temporaries = 4 if gated else 2  # gate, up, silu(gate), product; or up, gelu(up)
        if not ours:  # Llama; and those whose GELU is computed step by step (NewGELUActivation)
            temporaries = 3 if gated and kind != "seq2seq" else 4
        encoder = config.n_layers // 2 if kind == "seq2seq" else 0
        return Shape(
            kind=kind,
            ours=ours,
            vocab_size=config.vocab_size,
            n_layers=config.n_layers - encoder,
            encoder_layers=encoder,
            d_model=config.d_model,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            d_ff=math.ceil(config.d_ff * experts) if config.ffn == "moe" else config.d_ff,
            ffn_temporaries=temporaries,
            all_scores=config.n_sinks > 0 or (linear and not config.sees_all),
            shares_prompts=config.plain_attention,
            cache_copies=4 if linear else 2 if config.n_sinks else 0,  # linear: elu(k) and elu(k) + 1 too
        )
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    first = lambda *names: next((v for n in names if (v := getattr(config, n, None))), None)  # noqa: E731
    d_model = first("hidden_size", "d_model")
    heads = first("num_attention_heads", "num_heads") or 1  # Mamba has none
    layers = first("num_hidden_layers", "num_layers")
    silu = first("hidden_act", "activation_function") == "silu"
    return Shape(
        kind=kind,
        ours=False,
        vocab_size=config.vocab_size,
        n_layers=first("num_decoder_layers") or layers,
        encoder_layers=layers if kind == "seq2seq" else 0,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=first("num_key_value_heads") or heads,
        head_dim=first("head_dim", "d_kv") or d_model // heads,
        d_ff=first("intermediate_size", "n_inner", "d_ff") or 4 * d_model,
        ffn_temporaries=3 if silu else 4,
    )


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, in their present dtypes."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


# -----------------------------------------------------------------------------
# Peak memory of generation, and of a batch of likelihoods


def cache_bytes(s: Shape, rows: int, tokens: int, size: int) -> int:
    """Keys and values of `rows` sequences of `tokens` tokens, `size` bytes per element."""
    return 2 * s.n_layers * s.n_kv_heads * s.head_dim * rows * tokens * size


def activation_bytes(s: Shape, rows: int, length: int, size: int, on_cpu: bool = False) -> int:
    """Peak bytes of one layer on (rows, length) tokens without gradients: the larger of its two sub-layers.

    Feed-forward: the layer's input, the residual stream after attention, its norm, the temporaries of width
    d_ff and the output; a transformers decoder also keeps the embeddings of tokens and positions.
    Attention: the same streams; queries, keys and values before and after RoPE, the output and its
    transposed copy. Fused kernels do not materialise scores. transformers also allocates a mask of
    (rows, T, T) booleans and casts it. T5 adds a position bias (rows, H, T, T) to the mask, and makes a
    transposed copy of the sum while queries, keys and values are alive.
    """
    N, q, kv = rows * length, s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim
    streams = 4 if s.ours or s.kind == "seq2seq" else 6
    ffn = size * N * (streams * s.d_model + s.ffn_temporaries * s.d_ff)
    attention = size * N * ((streams - 1) * s.d_model + 4 * q + 3 * kv)
    ids = 16 * N
    pairs = rows * length**2
    if s.kind == "seq2seq":
        attention = size * N * (3 * s.d_model + q + 2 * kv) + 2 * size * s.n_heads * pairs
    elif not s.ours:
        attention += size * pairs
    elif s.all_scores:  # not fused: scores, float32 weights, weights
        attention += 3 * 4 * s.n_heads * pairs
    elif on_cpu and not s.cache_copies:
        # AttentionInBlocks: the scores of 64 queries, their softmax and that of the 64 before
        blocks = 2 if length <= 64 else 3
        attention += blocks * size * rows * s.n_heads * min(64, length) * length + 2 * size * N * kv
    mask = 0 if s.ours else pairs
    return max(ffn, attention) + ids + mask


def logit_bytes(s: Shape, rows: int, size: int, sampled: bool) -> int:
    """Bytes of the logits of one step: as computed, and in float32.

    Sampling adds probabilities in float32, in float64 and cumulative (`sample` in model.py). With
    transformers, `Draw` in support/hub_models.py makes two more tensors of the logits' shape.
    """
    chosen = 0 if s.ours else 8
    return rows * s.vocab_size * (size + 4 + (4 + 8 + 8 if sampled else chosen))


def generation_bytes(
    s: Shape, rows: int, prompt: int, new: int, n: int = 1, size: int = 2,
    sampled: bool = False, on_cpu: bool = False,
) -> int:  # fmt: skip
    """Peak bytes, without the weights, of continuing prompts of at most `prompt` tokens by `new` tokens.

    rows: sequences, n for each prompt. size: bytes of an activation (2: bfloat16). The peak is the larger of
    the prefill and the last steps.

    model.py allocates its cache at once, for prompt + new tokens. On a CPU the n samples of a prompt share
    its keys (KVCache.fork); on a GPU the keys are repeated. When rows finish, `KVCache.select` copies the
    keys of the others layer by layer, so one layer's old and new keys are alive together. On a GPU a step is
    recorded as a CUDA graph, whose tensors stay allocated: its logits count twice.
    The cache of transformers grows: each step concatenates old and new keys, one layer at a time. Every row
    computes its own prompt. With GQA the keys of a layer are repeated for every query head.
    An encoder-decoder encodes the prompt once and stores cross-attention keys and values for every decoder
    layer; those of one layer at a time are copied into the cache.
    """
    prompts = math.ceil(rows / n) if s.ours else rows
    reads = activation_bytes(s, prompts, prompt, size, on_cpu)
    step = activation_bytes(s, rows, 1, size) + logit_bytes(s, rows, size, sampled)
    if s.kind == "seq2seq":
        encoded, cross = rows * prompt * s.d_model * size, cache_bytes(s, rows, prompt, size)
        own = cache_bytes(s, rows, new, size)
        copies = max(cross // s.n_layers, own // (2 * s.n_layers) + step)
        return max(reads, encoded + cross + own + copies)
    if not s.ours:
        whole, groups = cache_bytes(s, rows, prompt + new, size), s.n_heads // s.n_kv_heads
        copies = whole // s.n_layers * (groups if groups > 1 else 0.5)
        return max(cache_bytes(s, rows, prompt, size) + reads, whole + max(int(copies), step))
    slots = 8 * math.ceil((prompt + new) / 8)
    first = cache_bytes(s, prompts, slots, size)  # cache of the prefill
    if s.cache_copies:  # also scores, float32 weights, weights
        step += rows * s.n_heads * slots * (s.cache_copies * s.head_dim * size + 3 * 4)
    if on_cpu:
        whole = first + (cache_bytes(s, rows, new, size) if n > 1 else 0)
        whole = whole if s.shares_prompts else cache_bytes(s, rows, slots, size)
        step += 4 * 4 * rows * s.n_heads * slots  # scores, masked scores, their concatenation, their softmax
    else:
        whole = cache_bytes(s, rows, slots, size)
        step += logit_bytes(s, rows, size, sampled)
    drawn = 4 * rows * new  # one uniform random number per token
    return max(first + reads, whole + drawn + max(step, whole // s.n_layers))


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
        return layer + cache_bytes(s, rows, length, size)
    hidden = 2 * rows * length * s.d_model * size
    logits = rows * columns * s.vocab_size * (size + 4 * (size < 4) + 4)
    if s.kind == "seq2seq":  # a decoder layer also stores the encoder's keys and values
        cross = rows * length * (s.d_model + 2 * s.n_heads * s.head_dim) * size
        layer = max(layer, cross + activation_bytes(s, rows, columns, size))
    return max(layer, hidden + logits)


# -----------------------------------------------------------------------------
# Free memory


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device; 2 GiB if the system does not report it.

    CUDA: free memory of the driver plus memory that torch has reserved but does not use, within the limit of
    the process (`torch.cuda.set_per_process_memory_fraction`). CPU: the minimum of MemAvailable and the
    limits of the process' control groups, which containers and job schedulers set.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
        return max(0, min(free, int(fraction * total) - reserved) + reserved - used)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    give_freed_memory_back()
    known = [n for n in (available_bytes(), control_group_bytes()) if n is not None]
    return max(0, min(known, default=2**31))


def room(device: torch.device, processes: int = 1) -> int:
    """Bytes that a batch may use if `processes` processes use the device at the same time."""
    return int(free_bytes(device) * SHARE.get(device.type, SHARE["cpu"]) / processes)


def available_bytes(file: Path = Path("/proc/meminfo")) -> int | None:
    """Main memory that is free or used only as file cache; None if it is not known."""
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s*(\d+) kB", file.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    with contextlib.suppress(ImportError):
        import psutil

        return psutil.virtual_memory().available
    with contextlib.suppress(AttributeError, ValueError, OSError):
        mac = sys.platform == "darwin"  # macOS does not report free pages: take half of all
        pages = os.sysconf("SC_PHYS_PAGES") // 2 if mac else os.sysconf("SC_AVPHYS_PAGES")
        return pages * os.sysconf("SC_PAGE_SIZE")
    return None


def control_group_bytes(
    mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """What Linux' control groups, version 2 or 1, leave to this process: the least over its group and all
    groups around it. None where there is no limit.
    """
    v2 = ("memory.max", "memory.current", "inactive_file")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    left = []
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                names, root = v2, mount
            elif "memory" in controllers.split(","):
                names, root = v1, mount / "memory"
            else:
                continue
            folder = root / path.lstrip("/")
            for group in (folder, *folder.parents):
                left.append(group_bytes(group, *names))
                if group == root:
                    break
    return min((n for n in left if n is not None), default=None)


def group_bytes(group: Path, limit: str, usage: str, files: str) -> int | None:
    """Limit minus usage of one control group, in which cached files count as free."""
    with contextlib.suppress(OSError, ValueError):  # no such file here; "max" is no limit
        most = int((group / limit).read_text())
        cached = re.search(rf"^{files} (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        if most < 2**60:  # version 1 writes a huge number for "no limit"
            return most - int((group / usage).read_text()) + (int(cached[1]) if cached else 0)
    return None


def give_freed_memory_back() -> None:
    """Returns freed memory to the system.

    glibc keeps it (`keep_freed_memory` in train.py asks it to), and the system counts it as used.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


# -----------------------------------------------------------------------------
# Choosing a batch size


class DoesNotFit(ValueError):
    """Out of memory with a single row; the message says what the user can do."""


def rows_that_fit(need: Callable[[int], int], most: int, room: int) -> int:
    """`most`, halved until need(rows) <= room bytes; at least 1.

    Halving, instead of the largest number that fits, makes results independent of small changes in memory.
    """
    rows = max(1, most)
    while rows > 1 and need(rows) > room:
        rows //= 2
    return rows


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, numpy, Python or the system means out of memory, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == 12  # ENOMEM
    words = ("can't allocate memory", "Cannot allocate memory", "not enough memory", "out of memory")
    words += ("ALLOC_FAILED", "bad_alloc", "could not create a primitive")  # cuBLAS, C++, oneDNN
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def free_cached_memory() -> None:
    """After a failed batch: frees the memory that torch has cached, so that it can be split differently."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_freed_memory_back()


def halving(function: Callable[[list], list], items: list, most: int = 0) -> list:
    """The list function(items), computed with at most `most` items at a time (0: all).

    Out of memory: continues with half as many at a time. Raises DoesNotFit if one item does not fit.
    """
    results, size = [], most or len(items)
    while len(items):
        try:
            results += function(items[:size])
            items = items[size:]
            continue
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise DoesNotFit(
                    "out of memory with one sequence at a time: use a smaller model, a shorter "
                    "--context_length or fewer --shots, or close other programs that use this memory"
                ) from None
        # Not inside the except clause: its traceback keeps the failed tensors alive.
        free_cached_memory()
        size = (min(size, len(items)) + 1) // 2
    return results
