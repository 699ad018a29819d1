"""What a run folder keeps so that the same command goes on after a kill, and ends with the same bits (on a
GPU up to rounding: its kernels add in any order).

What: checkpoints/step-N holds the model as a Hugging Face folder, and state.pt with everything else on which
step N + 1 depends: the optimizers' moments, float16's scale, counters, the best evaluation. There is no state
of a random generator or data loader: batches and dropout are functions of (seed, step, rank). Shards are
gathered, so any number of processes can go on from a checkpoint.

When: every save_every steps, at an evaluation whose model is published, after Ctrl-C or SIGTERM, and at the
end. A new checkpoint appears under its name complete or not at all. Then the files of the best one are linked
into the run folder, and older ones are removed.

How a killed run goes on: the same command finds run.json, refuses settings or data that would change the
result, reads the newest checkpoint that is not damaged, drops the log lines of later steps, repeats whatever
a kill may have left undone after saving (links, removals), and computes the next step.
"""

import contextlib
import datetime
import io
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from support.files import remove_folder, write_atomically, write_folder_atomically
from support.machine import git_commit, hardware, versions
from support.memory import is_out_of_memory
from support.runs import TrainError, checkpoints, first_line, newest

# Settings of older versions, with the value that this version computes with.
REMOVED = {"stride": 0, "order": "shuffled"}

# A model that was moved is still the same: where run.json has the same hash of the weights, paths may differ.
PATHS_OF_HASH = {"parent_hash": ("parent", "model", "init_from"), "start_hash": ("start",)}


def write_checkpoint(checkpoint: Path, write_model: Callable[[Path], None], state: dict) -> None:
    """A folder with the model and state.pt."""

    def write(folder: Path) -> None:
        write_model(folder)
        buffer = io.BytesIO()  # torch.save itself does not pass on the disk's errors
        torch.save(state, buffer)
        write_atomically(folder / "state.pt", lambda path: path.write_bytes(buffer.getbuffer()))

    write_folder_atomically(checkpoint, write)


def tidy(folder: Path, run: dict) -> None:
    """Removes temporary files and folders of killed processes, and the checkpoints of a finished run with
    --save_every=0.
    """
    for path in [*folder.glob(".*.tmp"), *folder.glob("checkpoints/.*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if run.get("status") == "finished" and not run.get("settings", {}).get("save_every"):
        for checkpoint in checkpoints(folder):
            remove_folder(checkpoint)
        with contextlib.suppress(OSError):  # not empty, or not there
            (folder / "checkpoints").rmdir()


def first_record(cfg, device: torch.device) -> dict:
    """What run.json says of any run when it begins."""
    commands = ("overwrite", "plan", "measure", "list")
    settings = {name: value for name, value in asdict(cfg).items() if name not in commands}
    return {
        "status": "running",
        "stage": Path(sys.argv[0]).stem,
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": settings,
        "changed": [name for name in settings if was_chosen(cfg, name)],
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "git": git_commit(),
        "versions": versions(),
        "hardware": hardware(device),
    }


def was_chosen(cfg, name: str) -> bool:
    """Whether a setting differs from its default, and from what follows from others, as d_ff from d_model."""
    default = type(cfg).__dataclass_fields__[name].default
    try:
        return getattr(replace(cfg, **{name: default}), name) != getattr(cfg, name)
    except ValueError:  # the default does not go with the rest
        return True


def refuse_another_run(folder: Path, run: dict, cfg, about: dict, free: Iterable[str]) -> None:
    """Raises TrainError if the run in this folder was begun with other settings or on other data.

    `run` is its run.json; the settings in `free` may change, because they change no result.
    """
    free = set(free)
    for name, paths in PATHS_OF_HASH.items():
        if about.get(name) and about[name] == run.get(name):
            free.update(paths)
    settings = asdict(cfg)
    known = run.get("settings", {})
    for name in settings.keys() - known.keys() - free:  # what that version did not have yet
        if was_chosen(cfg, name):
            known = known | {name: type(cfg).__dataclass_fields__[name].default}
    settings |= REMOVED
    for what, before, now in (("with other settings", known, settings), ("on other data", run, about)):
        changes = []
        for name, value in now.items():
            if name not in free and before.get(name, value) != value:
                changes.append(f"{name}: {before[name]!r} -> {value!r}")
        if changes:
            raise TrainError(
                f"{folder} was begun {what} ({', '.join(changes)}). Take that back to resume, choose another "
                "--name, or start anew with --overwrite"
            )


def explained(error: Exception, folder: Path) -> Exception:
    """An error that ended a run, as the user should read it."""
    if isinstance(error, TrainError):
        return error
    if is_out_of_memory(error):
        remedy = "try a smaller --batch_size, --context_length or model"
        return TrainError(f"out of memory: {first_line(error)}; {remedy}")
    if isinstance(error, RuntimeError):
        return error
    where = getattr(error, "filename", None) or folder
    cause = getattr(error, "strerror", None) or first_line(error)
    return TrainError(f"cannot read or write {where}: {cause}; {what_is_left(folder)}")


def what_is_left(folder: Path) -> str:
    """The end of an error message: what is left."""
    last = newest(folder)
    left = f"the last complete checkpoint is {last}" if last else "there is no checkpoint yet"
    return f"{left}: the same command goes on when that is solved"


# -----------------------------------------------------------------------------
# For study: the smallest checkpoint from which training can go on. The Trainer does not use it


def save_checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, iteration: int, out) -> None:
    """Writes weights, optimizer state and the number of steps done to `out`, a path or a binary file."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration}
    if isinstance(out, str | os.PathLike):
        write_atomically(Path(out), lambda path: torch.save(state, path))
    else:
        torch.save(state, out)


def load_checkpoint(src, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Reads what `save_checkpoint` wrote into the model and the optimizer; returns the iteration.

    `src` is a path or a binary file. A pickle could hold code; weights_only=True refuses it.
    """
    state = torch.load(src, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["iteration"]
