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

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from finetune import AdaptConfig, Epochs, FineTuner, build_model, by_length, plan_steps
from model import ModernDecoderLM, attention_mask
from support.adapters import merge
from support.chat_template import TemplateError
from support.loading import origin, resolve
from support.runs import AlreadyFinished, TrainError, run_folder
from support.text_model import TextModel, pad_rows
from train import Trainer, rows_per_step


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
        about, rows = corpus_info(source, split), []
        for text in islice(documents(source, split, about=about), count or None):
            ids = [model.eos, *model.encode(text), model.eos][: model.context_length]
            rows.append((ids, [True] * len(ids)))
        return rows, 0, about
    chats, about = load_conversations(source, split)
    chats = chats[: count or None]
    if source in TASKS and split == "train":
        test = (example.text for example in load_task(source, "test")[0])
        refuse_overlap((chat[0]["content"] for chat in chats), test, source)
    return *tokenised(model, chats), about


def tokenised(model: TextModel, chats: list[list[dict]]) -> tuple[list[Row], int]:
    """Conversations as rows, and how many were left out: too long even without their last turns, or refused
    by the model's chat template, which may know no system turn. If it refuses all, that is an error.
    """
    rows, refused = [], None
    for messages in chats:
        while messages := up_to_an_answer(messages):
            try:
                row = model.conversation(messages)
            except TemplateError as error:
                refused = error
                break
            if len(row[0]) <= model.context_length:
                rows += [row] if any(row[1]) else []
                break
            messages = messages[:-1]
    if refused and not rows:
        raise refused
    return rows, len(chats) - len(rows)


def up_to_an_answer(messages: list[dict]) -> list[dict]:
    """The conversation without the turns behind the assistant's last one."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    return messages


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


class PackedSet(Epochs):
    """Conversations, packed or one a row, in a new order every epoch.

    `shares`: for each source its indices and its weight; an epoch draws as many conversations as there are,
    from every source by its weight, or each once where no weights are given.
    """

    def __init__(
        self, rows: list[Row], shares: list[tuple[np.ndarray, float]], batch: int, room: int, seed: int,
        pad: int, packing: bool = True,
    ):  # fmt: skip
        self.rows, self.shares, self.room, self.seed, self.pad = rows, shares, room, seed, pad
        self.packing, self.lengths = packing, np.array([len(ids) for ids, _ in rows])
        super().__init__(partial(self.bins, batch=batch), batch)

    def bins(self, epoch: int, batch: int) -> list[list[int]]:
        """The conversations of each row of an epoch."""
        rng, weights = np.random.default_rng([self.seed, epoch]), sum(weight for _, weight in self.shares)
        drawn = []
        for index, weight in self.shares:
            n = round(len(self.rows) * weight / weights) if weights else len(index)
            for start in range(0, n + 1, len(index)):  # small sources are read several times
                drawn.append(rng.permutation(index)[: n - start])
        order = rng.permutation(np.concatenate(drawn))
        if not self.packing:
            return [[i] for i in by_length(order, self.lengths, batch).tolist()]
        bins = pack(self.lengths, order, self.room)
        return [bins[i] for i in rng.permutation(len(bins))]

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, ...]:
        bins = self.members(step, first, count)
        return collate_bins([[self.rows[i] for i in members] for members in bins], self.pad)


def collate_bins(bins: list[list[Row]], pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bins of conversations as ids, targets (-100: not trained on), positions and numbers of conversations:
    (B, T) each. The numbers are (B, 0) if each conversation has a row of its own: reading their maximum from
    a GPU would stop its queue of work.

    A conversation's last id predicts nothing and is left out: what follows it belongs to another one.
    """
    ids, targets, positions, numbers = [], [], [], []
    for conversations in bins:
        columns = [[], [], [], []]
        for number, (row, trained) in enumerate(conversations):
            columns[0] += row[:-1]
            columns[1] += [t if learn else -100 for t, learn in zip(row[1:], trained[1:], strict=True)]
            columns[2] += range(len(row) - 1)
            columns[3] += [number] * (len(row) - 1)
        for found, column in zip((ids, targets, positions, numbers), columns, strict=True):
            found.append(column)
    packed = any(len(conversations) > 1 for conversations in bins)
    numbers = pad_rows(numbers, -1)[:, : None if packed else 0]
    return pad_rows(ids, pad), pad_rows(targets, -100), pad_rows(positions, 0), numbers


def conversation_loss(model: nn.Module, ids: Tensor, targets: Tensor, positions: Tensor, numbers: Tensor):
    """Cross-entropy on the assistant's tokens, (sum, count); conversations of a row don't see each other."""
    net, mask = getattr(model, "module", model), None
    ours = isinstance(net, ModernDecoderLM)
    if numbers.shape[1]:
        window, stride = (net.config.sliding_window, net.config.sparse_stride) if ours else (0, 0)
        at = torch.arange(ids.shape[1], device=ids.device)
        same = numbers.unsqueeze(1) == numbers.unsqueeze(2)  # (B, T, T)
        mask = (same & attention_mask(at, at, window, stride)).unsqueeze(1)  # (B, 1, T, T)
    if ours:
        return model(ids, targets, positions=positions if mask is not None else None, mask=mask)
    kwargs = {} if mask is None else {"attention_mask": mask, "position_ids": positions}
    logits = model(input_ids=ids, use_cache=False, **kwargs).logits
    trained = targets != -100
    return F.cross_entropy(logits[trained].float(), targets[trained], reduction="sum"), trained.sum()


def can_pack(model: TextModel) -> bool:
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
    was_training = model.model.training
    model.model.eval()  # without dropout
    try:
        with torch.no_grad():
            packed, first, second = (loss_of(model, [some]) for some in (rows, rows[:1], rows[1:]))
    except (ValueError, RuntimeError, TypeError, IndexError):
        return False
    finally:
        model.model.train(was_training)
    tolerance = 1e-4 if model.model.dtype == torch.float32 else 1e-2
    return torch.allclose(packed[0], first[0] + second[0], rtol=tolerance)


def loss_of(model: TextModel, bins: list[list[Row]], core: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    tensors = (t.to(model.device) for t in collate_bins(bins, model.pad))
    return conversation_loss(core or model.model, *tensors)


# -----------------------------------------------------------------------------
# What SFT, DPO and the verifier share


def aligned_model(cfg: AdaptConfig) -> TextModel:
    """The decoder that will be trained, as one that is asked in conversations."""
    source = resolve(cfg.model)
    if source.kind != "causal":
        raise TrainError(f"{cfg.model} is no decoder ({source.kind}): only these hold conversations")
    return build_model(cfg, source, align=True)


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


def sft(cfg: SFTConfig) -> dict:
    """Trains; returns run.json."""
    run_folder(cfg)  # refuses a name that cannot be, before the work begins
    model = aligned_model(cfg)
    rows, shares, val_rows, data, lost = [], [], [], {}, 0
    for source, count, weight in mixture(cfg.data):
        count = min(filter(None, (count, cfg.max_train_examples)), default=0)
        some, left_out, about = source_rows(model, source, "train", count)
        held, _, held_about = source_rows(model, source, "validation", cfg.eval_examples)
        if not some:
            raise TrainError(
                f"no conversation of {source} fits into {model.context_length} tokens: --context_length"
            )
        shares.append((np.arange(len(rows), len(rows) + len(some)), weight))
        rows, val_rows, lost = rows + some, val_rows + held, lost + left_out
        data[source] = {"train": about | {"examples": len(some)}, "validation": held_about}
    packing = cfg.packing and can_pack(model)
    packed = PackedSet(
        rows, shares, rows_per_step(cfg), model.context_length, cfg.seed, model.pad, packing
    )  # fmt: skip
    val_bins = [[row] for row in val_rows]
    if packing:
        bins = pack([len(ids) for ids, _ in val_rows], np.arange(len(val_rows)), model.context_length)
        val_bins = [[val_rows[i] for i in members] for members in bins]

    @torch.no_grad()
    def evaluate(core, final):
        total, count = 0.0, 0
        for i in range(0, len(val_bins), cfg.batch_size):
            nats, n = loss_of(model, val_bins[i : i + cfg.batch_size], core)
            total, count = total + nats.item(), count + n.item()
        return {"val_loss": total / count}

    tokens = packed.lengths.sum() / len(packed.items)  # a row
    parameters = sum(p.numel() for p in model.model.parameters())
    about = parents(cfg, model, **data) | {"smoke": plan_steps(cfg, round(packed.batches * cfg.epochs))}
    trainer = trainer_for(
        cfg, model, packed.batch, loss=conversation_loss, evaluate=evaluate,
        flops_per_row=(4 if cfg.lora_r else 6) * parameters * tokens,
        tokens_per_row=max(1, round(tokens)), epoch=lambda step: step / packed.batches, about=about,
    )  # fmt: skip
    trained = sum(sum(learn) for _, learn in rows) / packed.lengths.sum()
    trainer.say(
        f"{trainer.folder}: {cfg.model} ({parameters / 1e6:.1f}M parameters) on {len(rows):,} conversations "
        f"of {cfg.data}, {100 * trained:.0f} % of their tokens trained on; {cfg.max_steps} steps of "
        f"{packed.batch_size} rows of {tokens:.0f} tokens"
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
    trainer.say(f"one of them, what is trained on in brackets: {format_row(model, rows[0])}")
    return train_and_merge(cfg, trainer)


def format_row(model: TextModel, row: Row) -> str:
    """A row as text, every token apart, what is trained on in brackets."""
    pieces = []
    for i, trained in zip(*row, strict=True):
        text = model.tokenizer.decode([i])
        pieces.append(f"[{text}]" if trained else text)
    return "|".join(pieces).replace("\n", "⏎")


def main() -> None:
    cfg = parse_config(SFTConfig, __doc__)
    folder = Path(cfg.out) / cfg.name
    try:
        run = sft(cfg)
        minutes, loss = run["seconds"] / 60, run["results"]["best"]["val_loss"]
        print(f"{folder}: {minutes:.1f} min, val_loss {loss:.4f}; python chat.py {folder} --chat")
    except AlreadyFinished:
        print(f"{folder} is finished: --overwrite trains it anew, --name trains another")
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(f"sft.py: {error}") from None


if __name__ == "__main__":
    run_script(main)
