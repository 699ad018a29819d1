"""Reads a folder of runs: run folders, their measurements, and comparisons on the same items.

eval.py writes results.json and answers/ into the folder of a run, an adapter or a checkpoint, and into
eval/MODEL for a model of the hub. finetune.py ends with an evaluation in run.json and predictions.jsonl.
Missing and half-written files are tolerated: a run may still be in progress.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from support.metrics import paired_bootstrap
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


# -----------------------------------------------------------------------------
# Runs


def run_folders(home: Path) -> list[Path]:
    """The run folders in `home`, by starting time. (Those of the lab are in out/experiments/.)"""
    found = [file.parent for file in home.glob("*/run.json")]
    return sorted(found, key=lambda folder: (str(read_json(folder / "run.json").get("started")), folder.name))


def run_of(folder: Path) -> dict:
    """run.json of a run folder, or of the run that a checkpoint belongs to; {} if its parts are damaged."""
    run = read_json((folder.parents[1] if folder.parent.name == "checkpoints" else folder) / "run.json")
    whole = all(isinstance(run.get(part) or {}, dict) for part in ("settings", "results", "data"))
    return run if whole else {}


def parent_of(run: dict, home: Path) -> Path | None:
    """The folder of the run that this one started from, also if `home` was copied; None if it is missing."""
    name = run.get("parent")
    if not name:
        return None
    settings = run.get("settings") or {}
    out = Path(settings.get("out") or home)
    parts = [home / Path(name).relative_to(out)] if Path(name).is_relative_to(out) else []
    for folder in [*parts, home / Path(name).name, Path(name)]:
        if (folder / "run.json").exists():
            return folder
    return None


def ancestors(folder: Path, home: Path) -> list[Path]:
    """The folders of this run's parent, the parent's parent, ..."""
    found = []
    parent = parent_of(run_of(folder), home)
    while parent is not None and parent not in found:
        found.append(parent)
        parent = parent_of(run_of(parent), home)
    return found


def is_smoke(folder: Path, home: Path) -> bool:
    """Whether a run or one of its ancestors was shortened. For runs of the lab: whether it was --quick."""
    if folder.parent.parent == home / "experiments":
        return folder.parent.name.endswith("-quick")
    return any(run_of(f).get("smoke") for f in (folder, *ancestors(folder, home)))


def label(folder: Path, home: Path) -> str:
    """The name of a model in tables: `base`; `base, step 500` for a checkpoint; `google/flan-t5-small`."""
    if folder.parent.name == "checkpoints":
        return f"{folder.parents[1].name}, {folder.name.replace('-', ' ')}"
    return folder.name.replace("--", "/") if folder.parent == home / "eval" else folder.name


def shown_name(folder: Path, home: Path) -> str:
    """The label, with SMOKE if it was a smoke run."""
    return label(folder, home) + f" ({SMOKE})" * is_smoke(folder, home)


# -----------------------------------------------------------------------------
# Measurements


@dataclass
class Measurement:
    """An entry of results.json, or the final evaluation of finetune.py."""

    model: str  # label
    origin: str  # label of its first ancestor; for a base model its own label
    way: str  # base, prompted, fine-tuned, from scratch, ...
    smoke: bool
    seed: int | None  # of the training
    entry: dict
    file: Path  # holds the answers

    @property
    def where(self) -> tuple:
        return self.entry.get("task"), self.entry.get("split")

    @property
    def headline(self) -> str | None:
        """The metric used in comparisons."""
        return next((name for name in HEADLINES if name in self.entry["metrics"]), None)

    @cached_property
    def scores(self) -> dict[str, float]:
        """{text of the item: its score} by the headline metric; {} for a corpus, which has no answers."""
        key = "rougeL" if self.headline == "rougeL" else "correct"
        return {r["text"]: float(r[key]) for r in read_jsonl(self.file) if "text" in r and key in r}

    @property
    def notes(self) -> str:
        entry = self.entry
        found = [SMOKE] if self.smoke else []
        if entry.get("items", 0) < entry.get("of", 0):
            found.append(f"a sample of {entry['of']:,}")
        if entry.get("calibrated"):
            found.append("calibrated")
        if entry.get("samples"):
            found.append(f"{entry['samples']} samples")
        return ", ".join(found)


def measurements(home: Path) -> list[Measurement]:
    """All measurements in `home`, by the starting time of the runs."""
    folders = {file.parent for name in ("results.json", "run.json") for file in home.rglob(name)}
    for folder in list(folders):
        run = run_of(folder)
        # A parent may be outside `home`, such as a folder with a hub model.
        parent = parent_of(run, home) or Path(run.get("parent") or "")
        if (parent / "results.json").exists():
            folders.add(parent)
    found, seen = [], set()
    for folder in sorted(folders, key=lambda f: (str(run_of(f).get("started", "")), str(f))):
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        entries = read_json(folder / "results.json").get("results")
        for key, entry in (entries if isinstance(entries, dict) else {}).items():
            if has_metrics(entry):
                file = folder / "answers" / f"{key.replace(' ', '-')}.jsonl"
                found.append(measurement(folder, home, entry, file))
        run = read_json(folder / "run.json")
        own = run.get("evaluation")
        if has_metrics(own):
            items = next((metric["n"] for metric in own["metrics"].values() if "n" in metric), 0)
            entry = {"task": run.get("task"), "shots": 0, "items": items} | own
            found.append(measurement(folder, home, entry, folder / "predictions.jsonl"))
    return found


def has_metrics(entry) -> bool:
    """Whether an entry is one: {"metrics": {name: {"value": ...}}, ...}."""
    metrics = entry.get("metrics") if isinstance(entry, dict) else None
    return isinstance(metrics, dict) and all(isinstance(m, dict) and "value" in m for m in metrics.values())


def measurement(folder: Path, home: Path, entry: dict, file: Path) -> Measurement:
    line = [folder, *ancestors(folder, home)]
    runs = [run_of(f) for f in line]
    origin = label(line[-1], home)
    if parent := runs[-1].get("parent"):  # a model of the hub, by its id or in a folder
        origin = Path(parent).name if (Path(parent) / "results.json").exists() else parent
    smoke = bool(entry.get("smoke")) or is_smoke(folder, home)
    seed = (runs[0].get("settings") or {}).get("seed")
    return Measurement(label(folder, home), origin, way_of(runs, entry), smoke, seed, entry, file)


def way_of(runs: list[dict], entry: dict) -> str:
    """How a model came to its answers; `runs` are its record and those of what it came from."""
    run, first = runs[0], runs[-1].get("settings") or {}
    task = run.get("task") or (run.get("settings") or {}).get("task")
    if entry.get("shots"):
        return f"prompted, {entry['shots']} examples"
    if run.get("stage") == "finetune" and task == entry.get("task"):
        untrained = runs[-1].get("stage") == "train" and first.get("learning_rate") == 0
        return "from scratch" if untrained else "fine-tuned"
    stages = {"finetune": f"fine-tuned on {task}", "sft": "instruction-tuned", "dpo": "preference-tuned"}
    return stages.get(run.get("stage"), "base")


def value_of(name: str, metric: dict) -> str:
    """A metric with its interval; shares are in percent."""
    scale, digits = (1, DIGITS[name]) if name in DIGITS else (100, 1)
    text = f"{scale * metric['value']:.{digits}f}"
    if metric.get("low") is not None:
        text += f" [{scale * metric['low']:.{digits}f}, {scale * metric['high']:.{digits}f}]"
    return text


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
        return paired(self.tuned, other) if self.tuned and other else None


def paired(a: Measurement, b: Measurement) -> dict | None:
    both = [text for text in a.scores if text in b.scores]
    if not both or a.where != b.where:
        return None
    return paired_bootstrap([a.scores[text] for text in both], [b.scores[text] for text in both])


def side_by_side(found: list[Measurement]) -> list[Comparison]:
    """For each task and split, a row for every tuned model; a base without tuned models gets its own row.

    If a model was measured several times on a task, the measurement with the most items is used.
    """
    rows = []
    for where in dict.fromkeys(m.where for m in found if m.headline):
        some = [m for m in found if m.where == where and m.headline]
        some.sort(key=lambda m: -m.entry.get("items", 0))
        scratch = [m for m in some if m.way == "from scratch"]
        origins = dict.fromkeys(m.origin for m in found if m in some and m not in scratch)
        for origin in origins:
            mine = [m for m in some if m.origin == origin]
            base = next((m for m in mine if m.model == origin and m.way == "base"), None)
            shots = [m for m in mine if m.model == origin and m.entry.get("shots")]
            prompted = max(shots, key=lambda m: m.entry["shots"], default=None)
            tuned: dict[str, Measurement] = {}
            for m in mine:
                if m.model != origin and not m.entry.get("shots"):
                    tuned.setdefault(m.model, m)
            for m in sorted(tuned.values(), key=found.index) or [None]:
                seed = m.seed if m else None
                twin = next((x for x in scratch if x.seed == seed), scratch[0] if scratch else None)
                rows.append(Comparison(m, base, prompted, twin))
    return rows
