"""The model: a decoder-only transformer, from single equations up to sampling text.

Read it from top to bottom: configuration, equations, layers, the whole model, key-value cache, sampling. It
needs torch alone; support/ reads and writes files and has a cache that rolls.

    config = ModelConfig(n_layers=6, d_model=288, n_heads=6, vocab_size=4096)
    model = ModernDecoderLM(config)
    logits = model(ids)                                     # ids (B, T) -> logits (B, T, V)
    loss_sum, n_targets = model(ids, targets)               # nats, summed over the targets that are not -100
    tokens = model.generate([[1, 2, 3]], max_new_tokens=20, temperature=0.8, n=4)   # 4 continuations
    model.save_pretrained("out/base")                       # a folder that transformers loads too

Shapes are written (B, T, d): B sequences of T tokens, d = d_model. H query heads, K key-value heads, D =
head_dim, f = d_ff, V = vocab_size. With the default switches this is a Llama; each other switch is an `if`
or two, near the layer that it changes. Everything is computed plainly here. The scripts run faster:
`pick_device` (support/machine.py) replaces five names of this module, `rms_norm`, `attend`, `project`,
`lm_loss` and `Decoder`, by those of support/kernels.py, with the same results.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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
    n_sinks: int = 0  # learned attention sinks per head: logits that softmax may spend its mass on
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
        check_config(self)
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.head_dim or self.d_model // self.n_heads
        if not self.d_ff:
            widening = 8 / 3 if self.ffn in ("swiglu", "moe") else 4
            self.d_ff = 32 * math.ceil(self.d_model * widening / 32)

    @property
    def moe_layers(self) -> range:
        """The blocks with experts: the last of every `moe_every`, as in GShard (Lepikhin et al., 2020)."""
        end = self.n_layers if self.ffn == "moe" else 0
        return range(self.moe_every - 1, end, self.moe_every)

    @property
    def sees_all(self) -> bool:
        """True if a token sees all tokens before it; False if `attention_mask` hides some of them."""
        return not (self.sliding_window or self.sparse_stride)

    @property
    def plain_attention(self) -> bool:
        """True if attention is a softmax over all tokens before, and nothing else."""
        return self.sees_all and not self.n_sinks and self.attention_kind == "softmax"


# -----------------------------------------------------------------------------
# Attention: its equations, then the layer


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along `dim`; subtracting the maximum keeps exp from overflowing."""
    e = (x - x.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


def attention(q: Tensor, k: Tensor, v: Tensor, mask=None, sinks=None, dropout=0.0, weights: bool = False):
    """softmax(q k^T / sqrt(D)) v, as in "Attention is all you need", eq. 1.

    q (..., T, D), k and v (..., S, D); mask (..., T, S), True = attend, None = everything. `sinks` (..., 1,
    n) are logits that join the softmax but bring no value, so a head can attend to nothing. `weights=True`
    returns (output, weights (..., T, S)). A query that may see nothing gets zeros.
    """
    scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], -1)], dim=-1)
    w = softmax(scores).nan_to_num()[..., : k.shape[-2]].to(q.dtype)
    w = F.dropout(w, dropout)
    return (w @ v, w) if weights else w @ v


def attention_mask(queries: Tensor, keys: Tensor, window: int = 0, stride: int = 0) -> Tensor:
    """Who may look at whom, True = attend: positions of queries (..., T), of keys (..., S) -> (..., T, S).

    With a stride: the last `stride` tokens and, before them, every stride-th one (Child et al., 2019).
    """
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    mask = distance >= 0
    if window:
        mask &= distance < window
    if stride:
        mask &= (distance < stride) | (distance % stride == 0)
    return mask


def text_mask(numbers: Tensor, config: ModelConfig) -> Tensor:
    """`attention_mask` for rows of several texts: numbers (B, T), alike in one text -> (B, 1, T, T)."""
    at = torch.arange(numbers.shape[1], device=numbers.device)
    same = numbers.unsqueeze(1) == numbers.unsqueeze(2)
    return (same & attention_mask(at, at, config.sliding_window, config.sparse_stride)).unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask=None, sinks=None, dropout=0.0, linear=False, weights=False):
    """What a layer calls: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D). Without a mask: causal.

    The scripts replace it by that of support/kernels.py, whose masks must hide all later tokens.
    """
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)
    if mask is None and q.shape[2] > 1:
        at = torch.arange(q.shape[2], device=q.device)
        mask = attention_mask(at, at)
    if linear:
        return linear_attention(q, k, v, mask, weights)
    return attention(q, k, v, mask, sinks, dropout, weights)


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
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps)
        self.sinks = nn.Parameter(torch.zeros(c.n_heads, c.n_sinks)) if c.n_sinks else None

    def forward(self, x: Tensor, positions=None, mask=None, rope=None, cache=None, weights: bool = False):
        """x (B, T, d) -> (B, T, d), or with `weights=True` (output, weights (B, H, T, S)).

        positions (T) or (B, T) default to 0 .. T-1. mask (T, S) or (B, 1, T, S), True = attend, defaults to
        causal (and the window or stride). `rope` spares the model computing the same angles in every layer.
        """
        c = self.config
        B, T, _ = x.shape
        q, k, v = [  # q (B, H, T, D), k and v (B, K, T, D)
            y.view(B, T, -1, c.head_dim).transpose(1, 2)
            for y in project(x, self.q_proj, self.k_proj, self.v_proj)
        ]
        if c.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if c.positions == "rope":
            if rope is None:
                at = torch.arange(T, device=x.device) if positions is None else positions
                rope = rope_angles(at.unsqueeze(-2), c.head_dim, c.rope_theta, q.dtype)
            q = rotate(q, *rope)
            if cache is None or not cache.rolls:  # a rolling cache rotates keys when they are read
                k = rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, D)
        if mask is None and T > 1 and not c.sees_all:
            order = torch.arange(T, device=x.device)
            mask = attention_mask(order, order, c.sliding_window, c.sparse_stride)
        sinks = None if self.sinks is None else self.sinks.unsqueeze(1)
        dropout = c.dropout * self.training
        y = attend(q, k, v, mask, sinks, dropout, c.attention_kind == "linear", weights)
        if weights:
            y, w = y
        y = self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        return (y, w) if weights else y


def project(x: Tensor, *layers: nn.Linear) -> Sequence[Tensor]:
    """What several linear layers make of the same x (..., d)."""
    return [layer(x) for layer in layers]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, mask=None, weights: bool = False):
    """phi(q) phi(k)^T v, each row of weights divided by its sum, with phi(x) = elu(x) + 1 where softmax has
    exp (Katharopoulos et al., 2020, eq. 7). Arguments as in `attention`.

    RoPE has turned q and k before: the weights stay positive, but depend on more than the distance.
    """
    w = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).float()
    w = w if mask is None else w * mask
    w = (w / w.sum(-1, keepdim=True).clamp(min=1e-6)).to(v.dtype)
    return (w @ v, w) if weights else w @ v


# -----------------------------------------------------------------------------
# Positions, norms and feed-forward layers


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


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich, 2019).

    This is `(x * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight` in one
    kernel. The casts keep a bfloat16 residual stream bfloat16, whatever autocast thinks of norms.
    """
    if weight is not None:
        weight = weight.to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], weight, eps).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with one learned scale per dimension."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's, but the result keeps the dtype of the residual stream (autocast would give float32)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "none":
        return nn.Identity()
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(config.d_model, config.norm_eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): a feed-forward layer whose hidden units are gated (Shazeer, 2020)."""

    def __init__(self, d_model: int, d_ff: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class MLP(nn.Module):
    """down(act(up(x))), act = GELU in GPT-2's tanh approximation, or SiLU."""

    def __init__(self, d_model: int, d_ff: int, act: str = "gelu", bias: bool = False):
        super().__init__()
        self.act = act
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up_proj(x)
        h = F.silu(h) if self.act == "silu" else F.gelu(h, approximate="tanh")
        return self.down_proj(h)


class MoE(nn.Module):
    """A sparse mixture of SwiGLU experts: a router sends each token to its best 1 or 2 of E experts.

    Routing as in Mixtral: softmax over all experts, the chosen probabilities renormalised (top-1 keeps the
    raw probability, as in Switch, else the router would get no gradient). Tokens are sorted into one (E, C,
    d) buffer, C slots an expert, so that all experts are three batched matrix products and no loop over
    tokens. With `capacity_factor` C is fixed, and tokens that find their expert full skip the layer (Switch
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
        """x (..., d) -> (..., d); what the router did is in `self.stats` afterwards."""
        c = self.config
        E, k = c.n_experts, c.experts_per_token
        tokens = x.reshape(-1, x.shape[-1])  # (N, d)
        N, d = tokens.shape
        with torch.autocast(x.device.type, enabled=False):  # float32: a rounding error could change the route
            router_logits = F.linear(tokens.float(), self.gate.weight.float())
        probs = router_logits.softmax(-1)  # (N, E)
        p, expert = probs.topk(k, dim=-1)  # (N, k)
        if k > 1:
            p = p / p.sum(-1, keepdim=True)

        # Rank of every (token, choice) among those that want the same expert; first choices are served first.
        choice = expert.T.flatten()  # (k N), all first choices before all second ones
        wants = F.one_hot(choice, E)  # (k N, E)
        rank = ((wants.cumsum(0) - 1) * wants).sum(-1)  # (k N)
        load = wants.sum(0)  # (E)
        C = math.ceil(c.capacity_factor * N * k / E) if c.capacity_factor else int(load.max())
        kept = rank < C
        slot = torch.where(kept, choice * C + rank, E * C)  # slot E * C takes the dropped

        buffer = tokens.new_zeros(E * C + 1, d).index_copy(0, slot, tokens.repeat(k, 1))
        b = buffer[:-1].view(E, C, d)
        w1, w2, w3 = (w.to(x.dtype).mT for w in (self.w1, self.w2, self.w3))
        b = torch.bmm(F.silu(torch.bmm(b, w1)) * torch.bmm(b, w3), w2)  # (E, C, d)
        out = torch.cat([b.view(E * C, d), b.new_zeros(1, d)])  # the dropped get zeros
        out = out[slot] * p.T.reshape(-1, 1).to(b.dtype)  # (k N, d)
        out = out.view(k, N, d).sum(0)

        # Load balancing (Switch, eq. 4): E * sum over experts of share of choices * mean probability.
        share = load.detach() / (k * N)
        balance = E * (share * probs.mean(0)).sum()
        z = router_logits.logsumexp(-1).square().mean()  # router z-loss (ST-MoE, eq. 5) keeps logits small
        aux_loss = c.load_balance_coef * balance + c.router_z_coef * z
        self.stats = {"aux_loss": aux_loss, "load": share, "dropped": (~kept).sum()}
        return out.to(x.dtype).view(x.shape)


def make_ffn(config: ModelConfig, layer: int) -> nn.Module:
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
        self.config = config
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config)  # Llama's name: the norm that comes after attention
        self.mlp = make_ffn(config, layer)

    def forward(self, x: Tensor, *context) -> Tensor:
        """x (B, T, d) -> (B, T, d); `context`: positions, mask, rope and cache, as in `Attention.forward`."""
        if self.config.norm_position == "post":
            x = self.input_layernorm(x + self.drop(self.self_attn(x, *context)))
            return self.post_attention_layernorm(x + self.drop(self.mlp(x)))
        x = x + self.drop(self.self_attn(self.input_layernorm(x), *context))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)


# -----------------------------------------------------------------------------
# The whole model


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats, 0 where the target is -100; logits (..., V), targets (...) -> (...)."""
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logits.exp().sum(-1).log() - chosen) * (targets != -100)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of `token_losses` over the targets that are not -100."""
    return token_losses(logits, targets).sum() / (targets != -100).sum()


def lm_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum of the losses of `hidden @ head.T`, in nats: hidden (N, d), head (V, d), targets (N)."""
    return token_losses(F.linear(hidden, head), targets).sum()


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


def n_parameters(model: nn.Module) -> int:
    """How many numbers its weights are."""
    return sum(p.numel() for p in model.parameters())


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
        self.init_weights()
        self.set_context_length(c.context_length)

    def init_weights(self) -> None:
        """Normal(0, 0.02), as GPT-2. Layers that write into the residual stream start smaller by sqrt(2
        n_layers), so that its variance does not grow with depth."""
        for name, p in self.named_parameters():
            if p.dim() >= 2 and not name.endswith("sinks"):
                std = 0.02
                if name.endswith(("o_proj.weight", "down_proj.weight", "w2")):
                    std /= math.sqrt(2 * self.config.n_layers)
                nn.init.normal_(p, std=std)
            elif name.endswith(".bias"):
                nn.init.zeros_(p)

    @torch.no_grad()
    def look_back(self) -> None:
        """The first head begins by looking at the token before it.

        Induction heads copy: they find where the last token stood before, and say what followed it (Olsson et
        al., 2022). For that they need a head that looks one token back, and it takes long to grow from noise.
        Here all embeddings get a direction u in common; if they are the output layer, too, every logit rises
        alike. From u the head makes a query a, and a key: a as RoPE turns it by one position more. So their
        product is largest one token back. Of RoPE's pairs the six fastest take part: fewer are back at the
        same angles after some hundred tokens, slower ones hardly tell neighbours apart. Raises ValueError as
        `check_look_back` does.
        """
        c = self.config
        check_look_back(c)
        u = F.normalize(torch.randn(c.d_model), dim=0)
        self.model["embed_tokens"].weight.add_(0.02 * math.sqrt(c.d_model) * u)  # as long as what differs
        along_u = math.sqrt(c.d_model / 2)  # of every normalised embedding, then
        a = torch.zeros(1, c.head_dim)
        a[:, :6] = math.sqrt(40 / 6) * c.head_dim**0.25 / along_u  # a logit of 40
        first = self.model["layers"][0].self_attn
        first.q_proj.weight[: c.head_dim] += a.T * u
        first.k_proj.weight[: c.head_dim] += apply_rope(a, torch.tensor([1]), c.rope_theta).T * u

    def set_context_length(self, context_length: int) -> None:
        """How many tokens the model looks at, with a table of RoPE's angles for them, (2, T, D).

        Without the table a compiler would put sines and powers into the kernels of every layer.
        """
        c = self.config
        c.context_length = context_length
        at = torch.arange(context_length, device=self.device)
        table = torch.stack(rope_angles(at, c.head_dim, c.rope_theta)) if c.positions == "rope" else None
        self.register_buffer("rope", table, persistent=False)

    def set_dropout(self, p: float) -> None:
        """Sets the dropout of a loaded model: all layers read it from this one config."""
        refuse(not 0 <= p < 1, f"dropout={p} must be from 0 to below 1")
        self.config.dropout = p

    @property
    def head(self) -> Tensor:
        """The (V, d) matrix that scores every token of the vocabulary."""
        return (self.lm_head or self.model["embed_tokens"]).weight

    def logits(self, x: Tensor) -> Tensor:
        """What `hidden` returns, (..., d) -> a score for every token of the vocabulary, (..., V)."""
        return self.lm_head(x) if self.lm_head else F.linear(x, self.head)

    @property
    def device(self) -> torch.device:
        return self.model["embed_tokens"].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: autocast's inside an autocast region, else that of the weights."""
        kind = self.device.type
        weights = self.model["embed_tokens"].weight.dtype
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights

    def hidden(self, ids: Tensor, positions=None, mask=None, cache=None, rope=None) -> Tensor:
        """ids (B, T) -> what the head reads, (B, T, d). Other arguments as in `Attention.forward`."""
        c, T = self.config, ids.shape[1]
        if cache is not None:
            positions, mask = cache.positions, cache.mask
        elif positions is None:
            positions = torch.arange(T, device=ids.device)
            if c.positions == "learned" and T > c.context_length:
                raise ValueError(f"{T} tokens, but the learned positions are {c.context_length}")
            if c.positions == "rope" and rope is None and T <= c.context_length:
                rope = self.rope[:, :T].to(self.dtype).unbind()
        if c.positions == "rope" and rope is None:  # the same angles serve every layer
            rope = rope_angles(positions.unsqueeze(-2), c.head_dim, c.rope_theta, self.dtype)
        x = self.model["embed_tokens"](ids)
        # Under autocast a GPU's residual stream is bfloat16 too, which saves a fifth of the activations. On a
        # CPU float32 takes no longer, and a base of configs/cpu.py ended at 0.671 with it, at 0.676 without.
        x = x.to(self.dtype) if x.is_cuda else x
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
        its auxiliary losses, times the count, while training only. With a cache, `cache.begin` decides where
        these tokens go.
        """
        x = self.hidden(ids, positions, mask, cache)
        if targets is None:
            return self.logits(x)
        n = (targets != -100).sum()
        loss = lm_loss(x.flatten(0, 1), self.head, targets.flatten())
        if self.training:
            for layer in self.config.moe_layers:
                loss = loss + n * self.model["layers"][layer].mlp.stats["aux_loss"]
        return loss, n

    def save_pretrained(self, folder: str | Path, **extra) -> None:
        """Writes Hugging Face's config.json (plus `extra`, such as eos_token_id) and model.safetensors."""
        from support.hf_format import save_pretrained

        save_pretrained(self, Path(folder), **extra)

    @staticmethod
    def from_pretrained(name: str | Path, device: str | torch.device = "cpu") -> "ModernDecoderLM":
        """A run folder of ours, or a GPT-2, Llama, Mistral, Qwen3 or Mixtral checkpoint: folder or hub id.

        The weights are float32 whatever they were stored as; the model is in evaluation mode. Raises
        FileNotFoundError or ValueError that name what is missing, damaged or not computed by this file.
        """
        from support.hf_format import from_pretrained

        return from_pretrained(name).to(device)

    @torch.no_grad()
    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Room for more tokens, a multiple of 64; the new rows are the mean of the old ones."""
        rows = 64 * math.ceil(vocab_size / 64)
        for layer in [self.model["embed_tokens"], self.lm_head]:
            if layer is not None:
                new = layer.weight.mean(0).repeat(rows - len(layer.weight), 1)
                layer.weight = nn.Parameter(torch.cat([layer.weight, new]))
        self.config.vocab_size = rows

    # -------------------------------------------------------------------------
    # Generation

    @in_eval_mode
    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 256,
        *,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        stop_tokens: Sequence[int] = (),
        ends: Callable[[list[int]], bool] | None = None,
        window: int = 0,
        keep: int = 4,
        stream: Callable[[int, int], None] | None = None,
        force: Callable[[int, list[int]], Sequence[int]] | None = None,
        adjust: Callable[[list[int], Tensor], Tensor] | None = None,
        compile: bool = False,
        **options,
    ) -> list[list[int]]:
        """Continues every prompt `n` times: the new tokens of prompt 0 sample 0, prompt 0 sample 1, ... as
        lists.

        Prompts may differ in length. A row ends after a stop token (the last of its list), where
        `ends(new_tokens)` is true, or after max_new_tokens.
        `options` are those of `sample`: temperature (0 is greedy), top_k, top_p, min_p, repetition_penalty.
        Row r has a random stream of its own, from `seed[r]` or `seed + r`: its text does not depend on its
        neighbours in the batch. With `window` > 0, or when a text outgrows the context, the cache rolls: the
        first `keep` tokens and the newest ones stay (StreamingLLM). Learned positions cannot roll: all rows
        end when the longest fills the context.

        `stream(row, token)` is called with every new token. `force(row, new_tokens)` may return tokens that
        must come next: that is how a calculator answers. `adjust(rows, logits)` is called once a step with
        the logits (B, V) of these rows, and returns those to sample from; it may raise to stop.
        `compile=True` decodes with a compiled step (support/kernels.py has it): half a minute to start, then
        faster.
        """
        if not len(prompts) or not all(len(p) for p in prompts):
            raise ValueError("generate needs at least one prompt, and in every prompt at least one token")
        if max_new_tokens < 1:
            return [[] for _ in range(len(prompts) * n)]
        cache, max_new_tokens = self.empty_cache(prompts, max_new_tokens, window, keep)
        texts = Texts(
            prompts, n, max_new_tokens, self.device, self.config.vocab_size, seed=seed,
            stop_tokens=stop_tokens, ends=ends, stream=stream, force=force, adjust=adjust, **options,
        )  # fmt: skip
        decoder = Decoder(self, cache, texts.draw, n, compile=compile, record=not (force or adjust))
        token = texts.draw(decoder.prefill(prompts), texts.uniforms[:, 0])
        for step in range(1, max_new_tokens + 1):
            token = texts.take(token, last=step == max_new_tokens)
            left = texts.left()
            if not left or step == max_new_tokens:
                break
            if left := decoder.shrink(left):
                texts.keep(left)
                token = token[left]
            token = decoder.next(token, texts.uniforms[:, step])
        return texts.rows

    def empty_cache(self, prompts: Sequence, new: int, window: int, keep: int) -> tuple["KVCache", int]:
        """A cache with room for all prompts and their new tokens, which may be fewer than asked."""
        c = self.config
        longest = max(map(len, prompts))
        limit = keep + window if window else c.context_length
        where = {"device": self.device, "dtype": self.dtype}
        if c.positions == "learned":
            message = f"a prompt of {longest} tokens leaves no room in context {c.context_length}"
            refuse(longest >= c.context_length, message)
            new = min(new, c.context_length - longest)
        elif longest + new > limit:
            from support.caches import RollingCache

            return RollingCache(c, len(prompts), limit, keep=keep, **where), new
        slots = 8 * math.ceil((longest + new) / 8)  # attention kernels want masks of such widths
        return KVCache(c, len(prompts), slots, **where), new

    def prefill(self, prompts: Sequence[Sequence[int]], cache: "KVCache") -> Tensor:
        """Reads prompts of any lengths into an empty cache; returns the logits after each one's last token,
        (B, V).

        What exceeds the slots of a rolling cache follows token by token, as it would have when generated.
        """
        rows = [torch.as_tensor(p, dtype=torch.long) for p in prompts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        lengths = torch.tensor([len(row) for row in rows])
        first = lengths.clamp(max=cache.slots)
        T = int(first.max())
        cache.begin(T, first)
        x = self.hidden(ids[:, :T], cache=cache)
        last = x[torch.arange(len(x), device=x.device), first.to(x.device) - 1]
        logits = self.logits(last)
        for t in range(cache.slots, ids.shape[1]):
            reads = lengths > t
            cache.begin(1, reads.long())
            new = self.step(ids[:, t : t + 1], cache)
            logits = torch.where(reads.to(x.device).unsqueeze(1), new, logits)
        return logits

    def step(self, ids: Tensor, cache: "KVCache") -> Tensor:
        """One token a row, ids (B, 1), after `cache.begin(1)`: the logits of the next one, (B, V)."""
        return self.logits(self.hidden(ids, cache=cache)[:, -1])


class Texts:
    """The rows that a generation writes. Some are still in the batch: its line j is row alive[j]."""

    def __init__(
        self, prompts, n: int, steps: int, device: torch.device, vocab_size: int, seed=0, stop_tokens=(),
        ends=None, stream=None, force=None, adjust=None, **options,
    ):  # fmt: skip
        check_sampling(**options)
        rows = len(prompts) * n
        seeds = range(seed, seed + rows) if isinstance(seed, int) else seed
        if len(seeds) != rows:
            raise ValueError(f"{len(seeds)} seeds for {rows} rows")
        # All the randomness that sampling needs: one number in [0, 1) per row and step, (rows, steps).
        streams = [torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds]
        self.uniforms = torch.stack(streams).to(device)
        self.seen = None  # (rows, V), True for the tokens of each row
        if options.get("repetition_penalty", 1.0) != 1.0:
            seen = torch.zeros(rows, vocab_size, dtype=torch.bool)
            for row in range(rows):
                seen[row, list(prompts[row // n])] = True
            self.seen = seen.to(device)
        self.options = options
        self.stop_tokens = stop_tokens
        self.ends = ends
        self.stream, self.force, self.adjust = stream, force, adjust
        # Reading a token makes a GPU wait: at every step only if somebody wants to see or change it.
        self.read_every = 1 if stream or force or adjust or device.type == "cpu" else 16
        self.unread: list[Tensor] = []
        self.alive = list(range(rows))
        self.rows: list[list[int]] = [[] for _ in range(rows)]  # the new tokens
        self.queues: list[list[int]] = [[] for _ in range(rows)]  # forced tokens that wait for their turn
        self.ended: set[int] = set()

    def draw(self, logits: Tensor, uniform: Tensor, token: Tensor | None = None) -> Tensor:
        """The next token of each line, (B), after `token`."""
        if self.seen is not None and token is not None:
            self.seen.scatter_(1, token.unsqueeze(1), True)
        if self.adjust:
            logits = self.adjust(self.alive, logits)
        return sample(logits, uniform, seen=self.seen, **self.options)

    def take(self, token: Tensor, last: bool) -> Tensor:
        """Notes the drawn token of each line, (B), or what `force` puts in its place; returns it."""
        if self.force:
            token = torch.tensor([*map(self.forced, self.alive, token.tolist())], device=token.device)
        self.unread.append(token)
        if last or len(self.unread) == self.read_every:
            for row, new in zip(self.alive, torch.stack(self.unread, dim=1).tolist(), strict=True):
                self.add(row, new)
            self.unread = []
        return token

    def forced(self, row: int, drawn: int) -> int:
        queue = self.queues[row]
        if not queue and row not in self.ended:
            queue.extend(self.force(row, self.rows[row]))
        return queue.pop(0) if queue else drawn

    def add(self, row: int, new: list[int]) -> None:
        """Appends tokens up to where the row ends."""
        for token in new:
            if row in self.ended:
                return
            self.rows[row].append(token)
            if self.stream:
                self.stream(row, token)
            if token in self.stop_tokens or (self.ends and self.ends(self.rows[row])):
                self.ended.add(row)

    def left(self) -> list[int]:
        """The lines whose rows go on."""
        return [j for j, row in enumerate(self.alive) if row not in self.ended]

    def keep(self, lines: list[int]) -> None:
        """Forgets all other lines of the batch."""
        self.alive = [self.alive[j] for j in lines]
        self.uniforms = self.uniforms[lines]
        if self.seen is not None:
            self.seen = self.seen[lines]


class KVCache:
    """Keys and values of the tokens so far: two (B, K, slots, D) tensors a layer, allocated once.

    Row b's token t lies in slot t, so rows of different lengths share the tensors, and padding behind a short
    prompt is never looked at. `begin(T)` plans a forward pass over the next T tokens: their positions and
    what they may see; `append` then stores them layer by layer.
    """

    rolls = False  # see RollingCache in support/caches.py

    def __init__(self, config: ModelConfig, rows: int, slots: int, device="cpu", dtype=torch.float32):
        shape = (rows, config.n_kv_heads, slots, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.v = [torch.zeros_like(k) for k in self.k]
        self.config = config
        self.slots = slots
        self.length = torch.zeros(rows, dtype=torch.long)  # tokens of each row; on the CPU: read at once
        # The pass that `begin` plans:
        self.positions = None  # of its tokens, (T) or (B, T)
        self.mask = None  # what they may see, (B, 1, T, S); None: all before them
        self.block = None  # the first slot to write, if all rows are equally long
        self.write = None  # else all slots, (B, T)
        self.read = 0  # slots that hold anything

    @property
    def device(self) -> torch.device:
        return self.k[0].device

    def begin(self, T: int, counts: Tensor | None = None) -> None:
        """Plans the next T tokens of every row, of which only the first counts[b] are real (default: all)."""
        empty = self.read == 0
        start = self.advance(T, counts)
        if self.read > self.slots:
            raise ValueError(f"{self.read} tokens do not fit into a KV cache of {self.slots} slots")
        even = bool((start == start[0]).all())
        self.block = int(start[0]) if even else None
        new = torch.arange(T, device=self.device)
        self.positions = self.write = new + (self.block if even else start.to(self.device).unsqueeze(1))
        all_visible = empty or (even and T == 1 and self.config.sees_all)
        self.mask = None if all_visible else self.visible(torch.arange(self.read, device=self.device))

    def advance(self, T: int, counts: Tensor | None) -> Tensor:
        """Counts the tokens of a pass; returns the length of each row before it."""
        start = self.length
        self.length = start + (T if counts is None else counts)
        self.read = int(self.length.max())
        return start

    def visible(self, keys: Tensor) -> Tensor:
        """The mask (B, 1, T, S) of the planned tokens over keys at these positions, (S) or (B, S)."""
        c = self.config
        return attention_mask(self.positions, keys, c.sliding_window, c.sparse_stride).unsqueeze(-3)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, K, T, D) of the tokens planned by `begin`; returns all that they may look at."""
        keys, values = self.k[layer], self.v[layer]
        if self.block is not None:
            here = slice(self.block, self.block + k.shape[2])
            keys[:, :, here] = k
            values[:, :, here] = v
        else:
            rows = torch.arange(len(k), device=k.device).unsqueeze(1)
            keys[rows, :, self.write] = k.transpose(1, 2).to(keys.dtype)  # (B, T, K, D) at (B, T)
            values[rows, :, self.write] = v.transpose(1, 2).to(values.dtype)
        return keys[:, :, : self.read], values[:, :, : self.read]

    def select(self, rows: Tensor) -> None:
        """Keeps, repeats or reorders rows: rows (B') of indices."""
        for layer in range(len(self.k)):  # one after the other: old and new keys of one layer exist together
            self.k[layer] = self.k[layer][rows]
            self.v[layer] = self.v[layer][rows]
        self.length = self.length[rows.cpu()]

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.k + self.v)


class Decoder:
    """The steps of one generation: a prefill, then one token a row at a time."""

    def __init__(self, model: ModernDecoderLM, cache: KVCache, draw: Callable, n: int = 1, **_):
        self.model = model
        self.cache = cache
        self.draw = draw
        self.n = n

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The logits of the first new token of each row, n rows a prompt: (rows, V)."""
        logits = self.model.prefill(prompts, self.cache)
        rows = torch.arange(len(prompts), device=logits.device).repeat_interleave(self.n)
        if self.n > 1:
            self.cache.select(rows)
        return logits[rows]

    def step(self, ids: Tensor) -> Tensor:
        return self.model.step(ids, self.cache)

    def next(self, token: Tensor, uniform: Tensor) -> Tensor:
        """The token after `token`, both (B)."""
        self.cache.begin(1)
        return self.draw(self.step(token.unsqueeze(1)), uniform, token)

    def shrink(self, left: list[int]) -> list[int]:
        """Drops the rows that have ended once they are an eighth of all; returns those left, [] for "all"."""
        if len(left) > len(self.cache.length) * 7 / 8:
            return []
        self.cache.select(torch.tensor(left, device=self.cache.device))
        return left


# -----------------------------------------------------------------------------
# Sampling


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
    if temperature < 1e-5:  # a division by less could overflow
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
    if order is not None:
        index = order.gather(1, index)
    return index.squeeze(1)


# -----------------------------------------------------------------------------
# Settings that mean nothing are refused by name


def refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)


def check_look_back(c: ModelConfig) -> None:
    """ValueError if a model has no head that could begin by looking at the token before it."""
    usual = c.positions == "rope" and c.attention_kind == "softmax" and c.norm == "rms"
    usual = usual and c.norm_position == "pre" and c.head_dim >= 16
    needs = "RoPE, softmax, RMSNorm before layers and a head_dim of at least 16"
    refuse(not usual, f"look_back needs {needs}; --look_back=False goes without it")


def check_config(c: ModelConfig) -> None:
    """ValueError if a config describes no model; a 0 that means "work it out" is still 0 here."""
    at_least_1 = """vocab_size context_length n_layers d_model n_heads n_experts experts_per_token moe_every
        rope_theta"""
    for field in fields(ModelConfig):
        name, value = field.name, getattr(c, field.name)
        if choices := get_args(field.type):
            refuse(value not in choices, f"{name}={value!r} must be one of {', '.join(choices)}")
            continue
        right_type = type(value) is field.type or (field.type is float and type(value) is int)
        refuse(not right_type, f"{name} must be of type {field.type.__name__}, not {value!r}")
        lowest = 1 if name in at_least_1.split() else 0
        refuse(not lowest <= value < 10**12, f"{name}={value} must be a number from {lowest}")
    refuse(c.dropout >= 1, f"dropout={c.dropout} must be below 1")
    kv_heads = c.n_kv_heads or c.n_heads
    head_dim = c.head_dim or c.d_model / c.n_heads
    refuse(head_dim % 1, f"d_model={c.d_model} is not a multiple of n_heads={c.n_heads}")
    refuse(c.n_heads % kv_heads, f"n_heads={c.n_heads} is not a multiple of n_kv_heads={kv_heads}")
    refuse(c.positions == "rope" and head_dim % 2, f"RoPE rotates pairs: {head_dim=} must be even")
    if c.ffn == "moe":
        too_many = c.experts_per_token > c.n_experts
        refuse(too_many, f"experts_per_token={c.experts_per_token} of n_experts={c.n_experts}")
        refuse(c.moe_every > c.n_layers, f"moe_every={c.moe_every}, but n_layers={c.n_layers}")
    if c.attention_kind == "linear":
        refuse(c.n_sinks, "n_sinks belong to a softmax: attention_kind='linear' has none")


def check_sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0) -> None:
    """ValueError for options that describe no distribution."""
    refuse(not 0 <= temperature < math.inf, f"{temperature=} must be 0 (greedy) or above")
    refuse(top_k < 0, f"{top_k=} must be 0 (all tokens) or above")
    refuse(not 0 < top_p <= 1, f"{top_p=} must be above 0 and at most 1")
    refuse(not 0 <= min_p <= 1, f"{min_p=} must be from 0 to 1")
    refuse(not 0 < repetition_penalty < math.inf, f"{repetition_penalty=} must be above 0")


# -----------------------------------------------------------------------------
# Beside the model: two layers that stand alone


class Linear(nn.Module):
    """x W^T, for study: the model uses torch's nn.Linear, which may have a bias.

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
    """A row of the matrix for each id, for study: the model uses torch's. Weights from N(0, 1), cut at 3."""

    def __init__(self, num_embeddings: int, embedding_dim: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.weight, a=-3, b=3)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., d)"""
        return self.weight[ids]
