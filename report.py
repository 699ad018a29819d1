"""Stage 8: the report. One page that shows what the run folders hold, and what made each step.

    python report.py                              # all of out/ -> out/report/index.html
    python report.py --home=out --to=report       # to a folder that is kept
    python report.py --compare=out/a,out/b --to=out/compared    # two or more runs beside each other

It reads run folders and JSON, no model and no torch: copied folders on a laptop will do. It writes index.html
(one file, nothing is fetched), index.md with figures/ for a code host, a CSV beside every table, and
experiments.md (a log with an entry a run, its observations computed from its curves) and paper/ (a draft in
Markdown and LaTeX). What is missing gets a sentence that says which command makes it; a run that is still
going is shown as far as it got.

A section is a function from the home folder to a list of blocks: Text, Table, Figure or Code. Both pages are
written from the same blocks, so that they cannot disagree.
"""

from support.terminal import run_script

import base64
import contextlib
import csv
import html
import io
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from configs import ConfigError, parse_config
from data import TASKS, proportion
from errors import KINDS
from support.tables import read_jsonl


@dataclass
class ReportConfig:
    """What is read, and where the page goes."""

    home: str = "out"  # the folder that holds the runs
    to: str = ""  # where the page goes; default: {home}/report
    compare: str = ""  # run folders, joined by commas: only these, beside each other
    only: str = ""  # sections, joined by commas, such as training,lab; nothing: all, the log and the paper


# -----------------------------------------------------------------------------
# Blocks


@dataclass
class Text:
    words: str


@dataclass
class Code:
    words: str


@dataclass
class Table:
    name: str  # of the CSV
    columns: list[str]
    rows: list[list]


@dataclass
class Figure:
    name: str
    caption: str
    png: bytes


Block = Text | Code | Table | Figure


def figure(name: str, caption: str, fig) -> Figure:
    """A drawn figure; it is closed."""
    for axes in fig.axes:
        if "tokens" in axes.get_xlabel():
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(lambda x, _: count(x) if x else "0")
        if not axes.images and axes.get_label() != "<colorbar>":
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=80, bbox_inches="tight")
    plt.close(fig)
    return Figure(name, caption, file.getvalue())


# -----------------------------------------------------------------------------
# Reading, as tolerant as a run that is still going needs it


def read_json(file: Path) -> dict:
    """What a file holds; {} if it is missing or half-written."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def run_folders(home: Path) -> list[Path]:
    """Folders that hold a run, in the order in which they were started; the lab's lie deeper."""
    found = [file.parent for file in home.glob("*/run.json")]
    return sorted(found, key=lambda folder: (str(read_json(folder / "run.json").get("started")), folder.name))


# -----------------------------------------------------------------------------
# Words


def percent(x: dict | None) -> str:
    """72.3 [69.4, 75.0] of {"value": 0.723, ...}."""
    if not x or x.get("value") is None:
        return ""
    interval = f" [{100 * x['low']:.1f}, {100 * x['high']:.1f}]" if x.get("low") is not None else ""
    return f"{100 * x['value']:.1f}{interval}"


def count(n: float) -> str:
    """0.87M, 3.3M, 512."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.3g}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


# -----------------------------------------------------------------------------
# Sections


def stages(home: Path) -> list[Block]:
    """The life of the model, a line a stage."""
    pipeline = read_json(home / "pipeline.json")
    if not pipeline.get("rows"):
        return [Text("No table of stages yet: `bash run_all.sh cpu eval` makes it.")]
    rows = pipeline["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row if isinstance(row[key], dict)))
    said = {"exact_match": "greedy", "calculator": "greedy + calculator", "mean_sample": "one sampled answer"}
    cells, several = [], len({row["task"] for row in rows if row.get("task")}) > 1
    for row in rows:
        line = [Path(row["model"]).name + (f", {row['task']}" if several and row.get("task") else "")]
        for column in columns:
            x = row.get(column)
            line.append("" if not x else f"{x['value']:.3f}" if "bits" in column else percent(x))
        cells.append([*line, f"{row.get('minutes', 0):.1f}"])
    return [
        Text(
            "Percent of problems solved, of one training run each, with 95 % intervals over the problems; "
            "bits per byte where it says so."
        ),
        Table("stages", ["model", *(said.get(c, c) for c in columns), "minutes of training"], cells),
    ]


def ledger(home: Path) -> list[Block]:
    """Where the time went, beside what the plan had said."""
    took, planned = (
        columns_of(home / "ledger.tsv"),
        {x[0]: float(x[1]) for x in columns_of(home / "plan.tsv")},
    )
    if not took:
        return [Text("No time ledger: `bash run_all.sh` keeps one.")]
    rows = [[name, minutes(float(s)), minutes(planned[name]) if name in planned else "", command]
            for name, s, command in took]  # fmt: skip
    said = minutes(sum(planned.get(x[0], 0.0) for x in took)) if planned else ""
    rows.append(["all", minutes(sum(float(x[1]) for x in took)), said, ""])
    return [Table("ledger", ["stage", "minutes", "planned", "command"], rows)]


def columns_of(file: Path) -> list[list[str]]:
    """The lines of run_all.sh's ledger or of the plan: a stage and two columns more."""
    try:
        lines = [x.split("\t") for x in file.read_text().splitlines()]
    except OSError:
        return []
    return [x for x in lines if len(x) == 3]


SHARES = {"accuracy": "accuracy", "macro_f1": "macro F1", "exact_match": "exact match"}  # in percent
SHARES |= {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
TEXT_METRICS = {
    "bits_per_byte": "bits/byte",
    "perplexity": "perplexity",
    "word_perplexity": "word perplexity",
}


def results(home: Path) -> list[Block]:
    """Every figure of every results.json: a line for each model on each task or text."""
    rows = []
    for file in sorted([*home.glob("eval/*/results.json"), *home.glob("*/results.json")]):
        for name, entry in read_json(file).get("results", {}).items():
            if not isinstance(entry, dict) or not isinstance(entry.get("metrics"), dict):
                continue
            figures = []
            for metric, x in entry["metrics"].items():
                if metric in SHARES:
                    figures.append(f"{SHARES[metric]} {percent(x)}")
                elif metric in TEXT_METRICS:
                    figures.append(f"{TEXT_METRICS[metric]} {with_interval(x)}")
            model = file.parent.name.replace("--", "/") + " (SMOKE RUN, no result)" * bool(entry.get("smoke"))
            if figures:
                rows.append([name, model, ", ".join(figures), f"{entry.get('items', 0):,}"])
    if not rows:
        return [Text("No model was measured on a task: `python eval.py RUN` does it.")]
    rows.sort(key=lambda row: row[0])  # models on one task stand together, those from the hub first
    return [Table("results", ["measured", "model", "result [95 %]", "items"], rows)]


def with_interval(x: dict) -> str:
    """A figure that is no share, with its interval: 1.234 [1.200, 1.270]."""
    return f"{x['value']:,.3f} [{x['low']:,.3f}, {x['high']:,.3f}]"


CURVES = 16  # runs whose curves a page has room for


def training(home: Path) -> list[Block]:
    """What was trained, how fast, and how the loss fell."""
    rows, drawn, alike = [], deque(maxlen=CURVES), {}  # long runs are not kept in memory
    planned = {x[0].removeprefix("finetune-"): float(x[2]) for x in columns_of(home / "plan.tsv")}
    for folder in run_folders(home):
        run, lines = read_json(folder / "run.json"), read_jsonl(folder / "metrics.jsonl")
        steps = [x for x in lines if "tokens_per_second" in x]
        last, best = ((run.get("results") or {}).get(key, {}) for key in ("last", "best"))
        loss = [f"{x['val_loss']:.4f} at {x['step']:,}" if "val_loss" in x else "" for x in (last, best)]
        speed = statistics.median(x["tokens_per_second"] for x in steps) if steps else 0
        memory = max((x.get("peak_memory_gib", 0) for x in steps), default=0)
        size = planned.get("pretrain" if run.get("stage") == "train" else folder.name)
        held = f"{memory:.2f}" + (f" ({size:.2f})" if size else "")
        state = run.get("status", "unreadable") + ", a smoke run" * bool(run.get("smoke"))
        # DPO and a verifier's head count what they compare, not its tokens.
        unit = " pairs" if run.get("stage") == "dpo" else " answers" if run.get("verifier") == "head" else ""
        read = 0 if unit or not steps else steps[-1].get("tokens", 0)
        spent = [count(read), f"{6 * run.get('parameters', 0) * read:.1e}"] if read else ["", ""]
        rows.append([folder.name, run.get("stage", ""), count(run.get("parameters", 0)), state, *loss, *spent,
                     minutes(run.get("seconds", 0)), f"{speed:,.0f}{unit}", held])  # fmt: skip
        steps = [x for x in steps if "loss" in x]  # a step whose loss was not finite has none
        if steps:
            drawn.append((folder.name, lines))
            held_out = run.get("data", {}).get("validation", {}).get("fingerprint")
            some = alike.setdefault((run.get("stage"), run.get("tokenizer"), held_out), deque(maxlen=CURVES))
            some.append((folder.name, [x for x in lines if "val_loss" in x], thinned(steps, 200)))
    if not rows:
        return [Text("No run folders here: `bash run_all.sh cpu` makes them.")]
    columns = "run|stage|parameters|state|last validation loss|best|tokens|FLOPs, 6 N tokens".split("|")
    columns += ["minutes", "tokens/s", "GiB (planned)" if planned else "GiB"]
    blocks = beside(alike)
    for name, lines in drawn:
        blocks += [curves(name, lines), *preferences(name, lines)]
    if len(rows) > CURVES:
        words = f"Curves of the {CURVES} newest of {len(rows)} runs; `report.py --compare=A,B` draws any."
        blocks.insert(0, Text(words))
    return [Table("runs", columns, rows), *blocks]


def thinned(lines: list, most: int = 1000) -> list:
    """A picture has room for a thousand points."""
    return lines[:: max(1, len(lines) // most)]


def beside(alike: dict) -> list[Block]:
    """Runs of one stage with the same tokenizer and validation text, overlaid: these losses compare."""
    several = [(stage, some) for (stage, _, held_out), some in alike.items() if len(some) > 1 and held_out]
    return [overlaid(f"curves-together-{i}-{stage}", some) for i, (stage, some) in enumerate(several, 1)]


def overlaid(name: str, runs) -> Figure:
    """Losses of several runs [(name, checks, steps)] against steps, tokens and minutes: validation as lines
    with points, training thin behind them.
    """
    fig, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    for i, (run, checks, steps) in enumerate(runs):
        at = {x["step"]: x for x in steps}
        for panel, (key, label, scale) in zip(axes, CLOCKS, strict=True):
            panel.plot([x.get(key, 0) / scale for x in steps], [x["loss"] for x in steps], color=f"C{i}",
                       lw=0.8, alpha=0.4)  # fmt: skip
            nearest = [at[min(at, key=lambda step: abs(step - c["step"]))] for c in checks if at]
            x, y = [step.get(key, 0) / scale for step in nearest], [c["val_loss"] for c in checks if at]
            panel.plot(x, y, "o-", color=f"C{i}", ms=4, label=run)
            panel.set_xlabel(label)
    axes[0].set_ylabel("loss")
    axes[-1].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    return figure(
        name, "Validation losses, with points, and training losses, thin, of runs on one text.", fig
    )


CLOCKS = (("step", "step", 1), ("tokens", "tokens read", 1), ("seconds", "minutes", 60))


def curves(name: str, lines: list[dict]) -> Figure:
    """Loss against steps, tokens (and epochs) and minutes; learning rate, gradient and speed below."""
    steps, checks = [x for x in lines if "loss" in x], [x for x in lines if "val_loss" in x]
    at = {x["step"]: x for x in steps}
    steps = thinned(steps)
    fig, axes = plt.subplots(2, 3, figsize=(11, 5.2), height_ratios=[2, 1])
    for column, (key, label, scale) in enumerate(CLOCKS):
        x = [line.get(key, 0) / scale for line in steps]
        axes[0, column].plot(x, [line["loss"] for line in steps], color="#4477aa", label="training", lw=1)
        held = [(at[c["step"]].get(key, 0) / scale, c["val_loss"]) for c in checks if c["step"] in at]
        if held:
            axes[0, column].plot(*zip(*held, strict=True), "o-", color="#ee6677", label="validation", ms=4)
        axes[0, column].set(ylabel="loss" if column == 0 else "")
        axes[0, column].set_xlabel(label)
        axes[1, column].set_xlabel(label)
    x = [line["step"] for line in steps]
    axes[1, 0].plot(x, [line.get("learning_rate", 0) for line in steps], color="#228833")
    axes[1, 0].set_ylabel("learning rate")
    axes[1, 1].plot(
        [s.get("tokens", 0) for s in steps], [s.get("grad_norm", 0) for s in steps], color="#aa3377", lw=1
    )
    axes[1, 1].set_ylabel("gradient norm")
    speeds = [(s.get("seconds", 0) / 60, s["tokens_per_second"]) for s in steps if "tokens_per_second" in s]
    axes[1, 2].plot(*zip(*speeds, strict=True), color="#888888", lw=1)
    axes[1, 2].set(ylabel="tokens/s", ylim=(0, None))
    axes[0, 0].legend(frameon=False)
    if epochs := steps[-1].get("epoch"):
        axes[1, 1].set_xlabel(f"tokens read ({epochs:.2g} epochs)")
    fig.suptitle(name)
    fig.tight_layout()
    return figure(
        f"curves-{name}", f"{name}: how the loss fell; below, what the optimizer and the clock did.", fig
    )


def preferences(name: str, lines: list[dict]) -> list[Block]:
    """Of a run that learns from pairs: accuracy and margin of the reward, log-probabilities of both sides."""
    checks = [x for x in lines if "reward_margin" in x]
    if not checks:
        return []
    fig, axes = plt.subplots(1, 3, figsize=(11, 2.8))
    x = [c["step"] for c in checks]
    axes[0].plot(x, [100 * c["reward_accuracy"] for c in checks], "o-", ms=4, color="#228833")
    axes[0].set(xlabel="step", ylabel="% of pairs right")
    axes[1].plot(x, [c["reward_margin"] for c in checks], "o-", ms=4, color="#aa3377")
    axes[1].set(xlabel="step", ylabel="margin of the reward, nats")
    for side in ("chosen", "rejected"):
        axes[2].plot(x, [c[side] for c in checks], "o-", ms=4, label=side)
    axes[2].set(xlabel="step", ylabel="log p of an answer, nats")
    axes[2].legend(frameon=False)
    fig.tight_layout()
    caption = (
        f"{name}: held-out pairs. If both sides fall together, the model unlearns instead of preferring."
    )
    return [figure(f"preferences-{name}", caption, fig)]


def samples(home: Path) -> list[Block]:
    """What it says: the same prompts by checkpoint, and by stage."""
    blocks: list[Block] = []
    for folder in run_folders(home):
        lines = [x for x in read_jsonl(folder / "samples.jsonl") if "text" in x]
        if lines:
            rows = [[x.get("step", ""), shorten(x.get("prompt", "")), shorten(x["text"])] for x in lines]
            blocks += [Text(f"**{folder.name}** while it was trained:")]
            blocks += [Table(f"samples-{folder.name}", ["step", "prompt", "continuation"], rows)]
    answered = read_json(home / "pipeline.json").get("battery", {})
    if answered:
        asked = next(iter(answered.values()))
        models = [m for m, said in answered.items() if len(said) == len(asked)]
        rows = [
            [
                shorten(item["asked"]),
                shorten(item["meant"]),
                *(shorten(answered[m][i]["said"]) for m in models),
            ]
            for i, item in enumerate(asked[:12])
        ]
        blocks += [Text("The same instructions by stage, the first dozen:")]
        blocks += [Table("battery", ["asked", "expected", *(Path(m).name for m in models)], rows)]
    return blocks or [Text("No samples: training runs write them at each evaluation.")]


def shorten(text: str, most: int = 240) -> str:
    text = " ⏎ ".join(str(text).strip().split("\n"))
    return text if len(text) <= most else text[: most - 1] + "…"


def choosing(home: Path) -> list[Block]:
    """What answering many times adds, and what the verifier is worth."""
    blocks: list[Block] = []
    for folder in run_folders(home):
        for entry in read_json(folder / "results.json").get("results", {}).values():
            if isinstance(entry, dict) and entry.get("curves"):
                blocks += chosen(folder.name, entry)
    return blocks or [Text("No model was sampled more than once: `python eval.py RUN --samples=16` does it.")]


def chosen(name: str, entry: dict) -> list[Block]:
    """Curves over the number of answers, differences, errors of one model."""
    fig, axes = plt.subplots(figsize=(6.4, 4.2))
    budgets = sorted({int(k) for curve in entry["curves"].values() for k in curve})
    for way, curve in entry["curves"].items():
        points = [(int(k), x) for k, x in curve.items()]
        x, y = [k for k, _ in points], [100 * p["value"] for _, p in points]
        (line,) = axes.plot(
            x, y, "--" if way == "pass" else "o-", label="pass (oracle)" if way == "pass" else way
        )
        if all("low" in p for _, p in points):
            low, high = ([100 * p[key] for _, p in points] for key in ("low", "high"))
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, lw=0)
    greedy = entry["metrics"].get("exact_match", {}).get("value")
    if greedy is not None:
        axes.axhline(100 * greedy, color="#888888", ls=":", label="greedy")
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, budgets)
    axes.set(xlabel="answers a problem", ylabel="% right", title=f"{name}, {entry['task']}, {entry['split']}")
    axes.legend(frameon=False, fontsize=8)
    caption = (
        f"{name}: how many of {entry['items']:,} problems are right when one of n answers is chosen, with "
        "95 % intervals. A calculator is a tool; the oracle knows the right answer and bounds them all."
    )
    rows = [[way, f"{100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"]
            for way, d in entry.get("differences", {}).items()]  # fmt: skip
    blocks: list[Block] = [figure(f"choosing-{name}-{entry['task']}", caption, fig)]
    if rows:
        blocks.append(
            Table(f"differences-{name}-{entry['task']}", ["paired difference", "points [95 %]"], rows)
        )
    for label, gates in entry.get("gating", {}).items():
        rows = [
            [g["threshold"] if g["threshold"] <= 1 else "never", f"{g['samples']:.1f}", percent(g["right"])]
            for g in gates
        ]
        blocks.append(Text(f"Sampling until the verifier ({label}) is sure, with {name}:"))
        blocks.append(Table(f"gating-{name}-{label}", ["sure from", "answers a problem", "right"], rows))
    return blocks


def verifiers(home: Path) -> list[Block]:
    """Whether a verifier's probabilities are true."""
    blocks: list[Block] = []
    for folder in run_folders(home):
        found = read_json(folder / "run.json").get("verification")
        if not found:
            continue
        rows = [[who, f"{x['auc']:.3f}", f"{x['auc_within']['value']:.3f}", percent(x["best_of_n"])]
                for who, x in found.items() if isinstance(x, dict) and "auc_within" in x]  # fmt: skip
        blocks.append(
            Text(f"**{folder.name}** on {found['answers']:,} answers to {found['problems']:,} problems:")
        )
        columns = ["score", "AUC", "AUC within a problem", "best of n right"]
        blocks.append(Table(f"verifier-{folder.name}", columns, rows))
        bins = [b for b in found.get("calibration", {}).get("bins", []) if b.get("n")]
        if bins:
            fig, axes = plt.subplots(figsize=(4.2, 4))
            axes.plot([0, 1], [0, 1], ":", color="#888888")
            axes.plot([b["said"] for b in bins], [b["is"] for b in bins], "o-", color="#4477aa")
            axes.set(xlabel="probability it says", ylabel="share that is right", title=folder.name)
            error = 100 * found["calibration"]["ece"]
            caption = (
                f"{folder.name}: on the dotted line its probabilities are true; mean error {error:.1f} %."
            )
            blocks.append(figure(f"reliability-{folder.name}", caption, fig))
    return blocks or [Text("No verifier: `python verifier.py configs/verifier.py` trains one.")]


def failures(home: Path) -> list[Block]:
    """What kinds of mistakes a model makes, what a verifier mends and breaks, what a stage did to its parent,
    and which labels are doubtful.
    """
    blocks, before, verdicts = [], {}, {}
    for folder in run_folders(home):
        blocks += violations(folder)
        found = read_json(folder / "results.json").get("results", {})
        last = {}  # of a task's evaluations: with more examples in the prompt, or with many answers
        for key, e in found.items():
            if isinstance(e, dict) and e.get("task") in TASKS:
                records = read_jsonl(folder / "answers" / f"{key.replace(' ', '-')}.jsonl")
                if records := [r for r in records if "kinds" in r]:
                    last[e["task"], e["split"]] = records, e
        for (task, split), (records, entry) in last.items():
            name = f"{folder.name}-{task}-{split}"
            blocks += sorted_mistakes(folder.name, name, task, records, entry)
            for label in entry.get("verifiers", {}):
                keys = ("text", "output", "correct", label, f"{label} correct", f"{label} sure")
                pairs = [tuple(r.get(k) for k in keys) for r in records if label in r]
                blocks += changed(f"{name}-{label}", "greedy", label, pairs)
            before[folder.name, task, split] = {r["text"]: r for r in records if "output" in r}
            parent = Path(str(read_json(folder / "run.json").get("parent"))).name
            if (old := before.get((parent, task, split))) and TASKS[task].metric == "exact_match":
                both = [(old[r["text"]], r) for r in records if r["text"] in old]
                pairs = [(r["text"], o["output"], o["correct"], r["output"], r["correct"]) for o, r in both]
                blocks += changed(f"{name}-{parent}", parent, folder.name, pairs)
            for r in records:
                if "sure" in r:
                    verdicts.setdefault((task, split), {}).setdefault(r["text"], []).append((folder.name, r))
    for (task, split), by_text in verdicts.items():
        blocks += doubtful(f"{task}-{split}", by_text)
    return blocks or [Text("No mistakes to sort: `python eval.py RUN --tasks=...` records them.")]


def sorted_mistakes(model: str, name: str, task: str, records: list[dict], entry: dict) -> list[Block]:
    """How many answers are of which kind, with an example of each; what a kind is, errors.py says."""
    kinds = {k: [r for r in records if k in r["kinds"]] for k in KINDS}
    kinds = {k: some for k, some in kinds.items() if some}
    if TASKS[task].metric == "rouge":
        flawed = sum(r["kinds"] != ["other"] for r in records)
        words = f"has a flaw that can be counted in {flawed:,} of {len(records):,} summaries."
        columns = ["flaw", "summaries", "% of all", "ROUGE-L of these"]
        rouge = {k: 100 * statistics.fmean(r["rougeL"] for r in some) for k, some in kinds.items()}
        rows = [[KINDS[k], len(some), percent(proportion(len(some), len(records))), f"{rouge[k]:.1f}"]
                for k, some in kinds.items()]  # fmt: skip
        shown = {k: some for k, some in kinds.items() if k != "other"}
    else:
        wrong = [r for r in records if not r["correct"]]
        words = f"is wrong on {len(wrong):,} of {len(records):,}."
        shown = {k: [r for r in some if not r["correct"]] for k, some in kinds.items()}
        if TASKS[task].labels:
            columns = ["the review has", "reviews", "wrong", "% wrong"]
            rows = [[KINDS[k], len(some), len(shown[k]), percent(proportion(len(shown[k]), len(some)))]
                    for k, some in kinds.items()]  # fmt: skip
        else:
            columns = ["first mistake", "answers", "% of the wrong ones"]
            rows = [[KINDS[k], len(some), percent(proportion(len(some), len(wrong)))]
                    for k, some in kinds.items()]  # fmt: skip
    shots = f", {entry['shots']} examples in the prompt" if entry.get("shots") else ""
    blocks: list[Block] = [Text(f"**{model}**, {task}, {entry['split']}{shots}: {words}")]
    if rows:
        blocks.append(Table(f"errors-{name}", columns, rows))
    examples = []
    for kind, first in ((k, some[0]) for k, some in shown.items() if some):
        said = first.get("output", first.get("prediction"))  # a class, where nothing is written
        examples.append([KINDS[kind], *(shorten(x) for x in (first["text"], said, first["target"]))])
    if examples:
        blocks.append(Table(f"examples-{name}", ["kind", "asked", "said", "should be"], examples))
    return blocks


def doubtful(name: str, by_text: dict[str, list[tuple]]) -> list[Block]:
    """Labels that several models contradict with one voice and a probability above 0.9: look at them."""
    found = []
    for text, said in by_text.items():
        answers = {r["prediction"] for _, r in said}
        sure = statistics.fmean(r["sure"] for _, r in said)
        if len(said) > 1 and len(answers) == 1 and not said[0][1]["correct"] and sure > 0.9:
            models = ", ".join(model for model, _ in said)
            found.append([shorten(text), said[0][1]["target"], answers.pop(), f"{sure:.2f}", models])
    found.sort(key=lambda row: row[3], reverse=True)
    several = max((len(said) for said in by_text.values()), default=0) > 1
    if not several:
        return []
    words = f"**{name}**: {len(found)} labels that all models contradict, with a mean probability above 0.9; "
    words += "they may be wrong."
    columns = ["text", "label", "all models say", "mean probability", "models"]
    return [Text(words), *([Table(f"doubtful-{name}", columns, found[:10])] if found else [])]


def changed(name: str, a: str, b: str, pairs: list[tuple]) -> list[Block]:
    """Of (problem, a's answer, right?, b's answer, right?, its probability?): how many b mended and broke;
    three of each, of the broken those that b was surest of.
    """
    mended = [p for p in pairs if p[4] and not p[2]]
    broken = [p for p in pairs if p[2] and not p[4]]
    if not (mended or broken):
        return []
    sure = len(pairs[0]) > 5 and pairs[0][5] is not None
    if sure:
        broken.sort(key=lambda p: -p[5])
    rows = [[what, *(shorten(p[i], 400) for i in (0, 1, 3)), *([f"{p[5]:.2f}"] if sure else [])]
            for what, some in (("mended", mended), ("broken", broken)) for p in some[:3]]  # fmt: skip
    words = f"**{b}** is right where {a} is wrong on {len(mended)} of {len(pairs):,} problems, "
    words += f"wrong where {a} is right on {len(broken)}. Three of each:"
    columns = ["", "problem", a, b, *(["it says"] if sure else [])]
    return [Text(words), Table(f"changed-{name}", columns, rows)]


def violations(folder: Path) -> list[Block]:
    """Held-out pairs that a model which learnt preferences moved the wrong way, the worst first."""
    found = read_jsonl(folder / "violations.jsonl")
    of = read_json(folder / "run.json").get("data", {}).get("validation", {}).get("pairs")
    if not found or not of:
        return []
    rows = [[f"{x['margin']:.1f}", *(shorten(x[key], 400) for key in ("prompt", "chosen", "rejected"))]
            for x in found[:3]]  # fmt: skip
    words = f"**{folder.name}** moved {len(found)} of {of} held-out pairs the wrong way; the three worst:"
    return [Text(words), Table(f"violations-{folder.name}", ["margin", "prompt", "chosen", "rejected"], rows)]


SEEN = {  # score of a head: what its map shows
    "previous": "a line just below the diagonal: every token looks at the one before",
    "first": "a full first column: heads park their attention there when nothing else fits",
    "induction": "spots off the diagonal: what followed the same word last time",
    "entropy": "an even shade: the head averages over all it may see",
}


def attention(home: Path) -> list[Block]:
    """What the heads look at."""
    blocks: list[Block] = []
    for folder in run_folders(home):
        found = read_json(folder / "attention.json")
        if not found.get("scores"):
            continue
        fig, axes = plt.subplots(1, len(found["scores"]), figsize=(11, 2.8))
        for panel, (name, scores) in zip(axes, found["scores"].items(), strict=True):
            image = panel.imshow(scores, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            panel.set(title=name, xlabel="head", xticks=range(len(scores[0])), yticks=range(len(scores)))
        axes[0].set_ylabel("layer")
        fig.colorbar(image, ax=axes, fraction=0.02)
        caption = (
            f"{folder.name}: scores of every head on random tokens that come twice. 1: all of its attention; "
        )
        caption += "of entropy: spread evenly."
        blocks.append(figure(f"heads-{folder.name}", caption, fig))
        if copies := found.get("copies"):
            told = " and ".join(f"{share:.0%} of those of {kind}" for kind, share in copies.items())
            blocks.append(Text(f"Told again, {told} are copied (digits; a guess gets a quarter or so)."))
        for i, example in enumerate(found["maps"]):
            labels = [token.replace("\n", "⏎").replace(" ", "␣") for token in example["tokens"]]
            fig, axes = plt.subplots(2, 2, figsize=(11, 10.5))
            for panel, head in zip(axes.flat, example["heads"], strict=True):
                image = panel.imshow(head["weights"], vmin=0, vmax=1, cmap="viridis")
                panel.set_title(
                    f"most {head['most']}: layer {head['layer']}, head {head['head']}", fontsize=10
                )
                panel.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
                panel.set_yticks(range(len(labels)), labels, fontsize=7)
            fig.tight_layout()
            fig.colorbar(image, ax=axes, fraction=0.02)
            seen = "; ".join(f"{h['most']}, {SEEN[h['most']]}" for h in example["heads"] if h["most"] in SEEN)
            caption = f"{folder.name}: rows look at columns. To look for: {seen}."
            blocks.append(figure(f"attention-{folder.name}-{i + 1}", caption, fig))
    return blocks or [Text("No maps: `python eval.py out/base --attention` makes them.")]


def lab(home: Path) -> list[Block]:
    """What each part of the model buys."""
    blocks: list[Block] = []
    for file in sorted(home.glob("experiments/*/experiments.json")):
        found = read_json(file)
        entries = {k: e for k, e in found.get("experiments", {}).items() if "bits_per_byte" in e}
        if not entries:
            continue
        seeds = f"{found['seeds']} seed{'s' * (found['seeds'] > 1)}"
        words = f"**{found['corpus']}**, {seeds}, {minutes(found['seconds'])} minutes"
        blocks.append(Text(words + (": a quick run, no findings." if found.get("quick") else ".")))
        rows = []
        for name, e in entries.items():
            d = e.get("difference", {})
            gap = f"{d['mean']:+.4f}" if d else ""
            gap += f" [{d['low']:+.4f}, {d['high']:+.4f}]" if "low" in d else ""
            rows.append([name, e["hypothesis"], f"{e['bits_per_byte']['mean']:.4f}", gap,
                         f"{e['tokens_per_second']['mean']:,.0f}", e.get("verdict", "")])  # fmt: skip
        columns = ["experiment", "hypothesis", "bits/byte", "minus baseline [95 %]", "tokens/s", "verdict"]
        blocks.append(Table(f"lab-{file.parent.name}", columns, rows))
        gaps = [(n, e["difference"]) for n, e in entries.items() if "low" in e.get("difference", {})]
        if gaps:
            gaps.sort(key=lambda x: x[1]["mean"])
            fig, axes = plt.subplots(figsize=(7, 0.26 * len(gaps) + 1))
            for i, (_, d) in enumerate(gaps):
                colour = "#228833" if d["high"] < 0 else "#ee6677" if d["low"] > 0 else "#888888"
                axes.plot([d["low"], d["high"]], [i, i], color=colour)
                axes.plot(d["mean"], i, "o", color=colour, ms=4)
            axes.axvline(0, color="black", lw=0.8)
            axes.set_yticks(range(len(gaps)), [n for n, _ in gaps])
            axes.set_xscale("symlog", linthresh=0.05)
            axes.set_xlabel("bits a byte minus the baseline's (left: better)")
            caption = (
                "Differences to the baseline with 95 % intervals over the seeds; grey: no difference found."
            )
            blocks.append(figure(f"forest-{file.parent.name}", caption, fig))
        for family, part in MEASURED.items():
            if what := found.get("measured", {}).get(family):
                blocks += part(file.parent.name, what)
    return blocks or [Text("The lab has not run: `bash run_all.sh experiments`.")]


def gqa(corpus: str, found: dict) -> list[Block]:
    rows = [[name, x["cache_bytes_per_token"], f"{x['tokens_per_second']:,.0f}"] for name, x in found.items()]
    return [Table(f"gqa-{corpus}", ["key-value heads", "cache bytes a token", "decoded tokens/s"], rows)]


def moe(corpus: str, found: dict) -> list[Block]:
    """The router over training, every seed a line."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    rows = []
    for i, (name, x) in enumerate(found.items()):
        for j, run in enumerate(x["routing"].values()):
            style = {"color": f"C{i}", "lw": 1, "label": name if j == 0 else None}
            axes[0].plot(run["steps"], run["busiest_expert"], **style)
            axes[1].plot(run["steps"], run["dropped"], **style)
        bits = ", ".join(f"{layer['bits']:.2f}" for layer in x["classes"])
        rows.append([name, bits])
    axes[0].axhline(1, color="#888888", ls=":")
    axes[0].set(xlabel="step", ylabel="load of the busiest expert / an even one")
    axes[1].set(xlabel="step", ylabel="choices dropped in a step")
    axes[0].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    caption = "The router over training, a line a seed; 1 is an even load."
    columns = ["mixture", "bits that the expert tells of the class of a token, by layer"]
    return [figure(f"moe-{corpus}", caption, fig), Table(f"moe-{corpus}", columns, rows)]


def streams(corpus: str, found: dict) -> list[Block]:
    """Perplexity beyond the context, by what the model may look at."""
    blocks: list[Block] = []
    for name, x in found.items():
        fig, axes = plt.subplots(figsize=(6.4, 3.8))
        for way, values in x["perplexity"].items():
            axes.plot(list(values), list(values.values()), "o-", ms=4, label=way)
        axes.set_yscale("log")
        axes.set(xlabel="position in the text, in contexts", ylabel="perplexity", title=name)
        axes.legend(frameon=False, fontsize=8)
        caption = (
            f"{name}: a text sixteen times as long as the context. Where a line jumps, the model is lost."
        )
        blocks.append(figure(f"streams-{corpus}-{name}", caption, fig))
        said = x["continuations"]
        keys = [k for k in next(iter(said.values())) if k != "example"]
        rows = [[way, *(f"{v[k]:.3f}" for k in keys), shorten(v["example"])] for way, v in said.items()]
        columns = ["continued four contexts under", *(k.replace("_", " ") for k in keys), "how one ends"]
        blocks.append(Table(f"continuations-{corpus}-{name}", columns, rows))
        if endless := x.get("endless"):
            rates, sizes = endless["tokens_per_second"], sorted(set(endless["cache_bytes"]))
            words = f"A stream of {endless['tokens']:,} tokens through {name}: a cache of "
            words += f"{' to '.join(f'{s:,}' for s in sizes)} bytes, "
            words += f"{min(rates):,.0f} to {max(rates):,.0f} tokens/s."
            blocks.append(Text(words))
    return blocks


def scaling(corpus: str, found: dict) -> list[Block]:
    """Sizes at equal FLOPs, their minima, the law through all of them, and what it predicts."""
    fig, axes = plt.subplots(figsize=(6.4, 4))
    minima, law = {b["budget"]: b for b in found["best"]}, found.get("law")
    for i, budget in enumerate(sorted({p["budget"] for p in found["points"]})):
        points = [p for p in found["points"] if p["budget"] == budget]
        sizes = [p["parameters"] for p in points]
        axes.plot(sizes, [p["loss"] for p in points], "o", color=f"C{i}", label=f"{budget:.1e} FLOPs", ms=4)
        if law:
            by_law = [law["E"] + law["A"] / p["parameters"] ** law["a"] + law["B"] / p["tokens"] ** law["b"]
                      for p in points]  # fmt: skip
            axes.plot(sizes, by_law, "-", color=f"C{i}", lw=1)
        if minima.get(budget, {}).get("inside"):
            axes.plot(minima[budget]["parameters"], minima[budget]["loss"], "*", color=f"C{i}", ms=12)
    axes.set(xlabel="parameters", ylabel="validation loss", xscale="log", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False)
    caption = (
        "Sizes at equal FLOPs (dots), the law (lines), and the minimum of a parabola through three sizes, if "
        "it lies within them (stars)."
    )
    blocks: list[Block] = [figure(f"scaling-{corpus}", caption, fig)]
    told, sizes = found.get("predictions", {}), found.get("sizes")
    if sizes:
        blocks.append(Text(f"The best size grows with FLOPs C as C^{sizes['exponent']:.2f}."))
    if not law:
        return [*blocks, Text("No law of loss goes through these runs.")]
    blocks.append(Text(
        f"Loss = {law['E']:.3f} + {law['A']:.3g} / N^{law['a']:.2f} + {law['B']:.3g} / D^{law['b']:.2f} "
        f"for N parameters and D tokens; the runs lie {100 * law['error']:.1f} % off."
    ))  # fmt: skip
    rows = []
    for name, p in told.items():
        loss = f"{p['loss']:.3f}" if "loss" in p else "nothing: the law misses its own runs"
        rows.append(
            [f"{name}, predicted best", f"{p['flops']:.2e}", count(p["parameters"]), count(p["tokens"]), loss]
        )
        if "has" in p:
            rows.append(
                [f"{name}, as configured", f"{p['flops']:.2e}", *(count(v) for v in p["has"].values()), ""]
            )
    columns = ["run", "FLOPs", "parameters", "tokens", "loss"]
    check = found.get("check", {})
    if "came" in check:
        for who, p in (("one more run, predicted", check["said"]), ("one more run, measured", check["came"])):
            rows.append([who, f"{check['flops']:.2e}", count(p["parameters"]), count(p["tokens"]),
                         f"{p['loss']:.3f}"])  # fmt: skip
    if not rows:
        return blocks
    words = "Said by a fit before anything of that size was run, in nats a token of this text:"
    return [*blocks, Text(words), Table(f"predicted-{corpus}", columns, rows)]


def shapes(corpus: str, found: dict) -> list[Block]:
    rows = []
    for name, x in found.items():
        speed, memory = f"{x['tokens_per_second']:,.0f}", f"{x['peak_memory_gib']:.2f}"
        rows.append([name, count(x["parameters"]), x["rows"], speed, memory, f"{x['most_rows_in_12_gib']:,}"])
    columns = ["shape", "parameters", "rows", "tokens/s", "GiB", "rows that 12 GiB would hold, by the plan"]
    return [Table(f"shapes-{corpus}", columns, rows)]


def transfer(corpus: str, found: dict) -> list[Block]:
    def cell(x: dict) -> str:
        return f"{x['mean']:.1f}" + (f" [{x['low']:.1f}, {x['high']:.1f}]" if "low" in x else "")

    ways = list(next(iter(found.values())))
    rows = [[task, *(cell(x[way]) for way in ways)] for task, x in found.items()]
    words = "A task learnt from nothing, by a pretrained model, or told in its prompt; percent right."
    return [Text(words), Table(f"transfer-{corpus}", ["task", *ways], rows)]


def race(corpus: str, found: dict) -> list[Block]:
    rows = []
    for seed, x in found["seeds"].items():
        there = [x["step"], f"{x['seconds']:.0f}", f"{x['ratio']:.2f}"] if "ratio" in x else ["never", "", ""]
        rows.append([seed, f"{x['loss']:.3f}", x["gpt_steps"], f"{x['gpt_seconds']:.0f}", *there,
                     f"{x['modern_loss']:.3f}"])  # fmt: skip
    columns = ["seed", "gpt ends at", "steps", "seconds", "modern is there at step", "seconds", "share",
               "modern ends at"]  # fmt: skip
    words = "How soon the modern parts together are where a plain GPT ends, nats a token."
    return [Text(words), Table(f"race-{corpus}", columns, rows)]


MEASURED = {
    "gqa": gqa,
    "moe": moe,
    "race": race,
    "streams": streams,
    "scaling": scaling,
    "shapes": shapes,
    "transfer": transfer,
}


def making(home: Path) -> list[Block]:
    """How to make all of it again."""
    blocks, read = [], []
    for folder in run_folders(home):
        run = read_json(folder / "run.json")
        hardware, versions = run.get("hardware", {}), run.get("versions", {})
        told = [f"{k} {v}" for k, v in versions.items()]
        machine = f"{hardware.get('device', 'unknown')}, {hardware.get('threads', '?')} threads"
        blocks.append(Text(f"**{folder.name}**, commit {run.get('git')}, {machine}; {', '.join(told)}"))
        blocks.append(Code(str(run.get("command", ""))))
        settings = run.get("settings", {})
        chosen = [f"{k}={settings[k]}" for k in run.get("changed", []) if settings.get(k) not in ("", None)]
        if chosen:
            blocks += [Text("Settings other than the defaults:"), Code(" ".join(chosen))]
        read += [[folder.name, *source] for source in sources(run.get("data"))]
    if read:
        columns = ["run", "split", "source", "licence", "tokens", "SHA-256"]
        blocks += [Text("What the runs read:"), Table("data", columns, read)]
    return blocks or [Text("No run folders here.")]


def sources(data, split: str = "train") -> list[list]:
    """[split, source, licence, tokens, fingerprint] of what a run's record names, however it is nested."""
    if not isinstance(data, dict):
        return [row for item in data for row in sources(item, split)] if isinstance(data, list) else []
    rows = []
    if "source" in data:
        tokens = data.get("tokens")
        rows.append(
            [
                split,
                shorten(data["source"], 80),
                data.get("licence", ""),
                f"{tokens:,}" if isinstance(tokens, int) else "",
                str(data.get("fingerprint") or "")[:12],
            ]
        )
    return rows + [row for key, inner in data.items() for row in sources(inner, key)]


def machine(home: Path) -> list[Block]:
    """What hardware.py measured here, in hardware.json, and on other machines, in hardware-NAME.json."""
    files = [home / "hardware.json", *sorted(home.glob("hardware-*.json"))]
    blocks = [b for i, file in enumerate(f for f in files if f.exists()) for b in one_machine(file, i)]
    return blocks or [Text("The machine was not measured: `bash run_all.sh hardware`.")]


def one_machine(file: Path, number: int) -> list[Block]:
    found, more = read_json(file), f"-{number + 1}" if number else ""
    peaks = [f"{x / 1e12:.3g} TFLOP/s in {dtype}" for dtype, x in found.get("matmul", {}).items()]
    words = f"**{found['hardware']['device']}**, {found['hardware']['threads']} threads"
    blocks: list[Block] = [Text(words + (f"; matrix products reach {', '.join(peaks)}." if peaks else "."))]
    if rows := found.get("memory"):
        cells = [[r["shape"], r["rows"], f"{r['planned'] / 2**30:.2f}",
                  f"{r['measured'] / 2**30:.2f}" if "measured" in r else r["error"],
                  f"{100 * (r['planned'] / r['measured'] - 1):+.1f}" if "measured" in r else ""]
                 for r in rows]  # fmt: skip
        columns = ["training step of", "rows", "GiB by the plan", "GiB measured", "plan is off by %"]
        blocks += [Text(f"Memory that a training step asks for, within {found['cap_gib']:g} GiB:")]
        blocks += [Table(f"memory{more}", columns, cells)]
    if rows := found.get("training"):
        cells = [[r["config"], r["rows"], way, f"{rate:,.0f}", f"{100 * r['share_of_matmul'][way]:.0f}"]
                 for r in rows for way, rate in r["tokens_per_second"].items()]  # fmt: skip
        blocks += [
            Table(f"steps{more}", ["config", "rows", "step", "tokens/s", "% of matrix products"], cells)
        ]
        if busy := [(r, way, ms) for r in rows for way, ms in r.get("kernels", {}).items()]:
            kinds = list(dict.fromkeys(kind for _, _, found in busy for kind in found))
            cells = [[r["config"], way, f"{r['peak_memory'][way] / 2**30:.2f}",
                      *(f"{1000 * found.get(kind, 0):.1f}" for kind in kinds)]
                     for r, way, found in busy]  # fmt: skip
            blocks += [Text("What the card did during a step, in milliseconds:")]
            blocks += [Table(f"kernels{more}", ["config", "step", "peak GiB", *kinds], cells)]
        for r in (r for r in rows if "forward" in r["seconds"]):
            forward, both, all_of_it = (
                1000 * r["seconds"][k] for k in ("forward", "forward and backward", "eager")
            )
            words = f"{r['config']}, eager: forward {forward:.0f} ms, backward {both - forward:.0f} ms, "
            words += f"clipping and {r['optimizer']} {all_of_it - both:.0f} ms."
            blocks.append(Text(words))
    if rows := found.get("attention"):
        both = [(r["shape"], r["milliseconds"]["torch"], r["milliseconds"]["in blocks"]) for r in rows]
        cells = [[shape, f"{a:.1f}", f"{b:.1f}", f"{a / b:.1f}"] for shape, a, b in both]
        blocks += [Text("Attention on a CPU, forward and backward, milliseconds:")]
        blocks += [Table(f"attention-speed{more}", ["of", "torch", "in blocks", "times torch"], cells)]
    if rows := found.get("decoding"):
        cells = [[r["task"], who, f"{rate:,.0f}", f"{rate / r['tokens_per_second']['transformers']:.2f}"]
                 for r in rows for who, rate in r["tokens_per_second"].items()]  # fmt: skip
        blocks += [Table(f"decoding{more}", ["decoding", "by", "tokens/s", "times transformers"], cells)]
    if peers := found.get("peers"):
        cells = [["a training step", who, f"{rate:,.0f}", f"{rate / theirs:.2f}"] for rates in
                 [peers["step"]["tokens_per_second"]] for theirs in [rates["transformers, eager"]]
                 for who, rate in rates.items()]  # fmt: skip
        cells += [[f"decoding, {task}", who, f"{rate:,.0f}", f"{rate / rates['transformers']:.2f}"]
                  for task, rates in peers["decoding"].items() for who, rate in rates.items()]  # fmt: skip
        words = "Others beside it, in a shape of 6 layers of width 288, float32, on one thread of a CPU: "
        words += "`OMP_NUM_THREADS=1 python train.py --bench --compile`, `... chat.py --bench --compile`."
        if shares := peers["step"].get("share_of_matmul"):
            best = max((s, who) for who, s in shares.items() if who.startswith("ours"))
            how = best[1].removeprefix("ours, ")
            words += f" Our step, {how}, runs at {best[0]:.1%} of what large matrix products reach."
        blocks += [
            Text(words),
            Table(f"peers{more}", ["what", "by", "tokens/s", "times transformers"], cells),
        ]
    if rate := found.get("data", {}).get("encoded_mb_per_second_and_core"):
        blocks.append(Text(f"One core tokenises {rate:.1f} MB/s."))
    return blocks


SECTIONS = {
    "What each stage gained": stages,
    "What every model was measured to do": results,
    "Where the time went": ledger,
    "Training": training,
    "What it says": samples,
    "Choosing among many answers": choosing,
    "The verifier": verifiers,
    "Where it fails": failures,
    "What the heads look at": attention,
    "The lab": lab,
    "The machine": machine,
    "How to make it again": making,
}


def comparison(folders: list[Path]) -> list[Block]:
    """Runs beside each other: settings that differ, losses in one picture, the last difference."""
    runs = {folder: read_json(folder / "run.json") for folder in folders}
    for folder, run in runs.items():
        if not run:
            raise ConfigError(f"{folder} holds no run that can be read")
    settings = [run.get("settings", {}) for run in runs.values()]
    differ = [key for key in dict.fromkeys(k for s in settings for k in s)
              if key != "name" and len({json.dumps(s.get(key)) for s in settings}) > 1]  # fmt: skip
    alike = len({folder.name for folder in folders}) < len(folders)
    names = [str(folder) if alike else folder.name for folder in folders]
    blocks: list[Block] = [Text("Settings that differ:" if differ else "No setting differs.")]
    if differ:
        blocks.append(
            Table("settings", ["setting", *names], [[k, *(s.get(k, "") for s in settings)] for k in differ])
        )
    lines = {folder: read_jsonl(folder / "metrics.jsonl") for folder in folders}
    drawn = [(f.name, [x for x in some if "val_loss" in x], thinned([x for x in some if "loss" in x]))
             for f, some in lines.items()]  # fmt: skip
    blocks.append(overlaid("comparison", drawn))
    last = [(run.get("results") or {}).get("last", {}).get("val_loss") for run in runs.values()]
    rows = [[n, "" if x is None else f"{x:.4f}", "" if None in (x, last[0]) else f"{x - last[0]:+.4f}"]
            for n, x in zip(names, last, strict=True)]  # fmt: skip
    blocks.append(Table("last", ["run", "last validation loss", f"minus {names[0]}"], rows))
    return [*blocks, *noise(runs)]


def noise(runs: dict[Path, dict]) -> list[Block]:
    """Groups of runs that differ in nothing but the seed: mean and spread, and differences between groups in
    units of their standard error.
    """
    groups: dict[str, dict] = {}  # settings: {seed: (name, loss)}
    for folder, run in runs.items():
        settings = dict(run.get("settings", {}))
        out = str(settings.pop("out", "")) + "/"  # the same run in another folder is the same run
        settings = {k: v.removeprefix(out) if isinstance(v, str) else v for k, v in settings.items()}
        same = json.dumps(settings | {"seed": 0, "name": ""}, sort_keys=True)
        loss = (run.get("results") or {}).get("last", {}).get("val_loss")
        if loss is not None:
            seed = run.get("settings", {}).get("seed")
            groups.setdefault(same, {}).setdefault(seed, (str(folder), loss))
    values = [[loss for _, loss in group.values()] for group in groups.values()]
    free = sum(len(x) - 1 for x in values)
    if not free:
        return [Text("What of a difference is noise, one run each cannot tell: repeat them with --seed=2.")]
    spread = math.sqrt(sum(statistics.variance(x) * (len(x) - 1) for x in values if len(x) > 1) / free)
    rows = []
    for group, x in zip(groups.values(), values, strict=True):
        gap = statistics.fmean(x) - statistics.fmean(values[0])
        error = spread * math.sqrt(1 / len(x) + 1 / len(values[0]))
        told = f"{gap:+.4f}, {abs(gap) / error:.1f} standard errors" if x is not values[0] and error else ""
        rows.append([", ".join(name for name, _ in group.values()), f"{statistics.fmean(x):.4f}", told])
    words = f"Runs of equal settings with other seeds differ with a standard deviation of {spread:.4f}."
    return [Text(words), Table("noise", ["runs", "mean of the last loss", "minus the first"], rows)]


# -----------------------------------------------------------------------------
# The log: one entry a run, with what its curves say


def observations(lines: list[dict]) -> tuple[list[str], list[str]]:
    """What can be said of a run from its metrics, and what to do about it. Every sentence is computed.

    Still falling: over the last fifth of the steps the validation loss (the averaged training loss, if there
    are fewer than three checks) lost more than 1 %. Overfitting: it ended more than 1 % above its lowest. Of
    training losses, which are of other batches each time, a difference must exceed three times its noise too.
    A spike: a training loss that jumps by more than eight times the usual step from one line to the next.
    """
    losses = [(x["step"], x["loss"]) for x in lines if "loss" in x]
    checks = [(x["step"], x["val_loss"]) for x in lines if "val_loss" in x]
    said, todo = [], []
    curve, what = (checks, "validation") if len(checks) >= 3 else (smooth(losses), "training")
    jumps = [b[1] - a[1] for a, b in zip(losses, losses[1:], strict=False)]
    if len(curve) >= 3:
        lowest = min(curve, key=lambda p: p[1])
        since, before = [p for p in curve if p[0] <= 0.8 * curve[-1][0] or p is curve[0]][-1]
        margin = max(0.01 * abs(lowest[1]), 0.001)
        if what == "training":  # of a difference of two means of five, by the differences of neighbours
            noise = statistics.pstdev(jumps[len(jumps) // 2 :]) / math.sqrt(2)
            margin = max(margin, 3 * noise * math.sqrt(2 / 5))
        if curve[-1][1] > lowest[1] + margin:
            ended = f"and rose to {curve[-1][1]:.4f}."
            said.append(f"The {what} loss was lowest at step {lowest[0]:,} ({lowest[1]:.4f}) {ended}")
            cures = {
                "validation": "Stop there, read more data, or use dropout.",
                "training": "Lower the rate.",
            }
            todo.append(cures[what])
        elif before - curve[-1][1] > margin:
            drop = 100 * (before - curve[-1][1]) / abs(before)
            said.append(f"The {what} loss was still falling: by {drop:.1f} % since step {since:,}.")
            todo.append("Train longer.")
        else:
            known = "1 %" if what == "validation" else "can be told from noise"
            said.append(f"The {what} loss was flat since step {since:,} (lower by less than {known}).")
            if what == "validation":
                todo.append("More steps alone will not help; a larger model or more data may.")
            else:
                todo.append("Look at the validation loss more often: the training loss is too noisy to tell.")
    if len(checks) >= 1 and len(losses) >= 10:
        gap = checks[-1][1] - smooth(losses)[-1][1]
        said.append(f"At the end the validation loss was {gap:+.4f} from the training loss.")
    if len(jumps) >= 10:
        usual = statistics.median(abs(j) for j in jumps)
        spikes = [(losses[i + 1][0], j) for i, j in enumerate(jumps) if j > 8 * usual]
        if spikes:
            step, jump = max(spikes, key=lambda x: x[1])
            several = f"{len(spikes)} spike{'s' * (len(spikes) > 1)} of the training loss"
            said.append(f"{several}, the largest at step {step:,} ({jump:+.3f}).")
            todo.append("A lower learning rate or a longer warmup, if spikes cost something.")
    skipped = max((x.get("skipped", 0) for x in lines), default=0)
    if skipped:
        said.append(f"{skipped} steps were skipped, their gradients not finite.")
    return said or ["Too short to say anything."], todo


def smooth(points: list[tuple], window: int = 5) -> list[tuple]:
    """Running means of the values, at the last step of each window."""
    return [
        (points[i][0], statistics.fmean(p[1] for p in points[i + 1 - window : i + 1]))
        for i in range(window - 1, len(points))
    ]


def log(home: Path) -> str:
    """The experiment log: a summary table, and for each run date, hypothesis, change, results, observations
    and next steps.
    """
    out, summary, entries = ["# Experiments", ""], [], []
    for folder in run_folders(home):
        run, lines = read_json(folder / "run.json"), read_jsonl(folder / "metrics.jsonl")
        settings, best = run.get("settings", {}), (run.get("results") or {}).get("best", {})
        loss = f"{best['val_loss']:.4f}" if "val_loss" in best else ""
        said, todo = observations(lines)
        summary.append([folder.name, run.get("stage", ""), str(run.get("started", ""))[:10], loss, said[0]])
        entries += ["", f"## {folder.name}", "", f"- **Date**: {run.get('started', 'unknown')}"]
        entries += [f"- **Hypothesis**: {settings.get('hypothesis') or 'none was written down'}"]
        entries += [f"- **Change**: `{run.get('command', 'unknown')}`"]
        results = [f"{k} {v:.4g}" for k, v in best.items() if isinstance(v, int | float)]
        took = f"{minutes(run.get('seconds', 0))} minutes"
        entries += [f"- **Results**: {', '.join(results) or 'none yet'}; {took}"]
        entries += [f"- **Observations**: {' '.join(said)}", f"- **Next steps**: {' '.join(todo) or 'none'}"]
    table = [["run", "stage", "date", "best validation loss", "observation"], ["---"] * 5, *summary]
    out += ["| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |" for row in table]
    return "\n".join([*out, *entries]) + "\n"


# -----------------------------------------------------------------------------
# The paper: a draft from the same blocks, "not run" where something was not

REFERENCES = (
    "Cobbe et al. (2021). Training verifiers to solve math word problems. arXiv:2110.14168.",
    "Hoffmann et al. (2022). Training compute-optimal large language models. arXiv:2203.15556.",
    "Jordan et al. (2024). Muon: an optimizer for hidden layers in neural networks.",
    "Min et al. (2022). Noisy channel language model prompting for few-shot text classification. ACL.",
    "Rafailov et al. (2023). Direct preference optimization. NeurIPS.",
    "Shazeer (2020). GLU variants improve transformer. arXiv:2002.05202.",
    "Su et al. (2021). RoFormer: enhanced transformer with rotary position embedding. arXiv:2104.09864.",
    "Touvron et al. (2023). LLaMA: open and efficient foundation language models. arXiv:2302.13971.",
    "Wang et al. (2023). Self-consistency improves chain of thought reasoning. ICLR.",
    "Xiao et al. (2024). Efficient streaming language models with attention sinks. ICLR.",
    "Zhang and Sennrich (2019). Root mean square layer normalization. NeurIPS.",
)


def paper(home: Path, made: dict[str, list[Block]]) -> dict[str, list[Block]]:
    """The draft's sections, of blocks that the page is `made` of."""
    runs = {folder.name: read_json(folder / "run.json") for folder in run_folders(home)}
    trained = {name: run for name, run in runs.items() if run.get("stage") == "train"}
    about = [
        f"{name} has {count(run.get('parameters', 0))} parameters and read {run.get('step', 0):,} batches "
        f"({minutes(run.get('seconds', 0))} minutes on {run.get('hardware', {}).get('device', 'unknown')})."
        for name, run in trained.items()
    ]
    data = []
    for name, run in trained.items():
        source = run.get("data", {})
        tokens = count(source.get("tokens", 0))
        data.append(f"{name} read {source.get('source')} ({source.get('licence')}), {tokens} tokens.")
    versions = next((run.get("versions", {}) for run in runs.values()), {})
    told = ", ".join(f"{k} {v}" for k, v in versions.items())
    return {
        "Abstract": [Text(abstract(home, trained))],
        "Method": [
            Text(
                "A decoder in the manner of LLaMA (Touvron et al., 2023), with RMSNorm (Zhang and "
                "Sennrich, 2019), rotary positions (Su et al., 2021) and SwiGLU (Shazeer, 2020), is "
                "pretrained, with Muon (Jordan et al., 2024) where a config says so, instruction-tuned on "
                "answers alone, and aligned by DPO (Rafailov et al., 2023) on pairs of its own answers. "
                "Of many answers one is chosen by a vote (Wang et al., 2023) or by a verifier (Cobbe et "
                "al., 2021). Ours is a noisy channel (Min et al., 2022): the same model trained "
                "backwards, so that an answer is scored by log p(answer | problem) + lambda log p(problem "
                "| answer). Texts longer than the context are read with the first tokens kept (Xiao et "
                "al., 2024); sizes are compared at equal FLOPs (Hoffmann et al., 2022)."
            ),
            Text(" ".join(about) or "Pretraining: not run."),
        ],
        "Data": [Text(" ".join(data) or "Not run.")],
        "Training": made["Training"][:2],
        "Results": made["What each stage gained"],
        "Choosing among many answers": made["Choosing among many answers"][:2],
        "Ablations": made["The lab"][:3],
        "Errors": made["Where it fails"][:2],
        "Limitations": [
            Text(
                "The models are small, the embedded tasks come from templates: what helps here may "
                "not help at a larger scale or on text that people wrote. Intervals are over test items, and "
                "over seeds only where the lab repeated a run."
            )
        ],
        "Reproducibility": [
            Text(f"Versions: {told or 'not run'}."),
            Text("Every run folder holds its command, settings, seed, commit and its data's fingerprint."),
        ],
        "References": [Text(reference) for reference in REFERENCES],
    }


def abstract(home: Path, trained: dict) -> str:
    """What was found, in figures that the tables hold."""
    said = ["We follow a small language model through its whole life on consumer hardware."]
    if trained:
        run = next(iter(trained.values()))
        loss = (run.get("results") or {}).get("last", {}).get("bits_per_byte")
        reached = (
            f" and reaches {loss:.3f} bits a byte of its own validation text" if loss is not None else ""
        )
        said.append(f"The base has {count(run.get('parameters', 0))} parameters{reached}.")
    rows = [row for row in read_json(home / "pipeline.json").get("rows", []) if row.get("exact_match")]
    rows = [row for row in rows if row.get("task") == rows[0].get("task")]
    for row in rows:
        said.append(
            f"{Path(row['model']).name} solves {percent(row['exact_match'])} % of the problems greedily."
        )
    best = {k: x for k, x in (rows[-1] if rows else {}).items() if isinstance(x, dict) and ", best of" in k}
    for way, x in best.items():
        said.append(f"With the {way} answers it solves {percent(x)} %.")
    return " ".join(said if rows else [*said, "Alignment: not run."])


def as_latex(title: str, sections: dict[str, list[Block]]) -> str:
    """An article in two columns; wide tables shrink to the page."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
    special |= {"⏎": "/", "␣": " ", "…": r"\dots{}", "±": r"$\pm$", "×": r"$\times$"}
    special |= {c: "\\" + c for c in "&%$#_{}"}

    def tex(text) -> str:
        text = str(text).replace("**", "").replace("`", "")
        return "".join(
            special.get(c, c if c.isascii() or c.isalpha() and ord(c) < 256 else "?") for c in text
        )

    out = [r"\documentclass[10pt,twocolumn]{article}", r"\usepackage[utf8]{inputenc}"]
    out += [r"\usepackage{graphicx}", r"\usepackage[margin=2cm]{geometry}", r"\begin{document}"]
    out += [rf"\title{{{tex(title)}}}", r"\author{}", r"\maketitle"]
    for heading, blocks in sections.items():
        if heading == "Abstract":
            out += [
                r"\begin{abstract}",
                *(tex(b.words) for b in blocks if isinstance(b, Text)),
                r"\end{abstract}",
            ]
            continue
        out += ["", rf"\section*{{{tex(heading)}}}"]
        for block in blocks:
            if heading == "References":
                out += ["", r"\noindent\hangindent=1em " + tex(block.words)]
            elif isinstance(block, Text | Code):
                out += ["", tex(block.words), ""]
            elif isinstance(block, Table):
                rows = [block.columns, *block.rows]
                widest = [max(len(str(row[i])) for row in rows) for i in range(len(block.columns))]
                layout = "".join("p{5cm}" if w > 40 else "l" for w in widest)
                kind = "table*" if sum(widest) > 60 else "table"  # across both columns, or in one
                out += [rf"\begin{{{kind}}}[t]\centering\small"]
                out += [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
                out += [rf"\begin{{tabular}}{{{layout}}}"]
                lines = [" & ".join(tex(c) for c in row) + r" \\" for row in rows]
                out += [r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}}"]
                out += [rf"\caption{{{tex(block.name)}}}", rf"\end{{{kind}}}"]
            else:
                out += [r"\begin{figure}[t]\centering"]
                out += [rf"\includegraphics[width=\linewidth]{{../figures/{block.name}.png}}"]
                out += [rf"\caption{{{tex(block.caption)}}}", r"\end{figure}"]
    return "\n".join([*out, r"\end{document}"]) + "\n"


def write_paper(folder: Path, title: str, sections: dict[str, list[Block]]) -> None:
    """paper.md and paper.tex, and paper.pdf where there is a TeX."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown = as_markdown(title, sections).replace("](figures/", "](../figures/")
    (folder / "paper.md").write_text(markdown, encoding="utf-8")
    (folder / "paper.tex").write_text(as_latex(title, sections), encoding="utf-8")
    if shutil.which("pdflatex"):
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        pipe, errors = subprocess.PIPE, subprocess.STDOUT
        done = subprocess.run(command, cwd=folder, stdout=pipe, stderr=errors, text=True, errors="replace")
        for suffix in ("aux", "log", "out"):
            (folder / f"paper.{suffix}").unlink(missing_ok=True)
        if done.returncode:
            print(f"{folder}/paper.tex: pdflatex failed:\n" + "\n".join(done.stdout.splitlines()[-15:]))


# -----------------------------------------------------------------------------
# Writing

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fdfdfb; --line: #d8d8d2; --soft: #f1f1ec }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e0; --paper: #17181a; --line: #3a3c40; --soft: #212327 } }
body { margin: 0 auto; max-width: 74rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  min-width: 3.5rem; max-width: 28rem; overflow-wrap: break-word }
thead th { background: var(--soft) }
figure { margin: 1.2rem 0 }
img { max-width: 100%; background: white; border-radius: 4px }
figcaption { font-size: .86rem; opacity: .8; position: sticky; left: 0 }
@media (max-width: 45rem) {  /* a phone scrolls what is wide, and keeps the names of rows in sight */
  figure { overflow-x: auto }
  img { max-width: 42rem }
  td:first-child, th:first-child { position: sticky; left: 0; max-width: 8rem }
  td:first-child { background: var(--paper) } }
small { white-space: nowrap; opacity: .8 }
pre { background: var(--soft); padding: .6rem; overflow-x: auto; font-size: .82rem }
"""


def as_html(title: str, sections: dict[str, list[Block]]) -> str:
    """The page; whatever a model said stays text."""

    def words(text: str) -> str:
        parts = html.escape(text).split("**")
        parts = [f"<b>{p}</b>" if i % 2 and i < len(parts) - 1 else p for i, p in enumerate(parts)]
        codes = "".join(parts).split("`")
        return "".join(f"<code>{c}</code>" if i % 2 else c for i, c in enumerate(codes))

    def cell(x) -> str:
        """An interval stands below its figure, so that tables stay narrow."""
        return re.sub(r"^(\S+) (\[[^][]+\])$", r"\1<br><small>\2</small>", html.escape(str(x)))

    out = ["<!doctype html><html lang=en><meta charset=utf-8>"]
    out.append("<meta name=viewport content='width=device-width, initial-scale=1'>")
    out.append(f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>")
    for heading, blocks in sections.items():
        out.append(f"<h2>{html.escape(heading)}</h2>")
        for block in blocks:
            if isinstance(block, Text):
                out.append(f"<p>{words(block.words)}</p>")
            elif isinstance(block, Code):
                out.append(f"<pre>{html.escape(block.words)}</pre>")
            elif isinstance(block, Table):
                head = "".join(f"<th>{html.escape(str(c))}</th>" for c in block.columns)
                body = "".join(
                    "<tr>" + "".join(f"<td>{cell(c)}</td>" for c in row) + "</tr>" for row in block.rows
                )
                out.append(f"<div class=wide><table><thead><tr>{head}</tr></thead>")
                out.append(f"<tbody>{body}</tbody></table></div>")
            else:
                data, caption = base64.b64encode(block.png).decode(), html.escape(block.caption, quote=True)
                out.append(f"<figure><img alt='{caption}' src='data:image/png;base64,{data}'>")
                out.append(f"<figcaption>{caption}</figcaption></figure>")
    return "\n".join(out) + "\n"


def as_markdown(title: str, sections: dict[str, list[Block]]) -> str:
    def cell(x) -> str:
        return html.escape(str(x), quote=False).replace("|", "\\|").replace("\n", " ")

    out = [f"# {title}", ""]
    for heading, blocks in sections.items():
        out += [f"## {heading}", ""]
        for block in blocks:
            if isinstance(block, Text):
                out += [block.words, ""]
            elif isinstance(block, Code):
                out += ["```", block.words, "```", ""]
            elif isinstance(block, Table):
                lines = [block.columns, ["---"] * len(block.columns), *block.rows]
                out += ["| " + " | ".join(cell(c) for c in line) + " |" for line in lines] + [""]
            else:
                out += [
                    f"![{cell(block.caption)}](figures/{block.name}.png)",
                    "",
                    f"*{cell(block.caption)}*",
                    "",
                ]
    return "\n".join(out)


def write(folder: Path, title: str, sections: dict[str, list[Block]]) -> Path:
    """Both pages, the figures and the CSVs; returns index.html's path."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for block in (b for blocks in sections.values() for b in blocks):
        if isinstance(block, Figure):
            (folder / "figures" / f"{block.name}.png").write_bytes(block.png)
        elif isinstance(block, Table):
            with open(folder / f"{block.name}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([block.columns, *block.rows])
    (folder / "index.md").write_text(as_markdown(title, sections), encoding="utf-8")
    (folder / "index.html").write_text(as_html(title, sections), encoding="utf-8")
    return folder / "index.html"


def what_was_written(folder: Path, since: float) -> list[str]:
    """Which files of the folder are newer than `since` (seconds), and which of them git shows as changed."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.stat().st_mtime >= since]
    kinds = Counter({".png": "figures", ".csv": "tables"}.get(f.suffix, "pages") for f in files)
    counts = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
    lines = [f"wrote {len(files)} files in {folder}/: {counts}"]
    git = ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no", "--", "."]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(git, capture_output=True, text=True, errors="replace", timeout=30, check=True)
        if changed := found.stdout.splitlines():
            lines.append(
                f"{len(changed)} of them are tracked by git and have changed: git diff --stat {folder}"
            )
            lines.append(f"to have the committed ones back: git checkout {folder}")
    return lines


def main() -> None:
    cfg = parse_config(ReportConfig, __doc__)
    home = Path(cfg.home)
    to = Path(cfg.to) if cfg.to else home / "report"
    try:
        if cfg.compare:
            folders = [Path(f) for f in cfg.compare.split(",") if f]
            sections = {"Comparison": comparison(folders)}
        elif not home.is_dir():
            raise ConfigError(
                f"there is no folder {home}: bash run_all.sh cpu makes it, or name another by --home"
            )
        else:
            wanted = {name for name in cfg.only.split(",") if name}
            if unknown := wanted - {section.__name__ for section in SECTIONS.values()}:
                known = ", ".join(section.__name__ for section in SECTIONS.values())
                raise ConfigError(f"--only={','.join(sorted(unknown))}: there are {known}")
            chosen = {h: s for h, s in SECTIONS.items() if not wanted or s.__name__ in wanted}
            sections = {heading: section(home) for heading, section in chosen.items()}
        before = time.time() - 1  # a file system's clock may be a little behind
        page = write(to, "Modern LLM: report", sections)
        if not (cfg.compare or cfg.only):
            (to / "experiments.md").write_text(log(home), encoding="utf-8")
            write_paper(to / "paper", "The whole life of a small language model", paper(home, sections))
        print("\n".join(what_was_written(to, before)), file=sys.stderr)
        print(page)
    except (ConfigError, OSError) as error:
        raise SystemExit(f"report.py: {error}") from None


if __name__ == "__main__":
    run_script(main)
