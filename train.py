"""Training: the Trainer that every stage shares, and pretraining, which makes a language model from text.

    python train.py configs/cpu.py                       # a story teller in minutes, on any laptop
    python train.py configs/max3060.py --plan --vram=12  # what a run costs, before it costs anything
    python train.py configs/cpu.py --plan --measure      # ... by some of its own steps, timed here
    python train.py configs/speedrun.py                  # the real thing; run it again and it resumes
    torchrun --nproc_per_node=2 train.py configs/cpu.py  # two cards, or two CPU processes; --parallel=fsdp
    python train.py --list                               # all runs and their checkpoints

It reads the token files that tokenizer.py wrote and writes a run folder, out/NAME:

    config.json, model.safetensors, tokenizer.json   a Hugging Face model: the best by validation loss
    run.json              settings, data, versions, hardware, status, results
    metrics.jsonl         a line per logged step and per evaluation
    samples.jsonl         what the model says on the way
    checkpoints/step-N/   the best and the last: the model, and state.pt, which an exact resume needs

Two ideas make runs exact. The batch of step s is a pure function of (seed, s), so there is no loader state
that a crash could lose: a run that was killed and resumed has the same bits as one that was not. And a loss
is a (sum, count) pair: gradients are divided by the count of the whole batch, over all micro-batches and
processes, so how a batch is cut never changes the result.
"""

from support.terminal import run_script

import contextlib
import copy
import datetime
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from configs import check_numbers, parse_config
from model import ModelConfig, ModernDecoderLM
from support.costs import estimate_flops
from support.files import remove_folder, write_atomically, write_folder_atomically
from support.kernels import fastest_products, float32_products
from support.machine import (
    git_commit,
    hardware,
    peak_flops,
    peak_resident_bytes,
    pick_device,
    pick_dtype,
    versions,
)
from support.memory import is_out_of_memory
from support.metrics import bits_per_byte, perplexity
from support.model_card import write_model_card
from support.processes import tqdm
from support.runs import (
    AlreadyFinished,
    TrainError,
    checkpoint_of,
    checkpoints,
    first_line,
    link_or_copy,
    list_runs,
    lock,
    newest,
    read_json,
    read_log,
    remove_run,
    run_folder,
    step_of,
    weights_hash,
)
from support.sharding import gathered, part_like, whole
from tokenizer import Tokenizer, TokenizerConfig, TokenizerStageConfig, open_tokens, tokens_folder


@dataclass
class TrainerConfig:
    """What every training stage has to be told."""

    name: str = "base"  # the run's folder is {out}/{name}
    out: str = "out"  # folder that holds everything the project makes
    seed: int = 1  # of the initial weights, the order of the data and dropout
    max_steps: int = 1000  # optimizer steps
    batch_size: int = 16  # sequences in one forward pass of one process; train.py: auto, as many as fit
    grad_accum_steps: int = 1  # forward passes before an optimizer step
    learning_rate: float = 1e-3  # the highest
    min_lr: float = 1e-4  # the lowest, reached at max_steps
    warmup_steps: int = 100  # steps from 0 up to learning_rate
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # wsd: warmup, stable, decay
    decay_fraction: float = 0.2  # wsd: share of the steps that decay, the last ones
    optimizer: Literal["adamw", "adamw_plain", "muon"] = "adamw"  # torch's fused one, ours to read, or Muon
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
    keep_last: int = 1  # checkpoints kept beside the best
    init_from: str = ""  # run folder or Hugging Face model whose weights are the start
    wandb: str = ""  # also log to this Weights & Biases project
    hypothesis: str = ""  # what the run is meant to find out; the experiment log prints it
    baseline: str = ""  # config file that this one starts from and is compared with
    overwrite: bool = False  # throw away what the run folder holds and start anew


@dataclass
class TrainConfig(ModelConfig, TokenizerConfig, TrainerConfig):
    """Pretraining: the model, the text and the Trainer's settings in one."""

    order: Literal["shuffled", "random"] = "shuffled"  # windows once an epoch, or at random offsets
    stride: int = 0  # tokens from one window to the next; 0: context_length, every token once an epoch
    eval_tokens: int = 0  # validation tokens read while training; 0: all
    final_eval_tokens: int = 0  # the same, at the end
    parallel: Literal["ddp", "fsdp"] = "ddp"  # many processes: each has the model, or a shard of it
    sample_prompt: str = ""  # what samples continue; nothing: the start of a document
    sample_tokens: int = 200  # length of a sample; 0: none
    plan: bool = False  # print memory, FLOPs and time, and stop
    measure: bool = False  # --plan, and time some steps here, at most two minutes
    vram: float = 0.0  # plan for a card with this many GB instead of the one here
    card: str = ""  # plan for a card of this name, such as "RTX 3090"
    list: bool = False  # list runs and checkpoints, and stop


# What may differ when a run is resumed, because it does not change the numbers that training produces.
FREE_TO_CHANGE = """
    name out tokens device compile parallel gradient_checkpointing batch_size grad_accum_steps log_every
    eval_every eval_tokens final_eval_tokens save_every keep_last sample_prompt sample_tokens wandb hypothesis
    baseline overwrite plan measure vram card list
""".split()  # (batch_size times grad_accum_steps is checked apart)

# A model that was moved is still the same: where run.json has the same hash of the weights, paths may differ.
PATHS_OF_HASH = {"parent_hash": ("parent", "model", "init_from"), "start_hash": ("start",)}


# -----------------------------------------------------------------------------
# Data: which tokens step s sees


class Windows:
    """Training windows of a token file, as a pure function of (seed, step).

    "shuffled": the file is cut into windows `stride` tokens apart and every epoch reads them in a new order.
    With stride = context_length each token is predicted exactly once an epoch; the last window may be short,
    its missing targets are -100. "random": offsets drawn uniformly, as nanoGPT and most courses do.
    """

    def __init__(
        self, tokens: np.ndarray, context_length: int, batch: int, seed: int, order="shuffled", stride=0
    ):
        self.tokens, self.T, self.batch, self.seed, self.order = tokens, context_length, batch, seed, order
        self.starts = np.arange(0, len(tokens) - 1, stride or context_length)
        self.cached = (-1, self.starts)  # (epoch, its order): one epoch's permutation at a time
        if len(self.starts) == 0:
            raise TrainError(f"{len(tokens)} tokens are too few to train on")

    def rows(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows first .. first + count - 1 of the batch of `step`: ids and targets, both (count, T) int64."""
        if self.order == "random":
            high = max(1, len(self.tokens) - self.T)
            at = np.random.default_rng([self.seed, step]).integers(0, high, self.batch)[first : first + count]
        else:
            at = [self.shuffled(step * self.batch + first + i) for i in range(count)]
        return windows_at(self.tokens, at, self.T)

    def shuffled(self, i: int) -> int:
        """Where the i-th window that training ever sees begins."""
        epoch, i = divmod(i, len(self.starts))
        if self.cached[0] != epoch:
            self.cached = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.starts))
        return int(self.cached[1][i])

    def epoch(self, step: int) -> float:
        """How often training has gone through the file after `step` steps."""
        return step * self.batch * self.T / max(1, len(self.tokens) - 1)


def windows_at(tokens: np.ndarray, starts, T: int) -> tuple[Tensor, Tensor]:
    """ids and targets (len(starts), T) int64; target t is the token behind id t, -100 behind the end."""
    ids, targets = np.zeros((len(starts), T), np.int64), np.full((len(starts), T), -100, np.int64)
    for row, start in enumerate(starts):
        piece = tokens[start : start + T + 1]
        ids[row, : len(piece[:-1])], targets[row, : len(piece[1:])] = piece[:-1], piece[1:]
    return torch.from_numpy(ids), torch.from_numpy(targets)


def get_batch(data: np.ndarray, batch_size: int, context_length: int, device="cpu", rng=None):
    """Windows at random places of a 1-D token array: ids and targets, (batch_size, context_length) int64."""
    starts = (rng or np.random.default_rng()).integers(0, len(data) - context_length, batch_size)
    ids, targets = windows_at(data, starts, context_length)
    return ids.to(device), targets.to(device)


# -----------------------------------------------------------------------------
# Optimizer and schedule


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, algorithm 2), to be read.

    Training uses torch's fused version, which does the same in one kernel (a test holds them together).
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["m"], state["v"] = 0, torch.zeros_like(p), torch.zeros_like(p)
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
    """Scales the gradients, in place, so that the L2 norm of all of them together is at most `max_norm`
    (Pascanu et al., 2013).

    To be read; training uses torch's clip_grad_norm_, which does the same in few kernels.
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
    learning rates and decay serve (Liu et al., 2025). torch.optim.Muon does the same (a test holds them
    together), but in bfloat16 everywhere: on a CPU without hardware for it (AMD EPYC, two threads,
    configs/cpu.py) its step took 680 ms where ours takes 25, beside a forward and backward pass of 295.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum, lr, by_shape = group["momentum"], group["lr"], {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                m = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                ahead = whole(p.grad.lerp(m, momentum))  # Nesterov: where the momentum will have carried us
                by_shape.setdefault(p.shape[-2:], []).append((p, ahead))
            for shape, some in by_shape.items():  # matrices of one shape go together; experts are a stack
                ahead = torch.cat([a.reshape(-1, *shape) for _, a in some])
                sizes, scale = [p.numel() // shape.numel() for p, _ in some], 0.2 * max(shape) ** 0.5
                for (p, _), move in zip(some, orthogonal(ahead).split(sizes), strict=True):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(part_like(p, move.view(p.shape)), alpha=-lr * scale)


def orthogonal(G: Tensor) -> Tensor:
    """About U V^T of matrices (..., n, m) = U S V^T, without a decomposition: five Newton-Schulz steps of a
    polynomial that pulls every singular value to between 0.7 and 1.2. In bfloat16 on a card, fast there.
    """
    X = G.bfloat16() if G.is_cuda else G
    X = X.mT if G.shape[-2] > G.shape[-1] else X  # the smaller product
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (2.0315 * A @ A - 4.7750 * A) @ X
    return (X.mT if G.shape[-2] > G.shape[-1] else X).to(G.dtype)


def make_optimizers(model: nn.Module, cfg: TrainerConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices of the layers and AdamW for the rest. Only matrices decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [(name, p) for name, p in named if p.dim() >= 2 and "sinks" not in name]  # sinks are logits
    hidden = [p for name, p in matrices if ".layers." in name]
    muon = cfg.optimizer == "muon"
    decayed, taken = {id(p) for _, p in matrices}, {id(p) for p in hidden} if muon else set()
    groups = [
        {"params": [p for _, p in matrices if id(p) not in taken], "weight_decay": cfg.weight_decay},
        {"params": [p for _, p in named if id(p) not in decayed], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kwargs = {"lr": cfg.learning_rate, "betas": (cfg.beta1, cfg.beta2)}
    optimizers = [AdamW(groups, **kwargs) if cfg.optimizer == "adamw_plain" else torch_adamw(groups, kwargs)]
    if muon:
        optimizers.append(Muon(hidden, lr=cfg.learning_rate, weight_decay=cfg.weight_decay))
    return optimizers


def torch_adamw(groups: list[dict], kwargs: dict) -> torch.optim.Optimizer:
    fused = all(p.device.type in ("cuda", "cpu") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, fused=fused, **kwargs)


def get_lr(
    step: int,
    max_lr: float,
    min_lr: float,
    warmup_steps: int,
    max_steps: int,
    schedule: str = "cosine",
    decay_fraction: float = 0.2,
) -> float:
    """From 0 at step 0 linearly up to max_lr, then down to min_lr at max_steps, then flat."""
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


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out) -> None:
    """Writes weights, optimizer state and the number of steps done to `out`, a path or a binary file.

    The smallest checkpoint from which training can go on. The Trainer's also hold the tokenizer and counters,
    and have the weights in Hugging Face's format.
    """
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
    if isinstance(out, str | os.PathLike):
        write_atomically(Path(out), lambda path: torch.save(state, path))
    else:
        torch.save(state, out)


def load_checkpoint(src, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Reads what `save_checkpoint` wrote into the model and the optimizer; returns the iteration.

    `src` is a path or a binary file. A pickle could hold code; weights_only=True refuses it.
    """
    state = torch.load(src, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["iteration"]


LR_SETTINGS = ("learning_rate", "min_lr", "warmup_steps", "max_steps", "schedule", "decay_fraction")


# -----------------------------------------------------------------------------
# The machine


# -----------------------------------------------------------------------------
# The Trainer


class Trainer:
    """Everything about training that is the same for every stage: steps, logs, checkpoints, resuming.

    A stage brings
        rows(step, first, count)  tensors of these rows of the batch of `step`: a pure function
        loss(model, *tensors)     (sum of losses in nats, number of targets)
        evaluate(model, final)    {"val_loss": ..., ...}, or None
        sample(model)             [{"prompt": ..., "text": ...}, ...], or None
        about                     what run.json should say of data and parent
        on_begin()                writes the stage's own files, once the folder is known to be this run's
    and, where its model is not one of ours, methods `write_model` and `read_model` of its own.
    """

    free_to_change = FREE_TO_CHANGE
    alike = False  # every batch has the same shape, see `fastest_products`
    keeps_best = True  # publish the checkpoint with the lowest validation loss; False: the last one

    def __init__(
        self,
        cfg: TrainerConfig,
        model: nn.Module,
        rows: Callable[[int, int, int], tuple[Tensor, ...]],
        loss: Callable = lambda model, ids, targets: model(ids, targets),
        evaluate: Callable[[nn.Module, bool], dict] | None = None,
        sample: Callable[[nn.Module], list[dict]] | None = None,
        tokenizer: Tokenizer | None = None,
        flops_per_row: float = 0.0,
        tokens_per_row: int = 0,
        epoch: Callable[[int], float] | None = None,
        about: dict | None = None,
        parallel: str = "ddp",
        on_begin: Callable[[], None] = lambda: None,
    ):
        defaults = {f.name: f.default for f in fields(cfg)}
        defaults["max_steps"] = None  # 0, "as many as the epochs have", was replaced by their number
        check_numbers(asdict(cfg), defaults)
        self.cfg, self.rows, self.loss, self.evaluate, self.sample = cfg, rows, loss, evaluate, sample
        self.tokenizer, self.epoch, self.about, self.on_begin = tokenizer, epoch, about or {}, on_begin
        self.flops_per_row, self.tokens_per_row = flops_per_row, tokens_per_row
        self.device = pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.sharded = parallel == "fsdp" and self.world > 1
        self.folder = run_folder(cfg)
        self.batch = cfg.batch_size * cfg.grad_accum_steps * self.world  # rows of one optimizer step
        self.micro_batch = cfg.batch_size  # halves when memory runs out; the batch stays the same
        self.step, self.seconds, self.skipped = 0, 0.0, 0
        self.best, self.last = None, None  # evaluations: the one with the lowest loss, and the newest
        self.window, self.last_loss = [0.0, 0], math.nan  # loss sum and count since the last logged line
        self.logged, self.rate = (0, 0.0), 0.0  # step and seconds of that line, tokens a second until then
        self.said = time.monotonic()  # when a line was last printed
        self.model = model.to(self.device)
        self.model.gradient_checkpointing = cfg.gradient_checkpointing
        self.optimizers = make_optimizers(self.model, cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.stopping, self.started, self.run, self.wandb = None, False, {}, None
        self.lock, self.opened = None, False

    # ---- one step

    def train_step(self, step: int) -> Tensor:
        """Forward, backward and update on the batch of `step`: (4) loss sum in nats, number of targets,
        whether to stop, norm of the gradient.

        With `ahead` nothing here waits for the card: it has the next step to do while the host reads the
        result of this one, and a gradient that is not finite is refused by the optimizer's own kernel.
        """
        cfg = self.cfg
        lr = get_lr(step, *(getattr(cfg, name) for name in LR_SETTINGS))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
        while True:
            try:
                totals = self.accumulate(step)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.micro_batch == 1 or self.world > 1:  # processes cannot halve it each on its own
                    raise TrainError(
                        f"out of memory with {self.micro_batch} sequences at a time: try a smaller "
                        "--batch_size, --gradient_checkpointing, a shorter --context_length or a smaller "
                        "model (`python train.py ... --plan` tells beforehand)"
                    ) from None
                self.micro_batch //= 2
                self.say(
                    f"out of memory: micro-batch {self.micro_batch} from now on, same batch, same result"
                )
            self.zero_grad()  # outside the except clause, whose traceback keeps the failed tensors alive
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        params = [p for p in self.model.parameters() if p.grad is not None]
        # The gradient so far is of sum / nominal count; one multiplication makes it that of the true mean.
        nominal = self.batch * max(1, self.tokens_per_row)
        if self.ahead:
            torch._foreach_mul_([p.grad for p in params], (nominal / totals[1].clamp(min=1)).float())
        elif (count := totals[1].item()) not in (0, nominal):
            torch._foreach_mul_([p.grad for p in params], nominal / count)
        norm = whole(nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf))
        finite = totals[0].isfinite() & norm.isfinite()
        for optimizer in self.optimizers:
            if self.ahead:
                optimizer.found_inf = (~finite).float()  # 1: the fused kernel changes nothing
                optimizer.step()
            elif finite:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.zero_grad()
        return torch.cat([totals, norm.double().view(1)])

    def read(self, step: int, result: Tensor) -> None:
        """Takes in what `train_step` returned."""
        total, count, stopping, self.norm = result.tolist()
        self.stop_agreed = stopping > 0
        if math.isfinite(total):
            self.window[0] += total
            self.window[1] += int(count)
        if math.isfinite(total) and math.isfinite(self.norm):
            self.bad_in_a_row = 0
        # float16's scaler tries too large scales on purpose: a bad gradient alone is no news there.
        elif not (self.scaler.is_enabled() and math.isfinite(total)):
            self.skipped += 1
            self.bad_in_a_row += 1
            self.say(f"step {step + 1}: loss or gradient is not finite; the update is skipped")
            if self.bad_in_a_row == 5:
                raise TrainError(
                    "five steps in a row gave no finite loss or gradient: try a lower --learning_rate, more "
                    f"--warmup_steps, --dtype=float32 or --qk_norm; {self.last_checkpoint()}"
                )

    def accumulate(self, step: int) -> Tensor:
        """Adds up the gradients of this process' rows, piece by piece; (3) of all rows: loss sum, number of
        targets, and how many processes were told to stop.
        """
        mine = self.batch // self.world
        nominal = self.batch * max(1, self.tokens_per_row)
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        # Dropout draws from here: the same numbers whether or not the run was interrupted before this step.
        torch.manual_seed(int(np.random.SeedSequence([self.cfg.seed, step, self.rank]).generate_state(1)[0]))
        for i in range(0, mine, self.micro_batch):
            count = min(self.micro_batch, mine - i)
            tensors = self.to_device(self.rows(step, self.rank * mine + i, count))
            last = i + count == mine
            if self.sharded:
                self.net.set_requires_gradient_sync(last)  # gradients cross the wire once a step
            ddp_waits = self.world > 1 and not self.sharded and not last
            with self.net.no_sync() if ddp_waits else contextlib.nullcontext():
                with self.autocast():
                    loss, n = self.forward(*tensors)
                # Times world, because gradients are averaged over processes and we want the sum.
                self.scaler.scale(loss * (self.world / nominal)).backward()
            totals[0] += loss.detach()
            totals[1] += n
        totals[2] = self.stopping is not None
        if self.world > 1:
            dist.all_reduce(totals)
        return totals

    def forward(self, *tensors):
        """The stage's loss; falls back from the compiled to the eager model if compiling fails."""
        if self.compiled is None:
            return self.loss(self.net, *tensors)
        try:
            result = self.loss(self.compiled, *tensors)
            self.compile_works = True
            return result
        except Exception as error:
            if self.compile_works or is_out_of_memory(error):
                raise
            self.say(f"torch.compile failed, going on without: {first_line(error)}")
            self.compiled = None
            return self.loss(self.net, *tensors)

    def autocast(self):
        """Weights are cast to the dtype of activations where they are used. Autocast would keep what it has
        cast to the end of the pass, which is what checkpointing wants to avoid.
        """
        half, keep = self.dtype != torch.float32, not self.cfg.gradient_checkpointing
        return torch.autocast(self.device.type, self.dtype, enabled=half, cache_enabled=keep)

    def to_device(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.device.type == "cuda":  # pinned memory lets the copy overlap with the computation
            return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in tensors)
        return tuple(t.to(self.device) for t in tensors)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    # ---- the run

    def run_all_steps(self) -> dict:
        """Trains to max_steps, resuming if the folder holds a checkpoint; returns run.json's results."""
        cfg, default = self.cfg, torch.get_float32_matmul_precision()
        try:
            self.begin()
            with self.catch_signals(), self.progress_bar() as bar:
                unread = []  # steps whose results have not been looked at: on a card at most the last one
                while self.step < cfg.max_steps:
                    begun = time.perf_counter()
                    with float32_products(fastest_products(self.device) if self.alike else default):
                        unread.append((self.step, self.train_step(self.step)))
                    self.step += 1
                    last = self.step == cfg.max_steps
                    logs, evaluates, saves = (
                        last or (every and self.step % every == 0)
                        for every in (cfg.log_every, cfg.eval_every, cfg.save_every)
                    )
                    now = logs or evaluates or saves or self.stopping is not None or not self.ahead
                    while len(unread) > (0 if now else 1):
                        self.read(*unread.pop(0))
                    took = time.perf_counter() - begun
                    self.seconds += took
                    self.show(bar, took)
                    if logs:
                        self.log_step()
                    improved = evaluates and self.evaluate_now(final=last)
                    if saves or self.stop_agreed or (cfg.save_every and improved):
                        self.save()
                    if self.stop_agreed and self.step < cfg.max_steps:
                        self.write_run(status="interrupted")
                        self.say(f"stopped at step {self.step}; the same command goes on from here")
                        raise SystemExit(128 + (self.stopping or signal.SIGTERM))
            self.finish()
        except (TrainError, OSError, RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                why = f"out of memory: {first_line(error)}"
                error = TrainError(f"{why}; try a smaller --batch_size, --context_length or model")
            elif isinstance(error, OSError):
                why = f"cannot read or write {error.filename or self.folder}: {error.strerror or error}"
                error = TrainError(f"{why}; the same command goes on when that is mended")
            elif not isinstance(error, TrainError):
                raise
            with contextlib.suppress(OSError):
                if self.opened:
                    self.write_run(status="failed", error=str(error))
            raise error from None
        finally:
            self.end()
        return self.run

    def begin(self) -> None:
        """Opens the run folder: new, resumed, or refused."""
        cfg, folder = self.cfg, self.folder
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # or every process would shard onto the first card
        if cfg.wandb and not importlib.util.find_spec("wandb"):
            raise TrainError('--wandb needs the package wandb: pip install -e ".[wandb]"')
        torch.set_flush_denormal(True)  # numbers near 1e-40 can slow a CPU down tenfold
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.started = True
        folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self.lock = lock(folder)
            if cfg.overwrite:
                remove_run(folder)
        self.barrier()
        if self.sharded:
            self.shard()
        self.resume()
        self.barrier()
        copies = self.world > 1 and not self.sharded  # which begin with the first process' weights
        ddp = nn.parallel.DistributedDataParallel
        self.net = ddp(self.model, broadcast_buffers=False) if copies else self.model
        self.compiled, self.compile_works, self.stop_agreed, self.bad_in_a_row = None, False, False, 0
        self.logged, self.ahead = (self.step, self.seconds), self.can_go_ahead()
        self.model.train()  # what from_pretrained gives is in evaluation mode
        wanted = cfg.compile if cfg.compile != "auto" else self.device.type == "cuda"
        if wanted and self.device.type == "cuda" and not importlib.util.find_spec("triton"):
            self.say("torch.compile needs triton, which is not installed; going on without")
        elif wanted:
            self.compiled = torch.compile(self.net)
        asks = ("overwrite", "plan", "measure", "list")
        settings = {k: v for k, v in asdict(cfg).items() if k not in asks}
        before = self.run
        self.run = {
            "status": "running",
            "stage": Path(sys.argv[0]).stem,
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": settings,
            "changed": [name for name in settings if chosen_by_hand(cfg, name)],
            "results": {"last": self.last, "best": self.best} if self.best else None,
            **self.about,
            "dtype": str(self.dtype).removeprefix("torch."),
            "processes": self.world,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "tokenizer": self.tokenizer.hash if self.tokenizer else None,
            "started": before.get("started")
            or datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "git": git_commit(),
            "versions": versions(),
            "hardware": hardware(self.device),
        }
        if "wandb" in before:
            self.run["wandb"] = before["wandb"]
        if self.rank == 0:
            self.on_begin()
        self.write_run()
        self.opened = True
        self.wandb = self.open_wandb()

    def can_go_ahead(self) -> bool:
        """Whether the host may prepare a step before it has seen the result of the one before: on one card,
        and where the optimizers can tell by themselves what to refuse.
        """
        fused = all(optimizer.defaults.get("fused") for optimizer in self.optimizers)
        return self.device.type == "cuda" and self.world == 1 and fused and not self.scaler.is_enabled()

    def shard(self) -> None:
        """FSDP2: of every parameter, gradient and optimizer state each process holds a part, and gathers a
        layer's weights while it computes the layer. The first one keeps a copy in main memory, to write and
        to sample from.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for p in self.model.parameters():  # the same start everywhere
            dist.broadcast(p.data, 0)
        self.copy = copy.deepcopy(self.model).cpu().eval() if self.rank == 0 else None
        mesh = init_device_mesh(self.device.type, (self.world,))
        for layer in self.model.model["layers"]:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizers = make_optimizers(self.model, self.cfg)

    def plain(self) -> nn.Module:
        """The model with all its weights. Of a sharded one the first process' copy, for which all have to
        ask.
        """
        if not self.sharded:
            return self.model
        copies = itertools.repeat(None) if self.copy is None else self.copy.parameters()
        with torch.no_grad():
            for mine, part in zip(copies, self.model.parameters(), strict=False):
                found = whole(part)
                if mine is not None:
                    mine.copy_(found)
        return self.copy

    def end(self) -> None:
        self.optimizers = []  # evaluation, which may follow, has use for their memory
        if self.lock is not None:
            os.close(self.lock)
        if self.wandb:
            self.wandb.finish()
        if self.started:
            dist.destroy_process_group()

    def log_step(self) -> None:
        loss = self.window[0] / self.window[1] if self.window[1] else None
        tokens = self.step * self.batch * self.tokens_per_row
        took = (self.seconds - self.logged[1]) / (self.step - self.logged[0])  # a step, on average
        self.logged, self.rate = (self.step, self.seconds), self.batch * self.tokens_per_row / took
        line = {
            "step": self.step,
            "loss": loss,
            "learning_rate": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": self.norm if math.isfinite(self.norm) else None,
            "tokens": tokens,
            "epoch": round(self.epoch(self.step), 4) if self.epoch else None,
            "tokens_per_second": round(self.rate, 1),
            "step_seconds": round(took, 4),
            "seconds": round(self.seconds, 2),
            "skipped": self.skipped,
        }
        if self.device.type == "cuda":
            line["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
            peak = peak_flops(torch.cuda.get_device_name(self.device))
            rate = self.batch * self.flops_per_row / took  # FLOP/s
            line["mfu"] = round(rate / (peak * self.world), 4) if peak else None
        else:
            line["peak_memory_gib"] = round(peak_resident_bytes() / 2**30, 3)
        moe = [m.stats for m in self.model.modules() if getattr(m, "stats", None)]
        if moe:  # averages over the layers
            line["router_load"] = torch.stack([s["load"] for s in moe]).mean(0).tolist()
            line["dropped"] = int(sum(s["dropped"] for s in moe))
        self.window = [0.0, 0]
        self.last_loss = loss or self.last_loss
        self.log(line)

    def evaluate_now(self, final: bool) -> bool:
        """Runs the stage's evaluation and samples; True if the validation loss is the best so far."""
        if self.evaluate is None:
            return False
        begun = time.perf_counter()
        self.model.eval()
        with self.autocast():
            found = {k: float(v) for k, v in self.evaluate(self.model, final).items()}  # numpy's don't load
        self.model.train()
        lowest = self.best is None or found["val_loss"] < self.best["val_loss"]
        improved = lowest or not self.keeps_best
        self.last = {"step": self.step, **found}
        if improved:
            self.best = self.last
        self.run["results"] = {"last": self.last, "best": self.best}
        self.log({"step": self.step, **found, "eval_seconds": round(time.perf_counter() - begun, 2)})
        self.say(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in found.items()))
        model = self.plain() if self.sample else None
        if self.sample and self.rank == 0:
            with self.autocast():
                samples = self.sample(model)
            self.append("samples.jsonl", [{"step": self.step, **s} for s in samples])
            if samples:
                prompt, text = samples[0]["prompt"][-100:], samples[0]["text"][:300]
                self.say(f"  {prompt}|{text}".replace("\n", " "))
        self.model.train()
        return improved

    # ---- checkpoints

    def save(self) -> None:
        """A checkpoint appears whole or not at all; then the run folder's model is linked to the best one.

        It is the same whoever wrote it: shards are gathered, so any number of processes can go on from it.
        """
        self.plain()
        state = self.state()
        if self.rank == 0:
            final = checkpoint_of(self.folder, self.step)

            def write(folder: Path) -> None:
                self.write_model(folder)
                write_atomically(folder / "state.pt", lambda path: self.write_state(path, state))

            try:
                write_folder_atomically(final, write)
            except (OSError, SafetensorError) as error:
                why = getattr(error, "strerror", None) or first_line(error)
                raise TrainError(f"cannot save {final}: {why}; {self.last_checkpoint()}") from None
            best = self.best_checkpoint()
            if best == final or not best.exists():
                self.publish(final)
            self.prune()
            self.write_run()
        self.barrier()

    def best_checkpoint(self) -> Path:
        """Where the checkpoint of the best evaluation is, if there is one; else the one of this step."""
        return checkpoint_of(self.folder, self.best["step"] if self.best else self.step)

    def prune(self) -> None:
        """Removes all checkpoints but the best and the last `keep_last` others: if the newest turns out to be
        damaged, there is one to go back to.
        """
        found, best = checkpoints(self.folder), self.best_checkpoint()
        others = [path for path in found if path != best and step_of(path) <= self.step]  # later: damaged
        keep = [best, *others[-max(1, self.cfg.keep_last) :]]
        for path in found:
            if path not in keep:
                remove_folder(path)

    def finish(self) -> None:
        """The end of a run. It may be repeated: what a killed process has not done, the next one does."""
        self.write_run()
        if self.rank == 0:
            self.prune()
            self.write_card()
        self.write_run(status="finished")
        if self.rank == 0:
            self.tidy()

    def tidy(self) -> None:
        """Removes what killed processes left, and the checkpoints of a finished run with --save_every=0."""
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("checkpoints/.*.tmp")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.run.get("status") == "finished" and not self.run.get("settings", {}).get("save_every"):
            for path in checkpoints(self.folder):
                remove_folder(path)
            with contextlib.suppress(OSError):  # not there, or something else is in it
                (self.folder / "checkpoints").rmdir()

    def state(self) -> dict:
        """What an exact resume needs beside the weights: tensors and numbers, so no code to unpickle."""
        over = self.step == self.cfg.max_steps and not self.cfg.save_every  # no step is left that needs them
        optimizers = [] if over else self.optimizers
        return {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "best": self.best,
            "last": self.last,
            "window": self.window,
            "micro_batch": self.micro_batch,
            "batch": self.batch,
            "optimizers": [gathered(o.state_dict(), keep=self.rank == 0) for o in optimizers],
            "scaler": self.scaler.state_dict(),
        }

    def write_state(self, path: Path, state: dict) -> None:
        buffer = io.BytesIO()  # torch.save itself does not pass on what the disk said
        torch.save(state, buffer)
        path.write_bytes(buffer.getbuffer())

    def last_checkpoint(self) -> str:
        """The end of an error message: what is left."""
        last = newest(self.folder)
        return f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"

    def write_model(self, folder: Path) -> None:
        model = self.copy if self.sharded else self.model
        if self.tokenizer is None:
            return model.save_pretrained(folder)
        eot = self.tokenizer.eot_id
        model.save_pretrained(folder, bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)
        self.tokenizer.save(folder, context_length=model.config.context_length)

    def read_model(self, folder: Path) -> None:
        """The inverse of `write_model`, into the model that is there."""
        if not self.sharded:
            self.model.load_state_dict(type(self.model).from_pretrained(folder, self.device).state_dict())
            return
        saved = ModernDecoderLM.from_pretrained(folder, "cpu")
        with torch.no_grad():
            for part, values in zip(self.model.parameters(), saved.parameters(), strict=True):
                part.copy_(part_like(part, values.to(self.device)))

    def publish(self, checkpoint: Path) -> None:
        """Links the checkpoint's model files into the run folder: no second copy on the disk."""
        for file in checkpoint.iterdir():
            if file.name != "state.pt":
                write_atomically(self.folder / file.name, lambda path, file=file: link_or_copy(file, path))

    def resume(self) -> None:
        """Goes on from the newest checkpoint that can be read, after making sure that it is this run's."""
        found = checkpoints(self.folder)
        if (self.folder / "run.json").exists():
            self.run = read_json(self.folder / "run.json")
            finished = self.run.get("status") == "finished"
            if found or finished:
                self.refuse_another_run()
            if finished:
                if self.rank == 0:
                    self.tidy()
                raise AlreadyFinished(self.run)
            # Another machine may prefer another dtype, but this run has its own.
            if found and self.cfg.dtype == "auto":
                self.dtype = getattr(torch, self.run.get("dtype", "float32"))
                self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if found and not any(self.load(checkpoint) for checkpoint in reversed(found)):
            raise TrainError(f"none of the checkpoints in {self.folder} can be read; --overwrite starts anew")
        if self.step:
            self.say(f"{self.folder}: resuming at step {self.step} of {self.cfg.max_steps}")
        if self.rank == 0:
            if self.step:  # a crash may have come between saving and publishing
                best, last = self.best_checkpoint(), checkpoint_of(self.folder, self.step)
                self.publish(best if best.exists() else last)
            for name in ("metrics.jsonl", "samples.jsonl"):
                self.cut_log(self.folder / name)
            self.tidy()

    def refuse_another_run(self) -> None:
        """Raises TrainError if the run in this folder was begun with other settings or on other data."""
        before, now = self.run.get("settings", {}), asdict(self.cfg)
        about = self.about | {"tokenizer": self.tokenizer and self.tokenizer.hash}
        free = {*self.free_to_change}
        for name, paths in PATHS_OF_HASH.items():
            if about.get(name) and about[name] == self.run.get(name):
                free |= {*paths}
        changed = [k for k, v in now.items() if k not in free and before.get(k, v) != v]
        if changed:
            what = ", ".join(f"{k}: {before[k]!r} -> {now[k]!r}" for k in changed)
            raise TrainError(
                f"{self.folder} was begun with other settings ({what}). Take them back to resume, choose "
                f"another --name, or start anew with --overwrite"
            )
        other = [f"{k}: {self.run[k]} -> {v}" for k, v in about.items()
                 if k not in free and self.run.get(k, v) != v]  # fmt: skip
        if other:
            raise TrainError(
                f"{self.folder} was begun on other data ({', '.join(other)}); --overwrite starts anew"
            )

    def load(self, checkpoint: Path) -> bool:
        """Takes over weights, optimizer and counters of a checkpoint; False if it cannot be read."""
        try:
            where = "cpu" if self.sharded else self.device
            state = torch.load(checkpoint / "state.pt", map_location=where, weights_only=True)
            self.read_model(checkpoint)
            if state["optimizers"] or state["step"] < self.cfg.max_steps:
                self.load_optimizers(state["optimizers"])
        except Exception as error:  # torn by a copy that was cut off, say: the one before will do
            self.say(f"cannot read {checkpoint} ({first_line(error)}); trying the one before")
            return False
        if state["batch"] != self.batch:
            raise TrainError(
                f"{self.folder} was begun with {state['batch']} sequences a step, now they would be "
                f"{self.batch}: --batch_size times --grad_accum_steps times processes must stay the same"
            )
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.skipped = state["step"], state["seconds"], state["skipped"]
        self.best, self.last = state["best"], state.get("last", state["best"])
        self.window = state["window"]
        self.micro_batch = min(self.micro_batch, state["micro_batch"])
        return True

    def load_optimizers(self, states: list[dict]) -> None:
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, values in saved["state"].items():
                values |= {k: part_like(params[i], v) for k, v in values.items()}
            optimizer.load_state_dict(saved)

    def cut_log(self, file: Path) -> None:
        """Keeps the lines up to the checkpoint: those of later steps will be written again."""
        lines, damaged = read_log(file)
        if damaged:
            self.say(f"{file}: {damaged} damaged lines are left out")
        text = "".join(json.dumps(line) + "\n" for line in lines if line.get("step", 0) <= self.step)
        write_atomically(file, lambda path: path.write_text(text))

    # ---- talking

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm().write(text, file=sys.stdout)
            sys.stdout.flush()

    def log(self, line: dict) -> None:
        line = {k: v for k, v in line.items() if v is not None}
        self.append("metrics.jsonl", [line])
        if self.wandb:
            self.wandb.log(line, step=self.step)

    def append(self, name: str, lines: list[dict]) -> None:
        if self.rank == 0:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))

    def write_run(self, **more) -> None:
        self.run |= more | {"step": self.step, "seconds": round(self.seconds, 2), "pid": os.getpid()}
        if self.run.get("status") != "running":
            del self.run["pid"]  # while it runs, by which serve.py can pause it
        if self.rank == 0:
            text = json.dumps(self.run, indent=2) + "\n"
            write_atomically(self.folder / "run.json", lambda path: path.write_text(text))

    def write_card(self) -> None:
        """README.md for people and for the hub. A full disk does not fail the run for it."""
        try:
            write_model_card(self.folder)
        except OSError as error:
            self.say(f"the model card was not written: {error}")

    def progress_bar(self):
        return tqdm()(
            total=self.cfg.max_steps,
            initial=self.step,
            desc=self.cfg.name,
            unit="step",
            disable=self.rank > 0 or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def show(self, bar, took: float) -> None:
        loss = self.window[0] / self.window[1] if self.window[1] else self.last_loss
        told = f"loss {loss:.4f}" if math.isfinite(loss) else ""  # the first result may not have been read
        rate = self.rate or self.batch * self.tokens_per_row / took
        bar.set_postfix_str(f"{told} {rate:,.0f} tok/s", refresh=False)
        bar.update()
        quiet = not sys.stderr.isatty() and self.rank == 0  # in a log file: a line now and then, no bar
        now = time.monotonic()
        if quiet and (self.step % max(1, self.cfg.max_steps // 20) == 0 or now > self.said + 60):
            self.said = now
            left = (self.cfg.max_steps - self.step) * self.seconds / self.step / 60
            self.say(f"step {self.step}/{self.cfg.max_steps}  {told}  {left:.1f} min left")

    def open_wandb(self):
        """One run of Weights & Biases for all processes that resume this one: run.json has its id, which is
        written before the run is made there, and its address.
        """
        if not self.cfg.wandb or self.rank > 0:
            return None
        import wandb

        about = self.run.setdefault("wandb", {"id": uuid.uuid4().hex[:8]})
        self.write_run()
        run = wandb.init(
            project=self.cfg.wandb,
            name=self.cfg.name,
            config=self.run["settings"],
            id=about["id"],
            resume="allow",  # goes on with the run of this id, or makes it
        )
        about["url"] = run.url  # None if wandb is offline
        self.write_run()
        return run

    @contextlib.contextmanager
    def catch_signals(self):
        """The first Ctrl-C or SIGTERM lets the step end and saves; the second ends the program at once."""

        # torchrun hands on a Ctrl-C that its processes have got already: within a second, two are one.
        grace = 1 if "TORCHELASTIC_RUN_ID" in os.environ else 0
        first = math.inf

        def note(number, _frame):
            nonlocal first
            first = min(first, time.monotonic())
            if self.stopping is not None and time.monotonic() >= first + grace:
                os._exit(128 + number)
            self.stopping = number
            self.say("stopping after this step (again: at once) ...")

        old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def chosen_by_hand(cfg, name: str) -> bool:
    """Whether a setting is other than its default, and than what follows from others, as d_ff of d_model."""
    default = next(f.default for f in fields(cfg) if f.name == name)
    if getattr(cfg, name) == default:
        return False
    try:
        return getattr(replace(cfg, **{name: default}), name) != getattr(cfg, name)
    except ValueError:  # the default does not go with the rest
        return True


# A parameter of a sharded model is a DTensor: this process holds a part, and full_tensor() gathers the rest.


# -----------------------------------------------------------------------------
# Small tools


# -----------------------------------------------------------------------------
# Pretraining


@torch.no_grad()
def evaluate_lm(model: nn.Module, tokens: np.ndarray, T: int, batch_size: int, n_bytes: int) -> dict:
    """Every token of `tokens` predicted once, in windows of T that do not overlap.

    Returns val_loss (nats a token), perplexity, bits_per_byte (comparable across tokenizers: `n_bytes` is the
    size of the text) and val_tokens. With several processes each takes a part; all get the sum.
    """
    device = next(model.parameters()).device
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    starts = np.arange(0, len(tokens) - 1, T)
    mine = starts[rank::world]
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for i in range(0, math.ceil(len(starts) / world), batch_size):
        some = mine[i : i + batch_size]
        ids, targets = (t.to(device) for t in windows_at(tokens, some if len(some) else starts[:1], T))
        if not len(some):  # shards compute together: who has read its part goes along, and counts nothing
            targets = torch.full_like(targets, -100)
        loss, count = model(ids, targets)
        totals += torch.stack([loss.double(), count.double()])
    if world > 1:
        dist.all_reduce(totals)
    total, count = totals.tolist()
    return {
        "val_loss": total / count,
        "perplexity": perplexity(total, count),
        "bits_per_byte": bits_per_byte(total, n_bytes),
        "val_tokens": int(count),
    }


def model_config(cfg: TrainConfig) -> ModelConfig:
    return ModelConfig(**{f.name: getattr(cfg, f.name) for f in fields(ModelConfig)})


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
    T = cfg.context_length
    world = int(os.environ.get("WORLD_SIZE", 1))
    batch = cfg.batch_size * cfg.grad_accum_steps * world
    windows = Windows(train, T, batch, cfg.seed, cfg.order, cfg.stride)

    def evaluate(model, final):
        wanted = cfg.final_eval_tokens if final else cfg.eval_tokens
        n = min(len(val), wanted + 1) if wanted else len(val)
        return evaluate_lm(model, val[:n], T, cfg.batch_size, val_about["bytes"] * n / len(val))

    def sample(model):
        if not cfg.sample_tokens:
            return []
        return [
            {"prompt": cfg.sample_prompt, "text": text}
            for text in write(model, tokenizer, cfg.sample_prompt, cfg.sample_tokens, n=2, seed=cfg.seed)
        ]

    flops = estimate_flops(model.config, T)
    about = {"data": {k: train_about.get(k) for k in ("source", "licence", "fingerprint", "tokens", "bytes")}}
    about["data"] |= {k: train_about[k] for k in ("left_out",) if k in train_about}  # rows without text
    about["data"]["validation"] = {k: val_about.get(k) for k in ("source", "fingerprint", "tokens", "bytes")}
    about["parent"] = cfg.init_from or None
    about["parent_hash"] = weights_hash(cfg.init_from) if cfg.init_from else None
    trainer = Trainer(
        cfg,
        model,
        windows.rows,
        evaluate=evaluate,
        sample=sample,
        tokenizer=tokenizer,
        flops_per_row=flops * T,
        tokens_per_row=T,
        epoch=windows.epoch,
        about=about,
        parallel=cfg.parallel,
    )
    trainer.say(
        f"{trainer.folder}: {trainer_size(model)} parameters, {len(train):,} tokens of {cfg.corpus}, "
        f"{batch * T:,} tokens a step, {batch * T * cfg.max_steps / len(train):.2f} epochs, "
        f"{str(trainer.dtype).removeprefix('torch.')} on {hardware(trainer.device)['device']}"
    )
    if batch * T * cfg.max_steps > 4 * len(train):
        trainer.say("past some 4 epochs repeated text teaches little: more text, or fewer --max_steps")
    trainer.alike = True
    return trainer.run_all_steps()


def tokenizer_command(cfg: TrainConfig) -> str:
    """The command that makes the token files of these settings: the same config files, and what differs."""
    files = []
    if Path(sys.argv[0]).name == "train.py":  # not a test or a notebook
        files = [word for word in sys.argv[1:] if word.endswith(".py") and not word.startswith("-")]
    from_files, flags = parse_config(TokenizerStageConfig, "", files), []
    for field in fields(TokenizerConfig):
        value = getattr(cfg, field.name)
        if value != getattr(from_files, field.name):
            flags.append(f"--{field.name}={value}")
    return shlex.join(["python", "tokenizer.py", *files, *flags])


def trainer_size(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M"


def adopt(model: ModernDecoderLM, cfg: TrainConfig, tokenizer: Tokenizer) -> None:
    """Makes --init_from's model and the settings agree: shape from the model, context and dropout from us."""
    have, parent = model.config, Path(cfg.init_from)
    theirs = Tokenizer.load(parent).hash if (parent / "tokenizer.json").exists() else tokenizer.hash
    # Token files hold no chat tokens, so GPT-2 itself can read those that its vocabulary made.
    if theirs != tokenizer.hash or have.vocab_size < min(tokenizer.vocab_size, 50257):
        raise TrainError(
            f"{cfg.init_from} ({have.vocab_size} tokens) has another vocabulary than the token files "
            f"({tokenizer.vocab_size}): make them with python tokenizer.py --tokenizer={cfg.init_from}"
        )
    if have.positions == "learned" and have.context_length < cfg.context_length:
        raise TrainError(f"{cfg.init_from} has {have.context_length} positions, --context_length is larger")
    if have.positions != "learned":
        model.set_context_length(cfg.context_length)
    model.set_dropout(cfg.dropout)
    for field in fields(ModelConfig):
        if field.name != "context_length":
            setattr(cfg, field.name, getattr(have, field.name))


def write(
    model, tokenizer, prompt: str, n_tokens: int, n: int = 1, seed: int = 1, temperature: float = 0.8
) -> list:
    """`n` texts that continue the prompt, each to the end of its document or n_tokens."""
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
    rows = model.generate(
        [ids], n_tokens, temperature=temperature, top_p=0.95, stop_tokens=[tokenizer.eot_id], n=n, seed=seed
    )
    return [tokenizer.decode([t for t in row if t != tokenizer.eot_id]) for row in rows]


def padded(vocab_size: int) -> int:
    """Rows of the embedding: a multiple of 64 suits a GPU's matrix units; no text uses the rest."""
    return 64 * math.ceil(vocab_size / 64)


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--batch_size=auto"]
    cfg = parse_config(TrainConfig, __doc__, words)
    try:
        if len(words) < len(sys.argv) - 1:
            from support.plan import fit_batch

            fit_batch(cfg)
        if cfg.list:
            list_runs(cfg.out)
        elif cfg.plan or cfg.measure:
            from support.plan import print_plan

            print_plan(cfg)
        else:
            run = pretrain(cfg)
            report(cfg, run)
    except AlreadyFinished as finished:
        report(cfg, finished.run)
        print("nothing to do: --overwrite trains it anew, --name trains another")
    except (ValueError, OSError) as error:  # TrainError and what the other files raise
        raise SystemExit(f"train.py: {error}") from None


def report(cfg: TrainConfig, run: dict) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        best = (run.get("results") or {}).get("best") or {}
        found = f", val_loss {best['val_loss']:.4f}, {best['bits_per_byte']:.4f} bits a byte" if best else ""
        folder = Path(cfg.out) / cfg.name
        minutes = f"{run['seconds'] / 60:.1f} min"
        print(f"{folder}: {run['step']} steps in {minutes}{found}; python chat.py {folder}")


if __name__ == "__main__":
    run_script(main)
