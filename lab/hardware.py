"""What this machine can do: measurements that the plans are compared with, and that only a GPU can give.

    python -m lab.hardware                               # minutes; out/hardware.json and a table
    python -m lab.hardware --only=memory --cap=11        # one part; on a GPU, within 11 GiB
    bash run_all.sh hardware                             # the same, and the report that shows it

matmul      large matrix products, in float32 and bfloat16; shares are of this figure, not of a data sheet's
memory      peaks of training steps, over shapes that differ in one thing each, and of sampling answers,
            against support/costs.py (a CUDA GPU only)
training    the configs' own steps, eager and, on a GPU, compiled
decoding    the first config's shape, beside transformers' generate with the same weights; on a CPU also
            SmolLM2-135M's, with weights of 8 bits among the contenders
sampling    the same for many answers to many prompts, in the shape of SmolLM2-135M
lora        SFT of that shape by LoRA, beside PEFT
peers       a step and decoding on one thread of a CPU, beside transformers and, if installed, litgpt
data        the tokenizer, beside tokenizers and tiktoken
"""

from support.terminal import run_script

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from configs import names_in, parse_config
from lab import peers as others
from lab.plan import ON_HUB
from model import ModelConfig, ModernDecoderLM
from support.costs import GIB, count_parameters, estimate_flops, estimate_memory, generation_bytes, shape_of
from support.files import write_json
from support.hf_format import architecture
from support.kernels import fastest_products, float32_products
from support.machine import autocast, git_commit, hardware, pick_device, pick_dtype, versions
from support.memory import free_cached_memory
from support.plan import Step, fit_batch, memory_options, planned_model
from support.runs import errors_for_users, read_json_if_there
from support.timing import in_turns, matmul_flops, medians
from train import TrainConfig


@dataclass
class HardwareConfig:
    """What is measured, and within what limit."""

    only: str = ""  # matmul, memory, training, decoding, sampling, lora, peers, data, by commas; nothing: all
    configs: str = ""  # whose steps are timed; the first decodes; nothing: speedrun,max3060, or cpu
    compile: bool = True  # compiled contenders, too: half a minute each to start
    cap: float = 11.0  # GiB that this process may take of a GPU, as if it had no more
    rounds: int = 8  # timed repetitions
    corpus: str = "storyworld"  # data: the text, 5 MB of it
    device: str = "auto"  # cuda, cpu, ...
    out: str = "out"  # folder that holds everything the project makes


def configs_of(cfg: HardwareConfig, device: torch.device) -> dict[str, TrainConfig]:
    """The configs by name; a name is a file of configs/ or a path."""
    found = {}
    usual = "speedrun,max3060" if device.type == "cuda" else "cpu"
    for name in (cfg.configs or usual).split(","):
        file = name if name.endswith(".py") else f"configs/{name}.py"
        found[Path(name).stem] = parse_config(TrainConfig, "", [file, f"--device={cfg.device}"])
    return found


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -----------------------------------------------------------------------------
# Matrix products and memory


def matmul(cfg: HardwareConfig, device: torch.device) -> dict[str, float]:
    """FLOP/s of a large matrix product by data type."""
    found = {}
    for dtype in dict.fromkeys([torch.float32, torch.bfloat16, pick_dtype("auto", device)]):
        n = 1536 if dtype == torch.float32 else 512  # a CPU may emulate bfloat16
        if device.type == "cuda":
            n = 8192
        with float32_products(fastest_products(device)):
            rate = matmul_flops(dtype, n, device, cfg.rounds)
        found[name_of(dtype)] = rate
        print(f"matmul  {dtype} {rate / 1e12:.3g} TFLOP/s", flush=True)
    return found


BASE = "configs/max3060.py --grad_accum_steps=2 --compile=False"
MEMORY = {  # name: flags that differ from BASE
    "max3060, 16 rows": "",
    "max3060, 8 rows": "--batch_size=8",
    "as many key-value heads as heads": "--batch_size=8 --n_kv_heads=12",
    "gradient checkpointing": "--gradient_checkpointing",
    "compiled": "--compile",
    "compiled, checkpointing": "--compile --gradient_checkpointing",
    "4,096 tokens": "--batch_size=4 --context_length=4096",
    "GPT-2's parts and vocabulary": """--batch_size=8 --vocab_size=50304 --n_kv_heads=12 --d_ff=3072
        --norm=layer --ffn=gelu --positions=learned""",
    "4 experts, 2 a token": "--batch_size=8 --ffn=moe --n_experts=4 --experts_per_token=2 --d_ff=1024",
    "8 layers of 512, 64 rows of 512": """--batch_size=64 --context_length=512 --vocab_size=8192
        --n_layers=8 --d_model=512 --n_heads=8 --d_ff=1408""",
    "Muon": "--optimizer=muon",
}
ANSWERS = [(1, 1), (64, 16), (1024, 16)]  # rows, answers a prompt
PROMPT, NEW = 96, 256  # tokens; fewer new ones where the context ends


def memory(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Peak bytes of a training step, and of sampling answers, against the plan, which without its overhead
    should be what the allocator was asked for.
    """
    if device.type != "cuda":
        print("memory: needs a CUDA GPU, whose allocator counts bytes")
        return []
    rows = []
    for name, flags in MEMORY.items():
        train = parse_config(TrainConfig, "", f"{BASE} {flags}".split())
        c = planned_model(train)
        options = memory_options(train, on_gpu=True)
        plan = estimate_memory(c, train.batch_size, **options)
        asked = plan["peak"] - plan["overhead"]
        row = {"shape": name, "rows": train.batch_size, "plan": plan["peak"], "planned": asked}
        rows.append(row | peak_of(row, cfg, partial(some_steps, c, train, device)))
    c = first_shape(cfg, device)
    new = min(NEW, c.context_length - PROMPT)
    weights = 6 * count_parameters(c)["total"]  # in bfloat16 beside float32
    for count, n in ANSWERS:
        planned = weights + generation_bytes(shape_of(c), count, PROMPT, new, n, sampled=True)
        row = {"shape": f"answering, {n} a prompt", "rows": count, "plan": planned, "planned": planned}
        rows.append(row | peak_of(row, cfg, partial(answer, c, device, count, n, new)))
    free_cached_memory()
    return rows


def some_steps(c: ModelConfig, train: TrainConfig, device: torch.device) -> None:
    """From the second on, a step has AdamW's moments beside the gradients."""
    in_turns({"step": Step(c, train, device)}, rounds=1)


def answer(c: ModelConfig, device: torch.device, rows: int, n: int, new: int) -> None:
    """Samples n answers to each of rows / n prompts, as DPO and the verifier do."""
    model = ModernDecoderLM(c).to(device).eval()
    with autocast(device, pick_dtype("auto", device)):
        model.generate([[1] * PROMPT] * (rows // n), new, n=n, temperature=1.0)


def peak_of(row: dict, cfg: HardwareConfig, run: Callable[[], None]) -> dict:
    """The most bytes that are allocated while run() works, and that the process reserves for them."""
    free_cached_memory()
    torch.cuda.reset_peak_memory_stats()
    try:
        run()
        found = {"measured": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        gap = f"off by {row['planned'] / found['measured'] - 1:+.1%}"
    except torch.OutOfMemoryError:
        found = {"error": f"out of memory within {cfg.cap} GiB"}
        gap = found["error"]
    about = f"{row['shape']:34}{row['rows']:5} rows  planned {row['planned'] / GIB:6.2f} GiB"
    print(f"memory  {about}, {gap}", flush=True)
    return found


# -----------------------------------------------------------------------------
# Training steps


def training(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Steps of the configs: tokens/s eager and compiled, their share of the measured matrix product, and what
    forward and backward take of an eager step.
    """
    peak = matmul(cfg, device)[name_of(pick_dtype("auto", device))]
    cuda = device.type == "cuda"
    rows = []
    for name, train in configs_of(cfg, device).items():
        train.compile = False  # what runs first has to fit, too
        if cuda:
            train.vram = min(torch.cuda.get_device_properties(device).total_memory / GIB, cfg.cap * 12 / 11)
            fit_batch(train)
        c = planned_model(train)
        tokens = train.batch_size * train.grad_accum_steps * c.context_length
        ways = ("eager", "compiled") if cuda and cfg.compile else ("eager",)
        seconds, rates, shares = {}, {}, {}
        for way in ways:
            train.compile = way == "compiled"
            step = Step(c, train, device)
            runs = {way: step}
            if way == "eager":
                runs |= {"forward": step.forward, "forward and backward": step.backward}
            with float32_products(fastest_products(device)):
                # Several calls in a row: a GPU is sent the next step while it computes one.
                seconds |= medians(runs, cfg.rounds, calls=4 if cuda else 1)
            rates[way] = tokens / seconds[way]
            shares[way] = rates[way] * estimate_flops(c) / peak
            shown = f"{rates[way]:,.0f} tok/s, {shares[way]:.0%} of matmul"
            print(f"training  {name}, {way}: {shown}", flush=True)
            del step, runs  # memory holds one step only
            free_cached_memory()
        rows.append(
            {
                "config": name,
                "rows": train.batch_size,
                "optimizer": train.optimizer,
                "seconds": seconds,
                "tokens_per_second": rates,
                "share_of_matmul": shares,
            }
        )
    return rows


# -----------------------------------------------------------------------------
# Decoding, other libraries, the tokenizer


def first_shape(cfg: HardwareConfig, device: torch.device) -> ModelConfig:
    """The shape of the first config."""
    return planned_model(next(iter(configs_of(cfg, device).values())))


def decoding(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Tokens a second of ours and of transformers' generate, same weights, shape of the first config; if none
    is named, on a CPU also in the shape of SmolLM2-135M.
    """
    rows, most = (64, 256) if device.type == "cuda" else (16, 128)
    shapes = {"": first_shape(cfg, device)}
    if device.type == "cpu" and not cfg.configs:
        shapes["SmolLM2-135M, "] = smol_or_named(cfg, device)
    found = []
    for name, c in shapes.items():
        if architecture(c) != "llama":
            print("decoding: the first of --configs is no Llama, which is what is compared here")
            continue
        new = min(most, c.context_length - 32)
        rates = others.decoding_rates(c, device, rows, new, cfg.compile, cfg.rounds // 2 + 1)
        for task, who in rates.items():
            found.append({"task": name + task, "new_tokens": new, "tokens_per_second": who})
    return found


def sampling(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """Many answers to many prompts, as DPO and the verifier want them."""
    return [others.sampling_rates(smol_or_named(cfg, device), device)]


def lora(cfg: HardwareConfig, device: torch.device) -> list[dict]:
    """SFT by LoRA, beside PEFT on transformers' model of the same shape."""
    return [others.lora_rates(smol_or_named(cfg, device), device, cfg.rounds // 4 + 1)]


def smol_or_named(cfg: HardwareConfig, device: torch.device) -> ModelConfig:
    """The shape of the first config that is named, else of SmolLM2-135M."""
    return first_shape(cfg, device) if cfg.configs else ON_HUB["HuggingFaceTB/SmolLM2-135M-Instruct"]


def data(cfg: HardwareConfig, device: torch.device) -> dict:
    """Megabytes of text that one core encodes a second, and other libraries."""
    rates = others.tokenizers(cfg.corpus, cfg.rounds)
    return {"encoded_mb_per_second_and_core": rates["encode"], "mb_per_second": rates}


def peers(cfg: HardwareConfig, device: torch.device) -> dict:
    """Training steps in float32 and in what training uses here, and decoding, in the shape of lab/peers.py,
    on one thread, ours and others'.
    """
    if device.type == "cuda":
        print("peers: on a CPU only; on a GPU `decoding` compares")
        return {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dtypes = dict.fromkeys([torch.float32, pick_dtype("auto", device)])
    steps = {name_of(dtype): others.training_step(device, cfg.compile, dtype) for dtype in dtypes}
    rates = others.decoding_rates(others.SHAPE, device, 16, 256, cfg.compile, cfg.rounds // 2 + 1)
    torch.set_num_threads(threads)
    return {"step": steps, "decoding": rates}


# -----------------------------------------------------------------------------

PARTS = {
    "matmul": matmul,
    "memory": memory,
    "training": training,
    "decoding": decoding,
    "sampling": sampling,
    "lora": lora,
    "peers": peers,
    "data": data,
}


def measure(cfg: HardwareConfig) -> dict:
    """Runs the parts and adds them to {out}/hardware.json, where parts of other calls stay."""
    wanted = names_in(cfg.only, PARTS)
    device = pick_device(cfg.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cfg.cap * GIB / total), device)
    about = {"hardware": hardware(device), "versions": versions(), "git": git_commit(), "cap_gib": cfg.cap}
    print(f"{about['hardware']['device']}, {about['hardware']['threads']} threads")
    file = Path(cfg.out) / "hardware.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found = read_json_if_there(file)
    if found.get("hardware") != about["hardware"]:  # another machine's figures are not this one's
        found = {}
    for part in wanted:
        found |= {part: PARTS[part](cfg, device)} | about
        write_json(file, found, indent=1)
    print(file)
    return found


def main() -> None:
    with errors_for_users():
        measure(parse_config(HardwareConfig, __doc__))


if __name__ == "__main__":
    run_script(main)
