"""What kind of mistake an answer is: rules that read it, so that a score comes with its reasons.

A solution is followed step by step beside the true one until they part. Reviews are sorted by what makes
them hard, right and wrong ones alike, since a kind matters by how often it goes wrong. Summaries are checked
for three flaws that ROUGE does not see. No model is asked; "other" is an answer, and a text can be of several
kinds. `eval.py` writes "kinds" into every line of a run's answers/, and `report.py` counts them:

    from tasks.mistakes import kinds_of
    kinds_of("sst2", {"text": "not bad at all", ...})    # ["negation", "short"]
"""

import re
from fractions import Fraction

from data import TASKS
from tasks.calculator import CalculatorError, calculate, decimal_text, equations, extract_number, plain_number
from tasks.sentiment import BAD, GOOD

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
    "other": "none of these",
}


def kinds_of(name: str, record: dict) -> list[str]:
    """The kinds of one record of `data.judge` on the task `name`; [] for a solution that is right."""
    if TASKS[name].labels:
        return review_kinds(record["text"])
    if TASKS[name].metric == "exact_match":
        wrong = not record["correct"]
        return [solution_kind(record["output"], record["target"], record["text"])] if wrong else []
    return summary_kinds(record["text"], record["output"], record["target"])


# -----------------------------------------------------------------------------
# Solutions with annotated steps: 3*4=<<3*4=12>>12

WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
WORDS = {word: str(i) for i, word in enumerate(WORDS)}
WORDS |= {
    "dozen": "12",
    "twice": "2",
    "double": "2",
    "half": "2",
    "triple": "3",
    "third": "3",
    "quarter": "4",
}
WORDS |= {"twenty": "20", "thirty": "30", "hundred": "100"}
UNITS = set("0.01 0.5 1 2 4 7 12 24 30 52 60 100 365 1000".split())  # hours, weeks, cents: known to everybody


def solution_kind(output: str, target: str, question: str = "") -> str:
    """What is wrong with a wrong solution, at the first step where it leaves the true one."""
    if extract_number(output) is None:
        return "none"
    steps, true_steps = ([(e.replace(",", ""), r) for e, r in equations(text)] for text in (output, target))
    if true_steps and not steps:
        return "bare"
    for i in range(min(len(steps), len(true_steps))):
        kind = step_kind(steps, true_steps, i, question)
        if kind:
            return kind
    if "####" in target and "####" not in output:
        return "unfinished"
    if len(steps) == len(true_steps):
        return "answer"
    return "missed" if len(steps) < len(true_steps) else "plan"


def step_kind(steps: list[tuple], true_steps: list[tuple], i: int, question: str) -> str:
    """What is wrong with step `i`, (expression, result), if all steps before it are right; "" if nothing is.

    A step with the true step's value is the same step, however it is written. The order decides where several
    kinds would fit: a number from nowhere, then a step left out (the next one is what the true solution does
    later), then a number of the question that the true solution never uses.
    """
    (expression, result), (true, true_result) = steps[i], true_steps[i]
    same = value_of(expression) is not None and value_of(expression) == value_of(true)
    if not same and operands(expression) != operands(true):
        return wrong_numbers(steps, true_steps, i, question)
    order_matters = set(operators(true)) & set("-/")  # 5-3 is not 3-5
    if not same and (operators(expression) != operators(true) or (expression != true and order_matters)):
        return "operation"
    return "slip" if extract_number(result) != extract_number(true_result) else ""


def wrong_numbers(steps: list[tuple], true_steps: list[tuple], i: int, question: str) -> str:
    """The kind of a step with other numbers than the true one."""
    used, in_question = set(operands(steps[i][0])), told_numbers(question)
    before = results_of(steps[:i])
    needed = {x for expression, _ in true_steps for x in operands(expression)}
    if question and not used <= in_question | UNITS | needed | before:
        return "made up"
    new = used - before
    if new and extract_number(true_steps[i][1]) not in results_of(steps[i + 1 :]):
        for expression, _ in true_steps[i + 1 :]:
            later = set(operands(expression)) - results_of(true_steps)
            if new == later and operators(steps[i][0]) == operators(expression):
                return "missed"
    return "distractor" if new & in_question - needed else "plan"


def results_of(steps: list[tuple]) -> set[str | None]:
    return {extract_number(result) for _, result in steps}


def operands(expression: str) -> list[str]:
    return sorted(plain_number(x) for x in re.findall(r"\d[\d.]*|\.\d+", expression))


def operators(expression: str) -> str:
    return re.sub(r"[\d.]+", "", expression)


def value_of(expression: str) -> Fraction | None:
    try:
        return calculate(expression)
    except CalculatorError:
        return None


def told_numbers(question: str) -> set[str]:
    """The numbers that a question gives: in digits, in words, or as shares of 100."""
    found = {plain_number(x) for x in re.findall(r"\d[\d,]*(?:\.\d+)?", question)}
    found |= {number for word, number in WORDS.items() if re.search(rf"\b{word}s?\b", question.lower())}
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
    return those_of(
        negation=re.search(NEGATION, text),
        contrast=re.search(CONTRAST, text),
        mixed=words & PRAISE and words & BLAME,
        short=len(re.findall(r"[a-z][\w'-]*", text)) <= 5,
    )


def those_of(**found) -> list[str]:
    return [kind.replace("_", " ") for kind, is_so in found.items() if is_so] or ["other"]


# -----------------------------------------------------------------------------
# Summaries: SAMSum and our own


def summary_kinds(dialogue: str, summary: str, reference: str) -> list[str]:
    """The flaws of a summary; ["other"] if it has none of these."""

    def words(text: str) -> list[str]:
        return re.findall(r"[\w-]+(?:'(?!s\b)\w+)*", text)

    def names(text: str) -> set[str]:
        return {word for word in words(text) if word[0].isupper()}

    length, true_length = len(words(summary)), len(words(reference))
    chat, summary_words = f" {' '.join(words(dialogue.lower()))} ", words(summary.lower())
    runs = [f" {' '.join(summary_words[i : i + 8])} " for i in range(length - 7)]
    speakers = names(" ".join(re.findall(r"^([^:\n]{1,30}):", dialogue, flags=re.M)))
    return those_of(
        copied=any(run in chat for run in runs),
        speaker=(speakers & names(reference)) - names(summary),
        too_short=2 * length < true_length,
        too_long=length > 2 * true_length,
    )
