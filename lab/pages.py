"""The report's sections of the lab: what experiments.py and hardware.py measured."""

from pathlib import Path

from support.pages import Block, Figure, Table, Text, count, figure, minutes, plt, shorten, signed
from support.results import SMOKE, read_json


def lab(home: Path) -> list[Block]:
    """The comparisons with the baseline: a table, a forest plot, and pages of the families."""
    blocks: list[Block] = []
    for file in sorted(home.glob("experiments/*/experiments.json")):
        found = read_json(file)
        entries = {k: e for k, e in found.get("experiments", {}).items() if "bits_per_byte" in e}
        if not entries:
            continue
        seeds = f"{found['seeds']} seed{'s' * (found['seeds'] > 1)}"
        words = f"**{found['corpus']}**, {seeds}, {minutes(found['seconds'])} minutes"
        blocks.append(Text(words + (f": a quick run, {SMOKE}." if found.get("quick") else ".")))
        rows = [experiment_row(name, e) for name, e in entries.items()]
        columns = [
            "experiment",
            "hypothesis",
            "bits/byte",
            "minus baseline [95 %]",
            "training loss",
            "tokens/s",
        ]
        columns.append("verdict")
        caption = f"Ablations on {found['corpus']}, {seeds}" + f" ({SMOKE})" * bool(found.get("quick"))
        blocks.append(Table(f"lab-{file.parent.name}", columns, rows, caption))
        gaps = [(n, e["difference"]) for n, e in entries.items() if "low" in e.get("difference", {})]
        if gaps:
            blocks.append(forest_plot(file.parent.name, gaps))
        for family, part in MEASURED.items():
            if what := found.get("measured", {}).get(family):
                blocks += part(file.parent.name, what)
    return blocks or [Text("The lab has not run: `bash run_all.sh experiments`.")]


def forest_plot(name: str, gaps: list[tuple[str, dict]]) -> Figure:
    """Differences to the baseline with their intervals, the best first."""
    gaps = sorted(gaps, key=lambda x: x[1]["mean"])
    fig, axes = plt.subplots(figsize=(7, 0.26 * len(gaps) + 1))
    for i, (_, d) in enumerate(gaps):
        colour = "#228833" if d["high"] < 0 else "#ee6677" if d["low"] > 0 else "#888888"
        axes.plot([d["low"], d["high"]], [i, i], color=colour)
        axes.plot(d["mean"], i, "o", color=colour, ms=4)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(gaps)), [n for n, _ in gaps])
    axes.set_xscale("symlog", linthresh=0.05)
    axes.set_xlabel("bits a byte minus the baseline's (left: better)")
    caption = "Differences to the baseline with 95 % intervals over the seeds; grey: no difference found."
    return figure(f"forest-{name}", caption, fig)


def experiment_row(name: str, e: dict) -> list:
    gap = signed(e.get("difference"), 1, 4)
    train_loss = f"{e['train_loss']['mean']:.4f}" if "train_loss" in e else ""
    speed = f"{e['tokens_per_second']['mean']:,.0f}"
    return [name, e["hypothesis"], f"{e['bits_per_byte']['mean']:.4f}", gap, train_loss, speed,
            e.get("verdict", "")]  # fmt: skip


def gqa(corpus: str, found: dict) -> list[Block]:
    rows = [[name, x["cache_bytes_per_token"], f"{x['tokens_per_second']:,.0f}"] for name, x in found.items()]
    return [Table(f"gqa-{corpus}", ["key-value heads", "cache bytes a token", "decoded tokens/s"], rows)]


def moe(corpus: str, found: dict) -> list[Block]:
    """Load and dropped tokens of the router during training, one line per seed."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    rows = []
    for i, (name, x) in enumerate(found.items()):
        for j, run in enumerate(x["routing"].values()):
            style = {"color": f"C{i}", "lw": 1, "label": name if j == 0 else None}
            axes[0].plot(run["steps"], run["busiest_expert"], **style)
            axes[1].plot(run["steps"], run["dropped"], **style)
        bits = ", ".join(f"{layer['bits']:.2f}" for layer in x["classes"])
        rows.append([name, bits])
    axes[0].axhline(1, color="#888888", ls=":")
    axes[0].set(xlabel="step", ylabel="load of the busiest expert / even load")
    axes[1].set(xlabel="step", ylabel="choices dropped in a step")
    axes[0].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    caption = "The router during training, one line per seed; 1 is an even load."
    columns = ["mixture", "mutual information of expert and class of a token, bits, by layer"]
    return [figure(f"moe-{corpus}", caption, fig), Table(f"moe-{corpus}", columns, rows)]


def streams(corpus: str, found: dict) -> list[Block]:
    """Perplexity and continuations beyond the context, for each attention window."""
    blocks: list[Block] = []
    for name, x in found.items():
        fig, axes = plt.subplots(figsize=(6.4, 3.8))
        for way, values in x["perplexity"].items():
            axes.plot(list(values), list(values.values()), "o-", ms=4, label=way)
        axes.set_yscale("log")
        axes.set(xlabel="position in the text, in contexts", ylabel="perplexity", title=name)
        axes.legend(frameon=False, fontsize=8)
        caption = f"{name}: a text sixteen times as long as the context. Where a line jumps, the model fails."
        blocks.append(figure(f"streams-{corpus}-{name}", caption, fig))
        scores = x["continuations"]
        keys = [k for k in next(iter(scores.values())) if k != "example"]
        rows = [[way, *(f"{v[k]:.3f}" for k in keys), shorten(v["example"])] for way, v in scores.items()]
        columns = ["window, over four contexts", *(k.replace("_", " ") for k in keys), "end of an example"]
        blocks.append(Table(f"continuations-{corpus}-{name}", columns, rows))
        if endless := x.get("endless"):
            rates, sizes = endless["tokens_per_second"], sorted(set(endless["cache_bytes"]))
            words = f"A stream of {endless['tokens']:,} tokens through {name}: a cache of "
            words += f"{' to '.join(f'{s:,}' for s in sizes)} bytes, "
            words += f"{min(rates):,.0f} to {max(rates):,.0f} tokens/s."
            blocks.append(Text(words))
    return blocks


def scaling(corpus: str, found: dict) -> list[Block]:
    """Losses of model sizes at equal FLOPs, their minima, the fitted scaling law and its predictions."""
    fig, axes = plt.subplots(figsize=(6.4, 4))
    minima, law = {b["budget"]: b for b in found["best"]}, found.get("law")
    for i, budget in enumerate(sorted({p["budget"] for p in found["points"]})):
        points = [p for p in found["points"] if p["budget"] == budget]
        sizes = [p["parameters"] for p in points]
        axes.plot(sizes, [p["loss"] for p in points], "o", color=f"C{i}", label=f"{budget:.1e} FLOPs", ms=4)
        if law:
            by_law = [law["E"] + law["A"] / p["parameters"] ** law["a"] + law["B"] / p["tokens"] ** law["b"]
                      for p in points]  # fmt: skip
            axes.plot(sizes, by_law, "-", color=f"C{i}", lw=1)
        if minima.get(budget, {}).get("inside"):
            axes.plot(minima[budget]["parameters"], minima[budget]["loss"], "*", color=f"C{i}", ms=12)
    axes.set(xlabel="parameters", ylabel="validation loss", xscale="log", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False)
    caption = (
        "Model sizes at equal FLOPs (dots), the fitted scaling law (lines), and the minimum of a parabola "
        "through three sizes, if it lies between them (stars)."
    )
    blocks: list[Block] = [figure(f"scaling-{corpus}", caption, fig)]
    predictions, sizes = found.get("predictions", {}), found.get("sizes")
    if sizes:
        blocks.append(Text(f"The best model size grows with FLOPs C as C^{sizes['exponent']:.2f}."))
    if not law:
        return [*blocks, Text("No scaling law fits these runs.")]
    blocks.append(Text(
        f"Loss = {law['E']:.3f} + {law['A']:.3g} / N^{law['a']:.2f} + {law['B']:.3g} / D^{law['b']:.2f} "
        f"for N parameters and D tokens; the runs deviate by {100 * law['error']:.1f} %."
    ))  # fmt: skip
    rows = []
    for name, p in predictions.items():
        loss = f"{p['loss']:.3f}" if "loss" in p else "no prediction: the law does not fit its own runs"
        rows.append(
            [f"{name}, predicted best", f"{p['flops']:.2e}", count(p["parameters"]), count(p["tokens"]), loss]
        )
        if "has" in p:
            rows.append(
                [f"{name}, as configured", f"{p['flops']:.2e}", *(count(v) for v in p["has"].values()), ""]
            )
    columns = ["run", "FLOPs", "parameters", "tokens", "loss"]
    check = found.get("check", {})
    if "came" in check:
        for who, p in (("one more run, predicted", check["said"]), ("one more run, measured", check["came"])):
            rows.append([who, f"{check['flops']:.2e}", count(p["parameters"]), count(p["tokens"]),
                         f"{p['loss']:.3f}"])  # fmt: skip
    if not rows:
        return blocks
    words = "Predicted by the fit before any run of that size, in nats per token of this text:"
    return [*blocks, Text(words), Table(f"predicted-{corpus}", columns, rows)]


def shapes(corpus: str, found: dict) -> list[Block]:
    rows = []
    for name, x in found.items():
        speed, memory = f"{x['tokens_per_second']:,.0f}", f"{x['peak_memory_gib']:.2f}"
        rows.append([name, count(x["parameters"]), x["rows"], speed, memory, f"{x['most_rows_in_12_gib']:,}"])
    columns = ["shape", "parameters", "rows", "tokens/s", "GiB", "rows that 12 GiB would hold, by the plan"]
    return [Table(f"shapes-{corpus}", columns, rows)]


def transfer(corpus: str, found: dict) -> list[Block]:
    def cell(x: dict) -> str:
        return f"{x['mean']:.1f}" + (f" [{x['low']:.1f}, {x['high']:.1f}]" if "low" in x else "")

    ways = list(next(iter(found.values())))
    rows = [[task, *(cell(x[way]) for way in ways)] for task, x in found.items()]
    words = "A task learnt from scratch, by a pretrained model, or from its prompt; percent right."
    return [Text(words), Table(f"transfer-{corpus}", ["task", *ways], rows)]


def race(corpus: str, found: dict) -> list[Block]:
    rows = []
    for seed, x in found["seeds"].items():
        there = [x["step"], f"{x['seconds']:.0f}", f"{x['ratio']:.2f}"] if "ratio" in x else ["never", "", ""]
        rows.append([seed, f"{x['loss']:.3f}", x["gpt_steps"], f"{x['gpt_seconds']:.0f}", *there,
                     f"{x['modern_loss']:.3f}"])  # fmt: skip
    columns = ["seed", "gpt ends at", "steps", "seconds", "modern reaches it at step", "seconds", "share"]
    columns.append("modern ends at")
    words = "How soon a model with all modern parts reaches a plain GPT's final loss (nats per token)."
    return [Text(words), Table(f"race-{corpus}", columns, rows)]


MEASURED = {
    "gqa": gqa,
    "moe": moe,
    "race": race,
    "streams": streams,
    "scaling": scaling,
    "shapes": shapes,
    "transfer": transfer,
}


def machine(home: Path) -> list[Block]:
    """What hardware.py measured here, in hardware.json, and on other machines, in hardware-NAME.json."""
    files = [home / "hardware.json", *sorted(home.glob("hardware-*.json"))]
    blocks = [b for i, file in enumerate(f for f in files if f.exists()) for b in one_machine(file, i)]
    return blocks or [Text("The machine was not measured: `bash run_all.sh hardware`.")]


def one_machine(file: Path, number: int) -> list[Block]:
    """The measurements of one machine. `number`: 0 for this machine; it makes the names of tables unique."""
    found, more = read_json(file), f"-{number + 1}" if number else ""
    peaks = [f"{x / 1e12:.3g} TFLOP/s in {dtype}" for dtype, x in found.get("matmul", {}).items()]
    words = f"**{found['hardware']['device']}**, {found['hardware']['threads']} threads"
    blocks: list[Block] = [Text(words + (f"; matrix products reach {', '.join(peaks)}." if peaks else "."))]
    if rows := found.get("memory"):
        blocks += [Text(f"Memory that a training step asks for, within {found['cap_gib']:g} GiB:")]
        blocks += [memory_table(rows, more)]
    if rows := found.get("training"):
        blocks += training_steps(rows, more)
    if rows := found.get("attention"):
        both = [(r["shape"], r["milliseconds"]["torch"], r["milliseconds"]["in blocks"]) for r in rows]
        cells = [[shape, f"{a:.1f}", f"{b:.1f}", f"{a / b:.1f}"] for shape, a, b in both]
        blocks += [Text("Attention on a CPU, forward and backward, milliseconds:")]
        blocks += [Table(f"attention-speed{more}", ["of", "torch", "in blocks", "times torch"], cells)]
    if rows := found.get("decoding"):
        cells = []
        for r in rows:
            cells += speed_rows(r["task"], r["tokens_per_second"], "transformers")
        blocks += [Table(f"decoding{more}", ["decoding", "by", "tokens/s", "times transformers"], cells)]
    if peers := found.get("peers"):
        blocks += other_libraries(peers, more)
    if rate := found.get("data", {}).get("encoded_mb_per_second_and_core"):
        blocks.append(Text(f"One core tokenises {rate:.1f} MB/s."))
    return blocks


def memory_table(rows: list[dict], more: str) -> Table:
    cells = []
    for r in rows:
        planned = f"{r['planned'] / 2**30:.2f}"
        if "measured" in r:
            error = f"{100 * (r['planned'] / r['measured'] - 1):+.1f}"
            cells.append([r["shape"], r["rows"], planned, f"{r['measured'] / 2**30:.2f}", error])
        else:
            cells.append([r["shape"], r["rows"], planned, r["error"], ""])
    columns = ["training step of", "rows", "GiB by the plan", "GiB measured", "plan is off by %"]
    return Table(f"memory{more}", columns, cells)


def training_steps(rows: list[dict], more: str) -> list[Block]:
    """Speed of the configs' training steps, GPU time by kind of kernel, and the parts of an eager step."""
    cells, kernels = [], []
    for r in rows:
        for way, rate in r["tokens_per_second"].items():
            share = f"{100 * r['share_of_matmul'][way]:.0f}"
            cells.append([r["config"], r["rows"], way, f"{rate:,.0f}", share])
        kernels += [(r, way, seconds) for way, seconds in r.get("kernels", {}).items()]
    columns = ["config", "rows", "step", "tokens/s", "% of matrix products"]
    blocks: list[Block] = [Table(f"steps{more}", columns, cells)]
    if kernels:
        kinds = list(dict.fromkeys(kind for _, _, seconds in kernels for kind in seconds))
        cells = []
        for r, way, seconds in kernels:
            peak = f"{r['peak_memory'][way] / 2**30:.2f}"
            cells.append([r["config"], way, peak, *(f"{1000 * seconds.get(kind, 0):.1f}" for kind in kinds)])
        blocks += [Text("What the GPU did during a step, in milliseconds:")]
        blocks += [Table(f"kernels{more}", ["config", "step", "peak GiB", *kinds], cells)]
    for r in rows:
        if "forward" not in r["seconds"]:
            continue
        ways = ("forward", "forward and backward", "eager")
        forward, both, all_of_it = (1000 * r["seconds"][way] for way in ways)
        words = f"{r['config']}, eager: forward {forward:.0f} ms, backward {both - forward:.0f} ms, "
        words += f"clipping and {r['optimizer']} {all_of_it - both:.0f} ms."
        blocks.append(Text(words))
    return blocks


def speed_rows(what: str, rates: dict[str, float], reference: str) -> list[list]:
    """A row per library: tokens/s, and how many times as fast as the reference."""
    return [[what, who, f"{rate:,.0f}", f"{rate / rates[reference]:.2f}"] for who, rate in rates.items()]


def other_libraries(peers: dict, more: str) -> list[Block]:
    cells = speed_rows("a training step", peers["step"]["tokens_per_second"], "transformers, eager")
    for task, rates in peers["decoding"].items():
        cells += speed_rows(f"decoding, {task}", rates, "transformers")
    words = "Other libraries with the same shape: 6 layers of width 288, float32, on one CPU thread: "
    words += "`OMP_NUM_THREADS=1 python -m lab.peers --what=step,decoding --compile`."
    if shares := peers["step"].get("share_of_matmul"):
        best = max((s, who) for who, s in shares.items() if who.startswith("ours"))
        how = best[1].removeprefix("ours, ")
        words += f" Our step, {how}, runs at {best[0]:.1%} of what large matrix products reach."
    return [Text(words), Table(f"peers{more}", ["what", "by", "tokens/s", "times transformers"], cells)]
