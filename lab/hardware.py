"""What this machine can do, measured: what the plans are held against, and what only a card can show.

    python -m lab.hardware                               # minutes; out/hardware.json and a table
    python -m lab.hardware --only=memory --cap=11        # one part; on a card, within 11 GiB
    bash run_all.sh hardware                         # the same, and the report that shows it

`matmul`: what large matrix products reach, in float32 and bfloat16; the shares below are of this figure, not
of a data sheet's. `memory`: peaks of training steps against `estimate_memory`, over shapes that differ in one
thing each (a CUDA card only). `training`: the configs' own steps, eager and, on a card, compiled, where a
step's time goes (there kernel by kernel), and whether the loader is ever waited for. `attention`: in blocks,
as model.py computes it on a CPU, beside torch's. `decoding`: ours beside transformers' generate, same
weights. `peers`: what `python -m lab.peers` measures beside transformers and, if installed,
litgpt, on one thread of a CPU. `data`: megabytes tokenised a second and core. Medians; what is compared is
interleaved.
"""

from support.terminal import run_script

import contextlib
import copy
import gc
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from configs import ConfigError, parse_config
from data import documents
from lab.peers import PeersConfig, training_step
from lab.peers import decoding as decoding_benchmark
from model import ModelConfig, ModernDecoderLM
from support.costs import estimate_flops, estimate_memory
from support.files import write_atomically
from support.hf_format import to_hf_config, to_hf_tensors
from support.kernels import AttentionInBlocks, fastest_products, float32_products
from support.machine import git_commit, hardware, pick_device, pick_dtype, versions
from support.plan import Step, fit_batch, planned_for
from support.runs import read_json
from tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe
from train import TrainConfig, Windows

GIB = 2**30


@dataclass
class HardwareConfig:
    """What is measured, and within what limit."""

    only: str = ""  # matmul, memory, training, attention, decoding, peers, data, by commas; nothing: all
    configs: str = ""  # whose steps are timed; the first decodes; nothing: speedrun,max3060, or cpu
    compile: bool = True  # compiled contenders, too: half a minute each to start
    cap: float = 11.0  # GiB that this process may take of a card, as if it had no more
    rounds: int = 8  # timed repetitions
    device: str = "auto"  # cuda, cpu, ...
    out: str = "out"  # folder that holds everything the project makes


def timed(run: Callable, device: torch.device) -> float:
    """Seconds that `run()` takes; a card has to have finished."""
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def repeat(run: Callable, times: int) -> None:
    for _ in range(times):
        run()  # what it returns, a loss with its graph, may not outlive it


def in_turns(
    contenders: dict[str, Callable], rounds: int, device: torch.device, calls: int = 1
) -> dict[str, float]:
    """Median seconds of a call of each, `calls` in a row; in turns, so that nobody has the slow minute. The
    first two turns warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 2):
        for name, run in contenders.items():
            seconds = timed(lambda run=run: repeat(run, calls), device) / calls
            if i > 1:
                times[name].append(seconds)
    return {name: statistics.median(x) for name, x in times.items()}


KERNELS = {  # what a kernel does, told by its name; the first that fits
    "attention": r"flash|fmha|attention|cudnn_generated",
    "matrix products": r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitK",
    "optimizer": r"multi_tensor_apply|foreach|adam|l2norm|LpNorm",
    "copies between host and card": r"Memcpy|Memset",
    "fused by torch.compile": r"^triton",
}


def kernels(step: Callable, seconds: float, steps: int = 3) -> dict[str, float]:
    """Seconds of a step by what the card did; and for how much of the `seconds` that it takes, nothing."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        repeat(step, steps)
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in watched.key_averages():
        if took := event.self_device_time_total / 1e6 / steps:
            kind = next(
                (k for k, names in KERNELS.items() if re.search(names, event.key)), "elementwise, rest"
            )
            found[kind] = found.get(kind, 0.0) + took
    found = dict(sorted(found.items(), key=lambda item: -item[1]))
    return found | {"nothing": max(0.0, seconds - sum(found.values()))}


def chosen(cfg: HardwareConfig, device: torch.device) -> dict[str, TrainConfig]:
    """The configs by name; a name is a file of configs/ or a path."""
    names = cfg.configs or ("speedrun,max3060" if device.type == "cuda" else "cpu")
    files = {Path(n).stem: n if n.endswith(".py") else f"configs/{n}.py" for n in names.split(",")}
    return {n: parse_config(TrainConfig, "", [file, f"--device={cfg.device}"]) for n, file in files.items()}


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# -----------------------------------------------------------------------------
# Parts


def matmul(cfg: HardwareConfig, device: torch.device) -> dict[str, float]:
    """FLOP/s of a large matrix product by data type (float32 on a card: TF32); the best of the rounds."""
    found, cuda = {}, device.type == "cuda"
    for dtype in dict.fromkeys([torch.float32, torch.bfloat16, pick_dtype("auto", device)]):
        n = 8192 if cuda else 1536 if dtype == torch.float32 else 512  # a CPU may have to emulate bfloat16
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        name, default = str(dtype).removeprefix("torch."), torch.get_float32_matmul_precision()
        ways = {f"{name} as torch comes": default, name: fastest_products(device)}
        for way, precision in ways.items():
            if way == name or (dtype == torch.float32 and precision != ways[name]):
                with float32_products(precision):
                    seconds = [timed(lambda a=a, b=b: a @ b, device) for _ in range(cfg.rounds)]
                found[way] = 2 * n**3 / min(seconds)
    return found


BASE = dict(
    vocab_size=32_768, context_length=1024, n_layers=14, d_model=768, n_heads=12, n_kv_heads=4, d_ff=2048
)
MEMORY = {  # name: what differs from max3060's model, rows, settings
    "max3060, 16 rows": ({}, 16, {}),
    "max3060, 8 rows": ({}, 8, {}),
    "as many key-value heads as heads": (dict(n_kv_heads=12), 8, {}),
    "gradient checkpointing": ({}, 16, dict(gradient_checkpointing=True)),
    "compiled": ({}, 16, dict(compile=True)),
    "compiled, checkpointing": ({}, 16, dict(compile=True, gradient_checkpointing=True)),
    "4,096 tokens": (dict(context_length=4096), 4, {}),
    "GPT-2's parts and vocabulary": (
        dict(vocab_size=50_304, n_kv_heads=12, d_ff=3072, norm="layer", ffn="gelu", positions="learned"),
        8, {},
    ),
    "4 experts, 2 a token": (dict(ffn="moe", n_experts=4, experts_per_token=2, d_ff=1024), 8, {}),
    "8 layers of 512, 64 rows of 512": (
        dict(vocab_size=8192, context_length=512, n_layers=8, d_model=512, n_heads=8, d_ff=1408), 64, {},
    ),
    "Muon": ({}, 16, dict(optimizer="muon")),
}  # fmt: skip


def memory(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Peak bytes of a training step against the plan, which without its overhead (CUDA's context, and what
    is lost between blocks) should be what the allocator was asked for.
    """
    if device.type != "cuda":
        print("memory: needs a CUDA card, whose allocator counts bytes")
        return []
    rows = []
    for name, (shape, batch, settings) in MEMORY.items():
        train = replace(TrainConfig(), batch_size=batch, grad_accum_steps=2, **settings)
        c = ModelConfig(**(BASE | shape))
        options = {"gradient_checkpointing": train.gradient_checkpointing, "compiled": train.compile is True}
        options["muon"] = train.optimizer == "muon"
        plan = estimate_memory(c, batch, **options)
        row = {"shape": name, "rows": batch, "planned": plan["peak"] - plan["overhead"], "plan": plan["peak"]}
        free(device)
        try:
            step = Step(c, train, device, train.compile is True)
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            row["measured"] = torch.cuda.max_memory_allocated()
            row["reserved"] = torch.cuda.max_memory_reserved()
        except torch.OutOfMemoryError:
            row["error"] = f"out of memory within {cfg.cap} GiB"
        step = None
        rows.append(row)
        gap = f"off by {row['planned'] / row['measured'] - 1:+.1%}" if "measured" in row else row["error"]
        print(f"memory  {name:34} planned {row['planned'] / GIB:6.2f} GiB, {gap}", flush=True)
    free(device)
    return rows


def training(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Steps of the configs: tokens/s eager and compiled, their share of the measured matrix product, and what
    forward, backward and update take; the same with batches from a token file instead of one that is there.
    """
    cuda, dtype = device.type == "cuda", pick_dtype("auto", device)
    peak = matmul(cfg, device)[str(dtype).removeprefix("torch.")]
    rows = []
    for name, train in chosen(cfg, device).items():
        train.compile = False  # what runs first has to fit, too
        if cuda:
            train.vram = min(torch.cuda.get_device_properties(device).total_memory / GIB, cfg.cap * 12 / 11)
            fit_batch(train)
        c = planned_for(train)[0]
        row = {"config": name, "rows": train.batch_size, "optimizer": train.optimizer, "seconds": {}}
        calls = max(1, 4 // train.grad_accum_steps) if cuda else 1  # it is given the next while it does one
        with tempfile.TemporaryDirectory() as folder:  # a file of the size of an epoch of anything
            file = np.memmap(f"{folder}/tokens.bin", np.uint16, "w+", shape=20_000_000)
            file[:] = np.random.default_rng(0).integers(0, c.vocab_size, len(file), dtype=np.uint16)
            windows, drawn = Windows(file, c.context_length, train.batch_size, 1), iter(range(10**9))

            def batch(windows=windows, drawn=drawn, n=train.batch_size):
                found = windows.batch(next(drawn), 0, n)
                return tuple(t.pin_memory().to(device, non_blocking=True) for t in found) if cuda else found

            for way in ("eager", "compiled") if cuda and cfg.compile else ("eager",):
                free(device)
                step = Step(c, train, device, compiled=way == "compiled")
                runs = {way: step, f"{way}, batches from a file": lambda s=step, b=batch: s(b)}
                if way == "eager" and not cuda:  # a card's kernels tell more, below
                    runs["forward"] = step.forward
                    runs["forward and backward"] = lambda step=step: step.forward().backward()
                with float32_products(fastest_products(device)):
                    row["seconds"] |= in_turns(runs, cfg.rounds, device, calls)
                if cuda:
                    row.setdefault("peak_memory", {})[way] = torch.cuda.max_memory_allocated()
                    row.setdefault("kernels", {})[way] = kernels(step, row["seconds"][way])
                step = runs = None
        tokens, flops = train.batch_size * train.grad_accum_steps * c.context_length, estimate_flops(c)
        took = {way: s for way, s in row["seconds"].items() if "forward" not in way}
        row["tokens_per_second"] = {way: tokens / s for way, s in took.items()}
        row["share_of_matmul"] = {way: flops * tokens / s / peak for way, s in took.items()}
        rows.append(row)
        for way, rate in row["tokens_per_second"].items():
            share = row["share_of_matmul"][way]
            print(f"training  {name}, {way:28} {rate:10,.0f} tok/s  {share:.0%} of matmul", flush=True)
        for way, found in row.get("kernels", {}).items():
            told = ", ".join(f"{kind} {1000 * s:.1f}" for kind, s in found.items())
            peak_memory = row["peak_memory"][way] / GIB
            print(f"training  {name}, {way}: {peak_memory:.2f} GiB; ms of a step: {told}", flush=True)
    return rows


def attention(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Milliseconds of attention, forward and backward, in blocks and by torch, as it comes; a CPU only."""
    if device.type != "cpu":
        return []
    rows, dtypes = [], dict.fromkeys([torch.float32, pick_dtype("auto", device)])
    shapes = (16, 4, 2, 256, 32), (16, 6, 6, 256, 48), (4, 8, 4, 1024, 64)
    for dtype, (B, H, K, T, D) in product(dtypes, shapes):
        q, k, v = (torch.randn(B, T, n, D, dtype=dtype, requires_grad=True) for n in (H, K, K))

        def qkv(q=q, k=k, v=v):
            return [t.transpose(1, 2) for t in (q, k, v)]

        def torchs(qkv=qkv, grouped=H != K):
            y = F.scaled_dot_product_attention(*qkv(), is_causal=True, enable_gqa=grouped)
            y.backward(torch.ones_like(y))

        def blocks(qkv=qkv):
            with float32_products(fastest_products(device)):
                y = AttentionInBlocks.apply(*qkv())
                y.backward(torch.ones_like(y))

        took = in_turns({"torch": torchs, "in blocks": blocks}, cfg.rounds, device)
        shape = f"{B} rows of {T}, {H} heads of {D}, {K} key heads, {str(dtype).removeprefix('torch.')}"
        rows.append({"shape": shape, "milliseconds": {who: 1000 * s for who, s in took.items()}})
        told = ", ".join(f"{who} {1000 * s:.1f} ms" for who, s in took.items())
        print(f"attention  {shape}: {told}, {took['torch'] / took['in blocks']:.1f}x", flush=True)
    return rows


def decoding(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Tokens a second of ours and of transformers' generate, on a card with a static cache that it compiles;
    same weights. Greedy, one row and many; and many answers to one prompt, as a verifier wants them.
    """
    import transformers

    cuda = device.type == "cuda"
    c = planned_for(next(iter(chosen(cfg, device).values())))[0]
    if to_hf_config(c)["architectures"] != ["LlamaForCausalLM"]:
        print("decoding: the first of --configs is no Llama, which is what is compared here")
        return []
    dtype, rows = (torch.bfloat16, 64) if cuda else (torch.float32, 16)
    new = min(256 if cuda else 128, c.context_length - 32)
    ours = ModernDecoderLM(c).to(device, dtype).eval()
    keys = {k: v for k, v in to_hf_config(c).items() if k not in ("architectures", "model_type", "dtype")}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys)).eval()
    theirs.load_state_dict(to_hf_tensors(c, ours.state_dict()), strict=False)  # the head is the embedding
    theirs.to(device, dtype)
    plain = dict(max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=None)
    plain |= dict(cache_implementation="static") if cuda else {}
    greedy = transformers.GenerationConfig(do_sample=False, **plain)
    drawn = transformers.GenerationConfig(do_sample=True, num_return_sequences=rows, top_k=0, **plain)
    ids = torch.randint(1, c.vocab_size, (rows, 32), device=device)  # 0 would count as padding
    tasks = {
        "1 row": (ids[:1], dict(temperature=0.0), greedy),
        f"{rows} rows": (ids, dict(temperature=0.0), greedy),
        f"{rows} answers to one prompt": (ids[:1], dict(temperature=1.0, n=rows), drawn),
    }
    found = []
    for name, (prompt, how, config) in tasks.items():
        total = new * (1 if name == "1 row" else rows)

        def mine(prompt=prompt, how=how, model=ours, **more):
            model.generate(prompt.tolist(), new, **how, **more)

        contenders = {
            "transformers": lambda p=prompt, g=config: theirs.generate(p, generation_config=copy.copy(g))
        }
        contenders["ours"] = mine
        if cfg.compile:
            contenders["ours, compiled"] = lambda mine=mine, model=ours: mine(model=model, compile=True)
        with torch.inference_mode():
            seconds = in_turns(contenders, max(2, cfg.rounds // 2), device)
        rates = {who: total / s for who, s in seconds.items()}
        found.append({"task": name, "new_tokens": new, "tokens_per_second": rates})
        for who, rate in rates.items():
            times = rate / rates["transformers"]
            print(f"decoding  {name:26} {who:16} {rate:10,.0f} tok/s  {times:5.2f}x transformers", flush=True)
    return found


def data(cfg: HardwareConfig, device: torch.device) -> dict:
    """Megabytes of text that one core encodes a second, and what TinyStories' 2.2 GB take at that rate."""
    texts = list(islice(documents("storyworld", "train"), 3000))
    tokenizer = Tokenizer(*train_bpe(texts, 8192, SPECIAL_TOKENS), SPECIAL_TOKENS)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6

    def encode():
        for text in texts:
            tokenizer.encode(text)

    seconds = in_turns({"encode": encode}, cfg.rounds, torch.device("cpu"))["encode"]
    rate = megabytes / seconds
    print(f"data  {rate:.1f} MB/s a core; TinyStories' 2.2 GB on 12 cores: {2200 / rate / 12 / 60:.1f} min")
    return {"encoded_mb_per_second_and_core": rate, "sample_mb": megabytes}


def peers(cfg: HardwareConfig, device: torch.device) -> dict:
    """A training step and decoding in the shape of the benchmarks, on one thread, ours and others'."""
    if device.type == "cuda":
        print("peers: on a CPU only; on a card `decoding` compares")
        return {}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step = training_step(PeersConfig(device=cfg.device, compile=cfg.compile))
        return {
            "step": step,
            "decoding": decoding_benchmark(PeersConfig(device=cfg.device, compile=cfg.compile)),
        }
    finally:
        torch.set_num_threads(before)


PARTS = {"matmul": matmul, "memory": memory, "training": training, "attention": attention}
PARTS |= {"decoding": decoding, "peers": peers, "data": data}


def measure(cfg: HardwareConfig) -> dict:
    """Runs the parts and adds them to {out}/hardware.json, where parts of other calls stay."""
    device, wanted = pick_device(cfg.device), [w for w in cfg.only.split(",") if w] or list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        raise ConfigError(f"--only={','.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cfg.cap * GIB / total), device)
    torch.set_flush_denormal(True)
    file = Path(cfg.out) / "hardware.json"
    about = {"hardware": hardware(device), "versions": versions(), "git": git_commit(), "cap_gib": cfg.cap}
    print(f"{about['hardware']['device']}, {about['hardware']['threads']} threads")
    found = {}
    with contextlib.suppress(OSError, ValueError):
        found = read_json(file)
    if found.get("hardware") != about["hardware"]:  # another machine's figures are not this one's
        found = {}
    for part in wanted:
        found[part] = PARTS[part](cfg, device)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found | about, indent=1) + "\n"
        write_atomically(file, lambda path, text=text: path.write_text(text))
        if part == "matmul":
            told = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in found[part].items())
            print(f"matmul  {told}", flush=True)
    print(file)
    return found | about


def main() -> None:
    try:
        measure(parse_config(HardwareConfig, __doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"lab.hardware: {error}") from None


if __name__ == "__main__":
    run_script(main)
