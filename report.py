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

A section is a function from the records of a folder (support/results.py) to blocks (support/pages.py). To add
one, write the function and name it in SECTIONS.
"""

from support.terminal import run_script

import json
import math
import pkgutil
import statistics
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs import ConfigError, parse_config
from data import TASKS
from support.charts import BLUE, GREY, Line, Panel, chart, line
from support.curves import curve_rows, loss_curves, overlaid, preferences
from support.metrics import proportion
from support.pages import (
    Block,
    Sections,
    Table,
    Text,
    fill,
    interval,
    percent,
    points,
    row,
    shorten,
    table,
    write,
)
from support.results import METRICS, SMOKE, Comparison, Records, Run, differing, value_of
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

WAYS = {  # of answering, as columns
    "exact_match": "greedy",
    "calculator": "greedy + calculator",
    "mean_sample": "one sampled answer",
}


def stages(records: Records) -> list[Block]:
    """The life of the model, a row per stage."""
    measured = records.pipeline.get("rows")
    if not measured:
        return [Text("No table of stages yet: `bash run_all.sh cpu eval` makes it.")]
    rows = []
    for stage in measured:
        cells = {"model": records.run(stage["model"]).shown, "task": stage.get("task", "")}
        cells["minutes of training"] = f"{stage.get('minutes', 0):.1f}"
        for key, metric in stage.items():
            if isinstance(metric, dict):
                cells[WAYS.get(key, key)] = interval(metric, 1, 3) if "bits" in key else percent(metric)
        rows.append(cells)
    words = "Percent of problems solved, of one training run each, with 95 % intervals over the problems; "
    words += "bits per byte where it says so."
    return [Text(words), table("stages", rows, "The life of the model, in percent of problems solved.")]


def results(records: Records) -> list[Block]:
    """Every number that was measured, and on each task what training changed."""
    if not records.measurements:
        return [Text("Nothing was measured: `python eval.py RUN --tasks=...` does it.")]
    words = (
        "The same task by a base, by the base with examples in its prompt, by what was trained from it, and "
        "by a model that learnt the task from nothing. Differences are paired, in points with 95 % intervals "
        "over the items that both answered."
    )
    caption = "Results by task: base, prompted, trained; paired differences in points."
    rows = []
    for m in sorted(records.measurements, key=lambda m: m.where):
        for name, metric in m.entry["metrics"].items():
            cells = {"task": m.where[0], "split": m.where[1], "model": m.model, "way": m.way}
            cells |= {"metric": METRICS.get(name, name), "value [95 %]": value_of(name, metric)}
            rows.append(cells | {"items": metric.get("n", m.items), "note": m.notes})
    return [
        Text(words),
        table("side-by-side", [compared(c) for c in records.comparisons], caption),
        Text("Every number that was measured, shares in percent:"),
        table("results", rows, "Every result.", folded=len(rows) > 20),
    ]


def compared(c: Comparison) -> dict:
    """A row of the table that sets results side by side."""
    first = c.tuned or c.base or c.prompted
    metric = first.headline
    model = f"{c.tuned.model}, {c.tuned.way}" if c.tuned else first.model
    cells = {"task": ", ".join(filter(None, first.where)), "model": model, "metric": METRICS[metric]}
    cells["items"] = first.items
    after = c.tuned if c.tuned is not c.scratch else None
    shown = {"base": c.base, "prompted": c.prompted, "after training": after, "from scratch": c.scratch}
    for column, m in shown.items():
        cells[column] = ""
        if m and metric in m.entry["metrics"]:
            notes = [SMOKE] * m.smoke + [f"{m.items} items"] * (m.items != first.items)
            value = value_of(metric, m.entry["metrics"][metric])
            cells[column] = f"{value} ({', '.join(notes)})" if notes else value
    for column, other in {"base": c.base, "prompted": c.prompted, "scratch": c.scratch}.items():
        gap = c.minus(other)
        fewer = f" ({gap['n']} items)" if gap and gap["n"] != first.items else ""
        cells[f"after - {column}"] = points(gap) + fewer
    return cells


def ledger(records: Records) -> list[Block]:
    """Where the time went, beside what the plan had said."""
    if not records.ledger:
        return [Text("No time ledger: `bash run_all.sh` keeps one.")]
    plan = {stage: float(seconds) for stage, seconds, _ in records.plan}
    spent = []
    for stage, seconds, command in records.ledger:
        spent.append({"stage": stage, "took": float(seconds), "plan": plan.get(stage), "command": command})
    planned = sum(x["plan"] or 0 for x in spent) if plan else None
    spent.append({"stage": "all", "took": sum(x["took"] for x in spent), "plan": planned, "command": ""})
    template = "stage: {stage} | minutes: {took:minutes} | planned: {plan:minutes} | command: {command}"
    return [table("ledger", [row(template, x) for x in spent])]


# -----------------------------------------------------------------------------
# Training

CURVES = 16  # runs whose curves a page has room for
TRAINED = """
run: {run.shown} | stage: {run.stage} | parameters: {parameters:count} | state: {status}
last validation loss: {run.last[val_loss]:.4f} at {run.last[step]:,}
best: {run.best[val_loss]:.4f} at {run.best[step]:,}
tokens: {tokens:count} | FLOPs, 6 N tokens: {flops:.1e} | minutes: {seconds:minutes}
tokens/s: {speed:,.0f}{unit} | GiB (planned): {memory:.2f}{planned}
"""


def training(records: Records) -> list[Block]:
    """What was trained, how fast, and how the loss fell."""
    rows, drawn = [], deque(maxlen=CURVES)  # the other logs are not kept in memory
    for run in records.runs:
        lines = curve_rows(run)
        rows.append(training_row(run, lines, records.plan))
        if any("loss" in x for x in lines):  # a step whose loss was not finite has none
            drawn.append((run, lines))
    if not rows:
        return [Text("No run folders here: `bash run_all.sh cpu` makes them.")]
    blocks: list[Block] = [table("runs", rows, "What was trained.")]
    if len(rows) > CURVES:
        words = f"Curves of the {CURVES} newest of {len(rows)} runs; `report.py --compare=A,B` draws any."
        blocks.append(Text(words))
    groups: dict[tuple, list] = {}  # of one stage, tokenizer and validation text: their losses compare
    for run, lines in drawn:
        key = (run.stage, run.record.get("tokenizer"), run.validation.get("fingerprint"))
        groups.setdefault(key, []).append((run.shown, lines))
    several = [(key, group) for key, group in groups.items() if key[-1] and len(group) > 1]
    for i, (key, group) in enumerate(several, 1):
        blocks.append(overlaid(f"curves-together-{i}-{key[0]}", group))
    for run, lines in drawn:
        blocks += [loss_curves(run, lines), *preferences(run, lines)]
    return blocks


def training_row(run: Run, lines: list[dict], plan: list[list[str]]) -> dict:
    steps = [x for x in lines if "tokens_per_second" in x]
    # DPO and a verifier's head count what they compare, not its tokens.
    unit = " pairs" if run.stage == "dpo" else " answers" if run.record.get("verifier") == "head" else ""
    gib = {stage.removeprefix("finetune-"): float(size) for stage, _, size in plan}
    planned = gib.get("pretrain" if run.stage == "train" else run.folder.name)
    values = {"parameters": 0, "seconds": 0, "status": "unreadable"} | run.record
    values |= {"run": run, "unit": unit, "planned": fill(" ({size:.2f})", {"size": planned})}
    values["memory"] = max((x.get("peak_memory_gib", 0) for x in steps), default=0)
    values["speed"] = statistics.median(x["tokens_per_second"] for x in steps) if steps else 0
    if steps and not unit:
        values["tokens"] = steps[-1].get("tokens", 0)
        values["flops"] = 6 * values["parameters"] * values["tokens"]
    return row(TRAINED, values)


# -----------------------------------------------------------------------------
# What it writes

COLUMNS = 5  # steps that a table has room for beside each other


def samples(records: Records) -> list[Block]:
    """What it writes: the same prompts by checkpoint, and by stage."""
    blocks: list[Block] = []
    for run in records.runs:
        for file, words in (("samples", "while it was trained"), ("generations", "asked afterwards")):
            lines = [x for x in read_jsonl(run.folder / f"{file}.jsonl") if "text" in x]
            if lines:
                blocks.append(Text(f"**{run.shown}** {words}, the same prompt by step:"))
                blocks.append(by_step(f"{file}-{run.folder.name}", lines))
    if battery := records.pipeline.get("battery"):
        asked = next(iter(battery.values()))
        rows = [row("asked: {asked:shorten} | expected: {meant:shorten}", x) for x in asked]
        for model, answers in battery.items():
            for cells, answer in zip(rows, answers, strict=False):
                cells[records.run(model).shown] = shorten(answer["said"])
        blocks += [Text("The same instructions by stage, the first dozen:"), table("battery", rows[:12])]
    return blocks or [Text("No samples: training runs write them at each evaluation.")]


def by_step(name: str, lines: list[dict]) -> Table:
    """Samples {"step", "prompt", "text"}: a row per prompt, a column per step; of many steps a few."""
    steps = sorted({x.get("step", 0) for x in lines})
    every = -(-len(steps) // COLUMNS)
    rows: dict[str, dict] = {}
    for step in steps[::-every][::-1]:
        for x in lines:
            if x.get("step", 0) == step:
                prompt = shorten(x.get("prompt", "")) or "(start of a text)"
                rows.setdefault(prompt, {"prompt": prompt})[f"step {step:,}"] = shorten(x["text"])
    return table(name, list(rows.values()))


# -----------------------------------------------------------------------------
# Many answers, and the verifier

CHOOSING = (
    "{run.shown}: how many of {items:,} problems are right when one of n answers is chosen, with 95 % "
    "intervals. A calculator is a tool; the oracle knows the right answer and bounds them all."
)
SCORE = "AUC: {auc:.3f} | AUC within a problem: {auc_within[value]:.3f} | best of n: {best_of_n:percent}"
GATE = "sure from: {threshold} | answers a problem: {samples:.1f} | right: {right:percent}"


def choosing(records: Records) -> list[Block]:
    """What answering many times adds, and what the verifier is worth."""
    blocks: list[Block] = []
    for run in records.runs:
        for entry in run.results().values():
            if entry.get("curves"):
                blocks += chosen(run, entry)
    return blocks or [Text("No model was sampled more than once: `python eval.py RUN --samples=16` does it.")]


def chosen(run: Run, entry: dict) -> list[Block]:
    """Curves over the number of answers, differences, and sampling until the verifier is sure."""
    name = f"{run.folder.name}-{entry['task']}"
    curves = [budget_curve(way, found) for way, found in entry["curves"].items()]
    panel = Panel(curves, "answers per problem", "% right", f"{run.shown}, {entry['task']}", log="x")
    panel.ticks = {n: str(n) for curve in curves for n in curve.x}
    if greedy := entry["metrics"].get("exact_match"):
        panel.level, panel.level_label = 100 * greedy["value"], "greedy"
    caption = fill(CHOOSING, entry | {"run": run})
    blocks: list[Block] = [chart(f"choosing-{name}", caption, [panel], size=(6.4, 4.2))]
    if differences := entry.get("differences"):
        rows = [{"paired difference": way, "points [95 %]": points(x)} for way, x in differences.items()]
        caption = f"{run.shown}: paired differences between ways to choose an answer."
        blocks.append(table(f"differences-{name}", rows, caption))
    for label, gates in entry.get("gating", {}).items():
        words = f"Sampling until the verifier ({label}) is sure (above 1: never), with {run.shown}:"
        blocks.append(Text(words))
        blocks.append(table(f"gating-{run.folder.name}-{label}", [row(GATE, gate) for gate in gates]))
    return blocks


def budget_curve(way: str, found: dict[str, dict]) -> Line:
    """Percent right against the number of answers, with intervals where there are some."""
    ends = ("value", "low", "high")
    value, low, high = ([100 * x.get(end, x["value"]) for x in found.values()] for end in ends)
    label, form = ("pass (oracle)", "--") if way == "pass" else (way, "o-")
    return Line(list(map(int, found)), value, label, form, low, high)


def verifiers(records: Records) -> list[Block]:
    """Whether a verifier's probabilities are true."""
    blocks: list[Block] = []
    for run in records.runs:
        found = run.record.get("verification")
        if not found:
            continue
        scores = {score: x for score, x in found.items() if isinstance(x, dict) and "auc_within" in x}
        rows = [{"score": score} | row(SCORE, x) for score, x in scores.items()]
        words = fill(" on {answers:,} answers to {problems:,} problems:", found)
        blocks.append(Text(f"**{run.shown}**{words}"))
        blocks.append(table(f"verifier-{run.folder.name}", rows))
        bins = [x for x in found.get("calibration", {}).get("bins", []) if x.get("n")]
        if bins:
            true = Line([0, 1], [0, 1], form=":", style={"color": GREY})
            lines = [true, line(bins, "said", "is", form="o-", color=BLUE)]
            panel = Panel(lines, "probability it says", "share that is right", run.shown)
            error = f"mean error {100 * found['calibration']['ece']:.1f} %."
            caption = f"{run.shown}: on the dotted line its probabilities are true; {error}"
            blocks.append(chart(f"reliability-{run.folder.name}", caption, [panel], size=(4.2, 4)))
    return blocks or [Text("No verifier: `python verifier.py configs/verifier.py` trains one.")]


# -----------------------------------------------------------------------------
# Mistakes

VIOLATION = """
margin: {margin:.1f} | prompt: {prompt:shorten} | chosen: {chosen:shorten} | rejected: {rejected:shorten}
"""
EXAMPLE = "asked: {text:shorten} | said: {said:shorten} | should be: {target:shorten}"


def failures(records: Records) -> list[Block]:
    """What kinds of mistakes a model makes, what a verifier mends and breaks, what a stage did to its parent,
    and which labels are doubtful.
    """
    blocks, known, verdicts = [], {}, {}  # known: {(run, task, split): {text: record}}
    for run in records.runs:
        blocks += violations(run)
        parent = Path(str(run.record.get("parent"))).name
        for (task, split), (entry, answers) in answers_by_task(run).items():
            name = f"{run.folder.name}-{task}-{split}"
            blocks += mistakes(run.shown, name, entry, answers)
            for label in entry.get("verifiers", {}):
                pairs = []  # the greedy answer and the one that the verifier picked
                for r in answers:
                    if label in r:
                        picked = {"output": r[label], "correct": r[f"{label} correct"]}
                        pairs.append((r, picked | {"sure": r.get(f"{label} sure")}))
                blocks += changed(f"{name}-{label}", "greedy", label, pairs)
            before = known.get((parent, task, split), {})
            known[run.folder.name, task, split] = {r["text"]: r for r in answers}
            if TASKS[task].metric == "exact_match":
                pairs = [(before[r["text"]], r) for r in answers if r["text"] in before]
                blocks += changed(f"{name}-{parent}", parent, run.shown, pairs)
            for r in answers:
                if "sure" in r:
                    by_text = verdicts.setdefault(f"{task}-{split}", {})
                    by_text.setdefault(r["text"], []).append(r | {"model": run.folder.name})
    for name, by_text in verdicts.items():
        blocks += doubtful(name, by_text)
    return blocks or [Text("No mistakes to sort: `python eval.py RUN --tasks=...` records them.")]


def answers_by_task(run: Run) -> dict[tuple, tuple]:
    """{(task, split): (entry, answers)} where mistakes were sorted. Of several evaluations the last counts:
    with more examples in the prompt, or with many answers.
    """
    found = {}
    for key, entry in run.results().items():
        if entry.get("task") in TASKS:
            answers = [r for r in read_jsonl(run.answers_file(key)) if "kinds" in r]
            if answers:
                found[entry["task"], entry["split"]] = entry, answers
    return found


def mistakes(model: str, name: str, entry: dict, answers: list[dict]) -> list[Block]:
    """How many answers are of which kind, with an example of each; what a kind is, tasks/mistakes.py says."""
    task = TASKS[entry["task"]]
    summaries = task.metric == "rouge"
    wrong = [r for r in answers if (r["kinds"] != ["other"] if summaries else not r["correct"])]
    column = "% of all" if summaries else "% of these wrong" if task.labels else "% of the wrong ones"
    rows, examples = [], []
    for kind, words in KINDS.items():
        some, bad = ([r for r in group if kind in r["kinds"]] for group in (answers, wrong))
        if some:
            total = {"% of all": answers, "% of these wrong": some, "% of the wrong ones": wrong}[column]
            cells = {"kind": words, "answers": len(some), "wrong": len(bad)}
            cells[column] = percent(proportion(len(bad), len(total)))
            if summaries:
                cells["ROUGE-L"] = f"{100 * statistics.fmean(r['rougeL'] for r in some):.1f}"
            rows.append(cells)
        if bad:
            said = bad[0].get("output", bad[0].get("prediction"))  # a class, where nothing is written
            examples.append({"kind": words} | row(EXAMPLE, bad[0] | {"said": said}))
    found = f"{len(wrong):,} of {len(answers):,}"
    found = f"has a flaw that can be counted in {found} summaries" if summaries else f"is wrong on {found}"
    shots = f", {entry['shots']} examples in the prompt" if entry.get("shots") else ""
    about = f"{entry['task']}, {entry['split']}"
    blocks: list[Block] = [Text(f"**{model}**, {about}{shots}: {found}.")]
    if rows:
        blocks.append(table(f"errors-{name}", rows, f"Mistakes of {model}, {about}."))
    if examples:
        blocks.append(table(f"examples-{name}", examples))
    return blocks


def doubtful(name: str, by_text: dict[str, list[dict]]) -> list[Block]:
    """Labels that all of several models contradict with a mean probability above 0.9: look at them."""
    if all(len(verdicts) < 2 for verdicts in by_text.values()):
        return []
    template = "text: {text:shorten} | label: {target} | all models say: {prediction}"
    rows = []
    for verdicts in by_text.values():
        first, sure = verdicts[0], statistics.fmean(r["sure"] for r in verdicts)
        unanimous = len(verdicts) > 1 and len({r["prediction"] for r in verdicts}) == 1
        if unanimous and not first["correct"] and sure > 0.9:
            models = ", ".join(r["model"] for r in verdicts)
            rows.append(row(template, first) | {"mean probability": f"{sure:.2f}", "models": models})
    rows.sort(key=lambda cells: cells["mean probability"], reverse=True)
    words = f"**{name}**: {len(rows)} labels that all models contradict, with a mean probability above 0.9; "
    words += "they may be wrong."
    return [Text(words), *([table(f"doubtful-{name}", rows[:10])] if rows else [])]


def changed(name: str, a: str, b: str, pairs: list[tuple[dict, dict]]) -> list[Block]:
    """How many answers of `a` were mended and broken by `b`, from the records of both; three of each, of the
    broken those that b was surest of.
    """
    mended = [(old, new) for old, new in pairs if new["correct"] and not old["correct"]]
    broken = [(old, new) for old, new in pairs if old["correct"] and not new["correct"]]
    if not (mended or broken):
        return []
    broken.sort(key=lambda pair: -(pair[1].get("sure") or 0))
    rows = []
    for old, new in mended[:3] + broken[:3]:
        cells = {"": "broken" if old["correct"] else "mended", "problem": shorten(old["text"])}
        cells |= {a: shorten(old["output"]), b: shorten(new["output"])}
        rows.append(cells if new.get("sure") is None else cells | {"it says": f"{new['sure']:.2f}"})
    words = f"**{b}** is right where {a} is wrong on {len(mended)} of {len(pairs):,} problems, "
    words += f"wrong where {a} is right on {len(broken)}. Three of each:"
    return [Text(words), table(f"changed-{name}", rows)]


def violations(run: Run) -> list[Block]:
    """Held-out pairs that a model which learnt preferences moved the wrong way, the worst first."""
    found, pairs = read_jsonl(run.folder / "violations.jsonl"), run.validation.get("pairs")
    if not found or not pairs:
        return []
    words = f"**{run.shown}** moved {len(found)} of {pairs} held-out pairs the wrong way; the three worst:"
    rows = []
    for pair in found[:3]:
        texts = {}
        for key in ("prompt", "chosen", "rejected"):  # messages, of which the last one counts
            texts[key] = pair[key][-1]["content"] if isinstance(pair.get(key), list) else pair.get(key)
        rows.append(row(VIOLATION, pair | texts))
    return [Text(words), table(f"violations-{run.folder.name}", rows)]


# -----------------------------------------------------------------------------
# How to make it again

DATA = "source: {source:shorten} | licence: {licence} | tokens: {tokens:,} | SHA-256: {fingerprint:.12}"


def making(records: Records) -> list[Block]:
    """Commit, machine, versions, command, settings and data of every run."""
    blocks, read = [], []
    for run in records.runs:
        versions = run.record.get("versions", {})
        used = ", ".join(f"{library} {version}" for library, version in versions.items())
        machine = fill("{device}, {threads} threads", run.record.get("hardware")) or "unknown machine"
        blocks.append(Text(f"**{run.shown}**, commit {run.record.get('git')}, {machine}; {used}"))
        blocks.append(Text(f"`{run.record.get('command', '')}`"))
        chosen = {key: run.settings.get(key) for key in run.record.get("changed", [])}
        chosen = [f"{key}={value}" for key, value in chosen.items() if value not in ("", None)]
        if chosen:
            blocks.append(Text(f"Settings other than the defaults: `{' '.join(chosen)}`"))
        read += [{"run": run.folder.name} | source for source in sources(run.data)]
    if read:
        blocks += [Text("What the runs read:"), table("data", read)]
    return blocks or [Text("No run folders here.")]


def sources(data: object, split: str = "train") -> list[dict]:
    """What a run's record names as its data, however it is nested."""
    if not isinstance(data, dict):
        return []
    rows = [{"split": split} | row(DATA, data)] if "source" in data else []
    for key, inner in data.items():
        rows += sources(inner, key)
    return rows


# -----------------------------------------------------------------------------
# Runs beside each other


def comparison(folders: list[Path]) -> list[Block]:
    """Settings that differ, losses in one picture, the last difference and how much of it is noise."""
    alike = len({folder.name for folder in folders}) < len(folders)
    runs = {str(folder) if alike else folder.name: Run(folder, folder.parent) for folder in folders}
    for run in runs.values():
        if not run.record:
            raise ConfigError(f"{run.folder} holds no run that can be read")
    differ = differing({name: run.settings for name, run in runs.items()})
    rows = [{"setting": key} | values for key, values in differ.items()]
    blocks: list[Block] = [Text("Settings that differ:"), table("settings", rows)]
    blocks = blocks if rows else [Text("No setting differs.")]
    blocks.append(overlaid("comparison", [(name, curve_rows(run)) for name, run in runs.items()]))
    first, rows = next(iter(runs)), []
    for name, run in runs.items():
        cells = {"run": name} | row("last validation loss: {val_loss:.4f}", run.last)
        if "val_loss" in run.last and "val_loss" in runs[first].last:
            cells[f"minus {first}"] = f"{run.last['val_loss'] - runs[first].last['val_loss']:+.4f}"
        rows.append(cells)
    return [*blocks, table("last", rows), *noise(list(runs.values()))]


def noise(runs: list[Run]) -> list[Block]:
    """Groups of runs that differ in nothing but the seed: mean and spread, and differences between groups in
    units of their standard error.
    """
    groups: dict[str, dict] = {}  # settings: {seed: run}
    for run in runs:
        if "val_loss" in run.last:
            groups.setdefault(settings_but_seed(run), {}).setdefault(run.settings.get("seed"), run)
    losses = [[run.last["val_loss"] for run in seeds.values()] for seeds in groups.values()]
    free = sum(len(group) - 1 for group in losses)
    if not free:
        return [Text("What of a difference is noise, one run each cannot tell: repeat them with --seed=2.")]
    spread = math.sqrt(sum(statistics.pvariance(group) * len(group) for group in losses) / free)
    rows = []
    for seeds, group in zip(groups.values(), losses, strict=True):
        mean = statistics.fmean(group)
        gap = mean - statistics.fmean(losses[0])
        error = spread * math.sqrt(1 / len(group) + 1 / len(losses[0]))
        cells = {"runs": ", ".join(str(run.folder) for run in seeds.values())}
        cells["mean of the last loss"] = f"{mean:.4f}"
        if rows and error:
            cells["minus the first"] = f"{gap:+.4f}, {abs(gap) / error:.1f} standard errors"
        rows.append(cells)
    words = f"Runs of equal settings with other seeds differ with a standard deviation of {spread:.4f}."
    return [Text(words), table("noise", rows)]


def settings_but_seed(run: Run) -> str:
    """The settings without seed and name; the same run in another folder is the same run."""
    out = f"{run.settings.get('out', '')}/"
    kept = {key: str(value).removeprefix(out) for key, value in run.settings.items()}
    return json.dumps(kept | {"seed": "", "name": "", "out": ""}, sort_keys=True)


# -----------------------------------------------------------------------------
# The page

# The lab stands above the lesson, which does not import it: its sections are named, as "module:function".
LOG, PAPER = "lab.log:log", "lab.paper:write_paper"
SECTIONS: dict[str, Callable | str] = {
    "What was found": "lab.log:findings",
    "What each stage gained": stages,
    "Every result": results,
    "Where the time went": ledger,
    "Training": training,
    "What it says": samples,
    "Choosing among many answers": choosing,
    "The verifier": verifiers,
    "Where it fails": failures,
    "What the heads look at": "lab.pages:attention",
    "Beyond the context": "lab.pages:beyond",
    "The lab": "lab.pages:lab",
    "The machine": "lab.pages:machine",
    "How to make it again": making,
}


def sections_of(records: Records, only: str = "") -> Sections:
    """{heading: blocks} of all sections, or of those whose functions `only` names, joined by commas."""
    found = {}
    for heading, section in SECTIONS.items():
        found[heading] = pkgutil.resolve_name(section) if isinstance(section, str) else section
    known = [section.__name__ for section in found.values()]
    wanted = [name for name in only.split(",") if name] or known
    if unknown := set(wanted).difference(known):
        raise ConfigError(f"--only={','.join(sorted(unknown))}: there are {', '.join(known)}")
    return {heading: section(records) for heading, section in found.items() if section.__name__ in wanted}


def make_report(cfg: ReportConfig) -> Path:
    """Writes the page, and unless it shows a part only, the log and the paper; returns the page's path."""
    home = Path(cfg.home)
    to = Path(cfg.to) if cfg.to else home / "report"
    if cfg.compare:
        folders = [Path(folder) for folder in cfg.compare.split(",") if folder]
        return write(to, "Modern LLM: report", {"Comparison": comparison(folders)})
    if not home.is_dir():
        raise ConfigError(f"there is no folder {home}: run bash run_all.sh cpu, or name another by --home")
    records = Records(home)
    sections = sections_of(records, cfg.only)
    if not cfg.only:
        write(to, "Modern LLM: experiments", pkgutil.resolve_name(LOG)(records, sections), "experiments")
        pkgutil.resolve_name(PAPER)(to / "paper", records, sections)
    return write(to, "Modern LLM: report", sections)


def main() -> None:
    cfg = parse_config(ReportConfig, __doc__)
    try:
        page = make_report(cfg)
    except (ConfigError, OSError) as error:
        raise SystemExit(f"report.py: {error}") from None
    print(f"wrote the page, its tables and figures to {page.parent}/", file=sys.stderr)
    print(page)


if __name__ == "__main__":
    run_script(main)
