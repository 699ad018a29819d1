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
it got, and a damaged record costs that record alone. A run that was cut short is marked as a smoke run
wherever its name stands.

A section is a function from the records of a folder (support/results.py) to blocks (support/pages.py). To add
one, write the function and name it in SECTIONS.
"""

from support.terminal import run_script

import json
import pkgutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from configs import ConfigError, names_in, parse_config
from data import TASKS
from support.charts import BLUE, GREY, canvas, chart, name_ticks, plot, plot_columns
from support.curves import loss_curves, overlaid, preferences
from support.metrics import proportion
from support.pages import Block, Sections, Table, Text, fill, percent, row, rows_of, say, shorten, write
from support.results import METRICS, SMOKE, Comparison, Measurement, Records, Run, differing
from support.runs import errors_for_users
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

STAGES = """
Percent of problems solved, of one training run each, with 95 % intervals over the problems; bits per byte \
where it says so.
"""


def stages(records: Records) -> list[Block]:
    """The life of the model, a row per run: its results on problems and texts, without examples."""
    rows = {}  # folder: cells
    for m in records.measurements:
        for name, value in m.values.items():
            if not m.shots and (name in ("exact_match", "bits_per_byte") or m.sampled):
                cells = rows.setdefault(m.run.folder, {"model": m.run.shown})
                cells |= row("minutes of training: {seconds:minutes}", **{"seconds": 0} | m.run.record)
                cells[f"{m.task}: {METRICS.get(name, name)}"] = value
    for model, answers in records.battery.items():
        run = records.run(model)
        right = sum(answer["correct"] for answer in answers)
        cells = rows.setdefault(run.folder, {"model": run.shown})
        cells["instructions followed"] = percent(proportion(right, len(answers)))
    caption = "The life of the model, in percent of problems solved."
    return [*say(STAGES), Table("stages", list(rows.values()), caption)] if rows else []


SIDE_BY_SIDE = """
The same task by a base, by the base with examples in its prompt, by what was trained from it, and by a \
model of the same size that learnt the task from random weights. Differences are paired, in points with \
95 % intervals over the items that both answered.
"""


RESULT = """
task: {m.task} | split: {m.split} | model: {m.run.name} | shots: {m.shots} | way: {m.way} | metric: {metric}
value [95 %]: {value} | items: {items} | note: {m.notes}
"""


def results(records: Records) -> list[Block]:
    """Every number that was measured, and on each task what training changed."""
    rows = []
    for m in sorted(records.measurements, key=lambda m: m.where):
        for name, value in m.values.items():
            items = m.entry["metrics"][name].get("n", m.items)
            rows.append(row(RESULT, m=m, metric=METRICS.get(name, name), value=value, items=items))
    if not rows:
        return []
    caption = "Results by task: base, prompted, trained; paired differences in points."
    beside = Table("side-by-side", records.each(records.comparisons, compared), caption)
    every = Table("results", rows, "Every result.", folded=len(rows) > 20)
    return [*say(SIDE_BY_SIDE), beside, Text("Every number that was measured, shares in percent:"), every]


COMPARED = """
task: {m.place} | model: {m.run.name}, {m.way} | metric: {metric} | base: {some[base]}
prompted: {some[prompted]} | after training: {some[after training]} | from scratch: {some[from scratch]}
after - base: {gaps[base]:points} ({gaps[base][n]} items)
after - prompted: {gaps[prompted]:points} ({gaps[prompted][n]} items)
after - from scratch: {gaps[from scratch]:points} ({gaps[from scratch][n]} items)
"""


def compared(c: Comparison) -> list[dict]:
    """A row of the table that sets results side by side."""
    headline, some = c.m.headline, {}
    for role, m in (c.others | {c.m.role: c.m}).items():
        mark = f"{SMOKE}; " * m.smoke
        some[role] = fill("{value} ({mark}{m.items} items)", value=m.values.get(headline), mark=mark, m=m)
    return [row(COMPARED, m=c.m, metric=METRICS[headline], some=some, gaps=c.gaps)]


LEDGER = "stage: {stage} | minutes: {seconds:minutes} | planned: {planned:minutes} | command: {command}"


def ledger(records: Records) -> list[Block]:
    """Where the time went, beside what the plan had said."""
    plan = {x["stage"]: x["seconds"] for x in records.plan}
    spent = [x | {"planned": plan.get(x["stage"])} for x in records.ledger]
    total = {"stage": "all", "command": "", "seconds": sum(x["seconds"] for x in spent)}
    total["planned"] = sum(x["planned"] or 0 for x in spent) if plan else None
    return [Table("ledger", [row(LEDGER, **x) for x in [*spent, total]])] if spent else []


# -----------------------------------------------------------------------------
# Training

CURVES = 16  # runs whose curves a page has room for
TRAINED = """
run: {run.shown} | stage: {run.stage} | parameters: {parameters:count} | state: {status}
last validation loss: {run.last[val_loss]:.4f} at {run.last[step]:,}
best: {run.best[val_loss]:.4f} at {run.best[step]:,}
tokens: {tokens:count} | FLOPs, 6 N tokens: {flops:.1e} | minutes: {seconds:minutes}
tokens/s: {speed:,.0f} | GiB: {memory:.2f}
"""


def training(records: Records) -> list[Block]:
    """What was trained, how fast, and how the loss fell."""
    if not records.runs:
        return []
    rows = records.each(records.runs, trained)
    # A step whose loss was not finite has none.
    drawn = [run for run in records.runs if any("loss" in x for x in run.metrics)]
    blocks = [Table("runs", rows, "What was trained.")]
    if len(drawn) > CURVES:
        note = "Curves of the {most} newest of {n} runs; `report.py --compare=A,B` draws any."
        blocks += say(note, most=CURVES, n=len(drawn))
    return blocks + records.each(drawn[-CURVES:], lambda run: [loss_curves(run), *preferences(run)])


def trained(run: Run) -> list[dict]:
    """A row of the table of runs."""
    record = {"parameters": 0, "seconds": 0, "status": "unreadable"} | run.record
    tokens = run.metrics[-1].get("tokens") if run.metrics else None
    figures = {
        "tokens": tokens,
        "flops": 6 * record["parameters"] * tokens if tokens else None,
        "speed": run.typical("tokens_per_second") or 0,
        "memory": max((x.get("peak_memory_gib", 0) for x in run.metrics), default=0),
    }
    return [row(TRAINED, **record | figures, run=run)]


# -----------------------------------------------------------------------------
# What it writes

COLUMNS = 5  # steps that a table has room for beside each other


def samples(records: Records) -> list[Block]:
    """What it writes: the same prompts by checkpoint, and by stage."""
    return records.each(records.runs, samples_of) + battery(records)


def samples_of(run: Run) -> list[Block]:
    """The samples of one run: a row per prompt, a column per step. Of many steps, COLUMNS are shown."""
    blocks = []
    for file, words in (("samples", "while it was trained"), ("generations", "asked afterwards")):
        lines = [x for x in read_jsonl(run.folder / f"{file}.jsonl") if "text" in x and "step" in x]
        steps = sorted({x["step"] for x in lines})
        kept = steps[:: -max(1, -(-len(steps) // COLUMNS))]
        rows = {}  # prompt: cells
        for x in sorted(lines, key=lambda x: x["step"]):
            if x["step"] in kept:
                prompt = shorten(x.get("prompt", "")) or "(start of a text)"
                cells = rows.setdefault(prompt, {"prompt": prompt})
                cells |= row(f"step {x['step']:,}: {{text:shorten}}", **x)
        if rows:
            blocks += say("**{run.shown}** {words}, the same prompt by step:", run=run, words=words)
            blocks.append(Table(f"{file}-{run.folder.name}", list(rows.values())))
    return blocks


def battery(records: Records) -> list[Block]:
    """The same instructions by stage, from pipeline.json."""
    rows = {}  # instruction: cells
    for model, answers in records.battery.items():
        for x in answers[:12]:
            cells = row("asked: {asked:shorten} | expected: {meant:shorten}", **x)
            rows.setdefault(x["asked"], cells)[records.run(model).shown] = shorten(x["said"])
    table = Table("battery", list(rows.values()))
    return [Text("The same instructions by stage, the first dozen:"), table] if rows else []


# -----------------------------------------------------------------------------
# Many answers, and the verifier

CHOOSING = (
    "{m.shown}: how many of {m.items:,} problems are right when one of n answers is chosen, with 95 % "
    "intervals. A calculator is a tool; the oracle knows the right answer and bounds them all."
)
SCORE = """
score: {key} | AUC: {auc:.3f} | AUC within a problem: {auc_within[value]:.3f} | best of n: {best_of_n:percent}
"""
GATE = "sure from: {threshold} | answers a problem: {samples:.1f} | right: {right:percent}"
UNTIL_SURE = "{m.shown}: sampling until the verifier ({name}) is sure (above 1: never)."
VERIFIED = "**{run.shown}** on {answers:,} answers to {problems:,} problems:"
TRUE = "{run.shown}: on the dotted line its probabilities are true; mean error {percent:.1f} %."


def choosing(records: Records) -> list[Block]:
    """What answering many times adds, and what the verifier is worth."""
    return records.each([m for m in records.measurements if m.entry.get("curves")], chosen)


def chosen(m: Measurement) -> list[Block]:
    """Curves over the number of answers, differences, and sampling until the verifier is sure."""
    rows = rows_of("paired difference: {key} | points [95 %]: {x:points}", m.entry.get("differences", {}))
    caption = f"{m.shown}: paired differences between ways to choose an answer."
    blocks = [budget_curves(m), Table(f"differences-{m.stem}", rows, caption)]
    for verifier, gates in m.entry.get("gating", {}).items():
        rows = [row(GATE, **gate) for gate in gates]
        blocks += say(UNTIL_SURE, name=verifier, m=m)
        blocks.append(Table(f"gating-{m.stem}-{verifier}", rows))
    return blocks


def budget_curves(m: Measurement) -> Block:
    """Percent right against the number of answers, with intervals where there are some."""
    fig, (axes,) = canvas(1, 6.4, 4.2)
    ticks = {}
    for way, found in m.entry["curves"].items():
        budgets = [int(n) for n in found]
        value = [100 * x["value"] for x in found.values()]
        low, high = ([100 * x.get(end, x["value"]) for x in found.values()] for end in ("low", "high"))
        name, form = ("pass (oracle)", "--") if way == "pass" else (way, "o-")
        color = plot(axes, budgets, value, name, form).get_color()
        axes.fill_between(budgets, low, high, color=color, alpha=0.12, lw=0)
        ticks |= zip(budgets, found, strict=True)
    if greedy := m.entry["metrics"].get("exact_match"):
        axes.axhline(100 * greedy["value"], color=GREY, ls=":", label="greedy")
    axes.set(xlabel="answers per problem", ylabel="% right", title=f"{m.run.shown}, {m.task}", xscale="log")
    name_ticks(axes, ticks)
    return chart(f"choosing-{m.stem}", fill(CHOOSING, m=m), fig)


def verifiers(records: Records) -> list[Block]:
    """Whether a verifier's probabilities are true."""
    return records.each([run for run in records.runs if run.record.get("verification")], verified)


def verified(run: Run) -> list[Block]:
    found = run.record["verification"]
    scores = {score: x for score, x in found.items() if isinstance(x, dict) and "auc_within" in x}
    blocks = [*say(VERIFIED, run=run, **found), Table(f"verifier-{run.folder.name}", rows_of(SCORE, scores))]
    calibration = found.get("calibration", {})
    if bins := calibration.get("bins"):
        fig, (axes,) = canvas(1, 4.2, 4)
        plot(axes, [0, 1], [0, 1], form=":", color=GREY)
        plot_columns(axes, bins, "said", "is", form="o-", color=BLUE)
        axes.set(xlabel="probability it says", ylabel="share that is right", title=run.shown)
        caption = fill(TRUE, run=run, percent=100 * calibration["ece"])
        blocks.append(chart(f"reliability-{run.folder.name}", caption, fig))
    return blocks


# -----------------------------------------------------------------------------
# Mistakes

WRONG = "**{m.run.shown}**, {m.place}, {m.way}: {wrong:,} of {all:,} answers are wrong or have a flaw."
KIND = """
kind: {kind} | answers: {answers} | wrong: {wrong} | % of all: {share:percent}
asked: {example[text]:shorten} | said: {example[output]:shorten} | should be: {example[target]:shorten}
"""
MOVED = "**{run.shown}** moved {n} of {run.validation[pairs]} held-out pairs the wrong way; the three worst:"
VIOLATION = """
margin: {margin:.1f} | prompt: {prompt:shorten} | chosen: {chosen:shorten} | rejected: {rejected:shorten}
"""


def failures(records: Records) -> list[Block]:
    """What kinds of mistakes a model makes, and which pairs preferences moved the wrong way."""
    # Of several evaluations the last counts: with more examples in the prompt, or with many answers.
    last = {(m.run.folder, m.where): m for m in records.measurements if m.task in TASKS}
    return records.each(records.runs, violations) + records.each(last.values(), mistakes)


def mistakes(m: Measurement) -> list[Block]:
    """How many answers are of which kind, with an example of each; what a kind is, tasks/mistakes.py says."""
    answers = [r for r in read_jsonl(m.file) if "kinds" in r]
    wrong = [r for r in answers if not r.get("correct", r["kinds"] == ["other"])]
    rows = []
    for kind, words in KINDS.items():
        some, bad = ([r for r in group if kind in r["kinds"]] for group in (answers, wrong))
        if some:
            example = {"output": bad[0].get("prediction")} | bad[0] if bad else {}  # a class is no text
            share = proportion(len(bad), len(answers))
            cells = row(KIND, kind=words, answers=len(some), wrong=len(bad), share=share, example=example)
            rows.append(cells)
    table = Table(f"errors-{m.stem}", rows, f"Mistakes of {m.run.shown}, {m.place}.")
    return [*say(WRONG, m=m, wrong=len(wrong), all=len(answers)), table] if answers else []


def violations(run: Run) -> list[Block]:
    """Held-out pairs that a model which learnt preferences moved the wrong way, the worst first."""
    found = read_jsonl(run.folder / "violations.jsonl")
    rows = []
    for pair in found[:3]:  # of a conversation the last message is what counts
        texts = {key: x[-1]["content"] if isinstance(x, list) else x for key, x in pair.items()}
        rows.append(row(VIOLATION, **texts))
    words = say(MOVED, run=run, n=len(found))
    return [*words, Table(f"violations-{run.folder.name}", rows)] if rows and words else []


# -----------------------------------------------------------------------------
# How to make it again

MADE = """
**{run.shown}**, commit {git}, {hardware[device]}, {hardware[threads]} threads; {run.versions}
`{command}`
Settings other than the defaults: `{chosen}`
"""
DATA = """
run: {run} | split: {split} | source: {source:shorten} | licence: {licence} | tokens: {tokens:,}
SHA-256: {fingerprint:.12}
"""


def making(records: Records) -> list[Block]:
    """Commit, machine, versions, command, settings and data of every run."""
    rows = records.each(records.runs, lambda run: sources(run.data, run.folder.name, "train"))
    table = [Text("What the runs read:"), Table("data", rows)] if rows else []
    return records.each(records.runs, made) + table


def made(run: Run) -> list[Block]:
    record = {"git": "unknown", "hardware": {"device": "unknown machine", "threads": "?"}} | run.record
    chosen = {key: run.settings.get(key) for key in run.record.get("changed", [])}
    chosen = " ".join(f"{key}={value}" for key, value in chosen.items() if value not in ("", None))
    return say(MADE, **record, run=run, chosen=chosen or None)


def sources(data: object, run: str, split: str) -> list[dict]:
    """What a run's record names as its data, however it is nested."""
    if not isinstance(data, dict):
        return []
    rows = [row(DATA, **data | {"run": run, "split": split})] if "source" in data else []
    for key, inner in data.items():
        rows += sources(inner, run, key)
    return rows


# -----------------------------------------------------------------------------
# Runs beside each other

ALONE = "What of a difference is noise, one run each cannot tell: repeat them with --seed=2."
GROUP = """
runs: {runs} | last validation loss: {losses} | mean: {mean:.4f} | standard deviation over seeds: {spread:.4f}
minus the first: {gap:+.4f}
"""


def comparison(folders: list[Path]) -> list[Block]:
    """Settings that differ, losses in one picture, the last difference and how much of it is noise."""
    damaged = []
    runs = {str(folder): Run(folder, folder.parent, damaged) for folder in folders}
    for run in runs.values():
        if not run.record:
            raise ConfigError(f"{run.folder} holds no run that can be read")
    differ = differing({name: run.settings for name, run in runs.items()})
    rows = [{"setting": key} | values for key, values in differ.items()]
    blocks = [Text("No setting differs.")]
    if rows:
        blocks = [Text("Settings that differ:"), Table("settings", rows)]
    losses = last_losses(runs)
    blocks += [overlaid("comparison", runs), Table("last", losses)]
    blocks += [Text(words) for words in damaged]
    if not any(cells["standard deviation over seeds"] for cells in losses):
        blocks.append(Text(ALONE))
    return blocks


def last_losses(runs: dict[str, Run]) -> list[dict]:
    """A row per group of runs that differ in nothing but the seed, with the spread of their last losses."""
    groups = {}  # settings: {seed: (name, loss)}
    for name, run in runs.items():
        loss = run.last.get("val_loss")
        if isinstance(loss, int | float):
            groups.setdefault(settings_but_seed(run), {}).setdefault(run.settings.get("seed"), (name, loss))
    rows, first = [], None
    for some in groups.values():
        names, losses = zip(*some.values(), strict=True)
        mean = statistics.fmean(losses)
        first = first or mean
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        spread = statistics.stdev(losses) if len(losses) > 1 else None
        rows.append(
            row(GROUP, runs=", ".join(names), losses=shown, mean=mean, gap=mean - first, spread=spread)
        )
    return rows


def settings_but_seed(run: Run) -> str:
    """The settings without seed and name; the same run in another folder is the same run."""
    out = f"{run.settings.get('out', '')}/"
    kept = {key: str(value).removeprefix(out) for key, value in run.settings.items()}
    return json.dumps(kept | {"seed": "", "name": "", "out": ""}, sort_keys=True)


# -----------------------------------------------------------------------------
# The page

# The lab stands above the lesson, which does not import it: its sections are named, as "module:function".
NO_FINDING = "No findings yet: a finding is a difference of full runs whose 95 % interval excludes 0."
SECTIONS = {  # heading: function, and what stands there if it returns nothing
    "What was found": ("lab.log:findings", NO_FINDING),
    "What each stage gained": (stages, "No table of stages yet: `bash run_all.sh cpu eval` makes it."),
    "Every result": (results, "Nothing was measured: `python eval.py RUN --tasks=...` does it."),
    "Where the time went": (ledger, "No time ledger: `bash run_all.sh` keeps one."),
    "Training": (training, "No run folders here: `bash run_all.sh cpu` makes them."),
    "What it says": (samples, "No samples: training runs write them at each evaluation."),
    "Choosing among many answers": (
        choosing,
        "No model was sampled more than once: `python eval.py RUN --samples=16` does it.",
    ),
    "The verifier": (verifiers, "No verifier: `python verifier.py configs/verifier.py` trains one."),
    "Where it fails": (failures, "No mistakes to sort: `python eval.py RUN --tasks=...` records them."),
    "What the heads look at": (
        "lab.pages:attention",
        "No maps: `python eval.py out/base --attention` makes them.",
    ),
    "Beyond the context": ("lab.pages:beyond", "Not measured: `python eval.py out/base --streams` does it."),
    "The lab": ("lab.pages:lab", "The lab has not run: `bash run_all.sh experiments`."),
    "The machine": ("lab.pages:machine", "The machine was not measured: `bash run_all.sh hardware`."),
    "How to make it again": (making, "No run folders here."),
}


def sections_of(records: Records, only: str = "") -> Sections:
    """{heading: blocks} of all sections, or of those whose functions `only` names, joined by commas."""
    sections = {}  # by the name of the function
    for heading, (section, empty) in SECTIONS.items():
        section = pkgutil.resolve_name(section) if isinstance(section, str) else section
        sections[section.__name__] = heading, section, empty
    wanted = names_in(only, sections)
    found = {}
    for name, (heading, section, empty) in sections.items():
        if name in wanted:
            found[heading] = records.each([section], lambda section: section(records)) or [Text(empty)]
    if records.damaged:
        found["What could not be read"] = [Text(words) for words in dict.fromkeys(records.damaged)]
    return found


def make_report(cfg: ReportConfig) -> Path:
    """Writes the page, and unless it shows a part only, the log and the paper; returns the page's path."""
    home = Path(cfg.home)
    to = Path(cfg.to or home / "report")
    if cfg.compare:
        folders = [Path(folder) for folder in cfg.compare.split(",") if folder]
        return write(to, "Modern LLM: report", {"Comparison": comparison(folders)})
    if not home.is_dir():
        raise ConfigError(f"there is no folder {home}: run bash run_all.sh cpu, or name another by --home")
    records = Records(home)
    sections = sections_of(records, cfg.only)
    page = write(to, "Modern LLM: report", sections)
    if not cfg.only:
        log = pkgutil.resolve_name("lab.log:log")
        write_paper = pkgutil.resolve_name("lab.paper:write_paper")
        write(to, "Modern LLM: experiments", log(records, sections), "experiments")
        write_paper(to / "paper", records, sections)  # with the page's figures
    return page


def main() -> None:
    cfg = parse_config(ReportConfig, __doc__)
    with errors_for_users():
        page = make_report(cfg)
    print(f"wrote the page, its tables and figures to {page.parent}/", file=sys.stderr)
    print(page)


if __name__ == "__main__":
    run_script(main)
