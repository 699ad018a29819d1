"""instructions: wishes to an assistant that have one right answer, so that right answers can be counted.

Which is larger, 12 or 31?    -> 31 is larger.
"""

import random
from collections.abc import Iterator

from support.formats import talk
from tasks.dialogue import DAYS
from tasks.grammar import Slots, fill, generated, number, pairs, pick, split_of
from tasks.stories import BOYS, GIRLS

OPPOSITES = pairs(
    "hot:cold big:small day:night wet:dry fast:slow old:new open:closed up:down light:dark full:empty"
)
SOUNDS = pairs(
    "dog:woof cat:meow cow:moo duck:quack sheep:baa owl:hoot lion:roar bee:buzz pig:oink frog:ribbit"
)
WORDS = """apple baker boat bread bridge candle castle cloud clock corn crow desk door drum egg farm fish
fire fox frost gate garden glass goat hat hill honey horse island jar jam king kite lake lamp leaf lemon moon
nest nut oak orange paper pear pond queen rain river road rope sand sea seed ship shoe silver snow star sun
swan table tent tree wheel window wood""".split()
COMMON = ("opposite", "sound", "after", "greet")  # facts to know by heart, which all splits share
WISHES = {  # question and answer; {x} and {y} are drawn, {z} follows from them
    "opposite": ("What is the opposite of {x}?|Tell me the opposite of {x}.", "The opposite of {x} is {z}."),
    "sound": ("What does {a_x} say?|Which sound does {a_x} make?", "{A_x} says {z}."),
    "repeat": ("(Say|Write|Repeat) the word {x} {y} times.", "{z}"),
    "capitals": ("(Write|Put) {x} in capital letters.|Shout: {x}!", "{z}"),
    "spell": ("Spell the word {x}.|How is {x} spelt?", "{z}"),
    "backwards": ("(Write|Say) these words backwards: {x}.", "{z}"),
    "count": ("Count from {x} to {y}.", "{z}"),
    "larger": ("Which is larger, {x} or {y}?|(Name|Tell me) the larger of {x} and {y}.", "{z} is larger."),
    "sum": ("What is {x} plus {y}?|Add {x} and {y}.", "<<{x}+{y}={z}>>{z}"),
    "after": ("Which day comes after {x}?|What day is it the day after {x}?", "{z} comes after {x}."),
    "greet": ("Say hello to {x}.|Greet {x}.", "Hello, {x}!"),
    "first": ("What is the first letter of {x}?|Which letter does {x} begin with?", "{X} begins with {z}."),
}


def values(rng: random.Random, kind: str) -> tuple:
    """{x}, {y} and {z} of a wish; "" for one that it does not have."""
    y = z = ""
    match kind:
        case "larger" | "sum":
            x = number(rng, 2, 60)
            y = number(rng, 2, 39)
            z = x + y if kind == "sum" else max(x, y)
        case "count":
            x = number(rng, 1, 20)
            y = x + number(rng, 2, 7)
            z = " ".join(map(str, range(x, y + 1)))
        case "opposite":
            x, z = pick(rng, OPPOSITES)
        case "sound":
            x, z = pick(rng, SOUNDS)
        case "after":
            day = number(rng, 0, 6)
            x = DAYS[day]
            z = DAYS[(day + 1) % 7]
        case "greet":
            x = pick(rng, GIRLS + BOYS)
        case "backwards":
            words = [pick(rng, WORDS) for _ in range(number(rng, 2, 4))]
            x = " ".join(words)
            z = " ".join(reversed(words))
        case "repeat":
            x = pick(rng, WORDS)
            y = number(rng, 2, 4)
            z = " ".join([x] * y)
        case _:
            x = pick(rng, WORDS)
            z = {"capitals": x.upper(), "first": x[0], "spell": " ".join(x)}[kind]
    return x, y, z


def instructions(split: str, n: int = 0) -> Iterator[dict]:
    """Conversations, {"messages"}, of one to three turns, a third of them with a system prompt.

    The values of a wish, not its wording, decide the split: a word that a test wants spelt is spelt
    nowhere in training.
    """

    def wish(rng: random.Random, kind: str) -> list[dict]:
        while True:
            x, y, z = values(rng, kind)
            if x != y and (kind in COMMON or split_of(f"{x} {y} {kind}") == split):
                question, answer = WISHES[kind]
                slots = Slots(x=x, y=y, z=z)
                return talk(fill(rng, question, slots), fill(rng, answer, slots))

    def make(rng: random.Random) -> tuple[dict, None]:
        n_turns = pick(rng, (1, 1, 1, 2, 3))
        kinds = [pick(rng, list(WISHES)) for _ in range(n_turns)]
        messages = []
        for kind in kinds:
            messages += wish(rng, kind)
        if rng.random() < 0.3:
            role = fill(rng, "You are a (kind|helpful) (robot|teacher).", {})
            messages.insert(0, {"role": "system", "content": role})
        return {"messages": messages}, None

    return generated("instructions", make, split, n)
