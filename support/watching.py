"""The state of the runs in a folder, read from their files alone, and the processes that the page starts.

The server keeps no state: after a restart it shows the same. While a run trains, it holds a lock on its
folder and run.json has its process id, so a run that was started in a terminal can be paused too. On SIGTERM
it finishes its step, saves and exits; the same command resumes it exactly.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

from configs import ROOT
from support.files import process_is_alive, write_atomically
from support.observations import observations
from support.results import METRICS, is_smoke, measurements, read_json, run_of, value_of
from support.runs import TrainError, checkpoints, locked
from support.tables import read_jsonl


class NotFound(ValueError):
    """There is no run or model of this name (any more)."""


class ContextTooLong(TrainError):
    """A prompt and its answer do not fit into the context."""


STAGES = ("train", "finetune", "sft", "dpo", "verifier")  # scripts that train


def named_runs(home: Path) -> dict[str, Path]:
    """{name: folder} of all runs, those of the lab's experiments too."""
    found = {}
    for pattern in ("*/run.json", "*/*/run.json", "experiments/*/*/run.json"):
        for file in home.glob(pattern):
            found[file.parent.relative_to(home).as_posix()] = file.parent
    return found


# -----------------------------------------------------------------------------
# What a run does now


class Watch:
    """Summaries of all runs; files are read again only when they have changed."""

    def __init__(self, home: Path):
        self.home, self.known = home, {}  # known: {name: (stamps of its files, summary)}

    def summaries(self) -> list[dict]:
        """What the list of runs shows, by starting time; see `summary`."""
        found = {}
        for name, folder in named_runs(self.home).items():
            files = (folder / "run.json", folder / "metrics.jsonl", folder / "results.json")
            stamps = (*map(stamp, files), locked(folder))
            if self.known.get(name, (None,))[0] != stamps:
                self.known[name] = (stamps, summary_or_damage(name, folder, self.home))
            found[name] = self.known[name][1]
        for begun in starting(self.home):
            run = found.get(begun["name"], {})
            if run.get("state") != "running":
                found[begun["name"]] = run | begun
        return sorted(found.values(), key=lambda run: (str(run.get("started")), run["name"]))


def summary_or_damage(name: str, folder: Path, home: Path) -> dict:
    """A run's files may hold anything, and may vanish: one bad run must not hide the others."""
    try:
        return summary(name, folder, home)
    except Exception as error:
        return {"name": name, "stage": None, "state": "lost", "error": f"its files are damaged: {error}"}


def stamp(file: Path) -> tuple:
    """What changes when a file is written or replaced."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def summary(name: str, folder: Path, home: Path) -> dict:
    run, lines = run_of(folder), last_lines(folder / "metrics.jsonl")
    settings, results = run.get("settings") or {}, run.get("results") or {}
    newest: dict = {}
    for line in lines:
        newest |= line
    checked = results.get("last") or results.get("best") or {}
    step = max(int(newest.get("step") or 0), int(run.get("step") or 0))
    left = (int(settings.get("max_steps") or 0) - step) * float(newest.get("step_seconds") or 0)
    state = state_of(folder, run)
    return finite(
        {
            "name": name,
            "stage": run.get("stage"),
            "state": state,
            "step": step,
            "max_steps": settings.get("max_steps"),
            "loss": newest.get("loss"),
            "val_loss": newest.get("val_loss", checked.get("val_loss")),
            "seconds": newest.get("seconds", run.get("seconds")),
            "tokens_per_second": newest.get("tokens_per_second"),
            "seconds_left": left if state == "running" and left > 0 else None,
            "started": run.get("started"),
            "smoke": is_smoke(folder, home),
            "parent": run.get("parent"),
            "has_results": (folder / "results.json").exists(),
            "chat": bool(run.get("chat")),
            "verifier": run.get("verifier"),
            "error": run.get("error") if state == "failed" else None,
        }
    )


def state_of(folder: Path, run: dict) -> str:
    """running, finished, interrupted (paused), failed, or lost: its process died without saying anything."""
    if locked(folder):
        return "running"
    status = run.get("status") or "lost"
    return "lost" if status == "running" else status


def last_lines(file: Path, most: int = 8192) -> list[dict]:
    """The lines in the last bytes of a metrics.jsonl."""
    try:
        with open(file, "rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, size - most))
            text = handle.read()
    except OSError:
        return []
    lines = text.split(b"\n")
    return parsed(lines[size > most :])


def parsed(lines: list[bytes]) -> list[dict]:
    """The lines that are JSON objects; numbers that are not finite become None."""
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(finite(value))
    return found


def finite(value):
    """A nest of dicts and lists in which NaN and infinity, which JSON does not have, are None."""
    if isinstance(value, dict):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Tail:
    """The lines that are new in a log since the last look; a log that was replaced begins again."""

    def __init__(self, file: Path, most: int = 2000):
        self.file, self.most = file, most
        self.inode, self.offset, self.begun = None, 0, False

    def news(self) -> tuple[bool, list[dict]] | None:
        """(from the start?, lines), None if there is nothing new. At first at most `most` lines: a whole
        number of lines is left out between two others, but none of an evaluation.
        """
        try:
            with open(self.file, "rb") as handle:
                about = os.fstat(handle.fileno())
                reset = about.st_ino != self.inode or about.st_size < self.offset
                if reset:
                    self.inode, self.offset = about.st_ino, 0
                handle.seek(self.offset)
                text = handle.read()
        except OSError:
            reset, text = not self.begun, b""
        self.begun = True
        whole = text[: text.rfind(b"\n") + 1]
        self.offset += len(whole)
        lines = parsed(whole.split(b"\n"))
        if not (reset or lines):
            return None
        if len(lines) > self.most:
            every, last = math.ceil(len(lines) / self.most), len(lines) - 1
            lines = [x for i, x in enumerate(lines) if i % every == 0 or "val_loss" in x or i == last]
        return reset, lines


# -----------------------------------------------------------------------------
# A run in full


def describe(name: str, folder: Path, home: Path) -> dict:
    """What the page of one run shows beside its curves."""
    run = run_of(folder)
    sentences, todo = observed(folder)
    here = [path.relative_to(home).as_posix() for path in checkpoints(folder)]
    return finite(
        {
            "name": name,
            "run": {k: v for k, v in run.items() if k not in ("settings", "changed")},
            "settings": run.get("settings") or {},
            "changed": run.get("changed") or [],
            "checkpoints": here,
            "results": results_table(folder, home),
            "observations": sentences,
            "todo": todo,
            "log": log_tail(home, name),
        }
    )


def observed(folder: Path) -> tuple[list[str], list[str]]:
    try:
        return observations(read_jsonl(folder / "metrics.jsonl"))
    except (TypeError, ValueError, OSError):
        return ["metrics.jsonl is damaged."], []


def results_table(folder: Path, home: Path) -> dict:
    """Every measurement of a run and its checkpoints, with its interval."""
    rows = []
    for found in measurements(home):
        if found.file.resolve().is_relative_to(folder.resolve()):
            metrics = found.entry["metrics"].items()
            values = "; ".join(f"{METRICS.get(key, key)} {value_of(key, metric)}" for key, metric in metrics)
            where = f"{found.entry.get('task')} ({found.entry.get('split', '')})"
            rows.append([where, found.way, found.entry.get("items"), values, found.notes])
    return {"head": ["task", "how", "items", "values [95 % interval]", ""], "rows": rows}


def compare(names: list[str], folders: list[Path]) -> dict:
    """The settings in which runs differ, and what their curves say."""
    settings = [run_of(folder).get("settings") or {} for folder in folders]
    keys = list(dict.fromkeys(key for some in settings for key in some if key not in ("name", "out")))
    rows = []
    for key in keys:
        values = [str(some.get(key, "")) for some in settings]
        if len(set(values)) > 1:
            rows.append([key, *values])
    said = {name: observed(folder)[0] for name, folder in zip(names, folders, strict=True)}
    return {"differences": {"head": ["setting", *names], "rows": rows}, "observations": said}


# -----------------------------------------------------------------------------
# Start, pause, resume


starting_one = threading.Lock()


def start(home: Path, name: str, stage: str, words: list[str]) -> None:
    """Starts `python STAGE.py WORDS` as a process of its own, which outlives this one; its output goes to
    logs/page-NAME.log. Raises TrainError if the run is being started already.
    """
    logs = home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / f"{stage}.py"), *words]
    with starting_one:
        if any(run["name"] == name and run["state"] == "starting" for run in starting(home)):
            raise TrainError(f"{name} is being started already")
        with open(logs / f"page-{flat(name)}.log", "wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        about = {"name": name, "stage": stage, "pid": process.pid, "began": began(process.pid)}
        try:
            write_atomically(
                logs / f"page-{flat(name)}.json", lambda path: path.write_text(json.dumps(about))
            )
        except OSError:  # a full disk
            process.kill()
            raise
        finally:
            threading.Thread(target=process.wait, daemon=True).start()  # or it would stay as a zombie


def began(pid: object) -> str | None:
    """When a process began, as Linux tells it: process ids are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def flat(name: str) -> str:
    return name.replace("/", "--")


def starting(home: Path) -> list[dict]:
    """Runs that were started here and have not begun to train yet, or never did."""
    found = []
    for file in home.glob("logs/page-*.json"):
        about = read_json(file)
        name, stage, pid = (about.get(key) for key in ("name", "stage", "pid"))
        if not (isinstance(name, str) and file.name == f"page-{flat(name)}.json"):
            continue
        if stamp(home / name / "run.json")[-1:] > stamp(file)[-1:]:  # it has written since
            continue
        alive = process_is_alive(str(pid)) and began(pid) == about.get("began")
        error = None if alive else last_words(log_tail(home, name), f"{stage}.py:")
        state = "starting" if alive else "failed"
        found.append({"name": name, "stage": stage, "state": state, "error": error})
    return found


def last_words(log: str, script: str) -> str:
    """The error at the end of a log: from where the script names itself, else the last line."""
    begin = log.rfind(script)
    return log[begin:].strip() if begin >= 0 else (log.strip().splitlines() or ["it ended at once"])[-1]


def log_tail(home: Path, name: str, most: int = 6000) -> str:
    """The end of what a run that was started here has printed."""
    try:
        text = (home / "logs" / f"page-{flat(name)}.log").read_bytes()
    except OSError:
        return ""
    return text[-most:].decode("utf-8", "replace")


def pause(folder: Path) -> None:
    """Asks a run to save and exit. Raises TrainError if it is not running."""
    pid = run_of(folder).get("pid")
    if not locked(folder) or not isinstance(pid, int):
        raise TrainError(f"{folder.name} is not running")
    os.kill(pid, signal.SIGTERM)


def resume(home: Path, name: str, folder: Path) -> None:
    """Starts the command in run.json again. Raises TrainError if that is none of ours, or it still runs."""
    words = shlex.split(str(run_of(folder).get("command") or ""))
    script = Path(words[1]).stem if len(words) > 1 else ""
    state = state_of(folder, run_of(folder))
    if state in ("running", "finished"):
        raise TrainError(f"{name} is {state}")
    if script not in STAGES:
        raise TrainError(f"run.json of {name} has no command that can be resumed")
    flags = [word for word in words[2:] if not word.startswith(("--overwrite", "--out="))]
    start(home, name, script, [*flags, f"--out={home}"])
