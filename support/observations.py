"""What the curves of one run say: overfitting, still falling, spikes; as sentences, with what to do."""

WINDOW = 5  # training losses of a moving average
CURES = {  # (loss, its trend): what to do
    ("validation", "rose"): "Stop there, read more data, or use dropout.",
    ("training", "rose"): "Lower the rate.",
    ("validation", "flat"): "More steps alone will not help; a larger model or more data may.",
    ("training", "flat"): "Look at the validation loss more often: the training loss is too noisy to tell.",
}


def observations(lines: list[dict]) -> tuple[list[str], list[str]]:
    """Sentences about a run, computed from its metrics, and what to do about them."""
    import numpy as np

    steps, losses = curve(lines, "loss")
    checked, checks = curve(lines, "val_loss")
    jumps = np.diff(losses)
    smooth = np.convolve(losses, np.ones(WINDOW) / WINDOW, "valid") if len(losses) >= WINDOW else losses[:0]
    sentences, todo = [], []
    if len(checks) >= 3:
        found, cure = trend(checked, checks, "validation", 0)
    else:
        # Every step has another batch, hence noise in the difference of two means of WINDOW losses. A jump is
        # the difference of two losses: its variance is twice theirs.
        noise = 3 * np.std(jumps[len(jumps) // 2 :]) / WINDOW**0.5 if len(smooth) else 0
        found, cure = trend(steps[len(steps) - len(smooth) :], smooth, "training", noise)
    if found:
        sentences.append(found)
        todo.append(cure)
    if len(losses) >= 10:
        if len(checks):
            gap = checks[-1] - smooth[-1]
            sentences.append(f"At the end the validation loss was {gap:+.4f} from the training loss.")
        spikes = int((jumps > 8 * np.median(abs(jumps))).sum())
        if spikes:
            largest = jumps.argmax()
            several = f"{spikes} spike{'s' * (spikes > 1)} of the training loss"
            sentences.append(
                f"{several}, the largest at step {steps[largest + 1]:,} ({jumps[largest]:+.3f})."
            )
            todo.append("Use a lower learning rate or a longer warmup if the spikes do harm.")
    skipped = max((x.get("skipped", 0) for x in lines), default=0)
    if skipped:
        sentences.append(f"{skipped} steps were skipped because their gradients were not finite.")
    return sentences or ["Too short to say anything."], todo


def curve(lines: list[dict], key: str) -> tuple:
    """The steps that logged `key`, and its values, as arrays."""
    import numpy as np

    rows = [x for x in lines if key in x]
    return np.array([x["step"] for x in rows]), np.array([x[key] for x in rows], float)


def trend(steps, losses, what: str, noise: float) -> tuple[str, str]:
    """Overfitting, still falling or flat, as a sentence and its cure; nothing for fewer than three points.

    Overfitting: the final loss is more than 1 % above the lowest. Still falling: it fell by more than 1 %
    over the last fifth of the steps. Both differences must exceed `noise`, too.
    """
    if len(losses) < 3:
        return "", ""
    lowest, last = losses.argmin(), losses[-1]
    since = max(0, int((steps <= 0.8 * steps[-1]).sum()) - 1)
    margin = max(0.01 * abs(losses[lowest]), 0.001, noise)
    fell = losses[since] - last
    if last > losses[lowest] + margin:
        found = f"was lowest at step {steps[lowest]:,} ({losses[lowest]:.4f}) and rose to {last:.4f}"
        return f"The {what} loss {found}.", CURES[what, "rose"]
    if fell > margin:
        found = f"was still falling: by {100 * fell / abs(losses[since]):.1f} % since step {steps[since]:,}"
        return f"The {what} loss {found}.", "Train longer."
    return f"The {what} loss was flat since step {steps[since]:,}.", CURES[what, "flat"]
