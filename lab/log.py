"""The experiment log: an entry per run and per experiment of the lab, findings and recommendations.

Every sentence is computed from run.json, metrics.jsonl, results.json and experiments.json. A finding is a
difference whose 95 % interval excludes 0; smoke runs and quick runs of the lab produce none.
"""

import json
import statistics
from pathlib import Path

from support.observations import observations
from support.pages import Block, Figure, Table, Text, figure, minutes, plt, signed, thinned
from support.results import (
    SMOKE,
    Comparison,
    is_smoke,
    label,
    measurements,
    read_json,
    run_folders,
    shown_name,
    side_by_side,
    value_of,
)
from support.tables import read_jsonl

FASTER = 1.05  # a change counts as faster from this ratio of its tokens/s to the baseline's


def train_loss_of(lines: list[dict]) -> float | None:
    """The mean of the last five training losses."""
    losses = [x["loss"] for x in lines if "loss" in x][-5:]
    return statistics.fmean(losses) if losses else None


# -----------------------------------------------------------------------------
# Findings and recommendations


def findings(home: Path) -> list[Block]:
    """Findings and recommendations in sentences, computed from the tables."""
    found, advice = [], []
    rows = side_by_side(measurements(home))
    found += task_findings(rows) + sampling_findings(home)
    advice += task_advice(rows)
    files = sorted(home.glob("experiments/*/experiments.json"))
    of_lab = [row for file in files for row in lab_findings(read_json(file))]
    if not found and not of_lab:
        return [
            Text("No findings yet: a finding is a difference of full runs whose 95 % interval excludes 0.")
        ]
    blocks: list[Block] = [Text("**Key findings**, differences whose 95 % interval excludes 0:")]
    blocks += [Text(sentence) for sentence in found]
    if of_lab:
        words = (
            "The lab, over its seeds: bits/byte minus the baseline's, and speed as a share of the baseline's."
        )
        columns = ["family", "lowest bits/byte", "better", "worse", "no difference found", "recommendation"]
        blocks += [Text(words), Table("findings", columns, of_lab, "Families of ablations: findings.")]
    if advice:
        blocks += [Text("**Recommendations**"), *(Text(sentence) for sentence in advice)]
    links = "[a page](experiments.html), [Markdown](experiments.md)"
    return [*blocks, Text(f"The log of all runs and experiments: {links}.")]


def by_family(found: dict) -> dict[str, dict[str, dict]]:
    """{family: {experiment: its entry}} without the baseline; {} for a quick run, which has no findings."""
    if found.get("quick"):
        return {}
    experiments, families = found.get("experiments") or {}, {}
    for family, names in (found.get("families") or {}).items():
        entries = {
            name: experiments[name]
            for name in names
            if "low" in experiments.get(name, {}).get("difference", {})
        }
        if entries and "tokens_per_second" in experiments.get("baseline", {}):
            families[family] = entries
    return families


def clear(difference: dict) -> bool:
    """Whether the interval excludes 0."""
    return difference["low"] > 0 or difference["high"] < 0


def listed(entries: dict[str, dict]) -> str:
    """muon -0.0510, wsd -0.0240: experiments with their mean differences."""
    means = {name: {"mean": e["difference"]["mean"]} for name, e in entries.items()}
    return ", ".join(f"{name} {signed(mean, 1, 4)}" for name, mean in means.items())


def lab_findings(found: dict) -> list[list]:
    """A row per family: lowest loss, what is better and worse than the baseline, and a recommendation."""
    rows = []
    for family, entries in by_family(found).items():
        entries = dict(sorted(entries.items(), key=lambda item: item[1]["difference"]["mean"]))
        better = {n: e for n, e in entries.items() if e["difference"]["high"] < 0}
        worse = {n: e for n, e in entries.items() if e["difference"]["low"] > 0}
        unclear = ", ".join(n for n in entries if n not in better and n not in worse)
        best = next(iter(entries))
        lowest = f"{best}, {entries[best]['bits_per_byte']['mean']:.4f}"
        rows.append([f"{found['corpus']}, {family}", lowest, listed(better), listed(worse), unclear,
                     lab_advice(found, better, worse, entries)])  # fmt: skip
    return rows


def speed_ratio(found: dict, entry: dict) -> float:
    """Tokens/s of an experiment, divided by the baseline's."""
    baseline = found["experiments"]["baseline"]["tokens_per_second"]["mean"]
    return entry["tokens_per_second"]["mean"] / baseline


def lab_advice(found: dict, better: dict, worse: dict, entries: dict) -> str:
    """What to adopt (best first), what is faster without a measured loss, and what to leave out."""
    words = [f"use {name} at {speed_ratio(found, e):.2f} times the speed" for name, e in better.items()]
    for name, e in entries.items():
        if name not in worse and name not in better and speed_ratio(found, e) >= FASTER:
            words.append(
                f"{name}: no difference in loss found, at {speed_ratio(found, e):.2f} times the speed"
            )
    if not better:
        words.append("keep the baseline unless speed or memory decides")
    return "; ".join(words + [f"leave out {', '.join(worse)}"] * bool(worse))


def task_findings(rows: list[Comparison]) -> list[str]:
    sentences = []
    for c in rows:
        if not c.tuned or c.tuned.smoke or c.tuned is c.scratch:
            continue
        parts = []
        for other, name in (
            (c.base, "the base"),
            (c.prompted, "the prompted base"),
            (c.scratch, "from scratch"),
        ):
            difference = c.minus(other) if other and not other.smoke else None
            if difference and clear(difference):
                parts.append(f"{signed(difference)} points over {name}")
        if parts:
            task, split = c.tuned.where
            sentences.append(f"**{c.tuned.model}** on {task}, {split}: {', '.join(parts)}.")
    return sentences


def task_advice(rows: list[Comparison]) -> list[str]:
    """The best model of each task, among those measured on the most items."""
    best: dict[tuple, list] = {}
    for c in rows:
        for m in (c.tuned, c.base, c.prompted):
            metric = m.headline if m else None
            if m and not m.smoke and metric != "bits_per_byte":
                best.setdefault(m.where, []).append((m.entry["metrics"][metric]["value"], m))
    sentences = []
    for (task, split), scored in best.items():
        most = max(m.entry.get("items", 0) for _, m in scored)
        scored = [(value, m) for value, m in scored if m.entry.get("items", 0) == most]
        if len({m.model for _, m in scored}) > 1:
            _, m = max(scored, key=lambda pair: pair[0])
            value = value_of(m.headline, m.entry["metrics"][m.headline])
            sentences.append(f"**{task}, {split}**: take {m.model} ({m.way}), {value}.")
    return sentences


def sampling_findings(home: Path) -> list[str]:
    """Ways to choose among samples whose difference from greedy decoding or majority vote is clear."""
    sentences = []
    for m in measurements(home):
        if not m.smoke:
            differences = m.entry.get("differences") or {}
            known = [f"{way} {signed(d)}" for way, d in differences.items() if clear(d)]
            if known:
                task, split = m.where
                words = f"**{m.model}** on {task}, {split}, {m.entry['samples']} answers to each problem: "
                sentences.append(words + f"{', '.join(known)} points.")
    return sentences


# -----------------------------------------------------------------------------
# Entries


def log(home: Path, made: dict[str, list[Block]]) -> dict[str, list[Block]]:
    """The log as sections of a page. `made`: the sections of the report; the log links to their figures."""
    rows = side_by_side(measurements(home))
    figures = {b.name for blocks in made.values() for b in blocks if isinstance(b, Figure)}
    summary, entries = [], {}
    for folder in run_folders(home):
        row, blocks = run_entry(folder, home, rows, figures)
        summary.append(row)
        entries[shown_name(folder, home)] = blocks
    for file in sorted(home.glob("experiments/*/experiments.json")):
        found = read_json(file)
        for name, e in (found.get("experiments") or {}).items():
            if "bits_per_byte" in e:
                row, blocks = lab_entry(file.parent, found, name, e)
                summary.append(row)
                entries[f"{name}, {file.parent.name}" + f" ({SMOKE})" * bool(found.get("quick"))] = blocks
    if not summary:
        return {"No runs": [Text("No run folders here: `bash run_all.sh cpu` makes them.")]}
    columns = [
        "run",
        "stage",
        "date",
        "validation loss",
        "training loss",
        "tokens/s",
        "minus baseline",
        "outcome",
    ]
    table = Table("experiments", columns, summary)
    return {"All runs": [table], "Findings": findings(home), **entries}


def run_entry(
    folder: Path, home: Path, rows: list[Comparison], figures: set[str]
) -> tuple[list, list[Block]]:
    """Summary row and log entry of a run."""
    run, lines = read_json(folder / "run.json"), read_jsonl(folder / "metrics.jsonl")
    settings, best = run.get("settings") or {}, (run.get("results") or {}).get("best") or {}
    said, todo = observations(lines)
    speeds = [x["tokens_per_second"] for x in lines if "tokens_per_second" in x]
    loss, speed = train_loss_of(lines), f"{statistics.median(speeds):,.0f}" if speeds else ""
    comparisons = compared_with(folder, home, run, rows)
    results = [f"{k} {v:.4g}" for k, v in best.items() if isinstance(v, int | float)]
    results += [f"training loss {loss:.4f}"] if loss is not None else []
    results += [f"{speed} tokens/s"] if speed else []
    words = {
        "Date": run.get("started", "unknown"),
        "Hypothesis": settings.get("hypothesis") or "none given",
        "Change": f"`{run.get('command', 'unknown')}`",
        "Results": f"{', '.join(results) or 'none yet'}; {minutes(run.get('seconds', 0))} minutes",
        "Comparison": "; ".join(comparisons) or "none: no other run here measured the same",
        "Curves": curve_links(folder, figures),
        "wandb": wandb_words(run),
        "Observations": " ".join(said),
        "Next steps": " ".join(todo) or "none",
    }
    if is_smoke(folder, home):
        words["Next steps"] = f"{SMOKE}: run it in full."
    row = [shown_name(folder, home), run.get("stage", ""), str(run.get("started", ""))[:10]]
    row += [four_digits(best.get("val_loss")), four_digits(loss), speed]
    row += [comparisons[0] if comparisons else "", said[0]]
    return row, [Text(f"**{key}**: {value}") for key, value in words.items() if value]


def four_digits(x: float | None) -> str:
    return "" if x is None else f"{x:.4f}"


def compared_with(folder: Path, home: Path, run: dict, rows: list[Comparison]) -> list[str]:
    """Differences of this run: on tasks to its base, in loss to the baseline that its config names."""
    found = []
    for c in rows:
        if c.tuned and c.tuned.model == label(folder, home):
            for other in (c.base, c.prompted, c.scratch):
                if other is not c.tuned and (difference := c.minus(other)):
                    way = f"{other.model}, {other.way}"
                    found.append(f"{' '.join(c.tuned.where)}: {signed(difference)} points over {way}")
    baseline = Path(str((run.get("settings") or {}).get("baseline") or "")).stem
    other = read_json(home / baseline / "run.json") if baseline else {}
    texts = [(r.get("data") or {}) for r in (run, other)]
    texts = [(t.get("validation") or {}).get("fingerprint") if isinstance(t, dict) else None for t in texts]
    losses = [((r.get("results") or {}).get("last") or {}).get("val_loss") for r in (run, other)]
    if (
        None not in losses
        and texts[0]
        and texts[0] == texts[1]
        and run.get("tokenizer") == other.get("tokenizer")
    ):
        found.append(f"validation loss {losses[0] - losses[1]:+.4f} from {baseline} (one seed: no finding)")
    return found


def curve_links(folder: Path, figures: set[str]) -> str:
    names = [f"{kind}-{folder.name}" for kind in ("curves", "preferences")]
    links = [f"[{name}](figures/{name}.png)" for name in names if name in figures]
    return ", ".join(links)


def wandb_words(run: dict) -> str:
    """The id and address of the run at Weights & Biases; nothing if it was not logged there."""
    about = run.get("wandb") or {}
    if not about.get("id"):
        return ""
    return f"run `{about['id']}`, " + (f"[{about['url']}]({about['url']})" if about.get("url") else "offline")


def lab_entry(folder: Path, found: dict, name: str, e: dict) -> tuple[list, list[Block]]:
    """Summary row and log entry of an experiment of the lab, over its seeds."""
    runs = {seed: folder / f"{name}-s{seed}" for seed in e.get("seeds") or {}}
    records = {seed: read_json(run / "run.json") for seed, run in runs.items()}
    lines = {seed: read_jsonl(run / "metrics.jsonl") for seed, run in runs.items()}
    first = next(iter(runs), None)
    losses = [loss for some in lines.values() if (loss := train_loss_of(some)) is not None]
    loss = e["train_loss"]["mean"] if "train_loss" in e else statistics.fmean(losses) if losses else None
    started = str(records[first].get("started", "")) if first else ""
    gap = signed(e.get("difference"), 1, 4)
    speed = f"{e['tokens_per_second']['mean']:,.0f}"
    results = [f"validation loss {e['val_loss']['mean']:.4f}"] if "val_loss" in e else []
    results.append(f"{e['bits_per_byte']['mean']:.4f} bits/byte")
    results += [f"training loss {loss:.4f}"] if loss is not None else []
    results.append(f"{speed} tokens/s, mean of {len(runs) or found.get('seeds', 1)} seeds")
    verdict = "the baseline" if name == "baseline" else e.get("verdict", "")
    addresses = [f"seed {seed}: {words}" for seed, run in records.items() if (words := wandb_words(run))]
    said, _ = observations(lines[first]) if first and lines[first] else ([], [])
    words = {
        "Date": started or "unknown",
        "Hypothesis": e.get("hypothesis")
        or ("what the others are compared with" if name == "baseline" else "none"),
        "Change": change_of(folder, name, first, e),
        "Results": ", ".join(results),
        "Comparison": f"{gap} bits/byte from the baseline, 95 % interval over the seeds: {verdict}"
        if gap
        else "",
        "wandb": "; ".join(addresses),
        "Observations": " ".join(said),
        "Next steps": lab_next_step(found, name, e),
    }
    blocks: list[Block] = [Text(f"**{key}**: {value}") for key, value in words.items() if value]
    row = [name, f"lab, {folder.name}", started[:10], four_digits(e.get("val_loss", {}).get("mean"))]
    row += [four_digits(loss), speed, gap and f"{gap} bits/byte", verdict]
    if any(lines.values()):
        blocks.append(lab_curves(folder, name, lines))
    return row, blocks


def change_of(folder: Path, name: str, seed: str | None, e: dict) -> str:
    """The settings that differ from the baseline's, where both run folders are here, and the command."""
    settings = [
        read_json(folder / f"{n}-s{seed}" / "run.json").get("settings") or {} for n in (name, "baseline")
    ]
    free = ("name", "hypothesis", "baseline", "seed")
    differ = [
        k
        for k in settings[0]
        if k not in free and json.dumps(settings[0][k]) != json.dumps(settings[1].get(k))
    ]
    changes = ", ".join(f"{k}={settings[0][k]}" for k in differ) if all(settings) else ""
    command = f"`{e.get('command', 'unknown')}`"
    return f"`{changes}`; {command}" if changes else command


def lab_next_step(found: dict, name: str, e: dict) -> str:
    """The next step that the interval suggests."""
    if found.get("quick"):
        return f"{SMOKE}: run it in full, `python experiments.py --only={name}`."
    difference = e.get("difference") or {}
    if name == "baseline" or not difference:
        return "none"
    if "low" not in difference:
        return f"One seed: no finding. `python experiments.py --only={name} --seeds=3`."
    if difference["high"] < 0:
        return "Adopt it, if its speed and memory allow."
    if difference["low"] > 0:
        return "Leave it out."
    return "Decide by speed and memory; no difference was found."


def lab_curves(folder: Path, name: str, lines: dict[str, list[dict]]) -> Figure:
    """Losses of an experiment, one line per seed, with those of the baseline in grey."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    groups = [(name, lines, "#4477aa")]
    if name != "baseline":
        base = {seed: read_jsonl(folder / f"baseline-s{seed}" / "metrics.jsonl") for seed in lines}
        groups.insert(0, ("baseline", base, "#bbbbbb"))
    for what, some, colour in groups:
        for i, rows in enumerate(some.values()):
            style = {"color": colour, "lw": 1, "label": what if i == 0 else None}
            steps = thinned([x for x in rows if "loss" in x])
            axes[0].plot([x["step"] for x in steps], [x["loss"] for x in steps], **style)
            checks = [x for x in rows if "val_loss" in x]
            axes[1].plot(
                [x["step"] for x in checks], [x["val_loss"] for x in checks], marker="o", ms=3, **style
            )
    axes[0].set(xlabel="step", ylabel="training loss")
    axes[1].set(xlabel="step", ylabel="validation loss")
    axes[0].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    return figure(f"curves-{folder.name}-{name}", f"{name} and the baseline, a line a seed.", fig)
