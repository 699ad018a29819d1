"""Memory of the machine: bytes that are free, how many rows of a batch fit, and what to do if none do.

need = partial(generation_bytes, shape_of(config), prompt=300, new=128)    # rows -> bytes, support/costs.py
rows = rows_that_fit(need, most=1024, room=room(device))
texts = halving(continued, prompts)        # if memory still runs out: half as many at a time
"""

import contextlib
import ctypes
import errno
import gc
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch

# Share of the free memory that is used. CUDA: the allocator loses about 6 % between blocks
# (report/speed.md), and kernels have workspaces. CPU: other programs need memory too, and Linux kills
# processes when none is left.
SHARE = {"cuda": 0.85, "cpu": 0.6}


# -----------------------------------------------------------------------------
# Free memory


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device.

    CUDA: free memory of the driver plus memory that torch has reserved but does not use, within the limit of
    the process (`torch.cuda.set_per_process_memory_fraction`). CPU: the minimum of what the system has and
    the limits of the process' control groups, which containers and job schedulers set.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        used = torch.cuda.memory_allocated(device)
        fraction = torch.cuda.get_per_process_memory_fraction(device)
        return max(0, min(free, int(fraction * total) - reserved) + reserved - used)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    give_freed_memory_back()
    return max(0, min(available_bytes(), control_group_bytes()))


def room(device: torch.device, processes: int = 1) -> int:
    """Bytes that a batch may use if `processes` processes use the device at the same time."""
    return int(free_bytes(device) * SHARE.get(device.type, SHARE["cpu"]) / processes)


def available_bytes() -> int:
    """Main memory that is free or used only as file cache."""
    import psutil

    return psutil.virtual_memory().available


def control_group_bytes(mount: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """What Linux' control groups (version 2) leave to this process: the least over its group and all groups
    around it, in which cached files count as free. Infinity where there is no limit.
    """
    if not own.exists():
        return math.inf
    left = [math.inf]
    path = own.read_text().rpartition("0::/")[2].strip()
    for group in (mount / path, *(mount / path).parents):
        with contextlib.suppress(OSError, ValueError):  # no such file here; "max" is no limit
            most = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            left.append(most - used + int(cached[1] if cached else 0))
    return min(left)


def give_freed_memory_back() -> None:
    """Returns freed memory to the system.

    glibc keeps it (`keep_freed_memory` in support/machine.py asks it to), and the system counts it as used.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def leave_memory_to_others() -> None:
    """Gives freed memory back when less than a quarter of the machine's is left.

    Tensors of ever new shapes leave gaps between them, so that the process grows. The next step has its pages
    cleared again and takes longer, so this is not done while there is room.
    """
    import psutil

    if available_bytes() < psutil.virtual_memory().total / 4:
        give_freed_memory_back()


# -----------------------------------------------------------------------------
# Choosing a batch size


class DoesNotFit(ValueError):
    """Out of memory with a single row; the message says what the user can do."""


def rows_that_fit(need: Callable[[int], int], most: int, room: int) -> int:
    """`most`, halved until need(rows) <= room bytes; at least 1.

    Halving, instead of the largest number that fits, makes results independent of small changes in memory.
    """
    rows = max(1, most)
    while rows > 1 and need(rows) > room:
        rows //= 2
    return rows


MESSAGES = (  # of torch, cuBLAS, C++, oneDNN
    "can't allocate memory",
    "Cannot allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",
    "bad_alloc",
    "could not create a primitive",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, numpy, Python or the system means out of memory, on a GPU or a CPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in MESSAGES)
    return isinstance(error, MemoryError)


def free_cached_memory() -> None:
    """After a failed batch: frees the memory that torch has cached, so that it can be split differently."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    give_freed_memory_back()


def halving(function: Callable[[list], list], items: list, most: int = 0) -> list:
    """The list function(items), computed with at most `most` items at a time (0: all).

    Out of memory: continues with half as many at a time. Raises DoesNotFit if one item does not fit.
    """
    results = []
    size = most or len(items)
    while len(items):
        try:
            results += function(items[:size])
            items = items[size:]
            continue
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise DoesNotFit(
                    "out of memory with one sequence at a time: use a smaller model, a shorter "
                    "--context_length or fewer --shots, or close other programs that use this memory"
                ) from None
        # Not inside the except clause: its traceback keeps the failed tensors alive.
        free_cached_memory()
        size = (min(size, len(items)) + 1) // 2
    return results
