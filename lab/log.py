"""The experiment log: an entry per run and per experiment of the lab, findings and recommendations.

Every sentence is computed from run.json, metrics.jsonl, results.json and experiments.json. A finding is a
difference whose 95 % interval excludes 0; smoke runs and quick runs of the lab produce none.
"""

from collections import defaultdict
from pathlib import Path

from support.curves import overlaid
from support.observations import observations
from support.pages import Block, Figure, Sections, Table, Text, blocks_of, fill, points, row, say
from support.results import SMOKE, Comparison, Measurement, Records, Run

# -----------------------------------------------------------------------------
# Findings and recommendations

LAB = "The lab, over its seeds: bits/byte minus the baseline's, and speed as a share of the baseline's."
LINKS = "The log of all runs and experiments: [a page](experiments.html), [Markdown](experiments.md)."


def findings(records: Records) -> list[Block]:
    """Findings and recommendations in sentences, computed from the tables."""
    found = task_findings(records)
    families = records.each(records.labs, lab_findings)
    if not found and not families:
        return []
    blocks = [Text("**Key findings**, differences whose 95 % interval excludes 0:"), *found]
    if families:
        blocks += [Text(LAB), Table("findings", families, "Families of ablations: findings.")]
    if advice := task_advice(records.measurements):
        blocks += [Text("**Recommendations**"), *advice]
    return [*blocks, Text(LINKS)]


def task_findings(records: Records) -> list[Block]:
    """Clear differences: of training, and of ways to choose among many answers."""
    return records.each(records.comparisons, of_training) + records.each(records.measurements, of_sampling)


def clear(gap: dict) -> bool:
    """True if the interval excludes 0: both ends have the same sign."""
    return gap["low"] * gap["high"] > 0


def of_training(c: Comparison) -> list[Block]:
    """Clear differences between a tuned model and what it was tuned from."""
    parts = []
    for role, gap in c.gaps.items():
        if clear(gap) and not (c.m.smoke or c.others[role].smoke):
            parts.append(f"{points(gap)} points over {OVER[role]}")
    return say("**{m.run.name}** on {m.place}: {parts}.", m=c.m, parts=", ".join(parts)) if parts else []


OVER = {"base": "the base", "prompted": "the prompted base", "from scratch": "from scratch"}
SAMPLED = "**{m.run.name}** on {m.place}, {m.entry[samples]} answers to each problem: {ways} points."


def of_sampling(m: Measurement) -> list[Block]:
    """Ways to choose among samples whose difference from greedy decoding or majority vote is clear."""
    differences = m.entry.get("differences") or {}
    ways = [f"{way} {points(gap)}" for way, gap in differences.items() if clear(gap) and not m.smoke]
    return say(SAMPLED, m=m, ways=", ".join(ways)) if ways else []


def task_advice(measured: list[Measurement]) -> list[Block]:
    """The best model of each task, among those measured on the most items."""
    by_task = defaultdict(list)
    for m in measured:
        if m.headline not in (None, "bits_per_byte") and not m.smoke:
            by_task[m.place].append(m)
    blocks = []
    for some in by_task.values():
        best = max(some, key=lambda m: (m.items, m.numbers[m.headline]))
        if len({m.run.name for m in some if m.items == best.items}) > 1:
            words = "**{m.place}**: take {m.run.name} ({m.way}), {value}."
            blocks += say(words, m=best, value=best.values[best.headline])
    return blocks


COLUMNS = {  # verdict of lab/experiments.py: what to do
    "better": "better: use it",
    "worse": "worse: leave it out",
    "no difference found": "no difference found: speed or memory decide",
}
BESIDE = "{name} {difference[mean]:+.4f} at {speed:.2f} times the speed"


def lab_findings(found: dict) -> list[dict]:
    """A row per family: lowest loss, what is better and worse than the baseline, and a recommendation."""
    if found["quick"]:
        return []
    experiments, rows = found["experiments"], []
    for family, names in found["families"].items():
        some = [e for e in experiments.values() if e["name"] in names and "low" in e["difference"]]
        some.sort(key=lambda e: e["difference"]["mean"])
        if not some:
            continue
        cells = {"family": f"{found['corpus']}, {family}"}
        cells |= row("lowest bits/byte: {name}, {bits_per_byte[mean]:.4f}", **some[0])
        usual = experiments["baseline"]["tokens_per_second"]["mean"]
        for verdict, column in COLUMNS.items():
            beside = []
            for e in some:
                if e["verdict"] == verdict:
                    beside.append(fill(BESIDE, **e, speed=e["tokens_per_second"]["mean"] / usual))
            cells[column] = ", ".join(beside)
        rows.append(cells)
    return rows


# -----------------------------------------------------------------------------
# Entries: a row of the summary, and paragraphs of which those without a value are left out

ROW = """
run: {name} | stage: {stage} | date: {started:.10} | validation loss: {val_loss[mean]:.4f}
training loss: {train_loss[mean]:.4f} | tokens/s: {tokens_per_second[mean]:,.0f} | minus baseline: {gap}
outcome: {outcome}
"""
ENTRY = """
**Date**: {started}
**Hypothesis**: {hypothesis}
**Change**: {change}
**Results**: {measured}
**Training**: loss {train_loss[mean]:.4f} at {tokens_per_second[mean]:,.0f} tokens/s
**Time**: {seconds:minutes} minutes
**Comparison**: {comparison}
**Curves**: {curves}
**wandb**: {logged}
**Observations**: {observations}
**Next steps**: {next}
"""
NEXT = {  # by the verdict of lab/experiments.py
    "better": "Adopt it, if its speed and memory allow.",
    "worse": "Leave it out.",
    "no difference found": "Decide by speed and memory; no difference was found.",
    "one seed: no finding": "One seed: no finding. Run it again with --seeds=3.",
}


def log(records: Records, made: Sections) -> Sections:
    """The log as sections of a page. `made`: the sections of the report; the log links to their figures."""
    figures = {figure.name for figure in blocks_of(made, Figure)}
    entries = records.each(records.runs, lambda run: entry(of_run(run, records, figures)))
    for found in records.labs:
        entries += records.each(found["experiments"].values(), lambda e: entry(of_lab(e, records)))
    if not entries:
        return {"No runs": [Text("No run folders here: `bash run_all.sh cpu` makes them.")]}
    rows = [cells for _, cells, _ in entries]
    sections = {"All runs": [Table("experiments", rows)], "Findings": findings(records)}
    return sections | {heading: blocks for heading, _, blocks in entries}


def entry(values: dict) -> list[tuple]:
    """(heading, row of the summary, blocks) of one run or experiment."""
    return [(values["heading"], row(ROW, **values), say(ENTRY, **values) + values["figures"])]


def of_run(run: Run, records: Records, figures: set[str]) -> dict:
    """What the templates name of a run."""
    gaps = compared_with(run, records)
    observed, todo = observations(run.metrics)
    best = [f"{key} {value:.4g}" for key, value in run.best.items() if isinstance(value, int | float)]
    names = [f"{kind}-{run.folder.name}" for kind in ("curves", "preferences")]
    links = [f"[{name}](figures/{name}.png)" for name in names if name in figures]
    return run.record | {
        "heading": run.shown,
        "name": run.shown,
        "hypothesis": run.settings.get("hypothesis") or None,
        "change": fill("`{command}`", **run.record) or None,
        "measured": ", ".join(best) or None,
        "val_loss": {"mean": run.best.get("val_loss")},
        "train_loss": {"mean": run.typical("loss", 5)},
        "tokens_per_second": {"mean": run.typical("tokens_per_second")},
        "gap": gaps[0] if gaps else "",
        "comparison": "; ".join(gaps) or "none: no other run here measured the same",
        "curves": ", ".join(links) or None,
        "logged": wandb(run) or None,
        "outcome": observed[0],
        "observations": " ".join(observed) if run.metrics else None,
        "next": f"{SMOKE}: run it in full." if run.smoke else " ".join(todo) or None,
        "figures": [],
    }


def compared_with(run: Run, records: Records) -> list[str]:
    """Differences of this run: on tasks to its base, in loss to the baseline that its config names."""
    found = []
    for c in records.comparisons:
        if c.m.run.folder == run.folder:
            for role, gap in c.gaps.items():
                other = c.others[role]
                found.append(f"{c.m.place}: {points(gap)} points over {other.run.name}, {other.way}")
    baseline = Path(str(run.settings.get("baseline"))).stem
    for other in records.runs:
        losses = [x.last.get("val_loss") for x in (run, other)]
        alike = run.text == other.text and run.text[1] and None not in losses
        if other.folder.name == baseline and alike:
            gap = losses[0] - losses[1]
            found.append(f"validation loss {gap:+.4f} from {baseline} (one seed: no finding)")
    return found


def wandb(run: Run) -> str:
    """The id and address of the run at Weights & Biases; nothing if it was not logged there."""
    about = run.record.get("wandb") or {}
    return fill("run `{id}`, [{url}]({url})", **about) or fill("run `{id}`, offline", **about)


MEASURED = "{bits_per_byte[mean]:.4f} bits/byte, {tokens_per_second[mean]:,.0f} tokens/s, mean of {n} seeds"
COMPARISON = "{difference:difference} bits/byte from the baseline, 95 % interval over the seeds: {verdict}"


def of_lab(e: dict, records: Records) -> dict:
    """What the templates name of an experiment: of the run of its first seed, with means over the seeds."""
    name, folder, seeds = e["name"], e["folder"], e.get("seeds") or {"1": {}}
    runs = [Run(folder / f"{name}-s{seed}", records.home, records.damaged) for seed in seeds]
    baseline = Run(folder / f"baseline-s{next(iter(seeds))}", records.home)
    logged = [f"{run.folder.name}: {wandb(run)}" for run in runs if wandb(run)]
    verdict = e.get("verdict") or ("the baseline" if name == "baseline" else "")
    values = of_run(runs[0], records, set()) | e
    values |= {
        "heading": f"{name}, {folder.name}" + f" ({SMOKE})" * e["quick"],
        "stage": f"lab, {folder.name}",
        "change": fill("`{command}`", **e),
        "measured": fill(MEASURED, **e, n=len(seeds)),
        "gap": fill("{difference:difference} bits/byte", **e),
        "comparison": fill(COMPARISON, **e | {"verdict": verdict}) or None,
        "logged": "; ".join(logged) or None,
        "outcome": verdict,
        "next": f"{SMOKE}: run it in full." if e["quick"] else NEXT.get(verdict),
    }
    if runs[0].metrics:
        beside = {run.folder.name: run for run in [baseline, *runs]}
        values["figures"] = [overlaid(f"curves-{folder.name}-{name}", beside)]
    return values
