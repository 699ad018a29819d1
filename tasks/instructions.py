"""instructions: what an assistant is asked to do, with the one right answer, so that it can be counted.

Which is larger, 12 or 31?    -> 31 is larger.
"""

import json
import random
from collections.abc import Iterator
from itertools import islice

from support.formats import talk
from tasks.dialogue import DAYS
from tasks.grammar import SEED, Slots, fill, number, parse, pick, split_of
from tasks.stories import BOYS, GIRLS

OPPOSITES = "hot:cold big:small day:night wet:dry fast:slow old:new open:closed up:down light:dark full:empty"
OPPOSITES = dict(pair.split(":") for pair in OPPOSITES.split())
SOUNDS = "dog:woof cat:meow cow:moo duck:quack sheep:baa owl:hoot lion:roar bee:buzz pig:oink frog:ribbit"
SOUNDS = dict(pair.split(":") for pair in SOUNDS.split())
WORDS = """apple baker boat bread bridge candle castle cloud clock corn crow desk door drum egg farm fish
fire fox frost gate garden glass goat hat hill honey horse island jar jam king kite lake lamp leaf lemon moon
nest nut oak orange paper pear pond queen rain river road rope sand sea seed ship shoe silver snow star sun
swan table tent tree wheel window wood""".split()
WISHES = {  # what is asked, and what is said; {x} and {y} are drawn, {z} follows from them
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
}  # fmt: skip


def instructions(split: str, n: int | None = None, seed: int = SEED) -> Iterator[dict]:
    """Conversations, {"messages"}, of one to three turns, a third of them with somebody to speak as.

    What is asked, not how, decides the split: a word that a test wants spelt is spelt nowhere in training.
    """

    def wish(rng: random.Random, kind: str) -> list[dict]:
        y = ""
        if kind in ("larger", "sum"):
            x, y = number(rng, 2, 60), number(rng, 2, 39)
            if x == y:
                return wish(rng, kind)
            z = x + y if kind == "sum" else max(x, y)
        elif kind == "count":
            x, y = (start := number(rng, 1, 20)), start + number(rng, 2, 7)
            z = " ".join(map(str, range(x, y + 1)))
        elif kind in ("opposite", "sound"):
            x, z = pick(rng, list((OPPOSITES if kind == "opposite" else SOUNDS).items()))
        elif kind == "after":
            day = int(rng.random() * 7)
            x, z = DAYS[day], DAYS[(day + 1) % 7]
        elif kind == "greet":
            x = z = pick(rng, GIRLS + BOYS)
        elif kind == "backwards":
            words = [pick(rng, WORDS) for _ in range(number(rng, 2, 4))]
            x, z = " ".join(words), " ".join(words[::-1])
        else:
            x, y = pick(rng, WORDS), number(rng, 2, 4) if kind == "repeat" else ""
            z = {"repeat": " ".join([x] * (y or 1)), "capitals": x.upper(), "first": x[0]}.get(
                kind, " ".join(x)
            )
        # There is nothing to generalise from about what a dog says; everything else has its split.
        if kind not in ("opposite", "sound", "after", "greet") and split_of(f"{x} {y} {kind}") != split:
            return wish(rng, kind)
        slots, (asked, said) = Slots(x=str(x), y=str(y), z=str(z)), WISHES[kind]
        return talk(*(fill(rng, parse(text), slots) for text in (asked, said)))

    def rows() -> Iterator[dict]:
        rng, seen = random.Random(f"instructions {split} {seed}"), set()
        while True:
            kinds = [pick(rng, list(WISHES)) for _ in range(pick(rng, (1, 1, 1, 2, 3)))]
            messages = [message for kind in kinds for message in wish(rng, kind)]
            if rng.random() < 0.3:
                role = fill(rng, parse("You are a (kind|helpful) (robot|teacher)."), {})
                messages.insert(0, {"role": "system", "content": role})
            if (text := json.dumps(messages)) not in seen:
                seen.add(text)
                yield {"messages": messages}

    return islice(rows(), n)
