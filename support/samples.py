"""Sampled answers to problems whose answers can be checked: drawn, judged, and laid out as arrays.

DPO makes pairs of them, a verifier learns from them, and eval.py measures ways to choose among them.
"""

import hashlib
import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress
from pathlib import Path

import numpy as np

from data import TASKS, DataError, Example, judge
from support.files import keep_if_possible, write_jsonl
from support.runs import weights_hash
from support.tables import read_jsonl, read_rows, shortened
from support.text_model import TextModel
from tasks.calculator import extract_number


@dataclass
class Samples:
    """n answers to each of P problems."""

    examples: list[Example]  # (P)
    answers: list[list[str]]  # (P, n)
    right: np.ndarray  # (P, n) bool: the final number is the true one

    @cached_property
    def numbers(self) -> np.ndarray:
        """(P, n) the final number of every answer, as text; "" if it has none."""
        return np.array([[extract_number(answer) or "" for answer in row] for row in self.answers])

    def flat(self) -> tuple[list[str], list[str]]:
        """(P n) problems and (P n) answers, in the order of `right.ravel()`."""
        n = self.right.shape[1]
        return [example.text for example in self.examples for _ in range(n)], [*chain(*self.answers)]

    def distinct(self, i: int, right: bool) -> list[str]:
        """The right answers to problem i, or the wrong ones: each once, in the order of drawing."""
        kept = compress(self.answers[i], self.right[i] == right)
        return list(dict.fromkeys(kept))


def draw(
    model: TextModel, task: str, split: str, examples: list[Example], n: int, temperature: float, seed: int,
    calculator: bool = False,
) -> Samples:  # fmt: skip
    """n answers to each example, judged; temperature 0 gives the greedy one.

    They are kept in the model's folder, in samples/, and read from there when the same model is asked the
    same questions in the same way; whatever differs (weights, seed, temperature, questions) makes new ones.
    So does a file that does not hold these questions in this order: it is only a cache.
    """
    stop = model.stop_of(TASKS[task])
    new_tokens = min(TASKS[task].max_new_tokens, model.context_length // 2)
    room = model.context_length - new_tokens
    prompts = [model.prompt(TASKS[task], example.text, room=room)[0] for example in examples]
    weights = weights_hash(model.name)
    how = {
        "task": task,
        "split": split,
        "n": n,
        "temperature": temperature,
        "seed": seed,
        "calculator": calculator,
        "max_new_tokens": new_tokens,
        "stop": stop,
        "model": weights,
    }
    key = hashlib.sha256(json.dumps([how, prompts]).encode()).hexdigest()[:12]
    file = Path(model.name, "samples", f"{task}-{split}-{n}x-{key}.jsonl")
    n = 1 if temperature == 0 else n
    questions = [example.text for example in examples]
    kept = read_jsonl(file)
    answers = [row.get("samples") for row in kept]
    whole = all(isinstance(some, list) and len(some) == n for some in answers)
    if not whole or [row.get("question") for row in kept] != questions:
        progress = f"{model.name} answers {task} {n} x"
        texts = model.generate(prompts, new_tokens, stop, progress, n, temperature, seed, calculator)
        texts = [text.strip() for text in texts]
        answers = [texts[i : i + n] for i in range(0, len(texts), n)]
        if weights:
            rows = [{"question": q, "samples": some} for q, some in zip(questions, answers, strict=True)]
            keep_if_possible(write_jsonl, file, rows)
    repeated = [example for example in examples for _ in range(n)]
    records, _ = judge(task, repeated, [*chain(*answers)])
    right = np.array([record["correct"] for record in records])
    return Samples(examples, answers, right.reshape(-1, n))


def labelled(file: str) -> list[Samples]:
    """Solutions that come with labels, split by question: training (half), validation and test (a quarter).

    A row has a question and, for each source, {"solution", "is_correct"}: the form of GSM8K's
    example_model_solutions.jsonl. A final "A: 18" becomes "#### 18", as in everything else here.
    """
    parts = [([], [], []) for _ in range(3)]  # examples, answers, right
    for number, row in enumerate(read_rows(file), 1):
        question = row.get("question")
        if not isinstance(question, str):
            raise DataError(f'{file}, row {number}: "question" should be text, but is {shortened(question)}')
        solutions = [value for value in row.values() if isinstance(value, dict) and "is_correct" in value]
        for solution in solutions:
            is_text = isinstance(solution.get("solution"), str)
            if not is_text or solution["is_correct"] not in (True, False):
                raise DataError(
                    f'{file}, row {number}: "solution" should be text and "is_correct" true or false, but '
                    f"there is {shortened(solution)}"
                )
        examples, answers, right = parts[(0, 0, 1, 2)[zlib.crc32(question.encode()) % 4]]
        texts = [solution["solution"].replace("\nA: ", "\n#### ") for solution in solutions]
        labels = [bool(solution["is_correct"]) for solution in solutions]
        target = texts[labels.index(True)] if any(labels) else ""
        examples.append(Example(question, target))
        answers.append(texts)
        right.append(labels)
    for _, _, right in parts:
        if len({len(row) for row in right}) != 1 or not any(map(any, right)):
            raise DataError(
                f"{file}: every question needs as many labelled solutions, and each part a right one; or "
                "there are too few questions"
            )
    return [Samples(examples, answers, np.array(right)) for examples, answers, right in parts]
