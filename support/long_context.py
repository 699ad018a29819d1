"""Texts longer than the context: perplexity and continuations under different attention windows.

Full attention, RoPE stretched without training, and a rolling cache that keeps the first tokens (attention
sinks; Xiao et al., 2024). `python eval.py MODEL --streams` and the lab's family `streams` measure it.
"""

import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import TASKS, documents
from model import ModelConfig, ModernDecoderLM
from support.attention import attention_weights
from support.caches import RollingCache
from support.files import write_json
from support.results import read_json
from support.runs import TrainError
from support.text_model import TextModel

STREAM = 16  # length of a stream, in contexts
KEPT = (0, 1, 4)  # how many first tokens a rolling cache keeps
ENDLESS = 5_000  # tokens that are generated through a rolling cache


@torch.no_grad()
def full_attention(model: ModernDecoderLM, ids: Tensor, stretch: str = "", factor: float = 1.0) -> Tensor:
    """Losses (B, T - 1) in nats of ids (B, T); every token attends to all tokens before it.

    `stretch` and `factor`: see `stretched_rope`.
    """
    rope = stretched_rope(model.config, ids.shape[1] - 1, stretch, factor, ids.device) if stretch else None
    logits = F.linear(model.hidden(ids[:, :-1], rope=rope), model.head)
    return F.cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none")


def stretched_rope(c: ModelConfig, T: int, stretch: str, factor: float, device=None) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (T, D): RoPE extended without training to texts of `factor` contexts.

    "linear" divides positions by the factor (Chen et al., 2023). "ntk" raises the base: the lowest frequency
    is divided by the factor, the highest stays. "yarn" (Peng et al., 2023) divides frequencies that make less
    than one rotation in a context, keeps those that make 32 or more, and interpolates between. It also
    sharpens attention, because the weights are spread over more tokens.
    """
    d, theta, sharper = c.head_dim, c.rope_theta, 1.0
    if stretch == "ntk":
        theta *= factor ** (d / (d - 2))
    frequencies = theta ** (-torch.arange(0, d, 2, device=device).float() / d)
    if stretch == "linear":
        frequencies = frequencies / factor
    if stretch == "yarn":
        # Hugging Face's ramp over the dimensions, from 32 rotations in a context to one.
        first, last = (d * math.log(c.context_length / (2 * math.pi * n), theta) / 2 for n in (32, 1))
        first, last = max(math.floor(first), 0), min(math.ceil(last), d - 1)
        ramp = ((torch.arange(d // 2, device=device) - first) / max(last - first, 0.001)).clamp(0, 1)
        frequencies = frequencies / factor * ramp + frequencies * (1 - ramp)
        sharper = 0.1 * math.log(factor) + 1
    angles = torch.arange(T, device=device).float().unsqueeze(-1) * frequencies
    cos, sin = angles.cos() * sharper, angles.sin() * sharper
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@torch.no_grad()
def rolling(model: ModernDecoderLM, ids: Tensor, keep: int, T: int = 0) -> Tensor:
    """Losses (B, len - 1) in nats, token by token, with a rolling cache of T tokens (default: one context).

    The cache holds the first `keep` tokens and the newest ones (StreamingLLM).
    """
    cache = RollingCache(model.config, len(ids), T or model.config.context_length, ids.device, keep=keep)
    logits, losses = model.prefill(ids[:, :1].tolist(), cache), []
    for t in range(1, ids.shape[1]):
        losses.append(F.cross_entropy(logits.float(), ids[:, t], reduction="none"))
        cache.begin(1)
        logits = model.step(ids[:, t : t + 1], cache)
    return torch.stack(losses, dim=1)


def by_position(losses: Tensor, T: int) -> dict[str, float]:
    """Perplexity by position, in contexts of T tokens: {"0-1": ..., "1-2": ..., "2-4": ...}."""
    found, first, last = {}, 0, 1
    while last * T <= losses.shape[1] + 1:  # the last token has no loss
        found[f"{first}-{last}"] = math.exp(losses[:, first * T : last * T].mean().item())
        first, last = last, 2 * last
    return found


def first_token_mass(model: ModernDecoderLM, ids: Tensor, first: int = 1) -> list[float]:
    """The attention weight that each layer puts on the first tokens.

    Mean over heads and over the queries of the second half. With learned sinks a row sums to less than 1.
    """
    half = ids.shape[1] // 2
    return attention_weights(model, ids, lambda w: w[..., half:, :first].sum(-1).mean()).tolist()


def liveliness(text: str, prompt: str, window: int = 50) -> dict[str, float]:
    """Statistics of a long continuation that need no judge.

    distinct_2: share of distinct word pairs. repeated_4: share of four-word sequences that occurred before.
    loops: 1 if the last `window` words repeat with a fixed period. topic: share of the prompt's words of five
    letters or more that occur in the last quarter.
    """
    words = re.findall(r"\w+", text.lower())
    pairs, fours = ([tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for n in (2, 4))
    tail = words[-window:]
    loops = any(tail[i:] == tail[:-i] for i in range(1, window // 2)) if len(tail) == window else False
    topic = {w for w in re.findall(r"\w+", prompt.lower()) if len(w) > 4}
    last = set(words[-len(words) // 4 :])
    return {
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
        "repeated_4": 1 - len(set(fours)) / max(1, len(fours)),
        "loops": float(loops),
        "topic": len(topic & last) / max(1, len(topic)),
    }


def streams(model: ModernDecoderLM, ids: Tensor, tokenizer, judge: ModernDecoderLM, T: int = 0) -> dict:
    """Perplexities and continuations beyond the context, for each attention window.

    ids (B, 16 T + 1); T is the context, or a part of it. `judge` measures the ends of the continuations.
    """
    if model.config.positions == "learned":
        raise ValueError("learned positions end with the context: streams need RoPE, or no positions")
    T = T or model.config.context_length
    found = {"perplexity": {"full": by_position(full_attention(model, ids), T)}}
    for keep in KEPT:
        found["perplexity"][f"window, first {keep} kept"] = by_position(rolling(model, ids, keep, T), T)
    if model.config.positions == "rope":
        short = ids[:, : 4 * T + 1]
        for stretch in ("", "linear", "ntk", "yarn"):
            losses = full_attention(model, short, stretch, 4.0)
            found.setdefault("stretched to 4 contexts", {})[stretch or "plain"] = by_position(losses, T)
    found["attention to the first token"] = first_token_mass(model, ids[:, :T])
    prompts, found["continuations"] = ids[:, : T // 4].tolist(), {}
    for keep in KEPT:
        new = model.generate(prompts, 4 * T, temperature=0.8, seed=1, window=T - keep, keep=keep)
        texts = [tokenizer.decode(row) for row in new]
        rows = [liveliness(t, tokenizer.decode(p)) for t, p in zip(texts, prompts, strict=True)]
        scores = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        losses = full_attention(judge, torch.tensor([row[-T - 1 :] for row in new], device=ids.device))
        scores |= {"perplexity_of_the_end": math.exp(losses.mean().item()), "example": texts[0][-300:]}
        found["continuations"][f"window, first {keep} kept"] = scores
    return found


@torch.no_grad()
def endless(model: ModernDecoderLM, tokens: int, T: int = 0) -> dict:
    """Generates `tokens` tokens with a rolling cache of T tokens (default: one context).

    Returns the size of the cache and the speed after each tenth: both must stay constant.
    """
    cache = RollingCache(model.config, 1, T or model.config.context_length, model.device)
    logits, sizes, rates = model.prefill([[0]], cache), [cache.nbytes()], []
    for _ in range(10):
        begun = time.perf_counter()
        for _ in range(tokens // 10):
            cache.begin(1)
            logits = model.step(logits.argmax(-1, keepdim=True), cache)
        rates.append(round(tokens // 10 / (time.perf_counter() - begun), 1))
        sizes.append(cache.nbytes())
    return {"tokens": tokens, "cache_bytes": sizes, "tokens_per_second": rates}


def read_streams(model: TextModel, corpus: str, split: str, rows: int) -> Tensor:
    """(rows or fewer, 16 T + 1) ids of documents that follow each other, T being the model's context."""
    length, ids = STREAM * model.context_length + 1, []
    for text in documents(corpus, split):
        ids += [model.eos, *model.encode(text)]
        if len(ids) > rows * length:
            break
    rows = min(rows, len(ids) // length)
    if not rows:
        raise TrainError(
            f"{corpus}, {split} has {len(ids):,} tokens, a stream {length:,}: take another corpus by "
            "--tasks, or a shorter --context_length"
        )
    return torch.tensor(ids[: rows * length], device=model.device).view(rows, length)


def show_streams(model: TextModel, folder: Path, tasks: list[str], split: str, rows: int) -> None:
    """Writes streams.json: of the first corpus among the tasks, or of the one the model was trained on."""
    own = read_json(Path(model.name) / "run.json").get("settings", {}).get("corpus") or "storyworld"
    corpus = next((task for task in tasks if task not in TASKS), re.split("[:,]", own)[0])
    T, ids = model.context_length, read_streams(model, corpus, split, rows)
    source = f"{len(ids)} streams of {STREAM} contexts of {T} tokens of {corpus}, {split}"
    found = {"model": model.name, "source": source}
    found |= streams(model.model, ids, model.tokenizer, model.model, T)
    found["endless"] = endless(model.model, ENDLESS, T)
    write_json(folder / "streams.json", found, indent=1)
    print(f"  {source}; perplexity by position, in contexts:")
    for way, values in found["perplexity"].items():
        print(f"    {way:24}" + "  ".join(f"{at} {value:.2f}" for at, value in values.items()))
    mass = ", ".join(f"{x:.0%}" for x in found["attention to the first token"])
    print(f"  attention to the first token, by layer: {mass}\n  {folder}/streams.json; report.py draws it")
