"""dialogue: chats of two people and their summaries; a small stand-in for SAMSum that needs no network.

Nora: Have you seen my kite?          -> Nora has lost her kite. Max saw it behind the shed.
Max: Yes, it is behind the shed.
"""

import random
from collections.abc import Iterator

from tasks.grammar import Slots, fill, generated, number, pick
from tasks.stories import BOYS, ELDERS, GIRLS

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
DUTIES = (
    "visit {elder}|look after my brother|go to the dentist|practise for a concert|finish a report"
).split("|")
CHATS = (  # (turns, a line each, of the speakers {A} and {B}; their summary)
    (
        "{A}: (Are you coming|Shall we go) to {place} on {day}?\n"
        "{B}: (Yes|Sure|Gladly)(!|, at {time2}?) (How about {time}?|Let us say {time}.)\n"
        "{A}: {Time} it is.\n"
        "{B}: I will bring (the|my) {thing}.",
        "{A} and {B} are going to {place} on {day} at {time}. {B} will bring the {thing}.",
    ),
    (
        "{A}: (Can|Could) you help me {chore} on {day}?\n"
        "{B}: (Sorry|I am sorry), I have to {duty}.\n"
        "{A}: (Never mind|No problem), I will ask {elder2}.",
        "{B} cannot help {A} {chore} on {day}. {A} will ask {elder2}.",
    ),
    (
        "{A}: Have you seen my {thing}(| anywhere)?\n"
        "{B}: (Yes, it is|I saw it|There is one) {spot}.\n"
        "{A}: (Thank you|Oh, thanks)! I looked everywhere.",
        "{A} has lost {a_his} {thing}. {B} saw it {spot}.",
    ),
    (
        "{A}: (May|Can) I borrow your {thing}?\n"
        "{B}: (Yes|Of course), but I need it (back |)on {day}.\n"
        "{A}: You will have it (then|by {time}), I promise.",
        "{B} lends {A} {b_his} {thing} until {day}.",
    ),
)
SMALL_TALK = (
    "Lovely weather today.|I am so tired.|How is {elder3}?|I had soup for lunch.|My {thing2} is broken again."
)


DRAWN = {  # slots that are filled alike, in this order
    "day": "|".join(DAYS),
    "place": "the lake|the market|the old mill|the library|the beach|the bridge|the school",
    "thing thing2": "ladder|tent|drum|kite|lamp|bike|camera|umbrella|sled|hammer|basket|guitar",
    "elder elder2 elder3": "|".join(ELDERS),
    "time time2": "nine|ten|noon|two|three|four|five|six",
    "chore": "paint the fence|clean the shed|carry the boxes|bake a cake|fix the roof|dig the garden",
    "spot": "under the bench|behind the shed|on the bus|in the hall|next to the stove|at the bakery",
}


def dialogue(split: str, n: int = 0) -> Iterator[dict]:
    """Chats of two with a line of small talk or two, {"dialogue", "summary"}; the facts decide the split."""

    def make(rng: random.Random) -> tuple[dict, str]:
        girl = (pick(rng, GIRLS), "her")
        boy = (pick(rng, BOYS), "his")
        (a, a_his), (b, b_his) = pick(rng, ((girl, boy), (boy, girl)))
        slots = Slots(a=a, b=b, a_his=a_his, b_his=b_his)
        for names, options in DRAWN.items():
            for name in names.split():
                slots[name] = fill(rng, options, slots)
        slots["duty"] = fill(rng, pick(rng, DUTIES), slots)
        chat, summary = pick(rng, CHATS)
        turns = fill(rng, chat, slots).split("\n")
        for _ in range(number(rng, 0, 2)):
            speaker, place = pick(rng, (a, b)), number(rng, 0, len(turns) - 1)
            turns.insert(place, f"{speaker}: {fill(rng, SMALL_TALK, slots)}")
        summary = fill(rng, summary, slots)
        return {"dialogue": "\n".join(turns), "summary": summary}, summary

    return generated("dialogue", make, split, n)
