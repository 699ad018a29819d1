"""Reads a folder of runs into records: the runs, their measurements, and comparisons on the same items.

eval.py writes results.json and answers/ into the folder of a run, an adapter or a checkpoint, and into
eval/MODEL for a model of the hub or in a read-only folder. finetune.py ends with an evaluation in run.json
and predictions.jsonl.

Missing and half-written files are tolerated: a run may still be in progress. A record with values of the
wrong type is left out, and `Records.damaged` names it.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean, median

from support.metrics import paired_bootstrap
from support.pages import interval
from support.tables import read_jsonl

SMOKE = "SMOKE RUN, no result"  # mark of a run that was shortened
METRICS = {  # name in results.json: name in a table
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "consistent": "stories that agree",
    "macro_f1": "macro F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "word_perplexity": "word perplexity",
    "answered": "gave a number",
    "calculator": "exact match, calculator",
    "mean_sample": "exact match, one sample",
    "words": "words",
}
# Comparisons use the first of these that a task has.
HEADLINES = ("accuracy", "exact_match", "consistent", "rougeL", "bits_per_byte")
DIGITS = {"perplexity": 2, "word_perplexity": 2, "bits_per_byte": 3, "loss": 4, "words": 1}  # no shares
LOGGED = "step loss val_loss tokens seconds tokens_per_second peak_memory_gib epoch skipped".split()
# What reading a value of the wrong type raises.
WrongType = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def read_json_or_empty(file: Path) -> dict:
    """The dict in a JSON file; {} if the file is missing or half-written."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def each(items: Iterable, read: Callable[..., list], damaged: list[str]) -> list:
    """read(item) of every item, joined. An item with values of the wrong type is left out and noted."""
    found = []
    for item in items:
        try:
            found += read(item)
        except WrongType as error:
            name = getattr(item, "shown", getattr(item, "__name__", item))
            damaged.append(f"{name}: damaged values, {type(error).__name__}: {error}")
    return found


def value_of(name: str, metric: dict) -> str:
    """A metric with its interval; shares are in percent."""
    return interval(metric, 1, DIGITS[name]) if name in DIGITS else interval(metric, 100)


# -----------------------------------------------------------------------------
# Runs


class Run:
    """The folder of a run, of one of its checkpoints, or of a hub model that was measured.

    lineage: the folder, then its ancestors: parent, grandparent, ...; records: run.json of each, or {}.
    damaged: gets a line if metrics.jsonl holds some of the wrong types. record: the content of run.json, if
    it is not written yet.
    """

    def __init__(
        self, folder: Path, home: Path, damaged: list[str] | None = None, record: dict | None = None
    ):
        self.folder = folder
        self.home = home  # the folder that holds the runs
        self.damaged = [] if damaged is None else damaged
        self.record = record or run_of(folder)
        self.lineage, self.records = [folder], [self.record]
        while (ancestor := parent_of(self.records[-1], home)) and ancestor not in self.lineage:
            self.lineage.append(ancestor)
            self.records.append(run_of(ancestor))
        self.stage = self.record.get("stage") or ""
        self.settings, self.data, results = (self.record.get(part) or {} for part in PARTS)
        self.last = results.get("last") or {}  # evaluations on the validation data
        self.best = results.get("best") or {}
        self.validation = self.data.get("validation") or {}
        alone = bool(self.settings.get("by_document"))
        self.text = self.record.get("tokenizer"), self.validation.get("fingerprint"), alone  # losses compare
        self.smoke = any(record.get("smoke") for record in self.records)
        if folder.parent.parent == home / "experiments":  # the lab caps its examples on purpose
            self.smoke = folder.parent.name.endswith("-quick")
        self.name = label(folder, home)
        self.shown = self.name + f" ({SMOKE})" * self.smoke
        # Its first ancestor, which may be a model of the hub.
        self.origin = self.records[-1].get("parent") or label(self.lineage[-1], home)

    def has(self, file: str) -> bool:
        return (self.folder / file).exists()

    @cached_property
    def metrics(self) -> list[dict]:
        """metrics.jsonl, with minutes. Evaluations get the clock of the step before."""
        lines, clock = [], {}
        logged = read_jsonl(self.folder / "metrics.jsonl")
        for line in logged:
            if all(isinstance(line.get(key, 0), int | float) for key in LOGGED):
                clock |= {key: line[key] for key in ("tokens", "seconds") if key in line}
                lines.append(clock | line | {"minutes": clock.get("seconds", 0) / 60})
        if left_out := len(logged) - len(lines):
            self.damaged.append(f"{self.folder}/metrics.jsonl: {left_out} lines of the wrong types")
        return lines

    @property
    def versions(self) -> str:
        """Of the libraries, as in run.json."""
        used = self.record.get("versions", {})
        return ", ".join(f"{library} {version}" for library, version in used.items())

    def typical(self, key: str, last: int = 0) -> float | None:
        """The median of what metrics.jsonl logged under a key, or the mean of its last values."""
        values = [x[key] for x in self.metrics if key in x][-last:]
        return (fmean(values) if last else median(values)) if values else None


PARTS = ("settings", "data", "results")  # of run.json


def run_of(folder: Path) -> dict:
    """run.json of a run folder, or of the run that a checkpoint belongs to; {} if its parts are damaged."""
    home = folder.parents[1] if folder.parent.name == "checkpoints" else folder
    run = read_json_or_empty(home / "run.json")
    parts = [run.get(part) or {} for part in PARTS]
    if isinstance(results := parts[-1], dict):
        parts += [results.get("last") or {}, results.get("best") or {}]
    return run if all(isinstance(part, dict) for part in parts) else {}


def parent_of(run: dict, home: Path) -> Path | None:
    """The folder that this run started from, also if `home` was copied; None if it has no records."""
    if not run.get("parent"):
        return None
    parent = Path(run["parent"])
    out = (run.get("settings") or {}).get("out") or home
    folders = [home / parent.relative_to(out)] if parent.is_relative_to(out) else []
    for folder in [*folders, home / parent.name, parent]:
        if (folder / "run.json").exists() or (folder / "results.json").exists():
            return folder
    return None


def label(folder: Path, home: Path) -> str:
    """The name of a model in tables: `base`; `base, step 500` for a checkpoint; `google/flan-t5-small`."""
    if folder.parent.name == "checkpoints":
        return f"{folder.parents[1].name}, {folder.name.replace('-', ' ')}"
    return folder.name.replace("--", "/") if folder.parent == home / "eval" else folder.name


def differing(settings: dict[str, dict]) -> dict[str, dict]:
    """{setting: {run: its value}} of the settings, beside the name, in which runs differ."""
    found = {}
    for key in dict.fromkeys(chain(*settings.values())):
        values = {run: some.get(key, "") for run, some in settings.items()}
        if key != "name" and len(set(map(json.dumps, values.values()))) > 1:
            found[key] = values
    return found


# -----------------------------------------------------------------------------
# Measurements


class Measurement:
    """An entry of results.json, or the final evaluation of finetune.py; `file` holds the answers."""

    def __init__(self, run: Run, entry: dict, file: Path):
        self.run = run
        self.entry = entry
        self.file = file
        self.where = self.task, self.split = (entry.get("task") or "", entry.get("split") or "")
        self.place = ", ".join(filter(None, self.where))
        self.stem = "-".join((run.folder.name, *self.where))  # how its figures and tables are named
        self.items, self.shots, of = (int(entry.get(key) or 0) for key in ("items", "shots", "of"))
        self.smoke = bool(entry.get("smoke")) or run.smoke
        self.shown = f"{run.shown}, {self.place}"
        self.way = way_of(run, entry)
        self.role = "prompted" if self.shots else "base"  # in a comparison
        if run.name != run.origin:
            self.role = "from scratch" if self.way == "from scratch" else "after training"
        notes = [SMOKE] * self.smoke + [f"a sample of {of:,}"] * (self.items < of)
        notes += ["calibrated"] * bool(entry.get("calibrated"))
        notes += [f"{entry['samples']} samples"] if entry.get("samples") else []
        self.notes = ", ".join(notes)
        self.numbers = {name: float(metric["value"]) for name, metric in entry["metrics"].items()}
        self.values = {name: value_of(name, metric) for name, metric in entry["metrics"].items()}
        self.sampled = entry.get("samples") and "exact_match" in self.values  # answers of its own
        # The metric used in comparisons.
        self.headline = next((name for name in HEADLINES if name in self.values), None)

    @cached_property
    def scores(self) -> dict[str, float]:
        """{text of the item: its score} by the headline metric; {} for a corpus, which has no answers."""
        key = "rougeL" if self.headline == "rougeL" else "correct"
        rows = read_jsonl(self.file)
        return {str(r["text"]): r[key] for r in rows if "text" in r and isinstance(r.get(key), int | float)}


def way_of(run: Run, entry: dict) -> str:
    """How a model came to its answers."""
    if entry.get("shots"):
        return f"prompted, {entry['shots']} examples"
    task = run.record.get("task")
    if run.stage == "finetune" and task == entry.get("task"):
        first = run.records[-1]
        rate = (first.get("settings") or {}).get("learning_rate")
        return "from scratch" if first.get("stage") == "train" and rate == 0 else "fine-tuned"
    ways = {"finetune": f"fine-tuned on {task}", "sft": "instruction-tuned", "dpo": "preference-tuned"}
    return ways.get(run.stage, "base")


def measurements_of(run: Run) -> list[Measurement]:
    """What finetune.py and eval.py measured of one run."""
    file, found = run.folder / "results.json", {}
    if own := run.record.get("evaluation"):
        items = next((metric["n"] for metric in own["metrics"].values() if "n" in metric), 0)
        entry = {"task": run.record.get("task"), "items": items} | own
        found[f"{run.folder}/run.json"] = (entry, run.folder / "predictions.jsonl")
    for key, entry in (read_json_or_empty(file).get("results") or {}).items():
        answers = run.folder / "answers" / f"{key.replace(' ', '-')}.jsonl"
        found[f"{file}, {key}"] = (entry, answers)
    return each(found, lambda name: [Measurement(run, *found[name])], run.damaged)


# -----------------------------------------------------------------------------
# Side by side


@dataclass
class Comparison:
    """A measurement of a model, and others by their role: its "base", the base "prompted" with the most
    examples, and the same training "from scratch".
    """

    m: Measurement
    others: dict[str, Measurement]

    @property
    def shown(self) -> str:
        return self.m.shown

    @cached_property
    def gaps(self) -> dict[str, dict]:
        """The paired differences, tuned minus other, over the items that both answered."""
        found = {}
        for role, other in self.others.items():
            both = [text for text in self.m.scores if text in other.scores]
            if both and self.m.role == "after training":
                found[role] = paired_bootstrap(*([m.scores[text] for text in both] for m in (self.m, other)))
        return found


def side_by_side(found: list[Measurement]) -> list[Comparison]:
    """A row for every model on every task and split, without examples in its prompt if that was measured."""
    # Of several measurements the one with the most examples, and on the most items, counts: the last.
    found = sorted((m for m in found if m.headline), key=lambda m: (m.where, m.shots, m.items))
    rows = {}  # (task, split), model: its measurement
    for m in found:
        if m.role != "from scratch" and m.shots == rows.setdefault((m.where, m.run.name), m).shots:
            rows[m.where, m.run.name] = m
    return [Comparison(m, others_of(m, found)) for m in rows.values()]


def others_of(m: Measurement, found: list[Measurement]) -> dict[str, Measurement]:
    """What a measurement is compared with, by role. "from scratch" has to have the same size; of several, the
    one with the same seed counts.
    """
    others = {}
    size = m.run.records[-1].get("parameters")
    for other in found:
        if other.where != m.where or other.role == "after training":
            continue
        if other.role != "from scratch":
            if other.run.origin == m.run.origin:
                others[other.role] = other
        elif other.run.records[-1].get("parameters") == size:
            same_seed = other.run.settings.get("seed") == m.run.settings.get("seed")
            if same_seed or other.role not in others:
                others[other.role] = other
    return others


# -----------------------------------------------------------------------------
# Everything that a folder holds


FILES = ("run.json", "results.json", "attention.json", "streams.json")  # what a model's folder may hold


class Records:
    """A folder of runs, read once; the sections of a page take it."""

    def __init__(self, home: Path):
        self.home = home
        self.damaged: list[str] = []  # a line for each record that could not be read
        folders = {file.parent for name in FILES for file in home.rglob(name)}
        every = self.each(folders, self.read_run)
        # Parents outside of `home`, such as a model of the hub.
        every += self.each({folder for run in every for folder in run.lineage} - folders, self.read_run)
        every.sort(key=lambda run: (str(run.record.get("started", "")), str(run.folder)))
        self.models = every  # runs, checkpoints and models of the hub, those of experiments too
        self.runs = [run for run in every if run.folder.parent == home and run.has("run.json")]
        self.measurements = self.each(every, measurements_of)
        self.comparisons = side_by_side(self.measurements)
        # Answers to instructions.
        self.battery = read_json_or_empty(home / "pipeline.json").get("battery") or {}
        self.labs = self.each(sorted(home.glob("experiments/*/experiments.json")), read_lab)
        self.ledger = self.each(lines_of(home / "ledger.tsv"), spent)  # by run_all.sh
        self.plan = self.each(lines_of(home / "plan.tsv"), spent)

    def each(self, items: Iterable, read: Callable[..., list]) -> list:
        return each(items, read, self.damaged)

    def read_run(self, folder: Path) -> list[Run]:
        return [Run(folder, self.home, self.damaged)]

    def run(self, model: str) -> Run:
        """The run of a path such as out/sft, also if the folder was copied."""
        return Run(self.home / Path(model).name, self.home)

    def with_file(self, name: str) -> list[Run]:
        """The models in `home` whose folder holds this file."""
        return [run for run in self.models if run.has(name) and self.home in run.folder.parents]


def read_lab(file: Path) -> list[dict]:
    """What lab/experiments.py found, with its "folder"; each experiment that was run gets its "name"."""
    found = read_json_or_empty(file)
    about = {"folder": file.parent, "quick": bool(found.get("quick"))}
    experiments = {}
    for name, e in (found.get("experiments") or {}).items():
        if "bits_per_byte" in e:
            experiments[name] = {"difference": {}} | e | about | {"name": name}
    return [found | about | {"experiments": experiments}]


def lines_of(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file.exists() else []


def spent(line: str) -> list[dict]:
    """A line of the ledger or of the plan. A torn one raises ValueError."""
    stage, seconds, command = line.split("\t")
    return [{"stage": stage, "seconds": float(seconds), "command": command}]
