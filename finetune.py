"""Stage 3: fine-tuning. A pretrained model, from the Hugging Face hub or a run of ours, learns one task.

    python finetune.py configs/sentiment.py           # our base, embedded data: a minute on a laptop
    python finetune.py configs/sst2.py --model=gpt2   # GPT-2 with LoRA: is a review good or bad?
    python finetune.py configs/samsum.py              # FLAN-T5 learns to summarise chats
    python finetune.py configs/gsm8k.py --model=TinyLlama/TinyLlama_v1.1 --lora_r=16 --load_in_4bit    # QLoRA
    python finetune.py configs/sst2.py --model=out/laptop --lora_r=0 --learning_rate=5e-4  # ours, all weights

A task is a question in words (data.py). `--method=lm` teaches the model to say the answer: the loss is on the
answer's tokens alone. `--method=head` puts a linear layer on top that reads off a class. Decoders (GPT-2,
Llama, ours), encoder-decoders (T5) and, with a head, encoders (BERT) will do. With `--lora_r` above 0 the
weights stay as they are and every matrix W gets a low-rank correction W + (alpha / r) B A (Hu et al., 2021),
which is trained and saved: by `LoRA` below for decoders with Llama's names that model.py computes; by PEFT,
which gives the same numbers and files, for the rest (heads, 4 bits, GPT-2, T5, adapters that are trained
further). With `--load_in_4bit` W itself shrinks to 4 bits a weight (QLoRA, Dettmers et al., 2023).

It reads a model and a task, and writes a run folder out/NAME as training does: the model or the adapter as it
was at the end (nothing is chosen by the validation split), run.json with its results on that split,
predictions.jsonl with all it answered. Training, resuming and logging are train.py's Trainer.
"""

from support.terminal import run_script

import contextlib
import math
import os
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs import parse_config
from data import TASKS, Example, Task, find_task, judge, load_task
from model import ModernDecoderLM, n_parameters
from support.adapters import (
    LORA_TARGETS,
    add_peft_lora,
    float32_where_trained,
    four_bit,
    is_plain_lora,
    is_target,
    lora_config,
    merge,
    target_names,
)
from support.files import write_jsonl
from support.hub_models import add_chat_tokens, set_dropout
from support.loading import (
    Source,
    explained,
    is_smoke,
    load_model,
    load_network,
    load_tokenizer,
    origin,
    refuse_changed_base,
    resolve,
)
from support.machine import dtype_for, pick_device, pick_dtype
from support.model_card import write_run
from support.processes import RANK
from support.results import SMOKE, value_of
from support.runs import TrainError, run_folder, run_stage, weights_hash  # noqa: F401
from support.text_model import TextModel, answer_task, collate, label_order, row_lengths, target_logits
from train import Trainer, TrainerConfig, rows_per_step


@dataclass
class AdaptConfig(TrainerConfig):
    """What every stage after pretraining adds to the Trainer's settings."""

    model: str = "out/base"  # what is tuned: run folder, folder with a Hugging Face model, or id on the hub
    epochs: float = 3.0  # times through the training examples
    max_steps: int = 0  # optimizer steps; 0: as many as the epochs have
    context_length: int = 0  # tokens of a text at most; 0: the model's context, at most 1024
    dropout: float = -1.0  # while training, on embeddings and wherever the model has it; -1: the model's own
    lora_r: int = 0  # rank of LoRA's corrections; 0: train all weights
    lora_alpha: float = 0.0  # their scale is lora_alpha / lora_r; 0: 2 lora_r
    lora_dropout: float = 0.05  # on what the corrections read
    lora_targets: str = ""  # names of layers to correct, joined by commas; nothing: all linear layers
    load_in_4bit: bool = False  # QLoRA: keep the frozen weights in 4 bits (needs bitsandbytes)
    merge: bool = False  # afterwards also save base and adapter as one model, in {name}/merged
    learning_rate: float = 2e-4  # the highest
    min_lr: float = 0.0  # the lowest, reached at the end
    warmup_steps: int = 50  # steps from 0 up to learning_rate
    weight_decay: float = 0.01  # pulls matrices, not norms and biases, towards 0
    beta2: float = 0.999  # memory of the squared gradient: fine-tuning has few steps but calm ones
    compile: bool | Literal["auto"] = False  # torch.compile: batches differ in shape, so it seldom pays


@dataclass
class FinetuneConfig(AdaptConfig):
    """A task, and how it is learnt."""

    name: str = ""  # the run's folder is {out}/{name}; default TASK-MODEL, with -lora or -qlora
    task: str = "sentiment"  # sst2, samsum, gsm8k, or embedded: sentiment, dialogue, arithmetic, story
    method: Literal["lm", "head"] = "lm"  # say the answer, or read a class off a linear layer on top
    max_train_examples: int = 0  # for a smoke run: train on this many only; 0: all
    eval_examples: int = 500  # validation examples looked at while training; all at the end
    max_eval_examples: int = 0  # for a smoke run: validation examples at the end; 0: all
    save_every: int = 200  # steps between checkpoints; 0: none, only the model at the end


# -----------------------------------------------------------------------------
# LoRA


class LoRA(nn.Module):
    """W x + (alpha / r) B A x: a frozen linear layer and a trained correction (Hu et al., 2021, eq. 3).

    A (r, in) is random and B (out, r) is 0, so at the start nothing changes. Dropout acts on what A reads.
    The names of the layers, and so those of the tensors in the file, are PEFT's; a test compares the numbers.
    """

    def __init__(self, layer: nn.Linear, r: int, alpha: float, dropout: float):
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A = nn.Linear(layer.in_features, r, bias=False)  # kaiming uniform, as any nn.Linear
        self.lora_B = nn.Linear(r, layer.out_features, bias=False)
        self.lora_A.reset_parameters()  # a second time, as PEFT: the same seed gives the same A
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        y = self.base_layer(x)
        A = self.lora_A.weight.to(y.dtype)  # kept in float32, also where the frozen weights are bfloat16
        B = (self.scale * self.lora_B.weight).to(y.dtype)
        return y + F.linear(F.linear(self.dropout(x), A), B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same function as one matrix, W + (alpha / r) B A."""
        W = self.base_layer.weight
        layer = nn.Linear(W.shape[1], W.shape[0], device="meta")
        with torch.autocast(W.device.type, enabled=False):
            correction = self.scale * self.lora_B.weight @ self.lora_A.weight
        layer.weight = nn.Parameter((W + correction).to(W.dtype))
        layer.bias = self.base_layer.bias  # None if it has none
        return layer


class Adapter:
    """The LoRA layers of one of our models: put in, merged to generate, saved and read as PEFT's files."""

    def __init__(self, model: ModernDecoderLM, cfg: AdaptConfig, base: str):
        """Freezes the model and puts a LoRA layer in the place of each target."""
        targets = target_names(model, cfg.lora_targets) or LORA_TARGETS["llama"]
        base = os.path.abspath(base) if Path(base).is_dir() else base  # PEFT opens it from any folder
        self.config = lora_config(cfg, "causal", targets, base_model_name_or_path=base, inference_mode=True)
        self.model = model.requires_grad_(False)
        self.layers = {}
        for name, layer in model.named_modules():
            if is_target(name, targets):
                self.layers[name] = LoRA(layer, cfg.lora_r, self.config.lora_alpha, cfg.lora_dropout)
        self.put(self.layers)

    def put(self, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            self.model.set_submodule(name, layer)

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """While the block runs, every LoRA layer is one matrix, so generation costs what the base's does."""
        self.put({name: layer.merged() for name, layer in self.layers.items()})
        try:
            yield
        finally:
            self.put(self.layers)

    def tensors(self) -> dict[str, Tensor]:
        """A and B of every layer under PEFT's names."""
        named = self.model.named_parameters()
        return {f"base_model.model.{name}": p.detach() for name, p in named if p.requires_grad}

    def save(self, folder: Path) -> None:
        self.config.save_pretrained(folder)  # adapter_config.json
        save_file(self.tensors(), folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        saved = load_file(folder / "adapter_model.safetensors")
        for name, tensor in self.tensors().items():
            tensor.copy_(saved[name])


def has_own_lora(source: Source, cfg: AdaptConfig) -> bool:
    """True where model.py computes the model, under Llama's names, and `Adapter` adds LoRA; else PEFT does.

    PEFT also trains 4-bit models, the embeddings of new chat tokens, and adapters that are more than LoRA on
    these layers.
    """
    if cfg.load_in_4bit or getattr(cfg, "chat_tokens", False):
        return False
    if source.adapter and not is_plain_lora(source.adapter):
        return False
    names = {name.strip().rpartition(".")[2] for name in cfg.lora_targets.split(",")}
    known = source.config.get("model_type") in ("llama", "mistral", "qwen3")
    return known and not source.why_not_ours() and names <= {"", *LORA_TARGETS["llama"]}


# -----------------------------------------------------------------------------
# The model that is trained


def build_model(
    cfg: AdaptConfig, source: Source, labels: tuple[str, ...] = (), align: bool = False
) -> TextModel:
    """The model that will be trained, as its settings want it: a new head for labels, LoRA or all weights,
    4 bits.

    `align`: it holds conversations, and where all its weights are trained, model.py computes it if it can.
    """
    check_settings(cfg, source)
    device = pick_device(cfg.device)
    tokenizer = load_tokenizer(cfg.model)
    torch.manual_seed(cfg.seed)  # of the new head and LoRA's A
    ours = has_own_lora(source, cfg) if cfg.lora_r else align and not source.why_not_ours()
    # float32; weights that stay frozen: in 4 bits, or (of PEFT only on a GPU) in the dtype of activations
    frozen = cfg.lora_r and device.type == "cuda"
    how = {"dtype": pick_dtype(cfg.dtype, device) if frozen else torch.float32}
    how = four_bit(device) if cfg.load_in_4bit else how
    further = ours and source.adapter  # our own LoRA goes on with the adapter's numbers
    if further:
        refuse_changed_base(source)
        model = ModernDecoderLM.from_pretrained(source.base)
    else:
        model = load_network(source, ours, labels, True, **how)
        if source.adapter:
            float32_where_trained(model)
    if cfg.dropout >= 0:
        set_dropout(model, cfg.dropout)
    adapter, new_tokens = None, []
    if getattr(cfg, "chat_tokens", False):
        tokenizer, new_tokens = add_chat_tokens(model, tokenizer)
    if ours:
        model.gradient_checkpointing = cfg.gradient_checkpointing
    elif cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.lora_r and ours:
        model.to(device, dtype_for(cfg.dtype, model, device))
        adapter = Adapter(model, cfg, source.base)
        if further:
            with explained(cfg.model):
                adapter.load(Path(cfg.model))
    elif cfg.lora_r and not source.adapter:
        model = add_peft_lora(model, cfg, source.kind, new_tokens)
    if not cfg.load_in_4bit:
        model = model.to(device)
    chat = align or source.is_chat(tokenizer)
    found = TextModel(model, tokenizer, source.kind, cfg.model, cfg.context_length or 1024, chat, adapter)
    found.dtype = dtype_for(cfg.dtype, model, device)
    return found


def chat_model(cfg: AdaptConfig) -> TextModel:
    """The decoder that SFT, DPO or a verifier trains; it reads and writes turns of conversations."""
    source = resolve(cfg.model)
    if source.kind != "causal":
        raise TrainError(f"{cfg.model} is no decoder ({source.kind}): only these hold conversations")
    return build_model(cfg, source, align=True)


def check_settings(cfg: AdaptConfig, source: Source) -> None:
    """Refuses what does not go together; an adapter that is trained further keeps its own settings."""
    if source.adapter:
        rank = source.adapter.get("r")
        if cfg.lora_r not in (0, rank):
            raise TrainError(f"{cfg.model} is an adapter of rank {rank}: --lora_r={rank}, or leave it out")
        cfg.lora_r = rank
        cfg.lora_alpha = source.adapter.get("lora_alpha", cfg.lora_alpha)
        cfg.lora_dropout = source.adapter.get("lora_dropout", cfg.lora_dropout)
        if isinstance(targets := source.adapter.get("target_modules"), list):
            cfg.lora_targets = ",".join(sorted(map(str, targets)))
    if (cfg.load_in_4bit or cfg.merge) and not cfg.lora_r:
        raise TrainError("--load_in_4bit and --merge are for adapters: they need --lora_r, the rank")
    overflows = pick_dtype(cfg.dtype, pick_device(cfg.device)) == torch.float16
    if source.kind == "seq2seq" and overflows:  # T5's activations exceed 65,504
        if cfg.dtype == "float16":
            raise TrainError("T5 overflows in float16: --dtype=bfloat16, or float32 on an older GPU")
        cfg.dtype = "float32"


# -----------------------------------------------------------------------------
# Rows, batches, loss


class Epochs:
    """Which rows each step sees: a pure function of (seed, step).

    `order(epoch)` of a subclass lists an epoch's rows, drawn from (seed, epoch); a step takes the next
    `per_step` of them.
    """

    def __init__(self, per_step: int):
        self.per_step = per_step
        self.epoch, self.items = 0, self.order(0)
        self.batches = max(1, len(self.items) // per_step)  # an epoch

    def members(self, step: int, first: int, count: int) -> list:
        """Rows first .. first + count - 1 of the batch of `step`."""
        epoch, at = divmod(step, self.batches)
        if epoch != self.epoch:
            self.epoch, self.items = epoch, self.order(epoch)
        start = at * self.per_step + first
        return [self.items[i % len(self.items)] for i in range(start, start + count)]


def by_length(order: np.ndarray, lengths: np.ndarray, batch: int) -> np.ndarray:
    """The order, cut into pieces of 50 batches that are sorted by length: little of a batch is padding."""
    pieces = np.split(order, range(50 * batch, len(order), 50 * batch))
    return np.concatenate([piece[np.argsort(lengths[piece], kind="stable")] for piece in pieces])


class TrainingSet(Epochs):
    """Pairs (prompt, answer) for `collate`, in batches of similar lengths and in a new order every epoch.

    What does not fill a batch is left out of that epoch.
    """

    def __init__(self, rows: list[tuple], batch: int, seed: int, kind: str, pad: int):
        self.rows = rows
        self.seed = seed
        self.kind = kind
        self.pad = pad
        self.lengths = np.array(row_lengths(rows))
        super().__init__(batch)

    def order(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        batch = self.per_step
        size = max(1, len(self.rows) // batch) * batch
        order = np.resize(rng.permutation(len(self.rows)), size)
        order = by_length(order, self.lengths, batch)
        return rng.permutation(order.reshape(-1, batch)).ravel()

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = [self.rows[i] for i in self.members(step, first, count)]
        return collate(rows, self.kind, self.pad)


def tokenise(model: TextModel, name: str, examples: list[Example]) -> tuple[list[tuple], dict[str, int]]:
    """Pairs (prompt ids, answer ids with their end) for `collate`, and what did not fit.

    A text that is too long is "cut"; an answer never is: an example whose answer leaves less than 16 tokens
    for the question is "left_out".
    """
    task = TASKS[name]
    rows = []
    lost = {"cut": 0, "left_out": 0}
    answer_ids = cache(partial(model.answer_ids, task))  # a class' name is always the same
    order = label_order(model.model.config.id2label, task.labels) if model.kind == "head" else []
    for example in examples:
        answer = order[example.label] if order else [*answer_ids(example.target), model.end]
        taken = len(answer) if model.kind == "causal" else 0
        if taken > model.context_length - 16:
            lost["left_out"] += 1
            continue
        ids, cut = model.prompt(task, example.text, room=model.context_length - taken)
        lost["cut"] += bool(cut)
        rows.append((ids, answer))
    if not rows:
        raise TrainError(f"no example of {name} fits into {model.context_length} tokens: --context_length")
    return rows, lost


def task_loss(model: nn.Module, ids: Tensor, mask: Tensor, targets: Tensor, kind: str):
    """Cross-entropy on the answer's tokens alone, or on the class: (sum in nats, number of targets)."""
    return loss_on_targets(target_logits(model, kind, ids, mask, targets), targets)


def loss_on_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy where the target is not -100: (sum in nats, number of targets)."""
    learned = targets != -100
    return F.cross_entropy(logits[learned].float(), targets[learned], reduction="sum"), learned.sum()


# -----------------------------------------------------------------------------
# Fine-tuning


class FineTuner(Trainer):
    """The Trainer for a TextModel, whichever library computes it: it saves and reads as that one does.

    Steps, epochs and FLOPs follow from `data` and from the mean number of `tokens` of its rows. Sets
    max_steps where it is 0. `about` goes to run.json.
    """

    def __init__(
        self, cfg: AdaptConfig, text_model: TextModel, data: Epochs, tokens: float, about: dict, **stage
    ):
        self.text_model = text_model
        model = text_model.model
        all_steps = max(1, math.ceil(data.batches * cfg.epochs))
        smoke = 0 < cfg.max_steps < all_steps or is_smoke(cfg.model)  # cut short, or a child of such a run
        cfg.max_steps = cfg.max_steps or all_steps
        about = origin(cfg.model) | {"chat": text_model.chat, "smoke": smoke} | about
        about["data"]["tokenizer"] = text_model.tokenizer.hash
        per_parameter = 4 if cfg.lora_r else 6  # frozen weights need no gradient
        usual = {
            "tokens_per_row": max(1, round(tokens)),
            "flops_per_row": per_parameter * n_parameters(model) * tokens,
            "epoch": lambda step: step / data.batches,
            "dtype": dtype_for(cfg.dtype, model, pick_device(cfg.device)),
        }
        super().__init__(cfg, model, data.batch, about=about, **usual | stage)

    def write_model(self, folder: Path) -> None:
        self.text_model.save(folder)

    def read_model(self, folder: Path) -> None:
        self.text_model.read_weights(folder)


def train_and_merge(cfg: AdaptConfig, trainer: Trainer) -> dict:
    """All steps and then, with --merge, base and adapter as one model. If a process was killed before it had
    merged, the next one does it.
    """
    run = trainer.run_all_steps()
    if cfg.merge and RANK == 0 and not (trainer.folder / "merged").exists():
        merge(trainer.folder)
    return run


def finetune(cfg: FinetuneConfig) -> dict:
    """Trains, then evaluates the model on the whole validation split; returns run.json."""
    task = find_task(cfg.task)
    train, train_about = load_task(cfg.task, "train")
    validation, validation_about = load_task(cfg.task, "validation")
    train = subsample(train, cfg.max_train_examples, cfg.seed)
    watched = subsample(validation, cfg.eval_examples, cfg.seed)
    model = build_for_task(cfg, task)
    cfg.name = cfg.name or default_name(cfg)
    run_folder(cfg)  # refuses a name that cannot be

    rows, lost = tokenise(model, cfg.task, train)
    val_rows, _ = tokenise(model, cfg.task, watched)
    batches = TrainingSet(rows, rows_per_step(cfg), cfg.seed, model.kind, model.pad)
    loss = partial(task_loss, kind=model.kind)

    @torch.no_grad()
    def evaluate(core, final):
        total, count = 0.0, 0
        for index in model.batch_indices(row_lengths(val_rows)):
            nats, n = loss(core, *model.collate([val_rows[i] for i in index]))
            total += nats.item()
            count += n.item()
        found = {"val_loss": total / count}
        if task.labels:
            outputs, _ = answer_task(model, cfg.task, watched)
            found["accuracy"] = judge(cfg.task, watched, outputs)[1]["accuracy"]["value"]
        return found

    def sample(core):
        texts, _ = answer_task(model, cfg.task, watched[:2])
        return [{"prompt": e.text, "text": text.strip()} for e, text in zip(watched, texts, strict=False)]

    trained = sum(p.numel() for p in model.model.parameters() if p.requires_grad)
    data = {
        "train": train_about | {"examples": len(train)} | lost,
        "validation": validation_about | {"examples": len(validation)},
    }
    about = {"task": cfg.task, "data": data, "kind": model.kind, "trained_parameters": trained}
    if cfg.max_train_examples or cfg.max_eval_examples:
        about["smoke"] = True
    if model.kind == "head":
        names = model.model.config.id2label
        about["labels"] = [str(names[i]) for i in sorted(names)]
    tokens = batches.lengths.mean()
    trainer = FineTuner(
        cfg, model, batches, tokens, about,
        loss=loss, evaluate=evaluate, sample=None if task.labels else sample,
        keeps_best=False,  # results are reported on the validation split: it must not choose the checkpoint
    )  # fmt: skip
    trainer.say(
        f"{trainer.folder}: {cfg.model} ({model.n_parameters / 1e6:.1f}M parameters, {trained / 1e6:.2f}M "
        f"trained) on {len(train):,} examples of {cfg.task} ({train_about['source']}), {tokens:.0f} tokens "
        f"each, {cfg.max_steps} steps of {batches.per_step}"
    )
    if any(lost.values()):
        trainer.say(f"too long: {lost['cut']} texts lost their end, {lost['left_out']} examples left out")
    trainer.say(f"an example, its answer in brackets: {format_row(model, rows[0])}")
    return train_and_evaluate(cfg, trainer, validation)


def train_and_evaluate(cfg: FinetuneConfig, trainer: Trainer, validation: list[Example]) -> dict:
    """All steps; then rank 0 evaluates what the run folder holds, as anybody would load it. It also does this
    for a finished run that was killed before its evaluation.
    """
    run = train_and_merge(cfg, trainer)
    if RANK > 0 or "evaluation" in run:
        return run
    model = load_model(str(trainer.folder), pick_device(cfg.device), context_length=cfg.context_length)
    validation = subsample(validation, cfg.max_eval_examples, cfg.seed)
    outputs, notes = answer_task(model, cfg.task, validation, progress=f"evaluating on {cfg.task}")
    notes.pop("sure", None)  # of every item; eval.py keeps it
    records, metrics = judge(cfg.task, validation, outputs)
    write_jsonl(trainer.folder / "predictions.jsonl", records)
    run["evaluation"] = {"split": "validation", **notes, "metrics": metrics}
    write_run(trainer.folder, run)
    return run


def build_for_task(cfg: FinetuneConfig, task: Task) -> TextModel:
    """`build_model` of the kind that task and method need; refused where they, or the model, do not fit."""
    source = resolve(cfg.model)
    if cfg.method == "lm":
        if source.kind == "head":
            raise TrainError(f"{cfg.model} has a classification head: --method=head")
        return build_model(cfg, source)
    if not task.labels:
        raise TrainError(f"--method=head is for classes; the answers of {cfg.task} are texts: --method=lm")
    if source.adapter and source.kind != "head":
        raise TrainError(f"{cfg.model} is an adapter of kind {source.kind}, not of kind head: use its base")
    return build_model(cfg, replace(source, kind="head"), task.labels)


def subsample(examples: list[Example], n: int, seed: int) -> list[Example]:
    """`n` of them by seed, in their order; 0: all."""
    if not n or n >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), n, replace=False)
    return [examples[i] for i in sorted(chosen)]


def default_name(cfg: FinetuneConfig) -> str:
    name = f"{cfg.task}-{Path(cfg.model).name}"
    if cfg.method == "head":
        name += "-head"
    if cfg.lora_r:
        name += "-qlora" if cfg.load_in_4bit else "-lora"
    return name


def format_row(model: TextModel, row: tuple) -> str:
    prompt, answer = row
    text = model.model.config.id2label[answer] if model.kind == "head" else model.decode(answer)
    return f"{model.decode(prompt)[-300:]}[{text[:200]}]".replace("\n", " / ")


def describe(folder: Path, run: dict) -> str:
    evaluation = run["evaluation"]
    figures = ", ".join(f"{name} {value_of(name, m)}" for name, m in evaluation["metrics"].items())
    smoke = f"{SMOKE}: " if run["smoke"] else ""
    return (
        f"{folder}: {smoke}{figures} on {run['task']}'s {evaluation['split']} split; "
        f"{run['seconds'] / 60:.1f} min of training"
    )


def best_evaluation(folder: Path, run: dict) -> str:
    """What SFT and DPO print at the end."""
    figures = ", ".join(f"{name} {value:.4g}" for name, value in run["results"]["best"].items())
    command = f"python chat.py {shlex.quote(str(folder))} --chat"
    return f"{folder}: {run['seconds'] / 60:.1f} min; {figures}; {command}"


def main() -> None:
    cfg = parse_config(FinetuneConfig, __doc__)
    warnings.filterwarnings("ignore", category=FutureWarning)  # what the libraries tell each other
    run_stage(finetune, cfg, describe)


if __name__ == "__main__":
    run_script(main)
