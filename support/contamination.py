"""Contamination: does the text that a run was trained on hold the items that it is tested on?"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from data import CORPORA_ONLY, TASKS, documents, load_conversations, load_preferences, load_task
from support.results import Run


def ngrams(text: str, n: int) -> set[str]:
    """The runs of n words of a text, without case and punctuation."""
    words = re.findall(r"[^\W_]+", text.lower())
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


def contamination(items: list[str], training_texts: Iterable[str], n: int) -> dict:
    """How many items share n words in a row with the training texts (GPT-3, appendix C, used 13).

    Items of fewer than n words cannot be checked and are counted apart. One pass over the training texts;
    only the items' runs of words are held in memory.
    """
    runs = [ngrams(item, n) for item in items]
    wanted = set().union(*runs)
    seen = set()
    for text in training_texts:
        seen |= wanted & ngrams(text, n)
    found = [item for item, grams in zip(items, runs, strict=True) if grams & seen]
    checked = sum(map(bool, runs))
    return {
        "words": n,
        "items": len(found),
        "checked": checked,
        "too_short": len(items) - checked,
        "share": len(seen) / max(1, len(wanted)),
        "examples": [item[:200] for item in found[:5]],
    }


def trained_on(name: str) -> list[tuple]:
    """What a run and its parents were trained on, by their records: [("corpus", "task" or "pairs", name)], of
    a part of a task also (first row, rows).

    A task here is also a set of conversations.
    """
    found = []
    folder = Path(name)
    for run in Run(folder, folder.parent).records:
        settings = run.get("settings", {})
        found += [(kind, settings[kind]) for kind in ("task", "corpus") if settings.get(kind)]
        if run.get("stage") == "sft":
            for source in run["data"]:
                if source != "tokenizer":
                    found.append(("corpus" if source in CORPORA_ONLY else "task", source))
        elif settings.get("data") in TASKS:  # DPO: its own answers to a part of a task's problems
            part = [settings[name] for name in ("first_problem", "problems") if name in settings]
            found.append(("task", settings["data"], *part))
        elif run.get("stage") == "dpo":
            found.append(("pairs", settings["data"]))
    return found


def training_texts(sources: list[tuple]) -> Iterator[str]:
    for kind, name, *part in sources:
        if kind == "corpus":
            yield from documents(name, "train")
        elif kind == "pairs":
            for pair in load_preferences(name, "train")[0]:
                texts = [message["content"] for message in pair.messages]
                yield " ".join([*texts, pair.chosen, pair.rejected])
        elif part:
            first, count = part
            for example in load_task(name, "train", first=first, count=count)[0]:
                yield f"{example.text} {example.target}"
        else:
            for conversation in load_conversations(name, "train")[0]:
                yield " ".join(message["content"] for message in conversation)
