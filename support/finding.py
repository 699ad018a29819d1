"""Finds data sets: as files in $DATA_DIR, or else on the Hugging Face hub and in its cache."""

import os
from collections.abc import Iterable

from support.hub import hub_file, hub_rows
from support.tables import DataError, read_rows


def data_folder(data_dir: str | None) -> str:
    return data_dir or os.environ.get("DATA_DIR") or "data"


def first_file(data_dir: str, names: Iterable[str], kinds: Iterable[str] = ("",)) -> str | None:
    """The first of these files in $DATA_DIR, of the first of these kinds, plain or gzipped."""
    for name in names:
        for kind in kinds:
            for path in (os.path.join(data_dir, name + kind), os.path.join(data_dir, f"{name}{kind}.gz")):
                if os.path.exists(path):
                    return path
    return None


def find_rows(
    name: str, hub: tuple[str, ...], part: str, files: list[str], data_dir: str, hint: str, stand_in: str
) -> tuple[list[dict], str]:
    """The rows of a task or a collection, and where they are from. `hub`: repository and configuration.

    `part`: a split on the hub, or a file of a repository that `datasets` cannot read. `hint` and `stand_in`
    are for the error if nothing is found.
    """
    path = first_file(data_dir, files, (".jsonl", ".tsv", ".json", ".csv", ".parquet"))
    if path:
        return list(read_rows(path)), os.path.relpath(path, data_dir)
    try:
        rows = list(read_rows(hub_file(hub[0], part))) if "." in part else hub_rows(*hub, split=part)
    except DataError as error:
        file = f"{os.path.join(data_dir, files[0])}.jsonl (or .csv, .tsv, .parquet, also .gz)"
        raise nowhere(name, error, hub[0], file, hint, stand_in) from None
    return rows, f"{hub[0]} on Hugging Face, {part}"


def nowhere(name: str, error: DataError, hub: str, file: str, hint: str, stand_in: str) -> DataError:
    return DataError(
        f"{name} is not on this disk and could not be fetched: {error}. Get online ({hub} on Hugging Face), "
        f"or put it at {file}{hint}, or use what is embedded: {stand_in}"
    )


def note_left_out(about: dict, n: int, what: str = "without text") -> None:
    """Adds to a run's record, and to its source, how many rows were left out."""
    if n:
        about["left_out"] = about.get("left_out", 0) + n
        about["source"] += f" ({n:,} {what} left out)"
