"""Where text and tasks come from, and how an answer is judged.

`storyworld` tells short stories in a vocabulary of 960 words; `arithmetic` sets word problems in GSM8K's
format; `sentiment` and `dialogue` stand in for SST-2 and SAMSum. They are programs, not files: as many
examples as you want, the same on every machine and in every Python, and none in two splits. Real corpora and
tasks are read from $DATA_DIR (default `data/`), or downloaded.

    python data.py                                               # five stories
    python data.py --corpus=arithmetic --show=3
    python data.py --corpus="my/notes/*.txt" --split=validation  # your own .txt, .jsonl or .parquet, also .gz
    python data.py --corpus=tinystories:0.9,arithmetic:0.1       # a mix; the shares are shares of bytes
    python data.py --task=gsm8k --split=test                     # questions as a model sees them, [answers]

Reads $DATA_DIR, and what is not there from Hugging Face's hub, through its cache in $HF_HOME. The other files
use `documents` and `corpus_info`, `load_task` and `judge`. The generators are in tasks/: a new story plot is
a block of text in tasks/stories.txt, a new task an entry in TASKS.
"""

from support.terminal import run_script

import argparse
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from glob import escape, glob
from itertools import islice

from support.documents import (
    HOLD_OUT,
    blocks_of_file,
    has_marks,
    hold_out_tail,
    kind_of_file,
    nothing_to_read,
    read_file,
    sha256,
)
from support.formats import first_question, messages_of, pair_of, talk
from support.hub import hub_file, hub_rows
from support.metrics import bootstrap, macro_f1, proportion, rouge
from support.tables import TABLE, DataError, read_rows, text_of
from tasks.arithmetic import arithmetic, arithmetic_text, numbers_text
from tasks.calculator import extract_number
from tasks.dialogue import dialogue
from tasks.grammar import SEED, SPLITS, split_of
from tasks.instructions import instructions
from tasks.sentiment import sentiment
from tasks.stories import storyworld

# -----------------------------------------------------------------------------
# corpora: what each name stands for, and where it is looked for


@dataclass(frozen=True)
class Corpus:
    """A text on Hugging Face's hub. Its first edition can be downloaded there; others may lie on this disk.

    An edition is {split: its files in $DATA_DIR/`folder`, plain or .gz}. "all" has no splits, so we hold out
    its tail; "head" has none either, and ends in the middle of a document.
    """

    hub: str
    licence: str
    folder: str
    editions: tuple[dict[str, tuple[str, ...]], ...]


def _wikitext(n: int, train_files: int, raw: str = "") -> Corpus:
    parts = {"train": train_files, "validation": 1, "test": 1}
    name = f"wikitext-{n}{raw}-v1/{{}}-{{:05}}-of-{{:05}}.parquet"
    on_hub = {split: tuple(name.format(split, i, k) for i in range(k)) for split, k in parts.items()}
    file = f"wikitext-{n}{raw}/wiki.{{}}.{'raw' if raw else 'tokens'}"
    on_disk = {split: (file.format(split.removesuffix("ation")),) for split in parts}
    return Corpus("Salesforce/wikitext", "CC BY-SA 3.0", "", (on_hub, on_disk))


CORPORA = {
    "tinystories": Corpus(
        "roneneldan/TinyStories",
        "CDLA-Sharing-1.0",
        "tinystories",
        (
            {"train": ("TinyStoriesV2-GPT4-train.txt",), "validation": ("TinyStoriesV2-GPT4-valid.txt",)},
            {"train": ("TinyStories-train.txt",), "validation": ("TinyStories-valid.txt",)},
            {"head": ("TinyStories-train-first-2MiB.txt",)},
        ),
    ),
    "wikitext2": _wikitext(2, train_files=1),
    "wikitext2_raw": _wikitext(2, 1, raw="-raw"),  # no <unk>: what GPT-2's published perplexity is of
    "wikitext103": _wikitext(103, train_files=2),
    "fineweb_edu": Corpus(  # two of the sample's 14 files: 4.3 GB, about 1.4B tokens, a day for one card
        "HuggingFaceFW/fineweb-edu",
        "ODC-By 1.0",
        "fineweb_edu",
        ({"all": ("sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet")},),
    ),
}
EMBEDDED = {  # name -> its documents, how many in train, how many in validation and in test
    "storyworld": (storyworld, 30_000, 1_000),
    "arithmetic": (arithmetic_text, 40_000, 1_000),
    "numbers": (numbers_text, 40_000, 1_000),
}


@dataclass
class Source:
    """One split of a corpus, found: how to read it, and what a run writes down about it."""

    read: Callable[[dict], Iterator[str]]  # counts the rows without text in the dict that it is given
    source: str
    licence: str
    fingerprint: Callable[[], str]
    size: int | None = None  # documents to take from a generator, which would never end
    running_text: Callable[[], bool] = lambda: False  # its documents are pieces of longer texts


def documents(
    corpus: str, split: str, data_dir: str | None = None, about: dict | None = None
) -> Iterator[str]:
    """The documents of one split, one at a time. Raises DataError at once if there is no such thing.

    `corpus` is a name (`storyworld`, `arithmetic`, or one of CORPORA), a path, folder or glob of your own
    .txt, .jsonl or .parquet files (also .gz), or a mix, "tinystories:0.9,arithmetic:0.1". Rows without text
    are left out; while reading, they are counted in `about`["left_out"].
    """
    found = _find(corpus, split, data_dir)
    print(f"data: {corpus}, {split}: {found.source}", file=sys.stderr)
    return _reported(found, corpus, split, {} if about is None else about)


def _reported(found: Source, corpus: str, split: str, about: dict) -> Iterator[str]:
    yield from islice(found.read(about), found.size)
    if about.get("left_out"):
        print(f"data: {corpus}, {split}: {about['left_out']:,} rows without text left out", file=sys.stderr)


def corpus_info(corpus: str, split: str, data_dir: str | None = None) -> dict:
    """What `documents` reads, for a run's record: {"source", "licence", "fingerprint" (of the content)}, and
    "running_text": True if its documents are pieces of longer texts.
    """
    found = _find(corpus, split, data_dir)
    about = {"source": found.source, "licence": found.licence, "fingerprint": found.fingerprint()}
    return about | ({"running_text": True} if found.running_text() else {})


def _find(corpus: str, split: str, data_dir: str | None) -> Source:
    data_dir = data_dir or os.environ.get("DATA_DIR") or "data"
    if split not in SPLITS:
        raise DataError(f'there is no split "{split}"; the splits are {", ".join(SPLITS)}')
    if corpus in EMBEDDED:
        make, n_train, n_other = EMBEDDED[corpus]
        # The fingerprint is of what it says: a change to the grammar shows, a change to a comment does not.
        fingerprint = lambda: sha256(doc.encode() for doc in islice(make(split), 300))  # noqa: E731
        size = n_train if split == "train" else n_other
        return Source(
            lambda about: make(split), f"generated by data.py, seed {SEED}", "MIT", fingerprint, size
        )
    if corpus in CORPORA:
        return _registered(corpus, split, data_dir)
    is_mix = re.fullmatch(r"[^:,]+:\d*\.?\d+(,[^:,]+:\d*\.?\d+)*", corpus)
    if is_mix and not os.path.exists(corpus):
        return _mix(corpus, split, data_dir)
    paths = _own_files(corpus)
    if not paths:
        names = ", ".join([*EMBEDDED, *CORPORA])
        raise DataError(f'"{corpus}" is neither a file nor the name of a corpus; those are {names}')
    return _from_files(paths, paths, "yours", hold_out=split)


def _own_files(corpus: str) -> list[str]:
    """The files of a path, a folder or a glob. What exists is no glob, though its name have [ ] or *."""
    if os.path.isfile(corpus):
        return [corpus]
    if os.path.isdir(corpus):
        found = sorted(glob(os.path.join(escape(corpus), "**"), recursive=True))
        return [path for path in found if os.path.isfile(path) and kind_of_file(path)]
    return [path for path in sorted(glob(corpus, recursive=True)) if os.path.isfile(path)]


def _registered(name: str, split: str, data_dir: str) -> Source:
    """The first edition of which any file is in $DATA_DIR; failing that, the hub's."""
    corpus = CORPORA[name]

    def here(file: str) -> str | None:
        path = os.path.join(data_dir, corpus.folder, file)
        return next((p for p in (path, path + ".gz") if os.path.exists(p)), None)

    # One edition for all splits: the validation text of one may be the training text of another.
    begun = [e for e in corpus.editions if any(here(file) for files in e.values() for file in files)]
    edition = begun[0] if begun else corpus.editions[0]
    part = next((part for part in ("all", "head", split) if part in edition), None)
    if part is None:
        raise DataError(f"{name} has no {split} split; it has {' and '.join(edition)}")
    paths, names = [], []
    for file in edition[part]:
        path = here(file)
        names.append(os.path.relpath(path, data_dir) if path else f"{corpus.hub} on Hugging Face, {file}")
        paths.append(path or _from_hub(name, file, edition is corpus.editions[0], data_dir))
    hold_out = split if part != split else None
    articles = corpus.hub == "Salesforce/wikitext"
    return _from_files(paths, names, corpus.licence, hold_out, torn=part == "head", articles=articles)


def _from_hub(name: str, file: str, on_hub: bool, data_dir: str) -> str:
    corpus = CORPORA[name]
    try:
        if not on_hub:
            raise DataError("this edition of it is not on the hub")
        return hub_file(corpus.hub, file)
    except DataError as error:
        path = os.path.join(data_dir, corpus.folder, file)
        raise DataError(
            f"{name} could not be fetched: {error}. Get online for {file} of {corpus.hub} on Hugging Face, "
            f"or put it at {path} (or .gz), or use the embedded corpus, which needs neither: storyworld"
        ) from None


def _from_files(
    paths: list[str], names: list[str], licence: str, hold_out: str | None = None, torn=False, articles=False
) -> Source:
    """`names` are what is shown of `paths`. `hold_out`: these files have no splits, so this one is cut from
    their tail.
    """
    for path in paths:
        if not kind_of_file(path):
            raise DataError(f"{path}: cannot read this; .txt, .jsonl and .parquet can be read, also as .gz")
        if os.path.getsize(path) == 0:
            raise DataError(f"{path} is empty")
    source = names[0] if len(names) == 1 else f"{len(names)} files, {names[0]} to {names[-1]}"
    source += f" ({HOLD_OUT[hold_out]})" if hold_out else ""

    def read(about: dict) -> Iterator[str]:
        docs = (doc for path in paths for doc in read_file(path, articles, about))
        return hold_out_tail(docs, hold_out, torn) if hold_out else docs

    def fingerprint() -> str:
        return sha256(block for path in paths for block in blocks_of_file(path))

    def running_text() -> bool:
        return articles or all(not TABLE.search(path) and not has_marks(path) for path in paths)

    return Source(read, source, licence, fingerprint, running_text=running_text)


def _mix(text: str, split: str, data_dir: str) -> Source:
    """Corpora interleaved so that, at every point, each has had its share of the bytes to within a document.

    A finite corpus is never repeated: the mix ends when the first one does. A generator goes on as long as it
    is asked; of generators alone, the one with the largest share sets the length.
    """
    shares = {name: float(share) for name, share in (part.rsplit(":", 1) for part in text.split(","))}
    if len(shares) <= text.count(",") or min(shares.values()) <= 0:
        raise DataError(f'"{text}": name each corpus once, with a share above 0')
    found = {name: _find(name, split, data_dir) for name in shares}
    leader = max(shares, key=shares.get) if all(source.size for source in found.values()) else None

    def read(about: dict) -> Iterator[str]:
        readers = {}
        for name, source in found.items():
            readers[name] = islice(source.read(about), source.size if name == leader else None)
        progress = dict.fromkeys(shares, 0.0)  # bytes so far / share
        while True:
            name = min(progress, key=progress.get)  # the one that is furthest behind
            doc = next(readers[name], None)
            if doc is None:
                return
            progress[name] += len(doc.encode()) / shares[name]
            yield doc

    source = "; ".join(f"{shares[name]:g} {name}: {s.source}" for name, s in found.items())
    licence = "; ".join(f"{name}: {s.licence}" for name, s in found.items())
    return Source(
        read, source, licence, lambda: sha256((text + s.fingerprint()).encode() for s in found.values())
    )


# -----------------------------------------------------------------------------
# tasks: what a model is asked, what it should say, and how that is judged


@dataclass(frozen=True)
class Example:
    """One item of a task: the text that fills its template, and what should follow, from its space on."""

    text: str
    target: str
    label: int | None = None  # classification: index in Task.labels


@dataclass(frozen=True)
class Task:
    """A data set as a question in words. Prompting, fine-tuning and evaluation all use this same wording."""

    template: str  # what a text to continue looks like; "{}" is where an example's text goes
    columns: tuple[str, str]  # of the text and of its answer
    metric: str  # accuracy, rouge or exact_match
    test: str  # the split that results are reported on
    licence: str
    labels: tuple[str, ...] = ()  # what to say for class 0, 1, ...
    max_new_tokens: int = 0  # of a generated answer
    stop: str = "\n\n"  # a generated answer ends here at the latest
    hub: tuple[str, ...] = ()  # Hugging Face id and configuration
    files: dict[str, tuple[str, ...]] | None = None  # split -> names of its file in $DATA_DIR, no suffix
    hold_out: int = 0  # rows at the end of train that serve as validation where there is none
    generator: Callable | None = None  # (split, n) -> rows, of an embedded task
    question: str = "{}"  # what the user of a conversation asks

    def prompt(self, text: str) -> str:
        return self.template.replace("{}", text)


def _task_files(folder: str, **names: str) -> dict[str, tuple[str, ...]]:
    return {split: tuple(f"{folder}/{name}" for name in text.split()) for split, text in names.items()}


SPLIT_FILES = {"train": "train", "validation": "validation dev valid", "test": "test"}
REVIEW = {"template": "{}\nIt was", "columns": ("sentence", "label"), "metric": "accuracy"}
REVIEW |= {"labels": (" bad", " good"), "question": "{}\nIs this review good or bad?"}
CHAT = {"template": "Conversation:\n{}\nSummary:", "columns": ("dialogue", "summary"), "metric": "rouge"}
CHAT |= {"stop": "\n", "test": "test", "question": "Summarize this conversation in one sentence.\n\n{}"}
PROBLEM = {"template": "Question: {}\nAnswer:", "columns": ("question", "answer"), "metric": "exact_match"}
PROBLEM |= {"test": "test"}
TASKS = {
    "sst2": Task(
        **REVIEW,
        test="validation",  # GLUE keeps the labels of its test split to itself
        licence="not stated by its authors; research use",
        hub=("nyu-mll/glue", "sst2"),
        files=_task_files("sst2", **SPLIT_FILES),
    ),
    "samsum": Task(
        **CHAT,
        licence="CC BY-NC-ND 4.0",
        max_new_tokens=80,
        hub=("knkarthick/samsum",),
        files=_task_files("samsum", **SPLIT_FILES),
    ),
    "gsm8k": Task(
        **PROBLEM,
        licence="MIT",
        max_new_tokens=256,
        hub=("openai/gsm8k", "main"),
        files=_task_files("gsm8k", train="train", test="test"),
        hold_out=500,
    ),
    "sentiment": Task(**REVIEW, test="test", licence="MIT", generator=sentiment),
    "dialogue": Task(**CHAT, licence="MIT", max_new_tokens=48, generator=dialogue),
    "arithmetic": Task(**PROBLEM, licence="MIT", max_new_tokens=128, generator=arithmetic),
}
GENERATED = {"train": 4_000, "validation": 500, "test": 1_000}  # rows of an embedded task


@cache
def load_task(
    name: str, split: str, data_dir: str | None = None, first: int = 0, count: int = 0
) -> tuple[list[Example], dict[str, str]]:
    """The examples of one split, and {"source", "licence", "fingerprint"} of them for a run's record.

    With `count` only so many, from number `first` on; embedded tasks have as many as anybody asks for.

    Real tasks are looked for in $DATA_DIR as plain files and then on the hub, through `datasets`. Raises
    DataError that says what is missing and where it would be found.
    """
    task = find_task(name)
    data_dir = data_dir or os.environ.get("DATA_DIR") or "data"
    if split not in SPLITS:
        raise DataError(f'there is no split "{split}"; the splits are {", ".join(SPLITS)}')
    if task.generator:
        last = first + (count or GENERATED[split])
        rows = list(islice(task.generator(split, last), first, None))
        source = f"generated by data.py, seed {SEED}" + (f", from row {first + 1:,} on" if first else "")
        numbered = list(enumerate(rows, first + 1))
    else:
        held = task.hold_out and split != "test"
        rows, source = _task_rows(name, "train" if held else split, data_dir)
        numbered = list(enumerate(rows, 1))
        if held:
            numbered = numbered[: -task.hold_out] if split == "train" else numbered[-task.hold_out :]
            source += f" (its last {task.hold_out} rows are validation)"
        numbered = numbered[first : first + count] if count else numbered[first:]
    if not numbered:
        raise DataError(f"{name}, {split}: {source} holds no examples")
    examples = []
    for number, row in numbered:
        example = _example(name, task, row, f"{source}, row {number}")
        if example:
            examples.append(example)
    if not examples:
        columns = " and ".join(f'"{column}"' for column in task.columns)
        raise nothing_to_read(f"{name}, {split}: {source}{_hint(name, task)}", rows, f"text in {columns}")
    about = {"source": source, "licence": task.licence}
    _note_left_out(about, len(numbered) - len(examples))
    fingerprint = sha256(f"{task.prompt(e.text)}\0{e.target}\0".encode() for e in examples)
    return examples, about | {"fingerprint": fingerprint}


def _note_left_out(about: dict, n: int, what: str = "without text") -> None:
    """Writes into a run's record, and into what is printed of the source, how many rows were left out."""
    if n:
        about["left_out"] = about.get("left_out", 0) + n
        about["source"] += f" ({n:,} {what} left out)"


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise DataError(f'there is no task "{name}"; the tasks are {", ".join(TASKS)}')
    return TASKS[name]


def _hint(name: str, task: Task) -> str:
    return f"; results on {name} are reported on its {task.test} split"


def _example(name: str, task: Task, row: dict, where: str) -> Example | None:
    """A row as an Example; None if it lacks its text or its answer, as one row of SAMSum."""
    text, answer = (text_of(row.get(column), f'{where}, "{column}"') for column in task.columns)
    if text is None or answer is None:
        return None
    if not task.labels:
        return Example(text, f" {answer}")
    if answer not in map(str, range(len(task.labels))):  # -1: the hub's way to hide a test split's labels
        last = len(task.labels) - 1
        raise DataError(f"{where}: label {answer!r} is not one of 0 to {last}{_hint(name, task)}")
    return Example(text, task.labels[int(answer)], int(answer))


def _task_rows(name: str, split: str, data_dir: str) -> tuple[list[dict], str]:
    """The raw rows of one split, and where they are from."""
    task = TASKS[name]
    names = task.files[split]
    path = _first_file(data_dir, names)
    if path:
        return list(read_rows(path)), os.path.relpath(path, data_dir)
    repo, *config = task.hub
    try:
        return hub_rows(repo, *config, split=split), f"{repo} on Hugging Face, {split}"
    except DataError as error:
        stand_in = next(n for n, t in TASKS.items() if t.generator and t.metric == task.metric)
        raise DataError(
            f"{name} is not on this disk and could not be fetched: {error}. Get online ({repo} on Hugging "
            f"Face), or put its {split} split at {os.path.join(data_dir, names[0])}.jsonl (or .csv, .tsv, "
            f".parquet, also .gz) with the columns {' and '.join(task.columns)}, or use the embedded task, "
            f"which needs neither: {stand_in}"
        ) from None


def _first_file(data_dir: str, stems: Iterable[str]) -> str | None:
    """The first of these files in $DATA_DIR, in any of the kinds that `read_rows` reads."""
    for stem in stems:
        for kind in (".jsonl", ".tsv", ".json", ".csv", ".parquet"):
            for gz in ("", ".gz"):
                path = os.path.join(data_dir, stem + kind + gz)
                if os.path.exists(path):
                    return path
    return None


def few_shot(name: str, shots: int, seed: int = SEED, data_dir: str | None = None) -> list[Example]:
    """`shots` examples drawn from the train split by seed, with as many of each class as of the others."""
    examples, _ = load_task(name, "train", data_dir)
    rng = random.Random(f"{name} {seed}")
    drawn = [examples[i] for i in rng.sample(range(len(examples)), min(len(examples), 50 * shots))]
    classes = max(1, len(TASKS[name].labels))
    kept, counts = [], [0] * classes
    for example in drawn:
        if len(kept) < shots and counts[example.label or 0] < -(-shots // classes):
            kept.append(example)
            counts[example.label or 0] += 1
    return kept


# -----------------------------------------------------------------------------
# conversations and preferences: what alignment learns from


@dataclass(frozen=True)
class Preference:
    """A conversation that ends with the user's turn, and two answers to it."""

    messages: list[dict]  # [{"role": "system", "user" or "assistant", "content": ...}, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Collection:
    """A data set of conversations or preferences: where it is, on the hub and in $DATA_DIR."""

    hub: str
    files: tuple[str, ...]  # the first that is there is read, and split by the first question
    licence: str
    hub_split: str = "train"
    hub_file: str = ""  # of a repository that `datasets` cannot read: the file with the rows
    note: str = ""  # what one has to know to get it


COLLECTIONS = {
    "alpaca": Collection("tatsu-lab/alpaca", ("alpaca/train", "instruct/alpaca_5000"), "CC BY-NC 4.0"),
    "dolly": Collection("databricks/databricks-dolly-15k", ("dolly/train",), "CC BY-SA 3.0"),
    "lima": Collection(
        "GAIR/lima",
        ("lima/train", "instruct/lima"),
        "CC BY-NC-SA",
        hub_file="train.jsonl",
        note="GAIR/lima is gated and comes as a script, which `datasets` does not run any more: its file "
        "train.jsonl can be had by who has accepted the terms on its page and run `hf auth login`; dolly and "
        "alpaca need neither",
    ),
    "hh-rlhf": Collection("Anthropic/hh-rlhf", ("hh-rlhf/train", "hh-rlhf/helpful-base/test"), "MIT"),
    "ultrafeedback": Collection(
        "HuggingFaceH4/ultrafeedback_binarized", ("ultrafeedback/train",), "MIT", hub_split="train_prefs"
    ),
}


def load_conversations(name: str, split: str, data_dir: str | None = None) -> tuple[list[list[dict]], dict]:
    """Conversations of one split, [[{"role", "content"}, ...], ...], and their source, for a run's record.

    `name`: the embedded `instructions`, a task (its questions and answers are turns), alpaca, dolly, lima, or
    a file. What is not split by its makers is split by the first question that the user asks: 90, 5, 5 %.
    """
    if name in TASKS:
        examples, about = load_task(name, split, data_dir)
        question = TASKS[name].question
        return [talk(question.replace("{}", e.text), e.target.strip()) for e in examples], about
    if name == "instructions":
        chats = [row["messages"] for row in instructions(split, GENERATED[split])]
        about = {"source": f"generated by data.py, seed {SEED}", "licence": "MIT"}
    else:
        chats, about = _collection(name, split, data_dir, messages_of, "a question and an answer")
    return chats, about | {"fingerprint": sha256(json.dumps(c).encode() for c in chats)}


def load_preferences(name: str, split: str, data_dir: str | None = None) -> tuple[list[Preference], dict]:
    """Preferences of one split and their source: hh-rlhf, ultrafeedback, or a file of pairs."""
    pairs, about = _collection(name, split, data_dir, preference_of, "a question and two answers to it")
    kept = [p for p in pairs if p.chosen != p.rejected]
    _note_left_out(about, len(pairs) - len(kept), "pairs with identical sides")
    if not kept:
        raise DataError(f"{name}, {split}: {about['source']} holds no pairs")
    texts = (json.dumps([p.messages, p.chosen, p.rejected]).encode() for p in kept)
    return kept, about | {"fingerprint": sha256(texts)}


def preference_of(row: dict, where: str = "") -> Preference | None:
    """A row as a Preference; None if it lacks a side, or if its sides answer different questions."""
    messages, chosen, rejected = pair_of(row, where)
    return Preference(messages, chosen, rejected) if messages else None


def _collection(name: str, split: str, data_dir: str | None, parse: Callable, what: str) -> tuple[list, dict]:
    """One split of the rows that `parse` makes something of. Rows with one first question share a split."""
    rows, source, licence = _collection_rows(name, data_dir or os.environ.get("DATA_DIR") or "data")
    if not rows:
        raise DataError(f"{name}: {source} holds no rows")
    items, in_split = 0, []
    for number, row in enumerate(rows, 1):
        item = parse(row, f"{source}, row {number}")
        if not item:
            continue
        items += 1
        if split_of(first_question(getattr(item, "messages", item))) == split:
            in_split.append(item)
    if not items:
        raise nothing_to_read(source, rows, what)
    if not in_split:
        raise DataError(
            f"{source}: none of its {items:,} rows falls into the {split} split. Rows with the same first "
            "question stay together; of different questions one in 20 is validation and one in 20 is test: "
            "there are too few"
        )
    about = {"source": f"{source}, split by the first question", "licence": licence}
    _note_left_out(about, len(rows) - items, f"without {what}")
    return in_split, about


def _collection_rows(name: str, data_dir: str) -> tuple[list[dict], str, str]:
    """The rows of a collection or of a file, where they are from, and their licence."""
    found = COLLECTIONS.get(name)
    if found is None:
        if not os.path.isfile(name):
            known = ", ".join(["instructions", *COLLECTIONS, *TASKS])
            raise DataError(f'"{name}" is neither a file nor a collection; those are {known}')
        return list(read_rows(name)), name, "yours"
    path = _first_file(data_dir, found.files)
    if path:
        return list(read_rows(path)), os.path.relpath(path, data_dir), found.licence
    try:
        if found.hub_file:
            rows = list(read_rows(hub_file(found.hub, found.hub_file)))
        else:
            rows = hub_rows(found.hub, split=found.hub_split)
        return rows, f"{found.hub} on Hugging Face", found.licence
    except DataError as error:
        raise DataError(
            f"{name} is not on this disk and could not be fetched: {error}. {found.note or 'Get online'} "
            f"({found.hub} on Hugging Face). Or put it at {os.path.join(data_dir, found.files[0])}.jsonl; "
            "the embedded collections need neither: instructions, arithmetic"
        ) from None


def refuse_overlap(train: Iterable[str], test: Iterable[str], what: str) -> None:
    """Raises DataError if a text that is tested on is trained on."""
    shared = set(train) & set(test)
    if shared:
        raise DataError(f"{what}: {len(shared)} test items are also trained on, such as {min(shared)[:80]!r}")


def judge(name: str, examples: list[Example], outputs: list) -> tuple[list[dict], dict[str, dict]]:
    """Outputs of a model against what they should be: a record an example, and the metrics.

    `outputs` are class indices where the task has labels, and generated texts elsewhere.
    """
    task, records = TASKS[name], []
    for example, output in zip(examples, outputs, strict=True):
        if task.labels:
            found = {"prediction": task.labels[output].strip(), "correct": output == example.label}
        elif task.metric == "exact_match":
            text = output.split(task.stop)[0].strip()
            found = {
                "output": text,
                "prediction": extract_number(text),
                "answer": extract_number(example.target),
            }
            found["correct"] = found["prediction"] == found["answer"]
        else:
            text = output.strip().split(task.stop)[0].strip()
            found = {"output": text} | rouge(text, example.target)
        records.append({"text": example.text, "target": example.target.strip(), **found})
    if task.metric == "rouge":
        metrics = {m: bootstrap([r[m] for r in records]) for m in ("rouge1", "rouge2", "rougeL")}
        length = sum(len(r["output"].split()) for r in records) / len(records)
        return records, metrics | {"words": {"value": length, "n": len(records)}}
    metrics = {task.metric: proportion(sum(r["correct"] for r in records), len(records))}
    if task.labels:
        pairs = [(e.label, output) for e, output in zip(examples, outputs, strict=True)]
        metrics["macro_f1"] = bootstrap(pairs, macro_f1, rounds=500)
    else:
        said = sum(r["prediction"] is not None for r in records)
        metrics["answered"] = proportion(said, len(records))
    return records, metrics


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [--name=value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--corpus", default="storyworld", help="a name, a path or glob, or a mix")
    parser.add_argument("--task", help=f"{', '.join(TASKS)}: show its items as a model sees them")
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--show", type=int, default=5, help="how many")
    args = parser.parse_args()
    try:
        if args.task:
            examples, about = load_task(args.task, args.split)
            print(f"{len(examples):,} examples, {about['source']}; licence: {about['licence']}", end="\n\n")
            for example in examples[: args.show]:
                print(f"{TASKS[args.task].prompt(example.text)}[{example.target}]", end="\n\n")
            return
        for doc in islice(documents(args.corpus, args.split), args.show):
            print(doc, end="\n\n")
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_script(main)
