"""What the curves of one run say: overfitting, still falling, spikes; as sentences, with what to do."""

import math
import statistics


def observations(lines: list[dict]) -> tuple[list[str], list[str]]:
    """Sentences about a run, computed from its metrics, and what to do about them."""
    losses = [(x["step"], x["loss"]) for x in lines if "loss" in x]
    checks = [(x["step"], x["val_loss"]) for x in lines if "val_loss" in x]
    sentences, todo = trend(losses, checks)
    if len(checks) >= 1 and len(losses) >= 10:
        gap = checks[-1][1] - smooth(losses)[-1][1]
        sentences.append(f"At the end the validation loss was {gap:+.4f} from the training loss.")
    if spikes := spikes_of(losses):
        step, jump = max(spikes, key=lambda x: x[1])
        several = f"{len(spikes)} spike{'s' * (len(spikes) > 1)} of the training loss"
        sentences.append(f"{several}, the largest at step {step:,} ({jump:+.3f}).")
        todo.append("Use a lower learning rate or a longer warmup if the spikes do harm.")
    skipped = max((x.get("skipped", 0) for x in lines), default=0)
    if skipped:
        sentences.append(f"{skipped} steps were skipped because their gradients were not finite.")
    return sentences or ["Too short to say anything."], todo


def trend(losses: list[tuple], checks: list[tuple]) -> tuple[list[str], list[str]]:
    """Overfitting, still falling or flat, as a sentence and its cure; nothing for fewer than three points.

    losses, checks: (step, training loss), (step, validation loss). The validation loss is used, or the
    smoothed training loss if there are fewer than three checks.
    Overfitting: the final loss is more than 1 % above the lowest. Still falling: it fell by more than 1 %
    over the last fifth of the steps. A difference of training losses must also exceed three times its noise,
    since every step has another batch.
    """
    curve, what = (checks, "validation") if len(checks) >= 3 else (smooth(losses), "training")
    if len(curve) < 3:
        return [], []
    lowest, last = min(curve, key=lambda p: p[1]), curve[-1][1]
    since, before = [p for p in curve if p[0] <= 0.8 * curve[-1][0] or p is curve[0]][-1]
    margin = max(0.01 * abs(lowest[1]), 0.001)
    if what == "training":
        margin = max(margin, 3 * noise_of(losses))
    if last > lowest[1] + margin:
        cures = {"validation": "Stop there, read more data, or use dropout.", "training": "Lower the rate."}
        sentence = (
            f"The {what} loss was lowest at step {lowest[0]:,} ({lowest[1]:.4f}) and rose to {last:.4f}."
        )
        return [sentence], [cures[what]]
    if before - last > margin:
        drop = 100 * (before - last) / abs(before)
        sentence = f"The {what} loss was still falling: by {drop:.1f} % since step {since:,}."
        return [sentence], ["Train longer."]
    known = "1 %" if what == "validation" else "can be told from noise"
    if what == "validation":
        cure = "More steps alone will not help; a larger model or more data may."
    else:
        cure = "Look at the validation loss more often: the training loss is too noisy to tell."
    return [f"The {what} loss was flat since step {since:,} (lower by less than {known})."], [cure]


def jumps_of(losses: list[tuple]) -> list[float]:
    """Differences of neighbouring training losses."""
    return [b[1] - a[1] for a, b in zip(losses, losses[1:], strict=False)]


def noise_of(losses: list[tuple]) -> float:
    """Standard deviation of the difference of two means of five losses, from the second half of the run."""
    jumps = jumps_of(losses)
    return statistics.pstdev(jumps[len(jumps) // 2 :]) / math.sqrt(2) * math.sqrt(2 / 5)


def spikes_of(losses: list[tuple]) -> list[tuple]:
    """[(step, jump)]: rises of more than eight times the median change; [] for fewer than ten changes."""
    jumps = jumps_of(losses)
    if len(jumps) < 10:
        return []
    usual = statistics.median(abs(j) for j in jumps)
    return [(losses[i + 1][0], j) for i, j in enumerate(jumps) if j > 8 * usual]


def smooth(points: list[tuple], window: int = 5) -> list[tuple]:
    """Moving averages of the values; each stands at the last step of its window."""
    return [
        (points[i][0], statistics.fmean(p[1] for p in points[i + 1 - window : i + 1]))
        for i in range(window - 1, len(points))
    ]
