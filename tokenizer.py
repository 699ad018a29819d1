"""Stage 1: text becomes numbers. Learns a byte-level BPE vocabulary and writes the corpus as token files.

A language model sees integers. Byte-pair encoding (Sennrich et al. 2016; over bytes as in GPT-2) finds the
byte strings that deserve one. This file learns them from scratch, turns text into them and back, and writes
each split of a corpus as one flat file of tokens, which training maps into memory.

    python tokenizer.py                                        # 4,096 tokens from the embedded stories
    python tokenizer.py configs/cpu.py                         # what a profile asks for
    python tokenizer.py --corpus="notes/*.txt" --vocab_size=8192
    python tokenizer.py --corpus=tinystories --tokenizer=gpt2  # nothing to learn: GPT-2's 50,257 tokens

Reads a corpus through data.py. Writes a folder, by default `out/tokens/CORPUS-SIZE/`: `tokenizer.json`,
which `transformers.AutoTokenizer` loads too, and a `.bin` and a `.json` for each split. What is there already
is not made again.
"""

from support.terminal import run_script

import hashlib
import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from configs import parse_config
from data import SPLITS, DataError, corpus_info, documents
from support.cutting import SLAB, SLABS, SPACED_WORDS, at_seams, special_regex
from support.files import write_json
from support.processes import CORES, alone_in
from support.runs import errors_for_users, read_json_if_there
from support.tables import valid
from support.token_files import at_most, open_tokens, tokens_folder, write_tokens
from support.tokenizer_json import (
    BYTE_LETTERS,
    CHAT_TEMPLATE,
    check_tokenizer,
    default_template,
    gpt2_merges,
    parse_tokenizer,
    read_tokenizer,
    write_tokenizer,
)

# <|endoftext|> stands between documents, and serves transformers as bos, eos and pad. The others make a chat:
# <|user|>Hello!<|end|><|assistant|>Hi.<|end|>
EOT = "<|endoftext|>"
SPECIAL_TOKENS = [EOT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]

# First this pattern splits text into words, which no token crosses: contractions; letters, numbers and runs
# of signs, each with a space before it; runs of whitespace, whose last character goes to the next word if it
# can. It is GPT-2's, with possessive quantifiers (`++`), which avoid useless backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same with every digit alone: then 47 + 5 is about digits, not about whether "47" was a frequent word.
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}++", r"\p{N}")
SEAM_PATTERNS = (GPT2_PATTERN, DIGITS_PATTERN)  # with these, long texts may be cut: support/cutting.py

Vocab = dict[int, bytes]
Merges = list[tuple[bytes, bytes]]  # in the order in which they were learnt


@dataclass
class TokenizerConfig:
    """What every stage needs to find the token files."""

    corpus: str = "storyworld"  # a registered name, a path or glob, or a mix: tinystories:0.9,arithmetic:0.1
    tokenizer: str = "bpe"  # "bpe" learns one from the corpus; "gpt2" is GPT-2's; a folder's is reused
    vocab_size: int = 4096  # tokens to learn, counting the 256 bytes and the special tokens
    split_digits: bool = False  # every digit its own token: arithmetic becomes learnable
    out: str = "out"  # folder that holds everything the project makes
    tokens: str = ""  # folder of tokenizer and token files; default: one in {out}/tokens


@dataclass
class TokenizerStageConfig(TokenizerConfig):
    """What only this script does."""

    learn_megabytes: int = 200  # of training text to learn from; more changes next to nothing. 0: all
    train_megabytes: float = 0.0  # of training text to encode, where a run reads less than there is. 0: all
    overwrite: bool = False  # make everything in the folder again


# -----------------------------------------------------------------------------
# Learning: split text into words, count them, merge the most frequent pair again and again


def train_bpe(
    input_path: str | Path | Iterable[str],
    vocab_size: int,
    special_tokens: list[str],
    split_digits: bool = False,
    workers: int = 1,  # accepted and not used: one process counts 20 MB in a second
) -> tuple[Vocab, Merges]:
    """Learn a byte-level BPE vocabulary from a UTF-8 text file, or from an iterable of documents.

    Returns `vocab`, id -> bytes, and `merges`, pairs of bytes in the order learnt. Ids 0-255 are the bytes
    themselves, then come the merges, then the special tokens. `vocab_size` counts all three; a small text may
    not have so many pairs. Special tokens separate texts; nothing is learnt from them. `split_digits` stands
    for DIGITS_PATTERN, and then the Tokenizer needs that pattern too.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is too small: bytes and special tokens alone are {least}")
    special = tuple(special_tokens)
    texts = input_path
    if isinstance(input_path, (str, Path)):
        texts = parts_of_file(input_path, special)
    words = count_words(texts, DIGITS_PATTERN if split_digits else GPT2_PATTERN, special)
    tokens, merges = learn_merges(words, vocab_size - least)
    tokens += [token.encode() for token in special_tokens]
    return dict(enumerate(tokens)), merges


def parts_of_file(path: str | Path, special_tokens: tuple[str, ...]) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="") as file:
        yield from at_seams(iter(partial(file.read, 32 * SLAB), ""), special_tokens)


@cache
def compiled(pattern: str):
    import regex  # 30 ms to import, and only learning needs it; unlike `re` it knows \p{L}

    return regex.compile(pattern)


def count_words(texts: Iterable[str], pattern: str, special_tokens: tuple[str, ...]) -> Counter:
    """How often each word, that is each piece that `pattern` cuts, occurs between special tokens.

    Text repeats itself, so a quick cut at spaces comes first, and the slow pattern sees every *different*
    piece of that once: 2x faster than the pattern alone on 20 MB of English.
    """
    spaced = Counter()
    words = Counter()
    for text in texts:
        for part in special_regex(special_tokens).split(text)[::2]:  # text, special token, text, ...
            spaced.update(SPACED_WORDS.findall(part))
    for piece, n in spaced.items():
        for word in compiled(pattern).findall(piece):
            words[word] += n
    return words


def learn_merges(words: dict[str, int], n_merges: int) -> tuple[list[bytes], Merges]:
    """The heart of BPE: again and again, the most frequent pair of neighbours becomes one token. Returns the
    tokens, bytes first, and the merges.

    Of equally frequent pairs the greater (bytes, bytes) goes first. Counting all pairs after each merge would
    take hours; three things make it seconds. Only the words that have the pair change: `where` lists them. A
    pair only gets rarer, so a heap finds the most frequent one: an entry whose count is too high goes back
    with its present count. And a word is a string with one character for each token, `chr(id)`: `split` and
    `join` replace a pair at the speed of C, from left to right, as encoding does: aaa -> (aa)a.
    """
    tokens = [bytes([b]) for b in range(256)]
    descending = [(-b, 1) for b in range(256)]  # a heap gives the least; the 1 puts "ab" before "a"
    frequency = list(words.values())
    spelled = [valid(word).encode().decode("latin-1") for word in words]  # so far, a character for each byte
    counts = defaultdict(int)  # pair -> how often it occurs
    where = defaultdict(list)  # pair -> words, perhaps twice, or no longer

    def heap_entry(pair: str) -> tuple:
        return -counts[pair], descending[ord(pair[0])], descending[ord(pair[1])], pair

    def replace(old: str, new: str, i: int) -> None:
        counts[old] -= frequency[i]
        counts[new] += frequency[i]
        where[new].append(i)
        appeared.add(new)

    for i, word in enumerate(spelled):
        for a, b in pairwise(word):
            counts[a + b] += frequency[i]
            where[a + b].append(i)
    heap = [heap_entry(pair) for pair in counts]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        count, _, _, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            if counts[pair]:
                heapq.heappush(heap, heap_entry(pair))
            continue
        a, b = pair
        ab = chr(len(tokens))
        merges.append((tokens[ord(a)], tokens[ord(b)]))
        tokens.append(tokens[ord(a)] + tokens[ord(b)])
        descending.append(descending[ord(a)][:-1] + descending[ord(b)])
        appeared = set()
        for i in dict.fromkeys(where.pop(pair)):
            pieces = spelled[i].split(pair)  # between every two pieces there was a pair
            spelled[i] = ab.join(pieces)
            for n, (left, right) in enumerate(pairwise(pieces)):
                if left:
                    replace(left[-1] + a, left[-1] + ab, i)
                elif n:  # right after another pair
                    replace(b + a, ab + ab, i)
                if right:
                    replace(b + right[0], ab + right[0], i)
        counts[pair] = 0
        for new in appeared:
            heapq.heappush(heap, heap_entry(new))
    return tokens, merges


# -----------------------------------------------------------------------------
# Text to tokens and back


class Tokenizer:
    """A vocabulary, its merges and its special tokens.

        tokenizer = Tokenizer.load("out/tokens/storyworld-4096")
        tokenizer.decode(tokenizer.encode("Once upon a time"))  # "Once upon a time"

    Two encoders give the same ids: `encode` runs in tiktoken's Rust core; `encode_plain` is the algorithm in
    Python, to be read, and to be the tests' second opinion.
    """

    def __init__(
        self,
        vocab: Vocab,
        merges: Merges,
        special_tokens: Iterable[str] | None = None,
        pattern: str = GPT2_PATTERN,
    ):
        """Special tokens that `vocab` lacks get the next ids. Raises ValueError if `merges` don't fit it."""
        self.vocab, self.merges, self.pattern = dict(vocab), list(merges), pattern
        ids = {token: i for i, token in self.vocab.items()}
        self.special_ids: dict[str, int] = {}
        for token in dict.fromkeys(special_tokens or ()):
            self.special_ids[token] = i = ids.get(token.encode(), max(self.vocab) + 1)
            self.vocab[i] = token.encode()
        self.special_tokens = tuple(self.special_ids)
        self.vocab_size = max(self.vocab) + 1  # ids run from 0 to vocab_size - 1

        # The bytes, and what is merged from them, must be there; and a later merge must have a higher id.
        try:
            self.ranks = {bytes([b]): ids[bytes([b])] for b in range(256)}
            self.pair_ids: dict[tuple[int, int], int] = {}
            for a, b in self.merges:
                self.ranks[a + b] = self.pair_ids[self.ranks[a], self.ranks[b]] = ids[a + b]
        except KeyError as error:
            raise ValueError(f"the vocabulary lacks {error}, which its merges need") from None
        merged = list(self.pair_ids.values())
        if merged != sorted(merged):
            raise ValueError("the merges are not in the order of their ids")
        self._words = {}  # ids of the words that encode_plain has met
        self.chat_template: str | None = None  # the folder's, if it has one

    @property
    def eot_id(self) -> int:
        return self.special_id(EOT)

    @property
    def bos(self) -> list[int]:
        """What a text begins with."""
        return [self.eot_id]

    pad_id = eot_id

    @property
    def template_tokens(self) -> dict[str, str]:
        """The tokens that a chat template may name."""
        return {"bos_token": EOT, "eos_token": EOT}

    def special_id(self, token: str) -> int:
        if token not in self.special_ids:
            have = ", ".join(self.special_tokens) or "none"
            raise ValueError(f"no special token {token}; there are: {have}")
        return self.special_ids[token]

    def with_special_tokens(self, tokens: Iterable[str]) -> "Tokenizer":
        """The same vocabulary, and these special tokens behind it."""
        return Tokenizer(self.vocab, self.merges, [*self.special_tokens, *tokens], self.pattern)

    @cached_property
    def hash(self) -> str:
        """sha256 of all that decides which ids a text gets."""
        lines = [self.pattern, *(f"{i} {token.hex()}" for i, token in sorted(self.vocab.items()))]
        lines += [f"{a.hex()} {b.hex()}" for a, b in self.merges] + sorted(self.special_tokens)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    # Encoding

    def encode(self, text: str, allowed_special: str | Collection[str] = "all") -> list[int]:
        """The ids of `text`.

        By default, text that spells a special token becomes it. With `allowed_special=()` it stays text: the
        way to encode what users and documents say, which could otherwise end a turn or a document.
        """
        special = self.special_tokens if allowed_special == "all" else tuple(allowed_special)
        ids = []
        for i, part in enumerate(special_regex(special).split(text)):
            if i % 2:
                ids.append(self.special_ids[part])
            else:
                slabs = SLABS.findall(part) if self.pattern in SEAM_PATTERNS else [part]
                for slab in slabs:  # a million spaces before a word would make tiktoken panic
                    ids += self.core.encode_ordinary(slab)
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """The ids that `encode` gives with `allowed_special=()`, in plain Python.

        (`regex` knows newer Unicode than tiktoken: they may differ on letters added after Unicode 16.)
        """
        ids = []
        known = self._words
        for word in compiled(self.pattern).findall(text):
            if word not in known:
                known[word] = self.merge_word(valid(word).encode())
            ids += known[word]
        return ids

    def merge_word(self, word: bytes) -> list[int]:
        """BPE itself: start from bytes; while neighbours can merge, merge the pair that was learnt first."""
        ids = [self.ranks[word[i : i + 1]] for i in range(len(word))]
        while True:
            known = [pair for pair in pairwise(ids) if pair in self.pair_ids]
            if not known:
                return ids
            pair = min(known, key=self.pair_ids.get)
            merged = []
            for i in ids:  # from left to right: aaa -> (aa)a
                if merged and (merged[-1], i) == pair:
                    merged[-1] = self.pair_ids[pair]
                else:
                    merged.append(i)
            ids = merged

    @cached_property
    def core(self):
        """tiktoken's encoder for this vocabulary.

        tiktoken gets ids, not merges: it joins the neighbours that spell the token with the lowest id. Does
        that equal merging in order? For a vocabulary that BPE has learnt, always:
        (1) As long as nothing merges across the two ends of a stretch of text, its inside merges as it would
        alone. (2) So the bytes of a learnt token, alone, become that token: when it was learnt from l and r,
        these were neighbours in some word; by (1), its bytes alone are l, r at that step too.
        (3) Now let neighbours x, y other than l, r spell it. By (1), its bytes alone would be x, y as well,
        at a step at which by (2) they are l, r, or one token already. So such neighbours never meet.
        `load` checks (2) where a vocabulary comes from elsewhere.
        """
        import tiktoken

        special = {EOT: self.eot_id} if EOT in self.special_ids else {}
        return tiktoken.Encoding("", pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=special)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """The ids of each text. All cores work, since the Rust core releases Python's lock."""
        with ThreadPoolExecutor(CORES) as pool:
            return list(pool.map(self.encode, texts))

    def encode_iterable(self, texts: Iterable[str]) -> Iterator[int]:
        """The ids of all `texts` joined, such as the lines of a file that does not fit into memory.

        The interface that a course asks for (tests/test_course.py); token files are written by write_tokens.
        Lazy: it holds some 16 thousand characters, more only if there are more from one space to the next.
        """
        has_seams = self.pattern in SEAM_PATTERNS
        for part in at_seams(texts, self.special_tokens) if has_seams else ["".join(texts)]:
            yield from self.encode(part)

    # Decoding

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids`, a list, array or tensor. Never fails: what is not UTF-8 becomes U+FFFD.

        So do ids that do not exist: models pad their vocabulary, and an untrained one may sample padding.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        hidden = set(self.special_ids.values()) if skip_special_tokens else ()
        return b"".join([self.token_bytes(i) for i in ids if i not in hidden]).decode("utf-8", "replace")

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one id, perhaps only part of a character: to stream, decode them incrementally."""
        return self.vocab.get(i, b"\xef\xbf\xbd")

    @cached_property
    def merge_order(self) -> dict[int, int]:
        """{id: number of the merge that made it, from 1}; bytes and special tokens are in no merge."""
        return {merged: n for n, merged in enumerate(self.pair_ids.values(), start=1)}

    # Files

    def save(
        self,
        folder: str | Path,
        end_token: str = "",
        context_length: int = 0,
        chat_template: str | None = None,
    ) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` for `load` and for transformers.

        `end_token`: of a model that learned conversations, what ends its turn; TRL and others stop there.
        `context_length`: the model's, in tokens, at which transformers warns or truncates; 0: not known.
        `chat_template`: by default the one that was loaded, else ours where its special tokens are there.
        """
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if EOT in self.special_ids:
            config |= dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOT)
        if end_token:
            config["eos_token"] = end_token
        if context_length:
            config["model_max_length"] = context_length
        ours = CHAT_TEMPLATE if self.special_ids.keys() >= set(SPECIAL_TOKENS) else None
        if template := chat_template or self.chat_template or ours:
            config["chat_template"] = template
        config["tokenizer_hash"] = self.hash
        pattern = None if self.pattern == GPT2_PATTERN else self.pattern
        write_tokenizer(Path(folder), self, pattern, config)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read a folder that `save` wrote, or one with any `tokenizer.json` of a GPT-2-like tokenizer."""
        content, config = read_tokenizer(Path(folder))
        try:
            vocab, merges, special_ids, pattern = parse_tokenizer(content)
            tokenizer = cls(vocab, merges, special_ids, pattern or GPT2_PATTERN)
            tokenizer.chat_template = default_template(config.get("chat_template"))
            if config.get("tokenizer_hash") != tokenizer.hash:
                for token, i in tokenizer.ranks.items():  # not from `save`: does the proof in `core` hold?
                    if tokenizer.merge_word(token) != [i]:
                        raise ValueError(f"token {i}, {token!r}, is not what its own merges make")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{folder}/tokenizer.json is not a byte-level BPE tokenizer that we can read: {error}"
            ) from None
        check_tokenizer(Path(folder), tokenizer.hash)
        return tokenizer

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's 50,257 tokens, then the chat tokens."""
        merges = gpt2_merges()
        tokens = [bytes([b]) for b in BYTE_LETTERS] + [a + b for a, b in merges] + [EOT.encode()]
        return cls(dict(enumerate(tokens)), merges, SPECIAL_TOKENS)


# -----------------------------------------------------------------------------
# The stage


def prepare_tokens(cfg: TokenizerStageConfig) -> None:
    """Makes the tokenizer and the token files of these settings, unless they are there."""
    folder = tokens_folder(cfg)
    with alone_in(folder):
        tokenizer = prepare_tokenizer(cfg, folder)
        print(f"{folder}: {tokenizer.vocab_size:,} tokens, {len(tokenizer.special_tokens)} of them special")
        for split in SPLITS:
            prepare_split(cfg, folder, tokenizer, split)


def prepare_tokenizer(cfg: TokenizerStageConfig, folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, if it was made with these settings; or else a new one, saved there."""
    settings = {"corpus": cfg.corpus, "tokenizer": cfg.tokenizer}
    if cfg.tokenizer == "bpe":
        settings |= {name: getattr(cfg, name) for name in ("vocab_size", "split_digits", "learn_megabytes")}
    settings["fingerprint"] = corpus_info(cfg.corpus, "train")["fingerprint"]
    note = folder / "settings.json"  # written before the tokenizer: one without it is not ours to replace
    if (folder / "tokenizer.json").exists() and not cfg.overwrite:
        before = read_json_if_there(note)
        changed = [f"{k} {before.get(k)!r} -> {v!r}" for k, v in settings.items() if before.get(k) != v]
        if changed:
            raise ValueError(
                f"{folder} was made with other settings: {', '.join(changed)}.\n  Models may depend on it: "
                "choose another folder with --tokens=..., or make this one again with --overwrite"
            )
        return Tokenizer.load(folder)
    tokenizer = new_tokenizer(cfg)
    write_json(note, settings)
    tokenizer.save(folder)
    sample = next(documents(cfg.corpus, "validation"))[:200]
    cut = b"|".join(map(tokenizer.token_bytes, tokenizer.encode(sample)))
    print(cut.decode("utf-8", "backslashreplace"))
    return tokenizer


def new_tokenizer(cfg: TokenizerStageConfig) -> Tokenizer:
    if cfg.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if cfg.tokenizer != "bpe":
        return Tokenizer.load(cfg.tokenizer)
    texts = first_megabytes(cfg.corpus, "train", cfg.learn_megabytes, "counting words")
    learnt = train_bpe(texts, cfg.vocab_size, SPECIAL_TOKENS, cfg.split_digits)
    return Tokenizer(*learnt, SPECIAL_TOKENS, DIGITS_PATTERN if cfg.split_digits else GPT2_PATTERN)


def prepare_split(cfg: TokenizerStageConfig, folder: Path, tokenizer: Tokenizer, split: str) -> None:
    """Writes the token file of one split, unless it is there already."""
    try:
        info = corpus_info(cfg.corpus, split)
    except DataError as error:
        if split != "test":
            raise
        print(f"test: {error}")
        return
    if split == "train" and cfg.train_megabytes:
        info["megabytes"] = cfg.train_megabytes
    meta = {}
    there = "; was there"
    with suppress(OSError, ValueError):  # missing, truncated or of another tokenizer
        meta = open_tokens(folder, split, tokenizer)[1]
    same = all(meta.get(key) == info.get(key) for key in ("fingerprint", "megabytes"))
    if cfg.overwrite or not same:
        texts = first_megabytes(cfg.corpus, split, info.get("megabytes", 0), f"encoding {split}", info)
        meta = write_tokens(tokenizer, texts, folder, split, info)
        there = ""
    per_token = meta["bytes"] / meta["tokens"]
    size = f"{meta['documents']:,} documents, {meta['tokens']:,} tokens"
    print(f"{split}: {size}, {per_token:.2f} bytes per token{there}")


def first_megabytes(
    corpus: str, split: str, megabytes: float, what: str, about: dict | None = None
) -> Iterable[str]:
    """The documents at the beginning of a split (megabytes=0: all of them), with a progress bar."""
    texts = at_most(documents(corpus, split, about=about), 1e6 * (megabytes or math.inf))
    return tqdm(texts, what, unit=" documents", unit_scale=True, disable=None, leave=False)


def main() -> None:
    cfg = parse_config(TokenizerStageConfig, __doc__)
    with errors_for_users():
        prepare_tokens(cfg)


if __name__ == "__main__":
    run_script(main)
