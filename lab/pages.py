"""The lab's sections of the report: what heads look at, texts beyond the context, what lab/experiments.py and
lab/hardware.py measured. The templates of tables and sentences name the keys of their JSON files.
"""

from support.charts import BLUE, GREY, canvas, chart, logarithmic, name_ticks, plot, plot_columns, saved
from support.pages import Block, Figure, Table, fill, lines_of, row, rows_of, say
from support.results import SMOKE, Records, Run, read_json_or_empty

# -----------------------------------------------------------------------------
# Heads

LOOK_FOR = """
{run.shown}: rows look at columns. Of a head that looks at the token before, look for a line below the \
diagonal; at the first token: a full first column; of an induction head: spots off the diagonal, at what \
followed the same word last time.
"""
SCORES = """
{run.shown}: scores of every head on random tokens that come twice. 1: all of its attention; of entropy: \
spread evenly.
"""
SURPRISE = """
{run.shown}: surprise of each token; the likeliest next one is {next[0][text]!r} ({next[0][p]:.0%}).
"""
PARTS = """
The parts sum to {parts[sum]:.4f}, the logit is {parts[target][logit]:.4f}. Below the lens: the likeliest \
token after each layer.
"""


def attention(records: Records) -> list[Block]:
    """What the heads look at, from attention.json of eval.py --attention."""
    return records.each(records.with_file("attention.json"), heads)


def heads(run: Run) -> list[Block]:
    """Scores of all heads, maps of the foremost, and what is behind a token."""
    found, name = read_json_or_empty(run.folder / "attention.json"), stem_of(run)
    if not found.get("scores"):
        return []
    blocks = [images(f"heads-{name}", fill(SCORES, run=run), found["scores"], len(found["scores"]))]
    for kind, share in found.get("copies", {}).items():
        words = "Of repeated digits in {kind}, {share:.0%} are copied (a guess gets a quarter or so)."
        blocks += say(words, kind=kind, share=share)
    for i, example in enumerate(found["maps"], 1):
        labels = [printable(token) for token in example["tokens"]]
        maps = {fill("{most} layer {layer}, head {head}", **x): x["weights"] for x in example["heads"]}
        across = 2 if len(maps) <= 4 else 4
        caption = fill(LOOK_FOR, run=run)
        blocks.append(images(f"attention-{name}-{i}", caption, maps, across, labels))
        if example.get("inside"):
            blocks.append(inside(f"inside-{name}-{i}", run, example["inside"]))
    return blocks


def stem_of(run: Run) -> str:
    """The name of a model's folder as a part of file names."""
    return "-".join(run.folder.relative_to(run.home).parts)


def images(name: str, caption: str, pictures: dict, across: int, labels: list[str] | None = None) -> Figure:
    """Matrices of values from 0 to 1 as images, `across` in a row: (layers, heads), or of labelled tokens."""
    side = 11 / across  # inches
    fig, grid = canvas(len(pictures), side, side, across)
    for axes, (title, values) in zip(grid, pictures.items(), strict=True):
        axes.set_title(title, fontsize=10)
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="equal" if labels else "auto")
        if labels:
            size = max(3, min(7, 45 * side / len(labels)))  # of letters, in points
            axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
            axes.set_yticks(range(len(labels)), labels, fontsize=size)
        else:
            axes.set(xlabel="head", ylabel="layer")
            axes.locator_params(integer=True, min_n_ticks=1)
    fig.tight_layout()
    fig.colorbar(image, ax=fig.axes, fraction=0.02)
    return saved(name, caption.strip(), fig)


def inside(name: str, run: Run, found: dict) -> Figure:
    """One text: how surprising each token was, and, where model.py computed it, who chose the next one."""
    parts = found.get("parts") or {}
    computed = found["lens"] and "parts" in parts
    fig, grid = canvas(3 if computed else 1)
    tokens = [token["text"] for token in found["tokens"]]
    bars(grid[0], "surprise, bits", tokens, [x["bits"] if x else 0 for x in found["surprise"]])
    if computed:
        layers = [f"{x['top'][0][0]} {x['layer']}" for x in found["lens"]]
        target = printable(parts["target"]["text"])
        bars(grid[1], f"logit lens: p({target})", layers, [x["target_p"] for x in found["lens"]])
        largest = sorted(parts["parts"], key=lambda part: -abs(part["value"]))[:12]
        names = [part["name"] for part in largest]
        bars(grid[2], "contributions to its logit", names, [part["value"] for part in largest])
    return chart(name, " ".join(lines_of(SURPRISE + PARTS, run=run, **found)), fig)


def bars(axes, title: str, labels: list[str], values: list[float]) -> None:
    axes.set(title=title)
    axes.bar(range(len(values)), values, color=BLUE)
    name_ticks(axes, dict(enumerate(map(printable, labels))))


def printable(token: str) -> str:
    return token.replace("\n", "⏎").replace(" ", "␣").replace("$", r"\$")


# -----------------------------------------------------------------------------
# Beyond the context

ENDLESS = """
A stream of {tokens:,} tokens through {name}: a cache of {bytes} bytes, {slowest:,.0f} to {fastest:,.0f} \
tokens/s.
"""
CONTINUATION = """
window, over four contexts: {key} | distinct 2: {distinct_2:.3f} | repeated 4: {repeated_4:.3f}
loops: {loops:.3f} | topic: {topic:.3f} | perplexity of the end: {perplexity_of_the_end:.3f}
example: {example:shorten}
"""
JUMPS = "a text sixteen times as long as the context. Where a line jumps, the model fails."


def beyond(records: Records) -> list[Block]:
    """Texts longer than the context, from streams.json of eval.py --streams."""
    return records.each(records.with_file("streams.json"), own_streams)


def own_streams(run: Run) -> list[Block]:
    found = read_json_or_empty(run.folder / "streams.json")
    if not found.get("perplexity"):
        return []
    words = say("**{run.shown}**, {source}:", run=run, source=found["source"])
    return words + streams(stem_of(run), {"own": found})


def streams(corpus: str, found: dict) -> list[Block]:
    """Perplexity and continuations beyond the context, for each attention window."""
    blocks = []
    for name, x in found.items():
        fig, (axes,) = canvas(1, 6.4, 3.8)
        for way, ys in x["perplexity"].items():
            plot(axes, list(ys), list(ys.values()), way, "o-")
        axes.set(xlabel="position in the text, in contexts", ylabel="perplexity", title=name)
        logarithmic(axes)
        blocks.append(chart(f"streams-{corpus}-{name}", f"{name}: {JUMPS}", fig))
        rows = rows_of(CONTINUATION, x["continuations"])
        blocks.append(Table(f"continuations-{corpus}-{name}", rows))
        if endless := x.get("endless"):
            sizes = [f"{size:,}" for size in sorted(set(endless["cache_bytes"]))]
            rates = endless["tokens_per_second"]
            blocks += say(
                ENDLESS,
                name=name,
                tokens=endless["tokens"],
                bytes=" to ".join(sizes),
                slowest=min(rates),
                fastest=max(rates),
            )
    return blocks


# -----------------------------------------------------------------------------
# Experiments

EXPERIMENT = """
experiment: {key} | hypothesis: {hypothesis} | bits/byte: {bits_per_byte[mean]:.4f}
minus baseline [95 %]: {difference:difference} | training loss: {train_loss[mean]:.4f}
tokens/s: {tokens_per_second[mean]:,.0f} | verdict: {verdict}
"""
FOREST = """
Differences to the baseline (down: better) with 95 % intervals over the seeds; where an interval crosses the \
line, no difference was found.
"""


def lab(records: Records) -> list[Block]:
    """The comparisons with the baseline: a table, a forest plot, and what the families measured beside."""
    return records.each(records.labs, one_lab)


def one_lab(found: dict) -> list[Block]:
    experiments, name = found["experiments"], found["folder"].name
    if not experiments:
        return []
    values = found | {"mark": f" ({SMOKE})" * found["quick"]}
    caption = fill("Ablations on {corpus}, seeds: {seeds}{mark}", **values)
    blocks = say("**{corpus}**, seeds: {seeds}, {seconds:minutes} minutes{mark}.", **values)
    blocks.append(Table(f"lab-{name}", rows_of(EXPERIMENT, experiments), caption))
    gaps = {key: e["difference"] for key, e in experiments.items() if "low" in e["difference"]}
    if gaps:
        blocks.append(forest_plot(f"forest-{name}", gaps))
    for family, measured in found.get("measured", {}).items():
        if measured and family in TABLES:
            words, template = TABLES[family]
            table = Table(f"{family}-{name}", rows_of(template, measured.get("seeds", measured)))
            blocks += [*say(words), table]
        elif measured and family in FAMILIES:
            blocks += FAMILIES[family](name, measured)
    return blocks


def forest_plot(name: str, gaps: dict[str, dict]) -> Figure:
    """Differences to the baseline with their intervals, the lowest loss first."""
    names = sorted(gaps, key=lambda name: gaps[name]["mean"])
    mean, low, high = ([gaps[name][key] for name in names] for key in ("mean", "low", "high"))
    fig, (axes,) = canvas(1, 9, 4)
    plot(axes, range(len(names)), mean, form="o")
    axes.vlines(range(len(names)), low, high)
    axes.axhline(0, color=GREY, ls=":")
    axes.set(ylabel="bits a byte minus the baseline's")
    axes.set_yscale("symlog", linthresh=0.1)
    name_ticks(axes, dict(enumerate(names)))
    return chart(name, FOREST.strip(), fig)


TABLES = {  # family: a sentence, and the columns of its table
    "gqa": ("", "key-value heads: {key} | cache bytes a token: {cache_bytes_per_token} | "
                "decoded tokens/s: {tokens_per_second:,.0f}"),
    "moe": ("""Mixtures of experts: the load of the busiest over an even one, choices that a step drops, and \
the bits that a token's expert tells about its class (a digit, a word, ...).""", """
mixture: {key} | busiest at first: {first:.2f} | busiest at last: {last:.2f} | dropped: {dropped:,.0f}
bits of the class: {bits:.2f}
"""),
    "shapes": ("", """
shape: {key} | parameters: {parameters:count} | rows: {rows} | tokens/s: {tokens_per_second:,.0f}
GiB: {peak_memory_gib:.2f} | rows that 12 GiB would hold, by the plan: {most_rows_in_12_gib:,}
"""),
    "race": ("How soon a model with all modern parts reaches a plain GPT's final loss (nats per token).", """
seed: {key} | gpt ends at: {loss:.3f} | steps: {gpt_steps} | seconds: {gpt_seconds:.0f}
modern reaches it at step: {step} | after seconds: {seconds:.0f} | share: {ratio:.2f}
modern ends at: {modern_loss:.3f}
"""),
    "transfer": ("A task learnt from scratch, by a pretrained model, or from its prompt; percent right.", """
task: {key} | scratch, tuned: {scratch, tuned:interval} | pretrained, tuned: {pretrained, tuned:interval}
prompted, 0 shots: {prompted, 0 shots:interval} | prompted, 4 shots: {prompted, 4 shots:interval}
pretrained - scratch: {pretrained - scratch:interval}
"""),
}  # fmt: skip


LAW = """
Loss = {E:.3f} + {A:.3g} / N^{a:.2f} + {B:.3g} / D^{b:.2f} for N parameters and D tokens; the runs \
deviate by {error:.1%}.
"""
SIZES = "The best model size grows with FLOPs C as C^{exponent:.2f}."
SIZE = """
run: {key} | FLOPs: {flops:.2e} | parameters: {parameters:count} | tokens: {tokens:count} | loss: {loss:.3f}
"""
PREDICTED = """
Predicted by the fit before any run of that size, in nats per token of this text; no loss is predicted by a \
law that does not fit its own runs:
"""


def scaling(name: str, found: dict) -> list[Block]:
    """Losses of model sizes at equal FLOPs, the fitted scaling law and its prediction of one more run."""
    fig, (axes,) = canvas(1, 6.4, 4)
    for budget in sorted({p["budget"] for p in found["points"]}):
        points = [p for p in found["points"] if p["budget"] == budget]
        plot_columns(axes, points, "parameters", "loss", f"{budget:.1e} FLOPs", "o-")
    axes.set(xlabel="parameters", ylabel="validation loss", xscale="log")
    logarithmic(axes)
    blocks = [chart(f"scaling-{name}", "Model sizes at equal FLOPs.", fig)]
    blocks += say(SIZES, **found.get("sizes") or {}) + say(LAW, **found.get("law") or {})
    check = found.get("check") or {}
    sizes = {
        "one more run, predicted": check | check.get("said", {}),
        "one more run, measured": check | check.get("came", {}),
    }
    rows = [cells for cells in rows_of(SIZE, sizes) if cells["FLOPs"]]
    return blocks + ([*say(PREDICTED), Table(f"predicted-{name}", rows)] if rows else [])


FAMILIES = {"streams": streams, "scaling": scaling}

# -----------------------------------------------------------------------------
# Machines

MACHINE = """
**{hardware[device]}**, {hardware[threads]} threads
Large matrix products reach {peaks}.
One core tokenises {data[encoded_mb_per_second_and_core]:.1f} MB/s.
"""
MEMORY = """
what: {shape} | rows: {rows} | GiB by the plan: {planned:gib} | GiB measured: {measured:gib}
not measured: {error}
"""
STEP = """
config: {config} | rows: {rows} | step: {way} | tokens/s: {value:,.0f} | % of matrix products: {share:.0f}
"""
SPEED = "of: {task} | by: {way} | tokens/s: {value:,.0f} | times transformers: {times:.2f}"
PEERS = """
Other libraries with the same shape: 6 layers of width 288, float32, on one CPU thread: \
`python -m lab.hardware --only=peers`.
"""


BESIDE = ("decoding", "sampling", "lora")  # what is measured beside transformers


def machine(records: Records) -> list[Block]:
    """What lab/hardware.py measured here, in hardware.json, and on other machines, in hardware-NAME.json."""
    home = records.home
    files = [*home.glob("hardware.json"), *sorted(home.glob("hardware-*.json"))]
    return records.each(files, lambda file: one_machine(read_json_or_empty(file), files.index(file) + 1))


def one_machine(found: dict, number: int) -> list[Block]:
    """The measurements of one machine; the names of its tables end in its number, from the second on."""
    peaks = [f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in found.get("matmul", {}).items()]
    blocks = say(MACHINE, **found | {"peaks": ", ".join(peaks) or None})
    peers = found.get("peers", {})
    steps = peers.get("step", {})
    rates = [{"task": f"a training step in {dtype}"} | step for dtype, step in steps.items()]
    for task, by_library in peers.get("decoding", {}).items():
        rates.append({"task": f"decoding, {task}", "tokens_per_second": by_library})
    tables = {
        "memory": (
            "Memory that a training step, or sampling answers, asks for, within {cap_gib:g} GiB:",
            [row(MEMORY, **r) for r in found.get("memory", [])],
        ),
        "steps": ("", [row(STEP, **r) for r in unfolded(found.get("training", []))]),
        "decoding": ("", speeds([r for part in BESIDE for r in found.get(part, [])])),
        "peers": (PEERS, speeds(rates)),
    }
    for name, (words, rows) in tables.items():
        if rows:
            blocks += [*say(words, **found), Table(name + f"-{number}" * (number > 1), rows)]
    return blocks


def unfolded(rows: list[dict]) -> list[dict]:
    """A row for each rate in a row: {"way": its key, "value": tokens/s, "share": percent of a product}."""
    found = []
    for r in rows:
        for way, value in r.get("tokens_per_second", {}).items():
            share = r.get("share_of_matmul", {}).get(way)
            found.append(r | {"way": way, "value": value, "share": share and 100 * share})
    return found


def speeds(rows: list[dict]) -> list[dict]:
    """A row per library: tokens/s, and how many times as fast as transformers."""
    found = []
    for r in unfolded(rows):
        rates = r["tokens_per_second"]
        reference = rates.get("transformers") or rates["transformers, eager"]
        found.append(row(SPEED, **r, times=r["value"] / reference))
    return found
