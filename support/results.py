"""Reads a folder of runs into records: the runs, their measurements, and comparisons on the same items.

eval.py writes results.json and answers/ into the folder of a run, an adapter or a checkpoint, and into
eval/MODEL for a model of the hub. finetune.py ends with an evaluation in run.json and predictions.jsonl.
Missing and half-written files are tolerated: a run may still be in progress.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from support.metrics import paired_bootstrap
from support.pages import interval
from support.tables import read_jsonl

SMOKE = "SMOKE RUN, no result"  # mark of a run that was shortened
METRICS = {  # name in results.json: name in a table
    "accuracy": "accuracy",
    "exact_match": "exact match",
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
HEADLINES = ("accuracy", "exact_match", "rougeL", "bits_per_byte")
DIGITS = {"perplexity": 2, "word_perplexity": 2, "bits_per_byte": 3, "loss": 4, "words": 1}  # no shares


def read_json(file: Path) -> dict:
    """The dict in a JSON file; {} if the file is missing or half-written."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def value_of(name: str, metric: dict) -> str:
    """A metric with its interval; shares are in percent."""
    return interval(metric, 1, DIGITS[name]) if name in DIGITS else interval(metric, 100)


# -----------------------------------------------------------------------------
# Runs


class Run:
    """The folder of a run, of one of its checkpoints, or of a hub model that was measured.

    lineage: the folder, then its ancestors: parent, grandparent, ...; records: run.json of each, or {}.
    """

    def __init__(self, folder: Path, home: Path):
        self.folder, self.home = folder, home  # home: the folder that holds the runs
        self.lineage: list[Path] = []
        self.records: list[dict] = []
        ancestor: Path | None = folder
        while ancestor is not None and ancestor not in self.lineage:
            self.lineage.append(ancestor)
            self.records.append(run_of(ancestor))
            ancestor = parent_of(self.records[-1], home)
        self.record = self.records[0]
        self.stage = self.record.get("stage") or ""
        self.settings = self.record.get("settings") or {}
        self.data = self.record.get("data") or {}
        self.validation = self.data.get("validation") or {}  # the validation data
        results = self.record.get("results") or {}
        self.last, self.best = (results.get(key) or {} for key in ("last", "best"))  # evaluations on it
        self.smoke = any(record.get("smoke") for record in self.records)
        if folder.parent.parent == home / "experiments":  # the lab caps its examples on purpose
            self.smoke = folder.parent.name.endswith("-quick")
        self.name = label(folder, home)
        self.shown = self.name + f" ({SMOKE})" * self.smoke
        # Its first ancestor; that may be a model of the hub, by its id or in a folder.
        self.origin = self.records[-1].get("parent") or label(self.lineage[-1], home)
        if (Path(self.origin) / "results.json").exists():
            self.origin = Path(self.origin).name

    def metrics(self) -> list[dict]:
        """metrics.jsonl. Evaluations get the tokens and seconds of the training step before them."""
        clock, lines = {}, read_jsonl(self.folder / "metrics.jsonl")
        for i, line in enumerate(lines):
            clock |= {key: line[key] for key in ("tokens", "seconds") if key in line}
            lines[i] = clock | line
        return lines

    def results(self) -> dict[str, dict]:
        """The entries of results.json that are measurements."""
        entries = read_json(self.folder / "results.json").get("results")
        entries = entries if isinstance(entries, dict) else {}
        return {key: entry for key, entry in entries.items() if has_metrics(entry)}

    def answers_file(self, key: str) -> Path:
        """The answers behind an entry of results.json."""
        return self.folder / "answers" / f"{key.replace(' ', '-')}.jsonl"


def run_of(folder: Path) -> dict:
    """run.json of a run folder, or of the run that a checkpoint belongs to; {} if its parts are damaged."""
    run = read_json((folder.parents[1] if folder.parent.name == "checkpoints" else folder) / "run.json")
    parts = [run.get(part) or {} for part in ("settings", "results", "data")]
    return run if all(isinstance(part, dict) for part in parts) else {}


def parent_of(run: dict, home: Path) -> Path | None:
    """The folder of the run that this one started from, also if `home` was copied; None if it is missing."""
    if not run.get("parent"):
        return None
    parent, out = Path(run["parent"]), Path((run.get("settings") or {}).get("out") or home)
    inside = [home / parent.relative_to(out)] if parent.is_relative_to(out) else []
    folders = [*inside, home / parent.name, parent]
    return next((folder for folder in folders if (folder / "run.json").exists()), None)


def label(folder: Path, home: Path) -> str:
    """The name of a model in tables: `base`; `base, step 500` for a checkpoint; `google/flan-t5-small`."""
    if folder.parent.name == "checkpoints":
        return f"{folder.parents[1].name}, {folder.name.replace('-', ' ')}"
    return folder.name.replace("--", "/") if folder.parent == home / "eval" else folder.name


def is_smoke(folder: Path, home: Path) -> bool:
    return Run(folder, home).smoke


def differing(settings: dict[str, dict]) -> dict[str, dict]:
    """{setting: {run: its value}} of the settings, beside the name, in which runs differ."""
    found = {}
    for key in dict.fromkeys(key for some in settings.values() for key in some):
        values = {run: some.get(key, "") for run, some in settings.items()}
        if key != "name" and len(set(map(json.dumps, values.values()))) > 1:
            found[key] = values
    return found


def has_metrics(entry: object) -> bool:
    """True for {"metrics": {name: {"value": ...}}, ...}."""
    metrics = entry.get("metrics") if isinstance(entry, dict) else None
    return isinstance(metrics, dict) and all(isinstance(m, dict) and "value" in m for m in metrics.values())


# -----------------------------------------------------------------------------
# Measurements


class Measurement:
    """An entry of results.json, or the final evaluation of finetune.py; `file` holds the answers."""

    def __init__(self, run: Run, entry: dict, file: Path):
        self.run, self.entry, self.file = run, entry, file
        self.model, self.origin = run.name, run.origin
        self.smoke = bool(entry.get("smoke")) or run.smoke
        self.where = (entry.get("task") or "", entry.get("split") or "")
        self.items = entry.get("items", 0)
        # The metric used in comparisons.
        self.headline = next((name for name in HEADLINES if name in entry["metrics"]), None)
        self.way = way_of(run, entry)
        notes = {
            SMOKE: self.smoke,
            f"a sample of {entry.get('of', 0):,}": self.items < entry.get("of", 0),
            "calibrated": entry.get("calibrated"),
            f"{entry.get('samples')} samples": entry.get("samples"),
        }
        self.notes = ", ".join(note for note, holds in notes.items() if holds)

    @cached_property
    def scores(self) -> dict[str, float]:
        """{text of the item: its score} by the headline metric; {} for a corpus, which has no answers."""
        key = "rougeL" if self.headline == "rougeL" else "correct"
        return {r["text"]: float(r[key]) for r in read_jsonl(self.file) if "text" in r and key in r}


def way_of(run: Run, entry: dict) -> str:
    """How a model came to its answers."""
    if entry.get("shots"):
        return f"prompted, {entry['shots']} examples"
    task = run.record.get("task") or run.settings.get("task")
    if run.stage == "finetune" and task == entry.get("task"):
        first = run.records[-1]
        rate = (first.get("settings") or {}).get("learning_rate")
        return "from scratch" if first.get("stage") == "train" and rate == 0 else "fine-tuned"
    ways = {"finetune": f"fine-tuned on {task}", "sft": "instruction-tuned", "dpo": "preference-tuned"}
    return ways.get(run.stage, "base")


def measurements(home: Path) -> list[Measurement]:
    """All measurements in `home`, by the starting time of the runs."""
    found = []
    for run in measured_runs(home):
        found += [Measurement(run, entry, run.answers_file(key)) for key, entry in run.results().items()]
        own = run.record.get("evaluation")
        if has_metrics(own):
            items = next((metric["n"] for metric in own["metrics"].values() if "n" in metric), 0)
            entry = {"task": run.record.get("task"), "shots": 0, "items": items} | own
            found.append(Measurement(run, entry, run.folder / "predictions.jsonl"))
    return found


def measured_runs(home: Path) -> list[Run]:
    """Every folder in `home` with a run or results, and parents outside of it, such as a hub model."""
    folders = {file.parent for name in ("results.json", "run.json") for file in home.rglob(name)}
    runs = {folder.resolve(): Run(folder, home) for folder in folders}
    for run in list(runs.values()):
        parent = run.lineage[1] if len(run.lineage) > 1 else Path(run.record.get("parent") or "")
        if (parent / "results.json").exists():
            runs.setdefault(parent.resolve(), Run(parent, home))
    return sorted(runs.values(), key=lambda run: (str(run.record.get("started", "")), str(run.folder)))


# -----------------------------------------------------------------------------
# Side by side


@dataclass
class Comparison:
    """A tuned model and the model that it was tuned from, on one task."""

    tuned: Measurement | None
    base: Measurement | None
    prompted: Measurement | None  # the base with few-shot examples (the largest number measured)
    scratch: Measurement | None  # the same training from random weights

    def minus(self, other: Measurement | None) -> dict | None:
        """The paired difference, tuned minus other, over the items that both answered."""
        if not (self.tuned and other):
            return None
        both = [text for text in self.tuned.scores if text in other.scores]
        pairs = [[m.scores[text] for text in both] for m in (self.tuned, other)]
        return paired_bootstrap(*pairs) if both else None


def most_items(some: Iterable[Measurement]) -> Measurement | None:
    """Of several measurements of a model on a task, the one on the most items."""
    return max(some, key=lambda m: m.items, default=None)


def side_by_side(found: list[Measurement]) -> list[Comparison]:
    """For each task and split, a row for every tuned model; a base without tuned models gets its own row."""
    rows = []
    for where in dict.fromkeys(m.where for m in found if m.headline):
        some = [m for m in found if m.where == where and m.headline]
        scratch = [m for m in some if m.way == "from scratch"]
        for origin in dict.fromkeys(m.origin for m in some if m not in scratch):
            rows += from_one_origin([m for m in some if m.origin == origin], scratch)
    return rows


def from_one_origin(some: list[Measurement], scratch: list[Measurement]) -> list[Comparison]:
    """The rows of one base model on one task; a twin from scratch has the same seed, if there is one."""
    own = [m for m in some if m.model == m.origin]
    shots = [m for m in own if m.entry.get("shots")]
    base = most_items(m for m in own if m not in shots)
    prompted = max(shots, key=lambda m: (m.entry["shots"], m.items), default=None)
    tuned: dict[str, Measurement] = {}
    for m in some:
        if m not in own and not m.entry.get("shots"):
            tuned[m.model] = most_items([tuned.get(m.model, m), m])
    rows = []
    for m in tuned.values():
        twins = [x for x in scratch if x.run.settings.get("seed") == m.run.settings.get("seed")]
        rows.append(Comparison(m, base, prompted, next(iter(twins or scratch), None)))
    return rows or [Comparison(None, base, prompted, next(iter(scratch), None))]


# -----------------------------------------------------------------------------
# Everything that a folder holds


class Records:
    """A folder of runs, read once; the sections of a page take it."""

    def __init__(self, home: Path):
        self.home = home
        runs = [Run(file.parent, home) for file in home.glob("*/run.json")]
        self.runs = sorted(runs, key=lambda run: (str(run.record.get("started")), run.folder.name))
        self.measurements = measurements(home)
        self.comparisons = side_by_side(self.measurements)
        self.pipeline = read_json(home / "pipeline.json")  # the life of one model, by eval.py
        files = sorted(home.glob("experiments/*/experiments.json"))
        self.labs = {file.parent: read_json(file) for file in files}  # {folder: what experiments.py found}
        self.ledger = read_columns(home / "ledger.tsv")  # stage, seconds, command
        self.plan = read_columns(home / "plan.tsv")  # stage, seconds, GiB

    def run(self, model: str) -> Run:
        """The run of a path such as out/sft, also if the folder was copied."""
        return Run(self.home / Path(model).name, self.home)

    def folders_with(self, file: str) -> list[Run]:
        """Runs, checkpoints and models of the hub whose folder holds this file."""
        patterns = (f"*/{file}", f"*/checkpoints/*/{file}", f"eval/*/{file}")
        folders = {found.parent for pattern in patterns for found in self.home.glob(pattern)}
        return [Run(folder, self.home) for folder in sorted(folders)]


def read_columns(file: Path) -> list[list[str]]:
    """The complete lines of run_all.sh's ledger or of the plan, three columns each; [] without the file."""
    try:
        lines = [line.split("\t") for line in file.read_text(errors="replace").splitlines()]
    except OSError:
        return []
    return [line for line in lines if len(line) == 3]
