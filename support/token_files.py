"""Token files: each split of a corpus as one flat file of ids, which training maps into memory."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

from support.cutting import SLAB
from support.documents import END_OF_TEXT
from support.files import write_atomically, write_json
from support.processes import CORES, map_ahead
from support.runs import read_json

REMEDY = 'run "python tokenizer.py" with this run\'s settings'


def write_tokens(
    tokenizer, texts: Iterable[str], folder: str | Path, split: str, info: dict | None = None
) -> dict:
    """Encodes documents into `{folder}/{split}.bin`; returns what `{split}.json` states about it.

    The .bin is nothing but ids, little-endian uint16 (uint32 for more than 65,536 tokens): an <|endoftext|>
    at the start and one after each document. `info` (source, licence, fingerprint) joins the .json. Documents
    stream through: a corpus need not fit in memory. The .json is written last: a .bin with one is complete.
    """
    import numpy as np

    path = Path(folder) / f"{split}.bin"
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    meta = {"tokenizer": tokenizer.hash, "dtype": dtype.name, "tokens": 0, "documents": 0, "bytes": 0}
    checksum = hashlib.sha256()

    def write(temporary: Path) -> None:
        encode = partial(encode_documents, tokenizer)
        with open(temporary, "wb") as file, ThreadPoolExecutor(CORES) as pool:
            parts = map_ahead(pool, encode, in_batches(texts, SLAB), 4 * CORES)
            for ids, n_documents, n_bytes in chain([([tokenizer.eot_id], 0, 0)], parts):
                data = np.asarray(ids, dtype).tobytes()
                file.write(data)
                checksum.update(data)
                meta["tokens"] += len(ids)
                meta["documents"] += n_documents
                meta["bytes"] += n_bytes  # of text in UTF-8, for bits per byte
            file.flush()
            os.fsync(file.fileno())  # a full disk shows here at the latest
        if not meta["documents"]:
            raise ValueError(f"no documents to write to {path}")
        path.with_suffix(".json").unlink(missing_ok=True)  # it describes the old .bin

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
    meta |= {"sha256": checksum.hexdigest()} | (info or {})
    write_json(path.with_suffix(".json"), meta)
    return meta


def encode_documents(tokenizer, texts: list[str]) -> tuple:
    """The ids of documents, an <|endoftext|> after each; the number of documents; their bytes."""
    joined = END_OF_TEXT.join([*texts, ""])
    if joined.count(END_OF_TEXT) == len(texts) and len(joined) < 4 * SLAB:
        # One call that returns an array: 1.4x faster than a list for each document of 1 KB.
        ids = tokenizer.core.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
    else:  # one is very long, or spells <|endoftext|>, which does not end it
        ids = []
        for text in texts:
            ids += [*tokenizer.encode(text, allowed_special=()), tokenizer.eot_id]
    n_bytes = len(joined.encode()) - len(END_OF_TEXT) * len(texts)
    return ids, len(texts), n_bytes


def at_most(texts: Iterable[str], n_bytes: float) -> Iterator[str]:
    """The first texts, until they have `n_bytes`."""
    for text in texts:
        if n_bytes <= 0:
            return
        n_bytes -= len(text.encode("utf-8", "replace"))
        yield text


def in_batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of texts of about `size` characters in all."""
    batch = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= size:
            yield batch
            batch = []
            length = 0
    if batch:
        yield batch


def open_tokens(folder: str | Path, split: str, tokenizer=None) -> tuple:
    """A token file mapped into memory, and its .json: (np.memmap (tokens,), dict).

    `tokenizer`: the one that the file must have been made with. Raises FileNotFoundError, or ValueError if
    the file is truncated or was made with another tokenizer.
    """
    import numpy as np

    path = Path(folder) / f"{split}.bin"
    about = path.with_suffix(".json")
    if not (path.exists() and about.exists()):
        raise FileNotFoundError(f"there is no {path} with a .json beside it: {REMEDY}")
    meta = read_json(about)
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    size = path.stat().st_size
    expected = meta["tokens"] * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, its .json states {expected:,}: delete it and {REMEDY}")
    made_with = meta["tokenizer"]
    if tokenizer is not None and tokenizer.hash != made_with:
        differ = f"was made with tokenizer {made_with[:8]}.., this run uses {tokenizer.hash[:8]}.."
        raise ValueError(f"{path} {differ}: {REMEDY}")
    return np.memmap(path, dtype, mode="r"), meta


def tokens_folder(cfg) -> Path:
    """The folder of the tokenizer and the token files of these settings."""
    kind = file_name(cfg.tokenizer)
    if cfg.tokenizer == "bpe":
        kind = f"{cfg.vocab_size}-digits" if cfg.split_digits else cfg.vocab_size
    return Path(cfg.tokens or f"{cfg.out}/tokens/{file_name(cfg.corpus)}-{kind}")


def file_name(text: str) -> str:
    """A name unchanged; a path, a glob or a mix shortened to letters and digits, with a checksum."""
    if re.fullmatch(r"\w+", text):
        return text
    readable = re.sub(r"\W+", "_", text).strip("_")
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return f"{readable[-40:]}_{checksum[:6]}"
