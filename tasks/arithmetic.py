"""arithmetic: word problems of one to four steps with traps, and their worked solutions, in GSM8K's format.

Anna has 3 nuts. Tom is 9 years old. She buys 4 more nuts. How many nuts does Anna have now?
She has <<3+4=7>>7 nuts.
#### 7
"""

import operator
import random
import re
from collections.abc import Iterator

from tasks.grammar import SEED, Slots, fill, generated, number, pairs, parse, pick
from tasks.stories import BOYS, GIRLS, words_of_plots

# What is counted, and what it comes in
ITEMS = pairs(
    """apples:bags pears:bags nuts:bags plums:bowls eggs:baskets cookies:boxes muffins:trays candies:jars
beads:jars marbles:jars coins:bags stickers:sheets stamps:sheets cards:packs balloons:packs pencils:boxes
crayons:boxes books:boxes blocks:boxes flowers:bunches roses:bunches shells:buckets buttons:tins"""
)
THINGS = [word for pair in ITEMS for word in pair]
STEPS = {  # sentence of the question, sentence of the solution, what is done with {k}, its largest value
    "start": ("{name} has {k} {item}.|{name} found {k} {item}.|There are {k} {item} in {name}'s bag.",
              "", "", 24),
    "boxes": ("{name} has {n} {box} (of {k} {item} each|with {k} {item} in each).", "That is {sum} {item}.",
              "", 9),
    "buy": ("{He} (buys|finds) {k} more {item}.|{He} gets {k} more {item} from {other}.|{other} gives "
            "{name} {k} more {item}.", "{He} has {sum} {item}.", "+", 16),
    "buy boxes": ("{He} (buys|gets) {n} {box} (of {k} {item} each|with {k} {item} in each).",
                  "{He} has {sum} {item}.", "+", 9),
    "give": ("{He} gives {k} {item} (to {other}|away).|{He} loses {k} {item}.|Then {he} sells {k} {item}.",
             "{He} has {sum} {item} left.", "-", 16),
    "double": ("(A week later|By evening) {he} has twice as many {item}.", "{He} has {sum} {item}.", "*", 16),
    "times": ("{other} has {k} times as many {item} as {name}.", "{other} has {sum} {item}.", "*", 5),
    "more": ("{other} has {k} more {item} than {name}.", "{other} has {sum} {item}.", "+", 16),
    "fewer": ("{other} has {k} fewer {item} than {name}.", "{other} has {sum} {item}.", "-", 16),
    "together": ("{other} has {k} {item}.", "Together they have {sum} {item}.", "+", 16),
}  # fmt: skip
OF_OTHERS = ["times", "more", "fewer", "together"]  # only the last step is one of these
QUESTIONS = dict.fromkeys(OF_OTHERS, "How many {item} does {other} have?")
QUESTIONS["together"] = "How many {item} do {name} and {other} have (together|in all)?"
QUESTION = "How many {item} does {name} have (now|in the end)?|How many {item} does {he} have now?"
TRAPS = (  # numbers that play no part
    "{name} is {age} years old.|The shop also sells {m} {thing}.|{He} also has {m} {thing}.|"
    "{He} buys {m} {thing}.|{He} gives {m} {thing} (to {other}|away).|{other} has {m} {thing}.|"
    "{third} (has|buys|finds) {m} {item}.|{third} gives {m} {item} away."
)
TRAPS_OF_OTHER = (  # if nobody asks about {other}
    "{other} (has|buys|finds) {m} {item}.|{other} has {m} (more|fewer) {item} than {name}.|"
    "{other} has {n} times as many {item} as {name}."
)
CALCULATE = {"+": operator.add, "-": operator.sub, "*": operator.mul}
LIMIT = 40  # no number in a problem or its solution is greater


def attempt(rng: random.Random, steps: int, traps: int) -> dict | None:
    """A word problem, {"question", "answer"}, annotated as GSM8K's are; every number is from 1 to 40.

    It is a running count and what happens to it: buy, give away, double, boxes of n, times as many as
    somebody, more or fewer, together. One or two sentences (`traps`) have a number that plays no part, or
    would if another question were asked. None if a number left the range: the caller tries again.
    """
    he, names, others = pick(rng, (("she", GIRLS, BOYS), ("he", BOYS, GIRLS)))  # no pronoun is ambiguous
    name = pick(rng, names)
    other = pick(rng, others)
    third = pick(rng, others)
    item, box = pick(rng, ITEMS)
    thing, _ = pick(rng, ITEMS)
    if item == thing or other == third:
        return None
    slots = Slots(name=name, other=other, third=third, he=he, item=item, box=box, thing=thing)
    sentences = []
    solution = []

    def work(sentence: str, a: int, sign: str, b: int) -> int:
        result = CALCULATE[sign](a, b)
        slots["sum"] = f"<<{a}{sign}{b}={result}>>{result}"
        solution.append(fill(rng, sentence, slots))
        return result

    total = 0
    kind = pick(rng, ("start", "start", "start", "boxes"))
    while True:
        told, solved, sign, largest = STEPS[kind]
        n = number(rng, 2, 6)
        k = number(rng, 2, largest)
        slots.update(n=n, k=k)
        sentences.append(fill(rng, told, slots))
        if "boxes" in kind:
            k = work("That is {sum} {item}.", n, "*", k)
        elif kind == "double":
            k = 2
        total = work(solved, total, sign, k) if sign else k
        if not 1 <= total <= LIMIT:
            return None
        left = steps - len(solution)
        if left == 0:
            break
        last = OF_OTHERS if left == 1 else ["buy boxes"]
        kind = pick(rng, ["buy", "buy", "give", "give", "double", *last])

    question = QUESTIONS.get(kind, QUESTION)
    possible = TRAPS if "{other}" in question else f"{TRAPS}|{TRAPS_OF_OTHER}"
    possible = list(parse(possible))
    for _ in range(traps):
        for name, low, high in (("m", 2, 24), ("n", 2, 5), ("age", 5, 12)):
            slots[name] = number(rng, low, high)
        trap = possible.pop(number(rng, 0, len(possible) - 1))  # nobody has two ages
        trap = fill(rng, [trap], slots)
        sentences.insert(number(rng, 1, len(sentences)), trap)
    sentences.append(fill(rng, question, slots))
    solution.append(f"#### {total}")
    return {"question": " ".join(sentences), "answer": "\n".join(solution)}


def arithmetic(split: str, n: int = 0) -> Iterator[dict]:
    """The word problems of one split, forever or the first `n`; none comes twice.

    The calculation (`9*3=27 27+5=32`) decides the split: a test problem is never a training problem with
    other names in it.
    """

    def make(rng: random.Random) -> tuple[dict, str]:
        steps = pick(rng, (1, 2, 2, 3, 3, 4))
        traps = pick(rng, (1, 2))
        problem = None
        while problem is None:
            problem = attempt(rng, steps, traps)
        calculation = re.findall("<<(.*?)>>", problem["answer"])
        return problem, " ".join(calculation)

    return generated("arithmetic", make, split, n)


def arithmetic_text(split: str) -> Iterator[str]:
    """Text to pretrain on, by turns a worked problem and a few plain equations.

    A base model that never saw digits copied and equations solved cannot be taught the word problems later:
    at 0.8M parameters fine-tuning alone reached 4 %, and 70 % with text like this in pretraining. Equations
    are facts, which all splits share; the problems are not.
    """
    rng = random.Random(f"equations {split} {SEED}")
    for problem in arithmetic(split):
        yield f"{problem['question']}\n{problem['answer']}"
        yield "\n".join(equation(rng) for _ in range(8))


def numbers_text(split: str) -> Iterator[str]:
    """Text with everything that word problems need except how to solve one: questions, equations that are
    solved, and lists repeated word for word.

    For a base that is taught to solve problems later. Solving begins with copying numbers from the question,
    which is the work of induction heads: find where the last words occurred before, and repeat what followed
    (Olsson et al., 2022). A model learns them all at once or not at all. Short lists of random things, four
    times each, bring that about within 2M tokens; then repeated parts of problems are copied as well, and
    names in stories. Without lists none of our bases could copy, and SFT, which had to teach it, failed with
    one in four. A word that is in no list looks to the model like all others of its kind: stories changed
    their grown-ups and their things (report/alignment.md). Half of the equations have the annotated form
    that solutions use.
    """
    rng = random.Random(f"numbers {split} {SEED}")
    for problem in arithmetic(split):
        question = problem["question"]
        yield f"{question}\n{told_again(rng, question, 0.5)}".strip()
        yield "\n".join(equation(rng, annotated=rng.random() < 0.5) for _ in range(10))
        for _ in range(2):
            yield "\n".join([things(rng)] * 4)


def told_again(rng: random.Random, question: str, share: float = 1.0) -> str:
    """Some of a problem's sentences in another order, without the question itself."""
    sentences = re.split(r"(?<=[.?]) ", question)[:-1]
    some = [sentence for sentence in sentences if rng.random() < share]
    return " ".join(sorted(some, key=lambda _: rng.random()))


def things(rng: random.Random) -> str:
    """A list of eight random things: of problems (40 %), children (15 %), of stories (20 %) and numbers."""
    kinds = [THINGS] * 8 + [GIRLS + BOYS] * 3 + [words_of_plots()] * 4 + [range(1, LIMIT + 1)] * 5
    return " ".join(str(pick(rng, pick(rng, kinds))) for _ in range(8))


def equation(rng: random.Random, annotated: bool = False) -> str:
    sign = pick(rng, "++-*")
    if sign == "*":
        b = number(rng, 2, 12)
        a = number(rng, 2, min(12, LIMIT // b))
    else:
        a = number(rng, 2, LIMIT - 1)
        b = number(rng, 1, LIMIT - a if sign == "+" else a - 1)
    result = CALCULATE[sign](a, b)
    text = f"{a}{sign}{b}={result}"
    return f"<<{text}>>{result}" if annotated else text
