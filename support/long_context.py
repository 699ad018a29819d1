"""Texts longer than the context: perplexity and continuations under different attention windows.

Full attention, RoPE stretched without training, and a rolling cache that keeps the first tokens (attention
sinks; Xiao et al., 2024). `python eval.py MODEL --streams` and the lab's family `streams` measure it.
"""

import re
import time
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from data import TASKS, documents
from model import ModelConfig, ModernDecoderLM, token_losses
from support.attention import attention_weights
from support.caches import RollingCache
from support.files import write_json
from support.results import run_of
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
    T = ids.shape[1] - 1
    rope = stretched_rope(model.config, T, stretch, factor, ids.device) if stretch else None
    parts = zip(model.hidden(ids[:, :-1], rope=rope).split(512, 1), ids[:, 1:].split(512, 1), strict=True)
    return torch.cat([token_losses(model.logits(x), targets) for x, targets in parts], dim=1)


def stretched_rope(c: ModelConfig, T: int, stretch: str, factor: float, device) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (T, D): RoPE extended without training to texts of `factor` contexts.

    "linear" divides positions by the factor (Chen et al., 2023). "ntk" raises the base: the lowest frequency
    is divided by the factor, the highest stays. "yarn" (Peng et al., 2023) divides only the low
    frequencies, and sharpens attention, because the weights are spread over more tokens.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    d = c.head_dim
    base = c.rope_theta
    if stretch == "ntk":
        base *= factor ** (d / (d - 2))
        stretch, factor = "linear", 1.0
    rope = {"rope_type": stretch, "factor": factor, "rope_theta": base}
    if stretch == "yarn":
        rope["original_max_position_embeddings"] = c.context_length
    theirs = LlamaConfig(head_dim=d, max_position_embeddings=c.context_length, rope_parameters=rope)
    frequencies, sharper = ROPE_INIT_FUNCTIONS[stretch](theirs, device)
    angles = torch.arange(T, device=device).unsqueeze(-1) * frequencies
    cos = angles.cos() * sharper
    sin = angles.sin() * sharper
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


@torch.no_grad()
def rolling(model: ModernDecoderLM, ids: Tensor, keep: int, T: int) -> Tensor:
    """Losses (B, len - 1) in nats, token by token, with a rolling cache of T tokens.

    The cache holds the first `keep` tokens and the newest ones (StreamingLLM).
    """
    cache = RollingCache(model.config, len(ids), T, ids.device, keep=keep)
    logits = model.prefill(ids[:, :1].tolist(), cache)
    losses = []
    for t in range(1, ids.shape[1]):
        losses.append(F.cross_entropy(logits.float(), ids[:, t], reduction="none"))
        cache.begin(1)
        logits = model.step(ids[:, t : t + 1], cache)
    return torch.stack(losses, dim=1)


def by_position(losses: Tensor, T: int) -> dict[str, float]:
    """Perplexity by position, in contexts of T tokens: {"0-1": ..., "1-2": ..., "2-4": ...}."""
    found = {}
    first, last = 0, 1
    while last * T <= losses.shape[1] + 1:  # the last token has no loss
        found[f"{first}-{last}"] = losses[:, first * T : last * T].mean().exp().item()
        first, last = last, 2 * last
    return found


def first_token_mass(model: ModernDecoderLM, ids: Tensor) -> list[float]:
    """The attention weight that each layer puts on the first token.

    Mean over heads and over the queries of the second half. With learned sinks a row sums to less than 1.
    """
    half = ids.shape[1] // 2
    return attention_weights(model, ids, lambda w: w[..., half:, 0].mean()).tolist()


def liveliness(text: str, prompt: str) -> dict[str, float]:
    """Statistics of a long continuation that need no judge.

    distinct_2: share of distinct word pairs. repeated_4: share of four-word sequences that occurred before.
    loops: 1 if the last 50 words repeat with a fixed period. topic: share of the prompt's words of five
    letters or more that occur in the last quarter.
    """
    words = re.findall(r"\w+", text.lower())
    pairs = list(pairwise(words))
    fours = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    tail = words[-50:]
    loops = len(tail) == 50 and any(tail[i:] == tail[:-i] for i in range(1, 25))
    topic = set(re.findall(r"\w{5,}", prompt.lower()))
    last = set(words[-len(words) // 4 :])
    return {
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
        "repeated_4": 1 - len(set(fours)) / max(1, len(fours)),
        "loops": float(loops),
        "topic": len(topic & last) / max(1, len(topic)),
    }


def streams(model: ModernDecoderLM, ids: Tensor, tokenizer, judge: ModernDecoderLM, T: int) -> dict:
    """Perplexities and continuations beyond the context, for each attention window.

    ids (B, 16 T + 1); T is the context, or a part of it. `judge` measures the ends of the continuations.
    """
    if model.config.positions == "learned":
        raise ValueError("learned positions end with the context: streams need RoPE, or no positions")
    least = 2 * max(KEPT)
    if T < least:
        raise ValueError(f"--context_length={T} is too short for streams: at least {least} tokens")
    found = {
        "perplexity": {"full": by_position(full_attention(model, ids), T)},
        "stretched to 4 contexts": {},
        "continuations": {},
        "attention to the first token": first_token_mass(model, ids[:, :T]),
    }
    if model.config.positions == "rope":
        for stretch in ("", "linear", "ntk", "yarn"):
            losses = full_attention(model, ids[:, : 4 * T + 1], stretch, 4.0)
            found["stretched to 4 contexts"][stretch or "plain"] = by_position(losses, T)
    for keep in KEPT:
        way = f"window, first {keep} kept"
        found["perplexity"][way] = by_position(rolling(model, ids, keep, T), T)
        found["continuations"][way] = continuation(model, ids, tokenizer, judge, T, keep)
    return found


def continuation(
    model: ModernDecoderLM, ids: Tensor, tokenizer, judge: ModernDecoderLM, T: int, keep: int
) -> dict:
    """Statistics of four contexts that follow a quarter of one, and the end of an example."""
    prompts = ids[:, : T // 4].tolist()
    new = model.generate(prompts, 4 * T, temperature=0.8, seed=1, window=T - keep, keep=keep)
    texts = [tokenizer.decode(row) for row in new]
    rows = [liveliness(text, tokenizer.decode(prompt)) for text, prompt in zip(texts, prompts, strict=True)]
    found = {}
    for key in rows[0]:
        found[key] = fmean(row[key] for row in rows)
    ends = torch.tensor([row[-T - 1 :] for row in new], device=ids.device)
    found["perplexity_of_the_end"] = full_attention(judge, ends).mean().exp().item()
    found["example"] = texts[0][-300:]
    return found


@torch.no_grad()
def endless(model: ModernDecoderLM, tokens: int, T: int) -> dict:
    """Generates `tokens` tokens with a rolling cache of T tokens.

    Returns the size of the cache and the speed after each tenth: both must stay constant.
    """
    cache = RollingCache(model.config, 1, T, model.device)
    logits = model.prefill([[0]], cache)
    sizes = [cache.nbytes()]
    rates = []
    tenth = tokens // 10
    for _ in range(10):
        begun = time.perf_counter()
        for _ in range(tenth):
            cache.begin(1)
            logits = model.step(logits.argmax(-1, keepdim=True), cache)
        rates.append(round(tenth / (time.perf_counter() - begun), 1))
        sizes.append(cache.nbytes())
    return {"tokens": tokens, "cache_bytes": sizes, "tokens_per_second": rates}


def read_streams(model: TextModel, corpus: str, split: str, rows: int) -> Tensor:
    """(rows or fewer, 16 T + 1) ids of documents that follow each other, T being the model's context."""
    length = STREAM * model.context_length + 1
    ids = []
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
    """Writes streams.json, measured on the first corpus among the tasks, or else on that of the training."""
    settings = run_of(Path(model.name)).get("settings") or {}
    own = settings.get("corpus") or "storyworld"
    corpora = [task for task in tasks if task not in TASKS] + re.split("[:,]", own)
    T = model.context_length
    ids = read_streams(model, corpora[0], split, rows)
    source = f"{len(ids)} streams of {STREAM} contexts of {T} tokens of {corpora[0]}, {split}"
    found = {"model": model.name, "source": source}
    found |= streams(model.model, ids, model.tokenizer, model.model, T)
    found["endless"] = endless(model.model, ENDLESS, T)
    write_json(folder / "streams.json", found, indent=1)
    print(f"  {source}; perplexity by position, in contexts:")
    for way, values in found["perplexity"].items():
        shown = [f"{at} {value:.2f}" for at, value in values.items()]
        print(f"    {way:24}", *shown, sep="  ")
    print("  attention to the first token, by layer:", found["attention to the first token"])
    print(f"  {folder}/streams.json; report.py draws it")
