"""What the unedited model says of an edit's subject: all but the fact, and always the same."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from tiny import REQUESTS, moved_from_identity, one_thread, tiny_editor, tiny_model, tiny_tokenizer  # noqa: F401

from baft.engine.encoding import Encoded, Encoder
from baft.engine.surroundings import Surroundings

ENCODER = Encoder(tiny_tokenizer(), append_eos=True)
ROWS = [ENCODER.pair(request.prompt, request.target, request.subject) for request in REQUESTS]


def surroundings(count: int = 6) -> Surroundings:
    return Surroundings(tiny_model(), nullcontext, ENCODER, count)


def text_of(row: Encoded) -> str:
    return str(tiny_tokenizer().decode(list(row.ids), skip_special_tokens=True))


def test_texts_begin_with_the_subject_and_go_on_differently() -> None:
    texts = surroundings().of(ROWS[1])
    start = ENCODER.prompt("Bob Stone").ids
    assert len(texts) >= 3
    assert all(text.ids[: len(start)] == start for text in texts)
    assert len({text.ids[len(start)] for text in texts}) == len(texts)


def test_texts_are_the_same_whatever_was_written_before() -> None:
    first, later = surroundings(), surroundings()
    for row in ROWS:
        later.of(row)
    assert [first.of(row) for row in ROWS] == [later.of(row) for row in reversed(ROWS)][::-1]


def test_what_tells_of_the_fact_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    every = surroundings()
    monkeypatch.setattr(every, "_answer", lambda prompt: "")
    texts = every.of(ROWS[0])
    telling = text_of(texts[1])[-4:].casefold()
    monkeypatch.setattr(every, "_answer", lambda prompt: telling)
    left = every.of(ROWS[0])
    assert left == tuple(text for text in texts if telling not in text_of(text).casefold()) and len(left) < len(texts)


def test_what_tells_of_another_edit_of_the_subject_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    every = surroundings()
    other = ENCODER.pair("The president of Norland is", "Ebor", "Norland")
    monkeypatch.setattr(every, "_answer", lambda prompt: "")
    texts = every.of(ROWS[0])
    telling = text_of(texts[0])[-4:].casefold()
    monkeypatch.setattr(every, "_answer", lambda prompt: telling if prompt == other.ids[: len(prompt)] else "")
    assert every.of(ROWS[0]) == texts
    edits = [ROWS[0]]
    every.know(edits)
    assert every.of(ROWS[0]) == texts
    edits.append(other)
    every.know(edits)
    assert texts[0] not in every.of(ROWS[0])
    every.know([ROWS[0]])  # as if the other had been taken back
    assert every.of(ROWS[0]) == texts


def test_without_a_subject_or_a_wish_there_are_none() -> None:
    nameless = ENCODER.pair("The capital of Norland is", "Ebor")
    assert surroundings().of(nameless) == ()
    assert surroundings(0).of(ROWS[0]) == ()


def test_the_model_is_asked_without_its_edits() -> None:
    editor = moved_from_identity(tiny_editor(subject_texts=6), scale=2.0)
    assert editor._surroundings().of(ROWS[1]) == surroundings().of(ROWS[1])


def test_a_lesson_has_texts_about_its_subjects_and_others() -> None:
    editor = tiny_editor(unrelated_per_step=4, subject_texts=6)
    trainer = editor._begin()
    pool = set(trainer.unrelated.draw(100, trainer.generator))
    near = trainer.lesson([ROWS[0]]).unrelated
    assert len(near) == 4 and sum(text in pool for text in near) == 2
    assert set(near) - pool <= set(trainer.surroundings.of(ROWS[0]))
    editor = tiny_editor(unrelated_per_step=4, subject_texts=0)
    trainer = editor._begin()
    assert all(text in pool for text in trainer.lesson([ROWS[0]]).unrelated)
