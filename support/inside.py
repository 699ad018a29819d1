"""What a decoder computes for one text: surprise, next token, logit lens, direct logit attribution.

    python eval.py out/base --attention --text="Anna has 3 nuts. She buys 4 more nuts. Now Anna has"

The browser's "look inside" and eval.py call `look_inside`; the report draws what eval.py wrote. Surprise and
the next token work for every decoder. The rest needs the residual stream, so it is for models that model.py
computes.

The residual stream is a sum: the embedding, and what every head and every feed-forward layer added. The last
norm divides it by one number and the head is linear. So each logit is a sum too, with one term for each
of these parts (Elhage et al., 2021, "direct logit attribution").
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ModernDecoderLM

if TYPE_CHECKING:
    from support.text_model import TextModel

Heads = Iterable[tuple[int, int]]  # (layer, head), both counted from 0


def without_heads(model: ModernDecoderLM, off: Heads = ()) -> ModernDecoderLM:
    """A model that shares all weights with `model`, except that the heads in `off` contribute nothing.

    Such a head's columns of the output projection are 0. The other tensors are not copied. Raises ValueError
    if there is no such head.
    """
    c = model.config
    weights = dict(model.state_dict())
    for layer, head in set(off):
        if not (0 <= layer < c.n_layers and 0 <= head < c.n_heads):
            raise ValueError(
                f"there is no head {head} in layer {layer}: layers 0 to {c.n_layers - 1}, "
                f"heads 0 to {c.n_heads - 1}"
            )
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        columns = slice(head * c.head_dim, (head + 1) * c.head_dim)
        weights[name] = weights[name].clone()
        weights[name][:, columns] = 0
    with torch.device("meta"):
        twin = ModernDecoderLM(c)
    twin.load_state_dict(weights, assign=True)
    twin.set_context_length(c.context_length)
    return twin.eval()


@dataclass
class Trace:
    """What the layers computed at one position of a text."""

    logits: Tensor  # (T, V), of all positions
    residual: Tensor  # (layers + 1, d): before the first block, and after each one
    heads: Tensor  # (layers, H, D): what each head read, before the output projection
    ffn: Tensor  # (layers, d): what each feed-forward layer added


@torch.no_grad()
def trace(model: ModernDecoderLM, ids: Tensor, position: int) -> Trace:
    """One forward pass over ids (T) that also keeps the parts of the residual stream at `position`."""
    model = without_heads(model)  # packed weights bypass the hooks of a layer; this twin has none
    residual, heads, ffn, hooks = [], [], [], []

    def keep(found: list):
        return lambda layer, given, *result: found.append((result or given)[0][0, position].float())

    layers = model.model["layers"]
    hooks.append(layers[0].register_forward_pre_hook(keep(residual)))
    for block in layers:
        hooks.append(block.register_forward_hook(keep(residual)))
        hooks.append(block.self_attn.o_proj.register_forward_pre_hook(keep(heads)))
        hooks.append(block.mlp.register_forward_hook(keep(ffn)))
    logits = model(ids[None])[0].float()
    for hook in hooks:
        hook.remove()
    c = model.config
    read = torch.stack(heads).view(c.n_layers, c.n_heads, c.head_dim)
    return Trace(logits, torch.stack(residual), read, torch.stack(ffn))


@torch.no_grad()
def logit_lens(model: ModernDecoderLM, found: Trace) -> Tensor:
    """Logits (layers + 1, V) if the model stopped after the embedding, after block 1, ... (nostalgebraist,
    2020): the last norm and the head, applied to the residual stream of every layer.
    """
    x = found.residual.to(model.head.dtype)
    x = model.model["norm"](x) if "norm" in model.model else x
    return F.linear(x, model.head).float()


@torch.no_grad()
def contributions(model: ModernDecoderLM, found: Trace, target: int) -> list[dict]:
    """The parts of one logit: [{"name", "layer", "head", "value"}]; their values sum to it.

    target: the id whose logit is explained. Raises ValueError for post-norm, which normalises after every
    layer, so that the logit is no sum of what the layers added.
    """
    c = model.config
    if c.norm_position == "post":
        raise ValueError("post-norm: the logit is not a sum of what the layers added")
    norm = model.model["norm"]
    x, row = found.residual[-1].double(), model.head[target].double()
    scale = torch.ones_like(x)
    if c.norm == "rms":
        scale = norm.weight.double() / (x.square().mean() + c.norm_eps).sqrt()
    elif c.norm == "layer":
        scale = norm.weight.double() / (x.var(unbiased=False) + c.norm_eps).sqrt()
    parts: list[dict] = []

    def add(name: str, part: Tensor, layer: int, head: int | None = None) -> None:
        part = part.double()
        centred = part - part.mean() if c.norm == "layer" else part
        parts.append({"name": name, "layer": layer, "head": head, "value": float((centred * scale) @ row)})

    add("embedding", found.residual[0], -1)
    for layer, block in enumerate(model.model["layers"]):
        out = block.self_attn.o_proj
        for head, columns in enumerate(out.weight.float().split(c.head_dim, dim=1)):
            add(f"L{layer} H{head}", columns @ found.heads[layer, head], layer, head)
        if out.bias is not None:
            add(f"L{layer} bias", out.bias, layer)
        add(f"L{layer} MLP", found.ffn[layer], layer)
    if getattr(norm, "bias", None) is not None:  # it is added behind the norm's scale
        value = float(norm.bias.double() @ row)
        parts.append({"name": "final bias", "layer": c.n_layers, "head": None, "value": value})
    return parts


# -----------------------------------------------------------------------------
# All of it for one text, as JSON


def token_of(model: "TextModel", i: int) -> dict:
    """A token: text, bytes, and which merge of the BPE made it (None: a byte, or a special token)."""
    tokenizer = model.tokenizer
    raw = tokenizer.token_bytes(i)
    special = i in tokenizer.special_ids.values()
    merges = getattr(tokenizer, "merge_order", {})  # transformers' tokenizers do not expose them
    return {"id": i, "text": token_text(raw), "bytes": list(raw), "merge": merges.get(i), "special": special}


def token_text(raw: bytes) -> str:
    """The text of a token; a part of a character is written as OpenAI's API does: bytes:\\xe2\\x82."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@torch.no_grad()
def logits_of(model: "TextModel", ids: list[int]) -> Tensor:
    """(T, V) in float32, of any decoder."""
    given = torch.tensor([ids], device=model.device)
    found = model.model(given)
    return (found if isinstance(found, Tensor) else found.logits)[0].float()


def surprise_of(log_p: Tensor, ids: list[int], names, most: int = 5) -> list[dict | None]:
    """For each token after the first: bits, rank (1: the likeliest), probability, and the likeliest tokens.

    log_p (T, V): natural logarithms of the probabilities of the next token.
    """
    found: list[dict | None] = [None]
    for row, i in zip(log_p, ids[1:], strict=False):
        p, best = row[i], row.topk(min(most, len(row)))
        top = [[j, names(j), math.exp(x)] for x, j in zip(*map(Tensor.tolist, best), strict=True)]
        rank = int((row > p).sum()) + 1
        found.append({"bits": float(-p / math.log(2)), "rank": rank, "p": float(p.exp()), "top": top})
    return found


def likeliest(logits: Tensor, names, most: int) -> list[dict]:
    """The next tokens with the highest logits (V), with their probabilities."""
    log_p = logits.log_softmax(-1)
    return [
        {"id": i, "text": names(i), "p": float(log_p[i].exp()), "logit": float(logits[i])}
        for i in logits.topk(min(most, len(logits))).indices.tolist()
    ]


def check_length(model: "TextModel", ids: list[int]) -> None:
    """Raises ValueError if a text is empty or longer than the context."""
    if not 1 <= len(ids) <= model.context_length:
        raise ValueError(
            f"the text has {len(ids)} tokens; the context of {model.name} is {model.context_length}"
        )


@torch.no_grad()
def look_inside(
    model: "TextModel",
    ids: list[int],
    position: int = -1,
    target: int | None = None,
    off: Heads = (),
    alternatives: int = 10,
) -> dict:
    """Everything the page "look inside" shows of a text's ids, ready for JSON.

    position: the next token after this one is shown (-1: the last). target: the id that the lens and the
    contributions explain (None: the likeliest). off: heads that are ablated in `next_off`, in the lens and in
    the contributions. Raises ValueError for ids, heads or positions that do not exist.
    """
    check_length(model, ids)
    config = model.model.config
    position = len(ids) - 1 if position == -1 else position
    if not 0 <= position < len(ids) or not (target is None or 0 <= target < config.vocab_size):
        raise ValueError(f"position {position} or target {target} is outside of the text or the vocabulary")
    if off and not model.ours:
        raise ValueError("heads can be switched off only in models that model.py computes")

    def names(i: int) -> str:
        return token_text(model.tokenizer.token_bytes(i))

    net = without_heads(model.model).float() if model.ours else None  # float32: the parts sum to the logit
    logits = net(torch.tensor([ids], device=model.device))[0] if model.ours else logits_of(model, ids)
    found = {
        "tokens": [token_of(model, i) for i in ids],
        "surprise": surprise_of(logits.log_softmax(-1), ids, names),
        "next": likeliest(logits[position], names, alternatives),
        "context_length": model.context_length,
        "layers": getattr(config, "n_layers" if model.ours else "num_hidden_layers", None),
        "heads": getattr(config, "n_heads" if model.ours else "num_attention_heads", None),
        **dict.fromkeys(("next_off", "lens", "parts")),
    }
    if not model.ours:
        return found
    net = without_heads(net, off)
    seen = trace(net, torch.tensor(ids, device=model.device), position)
    if off:
        found["next_off"] = likeliest(seen.logits[position], names, alternatives)
    target = found["next"][0]["id"] if target is None else target
    found["lens"] = lens_table(net, seen, names, target)
    try:
        parts = contributions(net, seen, target)
        about = {"id": target, "text": names(target), "logit": float(seen.logits[position, target])}
        found["parts"] = {"target": about, "sum": math.fsum(p["value"] for p in parts), "parts": parts}
    except ValueError as error:
        found["parts"] = {"why_not": str(error)}
    return found


def lens_table(model: ModernDecoderLM, found: Trace, names, target: int, most: int = 5) -> list[dict]:
    """A row for each layer: its likeliest next tokens, the probability of `target`, the stream's norm."""
    rows = []
    for layer, logits in enumerate(logit_lens(model, found)):
        rows.append(
            {
                "layer": layer,
                "name": f"layer {layer - 1}" if layer else "embedding",
                "top": [[token["text"], token["p"]] for token in likeliest(logits, names, most)],
                "target_p": float(logits.softmax(-1)[target]),
                "norm": float(found.residual[layer].norm()),
            }
        )
    return rows
