"""The state of the runs in a folder, read from their files alone, and the processes that the page starts.

The server keeps no state: after a restart it shows the same. While a run trains, it holds a lock on its
folder and run.json has its process id, so a run that was started in a terminal can be paused too. On SIGTERM
it finishes its step, saves and exits; the same command resumes it exactly.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

from configs import ROOT
from support.observations import observations
from support.results import METRICS, Records, Run, differing, read_json_or_empty, run_of
from support.runs import TrainError, checkpoints, lock, locked
from support.tables import json_lines, read_jsonl

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


def summaries(home: Path) -> list[dict]:
    """What the list of runs shows, by starting time; see `summary`."""
    found = {}
    for name, folder in named_runs(home).items():
        files = ("run.json", "metrics.jsonl", "results.json")
        times = tuple(written_at(folder / file) for file in files)
        found[name] = summary(name, folder, home, times, locked(folder))
    for begun in starting(home):
        run = found.get(begun["name"], {})
        if run.get("state") != "running":
            found[begun["name"]] = run | begun
    return sorted(found.values(), key=lambda run: (str(run.get("started")), run["name"]))


def written_at(file: Path) -> int:
    """Nanoseconds; 0 if there is no such file."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(2048)  # a run is read again only when its files or its lock have changed
def summary(name: str, folder: Path, home: Path, _times: tuple, is_locked: bool) -> dict:
    """Name, state and what run.json and the newest lines of metrics.jsonl say."""
    try:
        run = run_of(folder)
        results = run.get("results") or {}
        checked = results.get("last") or results.get("best") or {}
        found = {key: run.get(key) for key in ("stage", "started", "verifier", "error")}
        found["val_loss"] = checked.get("val_loss")
        for line in json_lines(last_bytes(folder / "metrics.jsonl", 8192)):
            found |= line
        found["step"] = max(found.get("step", 0), run.get("step") or 0)  # not every step has a line
        found["max_steps"] = (run.get("settings") or {}).get("max_steps")
        found["smoke"] = Run(folder, home).smoke
        found["has_results"] = (folder / "results.json").exists()
        return found | {"name": name, "state": state_of(run, is_locked)}
    except Exception as error:  # its files may hold anything: one bad run must not hide the others
        return {"name": name, "stage": None, "state": "lost", "error": f"its files are damaged: {error}"}


def state_of(run: dict, is_locked: bool) -> str:
    """running, finished, interrupted (paused), failed, or lost: its process died without saying anything."""
    if is_locked:
        return "running"
    status = run.get("status")
    return "lost" if status in ("running", None) else status


def last_bytes(file: Path, most: int) -> bytes:
    """The end of a file; nothing if there is no such file."""
    try:
        with open(file, "rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - most))
            return handle.read()
    except OSError:
        return b""


def tail(file: Path, most: int = 2000) -> Iterator[tuple[bool, list[dict]] | None]:
    """Yields (from the start?, lines that are new in a log), None if there are none. A log that was replaced
    begins again. At first at most `most` lines: see `thinned`.
    """
    inode, offset = None, 0
    while True:
        try:
            with open(file, "rb") as handle:
                about = os.fstat(handle.fileno())
                reset = about.st_ino != inode or about.st_size < offset
                inode, offset = about.st_ino, 0 if reset else offset
                handle.seek(offset)
                text = handle.read()
        except OSError:  # not yet written
            reset, inode, text = inode is None, 0, b""
        text = text[: text.rfind(b"\n") + 1]
        offset += len(text)
        lines = thinned(json_lines(text), most)
        yield (reset, lines) if reset or lines else None


def thinned(lines: list[dict], most: int) -> list[dict]:
    """Every k-th line, so that `most` remain; also those of evaluations."""
    every = -(-len(lines) // most)
    last = len(lines) - 1
    return [line for i, line in enumerate(lines) if (last - i) % every == 0 or "val_loss" in line]


# -----------------------------------------------------------------------------
# A run in full


def describe(name: str, folder: Path, home: Path) -> dict:
    """What the page of one run shows beside its curves."""
    run = run_of(folder)
    sentences, todo = observed(folder)
    return {
        "settings": run.get("settings") or {},
        "changed": run.get("changed") or [],
        "checkpoints": [path.relative_to(home).as_posix() for path in checkpoints(folder)],
        "results": results_table(folder, home),
        "observations": sentences,
        "todo": todo,
        "log": log_tail(home, name),
    }


def observed(folder: Path) -> tuple[list[str], list[str]]:
    try:
        return observations(read_jsonl(folder / "metrics.jsonl"))
    except (TypeError, ValueError):
        return ["metrics.jsonl is damaged."], []


def results_table(folder: Path, home: Path) -> dict:
    """Every measurement of a run and its checkpoints, with its interval."""
    rows = []
    for found in Records(home).measurements:
        if found.file.resolve().is_relative_to(folder.resolve()):
            where = f"{found.task} ({found.split})"
            values = [f"{METRICS.get(key, key)} {value}" for key, value in found.values.items()]
            rows.append([where, found.way, found.items, "; ".join(values), found.notes])
    return {"head": ["task", "how", "items", "values [95 % interval]", ""], "rows": rows}


def compare(folders: dict[str, Path]) -> dict:
    """The settings in which runs differ, and what their curves say."""
    settings, seen = {}, {}
    for name, folder in folders.items():
        settings[name] = run_of(folder).get("settings") or {}
        seen[name], _ = observed(folder)
    rows = []
    for key, values in differing(settings).items():
        if key != "out":
            rows.append([key, *map(str, values.values())])
    return {"differences": {"head": ["setting", *folders], "rows": rows}, "observations": seen}


# -----------------------------------------------------------------------------
# Start, pause, resume


def page_file(home: Path, name: str, kind: str) -> Path:
    return home / "logs" / f"page-{quote(name, safe='')}.{kind}"


def start(home: Path, name: str, stage: str, words: list[str]) -> None:
    """Starts `python STAGE.py WORDS` as a process of its own, which outlives this one; its output goes to
    logs/page-NAME.log. That file is locked as long as the process lives. Raises TrainError if it is starting.
    """
    if any(run["name"] == name and run["state"] == "starting" for run in starting(home)):
        raise TrainError(f"{name} is being started already")
    log = page_file(home, name, "log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)  # a run that was paused a moment ago may still hold the old one
    with open(log, "wb") as output:
        held = lock(log)
        try:
            subprocess.Popen(
                [sys.executable, str(ROOT / f"{stage}.py"), *words],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"}, pass_fds=[held],
            )  # fmt: skip
        finally:
            os.close(held)  # the process has inherited it
    page_file(home, name, "json").write_text(json.dumps({"name": name, "stage": stage}))


def starting(home: Path) -> list[dict]:
    """Runs that were started here and have not begun to train yet, or never did."""
    found = []
    for file in home.glob("logs/page-*.json"):
        about = read_json_or_empty(file)
        name, stage = about.get("name"), about.get("stage")
        if not name or written_at(home / name / "run.json") > written_at(file):  # half written; it has begun
            continue
        run = {"name": name, "stage": stage, "state": "starting", "error": None}
        if not locked(page_file(home, name, "log")):
            run |= {"state": "failed", "error": last_words(log_tail(home, name), f"{stage}.py:")}
        found.append(run)
    return found


def last_words(log: str, script: str) -> str:
    """The error at the end of a log: from where the script names itself, else the last line."""
    words = log.strip() or "it ended at once"
    begin = words.rfind(script)
    if begin < 0:
        begin = words.rfind("\n") + 1
    return words[begin:]


def log_tail(home: Path, name: str) -> str:
    """The end of what a run that was started here has printed."""
    return last_bytes(page_file(home, name, "log"), 6000).decode("utf-8", "replace")


def pause(folder: Path) -> None:
    """Asks a run to save and exit. Raises TrainError if it is not running."""
    pid = run_of(folder).get("pid")
    if not locked(folder) or not isinstance(pid, int):
        raise TrainError(f"{folder.name} is not running")
    os.kill(pid, signal.SIGTERM)


def resume(home: Path, name: str, folder: Path) -> None:
    """Starts the command in run.json again. Raises TrainError if that is none of ours, or it still runs."""
    run = run_of(folder)
    if (state := state_of(run, locked(folder))) in ("running", "finished"):
        raise TrainError(f"{name} is {state}")
    script, *flags = shlex.split(str(run.get("command")))[1:] or [""]
    stage = Path(script).stem
    if stage not in STAGES:
        raise TrainError(f"run.json of {name} has no command that can be resumed")
    flags = [word for word in flags if not word.startswith(("--overwrite", "--out="))]
    start(home, name, stage, [*flags, f"--out={home}"])
