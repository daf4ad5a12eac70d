"""When a generated text counts as an answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

from baft.sentences import marks

__all__ = ["answer_part", "matches", "normalise"]

# Hyphens, dashes and the minus sign are one mark; Unicode counts two apostrophes of Pacific languages as letters.
_ALIKE = str.maketrans({**dict.fromkeys("\u2010\u2012\u2013\u2014\u2015\u2212", "-"), "\u02bb": None, "\u02bc": None})

# A mark in a number tells it from another ("3.5" from "35"), but for the comma of thousands, and so does the sharp in a
# name ("C#"). Of all other marks the group tells: what Unicode has for punctuation, accents by themselves (as
# quotes), and what isn't seen.
_MARK = re.compile(r"(?<=\d)[.:/-](?=\d)|(?<=\w)#|([^\w\s]|_)")
_DROPPED = ("P", "Sk", "Cf")

# What is the last word is no article ("Vitamin A").
_ARTICLES = re.compile(r"(?<!\S)(?:a|an|the)\s+(?=\S)")


def normalise(text: str) -> str:
    """Compatibility form, case folded, without punctuation, articles and extra space: SQuAD's rule, for any script.

    What tells one answer from another stays: symbols ("C++"), and points and hyphens inside numbers.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().translate(_ALIKE)
    return _ARTICLES.sub("", " ".join(_MARK.sub(_without_punctuation, folded).split()))


def _without_punctuation(mark: re.Match[str]) -> str:
    dropped = mark[1] is not None and unicodedata.category(mark[1]).startswith(_DROPPED)
    return "" if dropped else mark[0]


def answer_part(text: str) -> str:
    """The text up to the first line end or sentence end, which is where a model's answer stops."""
    text = text.lstrip()
    return text[: _first_end(_stops(text))]


def matches(text: str, answers: Collection[str]) -> bool:
    """Whether ``text`` answers with one of ``answers``: exactly, after normalising, and nothing more before a stop.

    Any stop will do before the first sentence ends, as an answer may be an initial or a number. An answer that holds a
    stop itself ("Yahoo! News", "U.S.") is compared with as many sentences of the text.
    """
    text = text.lstrip()
    stops = _stops(text)
    first = _first_end(stops)
    wanted = {normalise(answer) for answer in answers} - {""}
    longer = {normalise(answer) for answer in answers if len(_stops(answer)) > 1} - {""}
    return any(normalise(text[:place]) in (wanted if place <= first else longer) for place, _ in stops)


def _stops(text: str) -> list[tuple[int, bool]]:
    """Where an answer may stop, and whether it does if it gets so far: marks, line ends, and the end of the text."""
    found = [(mark.start, mark.ends) for mark in marks(text)]
    lines = [(place, True) for place, character in enumerate(text) if character == "\n"]
    return sorted([*found, *lines, (len(text), True)])


def _first_end(stops: Iterable[tuple[int, bool]]) -> int:
    return next(place for place, ends in stops if ends)
