"""Atomic writes: even if a process is killed, a file under its final name is always complete."""

import fcntl
import glob
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary file), syncs it to the disk and renames it to `path`.

    A killed process leaves its temporary file behind; the next process that writes `path` removes it.
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
    except OSError as error:
        if error.errno:
            error.filename = error.filename or str(path)  # an error of write(), such as a full disk, lacks it
        raise
    finally:
        temporary.unlink(missing_ok=True)


def keep_if_possible(write: Callable, path: Path, content) -> None:
    """write(path, content), for what can be computed again: where it fails, on a full disk or in a read-only
    folder, it says so and goes on.
    """
    try:
        path.parent.mkdir(exist_ok=True)
        write(path, content)
    except OSError as error:
        print(f"{path} is not kept: {error.strerror or error}", file=sys.stderr, flush=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_folder_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls write(temporary folder) and renames it to `folder`."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for file in temporary.rglob("*"):
            give_default_mode(file)
        remove_folder(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Renames a folder before deleting it: a killed process leaves no half-deleted folder under its name."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


def give_default_mode(path: Path) -> None:
    """Sets a new file's usual permissions (by the umask); safetensors lets only the owner read its files."""
    umask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(umask)
    if path.is_file():
        path.chmod(0o666 & ~umask)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def take_lock(folder: Path, wait: bool = False, shared: bool = False) -> int | None:
    """Locks `folder` until the returned handle is closed, or the process ends; None if another process holds
    a lock that excludes this one. On file systems without locks nothing is locked.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        pass
    return handle


def process_is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)  # signal 0 only checks that the process exists
    except (ProcessLookupError, OverflowError):
        return False
    except (OSError, ValueError):  # another user's process; no file of ours
        pass
    return True
