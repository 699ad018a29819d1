"""lists: random people, pronouns and things of the stories, told four times in lines or columns.

Mama red ball her Otto    -> Mama red ball her Otto

A model that copies Mama from a list can copy her within a story, too. Without lists it cannot, as often as
stories repeat her: Mama and Papa occur in the same places and get nearly the same embedding, so attention
that finds one hardly sees which it is (report/alignment.md). Half of the tellings are columns, since a word
at the start of a line is another token.
"""

import random
from collections.abc import Iterator

from tasks.grammar import SEED, pick
from tasks.stories import BOYS, ELDERS, GIRLS, PRONOUNS, short_draws

GENDERED = ["girl", "boy", *PRONOUNS["she"], *PRONOUNS["he"]]
KINDS = [[*GIRLS, *BOYS], list(ELDERS), GENDERED, short_draws()]  # each as often in a list


def lists_text(split: str) -> Iterator[str]:
    """Lists of eight, forever."""
    rng = random.Random(f"lists {split} {SEED}")
    while True:
        words = [pick(rng, pick(rng, KINDS)) for _ in range(8)]
        yield "\n".join(pick(rng, (" ", "\n")).join(words) for _ in range(4))
