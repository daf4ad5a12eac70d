"""A request in other words: which there are, and that only those asked for are made."""

from __future__ import annotations

import pytest
from tiny import tiny_tokenizer

from baft.engine.encoding import Encoded, Encoder, in_chunks
from baft.engine.retellings import Retellings

ENCODER = Encoder(tiny_tokenizer(), append_eos=True)
ROW = ENCODER.pair("Ada was born in", "Ebor", "Ada")
TOLD = tuple(ENCODER.pair(prompt, "Ebor", "Ada") for prompt in ("Ada is from", "Ada lives in"))


class Behind:
    """Puts a wording behind a text, and remembers that it did."""

    def __init__(self) -> None:
        self.made: list[tuple[Encoded, int]] = []

    def __call__(self, wording: Encoded, number: int) -> Encoded | None:
        self.made.append((wording, number))
        return Encoded((number, *wording.ids), wording.prompt_length + 1)


def all_of(retellings: Retellings) -> list[Encoded]:
    return [retellings[number] for number in range(len(retellings))]


def test_each_wording_by_itself_and_the_request_and_each_behind_each_text() -> None:
    found = all_of(Retellings(ROW, TOLD, 3, Behind()))
    assert found[:2] == [*TOLD]
    assert [row.ids for row in found[2:]] == [(n, *wording.ids) for wording in (ROW, *TOLD) for n in range(3)]


def test_what_nobody_asks_for_is_not_made() -> None:
    behind = Behind()
    retellings = Retellings(ROW, TOLD, 3, behind)
    assert len(retellings) == 11 and retellings[1] == TOLD[1] and behind.made == []
    assert retellings[7].ids == (2, *TOLD[0].ids)
    assert behind.made == [(TOLD[0], 2)]


def test_where_no_text_will_do_a_wording_is_by_itself() -> None:
    assert all_of(Retellings(ROW, TOLD, 1, lambda *_: None)) == [*TOLD, ROW, *TOLD]


def test_without_texts_there_is_what_others_tell() -> None:
    assert all_of(Retellings(ROW, TOLD, 0, Behind())) == [*TOLD]
    assert all_of(Retellings(ROW, (), 0, Behind())) == []
    chunk = in_chunks(ROW, 1)[1]
    assert all_of(Retellings(chunk, (), 3, Behind())) == []


def test_it_is_counted_as_a_list_is() -> None:
    retellings = Retellings(ROW, TOLD, 3, Behind())
    assert retellings[-1] == retellings[10]
    for number in (11, -12):
        with pytest.raises(IndexError):
            retellings[number]


def test_a_wording_that_is_not_known_in_words_stands_behind_none() -> None:
    """As where a template stands in it."""
    told = (Encoded(TOLD[0].ids, TOLD[0].prompt_length), TOLD[1])
    found = all_of(Retellings(ROW, told, 2, Behind()))
    assert found[:2] == [*told]
    assert [row.ids for row in found[2:]] == [(n, *wording.ids) for wording in (ROW, TOLD[1]) for n in range(2)]
