"""What this machine can do: measurements that the plans are compared with, and that only a GPU can give.

    python -m lab.hardware                               # minutes; out/hardware.json and a table
    python -m lab.hardware --only=memory --cap=11        # one part; on a GPU, within 11 GiB
    bash run_all.sh hardware                             # the same, and the report that shows it

`matmul`: large matrix products, in float32 and bfloat16; the shares below are of this figure, not of a data
sheet's. `memory`: peaks of training steps against `estimate_memory`, over shapes that differ in one thing
each (a CUDA GPU only). `training`: the configs' own steps, eager and, on a GPU, compiled; where a step's time
goes (there kernel by kernel), and whether the loader is ever waited for. `attention`: in blocks, as on a CPU,
beside torch's. `decoding`: ours beside transformers' generate, same weights. `peers`: what `python -m
lab.peers` measures beside transformers and, if installed, litgpt, on one thread of a CPU. `data`: megabytes
tokenised a second and core. Medians of contenders that take turns.
"""

from support.terminal import run_script

import contextlib
import gc
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count, islice, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from configs import ConfigError, parse_config
from data import documents
from lab import peers as others
from model import ModelConfig
from support.costs import GIB, estimate_flops, estimate_memory
from support.files import write_atomically
from support.hf_format import to_hf_config
from support.kernels import AttentionInBlocks, fastest_products, float32_products
from support.machine import git_commit, hardware, pick_device, pick_dtype, versions
from support.plan import Step, fit_batch, planned_for
from support.runs import read_json
from support.timing import in_turns, medians
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe
from train import TrainConfig, Windows


@dataclass
class HardwareConfig:
    """What is measured, and within what limit."""

    only: str = ""  # matmul, memory, training, attention, decoding, peers, data, by commas; nothing: all
    configs: str = ""  # whose steps are timed; the first decodes; nothing: speedrun,max3060, or cpu
    compile: bool = True  # compiled contenders, too: half a minute each to start
    cap: float = 11.0  # GiB that this process may take of a GPU, as if it had no more
    rounds: int = 8  # timed repetitions
    device: str = "auto"  # cuda, cpu, ...
    out: str = "out"  # folder that holds everything the project makes


def configs_of(cfg: HardwareConfig, device: torch.device) -> dict[str, TrainConfig]:
    """The configs by name; a name is a file of configs/ or a path."""
    found = {}
    for name in (cfg.configs or ("speedrun,max3060" if device.type == "cuda" else "cpu")).split(","):
        file = name if name.endswith(".py") else f"configs/{name}.py"
        found[Path(name).stem] = parse_config(TrainConfig, "", [file, f"--device={cfg.device}"])
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# -----------------------------------------------------------------------------
# Matrix products and memory


def matmul(cfg: HardwareConfig, device: torch.device) -> dict[str, float]:
    """FLOP/s of a large matrix product by data type (float32 on a GPU: TF32); the best of the rounds."""
    found = {}
    default = torch.get_float32_matmul_precision()
    fastest = fastest_products(device)
    for dtype in dict.fromkeys([torch.float32, torch.bfloat16, pick_dtype("auto", device)]):
        n = (
            8192 if device.type == "cuda" else 1536 if dtype == torch.float32 else 512
        )  # a CPU may emulate bfloat16
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        ways = {name_of(dtype): fastest}
        if dtype == torch.float32 and default != fastest:
            ways = {"float32 as torch comes": default} | ways
        for way, precision in ways.items():
            with float32_products(precision):
                seconds = in_turns({way: partial(torch.mm, a, b)}, cfg.rounds)[way]
            found[way] = 2 * n**3 / min(seconds)
    rates = (f"{way} {rate / 1e12:.3g} TFLOP/s" for way, rate in found.items())
    print(f"matmul  {', '.join(rates)}", flush=True)
    return found


BASE = dict(vocab_size=32_768, n_layers=14, d_model=768, n_heads=12, n_kv_heads=4, d_ff=2048)
SMALL = dict(vocab_size=8192, context_length=512, n_layers=8, d_model=512, n_heads=8, d_ff=1408)
GPT2 = dict(vocab_size=50_304, n_kv_heads=12, d_ff=3072, norm="layer", ffn="gelu", positions="learned")
MEMORY = {  # name: rows, what differs from max3060's model, and what from its settings
    "max3060, 16 rows": (16, {}, {}),
    "max3060, 8 rows": (8, {}, {}),
    "as many key-value heads as heads": (8, dict(n_kv_heads=12), {}),
    "gradient checkpointing": (16, {}, dict(gradient_checkpointing=True)),
    "compiled": (16, {}, dict(compile=True)),
    "compiled, checkpointing": (16, {}, dict(compile=True, gradient_checkpointing=True)),
    "4,096 tokens": (4, dict(context_length=4096), {}),
    "GPT-2's parts and vocabulary": (8, GPT2, {}),
    "4 experts, 2 a token": (8, dict(ffn="moe", n_experts=4, experts_per_token=2, d_ff=1024), {}),
    "8 layers of 512, 64 rows of 512": (64, SMALL, {}),
    "Muon": (16, {}, dict(optimizer="muon")),
}


def memory(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Peak bytes of a training step against the plan, which without its overhead should be what the allocator
    was asked for.
    """
    if device.type != "cuda":
        print("memory: needs a CUDA GPU, whose allocator counts bytes")
        return []
    rows = []
    for name, (batch, shape, settings) in MEMORY.items():
        train = TrainConfig(batch_size=batch, grad_accum_steps=2, **settings)
        c = ModelConfig(**(BASE | dict(context_length=1024) | shape))
        compiled = train.compile is True
        plan = estimate_memory(
            c, batch, gradient_checkpointing=train.gradient_checkpointing, compiled=compiled,
            muon=train.optimizer == "muon",
        )  # fmt: skip
        row = {"shape": name, "rows": batch, "planned": plan["peak"] - plan["overhead"], "plan": plan["peak"]}
        free_memory(device)
        try:
            in_turns({name: Step(c, train, device, compiled)}, rounds=1)
            row |= {
                "measured": torch.cuda.max_memory_allocated(),
                "reserved": torch.cuda.max_memory_reserved(),
            }
            gap = f"off by {row['planned'] / row['measured'] - 1:+.1%}"
        except torch.OutOfMemoryError:
            gap = row["error"] = f"out of memory within {cfg.cap} GiB"
        rows.append(row)
        print(f"memory  {name:34} planned {row['planned'] / GIB:6.2f} GiB, {gap}", flush=True)
    free_memory(device)
    return rows


# -----------------------------------------------------------------------------
# Training steps

KERNELS = {  # what a kernel does, by its name; the first that fits
    "attention": r"flash|fmha|attention|cudnn_generated",
    "matrix products": r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitK",
    "optimizer": r"multi_tensor_apply|foreach|adam|l2norm|LpNorm",
    "copies between host and card": r"Memcpy|Memset",
    "fused by torch.compile": r"^triton",
    "elementwise, rest": "",
}


def kernels(step: Callable, seconds: float, steps: int = 3) -> dict[str, float]:
    """Seconds of a step by what the GPU did; and for how much of the `seconds` that it takes, nothing."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        in_turns({"step": step}, rounds=1, warmup=0, calls=steps)
    found: dict[str, float] = {}
    for event in watched.key_averages():
        if event.self_device_time_total:
            kind = next(kind for kind, names in KERNELS.items() if re.search(names, event.key))
            found[kind] = found.get(kind, 0.0) + event.self_device_time_total / 1e6 / steps
    found = dict(sorted(found.items(), key=lambda item: -item[1]))
    return found | {"nothing": max(0.0, seconds - sum(found.values()))}


@contextlib.contextmanager
def batches_from_a_file(c: ModelConfig, rows: int, device: torch.device):
    """A function that reads the next batch of random tokens from a file as large as an epoch of anything."""
    with tempfile.TemporaryDirectory() as folder:
        file = np.memmap(f"{folder}/tokens.bin", np.uint16, "w+", shape=20_000_000)
        file[:] = np.random.default_rng(0).integers(0, c.vocab_size, len(file), dtype=np.uint16)
        windows = Windows(file, c.context_length, rows, 1)
        steps = count()

        def batch() -> tuple[torch.Tensor, ...]:
            tensors = windows.batch(next(steps), 0, rows)
            if device.type != "cuda":
                return tensors
            return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)

        yield batch


def training(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Steps of the configs: tokens/s eager and compiled, their share of the measured matrix product, and what
    forward, backward and update take; the same with batches from a token file instead of one that is there.
    """
    peak = matmul(cfg, device)[name_of(pick_dtype("auto", device))]
    return [training_of(name, train, cfg, device, peak) for name, train in configs_of(cfg, device).items()]


def training_of(
    name: str, train: TrainConfig, cfg: HardwareConfig, device: torch.device, peak: float
) -> dict:
    cuda = device.type == "cuda"
    train.compile = False  # what runs first has to fit, too
    if cuda:
        train.vram = min(torch.cuda.get_device_properties(device).total_memory / GIB, cfg.cap * 12 / 11)
        fit_batch(train)
    c = planned_for(train)[0]
    row = {"config": name, "rows": train.batch_size, "optimizer": train.optimizer, "seconds": {}}
    calls = max(1, 4 // train.grad_accum_steps) if cuda else 1  # a GPU gets the next step while it does one
    with batches_from_a_file(c, train.batch_size, device) as batch:
        for way in ("eager", "compiled") if cuda and cfg.compile else ("eager",):
            free_memory(device)
            step = Step(c, train, device, compiled=way == "compiled")
            runs = {way: step, f"{way}, batches from a file": partial(step, batch)}
            if not cuda:  # a GPU's kernels tell more, below
                runs |= {"forward": step.forward, "forward and backward": partial(forward_and_backward, step)}
            with float32_products(fastest_products(device)):
                row["seconds"] |= medians(runs, cfg.rounds, calls=calls)
            if cuda:
                row.setdefault("peak_memory", {})[way] = torch.cuda.max_memory_allocated()
                row.setdefault("kernels", {})[way] = kernels(step, row["seconds"][way])
            del step, runs
    tokens = train.batch_size * train.grad_accum_steps * c.context_length
    rates = {way: tokens / s for way, s in row["seconds"].items() if "forward" not in way}
    shares = {way: rate * estimate_flops(c) / peak for way, rate in rates.items()}
    for way, rate in rates.items():
        print(f"training  {name}, {way:28} {rate:10,.0f} tok/s  {shares[way]:.0%} of matmul", flush=True)
    for way, found in row.get("kernels", {}).items():
        parts = ", ".join(f"{kind} {1000 * s:.1f}" for kind, s in found.items())
        print(
            f"training  {name}, {way}: {row['peak_memory'][way] / GIB:.2f} GiB; ms of a step: {parts}",
            flush=True,
        )
    return row | {"tokens_per_second": rates, "share_of_matmul": shares}


def forward_and_backward(step: Step) -> None:
    step.forward().backward()


# -----------------------------------------------------------------------------
# Attention, decoding, the tokenizer


def attention(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Milliseconds of attention, forward and backward, in blocks and by torch, as it comes; a CPU only."""
    shapes = (16, 4, 2, 256, 32), (16, 6, 6, 256, 48), (4, 8, 4, 1024, 64)
    rows = []
    dtypes = dict.fromkeys([torch.float32, pick_dtype("auto", device)])
    for dtype, (B, H, K, T, D) in product(dtypes, shapes) if device.type == "cpu" else ():
        q, k, v = (
            torch.randn(B, T, n, D, dtype=dtype, requires_grad=True).transpose(1, 2) for n in (H, K, K)
        )
        torchs = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=H != K)
        contenders = {
            "torch": partial(both_ways, torchs, torch.get_float32_matmul_precision()),
            "in blocks": partial(
                both_ways, partial(AttentionInBlocks.apply, q, k, v), fastest_products(device)
            ),
        }
        ms = {who: 1000 * s for who, s in medians(contenders, cfg.rounds).items()}
        shape = f"{B} rows of {T}, {H} heads of {D}, {K} key heads, {name_of(dtype)}"
        rows.append({"shape": shape, "milliseconds": ms})
        print(f"attention  {shape}: torch {ms['torch']:.1f} ms, in blocks {ms['in blocks']:.1f} ms, "
              f"{ms['torch'] / ms['in blocks']:.1f}x", flush=True)  # fmt: skip
    return rows


def both_ways(forward: Callable, precision: str) -> None:
    with float32_products(precision):
        y = forward()
        y.backward(torch.ones_like(y))


def decoding(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Tokens a second of ours and of transformers' generate, same weights: one row and many, greedy, and many
    answers to one prompt, as a verifier wants them.
    """
    c = planned_for(next(iter(configs_of(cfg, device).values())))[0]
    if to_hf_config(c)["architectures"] != ["LlamaForCausalLM"]:
        print("decoding: the first of --configs is no Llama, which is what is compared here")
        return []
    new, rows, dtype = (256, 64, torch.bfloat16) if device.type == "cuda" else (128, 16, torch.float32)
    new = min(new, c.context_length - 32)
    ids = torch.randint(1, c.vocab_size, (rows, 32), device=device)  # 0 would count as padding
    tasks = {
        "1 row": (ids[:1], 1),
        f"{rows} rows": (ids, 1),
        f"{rows} answers to one prompt": (ids[:1], rows),
    }
    rates = others.decoding_rates(c, tasks, new, dtype, cfg.compile, max(2, cfg.rounds // 2))
    return [{"task": task, "new_tokens": new, "tokens_per_second": who} for task, who in rates.items()]


def data(cfg: HardwareConfig, device: torch.device) -> dict:
    """Megabytes of text that one core encodes a second, and what TinyStories' 2.2 GB take at that rate."""
    texts = list(islice(documents("storyworld", "train"), 3000))
    tokenizer = Tokenizer(*train_bpe(texts, 8192, SPECIAL_TOKENS), SPECIAL_TOKENS)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def encode() -> None:
        for text in texts:
            tokenizer.encode(text)

    rate = megabytes / medians({"encode": encode}, cfg.rounds)["encode"]
    print(f"data  {rate:.1f} MB/s a core; TinyStories' 2.2 GB on 12 cores: {2200 / rate / 12 / 60:.1f} min")
    return {"encoded_mb_per_second_and_core": rate, "sample_mb": megabytes}


def peers(cfg: HardwareConfig, device: torch.device) -> dict:
    """A training step and decoding in the shape of lab/peers.py, on one thread, ours and others'."""
    if device.type == "cuda":
        print("peers: on a CPU only; on a GPU `decoding` compares")
        return {}
    settings = others.PeersConfig(device=cfg.device, compile=cfg.compile)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"step": others.training_step(settings), "decoding": others.decoding(settings)}
    finally:
        torch.set_num_threads(threads)


# -----------------------------------------------------------------------------

PARTS = {"matmul": matmul, "memory": memory, "training": training, "attention": attention}
PARTS |= {"decoding": decoding, "peers": peers, "data": data}


def measure(cfg: HardwareConfig) -> dict:
    """Runs the parts and adds them to {out}/hardware.json, where parts of other calls stay."""
    device = pick_device(cfg.device)
    wanted = [w for w in cfg.only.split(",") if w] or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        raise ConfigError(f"--only={','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cfg.cap * GIB / total), device)
    torch.set_flush_denormal(True)
    about = {"hardware": hardware(device), "versions": versions(), "git": git_commit(), "cap_gib": cfg.cap}
    print(f"{about['hardware']['device']}, {about['hardware']['threads']} threads")
    file = Path(cfg.out) / "hardware.json"
    found = {}
    with contextlib.suppress(OSError, ValueError):
        found = read_json(file)
    if found.get("hardware") != about["hardware"]:  # another machine's figures are not this one's
        found = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    for part in wanted:
        found |= {part: PARTS[part](cfg, device)} | about
        text = json.dumps(found, indent=1) + "\n"
        write_atomically(file, lambda path, text=text: path.write_text(text))
    print(file)
    return found


def main() -> None:
    try:
        measure(parse_config(HardwareConfig, __doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"lab.hardware: {error}") from None


if __name__ == "__main__":
    run_script(main)
