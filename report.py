"""Stage 8: the report. One page that shows what the run folders hold, and what made each step.

    python report.py                              # all of out/ -> out/report/index.html
    python report.py --home=out --to=report       # to a folder that is kept
    python report.py --compare=out/a,out/b --to=out/compared    # two or more runs beside each other

It reads run folders and JSON, no model and no torch: copied folders on a laptop will do. It writes

    index.html        one file, nothing is fetched; index.md with figures/ is the same page for a code host
    *.csv             every table; results.csv has every number that eval.py and finetune.py measured
    experiments.html  the experiment log, also as .md: an entry for each run and experiment, findings
    paper/            a draft in Markdown and LaTeX (and PDF, where there is a pdflatex)

What is missing gets a sentence that says which command makes it; a run that is still going is shown as far as
it got. A run that was cut short is marked as a smoke run wherever its name stands.

A section is a function from the home folder to a list of blocks (support/pages.py). The sections of the lab,
the log and the paper are in lab/.
"""

from support.terminal import run_script

import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

from configs import ConfigError, parse_config
from data import TASKS
from lab.log import findings, log
from lab.pages import lab, machine, streams
from lab.paper import paper, write_paper
from support.metrics import perplexity, proportion
from support.pages import (
    Block,
    Code,
    Figure,
    Table,
    Text,
    count,
    figure,
    minutes,
    percent,
    plt,
    shorten,
    signed,
    thinned,
    write,
)
from support.results import (
    METRICS,
    SMOKE,
    Comparison,
    Measurement,
    measurements,
    read_json,
    run_folders,
    shown_name,
    side_by_side,
    value_of,
)
from support.tables import read_jsonl
from tasks.mistakes import KINDS


@dataclass
class ReportConfig:
    """What is read, and where the page goes."""

    home: str = "out"  # the folder that holds the runs
    to: str = ""  # where the page goes; default: {home}/report
    compare: str = ""  # run folders, joined by commas: only these, beside each other
    only: str = ""  # sections, joined by commas, such as training,lab; nothing: all, the log and the paper


# -----------------------------------------------------------------------------
# The life of the model


def stages(home: Path) -> list[Block]:
    """The life of the model, a line a stage."""
    pipeline = read_json(home / "pipeline.json")
    if not pipeline.get("rows"):
        return [Text("No table of stages yet: `bash run_all.sh cpu eval` makes it.")]
    rows = pipeline["rows"]
    columns = list(dict.fromkeys(key for row in rows for key in row if isinstance(row[key], dict)))
    headings = {
        "exact_match": "greedy",
        "calculator": "greedy + calculator",
        "mean_sample": "one sampled answer",
    }
    several = len({row["task"] for row in rows if row.get("task")}) > 1
    cells = []
    for row in rows:
        name = shown_name(home / Path(row["model"]).name, home)
        line = [f"{name}, {row['task']}" if several and row.get("task") else name]
        for column in columns:
            x = row.get(column)
            line.append("" if not x else f"{x['value']:.3f}" if "bits" in column else percent(x))
        cells.append([*line, f"{row.get('minutes', 0):.1f}"])
    words = "Percent of problems solved, of one training run each, with 95 % intervals over the problems; "
    words += "bits per byte where it says so."
    columns = ["model", *(headings.get(c, c) for c in columns), "minutes of training"]
    return [
        Text(words),
        Table("stages", columns, cells, "The life of the model, in percent of problems solved."),
    ]


def results(home: Path) -> list[Block]:
    """Every number that was measured, and on each task what training changed."""
    found = measurements(home)
    if not found:
        return [Text("Nothing was measured: `python eval.py RUN --tasks=...` does it.")]
    columns = ["task", "model", "metric", "items", "base", "prompted", "after training", "from scratch"]
    columns += ["after - base", "after - prompted", "after - scratch"]
    rows = [compared(c) for c in side_by_side(found)]
    words = (
        "The same task by a base, by the base with examples in its prompt, by what was trained from it, and "
    )
    words += (
        "by a model that learnt the task from nothing. Differences are paired, in points with 95 % intervals "
    )
    words += "over the items that both answered."
    caption = "Results by task: base, prompted, trained; paired differences in points."
    blocks: list[Block] = [Text(words), Table("side-by-side", columns, rows, caption)]
    rows = []
    for m in found:
        for name, metric in m.entry["metrics"].items():
            n = metric.get("n", m.entry.get("items", ""))
            value = value_of(name, metric)
            rows.append([*m.where, m.model, m.way, METRICS.get(name, name), value, n, m.notes])
    rows.sort(key=lambda row: (row[0] or "", row[1] or ""))
    columns = ["task", "split", "model", "way", "metric", "value [95 %]", "items", "note"]
    blocks.append(Text("Every number that was measured, shares in percent:"))
    return [*blocks, Table("results", columns, rows, "Every result.", folded=len(rows) > 20)]


def compared(c: Comparison) -> list:
    """A row of the table that sets results side by side."""
    first = c.tuned or c.base or c.prompted
    metric = first.headline

    def cell(m: Measurement | None) -> str:
        if m is None or metric not in m.entry["metrics"]:
            return ""
        value = value_of(metric, m.entry["metrics"][metric])
        notes = [SMOKE] if m.smoke else []
        notes += [f"{m.entry['items']} items"] if m.entry.get("items") != first.entry.get("items") else []
        return f"{value} ({', '.join(notes)})" if notes else value

    model = f"{c.tuned.model}, {c.tuned.way}" if c.tuned else first.model
    task = first.entry["task"] + (f", {first.entry['split']}" if first.entry.get("split") else "")
    after = c.tuned if c.tuned is not c.scratch else None
    differences = []
    for other in (c.base, c.prompted, c.scratch):
        d = c.minus(other)
        n = f" ({d['n']} items)" if d and d.get("n") != first.entry.get("items") else ""
        differences.append(signed(d) + n)
    return [task, model, METRICS[metric], first.entry.get("items", ""), cell(c.base), cell(c.prompted),
            cell(after), cell(c.scratch), *differences]  # fmt: skip


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
        name, state = shown_name(folder, home), run.get("status", "unreadable")
        # DPO and a verifier's head count what they compare, not its tokens.
        unit = " pairs" if run.get("stage") == "dpo" else " answers" if run.get("verifier") == "head" else ""
        read = 0 if unit or not steps else steps[-1].get("tokens", 0)
        spent = [count(read), f"{6 * run.get('parameters', 0) * read:.1e}"] if read else ["", ""]
        rows.append([name, run.get("stage", ""), count(run.get("parameters", 0)), state, *loss, *spent,
                     minutes(run.get("seconds", 0)), f"{speed:,.0f}{unit}", held])  # fmt: skip
        steps = [x for x in steps if "loss" in x]  # a step whose loss was not finite has none
        if steps:
            drawn.append((folder.name, name, lines, predicts_text(run)))
            held_out = run.get("data", {}).get("validation", {}).get("fingerprint")
            some = alike.setdefault((run.get("stage"), run.get("tokenizer"), held_out), deque(maxlen=CURVES))
            some.append((name, [x for x in lines if "val_loss" in x], thinned(steps, 200)))
    if not rows:
        return [Text("No run folders here: `bash run_all.sh cpu` makes them.")]
    columns = "run|stage|parameters|state|last validation loss|best|tokens|FLOPs, 6 N tokens".split("|")
    columns += ["minutes", "tokens/s", "GiB (planned)" if planned else "GiB"]
    blocks = beside(alike)
    for folder, name, lines, is_text in drawn:
        blocks += [curves(folder, name, lines, is_text), *preferences(folder, name, lines)]
    if len(rows) > CURVES:
        words = f"Curves of the {CURVES} newest of {len(rows)} runs; `report.py --compare=A,B` draws any."
        blocks.insert(0, Text(words))
    return [Table("runs", columns, rows, "What was trained."), *blocks]


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


def predicts_text(run: dict) -> bool:
    """Whether the loss is in nats a token and so has a perplexity. That of pairs or of classes has none."""
    if run.get("stage") == "verifier":
        return run.get("verifier") != "head"
    return run.get("stage") != "dpo" and run.get("kind") != "head"


def curves(folder: str, name: str, lines: list[dict], is_text: bool) -> Figure:
    """Loss against steps, tokens (and epochs) and minutes, and perplexity; below, what the optimizer did."""
    steps, checks = [x for x in lines if "loss" in x], [x for x in lines if "val_loss" in x]
    at = {x["step"]: x for x in steps}
    steps = thinned(steps)
    fig, axes = plt.subplots(2, 4, figsize=(13, 5.2), height_ratios=[2, 1])
    for panel, (key, label, scale) in zip(axes[0], CLOCKS, strict=False):
        x = [line.get(key, 0) / scale for line in steps]
        panel.plot(x, [line["loss"] for line in steps], color="#4477aa", label="training", lw=1)
        held = [(at[c["step"]].get(key, 0) / scale, c["val_loss"]) for c in checks if c["step"] in at]
        if held:
            panel.plot(*zip(*held, strict=True), "o-", color="#ee6677", label="validation", ms=4)
        panel.set_xlabel(label)
    axes[0, 0].set_ylabel("loss")
    axes[0, 0].legend(frameon=False)
    if is_text:
        for some, key, style in ((steps, "loss", {"lw": 1}), (checks, "val_loss", {"marker": "o", "ms": 4})):
            values = [perplexity(x[key], 1) for x in some]
            colour = "#4477aa" if key == "loss" else "#ee6677"
            axes[0, 3].plot([x["step"] for x in some], values, color=colour, **style)
        axes[0, 3].set(xlabel="step", ylabel="perplexity", yscale="log")
        axes[0, 3].yaxis.set_major_formatter("{x:g}")
        axes[0, 3].yaxis.set_minor_formatter("")
    else:
        axes[0, 3].set_axis_off()
    panels = zip(axes[1], OPTIMIZER, strict=True)
    for panel, (clock, key, label) in panels:
        _, clock_label, scale = next(c for c in CLOCKS if c[0] == clock)
        some = [x for x in steps if key in x]
        panel.plot([x.get(clock, 0) / scale for x in some], [x[key] for x in some], color="#666666", lw=1)
        panel.set(xlabel=clock_label, ylabel=label)
    axes[1, 2].set_ylim(0, None)
    if epochs := steps[-1].get("epoch"):
        axes[1, 1].set_xlabel(f"tokens read ({epochs:.2g} epochs)")
    fig.suptitle(name)
    fig.tight_layout()
    caption = (
        f"{name}: loss and perplexity while it was trained; below, what the optimizer and the clock did."
    )
    return figure(f"curves-{folder}", caption if is_text else caption.replace(" and perplexity", ""), fig)


OPTIMIZER = (  # clock, key in metrics.jsonl, label
    ("step", "learning_rate", "learning rate"),
    ("tokens", "grad_norm", "gradient norm"),
    ("seconds", "tokens_per_second", "tokens/s"),
    ("step", "peak_memory_gib", "peak memory, GiB"),
)


def preferences(folder: str, name: str, lines: list[dict]) -> list[Block]:
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
    return [figure(f"preferences-{folder}", caption, fig)]


COLUMNS = 5  # steps or models that a table has room for beside each other


def samples(home: Path) -> list[Block]:
    """What it writes: the same prompts by checkpoint, and by stage."""
    blocks: list[Block] = []
    for folder in run_folders(home):
        for file, words in (("samples", "while it was trained"), ("generations", "asked afterwards")):
            lines = [x for x in read_jsonl(folder / f"{file}.jsonl") if "text" in x]
            if lines:
                blocks.append(Text(f"**{shown_name(folder, home)}** {words}, the same prompt by step:"))
                blocks.append(by_step(f"{file}-{folder.name}", lines))
    answered = read_json(home / "pipeline.json").get("battery", {})
    if answered:
        asked = next(iter(answered.values()))
        models = [m for m, said in answered.items() if len(said) == len(asked)]
        rows = []
        for i, item in enumerate(asked[:12]):
            texts = [item["asked"], item["meant"], *(answered[m][i]["said"] for m in models)]
            rows.append([shorten(text) for text in texts])
        names = [shown_name(home / Path(m).name, home) for m in models]
        blocks += [Text("The same instructions by stage, the first dozen:")]
        blocks += [Table("battery", ["asked", "expected", *names], rows)]
    return blocks or [Text("No samples: training runs write them at each evaluation.")]


def by_step(name: str, lines: list[dict]) -> Table:
    """Samples {"step", "prompt", "text"}: a row a prompt, a column a step; of many steps a few."""
    steps = sorted({x.get("step", 0) for x in lines})
    if len(steps) > COLUMNS:
        steps = [steps[round(i * (len(steps) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
    texts: dict[str, dict] = {}
    for x in lines:
        texts.setdefault(x.get("prompt", ""), {})[x.get("step", 0)] = x["text"]
    rows = []
    for prompt, said in texts.items():
        cells = [shorten(said.get(step, ""), 400) for step in steps]
        if any(cells):
            rows.append([shorten(prompt) or "(start of a text)", *cells])
    return Table(name, ["prompt", *(f"step {step:,}" for step in steps)], rows)


def choosing(home: Path) -> list[Block]:
    """What answering many times adds, and what the verifier is worth."""
    blocks: list[Block] = []
    for folder in run_folders(home):
        for entry in read_json(folder / "results.json").get("results", {}).values():
            if isinstance(entry, dict) and entry.get("curves"):
                blocks += chosen(folder.name, shown_name(folder, home), entry)
    return blocks or [Text("No model was sampled more than once: `python eval.py RUN --samples=16` does it.")]


def chosen(folder: str, name: str, entry: dict) -> list[Block]:
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
    rows = [[way, signed(d)] for way, d in entry.get("differences", {}).items()]
    blocks: list[Block] = [figure(f"choosing-{folder}-{entry['task']}", caption, fig)]
    if rows:
        blocks.append(
            Table(
                f"differences-{folder}-{entry['task']}",
                ["paired difference", "points [95 %]"],
                rows,
                f"{name}: paired differences between ways to choose an answer.",
            )
        )
    for label, gates in entry.get("gating", {}).items():
        rows = [
            [g["threshold"] if g["threshold"] <= 1 else "never", f"{g['samples']:.1f}", percent(g["right"])]
            for g in gates
        ]
        blocks.append(Text(f"Sampling until the verifier ({label}) is sure, with {name}:"))
        blocks.append(Table(f"gating-{folder}-{label}", ["sure from", "answers a problem", "right"], rows))
    return blocks


def verifiers(home: Path) -> list[Block]:
    """Whether a verifier's probabilities are true."""
    blocks: list[Block] = []
    for folder in run_folders(home):
        found = read_json(folder / "run.json").get("verification")
        if not found:
            continue
        name = shown_name(folder, home)
        rows = [[who, f"{x['auc']:.3f}", f"{x['auc_within']['value']:.3f}", percent(x["best_of_n"])]
                for who, x in found.items() if isinstance(x, dict) and "auc_within" in x]  # fmt: skip
        blocks.append(Text(f"**{name}** on {found['answers']:,} answers to {found['problems']:,} problems:"))
        columns = ["score", "AUC", "AUC within a problem", "best of n right"]
        blocks.append(Table(f"verifier-{folder.name}", columns, rows))
        bins = [b for b in found.get("calibration", {}).get("bins", []) if b.get("n")]
        if bins:
            fig, axes = plt.subplots(figsize=(4.2, 4))
            axes.plot([0, 1], [0, 1], ":", color="#888888")
            axes.plot([b["said"] for b in bins], [b["is"] for b in bins], "o-", color="#4477aa")
            axes.set(xlabel="probability it says", ylabel="share that is right", title=name)
            error = 100 * found["calibration"]["ece"]
            caption = f"{name}: on the dotted line its probabilities are true; mean error {error:.1f} %."
            blocks.append(figure(f"reliability-{folder.name}", caption, fig))
    return blocks or [Text("No verifier: `python verifier.py configs/verifier.py` trains one.")]


def failures(home: Path) -> list[Block]:
    """What kinds of mistakes a model makes, what a verifier mends and breaks, what a stage did to its parent,
    and which labels are doubtful.
    """
    blocks, before, verdicts = [], {}, {}
    for folder in run_folders(home):
        shown = shown_name(folder, home)
        blocks += violations(folder, shown)
        found = read_json(folder / "results.json").get("results", {})
        last = {}  # of a task's evaluations: with more examples in the prompt, or with many answers
        for key, e in found.items():
            if isinstance(e, dict) and e.get("task") in TASKS:
                records = read_jsonl(folder / "answers" / f"{key.replace(' ', '-')}.jsonl")
                if records := [r for r in records if "kinds" in r]:
                    last[e["task"], e["split"]] = records, e
        for (task, split), (records, entry) in last.items():
            name = f"{folder.name}-{task}-{split}"
            blocks += sorted_mistakes(shown, name, task, records, entry)
            for label in entry.get("verifiers", {}):
                keys = ("text", "output", "correct", label, f"{label} correct", f"{label} sure")
                pairs = [tuple(r.get(k) for k in keys) for r in records if label in r]
                blocks += changed(f"{name}-{label}", "greedy", label, pairs)
            before[folder.name, task, split] = {r["text"]: r for r in records if "output" in r}
            parent = Path(str(read_json(folder / "run.json").get("parent"))).name
            if (old := before.get((parent, task, split))) and TASKS[task].metric == "exact_match":
                both = [(old[r["text"]], r) for r in records if r["text"] in old]
                pairs = [(r["text"], o["output"], o["correct"], r["output"], r["correct"]) for o, r in both]
                blocks += changed(f"{name}-{parent}", parent, shown, pairs)
            for r in records:
                if "sure" in r:
                    verdicts.setdefault((task, split), {}).setdefault(r["text"], []).append((folder.name, r))
    for (task, split), by_text in verdicts.items():
        blocks += doubtful(f"{task}-{split}", by_text)
    return blocks or [Text("No mistakes to sort: `python eval.py RUN --tasks=...` records them.")]


def sorted_mistakes(model: str, name: str, task: str, records: list[dict], entry: dict) -> list[Block]:
    """How many answers are of which kind, with an example of each; what a kind is, tasks/mistakes.py says."""
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
        blocks.append(
            Table(f"errors-{name}", columns, rows, f"Mistakes of {model}, {task}, {entry['split']}.")
        )
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


def violations(folder: Path, name: str) -> list[Block]:
    """Held-out pairs that a model which learnt preferences moved the wrong way, the worst first."""
    found = read_jsonl(folder / "violations.jsonl")
    of = read_json(folder / "run.json").get("data", {}).get("validation", {}).get("pairs")
    if not found or not of:
        return []
    rows = [[f"{x['margin']:.1f}", *(shorten(x[key], 400) for key in ("prompt", "chosen", "rejected"))]
            for x in found[:3]]  # fmt: skip
    words = f"**{name}** moved {len(found)} of {of} held-out pairs the wrong way; the three worst:"
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
    for folder in folders_with(home, "attention.json"):
        found = read_json(folder / "attention.json")
        if not found.get("scores"):
            continue
        stem, name = stem_of(folder, home), shown_name(folder, home)
        fig, axes = plt.subplots(1, len(found["scores"]), figsize=(11, 2.8))
        for panel, (score, values) in zip(axes, found["scores"].items(), strict=True):
            image = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            panel.set(title=score, xlabel="head")
            panel.locator_params(integer=True, min_n_ticks=1)
        axes[0].set_ylabel("layer")
        fig.colorbar(image, ax=axes, fraction=0.02)
        caption = f"{name}: scores of every head on random tokens that come twice. 1: all of its attention; "
        caption += "of entropy: spread evenly."
        blocks.append(figure(f"heads-{stem}", caption, fig))
        if copies := found.get("copies"):
            shares = " and ".join(f"{share:.0%} of those of {kind}" for kind, share in copies.items())
            blocks.append(Text(f"Told again, {shares} are copied (digits; a guess gets a quarter or so)."))
        for i, example in enumerate(found["maps"], 1):
            blocks.append(attention_map(f"attention-{stem}-{i}", name, example))
            if example.get("inside"):
                blocks.append(inside(f"inside-{stem}-{i}", name, example["inside"]))
    return blocks or [Text("No maps: `python eval.py out/base --attention` makes them.")]


def attention_map(file: str, name: str, example: dict) -> Figure:
    """The heads of one text: every row is a token, which looks at the columns."""
    labels = [printable(token) for token in example["tokens"]]
    heads = example["heads"]
    across = min(len(heads), 2 if len(heads) <= 4 else 4)
    down = math.ceil(len(heads) / across)
    side = min(11 / across, 6.5, 2 + len(labels) / 4)  # inches
    size = max(3, min(7, 72 * side / (1.6 * len(labels))))
    fig, axes = plt.subplots(down, across, figsize=(side * across, 0.95 * side * down), squeeze=False)
    for panel in axes.flat[len(heads) :]:
        panel.set_axis_off()
    for panel, head in zip(axes.flat, heads, strict=False):
        image = panel.imshow(head["weights"], vmin=0, vmax=1, cmap="viridis")
        most = f"most {head['most']}: " if head.get("most") else ""
        panel.set_title(f"{most}layer {head['layer']}, head {head['head']}", fontsize=10)
        panel.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
        panel.set_yticks(range(len(labels)), labels, fontsize=size)
    fig.tight_layout()
    fig.colorbar(image, ax=axes, fraction=0.02)
    seen = "; ".join(f"{h['most']}, {SEEN[h['most']]}" for h in heads if h.get("most") in SEEN)
    return figure(file, f"{name}: rows look at columns." + f" To look for: {seen}." * bool(seen), fig)


def inside(file: str, name: str, found: dict) -> Figure:
    """One text: how surprising each token was, and, where model.py computed it, who chose the next one."""
    explained = found["lens"] and "parts" in (found["parts"] or {})
    fig, axes = plt.subplots(1, 3 if explained else 1, figsize=(11, 3.4), squeeze=False)
    labels = [printable(token["text"]) for token in found["tokens"]]
    bits = [0 if said is None else said["bits"] for said in found["surprise"]]
    axes[0, 0].bar(range(len(bits)), bits, color="#4c78a8")
    axes[0, 0].set(ylabel="bits", title="surprise")
    axes[0, 0].set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
    likely = found["next"][0]
    caption = (
        f"{name}: surprise of each token; the likeliest next one is {likely['text']!r} ({likely['p']:.0%})."
    )
    if explained:
        lens, parts = found["lens"], found["parts"]["parts"]
        axes[0, 1].plot(range(len(lens)), [row["target_p"] for row in lens], marker=".")
        axes[0, 1].set(title=f"logit lens: p({printable(found['parts']['target']['text'])})", ylim=(0, 1))
        axes[0, 1].set_xticks(
            range(len(lens)), [printable(row["top"][0][0]) + f"\n{row['layer']}" for row in lens]
        )
        largest = sorted(parts, key=lambda part: -abs(part["value"]))[:12][::-1]
        axes[0, 2].barh([part["name"] for part in largest], [part["value"] for part in largest])
        axes[0, 2].set_title("contributions to its logit")
        caption += f" All {len(parts)} parts sum to {found['parts']['sum']:.4f}, the logit is "
        caption += (
            f"{found['parts']['target']['logit']:.4f}. Below the lens: what each layer would have said."
        )
    fig.tight_layout()
    return figure(file, caption, fig)


def printable(token: str) -> str:
    return token.replace("\n", "⏎").replace(" ", "␣").replace("$", r"\$")


def beyond(home: Path) -> list[Block]:
    """Texts longer than the context, of models of one's own."""
    blocks: list[Block] = []
    for folder in folders_with(home, "streams.json"):
        found = read_json(folder / "streams.json")
        if found.get("perplexity"):
            blocks.append(Text(f"**{shown_name(folder, home)}**, {found['source']}:"))
            blocks += streams(stem_of(folder, home), {"own": found})
    return blocks or [Text("Not measured: `python eval.py out/base --streams` does it.")]


def folders_with(home: Path, name: str) -> list[Path]:
    """Folders of runs, of their checkpoints and of models of the hub that hold this file."""
    found = {*home.glob(f"*/{name}"), *home.glob(f"*/checkpoints/*/{name}"), *home.glob(f"eval/*/{name}")}
    return sorted(file.parent for file in found)


def stem_of(folder: Path, home: Path) -> str:
    """The name of a model's folder as a part of file names."""
    return "-".join(part for part in folder.relative_to(home).parts if part != "checkpoints")


def making(home: Path) -> list[Block]:
    """How to make all of it again."""
    blocks, read = [], []
    for folder in run_folders(home):
        run = read_json(folder / "run.json")
        hardware, versions = run.get("hardware", {}), run.get("versions", {})
        told = [f"{k} {v}" for k, v in versions.items()]
        machine = f"{hardware.get('device', 'unknown')}, {hardware.get('threads', '?')} threads"
        blocks.append(
            Text(f"**{shown_name(folder, home)}**, commit {run.get('git')}, {machine}; {', '.join(told)}")
        )
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


SECTIONS = {
    "What was found": findings,
    "What each stage gained": stages,
    "Every result": results,
    "Where the time went": ledger,
    "Training": training,
    "What it says": samples,
    "Choosing among many answers": choosing,
    "The verifier": verifiers,
    "Where it fails": failures,
    "What the heads look at": attention,
    "Beyond the context": beyond,
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


# -----------------------------------------------------------------------------
# The paper: a draft from the same blocks, "not run" where something was not


# -----------------------------------------------------------------------------
# Writing


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
            write(to, "Modern LLM: experiments", log(home, sections), "experiments")
            write_paper(to / "paper", "The whole life of a small language model", paper(home, sections))
        print("\n".join(what_was_written(to, before)), file=sys.stderr)
        print(page)
    except (ConfigError, OSError) as error:
        raise SystemExit(f"report.py: {error}") from None


if __name__ == "__main__":
    run_script(main)
