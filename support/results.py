"""What a folder of runs holds: run folders, and every measurement in them, compared on the same items.

eval.py writes results.json and answers/ into the folder of a run, an adapter or a checkpoint, and into
eval/MODEL for a model of the hub. finetune.py ends with an evaluation in run.json and predictions.jsonl.
Reading tolerates what a run that is still going may show: missing and half-written files.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data import paired_bootstrap
from support.tables import read_jsonl

SMOKE = "SMOKE RUN, no result"  # stands beside the name of a run that was cut short
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
HEADLINES = ("accuracy", "exact_match", "rougeL", "bits_per_byte")  # of each task the one that is compared
DIGITS = {"perplexity": 2, "word_perplexity": 2, "bits_per_byte": 3, "loss": 4, "words": 1}  # no shares


def read_json(file: Path) -> dict:
    """What a file holds; {} if it is missing or half-written."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# -----------------------------------------------------------------------------
# Runs


def run_folders(home: Path) -> list[Path]:
    """Folders that hold a run, in the order in which they were started; the lab's lie deeper."""
    found = [file.parent for file in home.glob("*/run.json")]
    return sorted(found, key=lambda folder: (str(read_json(folder / "run.json").get("started")), folder.name))


def run_of(folder: Path) -> dict:
    """run.json of a run folder, or of the run that a checkpoint belongs to."""
    return read_json((folder.parents[1] if folder.parent.name == "checkpoints" else folder) / "run.json")


def parent_of(run: dict, home: Path) -> Path | None:
    """The folder of the run that this one started from, also in a copy of `home`; None if it is not there."""
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
    """The folders of the runs that this one came from: its parent, the parent's parent, ..."""
    found = []
    parent = parent_of(run_of(folder), home)
    while parent is not None and parent not in found:
        found.append(parent)
        parent = parent_of(run_of(parent), home)
    return found


def is_smoke(folder: Path, home: Path) -> bool:
    """Whether a run, or one that it came from, was cut short. A run of the lab: whether the lab was quick."""
    if folder.parent.parent == home / "experiments":
        return folder.parent.name.endswith("-quick")
    return any(run_of(f).get("smoke") for f in (folder, *ancestors(folder, home)))


def label(folder: Path, home: Path) -> str:
    """The name of a model in tables: `base`, `base, step 500` of a checkpoint, `google/flan-t5-small`."""
    if folder.parent.name == "checkpoints":
        return f"{folder.parents[1].name}, {folder.name.replace('-', ' ')}"
    return folder.name.replace("--", "/") if folder.parent == home / "eval" else folder.name


def shown_name(folder: Path, home: Path) -> str:
    """The same, with the mark of a smoke run."""
    return label(folder, home) + f" ({SMOKE})" * is_smoke(folder, home)


# -----------------------------------------------------------------------------
# Measurements


@dataclass
class Measurement:
    """An entry of results.json, or the evaluation of a fine-tuning."""

    model: str  # label
    origin: str  # label of the first model that it came from; of a base its own
    way: str  # base, prompted, fine-tuned, from scratch, ...
    smoke: bool
    seed: int | None  # of its training
    entry: dict
    file: Path  # of the answers

    @property
    def where(self) -> tuple:
        return self.entry.get("task"), self.entry.get("split")

    @property
    def headline(self) -> str | None:
        """The metric that is compared."""
        return next((name for name in HEADLINES if name in self.entry["metrics"]), None)

    @cached_property
    def scores(self) -> dict[str, float]:
        """{text of the item: its score} by the headline metric; {} of a corpus, which has no answers."""
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
    """Everything that was measured, in the order of the runs."""
    folders = {file.parent for name in ("results.json", "run.json") for file in home.rglob(name)}
    parents = {Path(run_of(folder).get("parent") or "") for folder in folders}
    folders |= {
        folder for folder in parents if (folder / "results.json").exists()
    }  # a hub model's own folder
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
    """A metric with its interval: shares in percent, others as they are."""
    scale, digits = (1, DIGITS[name]) if name in DIGITS else (100, 1)
    text = f"{scale * metric['value']:.{digits}f}"
    if metric.get("low") is not None:
        text += f" [{scale * metric['low']:.{digits}f}, {scale * metric['high']:.{digits}f}]"
    return text


# -----------------------------------------------------------------------------
# Side by side


@dataclass
class Comparison:
    """A model that was trained further, beside the one that it came from, on one task."""

    tuned: Measurement | None
    base: Measurement | None
    prompted: Measurement | None  # the base with the most examples in its prompt
    scratch: Measurement | None  # the same training on a model that had learnt nothing

    def minus(self, other: Measurement | None) -> dict | None:
        """The paired difference of the tuned model to another, over the items that both answered."""
        return paired(self.tuned, other) if self.tuned and other else None


def paired(a: Measurement, b: Measurement) -> dict | None:
    both = [text for text in a.scores if text in b.scores]
    if not both or a.where != b.where:
        return None
    return paired_bootstrap([a.scores[text] for text in both], [b.scores[text] for text in both])


def side_by_side(found: list[Measurement]) -> list[Comparison]:
    """For each task and split, every tuned model beside its base; bases that nothing came from stand alone.

    Of several measurements of a model on one task the one with the most items counts.
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
