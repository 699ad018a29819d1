"""What eval.py measured: written into run folders, described for the terminal, compared between models."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from support.files import write_json, write_jsonl
from support.machine import git_commit, hardware, versions
from support.metrics import paired_bootstrap
from support.model_card import write_model_card
from support.pages import lines_of, points
from support.results import METRICS, read_json_or_empty, value_of
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

    @property
    def items(self) -> tuple:
        """What was asked: the answers of two models to the same items can be compared one by one."""
        return self.entry["task"], self.entry["split"], len(self.records)


def results_folder(name: str, out: str) -> Path:
    """The model's own; {out}/eval/NAME for a model of the hub, or in a read-only folder."""
    folder = Path(name)
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        folder = Path(out) / "eval" / name.strip("/").replace("/", "--")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_result(folder: Path, result: Result, dtype: str, device: torch.device) -> None:
    """Adds to the folder's results.json; what was measured before stays, unless it was measured again."""
    about = {"git": git_commit(), "versions": versions(), "hardware": hardware(device), "dtype": dtype}
    before = read_json_or_empty(folder / "results.json").get("results")
    entries = before if isinstance(before, dict) else {}
    entries[result.name] = result.entry | about
    if result.records:
        file = folder / "answers" / result.name.replace(" ", "-")
        file.parent.mkdir(exist_ok=True)
        wrong = [record for record in result.records if not record.get("correct", True)]
        write_jsonl(Path(f"{file}.jsonl"), result.records)
        write_jsonl(Path(f"{file}-wrong.jsonl"), wrong)
    write_json(folder / "results.json", {"results": entries})
    write_model_card(folder)


# -----------------------------------------------------------------------------
# For the terminal

NOTES = """
{items:,} items
documents alone: {documents_alone:,}, in windows: {documents_in_windows:,}
{left_out:,} rows without text left out
a sample of {limited:,}, seed {seed}
always the most frequent class: {majority_class:.1%}
{cut} texts were too long and lost their end
{shots_dropped} prompts had room for fewer examples
{contamination[items]} of {contamination[checked]} items share {contamination[words]} words in a row with \
the training text ({contamination[share]:.1%} of such runs)
{seconds:.1f} s
"""
LABELS = {"pass": "pass (oracle)", "calculator vote": "calculator vote (a tool)"}


def describe(entry: dict) -> str:
    """A line of metrics, one of what has to be known about them, and for samples a table."""
    metrics = entry["metrics"]
    figures = [f"{METRICS[name]} {value_of(name, metrics[name])}" for name in METRICS if name in metrics]
    facts = entry | {
        "left_out": entry["data"].get("left_out"),
        "limited": entry["of"] if entry["items"] < entry["of"] else None,
    }
    for key in ("left_out", "cut", "shots_dropped"):
        facts[key] = facts.get(key) or None  # none of it: not worth a note
    lines = [", ".join(figures), "; ".join(lines_of(NOTES, **facts))]
    return "\n      ".join(lines + (samples_table(entry) if "samples" in entry else []))


def samples_table(entry: dict) -> list[str]:
    """Ways to choose by budget, then differences and mistakes."""
    rows = {"answers a problem": list(entry["curves"]["pass"])}
    for way, curve in entry["curves"].items():
        rows[LABELS.get(way, way)] = [f"{100 * point['value']:.1f}" for point in curve.values()]
    lines = [f"{label:32}" + "".join(f"{cell:>7}" for cell in cells) for label, cells in rows.items()]
    lines += [f"{name:48} {points(difference)}" for name, difference in entry["differences"].items()]
    if "errors" in entry:
        kinds = [f"{KINDS[kind]} {count}" for kind, count in entry["errors"].items()]
        lines.append(f"wrong greedy answers: {', '.join(kinds) or 'none'}")
    return lines


def compare(results: dict[str, list[Result]]) -> list[str]:
    """Paired differences of every model to the first and to the one before it, on what both answered."""
    names = list(results)
    lines = []
    for i, name in enumerate(names[1:], 1):
        for other in dict.fromkeys((names[0], names[i - 1])):
            for result in results[name]:
                lines += paired(name, result, other, results[other])
    return lines


def paired(name: str, result: Result, other: str, before: list[Result]) -> list[str]:
    """A line, if the other model answered the same items, with the same number of shots or another."""
    twins = [old for old in before if old.items == result.items]
    measures = [key for key in ("correct", "rougeL") if result.records and key in result.records[0]]
    if not (twins and measures):  # a text, or answers of others, which are the same for all models
        return []
    twin = max(twins, key=lambda old: old.name == result.name)
    measure = measures[0]
    d = paired_bootstrap(*([float(r[measure]) for r in side.records] for side in (result, twin)))
    verdict = "" if d["low"] * d["high"] > 0 else " (no difference found)"
    return [f"{result.name}: {name} minus {other} ({twin.entry['shots']}-shot) {points(d)}{verdict}"]
