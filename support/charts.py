"""Charts as blocks of a page, through matplotlib, which is imported when the first is drawn.

curves = [line(rows, "step", "loss", label="training"), line(rows, "step", "val_loss", form="o-")]
chart("loss", "The loss of a run.", [Panel(curves, "step", "loss")])
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from support.pages import Figure

BLUE, RED, GREY = "#4477aa", "#ee6677", "#888888"
POINTS = 1000  # of a line; more cannot be seen in a figure


@dataclass
class Line:
    """A line of a panel. `form`: as in matplotlib, "-" a line, "o-" with points, "o" points alone; or "bar".

    low, high: ends of the intervals around y, drawn as a band or, around points alone, as error bars.
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str | None = None
    form: str = "-"
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: dict = field(default_factory=dict)  # color, lw, alpha, ...


def line(rows: list[dict], x: str, y: str, label: str | None = None, form: str = "-", **style) -> Line:
    """A line through the rows that hold both keys, such as those of metrics.jsonl."""
    rows = [row for row in rows if x in row and y in row]
    rows = rows[:: max(1, len(rows) // POINTS)]
    return Line([row[x] for row in rows], [row[y] for row in rows], label, form, style=style)


@dataclass
class Panel:
    lines: list[Line]
    xlabel: str
    ylabel: str = ""
    title: str = ""
    log: str = ""  # the logarithmic axes: "x", "y" or "xy"
    symlog: float = 0  # y axis: linear up to this distance from 0, logarithmic beyond
    level: float | None = None  # a dotted horizontal line
    level_label: str | None = None
    ticks: dict[float, str] | None = None  # labels of the x axis


def chart(
    name: str, caption: str, panels: list[Panel], columns: int = 0, size=(3.6, 3.2), title: str = ""
) -> Figure:
    """A Figure of panels beside each other, `columns` in a row; `size` of one: width and height in inches."""
    fig, grid = canvas(len(panels), columns or len(panels), *size)
    for axes, panel in zip(grid, panels, strict=True):
        draw(axes, panel)
    fig.suptitle(title)
    fig.tight_layout()
    return saved(name, caption, fig)


def draw(axes, panel: Panel) -> None:
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
    for curve in panel.lines:
        draw_line(axes, curve)
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, ls=":", label=panel.level_label)
    if "x" in panel.log:
        axes.set_xscale("log")
    if "y" in panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    if panel.symlog:
        axes.set_yscale("symlog", linthresh=panel.symlog)
    if panel.ticks:
        long = max(map(len, panel.ticks.values())) > 3
        axes.set_xticks(list(panel.ticks), panel.ticks.values(), rotation=90 if long else 0, fontsize=7)
        axes.minorticks_off()
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def draw_line(axes, curve: Line) -> None:
    if curve.form == "bar":
        axes.bar(curve.x, curve.y, color=BLUE)
        return
    form = "o" if curve.form == "-" and len(curve.x) == 1 else curve.form  # one point has no line
    (drawn,) = axes.plot(curve.x, curve.y, form, label=curve.label, **{"ms": 4, "lw": 1.2} | curve.style)
    if curve.low and form == "o":
        axes.vlines(curve.x, curve.low, curve.high, color=drawn.get_color())
    elif curve.low:
        axes.fill_between(curve.x, curve.low, curve.high, color=drawn.get_color(), alpha=0.12, lw=0)


def canvas(panels: int, columns: int, width: float, height: float):
    """(matplotlib's figure, the axes of each panel), `columns` in a row, each of so many inches. Not through
    pyplot, which would keep every figure.
    """
    from matplotlib.figure import Figure as Canvas

    rows = -(-panels // columns)
    fig = Canvas(figsize=(width * columns, height * rows))
    grid = fig.subplots(rows, columns, squeeze=False).flat
    for axes in grid[panels:]:
        axes.set_axis_off()
    return fig, grid[:panels]


def saved(name: str, caption: str, fig) -> Figure:
    """A matplotlib figure as a block."""
    for axes in fig.axes:
        if not axes.images and axes.get_label() != "<colorbar>":
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=80, bbox_inches="tight")
    return Figure(name, caption, file.getvalue())
