"""What the curves of one run say: overfitting, still falling, spikes; as sentences, with what to do."""

import statistics

WINDOW = 5  # training losses of a moving average


def observations(lines: list[dict]) -> tuple[list[str], list[str]]:
    """Sentences about a run, computed from its metrics, and what to do about them."""
    losses = [(x["step"], x["loss"]) for x in lines if "loss" in x]
    checks = [(x["step"], x["val_loss"]) for x in lines if "val_loss" in x]
    smooth = []
    for i in range(WINDOW, len(losses) + 1):
        smooth.append((losses[i - 1][0], statistics.fmean(loss for _, loss in losses[i - WINDOW : i])))
    jumps = [(b[0], b[1] - a[1]) for a, b in zip(losses, losses[1:], strict=False)]
    if len(checks) >= 3:
        sentences, todo = trend(checks, "validation", 0)
    else:
        # Every step has another batch, hence noise in the difference of two means of WINDOW losses. A jump is
        # the difference of two losses: its variance is twice theirs.
        late = [jump for _, jump in jumps[len(jumps) // 2 :]]
        noise = statistics.pstdev(late) / WINDOW**0.5 if late else 0
        sentences, todo = trend(smooth, "training", 3 * noise)
    if checks and len(losses) >= 10:
        gap = checks[-1][1] - smooth[-1][1]
        sentences.append(f"At the end the validation loss was {gap:+.4f} from the training loss.")
    usual = statistics.median(abs(jump) for _, jump in jumps) if len(jumps) >= 10 else float("inf")
    if spikes := [x for x in jumps if x[1] > 8 * usual]:
        step, jump = max(spikes, key=lambda x: x[1])
        several = f"{len(spikes)} spike{'s' * (len(spikes) > 1)} of the training loss"
        sentences.append(f"{several}, the largest at step {step:,} ({jump:+.3f}).")
        todo.append("Use a lower learning rate or a longer warmup if the spikes do harm.")
    skipped = max((x.get("skipped", 0) for x in lines), default=0)
    if skipped:
        sentences.append(f"{skipped} steps were skipped because their gradients were not finite.")
    return sentences or ["Too short to say anything."], todo


CURES = {  # (loss, its trend): what to do
    ("validation", "rose"): "Stop there, read more data, or use dropout.",
    ("training", "rose"): "Lower the rate.",
    ("validation", "flat"): "More steps alone will not help; a larger model or more data may.",
    ("training", "flat"): "Look at the validation loss more often: the training loss is too noisy to tell.",
}


def trend(curve: list[tuple], what: str, noise: float) -> tuple[list[str], list[str]]:
    """Overfitting, still falling or flat, as a sentence and its cure; nothing for fewer than three points.

    curve: (step, loss). Overfitting: the final loss is more than 1 % above the lowest. Still falling: it fell
    by more than 1 % over the last fifth of the steps. Both differences must exceed `noise`, too.
    """
    if len(curve) < 3:
        return [], []
    lowest, last = min(curve, key=lambda point: point[1]), curve[-1]
    since, before = [point for point in curve if point[0] <= 0.8 * last[0] or point is curve[0]][-1]
    margin = max(0.01 * abs(lowest[1]), 0.001, noise)
    if last[1] > lowest[1] + margin:
        found = f"was lowest at step {lowest[0]:,} ({lowest[1]:.4f}) and rose to {last[1]:.4f}"
        cure = CURES[what, "rose"]
    elif before - last[1] > margin:
        found = f"was still falling: by {100 * (before - last[1]) / abs(before):.1f} % since step {since:,}"
        cure = "Train longer."
    else:
        known = "1 %" if what == "validation" else "can be told from noise"
        found = f"was flat since step {since:,} (lower by less than {known})"
        cure = CURES[what, "flat"]
    return [f"The {what} loss {found}."], [cure]
