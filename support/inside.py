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
    if c.norm == "rms":
        scale = norm.weight.double() / (x.square().mean() + c.norm_eps).sqrt()
    elif c.norm == "layer":
        scale = norm.weight.double() / (x.var(unbiased=False) + c.norm_eps).sqrt()
    else:
        scale = torch.ones_like(x)

    def value(part: Tensor) -> float:
        part = part.double()
        if c.norm == "layer":
            part = part - part.mean()
        return float((part * scale) @ row)

    parts = [{"name": "embedding", "layer": -1, "head": None, "value": value(found.residual[0])}]
    for layer, block in enumerate(model.model["layers"]):
        out = block.self_attn.o_proj
        for head, read in enumerate(found.heads[layer]):
            columns = out.weight[:, head * c.head_dim : (head + 1) * c.head_dim].float()
            part = {"name": f"L{layer} H{head}", "layer": layer, "head": head}
            parts.append(part | {"value": value(columns @ read)})
        if out.bias is not None:
            parts.append({"name": f"L{layer} bias", "layer": layer, "head": None, "value": value(out.bias)})
        parts.append(
            {"name": f"L{layer} MLP", "layer": layer, "head": None, "value": value(found.ffn[layer])}
        )
    if getattr(norm, "bias", None) is not None:
        bias = float(norm.bias.double() @ row)
        parts.append({"name": "final bias", "layer": c.n_layers, "head": None, "value": bias})
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
    for t, i in enumerate(ids[1:]):
        p, best = log_p[t, i], log_p[t].topk(min(most, log_p.shape[1]))
        found.append(
            {
                "bits": float(-p / math.log(2)),
                "rank": int((log_p[t] > p).sum()) + 1,
                "p": float(p.exp()),
                "top": [[j, names(j), math.exp(x)] for x, j in zip(*map(Tensor.tolist, best), strict=True)],
            }
        )
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
    position = len(ids) - 1 if position == -1 else position
    known = model.model.config.vocab_size
    if not 0 <= position < len(ids) or not (target is None or 0 <= target < known):
        raise ValueError(f"position {position} or target {target} is outside of the text or the vocabulary")
    if off and not model.ours:
        raise ValueError("heads can be switched off only in models that model.py computes")

    def names(i: int) -> str:
        return token_text(model.tokenizer.token_bytes(i))

    if model.ours:  # in float32, so that the parts sum to the logit
        plain = without_heads(model.model).float()
        logits = plain(torch.tensor([ids], device=model.device))[0]
    else:
        logits = logits_of(model, ids)
    found = {
        "tokens": [token_of(model, i) for i in ids],
        "surprise": surprise_of(logits.log_softmax(-1), ids, names),
        "next": likeliest(logits[position], names, alternatives),
        "next_off": None,
        "lens": None,
        "parts": None,
        "layers": None,
        "heads": None,
        "context_length": model.context_length,
    }
    if not model.ours:
        config = model.model.config
        shape = {"layers": "num_hidden_layers", "heads": "num_attention_heads"}
        return found | {name: getattr(config, theirs, None) for name, theirs in shape.items()}
    net = without_heads(plain, off)
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
    return found | {"layers": net.config.n_layers, "heads": net.config.n_heads}


def lens_table(model: ModernDecoderLM, found: Trace, names, target: int, most: int = 5) -> list[dict]:
    """A row for each layer: its likeliest next tokens, the probability of `target`, the stream's norm."""
    rows = []
    for layer, logits in enumerate(logit_lens(model, found)):
        best = likeliest(logits, names, most)
        rows.append(
            {
                "layer": layer,
                "name": f"layer {layer - 1}" if layer else "embedding",
                "top": [[token["text"], token["p"]] for token in best],
                "target_p": float(logits.softmax(-1)[target]),
                "norm": float(found.residual[layer].norm()),
            }
        )
    return rows
