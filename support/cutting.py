"""Cuts long texts where that changes no token, so that they need not be in memory or be encoded as a whole.

With the two patterns of tokenizer.py, no word has whitespace behind a non-space, and only the last of several
whitespace characters can belong to the next word. So before every whitespace character that a non-space
follows there is a *seam*: a border of words at which a text may be cut and each part be encoded alone.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cache

SLAB = 1 << 16  # characters; with so many in one call, tiktoken's core is at its fastest
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # as Unicode; Python's \s has more
SEAM = f"[{SPACE}][^{SPACE}]"
SPACED_WORDS = re.compile(f"[{SPACE}]*[^{SPACE}]+|[{SPACE}]+")
UP_TO_LAST_SEAM = re.compile(f"(?s).+(?={SEAM})")
ENDS = rf"(?={SEAM}|\Z)"
SLABS = re.compile(rf"(?s).{{1,{SLAB}}}{ENDS}|.+?{ENDS}")  # longer if no seam is near


@cache
def special_regex(special_tokens: tuple[str, ...]) -> re.Pattern:
    """Splits text at special tokens, and keeps them. Where two begin at one place, the longer wins."""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    one_of_them = "|".join(map(re.escape, longest_first))
    return re.compile(f"({one_of_them or '(?!)'})")


def at_seams(texts: Iterable[str], special_tokens: tuple[str, ...]) -> Iterator[str]:
    """The joined `texts` in other pieces, which end at seams.

    Holds some 16 thousand characters; more only if there are more from one space to the next.
    """
    rest = ""
    enough = SLAB // 4
    for text in texts:
        rest += text
        if len(rest) >= enough:
            cut = last_seam(rest, special_tokens)
            yield rest[:cut]
            rest = rest[cut:]
            enough = max(SLAB // 4, 2 * len(rest))  # twice: looking for a seam in vain stays linear
    yield rest


def last_seam(text: str, special_tokens: tuple[str, ...]) -> int:
    """The last place where `text` may be cut whatever follows it; 0 if there is none yet."""
    longest = max(map(len, special_tokens), default=0)
    end = len(text) - longest + 1
    found = UP_TO_LAST_SEAM.match(text, 0, end)
    cut = found.end() if found else 0
    # Not within a special token; nor in the whitespace before one, which ends a text and stays in one piece
    for token in special_regex(special_tokens).finditer(text):
        if token.start() - 1 <= cut < token.end():
            return token.start()
    return cut
