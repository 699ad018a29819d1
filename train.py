"""Training: the Trainer that every stage shares, and pretraining, which makes a language model from text.

    python train.py configs/cpu.py                       # a story teller in minutes, on any laptop
    python train.py configs/max3060.py --plan --vram=12  # what a run costs, before it costs anything
    python train.py configs/cpu.py --plan --measure      # ... by some of its own steps, timed here
    python train.py configs/speedrun.py                  # the real thing; run it again and it resumes
    torchrun --nproc_per_node=2 train.py configs/cpu.py  # two GPUs, or two CPU processes; --parallel=fsdp
    python train.py --list                               # all runs and their checkpoints

It reads the token files that tokenizer.py wrote and writes a run folder, out/NAME:

    config.json, model.safetensors, tokenizer.json   a Hugging Face model: the best by validation loss
    run.json              settings, data, versions, hardware, status, results
    metrics.jsonl         a line per logged step and per evaluation
    samples.jsonl         what the model writes during training
    checkpoints/step-N/   the best and the last: the model, and state.pt, which an exact resume needs

Two ideas make runs exact. The batch of step s is a pure function of (seed, s), so there is no loader state
that a crash could lose: a run that was killed and resumed has the same bits as one that was not. And a loss
is a (sum, count) pair: gradients are divided by the count of the whole batch, over all micro-batches and
processes, so how a batch is cut never changes the result.
"""

from support.terminal import StopSignal, run_script

import contextlib
import datetime
import functools
import importlib.util
import io
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
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
from support.files import write_atomically, write_folder_atomically
from support.kernels import fastest_products, float32_products
from support.machine import git_commit, hardware, peak_flops, peak_memory, pick_device, pick_dtype, versions
from support.memory import is_out_of_memory
from support.metrics import bits_per_byte, perplexity
from support.model_card import write_model_card
from support.runs import (
    AlreadyFinished,
    Progress,
    RunLog,
    TrainError,
    checkpoint_of,
    checkpoints,
    first_line,
    list_runs,
    lock,
    newest,
    prune,
    publish,
    read_json,
    remove_checkpoints,
    remove_leftovers,
    remove_run,
    run_folder,
    weights_hash,
)
from support.sharding import full_tensor, gather_state, gather_weights, shard, shard_like
from tokenizer import Tokenizer, TokenizerConfig, TokenizerStageConfig, open_tokens, tokens_folder


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
    eval_tokens: int = 0  # validation tokens read while training; 0: all
    final_eval_tokens: int = 0  # the same, at the end
    parallel: Literal["ddp", "fsdp"] = "ddp"  # many processes: each has the model, or a shard of it
    sample_prompt: str = ""  # what samples continue; nothing: the start of a document
    sample_tokens: int = 200  # length of a sample; 0: none
    plan: bool = False  # print memory, FLOPs and time, and stop
    measure: bool = False  # --plan, and time some steps here, at most two minutes
    vram: float = 0.0  # plan for a GPU with this many GB instead of the one here
    card: str = ""  # plan for a GPU of this name, such as "RTX 3090"
    list: bool = False  # list runs and checkpoints, and stop


# What may differ when a run is resumed, because it changes neither the data nor the mathematics. (Another
# device, compile or micro-batch size changes the rounding: bits are equal only if these are, too.)
FREE_TO_CHANGE = """
    name out tokens device compile parallel gradient_checkpointing batch_size grad_accum_steps log_every
    eval_every eval_tokens final_eval_tokens save_every keep_last sample_prompt sample_tokens wandb hypothesis
    baseline overwrite plan measure vram card list
""".split()  # (batch_size times grad_accum_steps is checked apart)

# Settings of older versions, with the value that this version computes with.
REMOVED = {"stride": 0}

# A model that was moved is still the same: where run.json has the same hash of the weights, paths may differ.
PATHS_OF_HASH = {"parent_hash": ("parent", "model", "init_from"), "start_hash": ("start",)}


# -----------------------------------------------------------------------------
# Data: which tokens step s sees


class Windows:
    """Training windows of a token file, as a pure function of (seed, step).

    "shuffled": the file is cut into windows of `context_length` tokens, and every epoch reads them in a new
    order: each token is predicted exactly once an epoch. The last window may be short, its missing targets
    are -100. "random": offsets drawn uniformly, as nanoGPT and most courses do.
    """

    def __init__(self, tokens: np.ndarray, context_length: int, rows: int, seed: int, order="shuffled"):
        self.tokens = tokens
        self.T = context_length
        self.seed = seed
        self.order = order
        self.rows = rows  # of one step, in all processes
        self.count = math.ceil((len(tokens) - 1) / context_length)  # windows of an epoch
        if self.count < 1:
            raise TrainError(f"{len(tokens)} tokens are too few to train on")

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows first .. first + count - 1 of the batch of `step`: ids and targets, both (count, T) int64."""
        if self.order == "random":
            high = max(1, len(self.tokens) - self.T)
            starts = np.random.default_rng([self.seed, step]).integers(0, high, self.rows)
            return windows_at(self.tokens, starts[first : first + count], self.T)
        first += step * self.rows
        return windows_at(self.tokens, [self.shuffled(i) for i in range(first, first + count)], self.T)

    def shuffled(self, i: int) -> int:
        """Where the i-th window that training ever sees begins."""
        epoch, i = divmod(i, self.count)
        return self.T * int(permutation(self.count, self.seed, epoch)[i])

    def epoch(self, step: int) -> float:
        """How often training has gone through the file after `step` steps."""
        return step * self.rows * self.T / max(1, len(self.tokens) - 1)


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def windows_at(tokens: np.ndarray, starts, T: int) -> tuple[Tensor, Tensor]:
    """ids and targets (len(starts), T) int64; target t is the next token after id t, -100 past the end."""
    ids = np.zeros((len(starts), T), np.int64)
    targets = np.full((len(starts), T), -100, np.int64)
    for row, start in enumerate(starts):
        piece = tokens[start : start + T + 1]
        n = len(piece) - 1
        ids[row, :n] = piece[:-1]
        targets[row, :n] = piece[1:]
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

    Training uses torch's fused version, which does the same in one kernel (a test compares them).
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            lr = group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["m"] = torch.zeros_like(p)
                    state["v"] = torch.zeros_like(p)
                state["step"] += 1
                m = state["m"]
                v = state["v"]
                t = state["step"]
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
    learning rates and decay serve (Liu et al., 2025). torch.optim.Muon does the same (a test compares them),
    but in bfloat16 everywhere: on a CPU without hardware for it (AMD EPYC, two threads, configs/cpu.py) its
    step took 680 ms where ours takes 25, beside a forward and backward pass of 295.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum = group["momentum"]
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
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(shard_like(p, move.view(p.shape)), alpha=-lr * scale)


def orthogonal(G: Tensor) -> Tensor:
    """About U V^T of matrices (..., n, m) = U S V^T, without a decomposition: five Newton-Schulz steps of a
    polynomial that pulls every singular value to between 0.7 and 1.2. In bfloat16 on a GPU, fast there.
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
    hidden, matrices, others = [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2 or "sinks" in name:  # sinks are logits
            others.append(p)
        elif cfg.optimizer == "muon" and ".layers." in name:
            hidden.append(p)
        else:
            matrices.append(p)
    optimizers = []
    settings = {"lr": cfg.learning_rate, "betas": (cfg.beta1, cfg.beta2)}
    decays = ((matrices, cfg.weight_decay), (others, 0.0))
    if groups := [{"params": params, "weight_decay": decay} for params, decay in decays if params]:
        if cfg.optimizer == "adamw_plain":
            optimizers.append(AdamW(groups, **settings))
        else:
            fused = groups[0]["params"][0].device.type in ("cuda", "cpu")
            optimizers.append(torch.optim.AdamW(groups, fused=fused, **settings))
    if hidden:
        optimizers.append(Muon(hidden, lr=cfg.learning_rate, weight_decay=cfg.weight_decay))
    return optimizers


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


LR_SETTINGS = ("learning_rate", "min_lr", "warmup_steps", "max_steps", "schedule", "decay_fraction")


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out) -> None:
    """Writes weights, optimizer state and the number of steps done to `out`, a path or a binary file.

    The smallest checkpoint from which training can continue, to read and to stand alone. The Trainer has its
    own: see "checkpoints and exact resume".
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


# -----------------------------------------------------------------------------
# The Trainer

Batch = Callable[[int, int, int], tuple[Tensor, ...]]
"""batch(step, first, count): rows first .. first + count - 1 of the batch of `step`, as tensors for the loss.

The one protocol by which every stage hands out its data. It is a pure function of its arguments and a seed:
the same rows whenever they are asked for, whichever process asks, however the batch is cut.
"""


def rows_per_step(cfg: TrainerConfig) -> int:
    """Sequences of one optimizer step, in all processes."""
    return cfg.batch_size * cfg.grad_accum_steps * int(os.environ.get("WORLD_SIZE", 1))


def next_token_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return model(ids, targets)


@dataclass(eq=False, repr=False)
class Trainer:
    """Everything about training that is the same for every stage: steps, logs, checkpoints, resuming.

    The fields are what a stage brings. One whose model is not of model.py also overrides `write_model` and
    `read_model`.
    """

    cfg: TrainerConfig
    model: nn.Module
    batch: Batch
    loss: Callable = next_token_loss  # loss(model, *tensors): sum of losses in nats, number of targets
    evaluate: Callable | None = None  # evaluate(model, final): {"val_loss": ..., ...}
    sample: Callable | None = None  # sample(model): [{"prompt": ..., "text": ...}, ...]
    tokenizer: Tokenizer | None = None
    flops_per_row: float = 0.0
    tokens_per_row: int = 0
    epoch: Callable | None = None  # epoch(step): times through the data after `step` steps
    about: dict = field(default_factory=dict)  # what run.json records of data and parent
    parallel: str = "ddp"
    on_begin: Callable | None = None  # writes the stage's own files, once the folder is this run's
    keeps_best: bool = True  # publish the checkpoint of the lowest validation loss; False: the last one
    free_to_change: Iterable[str] = ()  # more settings that a resumed run may change
    dtype: torch.dtype | None = None  # of activations; None: by cfg.dtype
    same_shapes: bool = False  # of all batches, see `fastest_products`

    def __post_init__(self):
        cfg = self.cfg
        defaults = {f.name: f.default for f in fields(cfg)}
        defaults["max_steps"] = None  # 0, "as many as the epochs have", was replaced by their number
        check_numbers(asdict(cfg), defaults)
        self.about = self.about | {"tokenizer": self.tokenizer.hash if self.tokenizer else None}
        # The machine and the processes
        self.device = pick_device(cfg.device)
        self.dtype = self.dtype or pick_dtype(cfg.dtype, self.device)
        default = torch.get_float32_matmul_precision()
        self.precision = fastest_products(self.device) if self.same_shapes else default
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.sharded = self.parallel == "fsdp" and self.world > 1
        self.owns_group = False  # True if this object started the process group
        # The network: `model` has the gradients, `net` is the same behind DDP and torch.compile. `full_model`
        # has all weights where `model` is sharded: on rank 0, None on the others
        self.model = self.net = self.full_model = self.model.to(self.device)
        self.model.gradient_checkpointing = cfg.gradient_checkpointing
        self.optimizers = make_optimizers(self.model, cfg)
        self.scaler = self.make_scaler()
        # Progress: what a checkpoint holds beside the weights
        self.step = 0
        self.seconds = 0.0
        self.skipped = 0
        self.best = None  # the evaluation with the lowest loss
        self.last = None  # the newest evaluation
        self.loss_since_log = [0.0, 0]  # loss sum and count since the last logged line
        self.rows = rows_per_step(cfg)
        self.micro_batch = cfg.batch_size  # halves when memory runs out; the batch stays the same
        # Progress that every process counts anew
        self.bad_in_a_row = 0
        self.logged = (0, 0.0)  # step and seconds of the last logged line
        # The run folder
        self.folder = run_folder(cfg)
        self.lock = None
        self.opened = False
        self.run = {}  # run.json
        self.log = RunLog(self.folder, self.rank)
        self.stop = StopSignal(self.say)

    def say(self, text: str) -> None:
        self.log.say(text)

    # ---- the loop

    def run_all_steps(self) -> dict:
        """Trains to max_steps, resuming if the folder holds a checkpoint; returns run.json."""
        try:
            self.begin()
            with self.stop, Progress(self.cfg.name, self.step, self.cfg.max_steps, self.log) as progress:
                self.train(progress)
            self.finish()
        except (TrainError, OSError, RuntimeError, MemoryError) as error:
            error = self.explained(error)
            if self.opened:
                with contextlib.suppress(OSError):
                    self.write_run(status="failed", error=str(error))
            raise error from None
        finally:
            self.end()
        return self.run

    def train(self, progress: Progress) -> None:
        """The algorithm, every step of it, from the first one that is not done yet."""
        cfg = self.cfg
        nominal = self.rows * max(1, self.tokens_per_row)  # targets of a step if no row is short
        while self.step < cfg.max_steps:
            begun = time.perf_counter()
            with float32_products(self.precision):
                lr = get_lr(self.step, *(getattr(cfg, name) for name in LR_SETTINGS))
                for optimizer in self.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                self.seed_dropout()

                # Forward and backward: gradients of the sum of losses, one micro-batch after the other
                totals = torch.zeros(3, dtype=torch.float64, device=self.device)
                try:
                    for tensors, last in self.micro_batches():
                        with self.gradient_sync(last):
                            with self.autocast():
                                loss, count = self.loss(self.net, *tensors)
                            # Times world, because gradients are averaged over processes: we want the sum
                            self.scaler.scale(loss * (self.world / nominal)).backward()
                        totals[0] += loss.detach()
                        totals[1] += count
                except (RuntimeError, MemoryError) as error:
                    self.halve_micro_batch(error)  # raises it unless that helps
                    loss = None  # its graph holds memory
                    continue

                # Scale to the true mean, clip, step
                totals[2] = self.stop.number is not None
                if self.world > 1:
                    dist.all_reduce(totals)
                loss_sum, count, stopping = totals.tolist()
                for optimizer in self.optimizers:
                    self.scaler.unscale_(optimizer)
                params = [p for p in self.model.parameters() if p.grad is not None]
                if count not in (0, nominal):
                    torch._foreach_mul_([p.grad for p in params], nominal / count)
                norm = full_tensor(nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf)).item()
                if self.is_usable(loss_sum, count, norm):
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
        rows = self.rows // self.world
        for first in range(0, rows, self.micro_batch):
            count = min(self.micro_batch, rows - first)
            tensors = self.batch(self.step, self.rank * rows + first, count)
            yield self.to_device(tensors), first + count == rows

    # ---- guards of the loop

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def seed_dropout(self) -> None:
        """Dropout draws the same numbers whether or not the run was interrupted before this step."""
        seed = np.random.SeedSequence([self.cfg.seed, self.step, self.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))

    def to_device(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.device.type == "cuda":  # pinned memory lets the copy overlap with the computation
            return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in tensors)
        return tuple(t.to(self.device) for t in tensors)

    def autocast(self):
        """Weights are cast to the dtype of activations where they are used. Autocast would keep the casts to
        the end of the pass, which is what gradient checkpointing wants to avoid.
        """
        half = self.dtype != torch.float32
        keep = not self.cfg.gradient_checkpointing
        return torch.autocast(self.device.type, self.dtype, enabled=half, cache_enabled=keep)

    def make_scaler(self) -> torch.amp.GradScaler:
        """float16's gradients underflow unless the loss is scaled up; other dtypes need no scaling."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def gradient_sync(self, last: bool):
        """With several processes: gradients are exchanged once a step, with its last micro-batch."""
        if self.sharded:
            self.net.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return self.net.no_sync()
        return contextlib.nullcontext()

    def halve_micro_batch(self, error: Exception) -> None:
        """After running out of memory: the step begins anew in smaller pieces, with the same result."""
        if not is_out_of_memory(error):
            raise error
        if self.micro_batch == 1 or self.world > 1:  # processes cannot halve it each on its own
            raise TrainError(
                f"out of memory with {self.micro_batch} sequences at a time: try a smaller --batch_size, "
                "--gradient_checkpointing, a shorter --context_length or a smaller model "
                "(`python train.py ... --plan` estimates the memory)"
            ) from None
        self.micro_batch //= 2
        self.zero_grad()
        self.say(f"out of memory: micro-batch {self.micro_batch} from now on, same batch, same result")

    def is_usable(self, loss_sum: float, count: float, norm: float) -> bool:
        """False if loss or gradient is not finite: the update is skipped. Five in a row end the run."""
        if math.isfinite(loss_sum):
            self.loss_since_log[0] += loss_sum
            self.loss_since_log[1] += int(count)
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
                f"--warmup_steps, --dtype=float32 or --qk_norm; {self.last_checkpoint()}"
            )
        return False

    def explained(self, error: Exception) -> Exception:
        """An error as the user should read it."""
        if is_out_of_memory(error):
            remedy = "try a smaller --batch_size, --context_length or model"
            return TrainError(f"out of memory: {first_line(error)}; {remedy}")
        if isinstance(error, OSError):
            where = error.filename or self.folder
            remedy = "the same command goes on when that is solved"
            return TrainError(f"cannot read or write {where}: {error.strerror or error}; {remedy}")
        return error

    # ---- evaluation and logs

    def evaluate_now(self) -> bool:
        """Runs the stage's evaluation and samples; True if this is the model to publish."""
        if self.evaluate is None:
            return False
        begun = time.perf_counter()
        self.model.eval()
        with self.autocast():
            final = self.step == self.cfg.max_steps
            metrics = self.evaluate(self.model, final)
        metrics = {k: float(v) for k, v in metrics.items()}  # state.pt may hold no numbers of numpy
        self.model.train()
        lowest = self.best is None or metrics["val_loss"] < self.best["val_loss"]
        improved = lowest or not self.keeps_best
        self.last = {"step": self.step, **metrics}
        if improved:
            self.best = self.last
        self.run["results"] = {"last": self.last, "best": self.best}
        self.log.metrics(self.last | {"eval_seconds": round(time.perf_counter() - begun, 2)})
        self.say(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if self.sample:
            self.write_samples()
        self.model.train()
        return improved

    def write_samples(self) -> None:
        self.gather_weights()
        if self.rank > 0:
            return
        with self.autocast():
            samples = self.sample(self.full_model)
        self.log.append("samples.jsonl", [{"step": self.step, **s} for s in samples])
        if samples:
            prompt = samples[0]["prompt"][-100:]
            text = samples[0]["text"][:300]
            self.say(f"  {prompt}|{text}".replace("\n", " "))

    def log_step(self, lr: float, norm: float) -> None:
        """A line of metrics.jsonl: means over the steps since the last one."""
        step_seconds = (self.seconds - self.logged[1]) / (self.step - self.logged[0])
        self.logged = (self.step, self.seconds)
        line = {
            "step": self.step,
            "loss": self.loss_since_log[0] / self.loss_since_log[1] if self.loss_since_log[1] else None,
            "learning_rate": lr,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": self.step * self.rows * self.tokens_per_row,
            "epoch": round(self.epoch(self.step), 4) if self.epoch else None,
            "tokens_per_second": round(self.rows * self.tokens_per_row / step_seconds, 1),
            "step_seconds": round(step_seconds, 4),
            "seconds": round(self.seconds, 2),
            "skipped": self.skipped,
            "peak_memory_gib": round(peak_memory(self.device) / 2**30, 3),
        }
        if peak := peak_flops(self.run["hardware"]["device"]):
            line["mfu"] = round(self.rows * self.flops_per_row / step_seconds / (peak * self.world), 4)
        routers = [module.stats for module in self.model.modules() if getattr(module, "stats", None)]
        if routers:  # mixture of experts: shares of the experts, averaged over the layers
            line["router_load"] = torch.stack([stats["load"] for stats in routers]).mean(0).tolist()
            line["dropped"] = int(sum(stats["dropped"] for stats in routers))
        self.loss_since_log = [0.0, 0]
        self.log.metrics(line)

    def write_run(self, **changes) -> None:
        self.run |= changes | {"step": self.step, "seconds": round(self.seconds, 2), "pid": os.getpid()}
        if self.run.get("status") != "running":
            del self.run["pid"]  # by which serve.py pauses a run
        self.log.write_run(self.run)

    # ---- begin and end

    def begin(self) -> None:
        """Opens the run folder: new, resumed, or refused. Then everything is ready for the next step."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # or every process would shard onto the first GPU
        if self.cfg.wandb and not importlib.util.find_spec("wandb"):
            raise TrainError('--wandb needs the package wandb: pip install -e ".[wandb]"')
        torch.set_flush_denormal(True)  # numbers near 1e-40 can slow a CPU down tenfold
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self.owns_group = True
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self.lock = lock(self.folder)
            if self.cfg.overwrite:
                remove_run(self.folder)
        self.barrier()
        if self.sharded:
            self.full_model = shard(self.model, self.device)
            self.optimizers = make_optimizers(self.model, self.cfg)
        self.resume()
        self.barrier()
        if self.world > 1 and not self.sharded:  # every process begins with the weights of rank 0
            self.net = nn.parallel.DistributedDataParallel(self.model, broadcast_buffers=False)
        self.model.train()  # from_pretrained returns a model in evaluation mode
        if self.cfg.compile is True or (self.cfg.compile == "auto" and self.device.type == "cuda"):
            self.compile()
        self.logged = (self.step, self.seconds)
        self.run = self.description() | {k: v for k, v in self.run.items() if k in ("started", "wandb")}
        if self.on_begin and self.rank == 0:
            self.on_begin()
        self.write_run()
        self.opened = True
        if self.cfg.wandb and self.rank == 0:
            self.log.open_wandb(self.cfg.wandb, self.cfg.name, self.run)

    def compile(self) -> None:
        """torch.compile, tried by one forward and backward pass; where that fails, the eager model stays."""
        eager = self.net
        self.net = torch.compile(eager)
        try:
            tensors, _ = next(self.micro_batches())
            with float32_products(self.precision), self.gradient_sync(last=False):
                with self.autocast():
                    loss, _ = self.loss(self.net, *tensors)
                loss.backward()
        except Exception as error:
            if not is_out_of_memory(error):  # the loop has a remedy for that
                self.say(f"torch.compile failed, going on without: {first_line(error)}")
                self.net = eager
        self.zero_grad()

    def description(self) -> dict:
        """run.json at the start of a run."""
        commands = ("overwrite", "plan", "measure", "list")
        settings = {k: v for k, v in asdict(self.cfg).items() if k not in commands}
        return {
            "status": "running",
            "stage": Path(sys.argv[0]).stem,
            "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "settings": settings,
            "changed": [name for name in settings if was_chosen(self.cfg, name)],
            "results": {"last": self.last, "best": self.best} if self.best else None,
            **self.about,
            "dtype": str(self.dtype).removeprefix("torch."),
            "processes": self.world,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "git": git_commit(),
            "versions": versions(),
            "hardware": hardware(self.device),
        }

    def finish(self) -> None:
        """The end of a run. It may be repeated: what a killed process has not done, the next one does."""
        self.write_run()
        if self.rank == 0:
            prune(self.folder, self.best_checkpoint(), self.step, self.cfg.keep_last)
            try:
                write_model_card(self.folder)
            except OSError as error:  # a full disk does not fail the run for it
                self.say(f"the model card was not written: {error}")
        self.write_run(status="finished")
        if self.rank == 0:
            self.tidy()

    def end(self) -> None:
        self.optimizers = []  # evaluation, which may follow, has use for their memory
        self.log.close()
        if self.lock is not None:
            os.close(self.lock)
        if self.owns_group:
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def gather_weights(self) -> None:
        """FSDP: brings the weights of `full_model` up to date. Collective: every rank must call it."""
        if self.sharded:
            gather_weights(self.model, self.full_model)

    # ---- checkpoints and exact resume
    #
    # What: checkpoints/step-N holds the model as a Hugging Face folder, and state.pt with everything else on
    # which step N + 1 depends: the optimizers' moments, float16's scale, counters, the best evaluation. There
    # is no state of a random generator or data loader: batches and dropout are functions of (seed, step,
    # rank). Shards are gathered, so any number of processes can go on from a checkpoint.
    #
    # When: every save_every steps, at a better evaluation, after Ctrl-C or SIGTERM, and at the end. A new
    # checkpoint appears under its name complete or not at all. Then the files of the best one are linked into
    # the run folder, and older ones are removed.
    #
    # How a killed run goes on: the same command finds run.json, refuses settings or data that would change
    # the result, reads the newest checkpoint that is not damaged, drops the log lines of later steps, repeats
    # whatever a kill may have left undone after saving (links, removals), and computes the next step.

    def save(self) -> None:
        self.gather_weights()
        state = self.state()
        if self.rank == 0:
            checkpoint = checkpoint_of(self.folder, self.step)
            try:
                write_folder_atomically(checkpoint, lambda folder: self.write_checkpoint(folder, state))
            except (OSError, SafetensorError) as error:
                cause = getattr(error, "strerror", None) or first_line(error)
                raise TrainError(f"cannot save {checkpoint}: {cause}; {self.last_checkpoint()}") from None
            publish(self.best_checkpoint())
            prune(self.folder, self.best_checkpoint(), self.step, self.cfg.keep_last)
            self.write_run()
        self.barrier()

    def state(self) -> dict:
        """state.pt: tensors and numbers, so that reading it runs no code. Collective if sharded."""
        over = self.step == self.cfg.max_steps and not self.cfg.save_every  # no step is left that needs them
        optimizers = [] if over else self.optimizers
        return {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "best": self.best,
            "last": self.last,
            "window": self.loss_since_log,
            "micro_batch": self.micro_batch,
            "batch": self.rows,
            "optimizers": [gather_state(o.state_dict(), keep=self.rank == 0) for o in optimizers],
            "scaler": self.scaler.state_dict(),
        }

    def write_checkpoint(self, folder: Path, state: dict) -> None:
        self.write_model(folder)
        buffer = io.BytesIO()  # torch.save itself does not pass on the disk's errors
        torch.save(state, buffer)
        write_atomically(folder / "state.pt", lambda path: path.write_bytes(buffer.getbuffer()))

    def write_model(self, folder: Path) -> None:
        model = self.full_model
        if self.tokenizer is None:
            return model.save_pretrained(folder)
        eot = self.tokenizer.eot_id
        model.save_pretrained(folder, bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)
        self.tokenizer.save(folder, context_length=model.config.context_length)

    def best_checkpoint(self) -> Path:
        """Of the best evaluation, if it was saved; else of this step."""
        best = checkpoint_of(self.folder, self.best["step"] if self.best else self.step)
        return best if best.exists() else checkpoint_of(self.folder, self.step)

    def tidy(self) -> None:
        """Removes what killed processes left, and the checkpoints of a finished run with --save_every=0."""
        remove_leftovers(self.folder)
        if self.run.get("status") == "finished" and not self.run.get("settings", {}).get("save_every"):
            remove_checkpoints(self.folder)

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
            if found and self.cfg.dtype == "auto":  # the run has its own, whatever this machine prefers
                self.dtype = getattr(torch, self.run.get("dtype", "float32"))
                self.scaler = self.make_scaler()
        if found and not any(self.load(checkpoint) for checkpoint in reversed(found)):
            raise TrainError(f"none of the checkpoints in {self.folder} can be read; --overwrite starts anew")
        if self.step:
            self.say(f"{self.folder}: resuming at step {self.step} of {self.cfg.max_steps}")
        if self.rank == 0:
            if self.step:
                publish(self.best_checkpoint())
            for name in ("metrics.jsonl", "samples.jsonl"):
                self.log.cut(name, self.step)
            self.tidy()

    def refuse_another_run(self) -> None:
        """Raises TrainError if the run in this folder was begun with other settings or on other data."""
        free = {*FREE_TO_CHANGE, *self.free_to_change}
        for name, paths in PATHS_OF_HASH.items():
            if self.about.get(name) and self.about[name] == self.run.get(name):
                free |= {*paths}
        for what, before, now in (
            ("with other settings", self.run.get("settings", {}), asdict(self.cfg) | REMOVED),
            ("on other data", self.run, self.about),
        ):
            changed = [name for name in now if name not in free and before.get(name, now[name]) != now[name]]
            if changed:
                changes = ", ".join(f"{name}: {before[name]!r} -> {now[name]!r}" for name in changed)
                raise TrainError(
                    f"{self.folder} was begun {what} ({changes}). Take that back to resume, choose another "
                    "--name, or start anew with --overwrite"
                )

    def load(self, checkpoint: Path) -> bool:
        """Takes over weights, optimizers and counters of a checkpoint; False if it cannot be read."""
        try:
            device = "cpu" if self.sharded else self.device
            state = torch.load(checkpoint / "state.pt", map_location=device, weights_only=True)
            self.read_model(checkpoint)
            if state["optimizers"] or state["step"] < self.cfg.max_steps:
                self.load_optimizers(state["optimizers"])
        except Exception as error:  # torn by a copy that was cut off, for instance
            self.say(f"cannot read {checkpoint} ({first_line(error)}); trying the one before")
            return False
        if state["batch"] != self.rows:
            raise TrainError(
                f"{self.folder} was begun with {state['batch']} sequences a step, now they would be "
                f"{self.rows}: --batch_size times --grad_accum_steps times processes must stay the same"
            )
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.skipped = state["skipped"]
        self.best = state["best"]
        self.last = state.get("last", state["best"])
        self.loss_since_log = state["window"]
        self.micro_batch = min(self.micro_batch, state["micro_batch"])
        return True

    def load_optimizers(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            for i, moments in state["state"].items():
                for name, value in moments.items():
                    moments[name] = shard_like(params[i], value)
            optimizer.load_state_dict(state)

    def read_model(self, folder: Path) -> None:
        """The inverse of `write_model`, into the model that is there."""
        saved = ModernDecoderLM.from_pretrained(folder, "cpu")
        with torch.no_grad():
            for p, value in zip(self.model.parameters(), saved.parameters(), strict=True):
                p.copy_(shard_like(p, value.to(self.device)))

    def last_checkpoint(self) -> str:
        """The end of an error message: what is left."""
        last = newest(self.folder)
        return f"the last complete checkpoint is {last}" if last else "there is no checkpoint yet"


def was_chosen(cfg, name: str) -> bool:
    """Whether a setting differs from its default, and from what follows from others, as d_ff from d_model."""
    default = next(f.default for f in fields(cfg) if f.name == name)
    if getattr(cfg, name) == default:
        return False
    try:
        return getattr(replace(cfg, **{name: default}), name) != getattr(cfg, name)
    except ValueError:  # the default does not go with the rest
        return True


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
        chosen = mine[i : i + batch_size]
        ids, targets = windows_at(tokens, chosen if len(chosen) else starts[:1], T)
        if not len(chosen):  # FSDP needs every rank in every forward pass; this one counts nothing
            targets = torch.full_like(targets, -100)
        loss, count = model(ids.to(device), targets.to(device))
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
    windows = Windows(train, T, rows_per_step(cfg), cfg.seed, cfg.order)

    def evaluate(model, final):
        wanted = cfg.final_eval_tokens if final else cfg.eval_tokens
        n = min(len(val), wanted + 1) if wanted else len(val)
        return evaluate_lm(model, val[:n], T, cfg.batch_size, val_about["bytes"] * n / len(val))

    trainer = Trainer(
        cfg,
        model,
        windows.batch,
        evaluate=evaluate,
        sample=(lambda model: sample_texts(model, tokenizer, cfg)) if cfg.sample_tokens else None,
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
    total = windows.rows * T * cfg.max_steps  # tokens
    trainer.say(
        f"{trainer.folder}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
        f"{len(train):,} tokens of {cfg.corpus}, {windows.rows * T:,} tokens a step, "
        f"{total / len(train):.2f} epochs, {str(trainer.dtype).removeprefix('torch.')} "
        f"on {hardware(trainer.device)['device']}"
    )
    if total > 4 * len(train):
        trainer.say("past some 4 epochs repeated text teaches little: more text, or fewer --max_steps")
    return trainer.run_all_steps()


def data_record(train: dict, validation: dict) -> dict:
    """What run.json records of the token files; a resumed run must have the same."""
    keys = ("source", "fingerprint", "tokens", "bytes")
    record = {key: train.get(key) for key in (*keys, "licence")}
    if "left_out" in train:  # rows without text
        record["left_out"] = train["left_out"]
    return record | {"validation": {key: validation.get(key) for key in keys}}


def sample_texts(model: ModernDecoderLM, tokenizer: Tokenizer, cfg: TrainConfig) -> list[dict]:
    """Two texts that continue the prompt, each to the end of its document."""
    eot = tokenizer.eot_id
    rows = model.generate(
        [[eot, *tokenizer.encode(cfg.sample_prompt)]], cfg.sample_tokens, temperature=0.8, top_p=0.95,
        stop_tokens=[eot], n=2, seed=cfg.seed,
    )  # fmt: skip
    texts = [tokenizer.decode([t for t in row if t != eot]) for row in rows]
    return [{"prompt": cfg.sample_prompt, "text": text} for text in texts]


def model_config(cfg: TrainConfig) -> ModelConfig:
    return ModelConfig(**{f.name: getattr(cfg, f.name) for f in fields(ModelConfig)})


def padded(vocab_size: int) -> int:
    """Rows of the embedding: a multiple of 64 suits a GPU's matrix units; no text uses the rest."""
    return 64 * math.ceil(vocab_size / 64)


def tokenizer_command(cfg: TrainConfig) -> str:
    """The command that makes the token files of these settings: the same config files, and what differs."""
    files = []
    if Path(sys.argv[0]).name == "train.py":  # not a test or a notebook
        files = [word for word in sys.argv[1:] if word.endswith(".py") and not word.startswith("-")]
    from_files = parse_config(TokenizerStageConfig, "", files)
    flags = []
    for f in fields(TokenizerConfig):
        value = getattr(cfg, f.name)
        if value != getattr(from_files, f.name):
            flags.append(f"--{f.name}={value}")
    return shlex.join(["python", "tokenizer.py", *files, *flags])


def adopt(model: ModernDecoderLM, cfg: TrainConfig, tokenizer: Tokenizer) -> None:
    """Makes --init_from's model and the settings agree: shape from the model, context and dropout from us."""
    have = model.config
    parent = Path(cfg.init_from)
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
    for name in asdict(have).keys() - {"context_length"}:
        setattr(cfg, name, getattr(have, name))


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
            report(cfg, pretrain(cfg))
    except AlreadyFinished as finished:
        report(cfg, finished.run)
        print("nothing to do: --overwrite trains it anew, --name trains another")
    except (ValueError, OSError) as error:  # TrainError and what the other files raise
        raise SystemExit(f"train.py: {error}") from None


def report(cfg: TrainConfig, run: dict) -> None:
    if int(os.environ.get("RANK", 0)) > 0:
        return
    best = (run.get("results") or {}).get("best")
    folder = Path(cfg.out) / cfg.name
    losses = f", val_loss {best['val_loss']:.4f}, {best['bits_per_byte']:.4f} bits a byte" if best else ""
    print(f"{folder}: {run['step']} steps in {run['seconds'] / 60:.1f} min{losses}; python chat.py {folder}")


if __name__ == "__main__":
    run_script(main)
