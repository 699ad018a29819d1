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
data.py (`storyworld@300`) is read as in pretraining, so that less of it is forgotten: all tokens of a
document are trained on, as far as they fit into a row.

It reads a model and writes a run folder, out/NAME, as training does: the best by validation loss.
"""

from support.terminal import run_script

import math
import re
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from configs import parse_config
from data import CORPORA_ONLY, TASKS, corpus_info, documents, load_conversations, load_task, refuse_overlap
from finetune import (
    AdaptConfig,
    Epochs,
    FineTuner,
    best_evaluation,
    by_length,
    chat_model,
    loss_on_targets,
    train_and_merge,
)
from model import ModelConfig, ModernDecoderLM, text_mask
from support.chat_template import TemplateError
from support.runs import TrainError, run_folder, run_stage
from support.sharding import unwrapped
from support.text_model import TextModel, pad_rows
from train import pack, rows_per_step


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
# Conversations as ids


Row = tuple[list[int], list[bool]]  # ids of a conversation, and which of them are trained on


def mixture(text: str) -> list[tuple[str, int, float]]:
    """`arithmetic@2000:3,alpaca:1` → [("arithmetic", 2000, 3.0), ("alpaca", 0, 1.0)]: name, how many (0:
    all), weight (0 if there are none).
    """
    found = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, count, weight = re.fullmatch(r"(?s)(.+?)(?:@(\d+))?(?::(\d*\.?\d+))?", part).groups()
        if count and not int(count):
            raise TrainError(f"--data={text}: {name}@{count} takes nothing; without @ it is all of {name}")
        found.append((name, int(count or 0), float(weight or 0)))
    weights = [weight for _, _, weight in found]
    if not found or (any(weights) and not all(weights)):
        raise TrainError(f"--data={text}: give every source a weight above 0, or none: arithmetic:3,alpaca:1")
    return found


def source_rows(model: TextModel, source: str, split: str, count: int) -> tuple[list[Row], int, dict]:
    """The first `count` conversations (0: all) of a source, or documents of a corpus; how many of them were
    left out; and the source, for run.json.
    """
    if source in CORPORA_ONLY:
        about = corpus_info(source, split)
        rows = []
        for text in islice(documents(source, split, about=about), count or None):
            ids = [model.eos, *model.encode(text), model.eos][: model.context_length]
            rows.append((ids, [True] * len(ids)))
        return rows, 0, about
    chats, about = load_conversations(source, split)
    chats = chats[: count or None]
    if source in TASKS and split == "train":
        test = (example.text for example in load_task(source, "test")[0])
        refuse_overlap((chat[0]["content"] for chat in chats), test, source)
    rows = tokenised(model, chats)
    return rows, len(chats) - len(rows), about


def tokenised(model: TextModel, chats: list[list[dict]]) -> list[Row]:
    """Conversations as rows, each up to the last answer of the assistant that fits.

    One that has none is left out, and so is one that the model's chat template refuses, which may know no
    system turn. If it refuses all, that is an error.
    """
    rows = []
    refused = None
    for messages in chats:
        ends = [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]
        try:
            for end in reversed(ends):
                ids, trained = model.conversation(messages[:end])
                if len(ids) <= model.context_length:
                    rows += [(ids, trained)] if any(trained) else []
                    break
        except TemplateError as error:
            refused = error
    if refused and not rows:
        raise refused
    return rows


def format_row(model: TextModel, row: Row) -> str:
    """A row as text, every token apart, what is trained on in brackets."""
    pieces = []
    for i, trained in zip(*row, strict=True):
        text = model.tokenizer.decode([i])
        pieces.append(f"[{text}]" if trained else text)
    return "|".join(pieces).replace("\n", "⏎")


# -----------------------------------------------------------------------------
# Packing: a bin is the conversations of one row of a batch


class PackedSet(Epochs):
    """Conversations in a new order every epoch, packed or one a row.

    `sources`: rows and their weight. An epoch draws as many conversations as there are, from every source by
    its weight, or each once where no weights are given.
    """

    def __init__(
        self, sources: list[tuple[list[Row], float]], batch: int, room: int, seed: int, pad: int, packing=True
    ):
        self.rows = [row for rows, _ in sources for row in rows]
        self.lengths = np.array([len(ids) for ids, _ in self.rows])
        self.sources, self.room, self.seed, self.pad, self.packing = sources, room, seed, pad, packing
        super().__init__(batch)

    def order(self, epoch: int) -> list[list[int]]:
        """The conversations of each row of an epoch."""
        rng, weights = np.random.default_rng([self.seed, epoch]), sum(weight for _, weight in self.sources)
        drawn, first = [], 0
        for rows, weight in self.sources:
            index = np.arange(first, first + len(rows))
            first += len(rows)
            n = round(len(self.rows) * weight / weights) if weights else len(rows)
            for start in range(0, n + 1, len(rows)):  # small sources are read several times
                drawn.append(rng.permutation(index)[: n - start])
        order = rng.permutation(np.concatenate(drawn))
        if not self.packing:
            return [[i] for i in by_length(order, self.lengths, self.per_step).tolist()]
        bins = pack(self.lengths, order, self.room)
        return [bins[i] for i in rng.permutation(len(bins))]

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, ...]:
        bins = self.members(step, first, count)
        return collate_bins([[self.rows[i] for i in members] for members in bins], self.pad)


def collate_bins(bins: list[list[Row]], pad: int) -> tuple[Tensor, ...]:
    """Bins of conversations as ids, targets (-100: not trained on), positions and numbers of conversations:
    (B, T) each. The numbers are (B, 0) if each conversation has a row of its own: reading their maximum from
    a GPU would stop its queue of work.

    A conversation's last id predicts nothing and is left out: what follows it belongs to another one.
    """
    ids, targets, positions, numbers = ([[] for _ in bins] for _ in range(4))
    for b, conversations in enumerate(bins):
        for number, (row, trained) in enumerate(conversations):
            n = len(row) - 1
            ids[b] += row[:n]
            targets[b] += [t if learn else -100 for t, learn in zip(row[1:], trained[1:], strict=True)]
            positions[b] += range(n)
            numbers[b] += [number] * n
    if max(map(len, bins)) == 1:
        numbers = [[]] * len(bins)
    return pad_rows(ids, pad), pad_rows(targets, -100), pad_rows(positions, 0), pad_rows(numbers, -1)


def conversation_loss(model: nn.Module, ids, targets, positions, numbers) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the assistant's tokens, (sum, count); conversations of a row don't see each other."""
    net = unwrapped(model)
    ours = isinstance(net, ModernDecoderLM)
    masked = {}
    if numbers.shape[1]:
        mask = text_mask(numbers, net.config if ours else ModelConfig())
        if ours:
            masked = {"mask": mask, "positions": positions}
        else:
            masked = {"attention_mask": mask, "position_ids": positions}
    if ours:
        return model(ids, targets, **masked)
    return loss_on_targets(model(input_ids=ids, use_cache=False, **masked).logits, targets)


@torch.no_grad()
def mean_loss(model: TextModel, bins: list[list[Row]], batch_size: int) -> float:
    """Nats a trained token."""
    total, count = 0.0, 0
    for i in range(0, len(bins), batch_size):
        tensors = (t.to(model.device) for t in collate_bins(bins[i : i + batch_size], model.pad))
        nats, n = conversation_loss(model.model, *tensors)
        total += nats.item()
        count += n.item()
    return total / count


def can_pack(model: TextModel) -> bool:
    """Whether the conversations of a row stay apart in this model, so that packing changes no loss.

    transformers hands our mask to every layer. A layer with a window of its own would lose it, and some
    architectures (Bloom, MPT, Mamba) know no such mask, which two short rows show.
    """
    if model.ours:
        return True
    config = model.model.config.get_text_config()
    windows = [
        getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")
    ]
    if any(isinstance(window, int) and window < model.context_length for window in windows):
        return False
    rows = [([*ids, model.eos], [True] * 9) for ids in (range(8), range(8, 16))]
    model.model.eval()  # without dropout
    try:
        packed, alone = mean_loss(model, [rows], 1), mean_loss(model, [[row] for row in rows], 1)
    except (ValueError, RuntimeError, TypeError, IndexError):
        return False
    return math.isclose(packed, alone, rel_tol=1e-4 if model.model.dtype == torch.float32 else 1e-2)


# -----------------------------------------------------------------------------
# SFT


def sft(cfg: SFTConfig) -> dict:
    """Trains; returns run.json."""
    run_folder(cfg)  # refuses a name that cannot be, before the work begins
    model = chat_model(cfg)
    sources, val_rows, lost = [], [], 0
    about = {"data": {}} | ({"smoke": True} if cfg.max_train_examples else {})
    for source, count, weight in mixture(cfg.data):
        count = min(filter(None, (count, cfg.max_train_examples)), default=0)
        rows, left_out, read = source_rows(model, source, "train", count)
        held_out, _, held_out_read = source_rows(model, source, "validation", cfg.eval_examples)
        if not rows:
            raise TrainError(
                f"no conversation of {source} fits into {model.context_length} tokens: --context_length"
            )
        sources.append((rows, weight))
        val_rows += held_out
        lost += left_out
        about["data"][source] = {"train": read | {"examples": len(rows)}, "validation": held_out_read}
    if not val_rows:
        raise TrainError(
            f"no validation conversation of {cfg.data} fits into {model.context_length} tokens: raise "
            "--context_length or --eval_examples"
        )
    packing = cfg.packing and can_pack(model)
    data = PackedSet(sources, rows_per_step(cfg), model.context_length, cfg.seed, model.pad, packing)
    val_bins = [[row] for row in val_rows]
    if packing:
        bins = pack([len(ids) for ids, _ in val_rows], np.arange(len(val_rows)), model.context_length)
        val_bins = [[val_rows[i] for i in members] for members in bins]

    def evaluate(_net, _final):
        return {"val_loss": mean_loss(model, val_bins, cfg.batch_size)}

    tokens = data.lengths.sum() / len(data.items)  # a row
    trainer = FineTuner(
        cfg, model, data, tokens, about, loss=conversation_loss, evaluate=evaluate, tokenizer=model.tokenizer
    )
    trainer.say(
        f"{trainer.folder}: {cfg.model} on {len(data.rows):,} conversations of {cfg.data}; {cfg.max_steps} "
        f"steps of {data.per_step} rows of {tokens:.0f} tokens"
    )
    if cfg.packing and not packing:
        trainer.say("one conversation a row: packed together, some layers of this model would see others")
    if lost:
        trainer.say(f"{lost} conversations left out: too long, or refused by the model's chat template")
    trainer.say(f"one of them, what is trained on in brackets: {format_row(model, data.rows[0])}")
    return train_and_merge(cfg, trainer)


def main() -> None:
    run_stage(sft, parse_config(SFTConfig, __doc__), best_evaluation)


if __name__ == "__main__":
    run_script(main)
