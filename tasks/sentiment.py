"""sentiment: reviews of one sentence, good or bad; a small stand-in for SST-2 that needs no network.

Although the cast is dull, we found the film gripping, even fresh.    -> good
"""

import random
import re
from collections.abc import Iterator

from tasks.grammar import Slots, fill, generated, number, pick

GOOD = "warm funny clever charming touching gripping graceful lively bright fresh moving tender".split()
BAD = "dull clumsy slow shallow noisy stale tiresome pointless cold flat messy lifeless".split()
WORKS = "film story play book song show".split()
ASPECTS = "music:is ending:is cast:is plot:is camera:is jokes:are songs:are pictures:are words:are".split()
# {g} and {h} have the label's polarity, {b} the other one: not the words decide, but the sentence.
REVIEWS = (
    "{A_g} {work} whose {aspect} {is} {h}.|{A_g}, {h} {work}.",
    "The {work} is {g}(, and so {is} the {aspect}|).|(From start to end|All in all) {a_g} {work}.",
    "The {aspect} {is} {g} and the {aspect2} {is2} {h}.",
    "The {work} is not {b} (at all|for a minute).|Nobody could call this {work} {b}.|It is anything but {b}.",
    "The {aspect} {is} {b}, but the {work} (itself|as a whole) is {g}.|{B} {aspect}, yet {a_g} {work}.",
    "Although the {aspect} {is} {b}, (I|we) found the {work} {g}(, even {h}|).",
    "(I|We) expected {a_b} {work} and got {a_g} one.",
    "{A_g} {work}, (whatever they say about|for all) its {b} {aspect}.",
)


def sentiment(split: str, n: int = 0) -> Iterator[dict]:
    """Reviews of one sentence, {"sentence", "label"} (1: positive). Half of them need more than their words.

    The words that were drawn decide the split: a test review is never a training review turned around.
    """

    def make(rng: random.Random) -> tuple[dict, str]:
        while True:
            label = number(rng, 0, 1)
            own, other = (GOOD, BAD) if label else (BAD, GOOD)
            (aspect, is_), (aspect2, is2) = (pick(rng, ASPECTS).split(":") for _ in range(2))
            slots = Slots(g=pick(rng, own), h=pick(rng, own), b=pick(rng, other), work=pick(rng, WORKS))
            slots |= {"aspect": aspect, "is": is_, "aspect2": aspect2, "is2": is2}
            if slots["g"] != slots["h"] and aspect != aspect2:
                break
        sentence = fill(rng, pick(rng, REVIEWS), slots)
        drawn = set(re.findall("[a-z]+", sentence.lower())).intersection(slots.values()) - {"is", "are"}
        return {"sentence": sentence, "label": label}, " ".join(sorted(drawn))

    return generated("sentiment", make, split, n)
