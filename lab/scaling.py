"""Scaling: where to spend FLOPs. Six sizes at three budgets, what they predict for a larger one, and a check.

After Hoffmann et al. (2022): approach 2 (the best size at each budget) and approach 3 (a law of the loss).
Parameters are all of them: at these widths most are the embedding, and the head computes with it.
"""

import math
from itertools import product
from operator import itemgetter
from statistics import median

import numpy as np

from lab.study import FOLDER, ExperimentConfig, Run, read_run, run_of, settings_of, train_all
from support.costs import count_parameters, estimate_flops
from train import TrainConfig, model_config

SIZES = ((2, 32), (2, 48), (3, 72), (4, 96), (5, 128), (6, 176))  # layers, width
BUDGETS = (1e12, 2e12, 4e12)  # FLOPs of a training run; with less, a model has not begun to copy names
CHECK = 1.6e13  # FLOPs of one more run, at the best size by the fit: it tests the prediction
LARGER = (*SIZES, (7, 208), (8, 256))  # sizes to choose from for that run
EXPONENTS = np.arange(0.05, 2.01, 0.05)


def scaling_runs(cfg: ExperimentConfig) -> list[Run]:
    runs = []
    for budget, (layers, width) in product(BUDGETS, SIZES):
        name = f"scaling-{budget:.0e}-{layers}x{width}".replace("+", "")
        flags = size_flags(layers, width, budget / (20 if cfg.quick else 1))
        runs.append(run_of(cfg, name, "baseline.py", [f"--corpus={cfg.corpus}", *flags], 1))
    return runs


def size_flags(layers: int, width: int, budget: float) -> list[str]:
    """Flags to train a model of this shape for a budget of FLOPs. Narrow ones get a higher learning rate."""
    flags = [f"--n_layers={layers}", f"--d_model={width}", "--d_ff=0", "--eval_every=0"]
    c = settings_of([str(FOLDER / "baseline.py"), *flags])
    flops = estimate_flops(model_config(c)) * tokens_of(c) / c.max_steps
    steps = max(4, round(budget / flops))
    rate = c.learning_rate * math.sqrt(128 / width)
    return [
        *flags,
        f"--max_steps={steps}",
        f"--warmup_steps={max(1, steps // 20)}",
        f"--learning_rate={rate:.2g}",
    ]


def tokens_of(c: TrainConfig) -> int:
    return c.max_steps * c.batch_size * c.grad_accum_steps * c.context_length


# -----------------------------------------------------------------------------
# Fits


def column(points: list[dict], key: str) -> np.ndarray:
    return np.array([p[key] for p in points], float)


def isoflop(points: list[dict]) -> list[dict]:
    """From runs {"budget", "parameters", "tokens", "loss"}: the best size at each budget, the minimum of a
    parabola in log parameters through the three sizes around the least loss: models further away have not
    left the plateau of their first steps. A minimum outside of the sizes tried does not count.
    """
    best = []
    for budget in sorted({p["budget"] for p in points}):
        some = [p for p in points if p["budget"] == budget]
        some.sort(key=itemgetter("parameters"))
        if len(some) < 3:
            continue
        size = np.log(column(some, "parameters"))
        loss = column(some, "loss")
        least = loss.argmin()
        near = slice(least - 1, least + 2) if 0 < least < len(some) - 1 else slice(None)
        a, b, c = np.polyfit(size[near], loss[near], 2)
        at = -b / (2 * a) if a > 0 else math.nan
        entry = {"budget": budget, "inside": bool(size[0] <= at <= size[-1])}
        if entry["inside"]:
            tokens = math.exp(np.interp(at, size, np.log(column(some, "tokens"))))
            lowest = c - b * b / (4 * a)
            entry |= {"parameters": math.exp(at), "tokens": tokens, "loss": lowest}
        best.append(entry)
    return best


def fit_sizes(best: list[dict]) -> dict | None:
    """N = coefficient x C^exponent, how the best size grows with FLOPs, through three minima or more."""
    inside = [b for b in best if b["inside"]]
    if len(inside) < 3:
        return None
    budgets = np.log(column(inside, "budget"))
    exponent, start = np.polyfit(budgets, np.log(column(inside, "parameters")), 1)
    return {"coefficient": math.exp(start), "exponent": exponent}


def fit_law(points: list[dict]) -> dict | None:
    """L = E + A / N^a + B / D^b through runs of N parameters and D tokens.

    For given exponents the rest is linear: for those on a grid, E, A and B are fitted by least squares of the
    relative error, without the floor E where it would be negative. None if no law of this form falls with N
    and D.
    """
    N, D, L = (column(points, key) for key in ("parameters", "tokens", "loss"))
    N0 = np.median(N)
    D0 = np.median(D)
    ones = np.ones_like(L)
    best = None
    for a, b in product(EXPONENTS, EXPONENTS):
        columns = np.stack([ones, (N / N0) ** -a, (D / D0) ** -b], axis=1) / L[:, None]  # units near 1
        found = np.linalg.lstsq(columns, ones, rcond=None)[0]
        if (found < 0).any():
            found = np.insert(np.linalg.lstsq(columns[:, 1:], ones, rcond=None)[0], 0, 0.0)
        error = np.sqrt(np.mean((columns @ found - 1) ** 2))
        if (found >= 0).all() and (best is None or error < best["error"]):
            E, A, B = found.tolist()
            best = {"E": E, "A": A * N0**a, "B": B * D0**b, "a": a, "b": b, "error": error}
    return best


def loss_of(law: dict, parameters, tokens):
    return law["E"] + law["A"] / parameters ** law["a"] + law["B"] / tokens ** law["b"]


def best_use(law: dict, sizes: dict | None, flops: float, per_pair: float = 6.0) -> dict:
    """The best model for so many FLOPs, at `per_pair` FLOPs a parameter and token: its size from the minima,
    or else from the law, which also gives its loss.
    """
    if sizes:
        n = sizes["coefficient"] * flops ** sizes["exponent"]
    else:
        grid = np.geomspace(1e3, 1e12, 4000)
        n = grid[loss_of(law, grid, flops / (per_pair * grid)).argmin()]
    tokens = flops / (per_pair * n)
    return {"parameters": n, "tokens": tokens, "loss": loss_of(law, n, tokens)}


# -----------------------------------------------------------------------------
# The family


def scaling(cfg: ExperimentConfig, runs: list[Run]) -> dict:
    """The fits of the scaling runs, and the check of what they predict."""
    points = []
    for run, (budget, _) in zip(scaling_runs(cfg), product(BUDGETS, SIZES), strict=True):
        if figures := read_run(run):
            point = {key: figures[key] for key in ("parameters", "tokens", "flops")}
            points.append(point | {"budget": budget, "loss": figures["val_loss"]})
    best = isoflop(points)
    sizes = fit_sizes(best)
    law = fit_law(points) if len(points) > 5 else None
    found = {"points": points, "best": best, "law": law, "sizes": sizes}
    if law and law["error"] < 0.1 and not cfg.quick:  # a law that misses its own runs predicts nothing
        found["check"] = check(cfg, law, sizes, points)
    return found


def check(cfg: ExperimentConfig, law: dict, sizes: dict | None, points: list[dict]) -> dict:
    """What the fits predict for CHECK FLOPs, printed before it is tried; then the run, and its result."""
    per_pair = median(p["flops"] / (p["parameters"] * p["tokens"]) for p in points)
    best = best_use(law, sizes, CHECK, per_pair)
    trials = []
    for shape in LARGER:
        flags = size_flags(*shape, CHECK)
        c = settings_of([str(FOLDER / "baseline.py"), *flags])
        n = count_parameters(model_config(c))["total"]
        distance = abs(math.log(n / best["parameters"]))
        trials.append((distance, n, tokens_of(c), flags))
    _, n, D, flags = min(trials)
    said = {"parameters": n, "tokens": D, "loss": loss_of(law, n, D)}
    print(
        f"{CHECK:.1e} FLOPs: the fit predicts {best['parameters']:,.0f} parameters; of {n:,} a loss of "
        f"{said['loss']:.4f}; now they are trained",
        flush=True,
    )
    run = run_of(cfg, "scaling-check", "baseline.py", [f"--corpus={cfg.corpus}", *flags], 1)
    found = {"flops": CHECK, "best": best, "said": said}
    if failed := train_all([run], 1):
        return found | {"failed": failed[str(run.folder)]}
    figures = read_run(run)
    return found | {"came": said | {"tokens": figures["tokens"], "loss": figures["val_loss"]}}
