"""Metrics, every one with its 95 % interval as {"value", "low", "high", "n"}; choosing among many answers."""

import math
from collections.abc import Callable, Iterable
from functools import cache


def perplexity(nats: float, tokens: int) -> float:
    """exp of the mean loss: as uncertain as a choice among so many tokens. Depends on what a token is."""
    return math.exp(min(700, nats / tokens))


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """What compressing the text with this model would cost; comparable whatever the vocabularies."""
    return nats / math.log(2) / n_bytes


def proportion(hits: int, n: int) -> dict:
    """A share with Wilson's interval (1927), which stays within [0, 1] and holds for few or no hits, too."""
    z = 1.959964
    p, spread = hits / n, z * math.sqrt(hits / n * (1 - hits / n) / n + (z / (2 * n)) ** 2)
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    low, high = max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
    return {"value": p, "low": low, "high": high, "n": n}


def bootstrap(values, statistic: Callable | None = None, rounds: int = 2000, seed: int = 0) -> dict:
    """A statistic of `values` (n, ...), by default their mean, with its percentile bootstrap interval."""
    import numpy as np

    values, rng = np.asarray(values), np.random.default_rng(seed)
    statistic = statistic or (lambda sample: sample.mean(0))
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(rounds)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(statistic(values)), "low": float(low), "high": float(high), "n": len(values)}


def paired_bootstrap(a, b, rounds: int = 10_000, seed: int = 0) -> dict:
    """mean(a) - mean(b) of two systems on the same items; they differ if the interval excludes 0."""
    import numpy as np

    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"paired systems must have the same items: {len(a)} and {len(b)}")
    return bootstrap(a - b, rounds=rounds, seed=seed)


def macro_f1(labels_and_predictions) -> float:
    """The mean of the classes' F1, so that a rare class counts as much as a frequent one."""
    import numpy as np

    labels, predictions = np.asarray(labels_and_predictions).T
    scores = []
    for c in np.union1d(labels, predictions):
        both = ((labels == c) & (predictions == c)).sum()
        scores.append(2 * both / ((labels == c).sum() + (predictions == c).sum()))
    return float(np.mean(scores))


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L (Lin, 2004): F1 of shared words, word pairs and longest common subsequence."""
    scores = _rouge_scorer().score(reference, prediction)
    return {name: score.fmeasure for name, score in scores.items()}


@cache
def _rouge_scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def pass_at(k: int, n: int, correct: int) -> float:
    """The chance that k of n samples, `correct` of them right, hold a right one (Chen et al., 2021)."""
    if not 0 < k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples, not {n}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(answers: Iterable[str | None]) -> str | None:
    """The most frequent answer (self-consistency, Wang et al., 2022); of equals, the one given first."""
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    return max(counts, key=counts.get, default=None)  # max keeps the first


# -----------------------------------------------------------------------------
# Choosing among many answers


def best_of(scores: Iterable[float]) -> int | None:
    """Index of the highest score; of equals the first, of none None."""
    scores = list(scores)
    return max(range(len(scores)), key=scores.__getitem__) if scores else None


def weighted_vote(answers: Iterable[str | None], weights: Iterable[float]) -> str | None:
    """The answer whose weights add up to most (Li et al., 2023); samples without an answer have no vote."""
    totals: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + weight
    return max(totals, key=totals.get, default=None)


def gate(probabilities: Iterable[float], threshold: float) -> tuple[int, int]:
    """Sampling on until one is good enough: (index of the best so far, samples spent)."""
    best, spent = 0, 0
    probabilities = list(probabilities)
    for spent, p in enumerate(probabilities, 1):
        best = best if p <= probabilities[best] else spent - 1
        if probabilities[best] >= threshold:
            break
    return best, spent


# -----------------------------------------------------------------------------
# Judging a verifier: scores against labels


def auc(labels, scores) -> float:
    """The chance that a right answer scores above a wrong one, ties counting half; nan without both kinds."""
    import numpy as np

    labels, scores = np.asarray(labels, bool), np.asarray(scores, float)
    if labels.all() or not labels.any():
        return math.nan
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[inverse]  # of equals, the mean of their ranks
    n = labels.sum()
    return float((ranks[labels].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def auc_within(labels, scores) -> dict:
    """The mean over problems of `auc` of each one's answers, (problems, n); how hard a problem is has no say.

    Problems with only right or only wrong answers say nothing, and are not counted.
    """
    import numpy as np

    each = [auc(a, s) for a, s in zip(labels, scores, strict=True)]
    each = [a for a in each if not math.isnan(a)]
    return bootstrap(np.array(each), rounds=500) if each else {"value": math.nan, "n": 0}


def calibration(labels, probabilities, bins: int = 10) -> dict:
    """Expected calibration error (Guo et al., 2017) and what a reliability plot shows, bin by bin."""
    import numpy as np

    labels, probabilities = np.asarray(labels, float), np.asarray(probabilities, float)
    which = np.minimum((probabilities * bins).astype(int), bins - 1)
    found = []
    for b in range(bins):
        here = which == b
        if here.any():
            found.append(
                {
                    "n": int(here.sum()),
                    "said": float(probabilities[here].mean()),
                    "is": float(labels[here].mean()),
                }
            )
    error = sum(b["n"] * abs(b["said"] - b["is"]) for b in found) / len(labels)
    return {"ece": error, "bins": found}
