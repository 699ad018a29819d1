"""Run folders: their names, checkpoints, logs and run.json, and the lock of a process that trains in one."""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from support.documents import blocks_of_file, sha256
from support.files import link_or_copy, remove_folder, take_lock, write_atomically, write_json, write_text
from support.processes import RANK
from support.tables import DataError, json_lines, read_jsonl

# Folders that stages make in a run's folder. --overwrite removes no others: they may be runs of their own.
SUBFOLDERS = ("checkpoints", "merged", "samples", "judged")


class TrainError(ValueError):
    """Something the user can correct; the message says how."""


@contextlib.contextmanager
def errors_for_users() -> Iterator[None]:
    """An error that the user can correct ends the script with its message and without a traceback."""
    try:
        yield
    except (ValueError, OSError, DataError) as error:  # TrainError is a ValueError
        raise SystemExit(f"{Path(sys.argv[0]).name}: {error}") from None


def run_stage(stage: Callable, cfg, describe: Callable[[Path, dict], str]) -> None:
    """A stage from the command line: rank 0 prints describe(folder, run.json) of the run that it returns."""
    with errors_for_users():
        run = stage(cfg)
        if RANK == 0:
            print(describe(run_folder(cfg), run))


def run_folder(cfg) -> Path:
    """{out}/{name}. Refuses a name that leads to `out` itself or out of it: --overwrite deletes.

    Also one that eval.py would take for two models or for a config file.
    """
    name = Path(cfg.name)
    if not name.parts or name.is_absolute() or ".." in name.parts or not cfg.name.strip():
        raise TrainError(
            f"--name={cfg.name!r} must be the name of a folder in --out={cfg.out}, such as base or tests/base"
        )
    if "," in cfg.name or cfg.name.endswith(".py"):
        raise TrainError(f"--name={cfg.name} must have no comma, and not end in .py")
    return Path(cfg.out) / name


def remove_run(folder: Path) -> None:
    """Removes what a run has written, and nothing from a folder that holds no run."""
    record = folder / "run.json"
    if not record.exists():
        return
    for path in folder.iterdir():
        if path.name in SUBFOLDERS or (path.is_dir() and path.suffix == ".tmp"):
            shutil.rmtree(path)
        elif not path.is_dir() and path != record:
            path.unlink()
    record.unlink()  # the last: after a kill before it, the next --overwrite goes on


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def weights_hash(name: str) -> str | None:
    """sha256 of a folder's weights; None for a model from the hub."""
    files = sorted(Path(name).glob("*.safetensors"))
    return sha256(chain.from_iterable(map(blocks_of_file, files))) if files else None


def lock(folder: Path) -> int:
    """Refuses a folder in which another process trains. The lock ends with its handle or the process."""
    for patience in (0.05, 0.2, 0):  # `locked` may hold it for some microseconds
        handle = take_lock(folder)
        if handle is not None:
            return handle
        time.sleep(patience)
    raise TrainError(f"another process is training in {folder}: let it end, or choose a --name")


def locked(folder: Path) -> bool:
    """Whether a process is training in this folder, or holds the lock of a file."""
    try:
        handle = take_lock(folder, shared=True)
    except OSError:  # not there, or not ours to open
        return False
    if handle is not None:
        os.close(handle)
    return handle is None


# -----------------------------------------------------------------------------
# Checkpoints: folders {run}/checkpoints/step-N


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first. Copies with other names, such as "step-4 (copy)", do not count."""
    found = (folder / "checkpoints").glob("step-*")
    exact = [path for path in found if re.fullmatch(r"step-[1-9]\d*", path.name) and path.is_dir()]
    return sorted(exact, key=step_of)


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    return (checkpoints(folder) or [None])[-1]


def publish(checkpoint: Path) -> None:
    """Links a checkpoint's model files into the run folder: no second copy on the disk."""
    for file in checkpoint.iterdir():
        if file.is_file() and file.name != "state.pt":  # a checkpoint that was asked has samples/
            write_atomically(checkpoint.parents[1] / file.name, functools.partial(link_or_copy, file))


def prune(folder: Path, best: Path, step: int, keep_last: int) -> None:
    """Removes all checkpoints but the best and the last `keep_last` others: if the newest turns out to be
    damaged, there is one to go back to. A checkpoint of a later step than the run has reached is damaged.
    """
    found = checkpoints(folder)
    others = [path for path in found if path != best and step_of(path) <= step]
    kept = [best, *others[-max(1, keep_last) :]]
    for path in found:
        if path not in kept:
            remove_folder(path)


# -----------------------------------------------------------------------------
# Reading what runs have written

RUN_PARTS = {  # of run.json, if they are there
    dict: "settings data evaluation verification combine hardware versions",
    dict | None: "results",  # before the first evaluation
    str | None: "status stage kind task parent tokenizer",
    int | float: "step seconds parameters trained_parameters",
}


def read_json(path: Path) -> dict:
    """The object in a JSON file; TrainError if it holds anything else, or is a run.json whose parts have
    other types.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    valid = isinstance(found, dict)
    if valid and path.name == "run.json":
        for kind, names in RUN_PARTS.items():
            valid &= all(isinstance(found[name], kind) for name in names.split() if name in found)
    if not valid:
        raise TrainError(f"{path} is damaged; remove it, or start the run anew with --overwrite")
    return found


def read_json_if_there(path: Path) -> dict:
    """`read_json`; {} if there is no such file."""
    return read_json(path) if path.exists() else {}


def list_runs(out: str) -> None:
    """A line per run of the folder `out`, and one per checkpoint."""
    files = sorted(Path(out).glob("**/run.json"))
    if not files:
        print(f"no runs in {out}/")
    for file in files:
        try:
            print(*lines_of_run(file), sep="\n")
        except TrainError as error:
            print(error)
        except Exception as error:  # its files may hold anything: one bad run must not hide the others
            print(f"{file.parent}: its files are damaged: {type(error).__name__}: {error}")


def lines_of_run(file: Path) -> list[str]:
    """What `list_runs` prints about the run of a run.json."""
    run = read_json(file)
    checks = {}
    for line in read_jsonl(file.parent / "metrics.jsonl"):
        if "val_loss" in line:
            checks[line["step"]] = f"val_loss {line['val_loss']:.4f} at step {line['step']}"
    best = (run.get("results") or {}).get("best") or {}
    check = checks.get(best.get("step"), "not evaluated")
    minutes = f"{run.get('seconds', 0) / 60:.1f} min"
    lines = [f"{file.parent}  {run.get('status')}  step {run.get('step')}  {minutes}  {check}"]
    for path in checkpoints(file.parent):
        size = sum(f.stat().st_size for f in path.iterdir()) / 2**20
        lines.append(f"    {path}  {size:.0f} MiB  {checks.get(step_of(path), '')}")
    return lines


# -----------------------------------------------------------------------------
# What a training process writes and prints


class RunLog:
    """A run's messages, logs and run.json. Of several processes only rank 0 writes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.wandb = None  # a run of Weights & Biases

    def say(self, text: str) -> None:
        if RANK == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def metrics(self, line: dict) -> None:
        line = {k: v for k, v in line.items() if v is not None}
        self.append("metrics.jsonl", [line])
        if self.wandb:
            self.wandb.log(line, step=line["step"])

    def append(self, name: str, lines: list[dict]) -> None:
        if RANK == 0:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))

    def cut(self, name: str, step: int) -> None:
        """Keeps the lines up to a step: those of later steps will be written again. A last line that a crash
        cut off does not count as damaged.
        """
        file = self.folder / name
        text = file.read_bytes() if file.exists() else b""
        lines = [line for line in json_lines(text) if isinstance(line.get("step", 0), int)]
        damaged = sum(bool(line.strip()) for line in text.split(b"\n")[:-1]) - len(lines)
        if damaged > 0:
            self.say(f"{file}: {damaged} damaged lines are left out")
        kept = [json.dumps(line) + "\n" for line in lines if line.get("step", 0) <= step]
        write_text(file, "".join(kept))

    def write_run(self, run: dict) -> None:
        if RANK == 0:
            write_json(self.folder / "run.json", run)

    def open_wandb(self, project: str, name: str, run: dict) -> None:
        """A resumed run stays the same run of Weights & Biases. Its id is written to run.json before wandb
        creates it; its address follows.
        """
        import wandb

        about = run.setdefault("wandb", {"id": uuid.uuid4().hex[:8]})
        self.write_run(run)
        self.wandb = wandb.init(
            project=project, name=name, config=run["settings"], id=about["id"], resume="allow"
        )
        about["url"] = self.wandb.url  # None if wandb is offline
        self.write_run(run)

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()


class Progress:
    """A progress bar in a terminal; in a log file a line now and then."""

    def __init__(self, name: str, step: int, total: int, log: RunLog):
        self.total = total
        self.log = log
        self.to_file = not sys.stderr.isatty()
        self.printed = time.monotonic()
        hidden = RANK > 0 or self.to_file
        self.bar = tqdm(total=total, initial=step, desc=name, unit="step", disable=hidden)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def show(self, step: int, loss: float, rate: float, seconds: float) -> None:
        """After `step` steps in `seconds`: loss in nats, rate in tokens a second."""
        shown = f"loss {loss:.4f}" if math.isfinite(loss) else ""
        self.bar.set_postfix_str(f"{shown} {rate:,.0f} tok/s", refresh=False)
        self.bar.update()
        now = time.monotonic()
        if self.to_file and (step % max(1, self.total // 20) == 0 or now > self.printed + 60):
            self.printed = now
            left = (self.total - step) * seconds / step / 60
            self.log.say(f"step {step}/{self.total}  {shown}  {left:.1f} min left")
