"""Processes: those of a run; workers that end with their parent, and an error with a cause if one dies."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from support.files import take_lock

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# The processes that torchrun starts for one run, and the number of this one.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))


class WorkerDied(ValueError):
    """A worker process ended before its work was done; the message says how, and what to do."""


@contextmanager
def worker_pool(workers: int, remedy: str, context=None) -> Iterator[ProcessPoolExecutor]:
    """A ProcessPoolExecutor. An exception in the `with` block, also Ctrl-C, kills the workers at once.

    `remedy`: a setting that starts fewer processes, for the message of WorkerDied.
    """
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=become_worker)
    try:
        yield pool
    except BaseException as error:
        processes = list((pool._processes or {}).values())
        if isinstance(error, BrokenProcessPool):
            pool.shutdown()  # after this, the exit codes are known
            raise WorkerDied(cause_of_death(processes, remedy)) from None
        for process in processes:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def map_ahead(pool, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Results in order, as of `pool.map`, but no more than `ahead` items are read in advance."""
    waiting = deque()
    try:
        for item in items:
            with without_interrupts():
                waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def cause_of_death(processes: list, remedy: str) -> str:
    """Why the first worker died, and what to do. (The pool then ends the others with SIGTERM.)"""
    codes = (process.exitcode for process in processes)
    code = next((code for code in codes if code not in (None, 0, -signal.SIGTERM)), -signal.SIGTERM)
    if code == -signal.SIGTERM:  # as a batch system ends all processes of a job
        return "the worker processes were ended (SIGTERM): run the same command again"
    how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    if code == -signal.SIGKILL:
        how = "was killed (SIGKILL), most likely because the machine ran out of memory"
    return f"a worker process {how}; run the same command with {remedy}, which needs less memory"


def become_worker() -> None:
    """Ignores Ctrl-C, which the parent handles; ends this process when the parent ends, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block. Processes started inside it never receive Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A lock on `folder`: waits until no other process holds it. A process that dies releases it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = take_lock(folder)
    if handle is None:
        print(f"{folder}: waiting for another process that is using it", flush=True)
        handle = take_lock(folder, wait=True)
    try:
        yield
    finally:
        os.close(handle)
