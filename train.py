"""Training: the Trainer that every stage shares, and pretraining, which makes a language model from text.

    python train.py configs/cpu.py                       # a story teller in minutes, on any laptop
    python train.py configs/max3060.py --plan --vram=12  # what a run costs, before it costs anything
    python train.py configs/cpu.py --plan --measure      # ... by some of its own steps, timed here
    python train.py configs/speedrun.py                  # the real thing; run it again and it resumes
    torchrun --nproc_per_node=2 train.py configs/cpu.py  # two GPUs, or two CPU processes; --parallel=fsdp
    python train.py --list                               # all runs and their checkpoints

It reads the token files that tokenizer.py wrote and writes a run folder, out/NAME:

    config.json, model.safetensors, tokenizer.json   a Hugging Face model: the best by validation loss (with
                          --save_every=0 the last)
    run.json              settings, data, versions, hardware, status, results
    metrics.jsonl         a line per logged step and per evaluation
    samples.jsonl         what the model writes during training
    checkpoints/step-N/   the best and the last: the model, and state.pt, which an exact resume needs

Two ideas make runs exact. The batch of step s is a pure function of (seed, s), so there is no loader state
that a crash could lose: a run that was killed and resumed has the same bits as one that was not. And a loss
is a (sum, count) pair: gradients are divided by the count of the whole batch, over all micro-batches and
processes, so how a batch is cut changes the result by rounding only (dropout draws other masks for other
cuts, and experts are balanced within each piece).
"""

from support.terminal import StopSignal, run_script

import contextlib
import functools
import importlib.util
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from configs import check_numbers, parse_config
from model import ModelConfig, ModernDecoderLM, MoE, n_parameters, text_mask
from support import sharding
from support.checkpoints import (
    explained,
    first_record,
    load_checkpoint,  # noqa: F401
    refuse_another_run,
    save_checkpoint,  # noqa: F401
    tidy,
    what_is_left,
    write_checkpoint,
)
from support.costs import estimate_flops
from support.kernels import fastest_products, float32_products, multiplies_bfloat16
from support.machine import autocast, hardware, peak_flops, peak_memory, pick_device, pick_dtype
from support.memory import free_cached_memory, is_out_of_memory, leave_memory_to_others
from support.metrics import bits_per_byte, perplexity
from support.model_card import write_model_card
from support.pretraining import adopt, data_record, tokenizer_command
from support.processes import RANK, WORLD_SIZE
from support.runs import (
    Progress,
    RunLog,
    TrainError,
    checkpoint_of,
    checkpoints,
    errors_for_users,
    first_line,
    list_runs,
    lock,
    prune,
    publish,
    read_json_if_there,
    remove_run,
    run_folder,
    run_stage,
    weights_hash,
)
from support.sharding import barrier, full_tensor, gradient_sync, shard_like, unwrapped
from tokenizer import Tokenizer, TokenizerConfig, open_tokens, tokens_folder


@dataclass
class TrainerConfig:
    """Settings of every training stage."""

    name: str = "base"  # the run's folder is {out}/{name}
    out: str = "out"  # folder that holds everything the project makes
    seed: int = 1  # of the initial weights, the order of the data and dropout
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 16  # sequences in one forward pass of one process; train.py: auto, as many as fit
    grad_accum_steps: int = 1  # forward passes before an optimizer step
    learning_rate: float = 1e-3  # the highest
    min_lr: float = 1e-4  # where every decay ends, at max_steps
    warmup_steps: int = 100  # steps from 0 up to learning_rate
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # wsd: warmup, stable, decay
    decay_fraction: float = 0.2  # wsd: share of the steps that decay, the last ones
    optimizer: Literal["adamw", "adamw_plain", "muon", "normuon"] = "adamw"  # adamw_plain: ours, to read
    embedding_rate: float = 1.0  # learning rate of the embedding, as a multiple of the others'
    momentum: float = 0.95  # Muon's memory of the gradient
    weight_decay: float = 0.1  # pulls matrices, not norms and biases, towards 0
    beta1: float = 0.9  # memory of the gradient's mean
    beta2: float = 0.95  # memory of its square
    grad_clip: float = 1.0  # largest gradient norm; 0: any
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; auto: the fast one
    device: str = "auto"  # cuda, cpu, cuda:1, ...
    compile: bool | Literal["auto"] = "auto"  # torch.compile: a minute to start; auto: on CUDA only
    gradient_checkpointing: bool = False  # recompute blocks in the backward pass: less memory, a third slower
    log_every: int = 10  # steps between lines in metrics.jsonl
    eval_every: int = 200  # steps between evaluations; 0: only at the end
    save_every: int = 200  # steps between checkpoints; 0: none, only the model at the end
    keep_last: int = 1  # checkpoints kept beside the best, at least 1
    init_from: str = ""  # run folder or Hugging Face model whose weights are the start
    wandb: str = ""  # also log to this Weights & Biases project
    hypothesis: str = ""  # what the run is meant to find out; the experiment log prints it
    baseline: str = ""  # config file that this one starts from and is compared with
    overwrite: bool = False  # throw away what the run folder holds and start anew


@dataclass
class TrainConfig(ModelConfig, TokenizerConfig, TrainerConfig):
    """Pretraining: the model, the text and the Trainer's settings in one."""

    eval_tokens: int = 0  # validation tokens read while training; 0: all
    final_eval_tokens: int = 0  # the same, at the end
    look_back: bool = False  # the first head of a new model begins by looking at the token before it
    by_document: bool = False  # windows of whole documents, none of which sees another
    parallel: Literal["ddp", "fsdp"] = "ddp"  # many processes: each has the model, or a shard of it
    sample_prompt: str = ""  # what samples continue; nothing: the start of a document
    sample_tokens: int = 200  # length of a sample; 0: none
    plan: bool = False  # print memory, FLOPs and time, and stop
    measure: bool = False  # --plan, and time some steps here, at most two minutes
    vram: float = 0.0  # plan for a GPU with this many GB instead of the one here
    card: str = ""  # plan for a GPU of this name, such as "RTX 3090"
    list: bool = False  # list runs and checkpoints, and stop


# What may differ when a run is resumed, because it changes neither the data nor the mathematics. (Another
# device, compile or micro-batch size changes the rounding: bits are equal only if these are, too. Another
# eval_every may publish another checkpoint.)
FREE_TO_CHANGE = """
    name out tokens device compile parallel gradient_checkpointing batch_size grad_accum_steps log_every
    eval_every eval_tokens final_eval_tokens save_every keep_last sample_prompt sample_tokens wandb hypothesis
    baseline overwrite plan measure vram card list eval_examples max_eval_examples merge
""".split()  # of all stages (batch_size times grad_accum_steps is checked apart)


# -----------------------------------------------------------------------------
# Learning rate


def get_lr(
    step: int,
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    schedule: str = "cosine",
    decay_fraction: float = 0.2,
) -> float:
    """Linear warm-up from 0 to max_lr; then by `schedule`: constant; cosine or linear decay to min_lr at
    max_steps; wsd: max_lr, but for the last decay_fraction of the steps, which decay linearly to min_lr.
    """
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    if schedule == "constant":
        return max_lr
    if step >= max_steps:
        return min_lr
    start = max(warmup_steps, max_steps * (1 - decay_fraction)) if schedule == "wsd" else warmup_steps
    if step < start:
        return max_lr
    progress = (step - start) / max(1, max_steps - start)
    if schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return max_lr + progress * (min_lr - max_lr)


# -----------------------------------------------------------------------------
# Optimizers


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, algorithm 2), for study.

    Training uses torch's fused version, which does the same in one kernel (a test compares them), and this
    one with --optimizer=adamw_plain.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr = group["lr"]
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                m, v, t = state["m"], state["v"], state["step"]
                p.mul_(1 - lr * group["weight_decay"])  # apart from the gradient: not rescaled by v
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)  # mean of the gradient
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)  # mean of its square
                # Both begin at 0 and are too small at first; 1 - beta^t is by how much.
                denominator = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
                p.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, eps: float = 1e-6) -> None:
    """Scales the gradients, in place, so that the L2 norm of all of them is at most `max_norm` (Pascanu et
    al., 2013).

    For study: training uses torch's clip_grad_norm_, which does the same in few kernels.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(grad.float().square().sum() for grad in grads))
    if norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / (norm + eps))


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan et al., 2024), for the matrices of the layers.

    A gradient's few large singular values drown its many small ones; with all of them about 1, every
    direction moves equally far. 0.2 sqrt(longer side) makes a step as large as AdamW's, so that AdamW's
    learning rates and decay serve (Liu et al., 2025). torch.optim.Muon does the same (a test compares them),
    but in bfloat16 everywhere: on a CPU without hardware for it (AMD EPYC, cpu.py with 16 rows a step) its
    step took 680 ms where ours takes 25, beside a forward and backward pass of 295.

    An orthogonal step still moves some neurons much farther than others. With a beta2 above 0 each row is
    divided by the running root mean square of its own steps (NorMuon; Li et al., 2025), in a wide matrix
    each column; then the whole step gets back its size.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, beta2=0.0, weight_decay=0.1):
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum = group["momentum"]
            beta2 = group.get("beta2")  # older checkpoints have none
            lr = group["lr"]
            by_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                m = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                ahead = full_tensor(p.grad.lerp(m, momentum))  # Nesterov: where the momentum will lead
                by_shape.setdefault(p.shape[-2:], []).append((p, ahead))
            for shape, pairs in by_shape.items():  # one product for all of a shape; experts are a stack
                scale = 0.2 * max(shape) ** 0.5
                moves = orthogonal(torch.cat([ahead.reshape(-1, *shape) for _, ahead in pairs]))
                sizes = [p.numel() // shape.numel() for p, _ in pairs]
                for (p, _), move in zip(pairs, moves.split(sizes), strict=True):
                    if beta2:
                        move = self.level(move, self.state[p], beta2)
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(shard_like(p, move.view(p.shape)), alpha=-lr * scale)

    def level(self, move: Tensor, state: dict, beta2: float) -> Tensor:
        """The steps (..., n, m) with rows, or in wide matrices columns, of about equal size."""
        across = -1 if move.shape[-2] >= move.shape[-1] else -2
        square = move.square().mean(across, keepdim=True)
        state["square"] = state.get("square", torch.zeros_like(square)).lerp(square, 1 - beta2)
        even = move / state["square"].sqrt().clamp(min=1e-10)
        size = move.norm(dim=(-2, -1), keepdim=True)
        return even * (size / even.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))


def orthogonal(G: Tensor) -> Tensor:
    """About U V^T of matrices (k, n, m) = U S V^T, without a decomposition: five Newton-Schulz steps of a
    polynomial that pulls every singular value to between 0.7 and 1.2. In bfloat16 where that is faster.
    """
    X = G.bfloat16() if G.is_cuda or multiplies_bfloat16() else G
    X = X.mT if G.shape[-2] > G.shape[-1] else X  # the smaller product
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # X becomes a X + (b A + c A A) X with A = X X^T
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315)
        X = torch.baddbmm(X, B, X, beta=3.4445)
    return (X.mT if G.shape[-2] > G.shape[-1] else X).to(G.dtype)


def make_optimizers(model: nn.Module, cfg: TrainerConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices of the layers and AdamW for the rest. Only matrices decay.

    With an embedding_rate above 1 a small model learns more from each step (report/lab/findings.md). The
    decay is divided by it, so that the embedding is pulled towards 0 as strongly as the rest.
    """
    rate = cfg.embedding_rate
    tables = {p for layer in model.modules() if isinstance(layer, nn.Embedding) for p in layer.parameters()}
    hidden, embeddings, matrices, others = [], [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2 or "sinks" in name:  # sinks are logits
            others.append(p)
        elif "muon" in cfg.optimizer and ".layers." in name:
            hidden.append(p)
        elif p in tables and rate != 1:  # with 1 no group of its own: older checkpoints have none
            embeddings.append(p)
        else:
            matrices.append(p)
    groups = [
        {"params": embeddings, "weight_decay": cfg.weight_decay / rate, "rate": rate},
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers = []
    if groups:
        fused = groups[0]["params"][0].device.type in ("cuda", "cpu")
        how = {"lr": cfg.learning_rate, "betas": (cfg.beta1, cfg.beta2)}
        plain = cfg.optimizer == "adamw_plain"
        optimizers.append(AdamW(groups, **how) if plain else torch.optim.AdamW(groups, fused=fused, **how))
    if hidden:
        beta2 = 0.95 if cfg.optimizer == "normuon" else 0.0
        how = {"momentum": cfg.momentum, "beta2": beta2, "weight_decay": cfg.weight_decay}
        optimizers.append(Muon(hidden, cfg.learning_rate, **how))
    return optimizers


# -----------------------------------------------------------------------------
# Batches: which tokens step s sees

Batch = Callable[[int, int, int], tuple[Tensor, ...]]
"""batch(step, first, count): rows first .. first + count - 1 of the batch of `step`, as tensors for the loss.

The one protocol by which every stage hands out its data. It is a pure function of its arguments and a seed:
the same rows whenever they are asked for, whichever process asks, however the batch is cut.
"""


def rows_per_step(cfg: TrainerConfig) -> int:
    """Sequences of one optimizer step, in all processes."""
    return cfg.batch_size * cfg.grad_accum_steps * WORLD_SIZE


class Windows:
    """Training windows of a token file, as a pure function of (seed, step).

    The file is cut into windows of `context_length` tokens, and every epoch reads them in a new order: each
    token is predicted exactly once an epoch. The last window may be short, its missing targets are -100.

    With `eot`, the token that begins every document, a window is made of whole documents (of a long one,
    pieces), and a third tensor tells them apart, so that none sees another. Where a window shows other
    documents, too, the names in them compete with the hero's, and a small model learns late which to copy.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, rows: int, seed: int, eot: int | None = None):
        self.tokens = tokens
        self.T = context_length
        self.seed = seed
        self.rows = rows  # of one step, in all processes
        self.by_document = eot is not None
        last = len(tokens) - 1
        if last < 1:
            raise TrainError(f"{len(tokens)} tokens are too few to train on")
        self.begins = np.arange(0, last, context_length)  # of pieces
        self.bins = np.arange(len(self.begins))[:, None]  # the pieces of each window: one
        if self.by_document:
            documents = np.union1d(0, np.flatnonzero(tokens[:last] == eot))
            pieces = [documents]
            for begin, end in pairwise([*documents.tolist(), last]):
                if end - begin > context_length:
                    pieces.append(np.arange(begin + context_length, end, context_length))
            self.begins = np.sort(np.concatenate(pieces))
            order = permutation(len(self.begins), seed, 0)
            self.bins = pack(np.diff(self.begins, append=last), order, context_length)
        self.ends = np.append(self.begins[1:], last)
        self.count = len(self.bins)  # windows of an epoch

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, ...]:
        """Rows first .. first + count - 1 of the batch of `step`, in the form that `at` returns."""
        chosen = []
        for row in range(first, first + count):
            epoch, i = divmod(step * self.rows + row, self.count)
            chosen.append(permutation(self.count, self.seed, epoch)[i])
        return self.at(chosen)

    def at(self, chosen: Iterable[int]) -> tuple[Tensor, ...]:
        """ids and targets (n, T) int64 of windows; target t is the next token after id t, -100 past the end.
        By document also the number of each token's piece, -1 past the end.
        """
        bins = [self.bins[i] for i in chosen]
        shape = (len(bins), self.T)
        ids = np.zeros(shape, np.int64)
        targets = np.full(shape, -100, np.int64)
        numbers = np.full(shape, -1, np.int64)
        for row, pieces in enumerate(bins):
            at = 0
            for piece in pieces:
                begin, end = self.begins[piece], self.ends[piece]
                place = slice(at, at := at + end - begin)
                ids[row, place] = self.tokens[begin:end]
                targets[row, place] = self.tokens[begin + 1 : end + 1]
                numbers[row, place] = piece
        found = (ids, targets, numbers) if self.by_document else (ids, targets)
        return tuple(map(torch.from_numpy, found))

    def epoch(self, step: int) -> float:
        """How often training has gone through the file after `step` steps."""
        return step * self.rows / self.count


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def pack(lengths: list[int], order: np.ndarray, room: int) -> list[list[int]]:
    """Texts, in `order`, as bins of `room` tokens: each goes into the fullest open bin it fits in. At most 32
    bins are open.
    """
    closed = []
    bins = []  # [tokens, texts] of the open ones
    for i in order:
        fits = [one for one in bins if one[0] + lengths[i] <= room]
        if not fits:
            if len(bins) == 32:
                closed.append(max(bins, key=itemgetter(0)))
                bins.remove(closed[-1])
            fits = [[0, []]]
            bins += fits
        fullest = max(fits, key=itemgetter(0))
        fullest[0] += lengths[i]
        fullest[1].append(int(i))
    return [members for _, members in closed + bins]


def get_batch(data: np.ndarray, batch_size: int, context_length: int, device="cpu", rng=None):
    """Windows at random places of a 1-D token array: ids and targets, (batch_size, context_length) int64.

    For study, as in nanoGPT: the Trainer reads `Windows`, which an interrupted run finds again.
    """
    starts = (rng or np.random.default_rng()).integers(0, len(data) - context_length, batch_size)
    rows = torch.from_numpy(np.stack([data[i : i + context_length + 1] for i in starts]).astype(np.int64))
    return rows[:, :-1].to(device), rows[:, 1:].to(device)


# -----------------------------------------------------------------------------
# The loop


def next_token_loss(model: nn.Module, ids: Tensor, targets: Tensor, numbers=None) -> tuple[Tensor, Tensor]:
    """Sum of the losses in nats, and number of targets. `numbers` (B, T): of the text a token belongs to."""
    if numbers is None:
        return model(ids, targets)
    config = unwrapped(model).config
    positions = None
    if config.positions == "learned":  # they begin anew with every text; RoPE only knows distances
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        begins = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
        positions = positions - (positions * begins).cummax(1).values
    return model(ids, targets, positions, text_mask(numbers, config))


class NoStepLeft(Exception):
    """The run folder holds a finished run."""


# What a checkpoint holds beside weights and optimizers.
COUNTERS = ("step", "seconds", "skipped", "bad_in_a_row", "best", "last", "window", "micro_batch")


@dataclass(eq=False, repr=False)
class Trainer:
    """Everything about training that is the same for every stage: steps, logs, checkpoints, resuming.

    The fields are what a stage brings. One whose model is not of model.py also overrides `write_model` and
    `read_model`. support/checkpoints.py explains how a killed run goes on.
    """

    cfg: TrainerConfig
    model: nn.Module
    batch: Batch
    loss: Callable = next_token_loss  # loss(model, *tensors): sum of losses in nats, number of targets
    evaluate: Callable | None = None  # evaluate(model, final): {"val_loss": ..., ...}
    sample: Callable | None = None  # sample(model): [{"prompt": ..., "text": ...}, ...]
    tokenizer: Tokenizer | None = None
    flops_per_row: float = 0.0
    tokens_per_row: int = 0  # on average
    counts_rows: bool = False  # the loss counts rows and not their tokens
    epoch: Callable | None = None  # epoch(step): times through the data after `step` steps
    about: dict = field(default_factory=dict)  # what run.json records of data and parent
    parallel: str = "ddp"
    on_begin: Callable | None = None  # writes the stage's own files, once the folder is this run's
    keeps_best: bool = True  # publish the checkpoint of the lowest validation loss; False: the last one
    dtype: torch.dtype | None = None  # of activations; None: by cfg.dtype
    rows_together: int = 1  # rows that a micro-batch may not separate
    same_shapes: bool = False  # of all batches, see `fastest_products`

    def __post_init__(self):
        cfg = self.cfg
        # max_steps of 0, "as many as the epochs have", was replaced by their number.
        check_numbers(asdict(cfg), {f.name: f.default for f in fields(cfg) if f.name != "max_steps"})
        self.about = self.about | {"tokenizer": self.tokenizer.hash if self.tokenizer else None}
        self.keeps_best = self.keeps_best and bool(cfg.save_every)  # without checkpoints there is one model
        # The machine and the processes
        self.device = pick_device(cfg.device)
        self.dtype = self.dtype or pick_dtype(cfg.dtype, self.device)
        self.precision = torch.get_float32_matmul_precision()
        if self.same_shapes:
            self.precision = fastest_products(self.device)
        self.sharded = self.parallel == "fsdp" and WORLD_SIZE > 1
        # The network: `model` has the gradients, `net` is the same behind DDP and torch.compile. `full_model`
        # has all weights where `model` is sharded: on rank 0, None on the others
        self.model = self.net = self.full_model = self.model.to(self.device)
        self.model.gradient_checkpointing = cfg.gradient_checkpointing
        self.optimizers = make_optimizers(self.model, cfg)
        self.scaler = self.make_scaler()
        # Progress
        self.step = 0  # optimizer steps that are done
        self.seconds = 0.0
        self.skipped = 0  # steps whose gradients were not finite
        self.bad_in_a_row = 0  # the newest of them
        self.best = None  # the evaluation with the lowest loss
        self.last = None  # the newest evaluation
        self.window = [0.0, 0]  # loss sum and count since the last logged line
        self.rows = rows_per_step(cfg)
        self.micro_batch = cfg.batch_size  # halves when memory runs out; the batch stays the same
        self.logged = (0, 0.0)  # step and seconds of the last logged line
        # The run folder
        self.folder = run_folder(cfg)
        self.opened = False
        self.at_end = contextlib.ExitStack()  # what is closed when the run ends
        self.run = {}  # run.json
        self.log = RunLog(self.folder)
        self.say = self.log.say
        self.stop = StopSignal(self.say)

    def run_all_steps(self) -> dict:
        """Trains to max_steps, resuming if the folder holds a checkpoint; returns run.json."""
        try:
            with self.stop:
                self.begin()
                with Progress(self.cfg.name, self.step, self.cfg.max_steps, self.log) as progress:
                    self.train(progress)
            self.finish()
        except NoStepLeft:
            self.say(f"{self.folder} was trained before: --overwrite trains it anew, --name another one")
        except (TrainError, OSError, RuntimeError, MemoryError, SafetensorError) as error:
            error = explained(error, self.folder)
            if self.opened:
                with contextlib.suppress(OSError):  # a full disk is perhaps what ended the run
                    self.write_run(status="failed", error=str(error))
            raise error from None
        finally:
            self.end()
        return self.run

    def train(self, progress: Progress) -> None:
        """The algorithm, every step of it, from the first one that is not done yet."""
        cfg = self.cfg
        # Losses are divided by an expected number of targets, so that float16 does not overflow; gradients
        # are multiplied by expected / true number below
        expected_targets = self.rows * (1 if self.counts_rows else max(1, self.tokens_per_row))
        rates = cfg.learning_rate, cfg.min_lr, cfg.warmup_steps, cfg.max_steps
        while self.step < cfg.max_steps:
            begun = time.perf_counter()
            with float32_products(self.precision):
                lr = get_lr(self.step, *rates, cfg.schedule, cfg.decay_fraction)
                self.set_learning_rate(lr)
                self.seed_dropout()

                # Forward and backward: gradients of the sum of losses, one micro-batch after the other
                totals = torch.zeros(3, dtype=torch.float64, device=self.device)
                try:
                    for tensors, last in self.micro_batches():
                        with gradient_sync(self.net, last):
                            with self.autocast():
                                loss, count = self.loss(self.net, *tensors)
                            # Times world, because gradients are averaged over processes: we want the sum
                            self.scaler.scale(loss * (WORLD_SIZE / expected_targets)).backward()
                        totals[0] += loss.detach()
                        totals[1] += count
                except (RuntimeError, MemoryError) as error:
                    loss = tensors = None  # its graph holds memory
                    self.halve_micro_batch(error)  # raises it unless that helps
                    continue

                # Scale to the true mean, clip, step
                totals[2] = self.stop.number is not None
                loss_sum, count, stopping = sharding.total(totals).tolist()
                for optimizer in self.optimizers:
                    self.scaler.unscale_(optimizer)
                params = [p for p in self.model.parameters() if p.grad is not None]
                if count not in (0, expected_targets):
                    torch._foreach_mul_([p.grad for p in params], expected_targets / count)
                norm = full_tensor(nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf)).item()
                if self.record_loss(loss_sum, count, norm):
                    for optimizer in self.optimizers:
                        self.scaler.step(optimizer)
                self.scaler.update()
                self.zero_grad()

            # Log, evaluate, save
            self.step += 1
            took = time.perf_counter() - begun
            self.seconds += took
            rate = self.rows * self.tokens_per_row / took
            progress.show(self.step, loss_sum / max(1, count), rate, self.seconds)
            if self.is_due(cfg.log_every):
                self.log_step(lr, norm)
            improved = self.is_due(cfg.eval_every) and self.evaluate_now()
            if self.is_due(cfg.save_every) or stopping or (cfg.save_every and improved):
                self.save()
            if stopping and self.step < cfg.max_steps:
                self.write_run(status="interrupted")
                self.say(f"stopped at step {self.step}; the same command goes on from here")
                raise SystemExit(self.stop.exit_code)

    def is_due(self, every: int) -> bool:
        return self.step == self.cfg.max_steps or bool(every and self.step % every == 0)

    def micro_batches(self) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
        """This process' rows of the step, in pieces that fit into memory: (tensors, is it the last one)."""
        rows = self.rows // WORLD_SIZE
        for first in range(0, rows, self.micro_batch):
            count = min(self.micro_batch, rows - first)
            tensors = self.batch(self.step, RANK * rows + first, count)
            on_gpu = self.device.type == "cuda"
            if on_gpu:  # pinned memory lets the copy overlap with the computation
                tensors = [t.pin_memory() for t in tensors]
            yield tuple(t.to(self.device, non_blocking=on_gpu) for t in tensors), first + count == rows

    def set_learning_rate(self, lr: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("rate", 1)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def seed_dropout(self) -> None:
        """Dropout draws the same numbers whether or not the run was interrupted before this step."""
        seed = np.random.SeedSequence([self.cfg.seed, self.step, RANK]).generate_state(1)[0]
        torch.manual_seed(int(seed))

    def autocast(self):
        """Weights are cast to the dtype of activations where they are used. Autocast would keep the casts to
        the end of the pass, which is what gradient checkpointing wants to avoid.
        """
        return autocast(self.device, self.dtype, cache=not self.cfg.gradient_checkpointing)

    def make_scaler(self) -> torch.amp.GradScaler:
        """float16's gradients underflow unless the loss is scaled up; other dtypes need no scaling."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    # ---- guards

    def halve_micro_batch(self, error: Exception) -> None:
        """After running out of memory: the step begins anew in smaller pieces, with the same result."""
        if not is_out_of_memory(error):
            raise error
        half = self.micro_batch // 2 // self.rows_together * self.rows_together
        if not half or WORLD_SIZE > 1:  # processes cannot halve it each on its own
            raise TrainError(
                f"out of memory with {self.micro_batch} sequences at a time: try a smaller --batch_size, "
                "--gradient_checkpointing, a shorter --context_length or a smaller model "
                "(`python train.py ... --plan` estimates the memory)"
            ) from None
        self.micro_batch = half
        self.zero_grad()
        traceback.clear_frames(error.__traceback__)  # their variables hold tensors of the failed pass
        for layer in self.model.modules():
            if isinstance(layer, MoE):
                layer.stats = {}  # so do losses of experts
        free_cached_memory()
        self.say(f"out of memory: micro-batch {self.micro_batch} from now on, same batch, same result")

    def record_loss(self, loss_sum: float, count: float, norm: float) -> bool:
        """False if loss or gradient is not finite: the update is skipped. Five in a row end the run."""
        if math.isfinite(loss_sum):
            self.window[0] += loss_sum
            self.window[1] += int(count)
            if math.isfinite(norm):
                self.bad_in_a_row = 0
                return True
            if self.scaler.is_enabled():  # it tries too large scales on purpose
                return False
        self.skipped += 1
        self.bad_in_a_row += 1
        self.say(f"step {self.step + 1}: loss or gradient is not finite; the update is skipped")
        if self.bad_in_a_row == 5:
            raise TrainError(
                "five steps in a row gave no finite loss or gradient: try a lower --learning_rate, more "
                f"--warmup_steps, --dtype=float32 or --qk_norm; {what_is_left(self.folder)}"
            )
        return False

    # ---- evaluation and logs

    def evaluate_now(self) -> bool:
        """Runs the stage's evaluation and samples; True if this is the model to publish."""
        if self.evaluate is None:
            return False
        begun = time.perf_counter()
        self.model.eval()
        with self.autocast():
            metrics = self.evaluate(self.model, self.step == self.cfg.max_steps)
        self.model.train()
        metrics = {k: float(v) for k, v in metrics.items()}  # state.pt may hold no numbers of numpy
        self.last = {"step": self.step, **metrics}
        improved = not self.best or metrics["val_loss"] < self.best["val_loss"] or not self.keeps_best
        if improved:
            self.best = self.last
        self.run["results"] = {"last": self.last, "best": self.best}
        self.log.metrics(self.last | {"eval_seconds": round(time.perf_counter() - begun, 2)})
        self.say(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if self.sample:
            self.write_samples()
        return improved

    def write_samples(self) -> None:
        sharding.gather_weights(self.model, self.full_model)
        if RANK > 0:
            return
        with self.autocast():
            samples = self.sample(self.full_model)
        self.model.train()
        self.log.append("samples.jsonl", [{"step": self.step, **s} for s in samples])
        for first in samples[:1]:
            self.say(f"  {first['prompt'][-100:]}|{first['text'][:300]}".replace("\n", " "))

    def log_step(self, lr: float, norm: float) -> None:
        """A line of metrics.jsonl: means over the steps since the last one."""
        step_seconds = (self.seconds - self.logged[1]) / (self.step - self.logged[0])
        self.logged = (self.step, self.seconds)
        loss_sum, count = self.window
        self.window = [0.0, 0]
        tokens = self.rows * self.tokens_per_row  # of a step
        line = {
            "step": self.step,
            "loss": loss_sum / count if count else None,
            "learning_rate": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": self.step * tokens,
            "epoch": round(self.epoch(self.step), 4) if self.epoch else None,
            "tokens_per_second": round(tokens / step_seconds, 1),
            "step_seconds": round(step_seconds, 4),
            "seconds": round(self.seconds, 2),
            "skipped": self.skipped,
            "peak_memory_gib": round(peak_memory(self.device) / 2**30, 3),
        }
        if peak := peak_flops(self.run["hardware"]["device"]):
            line["mfu"] = round(self.rows * self.flops_per_row / step_seconds / (peak * WORLD_SIZE), 4)
        routers = [module.stats for module in self.model.modules() if getattr(module, "stats", None)]
        if routers:  # mixture of experts: shares of the experts, averaged over the layers
            line["router_load"] = torch.stack([stats["load"] for stats in routers]).mean(0).tolist()
            line["dropped"] = int(sum(stats["dropped"] for stats in routers))
        self.log.metrics(line)
        leave_memory_to_others()

    def write_run(self, **changes) -> None:
        self.run |= changes | {"step": self.step, "seconds": round(self.seconds, 2), "pid": os.getpid()}
        if self.run.get("status") != "running":
            del self.run["pid"]  # by which serve.py pauses a run
        self.log.write_run(self.run)

    # ---- begin and end

    def begin(self) -> None:
        """Opens the run folder: new, resumed, or refused. Then everything is ready for the next step."""
        cfg = self.cfg
        if cfg.wandb and not importlib.util.find_spec("wandb"):
            raise TrainError('--wandb needs the package wandb: pip install -e ".[wandb]"')
        if sharding.start_group(self.device):
            self.at_end.callback(torch.distributed.destroy_process_group)
        self.folder.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            self.at_end.callback(os.close, lock(self.folder))
            if cfg.overwrite:
                remove_run(self.folder)
        barrier()
        if self.sharded:
            self.full_model = sharding.shard(self.model, self.device)
            self.optimizers = make_optimizers(self.model, cfg)
        self.resume()
        barrier()
        if WORLD_SIZE > 1 and not self.sharded:  # every process begins with the weights of rank 0
            self.net = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        self.model.train()  # from_pretrained returns a model in evaluation mode
        if cfg.compile is True or (cfg.compile == "auto" and self.device.type == "cuda"):
            self.compile()
        self.logged = (self.step, self.seconds)
        before = self.run
        self.run = first_record(cfg, self.device) | {
            "results": {"last": self.last, "best": self.best} if self.best else None,
            **self.about,
            "dtype": str(self.dtype).removeprefix("torch."),
            "processes": WORLD_SIZE,
            "parameters": n_parameters(self.model),
        }
        self.run |= {name: before[name] for name in ("started", "wandb") if name in before}
        if self.on_begin and RANK == 0:
            self.on_begin()
        self.write_run()
        self.opened = True
        if cfg.wandb and RANK == 0:
            self.log.open_wandb(cfg.wandb, cfg.name, self.run)

    def compile(self) -> None:
        """torch.compile, tried by one forward and backward pass; where that fails, the eager model stays."""
        eager = self.net
        self.net = torch.compile(eager)
        try:
            tensors, _ = next(self.micro_batches())
            with float32_products(self.precision), gradient_sync(self.net, last=False):
                with self.autocast():
                    loss, _ = self.loss(self.net, *tensors)
                loss.backward()
        except Exception as error:
            if not is_out_of_memory(error):  # the loop has a remedy for that
                self.say(f"torch.compile failed, going on without: {first_line(error)}")
                self.net = eager
        self.zero_grad()

    def finish(self) -> None:
        """The end of a run. It may be repeated: what a killed process has not done, the next one does."""
        if RANK == 0:
            self.remove_older_checkpoints()
            try:
                write_model_card(self.folder)
            except OSError as error:  # a full disk does not fail the run for it
                self.say(f"the model card was not written: {error}")
        self.write_run(status="finished")
        if RANK == 0:
            tidy(self.folder, self.run)

    def end(self) -> None:
        self.optimizers = []  # evaluation, which may follow, has use for their memory
        # Before the processes part: afterwards DDP's end, holding Python's lock, may wait for a thread of
        # gloo that waits for this lock.
        self.net = self.model
        self.log.close()
        self.at_end.close()

    # ---- checkpoints

    def save(self) -> None:
        """A checkpoint of this step; the best one's model becomes the run's. Collective."""
        sharding.gather_weights(self.model, self.full_model)
        state = self.state()
        if RANK == 0:
            write_checkpoint(checkpoint_of(self.folder, self.step), self.write_model, state)
            publish(self.best_checkpoint())
            self.remove_older_checkpoints()
            self.write_run()
        barrier()

    def state(self) -> dict:
        """state.pt: tensors and numbers, so that reading it runs no code. Collective."""
        over = self.step == self.cfg.max_steps and not self.cfg.save_every  # no step is left that needs them
        moments = [] if over else [optimizer.state_dict() for optimizer in self.optimizers]
        return {name: getattr(self, name) for name in COUNTERS} | {
            "batch": self.rows,
            "optimizers": sharding.gather_state(moments, keep=RANK == 0),
            "scaler": self.scaler.state_dict(),
        }

    def best_checkpoint(self) -> Path:
        """The checkpoint of the best evaluation, if it was saved; else of this step."""
        best = checkpoint_of(self.folder, self.best["step"] if self.best else self.step)
        return best if best.exists() else checkpoint_of(self.folder, self.step)

    def remove_older_checkpoints(self) -> None:
        prune(self.folder, self.best_checkpoint(), self.step, self.cfg.keep_last)

    def write_model(self, folder: Path) -> None:
        model = self.full_model
        if self.tokenizer is None:
            return model.save_pretrained(folder)
        eot = self.tokenizer.eot_id
        model.save_pretrained(folder, bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)
        self.tokenizer.save(folder, context_length=model.config.context_length)

    def read_model(self, folder: Path) -> None:
        """The inverse of `write_model`, into the model that is there."""
        saved = ModernDecoderLM.from_pretrained(folder, "cpu")
        with torch.no_grad():
            for p, value in zip(self.model.parameters(), saved.parameters(), strict=True):
                p.copy_(shard_like(p, value.to(self.device)))

    def resume(self) -> None:
        """Goes on from the newest checkpoint that can be read, after making sure that it is this run's."""
        found = checkpoints(self.folder)
        self.run = read_json_if_there(self.folder / "run.json")
        finished = self.run.get("status") == "finished"
        if found or finished:
            refuse_another_run(self.folder, self.run, self.cfg, self.about, FREE_TO_CHANGE)
        if RANK == 0:
            tidy(self.folder, self.run)
        if finished:
            raise NoStepLeft
        if self.run and found and self.cfg.dtype == "auto":  # the run's own, whatever this machine prefers
            self.dtype = getattr(torch, self.run.get("dtype", "float32"))
            self.scaler = self.make_scaler()
        if found and not any(self.load(checkpoint) for checkpoint in reversed(found)):
            raise TrainError(f"none of the checkpoints in {self.folder} can be read; --overwrite starts anew")
        if self.step:
            self.say(f"{self.folder}: resuming at step {self.step} of {self.cfg.max_steps}")
        if RANK == 0:
            if self.step:
                publish(self.best_checkpoint())
            for name in ("metrics.jsonl", "samples.jsonl"):
                self.log.cut(name, self.step)

    def load(self, checkpoint: Path) -> bool:
        """Takes over weights, optimizers and counters of a checkpoint; False if it cannot be read."""
        try:
            device = "cpu" if self.sharded else self.device
            state = torch.load(checkpoint / "state.pt", map_location=device, weights_only=True)
            self.read_model(checkpoint)
            if state["optimizers"] or state["step"] < self.cfg.max_steps:
                for optimizer, moments in zip(self.optimizers, state["optimizers"], strict=True):
                    sharding.load_optimizer(optimizer, moments)
        except Exception as error:  # torn by a copy that was cut off, for instance
            self.say(f"cannot read {checkpoint} ({first_line(error)}); trying the one before")
            return False
        if state["batch"] != self.rows:
            raise TrainError(
                f"{self.folder} was begun with {state['batch']} sequences a step, now they would be "
                f"{self.rows}: --batch_size times --grad_accum_steps times processes must stay the same"
            )
        state["micro_batch"] = min(self.micro_batch, state["micro_batch"])
        state = {"last": state["best"], "bad_in_a_row": 0} | state  # what older versions did not keep
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.scaler.load_state_dict(state["scaler"])
        return True


# -----------------------------------------------------------------------------
# Pretraining


@torch.no_grad()
def evaluate_lm(model: nn.Module, windows: Windows, batch_size: int, n_bytes: float) -> dict:
    """Every token predicted once, in windows that do not overlap.

    Returns val_loss (nats a token), perplexity, bits_per_byte (comparable across tokenizers: `n_bytes` is the
    size of the text) and val_tokens. By document no token knows what stood before its text, so that losses
    of the two kinds of windows do not compare. With several processes each takes a part; all get the sum.
    """
    device = next(model.parameters()).device
    mine = range(RANK, windows.count, WORLD_SIZE)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for i in range(0, math.ceil(windows.count / WORLD_SIZE), batch_size):
        chosen = mine[i : i + batch_size]
        batch = windows.at(chosen or [0])
        if not chosen:  # FSDP needs every rank in every forward pass; this one counts nothing
            batch[1][:] = -100
        loss, count = next_token_loss(model, *(tensor.to(device) for tensor in batch))
        totals[0] += loss
        totals[1] += count
    total, count = sharding.total(totals).tolist()
    return {
        "val_loss": total / count,
        "perplexity": perplexity(total, count),
        "bits_per_byte": bits_per_byte(total, n_bytes),
        "val_tokens": int(count),
    }


def pretrain(cfg: TrainConfig) -> dict:
    """Stage 2: a language model from token files; returns run.json."""
    folder = tokens_folder(cfg)
    for name in ("tokenizer.json", "train.json", "validation.json"):
        if not (folder / name).exists():
            raise TrainError(f"there is no {folder / name}: make the tokens with\n  {tokenizer_command(cfg)}")
    tokenizer = Tokenizer.load(folder)
    train, train_about = open_tokens(folder, "train", tokenizer)
    val, val_about = open_tokens(folder, "validation", tokenizer)
    cfg.vocab_size = padded(tokenizer.vocab_size)
    torch.manual_seed(cfg.seed)
    if cfg.init_from:
        model = ModernDecoderLM.from_pretrained(cfg.init_from)
        adopt(model, cfg, tokenizer)
    else:
        model = ModernDecoderLM(model_config(cfg))
        if cfg.look_back:
            model.look_back()
    T = cfg.context_length
    eot = tokenizer.eot_id if cfg.by_document else None
    windows = Windows(train, T, rows_per_step(cfg), cfg.seed, eot)

    def evaluate(model, final):
        wanted = cfg.final_eval_tokens if final else cfg.eval_tokens
        n = min(len(val), wanted + 1) if wanted else len(val)
        held_out = Windows(val[:n], T, cfg.batch_size, 0, eot)
        return evaluate_lm(model, held_out, cfg.batch_size, val_about["bytes"] * n / len(val))

    trainer = Trainer(
        cfg,
        model,
        windows.batch,
        evaluate=evaluate,
        sample=functools.partial(sample_texts, cfg, tokenizer) if cfg.sample_tokens else None,
        tokenizer=tokenizer,
        flops_per_row=estimate_flops(model.config, T) * T,
        tokens_per_row=T,
        epoch=windows.epoch,
        about={
            "data": data_record(train_about, val_about),
            "parent": cfg.init_from or None,
            "parent_hash": weights_hash(cfg.init_from) if cfg.init_from else None,
        },
        parallel=cfg.parallel,
        same_shapes=True,
    )
    epochs = windows.epoch(cfg.max_steps)
    trainer.say(
        f"{trainer.folder}: {n_parameters(model) / 1e6:.2f}M parameters, {len(train):,} tokens of "
        f"{cfg.corpus}, {windows.rows * T:,} tokens a step, {epochs:.2f} epochs, "
        f"{str(trainer.dtype).removeprefix('torch.')} on {hardware(trainer.device)['device']}"
    )
    if epochs > 4:
        trainer.say("past some 4 epochs repeated text teaches little: more text, or fewer --max_steps")
    return trainer.run_all_steps()


def sample_texts(cfg: TrainConfig, tokenizer: Tokenizer, model: ModernDecoderLM) -> list[dict]:
    """Two texts that continue the prompt, each to the end of its document."""
    eot = tokenizer.eot_id
    prompt = [eot, *tokenizer.encode(cfg.sample_prompt)]
    rows = model.generate(
        [prompt], cfg.sample_tokens, n=2, temperature=0.8, top_p=0.95, stop_tokens=[eot], seed=cfg.seed
    )
    texts = [tokenizer.decode([t for t in row if t != eot]) for row in rows]
    return [{"prompt": cfg.sample_prompt, "text": text} for text in texts]


def model_config(cfg: TrainConfig) -> ModelConfig:
    return ModelConfig(**{f.name: getattr(cfg, f.name) for f in fields(ModelConfig)})


def padded(vocab_size: int) -> int:
    """Rows of the embedding: a multiple of 64 suits a GPU's matrix units; no text uses the rest."""
    return 64 * math.ceil(vocab_size / 64)


def main() -> None:
    auto = "--batch_size=auto"
    cfg = parse_config(TrainConfig, __doc__, [word for word in sys.argv[1:] if word != auto])
    with errors_for_users():
        if auto in sys.argv:
            from support.plan import fit_batch

            fit_batch(cfg)
        if cfg.list:
            list_runs(cfg.out)
        elif cfg.plan or cfg.measure:
            from support.plan import print_plan

            print_plan(cfg)
        else:
            run_stage(pretrain, cfg, describe)


def describe(folder: Path, run: dict) -> str:
    best = (run.get("results") or {}).get("best")
    loss = f", val_loss {best['val_loss']:.4f}, {best['bits_per_byte']:.4f} bits a byte" if best else ""
    command = f"python chat.py {shlex.quote(str(folder))}"
    return f"{folder}: {run['step']} steps in {run['seconds'] / 60:.1f} min{loss}; {command}"


if __name__ == "__main__":
    run_script(main)
