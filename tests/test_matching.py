"""When a generated text counts as an answer."""

from __future__ import annotations

import pytest

from baft.evaluation.matching import answer_part, matches, normalise


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("  The  Hague ", "hague"),
        ("U.S.", "us"),
        ("São Paulo!", "são paulo"),
        ("\uff21\uff22", "ab"),
        ("...", ""),
        ("«Paris»", "paris"),
        ("O\u2019Brien", "obrien"),
        ("Hawai\u02bbi", "hawaii"),
        ("「東京」", "東京"),
        ("2009\u201310", "2009-10"),
        ("Anna\u2014Maria, snake_case", "annamaria snakecase"),
        ("-1,000.5 at 12:30", "1000.5 at 12:30"),
        ("C++", "c++"),
        ("C#, F#.", "c# f#"),
        ("#1", "1"),
        ("दिल्ली।", "दिल्ली"),
        ("soft\u00adly `said`", "softly said"),
        ("A", "a"),
        ("Vitamin A", "vitamin a"),
        ("a an the", "the"),
    ],
)
def test_normalise_drops_what_is_not_the_answer(text: str, wanted: str) -> None:
    assert normalise(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" Paris. It is a city", "Paris"),
        (" Paris\nQ: next", "Paris"),
        (" version 3.5 beta", "version 3.5 beta"),
        ("Paris.", "Paris"),
        ("", ""),
        ("Paris! It is", "Paris"),
        ('"Paris." It is', '"Paris'),
        ("東京。日本の首都", "東京"),
        ("दिल्ली। भारत", "दिल्ली"),
        ("1999. It was", "1999"),
        ("No. It is", "No"),
        ("grade A.\nNext", "grade A"),
        ("J. R. R. Tolkien. He", "J. R. R. Tolkien"),
    ],
)
def test_an_answer_ends_at_a_line_or_sentence_end(text: str, wanted: str) -> None:
    assert answer_part(text) == wanted


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("J. R. R. Tolkien.", "J. K. Rowling."),
        ("St. Louis", "St. Petersburg"),
        ("Dr. Rajendra Prasad", "Dr. Zakir Husain"),
        ("No. 5", "No. 7"),
        ("1. Paris", "1. Rome"),
        ("the U.S. Army", "the U.S. Senate"),
        ("3.5", "35"),
        ("C++", "C#"),
    ],
)
def test_different_answers_are_told_apart(text: str, other: str) -> None:
    """As locality compares them."""
    assert normalise(answer_part(text)) != normalise(answer_part(other))


@pytest.mark.parametrize(
    ("text", "answers", "right"),
    [
        (" Paris", ["Paris"], True),
        (" paris. It is the capital", ["Paris"], True),
        (" Paris, France", ["Paris"], False),  # more than the answer before a stop
        (" Parisian", ["Paris"], False),
        (" New York City.", ["NYC", "New York City"], True),
        (" J. R. R. Tolkien. He wrote", ["J. R. R. Tolkien"], True),
        (" the U.S.", ["U.S."], True),
        (" U.S. Steel", ["U.S."], True),  # "U.S." ends a sentence as far as anybody can tell
        ("", ["Paris"], False),
        (" ...", ["?"], False),  # nothing is left of either after normalising: never a match
        (" A", ["A"], True),
        (" A. Because", ["A"], True),  # whatever a point means behind a letter or a number
        (" 12. The team", ["12"], True),
        (" Dr. Zakir Husain", ["Dr. Rajendra Prasad"], False),
        (" 2009\u201310.", ["2009-10"], True),
        (" 東京。日本の首都", ["東京"], True),
        (" Yahoo! News is", ["Yahoo! News is"], True),
        (" Berlin", [], False),
    ],
)
def test_matches_any_alias_exactly(text: str, answers: list[str], right: bool) -> None:
    assert matches(text, answers) is right
