"""Figures of what a run wrote into metrics.jsonl: losses, perplexity, the optimizer, preferences."""

from support.charts import BLUE, GREY, RED, Panel, chart, line
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
    panels = []
    for clock, label in CLOCKS.items():
        curves = []
        for i, (shown, run) in enumerate(runs.items()):
            curves.append(line(run.metrics, clock, "loss", color=f"C{i}", lw=0.8, alpha=0.4))
            curves.append(line(run.metrics, clock, "val_loss", shown, "o-", color=f"C{i}"))
        panels.append(Panel(curves, label, "loss"))
    caption = "Validation losses, with points, and training losses, thin, of runs on one text."
    return chart(name, caption, panels)


def loss_curves(run: Run) -> Figure:
    """Loss against steps, tokens and minutes; what the optimizer did; perplexity."""

    def losses(clock: str) -> list:
        training = line(run.metrics, clock, "loss", "training", color=BLUE)
        return [training, line(run.metrics, clock, "val_loss", "validation", "o-", color=RED)]

    panels = [Panel(losses(clock), label, "loss") for clock, label in CLOCKS.items()]
    for clock, key, label in OPTIMIZER:
        panels.append(Panel([line(run.metrics, clock, key, color=GREY)], CLOCKS[clock], label))
    what = "loss"
    # A loss in nats a token has a perplexity; that of pairs or of classes has none.
    heads = "head" in (run.record.get("verifier"), run.record.get("kind"))
    if run.stage != "dpo" and not heads:
        what = "loss and perplexity"
        curves = losses("step")
        for curve in curves:
            curve.y = [perplexity(loss, 1) for loss in curve.y]
        panels.append(Panel(curves, "step", "perplexity", log="y"))
    caption = f"{run.shown}: {what} while it was trained, and what the optimizer and the clock did."
    return chart(f"curves-{run.folder.name}", caption, panels, columns=4, size=(3.2, 2.6), title=run.shown)


def preferences(run: Run) -> list[Block]:
    """A run that learns from pairs: accuracy and margin of the reward, log-probabilities of both sides."""
    if not any("reward_margin" in x for x in run.metrics):
        return []
    panels = []
    for keys, label in PREFERENCES.items():
        curves = [line(run.metrics, "step", key, key, "o-") for key in keys]
        panels.append(Panel(curves, "step", label))
    caption = f"{run.shown}: held-out pairs. If both sides fall together, the model unlearns instead of "
    return [chart(f"preferences-{run.folder.name}", caption + "preferring.", panels)]
