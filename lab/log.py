"""The experiment log: an entry per run and per experiment of the lab, findings and recommendations.

Every sentence is computed from run.json, metrics.jsonl, results.json and experiments.json. A finding is a
difference whose 95 % interval excludes 0; smoke runs and quick runs of the lab produce none.
"""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from support.charts import BLUE, GREY, Panel, chart, line
from support.observations import observations
from support.pages import Block, Figure, Sections, Text, blocks_of, fill, points, row, table
from support.results import SMOKE, Comparison, Records, Run, load_run, read_json, value_of
from support.tables import read_jsonl

FASTER = 1.05  # a change counts as faster from this ratio of its tokens/s to the baseline's

# -----------------------------------------------------------------------------
# Findings and recommendations


def findings(records: Records) -> list[Block]:
    """Findings and recommendations in sentences, computed from the tables."""
    found = task_findings(records) + sampling_findings(records)
    families = [row for of_lab in records.labs.values() for row in lab_findings(of_lab)]
    if not found and not families:
        words = "No findings yet: a finding is a difference of full runs whose 95 % interval excludes 0."
        return [Text(words)]
    blocks: list[Block] = [Text("**Key findings**, differences whose 95 % interval excludes 0:")]
    blocks += [Text(sentence) for sentence in found]
    if families:
        words = "The lab, over its seeds: bits/byte minus the baseline's, and speed as a share of the "
        blocks.append(Text(words + "baseline's."))
        blocks.append(table("findings", families, "Families of ablations: findings."))
    if advice := task_advice(records.comparisons):
        blocks += [Text("**Recommendations**"), *(Text(sentence) for sentence in advice)]
    links = "[a page](experiments.html), [Markdown](experiments.md)"
    return [*blocks, Text(f"The log of all runs and experiments: {links}.")]


def clear(gap: dict | None) -> bool:
    """True if the interval excludes 0."""
    return bool(gap) and (gap["low"] > 0 or gap["high"] < 0)


def task_findings(records: Records) -> list[str]:
    """Clear differences between a tuned model and what it was tuned from."""
    sentences = []
    for c in records.comparisons:
        if not c.tuned or c.tuned.smoke or c.tuned is c.scratch:
            continue
        parts = []
        others = {"the base": c.base, "the prompted base": c.prompted, "from scratch": c.scratch}
        for name, other in others.items():
            gap = c.minus(other) if other and not other.smoke else None
            if clear(gap):
                parts.append(f"{points(gap)} points over {name}")
        if parts:
            sentences.append(f"**{c.tuned.model}** on {', '.join(c.tuned.where)}: {', '.join(parts)}.")
    return sentences


def sampling_findings(records: Records) -> list[str]:
    """Ways to choose among samples whose difference from greedy decoding or majority vote is clear."""
    sentences = []
    for m in records.measurements:
        differences = {} if m.smoke else m.entry.get("differences") or {}
        known = [f"{way} {points(gap)}" for way, gap in differences.items() if clear(gap)]
        if known:
            words = f"**{m.model}** on {', '.join(m.where)}, {m.entry['samples']} answers to each problem: "
            sentences.append(words + f"{', '.join(known)} points.")
    return sentences


def task_advice(rows: list[Comparison]) -> list[str]:
    """The best model of each task, among those measured on the most items."""
    measured: dict[tuple, list] = {}
    for c in rows:
        for m in (c.tuned, c.base, c.prompted):
            if m and not m.smoke and m.headline != "bits_per_byte":
                measured.setdefault(m.where, []).append(m)
    sentences = []
    for where, some in measured.items():
        most = max(m.items for m in some)
        some = [m for m in some if m.items == most]
        if len({m.model for m in some}) > 1:
            best = max(some, key=lambda m: m.entry["metrics"][m.headline]["value"])
            value = value_of(best.headline, best.entry["metrics"][best.headline])
            sentences.append(f"**{', '.join(where)}**: take {best.model} ({best.way}), {value}.")
    return sentences


def lab_findings(found: dict) -> list[dict]:
    """A row per family: lowest loss, what is better and worse than the baseline, and a recommendation."""
    experiments, rows = found.get("experiments") or {}, []
    if found.get("quick") or "tokens_per_second" not in experiments.get("baseline", {}):
        return []
    speed = experiments["baseline"]["tokens_per_second"]["mean"]
    for family, names in found["families"].items():
        gaps = {name: experiments.get(name, {}).get("difference", {}) for name in names}
        names = sorted((name for name in names if "low" in gaps[name]), key=lambda name: gaps[name]["mean"])
        if not names:
            continue
        better = [name for name in names if gaps[name]["high"] < 0]
        worse = [name for name in names if gaps[name]["low"] > 0]
        unclear = [name for name in names if not clear(gaps[name])]
        ratios = {name: experiments[name]["tokens_per_second"]["mean"] / speed for name in names}
        advice = [f"use {name} at {ratios[name]:.2f} times the speed" for name in better]
        for name in unclear:
            if ratios[name] >= FASTER:
                advice.append(f"{name}: no difference in loss found, at {ratios[name]:.2f} times the speed")
        advice += [] if better else ["keep the baseline unless speed or memory decides"]
        advice += [f"leave out {', '.join(worse)}"] if worse else []
        cells = {
            "family": f"{found['corpus']}, {family}",
            "lowest bits/byte": f"{names[0]}, {experiments[names[0]]['bits_per_byte']['mean']:.4f}",
            "better": ", ".join(f"{name} {gaps[name]['mean']:+.4f}" for name in better),
            "worse": ", ".join(f"{name} {gaps[name]['mean']:+.4f}" for name in worse),
            "no difference found": ", ".join(unclear),
            "recommendation": "; ".join(advice),
        }
        rows.append(cells)
    return rows


# -----------------------------------------------------------------------------
# Entries: an entry is a row of the summary and paragraphs, both made from the same values

SUMMARY = """
run: {run} | stage: {stage} | date: {started:.10} | validation loss: {val_loss:.4f}
training loss: {train_loss:.4f} | tokens/s: {speed:,.0f} | minus baseline: {gap} | outcome: {outcome}
"""
ENTRY = """
Date: {started}
Hypothesis: {hypothesis}
Change: {change}
Results: {results}
Comparison: {comparison}
Curves: {curves}
wandb: {wandb}
Observations: {observations}
Next steps: {next}
"""
RESULTS = (
    "{found}",
    "training loss {train_loss:.4f}",
    "{speed:,.0f} tokens/s",
    "mean of {seeds} seeds",
    "{seconds:minutes} minutes",
)


def log(records: Records, made: Sections) -> Sections:
    """The log as sections of a page. `made`: the sections of the report; the log links to their figures."""
    figures = {figure.name for figure in blocks_of(made, Figure)}
    rows, entries = [], {}
    for run in records.runs:
        values = run_values(run, records, figures)
        rows.append(row(SUMMARY, values))
        entries[run.shown] = entry(values)
    for folder, found in records.labs.items():
        for name, e in (found.get("experiments") or {}).items():
            if "bits_per_byte" in e:
                runs = {
                    seed: load_run(folder / f"{name}-s{seed}", records.home) for seed in e.get("seeds") or ()
                }
                values = lab_values(folder, found, name, e, runs)
                rows.append(row(SUMMARY, values))
                heading = f"{name}, {folder.name}" + f" ({SMOKE})" * bool(found.get("quick"))
                entries[heading] = entry(values)
                if any(run.record for run in runs.values()):
                    entries[heading].append(lab_curves(folder, name, runs))
    if not rows:
        return {"No runs": [Text("No run folders here: `bash run_all.sh cpu` makes them.")]}
    return {"All runs": [table("experiments", rows)], "Findings": findings(records), **entries}


def entry(values: dict) -> list[Block]:
    results = ", ".join(filter(None, (fill(template, values) for template in RESULTS)))
    words = row(ENTRY, values | {"results": results})
    return [Text(f"**{key}**: {value}") for key, value in words.items() if value]


def train_loss_of(lines: list[dict]) -> float | None:
    """The mean of the last five training losses."""
    losses = [x["loss"] for x in lines if "loss" in x][-5:]
    return statistics.fmean(losses) if losses else None


def run_values(run: Run, records: Records, figures: set[str]) -> dict:
    """What the log says about a run."""
    lines = run.metrics()
    observed, todo = observations(lines)
    speeds = [x["tokens_per_second"] for x in lines if "tokens_per_second" in x]
    gaps = compared_with(run, records)
    names = [f"{kind}-{run.folder.name}" for kind in ("curves", "preferences")]
    found = [f"{key} {value:.4g}" for key, value in run.best.items() if isinstance(value, int | float)]
    return {
        "run": run.shown,
        "stage": run.stage,
        "started": str(run.record.get("started", "unknown")),
        "hypothesis": run.settings.get("hypothesis") or "none given",
        "change": f"`{run.record.get('command', 'unknown')}`",
        "found": ", ".join(found),
        "val_loss": run.best.get("val_loss"),
        "train_loss": train_loss_of(lines),
        "speed": statistics.median(speeds) if speeds else None,
        "seconds": run.record.get("seconds"),
        "gap": gaps[0] if gaps else "",
        "comparison": "; ".join(gaps) or "none: no other run here measured the same",
        "curves": ", ".join(f"[{name}](figures/{name}.png)" for name in names if name in figures),
        "wandb": wandb_words(run),
        "observations": " ".join(observed),
        "outcome": observed[0],
        "next": f"{SMOKE}: run it in full." if run.smoke else " ".join(todo) or "none",
    }


def compared_with(run: Run, records: Records) -> list[str]:
    """Differences of this run: on tasks to its base, in loss to the baseline that its config names."""
    found = []
    for c in records.comparisons:
        for other in (c.base, c.prompted, c.scratch):
            mine = c.tuned and c.tuned.model == run.name and other is not c.tuned
            if gap := c.minus(other) if mine else None:
                way = f"{other.model}, {other.way}"
                found.append(f"{' '.join(c.tuned.where)}: {points(gap)} points over {way}")
    baseline = Path(str(run.settings.get("baseline") or "")).stem
    for other in records.runs:
        alike = other.record.get("tokenizer") == run.record.get("tokenizer")
        alike = alike and other.validation.get("fingerprint") == run.validation.get("fingerprint") is not None
        if other.folder.name == baseline and alike and "val_loss" in run.last and "val_loss" in other.last:
            gap = run.last["val_loss"] - other.last["val_loss"]
            found.append(f"validation loss {gap:+.4f} from {baseline} (one seed: no finding)")
    return found


def wandb_words(run: Run) -> str:
    """The id and address of the run at Weights & Biases; nothing if it was not logged there."""
    about = run.record.get("wandb") or {}
    return fill("run `{id}`, [{url}]({url})", about) or fill("run `{id}`, offline", about)


def lab_values(folder: Path, found: dict, name: str, e: dict, runs: dict[str, Run]) -> dict:
    """What the log says about an experiment of the lab, over its runs {seed: run}."""
    first, baseline = next(iter(runs), None), name == "baseline"
    lines = {seed: run.metrics() for seed, run in runs.items()}
    losses = [loss for some in lines.values() if (loss := train_loss_of(some)) is not None]
    means = {key: e[key]["mean"] for key in ("train_loss", "val_loss", "bits_per_byte") if key in e}
    if losses:
        means.setdefault("train_loss", statistics.fmean(losses))
    gap = fill("{difference:difference} bits/byte", e)
    verdict = "the baseline" if baseline else e.get("verdict", "")
    addresses = [f"seed {seed}: {words}" for seed, run in runs.items() if (words := wandb_words(run))]
    bits = "{bits_per_byte:.4f} bits/byte"
    return means | {
        "found": fill("validation loss {val_loss:.4f}, " + bits, means) or fill(bits, means),
        "run": name,
        "stage": f"lab, {folder.name}",
        "started": str(runs[first].record.get("started", "unknown")) if runs else "unknown",
        "hypothesis": e.get("hypothesis") or ("what the others are compared with" if baseline else "none"),
        "change": change_of(folder, name, first, e),
        "speed": e["tokens_per_second"]["mean"],
        "seeds": len(runs) or found.get("seeds", 1),
        "gap": gap,
        "comparison": f"{gap} from the baseline, 95 % interval over the seeds: {verdict}" if gap else "",
        "curves": "",
        "wandb": "; ".join(addresses),
        "observations": " ".join(observations(lines[first])[0]) if lines and lines[first] else "",
        "outcome": verdict,
        "next": lab_next_step(found, name, e),
    }


def change_of(folder: Path, name: str, seed: str | None, e: dict) -> str:
    """The settings that differ from the baseline's, where both run folders are here, and the command."""
    files = [folder / f"{run}-s{seed}" / "run.json" for run in (name, "baseline")]
    settings, baseline = (read_json(file).get("settings") or {} for file in files)
    changes = []
    for key, value in settings.items():
        differs = baseline and json.dumps(value) != json.dumps(baseline.get(key))
        if differs and key not in ("name", "hypothesis", "baseline", "seed"):
            changes.append(f"{key}={value}")
    command = f"`{e.get('command', 'unknown')}`"
    return f"`{', '.join(changes)}`; {command}" if changes else command


def lab_next_step(found: dict, name: str, e: dict) -> str:
    """The next step that the interval suggests."""
    gap = e.get("difference") or {}
    if found.get("quick"):
        return f"{SMOKE}: run it in full, `python experiments.py --only={name}`."
    if name == "baseline" or not gap:
        return "none"
    if "low" not in gap:
        return f"One seed: no finding. `python experiments.py --only={name} --seeds=3`."
    if not clear(gap):
        return "Decide by speed and memory; no difference was found."
    return "Leave it out." if gap["low"] > 0 else "Adopt it, if its speed and memory allow."


def lab_curves(folder: Path, name: str, seeds: Iterable[str]) -> Figure:
    """Losses of an experiment, one line per seed, with those of the baseline in grey."""
    training, validation = [], []
    for run, color in (("baseline", GREY), (name, BLUE)):
        for i, seed in enumerate(seeds):
            rows = read_jsonl(folder / f"{run}-s{seed}" / "metrics.jsonl")
            training.append(line(rows, "step", "loss", run if i == 0 else None, color=color))
            validation.append(line(rows, "step", "val_loss", form="o-", color=color))
    panels = [Panel(training, "step", "training loss"), Panel(validation, "step", "validation loss")]
    caption = f"{name} and the baseline, a line a seed."
    return chart(f"curves-{folder.name}-{name}", caption, panels)
