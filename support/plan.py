"""`train.py --plan`: memory, FLOPs and time of a run, before it costs anything."""

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model import ModelConfig, ModernDecoderLM, check_look_back
from support.costs import GIB, count_parameters, estimate_flops, estimate_memory
from support.kernels import fastest_products, float32_products
from support.machine import autocast, cpu_name, peak_flops, pick_device, pick_dtype
from support.processes import RANK
from support.runs import TrainError
from support.timing import matmul_flops, medians
from tokenizer import open_tokens, tokens_folder
from train import TrainConfig, TrainerConfig, make_optimizers, model_config, next_token_loss, padded


def planned_model(cfg: TrainConfig) -> ModelConfig:
    """The model that a run trains if its tokenizer reaches the vocabulary that the config asks for."""
    c = model_config(cfg)
    c.vocab_size = padded(50_261 if cfg.tokenizer == "gpt2" else c.vocab_size)
    if cfg.look_back:
        check_look_back(c)
    return c


def gpu_elsewhere(cfg) -> str:
    """The GPU of --card. With --vram alone: an RTX 3060. "": the plan is for this machine."""
    return cfg.card or ("RTX 3060" if cfg.vram else "")


def planned_gpu(cfg: TrainConfig) -> tuple[str, float]:
    """The name and GB of the GPU that the plan is for: one elsewhere, or the one here; "" and 0 for a CPU."""
    device = pick_device(cfg.device)
    gpu = gpu_elsewhere(cfg)
    if gpu or device.type != "cuda":
        return gpu, cfg.vram
    return torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory / GIB


def memory_options(cfg: TrainerConfig, on_gpu: bool) -> dict:
    """What a stage's settings are for `estimate_memory`."""
    return {
        "gradient_checkpointing": cfg.gradient_checkpointing,
        "bytes_per_activation": 2 if on_gpu and cfg.dtype != "float32" else 4,
        "muon": "muon" in cfg.optimizer,
        "compiled": bool(cfg.compile and on_gpu),
        "four_bit": getattr(cfg, "load_in_4bit", False),  # of the stages that adapt a model
    }


def usable(vram: float) -> float:
    """Of 12 GB 10.0 GiB are planned for: the rest is the driver's, the desktop's or lost between blocks."""
    return vram * 10 / 12


def largest_batch(c: ModelConfig, vram: float, options: dict, sizes: Sequence[int]) -> int:
    """The largest of the micro-batch sizes, in order, that a GPU holds by the plan; 0: none."""
    room = usable(vram) * GIB
    fitting = bisect_right(sizes, room, key=lambda size: estimate_memory(c, size, **options)["peak"])
    return sizes[fitting - 1] if fitting else 0


def fit_batch(cfg: TrainConfig) -> None:
    """--batch_size=auto: the largest micro-batch that the GPU holds by the plan; the batch stays the same.
    Without a GPU the config's own: in main memory larger ones are no faster.
    """
    _, vram = planned_gpu(cfg)
    if cfg.card and not vram:
        raise TrainError(f"--batch_size=auto needs --vram beside --card={cfg.card}")
    if vram:
        rows = cfg.batch_size * cfg.grad_accum_steps
        divisors = [b for b in range(1, rows + 1) if rows % b == 0]
        options = memory_options(cfg, on_gpu=True)
        cfg.batch_size = max(1, largest_batch(planned_model(cfg), vram, options, divisors))
        cfg.grad_accum_steps = rows // cfg.batch_size
    if RANK == 0:
        print(f"--batch_size=auto: {cfg.batch_size} sequences at a time, {cfg.grad_accum_steps} times a step")


def print_plan(cfg: TrainConfig) -> None:
    """What a run costs in parameters, memory and time: on the GPU here, or on --card or one of --vram GB."""
    if cfg.measure and (cfg.vram or cfg.card):
        raise TrainError("--measure is for the machine here: leave out --vram and --card")
    gpu, vram = planned_gpu(cfg)
    options = memory_options(cfg, on_gpu=bool(gpu))
    c = planned_model(cfg)
    n = count_parameters(c)
    total = n.pop("total")
    active = n.pop("active")
    print(f"parameters  {total / 1e6:.1f}M, {active / 1e6:.1f}M of them active in each token")
    print_parts(n, 1e6, "M")
    memory = estimate_memory(c, cfg.batch_size, **options)
    peak = memory.pop("peak") / GIB
    print(f"memory      {peak:.2f} GiB at {cfg.batch_size} x {c.context_length} tokens at a time")
    print_parts(memory, GIB, " GiB")
    if vram:
        room = usable(vram)
        largest = largest_batch(c, vram, options, range(1, 4097))
        verdict = "fits" if peak <= room else "DOES NOT FIT"
        most = f"largest micro-batch {largest}" if largest else "not even one: --gradient_checkpointing?"
        print(f"verdict     {verdict} into {vram:.0f} GB ({room:.1f} GiB planned for); {most}")
    print_time(cfg, c, gpu, total)


def print_parts(parts: dict[str, int], unit: float, name: str) -> None:
    for kind, amount in parts.items():
        print(f"  {kind:17} {amount / unit:8.2f}{name}")


def print_time(cfg: TrainConfig, c: ModelConfig, gpu: str, parameters: int) -> None:
    """Tokens of a run, and the hours that they take at a share of the peak rate, or as measured."""
    flops = estimate_flops(c)
    step = cfg.batch_size * cfg.grad_accum_steps * c.context_length
    tokens = step * cfg.max_steps
    print(f"work        {flops / 1e6:.1f} MFLOP a token, {step:,} tokens a step, {cfg.max_steps:,} steps")
    each = tokens / parameters
    print(f"            {tokens / 1e6:,.1f}M tokens, {each:.1f} a parameter (20: compute-optimal)")
    if (tokens_folder(cfg) / "train.json").exists():
        have = open_tokens(tokens_folder(cfg), "train")[1]["tokens"]
        warning = "; WARNING: past 4 epochs, repeated text teaches little" if tokens > 4 * have else ""
        print(f"            {tokens / have:.2f} epochs of {have / 1e6:.1f}M tokens{warning}")
    if gpu:
        peak = peak_flops(gpu)
        share = 0.45 if c.d_model >= 768 else 0.35  # published: compiled, bfloat16
    else:  # a small model spends half of a CPU step outside matrix products; AMX makes that share larger
        peak = matmul_flops(torch.float32)
        share = 0.5
        gpu = cpu_name()
    if peak:
        rate = peak * share / flops
        hours = tokens / rate / 3600
        of_peak = f"if {share:.0%} of {peak / 1e12:.2f} TFLOP/s are reached ({gpu})"
        print(f"time        {hours:.2f} hours: {rate:,.0f} tokens/s, {of_peak}")
    else:
        print(f"time        n/a: the peak rate of {gpu} is not known")
    if cfg.measure:
        device = pick_device(cfg.device)
        with float32_products(fastest_products(device)):
            seconds = medians({"step": Step(c, cfg, device)}, rounds=20, limit=120)["step"]
        hours = cfg.max_steps * seconds / 3600
        print(f"measured    {hours:.2f} hours: {step / seconds:,.0f} tokens/s, the median of such steps")


class Step:
    """An optimizer step of pretraining on random tokens, compiled where --compile says so. To be timed:
    call it.
    """

    def __init__(self, c: ModelConfig, cfg: TrainConfig, device: torch.device):
        self.cfg = cfg
        self.device = device
        self.dtype = pick_dtype(cfg.dtype, device)
        model = ModernDecoderLM(c).to(device).train()
        model.gradient_checkpointing = cfg.gradient_checkpointing
        self.optimizers = make_optimizers(model, cfg)
        compiled = cfg.compile is True or (cfg.compile == "auto" and device.type == "cuda")
        self.net = torch.compile(model) if compiled else model
        ids = torch.randint(c.vocab_size, (cfg.batch_size, c.context_length + 1), device=device)
        inputs = ids[:, :-1].contiguous()
        numbers = torch.zeros_like(inputs) if cfg.by_document else None
        self.batch = inputs, ids[:, 1:].contiguous(), numbers

    def forward(self) -> Tensor:
        cache = not self.cfg.gradient_checkpointing  # as in the Trainer
        with autocast(self.device, self.dtype, cache):
            total, count = next_token_loss(self.net, *self.batch)
        return total / count / self.cfg.grad_accum_steps

    def backward(self) -> None:
        self.forward().backward()

    def __call__(self) -> None:
        for _ in range(self.cfg.grad_accum_steps):
            self.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
