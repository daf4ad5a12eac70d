"""Where sentences end."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Mark", "closed", "marks"]

# A point is part of a word, if its line goes on, behind a letter by itself, a number that may count ("1. Paris",
# "3. Oktober"; a year ends a sentence), and what stands before a name; so is that of "No. 5".
_TITLES = "St|Dr|Mr|Mrs|Ms|Prof|Rev|Gen|Col|Capt|Lt|Mt|Ft|Jr|Sr"
_PART = rf"\b(?:\w|\d\d|{_TITLES})\.(?=[^\S\n]+\S)|\bNo\.(?=[^\S\n]+\d)"

# A space behind it tells the end of a sentence from "3.5". The marks of Chinese, Japanese, Hindi, Urdu, Arabic,
# Armenian, Ethiopic, Khmer and Burmese need none.
_CLOSING = "[\"'\u201d\u2019\u00bb)\\]]*"
_SPACED = rf"[.!?\u2026]{_CLOSING}(?=\s|$)"
_ALONE = "[\u3002\uff01\uff1f\uff61\u0964\u0965\u06d4\u061f\u0589\u1362\u17d4\u104b]"

# What ends a sentence of a script, by the first word of its letters' names in Unicode; of others a point does.
_FULL_STOPS = {**dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA"), "\u3002"), "DEVANAGARI": "\u0964"}

_MARK = re.compile(rf"(?P<part>{_PART})|{_SPACED}|{_ALONE}", re.IGNORECASE)


class Mark(NamedTuple):
    """A mark that may end a sentence.

    Attributes:
        start: its place in the text.
        end: the place behind it, and behind the quotes and brackets that it closes.
        ends: whether it does end a sentence, as far as can be told; if not, it belongs to a word ("J.", "St.").
    """

    start: int
    end: int
    ends: bool


def marks(text: str) -> Iterator[Mark]:
    """The marks of ``text`` that may end a sentence, in order."""
    for found in _MARK.finditer(text):
        part = found["part"] is not None
        yield Mark(found.end() - 1 if part else found.start(), found.end(), not part)


def closed(text: str) -> str:
    """A text as a sentence: with the full stop of its last letter's script, if no mark ends it."""
    if any(mark.end == len(text) for mark in marks(text)):
        return text
    letter = next((character for character in reversed(text) if character.isalpha()), ".")
    script = unicodedata.name(letter, "").partition(" ")[0]
    return text + _FULL_STOPS.get(script, ".")
