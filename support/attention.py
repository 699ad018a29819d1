"""Attention analysis: what each head looks at, and whether a model copies what stands in its context.

Works on ModernDecoderLM and on transformers' decoders, encoders and encoder-decoders, also with a PEFT
adapter. `python eval.py MODEL --attention` writes what it finds to attention.json.
"""

import random
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data import arithmetic, things, told_again
from model import ModernDecoderLM

if TYPE_CHECKING:
    from finetune import TextModel

LOOKED_AT = (
    "Once upon a time there was a girl named Lucy. Lucy had a red ball. One day",
    "Anna has 3 nuts. She buys 4 more nuts. How many nuts does Anna have now?",
)


def attention_weights(model: nn.Module, ids: Tensor, reduce: Callable = lambda w: w) -> Tensor:
    """(layers, B, heads, T, T): the weights of every head on the tokens ids (B, T), or what `reduce` makes of
    each layer's. With learned sinks the rows sum to less than 1. Of an encoder-decoder: the encoder's.
    """
    if not isinstance(model, ModernDecoderLM):
        return torch.stack([reduce(w.float().cpu()) for w in hub_attention(model, ids)])
    found = []

    def watch(layer, args, kwargs, _) -> None:
        x = args[0] if args else kwargs["x"]
        found.append(
            reduce(type(layer).forward(layer, x, weights=True)[1][..., : ids.shape[1]].float().cpu())
        )

    hooks = [b.self_attn.register_forward_hook(watch, with_kwargs=True) for b in model.model["layers"]]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def hub_attention(model: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
    """The same of a model of transformers, perhaps in PEFT's wrapping: a tensor a layer."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.set_attn_implementation("eager")  # the others do not return their weights
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    with torch.no_grad():
        found = model(input_ids=ids, output_attentions=True).attentions
    if not found or any(w is None for w in found):
        raise ValueError(f"{type(model).__name__} gives no attention weights")
    return found


def head_scores(model: nn.Module, seed: int = 1, rows: int = 8, length: int = 32) -> dict[str, Tensor]:
    """{score: (layers, heads)} on random tokens, told twice, so that nothing but their order can be used.

    previous: weight on the token before. first: weight on the first token, where heads look that have nothing
    to look for. induction: in the second telling, weight on the token that followed the same token the first
    time (Olsson et al., 2022). entropy: of the weights, over the most that so many tokens allow.
    """
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    device = next(model.parameters()).device
    each = attention_weights(model, torch.cat([once, once], dim=1).to(device))
    w = each.mean(1)  # over the rows
    t = torch.arange(1, 2 * length)
    second = torch.arange(length, 2 * length)
    causal = not (each.triu(1) > 0).any()
    visible = t + 1.0 if causal else torch.full((len(t),), 2.0 * length)
    entropy = -(each.clamp(min=1e-12).log() * each).sum(-1)[..., 1:] / visible.log()
    return {
        "previous": w[..., t, t - 1].mean(-1),
        "first": w[..., t, 0].mean(-1),
        "induction": w[..., second, second - length + 1].mean(-1),
        "entropy": entropy.mean((1, -1)),
    }


def copying(model: "TextModel", seed: int, n: int = 200) -> dict[str, float]:
    """Can it look a number up? The share of digits that are the likeliest token where they are told again,
    given the true ones before: those of `facts`, the sentences of n problems in another order behind the
    problem, and of `lists`, of eight random things each. A model that guesses numbers gets a quarter or so.
    """
    rng = random.Random(seed)
    questions = [problem["question"] for problem in islice(arithmetic("validation"), n)]
    lists = [things(rng) for _ in range(n)]
    texts = {"facts": [(q, told_again(rng, q)) for q in questions], "lists": [(told, told) for told in lists]}
    return {kind: copied_digits(model, pairs) for kind, pairs in texts.items()}


def copied_digits(model: "TextModel", pairs: list[tuple[str, str]]) -> float:
    hits = []
    for before, again in pairs:
        start = [model.eos, *model.encode(f"{before}\n")]
        ids = torch.tensor([*start, *model.encode(again)], device=model.device)
        with torch.inference_mode():
            logits = model.model(ids[None, :-1])
            logits = logits if isinstance(logits, Tensor) else logits.logits
            likeliest = logits[0].argmax(-1).tolist()
        asked = zip(likeliest[len(start) - 1 :], ids[len(start) :].tolist(), strict=True)
        hits += [said == true for said, true in asked if model.decode([true]).strip().isdigit()]
    return sum(hits) / len(hits)


def foremost(scores: dict[str, list[list[float]]]) -> dict[str, tuple[int, int]]:
    """{score: (layer, head) that has most of it}."""
    found = {}
    for name, layers in scores.items():
        _, layer, head = max((value, -i, -j) for i, row in enumerate(layers) for j, value in enumerate(row))
        found[name] = (-layer, -head)
    return found


def chosen_heads(scores: dict, layer: int, head: int) -> list[tuple[str, int, int]]:
    """[(score that it has most of, layer, head)]: the foremost heads, or those that the flags choose."""
    if layer < 0 and head < 0:
        return [(name, *at) for name, at in foremost(scores).items()]
    rows = next(iter(scores.values()))
    for flag, chosen, n in (("layer", layer, len(rows)), ("head", head, len(rows[0]))):
        if chosen >= n:
            raise ValueError(f"--{flag}={chosen}: there are {n}, from 0 to {n - 1}")
    layers = range(len(rows)) if layer < 0 else [layer]
    heads = range(len(rows[0])) if head < 0 else [head]
    return [("", i, j) for i in layers for j in heads]


def attention(model: "TextModel", seed: int, text: str = "", layer: int = -1, head: int = -1) -> dict:
    """The scores of all heads, and maps of some over a text; without one over two of ours, and of decoders
    also what is copied.
    """
    scores = head_scores(model.model, seed, length=min(32, model.context_length // 2))
    scores = {name: [[round(x, 4) for x in row] for row in s.tolist()] for name, s in scores.items()}
    chosen, maps = chosen_heads(scores, layer, head), []
    for looked_at in [text] if text else LOOKED_AT:
        ids = [*model.before, *model.encode(looked_at), *model.behind]
        if len(ids) > model.context_length:
            raise ValueError(f"{model.name} looks at {model.context_length} tokens, the text has {len(ids)}")
        weights = attention_weights(model.model, torch.tensor([ids], device=model.device))[:, 0]
        heads = []
        for name, i, j in chosen:
            rows = [[round(x, 3) for x in row] for row in weights[i, j].tolist()]
            heads.append({"most": name, "layer": i, "head": j, "weights": rows})
        maps.append({"tokens": [model.tokenizer.decode([i]) for i in ids], "heads": heads})
    found = {"model": model.name, "scores": scores, "maps": maps}
    return found | ({"copies": copying(model, seed)} if model.kind == "causal" and not text else {})
