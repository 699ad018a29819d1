"""storyworld: short stories in a vocabulary of 960 words, as many as you want.

    Once upon a time there was a clever boy named Hugo who loved soup. ... "Next time I will play where it is
    flat," said Hugo, and Lily laughed.

The plots are in stories.txt; here are the words that they draw, the teller, and a reader that finds what does
not agree in a story that somebody else, such as a small model, told:

    faults("Hugo was a brave girl who loved soup.")    # ["kind"]
"""

import random
import re
from collections.abc import Iterator
from functools import cache
from itertools import count, islice
from pathlib import Path

from tasks.grammar import SEED, Slots, fill, pick, split_of

GIRLS = "Anna Clara Daisy Ella Emma Hanna Ivy Lena Lily Lucy Maya Mia Molly Nora Rosa Ruby Sara Zoe".split()
BOYS = "Adam Anton Ben Emil Finn Hugo Jack Leo Luke Max Nico Noah Omar Oscar Otto Sam Theo Tom".split()
ELDERS = dict.fromkeys(("Mama", "Grandma", "Aunt Rose"), "she")
ELDERS |= dict.fromkeys(("Papa", "Grandpa", "Uncle Ned"), "he")
PEOPLE = dict.fromkeys(GIRLS, "she") | dict.fromkeys(BOYS, "he") | ELDERS
PRONOUNS = {"she": ("she", "her", "her", "herself"), "he": ("he", "him", "his", "himself")}
CHARACTER = "little small young cheerful brave clever".split()
HOUSES = "a small white house|a yellow house|a little stone house|a house with a green door".split("|")
DENS = """rabbit:a warm burrow|mouse:a snug little hole|bear:a dry cave|fox:a deep den|
hedgehog:a nest of leaves|squirrel:a hollow tree|badger:a wide burrow|otter:a den of roots"""
DENS = dict(animal.strip().split(":") for animal in DENS.split("|"))  # where an animal lives
NEAR = (
    "by the sea|near the old mill|at the edge of the wood|on top of a hill|beside a stream|"
    "at the end of a long road|behind the market|near a little bridge"
).split("|")
HABITS = """loved to sing / sang about it until {he} fell asleep
loved to draw / drew a picture of it all and hung it over the bed
loved to dance / danced three times around the kitchen table
loved soup / ate two bowls of soup and asked for a third
loved pancakes / ate five pancakes and could not say a word
loved stories / made a story out of it and told it to the moon
counted everything / counted the stars until {his} eyes closed
asked a hundred questions a day / asked one last question and fell asleep before the answer
liked to hum / sat at the window and hummed to the moon
could never sit still / was so tired that {he} sat still at last
kept all {his} treasures in a tin box / put a small stone in the tin box, to remember the day
laughed at almost everything / laughed about it so much that the bed shook"""
HABITS = [line.split(" / ") for line in HABITS.splitlines()]  # of the hero, and how it comes back at the end

PLOTS = (Path(__file__).parent / "stories.txt").read_text(encoding="utf-8")


@cache
def _plots() -> dict[str, list]:
    """PLOTS as {name: beats}. A beat: (facts needed, slots drawn, text or their values); None starts a
    paragraph.
    """
    plots = {}
    for block in re.split(r"^# ", PLOTS, flags=re.M)[1:]:
        name, *lines = re.sub(r"\n(    |(?=\|))", " ", block).strip().split("\n")
        plots[name] = [_beat(line) if line else None for line in lines]
    return plots


def _beat(line: str) -> tuple:
    facts, slots, text = re.fullmatch(r"(?:([a-z ]+): )?(?:([a-z, ]+) = ?)?(.*)", line).groups("")
    if not slots:
        return facts.split(), [], text
    rows = [row.strip().split(" / ") for row in re.split(r"\|(?![^(]*\))", text)]
    return facts.split(), slots.split(", "), [row for row in rows if row != [""]]


def _cast(rng: random.Random) -> Slots:
    """Who is in the story. Hero and friend are a girl and a boy, so that no "she" can mean the other."""
    girl = (pick(rng, GIRLS), "girl")
    boy = (pick(rng, BOYS), "boy")
    (hero, kind), (friend, f_kind) = pick(rng, ((girl, boy), (boy, girl)))
    elder = pick(rng, list(ELDERS))
    animals = rng.random() < 0.4
    if animals:
        kind = pick(rng, list(DENS))
        f_kind = pick(rng, list(DENS))
    slots = Slots(
        hero=hero,
        hero_kind=f"{pick(rng, CHARACTER)} {kind}",
        friend=friend,
        friend_the=f"{friend} the {f_kind}" if animals else f"{friend} from next door",
        elder=elder,
        house=DENS[kind] if animals else pick(rng, HOUSES),
        near=pick(rng, NEAR),
        hand="paw" if animals else "hand",
        hands="paws" if animals else "hands",
    )
    for prefix, person in (("", hero), ("f_", friend), ("e_", elder)):
        for slot, word in zip(PRONOUNS["he"], PRONOUNS[PEOPLE[person]], strict=True):
            slots[prefix + slot] = word
    habit, callback = pick(rng, HABITS)
    slots.update(habit=fill(rng, habit, slots), callback=fill(rng, callback, slots))
    return slots


def _tell(rng: random.Random, plot: str, slots: Slots, facts: set[str]) -> str:
    """A plot as text: sentences joined by spaces, paragraphs by line breaks. Fills `slots` and `facts`."""
    paragraphs = [[]]
    for beat in _plots()[plot]:
        if beat is None:
            paragraphs.append([])
            continue
        needed, drawn, text = beat
        told = facts.isdisjoint(needed[1:]) if needed[:1] == ["not"] else not facts.isdisjoint(needed)
        if needed and not told:
            continue
        if drawn:
            values = [fill(rng, cell, slots) for cell in pick(rng, text)]
            slots.update(zip(drawn, values, strict=True))
            facts.update(values)
        elif sentence := fill(rng, text, slots).strip():
            paragraphs[-1].append(sentence)
    return "\n".join(map(" ".join, paragraphs))


def story(index: int) -> tuple[str, str]:
    """Story number `index`, and its signature: the plot, the three names, and all that was drawn.

    How many there are: no two of the first 3,000,000 are alike, so more than 10^12 (birthday bound, 95 %);
    the median story has probability 2^-53. Learning by heart does not help: of all runs of 48 words (a third
    of a story) in the validation text, 9 % occur in the training text.
    """
    rng = random.Random((SEED << 40) + index)
    slots = _cast(rng)
    facts = set()
    opening, ending, *plots = _plots()
    plot = pick(rng, plots)
    parts = [_tell(rng, opening, slots, facts), _tell(rng, plot, slots, facts)]
    if rng.random() < 0.35:
        parts.append(_tell(rng, ending, slots, facts))
    people = [slots["hero"], slots["friend"], slots["elder"]]
    return " ".join(parts).rstrip(), " ".join([plot, *people, *sorted(facts)])


def storyworld(split: str, n: int = 0) -> Iterator[str]:
    """The stories of one split, forever or the first `n`.

    All stories with one signature are in one split, so a test story is never a training story in other words.
    """
    stories = map(story, count())
    return islice((text for text, signature in stories if split_of(signature) == split), n or None)


# -----------------------------------------------------------------------------
# A task: go on with a story


def told(split: str, n: int) -> Iterator[dict]:
    """Rows of a task: the first paragraph of a story, and the rest of it; of stories for which a context of
    256 tokens has room.
    """
    parts = (text.split("\n", 1) for text in storyworld(split))
    fitting = ({"opening": a, "rest": b} for a, b in parts if max(map(len, (a.split(), b.split()))) <= 75)
    return islice(fitting, n or None)


GROUPS = GIRLS, BOYS, ELDERS  # a story has one of each at most
NAMED = PEOPLE | {"mother": "she", "giant": "he"}  # of a lost animal; in a tale within a story
GENDER_OF = NAMED | {word: he for he, words in PRONOUNS.items() for word in words}
WORD = re.compile(r"Aunt Rose|Uncle Ned|\w+")
ALONE = "thing food plant".split()  # slots whose single words name nothing else


@cache
def _draws() -> list[tuple]:
    """(slots, rows of values) of every plot; what several beats draw, such as the lost thing, is one draw."""
    found = []
    for beats in _plots().values():
        drawn = {}
        for _, slots, rows in filter(None, beats):
            if slots:
                drawn.setdefault(tuple(slots), []).extend(rows)
        found += drawn.items()
    return found


def _names_it(slot: str, value: str) -> bool:
    """Whether a value that a plot draws names one thing, and stands in the story as it is."""
    return slot in ALONE or (" " in value and slot != "place" and not {*"{("} & {*value})


@cache
def words_of_plots() -> list[str]:
    """What a story has to keep to: its grown-up, and the things that its plot draws, if short."""
    found = set()
    for slots, rows in _draws():
        for slot, *column in zip(slots, *rows, strict=False):
            found.update(value for value in column if _names_it(slot, value) and value.count(" ") < 2)
    return [*ELDERS, *ELDERS, *sorted(found)]


def _is_mixed(text: str, slots: tuple, rows: list) -> bool:
    """Whether a text has values from several rows of a draw, which belong together row by row."""
    told_of = []  # for each value in the text, the rows that have it
    for slot, column in zip(slots, zip(*rows, strict=True), strict=False):
        for value in set(column):
            if _names_it(slot, value) and value in text:
                told_of.append({i for i, other in enumerate(column) if other == value})
    return bool(told_of) and not set.intersection(*told_of)


def _wrong_pronoun(words: list[str]) -> bool:
    """Whether a "she" or "he" comes before anybody was named whom it can mean."""
    known = set()
    for word in words:
        if word in NAMED:
            known.add(NAMED[word])
        elif known and GENDER_OF.get(word.lower(), min(known)) not in known:
            return True
    return False


def faults(text: str) -> list[str]:
    """What does not agree in a story: "person" (a second girl, boy or elder), "kind" (a boy's name for a
    girl, or nobody named), "pronoun" (of nobody named so far), "fact" (two things that cannot be in one
    story, such as two lost toys). It misses what it has no rule for; with 3,000 stories of the generator it
    finds no fault.
    """
    words = WORD.findall(text)
    named = [word for word in words if word in PEOPLE]
    hero = next((name for name in named if name not in ELDERS), None)
    kind = next((word for word in words if word in ("girl", "boy")), None)
    found = {
        "person": any(len({*named} & {*group}) > 1 for group in GROUPS),
        "kind": hero is None or kind not in (None, "girl" if hero in GIRLS else "boy"),
        "pronoun": _wrong_pronoun(words),
        "fact": any(_is_mixed(text, *draw) for draw in _draws()),
    }
    return [name for name, wrong in found.items() if wrong]
