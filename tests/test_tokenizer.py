"""The tokenizer against second opinions: a slow BPE written out here, tiktoken, tokenizers, transformers."""

import errno
import gzip
import json
import os
import random
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from collections import Counter
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support import cutting
from support.chat_template import marked_ids
from support.runs import read_json
from support.tokenizer_json import spell, unspell
from tokenizer import (
    DIGITS_PATTERN,
    EOT,
    GPT2_PATTERN,
    SPECIAL_TOKENS,
    Tokenizer,
    TokenizerConfig,
    open_tokens,
    tokens_folder,
    train_bpe,
    write_tokens,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("DATA_DIR") or ROOT.parent / "shared" / "data")

# All that is awkward: contractions, digits, runs of spaces, CRLF, tabs, accents, ideographs, emoji, repeats.
TEXT = """The cat can't see what they'll do; we've said it's 3 o'clock, 2024-06-30, 1,234.5 -- "really?!"
\tdef f(x):\r\n        return x  # naïve café\n\n\n   trailing   \n 東京 と 京都。
Привет, мир! ½ ² ٣٤ 👩‍👩‍👧 e\u0301 \u00a0nbsp\u3000wide
aaaa aaa aaaaaaa abab ababab banana bananas the then there these other others <|endoftext|> <|end <|end|>
"""
WORDS = (
    "the cat sat on a mat and then another can't bear 12 or 345 bananas , it said . low lower newer".split()
)
rng = random.Random(1)
CORPUS = TEXT + " ".join(rng.choices(WORDS, k=5000)) + "\n" + TEXT


def real(name: str) -> str:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {path}")
    return gzip.decompress(path.read_bytes()).decode()


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    return Tokenizer(*train_bpe([CORPUS], 600, SPECIAL_TOKENS), SPECIAL_TOKENS)


@pytest.fixture(scope="session")
def digits() -> Tokenizer:
    learnt = train_bpe([CORPUS], 500, SPECIAL_TOKENS, split_digits=True)
    return Tokenizer(*learnt, SPECIAL_TOKENS, DIGITS_PATTERN)


@pytest.fixture(scope="session")
def gpt2() -> Tokenizer:
    if not (os.environ.get("TIKTOKEN_CACHE_DIR") or (SHARED / "tiktoken_cache").exists()):
        pytest.skip("needs GPT-2's vocabulary in TIKTOKEN_CACHE_DIR")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    return Tokenizer.gpt2()


def auto(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def hf_pair(small, digits, tmp_path_factory):
    folders = [tmp_path_factory.mktemp("saved") for _ in range(2)]
    for tokenizer, folder in zip((small, digits), folders, strict=True):
        tokenizer.save(folder)
    return [auto(folder) for folder in folders]


# Letters newer than the regex engines' common Unicode version may be cut differently by each.
known = st.characters(exclude_categories=("Cs", "Cn")).filter(lambda c: unicodedata.category(c) != "Cn")
odd = [*SPECIAL_TOKENS, *TEXT.split(" "), " ", "  ", "\n", "\r\n", "a", "<|", "|>", "'", "'r", "e"]
texts = st.one_of(st.text(known), st.lists(st.sampled_from(odd)).map("".join), st.text("ab '\n 1"))


# -----------------------------------------------------------------------------
# Learning


def slow_bpe(text: str, n_merges: int, special_tokens: list[str], pattern: str) -> list[tuple[bytes, bytes]]:
    """BPE with no trick in it: count all pairs, merge the greatest (count, pair), again and again."""
    parts = regex.split("|".join(map(regex.escape, special_tokens or ["\0"])), text)
    words = [[bytes([b]) for b in w.encode()] for part in parts for w in regex.findall(pattern, part)]
    merges = []
    while len(merges) < n_merges:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in words:
            for i in range(len(word)):
                if tuple(word[i : i + 2]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
    return merges


@pytest.mark.parametrize("split_digits, pattern", [(False, GPT2_PATTERN), (True, DIGITS_PATTERN)])
def test_merges_are_those_of_a_slow_implementation(split_digits, pattern, tmp_path):
    (tmp_path / "text.txt").write_bytes(CORPUS[:4000].encode())
    vocab, merges = train_bpe(tmp_path / "text.txt", 400, SPECIAL_TOKENS, split_digits)
    assert merges == slow_bpe(CORPUS[:4000], 139, SPECIAL_TOKENS, pattern)
    tokens = [bytes([i]) for i in range(256)] + [a + b for a, b in merges]
    assert vocab == dict(enumerate(tokens + [token.encode() for token in SPECIAL_TOKENS]))


@settings(max_examples=60, deadline=None)
@given(st.text("aab c"), st.integers(0, 30))
@example("aaaa aaa aa a aaaaa", 8)
@example("ab zy zyx", 3)  # ties go to the greater pair of bytes
@example("aaa", 5)  # fewer pairs than asked for
def test_merges_of_overlapping_pairs_are_those_of_a_slow_implementation(text, n):
    vocab, merges = train_bpe([text], 256 + n, [])
    assert merges == slow_bpe(text, n, [], GPT2_PATTERN) and len(vocab) == 256 + len(merges)


def test_one_long_word_takes_a_time_that_grows_with_its_length_alone():
    random.seed(1)
    for word in ("a" * 200_000, "".join(random.choices("ACGT", k=200_000))):
        begun = time.process_time()
        train_bpe([word], 296, [])
        assert time.process_time() - begun < 2  # it was quadratic: 20,000 letters took longer


# -----------------------------------------------------------------------------
# Encoding


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_all_encoders_agree_and_what_is_encoded_decodes_to_itself(text, small, digits, hf_pair):
    for ours, theirs in zip((small, digits), hf_pair, strict=True):
        plain, ids = ours.encode(text, allowed_special=()), ours.encode(text)
        assert ours.encode_plain(text) == plain and theirs.encode(text) == ids
        assert ours.decode(plain) == ours.decode(ids) == text
        single = [ours.decode([i]) for i in plain] if ours is digits else []
        assert all(len(token) == 1 for token in single if regex.search("[0-9]", token))


@settings(max_examples=150, deadline=None)
@given(st.binary(), st.text(), st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 600)))
def test_any_unicode_and_bytes_can_be_encoded_and_any_ids_decoded(small, data, text, ids):
    assert small.decode(small.encode(f"\ud800{text}")) == small.decode(small.encode_plain(f"\ufffd{text}"))
    for some in (list(data), small.merge_word(data)):  # ids 0-255 are the bytes
        assert small.decode(some) == data.decode("utf-8", "replace")
    assert unspell(spell(data)) == data
    assert small.decode(ids) == small.decode(np.array(ids, dtype=np.int64))
    assert small.decode([104, small.vocab_size, 105]) == "h\ufffdi"


@settings(max_examples=200, deadline=None)
@given(st.text("abc", min_size=0, max_size=60), st.integers(0, 40), st.text("abc", max_size=30))
def test_rank_order_and_merge_order_agree_for_any_learnt_vocabulary(corpus, n, text):
    """The claim in Tokenizer.core, where it would break first: of few letters, tokens nest and overlap."""
    tokenizer = Tokenizer(*train_bpe([corpus], 256 + n, []))
    assert tokenizer.encode(text) == tokenizer.encode_plain(text)


def test_gpt2_gives_the_ids_of_tiktoken_and_the_known_ones(gpt2):
    import tiktoken

    theirs = tiktoken.get_encoding("gpt2")
    assert gpt2.eot_id == 50256 and gpt2.special_ids["<|end|>"] == 50260 and gpt2.vocab_size == 50261
    for text in (TEXT.replace("<|end|>", ""), real("wikitext-2/wiki.test.tokens.gz")):
        assert gpt2.encode(text) == theirs.encode(text, allowed_special="all")
    assert gpt2.encode_plain(text[:200_000]) == gpt2.encode(text[:200_000])


def test_long_texts_are_cut_without_a_trace(monkeypatch, small):
    pieces = [CORPUS.replace("<|", "< |"), " " * 3000 + "x", "\n \t" * 500, "y" * 3000, " \n" * 1000]
    text = "".join(rng.sample(pieces * 3, 15))
    monkeypatch.setattr("tokenizer.SLABS", regex.compile(cutting.SLABS.pattern.replace("65536", "100")))
    assert small.encode(text) == small.encode_plain(text)
    for text in (" " * 1_000_000 + "x", "\n" * 1_000_000, "ab" * 200_000):
        assert small.decode(small.encode(text)) == text


overlapping = ["<a b>", "<a b> <c>", " <", "b> x", EOT, EOT + EOT]
pieces = st.sampled_from([*overlapping, "<a", " b>", " ", "  ", "x", "\n"])


@settings(max_examples=300, deadline=None)
@given(texts | st.lists(pieces).map("".join), st.lists(st.integers(0, 100)), st.integers(1, 40))
def test_encode_iterable_equals_encode_wherever_the_text_is_cut(small, text, cuts, enough):
    cuts = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    chunks = [text[a:b] for a, b in pairwise(cuts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "SLAB", 4 * enough)  # how much it waits for
        for tokenizer in (small, Tokenizer(small.vocab, small.merges, overlapping)):
            assert list(tokenizer.encode_iterable(chunks)) == tokenizer.encode(text)


def test_encode_iterable_holds_little_of_an_endless_text(small):
    endless = small.encode_iterable("a line of an endless text\n" for _ in count())
    tracemalloc.start()
    for _ in range(20_000):
        next(endless)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_special_tokens_become_ids_only_where_they_are_allowed(small):
    text, eot, end = f"a{EOT}b<|end|>", small.eot_id, small.special_ids["<|end|>"]
    assert small.encode(text) == [ord("a"), eot, ord("b"), end]
    assert max(small.encode(text, allowed_special=())) < eot
    assert small.decode(small.encode(text), skip_special_tokens=True) == "ab"
    assert small.encode_batch([text, CORPUS, ""]) == [small.encode(t) for t in (text, CORPUS, "")]
    double = Tokenizer(small.vocab, small.merges, [EOT, EOT + EOT])  # the longest one counts
    assert double.encode(EOT * 3) == [double.special_ids[EOT + EOT], double.eot_id]


def test_the_hash_tells_everything_that_changes_ids(small, digits):
    vocab, merges = small.vocab, small.merges
    others = [digits, Tokenizer(vocab, merges[:-1], SPECIAL_TOKENS), Tokenizer(vocab, merges, [EOT])]
    others.append(Tokenizer(vocab, merges, SPECIAL_TOKENS, DIGITS_PATTERN))
    assert Tokenizer(vocab, merges, SPECIAL_TOKENS).hash == small.hash
    assert len({small.hash, *(t.hash for t in others)}) == 5


# -----------------------------------------------------------------------------
# Files, and transformers


@pytest.mark.parametrize("name, model_type", [("small", None), ("digits", "llama"), ("gpt2", "gpt2")])
def test_transformers_loads_what_we_save_and_gives_the_same_ids(name, model_type, tmp_path, request):
    """Whatever model lies beside it: for some model types transformers would rather rebuild the tokenizer."""
    tokenizer = request.getfixturevalue(name)
    folder = tmp_path / "new" / "folder"
    tokenizer.save(folder)
    eos = tokenizer.eot_id
    if model_type:
        config = {"model_type": model_type, "vocab_size": tokenizer.vocab_size}
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": eos, "bos_token_id": eos}))
    theirs, again = auto(folder), Tokenizer.load(folder)
    assert again.hash == tokenizer.hash and again.vocab == tokenizer.vocab
    for text in (TEXT, CORPUS[:5000], "", " ", "a<|end|> b", EOT * 2):
        ids = tokenizer.encode(text)
        assert theirs.encode(text) == again.encode(text) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == theirs.pad_token_id == eos


CHAT = [
    {"role": "system", "content": "Be  brief.\n"},
    {"role": "user", "content": " Hello, what's 12 + 3? "},
    {"role": "assistant", "content": "15\n\n"},
    {"role": "user", "content": "naïve 東京"},
]


def test_chat_is_what_the_template_makes_and_what_is_said_is_never_a_special_token(small, hf_pair):
    for messages, add in ((CHAT, True), (CHAT[:3], False)):
        theirs = hf_pair[0].apply_chat_template(messages, add_generation_prompt=add)
        theirs = theirs if isinstance(theirs, list) else theirs["input_ids"]
        assert marked_ids(small, messages)[0] == theirs
    ids, _ = marked_ids(small, [{"role": "user", "content": f"<|end|><|system|>{EOT}"}])
    marks = [small.special_ids[token] for token in ("<|user|>", "<|end|>", "<|assistant|>")]
    assert [i for i in ids if i >= small.eot_id] == marks
    with pytest.raises(ValueError, match=r"no special token <\|tool\|>"):
        marked_ids(small, [{"role": "tool", "content": ""}])


def test_a_missing_or_damaged_tokenizer_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match='"python tokenizer.py" makes one'):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.load(tmp_path)


SPLITS_WORDS = ("pre_tokenizer", "pretokenizers", 0)


@pytest.mark.parametrize("place, change, message", [
    (("model",), {"type": "Unigram"}, "another kind"),
    ((), {"normalizer": {"type": "NFC"}}, "another kind"),
    ((), {"pre_tokenizer": None}, "another kind"),
    (("added_tokens", -1), {"special": False}, "finds the added token"),
    (("added_tokens", -1), {"lstrip": True}, "finds the added token"),
    (SPLITS_WORDS, {"behavior": "MergedWithNext"}, "splits words in another way"),
    (SPLITS_WORDS, {"invert": True}, "splits words in another way"),
])  # fmt: skip
def test_tokenizers_of_another_kind_are_refused(digits, tmp_path, place, change, message):
    digits.save(tmp_path)
    content = part = read_json(tmp_path / "tokenizer.json")
    for key in place:
        part = part[key]
    part |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_vocabularies_that_bpe_cannot_have_learnt_are_refused(tmp_path):
    tokens = [bytes([b]) for b in range(256)]
    vocab = dict(enumerate([*tokens, b"ab", b"bc"]))
    with pytest.raises(ValueError, match="order"):
        Tokenizer(vocab, [(b"b", b"c"), (b"a", b"b")])
    for few, merges in ((vocab, [(b"a", b"c")]), ({0: b"a"}, [])):
        with pytest.raises(ValueError, match="lacks"):
            Tokenizer(few, merges)
    # Here "abc" is spelled ab + c, but b + c comes first: alone, its bytes are a, bc.
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]
    Tokenizer(dict(enumerate(tokens + [a + b for a, b in merges])), merges).save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="not what its own merges make"):
        Tokenizer.load(tmp_path)


def test_gpt2_without_network_or_cache_says_what_to_do(tmp_path):
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:9")
    nowhere |= {"TIKTOKEN_CACHE_DIR": str(tmp_path), "DATA_DIR": str(tmp_path), "NO_PROXY": ""}
    done = run("-c", "from tokenizer import Tokenizer; Tokenizer.gpt2()", **nowhere)
    assert done.returncode and "TIKTOKEN_CACHE_DIR" in done.stderr and "--tokenizer=bpe" in done.stderr


def run(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    args = {"cwd": cwd, "env": os.environ | env, "capture_output": True, "text": True, "timeout": 120}
    return subprocess.run([sys.executable, *words], **args)


# -----------------------------------------------------------------------------
# Token files


def test_token_files_hold_every_document_between_separators(small, tmp_path):
    docs = ["One day.", "", "Two\n\ndays ", f"says {EOT} itself", "é" * 10, CORPUS * 8]
    meta = write_tokens(small, iter(docs), tmp_path, "train", {"licence": "MIT"})
    tokens, same = open_tokens(tmp_path, "train", small)
    assert meta == same and meta["documents"] == len(docs) and meta["dtype"] == "uint16" == str(tokens.dtype)
    assert meta["bytes"] == sum(len(doc.encode()) for doc in docs) and meta["licence"] == "MIT"
    borders = np.flatnonzero(tokens == small.eot_id)
    assert len(borders) == len(docs) + 1 and borders[0] == 0 and borders[-1] == len(tokens) - 1
    assert [small.encode(doc, ()) for doc in docs] == [list(tokens[a + 1 : b]) for a, b in pairwise(borders)]
    vocab = dict(enumerate([bytes([b]) for b in range(256)])) | {70_000: EOT.encode()}
    write_tokens(Tokenizer(vocab, [], [EOT]), ["abc"], tmp_path, "test")
    tokens, meta = open_tokens(tmp_path, "test")
    assert meta["dtype"] == "uint32" and tokens.tolist() == [70_000, 97, 98, 99, 70_000]


def test_a_token_file_that_is_missing_cut_short_or_foreign_is_refused_by_name(small, digits, tmp_path):
    with pytest.raises(FileNotFoundError, match="train.bin.*python tokenizer.py"):
        open_tokens(tmp_path, "train", small)
    write_tokens(small, ["One", "two"], tmp_path, "train")
    with pytest.raises(ValueError, match=f"train.bin.*tokenizer {small.hash[:8]}.*{digits.hash[:8]}"):
        open_tokens(tmp_path, "train", digits)
    os.truncate(tmp_path / "train.bin", 3)
    with pytest.raises(ValueError, match="train.bin has 3 bytes"):
        open_tokens(tmp_path, "train", small)


def test_a_full_disk_or_an_interrupt_leaves_no_half_file_and_keeps_the_old_one(small, tmp_path, monkeypatch):
    def interrupted():
        yield CORPUS * 10
        raise KeyboardInterrupt

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = write_tokens(small, ["the old text"], tmp_path, "train")
    with pytest.raises(KeyboardInterrupt):
        write_tokens(small, interrupted(), tmp_path, "train")
    with pytest.raises(ValueError, match="no documents"):
        write_tokens(small, [], tmp_path, "train")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*train.bin"):
        write_tokens(small, ["a new text"], tmp_path, "train")
    assert open_tokens(tmp_path, "train", small)[1] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.bin", "train.json"]


def test_folders_have_clean_names_that_tell_settings_apart():
    chosen = TokenizerConfig(vocab_size=512, split_digits=True, out="o")
    assert tokens_folder(chosen).as_posix() == "o/tokens/storyworld-512-digits"
    corpora = ("a/*.txt", "a_/.txt", "tinystories:0.9,arithmetic:0.1", "tinystories:0.1,arithmetic:0.9")
    names = {tokens_folder(TokenizerConfig(corpus=corpus)).name for corpus in corpora}
    assert len(names) == 4 and all(regex.fullmatch(r"\w+-4096", name) for name in names)


# -----------------------------------------------------------------------------
# The command


@pytest.fixture()
def notes(tmp_path) -> Path:
    for i in range(40):
        (tmp_path / f"note{i:02}.txt").write_text(" ".join(rng.choices(WORDS, k=300)))
    return tmp_path


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    return run(str(ROOT / "tokenizer.py"), "--corpus=note*.txt", *words, cwd=cwd, DATA_DIR=str(cwd / "data"))


def test_the_command_does_everything_once_and_refuses_to_change_it(notes):
    args, folder = ["--vocab_size=300", "--tokens=tokens"], notes / "tokens"

    def sizes() -> list[int]:
        return [read_json(folder / f"{split}.json")["bytes"] for split in ("train", "validation")]

    first = command(*args, cwd=notes)
    assert first.returncode == 0, first.stderr
    stamps, all_of_it = {path: path.stat().st_mtime_ns for path in folder.iterdir()}, sizes()
    (folder / "validation.json").unlink()  # as if killed between the two files
    assert command(*args, cwd=notes).stdout.count("was there") == 2
    changed = {path.name for path in stamps if path.stat().st_mtime_ns != stamps[path]}
    assert changed == {"validation.bin", "validation.json"}
    assert command(*args, "--train_megabytes=0.01", cwd=notes).stdout.count("was there") == 2
    assert 10_000 <= sizes()[0] < 15_000 < all_of_it[0] and sizes()[1] == all_of_it[1]
    other = command(*args, "--vocab_size=320", cwd=notes)
    assert other.returncode and "vocab_size 300 -> 320" in other.stderr and "--overwrite" in other.stderr
    assert "was there" not in command(*args, "--vocab_size=320", "--overwrite", cwd=notes).stdout
    assert "320 tokens" in command("--tokenizer=tokens", cwd=notes).stdout


@pytest.mark.parametrize(
    "bad", ["--corpus=none*.txt", "--tokens=file", "--vocab_size=100", "--tokenizer=none"]
)
def test_what_a_user_can_cause_ends_in_a_message(notes, bad):
    (notes / "file").write_text("in the way")
    done = command(bad, cwd=notes)
    assert done.returncode and bad.split("=")[1] in done.stderr and "Traceback" not in done.stderr


def test_the_tokenizer_and_the_data_need_no_heavy_library():
    heavy = {"torch", "transformers", "numpy", "tiktoken", "regex", "datasets", "requests", "pyarrow"}
    done = run("-c", f"import sys, tokenizer; print({heavy} & set(sys.modules) or 'none')")
    assert done.stdout.strip() == "none", done.stdout + done.stderr
