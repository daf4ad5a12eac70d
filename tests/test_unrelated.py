"""The pool of unrelated texts: what is drawn of it, and requests behind its texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import REQUESTS, UNRELATED, tiny_editor, tiny_tokenizer

from baft import BaftConfig
from baft.engine.encoding import Encoded, Encoder, in_chunks
from baft.engine.unrelated import UnrelatedPool, _whole_sentences

ENCODER = Encoder(tiny_tokenizer(), append_eos=True)
ROW = ENCODER.pair("Ada was born in", "Ebor", "Ada")
TEXTS = ["Bob is in Norland.", "Norland is. The president of", "Where is the king? ", "1 2. 3 4."]


def said(rows: tuple[Encoded, ...]) -> list[str]:
    return [ENCODER.tokenizer.decode(list(row.ids), skip_special_tokens=True) for row in rows]


def test_texts_that_come_twice_count_once() -> None:
    pool = UnrelatedPool([*TEXTS, *TEXTS], ENCODER)
    assert (len(pool), pool.texts) == (4, tuple(TEXTS))
    drawn = pool.draw(4, torch.Generator().manual_seed(0))
    assert sorted(row.ids for row in drawn) == sorted(ENCODER.prompt(text).ids for text in TEXTS)


def test_a_request_stands_behind_whole_sentences() -> None:
    rows = UnrelatedPool(TEXTS, ENCODER).behind(ROW, 9)
    sentences = ["Bob is in Norland.", "Norland is.", "Where is the king?", "1 2. 3 4."]
    assert sorted(said(rows)) == sorted(f"{sentence} Ada was born in Ebor" for sentence in sentences)
    for row in rows:
        assert row.ids[row.prompt_length :] == ROW.ids[ROW.prompt_length :]
        assert row.subject and ENCODER.tokenizer.decode(list(row.ids[slice(*row.subject)])).strip() == "Ada"


def test_a_request_has_its_own_texts_whatever_came_before() -> None:
    texts = [f"{number} is a number." for number in range(50)]
    other = ENCODER.pair("Bob was born in", "Ebor", "Bob")
    pool, again = UnrelatedPool(texts, ENCODER), UnrelatedPool(texts, ENCODER)
    again.behind(other, 3)
    rows = pool.behind(ROW, 3)
    assert rows == again.behind(ROW, 3) and len({row.ids for row in rows}) == 3
    assert rows != again.behind(ROW, 3, seed=1)
    assert {text.split(" Bob")[0] for text in said(pool.behind(other, 3))} != {t.split(" Ada")[0] for t in said(rows)}


def test_texts_that_will_not_do() -> None:
    about = "Adam and Ada are here."
    long = f"{'is ' * 80}."
    with pytest.warns(RuntimeWarning, match="^contexts: none of 3 unrelated texts has whole sentences"):
        assert UnrelatedPool([about, long, "The capital of 3.5 kings"], ENCODER).behind(ROW, 2) == ()
    assert len(UnrelatedPool([about, *TEXTS], ENCODER).behind(ROW, 9)) == 4
    width = max(len(row.ids) for row in UnrelatedPool(TEXTS, ENCODER).behind(ROW, 4))
    assert len(UnrelatedPool(TEXTS, ENCODER, limit=width - 1).behind(ROW, 4)) < 4
    assert len(UnrelatedPool(TEXTS, ENCODER, limit=width).behind(ROW, 4)) == 4


def test_none_are_asked_for_or_the_target_is_in_chunks() -> None:
    pool = UnrelatedPool(TEXTS, ENCODER)
    assert pool.behind(ROW, 0) == ()
    chunks = in_chunks(ROW, 1)
    assert len(chunks) > 1 and all(pool.behind(chunk, 2) == () for chunk in chunks)
    (whole,) = in_chunks(ROW, 99)
    assert pool.behind(whole, 2) == pool.behind(ROW, 2) != ()


def test_the_template_stands_around_text_and_prompt() -> None:
    encoder = Encoder(tiny_tokenizer(), append_eos=True, template="is {prompt} the")
    (row,) = UnrelatedPool(TEXTS[:1], encoder).behind(encoder.pair("Ada was born in", "Ebor", "Ada"), 1)
    assert said((row,)) == ["is Bob is in Norland. Ada was born in the Ebor"]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is. It was", "It is."),
        ('"It is," he says. "No."', '"It is," he says. "No."'),
        ("3.5 kings", ""),
        ("日本。東京", "日本。"),
        ("One!\nTwo? ", "One!\nTwo?"),
        ("", ""),
    ],
)
def test_whole_sentences(text: str, sentences: str) -> None:
    assert _whole_sentences(text) == sentences


def test_contexts_are_retellings() -> None:
    with pytest.raises(ValueError, match="contexts: expected 0 without retellings, which they join, got 2"):
        BaftConfig(contexts=2, retellings=0)


@pytest.mark.parametrize("changes", [{}, {"positions": "subject"}, {"chunk_tokens": 2}])
@pytest.mark.parametrize("mode", ["single", "sequential", "batch"])
def test_edits_with_contexts_in_every_mode(mode: Any, changes: dict[str, Any]) -> None:
    def losses(contexts: int) -> list[list[float]]:
        options = {"contexts": contexts, "max_steps": 3, "batch_passes": 3, "stop_below": 0.0, "subject_texts": 0}
        return [o.curve.losses for o in tiny_editor(**options, **changes).edit(REQUESTS[:3], mode)]

    assert losses(2) == losses(2)
    assert losses(2) != losses(0)


def test_lessons_tell_a_request_behind_other_texts() -> None:
    editor = tiny_editor(contexts=2, subject_texts=0, retellings=1)
    trainer = editor._begin()
    row = editor._encode(REQUESTS[0])
    behind = trainer.unrelated.behind(row, 2)
    assert behind and set(trainer.unrelated.texts) == set(UNRELATED)
    lessons = [trainer.lesson([row]) for _ in range(20)]
    assert all(lesson.edits[0] == row and len(lesson.edits) == 2 for lesson in lessons)
    assert {lesson.edits[1] for lesson in lessons} == set(behind)
    known = [trainer.lesson([row], known=[row]).edits for _ in range(40)]
    assert {edits[0] for edits in known} == {row, *behind}
    assert len(tiny_editor(contexts=0, subject_texts=0)._begin().lesson([row]).edits) == 1
