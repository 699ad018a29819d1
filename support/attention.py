"""Attention analysis: what each head attends to, and whether a model can copy from its context.

Works on ModernDecoderLM and on transformers' decoders, encoders and encoder-decoders, also with a PEFT
adapter. `python eval.py MODEL --attention` writes the results to attention.json.
"""

import random
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model import ModernDecoderLM
from support.inside import look_inside
from tasks.arithmetic import arithmetic, things, told_again

if TYPE_CHECKING:
    from support.text_model import TextModel

EXAMPLE_TEXTS = (
    "Once upon a time there was a girl named Lucy. Lucy had a red ball. One day",
    "Anna has 3 nuts. She buys 4 more nuts. How many nuts does Anna have now?",
)


def attention_weights(model: nn.Module, ids: Tensor, reduce: Callable = lambda w: w) -> Tensor:
    """Attention weights (layers, B, heads, T, T) for token ids (B, T); `reduce` is applied to each layer.

    With learned sinks the rows sum to less than 1. For an encoder-decoder: the weights of its encoder.
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
    """The same for a transformers model, with or without a PEFT adapter: one tensor per layer."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    core = model.get_encoder() if model.config.is_encoder_decoder else model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others do not return their weights
    try:
        with torch.no_grad():
            found = core(input_ids=ids, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    if not found or any(w is None for w in found):
        raise ValueError(f"{type(model).__name__} gives no attention weights")
    return found


def head_scores(model: nn.Module, seed: int = 1, rows: int = 8, length: int = 32) -> dict[str, Tensor]:
    """{score: (layers, heads)}, measured on sequences of random tokens that are repeated once.

    Random tokens carry no meaning, so a head can use only their order.
    previous: weight on the previous token.
    first: weight on the first token, where heads put their weight when nothing else is relevant.
    induction: in the second copy, weight on the token that followed the same token in the first copy
    (Olsson et al., 2022).
    entropy: entropy of the weights, divided by the maximum for that number of visible tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(model.config.vocab_size, (rows, length), generator=generator)
    device = next(model.parameters()).device
    each = attention_weights(model, torch.cat([once, once], dim=1).to(device))  # (layers, rows, heads, T, T)
    w = each.mean(1)  # mean over the rows
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
    """Copy accuracy on repeated digits: {"facts": share, "lists": share}.

    A digit counts as copied if it is the most likely token, given the true tokens before it. `facts`: n word
    problems, each followed by its sentences in another order. `lists`: n lists of eight random things, each
    repeated. A model that guesses gets about a quarter right.
    """
    rng = random.Random(seed)
    questions = [problem["question"] for problem in islice(arithmetic("validation"), n)]
    lists = [things(rng) for _ in range(n)]
    texts = {"facts": [(q, told_again(rng, q)) for q in questions], "lists": [(text, text) for text in lists]}
    return {kind: copied_digits(model, pairs) for kind, pairs in texts.items()}


def copied_digits(model: "TextModel", pairs: list[tuple[str, str]]) -> float:
    """The share of digits in the second text of each pair that the model predicts after reading the first."""
    hits = []
    for before, again in pairs:
        start = [model.eos, *model.encode(f"{before}\n")]
        ids = torch.tensor([*start, *model.encode(again)], device=model.device)
        with torch.inference_mode():
            logits = model.model(ids[None, :-1])
            logits = logits if isinstance(logits, Tensor) else logits.logits
            likeliest = logits[0].argmax(-1).tolist()
        for predicted, true in zip(likeliest[len(start) - 1 :], ids[len(start) :].tolist(), strict=True):
            if model.decode([true]).strip().isdigit():
                hits.append(predicted == true)
    return sum(hits) / len(hits)


def foremost(scores: dict[str, list[list[float]]]) -> dict[str, tuple[int, int]]:
    """{score: (layer, head) with the highest value}."""
    found = {}
    for name, layers in scores.items():
        _, layer, head = max((value, -i, -j) for i, row in enumerate(layers) for j, value in enumerate(row))
        found[name] = (-layer, -head)
    return found


def chosen_heads(scores: dict, layer: int, head: int) -> list[tuple[str, int, int]]:
    """[(score, layer, head)]: the head with the highest value of each score, or the heads that --layer and
    --head select (their score is "").
    """
    if layer < 0 and head < 0:
        return [(name, *at) for name, at in foremost(scores).items()]
    rows = next(iter(scores.values()))
    for flag, chosen, n in (("layer", layer, len(rows)), ("head", head, len(rows[0]))):
        if chosen >= n:
            raise ValueError(f"--{flag}={chosen}: the model has {n}, from 0 to {n - 1}")
    layers = range(len(rows)) if layer < 0 else [layer]
    heads = range(len(rows[0])) if head < 0 else [head]
    return [("", i, j) for i in layers for j in heads]


def attention(model: "TextModel", seed: int, text: str = "", layer: int = -1, head: int = -1) -> dict:
    """Scores of all heads, and attention maps of the chosen heads on `text`.

    Of decoders also what support/inside.py says of the text. Without a text: two example texts, and for
    decoders also the copy accuracy.
    """
    scores = head_scores(model.model, seed, length=min(32, model.context_length // 2))
    scores = {name: [[round(x, 4) for x in row] for row in s.tolist()] for name, s in scores.items()}
    chosen, maps = chosen_heads(scores, layer, head), []
    for example in [text] if text else EXAMPLE_TEXTS:
        ids = [*model.before, *model.encode(example), *model.behind]
        if len(ids) > model.context_length:
            raise ValueError(
                f"the context of {model.name} is {model.context_length} tokens, but the text has {len(ids)}"
            )
        weights = attention_weights(model.model, torch.tensor([ids], device=model.device))[:, 0]
        heads = []
        for name, i, j in chosen:
            rows = [[round(x, 3) for x in row] for row in weights[i, j].tolist()]
            heads.append({"most": name, "layer": i, "head": j, "weights": rows})
        maps.append({"tokens": [model.tokenizer.decode([i]) for i in ids], "heads": heads})
        if model.kind == "causal":
            maps[-1]["inside"] = look_inside(model, ids)
    found = {"model": model.name, "scores": scores, "maps": maps}
    return found | ({"copies": copying(model, seed)} if model.kind == "causal" and not text else {})
