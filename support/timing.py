"""The timing loop of the project: contenders take turns, the first turns warm up, medians are compared."""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm


def seconds_of(run: Callable[[], object], calls: int = 1) -> float:
    """Wall-clock seconds of a call, the mean of `calls` in a row, until the GPU has finished them."""
    begun = time.perf_counter()
    for _ in range(calls):
        run()  # its result, such as a loss with its graph, is freed at once
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / calls


def in_turns(
    contenders: dict[str, Callable], rounds: int, warmup: int = 2, calls: int = 1, limit: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of a call of each contender, one number a round.

    Every second round goes backwards through the contenders, so that none of them always has the slow minute
    or place. No new round begins after `limit` seconds, but for the first one that counts.
    """
    times = {name: [] for name in contenders}
    begun = time.perf_counter()
    for turn in tqdm(range(warmup + rounds), desc="rounds", disable=None, leave=False):
        if turn > warmup and time.perf_counter() - begun > limit:
            break
        order = list(contenders)
        if turn % 2:
            order.reverse()
        for name in order:
            seconds = seconds_of(contenders[name], calls)
            if turn >= warmup:
                times[name].append(seconds)
    return times


def medians(contenders: dict[str, Callable], rounds: int, **how) -> dict[str, float]:
    """Median seconds of a call of each contender; see `in_turns`."""
    times = in_turns(contenders, rounds, **how)
    return {name: statistics.median(some) for name, some in times.items()}


def matmul_flops(
    dtype: torch.dtype, n: int = 1536, device: str | torch.device = "cpu", rounds: int = 4
) -> float:
    """FLOP/s of a large matrix product: the best of the rounds."""
    square = torch.randn(n, n, device=device).to(dtype)
    times = in_turns({"product": partial(torch.mm, square, square)}, rounds)
    return 2 * n**3 / min(times["product"])
