"""How a script meets its terminal: Ctrl-C, a pipe that closes, an encoding that lacks characters, its parent.

Every script begins with `from support.terminal import run_script` and ends with

    if __name__ == "__main__":
        run_script(main)

That import stands above all others because it already acts, but only if one of the project's scripts is what
Python was started with: Ctrl-C ends the program with status 130 and without a traceback from here on, also in
the seconds in which torch is imported.
"""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT  # the exit status that shells expect
PIPE_CLOSED = 128 + 13  # the same for SIGPIPE, which Windows does not have


def run_script(main: Callable[[], None]) -> None:
    """main(), in which Ctrl-C is a KeyboardInterrupt: it may save and tidy up before the end, status 130."""
    if signal.getsignal(signal.SIGINT) is end_now:  # not if it is ignored, as in a shell's background job
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        take_over_interrupts()  # what libraries do at exit may take a while, too
    except KeyboardInterrupt:
        take_over_interrupts()
        stop_workers()
        raise SystemExit(INTERRUPTED) from None


def take_over_interrupts() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_now)


def end_now(*_) -> None:
    os._exit(INTERRUPTED)


def stop_workers() -> None:
    if multiprocessing := sys.modules.get("multiprocessing"):
        for process in multiprocessing.active_children():
            process.kill()


class Output(io.TextIOWrapper):
    """Standard output or error. If its reader is gone, as in `| head -3`, the program ends in silence."""

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
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # or Python fails once more, at its exit
        raise SystemExit(PIPE_CLOSED)


def forgiving(stream: io.TextIOWrapper, errors: str) -> Output:
    """`stream` again: a character that its encoding lacks becomes "?" instead of ending hours of training."""
    buffering = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return Output(stream.buffer, stream.encoding, errors, **buffering)


def end_with_parent() -> None:
    """Ends this process when its parent is gone, even by kill -9. For children that got $END_WITH_PARENT, the
    parent's process id: a training run whose lab has ended would lock its folder.
    """
    wanted = os.environ.pop("END_WITH_PARENT", "")  # our own children are not the lab's
    if not wanted or os.name != "posix":
        return
    parent = os.getppid()
    if parent == 1 and wanted != "1":  # it went before we came here
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def begin() -> None:
    take_over_interrupts()
    end_with_parent()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = forgiving(sys.stdout, "replace")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = forgiving(sys.stderr, "backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


def started_as_script() -> bool:
    """Whether Python was started with a script of this project, and not with pytest or a notebook."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    return bool(file) and Path(file).resolve().parent == Path(__file__).resolve().parents[1]


if "--multiprocessing-fork" in sys.orig_argv:  # a spawned worker that still imports: its parent hears Ctrl-C
    signal.signal(signal.SIGINT, signal.SIG_IGN)
elif started_as_script():
    begin()
