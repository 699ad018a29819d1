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


def curve_rows(run: Run) -> list[dict]:
    """metrics.jsonl with the columns that figures need beside: minutes and perplexities."""
    lines = run.metrics()
    for x in lines:
        x["minutes"] = x.get("seconds", 0) / 60
        for key in ("loss", "val_loss"):
            if key in x:
                x[f"perplexity of {key}"] = perplexity(x[key], 1)
    return lines


def overlaid(name: str, runs: list[tuple[str, list[dict]]]) -> Figure:
    """Losses of several runs against steps, tokens and minutes."""
    panels = []
    for clock, label in CLOCKS.items():
        curves = []
        for i, (run, lines) in enumerate(runs):
            curves.append(line(lines, clock, "loss", color=f"C{i}", lw=0.8, alpha=0.4))
            curves.append(line(lines, clock, "val_loss", run, "o-", color=f"C{i}"))
        panels.append(Panel(curves, label, "loss"))
    caption = "Validation losses, with points, and training losses, thin, of runs on one text."
    return chart(name, caption, panels)


def loss_curves(run: Run, lines: list[dict]) -> Figure:
    """Loss against steps, tokens (and epochs) and minutes; what the optimizer did; perplexity."""
    labels = CLOCKS.copy()
    if epochs := lines[-1].get("epoch"):
        labels["tokens"] += f" ({epochs:.2g} epochs)"
    losses = (("loss", "training", "-", BLUE), ("val_loss", "validation", "o-", RED))
    panels = []
    for clock, label in labels.items():
        curves = [line(lines, clock, key, name, form, color=color) for key, name, form, color in losses]
        panels.append(Panel(curves, label, "loss"))
    for clock, key, label in OPTIMIZER:
        panels.append(Panel([line(lines, clock, key, color=GREY)], labels[clock], label))
    caption = f"{run.shown}: loss while it was trained, and what the optimizer and the clock did."
    if predicts_text(run):
        curves = [line(lines, "step", f"perplexity of {key}", name, form, color=color)
                  for key, name, form, color in losses]  # fmt: skip
        panels.append(Panel(curves, "step", "perplexity", log="y"))
        caption = caption.replace("loss", "loss and perplexity")
    return chart(f"curves-{run.folder.name}", caption, panels, columns=4, size=(3.2, 2.6), title=run.shown)


def predicts_text(run: Run) -> bool:
    """True if the loss is in nats per token and so has a perplexity. That of pairs or of classes has none."""
    heads = "head" in (run.record.get("verifier"), run.record.get("kind"))
    return run.stage != "dpo" and not heads


def preferences(run: Run, lines: list[dict]) -> list[Block]:
    """Of a run that learns from pairs: accuracy and margin of the reward, log-probabilities of both sides."""
    checks = [x for x in lines if "reward_margin" in x]
    if not checks:
        return []
    panels = []
    for keys, label in PREFERENCES.items():
        panels.append(Panel([line(checks, "step", key, key, "o-") for key in keys], "step", label))
    caption = f"{run.shown}: held-out pairs. If both sides fall together, the model unlearns instead of "
    caption += "preferring."
    return [chart(f"preferences-{run.folder.name}", caption, panels)]
