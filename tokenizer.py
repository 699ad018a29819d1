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

import gzip
import hashlib
import heapq
import json
import os
import re
import signal
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain, islice, pairwise
from pathlib import Path

from configs import parse_config
from data import DataError, corpus_info, documents
from support.processes import alone_in, without_interrupts, worker_pool
from support.tables import valid

# <|endoftext|> stands between documents, and serves transformers as bos, eos and pad. The others make a chat:
# <|user|>Hello!<|end|><|assistant|>Hi.<|end|>
EOT = "<|endoftext|>"
SPECIAL_TOKENS = [EOT, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]

# No token reaches across the borders that this pattern draws: contractions; words, numbers and runs of signs,
# each with a space before it; runs of whitespace, whose last character goes to the next word if it can. It is
# GPT-2's, with possessive quantifiers (`++`), which keep a regex engine from giving characters back in vain.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same with every digit alone: then 47 + 5 is about digits, not about whether "47" was a frequent word.
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}++", r"\p{N}")

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class TokenizerConfig:
    """What every stage needs to find the token files."""

    corpus: str = "storyworld"  # a registered name, a path or glob, or a mix: tinystories:0.9,arithmetic:0.1
    tokenizer: str = "bpe"  # "bpe" learns one from the corpus; "gpt2" is GPT-2's; a folder's is reused
    vocab_size: int = 4096  # tokens to learn, counting the 256 bytes and the special tokens
    split_digits: bool = False  # every digit its own token: arithmetic becomes learnable
    out: str = "out"  # folder that holds everything the project makes
    tokens: str = ""  # folder of tokenizer and token files; default {out}/tokens/{corpus}-{vocab_size}


@dataclass
class TokenizerStageConfig(TokenizerConfig):
    """What only this script does."""

    learn_megabytes: int = 200  # of training text to learn from; more changes next to nothing. 0: all
    train_megabytes: float = 0.0  # of training text to encode, where a run reads less than there is. 0: all
    workers: int = 0  # threads and processes; 0: one for each core
    overwrite: bool = False  # make everything in the folder again


# -----------------------------------------------------------------------------
# Cutting text into words

# Now and then a long text must be cut, and in a place that surely separates two words. With our patterns, no
# word has whitespace behind a non-space, and only the last of several whitespace characters can belong to
# what follows. So there is such a *seam* before every whitespace character that a non-space follows.
SEAM_PATTERNS = (GPT2_PATTERN, DIGITS_PATTERN)
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # as Unicode; Python's \s has more
SEAM = f"[{SPACE}][^{SPACE}]"
SPACED_WORDS = re.compile(f"[{SPACE}]*[^{SPACE}]+|[{SPACE}]+")
UP_TO_LAST_SEAM = re.compile(f"(?s).+(?={SEAM})")
SLAB = 1 << 16  # characters; with so many in one call, tiktoken's core is at its fastest
SLABS = re.compile(rf"(?s).{{1,{SLAB}}}(?={SEAM}|\Z)|.+?(?={SEAM}|\Z)")  # longer if no seam is near


@cache
def compiled(pattern: str):
    import regex  # 30 ms to import, and only learning needs it; unlike `re` it knows \p{L}

    return regex.compile(pattern)


@cache
def special_regex(special_tokens: tuple[str, ...]) -> re.Pattern:
    """Splits text at special tokens, and keeps them. Where two begin at one place, the longer wins."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def last_seam(text: str, special_tokens: tuple[str, ...] = ()) -> int:
    """The last place where `text` may be cut however it goes on; 0 if there is none yet."""
    longest = max(map(len, special_tokens), default=0)
    found = UP_TO_LAST_SEAM.match(text, 0, max(0, len(text) - longest + 1))
    cut = found.end() if found else 0
    # Not within a special token; nor in the whitespace before one, which ends a text and so stays together.
    for token in special_regex(special_tokens).finditer(text):
        if token.start() - 1 <= cut < token.end():
            return token.start()
    return cut


def count_words(pattern: str, special_tokens: tuple[str, ...], texts: list[str]) -> Counter:
    """How often each word, that is each piece that `pattern` cuts, occurs between special tokens.

    Text repeats itself, so a quick cut at spaces comes first, and the slow pattern sees every *different*
    piece of that once: 2x faster than the pattern alone on 20 MB of English.
    """
    cut, separator = compiled(pattern).findall, special_regex(special_tokens)
    quick_cut = SPACED_WORDS.findall if pattern in SEAM_PATTERNS else cut
    spaced, words = Counter(), Counter()
    for text in texts:
        for part in separator.split(text)[::2]:  # text, special token, text, ...
            spaced.update(quick_cut(part))
    for piece, n in spaced.items():
        for word in cut(piece):
            words[word] += n
    return words


BATCH = 1 << 21  # characters to count at once: some 30 MB of Python strings
SERIAL_BATCHES = 16  # less text than that is counted before other processes would have started


def count_all_words(texts: Iterable[str], pattern: str, special_tokens: tuple[str, ...], workers: int):
    """`count_words` of any amount of text, a few batches at a time in memory; of much text, on all cores."""
    batches, words = in_batches(texts, BATCH), Counter()
    count = partial(count_words, pattern, special_tokens)
    head = list(islice(batches, SERIAL_BATCHES))
    if len(head) < SERIAL_BATCHES or workers == 1:
        for batch in chain(head, batches):
            words.update(count(batch))
        return words
    with worker_pool(workers, remedy="--workers=1") as pool:
        for part in map_ahead(pool, count, chain(head, batches), ahead=2 * workers):
            words.update(part)
    return words


def in_batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of texts of about `size` characters in all."""
    batch, length = [], 0
    for text in texts:
        batch.append(text)
        length += len(text)
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def map_ahead(pool, function, items: Iterable, ahead: int) -> Iterator:
    """Results in order like `pool.map`'s, but reading `ahead` items at most before they are wanted."""
    waiting = deque()
    try:
        for item in items:
            with without_interrupts():
                waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def read_text(path: Path, pattern: str, special_tokens: tuple[str, ...]) -> Iterator[str]:
    """A text file, plain or gzipped, in parts that end at seams. Line ends stay as they are."""
    rest = ""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            while part := file.read(BATCH):
                rest += part
                if pattern not in SEAM_PATTERNS:
                    continue
                cut = last_seam(rest, special_tokens)
                yield rest[:cut]
                rest = rest[cut:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason}") from None
    yield rest


# -----------------------------------------------------------------------------
# Learning the merges


def train_bpe(
    input_path: str | Path | Iterable[str],
    vocab_size: int,
    special_tokens: list[str],
    pattern: str = GPT2_PATTERN,
    split_digits: bool = False,
    workers: int | None = None,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Learn a byte-level BPE vocabulary from a UTF-8 text file, or from an iterable of documents.

    Returns `vocab`, id -> bytes, and `merges`, pairs of bytes in the order learnt. Ids 0-255 are the bytes
    themselves, then come the merges, then the special tokens. `vocab_size` counts all three; a small text may
    not have so many pairs. Special tokens separate texts; nothing is learnt from them. `split_digits` stands
    for DIGITS_PATTERN, and then the Tokenizer needs that pattern too.
    """
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0:
        least = 256 + len(special_tokens)
        raise ValueError(f"vocab_size={vocab_size} is too small: bytes and special tokens alone are {least}")
    pattern = DIGITS_PATTERN if split_digits else pattern
    special_tokens = tuple(special_tokens)
    if isinstance(input_path, (str, Path)):
        input_path = read_text(Path(input_path), pattern, special_tokens)
    words = count_all_words(input_path, pattern, special_tokens, workers or CORES)
    merges = learn_merges(words, n_merges)
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    return dict(enumerate(tokens + [token.encode() for token in special_tokens])), merges


def learn_merges(words: dict[str, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The heart of BPE: again and again, the most frequent pair of neighbours becomes one token.

    Of equally frequent pairs the lexicographically greater (bytes, bytes) goes first. To count all pairs
    again after each merge would take hours. Three things make it seconds:

    - Only words with the merged pair change. `where` lists them.
    - A pair, once there, only gets rarer; those that appear have the new token in them. So the counts in the
      heap may be out of date: what comes out too high goes back with its present count.
    - A word is a Python string with a character for each token, `chr(id)`. Then `split` and `join` replace a
      pair at the speed of C, from left to right and without overlap, just as encoding will: aaa -> (aa)a.
    """
    tokens = [bytes([b]) for b in range(256)]
    # heapq gives the least, so counts are negated, and bytes turned round to 255 - b. A mark above all others
    # ends them, for "ab" must come before its own beginning "a".
    turned = [chr(255 - b) + "\u0100" for b in range(256)]

    def heap_entry(pair: str) -> tuple[int, str, str]:
        return -counts[pair], turned[ord(pair[0])] + turned[ord(pair[1])], pair

    frequency = list(words.values())
    spelled = [valid(word).encode().decode("latin-1") for word in words]  # so far, a character for each byte
    counts: dict[str, int] = {}
    where: dict[str, list[int]] = {}  # pair -> words; some may have lost the pair since, or be listed twice
    for i, word in enumerate(spelled):
        for a, b in pairwise(word):
            counts[a + b] = counts.get(a + b, 0) + frequency[i]
            where.setdefault(a + b, []).append(i)
    heap = [heap_entry(pair) for pair in counts]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        count, _, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            if counts[pair]:
                heapq.heappush(heap, heap_entry(pair))
            continue
        a, b, new = *pair, chr(len(tokens))
        merges.append((tokens[ord(a)], tokens[ord(b)]))
        tokens.append(tokens[ord(a)] + tokens[ord(b)])
        turned.append(turned[ord(a)][:-1] + turned[ord(b)])
        born = defaultdict(list)  # new pair -> words, as often as it occurs in each
        for i in dict.fromkeys(where.pop(pair)):  # each word once, however often it has the pair
            pieces = spelled[i].split(pair)
            spelled[i] = new.join(pieces)
            n = frequency[i]
            for x in pieces[:-1]:
                if x:  # x a becomes x new
                    counts[x[-1] + a] -= n
                    born[x[-1] + new].append(i)
            for y in pieces[1:]:
                if y:  # b y becomes new y
                    counts[b + y[0]] -= n
                    born[new + y[0]].append(i)
            for between in pieces[1:-1]:
                if not between:  # a b a b becomes new new
                    counts[b + a] -= n
                    born[new + new].append(i)
        counts[pair] = 0
        where.update(born)
        for pair, places in born.items():
            counts[pair] = sum(frequency[i] for i in places)
            heapq.heappush(heap, heap_entry(pair))
    return merges


# -----------------------------------------------------------------------------
# Text to tokens and back

ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (  # Tokenizer.chat in the language that transformers, vLLM and others share
    "{% for message in messages %}{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Tokenizer:
    """A vocabulary, its merges and its special tokens.

        tokenizer = Tokenizer.load("out/tokens/storyworld-4096")
        tokenizer.decode(tokenizer.encode("Once upon a time"))  # "Once upon a time"

    Two encoders give the same ids: `encode` runs in tiktoken's Rust core; `encode_plain` is the algorithm in
    Python, to be read, and to be the tests' second opinion.
    """

    def __init__(
        self,
        vocab: dict[int, bytes],
        merges: list[tuple[bytes, bytes]],
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
            self._ranks = {bytes([b]): ids[bytes([b])] for b in range(256)}
            self._pair_ids: dict[tuple[int, int], int] = {}
            for a, b in self.merges:
                self._ranks[a + b] = self._pair_ids[self._ranks[a], self._ranks[b]] = ids[a + b]
        except KeyError as error:
            raise ValueError(f"the vocabulary lacks {error}, which its merges need") from None
        if any(i >= j for i, j in pairwise(self._pair_ids.values())):
            raise ValueError("the merges are not in the order of their ids")
        self._words: dict[str, list[int]] = {}  # encode_plain's memory
        self.chat_template: str | None = None  # the folder's, if it has one

    @property
    def eot_id(self) -> int:
        return self.special_id(EOT)

    @property
    def bos(self) -> list[int]:
        """What a text begins with."""
        return [self.eot_id]

    @property
    def pad_id(self) -> int:
        return self.eot_id

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
        ids = []
        for part in self._parts(text, allowed_special):
            if isinstance(part, int):
                ids.append(part)
            elif len(part) <= SLAB or self.pattern not in SEAM_PATTERNS:
                ids += self._core.encode_ordinary(part)
            else:  # because a million spaces before a word would make tiktoken panic
                for slab in SLABS.findall(part):
                    ids += self._core.encode_ordinary(slab)
        return ids

    @cached_property
    def _core(self):
        """tiktoken's encoder for this vocabulary.

        tiktoken is told ids, not merges: it joins the neighbours that spell the token with the lowest id. May
        it stand in for merging in order? For a vocabulary that BPE has learnt, always:
        (1) As long as nothing merges across the two ends of a stretch of text, its inside merges as it would
        alone. (2) So the bytes of a learnt token, alone, become that token: when it was learnt from l and r,
        these were neighbours in some word; by (1), its bytes alone are l, r at that step too.
        (3) Now let neighbours x, y other than l, r spell it. By (1), its bytes alone would be x, y as well,
        at a step at which by (2) they are l, r, or one token already. So such neighbours never meet.
        `load` checks (2) where a vocabulary comes from elsewhere.
        """
        import tiktoken

        special = {EOT: self.eot_id} if EOT in self.special_ids else {}
        ranks = self._ranks
        return tiktoken.Encoding("", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special)

    def _parts(self, text: str, allowed_special: str | Collection[str]) -> Iterator[int | str]:
        """`text` cut at the special tokens: theirs as ids, and what is between them."""
        for i, part in enumerate(special_regex(self._allowed(allowed_special)).split(text)):
            yield self.special_ids[part] if i % 2 else part

    def _allowed(self, allowed_special: str | Collection[str]) -> tuple[str, ...]:
        if allowed_special == "all":
            return self.special_tokens
        return tuple(sorted(allowed_special, key=self.special_id))  # which refuses what is none

    def encode_batch(
        self, texts: Iterable[str], threads: int | None = None, allowed_special: str | Collection[str] = "all"
    ) -> list[list[int]]:
        """The ids of each text. All cores work, since the Rust core lets go of Python's lock."""

        def encode_each(batch: list[str]) -> list[list[int]]:
            return [self.encode(text, allowed_special) for text in batch]

        # 64 KB to a task: with 4 KB, handing tasks out costs a third of the time.
        with ThreadPoolExecutor(threads or CORES) as pool:
            return list(chain.from_iterable(pool.map(encode_each, in_batches(texts, SLAB))))

    def encode_iterable(
        self, texts: Iterable[str], allowed_special: str | Collection[str] = "all"
    ) -> Iterator[int]:
        """The ids of all `texts` joined, lazily, however the joints cut words and special tokens.

        Holds some 16 thousand characters; more only if there are more from one space to the next.
        """
        held, length, enough = [], 0, SLAB // 4
        for text in texts:
            held.append(text)
            length += len(text)
            if length >= enough and self.pattern in SEAM_PATTERNS:
                whole = "".join(held)
                cut = last_seam(whole, self._allowed(allowed_special))
                yield from self.encode(whole[:cut], allowed_special)
                held, length = [whole[cut:]], len(whole) - cut
                enough = max(SLAB // 4, 2 * length)  # twice: looking for a seam in vain stays linear
        yield from self.encode("".join(held), allowed_special)

    def encode_plain(self, text: str, allowed_special: str | Collection[str] = "all") -> list[int]:
        """The ids that `encode` gives, in plain Python. Most words have been seen before: they are looked up.

        (`regex` knows newer Unicode than tiktoken: they may differ on letters added after Unicode 16.)
        """
        ids, words = [], self._words
        for part in self._parts(text, allowed_special):
            if isinstance(part, int):
                ids.append(part)
                continue
            for word in compiled(self.pattern).findall(part):
                if word not in words:
                    if len(words) >= 1 << 18:
                        words.clear()
                    words[word] = self.merge_word(valid(word).encode())
                ids += words[word]
        return ids

    def merge_word(self, word: bytes) -> list[int]:
        """BPE itself: start from bytes; while neighbours can merge, merge the pair that was learnt first."""
        ids = [self._ranks[word[i : i + 1]] for i in range(len(word))]
        never = self.vocab_size
        while len(ids) > 1:
            pair = min(pairwise(ids), key=lambda pair: self._pair_ids.get(pair, never))
            if pair not in self._pair_ids:
                break
            merged, i = [], 0
            while i < len(ids):
                if tuple(ids[i : i + 2]) == pair:
                    merged.append(self._pair_ids[pair])
                    i += 2
                else:
                    merged.append(ids[i])
                    i += 1
            ids = merged
        return ids

    # Decoding, and chat

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
        """{id: the how-manieth merge made it, from 1}; bytes and special tokens are in no merge."""
        return {merged: n for n, merged in enumerate(self._pair_ids.values(), start=1)}

    def chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation: [{"role": "user", "content": "Hello!"}, ...].

        As from transformers' `apply_chat_template`, except that what is said is never a special token.
        """
        ids = []
        for message in messages:
            if message["role"] not in ROLES:
                raise ValueError(f"unknown role {message['role']!r}: use {', '.join(ROLES)}")
            ids.append(self.special_id(f"<|{message['role']}|>"))
            ids += self.encode(message["content"].strip(), allowed_special=())
            ids.append(self.special_id("<|end|>"))
        return ids + [self.special_id("<|assistant|>")] if add_generation_prompt else ids

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
        content = json.loads(TOKENIZER_JSON)
        if self.pattern != GPT2_PATTERN:  # GPT-2's is built into the step "ByteLevel"
            split = {"type": "Split", "pattern": {"Regex": self.pattern}}
            split |= {"behavior": "Isolated", "invert": False}
            byte_level = content["pre_tokenizer"] | {"use_regex": False}
            content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        special = {i: token for token, i in self.special_ids.items()}
        content["added_tokens"] = [{"id": i, "content": special[i]} | flags for i in sorted(special)]
        tokens = ((special.get(i) or spell(token), i) for i, token in sorted(self.vocab.items()))
        content["model"]["vocab"] = dict(tokens)
        content["model"]["merges"] = [[spell(a), spell(b)] for a, b in self.merges]

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
        write_json(Path(folder) / "tokenizer_config.json", config | {"tokenizer_hash": self.hash})
        write_json(Path(folder) / "tokenizer.json", content)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read a folder that `save` wrote, or one with any `tokenizer.json` of a GPT-2-like tokenizer."""
        path = Path(folder) / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f'there is no {path}; "python tokenizer.py" makes one')
        content, config = read_json(path), path.with_name("tokenizer_config.json")
        settings = read_json(config) if config.exists() else {}
        template = path.with_name("chat_template.jinja")  # where transformers 5 writes it
        try:
            special = {token["content"]: token["id"] for token in content["added_tokens"]}
            vocab = {i: token.encode() for token, i in special.items()}
            vocab |= {i: unspell(t) for t, i in content["model"]["vocab"].items() if t not in special}
            merges = [tuple(map(unspell, _halves(pair))) for pair in content["model"]["merges"]]
            tokenizer = cls(vocab, merges, special, _pattern_of(content))
            tokenizer.chat_template = settings.get("chat_template")
            if template.exists():
                tokenizer.chat_template = template.read_text(encoding="utf-8")
            if settings.get("tokenizer_hash") != tokenizer.hash:
                for token, i in tokenizer._ranks.items():  # not from `save`: does _core's proof hold?
                    if tokenizer.merge_word(token) != [i]:
                        raise ValueError(f"token {i}, {token!r}, is not what its own merges make")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a byte-level BPE tokenizer that we can read: {error}") from None
        check_tokenizer(Path(folder), tokenizer.hash)
        return tokenizer

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's 50,257 tokens, then the chat tokens. tiktoken downloads the merges once and keeps them."""
        from tiktoken.load import read_file_cached

        url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
        sha256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
        beside_the_data = os.path.join(os.environ.get("DATA_DIR") or "data", "tiktoken_cache")
        if os.path.isdir(beside_the_data):
            os.environ.setdefault("TIKTOKEN_CACHE_DIR", beside_the_data)
        try:
            lines = read_file_cached(url, sha256).decode().splitlines()
        except (OSError, ValueError) as error:
            raise OSError(
                f"GPT-2's merges are not here and cannot be fetched: {type(error).__name__}: {error!s:.120}\n"
                "  Connect to the network once; or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has\n"
                "  kept them, on another machine perhaps; or learn a vocabulary with --tokenizer=bpe"
            ) from None
        merges = [tuple(map(unspell, line.split(" "))) for line in lines[1:]]  # the first line is a version
        tokens = [bytes([b]) for b in byte_letters()] + [a + b for a, b in merges] + [EOT.encode()]
        return cls(dict(enumerate(tokens)), merges, SPECIAL_TOKENS)


HUB_MARK = "hub-"  # begins the hash of a tokenizer that transformers reads


class ForeignTokenizer(ValueError):
    """tokenizer.json is not the one that the weights beside it were trained with."""


def check_tokenizer(folder: Path, found: str) -> None:
    """Compares the hash of a run folder's tokenizer with those that run.json and tokenizer_config.json hold.

    Weights read with another vocabulary give nonsense without an error. A folder without run.json is not
    checked: other programs add tokens to a tokenizer and leave our hash in tokenizer_config.json. Nor is a
    hash compared with one that was computed in the other way: ours, or support.hub_models.HubTokenizer's.
    """
    if not (folder / "run.json").exists():
        return
    config = folder / "tokenizer_config.json"
    recorded = [read_json(folder / "run.json").get("tokenizer")]
    if config.exists():
        recorded.append(read_json(config).get("tokenizer_hash"))
    for expected in recorded:
        if not isinstance(expected, str) or expected == found:
            continue
        if expected.startswith(HUB_MARK) != found.startswith(HUB_MARK):
            continue
        raise ForeignTokenizer(
            f"{folder / 'tokenizer.json'} is not the tokenizer of this run: its hash is {found[:8]}, the "
            f"weights were trained with {expected[:8]}. Copy tokenizer.json back from {folder}/checkpoints, "
            "or train the run again"
        )


@cache
def byte_letters() -> dict[int, str]:
    """How GPT-2 writes bytes as text, in the order of its ids: as in Latin-1, or if invisible from U+0100."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}


@cache
def letter_bytes() -> dict[str, int]:
    return {letter: b for b, letter in byte_letters().items()}


def spell(token: bytes) -> str:
    return "".join(map(byte_letters().__getitem__, token))


def unspell(text: str) -> bytes:
    return bytes(map(letter_bytes().__getitem__, text))


TOKENIZER_JSON = """{
"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
"post_processor": null,
"decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
"model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
"end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false}}"""


def _halves(pair: str | list[str]) -> list[str]:
    return pair.split(" ") if isinstance(pair, str) else pair  # older files have "a b"


def _pattern_of(content: dict) -> str:
    """The pattern of a tokenizer.json. ValueError if it does what we could not do identically."""
    *before, last = (content["pre_tokenizer"] or {}).get("pretokenizers", [content["pre_tokenizer"] or {}])
    if content["model"]["type"] != "BPE" or content["normalizer"] or last.get("type") != "ByteLevel":
        raise ValueError("it is of another kind")
    if last["add_prefix_space"] or any(t["lstrip"] or t["rstrip"] for t in content["added_tokens"]):
        raise ValueError("it adds or strips spaces")
    if not before and last.get("use_regex", True):
        return GPT2_PATTERN
    if [step["type"] for step in before] != ["Split"] or last.get("use_regex", True):
        raise ValueError("it cuts words in its own way")
    return before[0]["pattern"]["Regex"]


# -----------------------------------------------------------------------------
# Token files


@contextmanager
def atomic_open(path: Path, outdates: Path | None = None):
    """A file to write that will be there whole, or not at all. `outdates` goes right before it comes."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if outdates:
            outdates.unlink(missing_ok=True)
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # A write that fails (the disk is full) does not say where.
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, f"cannot write, {error.strerror}", str(path)) from None
        raise


def write_json(path: Path, content: dict) -> None:
    with atomic_open(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and make it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no object): delete it and make it again")
    return found


def tokens_folder(cfg: TokenizerConfig) -> Path:
    """Where the tokenizer and the token files of these settings are."""
    kind = str(cfg.vocab_size) if cfg.tokenizer == "bpe" else file_name(cfg.tokenizer)
    digits = "-digits" if cfg.split_digits and cfg.tokenizer == "bpe" else ""
    return Path(cfg.tokens or Path(cfg.out) / "tokens" / f"{file_name(cfg.corpus)}-{kind}{digits}")


def file_name(text: str) -> str:
    """A name as it is; for a path, a glob or a mix, what is readable of it, and a checksum."""
    if re.fullmatch(r"\w+", text):
        return text
    readable = re.sub(r"\W+", "_", text).strip("_")[-40:]
    return f"{readable}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def write_tokens(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    folder: str | Path,
    split: str,
    info: dict | None = None,
    threads: int | None = None,
) -> dict:
    """Encode documents into `{folder}/{split}.bin`; returns what `{split}.json` then says about it.

    The .bin is nothing but ids, little-endian uint16 (uint32 for more than 65,536 tokens): an <|endoftext|>
    at the start and one after each document. `info` (source, licence, fingerprint) joins the .json. Documents
    stream through: a corpus need not fit in memory. The .json comes last, so what has one is complete.
    """
    import numpy as np

    path, threads = Path(folder) / f"{split}.bin", threads or CORES
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    meta = {"tokenizer": tokenizer.hash, "dtype": dtype, "tokens": 0, "documents": 0, "bytes": 0}
    checksum = hashlib.sha256()
    with atomic_open(path, outdates=path.with_suffix(".json")) as file, ThreadPoolExecutor(threads) as pool:
        start = ([tokenizer.eot_id], 0, 0)
        parts = map_ahead(pool, partial(_encode_documents, tokenizer), in_batches(texts, SLAB), 4 * threads)
        for ids, n_documents, n_bytes in chain([start], parts):
            data = np.asarray(ids, np.dtype(dtype).newbyteorder("<")).tobytes()
            file.write(data)
            checksum.update(data)
            meta["tokens"] += len(ids)
            meta["documents"] += n_documents
            meta["bytes"] += n_bytes  # of text in UTF-8, without separators: what bits per byte divides by
        if not meta["documents"]:
            raise ValueError(f"no documents to write to {path}")
    meta |= {"sha256": checksum.hexdigest()} | (info or {})
    write_json(path.with_suffix(".json"), meta)
    return meta


def _encode_documents(tokenizer: Tokenizer, texts: list[str]) -> tuple:
    """Ids of documents, an <|endoftext|> after each; the number of documents; their bytes."""
    joined = EOT.join([*texts, ""])
    try:
        n_bytes = len(joined.encode()) - len(EOT) * len(texts)
    except UnicodeEncodeError:
        return _encode_documents(tokenizer, [valid(text) for text in texts])
    if joined.count(EOT) == len(texts) and len(joined) < 4 * SLAB:
        # All in one call, into an array: 1.4x faster than lists of ids for documents of 1 KB.
        ids = tokenizer._core.encode_to_numpy(joined, allowed_special={EOT}, disallowed_special=())
    else:  # one is very long, or spells <|endoftext|> and must not end there
        ids = [i for text in texts for i in (*tokenizer.encode(text, allowed_special=()), tokenizer.eot_id)]
    return ids, len(texts), n_bytes


def open_tokens(folder: str | Path, split: str, tokenizer: "Tokenizer | str | None" = None) -> tuple:
    """A token file mapped into memory, and its .json: (np.memmap (tokens,), dict).

    FileNotFoundError if it is not there; ValueError if it is cut short, or made with another tokenizer than
    `tokenizer` (or the one with this hash).
    """
    import numpy as np

    path = Path(folder) / f"{split}.bin"
    remedy = 'run "python tokenizer.py" with this run\'s settings'
    if not (path.exists() and path.with_suffix(".json").exists()):
        raise FileNotFoundError(f"there is no {path} with a .json beside it: {remedy}")
    meta = read_json(path.with_suffix(".json"))
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    size, expected = path.stat().st_size, meta["tokens"] * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path} has {size:,} bytes, its .json says {expected:,}: delete it and {remedy}")
    wanted = getattr(tokenizer, "hash", tokenizer)
    if wanted and meta["tokenizer"] != wanted:
        was, now = meta["tokenizer"][:8], wanted[:8]
        raise ValueError(f"{path} was made with tokenizer {was}.., this run uses {now}..: {remedy}")
    return np.memmap(path, dtype, mode="r"), meta


# -----------------------------------------------------------------------------
# The stage


def prepare_tokens(cfg: TokenizerStageConfig) -> tuple[Tokenizer, Path]:
    """The tokenizer and the folder of these settings, after making what is not there yet."""
    folder = tokens_folder(cfg)
    with alone_in(folder):
        return make_tokens(cfg, folder), folder


def make_tokens(cfg: TokenizerStageConfig, folder: Path) -> Tokenizer:
    tokenizer = prepare_tokenizer(cfg, folder)
    print(f"{folder}: {tokenizer.vocab_size:,} tokens, {len(tokenizer.special_tokens)} of them special")
    for split in ("train", "validation", "test"):
        try:
            info = corpus_info(cfg.corpus, split)
        except DataError as error:
            if split != "test":
                raise
            print(f"test: {str(error).splitlines()[0]}")
            continue
        meta, rate = None, "was there"
        with suppress(OSError, ValueError):  # missing, cut short or foreign
            meta = open_tokens(folder, split, tokenizer)[1]
        most = cfg.train_megabytes if split == "train" else 0
        info |= {"megabytes": most} if most else {}
        if not meta or any(meta.get(k) != info.get(k) for k in ("fingerprint", "megabytes")) or cfg.overwrite:
            start = time.perf_counter()
            texts = at_most(documents(cfg.corpus, split, about=info), 1e6 * (most or float("inf")))
            texts = with_progress(texts, f"encoding {split}")
            meta = write_tokens(tokenizer, texts, folder, split, info, cfg.workers)
            rate = f"{meta['bytes'] / 1e6 / (time.perf_counter() - start):.1f} MB/s"
        per_token = f"{meta['bytes'] / meta['tokens']:.2f} bytes per token"
        print(f"{split}: {meta['documents']:,} documents, {meta['tokens']:,} tokens, {per_token}; {rate}")
    return tokenizer


def prepare_tokenizer(cfg: TokenizerStageConfig, folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, if it was made with these settings; or else a new one, saved there."""
    settings = {"corpus": cfg.corpus, "tokenizer": cfg.tokenizer}
    if cfg.tokenizer == "bpe":
        settings |= {name: getattr(cfg, name) for name in ("vocab_size", "split_digits", "learn_megabytes")}
    settings["fingerprint"] = corpus_info(cfg.corpus, "train")["fingerprint"]
    note = folder / "settings.json"  # written before the tokenizer: one without it is not ours to replace
    if (folder / "tokenizer.json").exists() and not cfg.overwrite:
        before = read_json(note) if note.exists() else {}
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
    report(tokenizer, next(documents(cfg.corpus, "validation")))
    return tokenizer


def new_tokenizer(cfg: TokenizerStageConfig) -> Tokenizer:
    if cfg.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if cfg.tokenizer != "bpe":
        return Tokenizer.load(cfg.tokenizer)
    start, pattern = time.perf_counter(), DIGITS_PATTERN if cfg.split_digits else GPT2_PATTERN
    texts = at_most(documents(cfg.corpus, "train"), 1e6 * (cfg.learn_megabytes or float("inf")))
    texts = with_progress(texts, "counting words")
    vocab, merges = train_bpe(texts, cfg.vocab_size, SPECIAL_TOKENS, pattern, workers=cfg.workers)
    print(f"learnt {len(merges):,} merges in {time.perf_counter() - start:.1f} s")
    if len(vocab) < cfg.vocab_size:
        print(f"no pairs are left to merge: {len(vocab):,} tokens, not {cfg.vocab_size:,}")
    return Tokenizer(vocab, merges, SPECIAL_TOKENS, pattern)


def at_most(texts: Iterable[str], n_bytes: float) -> Iterator[str]:
    for text in texts:
        if n_bytes <= 0:
            return
        n_bytes -= len(text.encode("utf-8", "replace"))
        yield text


def with_progress(texts: Iterable[str], what: str) -> Iterator[str]:
    """`texts`, with a bar that counts characters where somebody watches."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for text in texts:
            yield text
            bar.update(len(text))


def report(tokenizer: Tokenizer, sample: str) -> None:
    """What one wants to see of a new vocabulary: its longest tokens, and where it cuts."""
    learnt = sorted((a + b for a, b in tokenizer.merges), key=len, reverse=True)
    print("longest tokens:", ", ".join(repr(token.decode("utf-8", "replace")[:30]) for token in learnt[:8]))
    sample = " ".join(sample.split())[:200]
    for text in (sample, "The wizard's 12 apples cost $3.50!", "A naïve café in 東京", "<|user|>Hi!<|end|>"):
        tokens = map(tokenizer.token_bytes, tokenizer.encode(text))
        print("  " + "|".join(token.decode("utf-8", "backslashreplace") for token in tokens))


def main() -> None:
    cfg = parse_config(TokenizerStageConfig, __doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave the way that cleans up
    try:
        prepare_tokens(cfg)
    except KeyboardInterrupt:
        print("interrupted; nothing is half-written, the same command goes on", file=sys.stderr)
        raise
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"tokenizer.py: {error}")


if __name__ == "__main__":
    run_script(main)
