"""Where sentences end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Mark", "closed", "marks"]

# A point is part of a word, if its line goes on, behind a letter by itself, a number that may count ("1. Paris",
# "3. Oktober"; a year ends a sentence), and what stands before a name; so is that of "No. 5".
_TITLES = "St|Dr|Mr|Mrs|Ms|Prof|Rev|Gen|Col|Capt|Lt|Mt|Ft|Jr|Sr"
_PART = rf"\b(?:\w|\d\d|{_TITLES})\.(?=[^\S\n]+\S)|\bNo\.(?=[^\S\n]+\d)"

# A space behind it tells the end of a sentence from "3.5". The marks of Chinese, Japanese, Hindi, Urdu, Arabic,
# Armenian, Ethiopic, Khmer and Burmese need none.
_CLOSING = "[\"'\u201d\u2019\u00bb)\\]\u300d\u300f\uff09\u3011\u300b]*"
_SPACED = rf"[.!?\u2026]{_CLOSING}(?=\s|$)"
_ALONE = f"[\u3002\uff01\uff1f\uff61\u0964\u0965\u06d4\u061f\u0589\u1362\u17d4\u104b]{_CLOSING}"

_MARK = re.compile(rf"(?P<part>{_PART})|{_SPACED}|{_ALONE}", re.IGNORECASE)

# What ends a sentence in letters that a point doesn't go with: Chinese and Japanese, four scripts of India, Armenian,
# Ethiopic, Khmer, Burmese; in Thai and Lao a space does. Arabic letters are taken for Arabic, and not for Urdu.
_FULL_STOPS = {
    "\u3002": "[\u3005-\u3007\u3031-\u312f\u31a0-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]",
    "\u0964": "[\u0900-\u0a7f\u0b00-\u0b7f]",
    "\u0589": "[\u0530-\u058f]",
    "\u1362": "[\u1200-\u137f]",
    "\u17d4": "[\u1780-\u17ff]",
    "\u104b": "[\u1000-\u109f]",
    " ": "[\u0e00-\u0eff]",
}


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


def closed(text: str, like: str | None = None) -> str:
    """A text as a sentence: with a full stop, if no mark ends it.

    Args:
        text: what it says.
        like: a text in whose script it is, by its last letter; None is the text itself.
    """
    if any(mark.end == len(text) for mark in marks(text)):
        return text
    letter = next((character for character in reversed(text if like is None else like) if character.isalpha()), "")
    return text + next((stop for stop, letters in _FULL_STOPS.items() if re.match(letters, letter)), ".")
