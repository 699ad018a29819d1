"""A small grammar with which the embedded tasks write: choices and slots, and a split for all that is drawn.

    fill(random.Random(1), "{A_thing} is (here|there).", Slots(thing="apple"))  # An apple is there.

The generators give the same text on every machine and in every Python.
"""

import random
import re
import zlib
from collections.abc import Callable, Iterator
from functools import cache

SPLITS = ("train", "validation", "test")
SEED = 1  # of all generators: another seed is another corpus


def pairs(text: str) -> list[list[str]]:
    """ "hot:cold big:small" → [["hot", "cold"], ["big", "small"]]"""
    return [pair.split(":") for pair in text.split()]


def pick(rng: random.Random, options):
    """One of `options`. Of all of `random`, only random() is promised to stay the same in every Python."""
    return options[int(rng.random() * len(options))]


@cache
def parse(template: str) -> list:
    """`a (b|c) {d}` → its alternatives, each a list of str, (slot, capital?) or, again, alternatives."""
    stack = [[[]]]
    for token in re.findall(r"[(|)]|\{\w+\}|[^(|){]+", template):
        if token == "(":
            stack.append([[]])
        elif token == "|":
            stack[-1].append([])
        elif token == ")":
            alternatives = stack.pop()
            stack[-1][-1].append(alternatives)
        elif token[0] == "{":
            stack[-1][-1].append((token[1:-1].lower(), token[1].isupper()))
        else:
            stack[-1][-1].append(token)
    return stack[0]


def fill(rng: random.Random, text: str | list, slots: dict) -> str:
    """A template, as text or parsed, with its choices made and its slots filled. {He} is {he} with a
    capital.
    """
    out = ""
    for part in pick(rng, parse(text) if isinstance(text, str) else text):
        if isinstance(part, str):
            out += part
        elif isinstance(part, list):
            out += fill(rng, part, slots)
        else:
            name, capital = part
            value = str(slots[name])
            out += value[:1].upper() + value[1:] if capital else value
    return out


class Slots(dict):
    def __missing__(self, name: str) -> str:  # {a_cup} is {cup} with its article
        noun = self[name.removeprefix("a_")]
        return ("an " if noun[0] in "aeiou" else "a ") + noun


def split_of(signature: str) -> str:
    """The split where everything with this signature lives: 90 % train, 5 % validation, 5 % test."""
    bucket = zlib.crc32(signature.encode()) % 20
    return "validation" if bucket == 0 else "test" if bucket == 1 else "train"


def number(rng: random.Random, low: int, high: int) -> int:
    return low + int(rng.random() * (high - low + 1))


def generated(name: str, make: Callable, split: str, n: int) -> Iterator[dict]:
    """The first `n` different rows of one split that come from `make(rng)`, a (row, signature); for n = 0
    forever. Rows are the same if their first column is. Signature None: `make` itself keeps the splits apart.
    """
    rng = random.Random(f"{name} {split} {SEED}")
    seen = set()
    while not n or len(seen) < n:
        row, signature = make(rng)
        first, *_ = row.values()
        key = str(first)
        if key not in seen and (signature is None or split_of(signature) == split):
            seen.add(key)
            yield row
