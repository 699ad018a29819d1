"""Reading files: lines of text, JSON lines and tables, plain or gzipped.

Every error is a DataError that names the file and line. All returned text is valid Unicode.
"""

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path


class DataError(Exception):
    """A problem with data that the user can fix; the message says how."""


def valid(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which JSON allows ("\\ud800") and UTF-8 does not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parse_json(text: str):
    """json.loads, with lone surrogates replaced in every string. Raises ValueError."""
    value = json.loads(text)
    if "\\ud" in text or "\\uD" in text:
        return json.loads(valid(json.dumps(value, ensure_ascii=False)))
    return value


def text_of(value, what: str = "a cell") -> str | None:
    """The text of a table cell, stripped; None if the cell is None, NaN, "" or whitespace.

    A number counts as text: 7 and 7.0 are "7". Raises DataError for anything else; `what` is the cell's name.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) in (int, float):  # a bool is no number
        value = str(value)
    if not isinstance(value, str):
        raise DataError(f"{what} should be text, but is {shortened(value)}")
    return value.replace("\r\n", "\n").strip() or None


def shortened(value) -> str:
    """A value as JSON, for an error message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:60] + "..."


# -----------------------------------------------------------------------------
# Lines


def text_lines(path: str) -> Iterator[str]:
    """The lines of a UTF-8 file, plain or .gz, each ending in "\\n", also where the file has "\\r\\n"."""
    number = 0
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path}, line {number}: not UTF-8 text (byte 0x{byte:02x}); if it is Latin-1, convert it with\n"
            f"iconv -f latin1 -t utf-8 OLD > NEW"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: a damaged gzip file, after line {number} ({error}); download or compress it again"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON-lines file that this project wrote; [] if there is no such file."""
    try:
        return json_lines(path.read_bytes())
    except OSError:
        return []


def json_lines(text: bytes) -> list[dict]:
    """The lines that are JSON objects: one that was cut off by a crash, is blank or not UTF-8 is skipped.

    Lines end at "\n" only: str.splitlines() would also cut at U+2028 and U+0085, which JSON strings may hold.
    """
    found = []
    for line in text.split(b"\n"):
        try:
            row = parse_json(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


# -----------------------------------------------------------------------------
# Tables

TABLE = re.compile(r"\.(jsonl|json|tsv|csv|parquet)(\.gz)?$")


def read_rows(path: str, columns: Sequence[str] = ()) -> Iterator[dict]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file, the first four plain or .gz.

    A .json file holds an array of objects, or one object per line; a .tsv file has a header and no quoting.
    `columns`: for parquet files, read only these.
    """
    kind = TABLE.search(path)
    if not kind:
        raise DataError(f"{path}: unknown file type; use .jsonl, .json, .csv, .tsv (also .gz) or .parquet")
    readers = {"jsonl": _json_lines, "json": _json_array, "tsv": _tab_separated, "csv": _comma_separated}
    rows = _parquet(path, columns) if kind[1] == "parquet" else readers[kind[1]](path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            example = '{"text": "..."}'
            raise DataError(f"{path}, row {number}: should be an object like {example}, not {shortened(row)}")
        yield row


def _json_lines(path: str) -> Iterator:
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        try:
            yield parse_json(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None


def _json_array(path: str) -> Iterator:
    try:
        content = parse_json("".join(text_lines(path)))
    except (ValueError, RecursionError):  # maybe one object per line, like many .json files on the hub
        yield from _json_lines(path)
        return
    if not isinstance(content, list):
        raise DataError(f"{path}, row 1: should be an array of rows, but is {shortened(content)}")
    yield from content


def _tab_separated(path: str) -> Iterator[dict]:
    """No quoting: a quotation mark in a review is just a character."""
    lines = (line.rstrip("\n").split("\t") for line in text_lines(path))
    header = next(lines, [])
    for number, cells in enumerate(lines, 2):
        if len(cells) != len(header):
            raise DataError(f"{path}, line {number}: {len(cells)} cells, but the header has {len(header)}")
        yield dict(zip(header, cells, strict=True))


def _comma_separated(path: str) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # by default 128 KB
    reader = csv.DictReader(text_lines(path), strict=True)
    try:
        for row in reader:
            if None in row:  # csv stores surplus cells under the key None
                names = len(reader.fieldnames)
                cells = names + len(row[None])
                raise DataError(f"{path}, line {reader.line_num}: {cells} cells, but the header has {names}")
            yield row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _parquet(path: str, columns: Sequence[str]) -> Iterator[dict]:
    try:
        from pyarrow.parquet import ParquetFile

        file = ParquetFile(path)
        wanted = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(1024, columns=wanted or None):
            yield from batch.to_pylist()
    except ImportError as error:
        raise DataError(f"{path}: reading parquet needs pyarrow, which does not load here: {error}") from None
    except (OSError, ValueError) as error:  # pyarrow's own errors are among them
        raise DataError(f"{path}: not a parquet file ({error})") from None
