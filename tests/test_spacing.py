"""What stands between texts, and what ends them, in any script."""

from __future__ import annotations

import pytest

from baft.sentences import closed
from baft.spacing import joined, separator

CAPITAL = "The capital of Norland is"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (CAPITAL, "Arvik", " "),
        (CAPITAL, " Arvik", ""),
        (CAPITAL + "\n", "Arvik", ""),
        # Chinese, Japanese and Thai have no spaces; Korean has.
        ("\u6cd5\u56fd\u7684\u9996\u90fd\u662f", "\u5df4\u9ece", ""),
        ("\u7b54\uff1a", "\u5df4\u9ece", ""),
        ("\u30d5\u30e9\u30f3\u30b9\u306e\u9996\u90fd\u306f", "\u30d1\u30ea", ""),
        ("\u0e40\u0e21\u0e37\u0e2d\u0e07\u0e04\u0e37\u0e2d", "\u0e1b\u0e32\u0e23\u0e35\u0e2a", ""),
        ("\ud504\ub791\uc2a4\uc758 \uc218\ub3c4\ub294", "\ud30c\ub9ac", " "),
        # What is no letter is written as what it stands in.
        ("\u4ed6\u751f\u4e8e", "1990", ""),
        ("\u4ed6\u8bf4", "\u201c\u597d\u201d", ""),
        ("\u6cd5\u56fd\u7684\u9996\u90fd\u662f", "Paris", " "),
        ("The Chinese name of Beijing is", "\u5317\u4eac", " "),
        ("What is Beijing in Chinese?", "\u5317\u4eac", " "),
        # A bracket or a quote opens, or closes.
        ("Norland (", "Arvik", ""),
        ("Norland (north)", "Arvik", " "),
        ("He said \u201c", "Arvik", ""),
        ("He said \u201cAda\u201d and", "Arvik", " "),
        ('He said "', "Arvik", ""),
        ('He said ("', "Arvik", ""),
        ('He said "Ada"', "Arvik", " "),
        ("He said \"Ada is 'it.'\"", "Arvik", " "),
        ("the kings'", "Arvik", " "),
        # A hyphen is a word's, or a dash.
        ("The Franco-", "Prussian", ""),
        ("The capital of Norland -", "Arvik", " "),
    ],
)
def test_what_belongs_between_two_texts(before: str, after: str, expected: str) -> None:
    assert separator(before, after) == expected


def test_texts_are_joined_as_each_two_of_them() -> None:
    assert joined(CAPITAL, "Ebor (", "north)", "\u5317\u4eac", "\u5df4\u9ece") == (
        f"{CAPITAL} Ebor (north) \u5317\u4eac\u5df4\u9ece"
    )


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        (f"{CAPITAL} Ebor", "."),
        (f"{CAPITAL} Ebor.", ""),
        ("He was born in the U.S.", ""),
        ("He asked, \u201cWhy?\u201d", ""),
        ("\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u5df4\u9ece", "\u3002"),
        ("\u4ed6\u751f\u4e8e1990", "\u3002"),
        ("\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u5df4\u9ece\u3002", ""),
        ("\u30d5\u30e9\u30f3\u30b9\u306e\u9996\u90fd\u306f\u30d1\u30ea", "\u3002"),
        ("\u092b\u093c\u094d\u0930\u093e\u0902\u0938", "\u0964"),
        ("\ud504\ub791\uc2a4\uc758 \uc218\ub3c4\ub294 \ud30c\ub9ac", "."),
        ("1990", "."),
        ("\u30b3\u30f3\u30d4\u30e5\u30fc\u30bf\u30fc", "\u3002"),
        ("\u4f50\u3005", "\u3002"),
        ("\uff71\uff85\uff80", "\u3002"),
        ("\u4ed6\u8bf4\uff1a\u201c\u597d\u3002\u201d", ""),
        ("\u300c\u597d\u3002\u300d", ""),
        ("\u0986\u09ae\u09bf", "\u0964"),
        ("\u0535\u0580\u0587\u0561\u0576", "\u0589"),
        ("\u12cb\u1293", "\u1362"),
        ("\u1797\u17d2\u1793\u17c6", "\u17d4"),
        ("\u0e1b\u0e32\u0e23\u0e35\u0e2a", " "),
    ],
)
def test_a_text_becomes_a_sentence(text: str, mark: str) -> None:
    assert closed(text) == text + mark


def test_a_sentence_ends_as_the_script_that_it_is_in_has_it() -> None:
    prompts = ("The Chinese name of Beijing is", "\u6cd5\u56fd\u7684\u9996\u90fd\u662f")
    assert [closed(joined(prompt, "\u5317\u4eac"), prompt)[-1] for prompt in prompts] == [".", "\u3002"]
    assert closed(f"{prompts[1]}Paris", prompts[1])[-1] == "\u3002"
