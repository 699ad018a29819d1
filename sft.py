"""Stage 4: instruction tuning (SFT). A model that continues texts learns to answer in a conversation.

    python sft.py configs/sft.py                                         # our base, embedded data: a minute
    python sft.py --model=out/laptop --data=alpaca --context_length=512  # real instructions
    python sft.py --model=out/laptop --data=gsm8k:3,alpaca@1000:1        # a mix, three to one
    python sft.py --model=gpt2 --data=dolly --lora_r=16                  # LoRA on a model from the hub
    python chat.py out/sft --chat

A conversation is turns of system, user and assistant between special tokens, or between words ("User: ...")
for a model without them. Only what the assistant says is trained on. Short conversations are packed together
into rows of --context_length tokens; none sees another, since the attention mask is cut into blocks and
positions start anew: the loss is that of conversations one by one, without their padding.

--data names, joined by commas, the embedded `instructions`, any task of data.py (arithmetic, gsm8k), alpaca,
dolly, lima, or files of yours; `arithmetic@2000` is the first 2,000 of them. With weights
(`arithmetic:3,alpaca:1`) an epoch draws as many as there are in these shares; without, each once. A corpus of
data.py (`storyworld@300`) is read as in pretraining, every token trained on, so that less of it is forgotten.

It reads a model and writes a run folder, out/NAME, as training does: the best by validation loss.
"""

from support.terminal import run_script

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import parse_config
from data import (
    CORPORA,
    EMBEDDED,
    TASKS,
    DataError,
    corpus_info,
    documents,
    load_conversations,
    load_task,
    refuse_overlap,
)
from finetune import AdaptConfig, FineTuner, add_chat_tokens, build_model, is_smoke, merge, origin
from model import ModernDecoderLM, attention_mask
from support.chat_template import TemplateError
from support.loading import is_adapter, kind_of, load_model, read_config, why_not_ours
from support.machine import pick_device
from support.runs import AlreadyFinished, TrainError, run_folder
from support.text_model import TextModel, padded
from train import Trainer


@dataclass
class SFTConfig(AdaptConfig):
    """What is learnt, and how conversations become rows."""

    name: str = "sft"  # the run's folder is {out}/{name}
    data: str = "arithmetic:3,instructions:1"  # conversations, joined by commas, with weights if wanted
    packing: bool = True  # many conversations a row, none seeing another; False: one a row, padded
    max_train_examples: int = 0  # for a smoke run: conversations; 0: all
    eval_examples: int = 300  # validation conversations; 0: all
    learning_rate: float = 1e-3  # the highest
    chat_tokens: bool = False  # a model without a chat template gets special tokens for turns, not words


# -----------------------------------------------------------------------------
# Conversations as rows


Row = tuple[list[int], list[bool]]  # ids, and which of them are trained on


def pack(lengths: list[int], order: np.ndarray, room: int, open_bins: int = 32) -> list[list[int]]:
    """Conversations, in `order`, as bins of `room` tokens: each goes into the fullest open bin it fits in."""
    bins: list[tuple[int, list[int]]] = []  # (tokens, conversations), the open ones last
    closed: list[list[int]] = []
    for i in order:
        fits = [b for b in range(len(bins)) if bins[b][0] + lengths[i] <= room]
        if fits:
            b = max(fits, key=lambda b: bins[b][0])
            bins[b] = (bins[b][0] + lengths[i], [*bins[b][1], int(i)])
        else:
            if len(bins) == open_bins:
                closed.append(bins.pop(max(range(len(bins)), key=lambda b: bins[b][0]))[1])
            bins.append((lengths[i], [int(i)]))
    return closed + [members for _, members in bins]


class PackedSet:
    """Which conversations each step sees, packed or one a row: a pure function of (seed, step).

    `shares`: for each source its indices and its weight; an epoch draws as many conversations as there are,
    from every source by its weight, or each once where no weights are given.
    """

    def __init__(
        self, rows: list[Row], shares: list[tuple[np.ndarray, float]], batch: int, room: int, seed: int,
        pad: int, packing: bool = True,
    ):  # fmt: skip
        self.rows, self.shares, self.batch, self.room = rows, shares, batch, room
        self.seed, self.pad, self.packing = seed, pad, packing
        self.lengths = [len(ids) for ids, _ in rows]
        self.cached: tuple[int, list[list[int]]] = (-1, [])
        self.batches = max(1, len(self.bins(0)) // batch)  # an epoch

    def bins(self, epoch: int) -> list[list[int]]:
        if self.cached[0] != epoch:
            rng, weights = np.random.default_rng([self.seed, epoch]), sum(w for _, w in self.shares)
            drawn = []
            for index, weight in self.shares:
                n = round(len(self.rows) * weight / weights) if weights else len(index)
                drawn += [rng.permutation(index) for _ in range(n // len(index))]
                drawn += [rng.permutation(index)[: n % len(index)]]
            order = rng.permutation(np.concatenate(drawn))
            if self.packing:
                bins = pack(self.lengths, order, self.room)
                bins = [bins[i] for i in rng.permutation(len(bins))]
            else:  # neighbours of similar length, so that little of a batch is padding
                pieces = np.split(order, range(50 * self.batch, len(order), 50 * self.batch))
                order = np.concatenate(
                    [p[np.argsort([self.lengths[i] for i in p], kind="stable")] for p in pieces]
                )
                bins = [[int(i)] for i in order]
            self.cached = (epoch, bins)
        return self.cached[1]

    def tensors(self, step: int, first: int, count: int) -> tuple[Tensor, ...]:
        epoch, at = divmod(step, self.batches)
        bins = self.bins(epoch)
        members = [bins[(at * self.batch + i) % len(bins)] for i in range(first, first + count)]
        return lay_out([[self.rows[i] for i in some] for some in members], self.pad)


def lay_out(bins: list[list[Row]], pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bins of conversations as ids, targets (-100: not asked), positions and numbers of conversations: (B, T)
    each. The numbers are (B, 0) if each conversation has a row of its own: asking a card for their maximum
    would stop its queue of work.

    A conversation's last id predicts nothing and is left out: what follows it belongs to another one.
    """
    ids = [[i for row, _ in some for i in row[:-1]] for some in bins]
    targets = [
        [t if s else -100 for row, said in some for t, s in zip(row[1:], said[1:], strict=True)]
        for some in bins
    ]
    positions = [[p for row, _ in some for p in range(len(row) - 1)] for some in bins]
    numbers = [[n for n, (row, _) in enumerate(some) for _ in row[1:]] for some in bins]
    numbers = padded(numbers, -1)[:, : 0 if all(len(some) < 2 for some in bins) else None]
    return padded(ids, pad), padded(targets, -100), padded(positions, 0), numbers


def answer_loss(model: nn.Module, ids: Tensor, targets: Tensor, positions: Tensor, numbers: Tensor):
    """Cross-entropy on what the assistant says, (sum, count); conversations of a row don't see each other."""
    mask, net = None, getattr(model, "module", model)
    ours = isinstance(net, ModernDecoderLM)
    if numbers.shape[1]:
        window, stride = (net.config.sliding_window, net.config.sparse_stride) if ours else (0, 0)
        at = torch.arange(ids.shape[1], device=ids.device)
        same = numbers.unsqueeze(1) == numbers.unsqueeze(2)  # (B, T, T)
        mask = (same & attention_mask(at, at, window, stride)).unsqueeze(1)  # (B, 1, T, T)
    if ours:
        return model(ids, targets, positions=positions if mask is not None else None, mask=mask)
    if mask is not None:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    else:
        logits = model(input_ids=ids, use_cache=False).logits
    asked = targets != -100
    return F.cross_entropy(logits[asked].float(), targets[asked], reduction="sum"), asked.sum()


def packs(model: TextModel) -> bool:
    """Whether the conversations of a row stay apart in this model, so that packing changes no loss.

    transformers hands our mask to every layer. A layer with a window of its own would lose it, and some
    architectures (Bloom, MPT, Mamba) know no such mask, which two short rows show.
    """
    if model.ours:
        return True
    config = model.model.config.get_text_config()
    for name in ("sliding_window", "window_size", "attention_chunk_size"):
        window = getattr(config, name, None)
        if isinstance(window, int) and window < model.context_length:
            return False
    rows = [([*ids, model.eos], [True] * 9) for ids in (range(8), range(8, 16))]

    def loss(*bins: list[Row]) -> Tensor:
        return answer_loss(model.model, *(t.to(model.device) for t in lay_out(bins, model.pad)))[0]

    was_training = model.model.training
    model.model.eval()  # without dropout
    try:
        with torch.no_grad():
            packed, apart = loss(rows), loss(rows[:1]) + loss(rows[1:])
    except (ValueError, RuntimeError, TypeError, IndexError):
        return False
    finally:
        model.model.train(was_training)
    return torch.allclose(packed, apart, rtol=1e-4 if model.weight_dtype == torch.float32 else 1e-2)


# -----------------------------------------------------------------------------
# Models that are aligned: ours where model.py computes them, transformers' with LoRA


def aligned_model(cfg: AdaptConfig) -> TextModel:
    """The decoder that will be trained, as one that is asked in conversations.

    model.py computes it if it can and all weights are trained; else transformers, with LoRA by PEFT.
    """
    config = read_config(cfg.model)
    if (kind := kind_of(cfg.model, config)) != "causal":
        raise TrainError(f"{cfg.model} is no decoder ({kind}): only these hold conversations")
    if cfg.lora_r or is_adapter(cfg.model) or why_not_ours(kind, config):
        model = build_model(cfg, kind)
    elif cfg.load_in_4bit or cfg.merge:
        raise TrainError("--load_in_4bit and --merge need --lora_r")
    else:
        model = load_model(cfg.model, pick_device(cfg.device))
        if cfg.dropout >= 0:
            model.model.set_dropout(cfg.dropout)
        if getattr(cfg, "chat_tokens", False):
            model.tokenizer, _ = add_chat_tokens(model.model, model.tokenizer)
    limit = cfg.context_length or min(1024, model.context_length)
    return TextModel(model.model, model.tokenizer, "causal", cfg.model, limit, chat=True)


def trainer_for(cfg: AdaptConfig, model: TextModel, rows: Callable, **kwargs) -> Trainer:
    return FineTuner(cfg, model, rows, tokenizer=model.tokenizer, **kwargs)


def parents(cfg: AdaptConfig, model: TextModel, **data) -> dict:
    """What run.json says of a stage's origin."""
    return origin(cfg.model) | {"chat": True, "data": data | {"tokenizer": model.tokenizer.hash}}


def train_and_merge(cfg: AdaptConfig, trainer: Trainer) -> dict:
    """All steps and then, with --merge, base and adapter as one model. If a process was killed before it had
    merged, the next one does it.
    """
    try:
        run = trainer.run_all_steps()
    except AlreadyFinished as finished:
        if not cfg.merge or (trainer.folder / "merged").exists():
            raise
        run = finished.run
    if cfg.merge and trainer.rank == 0:
        merge(trainer.folder)
    return run


# -----------------------------------------------------------------------------
# SFT


def mixture(text: str) -> list[tuple[str, int, float]]:
    """`arithmetic@2000:3,alpaca:1` → [("arithmetic", 2000, 3.0), ("alpaca", 0, 1.0)]: name, how many (0:
    all), weight (0 if there are none).
    """
    found = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, count, weight = re.fullmatch(r"(?s)(.+?)(?:@(-?\d+))?(?::(\d*\.?\d+))?", part).groups()
        if count and int(count) < 0:
            raise TrainError(f"--data={text}: the number after @ must be 0 (all) or more")
        found.append((name, int(count or 0), float(weight or 0)))
    weights = [weight for _, _, weight in found]
    if not found or (any(weights) and not all(weights)):
        raise TrainError(f"--data={text}: give every source a weight above 0, or none: arithmetic:3,alpaca:1")
    return found


def source_rows(model: TextModel, source: str, split: str, count: int) -> tuple[list[Row], int, dict]:
    """The first `count` conversations (0: all) of a source, or documents of a corpus, as rows; how many were
    left out; and the source, for a run's record.
    """
    if source in (EMBEDDED.keys() | CORPORA.keys()) - TASKS.keys():
        about = corpus_info(source, split)
        texts = islice(documents(source, split, about=about), count or None)
        whole = ([model.eos, *model.encode(text), model.eos] for text in texts)
        rows = [(ids[: model.context_length], [True] * min(len(ids), model.context_length)) for ids in whole]
        return rows, 0, about
    chats, about = load_conversations(source, split)
    if source in TASKS and split == "train":
        test = (e.text for e in load_task(source, "test")[0])
        refuse_overlap((c[0]["content"] for c in chats[: count or None]), test, source)
    return *tokenised(model, chats[: count or None]), about


def tokenised(model: TextModel, chats: list[list[dict]]) -> tuple[list[Row], int]:
    """Conversations as rows, and how many were too long. A long one loses its last turns, whole ones."""
    rows, lost, refused = [], 0, None
    for messages in chats:
        row = ([], [])
        while messages := up_to_an_answer(messages):
            try:
                row = model.conversation(messages)
            except TemplateError as error:  # a system turn, say, which the model's template does not know
                row, refused = ([], []), error
            if len(row[0]) <= model.context_length:
                break
            messages = messages[:-1]
        if messages and any(row[1]):
            rows.append(row)
        else:
            lost += 1
    if refused and not rows:
        raise refused
    return rows, lost


def up_to_an_answer(messages: list[dict]) -> list[dict]:
    """The conversation without the turns behind the assistant's last one."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    return messages[: last + 1]


def marked(model: TextModel, row: Row) -> str:
    """A row as text, every token apart, what is trained on in brackets."""
    decode = model.tokenizer.decode
    pieces = [f"[{decode([i])}]" if said else decode([i]) for i, said in zip(*row, strict=True)]
    return "|".join(pieces).replace("\n", "⏎")


def sft(cfg: SFTConfig) -> dict:
    """Trains; returns run.json."""
    run_folder(cfg)  # refuses a name that cannot be, before the work begins
    model = aligned_model(cfg)
    rows, shares, val_rows, data, lost = [], [], [], {}, 0
    for source, count, weight in mixture(cfg.data):
        wanted = min(filter(None, (count, cfg.max_train_examples)), default=0)
        found, left_out, about = source_rows(model, source, "train", wanted)
        held, _, held_about = source_rows(model, source, "validation", cfg.eval_examples)
        if not found:
            raise TrainError(
                f"no conversation of {source} fits into {model.context_length} tokens: --context_length"
            )
        shares.append((np.arange(len(rows), len(rows) + len(found)), weight))
        rows, lost = rows + found, lost + left_out
        val_rows += held
        data[source] = {"train": about | {"examples": len(found)}, "validation": held_about}
    packing = cfg.packing and packs(model)
    packed = PackedSet(
        rows, shares, cfg.batch_size * cfg.grad_accum_steps * world(), model.context_length, cfg.seed,
        model.pad, packing,
    )  # fmt: skip
    all_steps = max(1, round(packed.batches * cfg.epochs))
    smoke = bool(cfg.max_train_examples or 0 < cfg.max_steps < all_steps)
    cfg.max_steps = cfg.max_steps or all_steps
    val_bins = [[i] for i in range(len(val_rows))]
    if packing:
        val_bins = pack([len(r[0]) for r in val_rows], np.arange(len(val_rows)), model.context_length)

    def evaluate(core, final):
        totals = np.zeros(2)
        with torch.no_grad():
            for i in range(0, len(val_bins), cfg.batch_size):
                some = [[val_rows[j] for j in members] for members in val_bins[i : i + cfg.batch_size]]
                tensors = (t.to(model.device) for t in lay_out(some, model.pad))
                totals += [x.item() for x in answer_loss(core, *tensors)]
        return {"val_loss": totals[0] / totals[1]}

    tokens = sum(len(ids) for ids, _ in rows) / len(packed.bins(0))
    parameters = sum(p.numel() for p in model.model.parameters())
    trainer = trainer_for(
        cfg, model, packed.tensors, loss=answer_loss, evaluate=evaluate,
        flops_per_row=(4 if cfg.lora_r else 6) * parameters * tokens,
        tokens_per_row=max(1, round(tokens)), epoch=lambda step: step / packed.batches,
        about=parents(cfg, model, **data) | {"smoke": smoke or is_smoke(cfg.model)},
    )  # fmt: skip
    said = sum(sum(s) for _, s in rows) / sum(len(s) for _, s in rows)
    trainer.say(
        f"{trainer.folder}: {cfg.model} ({parameters / 1e6:.1f}M parameters) on {len(rows):,} conversations "
        f"of {cfg.data}, {100 * said:.0f} % of their tokens trained on; {cfg.max_steps} steps of "
        f"{packed.batch} rows of {tokens:.0f} tokens"
    )
    if cfg.packing and not packing:
        trainer.say("one conversation a row: packed together, some layers of this model would see others")
    if lost:
        trainer.say(
            f"{lost} conversations were left out: longer than {model.context_length} tokens, or refused by "
            "the model's chat template"
        )
    for source, parts in data.items():
        if parts["train"].get("left_out"):
            trainer.say(f"{source}: {parts['train']['left_out']:,} rows without text were left out")
    trainer.say(f"one of them, what is trained on in brackets: {marked(model, rows[0])}")
    return train_and_merge(cfg, trainer)


def world() -> int:
    """Processes that train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def main() -> None:
    cfg = parse_config(SFTConfig, __doc__)
    try:
        run = sft(cfg)
        loss = run["results"]["best"]["val_loss"]
        print(
            f"{Path(cfg.out) / cfg.name}: {run['seconds'] / 60:.1f} min, val_loss {loss:.4f}; "
            f"python chat.py {Path(cfg.out) / cfg.name} --chat"
        )
    except AlreadyFinished:
        print(f"{Path(cfg.out) / cfg.name} is finished: --overwrite trains it anew, --name trains another")
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(f"sft.py: {error}") from None


if __name__ == "__main__":
    run_script(main)
