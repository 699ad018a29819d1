"""Attention analysis: what each head attends to, and whether a model can copy from its context.

Works on ModernDecoderLM and on transformers' decoders, encoders and encoder-decoders, also with a PEFT
adapter. `python eval.py MODEL --attention` writes the results to attention.json.
"""

import random
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model import ModernDecoderLM
from support.files import write_json
from support.inside import check_length, logits_of, look_inside
from support.loading import explained, is_adapter, load_model, load_tokenizer, resolve
from support.text_model import TextModel
from tasks.arithmetic import arithmetic, things, told_again

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

    def watch(layer, given, _) -> None:
        _, weights = layer.forward(given[0], weights=True)
        found.append(reduce(weights.float().cpu()))

    hooks = [block.self_attn.register_forward_hook(watch) for block in model.model["layers"]]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def attention_of_text(model: TextModel, ids: list[int], reduce: Callable = lambda w: w) -> Tensor:
    """The same for one text: (layers, heads, T, T). Raises ValueError if it is longer than the context."""
    check_length(model, ids)
    given = torch.tensor([ids], device=model.device)
    return attention_weights(model.model, given, reduce)[:, 0]


def hub_attention(model: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
    """The same for a transformers model, with or without a PEFT adapter: one tensor per layer."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
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
    twice = torch.cat([once, once], dim=1).to(next(model.parameters()).device)
    each = attention_weights(model, twice)  # (layers, rows, heads, T, T)
    w = each.mean(1)  # mean over the rows
    t = torch.arange(1, 2 * length)
    second = torch.arange(length, 2 * length)
    causal = not each.triu(1).any()
    visible = t + 1.0 if causal else 2.0 * length + 0 * t
    entropy = torch.special.entr(each).sum(-1)
    entropy = entropy[..., 1:] / visible.log()  # the first token sees itself alone
    return {
        "previous": w[..., t, t - 1].mean(-1),
        "first": w[..., t, 0].mean(-1),
        "induction": w[..., second, second - length + 1].mean(-1),
        "entropy": entropy.mean((1, -1)),
    }


def copying(model: TextModel, seed: int, n: int = 200) -> dict[str, float]:
    """Copy accuracy on repeated digits: {"facts": fraction, "lists": fraction}.

    A digit counts as copied if it is the most likely token, given the true tokens before it. `facts`: n word
    problems, each followed by its sentences in another order. `lists`: n lists of eight random things, each
    repeated. A model that guesses gets about a quarter right.
    """
    rng = random.Random(seed)
    questions = [problem["question"] for problem in islice(arithmetic("validation"), n)]
    lists = [things(rng) for _ in range(n)]
    return {
        "facts": copied_digits(model, questions, [told_again(rng, question) for question in questions]),
        "lists": copied_digits(model, lists, lists),
    }


def copied_digits(model: TextModel, texts: list[str], copies: list[str]) -> float:
    """The fraction of digits in each copy that the model predicts after its text."""
    hits = []
    for text, copy in zip(texts, copies, strict=True):
        before = [model.eos, *model.encode(f"{text}\n")]
        after = model.encode(copy)
        ids = before + after[:-1]
        if len(ids) > model.context_length:  # learned positions end there
            continue
        logits = logits_of(model.model, ids)[len(before) - 1 :]
        for token, true in zip(logits.argmax(-1).tolist(), after, strict=True):
            if model.decode([true]).strip().isdigit():
                hits.append(token == true)
    return sum(hits) / max(1, len(hits))


def foremost(scores: dict[str, list[list[float]]]) -> dict[str, tuple[int, int]]:
    """{score: (layer, head) with the highest value}."""
    return {name: divmod(int(np.argmax(values)), len(values[0])) for name, values in scores.items()}


def chosen_heads(scores: dict, layer: int, head: int) -> list[tuple[str, int, int]]:
    """[(score, layer, head)]: the head with the highest value of each score, or the heads that --layer and
    --head select (their score is "").
    """
    if layer < 0 and head < 0:
        return [(name, *at) for name, at in foremost(scores).items()]
    n_layers, n_heads = np.shape(scores["previous"])
    if layer >= n_layers or head >= n_heads:
        raise ValueError(f"--layer={layer} --head={head}: {n_layers} layers of {n_heads} heads count from 0")
    layers = range(n_layers) if layer < 0 else [layer]
    heads = range(n_heads) if head < 0 else [head]
    return [("", i, j) for i in layers for j in heads]


def attention_map(model: TextModel, text: str, heads: list[tuple[str, int, int]]) -> dict:
    """The weights of some heads on a text; for decoders also what support/inside.py says of the text."""
    ids = [*model.before, *model.encode(text), *model.behind]
    weights = attention_of_text(model, ids)
    found = {"tokens": [model.tokenizer.decode([i]) for i in ids], "heads": []}
    for score, i, j in heads:
        found["heads"].append({"most": score, "layer": i, "head": j, "weights": rounded(weights[i, j], 3)})
    if model.kind == "causal":
        found["inside"] = look_inside(model, ids)
    return found


def rounded(values: Tensor, digits: int) -> list:
    return values.double().numpy().round(digits).tolist()


def show_attention(model: TextModel, folder: Path, seed: int, text: str, layer: int, head: int) -> None:
    """Writes and prints the scores of all heads, and the maps of some on `text` or on two example texts;
    without a text for decoders also the copy accuracy.
    """
    length = min(32, model.context_length // 2)
    scores = head_scores(model.model, seed, length=length)
    scores = {name: rounded(values, 4) for name, values in scores.items()}
    heads = chosen_heads(scores, layer, head)
    texts = [text] if text else EXAMPLE_TEXTS
    maps = [attention_map(model, example, heads) for example in texts]
    file = folder / "attention.json"
    found = {"model": model.name, "scores": scores, "maps": maps}
    if model.kind == "causal" and not text:
        found["copies"] = copying(model, seed)
    write_json(file, found, indent=None)
    for score, (i, j) in foremost(scores).items():
        print(f"  most {score}: layer {i}, head {j}: {scores[score][i][j]:.3f}")
    for kind, accuracy in found.get("copies", {}).items():
        print(f"  copy accuracy on repeated digits, {kind}: {accuracy:.0%}")
    print(f"  attention maps of {len(maps)} text(s) in {file}; python report.py draws them")


def load_for_attention(name: str, device: torch.device, *how) -> TextModel:
    """`load_model`; but an encoder such as BERT is loaded without a head, whose weights may be missing."""
    architecture = "".join(resolve(name).config.get("architectures") or ())
    if is_adapter(name) or not re.search("MaskedLM|PreTraining|(?<!LMHead)Model$", architecture):
        return load_model(name, device, *how)
    import transformers

    transformers.logging.set_verbosity_error()
    with explained(name):
        encoder = transformers.AutoModel.from_pretrained(name, attn_implementation="eager")
    return TextModel(encoder.to(device).eval(), load_tokenizer(name), "head", name)
