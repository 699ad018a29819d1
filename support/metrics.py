"""Metrics. Those of a sample come with a 95 % interval: {"value", "low", "high", "n"}."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache


def perplexity(nats: float, tokens: int) -> float:
    """exp of the mean loss: as uncertain as a choice among so many tokens. Depends on what a token is."""
    return math.exp(min(700, nats / tokens))


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """What compressing the text with this model would cost; comparable whatever the vocabularies."""
    return nats / math.log(2) / n_bytes


def proportion(hits: int, n: int) -> dict:
    """A proportion with Wilson's interval (1927), which stays within [0, 1] and also holds for few hits."""
    z = 1.959964
    p = hits / n
    spread = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    middle = p + z * z / (2 * n)
    scale = 1 + z * z / n
    low = max(0.0, (middle - spread) / scale)
    high = min(1.0, (middle + spread) / scale)
    return {"value": p, "low": low, "high": high, "n": n}


def bootstrap(values, statistic: Callable = lambda sample: sample.mean(0), rounds: int = 2000) -> dict:
    """A statistic of `values` (n, ...), by default their mean, with its percentile bootstrap interval."""
    import numpy as np

    values = np.asarray(values)
    rng = np.random.default_rng(0)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(rounds)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(statistic(values)), "low": float(low), "high": float(high), "n": len(values)}


def paired_bootstrap(a, b) -> dict:
    """mean(a) - mean(b) of two systems on the same items; they differ if the interval excludes 0."""
    import numpy as np

    a = np.asarray(a, float)
    b = np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"paired systems must have the same items: {len(a)} and {len(b)}")
    return bootstrap(a - b, rounds=10_000)


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
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=counts.get, default=None)


# -----------------------------------------------------------------------------
# Judging a verifier: its scores against what is right


def auc(labels, scores) -> float:
    """The chance that a right answer scores above a wrong one, ties counting half; nan without both kinds."""
    import numpy as np

    labels = np.asarray(labels, bool)
    scores = np.asarray(scores, float)
    if labels.all() or not labels.any():
        return math.nan
    wrong = np.sort(scores[~labels])
    below, not_above = (np.searchsorted(wrong, scores[labels], side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(wrong)))


def auc_within(labels, scores) -> dict:
    """The mean over problems of `auc` of each one's answers, (problems, n): blind to how hard a problem is.

    Problems with only right or only wrong answers are not counted.
    """
    import numpy as np

    each = np.array([auc(a, s) for a, s in zip(labels, scores, strict=True)])
    each = each[~np.isnan(each)]
    return bootstrap(each, rounds=500) if len(each) else {"value": math.nan, "n": 0}


def calibration(labels, probabilities) -> dict:
    """Expected calibration error (Guo et al., 2017) and what a reliability plot shows, in ten bins."""
    import numpy as np

    labels = np.asarray(labels, float)
    probabilities = np.asarray(probabilities, float)
    bin_of = np.minimum((probabilities * 10).astype(int), 9)
    found = []
    for b in np.unique(bin_of):
        inside = bin_of == b
        said = float(probabilities[inside].mean())
        found.append({"n": int(inside.sum()), "said": said, "is": float(labels[inside].mean())})
    error = sum(x["n"] * abs(x["said"] - x["is"]) for x in found) / len(labels)
    return {"ece": error, "bins": found}
