"""Scripts and their surroundings: Ctrl-C, closed pipes, encodings that lack characters, a parent that ends,
other programs that want the CPU, libraries that keep too much memory.

Every script begins with `from support.terminal import run_script` and ends with

    if __name__ == "__main__":
        run_script(main)

The import comes first because it has an effect (only if Python was started with a script of this project):
from then on Ctrl-C ends the program with status 130 and no traceback, also while torch is imported.
"""

import functools
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells expect
PIPE_CLOSED = 128 + signal.SIGPIPE


def run_script(main: Callable[[], None]) -> None:
    """Runs main(). Ctrl-C in it is a KeyboardInterrupt: it can save and clean up; the exit status is 130."""
    if signal.getsignal(signal.SIGINT) is end_now:  # not if it is ignored, as in a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        take_over_interrupts()  # libraries may need some time at exit
    except KeyboardInterrupt:
        take_over_interrupts()
        stop_workers()
        raise SystemExit(INTERRUPTED) from None


def bare_words(argv: list[str], Config) -> tuple[list[str], list[str]]:
    """Splits a command line: flags with their values and config files; and other words, such as out/base."""
    takes_value = {f"--{field.name}" for field in fields(Config) if field.type is not bool}
    flags = []
    words = []
    for before, word in pairwise(["", *argv]):
        bare = not (word.startswith("-") or word.endswith(".py") or before in takes_value)
        (words if bare else flags).append(word)
    return flags, words


def take_over_interrupts() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_now)


def end_now(*_) -> None:
    os._exit(INTERRUPTED)


def stop_workers() -> None:
    if multiprocessing := sys.modules.get("multiprocessing"):
        for process in multiprocessing.active_children():
            process.kill()


class StopSignal:
    """A context in which the first Ctrl-C or SIGTERM is only noted, in `number`: the program can finish a
    step and save. The second one ends it at once.
    """

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.number = None
        self.first = 0.0  # when it arrived
        # torchrun passes on a Ctrl-C that its processes have received already: within a second, two are one.
        self.grace = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self.handlers = {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number, _frame) -> None:
        now = time.monotonic()
        if self.number is None:
            self.first = now
        elif now >= self.first + self.grace:
            os._exit(128 + number)
        self.number = number
        self.say("stopping after this step (again: at once) ...")

    @property
    def exit_code(self) -> int:
        """As shells expect it; another process may have received the signal for this one."""
        return 128 + (self.number or signal.SIGTERM)


class Output(io.TextIOWrapper):
    """Standard output or error. If its reader has closed, as in `| head -3`, the program ends silently. A
    character that the encoding lacks is replaced: it must not end hours of training.
    """

    def __init__(self, stream: io.TextIOWrapper, errors: str):
        super().__init__(
            stream.buffer, stream.encoding, errors,
            line_buffering=stream.line_buffering, write_through=stream.write_through,
        )  # fmt: skip

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self.end()

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self.end()

    def end(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # otherwise Python fails again when it exits
        raise SystemExit(PIPE_CLOSED)


def end_with_parent() -> None:
    """Ends this process when its parent ends, even by kill -9, if $END_WITH_PARENT is set.

    $END_WITH_PARENT is the parent's process id. lab/experiments.py and run_all.sh set it: otherwise a
    training run would go on without them and keep its folder locked.
    """
    wanted = os.environ.pop("END_WITH_PARENT", "")  # not passed on to our own children
    if not wanted:
        return
    parent = os.getppid()
    if parent == 1 and wanted != "1":  # the parent ended before this line
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@functools.cache
def is_amd() -> bool:
    """Whether this is a Linux machine with a processor of AMD."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def leave_cores_to_others() -> None:
    """Makes torch's threads give up their cores sooner. It must be set before torch is loaded.

    A thread that waits for work keeps its core busy for 300,000 rounds of a loop. Beside another program it
    may so hold up the very thread that it waits for: a step of configs/cpu.py, 0.14 s alone, took 1.3 s
    beside one busy process with 20,000 rounds and takes 0.32 s with 2,000 (two cores of a Zen 4). With too
    few the thread sleeps between two operations, and waking it costs more: on a Xeon 2,000 rounds make the
    step a quarter slower than 4,000 do (report/speed.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000" if is_amd() else "4000")


def keep_fewer_kernels() -> None:
    """Makes oneDNN, and ideep between it and torch, keep 128 kernels each and not 1,024. It must be set
    before torch is loaded.

    A kernel serves one shape, and in fine-tuning every batch has another one: SFT of a model of 135M
    parameters by LoRA grew from 5.3 to 9.5 GiB in 200 steps. A step needs some dozens of kernels.
    """
    for capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(capacity, "128")


def begin() -> None:
    leave_cores_to_others()
    keep_fewer_kernels()
    take_over_interrupts()
    end_with_parent()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = Output(sys.stdout, "replace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = Output(sys.stderr, "backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def started_as_script() -> bool:
    """Whether Python was started with a script of this project, and not with pytest or a notebook."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    home = Path(__file__).resolve().parents[1]
    return bool(file) and Path(file).resolve().parent in (home, home / "lab")


if "--multiprocessing-fork" in sys.orig_argv:  # a spawned worker: its parent handles Ctrl-C
    signal.signal(signal.SIGINT, signal.SIG_IGN)
elif started_as_script():
    begin()
