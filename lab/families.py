"""What a family of experiments measures beside the loss: decoding, routing, races, costs of shapes,
transfer."""

import math
import multiprocessing
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import product
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import few_shot, judge, load_task
from finetune import subsample
from lab.study import ExperimentConfig, Run, by_seed, finished, read_run, run_of, settings_of, spread
from model import ModelConfig, ModernDecoderLM, MoE
from support.costs import GIB, count_parameters, estimate_memory, kv_cache_bytes
from support.loading import load_model
from support.long_context import STREAM, endless, streams
from support.machine import peak_memory, pick_device
from support.plan import Step
from support.processes import worker_pool
from support.text_model import answer_task
from support.timing import in_turns, medians
from tokenizer import Tokenizer, open_tokens, tokens_folder
from train import TrainConfig

# -----------------------------------------------------------------------------
# GQA: what decoding costs


def models_of(cfg: ExperimentConfig, runs: list[Run]) -> Iterator[tuple[str, ModernDecoderLM]]:
    """The trained models of the first seed, the baseline first."""
    for run in runs:
        if run.seed == 1 and finished(run):
            yield run.name, ModernDecoderLM.from_pretrained(run.folder, pick_device(cfg.device)).eval()
            print(f"measured {run.name}", flush=True)


def gqa(cfg: ExperimentConfig, runs: list[Run]) -> dict:
    """Bytes of cache a token (float32), and tokens a second of 16 rows of 100 tokens."""
    found = {}
    for name, model in models_of(cfg, runs):
        decode = partial(model.generate, [[0]] * 16, 100, temperature=0)
        seconds = medians({"decode": decode}, rounds=3, warmup=0)["decode"]
        cache = kv_cache_bytes(model.config, 1, bytes_per_value=4)
        found[name] = {"cache_bytes_per_token": cache, "tokens_per_second": 16 * 100 / seconds}
    return found


# -----------------------------------------------------------------------------
# Streams: a text longer than the context


def held_out_text(cfg: ExperimentConfig, run: Run) -> tuple[Tokenizer, Tensor]:
    """A run's tokenizer, and some pieces of its text, 16 contexts long: (rows, 16 T + 1)."""
    c = settings_of(run.words)
    tokenizer = Tokenizer.load(tokens_folder(c))
    tokens, _ = open_tokens(tokens_folder(c), "validation", tokenizer)
    length = STREAM * c.context_length + 1
    rows = min(4 if cfg.quick else 16, len(tokens) // length)
    ids = torch.from_numpy(tokens[: rows * length].astype(np.int64)).view(rows, length)
    return tokenizer, ids.to(pick_device(cfg.device))


def stream(cfg: ExperimentConfig, runs: list[Run]) -> dict:
    tokenizer, ids = held_out_text(cfg, runs[0])
    found = {}
    baseline = None
    for name, model in models_of(cfg, runs):
        baseline = baseline or model
        T = model.config.context_length
        found[name] = streams(model, ids, tokenizer, baseline, T)
        if model is baseline:
            found[name]["endless"] = endless(model, 5_000 if cfg.quick else 100_000, T)
    return found


# -----------------------------------------------------------------------------
# MoE: where tokens go

CLASSES = {
    "digit": r"\d+",
    "punctuation": r"[^\w\s]+",
    "capitalised": r"[A-Z]\w*",
    "word": r"\w+",
    "other": ".*",
}


def token_class(piece: str) -> str:
    return next(name for name, pattern in CLASSES.items() if re.fullmatch(pattern, piece.strip(), re.DOTALL))


def moe(cfg: ExperimentConfig, runs: list[Run]) -> dict:
    """Of each mixture, over its seeds: how much more than an even load the busiest expert has at the first
    logged step and at the last, and how many choices the last step drops; `experts_by_class` of one model.
    """
    tokenizer, ids = held_out_text(cfg, runs[0])
    found = {}
    for name, model in models_of(cfg, runs):
        if model.config.ffn == "moe":
            seeds = [routing(run) for run in runs if run.name == name and finished(run)]
            bits = fmean(experts_by_class(model, ids[:, : model.config.context_length], tokenizer))
            found[name] = {key: fmean(seed[key] for seed in seeds) for key in seeds[0]} | {"bits": bits}
    return found


def routing(run: Run) -> dict[str, float]:
    """The router's work by metrics.jsonl, averaged over the layers."""
    lines = [x for x in run.made.metrics if "router_load" in x]
    first, last = (max(x["router_load"]) * len(x["router_load"]) for x in (lines[0], lines[-1]))
    return {"first": first, "last": last, "dropped": lines[-1]["dropped"]}


@torch.no_grad()
def experts_by_class(model: ModernDecoderLM, ids: Tensor, tokenizer: Tokenizer) -> list[float]:
    """For each layer, the bits that the class of a token and its first expert share; ids (B, T)."""
    names = list(CLASSES)
    kinds = [names.index(token_class(tokenizer.decode([i]))) for i in range(tokenizer.vocab_size)]
    kind = torch.tensor(kinds)[ids.flatten().cpu()]
    found = []

    def watch(moe: MoE, args: tuple[Tensor], _) -> None:
        n = moe.config.n_experts
        expert = F.linear(args[0].float(), moe.gate.weight).argmax(-1).flatten().cpu()
        counts = torch.bincount(kind * n + expert, minlength=len(names) * n).view(-1, n)  # (class, expert)
        joint = counts.double() / counts.sum()
        independent = joint.sum(1, keepdim=True) * joint.sum(0)
        bits = torch.xlogy(joint, joint / independent.clamp(min=1e-300)).sum() / math.log(2)
        found.append(bits.item())

    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, MoE)]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


# -----------------------------------------------------------------------------
# The race: how soon is `modern` where `gpt` ends?


def race(cfg: ExperimentConfig, runs: list[Run]) -> dict:
    """For each seed, seconds of training until `modern` first has the final loss of `gpt`, over all of
    `gpt`'s. Time spent on evaluation does not count.
    """
    gpts = by_seed(runs, "gpt")
    seeds = {}
    for run in runs:
        gpt = gpts.get(run.seed)
        modern = read_run(run) if run.name == "modern" else None
        if not gpt or not modern:
            continue
        entry = {
            "loss": gpt["val_loss"],
            "gpt_seconds": gpt["seconds"],
            "gpt_steps": gpt["steps"],
            "modern_loss": modern["val_loss"],
        }
        reached = [x for x in run.made.metrics if x.get("val_loss", math.inf) <= gpt["val_loss"]]
        if reached:
            seconds = reached[0]["seconds"]
            entry |= {"step": reached[0]["step"], "seconds": seconds, "ratio": seconds / gpt["seconds"]}
        seeds[run.seed] = entry
    found = {"seeds": seeds} if seeds else {}
    ratios = [entry["ratio"] for entry in seeds.values() if "ratio" in entry]
    if ratios and len(ratios) == len(seeds):
        found["ratio"] = spread(ratios)
    return found


# -----------------------------------------------------------------------------
# Shapes and batches: what they cost

SHAPES = {  # layers, width, rows
    "shape-4x256": (4, 256, 4),
    "shape-8x512": (8, 512, 4),
    "shape-12x768": (12, 768, 4),
    "rows-1": (4, 128, 1),
    "rows-4": (4, 128, 4),
    "rows-16": (4, 128, 16),
    "rows-64": (4, 128, 64),
    "rows-256": (4, 128, 256),
}


def cost(layers: int, width: int, rows: int, device_name: str) -> dict:
    """A training step (AdamW) in this shape: parameters, tokens a second (the better of two), peak memory of
    this process, and the rows that 12 GiB would hold in bfloat16, estimated.
    """
    heads = max(4, width // 64)
    c = ModelConfig(vocab_size=1024, context_length=128, n_layers=layers, d_model=width, n_heads=heads)
    device = pick_device(device_name)
    step = Step(c, TrainConfig(batch_size=rows, dtype="float32", compile=False), device)
    seconds = min(in_turns({"step": step}, rounds=2, warmup=1)["step"])
    most = 1
    while estimate_memory(c, 2 * most)["peak"] <= 12 * GIB:
        most *= 2
    return {
        "parameters": count_parameters(c)["total"],
        "rows": rows,
        "tokens_per_second": rows * c.context_length / seconds,
        "peak_memory_gib": round(peak_memory(device) / GIB, 3),
        "most_rows_in_12_gib": most,
    }


def costs(cfg: ExperimentConfig, runs: list[Run]) -> dict:
    """`cost` of every shape, each in a process of its own, whose memory starts at nothing."""
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for name, shape in SHAPES.items():
        with worker_pool(1, "--only of other families", spawn) as pool:
            found[name] = pool.submit(cost, *shape, cfg.device).result()
    return found


# -----------------------------------------------------------------------------
# Transfer: a task learnt from nothing, by a pretrained model, or given in a prompt


def transfer_runs(cfg: ExperimentConfig) -> list[Run]:
    """Two base models a seed, one that has read stories and numbers and one that has read nothing; both are
    tuned on the same examples of each task in the same order. See configs/experiments/transfer/.
    """
    runs = []
    for seed, base in product(cfg.all_seeds, ("pretrained", "scratch")):
        flags = [f"--corpus={cfg.corpus}:0.5,numbers:0.5"]
        if cfg.quick and base == "pretrained":
            flags += ["--max_steps=6", "--warmup_steps=0"]
        runs.append(run_of(cfg, f"transfer-{base}", f"transfer/{base}.py", flags, seed))
    quick = ["--max_train_examples=50", "--max_eval_examples=12"] if cfg.quick else []
    for base, task in product(runs.copy(), cfg.tasks.split(",")):
        flags = [f"--task={task}", f"--model={base.folder}", *quick]
        name = f"{base.name}-{task}"
        runs.append(run_of(cfg, name, "transfer/task.py", flags, base.seed, "finetune.py"))
    return runs


def transfer(cfg: ExperimentConfig, runs: list[Run]) -> dict:
    """{task: {way: spread over the seeds}}, and the gain of pretraining, in points. A prompt has no or four
    examples and no training; the two that are tuned have seen the same examples. A seed of which a run failed
    is left out.
    """
    by_name = {(run.name, run.seed): run for run in transfer_runs(cfg)}
    found = {}
    for task in cfg.tasks.split(","):
        scores = defaultdict(list)
        examples, _ = load_task(task, "validation")
        for seed in cfg.all_seeds:
            pair = {way: by_name[f"transfer-{way}-{task}", seed] for way in ("scratch", "pretrained")}
            if not all(finished(run) for run in pair.values()):
                continue
            for way, run in pair.items():
                scores[f"{way}, tuned"].append(points(run.made.record["evaluation"]["metrics"]))
            gain = scores["pretrained, tuned"][-1] - scores["scratch, tuned"][-1]
            scores["pretrained - scratch"].append(gain)
            base = by_name["transfer-pretrained", seed].folder
            model = load_model(str(base), pick_device(cfg.device))
            some = subsample(examples, 50 if cfg.quick else 500, seed)
            for shots in (0, 4):
                outputs, _ = answer_task(model, task, some, few_shot(task, shots, seed))
                scores[f"prompted, {shots} shots"].append(points(judge(task, some, outputs)[1]))
        if scores:
            found[task] = {way: spread(values) for way, values in scores.items()}
    return found


def points(metrics: dict) -> float:
    """The task's own metric in percent."""
    name = next(name for name in ("accuracy", "exact_match", "consistent", "rouge1") if name in metrics)
    return 100 * metrics[name]["value"]
