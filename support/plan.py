"""`train.py --plan`: memory, FLOPs and time of a run, before it costs anything."""

import contextlib
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from model import ModelConfig, ModernDecoderLM
from support.costs import count_parameters, estimate_flops, estimate_memory
from support.kernels import fastest_products, float32_products
from support.machine import cpu_name, matmul_flops, peak_flops, pick_device, pick_dtype
from support.runs import TrainError
from tokenizer import open_tokens, tokens_folder
from train import TrainConfig, make_optimizers, model_config, padded


def planned_for(cfg: TrainConfig) -> tuple[ModelConfig, str, float, dict]:
    """The model, the card (its name and GiB: the one here, --card, one of --vram GB, or none), and how memory
    is to be estimated there.
    """
    c, device = model_config(cfg), pick_device(cfg.device)
    c.vocab_size = padded(50_261 if cfg.tokenizer == "gpt2" else c.vocab_size)
    here = device.type == "cuda" and not (cfg.vram or cfg.card)
    card = torch.cuda.get_device_name(device) if here else cfg.card or ("RTX 3060" if cfg.vram else "")
    vram = torch.cuda.get_device_properties(device).total_memory / 2**30 if here else cfg.vram
    on_cpu = not (card or vram)
    options = {
        "gradient_checkpointing": cfg.gradient_checkpointing,
        "bytes_per_activation": 4 if on_cpu or cfg.dtype == "float32" else 2,
        "muon": cfg.optimizer == "muon",
        "compiled": bool(cfg.compile) and not on_cpu,
    }
    return c, card, vram, options


def usable(vram: float) -> float:
    """Of 12 GB 10.0 GiB are planned for: the rest is the driver's, the desktop's or lost between blocks."""
    return vram * 10 / 12


def fit_batch(cfg: TrainConfig) -> None:
    """--batch_size=auto: the largest micro-batch that the card holds by the plan; the batch stays the same.
    Without a card the config's own: in main memory larger ones are no faster.
    """
    c, _, vram, options = planned_for(cfg)
    rows = cfg.batch_size * cfg.grad_accum_steps
    if cfg.card and not vram:
        raise TrainError(f"--batch_size=auto needs --vram beside --card={cfg.card}")
    if vram:
        room = usable(vram) * 2**30
        fits = [b for b in range(1, rows + 1)
                if rows % b == 0 and estimate_memory(c, b, **options)["peak"] <= room]  # fmt: skip
        cfg.batch_size = max(fits, default=1)
        cfg.grad_accum_steps = rows // cfg.batch_size
    if not int(os.environ.get("RANK", 0)):
        print(f"--batch_size=auto: {cfg.batch_size} sequences at a time, {cfg.grad_accum_steps} times a step")


def print_plan(cfg: TrainConfig) -> None:
    """What a run costs in parameters, memory and time: on the card here, or on --card or one of --vram GB."""
    c, card, vram, options = planned_for(cfg)
    gib, on_cpu = 2**30, not (card or vram)
    n, flops = count_parameters(c), estimate_flops(c)
    memory = estimate_memory(c, cfg.batch_size, **options)
    active = f", {n['active'] / 1e6:.1f}M of them active" if c.ffn == "moe" else ""
    print(f"parameters  {n['total'] / 1e6:.1f}M{active}")
    for kind, count in n.items():
        if kind not in ("total", "active") and count:
            print(f"  {kind:17} {count / 1e6:8.2f}M")
    shape = f"{cfg.batch_size} x {c.context_length}"
    print(f"memory      {memory['peak'] / gib:.2f} GiB at {shape} tokens at a time")
    for kind, size in memory.items():
        if kind != "peak":
            print(f"  {kind:17} {size / gib:8.2f} GiB")
    if vram:
        room = usable(vram)
        fits = [b for b in range(1, 4097) if estimate_memory(c, b, **options)["peak"] / gib <= room]
        verdict = "fits" if memory["peak"] / gib <= room else "DOES NOT FIT"
        largest = (
            f"largest micro-batch {fits[-1]}" if fits else "not even one sequence: --gradient_checkpointing?"
        )
        print(f"verdict     {verdict} into {vram:.0f} GB ({room:.1f} GiB planned for); {largest}")
    step = cfg.batch_size * cfg.grad_accum_steps * c.context_length
    total = step * cfg.max_steps
    print(f"work        {flops / 1e6:.1f} MFLOP a token, {step:,} tokens a step, {cfg.max_steps:,} steps")
    each = total / n["total"]
    print(f"            {total / 1e6:,.1f}M tokens, {each:.1f} a parameter (20: compute-optimal)")
    with contextlib.suppress(Exception):  # the token files need not be there yet
        have = open_tokens(tokens_folder(cfg), "train")[1]["tokens"]
        warning = "; WARNING: past 4 epochs, repeated text teaches little" if total > 4 * have else ""
        print(f"            {total / have:.2f} epochs of {have / 1e6:.1f}M tokens{warning}")
    peak, share = peak_flops(card), 0.45 if c.d_model >= 768 else 0.35  # published: compiled, bfloat16
    if on_cpu:
        # A small model spends half of a CPU step outside matrix products; AMX only makes that share larger.
        peak, share, card = matmul_flops(torch.float32), 0.5, cpu_name()
    if peak:
        rate = peak * share / flops
        print(f"time        {total / rate / 3600:.2f} hours: {rate:,.0f} tokens/s,", end=" ")
        print(f"if {share:.0%} of {peak / 1e12:.2f} TFLOP/s are reached ({card})")
    else:
        print(f"time        n/a: the peak rate of {card or 'this card'} is not known")
    if cfg.measure:
        if cfg.vram or cfg.card:
            raise TrainError("--measure is for the machine here: leave out --vram and --card")
        rate = measured_rate(cfg, c)
        print(f"measured    {total / rate / 3600:.2f} hours: {rate:,.0f} tokens/s, the median of such steps")


class Step:
    """A step of training, for whoever wants to know what it takes: call it. Of pretraining on random tokens,
    if there is no other loss of a model and a batch.
    """

    def __init__(
        self, c: ModelConfig, cfg: TrainConfig, device: torch.device, compiled: bool = False,
        loss: Callable = lambda net, *batch: net(*batch), batch: tuple[Tensor, ...] = (),
    ):  # fmt: skip
        self.device, self.dtype, self.times = device, pick_dtype(cfg.dtype, device), cfg.grad_accum_steps
        self.model = ModernDecoderLM(c).to(device).train()
        self.model.gradient_checkpointing = cfg.gradient_checkpointing
        half = self.dtype != torch.float32
        self.autocast = dict(enabled=half, cache_enabled=not cfg.gradient_checkpointing)
        self.optimizers = make_optimizers(self.model, cfg)
        self.net = torch.compile(self.model) if compiled else self.model
        rows = torch.randint(c.vocab_size, (cfg.batch_size, c.context_length + 1), device=device)
        self.loss = loss
        self.batch = batch or (rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def forward(self, batch: tuple | None = None) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, **self.autocast):
            total, count = self.loss(self.net, *(batch or self.batch))
        return total / count

    def __call__(self, batches: Callable[[], tuple] | None = None) -> None:
        for _ in range(self.times):
            (self.forward(batches() if batches else None) / self.times).backward()
        self.update()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def measured_rate(cfg: TrainConfig, c: ModelConfig, steps: int = 20, seconds: float = 120) -> float:
    """Tokens a second of a run's own steps on this machine: the median of so many, or of as many as can be
    done in so many seconds, behind two that compile and allocate.
    """
    device, times = pick_device(cfg.device), []
    step = Step(c, cfg, device, cfg.compile is True or (cfg.compile == "auto" and device.type == "cuda"))
    started = time.perf_counter()
    while len(times) < steps + 2 and (len(times) < 3 or time.perf_counter() - started < seconds):
        begun = time.perf_counter()
        with float32_products(fastest_products(device)):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return cfg.batch_size * cfg.grad_accum_steps * c.context_length / float(np.median(times[2:]))
