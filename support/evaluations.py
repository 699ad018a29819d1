"""What eval.py measured: written into run folders, described for the terminal, compared between models."""

from dataclasses import dataclass
from pathlib import Path

import torch

from support.files import write_json, write_jsonl
from support.machine import git_commit, hardware, versions
from support.metrics import paired_bootstrap
from support.model_card import write_model_card
from support.pages import points
from support.results import METRICS, read_json, value_of
from tasks.mistakes import KINDS


@dataclass
class Result:
    """An entry of results.json, and a record of the answer to each item."""

    entry: dict
    records: list[dict]

    @property
    def name(self) -> str:
        """Its key in results.json: "sst2 test 4-shot", "gsm8k test 16 samples"."""
        entry = self.entry
        way = f"{entry['samples']} samples" if "samples" in entry else f"{entry['shots']}-shot"
        return f"{entry['task']} {entry['split']} {way}" + " calibrated" * entry.get("calibrated", False)


def results_folder(name: str, out: str) -> Path:
    folder = Path(name) if Path(name).is_dir() else Path(out) / "eval" / name.replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_results(folder: Path, results: list[Result], dtype: str, device: torch.device) -> None:
    """Adds to the folder's results.json; what was measured before stays, unless it was measured again."""
    run = read_json(folder / "run.json")
    about = {"git": git_commit(), "versions": versions(), "hardware": hardware(device), "dtype": dtype}
    about |= {"smoke": run.get("smoke", False), "model_step": run.get("step")}
    entries = read_json(folder / "results.json").get("results", {})
    entries |= {result.name: result.entry | about for result in results}
    write_json(folder / "results.json", {"results": entries})
    answers = folder / "answers"
    for result in results:
        if result.records:
            answers.mkdir(exist_ok=True)
            file = result.name.replace(" ", "-")
            wrong = [record for record in result.records if not record.get("correct", True)]
            write_jsonl(answers / f"{file}.jsonl", result.records)
            write_jsonl(answers / f"{file}-wrong.jsonl", wrong)
    write_model_card(folder)


# -----------------------------------------------------------------------------
# For the terminal

NOTES = (  # what an entry has to have, and what is printed of it
    ("stride", "documents alone: {documents_alone:,}, in windows: {documents_in_windows:,}"),
    ("left_out", "{left_out:,} rows without text left out"),
    ("limited", "a sample of {of:,}, seed {seed}"),
    ("majority_class", "always the most frequent class: {majority_class:.1%}"),
    ("cut", "{cut} texts were too long and lost their end"),
    ("shots_dropped", "{shots_dropped} prompts had room for fewer examples"),
    ("contamination", "{contamination[items]} of {contamination[checked]} items share {contamination[words]} "
     "words in a row with the training text ({contamination[share]:.1%} of such runs)"),
)  # fmt: skip


def describe(entry: dict) -> str:
    """A line of metrics, one of what has to be known about them, and for samples a table."""
    metrics = entry["metrics"]
    figures = [
        f"{label} {value_of(name, metrics[name])}" for name, label in METRICS.items() if name in metrics
    ]
    facts = entry | {"left_out": entry["data"].get("left_out"), "limited": entry["items"] < entry["of"]}
    notes = [text.format_map(facts) for name, text in NOTES if facts.get(name)]
    notes = [f"{entry['items']:,} items", *notes, f"{entry['seconds']:.1f} s"]
    lines = [", ".join(figures), "; ".join(notes), *(samples_table(entry) if "samples" in entry else ())]
    return "\n      ".join(lines)


def samples_table(entry: dict) -> list[str]:
    """Ways to choose by budget, then differences, sampling until sure, and mistakes."""
    rows = {"answers a problem": entry["curves"]["pass"].keys()}
    for way, curve in entry["curves"].items():
        label = {"pass": "pass (oracle)", "calculator vote": "calculator vote (a tool)"}.get(way, way)
        rows[label] = [f"{100 * point['value']:.1f}" for point in curve.values()]
    lines = [f"{label:32}" + "".join(f"{cell:>7}" for cell in cells) for label, cells in rows.items()]
    lines += [f"{name:48} {points(difference)}" for name, difference in entry["differences"].items()]
    for label, stops in entry["gating"].items():
        cells = [f"{100 * point['right']['value']:.1f} at {point['samples']:.1f}" for point in stops]
        lines.append(f"{label}, sampling until sure: {', '.join(cells)} samples")
    kinds = [f"{KINDS[kind]} {count}" for kind, count in entry["errors"].items()]
    return [*lines, f"wrong greedy answers: {', '.join(kinds) or 'none'}"]


def compare(results: dict[str, list[Result]]) -> list[str]:
    """Paired differences of every model to the first and to the one before it, on what both answered."""
    names, lines = list(results), []
    for i, name in enumerate(names):
        for other in dict.fromkeys(names[: min(i, 1)] + names[max(0, i - 1) : i]):
            for result in results[name]:
                lines += paired(name, result, other, results[other])
    return lines


def paired(name: str, result: Result, other: str, before: list[Result]) -> list[str]:
    """A line, if the other model answered the same items, with the same number of shots or another."""

    def items(result: Result) -> tuple:
        return result.entry["task"], result.entry["split"], len(result.records)

    twins = [twin for twin in before if twin.records and items(twin) == items(result)]
    if not twins:
        return []
    twin = max(twins, key=lambda twin: twin.name == result.name)
    measure = "correct" if "correct" in result.records[0] else "rougeL"
    a, b = ([float(record[measure]) for record in side.records] for side in (result, twin))
    d = paired_bootstrap(a, b)
    verdict = "" if d["low"] > 0 or d["high"] < 0 else " (no difference found)"
    return [f"{result.name}: {name} minus {other} ({twin.entry['shots']}-shot) {points(d)}{verdict}"]
