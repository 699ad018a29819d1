"""Files as documents (.txt, .jsonl, .parquet, plain or gzipped); a held-out tail where no split is given."""

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import escape, glob
from itertools import chain, islice

from support.tables import TABLE, DataError, read_rows, shortened, text_lines, text_of

END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 1_000  # documents, at most, in a validation or test split that is cut from a tail
HOLD_OUT = {  # how a source names it
    "train": "all but the held-out tail",
    "test": f"held out: the 5 % before the last 5 %, at most {HELD_OUT:,} documents",
    "validation": f"held out: the last 5 %, at most {HELD_OUT:,} documents",
}
PASSAGE = 2_000  # characters; text without <|endoftext|> is cut at the next blank line after so many
PIECES = re.compile(rf"(?s).{{1,{4 * PASSAGE}}}(?!\S)\s*|.{{{4 * PASSAGE}}}")  # of a line, by whole words
DOCUMENTS = re.compile(r"\.(txt|tokens|raw|jsonl|parquet)(\.gz)?$")


@dataclass
class Source:
    """One split of a corpus, found: how to read it, and what a run records about it."""

    read: Callable[[dict], Iterator[str]]  # counts rows without text in the given dict, as "left_out"
    source: str
    licence: str
    fingerprint: Callable[[], str]
    running_text: bool = False  # its documents are pieces of longer texts
    size: int | None = None  # documents to take from a generator, which would never end


def own_files(corpus: str) -> list[str]:
    """The files of a path, a folder or a glob. An existing path is no glob, even with [ ] or * in it."""
    if os.path.isfile(corpus):
        return [corpus]
    is_folder = os.path.isdir(corpus)
    pattern = os.path.join(escape(corpus), "**") if is_folder else corpus
    found = sorted(filter(os.path.isfile, glob(pattern, recursive=True)))
    return list(filter(DOCUMENTS.search, found)) if is_folder else found


def from_files(
    paths: list[str],
    names: list[str],
    licence: str,
    hold_out: str,
    torn: bool = False,
    articles: bool = False,
) -> Source:
    """`names` are what is shown of `paths`. `hold_out`: these files have no splits, so this one is cut from
    their tail. `torn`: the last document is incomplete. `articles`: they are WikiText.
    """
    for path in paths:
        if not DOCUMENTS.search(path):
            raise DataError(f"{path}: cannot read this; .txt, .jsonl and .parquet can be read, also as .gz")
    source = names[0] if len(names) == 1 else f"{len(names)} files, {names[0]} to {names[-1]}"
    if hold_out:
        source += f" ({HOLD_OUT[hold_out]})"

    def read(about: dict) -> Iterator[str]:
        docs = (doc for path in paths for doc in read_file(path, articles, about))
        return hold_out_tail(docs, hold_out, torn) if hold_out else docs

    def fingerprint() -> str:
        return sha256(block for path in paths for block in blocks_of_file(path))

    running = articles or not any(TABLE.search(path) or has_marks(path) for path in paths)
    return Source(read, source, licence, fingerprint, running)


def interleaved(shares: dict[str, float], sources: dict[str, Source], name_of_mix: str) -> Source:
    """A mix in which, at every point, each corpus has had its share of the bytes to within a document.

    A finite corpus is never repeated: the mix ends when the first one does. A generator goes on as long as
    documents are read; of generators alone, the one with the largest share sets the length.
    """

    def read(about: dict) -> Iterator[str]:
        readers = {name: source.read(about) for name, source in sources.items()}
        if all(source.size for source in sources.values()):
            leader = max(shares, key=shares.get)
            readers[leader] = islice(readers[leader], sources[leader].size)
        progress = dict.fromkeys(shares, 0.0)  # bytes so far / share
        while True:
            name = min(progress, key=progress.get)  # the one that is furthest behind
            doc = next(readers[name], None)
            if doc is None:
                return
            progress[name] += len(doc.encode()) / shares[name]
            yield doc

    return Source(
        read,
        "; ".join(f"{shares[name]:g} {name}: {source.source}" for name, source in sources.items()),
        "; ".join(f"{name}: {source.licence}" for name, source in sources.items()),
        lambda: sha256((name_of_mix + source.fingerprint()).encode() for source in sources.values()),
    )


# -----------------------------------------------------------------------------
# One file


def read_file(path: str, articles: bool, about: dict) -> Iterator[str]:
    """The documents of a file: rows of .jsonl and .parquet (field "text"); of .txt the texts between
    <|endoftext|> marks, or else passages of about PASSAGE characters. `articles`: it is WikiText. Rows
    without text are counted in `about`["left_out"].
    """
    if articles:
        docs = articles_of(path)
    elif TABLE.search(path):
        docs = texts_of_table(path, about)
    else:
        lines = text_lines(path)
        docs = filter(None, map(str.strip, between_marks(lines) if has_marks(path) else passages(lines)))
    first = next(docs, None)
    if first is None:
        rows = list(islice(read_rows(path), 100)) if TABLE.search(path) else []
        raise nothing_to_read(path, rows, 'a "text"')
    yield first
    yield from docs


def nothing_to_read(source: str, rows: list[dict], what: str) -> DataError:
    """The error for a data set in which no row has its text."""
    if not rows:
        return DataError(f"{source} is empty: it holds no rows and no text")
    columns = ", ".join(dict.fromkeys(map(str, chain(*rows[:100])))) or "none"
    return DataError(f"{source}: no row has {what}; the columns are {columns} (row 1: {shortened(rows[0])})")


def texts_of_table(path: str, about: dict) -> Iterator[str]:
    for number, row in enumerate(read_rows(path, ("text",)), 1):
        text = text_of(row.get("text"), f'{path}, row {number}: "text"')
        if text is None:
            about["left_out"] = about.get("left_out", 0) + 1
        else:
            yield text


def has_marks(path: str) -> bool:
    return any(END_OF_TEXT in line for line in text_lines(path))


def between_marks(lines: Iterable[str]) -> Iterator[str]:
    doc = ""
    for line in lines:
        before, *after = line.split(END_OF_TEXT)
        doc += before
        for text in after:
            yield doc
            doc = text
    yield doc


def passages(lines: Iterable[str]) -> Iterator[str]:
    passage = ""
    for piece in chain.from_iterable(map(PIECES.findall, lines)):
        passage += piece
        if len(passage) >= PASSAGE and (piece.isspace() or len(passage) >= 4 * PASSAGE):
            yield passage
            passage = ""
    yield passage


def articles_of(path: str) -> Iterator[str]:
    """WikiText, kept to the byte: its perplexity is compared with other people's.

    A title is ` = Title = ` after a blank line; ` = = Section = = ` is not one. On the hub a blank line is an
    empty row.
    """
    is_table = TABLE.search(path)
    lines = (row.get("text") or " \n" for row in read_rows(path)) if is_table else text_lines(path)
    article = ""
    for line in lines:
        if re.fullmatch(r" = [^=]+ = \n", line) and article.endswith(("\n \n", "\n\n")):
            yield article
            article = ""
        article += line
    yield article


def hold_out_tail(docs: Iterable[str], split: str, torn: bool) -> Iterator[str]:
    """The last 5 % of the documents, at most HELD_OUT, is validation, as many before it test, the rest train.

    One pass, with 2 HELD_OUT documents in memory. `torn`: the last document is cut off, and dropped.
    """
    tail = deque()
    n = 0
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
