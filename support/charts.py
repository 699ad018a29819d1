"""Charts as blocks of a page, drawn with matplotlib, which is imported when the first is drawn.

fig, (axes,) = canvas(1)
plot_columns(axes, rows, "step", "val_loss", "validation", "o-")
axes.set(xlabel="step", ylabel="loss")
chart("loss", "The loss of a run.", fig)
"""

import io
from collections.abc import Sequence

from support.pages import Figure

BLUE, RED, GREY = "#4477aa", "#ee6677", "#888888"
POINTS = 1000  # of a line; more cannot be seen in a figure


def canvas(panels: int, width: float = 3.6, height: float = 3.2, columns: int = 0):
    """(matplotlib's figure, the axes of each panel), each of so many inches, `columns` in a row (0: all). Not
    through pyplot, which would keep every figure.
    """
    from matplotlib.figure import Figure as Canvas

    columns = columns or panels
    rows = -(-panels // columns)
    fig = Canvas(figsize=(width * columns, height * rows))
    grid = fig.subplots(rows, columns, squeeze=False).flat
    for axes in grid[panels:]:
        axes.set_axis_off()
    return fig, grid[:panels]


def plot(axes, x: Sequence, y: Sequence, label: str | None = None, form: str = "-", **style):
    """Draws and returns a line. `form`: as in matplotlib, "-" a line, "o-" with points, "o" points alone."""
    if form == "-" and len(x) == 1:  # one point has no line
        form = "o"
    style = {"ms": 4, "lw": 1.2} | style
    return axes.plot(x, y, form, label=label, **style)[0]


def plot_columns(axes, rows: list[dict], x: str, y: str, label: str | None = None, form="-", **style) -> None:
    """A line through the rows that hold both keys, such as those of metrics.jsonl."""
    rows = [row for row in rows if x in row and y in row]
    rows = rows[:: max(1, len(rows) // POINTS)]
    plot(axes, [row[x] for row in rows], [row[y] for row in rows], label, form, **style)


def logarithmic(axes) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")


def name_ticks(axes, names: dict[float, str]) -> None:
    """Ticks of the x axis, by position."""
    long = max(map(len, names.values())) > 3
    axes.set_xticks(list(names), names.values(), rotation=90 if long else 0, fontsize=7)
    axes.minorticks_off()


def chart(name: str, caption: str, fig, title: str = "") -> Figure:
    """Finishes a figure of lines or bars."""
    fig.suptitle(title)
    fig.tight_layout()
    for axes in fig.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return saved(name, caption, fig)


def saved(name: str, caption: str, fig) -> Figure:
    """A matplotlib figure as a block."""
    file = io.BytesIO()
    fig.savefig(file, format="png", dpi=80, bbox_inches="tight")
    return Figure(name, caption, file.getvalue())
