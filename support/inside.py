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

import torch
from torch import Tensor

from model import ModernDecoderLM
from support.text_model import TextModel

Heads = Iterable[tuple[int, int]]  # (layer, head), both counted from 0


def without_heads(model: ModernDecoderLM, off: Heads = ()) -> ModernDecoderLM:
    """A model that shares all weights with `model`, except that the heads in `off` contribute nothing.

    Such a head's columns of the output projection are 0. The other tensors are not copied. Raises ValueError
    if there is no such head.
    """
    if not isinstance(model, ModernDecoderLM):
        raise ValueError("heads can be switched off only in models that model.py computes")
    c = model.config
    weights = model.state_dict()
    for layer, head in set(off):
        if not (0 <= layer < c.n_layers and 0 <= head < c.n_heads):
            raise ValueError(f"no head {head} in layer {layer}: {c.n_layers} layers of {c.n_heads} heads")
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        weights[name] = weights[name].clone()
        weights[name].view(-1, c.n_heads, c.head_dim)[:, head] = 0
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
def trace(model: ModernDecoderLM, ids: list[int], position: int) -> Trace:
    """One forward pass over a text that also keeps the parts of the residual stream at `position`.

    `model` is in float32, as `look_inside` makes it.
    """
    model = without_heads(model)  # a twin, which is forgotten with its hooks
    residual, heads, ffn = [], [], []

    def keep(found: list):
        return lambda layer, given, *result: found.append((result or given)[0][0, position])

    layers = model.model["layers"]
    layers[0].register_forward_pre_hook(keep(residual))
    for block in layers:
        block.register_forward_hook(keep(residual))
        block.self_attn.o_proj.register_forward_pre_hook(keep(heads))
        block.mlp.register_forward_hook(keep(ffn))
    logits = logits_of(model, ids)
    c = model.config
    read = torch.stack(heads).view(c.n_layers, c.n_heads, c.head_dim)
    return Trace(logits, torch.stack(residual), read, torch.stack(ffn))


@torch.no_grad()
def logit_lens(model: ModernDecoderLM, found: Trace) -> Tensor:
    """Logits (layers + 1, V) if the model stopped after the embedding, after block 1, ... (nostalgebraist,
    2020): the last norm and the head, applied to the residual stream of every layer.
    """
    x = found.residual
    x = model.model["norm"](x) if "norm" in model.model else x
    return model.logits(x)


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
    stream = found.residual[-1].double()
    parts = []
    direction = model.head[target].double()  # a part's share of the logit is its product with this

    def add(name: str, values: Tensor, layer: int, head: int | None = None) -> None:
        value = float(values.double() @ direction)
        parts.append({"name": name, "layer": layer, "head": head, "value": value})

    if c.norm == "layer":
        add("final bias", norm.bias, c.n_layers)  # it is added behind the norm's scale
        stream = stream - stream.mean()
    if c.norm != "none":
        variance = stream.square().mean()
        direction = direction * norm.weight / (variance + c.norm_eps).sqrt()
    if c.norm == "layer":
        direction = direction - direction.mean()  # the norm subtracts the mean of each part
    add("embedding", found.residual[0], -1)
    for layer, block in enumerate(model.model["layers"]):
        out = block.self_attn.o_proj
        for head, columns in enumerate(out.weight.split(c.head_dim, dim=1)):
            add(f"L{layer} H{head}", columns @ found.heads[layer, head], layer, head)
        if out.bias is not None:
            add(f"L{layer} bias", out.bias, layer)
        add(f"L{layer} MLP", found.ffn[layer], layer)
    return parts


# -----------------------------------------------------------------------------
# All of it for one text, as JSON


def token_of(model: TextModel, i: int) -> dict:
    """A token: text, bytes, and which merge of the BPE made it (None: a byte, or a special token)."""
    tokenizer = model.tokenizer
    raw = tokenizer.token_bytes(i)
    merge = getattr(tokenizer, "merge_order", {}).get(i)  # transformers' tokenizers do not expose it
    special = i in tokenizer.special_ids.values()
    return {"id": i, "text": token_text(raw), "bytes": list(raw), "merge": merge, "special": special}


def token_text(raw: bytes) -> str:
    """The text of a token; a part of a character is written as OpenAI's API does: bytes:\\xe2\\x82."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@torch.no_grad()
def logits_of(net, ids: list[int]) -> Tensor:
    """(T, V) in float32, of any decoder."""
    found = net(torch.tensor([ids], device=net.device))
    return (found if isinstance(found, Tensor) else found.logits)[0].float()


def likeliest(logits: Tensor, names, most: int) -> list[dict]:
    """The next tokens with the highest logits (V), with their probabilities."""
    p = logits.softmax(-1)
    found = []
    for i in logits.topk(min(most, len(logits))).indices.tolist():
        found.append({"id": i, "text": names(i), "p": float(p[i]), "logit": float(logits[i])})
    return found


def top_of(logits: Tensor, names) -> list[list]:
    """[[text, probability], ...] of the five likeliest tokens."""
    return [[token["text"], token["p"]] for token in likeliest(logits, names, 5)]


def surprise_of(logits: Tensor, ids: list[int], names) -> list[dict | None]:
    """For each token after the first: bits, rank (1: the likeliest), probability, the likeliest tokens."""
    found = [None]
    for row, i in zip(logits, ids[1:], strict=False):
        nats = float(row.logsumexp(0) - row[i])
        about = {
            "bits": nats / math.log(2),
            "rank": int((row > row[i]).sum()) + 1,
            "p": math.exp(-nats),
            "top": top_of(row, names),
        }
        found.append(about)
    return found


def check_length(model: TextModel, ids: list[int]) -> None:
    """Raises ValueError if a text is empty or longer than the context."""
    T = model.context_length
    if not 1 <= len(ids) <= T:
        raise ValueError(f"the text has {len(ids)} tokens; the context of {model.name} is {T}")


@torch.no_grad()
def look_inside(
    model: TextModel,
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
    if not (0 <= position < len(ids) and 0 <= (target or 0) < config.vocab_size):
        raise ValueError(f"position {position} or target {target} is outside of the text or the vocabulary")

    def names(i: int) -> str:
        return token_text(model.tokenizer.token_bytes(i))

    found = {
        "next_off": None,
        "lens": None,
        "parts": None,
        "context_length": model.context_length,
        "tokens": [token_of(model, i) for i in ids],
    }
    net = model.model
    if model.ours or off:
        net = without_heads(net).float()  # float32: the parts sum to the logit
    logits = logits_of(net, ids)
    found["surprise"] = surprise_of(logits, ids, names)
    found["next"] = likeliest(logits[position], names, alternatives)
    if not model.ours:
        found["layers"] = getattr(config, "num_hidden_layers", None)
        found["heads"] = getattr(config, "num_attention_heads", None)
        return found
    found |= {"layers": config.n_layers, "heads": config.n_heads}
    net = without_heads(net, off)
    seen = trace(net, ids, position)
    if off:
        found["next_off"] = likeliest(seen.logits[position], names, alternatives)
    target = found["next"][0]["id"] if target is None else target
    found["lens"] = lens_table(net, seen, names, target)
    try:
        parts = contributions(net, seen, target)
        about = {"id": target, "text": names(target), "logit": float(seen.logits[position, target])}
        total = math.fsum(part["value"] for part in parts)
        found["parts"] = {"target": about, "sum": total, "parts": parts}
    except ValueError as error:
        found["parts"] = {"why_not": str(error)}
    return found


def lens_table(model: ModernDecoderLM, found: Trace, names, target: int) -> list[dict]:
    """A row for each layer: its likeliest next tokens, the probability of `target`, the stream's norm."""
    rows = []
    for layer, logits in enumerate(logit_lens(model, found)):
        row = {
            "layer": layer,
            "name": f"layer {layer - 1}" if layer else "embedding",
            "top": top_of(logits, names),
            "target_p": float(logits.softmax(-1)[target]),
            "norm": float(found.residual[layer].norm()),
        }
        rows.append(row)
    return rows
