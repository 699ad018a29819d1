"""Stories that are grammatical, problems that add up, splits that don't touch, faults that are named."""

import gzip
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from support import metrics
from support.tables import read_rows
from tasks.arithmetic import arithmetic
from tasks.calculator import (
    CalculatorError,
    calculate,
    calculates,
    calculator_answer,
    decimal_text,
    extract_number,
)
from tasks.grammar import SPLITS
from tasks.mistakes import kinds_of
from tasks.sentiment import BAD, GOOD
from tasks.stories import faults, story, storyworld

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("DATA_DIR") or ROOT.parent / "shared" / "data")
EOT = "\n<|endoftext|>\n"


def shared(path):
    """The folder of real corpora, if it holds `path`; otherwise the test is skipped."""
    if not (SHARED / path).exists():
        pytest.skip(f"{path} is not here")
    return str(SHARED)


@pytest.fixture(scope="module")
def stories():
    return [story(i) for i in range(8_000)]


@pytest.fixture(scope="module")
def problems():
    return {split: list(arithmetic(split, 1_000)) for split in SPLITS}


# -----------------------------------------------------------------------------
# storyworld


@pytest.mark.parametrize("corpus, n, digest", [
    ("storyworld", 200, "4d5952df4c8f18ac"), ("arithmetic", 400, "4bea6a8a458dcc32"),
    ("numbers", 400, "d552e859dd928ea1"),
])  # fmt: skip
def test_the_first_documents_never_change(corpus, n, digest):
    texts = islice(data.documents(corpus, "train"), n)
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16] == digest


def test_no_story_comes_twice_or_has_a_fault_and_splits_share_none(stories):
    assert len({text for text, _ in stories}) == len(stories)
    assert not any(faults(text) for text, _ in stories[:1500])
    words = Counter(word for text, _ in stories for word in re.findall(r"[a-z]+", text.lower()))
    assert 600 <= len(words) <= 1_200 and min(words.values()) >= 5  # no word is too rare to learn
    validation, test = (set(data.documents("storyworld", split)) for split in SPLITS[1:])
    assert len(validation | test) == 2_000
    assert not (validation | test) & set(islice(storyworld("train"), 8_000))


@pytest.mark.parametrize("old, new, kinds", [
    ("Anna", "Anna", []),
    ("said Anna", "said Ruby", ["person"]),
    ("to Papa", "to Mama", ["person"]),
    ("small girl", "small boy", ["kind"]),
    ("She played", "He played", ["pronoun"]),
    ("lay the red ball", "lay the silver bell", ["fact"]),
    ("Anna", "Somebody", ["kind"]),
])  # fmt: skip
def test_faults_of_a_story_have_kinds(old, new, kinds):
    text = (
        "There was a small girl named Anna, who loved soup. She played with her red ball. It was gone!\n"
        '"I will show Papa," said Anna to Papa. There lay the red ball, and Leo laughed. He ran home.'
    )
    assert faults(text.replace(old, new)) == kinds


def test_a_story_that_says_little_does_not_agree():
    [example] = data.load_task("story", "test", count=1)[0]
    for output, correct, kinds in ((example.target, True, []), ("It is 42.", False, ["too short"])):
        [record], found = data.judge("story", [example], [output])
        assert found["consistent"]["value"] == correct
        assert kinds_of("consistent", record) == kinds


def test_stories_obey_the_rules_of_writing(stories):
    wrong = {
        "something left unfilled": r"[{}|()<>_=/]",
        "spaces": r"  | \n|\n | $|^ | [.,!?]|\t",
        "punctuation": r"[.,!?]{2}|,\.|\?,|!,",
        "a before a vowel": r"\b[Aa] [aeiou]",
        "an before a consonant": r"\b[Aa]n (?!hour)[^aeiou]",
        "a word twice": r"\b(\w+) \1\b(?! tap)",
        "small letter after a full stop": r'[.!?]"? (?!(?:said|asked|called|cried|laughed|went)\b)[a-z]',
        "small letter in the first word": r'(^|\n)"?[a-z]',
        "quote without a mark inside": r'[a-z]" ',
        "no full stop at the end": r'[^.!?"](\n|$)',
    }
    allowed = re.compile(r'\?" (he|she) (asked)|[?!]" (he|she) (called|cried|said|asked)')
    for text, signature in stories:
        assert text.count('"') % 2 == 0, text
        plain = allowed.sub('." Said', text).replace("Tap, tap, tap", "Tap")
        for rule, pattern in wrong.items():
            found = re.search(pattern, plain)
            assert not found, f"{rule} ({found[0]!r}): {text}\n{signature}"


# -----------------------------------------------------------------------------
# arithmetic


def test_every_annotation_and_every_answer_is_right(problems):
    steps = Counter()
    for problem in problems["train"]:
        answer = problem["answer"]
        steps[answer.count("\n")] += 1
        assert calculates(answer), answer
        assert re.findall(r"=(\d+)>>", answer) == re.findall(r">>(\d+)", answer)
        assert all(1 <= int(n) <= 40 for n in re.findall(r"\d+", problem["question"] + answer))
    assert set(steps) == {1, 2, 3, 4} and min(steps.values()) > 100


def test_the_question_alone_gives_the_answer(problems):
    """A second opinion: solve the English, ignoring what is about other things and other people."""
    for problem in problems["validation"]:
        *told, question = re.split(r"(?<=[.?]) ", problem["question"])
        item = re.search(r"How many (.+?) do", question)[1]
        name = next(filter(None, re.search(r"^(?!There)(\w+)|(\w+)'s bag", told[0]).groups()))
        people = {name, "She", "He", "There", "A", "By", "Then", *re.findall("[A-Z][a-z]+", question)}
        people.remove("How")
        total = None
        for sentence in told:
            if item not in sentence or not (sentence.split()[0] in people or f"gives {name}" in sentence):
                continue
            numbers = [int(n) for n in re.findall(r"\d+", sentence)] or [2]
            amount = math.prod(numbers)
            if total is None:
                total = amount
            elif "times as many" in sentence or "twice" in sentence:
                total *= amount
            elif "more" not in sentence and re.search("gives|loses|sells|fewer", sentence):
                total -= amount
            else:
                total += amount
        assert problem["answer"].endswith(f"#### {total}"), (name, problem)


def test_no_problem_and_no_calculation_is_in_two_splits(problems):
    found = {}
    for split, rows in problems.items():
        questions = {row["question"] for row in rows}
        found[split] = questions | {"".join(re.findall("<<.*?>>", row["answer"])) for row in rows}
    for a, b in combinations(SPLITS, 2):
        assert not found[a] & found[b]


# -----------------------------------------------------------------------------
# corpora


def show(*words: str) -> list[str]:
    command = [sys.executable, "data.py", *words]
    return subprocess.check_output(command, cwd=ROOT, text=True).split("\n\n")


def test_show_prints_stories_and_tasks_as_a_model_sees_them():
    assert list(islice(storyworld("train"), 2)) == show("--corpus=storyworld", "--show=2")[:2]
    assert "It is anything but graceful.\nIt was[ bad]" in show("--task=sentiment", "--show=1")


def test_tinystories_slice_drops_the_torn_story_and_holds_out_its_tail(data_dir):
    folder = shared("tinystories/TinyStories-train-first-2MiB.txt.gz")
    data_dir(folder)
    parts = {split: list(data.documents("tinystories", split)) for split in SPLITS}
    assert [len(parts[split]) for split in SPLITS] == [2_086, 115, 115]
    with gzip.open(Path(folder) / "tinystories/TinyStories-train-first-2MiB.txt.gz", "rt") as file:
        stories = [story.strip() for story in file.read().split("<|endoftext|>")][:-1]
    assert parts["train"] + parts["test"] + parts["validation"] == stories
    assert "held out: the last 5 %" in data.corpus_info("tinystories", "validation")["source"]


def test_wikitext2_articles_joined_are_the_file(data_dir):
    folder = shared("wikitext-2/wiki.valid.tokens.gz")
    data_dir(folder)
    docs = list(data.documents("wikitext2", "validation"))
    with gzip.open(Path(folder) / "wikitext-2/wiki.valid.tokens.gz", "rt", encoding="utf-8") as file:
        assert "".join(docs) == file.read()
    assert len(docs) == 60 and all(re.match(r"\s+= [^=]+ = \n| = [^=]+ = \n", doc) for doc in docs)


def test_no_edition_is_mixed_with_another(tmp_path, monkeypatch, data_dir):
    data_dir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    own(tmp_path, "tinystories/TinyStories-train.txt", EOT.join(["one", "two", ""]))
    with pytest.raises(data.DataError, match="TinyStories-valid.txt"):
        data.documents("tinystories", "validation")
    with pytest.raises(data.DataError, match="no test split"):
        data.documents("tinystories", "test")


@pytest.mark.parametrize("load, corpus, split, message", [
    (data.documents, "tinystory", "train", "neither a file nor the name of a corpus.*tinystories"),
    (data.documents, "storyworld", "valid", "the splits are train, validation, test"),
    (data.documents, "storyworld:0.5,storyworld:0.5", "train", "once"),
    (data.documents, "storyworld:0,arithmetic:1", "train", "above 0"),
    (data.documents, str(ROOT / "web"), "train", "a folder without files"),
    (data.load_task, "nothing", "train", "no task.*the tasks are sst2"),
    (data.load_task, "sentiment", "valid", "no split"),
    (data.load_conversations, "alpaca", "valid", "no split"),
    (data.load_conversations, "instructions", "valid", "no split"),
])  # fmt: skip
def test_unknown_names_splits_and_shares_are_refused(load, corpus, split, message):
    with pytest.raises(data.DataError, match=message):
        load(corpus, split)


def is_sum(document: str) -> bool:
    return bool(re.search(r"####|^\d", document))


def test_a_mix_has_its_shares_at_every_point_and_names_every_part():
    sums = total = 0
    for i, doc in enumerate(islice(data.documents("storyworld:0.9,arithmetic:0.1", "train"), 3_000)):
        total += len(doc)
        sums += len(doc) if is_sum(doc) else 0
        assert i < 1_000 or abs(sums / total - 0.1) < 0.01
    mixes = "storyworld:9,arithmetic:1", "storyworld:8,arithmetic:2"
    info, other = (data.corpus_info(mix, "train") for mix in mixes)
    assert info["source"].count("generated by data.py") == 2 and info["fingerprint"] != other["fingerprint"]


def test_a_mix_ends_with_its_finite_corpus_or_its_largest_generator(tmp_path, monkeypatch):
    path = own(tmp_path, "own.txt", EOT.join(f"own story {i} " + "word " * 80 for i in range(400)))
    docs = list(data.documents(f"{path}:0.5,arithmetic:0.5", "train"))
    assert [doc for doc in docs if not is_sum(doc)] == list(data.documents(path, "train"))
    monkeypatch.setitem(data.EMBEDDED, "storyworld", (storyworld, 100))
    docs = list(data.documents("arithmetic:0.2,storyworld:0.8", "train"))
    assert [doc for doc in docs if not is_sum(doc)] == list(data.documents("storyworld", "train"))


# -----------------------------------------------------------------------------
# your own files

DOCS = [f"Document {i}.\nIt has two lines, é and 漢." for i in range(60)]


def own(tmp_path, name, content):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):  # rows
        content = "\n".join(map(json.dumps, content))
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(path)


def parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)
    from pyarrow.parquet import write_table

    path.parent.mkdir(exist_ok=True)
    write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def everything(corpus):
    return [doc for split in ("train", "test", "validation") for doc in data.documents(corpus, split)]


def test_all_kinds_of_files_give_the_same_documents(tmp_path):
    rows = [{"text": doc, "id": 1} for doc in DOCS]
    text, lines = EOT.join(DOCS), "\n".join(map(json.dumps, rows))
    for name, content in (
        ("crlf.txt", text.replace("\n", "\r\n")),
        ("bom.txt.gz", b"\xef\xbb\xbf" + text.encode()),
        ("inline.txt", "<|endoftext|>".join(DOCS)),
        ("a.jsonl", rows),
        ("a.jsonl.gz", lines.replace("\n", "\r\n") + "\n\n"),
    ):
        assert everything(own(tmp_path, name, content)) == DOCS, name
    assert everything(parquet(tmp_path / "a.parquet", rows)) == DOCS


def test_globs_and_folders_read_all_files_in_order_and_a_path_that_exists_is_no_pattern(tmp_path):
    for i in range(3):
        own(tmp_path, f"deep [1]/{i}[1].txt", EOT.join(DOCS[20 * i : 20 * i + 20]))
    own(tmp_path, "deep [1]/readme.html", "no text")
    own(tmp_path, "deep 1/11.txt", "another")
    folder = tmp_path / "deep [1]"
    assert everything(str(folder)) == DOCS == everything(str(tmp_path / "deep [[]1]" / "*.txt"))
    file = str(folder / "0[1].txt")
    assert everything(file) == DOCS[:20] and DOCS[0] in data.documents(f"{file}:1,storyworld:1", "train")


def test_half_an_emoji_is_replaced_where_text_enters(tmp_path):
    file = own(tmp_path, "a.jsonl", "\n".join(['{"text": "Goat \\ud83d \\ud83d\\ude00"}'] * 60))
    assert set(everything(file)) == {"Goat \ufffd \U0001f600"}
    file = own(tmp_path, "a.json", '[{"question": "a\\uDC00", "answer": {"b\\ud800": ["c\\ud800"]}}]')
    assert list(read_rows(file)) == [{"question": "a\ufffd", "answer": {"b\ufffd": ["c\ufffd"]}}]


def test_text_without_marks_is_running_text_that_becomes_passages_and_loses_nothing(tmp_path):
    paragraphs = ["word " * 150 + f"{i}." for i in range(200)]
    for joint in ("\n\n", "\n"):
        novel = own(tmp_path, "novel.txt", joint.join(paragraphs))
        docs = everything(novel)
        assert joint.join(docs) == joint.join(paragraphs)
        assert len(docs) > 10 and all(len(doc) < 10_000 for doc in docs)
    assert data.corpus_info(novel, "test")["running_text"]
    for joint in ("\r\r", ""):  # one line, of an old Mac, or without a space
        text = joint.join(paragraphs).replace(" ", joint)
        docs = everything(own(tmp_path, "line.txt", text))
        assert " ".join(docs).split() == text.split() if joint else "".join(docs) == text
        assert len(docs) > 10 and all(len(doc) <= 16_000 for doc in docs)
    late = own(tmp_path, "late.txt", "A line of a long document.\n" * 12_000 + EOT.join(["", *DOCS]))
    assert EOT not in "".join(everything(late)) and "running_text" not in data.corpus_info(late, "test")


@pytest.mark.parametrize("name, content, message", [
    ("blank.txt", " \n\n", "is empty"),
    ("short.txt", "One line.", "too little text"),
    ("latin.txt", "good\nna\xefve\n".encode("latin-1"), "line 2: not UTF-8.*0xef"),
    ("torn.jsonl", '{"text": "a"}\n{"text": ', "line 2"),
    ("other.jsonl", '{"body": "a"}', 'no row has a "text"; the columns are body'),
    ("object.jsonl", '{"text": {"a": 1}}', "row 1.*should be text"),
    ("list.jsonl", '{"text": "a"}\n["a"]', "row 2: should be an object"),
    ("page.html", "<p>", "cannot read"),
    ("c.parquet", "hello", "not a parquet file"),
    ("torn.txt.gz", gzip.compress(os.urandom(5_000).hex().encode())[:2_000], "damaged gzip"),
    ("none.txt.gz", b"not gzip at all", "damaged gzip"),
])  # fmt: skip
def test_bad_files_are_named_with_their_fault(tmp_path, name, content, message):
    path = own(tmp_path, name, "")
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(data.DataError, match=message) as error:
        list(data.documents(path, "train"))
    assert name in str(error.value) or name == "short.txt"


# -----------------------------------------------------------------------------
# Tasks


@pytest.mark.parametrize("name", ["sentiment", "dialogue", "arithmetic"])
def test_embedded_tasks_have_disjoint_splits_of_their_sizes(name):
    texts = [[e.text for e in data.load_task(name, split)[0]] for split in SPLITS]
    assert [len(t) for t in texts] == [4000, 500, 1000]
    assert len(set().union(*map(set, texts))) == 5500  # none twice, in a split or across splits


def read_sentiment(sentence: str) -> bool:
    """A reader who knows how the reviews are meant, but not how they are made."""
    text = sentence.lower()
    if any(frame in text for frame in (" not ", "nobody could call", "anything but")):
        return any(word in text for word in BAD)
    text = re.split(", whatever|, for all", text)[0]
    text = re.split(", but |, yet | and got |, (?:i|we) found", text)[-1]
    return any(word in text for word in GOOD)


def test_the_labels_of_reviews_are_what_a_reader_says():
    assert all(read_sentiment(e.text) == bool(e.label) for e in data.load_task("sentiment", "train")[0])


def test_gsm8k_holds_out_its_validation_split_and_the_calculator_agrees_with_its_annotations(data_dir):
    data_dir(shared("gsm8k"))
    train, validation, test = (data.load_task("gsm8k", split)[0] for split in SPLITS)
    assert (len(train), len(validation), len(test)) == (6_973, 500, 1_319)
    assert not {e.text for e in train} & {e.text for e in validation + test}
    disagreed, n = 0, 0
    for e in train:
        assert extract_number(e.target) == e.target.split("####")[1].strip().replace(",", "")
        for expression, result in re.findall("<<([^>]*)=(.*?)>>", e.target):
            n += 1
            try:
                value = calculate(expression)
                disagreed += abs(value - calculate(result)) > max(1, abs(value)) / 100  # they round to cents
            except CalculatorError:
                disagreed += 1
    assert n > 20_000 and disagreed <= 5


SUM = {"question": "q", "answer": "#### 7"}


@pytest.mark.parametrize("file, content, given, message", [
    ("sst2/dev.tsv", "sentence\tgood\na film\t1\n", ["validation"], "columns are sentence, good"),
    ("sst2/dev.tsv", "sentence\tlabel\na film\t2\n", ["validation"], "label '2' is not one of 0, 1"),
    ("sst2/dev.tsv", "sentence\tlabel\na film\n", ["validation"], "line 2: 1 cells, but the header has 2"),
    ("sst2/dev.tsv", "sentence\tlabel\n", ["validation"], "holds no rows"),
    ("gsm8k/train.jsonl", [SUM] * 300, ["train"], "only 300 rows, but its last 500 are validation"),
    ("gsm8k/train.jsonl", [SUM] * 900, ["train", 4000], "has 400 rows, so --first_problem=4000 is too large"),
])  # fmt: skip
def test_a_task_file_with_a_fault_is_named_with_it(tmp_path, data_dir, file, content, given, message):
    data_dir(tmp_path)
    own(tmp_path, file, content)
    with pytest.raises(data.DataError, match=message):
        data.load_task(file.split("/")[0], *given)


def test_a_problem_whose_answer_has_no_number_is_left_out_and_counted(tmp_path, data_dir):
    data_dir(tmp_path)
    own(tmp_path, "gsm8k/test.jsonl", [SUM, SUM | {"answer": "not given"}])
    examples, about = data.load_task("gsm8k", "test")
    assert len(examples) == about["left_out"] == 1


def test_all_kinds_of_files_give_the_same_task(tmp_path, data_dir):
    data_dir(tmp_path)
    rows = [{"sentence": 'a "film" ', "label": 1}, {"sentence": "no", "label": 0}]
    parquet(tmp_path / "sst2" / "validation.parquet", rows)
    found = [data.load_task("sst2", "validation")[0]]
    for name, content in {
        "dev.tsv": 'sentence\tlabel\na "film" \t1\nno\t0\n',
        "dev.jsonl": rows,
        "dev.json": json.dumps(rows),
        "dev.csv": 'label,sentence\n1,"a ""film"" "\n0,no\n',
    }.items():
        own(tmp_path, f"{name}/sst2/{name}", content)
        data_dir(tmp_path / name)
        found.append(data.load_task("sst2", "validation")[0])
    assert all(f == found[0] for f in found) and found[0][0].text == 'a "film"'


def test_few_shot_examples_come_from_train_by_seed_and_are_balanced():
    shots = data.few_shot("sentiment", 4)
    assert sum(e.label for e in shots) == 2 and len(set(shots)) == 4
    assert set(shots) <= set(data.load_task("sentiment", "train")[0])
    assert data.few_shot("sentiment", 4) == shots != data.few_shot("sentiment", 4, seed=2)


# -----------------------------------------------------------------------------
# Answers and the calculator


@pytest.mark.parametrize("text, number", [
    ("She has <<2+2=4>>4.\n#### 1,080", "1080"), ("#### $-5.50 dollars", "-5.5"),
    ("#### 7\n#### 8", "7"),  # what a model adds afterwards does not count
    ("#### none, but 3 before\n4", "3"), ("####\n4", None), ("So the answer is $1,234.00!", "1234"),
    ("There are 3 left.\nA: 12 apples", "12"), ("It costs $.75", "0.75"), ("from 10-5", "5"), ("-0.0", "0"),
    ("#### 1e5", "100000"), ("it is -1.50E-3.", "-0.0015"), ("2e400 3 days", "3"), ("4 e5", "5"),
    ("١٢", None), ("no number", None), ("", None),
])  # fmt: skip
def test_the_answer_is_found_in_a_solution(text, number):
    assert extract_number(text) == number


SUMS = """9*3 = 27|2+3*4-5 = 9|(2+3)*4 = 20|7/2 = 3.5|1/3 = 0.3333|2/3 = 0.6667|-1/3 = -0.3333|8-3-2 = 3|
2**3**2 = 512|-2**2 = -4|2**-2 = 0.25|20%*50 = 10|1,234.50*2 = 2469|.5 + 12. = 12.5|-(3--5) = -8|
0.1+0.2 = 0.3|1/100000 = 0"""
HOSTILE = "9**9**9|9**-9**9|1/0|0**-1|2**0.5|__import__('os').system('true')|1.5**300|١+٢|２+３|1e9|1 2|1,2"
HOSTILE = f"{HOSTILE}|()||  |1+|(1|1)|...|a+1|1;2|7//2|7%3|1\n__builtins__".split("|")
HOSTILE += ["(" * 10_000, "(" * 100 + "1" + ")" * 100, "9" * 199, "*".join(["9" * 30] * 6)]


def test_the_calculator_calculates_and_refuses_what_is_no_sum_at_once():
    for line in SUMS.replace("\n", "").split("|"):
        expression, value = line.split(" = ")
        assert decimal_text(calculate(expression)) == value
    start = time.perf_counter()
    for hostile in HOSTILE:
        with pytest.raises(CalculatorError):
            calculate(hostile)
    assert time.perf_counter() - start < 5


NUMBERS = st.one_of(st.integers(0, 999), st.decimals(0, 99, places=2)).map(str)


def combined(parts):
    pair = st.tuples(parts, st.sampled_from("+-*/"), parts).map(" ".join)
    return pair.map("({})".format) | parts.map("-{}".format)


@settings(deadline=None)
@given(st.recursive(NUMBERS, combined, max_leaves=6))
def test_the_calculator_equals_pythons_fractions(expression):
    exact = re.sub(r"\d+(\.\d+)?", r"Fraction('\g<0>')", expression)
    try:
        expected = eval(exact, {"Fraction": Fraction})  # we made the expression ourselves
    except ZeroDivisionError:
        with pytest.raises(CalculatorError):
            calculate(expression)
        return
    assert calculate(expression) == expected


def test_the_calculator_types_behind_an_open_annotation_only():
    assert calculator_answer("That is 9*3=<<9*3=") == "27>>"
    assert calculator_answer("That is <<10/4=") == "2.5>>"
    for text in ("9*3=", "<<9*3", "<<9*3=27>>", "<<9*3=27>>27 and x=", "<<os=", "<<=", "<<1/0="):
        assert calculator_answer(text) is None


# -----------------------------------------------------------------------------
# Metrics, each beside somebody else's


def test_intervals_and_macro_f1_are_scipys_and_scikit_learns():
    from scipy.stats import binomtest
    from scipy.stats import bootstrap as scipys
    from sklearn.metrics import f1_score

    for hits, n in [(0, 10), (10, 10), (1, 3), (437, 872)]:
        theirs = binomtest(hits, n).proportion_ci(0.95, method="wilson")
        mine = metrics.proportion(hits, n)
        found = [mine["value"], mine["low"], mine["high"]]
        assert found == pytest.approx([hits / n, theirs.low, theirs.high], abs=1e-6)
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 3, (2, 40))
    theirs = f1_score(labels, predictions, average="macro")
    assert metrics.macro_f1(list(zip(labels, predictions, strict=True))) == pytest.approx(theirs)
    values, others = rng.exponential(size=(2, 200))
    for mine, sample in (
        (metrics.bootstrap(values, rounds=5000), values),
        (metrics.paired_bootstrap(values, others), values - others),
    ):
        theirs = scipys((sample,), np.mean, method="percentile", n_resamples=5000).confidence_interval
        found = [mine["value"], mine["low"], mine["high"]]
        assert found == pytest.approx([sample.mean(), theirs.low, theirs.high], abs=0.02)


def test_rouge_is_rouge_scores():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"], True)
    rng = random.Random(4)
    for _ in range(30):
        a, b = (" ".join(rng.choices("red dogs walking they hat".split(), k=rng.randint(1, 7))) for _ in "ab")
        theirs = {name: score.fmeasure for name, score in scorer.score(a, b).items()}
        assert {name: metrics.rouge(b, a)[name] for name in theirs} == pytest.approx(theirs)


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample():
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations(range(n), k))
                share = sum(any(i < correct for i in draw) for draw in draws) / len(draws)
                assert metrics.pass_at(k, n, correct) == pytest.approx(share)
    with pytest.raises(ValueError, match="at least 3 samples"):
        metrics.pass_at(3, 2, 1)


def test_a_majority_is_the_first_of_equally_frequent_answers():
    assert metrics.majority(["3", "4", "4", "3", None, None, None]) == "3"
    assert metrics.majority([None]) is None


def test_judging_counts_what_is_right_and_keeps_every_answer():
    solutions = [" 2+2=<<2+2=4>>4\n#### 4", " #### 1,000", " not given"]
    problems = [data.Example("q", solution) for solution in solutions]
    records, found = data.judge("gsm8k", problems, [" It is 4.", "A dog", "I do not know"])
    assert [r["correct"] for r in records] == [True, False, False] and records[1]["answer"] == "1000"
    assert found["exact_match"]["value"] == found["answered"]["value"] == pytest.approx(1 / 3)
    reviews = [data.Example("x", " good", 1), data.Example("y", " bad", 0), data.Example("z", " bad", 0)]
    records, found = data.judge("sst2", reviews, [1, 1, 0])
    assert [r["correct"] for r in records] == [True, False, True] and records[1]["prediction"] == "good"
    assert found["accuracy"]["value"] == pytest.approx(2 / 3) and found["accuracy"]["n"] == 3
    chats = [data.Example("x", " Tom will come."), data.Example("y", " Ann left.")]
    _, found = data.judge("samsum", chats, ["Tom will come.", ""])
    assert found["rougeL"]["value"] == pytest.approx(0.5) and found["words"]["value"] == 1.5
