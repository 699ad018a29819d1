"""What the curves of one run say: overfitting, still falling, spikes; as sentences, with what to do."""

from itertools import pairwise
from statistics import fmean, median


def observations(lines: list[dict]) -> tuple[list[str], list[str]]:
    """Sentences about a run, computed from its metrics, and what to do about them."""
    losses = [(x["step"], x["loss"]) for x in lines if "loss" in x]
    checks = [(x["step"], x["val_loss"]) for x in lines if "val_loss" in x]
    sentences, todo = [], []
    if len(checks) >= 3:
        found, cure = trend(checks)
        sentences.append(f"The validation loss {found}.")
        todo.append(cure)
    if checks and len(losses) >= 10:
        gap = checks[-1][1] - fmean(loss for _, loss in losses[-5:])
        sentences.append(f"At the end the validation loss was {gap:+.4f} from the training loss.")
    jumps = [(loss - before, step) for (_, before), (step, loss) in pairwise(losses)]
    usual = median(abs(jump) for jump, _ in jumps) if len(jumps) >= 10 else float("inf")
    if spikes := [x for x in jumps if x[0] > 8 * usual]:
        jump, step = max(spikes)
        several = f"{len(spikes)} spike{'s' * (len(spikes) > 1)} of the training loss"
        sentences.append(f"{several}, the largest at step {step:,} ({jump:+.3f}).")
        todo.append("Use a lower learning rate or a longer warmup if the spikes do harm.")
    if skipped := max((x.get("skipped", 0) for x in lines), default=0):
        sentences.append(f"{skipped} steps were skipped because their gradients were not finite.")
    return sentences or ["Too short to say anything."], todo


def trend(curve: list[tuple]) -> tuple[str, str]:
    """Overfitting, still falling or flat, and what to do. curve: (step, loss) of each evaluation.

    Overfitting: the final loss is more than 1 % above the lowest. Still falling: it fell by more than 1 %
    over the last fifth of the steps.
    """
    best, lowest = min(curve, key=lambda point: point[1])
    end, last = curve[-1]
    since, before = [point for point in curve if point[0] <= 0.8 * end or point is curve[0]][-1]
    margin = max(0.01 * abs(lowest), 0.001)
    if last > lowest + margin:
        cure = "Stop there, read more data, or use dropout."
        return f"was lowest at step {best:,} ({lowest:.4f}) and rose to {last:.4f}", cure
    if before - last > margin:
        fell = 100 * (before - last) / abs(before)
        return f"was still falling: by {fell:.1f} % since step {since:,}", "Train longer."
    cure = "More steps alone will not help; a larger model or more data may."
    return f"was flat since step {since:,} (lower by less than 1 %)", cure
