"""The experiment log: an entry per run and per experiment of the lab, findings and recommendations.

Every sentence is computed from run.json, metrics.jsonl, results.json and experiments.json. A finding is a
difference whose 95 % interval excludes 0; smoke runs and quick runs of the lab produce none.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path

from support.charts import BLUE, GREY, Panel, chart, line
from support.observations import observations
from support.pages import Block, Figure, Sections, Text, blocks_of, fill, points, row, table
from support.results import SMOKE, Comparison, Records, Run, differing, read_json, value_of
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
    for family, names in found["families"].items():
        names = [name for name in names if "low" in experiments.get(name, {}).get("difference", {})]
        names.sort(key=lambda name: experiments[name]["difference"]["mean"])
        if not names:
            continue
        lowest = fill("{bits_per_byte[mean]:.4f}", experiments[names[0]])
        cells = {"family": f"{found['corpus']}, {family}", "lowest bits/byte": f"{names[0]}, {lowest}"}
        alike = {verdict: [] for verdict in ("better", "worse", "no difference found")}
        for name in names:
            alike[experiments[name]["verdict"]].append(name)
        for verdict, some in alike.items():
            gaps = [f"{name} {experiments[name]['difference']['mean']:+.4f}" for name in some]
            cells[verdict] = ", ".join(gaps)
        rows.append(cells | {"recommendation": lab_advice(experiments, *alike.values())})
    return rows


def lab_advice(experiments: dict, better: list[str], worse: list[str], unclear: list[str]) -> str:
    """What to adopt (best first), what is faster without a measured loss, and what to leave out."""
    speed = {name: experiments[name]["tokens_per_second"]["mean"] for name in ("baseline", *better, *unclear)}
    words = []
    for name in better + unclear:
        ratio = speed[name] / speed["baseline"]
        if name in better:
            words.append(f"use {name} at {ratio:.2f} times the speed")
        elif ratio >= FASTER:
            words.append(f"{name}: no difference in loss found, at {ratio:.2f} times the speed")
    words += [] if better else ["keep the baseline unless speed or memory decides"]
    words += [f"leave out {', '.join(worse)}"] if worse else []
    return "; ".join(words)


# -----------------------------------------------------------------------------
# Entries: a row of the summary, and paragraphs of which those without a value are left out

RUN_ROW = """
run: {run.shown} | stage: {run.stage} | date: {run.record[started]:.10}
validation loss: {run.best[val_loss]:.4f} | training loss: {loss:.4f} | tokens/s: {speed:,.0f}
minus baseline: {gaps[0]} | outcome: {observed[0]}
"""
RUN = """
Date: {run.record[started]}
Hypothesis: {run.settings[hypothesis]}
Change: `{run.record[command]}`
Results: {best}
Training: loss {loss:.4f} at {speed:,.0f} tokens/s
Time: {run.record[seconds]:minutes} minutes
Comparison: {comparison}
Curves: {curves}
wandb: {wandb}
Observations: {observations}
Next steps: {next}
"""
LAB_ROW = """
run: {name} | stage: lab, {folder} | date: {run.record[started]:.10} | validation loss: {val_loss[mean]:.4f}
training loss: {loss:.4f} | tokens/s: {tokens_per_second[mean]:,.0f}
minus baseline: {difference:difference} bits/byte | outcome: {verdict}
"""
LAB = """
Date: {run.record[started]}
Hypothesis: {hypothesis}
Change: {change}
Results: {bits_per_byte[mean]:.4f} bits/byte, {tokens_per_second[mean]:,.0f} tokens/s, mean of {n} seeds
Validation loss: {val_loss[mean]:.4f}
Training loss: {loss:.4f}
Comparison: {difference:difference} bits/byte from the baseline, 95 % interval over the seeds: {verdict}
wandb: {wandb}
Observations: {observations}
Next steps: {next}
"""
NEXT = {  # by the verdict of experiments.py
    "better": "Adopt it, if its speed and memory allow.",
    "worse": "Leave it out.",
    "no difference found": "Decide by speed and memory; no difference was found.",
    "one seed: no finding": "One seed: no finding. Run it again with --seeds=3.",
}


def log(records: Records, made: Sections) -> Sections:
    """The log as sections of a page. `made`: the sections of the report; the log links to their figures."""
    figures = {figure.name for figure in blocks_of(made, Figure)}
    rows, entries = [], {}
    for run in records.runs:
        values = run_values(run, records, figures)
        rows.append(row(RUN_ROW, values))
        entries[run.shown] = entry(RUN, values)
    for folder, found in records.labs.items():
        for name, e in (found.get("experiments") or {}).items():
            if "bits_per_byte" in e:
                values = lab_values(folder, found, name, e)
                rows.append(row(LAB_ROW, values))
                heading = f"{name}, {folder.name}" + f" ({SMOKE})" * bool(found.get("quick"))
                entries[heading] = entry(LAB, values)
                if values["loss"] is not None:
                    entries[heading].append(lab_curves(folder, name, e["seeds"]))
    if not rows:
        return {"No runs": [Text("No run folders here: `bash run_all.sh cpu` makes them.")]}
    return {"All runs": [table("experiments", rows)], "Findings": findings(records), **entries}


def entry(template: str, values: dict) -> list[Block]:
    return [Text(f"**{key}**: {value}") for key, value in row(template, values).items() if value]


def train_loss_of(lines: list[dict]) -> float | None:
    """The mean of the last five training losses."""
    losses = [x["loss"] for x in lines if "loss" in x][-5:]
    return statistics.fmean(losses) if losses else None


def run_values(run: Run, records: Records, figures: set[str]) -> dict:
    """What the templates name of a run."""
    lines, gaps = run.metrics(), compared_with(run, records)
    observed, todo = observations(lines)
    speeds = [x["tokens_per_second"] for x in lines if "tokens_per_second" in x]
    best = [f"{key} {value:.4g}" for key, value in run.best.items() if isinstance(value, int | float)]
    names = [f"{kind}-{run.folder.name}" for kind in ("curves", "preferences")]
    return {
        "run": run,
        "best": ", ".join(best),
        "loss": train_loss_of(lines),
        "speed": statistics.median(speeds) if speeds else None,
        "gaps": gaps,
        "comparison": "; ".join(gaps) or "none: no other run here measured the same",
        "curves": ", ".join(f"[{name}](figures/{name}.png)" for name in names if name in figures),
        "wandb": wandb_words(run),
        "observed": observed,
        "observations": " ".join(observed),
        "next": f"{SMOKE}: run it in full." if run.smoke else " ".join(todo),
    }


def compared_with(run: Run, records: Records) -> list[str]:
    """Differences of this run: on tasks to its base, in loss to the baseline that its config names."""
    found = []
    for c in records.comparisons:
        if c.tuned and c.tuned.model == run.name:
            for other in (c.base, c.prompted, c.scratch):
                if other is not c.tuned and (gap := c.minus(other)):
                    way = f"{other.model}, {other.way}"
                    found.append(f"{' '.join(c.tuned.where)}: {points(gap)} points over {way}")
    baseline = Path(str(run.settings.get("baseline") or "")).stem
    for other in records.runs:
        texts = [(x.record.get("tokenizer"), x.validation.get("fingerprint")) for x in (run, other)]
        losses = [x.last.get("val_loss") for x in (run, other)]
        if other.folder.name == baseline and texts[0] == texts[1] and texts[0][1] and None not in losses:
            gap = losses[0] - losses[1]
            found.append(f"validation loss {gap:+.4f} from {baseline} (one seed: no finding)")
    return found


def wandb_words(run: Run) -> str:
    """The id and address of the run at Weights & Biases; nothing if it was not logged there."""
    about = run.record.get("wandb") or {}
    return fill("run `{id}`, [{url}]({url})", about) or fill("run `{id}`, offline", about)


def lab_values(folder: Path, found: dict, name: str, e: dict) -> dict:
    """What the templates name of an experiment of the lab, over its seeds."""
    runs = {seed: Run(folder / f"{name}-s{seed}", folder.parents[1]) for seed in e.get("seeds") or {}}
    lines = [run.metrics() for run in runs.values()]
    losses = [loss for some in lines if (loss := train_loss_of(some)) is not None]
    addresses = [f"seed {seed}: {words}" for seed, run in runs.items() if (words := wandb_words(run))]
    again = f"{SMOKE}: run it in full, `python experiments.py --only={name}`."
    verdict = e.get("verdict", "the baseline" if name == "baseline" else "")
    return e | {
        "name": name,
        "folder": folder.name,
        "run": next(iter(runs.values()), None),
        "loss": e["train_loss"]["mean"]
        if "train_loss" in e
        else statistics.fmean(losses)
        if losses
        else None,
        "n": len(runs) or found.get("seeds", 1),
        "change": change_of(folder, name, next(iter(runs), None), e),
        "verdict": verdict,
        "wandb": "; ".join(addresses),
        "observations": " ".join(observations(lines[0])[0]) if losses else "",
        "next": again if found.get("quick") else NEXT.get(verdict),
    }


def change_of(folder: Path, name: str, seed: str | None, e: dict) -> str:
    """The settings that differ from the baseline's, where both run folders are here, and the command."""
    records = {run: read_json(folder / f"{run}-s{seed}" / "run.json") for run in ("baseline", name)}
    settings = {run: record.get("settings") or {} for run, record in records.items()}
    differ = differing(settings) if all(settings.values()) else {}
    changes = [
        f"{key}={values[name]}" for key, values in differ.items() if key not in ("hypothesis", "baseline")
    ]
    return f"`{', '.join(changes)}`; " * bool(changes) + f"`{e.get('command', 'unknown')}`"


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
