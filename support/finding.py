"""Finds data sets: as files in $DATA_DIR, or else on the Hugging Face hub and in its cache."""

import os
from collections.abc import Iterable
from itertools import product

from support.documents import Source, from_files
from support.hub import hub_file, hub_rows
from support.tables import DataError, read_rows

TABLES = (".jsonl", ".tsv", ".json", ".csv", ".parquet")


def data_folder() -> str:
    return os.environ.get("DATA_DIR") or "data"


def first_file(folder: str, names: Iterable[str], kinds: Iterable[str] = ("",)) -> str | None:
    """The first of these files that is in `folder`, plain or gzipped."""
    paths = (os.path.join(folder, "".join(parts)) for parts in product(names, kinds, ("", ".gz")))
    return next(filter(os.path.exists, paths), None)


def find_edition(name: str, corpus, split: str) -> Source:
    """One split of a data.Corpus: the first edition of which any file is in $DATA_DIR, or else the hub's."""
    data_dir = data_folder()
    folder = os.path.join(data_dir, corpus.folder)
    # One edition for all splits: the validation text of one may be the training text of another.
    edition = corpus.editions[0]
    for other in reversed(corpus.editions):
        if any(first_file(folder, files) for files in other.values()):
            edition = other
    part = next((part for part in ("all", "head", split) if part in edition), None)
    if part is None:
        raise DataError(f"{name} has no {split} split; it has {' and '.join(edition)}")
    paths = []
    names = []
    for file in edition[part]:
        path = first_file(folder, [file])
        if path:
            names.append(os.path.relpath(path, data_dir))
        else:
            try:
                path = hub_file(corpus.hub, file)
            except DataError as error:
                place = f"{os.path.join(folder, file)} (or .gz)"
                raise nowhere(name, error, corpus.hub, place, "storyworld") from None
            names.append(f"{corpus.hub} on Hugging Face, {file}")
        paths.append(path)
    return from_files(
        paths,
        names,
        corpus.licence,
        hold_out="" if part == split else split,
        torn=part == "head",
        articles=corpus.hub == "Salesforce/wikitext",
    )


def find_rows(
    name: str, hub: tuple[str, ...], part: str, files: list[str], embedded: str
) -> tuple[list[tuple], str]:
    """The numbered rows of a task or collection, and where they are from. `hub`: repository, configuration.

    `part`: a split on the hub, or a file of a repository that `datasets` cannot read. `embedded`: what the
    error proposes if nothing is found.
    """
    data_dir = data_folder()
    path = first_file(data_dir, files, TABLES)
    if path:
        return numbered(read_rows(path)), os.path.relpath(path, data_dir)
    is_file = "." in part
    try:
        rows = read_rows(hub_file(hub[0], part)) if is_file else hub_rows(*hub, split=part)
        return numbered(rows), f"{hub[0]} on Hugging Face, {part}"
    except DataError as error:
        place = os.path.join(data_dir, files[0])
        kinds = ".jsonl (or .csv, .tsv, .parquet, also .gz)"
        raise nowhere(name, error, hub[0], place + kinds, embedded) from None


def numbered(rows: Iterable[dict]) -> list[tuple[int, dict]]:
    """Rows with their numbers, from 1, for error messages."""
    return list(enumerate(rows, 1))


def nowhere(name: str, error: DataError, hub: str, place: str, embedded: str) -> DataError:
    return DataError(
        f"{name} is not on this disk and could not be fetched: {error}. Get online ({hub} on Hugging Face), "
        f"or put it at {place}, or use what is embedded: {embedded}"
    )


def note_left_out(about: dict, n: int, what: str) -> None:
    """Adds to a run's record, and to its source, how many rows were left out."""
    if n:
        about["left_out"] = about.get("left_out", 0) + n
        about["source"] += f" ({n:,} {what} left out)"
