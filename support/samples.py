"""Sampled answers to problems whose answers can be checked: drawn, judged, and laid out as arrays.

DPO makes pairs of them, a verifier learns from them, and eval.py measures ways to choose among them.
"""

import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress

import numpy as np

from data import DataError, Example, judge
from support.tables import read_rows, shortened
from support.text_model import TextModel, sample_answers
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
    """n answers to each example, judged; temperature 0 is greedy. `sample_answers` keeps them on the disk."""
    answers = sample_answers(model, task, split, examples, n, temperature, seed, calculator)
    repeated = [example for example in examples for _ in answers[0]]  # as many answers each
    records, _ = judge(task, repeated, [*chain(*answers)])
    right = np.array([record["correct"] for record in records])
    return Samples(examples, answers, right.reshape(len(examples), -1))


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
