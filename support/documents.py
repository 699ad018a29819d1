"""Files as documents (.txt, .jsonl, .parquet, plain or gzipped); a held-out tail where no split is given."""

import hashlib
import re
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from support.tables import TABLE, DataError, columns_of, read_rows, shortened, text_lines, text_of

END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 1_000  # documents, at most, in a validation or test split that is cut from a tail
HOLD_OUT = {  # what is said about it
    "train": "all but the held-out tail",
    "test": f"held out: the 5 % before the last 5 %, at most {HELD_OUT:,} documents",
    "validation": f"held out: the last 5 %, at most {HELD_OUT:,} documents",
}
PASSAGE = 2_000  # characters; text without <|endoftext|> is cut at the next blank line after so many


def kind_of_file(path: str) -> str:
    match = re.search(r"\.(txt|tokens|raw|jsonl|parquet)(\.gz)?$", path)
    return match[1] if match else ""


def read_file(path: str, articles: bool = False, about: dict | None = None) -> Iterator[str]:
    """The documents of a file: rows of .jsonl and .parquet (field "text"); of .txt what stands between
    <|endoftext|> marks, or else passages of about PASSAGE characters. `articles`: it is WikiText. Rows
    without text are counted in `about`["left_out"].
    """
    about = {} if about is None else about
    if articles:  # kept to the byte: its perplexity is compared with other people's
        yield from articles_of(wikitext_lines(path))
        return
    if TABLE.search(path):
        yield from texts_of_table(path, about)
        return
    lines = text_lines(path)
    docs = between_marks(lines) if has_marks(path) else passages(lines)
    docs = filter(None, map(str.strip, docs))
    first = next(docs, None)
    if first is None:
        raise DataError(f"{path} holds no text")
    yield first
    yield from docs


def texts_of_table(path: str, about: dict) -> Iterator[str]:
    rows, empty, found = 0, [], False
    for row in read_rows(path, ("text",)):
        rows += 1
        text = text_of(row.get("text"), f'{path}, row {rows}, "text"')
        if text is not None:
            found = True
            yield text
            continue
        about["left_out"] = about.get("left_out", 0) + 1
        if len(empty) < 100:
            empty.append(row)
    if not rows:
        raise DataError(f"{path} holds no text")
    if not found:
        raise nothing_to_read(path, empty, 'a "text"')


def nothing_to_read(source: str, rows: list[dict], what: str) -> DataError:
    """The error for a data set in which no row has its text."""
    return DataError(
        f"{source}: no row has {what}; the columns are {columns_of(rows)} (row 1: {shortened(rows[0])})"
    )


def wikitext_lines(path: str) -> Iterator[str]:
    if not TABLE.search(path):
        return text_lines(path)
    return (row.get("text") or " \n" for row in read_rows(path))  # on the hub a blank line is an empty row


def has_marks(path: str) -> bool:
    return any(END_OF_TEXT in line for line in islice(text_lines(path), 10_000))


def between_marks(lines: Iterable[str]) -> Iterator[str]:
    doc = []
    for line in lines:
        before, *after = line.split(END_OF_TEXT)
        doc.append(before)
        for text in after:
            yield "".join(doc)
            doc = [text]
    yield "".join(doc)


def passages(lines: Iterable[str]) -> Iterator[str]:
    passage, size = [], 0
    for line in lines:
        passage.append(line)
        size += len(line)
        if size >= PASSAGE and (not line.strip() or size >= 4 * PASSAGE):
            yield "".join(passage)
            passage, size = [], 0
    yield "".join(passage)


def articles_of(lines: Iterable[str]) -> Iterator[str]:
    """A title is ` = Title = ` after a blank line; ` = = Section = = ` is not one."""
    article, previous = [], ""
    for line in lines:
        if len(article) > 1 and not previous.strip() and re.fullmatch(r" = [^=]+ = \n", line):
            yield "".join(article)
            article = []
        article.append(line)
        previous = line
    yield "".join(article)


def hold_out_tail(docs: Iterable[str], split: str, torn: bool) -> Iterator[str]:
    """The last 5 % of the documents, at most HELD_OUT, is validation, as many before it test, the rest train.

    One pass, with 2 HELD_OUT documents in memory. `torn`: the last document is cut off, and dropped.
    """
    tail, n = deque(), 0
    for doc in docs:
        tail.append(doc)
        n += 1
        if len(tail) > 2 * HELD_OUT + torn:
            early = tail.popleft()
            if split == "train":
                yield early
    if n < 3:
        raise DataError(f"only {n} document(s): too little text to hold out a validation and a test split")
    tail = list(tail)[: len(tail) - torn]
    k = max(1, min(HELD_OUT, n // 20))
    yield from {"train": tail[: -2 * k], "test": tail[-2 * k : -k], "validation": tail[-k:]}[split]


def blocks_of_file(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def sha256(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()
