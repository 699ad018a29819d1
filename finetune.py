"""Stage 3: fine-tuning. A pretrained model, from the Hugging Face hub or a run of ours, learns one task.

    python finetune.py configs/sentiment.py           # our base, embedded data: a minute on a laptop
    python finetune.py configs/sst2.py --model=gpt2   # GPT-2 with LoRA: is a review good or bad?
    python finetune.py configs/samsum.py              # FLAN-T5 learns to summarise chats
    python finetune.py configs/gsm8k.py --model=TinyLlama/TinyLlama_v1.1 --load_in_4bit    # QLoRA
    python finetune.py configs/sst2.py --model=out/laptop --lora_r=0 --learning_rate=5e-4  # ours, all weights

A task is a question in words (data.py). `--method=lm` teaches the model to say the answer: the loss is on the
answer's tokens alone. `--method=head` puts a linear layer on top that reads off a class. Decoders (GPT-2,
Llama, ours), encoder-decoders (T5) and, with a head, encoders (BERT) will do. With `--lora_r` above 0 the
weights stay as they are and every matrix W gets a low-rank correction W + (alpha / r) B A (Hu et al., 2021),
the only thing that is trained and saved; with `--load_in_4bit` W itself shrinks to 4 bits a weight (QLoRA,
Dettmers et al., 2023).

It reads a model and a task, and writes a run folder out/NAME as training does: the model or the adapter as it
was at the end (nothing is chosen by the validation split), run.json with its results on that split,
predictions.jsonl with all it answered. Training, resuming and logging are train.py's Trainer.
"""

from support.terminal import run_script

import json
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs import parse_config
from data import TASKS, DataError, Example, Task, find_task, judge, load_task
from support.files import write_atomically, write_folder_atomically
from support.hub_models import HubTokenizer
from support.loading import (
    LORA_KINDS,
    adapter_base,
    all_linear,
    four_bit,
    from_hub,
    head_layers,
    is_adapter,
    is_chat,
    kind_of,
    load_model,
    load_tokenizer,
    read_config,
    with_adapter,
)
from support.machine import pick_device, pick_dtype
from support.model_card import write_model_card
from support.runs import AlreadyFinished, TrainError, read_json, run_folder, weights_hash
from support.text_model import TextModel, ask, collate, label_order, length, set_ids, target_logits
from tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, Tokenizer
from train import Trainer, TrainerConfig


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
    task: str = "sentiment"  # sst2, samsum, gsm8k, or embedded: sentiment, dialogue, arithmetic
    method: Literal["lm", "head"] = "lm"  # say the answer, or read a class off a linear layer on top
    max_train_examples: int = 0  # for a smoke run: train on so many only; 0: all
    eval_examples: int = 500  # validation examples looked at while training; all at the end
    max_eval_examples: int = 0  # for a smoke run: validation examples at the end; 0: all
    save_every: int = 200  # steps between checkpoints; 0: none, only the model at the end


# -----------------------------------------------------------------------------
# TextModel: one interface to every library and architecture


_work: Callable  # the function of the processes of `on_all_cores`, inherited when they are forked


# -----------------------------------------------------------------------------
# Loading


# -----------------------------------------------------------------------------
# Asking a whole task: the one protocol for prompted and for fine-tuned models


# -----------------------------------------------------------------------------
# LoRA


LORA_TARGETS = {  # all linear layers of the blocks; other architectures leave the search to PEFT
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LORA_TARGETS |= dict.fromkeys(("mistral", "qwen2", "qwen3"), LORA_TARGETS["llama"])


def add_lora(model: nn.Module, cfg: AdaptConfig, kind: str, new_tokens: list[int] = ()) -> nn.Module:
    """Freezes the model and puts LoRA's corrections beside its linear layers. B = 0 at first: no change.

    The embeddings of `new_tokens` are trained and saved, too. TrainError for a target that no layer has.
    """
    import peft

    architecture = model.config.model_type
    targets = [name.strip() for name in cfg.lora_targets.split(",") if name.strip()]
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            layers = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
            have = ", ".join(sorted(layers))
            raise TrainError(
                f"--lora_targets={cfg.lora_targets}: no layer is called {target!r}; there are {have}"
            )
    head = head_layers(model) if kind == "head" else []
    targets = targets or LORA_TARGETS.get(architecture) or all_linear(model, head)
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    if embeddings[1] is None or embeddings[1].weight is embeddings[0].weight:  # tied: PEFT trains them as one
        embeddings.pop()
    where = [n.rpartition(".")[2] for n, m in model.named_modules() if any(m is e for e in embeddings)]
    settings = peft.LoraConfig(
        task_type=LORA_KINDS[kind],
        modules_to_save=head or None,
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha or 2 * cfg.lora_r,
        lora_dropout=cfg.lora_dropout,
        target_modules=targets,
        trainable_token_indices=dict.fromkeys(where, new_tokens) if new_tokens else None,
        fan_in_fan_out=architecture == "gpt2",  # its Conv1D stores (in, out) where Linear stores (out, in)
    )
    if cfg.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=cfg.gradient_checkpointing
        )
    try:
        model = peft.get_peft_model(model, settings)
    except ValueError as error:
        which = f"--lora_targets={cfg.lora_targets}" if cfg.lora_targets else "LoRA"
        raise TrainError(f"{which}: {str(error).splitlines()[0][:200]}") from None
    float32_where_trained(model)
    return model


def float32_where_trained(model: nn.Module) -> None:
    """A frozen matrix may be bfloat16; what is trained may not."""
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()


# -----------------------------------------------------------------------------
# Fine-tuning


def dtype_for(cfg: AdaptConfig, model: nn.Module) -> torch.dtype | None:
    """auto: float32 for a small model on a CPU, even one that multiplies bfloat16 faster. These stages'
    batches have ever new shapes, and for each one kernels in bfloat16 are made anew: with 0.9M parameters
    float32 was 1.1 (SFT) to 1.6 times (the verifier) as fast, in a third of the memory.
    """
    small = sum(p.numel() for p in model.parameters()) < 2e7
    on_cpu = cfg.dtype == "auto" and pick_device(cfg.device).type == "cpu"
    return torch.float32 if small and on_cpu else None


def build_model(cfg: AdaptConfig, kind: str, labels: tuple[str, ...] = ()) -> TextModel:
    """The model that will be trained, as its settings want it: a new head for labels, LoRA or all weights,
    4 bits.
    """
    device = pick_device(cfg.device)
    if is_adapter(cfg.model):  # goes on with the adapter that is there
        if (other := kind_of(cfg.model, read_config(cfg.model))) != kind:
            raise TrainError(f"{cfg.model} is an adapter of kind {other}, not of kind {kind}: use its base")
        rank = read_json(Path(cfg.model) / "adapter_config.json").get("r")
        if cfg.lora_r not in (0, rank):
            raise TrainError(f"{cfg.model} is an adapter of rank {rank}: --lora_r={rank}, or leave it out")
        cfg.lora_r = rank
    if cfg.load_in_4bit and not cfg.lora_r:
        raise TrainError("--load_in_4bit freezes the weights: it needs --lora_r, the rank of what is trained")
    if cfg.merge and not cfg.lora_r:
        raise TrainError("--merge joins an adapter with its base; without --lora_r there is none")
    if kind == "seq2seq" and pick_dtype(cfg.dtype, device) == torch.float16:  # T5's activations exceed 65,504
        if cfg.dtype == "float16":
            raise TrainError("T5 overflows in float16: --dtype=bfloat16, or float32 on an older card")
        cfg.dtype = "float32"
    torch.manual_seed(cfg.seed)  # of the new head and LoRA's A
    kwargs = four_bit(device) if cfg.load_in_4bit else {}
    if cfg.lora_r and not kwargs and device.type == "cuda":
        kwargs["dtype"] = pick_dtype(cfg.dtype, device)  # frozen weights need no float32 copy
    tokenizer = load_tokenizer(cfg.model)
    if is_adapter(cfg.model):
        model = with_adapter(cfg.model, kind, trainable=True, **kwargs)
        float32_where_trained(model)
    else:
        model = from_hub(cfg.model, kind, labels, **kwargs)
    odd = [m.in_features for m in model.modules() if type(m).__name__ == "Linear4bit" and m.in_features % 64]
    if odd and device.type == "cpu":  # a block of bitsandbytes' 64 weights must not reach across rows there
        raise TrainError(f"on a CPU --load_in_4bit needs widths that are multiples of 64, not {odd[0]}")
    if cfg.dropout >= 0:
        set_dropout(model, cfg.dropout)
    new_tokens = []
    if getattr(cfg, "chat_tokens", False):
        tokenizer, new_tokens = add_chat_tokens(model, tokenizer)
    chat = is_chat(cfg.model, tokenizer, read_config(cfg.model))
    text_model = TextModel(model, tokenizer, kind, cfg.model, cfg.context_length or 1024, chat)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.lora_r and not is_adapter(cfg.model):
        text_model.model = add_lora(model, cfg, kind, new_tokens)
    return text_model


def add_chat_tokens(
    model: nn.Module, tokenizer: Tokenizer | HubTokenizer
) -> tuple[Tokenizer | HubTokenizer, list[int]]:
    """Gives a model without them the special tokens of our conversations: its new tokenizer, and their ids.

    Their embeddings begin as the mean of all others.
    """
    tokenizer = tokenizer.with_special_tokens(SPECIAL_TOKENS[1:])
    tokenizer.chat_template = CHAT_TEMPLATE
    if tokenizer.vocab_size > model.config.vocab_size:
        model.resize_token_embeddings(tokenizer.vocab_size)
    return tokenizer, [tokenizer.special_ids[token] for token in SPECIAL_TOKENS[1:]]


def build(cfg: FinetuneConfig) -> TextModel:
    """`build_model` of the kind that task and method need; refused where they, or the model, do not fit."""
    task = find_task(cfg.task)
    if cfg.method == "head" and not task.labels:
        raise TrainError(f"--method=head is for classes; the answers of {cfg.task} are texts: --method=lm")
    kind = "head" if cfg.method == "head" else kind_of(cfg.model, read_config(cfg.model))
    if kind == "head" and cfg.method != "head":
        raise TrainError(f"{cfg.model} has a classification head: --method=head")
    return build_model(cfg, kind, task.labels if kind == "head" else ())


def set_dropout(model: nn.Module, p: float) -> None:
    """Dropout of `p` wherever the architecture has it, and for Llama, which has next to none, on embeddings.

    A small model that sees the same phrases again and again soon knows them by heart (report/real-text.md).
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for layer in layers:
        layer.p = p
    for module in model.modules():  # some attention layers keep a number instead
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, p)
    if not layers:
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda module, _, output: F.dropout(output, p, module.training))


@dataclass
class TrainingSet:
    """Tokenised examples, and which of them each step sees: a pure function of (seed, step).

    Every epoch is a new order in which batches hold texts of similar length, so that little of a batch is
    padding: the order is cut into pieces of 50 batches, each is sorted by length and cut into batches, and
    these are shuffled. What does not fill a batch is left out of that epoch.
    """

    rows: list[tuple[list[int], list[int] | int]]
    batch: int
    seed: int
    kind: str
    pad: int

    def __post_init__(self):
        self.lengths = np.array([length(row) for row in self.rows])
        self.batches = max(1, len(self.rows) // self.batch)  # an epoch
        self.cached: tuple[int, np.ndarray] = (-1, np.empty(0))

    def order(self, epoch: int) -> np.ndarray:
        """(batches, batch) indices of the examples."""
        if self.cached[0] != epoch:
            rng, size = np.random.default_rng([self.seed, epoch]), self.batches * self.batch
            order = np.resize(rng.permutation(len(self.rows)), size)
            pieces = np.split(order, range(50 * self.batch, size, 50 * self.batch))
            order = np.concatenate(
                [piece[np.argsort(self.lengths[piece], kind="stable")] for piece in pieces]
            )
            self.cached = (epoch, rng.permutation(order.reshape(self.batches, self.batch)))
        return self.cached[1]

    def members(self, step: int, first: int, count: int) -> np.ndarray:
        epoch, at = divmod(step, self.batches)
        return self.order(epoch)[at][first : first + count]

    def tensors(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        return collate([self.rows[i] for i in self.members(step, first, count)], self.kind, self.pad)


def tokenise(model: TextModel, name: str, examples: list[Example]) -> tuple[list[tuple], dict[str, int]]:
    """Pairs (prompt ids, answer ids with their end) for `collate`, and what did not fit.

    A text that is too long is "cut"; an answer never is: an example whose answer leaves less than 16 tokens
    for the question is "left_out".
    """
    task, rows, lost = TASKS[name], [], {"cut": 0, "left_out": 0}
    answer_ids = cache(partial(model.answer_ids, task))  # a class' name is always the same
    order = label_order(model.model.config.id2label, task.labels) if model.kind == "head" else []
    for example in examples:
        answer = order[example.label] if order else [*answer_ids(example.target), model.end]
        taken = len(answer) if model.kind == "causal" else 0
        if taken > model.context_length - 16:
            lost["left_out"] += 1
            continue
        ids, gone = model.prompt(task, example.text, room=model.context_length - taken)
        lost["cut"] += bool(gone)
        rows.append((ids, answer))
    if not rows:
        raise TrainError(f"no example of {name} fits into {model.context_length} tokens: --context_length")
    return rows, lost


def answer_loss(kind: str):
    """The Trainer's loss: cross-entropy on the answer's tokens alone, or on the class, as (sum, count)."""

    def loss(model: nn.Module, ids: Tensor, mask: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = target_logits(model, kind, ids, mask, targets)
        asked = targets != -100
        return F.cross_entropy(logits[asked].float(), targets[asked], reduction="sum"), asked.sum()

    return loss


class FineTuner(Trainer):
    """The Trainer for a TextModel, whichever library computes it: it saves and reads as that one does."""

    def __init__(self, cfg: AdaptConfig, text_model: TextModel, *args, free_to_change=(), **kwargs):
        self.text_model = text_model
        free = ["eval_examples", "max_eval_examples", "merge", *free_to_change]
        model = kwargs.pop("model", text_model.model)
        super().__init__(cfg, model, *args, free_to_change=free, dtype=dtype_for(cfg, model), **kwargs)

    def write_model(self, folder: Path) -> None:
        self.text_model.save(folder)

    def read_model(self, folder: Path) -> None:
        self.text_model.read_weights(folder)


def finetune(cfg: FinetuneConfig) -> dict:
    """Trains, then evaluates the model on the whole validation split; returns run.json."""
    begun = time.perf_counter()
    task = find_task(cfg.task)
    train, train_about = load_task(cfg.task, "train")
    validation, validation_about = load_task(cfg.task, "validation")
    train = subsample(train, cfg.max_train_examples, cfg.seed)
    text_model = build(cfg)
    kind = text_model.kind
    cfg.name = cfg.name or default_name(cfg)
    run_folder(cfg)  # refuses a name that cannot be
    rows, lost = tokenise(text_model, cfg.task, train)
    watched = subsample(validation, cfg.eval_examples, cfg.seed)
    val_rows, val_lost = tokenise(text_model, cfg.task, watched)
    world = int(os.environ.get("WORLD_SIZE", 1))
    batch = cfg.batch_size * cfg.grad_accum_steps * world
    training_set = TrainingSet(rows, batch, cfg.seed, kind, text_model.pad)
    all_steps = math.ceil(training_set.batches * cfg.epochs)
    smoke = bool(cfg.max_train_examples or cfg.max_eval_examples or 0 < cfg.max_steps < all_steps)
    cfg.max_steps = cfg.max_steps or all_steps
    loss = answer_loss(kind)

    def evaluate(model, final):
        totals = np.zeros(2)
        with torch.no_grad():
            for _, tensors in text_model.batches(val_rows, ""):
                totals += [x.item() for x in loss(model, *tensors)]
        found = {"val_loss": totals[0] / totals[1]}
        if task.labels:
            outputs, _ = ask(text_model, cfg.task, watched)
            found["accuracy"] = judge(cfg.task, watched, outputs)[1]["accuracy"]["value"]
        return found

    def samples(model):
        if task.labels:
            return []
        texts, _ = ask(text_model, cfg.task, watched[:2])
        return [{"prompt": e.text, "text": t.strip()} for e, t in zip(watched, texts, strict=False)]

    sizes = [(p.numel(), p.requires_grad) for p in text_model.model.parameters()]
    total, trained = sum(n for n, _ in sizes), sum(n for n, needed in sizes if needed)
    mean_length = float(training_set.lengths.mean())
    about = origin(cfg.model) | {
        "chat": text_model.chat,
        "task": cfg.task,
        "kind": kind,
        "smoke": smoke or is_smoke(cfg.model),  # what was cut short, or came from it, is no result
        "trained_parameters": trained,
        "data": {"train": train_about | {"examples": len(train)} | lost},
    }
    if kind == "head":
        about["labels"] = [str(name) for _, name in sorted(text_model.model.config.id2label.items())]
    about["data"]["validation"] = validation_about | {"examples": len(validation)}
    about["data"]["tokenizer"] = text_model.tokenizer.hash
    trainer = FineTuner(
        cfg,
        text_model,
        training_set.tensors,
        loss=loss,
        evaluate=evaluate,
        sample=samples,
        flops_per_row=(4 if cfg.lora_r else 6) * total * mean_length,  # frozen weights need no gradient
        tokens_per_row=max(1, round(mean_length)),
        epoch=lambda step: step / training_set.batches,
        about=about,
        keeps_best=False,  # results are reported on the validation split: it must not choose the checkpoint
    )
    trainer.say(
        f"{trainer.folder}: {cfg.model} ({total / 1e6:.1f}M parameters, {trained / 1e6:.2f}M trained) on "
        f"{len(train):,} examples of {cfg.task} ({train_about['source']}), {mean_length:.0f} tokens each, "
        f"{cfg.max_steps} steps of {batch}"
    )
    for split, n in (("training", lost), ("validation", val_lost)):
        if any(n.values()):
            trainer.say(
                f"too long for {split}: {n['cut']} texts lost their end, {n['left_out']} examples left out"
            )
    trainer.say(f"an example, its answer in brackets: {shown(text_model, rows[0], task)}")
    try:
        run = trainer.run_all_steps()
    except AlreadyFinished as finished:
        run = finished.run
        if "evaluation" in run:
            raise
    if trainer.rank == 0:
        run |= finish(cfg, trainer.folder, validation)
        run["minutes"] = round((time.perf_counter() - begun) / 60, 2)
        write_run(trainer.folder, run)
    return run


def finish(cfg: FinetuneConfig, folder: Path, validation: list[Example]) -> dict:
    """Evaluates what the run folder now holds, as anybody would load it; and merges, if asked."""
    if cfg.merge:
        merge(folder)
    model = load_model(str(folder), pick_device(cfg.device), context_length=cfg.context_length)
    validation = subsample(validation, cfg.max_eval_examples, cfg.seed)
    outputs, about = ask(model, cfg.task, validation, progress=f"evaluating on {cfg.task}")
    about.pop("sure", None)  # of every item; eval.py keeps it
    records, metrics = judge(cfg.task, validation, outputs)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(folder / "predictions.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
    return {"evaluation": {"split": "validation", **about, "metrics": metrics}}


def is_smoke(name: str) -> bool:
    """Whether a model is a run that was cut short, or came from one."""
    run = Path(name) / "run.json"
    return run.exists() and bool(read_json(run).get("smoke"))


def origin(name: str) -> dict:
    """What run.json says of the model that a run started from."""
    about = {"parent": name, "parent_hash": weights_hash(name)}
    return about | {"base_hash": weights_hash(adapter_base(name))} if is_adapter(name) else about


def merge(folder: Path) -> None:
    """Base and adapter as one model, in {folder}/merged: W + (alpha / r) B A is a matrix like any other."""
    kind = kind_of(str(folder), read_config(str(folder)))
    model = with_adapter(str(folder), kind, merge=True)
    ids = folder / "generation_config.json"
    if ids.exists():  # a chat stops elsewhere than its base
        set_ids(model, {k: v for k, v in read_json(ids).items() if k.endswith("_token_id")})
    run = read_json(folder / "run.json")
    about = {key: run[key] for key in ("chat", "task", "smoke", "seconds", "results") if key in run}
    about |= {"status": "finished", "stage": "merge", "settings": {"task": run.get("task")}}

    def write(target: Path) -> None:
        model.save_pretrained(target)
        load_tokenizer(str(folder), ours=False).inner.save_pretrained(target)
        write_run(target, origin(str(folder)) | about)

    write_folder_atomically(folder / "merged", write)


def subsample(examples: list[Example], n: int, seed: int) -> list[Example]:
    """`n` of them by seed, in their order; 0: all."""
    if not n or n >= len(examples):
        return examples
    chosen = np.random.default_rng(seed).choice(len(examples), n, replace=False)
    return [examples[i] for i in sorted(chosen)]


def default_name(cfg: FinetuneConfig) -> str:
    kind = "-qlora" if cfg.load_in_4bit else "-lora" if cfg.lora_r else ""
    return f"{cfg.task}-{Path(cfg.model).name}{'-head' if cfg.method == 'head' else ''}{kind}"


def shown(model: TextModel, row: tuple, task: Task) -> str:
    prompt, answer = row
    if model.kind == "head":
        answer = model.model.config.id2label[answer]
    else:
        answer = model.decode(answer)
    return f"{model.decode(prompt)[-300:]}[{answer[:200]}]".replace("\n", " / ")


def write_run(folder: Path, run: dict) -> None:
    """run.json, and before it the card: if a process is killed between the two, the next one writes both."""
    text = json.dumps(run, indent=2) + "\n"
    write_model_card(folder, run)
    write_atomically(folder / "run.json", lambda path: path.write_text(text))


def report(cfg: FinetuneConfig, run: dict) -> None:
    evaluation = run["evaluation"]
    figures = ", ".join(f"{name} {show(m)}" for name, m in evaluation["metrics"].items())
    what = "SMOKE RUN, no result: " if run["smoke"] else ""
    folder = Path(cfg.out) / cfg.name
    where = f"on {run['task']}'s {evaluation['split']} split"
    print(f"{folder}: {what}{figures} {where}; {run['seconds'] / 60:.1f} min of training")


def show(metric: dict) -> str:
    """A metric with its interval: shares and ROUGE as percentages."""
    if "low" not in metric:
        return f"{metric['value']:.1f}"
    value, low, high = (100 * metric[key] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}] (n={metric['n']})"


def main() -> None:
    cfg = parse_config(FinetuneConfig, __doc__)
    warnings.filterwarnings("ignore", category=FutureWarning)  # what the libraries tell each other
    try:
        if int(os.environ.get("RANK", 0)) == 0:
            report(cfg, finetune(cfg))
        else:
            finetune(cfg)
    except AlreadyFinished as finished:
        report(cfg, finished.run)
        print("nothing to do: --overwrite trains it anew, --name trains another")
    except (ValueError, OSError, DataError) as error:
        raise SystemExit(f"finetune.py: {error}") from None


if __name__ == "__main__":
    run_script(main)
