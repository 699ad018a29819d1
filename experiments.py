"""The lab: what does each part of a modern decoder buy? Configs with a hypothesis, over seeds, compared.

    python experiments.py                              # everything, three seeds
    python experiments.py --quick                      # every family once, short: no findings
    python experiments.py --only=norm_layer,kv_heads_1 # some of them, against the baseline
    python experiments.py --corpus=wikitext2           # on other text
    python train.py configs/experiments/kv_heads_1.py --seed=2 --name=mine    # one of them, by hand

An experiment is a file in configs/experiments/: a baseline, a hypothesis, and the lines that differ. Each is
trained with every seed as a run folder of its own, out/experiments/CORPUS/NAME-sSEED, and prints to
NAME-sSEED.log beside it. What is finished is not run again; what was begun goes on, also after Ctrl-C or a
kill. A seed fixes the order of the data and the initialisation, so runs of one seed are compared in pairs,
and a difference counts only if the 95 % interval over the seeds' differences (Student's t) excludes 0.

Families: `ablations`; `gqa`, with decoding speed and cache; `moe`, with the router's balance; `race`, how
soon all that helps is where a plain GPT ends; `streams`, what becomes of a text longer than the context, with
and without attention sinks; `scaling`, six sizes at three budgets of FLOPs, what they predict for larger
ones, and one more run to see whether that comes true; `shapes`, what larger models and batches cost;
`transfer`, a task learnt from nothing, by a pretrained model, or told in a prompt. Everything goes to
out/experiments/CORPUS/experiments.json, and a table to the terminal.
"""

from support.terminal import run_script

import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs import ROOT, ConfigError, parse_config
from data import few_shot, judge, load_task
from finetune import FinetuneConfig, subsample, weights_hash
from model import ModelConfig, ModernDecoderLM, MoE
from support.costs import count_parameters, estimate_flops, estimate_memory, kv_cache_bytes
from support.files import write_atomically
from support.loading import load_model
from support.long_context import STREAM, endless, streams
from support.machine import git_commit, hardware, peak_resident_bytes, pick_device, versions
from support.processes import worker_pool
from support.runs import TrainError, read_json, read_jsonl
from support.text_model import answer_task
from tokenizer import Tokenizer, open_tokens, tokens_folder
from train import FREE_TO_CHANGE, TrainConfig, model_config

FOLDER = Path("configs/experiments")
FAMILIES = {
    "ablations": """norm_layer norm_none norm_post positions_learned positions_none ffn_gelu ffn_silu untied
        qk_norm heads_8 heads_16 lr_1e3 lr_9e3 lr_3e2 warmup_0 wsd muon batch_1 batch_16 batch_64 vocab_512
        vocab_2048 context_64 context_256 linear sparse_16""".split(),
    "gqa": ["kv_heads_1", "kv_heads_2"],
    "moe": """moe_4_top1 moe_4_top2 moe_8_top1 moe_8_top2 moe_every_2 dense_as_moe_4
        dense_as_moe_8""".split(),
    "race": ["gpt", "modern"],
    "streams": ["sink"],
    "scaling": [],
    "shapes": [],
    "transfer": [],
}
SIZES = ((2, 32), (2, 48), (3, 72), (4, 96), (5, 128), (6, 176))  # layers, width
BUDGETS = (1e12, 2e12, 4e12)  # FLOPs of a training run; with less, a model has not begun to copy names
CHECK = 1.6e13  # of one more, at the size that the fit calls best: is its word good?
LARGER = (*SIZES, (7, 208), (8, 256))  # among which the best is looked for
SHAPES = {f"shape-{n}x{d}": (n, d, 4) for n, d in ((4, 256), (8, 512), (12, 768))}  # layers, width, rows
SHAPES |= {f"rows-{rows}": (4, 128, rows) for rows in (1, 4, 16, 64, 256)}
SETTINGS = {"train.py": TrainConfig, "finetune.py": FinetuneConfig}


@dataclass
class ExperimentConfig:
    """Which experiments, how often, on what."""

    only: str = ""  # experiments or families, joined by commas; nothing: all
    seeds: int = 3  # runs of each experiment, with seeds 1, 2, ...
    quick: bool = False  # one seed and a twentieth of the steps: to see that everything works
    corpus: str = "storyworld"  # what is read
    tasks: str = "sentiment,arithmetic"  # of the family `transfer`
    jobs: int = 0  # runs at a time, each with one thread; 0: one a core, and one on a CUDA card
    device: str = "auto"  # cuda, cpu, ...
    wandb: str = ""  # also log the runs to this Weights & Biases project
    out: str = "out"  # folder that holds everything the project makes


@dataclass
class Run:
    """A training run that has to be there: its settings are a config file, flags and a seed."""

    name: str
    config: str
    flags: list[str]
    seed: int
    folder: Path
    script: str = "train.py"

    def words(self) -> list[str]:
        """What stands behind `python train.py`."""
        return [*([self.config] if self.config else []), *self.flags, f"--seed={self.seed}"]


# -----------------------------------------------------------------------------
# Training what is missing


def plan(cfg: ExperimentConfig) -> list[Run]:
    """All runs, the baseline's first."""
    names = list(dict.fromkeys(name for family in chosen(cfg).values() for name in family))
    home, found = home_of(cfg), []
    common = [f"--corpus={cfg.corpus}", f"--device={cfg.device}"]
    for seed in range(1, (1 if cfg.quick else cfg.seeds) + 1):
        for name in ["baseline", *names]:
            flags = [*common]
            if cfg.quick:
                c = settings_of([str(FOLDER / f"{name}.py")])
                flags += [f"--max_steps={max(4, c.max_steps // 20)}", "--eval_every=0"]
                flags += [f"--warmup_steps={min(2, c.warmup_steps)}"]
            found.append(run_of(home, name, f"{name}.py", flags, seed, cfg))
    if "scaling" in chosen(cfg):
        for budget in BUDGETS:
            for layers, width in SIZES:
                flags = [*common, *size_flags(layers, width, budget / (20 if cfg.quick else 1))]
                name = f"scaling-{budget:.0e}-{layers}x{width}".replace("+", "")
                found.append(run_of(home, name, "baseline.py", flags, 1, cfg))
    if "transfer" in chosen(cfg):
        found += transfer_runs(cfg)
    return found


def transfer_runs(cfg: ExperimentConfig) -> list[Run]:
    """Two bases a seed, one that has read stories and numbers and one that has read nothing (a rate of 0),
    and both tuned on the same examples of each task in the same order.
    """
    home, found = home_of(cfg), []
    seeds, short = range(1, (1 if cfg.quick else cfg.seeds) + 1), 40 if cfg.quick else 1
    bases = {"pretrained": [f"--max_steps={240 // short}", f"--warmup_steps={24 // short}"]}
    bases["scratch"] = ["--max_steps=1", "--warmup_steps=0", "--learning_rate=0", "--min_lr=0"]
    for seed in seeds:
        for base, flags in bases.items():
            flags = [f"--corpus={cfg.corpus}:0.5,numbers:0.5", *flags, "--eval_every=0", "--save_every=0"]
            flags += ["--final_eval_tokens=20000", "--sample_tokens=0", f"--device={cfg.device}"]
            found.append(run_of(home, f"transfer-{base}", "../cpu.py", flags, seed, cfg))
    for run in found.copy():
        for task in cfg.tasks.split(","):
            flags = [f"--task={task}", f"--model={run.folder}", "--method=lm", f"--device={cfg.device}"]
            flags += [f"--max_train_examples={2000 // short}", f"--max_eval_examples={500 // short}"]
            flags += ["--epochs=2", "--batch_size=16", "--learning_rate=1e-3", "--warmup_steps=20"]
            flags += ["--eval_every=0", "--save_every=0"]
            tuned = run_of(home, f"{run.name}-{task}", "", flags, run.seed, cfg)
            found.append(replace(tuned, config="", script="finetune.py"))
    return found


def home_of(cfg: ExperimentConfig) -> Path:
    text = re.sub(r"\W+", "_", cfg.corpus)
    return Path(cfg.out) / "experiments" / (f"{text}-quick" if cfg.quick else text)


def run_of(home: Path, name: str, file: str, flags: list[str], seed: int, cfg: ExperimentConfig) -> Run:
    folder = home / f"{name}-s{seed}"
    flags = [*flags, f"--out={cfg.out}", f"--name={folder.relative_to(cfg.out)}"]
    if cfg.wandb:
        flags.append(f"--wandb={cfg.wandb}")
    return Run(name, os.path.normpath(FOLDER / file), flags, seed, folder)


def chosen(cfg: ExperimentConfig) -> dict[str, list[str]]:
    """The families, or what --only leaves of them."""
    wanted = [w for w in cfg.only.split(",") if w]
    known = {*FAMILIES, *(name for names in FAMILIES.values() for name in names)}
    if unknown := set(wanted) - known:
        raise ConfigError(f"--only={','.join(sorted(unknown))}: there are {', '.join(sorted(known))}")
    if not wanted:
        return FAMILIES
    found = {f: names if f in wanted else [n for n in names if n in wanted] for f, names in FAMILIES.items()}
    return {family: names for family, names in found.items() if names or family in wanted}


def settings_of(words: list[str]) -> TrainConfig:
    return parse_config(TrainConfig, "", words)


def size_flags(layers: int, width: int, budget: float) -> list[str]:
    """Flags of a model of this shape that is trained for a budget of FLOPs; smaller ones learn faster."""
    shape = [f"--n_layers={layers}", f"--d_model={width}", "--d_ff=0"]
    c = settings_of([str(FOLDER / "baseline.py"), *shape])
    flops = estimate_flops(model_config(c), c.context_length) * c.batch_size * c.context_length
    steps = max(4, round(budget / flops))
    rate = c.learning_rate * math.sqrt(128 / width)
    return [
        *shape,
        f"--max_steps={steps}",
        f"--warmup_steps={max(1, steps // 20)}",
        f"--learning_rate={rate:.2g}",
        "--eval_every=0",
    ]


def found_in(run: Run) -> dict | None:
    """run.json of this very run, finished or not; None if there is none, or only that of another run."""
    file, kind = run.folder / "run.json", SETTINGS[run.script]
    try:
        found = read_json(file) if file.exists() else {}
    except TrainError:  # damaged
        return None
    if not found:
        return None
    wanted = parse_config(kind, "", run.words())
    free = {*FREE_TO_CHANGE, "vocab_size"} - {"final_eval_tokens"}
    if kind is FinetuneConfig:
        free |= {"max_steps", "context_length"}  # worked out by the run
        if found.get("parent_hash") != weights_hash(wanted.model):
            return None
    have, same = found.get("settings", {}), [f for f in fields(kind) if f.name not in free]
    # A setting that was added after the run was made has its default there.
    if any(have.get(f.name, f.default) != getattr(wanted, f.name) for f in same):
        return None
    batch = have.get("batch_size", 0) * have.get("grad_accum_steps", 0)
    return found if batch == wanted.batch_size * wanted.grad_accum_steps else None


def finished(run: Run) -> bool:
    """Whether the run's folder holds what this command would make."""
    found = found_in(run)
    done = found is not None and found["status"] == "finished"
    return done and (run.script != "finetune.py" or "evaluation" in found)


def log_of(run: Run) -> Path:
    """What the run printed: beside its folder, since --overwrite empties that."""
    return run.folder.with_name(f"{run.folder.name}.log")


def way_to_start(run: Run) -> str:
    if not (run.folder / "run.json").exists():
        return "new"
    return "resume" if found_in(run) else "overwrite"


def start(run: Run, overwrite: bool, env: dict[str, str]) -> subprocess.Popen:
    run.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / run.script), *run.words()]
    command += ["--overwrite"] if overwrite else []
    with open(log_of(run), "a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        # A session of its own: Ctrl-C in the terminal is passed on once, by us.
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


def last_line(run: Run, status: int) -> str:
    """The end of what the run printed: its result, or why it failed."""
    lines = log_of(run).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if status == -signal.SIGKILL:
        return "killed (SIGKILL), most likely because the machine ran out of memory: fewer --jobs need less"
    if status < 0:
        return f"ended by signal {-status}"
    return lines[-1]


def train_all(runs: list[Run], jobs: int) -> dict[str, str]:
    """Trains those that are not finished, `jobs` at a time; {folder: why it failed}.

    A run that was begun goes on from its checkpoint; if it cannot, it starts anew. Ctrl-C reaches the runs,
    which end as they do by hand, and then this process.
    """
    waiting, running, failed = [(r, way_to_start(r)) for r in runs if not finished(r)], {}, {}
    if waiting:
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished; {jobs} at a time", flush=True)
    todo, env = len(waiting), os.environ | {"END_WITH_PARENT": str(os.getpid())}
    if jobs > 1:
        env["OMP_NUM_THREADS"] = "1"
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run, way = waiting.pop(0)
                running[start(run, way == "overwrite", env)] = run, way
            for process in [p for p in running if p.poll() is not None]:
                run, way = running.pop(process)
                last = last_line(run, process.returncode)
                if process.returncode > 0 and way == "resume":
                    print(f"{run.name}, seed {run.seed}, cannot go on ({last}); it starts anew", flush=True)
                    waiting.insert(0, (run, "overwrite"))
                    continue
                done = todo - len(waiting) - len(running)
                print(f"[{done}/{todo}] {run.name}, seed {run.seed}: {last}", flush=True)
                if process.returncode:
                    failed[str(run.folder)] = last
            time.sleep(0.1)
    except BaseException:
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        raise
    return failed


def prepare_tokens(runs: list[Run]) -> None:
    """A tokenizer and token files for each vocabulary, before runs need them side by side."""
    folders = {tokens_folder(settings_of(r.words())): r for r in runs if r.script == "train.py"}
    env = os.environ | {"END_WITH_PARENT": str(os.getpid())}
    for folder, run in folders.items():
        if not has_tokens(folder):
            c = settings_of(run.words())
            flags = [f"--{key}={getattr(c, key)}" for key in ("corpus", "vocab_size", "out")]
            command = [sys.executable, str(ROOT / "tokenizer.py"), run.config, *flags]
            if status := subprocess.run(command, env=env).returncode:
                raise ConfigError(f"{folder}: tokenizer.py ended with status {status}; see above")


def has_tokens(folder: Path) -> bool:
    """Whether a run can read them. If not, tokenizer.py makes what is missing."""
    try:
        tokenizer = Tokenizer.load(folder)
        for split in ("train", "validation"):
            open_tokens(folder, split, tokenizer)
    except (OSError, ValueError):
        return False
    return True


# -----------------------------------------------------------------------------
# What a run says, and comparisons


def read_run(folder: Path) -> dict | None:
    """The figures of a finished run; None if it did not get there."""
    file = folder / "run.json"
    run = read_json(file) if file.exists() else {}
    if run.get("status") != "finished":
        return None
    lines = [x for x in read_jsonl(folder / "metrics.jsonl") if "tokens_per_second" in x]
    settings = run["settings"]
    config = ModelConfig(**{f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings})
    last, best, tokens = run["results"]["last"], run["results"]["best"], lines[-1]["tokens"]
    return {
        "parameters": run["parameters"],
        "active_parameters": count_parameters(config)["active"],
        "tokens": tokens,
        "flops": estimate_flops(config, config.context_length) * tokens,
        "train_loss": float(np.mean([x["loss"] for x in lines if "loss" in x][-5:])),
        "val_loss": last["val_loss"],
        "bits_per_byte": last["bits_per_byte"],
        "best_val_loss": best["val_loss"],
        "best_step": best["step"],
        "steps": run["step"],
        "tokens_per_second": float(np.median([x["tokens_per_second"] for x in lines])),
        "peak_memory_gib": max(x["peak_memory_gib"] for x in lines),
        "seconds": run["seconds"],
    }


STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def spread(values: list[float]) -> dict:
    """Mean, standard deviation and, from two values on, the 95 % interval of the mean (Student's t)."""
    x, n = np.asarray(values, float), len(values)
    found = {"mean": float(x.mean()), "n": n}
    if n > 1:
        sd = float(x.std(ddof=1))
        half = STUDENT.get(n - 1, 1.96) * sd / math.sqrt(n)
        found |= {"sd": sd, "low": found["mean"] - half, "high": found["mean"] + half}
    return found


def verdict(difference: dict) -> str:
    """What a difference of losses lets one say."""
    if "low" not in difference:
        return "one seed: no finding"
    if difference["low"] > 0:
        return "worse"
    return "better" if difference["high"] < 0 else "no difference found"


SPREADS = ("train_loss", "val_loss", "bits_per_byte", "tokens_per_second", "peak_memory_gib", "seconds")


def compared(name: str, runs: list[Run], failed: dict[str, str]) -> dict:
    """One experiment: its figures over the seeds, and what it is to the baseline, in bits a byte."""
    mine = {r.seed: read_run(r.folder) for r in runs if r.name == name}
    base = {r.seed: read_run(r.folder) for r in runs if r.name == "baseline"}
    first = next(r for r in runs if r.name == name)
    settings = settings_of(first.words())
    entry = {"hypothesis": settings.hypothesis, "command": " ".join(["python train.py", *first.words()])}
    entry["seeds"] = {seed: figures for seed, figures in mine.items() if figures}
    entry["failed"] = {
        r.seed: failed[str(r.folder)] for r in runs if r.name == name and str(r.folder) in failed
    }
    if entry["seeds"]:
        for key in SPREADS:
            entry[key] = spread([figures[key] for figures in entry["seeds"].values()])
        pairs = [(mine[s], base[s]) for s in mine if mine[s] and base.get(s)]
        if name != "baseline" and pairs:
            entry["difference"] = spread([a["bits_per_byte"] - b["bits_per_byte"] for a, b in pairs])
            entry["verdict"] = verdict(entry["difference"])
    return entry


# -----------------------------------------------------------------------------
# GQA: what decoding costs


def load(folder: Path, device: torch.device) -> ModernDecoderLM:
    return ModernDecoderLM.from_pretrained(folder, device).eval()


def decoding(model: ModernDecoderLM, tokens: int = 100, rows: int = 16) -> dict:
    """Bytes of cache a token (float32) and tokens a second, the median of three."""
    rates = []
    for _ in range(3):
        begun = time.perf_counter()
        model.generate([[0]] * rows, tokens, temperature=0)
        rates.append(rows * tokens / (time.perf_counter() - begun))
    return {
        "cache_bytes_per_token": kv_cache_bytes(model.config, 1, 1, 4),
        "tokens_per_second": float(np.median(rates)),
    }


# -----------------------------------------------------------------------------
# MoE: where tokens go

CLASSES = {"digit": r"\d+", "punctuation": r"[^\w\s]+", "capitalised": r"[A-Z]\w*", "word": r"\w+"}


def token_class(piece: str) -> str:
    return next((name for name, pattern in CLASSES.items() if re.fullmatch(pattern, piece.strip())), "other")


def routing(folder: Path) -> dict:
    """The router over training: how much more than its share the busiest expert got, and what was dropped."""
    lines = [x for x in read_jsonl(folder / "metrics.jsonl") if "router_load" in x]
    busiest = [max(x["router_load"]) * len(x["router_load"]) for x in lines]
    return {
        "steps": [x["step"] for x in lines],
        "busiest_expert": [round(b, 3) for b in busiest],  # 1: an even load
        "dropped": [x["dropped"] for x in lines],  # choices in the logged step, all layers
        "last_load": lines[-1]["router_load"] if lines else [],
    }


@torch.no_grad()
def experts_by_class(model: ModernDecoderLM, ids: Tensor, tokenizer: Tokenizer) -> list[dict]:
    """For each layer, the share of each expert in the first choices of each class of tokens, and how many
    bits the expert tells of the class (mutual information). ids (B, T).
    """
    pieces = [token_class(tokenizer.decode([i])) for i in range(tokenizer.vocab_size)]
    kind, found, names = np.array(pieces)[ids.flatten().cpu().numpy()], [], [*CLASSES, "other"]

    def watch(moe: MoE, args: tuple[Tensor], _) -> None:
        expert = F.linear(args[0].float(), moe.gate.weight).argmax(-1).flatten().cpu().numpy()
        counts = np.zeros((len(names), moe.config.n_experts))
        np.add.at(counts, (np.array([names.index(k) for k in kind]), expert), 1)
        joint = counts / counts.sum()
        independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        here = joint > 0
        share = counts / counts.sum(1, keepdims=True).clip(min=1)
        found.append({"bits": float((joint[here] * np.log2(joint[here] / independent[here])).sum())})
        found[-1]["share"] = dict(zip(names, share.round(3).tolist(), strict=True))

    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, MoE)]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


# -----------------------------------------------------------------------------
# The race: how soon is one where the other ends?


def race(runs: list[Run]) -> dict:
    """For each seed, seconds of training until `modern` first has the loss with which `gpt` ends, over all of
    `gpt`'s. Time spent on evaluation does not count.
    """
    folders, found = {(r.name, r.seed): r.folder for r in runs}, {"seeds": {}}
    for seed in sorted({seed for name, seed in folders if name == "modern"}):
        gpt, modern = (read_run(folders[name, seed]) for name in ("gpt", "modern"))
        if not (gpt and modern):
            continue
        lines = read_jsonl(folders["modern", seed] / "metrics.jsonl")
        seconds = {x["step"]: x["seconds"] for x in lines if "seconds" in x}
        there = [x["step"] for x in lines if x.get("val_loss", math.inf) <= gpt["val_loss"]]
        entry = {"loss": gpt["val_loss"], "gpt_seconds": gpt["seconds"], "gpt_steps": gpt["steps"]}
        entry |= {"modern_loss": modern["val_loss"], "modern_seconds": modern["seconds"]}
        if there:
            entry |= {"step": there[0], "seconds": seconds[there[0]]}
            entry["ratio"] = entry["seconds"] / gpt["seconds"]
        found["seeds"][seed] = entry
    if all("ratio" in entry for entry in found["seeds"].values()) and found["seeds"]:
        found["ratio"] = spread([entry["ratio"] for entry in found["seeds"].values()])
    return found


# -----------------------------------------------------------------------------
# Scaling: where to spend FLOPs


def isoflop(points: list[dict]) -> list[dict]:
    """From runs {"budget", "parameters", "tokens", "loss"}: the best size at each budget, the minimum of a
    parabola in log parameters (Hoffmann et al., 2022, approach 2) through the three sizes around the least
    loss: further away lie models that have not left the plateau of their first steps. A minimum outside of
    the sizes tried is none.
    """
    best = []
    for budget in sorted({p["budget"] for p in points}):
        some = sorted((p for p in points if p["budget"] == budget), key=lambda p: p["parameters"])
        if len(some) < 3:
            continue
        size, tokens = (np.log([p[key] for p in some]) for key in ("parameters", "tokens"))
        least = int(np.argmin([p["loss"] for p in some]))
        near = slice(max(0, least - 1), least + 2) if 0 < least < len(some) - 1 else slice(None)
        a, b, c = np.polyfit(size[near], [p["loss"] for p in some[near]], 2)
        at = -b / (2 * a) if a > 0 else math.nan
        entry = {"budget": budget, "inside": bool(size[0] <= at <= size[-1])}
        if entry["inside"]:
            entry["parameters"] = math.exp(at)
            entry["tokens"] = math.exp(np.interp(at, size, tokens))
            entry["loss"] = float(c - b * b / (4 * a))
        best.append(entry)
    return best


def fit_sizes(best: list[dict]) -> dict | None:
    """N = coefficient x C^exponent, how the best size grows with FLOPs, through three minima or more."""
    inside = [b for b in best if b["inside"]]
    if len(inside) < 3:
        return None
    budgets, sizes = (np.log([b[key] for b in inside]) for key in ("budget", "parameters"))
    exponent, start = np.polyfit(budgets, sizes, 1)
    return {"coefficient": math.exp(start), "exponent": float(exponent)}


def fit_law(points: list[dict]) -> dict | None:
    """L = E + A / N^a + B / D^b through runs of N parameters and D tokens (the same paper, approach 3).

    For given exponents the rest is linear: they are tried on a grid, and E, A and B are those of least
    squares of the relative error, none of them below 0. None if no law of this form falls with N and D.
    """
    N, D, L = (np.array([p[key] for p in points], float) for key in ("parameters", "tokens", "loss"))
    N0, D0, best = np.median(N), np.median(D), None  # units near 1
    for a in EXPONENTS:
        for b in EXPONENTS:
            columns = np.stack([np.ones_like(L), (N / N0) ** -a, (D / D0) ** -b], axis=1) / L[:, None]
            for used in ([0, 1, 2], [1, 2]):  # without a floor, if the best one lies below 0
                found = np.linalg.lstsq(columns[:, used], np.ones_like(L), rcond=None)[0]
                if (found < 0).any():
                    continue
                error = float(np.mean((columns[:, used] @ found - 1) ** 2))
                if best is None or error < best["error"]:
                    E, A, B = [0.0] * (3 - len(found)) + found.tolist()
                    best = {"E": E, "A": A * N0**a, "B": B * D0**b, "a": float(a), "b": float(b)}
                    best["error"] = error
                break
    return best and best | {"error": math.sqrt(best["error"])}


EXPONENTS = np.arange(0.05, 2.01, 0.05)


def loss_of(law: dict, parameters: float, tokens: float) -> float:
    return law["E"] + law["A"] / parameters ** law["a"] + law["B"] / tokens ** law["b"]


def predict(law: dict, budget: float, per_pair: float = 6.0) -> dict:
    """The best use of so many FLOPs by the law, at `per_pair` FLOPs a parameter and token."""
    sizes = np.geomspace(1e3, 1e12, 4000)
    tokens = budget / (per_pair * sizes)
    best = int(np.argmin([loss_of(law, n, d) for n, d in zip(sizes, tokens, strict=True)]))
    n, d = float(sizes[best]), float(tokens[best])
    return {"parameters": n, "tokens": d, "loss": loss_of(law, n, d)}


def scaling(runs: list[Run]) -> dict:
    """The fit of the scaling runs, and what it predicts for the profiles of a 12 GB card: written before
    those are run, at many times the FLOPs and on other text, so it is a guess to be checked.

    Parameters are all of them: at these widths most are the embedding, and the head computes with it.
    """
    points = []
    for run in runs:
        if run.name.startswith("scaling-") and (figures := read_run(run.folder)):
            c = settings_of(run.words())
            rounded = float(run.name.split("-")[1].replace("e", "e+"))
            budget = min(BUDGETS, key=lambda b: abs(b - rounded))
            points.append({"budget": budget, "layers": c.n_layers, "width": c.d_model,
                           "parameters": figures["parameters"], "tokens": figures["tokens"],
                           "flops": figures["flops"], "loss": figures["val_loss"]})  # fmt: skip
    found = {"points": points, "best": isoflop(points), "law": fit_law(points) if len(points) > 5 else None}
    found["sizes"], trusted = fit_sizes(found["best"]), found["law"] and found["law"]["error"] < 0.1
    for profile in ("speedrun", "max3060"):
        c = settings_of([f"configs/{profile}.py"])
        tokens = c.max_steps * c.batch_size * c.grad_accum_steps * c.context_length
        budget = estimate_flops(model_config(c), c.context_length) * tokens
        said = predict(found["law"], budget) if trusted else {}  # a law that misses its own runs says nothing
        if found["sizes"]:
            n = best_size(found["sizes"], budget)
            said = {"parameters": n, "tokens": budget / (6 * n)}
            said |= {"loss": loss_of(found["law"], **said)} if trusted else {}
        if said:
            has = {"parameters": count_parameters(model_config(c))["total"], "tokens": tokens}
            found.setdefault("predictions", {})[profile] = {"flops": budget, **said, "has": has}
    return found


def best_size(sizes: dict, budget: float) -> float:
    return sizes["coefficient"] * budget ** sizes["exponent"]


def scaling_check(cfg: ExperimentConfig, found: dict) -> dict:
    """What the fits say of CHECK FLOPs, said before it is tried; then the run, and what came."""
    law = found["law"]
    per_pair = float(np.median([p["flops"] / (p["parameters"] * p["tokens"]) for p in found["points"]]))
    best, inner = predict(law, CHECK, per_pair), {}
    if found["sizes"]:
        n = best_size(found["sizes"], CHECK)
        best = {"parameters": n, "tokens": CHECK / (per_pair * n)}
    for shape in LARGER:
        c = settings_of([str(FOLDER / "baseline.py"), *size_flags(*shape, CHECK)])
        tokens = c.max_steps * c.batch_size * c.context_length
        inner[shape] = (count_parameters(model_config(c))["total"], tokens)
    shape = min(inner, key=lambda s: abs(math.log(inner[s][0] / best["parameters"])))
    n, tokens = inner[shape]
    said = {"parameters": n, "tokens": tokens, "loss": loss_of(law, n, tokens)}
    print(f"{CHECK:.1e} FLOPs: the fit says {best['parameters']:,.0f} parameters; of {shape[0]} layers of "
          f"{shape[1]} it says a loss of {said['loss']:.4f}; now they are trained", flush=True)  # fmt: skip
    flags = [f"--corpus={cfg.corpus}", f"--device={cfg.device}", *size_flags(*shape, CHECK)]
    run = run_of(home_of(cfg), "scaling-check", "baseline.py", flags, 1, cfg)
    failed = train_all([run], 1)
    if failed:
        return {"flops": CHECK, "best": best, "said": said, "failed": failed[str(run.folder)]}
    figures = read_run(run.folder)
    came = {"parameters": n, "tokens": figures["tokens"], "loss": figures["val_loss"]}
    return {"flops": CHECK, "best": best, "layers": shape[0], "width": shape[1], "said": said, "came": came}


# -----------------------------------------------------------------------------
# Shapes and batches: what they cost


def cost(layers: int, width: int, rows: int, device: str, T: int = 128) -> dict:
    """A training step (AdamW) in this shape: parameters, tokens a second (the better of two), peak memory of
    this process, and the rows that 12 GiB would hold in bfloat16, estimated.
    """
    heads = max(4, width // 64)
    c = ModelConfig(vocab_size=1024, context_length=T, n_layers=layers, d_model=width, n_heads=heads)
    model = ModernDecoderLM(c).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, seconds = torch.randint(c.vocab_size, (rows, T + 1), device=device), []
    for _ in range(3):  # the first one warms up
        begun = time.perf_counter()
        total, count = model(ids[:, :-1], ids[:, 1:])
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        total.item()  # a card has to have finished
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if "cuda" in device else peak_resident_bytes()
    most = 1
    while estimate_memory(c, 2 * most)["peak"] <= 12 * 2**30:
        most *= 2
    return {
        "parameters": count_parameters(c)["total"],
        "rows": rows,
        "tokens_per_second": rows * T / min(seconds[1:]),
        "peak_memory_gib": round(peak / 2**30, 3),
        "most_rows_in_12_gib": most,
    }


def costs(device: torch.device) -> dict:
    """`cost` of every shape, each in a process of its own, whose memory starts at nothing."""
    spawn, found = multiprocessing.get_context("spawn"), {}
    for name, shape in SHAPES.items():
        with worker_pool(1, "--only of other families", spawn) as pool:
            found[name] = pool.submit(cost, *shape, str(device)).result()
    return found


# -----------------------------------------------------------------------------
# Transfer: from nothing, from a pretrained model, from a prompt


def transfer(cfg: ExperimentConfig, runs: list[Run], device: torch.device) -> dict:
    """{task: {way: spread over the seeds}}, and the gain of pretraining, in points. A prompt has no or four
    examples and no training; the two that are tuned have seen the same examples. A seed of which a run failed
    is left out.
    """
    folders, found = {(r.name, r.seed): r.folder for r in runs}, {}
    seeds = sorted({seed for name, seed in folders if name == "transfer-pretrained"})
    for task in cfg.tasks.split(","):
        scores: dict[str, list[float]] = {}
        examples, _ = load_task(task, "validation")
        for seed in seeds:
            tuned = [r for r in runs if r.seed == seed and r.name.endswith(f"-{task}")]
            if not all(finished(r) for r in tuned):
                continue
            for base in ("scratch", "pretrained"):
                run = read_json(folders[f"transfer-{base}-{task}", seed] / "run.json")
                scores.setdefault(f"{base}, tuned", []).append(points(run["evaluation"]["metrics"]))
            model = load_model(str(folders["transfer-pretrained", seed]), device)
            asked = subsample(examples, 50 if cfg.quick else 500, seed)
            for shots in (0, 4):
                outputs, _ = answer_task(model, task, asked, few_shot(task, shots, seed))
                scores.setdefault(f"prompted, {shots} shots", []).append(
                    points(judge(task, asked, outputs)[1])
                )
        if not scores:
            continue
        found[task] = {way: spread(values) for way, values in scores.items()}
        gains = np.subtract(scores["pretrained, tuned"], scores["scratch, tuned"])
        found[task]["pretrained - scratch"] = spread(gains.tolist())
    return found


def points(metrics: dict) -> float:
    return 100 * next(
        metrics[key]["value"] for key in ("accuracy", "exact_match", "rouge1") if key in metrics
    )


# -----------------------------------------------------------------------------
# All of it


def measure(cfg: ExperimentConfig, runs: list[Run], families: dict) -> dict:
    """What a family wants to know beside the loss, of the runs with the first seed."""
    device, found = pick_device(cfg.device), {}
    trained = [r for r in runs if r.seed == 1 and r.script == "train.py"]
    first = {r.name: r for r in trained if read_run(r.folder)}
    if "baseline" not in first:
        return found
    c = settings_of(first["baseline"].words())
    tokenizer = Tokenizer.load(tokens_folder(c))
    val, _ = open_tokens(tokens_folder(c), "validation", tokenizer)
    T, rows = c.context_length, 4 if cfg.quick else 16
    rows = min(rows, len(val) // (STREAM * T + 1))
    ids = torch.from_numpy(val[: rows * (STREAM * T + 1)].astype(np.int64)).view(rows, -1).to(device)
    for family in ("gqa", "moe", "streams"):
        for name in ["baseline", *families.get(family, [])] if family in families else []:
            if name not in first:
                continue
            folder = first[name].folder
            model, entry = load(folder, device), found.setdefault(family, {})
            if family == "gqa":
                entry[name] = decoding(model)
            elif family == "moe" and model.config.ffn == "moe":
                entry[name] = {
                    "routing": {
                        r.seed: routing(r.folder) for r in runs if r.name == name and read_run(r.folder)
                    },
                    "classes": experts_by_class(model, ids[:, :T], tokenizer),
                }
            elif family == "streams":
                entry[name] = streams(model, ids, tokenizer, load(first["baseline"].folder, device))
                if name == "baseline":
                    entry[name]["endless"] = endless(model, 5_000 if cfg.quick else 100_000)
            print(f"measured {family}: {name}", flush=True)
    if {"gpt", "modern"} <= set(families.get("race", [])):
        found["race"] = race(runs)
    if "scaling" in families:
        found["scaling"] = scaling(runs)
        if found["scaling"]["law"] and not cfg.quick:
            found["scaling"]["check"] = scaling_check(cfg, found["scaling"])
    if "shapes" in families:
        found["shapes"] = costs(device)
    if "transfer" in families:
        found["transfer"] = transfer(cfg, runs, device)
    return found


def table(experiments: dict) -> list[str]:
    lines = [
        "",
        "| experiment | bits/byte | minus baseline [95 %] | tokens/s | GiB | verdict |",
        "|---" * 6 + "|",
    ]
    for name, e in experiments.items():
        if "bits_per_byte" not in e:
            lines.append(f"| {name} | failed: {next(iter(e['failed'].values()), 'not run')} | | | | |")
            continue
        d = e.get("difference")
        gap = f"{d['mean']:+.4f}" if d else ""
        gap += f" [{d['low']:+.4f}, {d['high']:+.4f}]" if d and "low" in d else ""
        lines.append(
            f"| {name} | {e['bits_per_byte']['mean']:.4f} | {gap} | {e['tokens_per_second']['mean']:,.0f} "
            f"| {e['peak_memory_gib']['mean']:.2f} | {e.get('verdict', '')} |"
        )
    return lines


def experiment(cfg: ExperimentConfig) -> dict:
    """Trains, measures, compares; returns what experiments.json holds."""
    begun, families = time.perf_counter(), chosen(cfg)
    jobs = cfg.jobs or (1 if pick_device(cfg.device).type == "cuda" else os.cpu_count() or 1)
    runs = plan(cfg)
    prepare_tokens(runs)
    failed = train_all([r for r in runs if r.script == "train.py"], jobs)
    failed |= train_all([r for r in runs if r.script != "train.py"], jobs)
    compared_with = {"baseline", *(name for family in families.values() for name in family)}
    names = list(dict.fromkeys(r.name for r in runs if r.name in compared_with))
    measured = measure(cfg, runs, families)
    check = measured.get("scaling", {}).get("check", {})
    if "failed" in check:
        failed["scaling-check"] = check["failed"]
    found = {
        "corpus": cfg.corpus, "quick": cfg.quick, "seeds": 1 if cfg.quick else cfg.seeds, "jobs": jobs,
        "families": families, "experiments": {name: compared(name, runs, failed) for name in names},
        "measured": measured, "failed": failed,
        "git": git_commit(), "versions": versions(), "hardware": hardware(pick_device(cfg.device)),
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip
    file = home_of(cfg) / "experiments.json"
    write_atomically(file, lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))
    print("\n".join(table(found["experiments"])))
    print(f"\n{file}: {found['seconds'] / 60:.1f} min" + "; QUICK RUN, no findings" * cfg.quick)
    return found


def main() -> None:
    cfg = parse_config(ExperimentConfig, __doc__)
    try:
        found = experiment(cfg)
        if found["failed"]:
            lines = [f"  {folder}: {why}" for folder, why in found["failed"].items()]
            raise ConfigError("\n".join(["these runs failed, their output is in FOLDER.log:", *lines]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"experiments.py: {error}") from None


if __name__ == "__main__":
    run_script(main)
