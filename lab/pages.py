"""The lab's sections of the report: what heads look at, texts beyond the context, what experiments.py and
lab/hardware.py measured. The templates of tables and sentences name the keys of their JSON files.
"""

from support.charts import Line, Panel, canvas, chart, line, saved
from support.pages import Block, Figure, Text, fill, interval, row, shorten, table
from support.results import SMOKE, Records, Run, read_json

# -----------------------------------------------------------------------------
# Heads

SEEN = {  # score of a head: what its map shows
    "previous": "a line just below the diagonal: every token looks at the one before",
    "first": "a full first column: heads park their attention there when nothing else fits",
    "induction": "spots off the diagonal: what followed the same word last time",
    "entropy": "an even shade: the head averages over all it may see",
}


def attention(records: Records) -> list[Block]:
    """What the heads look at, from attention.json of eval.py --attention."""
    blocks: list[Block] = []
    for run in records.folders_with("attention.json"):
        found = read_json(run.folder / "attention.json")
        if not found.get("scores"):
            continue
        stem = stem_of(run)
        blocks.append(head_scores(f"heads-{stem}", run.shown, found["scores"]))
        if copies := found.get("copies"):
            shares = " and ".join(f"{share:.0%} of those of {kind}" for kind, share in copies.items())
            blocks.append(Text(f"Of repeated digits, {shares} are copied (a guess gets a quarter or so)."))
        for i, example in enumerate(found["maps"], 1):
            blocks.append(attention_maps(f"attention-{stem}-{i}", run.shown, example))
            if example.get("inside"):
                blocks.append(inside(f"inside-{stem}-{i}", run.shown, example["inside"]))
    return blocks or [Text("No maps: `python eval.py out/base --attention` makes them.")]


def stem_of(run: Run) -> str:
    """The name of a model's folder as a part of file names."""
    return "-".join(part for part in run.folder.relative_to(run.home).parts if part != "checkpoints")


def head_scores(file: str, name: str, scores: dict[str, list]) -> Figure:
    """Every score as an image (layers, heads)."""
    fig, grid = canvas(1, len(scores), 11, 2.8)
    for axes, (score, values) in zip(grid.flat, scores.items(), strict=True):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set(title=score, xlabel="head", ylabel="layer" if axes is grid[0, 0] else "")
        axes.locator_params(integer=True, min_n_ticks=1)
    fig.colorbar(image, ax=grid, fraction=0.02)
    caption = f"{name}: scores of every head on random tokens that come twice. 1: all of its attention; "
    return saved(file, caption + "of entropy: spread evenly.", fig)


def attention_maps(file: str, name: str, example: dict) -> Figure:
    """The heads of one text: every row is a token, which looks at the columns."""
    labels, heads = [printable(token) for token in example["tokens"]], example["heads"]
    across = min(len(heads), 2 if len(heads) <= 4 else 4)
    down, side = -(-len(heads) // across), 11 / across  # inches
    size = max(3, min(7, 45 * side / len(labels)))  # of letters, in points
    fig, grid = canvas(down, across, side * across, side * down)
    for axes in grid.flat[len(heads) :]:
        axes.set_axis_off()
    for axes, head in zip(grid.flat, heads, strict=False):
        image = axes.imshow(head["weights"], vmin=0, vmax=1, cmap="viridis")
        most = f"most {head['most']}: " if head.get("most") else ""
        axes.set_title(f"{most}layer {head['layer']}, head {head['head']}", fontsize=10)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(len(labels)), labels, fontsize=size)
    fig.tight_layout()
    fig.colorbar(image, ax=grid, fraction=0.02)
    seen = [f"{head['most']}, {SEEN[head['most']]}" for head in heads if head.get("most") in SEEN]
    caption = f"{name}: rows look at columns."
    return saved(file, caption + f" To look for: {'; '.join(seen)}." * bool(seen), fig)


INSIDE = "{name}: surprise of each token; the likeliest next one is {next[0][text]!r} ({next[0][p]:.0%})."
PARTS_SUM = (
    " The parts sum to {parts[sum]:.4f}, the logit is {parts[target][logit]:.4f}. Below the lens: the "
    "likeliest token after each layer."
)


def inside(file: str, name: str, found: dict) -> Figure:
    """One text: how surprising each token was, and, where model.py computed it, who chose the next one."""
    tokens = [token["text"] for token in found["tokens"]]
    panels = [bars("surprise, bits", tokens, [x["bits"] if x else 0 for x in found["surprise"]])]
    caption = fill(INSIDE, found | {"name": name})
    if found["lens"] and "parts" in (found["parts"] or {}):
        layers = [f"{row['top'][0][0]} {row['layer']}" for row in found["lens"]]
        target = printable(found["parts"]["target"]["text"])
        panels.append(bars(f"logit lens: p({target})", layers, [row["target_p"] for row in found["lens"]]))
        largest = sorted(found["parts"]["parts"], key=lambda part: -abs(part["value"]))[:12]
        names = [part["name"] for part in largest]
        panels.append(bars("contributions to its logit", names, [part["value"] for part in largest]))
        caption += fill(PARTS_SUM, found)
    return chart(file, caption, panels)


def bars(title: str, labels: list[str], values: list[float]) -> Panel:
    ticks = dict(enumerate(map(printable, labels)))
    return Panel([Line(range(len(values)), values, form="bar")], "", title=title, ticks=ticks)


def printable(token: str) -> str:
    return token.replace("\n", "⏎").replace(" ", "␣").replace("$", r"\$")


# -----------------------------------------------------------------------------
# Beyond the context


def beyond(records: Records) -> list[Block]:
    """Texts longer than the context, from streams.json of eval.py --streams."""
    blocks: list[Block] = []
    for run in records.folders_with("streams.json"):
        found = read_json(run.folder / "streams.json")
        if found.get("perplexity"):
            blocks.append(Text(f"**{run.shown}**, {found['source']}:"))
            blocks += streams(stem_of(run), {"own": found})
    return blocks or [Text("Not measured: `python eval.py out/base --streams` does it.")]


def streams(corpus: str, found: dict) -> list[Block]:
    """Perplexity and continuations beyond the context, for each attention window."""
    blocks: list[Block] = []
    for name, x in found.items():
        curves = []
        for way, values in x["perplexity"].items():
            curves.append(Line(list(values), list(values.values()), way, "o-"))
        panel = Panel(curves, "position in the text, in contexts", "perplexity", name, log="y")
        caption = f"{name}: a text sixteen times as long as the context. Where a line jumps, the model fails."
        blocks.append(chart(f"streams-{corpus}-{name}", caption, [panel], size=(6.4, 3.8)))
        rows = []
        for way, values in x["continuations"].items():
            cells = {"window, over four contexts": way}
            for key, value in values.items():
                cells[key.replace("_", " ")] = shorten(value) if key == "example" else f"{value:.3f}"
            rows.append(cells)
        blocks.append(table(f"continuations-{corpus}-{name}", rows))
        if endless := x.get("endless"):
            rates, sizes = endless["tokens_per_second"], sorted(set(endless["cache_bytes"]))
            words = f"A stream of {endless['tokens']:,} tokens through {name}: a cache of "
            words += f"{' to '.join(f'{size:,}' for size in sizes)} bytes, "
            blocks.append(Text(words + f"{min(rates):,.0f} to {max(rates):,.0f} tokens/s."))
    return blocks


# -----------------------------------------------------------------------------
# Experiments

EXPERIMENT = """
hypothesis: {hypothesis} | bits/byte: {bits_per_byte[mean]:.4f}
minus baseline [95 %]: {difference:difference} | training loss: {train_loss[mean]:.4f}
tokens/s: {tokens_per_second[mean]:,.0f} | verdict: {verdict}
"""


def lab(records: Records) -> list[Block]:
    """The comparisons with the baseline: a table, a forest plot, and what the families measured beside."""
    blocks: list[Block] = []
    for folder, found in records.labs.items():
        entries = {name: e for name, e in found.get("experiments", {}).items() if "bits_per_byte" in e}
        if not entries:
            continue
        mark = f" ({SMOKE})" * bool(found.get("quick"))
        words = fill("**{corpus}**, seeds: {seeds}, {seconds:minutes} minutes", found)
        blocks.append(Text(f"{words}{mark}."))
        caption = fill("Ablations on {corpus}, seeds: {seeds}", found) + mark
        rows = [{"experiment": name} | row(EXPERIMENT, e) for name, e in entries.items()]
        blocks.append(table(f"lab-{folder.name}", rows, caption))
        blocks += forest_plot(f"forest-{folder.name}", entries)
        for family, measured in found.get("measured", {}).items():
            if measured:
                blocks += FAMILIES[family](folder.name, measured)
    return blocks or [Text("The lab has not run: `bash run_all.sh experiments`.")]


def forest_plot(file: str, entries: dict[str, dict]) -> list[Block]:
    """Differences to the baseline with their intervals, the lowest loss first."""
    gaps = {name: e["difference"] for name, e in entries.items() if "low" in e.get("difference", {})}
    if not gaps:
        return []
    names = sorted(gaps, key=lambda name: gaps[name]["mean"])
    mean, low, high = ([gaps[name][key] for name in names] for key in ("mean", "low", "high"))
    gap = Line(range(len(names)), mean, form="o", low=low, high=high)
    panel = Panel([gap], "", "bits a byte minus the baseline's")
    panel.level, panel.symlog, panel.ticks = 0, 0.1, dict(enumerate(names))
    caption = (
        "Differences to the baseline (down: better) with 95 % intervals over the seeds; where an interval "
    )
    return [chart(file, caption + "crosses the line, no difference was found.", [panel], size=(9, 4))]


GQA = "cache bytes a token: {cache_bytes_per_token} | decoded tokens/s: {tokens_per_second:,.0f}"


def gqa(corpus: str, found: dict) -> list[Block]:
    return [table(f"gqa-{corpus}", [{"key-value heads": name} | row(GQA, x) for name, x in found.items()])]


def moe(corpus: str, found: dict) -> list[Block]:
    """Load and dropped tokens of the router during training, one line per seed."""
    load, dropped, rows = [], [], []
    for i, (name, x) in enumerate(found.items()):
        for seed, run in enumerate(x["routing"].values()):
            label = name if seed == 0 else None
            load.append(Line(run["steps"], run["busiest_expert"], label, style={"color": f"C{i}"}))
            dropped.append(Line(run["steps"], run["dropped"], style={"color": f"C{i}"}))
        bits = ", ".join(f"{layer['bits']:.2f}" for layer in x["classes"])
        rows.append({"mixture": name, "bits that expert and class of a token share, by layer": bits})
    panels = [Panel(load, "step", "load of the busiest expert / even load", level=1)]
    panels.append(Panel(dropped, "step", "choices dropped in a step"))
    caption = "The router during training, one line per seed; 1 is an even load."
    return [chart(f"moe-{corpus}", caption, panels), table(f"moe-{corpus}", rows)]


LAW = (
    "Loss = {E:.3f} + {A:.3g} / N^{a:.2f} + {B:.3g} / D^{b:.2f} for N parameters and D tokens; the runs "
    "deviate by {error:.1%}."
)
SIZE = "FLOPs: {flops:.2e} | parameters: {parameters:count} | tokens: {tokens:count} | loss: {loss:.3f}"


def scaling(corpus: str, found: dict) -> list[Block]:
    """Losses of model sizes at equal FLOPs, their minima, the fitted scaling law and its predictions."""
    law = found.get("law")
    caption = (
        "Model sizes at equal FLOPs (dots), the fitted scaling law (lines), and the minimum of a parabola "
        "through three sizes, if it lies between them (stars)."
    )
    panel = Panel(scaling_curves(found, law), "parameters", "validation loss", log="xy")
    blocks: list[Block] = [chart(f"scaling-{corpus}", caption, [panel], size=(6.4, 4))]
    if sizes := found.get("sizes"):
        blocks.append(Text(f"The best model size grows with FLOPs C as C^{sizes['exponent']:.2f}."))
    if not law:
        return [*blocks, Text("No scaling law fits these runs.")]
    rows = []
    for name, p in found.get("predictions", {}).items():
        predicted = row(SIZE, p)
        predicted["loss"] = predicted["loss"] or "no prediction: the law does not fit its own runs"
        rows.append({"run": f"{name}, predicted best"} | predicted)
        if "has" in p:
            rows.append({"run": f"{name}, as configured"} | row(SIZE, p | {"loss": None} | p["has"]))
    check = found.get("check", {})
    for what, key in (("predicted", "said"), ("measured", "came")):
        if "came" in check:
            rows.append({"run": f"one more run, {what}"} | row(SIZE, check | check[key]))
    blocks.append(Text(fill(LAW, law)))
    if rows:
        words = "Predicted by the fit before any run of that size, in nats per token of this text:"
        blocks += [Text(words), table(f"predicted-{corpus}", rows)]
    return blocks


def scaling_curves(found: dict, law: dict | None) -> list[Line]:
    """For each budget of FLOPs the measured losses, those of the law and the best size."""
    curves, minima = [], {best["budget"]: best for best in found["best"]}
    for i, budget in enumerate(sorted({p["budget"] for p in found["points"]})):
        points = [p for p in found["points"] if p["budget"] == budget]
        curves.append(line(points, "parameters", "loss", f"{budget:.1e} FLOPs", "o", color=f"C{i}"))
        if law:
            for p in points:
                of_size, of_tokens = p["parameters"] ** law["a"], p["tokens"] ** law["b"]
                p["law"] = law["E"] + law["A"] / of_size + law["B"] / of_tokens
            curves.append(line(points, "parameters", "law", color=f"C{i}"))
        best = minima.get(budget, {})
        if best.get("inside"):
            curves.append(line([best], "parameters", "loss", form="*", color=f"C{i}", ms=12))
    return curves


SHAPE = """
parameters: {parameters:count} | rows: {rows} | tokens/s: {tokens_per_second:,.0f}
GiB: {peak_memory_gib:.2f} | rows that 12 GiB would hold, by the plan: {most_rows_in_12_gib:,}
"""


def shapes(corpus: str, found: dict) -> list[Block]:
    return [table(f"shapes-{corpus}", [{"shape": name} | row(SHAPE, x) for name, x in found.items()])]


def transfer(corpus: str, found: dict) -> list[Block]:
    rows = [{"task": task} | {way: interval(x) for way, x in ways.items()} for task, ways in found.items()]
    words = "A task learnt from scratch, by a pretrained model, or from its prompt; percent right."
    return [Text(words), table(f"transfer-{corpus}", rows)]


RACE = """
gpt ends at: {loss:.3f} | steps: {gpt_steps} | seconds: {gpt_seconds:.0f} | modern reaches it at step: {step}
after seconds: {seconds:.0f} | share: {ratio:.2f} | modern ends at: {modern_loss:.3f}
"""


def race(corpus: str, found: dict) -> list[Block]:
    rows = [{"seed": seed} | row(RACE, {"step": "never"} | x) for seed, x in found["seeds"].items()]
    words = "How soon a model with all modern parts reaches a plain GPT's final loss (nats per token)."
    return [Text(words), table(f"race-{corpus}", rows)]


FAMILIES = {
    "gqa": gqa,
    "moe": moe,
    "race": race,
    "streams": streams,
    "scaling": scaling,
    "shapes": shapes,
    "transfer": transfer,
}

# -----------------------------------------------------------------------------
# Machines

MEMORY = """
training step of: {shape} | rows: {rows} | GiB by the plan: {planned:gib} | GiB measured: {measured:gib}
plan is off by %: {off:+.1f}
"""
ATTENTION = """
of: {shape} | torch: {milliseconds[torch]:.1f} | in blocks: {milliseconds[in blocks]:.1f}
times torch: {times:.1f}
"""
STEP = """
config: {config} | rows: {rows} | step: {way} | tokens/s: {rate:,.0f} | % of matrix products: {share:.0f}
"""
KERNELS = "config: {config} | step: {way} | peak GiB: {peak:gib}"
PARTS = (
    "{config}, eager: forward {forward:.0f} ms, backward {backward:.0f} ms, clipping and {optimizer} "
    "{rest:.0f} ms."
)


def machine(records: Records) -> list[Block]:
    """What lab/hardware.py measured here, in hardware.json, and on other machines, in hardware-NAME.json."""
    files = [records.home / "hardware.json", *sorted(records.home.glob("hardware-*.json"))]
    blocks: list[Block] = []
    for number, file in enumerate(file for file in files if file.exists()):
        blocks += one_machine(read_json(file), f"-{number + 1}" if number else "")
    return blocks or [Text("The machine was not measured: `bash run_all.sh hardware`.")]


def one_machine(found: dict, more: str) -> list[Block]:
    """The measurements of one machine. `more` makes the names of its tables unique."""
    words = fill("**{device}**, {threads} threads", found["hardware"])
    peaks = [f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in found.get("matmul", {}).items()]
    blocks: list[Block] = [Text(words + (f"; matrix products reach {', '.join(peaks)}." if peaks else "."))]
    for part, show in PARTS_OF_A_MACHINE.items():
        if found.get(part):
            blocks += show(found, more)
    return blocks


def memory(found: dict, more: str) -> list[Block]:
    """Planned and measured memory of training steps; or why it was not measured, such as out of memory."""
    rows = []
    for r in found["memory"]:
        if "measured" in r:
            rows.append(row(MEMORY, r | {"off": 100 * (r["planned"] / r["measured"] - 1)}))
        else:
            rows.append(row(MEMORY, r) | {"GiB measured": r["error"]})
    words = f"Memory that a training step asks for, within {found['cap_gib']:g} GiB:"
    return [Text(words), table(f"memory{more}", rows)]


def attention_speed(found: dict, more: str) -> list[Block]:
    rows = []
    for r in found["attention"]:
        times = r["milliseconds"]["torch"] / r["milliseconds"]["in blocks"]
        rows.append(row(ATTENTION, r | {"times": times}))
    words = "Attention on a CPU, forward and backward, milliseconds:"
    return [Text(words), table(f"attention-speed{more}", rows)]


def decoding(found: dict, more: str) -> list[Block]:
    rows = []
    for r in found["decoding"]:
        rows += speed_rows("decoding", r["task"], r["tokens_per_second"])
    return [table(f"decoding{more}", rows)]


def data_speed(found: dict, more: str) -> list[Block]:
    return [Text(fill("One core tokenises {encoded_mb_per_second_and_core:.1f} MB/s.", found["data"]))]


def training_steps(found: dict, more: str) -> list[Block]:
    """Speed of the configs' training steps, GPU time by kind of kernel, and the parts of an eager step."""
    speeds, kernels, parts = [], [], []
    for r in found["training"]:
        for way, rate in r["tokens_per_second"].items():
            speeds.append(row(STEP, r | {"way": way, "rate": rate, "share": 100 * r["share_of_matmul"][way]}))
        for way, seconds in r.get("kernels", {}).items():
            cells = row(KERNELS, r | {"way": way, "peak": r["peak_memory"][way]})
            kernels.append(cells | {kind: f"{1000 * x:.1f}" for kind, x in seconds.items()})
        if "forward" in r["seconds"]:
            ways = ("forward", "forward and backward", "eager")
            forward, both, step = (1000 * r["seconds"][way] for way in ways)
            times = {"forward": forward, "backward": both - forward, "rest": step - both}
            parts.append(Text(fill(PARTS, r | times)))
    blocks: list[Block] = [table(f"steps{more}", speeds)]
    if kernels:
        words = "What the GPU did during a step, in milliseconds:"
        blocks += [Text(words), table(f"kernels{more}", kernels)]
    return blocks + parts


def speed_rows(column: str, what: str, rates: dict[str, float]) -> list[dict]:
    """A row per library: tokens/s, and how many times as fast as transformers."""
    template = "by: {by} | tokens/s: {rate:,.0f} | times transformers: {times:.2f}"
    reference = rates.get("transformers") or rates["transformers, eager"]
    rows = []
    for library, rate in rates.items():
        rows.append({column: what} | row(template, {"by": library, "rate": rate, "times": rate / reference}))
    return rows


def other_libraries(found: dict, more: str) -> list[Block]:
    peers = found["peers"]
    rows = speed_rows("what", "a training step", peers["step"]["tokens_per_second"])
    for task, rates in peers["decoding"].items():
        rows += speed_rows("what", f"decoding, {task}", rates)
    words = "Other libraries with the same shape: 6 layers of width 288, float32, on one CPU thread: "
    words += "`python -m lab.hardware --only=peers`."
    shares = peers["step"].get("share_of_matmul", {})
    ours = [library for library in shares if library.startswith("ours")]
    if ours:
        best = max(ours, key=shares.get)
        words += f" Our step, {best.removeprefix('ours, ')}, runs at {shares[best]:.1%} of what large matrix "
        words += "products reach."
    return [Text(words), table(f"peers{more}", rows)]


PARTS_OF_A_MACHINE = {  # of hardware.json
    "memory": memory,
    "training": training_steps,
    "attention": attention_speed,
    "decoding": decoding,
    "peers": other_libraries,
    "data": data_speed,
}
