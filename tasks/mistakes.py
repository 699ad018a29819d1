"""What kind of mistake an answer is: rules that read it, so that a score comes with its reasons.

A solution is followed step by step beside the true one until they part. Reviews are sorted by what makes
them hard, right and wrong ones alike, since a kind matters by how often it goes wrong. Summaries are checked
for three flaws that ROUGE does not see, stories by the rules of their generator. No model is asked; "other"
is an answer, and a text can be of several kinds. `eval.py` writes "kinds" into every line of a run's
answers/, and `report.py` counts them:

    from tasks.mistakes import kinds_of
    kinds_of("accuracy", {"text": "not bad at all", ...})    # ["negation", "short"]
"""

import re
from fractions import Fraction
from typing import NamedTuple

from tasks.calculator import CalculatorError, calculate, decimal_text, equations, extract_number, plain_number
from tasks.grammar import pairs
from tasks.sentiment import BAD, GOOD
from tasks.stories import faults

KINDS = {
    # of a wrong solution, at the first step that is not the true one; one kind each
    "slip": "right equation, wrong result",
    "operation": "right numbers, wrong operation",
    "made up": "a number that is not in the problem: copied wrong or invented",
    "missed": "a step left out",
    "distractor": "a number that plays no part",
    "plan": "another wrong step, or one too many",
    "answer": "right steps, another final number",
    "bare": "a number, but no annotated step",
    "unfinished": "steps, but no final answer",
    "none": "no number at all",
    # of a review
    "negation": "a negation",
    "contrast": "two halves: but, although, despite",
    "mixed": "words of praise and of blame",
    "short": "five words or fewer",
    # of a summary
    "copied": "eight words in a row from the conversation",
    "speaker": "a speaker of the true summary is missing",
    "too short": "less than half as long as the true one",
    "too long": "more than twice as long as the true one",
    # of a story; it can also be too short
    "person": "a second girl, boy or grown-up",
    "kind": "a boy's name for a girl, or the other way round",
    "pronoun": "a pronoun that fits nobody named so far",
    "fact": "two things that cannot be in one story",
    "other": "none of these",
}


def kinds_of(metric: str, record: dict) -> list[str]:
    """The kinds of one record of `data.judge` on a task with this metric; [] for a solution that is right."""
    if metric == "accuracy":
        return review_kinds(record["text"])
    if metric == "rouge":
        return summary_kinds(record["text"], record["output"], record["target"])
    if metric == "consistent":
        found = faults(f"{record['text']}\n{record['output']}")
        return found or ([] if record["correct"] else ["too short"])
    return [] if record["correct"] else [solution_kind(record["output"], record["target"], record["text"])]


# -----------------------------------------------------------------------------
# Solutions with annotated steps: 3*4=<<3*4=12>>12

NUMBER_WORDS = pairs("""zero:0 one:1 two:2 three:3 four:4 five:5 six:6 seven:7 eight:8 nine:9 ten:10 eleven:11
twelve:12 dozen:12 twenty:20 thirty:30 hundred:100 twice:2 double:2 half:2 triple:3 third:3 quarter:4""")
UNITS = set("0.01 0.5 1 2 4 7 12 24 30 52 60 100 365 1000".split())  # hours, weeks, cents: known to everybody


class Step(NamedTuple):
    expression: str
    value: Fraction | None
    numbers: list[str]  # sorted
    operators: str
    result: str | None


def steps_of(solution: str) -> list[Step]:
    steps = []
    for expression, result in equations(solution):
        expression = expression.replace(",", "")
        try:
            value = calculate(expression)
        except CalculatorError:
            value = None
        numbers = sorted(map(plain_number, re.findall(r"\d+\.?\d*|\.\d+", expression)))
        operators = re.sub(r"[\d.]+", "", expression)
        steps.append(Step(expression, value, numbers, operators, extract_number(result)))
    return steps


def solution_kind(output: str, target: str, question: str = "") -> str:
    """What is wrong with a wrong solution, at the first step where it leaves the true one."""
    if extract_number(output) is None:
        return "none"
    steps, true_steps = steps_of(output), steps_of(target)
    if true_steps and not steps:
        return "bare"
    for i, (step, true) in enumerate(zip(steps, true_steps, strict=False)):
        # A step with the true step's value is the same step, however it is written.
        same = step.expression == true.expression or (step.value is not None and step.value == true.value)
        if not same:
            if step.numbers == true.numbers:
                return "operation"
            return wrong_numbers(steps, true_steps, i, question)
        if step.result != true.result:
            return "slip"
    if "####" in target and "####" not in output:
        return "unfinished"
    if len(steps) == len(true_steps):
        return "answer"
    return "missed" if len(steps) < len(true_steps) else "plan"


def wrong_numbers(steps: list[Step], true_steps: list[Step], i: int, question: str) -> str:
    """The kind of step `i`, which has other numbers than the true one, after steps that are right.

    The order decides where several kinds would fit: a number from nowhere, then a step left out (this one is
    what the true solution does later), then a number of the question that the true solution never uses.
    """
    used, in_question = set(steps[i].numbers), question_numbers(question)
    before, results = ({step.result for step in some} for some in (steps[:i], true_steps))
    needed = set().union(*(step.numbers for step in true_steps))
    if question and not used <= in_question | UNITS | needed | before:
        return "made up"
    new = used - before
    if new and true_steps[i].result not in [step.result for step in steps[i + 1 :]]:
        for later in true_steps[i + 1 :]:
            if new == set(later.numbers) - results and steps[i].operators == later.operators:
                return "missed"
    return "distractor" if new & in_question - needed else "plan"


def question_numbers(question: str) -> set[str]:
    """The numbers in a question: in digits, in words, or as percentages."""
    found = {plain_number(x) for x in re.findall(r"\d[\d,]*(?:\.\d+)?", question)}
    found |= {number for word, number in NUMBER_WORDS if re.search(rf"\b{word}s?\b", question.lower())}
    for percent in re.findall(r"(\d+(?:\.\d+)?) ?(?:%|percent)", question):
        share = Fraction(percent) / 100
        shares = share, 1 - share, 1 + share, 100 * (1 - share), 100 * (1 + share)
        found |= set(map(decimal_text, shares))
    return found


# -----------------------------------------------------------------------------
# Reviews: SST-2 and our own

NEGATION = (
    r"\b(?:not?|never|nothing|nobody|none|neither|nor|without|hardly|barely|cannot)\b|n't\b|anything but"
)
CONTRAST = r"\b(?:but|yet|though|although|however|despite|nevertheless|in spite of)\b"
PRAISE = {*GOOD, *(
    "good great best better well fine fun enjoyable entertaining beautiful beautifully brilliant excellent "
    "wonderful delightful engaging intelligent smart witty powerful compelling fascinating fresh original "
    "hilarious perfect pleasant rewarding rich satisfying sweet tender terrific thoughtful triumph love "
    "impressive solid strong masterpiece memorable imaginative"
).split()}  # fmt: skip
BLAME = {*BAD, *(
    "bad worst worse poor poorly awful terrible horrible boring bland stupid silly ugly mediocre tedious "
    "predictable disappointing disappointment unfunny weak waste wasted mess failure fails lame lazy hollow "
    "empty contrived annoying depressing dreary pretentious ridiculous lacks lacking problem problems tired "
    "unfortunately sadly trite forgettable"
).split()}  # fmt: skip


def review_kinds(text: str) -> list[str]:
    """What makes a review hard; ["other"] if nothing does."""
    text = text.lower()
    words = set(re.findall(r"[a-z']+", text))
    found = {
        "negation": re.search(NEGATION, text),
        "contrast": re.search(CONTRAST, text),
        "mixed": words & PRAISE and words & BLAME,
        "short": len(re.findall(r"[a-z][\w'-]*", text)) <= 5,
    }
    return list(filter(found.get, found)) or ["other"]


# -----------------------------------------------------------------------------
# Summaries: SAMSum and our own


def summary_kinds(dialogue: str, summary: str, reference: str) -> list[str]:
    """The flaws of a summary; ["other"] if it has none of these."""

    def words(text: str) -> list[str]:
        return re.findall(r"[\w-]+(?:'(?!s\b)\w+)*", text)

    def names(text: str) -> set[str]:
        return {word for word in words(text) if word[0].isupper()}

    length, true_length = len(words(summary)), len(words(reference))
    chat, said = f" {' '.join(words(dialogue.lower()))} ", words(summary.lower())
    runs = [f" {' '.join(said[i : i + 8])} " for i in range(length - 7)]
    speakers = names(" ".join(re.findall(r"^([^:\n]{1,30}):", dialogue, flags=re.M)))
    found = {
        "copied": any(run in chat for run in runs),
        "speaker": (speakers & names(reference)) - names(summary),
        "too short": 2 * length < true_length,
        "too long": length > 2 * true_length,
    }
    return list(filter(found.get, found)) or ["other"]
