"""The model: a decoder-only transformer, from single equations up to sampling text.

Read it from top to bottom. It starts with the equations as small functions (softmax, cross-entropy, RMSNorm,
RoPE, attention), builds the layers out of them (attention with grouped queries, SwiGLU, mixture of experts),
stacks the layers into `ModernDecoderLM`, and ends with the key-value cache, sampling, Hugging Face's file
format, and the arithmetic of parameters, FLOPs and memory. It needs torch and, to write
files, support/files.py.

    config = ModelConfig(n_layers=6, d_model=288, n_heads=6, vocab_size=4096)
    model = ModernDecoderLM(config)
    logits = model(ids)                                     # ids (B, T) -> logits (B, T, V)
    loss_sum, n_targets = model(ids, targets)               # nats, summed over the targets that are not -100
    tokens = model.generate([[1, 2, 3]], max_new_tokens=20, temperature=0.8, n=4)   # 4 continuations
    model.save_pretrained("out/base")                       # a folder that transformers loads too

Shapes are written (B, T, d): B sequences, T tokens each, d = d_model. H query heads, K key-value heads, D =
head_dim, f = d_ff, V = vocab_size. With the default switches this is a Llama; every other switch is one `if`
in one place.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from support.files import write_atomically
from support.kernels import (
    AttentionInBlocks,
    ChunkedCrossEntropy,
    Recorded,
    as_many_of_each,
    attention_after_prompt,
    fastest_products,
    float32_products,
    linear,
    one_query,
    together,
)


@dataclass
class ModelConfig:
    """The shape of the decoder, and its switches."""

    vocab_size: int = 4096  # rows of the embedding table
    context_length: int = 256  # tokens the model is trained to look at
    n_layers: int = 6  # transformer blocks
    d_model: int = 288  # width of the residual stream
    n_heads: int = 6  # query heads
    n_kv_heads: int = 0  # key-value heads shared by groups of query heads (GQA); 0: as many as n_heads
    head_dim: int = 0  # width of a head; 0: d_model / n_heads
    d_ff: int = 0  # hidden width of the feed-forward layer; 0: 8/3 d_model if gated, else 4 d_model
    norm: Literal["rms", "layer", "none"] = "rms"  # normalisation layer
    norm_position: Literal["pre", "post"] = "pre"  # before a sublayer, or after its residual addition (2017)
    norm_eps: float = 1e-5  # added to the variance
    positions: Literal["rope", "learned", "none"] = "rope"  # how a token knows where it stands
    rope_theta: float = 10000.0  # slowest RoPE wavelength is about 2 pi theta tokens
    qk_norm: bool = False  # RMSNorm on every query and key (Qwen3): tames attention logits
    n_sinks: int = 0  # learned attention sinks a head: logits that softmax may spend its mass on
    sliding_window: int = 0  # a token sees this many tokens, itself included; 0: all before it
    sparse_stride: int = 0  # n: a token sees the last n tokens and every n-th one before them; 0: all
    attention_kind: Literal["softmax", "linear"] = "softmax"  # linear: elu(x) + 1 instead of softmax's exp
    ffn: Literal["swiglu", "gelu", "silu", "moe"] = "swiglu"  # feed-forward layer; moe: SwiGLU experts
    n_experts: int = 8  # moe: experts a layer
    experts_per_token: int = 2  # moe: experts that each token visits
    moe_every: int = 1  # moe: every n-th block has experts, the others a dense SwiGLU; 1: all have experts
    capacity_factor: float = 0.0  # moe: room per expert relative to an even load; 0: room for all tokens
    load_balance_coef: float = 0.01  # moe: weight of the load-balancing loss
    router_z_coef: float = 0.001  # moe: weight of the router z-loss
    bias: bool = False  # biases in linear layers (GPT-2 has them)
    tie_embeddings: bool = True  # one matrix embeds tokens and predicts them
    dropout: float = 0.0  # on embeddings, attention weights and sublayer outputs, while training

    def __post_init__(self):
        for name, field in ModelConfig.__dataclass_fields__.items():
            value, choices = getattr(self, name), get_args(field.type)
            number = {int: int, float: int | float}.get(field.type)
            if number and not isinstance(value, number):
                raise ValueError(f"{name}={value!r} must be a {'whole ' * (number is int)}number")
            if choices and value not in choices:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
            least_1 = ("vocab_size", "context_length", "n_layers", "d_model", "n_heads", "moe_every")
            if name in least_1 and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
            if isinstance(value, int | float) and not 0 <= value < math.inf:  # also false for nan
                raise ValueError(f"{name}={value} must be a finite number, at least 0")
        if self.dropout >= 1:
            raise ValueError(f"dropout={self.dropout} must be below 1: it is the share that is set to 0")
        if self.rope_theta < 1:
            raise ValueError(f"rope_theta={self.rope_theta} must be at least 1, usually 10000 or more")
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        if not self.head_dim:
            if self.d_model % self.n_heads:
                raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")
            self.head_dim = self.d_model // self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"RoPE rotates pairs: head_dim={self.head_dim} must be even")
        if not self.d_ff:
            wanted = self.d_model * (8 / 3 if self.ffn in ("swiglu", "moe") else 4)
            self.d_ff = 32 * math.ceil(wanted / 32)
        if self.ffn == "moe" and not 1 <= self.experts_per_token <= self.n_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} of n_experts={self.n_experts}")
        if self.ffn == "moe" and not self.moe_layers:
            raise ValueError(f"moe_every={self.moe_every} of n_layers={self.n_layers}: no block has experts")
        if self.attention_kind == "linear" and self.n_sinks:
            raise ValueError(
                f"n_sinks={self.n_sinks}: sinks are logits of a softmax, and attention_kind='linear' has none"
            )

    @property
    def moe_layers(self) -> range:
        """The blocks with experts: the last of every `moe_every`, as in GShard (Lepikhin et al., 2020)."""
        return range(self.moe_every - 1, self.n_layers if self.ffn == "moe" else 0, self.moe_every)

    @property
    def sees_all(self) -> bool:
        """True if a token sees all tokens before it; False if `attention_mask` hides some of them."""
        return not (self.sliding_window or self.sparse_stride)

    @property
    def plain_attention(self) -> bool:
        """True if attention is a softmax over all tokens before, and nothing else."""
        return self.sees_all and not self.n_sinks and self.attention_kind == "softmax"


# -----------------------------------------------------------------------------
# Equations. Each stands alone: lift it out, compare it with the paper.


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along `dim`; subtracting the maximum keeps exp from overflowing."""
    e = (x - x.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log p(target) in nats; logits (..., V), targets (...) ids, -100 where nothing is asked."""
    logits = logits.float() - logits.float().amax(-1, keepdim=True)
    asked = targets != -100
    chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return ((logits.exp().sum(-1).log() - chosen) * asked).sum() / asked.sum()


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich, 2019).

    This is `(x * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight` in one
    kernel. The casts keep a bfloat16 residual stream bfloat16, whatever autocast thinks of norms.
    """
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps).to(x.dtype)


def rope_angles(positions: Tensor, head_dim: int, theta: float = 10000.0, dtype=torch.float32):
    """What `rotate` needs: positions (..., T) -> (cos, sin), each (..., T, D).

    The two halves of D hold the same angles; sin is negative in the first, the sign of a rotation matrix.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float().unsqueeze(-1) * frequencies  # (..., T, D/2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + D/2]) of x (..., T, D) by the angles of `rope_angles`."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([b, a], dim=-1).mul_(sin)  # in place: autograd then keeps nothing but sin


def apply_rope(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary position embedding (Su et al., 2021) of x (..., T, D) at integer positions (T) or (..., T).

    Convention: Hugging Face's, i.e. dimension i is paired with i + D/2 ("rotate half"). The paper and Meta's
    own Llama pair 2i with 2i + 1; the two differ only by a fixed permutation of the dimensions of q_proj and
    k_proj. The dot product of a rotated query and key depends on their distance alone.
    """
    return rotate(x, *rope_angles(positions, x.shape[-1], theta, x.dtype))


def attention_mask(queries: Tensor, keys: Tensor, window: int = 0, stride: int = 0) -> Tensor:
    """Who may look at whom, True = attend: positions of queries (..., T), of keys (..., S) -> (..., T, S).

    With a stride: the last `stride` tokens and, before them, every stride-th one (Child et al., 2019).
    """
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    mask = (distance >= 0) & (distance < window) if window else distance >= 0
    return mask & ((distance < stride) | (distance % stride == 0)) if stride else mask


def attention(q: Tensor, k: Tensor, v: Tensor, mask=None, sinks=None, dropout=0.0, weights: bool = False):
    """softmax(q k^T / sqrt(D)) v, as in "Attention is all you need", eq. 1: the path to read.

    q (..., T, D), k and v (..., S, D); mask (..., T, S), True = attend, None = everything. `sinks` (..., 1,
    n) are logits that join the softmax but bring no value, so a head can attend to nothing. `weights=True`
    returns (output, weights (..., T, S)). A query that may see nothing gets zeros.
    """
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], -1)], dim=-1)
    w = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[-2]]
    w = w.nan_to_num() if mask is not None else w
    w = F.dropout(w, dropout) if dropout else w
    return (w @ v, w) if weights else w @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """phi(q) phi(k)^T v, each row of weights divided by its sum, with phi(x) = elu(x) + 1 where softmax has
    exp (Katharopoulos et al., 2020, eq. 7). Arguments as in `attention`; returns (output, weights).

    RoPE has turned q and k before: the weights stay positive, but depend on more than the distance.
    """
    w = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).float()
    w = w if mask is None else w * mask
    w = (w / w.sum(-1, keepdim=True).clamp(min=1e-6)).to(v.dtype)
    return w @ v, w


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """`linear_attention` of a whole text with the causal mask, in a time that grows with T and not with T^2.

    Without a softmax, phi(q) phi(k)^T v is also phi(q) (phi(k)^T v): a D x D matrix holds all that a query
    needs of the chunks before its own (eq. 9). q, k and v are (..., T, D). Decoding does not use this: the
    cache keeps keys and values, as it does for softmax.
    """
    q, k = F.elu(q) + 1, F.elu(k) + 1
    v = F.pad(v, (0, 1), value=1.0)  # a column of ones sums the weights of a row
    past, chunks = torch.zeros(q.shape[-1], v.shape[-1], device=q.device), []
    for i in range(0, q.shape[-2], chunk):
        queries, keys, values = (x[..., i : i + chunk, :] for x in (q, k, v))
        chunks.append((queries @ keys.mT).tril() @ values + queries @ past.to(q.dtype))
        past = past + (keys.mT @ values).float()
    y = torch.cat(chunks, dim=-2)
    return y[..., :-1] / y[..., -1:].clamp(min=1e-6)


# -----------------------------------------------------------------------------
# Layers


class Linear(nn.Module):
    """x W^T, to be read and to stand alone; the model uses torch's nn.Linear, which may have a bias.

    Weights from N(0, 2 / (in + out)) (Glorot & Bengio, 2010), cut at three standard deviations.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        std = math.sqrt(2 / (in_features + out_features))
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        return x @ self.weight.T


class Embedding(nn.Module):
    """A row of the matrix for each id, to be read; the model uses torch's. Weights from N(0, 1), cut at 3."""

    def __init__(self, num_embeddings: int, embedding_dim: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.weight, a=-3, b=3)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., d)"""
        return self.weight[ids]


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale a dimension."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's, but the result keeps the dtype of the residual stream (autocast would give float32)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, config.norm_eps) if config.norm == "layer" else nn.Identity()


class Attention(nn.Module):
    """Causal self-attention; each group of H / K query heads shares one key-value head.

    That is GQA (Ainslie et al., 2023): it costs little quality and shrinks the cache that decoding has to
    read for every token.
    """

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        c = self.config = config
        self.layer = layer  # which part of a KV cache is ours
        self.q_proj = nn.Linear(c.d_model, c.n_heads * c.head_dim, bias=c.bias)
        self.k_proj = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=c.bias)
        self.v_proj = nn.Linear(c.d_model, c.n_kv_heads * c.head_dim, bias=c.bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.d_model, bias=c.bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.norm_eps), RMSNorm(c.head_dim, c.norm_eps)
        if c.n_sinks:
            self.sinks = nn.Parameter(torch.zeros(c.n_heads, c.n_sinks))

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: "KVCache | None" = None,
        weights: bool = False,
    ):
        """x (B, T, d) -> (B, T, d), or with `weights=True` (output, weights (B, H, T, S)) by the plain path.

        positions (T) or (B, T) default to 0 .. T-1. mask (T, S) or (B, 1, T, S), True = attend, defaults to
        causal (and the window or stride). `rope` spares the model computing the same angles in every layer.
        """
        c, (B, T, _) = self.config, x.shape
        q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj)
        q = q.view(B, T, c.n_heads, c.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, c.n_kv_heads, c.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = v.view(B, T, c.n_kv_heads, c.head_dim).transpose(1, 2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.positions == "rope":
            if rope is None:
                positions = torch.arange(T, device=x.device) if positions is None else positions
                rope = rope_angles(positions.unsqueeze(-2), c.head_dim, c.rope_theta, q.dtype)
            q = rotate(q, *rope)
            if cache is None or cache.key_rope is None:
                k = rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
            if cache.key_rope is not None:  # a rolling cache gives keys their positions when they are read
                k = rotate(k, *cache.key_rope)
        linear = c.attention_kind == "linear"
        slow = weights or c.n_sinks > 0
        if mask is None and T > 1 and (slow or not c.sees_all):
            mask = attention_mask(*2 * [torch.arange(T, device=x.device)], c.sliding_window, c.sparse_stride)
        dropout = c.dropout * self.training
        if slow or linear:
            k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1) for t in (k, v))
        if linear and mask is None and T > 1:
            y = causal_linear_attention(q, k, v)
        elif linear:  # one new token, or a mask that hides more than the future
            y, w = linear_attention(q, k, v, mask)
        elif slow:
            sinks = self.sinks.unsqueeze(1) if c.n_sinks else None
            y, w = attention(q, k, v, mask, sinks, dropout, weights=True)
        elif cache is not None and cache.prompts is not None:
            y = attention_after_prompt(q, *cache.prompts[self.layer], cache.prompt_mask, k, v)
        elif T == 1 and cache is not None:
            # One new token: a group's query heads become "queries" of their key head, and no key is repeated.
            y = one_query(q.view(B, c.n_kv_heads, -1, c.head_dim), k, v, mask)
            y = y.reshape(B, c.n_heads, 1, c.head_dim)
        elif x.device.type == "cpu" and not dropout and 1 < T == k.shape[2] <= 1024:
            y = AttentionInBlocks.apply(q, k, v, mask)
        else:
            causal, grouped = mask is None and T > 1, c.n_heads != c.n_kv_heads
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)
        (y,) = together(y.transpose(1, 2).reshape(B, T, -1), self.o_proj)
        return (y, w) if weights else y


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): a feed-forward layer whose hidden units are gated (Shazeer, 2020)."""

    def __init__(self, d_model: int, d_ff: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = together(x, self.gate_proj, self.up_proj)
        (y,) = together(F.silu(gate) * up, self.down_proj)
        return y


class MLP(nn.Module):
    """down(act(up(x))), act = GELU in GPT-2's tanh approximation, or SiLU."""

    def __init__(self, d_model: int, d_ff: int, act: str = "gelu", bias: bool = False):
        super().__init__()
        self.act = act
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up_proj(x)
        return self.down_proj(F.gelu(h, approximate="tanh") if self.act == "gelu" else F.silu(h))


class MoE(nn.Module):
    """A sparse mixture of SwiGLU experts: a router sends each token to its best 1 or 2 of E experts.

    Routing as in Mixtral: softmax over all experts, the chosen probabilities renormalised (top-1 keeps the
    raw probability, as in Switch, else the router would get no gradient). Tokens are sorted into one (E, C,
    d) buffer, C slots an expert, so that all experts are three batched matrix products and no loop over
    tokens. With `capacity_factor` C is fixed and tokens that find their expert full skip the layer (Switch
    Transformer, 2.2).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.gate = nn.Linear(c.d_model, c.n_experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(c.n_experts, c.d_ff, c.d_model))  # gate projection of each expert
        self.w3 = nn.Parameter(torch.empty(c.n_experts, c.d_ff, c.d_model))  # up projection
        self.w2 = nn.Parameter(torch.empty(c.n_experts, c.d_model, c.d_ff))  # down projection
        self.stats: dict[str, Tensor] = {}  # of the last forward pass: aux_loss, load (E), dropped

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d); what the router did lies in `self.stats` afterwards."""
        c, shape = self.config, x.shape
        E, k = c.n_experts, c.experts_per_token
        x = x.reshape(-1, shape[-1])  # (N, d)
        N = len(x)
        with torch.autocast(x.device.type, enabled=False):  # float32: a rounding error could change the route
            router_logits = F.linear(x.float(), self.gate.weight)
        probs = router_logits.softmax(-1)  # (N, E)
        p, expert = probs.topk(k, dim=-1)  # (N, k)
        p = p / p.sum(-1, keepdim=True) if k > 1 else p

        # Rank of every (token, choice) among those that want the same expert; first choices are served first.
        wants = F.one_hot(expert.T.reshape(-1), E)  # (k N, E), all first choices before all second ones
        rank = ((wants.cumsum(0) - 1) * wants).sum(-1)  # (k N)
        load = wants.sum(0)  # (E)
        C = math.ceil(c.capacity_factor * N * k / E) if c.capacity_factor else int(load.max())
        kept = rank < C
        slot = torch.where(kept, expert.T.reshape(-1) * C + rank, E * C)  # E * C: the bin for the dropped

        token = torch.arange(N, device=x.device).repeat(k)
        buffer = x.new_zeros(E * C + 1, shape[-1]).index_copy(0, slot, x[token])
        b = buffer[:-1].view(E, C, -1)
        w1, w2, w3 = (w.to(x.dtype).transpose(1, 2) for w in (self.w1, self.w2, self.w3))
        b = torch.bmm(F.silu(torch.bmm(b, w1)) * torch.bmm(b, w3), w2)  # (E, C, d)
        out = torch.cat([b.view(E * C, -1), b.new_zeros(1, shape[-1])])  # the dropped get zeros
        out = out[slot]  # (k N, d)
        out = (out * p.T.reshape(-1, 1).to(out.dtype)).view(k, N, -1).sum(0)

        # Load balancing (Switch, eq. 4): E * sum over experts of share of choices * mean probability.
        balance = E * (load / (k * N) * probs.mean(0)).sum()
        z = router_logits.logsumexp(-1).square().mean()  # router z-loss (ST-MoE, eq. 5) keeps logits small
        self.stats = {
            "aux_loss": c.load_balance_coef * balance + c.router_z_coef * z,
            "load": load.detach() / (k * N),
            "dropped": (~kept).sum(),
        }
        return out.to(x.dtype).view(shape)


def make_ffn(config: ModelConfig, layer: int = 0) -> nn.Module:
    if layer in config.moe_layers:
        return MoE(config)
    if config.ffn in ("swiglu", "moe"):
        return SwiGLU(config.d_model, config.d_ff, config.bias)
    return MLP(config.d_model, config.d_ff, config.ffn, config.bias)


class Block(nn.Module):
    """Attention, then the feed-forward layer, each added to the residual stream.

    Pre-norm (x + f(norm(x))) trains at any depth; post-norm (norm(x + f(x))), the 2017 order, is there to
    compare.
    """

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        self.post = config.norm_position == "post"
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config)  # Llama's name: the norm that comes after attention
        self.mlp = make_ffn(config, layer)
        self.config = config

    def forward(self, x: Tensor, positions=None, mask=None, rope=None, cache=None) -> Tensor:
        """x (B, T, d) -> (B, T, d); the other arguments are `Attention.forward`'s."""
        if self.post:
            x = self.input_layernorm(x + self.drop(self.self_attn(x, positions, mask, rope, cache)))
            return self.post_attention_layernorm(x + self.drop(self.mlp(x)))
        x = x + self.drop(self.self_attn(self.input_layernorm(x), positions, mask, rope, cache))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout) if self.config.dropout and self.training else x


# -----------------------------------------------------------------------------
# The whole model


def in_eval_mode(method):
    """Decorator: no dropout while the method runs; afterwards, or when it raises, the mode is as it was."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        was_training = self.training
        self.eval()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.train(was_training)

    return wrapped


class ModernDecoderLM(nn.Module):
    """Embedding, n_layers blocks, a last norm and the head, with the names of Hugging Face's Llama."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.vocab_size, c.d_model)})
        if c.positions == "learned":
            self.model["embed_positions"] = nn.Embedding(c.context_length, c.d_model)
        self.model["layers"] = nn.ModuleList(Block(c, layer) for layer in range(c.n_layers))
        if c.norm_position == "pre":  # post-norm has already normalised what leaves the last block
            self.model["norm"] = make_norm(c)
        self.lm_head = None if c.tie_embeddings else nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.gradient_checkpointing = False  # recompute each block in the backward pass: a third more FLOPs
        self.loss_chunk = 4096  # tokens whose logits exist at a time, see ChunkedCrossEntropy
        self.init_weights()
        self.tabulate()

    def init_weights(self):
        """Normal(0, 0.02), as GPT-2. Layers that write into the residual stream start smaller by sqrt(2
        n_layers), so that its variance does not grow with depth."""
        for name, p in self.named_parameters():
            if p.dim() >= 2 and not name.endswith("sinks"):
                residual = name.endswith(("o_proj.weight", "down_proj.weight", "w2"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)

    def tabulate(self) -> None:
        """The angles of all positions, (2, T, D): a compiler would not compute them once but put their sines
        and powers into the kernels of every layer.
        """
        c, device = self.config, self.head.device
        if c.positions != "rope":
            return
        table = rope_angles(torch.arange(c.context_length, device=device), c.head_dim, c.rope_theta)
        self.register_buffer("rope", torch.stack(table), persistent=False)

    def set_dropout(self, p: float) -> None:
        """The dropout of a model that was loaded, everywhere: all layers read it from this one config."""
        if not 0 <= p < 1:
            raise ValueError(f"dropout={p} must be at least 0 and below 1: it is the share that is set to 0")
        self.config.dropout = p

    @property
    def head(self) -> Tensor:
        """The (V, d) matrix that scores every token of the vocabulary."""
        return (self.lm_head or self.model["embed_tokens"]).weight

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: autocast's inside an autocast region, else that of the weights."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.head.dtype

    def hidden(self, ids: Tensor, positions=None, mask=None, cache=None, rope=None) -> Tensor:
        """ids (B, T) -> what the head reads, (B, T, d). Other arguments as in `Attention.forward`."""
        c, T = self.config, ids.shape[1]
        if cache is not None:
            positions, mask = cache.positions, cache.mask
        elif positions is None:
            if c.positions == "learned" and T > c.context_length:
                raise ValueError(
                    f"{T} tokens, but learned positions end at context_length={c.context_length}"
                )
            if c.positions == "rope" and rope is None and T <= c.context_length == self.rope.shape[1]:
                rope = self.rope[:, :T].to(self.dtype).unbind()
            positions = torch.arange(T, device=ids.device)
        x = self.model["embed_tokens"](ids)
        # Under autocast a card's residual stream is bfloat16 too: 37 bytes a token and d per layer instead of
        # 47. A CPU has the room: float32 takes no longer there and ends at 0.671 nats and not 0.676 (cpu.py).
        x = x.to(self.dtype) if x.is_cuda else x
        if c.positions == "rope" and rope is None:  # the same angles serve every layer
            rope = rope_angles(positions.unsqueeze(-2), c.head_dim, c.rope_theta, self.dtype)
        if c.positions == "learned":
            x = x + self.model["embed_positions"](positions).to(x.dtype)
        x = F.dropout(x, c.dropout, self.training)
        for block in self.model["layers"]:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, positions, mask, rope, use_reentrant=False)
            else:
                x = block(x, positions, mask, rope, cache)
        return self.model["norm"](x) if "norm" in self.model else x

    def forward(self, ids: Tensor, targets: Tensor | None = None, positions=None, mask=None, cache=None):
        """Logits (B, T, V); or with targets (B, T), -100 = not asked, (sum of losses in nats, number of
        targets).

        The sum and the count are returned apart because the mean over a batch that is split into
        micro-batches or ranks is the sum of sums over the sum of counts, not the mean of means. An MoE adds
        its auxiliary losses, times the count, while training only. With a cache, `cache.begin` says where
        these tokens go.
        """
        x = self.hidden(ids, positions, mask, cache)
        if targets is None:
            return F.linear(x, self.head)
        n = (targets != -100).sum()
        # A Function does not see no_grad(): attached, the head would get its gradient in evaluation too.
        head = self.head if torch.is_grad_enabled() else self.head.detach()
        loss = ChunkedCrossEntropy.apply(x.flatten(0, 1), head, targets.flatten(), self.loss_chunk)
        if self.config.ffn == "moe" and self.training:
            experts = [self.model["layers"][layer].mlp for layer in self.config.moe_layers]
            loss = loss + n * sum(moe.stats["aux_loss"] for moe in experts)
        return loss, n

    # -------------------------------------------------------------------------
    # Generation

    def pack(self, transposed: bool = True) -> "ModernDecoderLM":
        """Lays the weights out for decoding, where a step is bound by reading them: q, k and v side by side,
        gate and up too, and all of them transposed (1.1x to 1.2x on two cores, batch 1 and 16), but for
        compiled decoding of one row on a CPU, see `linear`.

        Parameters become views of the packed matrices, so nothing is stored twice. Training or moving the
        model forgets the packing again.
        """
        self.unpack().eval()
        for block in self.model["layers"]:
            a, m = block.self_attn, block.mlp
            groups = [[a.q_proj, a.k_proj, a.v_proj], [a.o_proj]]
            if isinstance(m, SwiGLU):
                groups += [[m.gate_proj, m.up_proj], [m.down_proj]]
            for group in groups:
                packed = torch.cat([layer.weight.data for layer in group]).t()  # (in, outputs)
                packed = packed.contiguous() if transposed else packed
                columns = packed.split([layer.out_features for layer in group], dim=1)
                for layer, part in zip(group, columns, strict=True):
                    layer.weight.data = part.t()
                group[0].packed = packed
        return self

    def unpack(self) -> "ModernDecoderLM":
        packed = [layer for layer in self.modules() if getattr(layer, "packed", None) is not None]
        for layer in packed:
            layer.packed = None
        for p in self.parameters() if packed else ():
            p.data = p.data.clone(memory_format=torch.contiguous_format)
        return self

    def train(self, mode: bool = True) -> "ModernDecoderLM":
        if mode:
            self.unpack()
        return super().train(mode)

    def _apply(self, function, recurse: bool = True):  # what .to(), .half(), .cuda() call
        self.unpack()
        super()._apply(function, recurse)
        self.tabulate()
        return self

    @torch.no_grad()
    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Room for more tokens, a multiple of 64; the new rows are the mean of the old ones."""
        rows = 64 * math.ceil(vocab_size / 64)
        embedding = self.model["embed_tokens"]
        for matrix in [embedding] if self.config.tie_embeddings else [embedding, self.lm_head]:
            old = matrix.weight
            new = old.mean(0).repeat(rows - len(old), 1)
            matrix.weight = nn.Parameter(torch.cat([old, new]))
        self.config.vocab_size = rows

    @in_eval_mode
    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_tokens: Sequence[int] = (),
        n: int = 1,
        seed: int | Sequence[int] = 0,
        window: int = 0,
        keep: int = 4,
        stream: Callable[[int, int], None] | None = None,
        force: Callable[[int, list[int]], Sequence[int]] | None = None,
        adjust: Callable[[list[int], Tensor], Tensor] | None = None,
        compile: bool = False,
        graph: bool | None = None,
    ) -> list[list[int]]:
        """Continues every prompt `n` times: the new tokens of prompt 0 sample 0, prompt 0 sample 1, ... as
        lists.

        Prompts may differ in length. A row ends after a stop token (the last of its list) or max_new_tokens.
        temperature 0 is greedy; `sample` explains top_k, top_p, min_p and repetition_penalty. Row r has a
        random stream of its own, from `seed[r]` or `seed + r`: its text does not depend on its neighbours in
        the batch. With `window` > 0, or when a text outgrows the context, the cache rolls: the first `keep`
        tokens and the newest ones stay (StreamingLLM). Learned positions cannot roll: all rows end when the
        longest fills the context. `stream(row, token)` is told every new token. `force(row, new_tokens)` may
        return tokens that must come next: that is how a calculator answers. `adjust(rows, logits)` is called
        once a step with the logits (B, V) of these rows, and returns those to sample from; it may raise to
        stop. `compile=True` decodes with a compiled step: half a minute to start, then faster. `graph`, which
        is on by itself on a card, gives every step the same shapes, so that the card can be told once what to
        do and then again and again.
        """
        check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        c, rows = self.config, len(prompts) * n
        if not rows or not all(len(p) for p in prompts):
            raise ValueError("generate needs at least one prompt, and in every prompt at least one token")
        if max_new_tokens < 1:
            return [[] for _ in range(rows)]
        longest = max(map(len, prompts))
        slots = keep + window if window else min(longest + max_new_tokens, c.context_length)
        rolling = longest + max_new_tokens > slots
        if c.positions == "learned" and rolling:
            if longest >= c.context_length:
                raise ValueError(
                    f"a prompt of {longest} tokens leaves no room in context_length={c.context_length}"
                )
            slots, rolling = c.context_length, False
            max_new_tokens = min(max_new_tokens, c.context_length - longest)
        if graph is None:
            graph = self.device.type == "cuda"
        # An expert's room is asked for each time; `force` and `adjust` are Python.
        graph = graph and not (rolling or force or adjust or c.ffn == "moe")
        slots += -slots % 8 if graph else 0  # attention kernels want masks of such widths
        net = self.cast()
        cache = KVCache(c, len(prompts), slots, keep if rolling else None, self.device, self.dtype)
        logits = net.prefill(prompts, cache)  # (B, V)
        if n > 1:  # n samples from one prefill
            # Reading a prompt's keys once for all of its samples makes a CPU 1.3 times as fast; a card, which
            # waits for launches and not for memory, would launch more.
            if compile or graph or rolling or not c.plain_attention or self.device.type != "cpu":
                cache.select(torch.arange(len(prompts), device=self.device).repeat_interleave(n))
            else:
                cache = cache.fork(n, max_new_tokens)
            logits = logits.repeat_interleave(n, dim=0)

        seeds = [seed + r for r in range(rows)] if isinstance(seed, int) else seed
        if len(seeds) != rows:
            raise ValueError(f"{len(seeds)} seeds for {rows} rows")
        # One uniform number a row and step, drawn beforehand, is all the randomness that sampling needs.
        uniforms = [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
        uniforms = torch.stack(uniforms).to(self.device)
        seen = None
        if repetition_penalty != 1.0:
            seen = torch.zeros(rows, c.vocab_size, dtype=torch.bool, device=self.device)
            for r in range(rows):
                seen[r, list(prompts[r // n])] = True
        if compile and not hasattr(self, "_compiled_step"):
            # The cache is allocated once, but on a CPU a step reads its filled part only, whose length torch
            # makes a symbol at the second step. A step of fixed shape that masks the rest lost: 428 tok/s
            # against 490 at batch 1, 838 against 1,320 at batch 16 (256 tokens, one thread).
            # cpp_wrapper calls kernels from C++ and not from Python: 1.1 times as fast at batch 1.
            cpu = {"cpp_wrapper": True, "size_asserts": False} if self.device.type == "cpu" else None
            self._compiled_step = torch.compile(type(self).step, options=cpu)
        step = self._compiled_step if compile else type(self).step
        if graph:
            cache.fix()

        alive = list(range(rows))  # the row of each logit

        def draw(logits: Tensor, uniform: Tensor) -> Tensor:
            logits = adjust(alive, logits) if adjust else logits
            return sample(logits, uniform, temperature, top_k, top_p, min_p, repetition_penalty, seen)

        # Products of compiled steps are all alike, but for those of grouped queries with their keys.
        alike = compile and c.n_heads == c.n_kv_heads and rows * c.d_model >= 4096
        precision = fastest_products(self.device) if alike else torch.get_float32_matmul_precision()

        def next_token(token: Tensor, uniform: Tensor) -> Tensor:
            if seen is not None:
                seen.scatter_(1, token.unsqueeze(1), True)
            cache.begin(1)
            with float32_products(precision):
                logits = step(net, token.unsqueeze(1), cache)
            return draw(logits, uniform)

        following = Recorded(next_token) if graph and self.device.type == "cuda" else next_token

        result: list[list[int]] = [[] for _ in range(rows)]
        forced: list[list[int]] = [[] for _ in range(rows)]
        done, pending = set(), []
        # Asking a GPU for a token stops its queue of work: look every step only if somebody waits for it.
        look_every = 1 if stream or force or adjust or self.device.type == "cpu" else 16
        token = draw(logits, uniforms[:, 0])
        for i in range(max_new_tokens):
            if force:
                drawn = token.tolist()
                for j, r in enumerate(alive):
                    forced[r] = forced[r] or (list(force(r, result[r])) if r not in done else [])
                    drawn[j] = forced[r].pop(0) if forced[r] else drawn[j]
                token = torch.tensor(drawn, device=self.device)
            pending.append(token)
            if len(pending) == look_every or i == max_new_tokens - 1:
                for r, column in zip(alive, torch.stack(pending, dim=1).tolist(), strict=True):
                    for t in column if r not in done else []:
                        result[r].append(t)
                        if stream:
                            stream(r, t)
                        if t in stop_tokens:
                            done.add(r)
                            break
                pending = []
                if len(done) == rows or i == max_new_tokens - 1:
                    break
                left = [j for j, r in enumerate(alive) if r not in done]
                if cache.prompts is not None and len(left) <= len(alive) * 3 // 4:
                    left = as_many_of_each(left, [r // n for r in alive])
                if not compile and len(left) <= len(alive) // 2:  # go on with the unfinished rows alone
                    alive, index = [alive[j] for j in left], torch.tensor(left, device=self.device)
                    cache.select(index)
                    token, uniforms = token[index], uniforms[index]
                    seen = seen[index] if seen is not None else None
            token = following(token, uniforms[:, i + 1])
        return result

    def cast(self) -> "ModernDecoderLM":
        """Under autocast a copy in its dtype, so that weights are cast once and not for every token (but for
        the router's, which are few and decide who computes); else the model itself.
        """
        if self.head.dtype == self.dtype:
            return self
        with torch.device("meta"):
            twin = ModernDecoderLM(self.config)
        weights = {k: v if ".gate." in k else v.to(self.dtype) for k, v in self.state_dict().items()}
        twin.load_state_dict(weights, assign=True)
        twin.tabulate()
        return twin.pack()

    def prefill(self, prompts: Sequence[Sequence[int]], cache: "KVCache") -> Tensor:
        """Reads prompts of any lengths into an empty cache; returns the logits after each one's last token,
        (B, V).

        What exceeds the slots of a rolling cache follows token by token, as it would have when generated.
        """
        lengths = torch.tensor([len(p) for p in prompts])
        ids = nn.utils.rnn.pad_sequence(
            [torch.as_tensor(p, dtype=torch.long) for p in prompts], batch_first=True
        ).to(self.device)
        first = lengths.clamp(max=cache.slots)
        cache.begin(int(first.max()), first)
        x = self.hidden(ids[:, : first.max()], cache=cache)
        logits = F.linear(x[torch.arange(len(x), device=x.device), first.to(x.device) - 1], self.head)
        for t in range(cache.slots, ids.shape[1]):
            reads = lengths > t
            cache.begin(1, reads.long())
            logits = torch.where(reads.to(x.device).unsqueeze(1), self.step(ids[:, t : t + 1], cache), logits)
        return logits

    def step(self, ids: Tensor, cache: "KVCache") -> Tensor:
        """One token a row, ids (B, 1), after `cache.begin(1)`: the logits of the next one, (B, V)."""
        return linear(self.hidden(ids, cache=cache)[:, -1], self.head)


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """Draws one token a row: logits (B, V), uniform (B) in [0, 1), seen (B, V) bool -> ids (B).

    In this order, as in transformers: tokens already seen have their logits divided (if positive) or
    multiplied by repetition_penalty (Keskar et al., 2019); logits are divided by temperature; the top_k best
    stay; of these the smallest set that holds at least top_p of the probability (Holtzman et al., 2019); of
    these the tokens with at least min_p times the best one's probability. The draw inverts the cumulative
    distribution at `uniform`.
    """
    logits = logits.float()
    if seen is not None:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if temperature == 0:
        return logits.argmax(-1)
    order = None  # column -> token id, once columns are sorted from best to worst
    if 0 < top_k < logits.shape[-1]:
        logits, order = logits.topk(top_k, dim=-1)
    elif top_p < 1:
        logits, order = logits.sort(dim=-1, descending=True)
    p = (logits / temperature).softmax(-1)
    if top_p < 1:
        before = p.cumsum(-1) - p  # the mass of all better tokens: 0 for the best one, which always stays
        p = p * (before < max(top_p, 1e-9))
    if min_p > 0:
        p = p * (p >= min_p * p.amax(-1, keepdim=True))
    cdf = p.double().cumsum(-1)
    index = torch.searchsorted(cdf, (uniform.double() * cdf[:, -1]).unsqueeze(1), right=True)
    index = index.clamp(max=p.shape[-1] - 1)
    return (index if order is None else order.gather(1, index)).squeeze(1)


def check_sampling(
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> None:
    """ValueError for options that describe no distribution."""
    allowed = {
        f"temperature={temperature} must be 0 (greedy) or above": 0 <= temperature < math.inf,
        f"top_k={top_k} must be 0 (all tokens) or above": top_k >= 0,
        f"top_p={top_p} must be above 0 and at most 1": 0 < top_p <= 1,
        f"min_p={min_p} must be from 0 to 1": 0 <= min_p <= 1,
        f"repetition_penalty={repetition_penalty} must be above 0": 0 < repetition_penalty < math.inf,
    }
    for message, is_allowed in allowed.items():
        if not is_allowed:
            raise ValueError(message)


class KVCache:
    """Keys and values of the tokens so far: two (B, K, S, D) tensors a layer, allocated once.

    Row b's token t lies in slot t, so rows of different lengths share the tensors and padding behind a short
    prompt is never looked at. `begin(T)` plans a forward pass over the next T tokens: where they go, their
    positions, what they may see; `append` then stores them layer by layer.

    A rolling cache (`keep` given) never fills: the first `keep` tokens stay, the others form a ring that
    forgets its oldest. Positions count inside the cache, as StreamingLLM found necessary (Xiao et al., 2023),
    so its keys are stored unrotated and get their RoPE when read.
    """

    def __init__(self, config, rows, slots, keep=None, device="cpu", dtype=torch.float32):
        shape = (rows, config.n_kv_heads, slots, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.config, self.slots, self.keep, self.device = config, slots, keep, device
        self.length = torch.zeros(rows, dtype=torch.long, device=device)  # tokens that each row has seen
        self.lengths = [0] * rows  # the same, known without asking the device
        self.prompts = None  # of a fork: a layer's keys and values of what its rows share
        self.fixed = False  # see `fix`
        if keep is not None and not 0 <= keep < slots:
            raise ValueError(f"keep={keep} tokens of slots={slots}: a window must remain")
        if keep is not None and config.positions == "learned":
            raise ValueError("learned positions cannot roll: they are baked into the keys of the cache")

    def begin(self, T: int, counts: Tensor | None = None) -> None:
        """Plans the next T tokens of every row, of which only the first counts[b] are real (default: all).

        Sets, for `append` and the model: `positions` of the new tokens; `mask`, what they may see; `read`,
        how many slots hold anything; `block`, the first of the slots to write if all rows write the same
        ones, or else `write` (B, T); and `key_rope`, the angles of all keys in a rolling cache.
        """
        if self.fixed:
            return self.begin_fixed()
        c, start, empty = self.config, self.length, max(self.lengths) == 0
        counts = torch.full((len(start),), T) if counts is None else counts
        self.length = start + counts.to(self.device)
        self.lengths = [n + more for n, more in zip(self.lengths, counts.tolist(), strict=True)]
        most, even = max(self.lengths), len(set(self.lengths)) == 1
        if self.keep is None and most > self.slots:
            raise ValueError(f"{most} tokens do not fit into a KV cache of {self.slots} slots")
        if self.keep is not None and T > 1 and not empty:
            raise ValueError("a rolling cache reads one token at a time after its first prompt")
        self.empty, self.read = empty, min(most, self.slots)
        self.block = self.mask = self.key_rope = None
        new = torch.arange(T, device=self.device)
        slot = torch.arange(self.read, device=self.device)
        if empty:  # a prefill sees nothing but itself: attention's own causal mask will do
            self.block, self.positions, where = 0, new, new
        elif self.keep is None:
            self.write = self.positions = start.unsqueeze(1) + new  # (B, T)
            where = slot  # slot s holds position s
            if even and T == 1:
                self.block, self.positions = most - 1, slot[-1:]
        else:
            at = start.unsqueeze(1) + new  # (B, 1): index in the row's whole text
            ring = self.slots - self.keep
            self.write = torch.where(at < self.slots, at, self.keep + (at - self.keep) % ring)
            self.positions = at.clamp(max=self.slots - 1)
            # The slot behind the newest token's is the oldest of a full ring; ages count from there. A row
            # without a token now (counts 0) overwrites that oldest slot, which its next token takes anyway.
            overflow = (at + 1 - self.slots).clamp(min=0)
            age = (slot - self.keep - overflow) % ring
            where = torch.where(slot < self.keep, slot, self.keep + age)  # (B, S)
        if self.prompts is not None:
            self.positions = self.positions + self.after.unsqueeze(1)
        if self.keep is not None and c.positions == "rope":
            self.key_rope = rope_angles(where.unsqueeze(-2), c.head_dim, c.rope_theta, self.k[0].dtype)
        if not empty and (not even or T > 1 or not c.sees_all):
            mask = attention_mask(self.positions, where, c.sliding_window, c.sparse_stride)
            self.mask = mask.unsqueeze(-3)

    def fix(self) -> None:
        """From now on one token at a time, by steps that are all alike: they read every slot, of which a mask
        hides the empty ones, and what changes from step to step is on the device. The caller counts slots.
        """
        self.fixed, self.empty, self.read = True, False, self.slots
        self.block = self.key_rope = None
        self.slot = torch.arange(self.slots, device=self.device)

    def begin_fixed(self) -> None:
        c = self.config
        self.positions = self.write = self.length.unsqueeze(1).clone()  # (B, 1)
        self.length.add_(1)
        mask = attention_mask(self.positions, self.slot, c.sliding_window, c.sparse_stride)
        self.mask = mask.unsqueeze(-3)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, K, T, D) of the tokens planned by `begin`; returns all that they may look at."""
        keys, values = self.k[layer], self.v[layer]
        if self.block is not None:
            keys.narrow(2, self.block, k.shape[2]).copy_(k)
            values.narrow(2, self.block, v.shape[2]).copy_(v)
        else:
            rows = torch.arange(len(k), device=k.device).unsqueeze(1)
            keys[rows, :, self.write] = k.transpose(1, 2).to(keys.dtype)  # (B, T, K, D) at (B, T)
            values[rows, :, self.write] = v.transpose(1, 2).to(values.dtype)
        return (k, v) if self.empty else (keys.narrow(2, 0, self.read), values.narrow(2, 0, self.read))

    def fork(self, n: int, slots: int) -> "KVCache":
        """An empty cache with n rows for each row here, which they all go on from: what was read so far is
        stored once and read once for all of them (`attention_after_prompt`).
        """
        new = KVCache(self.config, n * len(self.lengths), slots, None, self.device, self.k[0].dtype)
        read = [[t.narrow(2, 0, self.read) for t in layers] for layers in (self.k, self.v)]
        new.prompts = list(zip(*read, strict=True))
        slot = torch.arange(self.read, device=self.device)
        new.prompt_mask = (slot < self.length.unsqueeze(1)).view(-1, 1, 1, self.read)
        new.after = self.length.repeat_interleave(n)  # the position of each row's first token
        return new

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows: rows (B') of indices; of a fork, as many rows of each prompt."""
        if self.prompts is not None:
            prompt = torch.unique_consecutive(rows // (len(self.lengths) // len(self.prompt_mask)))
            for layer, (k, v) in enumerate(self.prompts):
                self.prompts[layer] = (k[prompt], v[prompt])
            self.prompt_mask, self.after = self.prompt_mask[prompt], self.after[rows]
        for layer in range(len(self.k)):  # one after the other: old and new keys of one layer exist together
            self.k[layer] = self.k[layer][rows]
            self.v[layer] = self.v[layer][rows]
        self.length, self.lengths = self.length[rows], [self.lengths[i] for i in rows.tolist()]

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.k + self.v)


# -----------------------------------------------------------------------------
# Hugging Face's folder: config.json and model.safetensors


def save_pretrained(model: ModernDecoderLM, folder: str | Path, **extra) -> None:
    """Writes config.json (plus `extra`, such as eos_token_id) and model.safetensors, each atomically.

    The ids in `extra` also go to generation_config.json, from which transformers' `generate` takes them.
    """
    from safetensors.torch import save_file

    from support.hf_format import to_hf_config, to_hf_tensors, write_generation_config

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_hf_tensors(
        model.config, {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    )
    text = json.dumps(to_hf_config(model.config) | extra, indent=2)
    write_atomically(folder / "config.json", lambda path: path.write_text(text + "\n"))
    write_generation_config(folder, extra)
    write_atomically(
        folder / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )


def from_pretrained(name: str | Path, device: str | torch.device = "cpu") -> ModernDecoderLM:
    """A run folder of ours, or a GPT-2, Llama, Mistral, Qwen3 or Mixtral checkpoint: folder or hub id.

    Weights are float32 whatever they were stored as; the model is in evaluation mode. Raises
    FileNotFoundError or ValueError that say what is wrong: no such folder, an architecture this file can't
    compute, tensors missing or too many or misshapen.
    """
    from support.hf_format import from_hf_config, load_tensors

    folder = Path(name)
    if not folder.is_dir() and (folder.parts[0] in ("/", "..", "out") or len(folder.parts) > 2):
        raise FileNotFoundError(f"there is no folder {folder}")  # nor could it be a name on the hub
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors"]))
        except Exception as error:
            raise FileNotFoundError(
                f"{name} is neither a folder nor a model that the hub gave: {error}"
            ) from None
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} holds no config.json: not a finished run, nor a Hugging Face model"
        )
    try:
        config = from_hf_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, UnicodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged or incomplete: {error!r}") from None
    return from_tensors(config, load_tensors(folder), f"{folder}").to(device)


def from_tensors(config: ModelConfig, tensors: dict[str, Tensor], source: str) -> ModernDecoderLM:
    """The model of a checkpoint's tensors, under the names that they have on disk, in evaluation mode.

    Raises ValueError, which names the `source`, if tensors are missing, too many or of another shape.
    """
    from support.hf_format import from_hf_tensors

    with torch.device("meta"):  # shapes only: no time spent on initialising weights that are then replaced
        model = ModernDecoderLM(config)
    ours, want = from_hf_tensors(config, tensors), model.state_dict()
    missing, unexpected = sorted(want.keys() - ours.keys()), sorted(ours.keys() - want.keys())
    misshapen = [k for k in want.keys() & ours.keys() if want[k].shape != ours[k].shape]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"{source} does not hold the model its config.json describes: missing {missing[:4]}, "
            f"unexpected {unexpected[:4]}, of another shape {misshapen[:4]}"
        )
    model.load_state_dict({k: v.float().contiguous() for k, v in ours.items()}, assign=True)
    model.tabulate()
    return model.requires_grad_(True).eval()


ModernDecoderLM.save_pretrained = save_pretrained
ModernDecoderLM.from_pretrained = staticmethod(from_pretrained)
