"""Faster versions of five names in model.py: `rms_norm`, `attend`, `project`, `lm_loss`, `Decoder`.

`install()` puts them into model.py; support/machine.py's pick_device calls it, so all scripts run with them.
Each gives the results of the plain one (tests/test_kernels.py), and each figure below says what it is
worth. model.py works without this file.
"""

from support.terminal import is_amd

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import model as plain
from model import KVCache, ModernDecoderLM, SwiGLU, n_parameters
from support.caches import FixedCache, SharedKeys, SharedPromptCache

PLAIN = {name: getattr(plain, name) for name in ("rms_norm", "attend", "project", "lm_loss", "Decoder")}


def install(fast: bool = True) -> None:
    """From now on model.py calls the functions of this file; with fast=False its own again."""
    for name in PLAIN:
        setattr(plain, name, globals()[name] if fast else PLAIN[name])


# -----------------------------------------------------------------------------
# The norm


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`model.rms_norm`. While a CPU trains, in the dtype of autocast, so that the layers which read it need
    not each cast it.
    """
    trains = x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if weight is None or not trains:
        return PLAIN["rms_norm"](x, weight, eps)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return NormInFewPasses.apply(x, weight, eps, dtype)


class NormInFewPasses(torch.autograd.Function):
    """y = x / r * weight, r = sqrt(mean(x^2) + eps), reading and writing tensors of the size of x half as
    often as torch's own derivative: forward and backward in half of its time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = weight.to(wide)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = (norm.square_() / x.shape[-1] + eps).rsqrt_()  # 1 / r
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return (unit * weight).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """With u = x / r: dweight = the sum of dy u, dx = (dy weight - u mean(dy weight u)) / r."""
        unit, scale, weight = ctx.saved_tensors
        grad = grad.to(unit.dtype)
        product = grad * unit
        dweight = product.flatten(0, -2).sum(0)
        mean = (product @ weight).unsqueeze(-1) / -unit.shape[-1]
        return (grad * weight).addcmul_(unit, mean).mul_(scale), dweight, None, None


# -----------------------------------------------------------------------------
# Attention


def attend(q, k, v, mask=None, sinks=None, dropout=0.0, linear=False, weights=False):
    """`model.attend`: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D)."""
    if isinstance(k, SharedKeys):
        return attention_after_prompt(q, k, v)
    B, H, T, D = q.shape
    K = k.shape[1]
    causal = mask is None and T > 1
    if linear and causal and not weights:
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
        return causal_linear_attention(q, k, v)
    if linear or weights or sinks is not None:
        return PLAIN["attend"](q, k, v, mask, sinks, dropout, linear, weights)
    if T == 1 and not dropout:
        # A group's query heads become "queries" of their key head, and no key is repeated.
        return one_query(q.view(B, K, -1, D), k, v, mask).reshape(q.shape)
    if q.device.type == "cpu" and not dropout and 1 < T == k.shape[2] <= 1024:
        return AttentionInBlocks.apply(q, k, v, mask)
    if q.is_cuda and H != K and (mask is not None or q.dtype == torch.float32):
        # Of torch's kernels for these, those that share key heads keep all scores, (B, H, T, T) in float32.
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=H != k.shape[1])


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """`linear_attention` of a whole text with the causal mask, in a time that grows with T and not with T^2.

    Without a softmax, phi(q) phi(k)^T v is also phi(q) (phi(k)^T v): a D x D matrix holds all that a query
    needs of the chunks before its own (eq. 9). q, k and v are (..., T, D). Decoding does not use this: the
    cache keeps keys and values, as it does for softmax.
    """
    q = F.elu(q) + 1
    k = F.elu(k) + 1
    v = F.pad(v, (0, 1), value=1.0)  # a column of ones sums the weights of a row
    past = torch.zeros(q.shape[-1], v.shape[-1], device=q.device)
    chunks = []
    cut = [x.split(chunk, dim=-2) for x in (q, k, v)]
    for queries, keys, values in zip(*cut, strict=True):
        chunks.append((queries @ keys.mT).tril() @ values + queries @ past.to(q.dtype))
        past = past + keys.mT @ values
    y = torch.cat(chunks, dim=-2)
    return y[..., :-1] / y[..., -1:].clamp(min=1e-6)


class AttentionInBlocks(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v of a whole text on a CPU, 128 queries at a time with the keys up to theirs.

    What a block of queries may not see is never computed, except in its own upper triangle, and its scores
    stay in the cache. The weights are kept for the backward pass: 2.4 MB for a layer, head and row of 1,024
    tokens in float32. torch's own flash attention, which keeps none, takes 1.2 to 3.0 times as long forward
    and backward (256 and 1,024 tokens, float32, two threads), in bfloat16 2.4 to 3.7 times.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, block: int = 128) -> Tensor:
        """q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D), each H / K query heads with one of K. A mask
        (T, T) or (B, 1, T, T), True = attend, lies within the causal triangle; what may see nothing gets 0.
        """
        B, H, T, D = q.shape
        q = (q / math.sqrt(D)).reshape(B, k.shape[1], -1, T, D)  # (B, K, H / K, T, D)
        k = k.contiguous()
        v = v.contiguous()
        future = torch.full((block, block), -torch.inf, dtype=q.dtype).triu(1)
        y = torch.empty_like(q)
        weights = []
        for i in range(0, T, block):
            queries = q[..., i : i + block, :]
            n = queries.shape[-2]
            S = i + n  # keys that this block may see
            scores = queries.flatten(2, 3) @ k[:, :, :S].mT
            blocks = scores.unflatten(2, (-1, n))  # (B, K, H / K, n, S), a view
            if mask is None:
                blocks[..., i:] += future[:n, :n]
            else:
                blocks.masked_fill_(~mask[..., i:S, :S].unsqueeze(-3), -torch.inf)
            w = scores.softmax(-1)
            if mask is not None:
                w.nan_to_num_()
            y[..., i:S, :] = (w @ v[:, :, :S]).unflatten(2, (-1, n))
            if any(ctx.needs_input_grad):
                weights.append(w)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.block = block
        return y.view(B, H, T, D)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """With y = w v: dv = w^T dy, dw = dy v^T; and through the softmax ds = w (dw - sum of w dw)."""
        q, k, v, *weights = ctx.saved_tensors
        grad = grad.reshape(q.shape)
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        blocks = [x.split(ctx.block, dim=-2) for x in (q, dq, grad)]
        for w, queries, dqueries, dy in zip(weights, *blocks, strict=True):
            S = w.shape[-1]
            dy = dy.flatten(2, 3)
            dv[:, :, :S] += w.mT @ dy
            ds = torch._softmax_backward_data(dy @ v[:, :, :S].mT, w, -1, w.dtype)
            dqueries.copy_((ds @ k[:, :, :S]).view(queries.shape))
            dk[:, :, :S] += ds.mT @ queries.flatten(2, 3)
        return (dq / math.sqrt(q.shape[-1])).flatten(1, 2), dk, dv, None, None


def one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Decoding: one new query per row attends to the cache, k and v (B, K, S, D).

    q is (B, K, G, D), G query heads per KV head; returns the shape of q.
    """
    if q.device.type == "cpu" and torch.compiler.is_compiling():
        # Sums over the cache: faster than products of tiny matrices, except for several queries per key.
        scores = (q * k).sum(-1).unsqueeze(2) if q.shape[2] == 1 else q @ k.mT  # (B, K, G, S)
        scores = scores / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(2)).sum(-2)
    return F.scaled_dot_product_attention(q, k, v, mask)


def attention_after_prompt(q: Tensor, k: SharedKeys, v: Tensor) -> Tensor:
    """One new token a row, q (B, H, 1, D) -> (B, H, 1, D); v (B, K, T, D) belong to the row's own keys.

    The rows of a prompt look at the same keys, so these are read once for all of them (as in Hydragen;
    Juravsky et al., 2024); each also looks at its own, under one softmax.
    """
    B, H, _, D = q.shape
    P, K, S, _ = k.prompt_k.shape
    G = H // K  # query heads a key-value head

    def per_prompt(x: Tensor) -> Tensor:  # (B, K, G, ...) -> (P, K, n G, ...)
        grid = x.new_zeros(P * k.n, K, G, x.shape[-1])
        grid[k.place] = x
        return grid.view(P, k.n, K, G, -1).transpose(1, 2).flatten(2, 3)

    def per_row(x: Tensor) -> Tensor:
        return x.view(P, K, k.n, G, -1).transpose(1, 2).flatten(0, 1)[k.place]

    q = q.reshape(B, K, G, D) / math.sqrt(D)
    prompt_scores = (per_prompt(q) @ k.prompt_k.mT).masked_fill(~k.prompt_mask, -torch.inf)
    own_scores = (q @ k.own.mT).masked_fill(~k.own_mask, -torch.inf)
    scores = torch.cat([per_row(prompt_scores), own_scores], dim=-1)  # (B, K, G, S + T)
    w = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    y = per_row(per_prompt(w[..., :S]) @ k.prompt_v) + w[..., S:] @ v
    return y.reshape(B, H, 1, D)


# -----------------------------------------------------------------------------
# Matrix products


def project(x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """`model.project` in one matrix product, where `decoding_copy` has laid the weights side by side, and
    compiled on a GPU, whose matrix units narrow products leave idle.
    """
    joined = getattr(layers[0], "joined", None)
    if joined is None:
        plain_layers = all(isinstance(layer, nn.Linear) for layer in layers)  # LoRA's are not
        if not (x.is_cuda and torch.compiler.is_compiling() and plain_layers):
            return [layer(x) for layer in layers]
        joined = torch.cat([layer.weight for layer in layers])
    y = one_row_linear(x, joined.to(x.dtype))
    if layers[0].bias is not None:
        y = y + torch.cat([layer.bias for layer in layers]).to(x.dtype)
    return y.split([layer.out_features for layer in layers], dim=-1)


def one_row_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., d), weight (outputs, d) -> (..., outputs).

    One row of x on a CPU costs what reading the weights does. A compiled loop reads them at 46 GB/s, MKL at
    25 and, if they lie transposed, at 32 (29 MB, a core of a Zen 5).
    """
    one_row = x.numel() == x.shape[-1] and weight.stride(-1) == 1
    if one_row and x.device.type == "cpu" and torch.compiler.is_compiling():
        return (weight * x.flatten()).sum(-1).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class OneRowLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = one_row_linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """A linear layer for decoding on a CPU: weights in 8 bits, and a scale for each output.

    With one row the time goes into reading the weights, and these take half the bytes of bfloat16
    (weight-only quantization, as in gpt-fast). SmolLM2-135M decodes 1 row 1.8 times as fast as in bfloat16,
    4 rows 1.2 times, 8 rows no faster, and 64 rows at 0.87 of the speed (two cores of a Zen 4). Above 16
    rows, as in a prompt, the weights are converted for an ordinary product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """weight (outputs, inputs), bias (outputs). torch's kernel reads 16 inputs at a time: a multiple."""
        super().__init__()
        self.scale = (weight.abs().amax(1) / 127).clamp(min=1e-8).bfloat16()
        q = (weight / self.scale.float().unsqueeze(1)).round().clamp(-127, 127)
        self.q = nn.Parameter(q.to(torch.int8), requires_grad=False)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= 16:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.q, self.scale).to(x.dtype)
        else:
            y = F.linear(rows, self.q.to(x.dtype)) * self.scale.to(x.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def to_int8(model: ModernDecoderLM) -> None:
    """Makes the layers of the blocks and the head of a model `Int8Linear`; experts and routers stay as they
    are. Raises ValueError on a GPU.
    """
    if model.device.type != "cpu":
        raise ValueError("--int8 computes on a CPU: add --device=cpu, or leave --int8 out")
    for part in list(model.model["layers"].modules()):
        for name, layer in part.named_children():
            if isinstance(layer, nn.Linear) and layer.in_features % 16 == 0 and name != "gate":
                setattr(part, name, Int8Linear(layer.weight.detach(), layer.bias))
    if model.config.d_model % 16 == 0:
        model.lm_head = Int8Linear(model.head.detach())


@contextlib.contextmanager
def float32_products(precision: str):
    """torch.set_float32_matmul_precision(precision), and afterwards what it was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fastest_products(device: torch.device) -> str:
    """The precision to give `float32_products` where the same shapes are multiplied again and again.

    torch has MKL multiply, which on AMD's processors runs code for AVX2 whatever they have. At "medium" it
    asks oneDNN: 250 GFLOP/s a core and not 110 (Zen 5), and as exact, since only AMX has anything less to
    offer. But oneDNN makes a kernel for every new shape, which takes half a millisecond and half a MiB.
    """
    return "medium" if device.type == "cpu" and mkl_is_slow() else torch.get_float32_matmul_precision()


def mkl_is_slow() -> bool:
    """On AMD's processors with AVX-512; but where there is AMX, oneDNN's "medium" would round to bfloat16."""
    return is_amd() and torch.backends.cpu.get_cpu_capability() == "AVX512" and not has_amx()


def has_amx() -> bool:
    """Units of Intel's server processors that multiply bfloat16 matrices; a virtual machine may hide them."""
    return torch.cpu._is_amx_tile_supported()


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: AMX 8 times, AMD from Zen 4 on twice.

    Intel's AVX512-BF16 without AMX reached 82 GFLOP/s where float32 had 154; other CPUs emulate it.
    """
    return has_amx() or (is_amd() and torch.cpu._is_avx512_bf16_supported())


# -----------------------------------------------------------------------------
# The loss


def lm_loss(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = 4096) -> Tensor:
    """`model.lm_loss`, `chunk` tokens at a time; on a CPU without the targets of -100, if they are many, and
    in chunks whose logits stay in its cache: in bfloat16 on AMX 1.3 times as fast with 8,192 words, twice
    with 49,152.
    """
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():
        chunk = min(chunk, 512)
        asked = targets != -100
        if asked.sum() < 0.9 * len(asked):
            hidden, targets = hidden[asked], targets[asked]
    # A Function does not see no_grad(): attached, the head would get its gradient in evaluation too.
    head = head if torch.is_grad_enabled() else head.detach()
    return ChunkedCrossEntropy.apply(hidden, head, targets, chunk)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T` without ever holding all logits.

    At 8k tokens and a vocabulary of 50k, logits, their softmax and their gradient in float32 are 4.6 GiB: on
    a 12 GB GPU the loss would take more room than the model. Here a chunk of tokens at a time becomes
    logits, loss and both gradients, then is forgotten. Computing the gradients already in the forward pass
    costs no extra matrix product (a recomputing checkpoint would: 5 % of a step at V=4,096, d=288). torch's
    own `linear_cross_entropy`, from 2.13 on, had 0.90 and 0.98 of the speed on a CPU (report/speed.md).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        """hidden (N, d), weight (V, d), targets (N), -100 = ignore -> sum of losses in nats (float32)."""
        total = torch.zeros((), device=hidden.device)
        trains_weight = ctx.needs_input_grad[1]  # False with LoRA, whose head is frozen
        need = ctx.needs_input_grad[0] or trains_weight
        w = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if need else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if trains_weight else None
        for i in range(0, len(hidden), chunk):
            h = hidden[i : i + chunk]
            t = targets[i : i + chunk].unsqueeze(-1)  # (n, 1)
            counts = t != -100
            loss, grad = ChunkedCrossEntropy.of_chunk(h, w, t.clamp(min=0), counts, need)
            total = total - loss
            if need:
                grad_hidden[i : i + chunk] = (grad @ w) * counts
            if trains_weight:
                grad_weight += grad.T @ (h * counts)
            del grad  # or it would lie there beside the next chunk's
        if need:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def of_chunk(h: Tensor, w: Tensor, index: Tensor, counts: Tensor, need: bool):
        """Sum of log p of the targets `index` (n, 1) where `counts`, and d loss / d logits (n, V) if needed:
        softmax - one_hot(target), also in the rows that do not count.
        """
        log_p = torch.log_softmax((h @ w.T).float(), dim=-1)  # (n, V)
        total = (log_p.gather(-1, index) * counts).sum()
        if not need:
            return total, None
        if torch.compiler.is_compiling():  # all of it in one kernel, and nothing in float32 ever stored
            one_hot = torch.arange(len(w), device=h.device) == index
            return total, (log_p.exp() - one_hot.float()).to(h.dtype)
        grad = log_p.exp_()
        grad.scatter_add_(-1, index, -torch.ones_like(index, dtype=grad.dtype))
        return total, grad.to(h.dtype)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_hidden * grad_output, grad_weight, None, None


# -----------------------------------------------------------------------------
# Decoding


class Decoder(PLAIN["Decoder"]):
    """`model.Decoder` on weights laid out for it, with prompts read once, and steps compiled or recorded."""

    def __init__(self, model, cache, draw, n, compile, record):
        super().__init__(decoding_copy(model, compile), cache, draw, n)
        c = model.config
        rows = len(cache.length) * n
        on_cpu = model.device.type == "cpu"
        self.compile = compile
        self.compiled = compiled_step(model.device.type) if compile else ModernDecoderLM.step
        # A rolling cache and a mixture of experts have tensors of other shapes at every step.
        self.record = record and can_record(model.device) and not (cache.rolls or c.ffn == "moe")
        # A SharedPromptCache makes a CPU 1.1 to 1.6 times as fast, also for prompts with one answer each
        # (report/speed.md). A GPU waits for launches and not for memory, and would launch more.
        other_cache = compile or self.record or cache.rolls
        self.share = on_cpu and rows > 1 and c.plain_attention and not other_cache
        # Products of compiled steps have the same shapes, but for those of grouped queries with their keys.
        same_shapes = c.n_heads == c.n_kv_heads and rows * c.d_model >= 4096
        self.precision = torch.get_float32_matmul_precision()
        if compile and same_shapes:
            self.precision = fastest_products(model.device)
        self.recorded = Recorded() if self.record and not on_cpu else None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        if self.share:
            empty = self.cache
            longest = max(map(len, prompts))
            self.cache = KVCache(empty.config, len(prompts), longest, empty.device, empty.k[0].dtype)
            empty.k, empty.v = [], []
            logits = self.model.prefill(prompts, self.cache)
            self.cache = SharedPromptCache(self.cache, self.n)
            return logits.repeat_interleave(self.n, dim=0)
        logits = super().prefill(prompts)
        if self.record:
            self.cache = FixedCache(self.cache)
        return logits

    def next(self, token: Tensor, uniform: Tensor) -> Tensor:
        run = super().next
        return self.recorded(run, token, uniform) if self.recorded else run(token, uniform)

    def step(self, ids: Tensor) -> Tensor:
        with float32_products(self.precision):
            return self.compiled(self.model, ids, self.cache)

    def shrink(self, left: list[int]) -> list[int]:
        many = len(left) > len(self.cache.length) // 2
        if self.compile or (self.recorded and many):  # steps of other shapes are recorded anew
            return []
        return super().shrink(left)


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


def step(model: ModernDecoderLM, ids: Tensor, cache: KVCache) -> Tensor:
    """`ModernDecoderLM.step`, to be compiled."""
    return one_row_linear(model.hidden(ids, cache=cache)[:, -1], model.head)


@functools.cache
def compiled_step(device: str) -> Callable:
    """The cache is allocated once, but on a CPU a step reads its filled part only, whose length torch makes a
    symbol at the second step. A step of fixed shape that masks the rest was slower: 428 tok/s against 490 at
    batch 1, 838 against 1,320 at batch 16 (256 tokens, one thread). cpp_wrapper calls kernels from C++ and
    not from Python: 1.1 times as fast at batch 1.
    """
    options = {"cpp_wrapper": True, "size_asserts": False} if device == "cpu" else None
    return torch.compile(step, options=options)


def decoding_copy(model: ModernDecoderLM, compiled: bool) -> ModernDecoderLM:
    """The model with its weights laid out for decoding, where a step is bound by reading them; or the model
    itself where that does not pay.

    Under autocast the weights are cast once instead of for every token, except for the router's: they are few
    and decide which expert computes. q, k and v lie side by side, gate and up too. All are transposed, except
    for compiled decoding on a CPU, see `one_row_linear`: 1.1 times as fast at 1 row (width 128, a core of a
    Zen 5), 1.14 to 1.18 at 128 rows (a core of a Xeon).
    """
    if any(isinstance(layer, Int8Linear) for layer in model.modules()):
        return model
    on_cpu = model.device.type == "cpu"
    cast = model.head.dtype != model.dtype
    small = n_parameters(model) < 2**26  # the copy takes at most 256 MiB
    if not (cast or (on_cpu and (compiled or small))):
        return model
    # What `memo` holds is taken from there and not copied.
    memo = {id(buffer): buffer for buffer in model.buffers()}
    for name, p in model.named_parameters():
        memo[id(p)] = p if ".gate." in name else nn.Parameter(p.to(model.dtype), requires_grad=False)
    for layer in model.config.moe_layers:
        memo[id(model.model["layers"][layer].mlp.stats)] = {}
    twin = copy.deepcopy(model, memo).eval()
    for block in twin.model["layers"]:
        a, m = block.self_attn, block.mlp
        groups = [[a.q_proj, a.k_proj, a.v_proj], [a.o_proj]]
        if isinstance(m, SwiGLU):
            groups += [[m.gate_proj, m.up_proj], [m.down_proj]]
        for layers in groups:
            lay_out(layers, transposed=not (compiled and on_cpu))
    return twin


def lay_out(layers: list[nn.Linear], transposed: bool) -> None:
    """Makes the weights of layers parts of one matrix, which `project` multiplies by."""
    joined = torch.cat([layer.weight for layer in layers])  # (outputs, in)
    if transposed:
        joined = joined.t().contiguous().t()
    parts = joined.split([layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
        layer.__class__ = OneRowLinear
    layers[0].joined = joined


class Recorded:
    """Calls a function of tensors that does the same to the same shapes again and again, on a GPU.

    A small model's step is a few hundred kernels of some microseconds each, and Python takes longer to launch
    one than the GPU to run it. So the third call is recorded as a CUDA graph, which is then launched whole;
    what the function keeps in tensors (the cache) has to be changed in place. Other shapes are recorded anew.
    The function is not kept: a method of our owner would hold all that it holds, the cache, for too long.
    """

    def __init__(self):
        self.shapes = None
        self.calls = 0

    def __call__(self, run: Callable, *given: Tensor) -> Tensor:
        shapes = [x.shape for x in given]
        if shapes != self.shapes:
            self.shapes = shapes
            self.calls = 0
        self.calls += 1
        if self.calls < 3:  # libraries choose and load their kernels when they are first called
            return run(*given)
        if self.calls == 3:
            self.inputs = [x.clone() for x in given]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = run(*self.inputs)
        for mine, x in zip(self.inputs, given, strict=True):
            mine.copy_(x)
        self.graph.replay()
        return self.output.clone()
