"""Writing files so that a process may be killed at any moment: what has a name is complete."""

import glob
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` makes a temporary file that takes the place of `path` only when it is complete and on the disk.

    A process that was killed here leaves its temporary file behind; the next one to write `path` removes it.
    """
    for left_over in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not process_is_alive(left_over.name.split(".")[-2]):
            left_over.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        give_default_mode(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """`write` fills a temporary folder that takes the place of `folder` only when it is complete."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.rglob("*"):
            give_default_mode(file)
        remove_folder(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Hides a folder before its files go one by one: whoever is killed here leaves no half of it in sight."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


def give_default_mode(path: Path) -> None:
    """The permissions of any new file, by the umask. safetensors' files can be read by their owner alone."""
    umask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(umask)
    if path.is_file():
        path.chmod(0o666 & ~umask)


def process_is_alive(pid: str) -> bool:
    if os.name == "nt" or not pid.isdecimal():  # on Windows os.kill() would send a Ctrl-C
        return True
    try:
        os.kill(int(pid), 0)  # signal 0 only asks
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's process
        return True
    return True
