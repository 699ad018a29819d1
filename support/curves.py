"""Figures of what a run wrote into metrics.jsonl: losses, perplexity, the optimizer, preferences."""

from support.charts import BLUE, GREY, RED, canvas, chart, logarithmic, plot_columns
from support.metrics import perplexity
from support.pages import Block, Figure
from support.results import Run

CLOCKS = {"step": "step", "tokens": "tokens read", "minutes": "minutes"}  # column of a log: label
OPTIMIZER = (  # clock, column of the log, label
    ("step", "learning_rate", "learning rate"),
    ("tokens", "grad_norm", "gradient norm"),
    ("minutes", "tokens_per_second", "tokens/s"),
    ("step", "peak_memory_gib", "peak memory, GiB"),
)
PREFERENCES = {  # columns of the log: label
    ("reward_accuracy",): "share of pairs right",
    ("reward_margin",): "margin, nats",
    ("chosen", "rejected"): "log p of an answer, nats",
}


def overlaid(name: str, runs: dict[str, Run]) -> Figure:
    """Losses of several runs against steps, tokens and minutes."""
    fig, grid = canvas(len(CLOCKS))
    for axes, (clock, label) in zip(grid, CLOCKS.items(), strict=True):
        for i, (shown, run) in enumerate(runs.items()):
            plot_columns(axes, run.metrics, clock, "loss", color=f"C{i}", lw=0.8, alpha=0.4)
            plot_columns(axes, run.metrics, clock, "val_loss", shown, "o-", color=f"C{i}")
        axes.set(xlabel=label, ylabel="loss")
    caption = "Validation losses, with points, and training losses, thin, of runs on one text."
    return chart(name, caption, fig)


def loss_curves(run: Run) -> Figure:
    """Loss against steps, tokens and minutes; what the optimizer did; perplexity."""
    # A loss in nats a token has a perplexity; that of pairs or of classes has none.
    heads = "head" in (run.record.get("verifier"), run.record.get("kind"))
    of_tokens = run.stage != "dpo" and not heads
    fig, grid = canvas(len(CLOCKS) + len(OPTIMIZER) + of_tokens, 3.2, 2.6, columns=4)
    panels = iter(grid)
    for clock, label in CLOCKS.items():
        plot_losses(next(panels), run.metrics, clock, label, "loss")
    for clock, key, label in OPTIMIZER:
        axes = next(panels)
        plot_columns(axes, run.metrics, clock, key, color=GREY)
        axes.set(xlabel=CLOCKS[clock], ylabel=label)
    what = "loss"
    if of_tokens:
        what = "loss and perplexity"
        rows = []
        for x in run.metrics:
            rows.append(x | {key: perplexity(x[key], 1) for key in ("loss", "val_loss") if key in x})
        axes = next(panels)
        plot_losses(axes, rows, "step", "step", "perplexity")
        logarithmic(axes)
    caption = f"{run.shown}: {what} while it was trained, and what the optimizer and the clock did."
    return chart(f"curves-{run.folder.name}", caption, fig, run.shown)


def plot_losses(axes, rows: list[dict], clock: str, xlabel: str, ylabel: str) -> None:
    plot_columns(axes, rows, clock, "loss", "training", color=BLUE)
    plot_columns(axes, rows, clock, "val_loss", "validation", "o-", color=RED)
    axes.set(xlabel=xlabel, ylabel=ylabel)


def preferences(run: Run) -> list[Block]:
    """A run that learns from pairs: accuracy and margin of the reward, log-probabilities of both sides."""
    if not any("reward_margin" in x for x in run.metrics):
        return []
    fig, grid = canvas(len(PREFERENCES))
    for axes, (keys, label) in zip(grid, PREFERENCES.items(), strict=True):
        for key in keys:
            plot_columns(axes, run.metrics, "step", key, key, "o-")
        axes.set(xlabel="step", ylabel=label)
    caption = f"{run.shown}: held-out pairs. If both sides fall together, the model unlearns instead of "
    return [chart(f"preferences-{run.folder.name}", caption + "preferring.", fig)]
