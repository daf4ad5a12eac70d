"""What stands between texts, as their scripts have it."""

from __future__ import annotations

import re
import unicodedata
from functools import reduce

__all__ = ["is_unspaced", "joined", "separator"]

# Scripts without spaces between words, with their punctuation: Thai, Lao, Tibetan and Burmese, Khmer, Chinese and
# Japanese. Korean, which has spaces, lies between them.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u312f\u3190-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f\U00020000-\U0003ffff]"
)


def is_unspaced(character: str) -> bool:
    """Whether a character is of a script that is written without spaces; false for none."""
    return _UNSPACED.match(character) is not None


def joined(*texts: str) -> str:
    """Texts one behind the other, with what belongs between them."""
    return reduce(lambda before, after: before + separator(before, after) + after, texts)


def separator(before: str, after: str) -> str:
    """What belongs between a text and what goes on with it: a space, or nothing.

    Nothing where white space is already, behind an opening bracket or quote and a word's hyphen, and within a script
    that is written without spaces; what is no letter there, such as a number, follows the script before it.
    """
    last, first = before[-1:], after[:1]
    if last.isspace() or first.isspace() or _opens(before):
        return ""
    return "" if is_unspaced(last) and (is_unspaced(first) or not first.isalpha()) else " "


def _opens(text: str) -> bool:
    """Whether ``text`` ends with what stands right before a word: a straight quote opens where no word precedes it."""
    before, last = text[:-1], text[-1:]
    if last in ("-", "\u2010", "\u2011"):
        return before[-1:].isalnum()
    if last in ('"', "'"):
        return not before or before[-1:].isspace() or _opens(before)
    return bool(last) and unicodedata.category(last) in ("Ps", "Pi")
