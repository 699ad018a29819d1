"""Run folders: their names, checkpoints and logs, and the lock of a process that trains in one."""

import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import uuid
from pathlib import Path

from support.files import write_atomically
from support.processes import tqdm

# Folders that stages make in a run's folder. --overwrite removes no others: they may be runs of their own.
SUBFOLDERS = ("checkpoints", "merged", "samples", "judged")


class TrainError(ValueError):
    """Something the user can mend; the message says how."""


class AlreadyFinished(Exception):
    """The run folder holds a finished run: nothing to do."""

    def __init__(self, run: dict):
        self.run = run
        super().__init__("finished")


def run_folder(cfg) -> Path:
    """{out}/{name}. Refuses a name that leads to `out` itself or out of it: --overwrite deletes."""
    name = Path(cfg.name)
    if not name.parts or name.is_absolute() or ".." in name.parts or not cfg.name.strip():
        raise TrainError(
            f"--name={cfg.name!r} must be the name of a folder in --out={cfg.out}, such as base or tests/base"
        )
    return Path(cfg.out) / name


def remove_run(folder: Path) -> None:
    """Removes what a run has written, and nothing from a folder that holds no run."""
    if not (folder / "run.json").exists():
        return
    for path in folder.iterdir():
        if path.name in SUBFOLDERS or (path.is_dir() and path.suffix == ".tmp"):
            shutil.rmtree(path)
        elif not path.is_dir() and path.name != "run.json":
            path.unlink()
    (folder / "run.json").unlink()  # the last: who is killed before finds it and goes on


def first_line(error: BaseException) -> str:
    """What an error says in a line; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first. Copies with other names, such as "step-4 (copy)", are none."""
    found = (folder / "checkpoints").glob("step-*")
    exact = [path for path in found if re.fullmatch(r"step-[1-9]\d*", path.name) and path.is_dir()]
    return sorted(exact, key=step_of)


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    return (checkpoints(folder) or [None])[-1]


RUN_PARTS = {  # of run.json, if they are there
    dict: "settings data evaluation verification combine hardware versions",
    dict | None: "results",  # before the first evaluation
    str | None: "status stage kind task parent tokenizer",
    int | float: "step seconds parameters trained_parameters",
}


def read_json(path: Path) -> dict:
    """The object in a JSON file; TrainError if it holds anything else, or a run's record has parts of another
    type.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or (path.name == "run.json" and not whole_record(found)):
        raise TrainError(f"{path} is damaged; remove it, or start the run anew with --overwrite")
    return found


def whole_record(run: dict) -> bool:
    """True if the parts of a run.json have their types."""
    for kind, names in RUN_PARTS.items():
        for name in names.split():
            if name in run and not isinstance(run[name], kind):
                return False
    return True


def read_jsonl(path: Path) -> list[dict]:
    """The lines of a log that can be read."""
    return read_log(path)[0]


def read_log(path: Path) -> tuple[list[dict], int]:
    """The lines of a log that can be read, and how many could not. A last line that a crash cut off is not
    counted.
    """
    lines, damaged = [], 0
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return [], 0
    *whole, cut_off = text.split("\n")  # not splitlines(): JSON may hold other line separators
    for line in [*whole, cut_off]:
        try:
            found = json.loads(line)
        except ValueError:
            damaged += bool(line.strip()) and line is not cut_off
            continue
        if isinstance(found, dict) and isinstance(found.get("step", 0), int):
            lines.append(found)
        else:
            damaged += 1
    return lines, damaged


def lock(folder: Path) -> int | None:
    """Refuses a folder that another process trains in; the lock goes when its handle is closed, or we die."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(folder, os.O_RDONLY)
    for patience in (0.05, 0.2, 0):  # `locked` may hold it for some microseconds
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(patience)
    os.close(handle)
    raise TrainError(f"another process is training in {folder}: let it end, or choose a --name")


def locked(folder: Path) -> bool:
    """Whether a process is training in this folder. (Windows does not say: False.)"""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def weights_hash(name: str) -> str | None:
    """sha256 of a folder's weights; None for a model from the hub."""
    files = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest() if files else None


# -----------------------------------------------------------------------------
# What a training process writes and prints


class RunLog:
    """A run's messages, logs and run.json. Of several processes only rank 0 writes."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank = folder, rank
        self.wandb = None  # a run of Weights & Biases

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm().write(text, file=sys.stdout)
            sys.stdout.flush()

    def metrics(self, line: dict) -> None:
        line = {k: v for k, v in line.items() if v is not None}
        self.append("metrics.jsonl", [line])
        if self.wandb:
            self.wandb.log(line, step=line["step"])

    def append(self, name: str, lines: list[dict]) -> None:
        if self.rank == 0:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))

    def cut(self, name: str, step: int) -> None:
        """Keeps the lines up to a step: those of later steps will be written again."""
        lines, damaged = read_log(self.folder / name)
        if damaged:
            self.say(f"{self.folder / name}: {damaged} damaged lines are left out")
        text = "".join(json.dumps(line) + "\n" for line in lines if line.get("step", 0) <= step)
        write_atomically(self.folder / name, lambda path: path.write_text(text))

    def write_run(self, run: dict) -> None:
        if self.rank == 0:
            text = json.dumps(run, indent=2) + "\n"
            write_atomically(self.folder / "run.json", lambda path: path.write_text(text))

    def open_wandb(self, project: str, name: str, run: dict) -> None:
        """All processes that resume a run are one run of Weights & Biases. Its id is in run.json before it is
        made there; its address follows.
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
        self.total, self.log = total, log
        self.to_file, self.printed = not sys.stderr.isatty(), time.monotonic()
        self.bar = tqdm()(
            total=total, initial=step, desc=name, unit="step", disable=log.rank > 0 or self.to_file,
            dynamic_ncols=True,
        )  # fmt: skip

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


def list_runs(out: str) -> None:
    """A line per run of the folder `out`, and one per checkpoint."""
    runs = sorted(Path(out).glob("**/run.json"))
    if not runs:
        print(f"no runs in {out}/")
    for file in runs:
        run = read_json(file)
        best = (run.get("results") or {}).get("best")
        loss = f"val_loss {best['val_loss']:.4f} at step {best['step']}" if best else "not evaluated"
        minutes = f"{run.get('seconds', 0) / 60:.1f} min"
        print(f"{file.parent}  {run.get('status')}  step {run.get('step')}  {minutes}  {loss}")
        lines = read_jsonl(file.parent / "metrics.jsonl")
        evaluated = {line["step"]: f"val_loss {line['val_loss']:.4f}" for line in lines if "val_loss" in line}
        for path in checkpoints(file.parent):
            size = sum(f.stat().st_size for f in path.iterdir()) / 2**20
            print(f"    {path}  {size:.0f} MiB  {evaluated.get(step_of(path), '')}")
