"""The pool of unrelated texts: what is drawn of it, and requests behind its texts."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from tiny import REQUESTS, UNRELATED, tiny_editor, tiny_model, tiny_tokenizer, tokenizer_of_bytes
from tokenizers import normalizers

from baft import BaftConfig, BaftEditor
from baft.engine.encoding import Encoded, Encoder, in_chunks
from baft.engine.unrelated import UnrelatedPool, _whole_sentences

ENCODER = Encoder(tiny_tokenizer(), append_eos=True)
ROW = ENCODER.pair("Ada was born in", "Ebor", "Ada")
TEXTS = ["Bob is in Norland.", "Norland is. The president of", "Where is the king? ", "1 2. 3 4."]


def said(row: Encoded | None) -> str:
    assert row is not None
    return str(ENCODER.tokenizer.decode(list(row.ids), skip_special_tokens=True))


def test_texts_that_come_twice_count_once() -> None:
    pool = UnrelatedPool([*TEXTS, *TEXTS], ENCODER)
    assert (len(pool), pool.texts) == (4, tuple(TEXTS))
    drawn = pool.draw(4, torch.Generator().manual_seed(0))
    assert sorted(row.ids for row in drawn) == sorted(ENCODER.prompt(text).ids for text in TEXTS)


def test_a_request_stands_behind_whole_sentences() -> None:
    pool = UnrelatedPool(TEXTS, ENCODER)
    rows = [row for number in range(4) if (row := pool.behind(ROW, number))]
    sentences = ["Bob is in Norland.", "Norland is.", "Where is the king?", "1 2. 3 4."]
    assert sorted(map(said, rows)) == sorted(f"{sentence} Ada was born in Ebor" for sentence in sentences)
    assert pool.behind(ROW, 4) == rows[0]  # there are no more
    for row in rows:
        assert row.ids[row.prompt_length :] == ROW.ids[ROW.prompt_length :]
        assert row.subject and ENCODER.tokenizer.decode(list(row.ids[slice(*row.subject)])).strip() == "Ada"


def test_a_request_has_its_own_texts_whatever_came_before() -> None:
    texts = [f"{number} is a number." for number in range(50)]
    other = ENCODER.pair("Bob was born in", "Ebor", "Bob")
    pool, again = UnrelatedPool(texts, ENCODER), UnrelatedPool(texts, ENCODER)
    again.behind(other, 3)
    assert pool.behind(ROW, 3) == again.behind(ROW, 3)
    assert len({pool.behind(ROW, 0, seed) for seed in range(10)}) > 5
    assert len({said(pool.behind(row, 0)).split(row.words.prompt)[0] for row in (ROW, other) if row.words}) == 2


def test_what_stands_side_by_side_among_the_texts_is_not_what_a_request_stands_behind() -> None:
    """A user's texts, and FactWorld's, are in order: several about one thing after each other."""
    pool = UnrelatedPool([f"{number} is a number." for number in range(50)], ENCODER)
    numbers = [int(said(pool.behind(ROW, number)).split()[0]) for number in range(10)]
    steps = [(after - before) % 50 for before, after in itertools.pairwise(numbers)]
    assert len({*numbers}) == 10 and steps.count(1) < 3


def test_texts_of_the_same_tokens_count_once() -> None:
    same = ["Bob is in Norland.", "Bob is in\u00a0Norland."]
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert len(UnrelatedPool(same, Encoder(tokenizer, append_eos=True))) == 1


@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_text_without_tokens_is_none(positions: str) -> None:
    without_bos = tiny_tokenizer(bos=False)
    pool = UnrelatedPool(["", *TEXTS], Encoder(without_bos, append_eos=True))
    assert len(pool) == len(TEXTS)
    config = BaftConfig(rank=2, layers=(1,), positions=positions, subject_texts=0, max_steps=1)
    editor = BaftEditor(tiny_model(), without_bos, config, unrelated=[*TEXTS, ""])
    assert editor.edit(REQUESTS[:1])[0].curve.steps == 1


def test_texts_that_all_have_no_tokens_are_refused() -> None:
    editor = BaftEditor(tiny_model(), tiny_tokenizer(bos=False), BaftConfig(rank=2), unrelated=[""])
    with pytest.raises(ValueError, match=r"^unrelated: expected texts with tokens, got 1 without any$"):
        editor.edit(REQUESTS[:1])


def test_texts_that_will_not_do() -> None:
    about = "Adam and Ada are here."
    long = f"{'is ' * 80}."
    with pytest.warns(RuntimeWarning, match="^contexts: none of 3 unrelated texts has whole sentences"):
        assert UnrelatedPool([about, long, "The capital of 3.5 kings"], ENCODER).behind(ROW, 0) is None
    pool = UnrelatedPool([about, *TEXTS], ENCODER)
    assert {said(pool.behind(ROW, number)).split(" Ada")[0] for number in range(9)}.isdisjoint({about})
    rows = [row for number in range(4) if (row := UnrelatedPool(TEXTS, ENCODER).behind(ROW, number))]
    width = max(len(row.ids) for row in rows)
    for limit, fewer in ((width - 1, 2), (width, 0)):  # two are as long
        narrow = UnrelatedPool(TEXTS, ENCODER, limit=limit)
        assert [narrow.behind(ROW, number) for number in range(4)].count(None) == fewer


def test_a_text_is_no_longer_than_the_model_takes() -> None:
    texts = ["Bob is in Norland.", "Bob is in Norland. Where is the king?"]
    pool = UnrelatedPool(texts, ENCODER, limit=4)
    (row,) = pool.draw(2, torch.Generator())  # what remains of both is the same
    whole = ENCODER.prompt(texts[0], subject="")
    assert row == Encoded(whole.ids[:4], 4, whole.subject)
    assert len(whole.ids) > 4 and row.subject == (0, 0)


def test_a_target_in_chunks_is_not_known_in_words() -> None:
    pool = UnrelatedPool(TEXTS, ENCODER)
    chunks = in_chunks(ROW, 1)
    assert len(chunks) > 1 and all(pool.behind(chunk, 0) is None for chunk in chunks)
    (whole,) = in_chunks(ROW, 99)
    assert pool.behind(whole, 0) == pool.behind(ROW, 0) is not None


def test_a_request_stands_behind_a_text_as_its_script_has_it() -> None:
    encoder = Encoder(tokenizer_of_bytes(), append_eos=False)
    request = encoder.pair("\u6cd5\u56fd\u7684\u9996\u90fd\u662f", "\u5df4\u9ece")
    row = UnrelatedPool(["\u5929\u6c14\u597d\u3002"], encoder).behind(request, 0)
    assert row and encoder.tokenizer.decode(row.ids) == (
        "\u5929\u6c14\u597d\u3002\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u5df4\u9ece"
    )


def test_the_template_stands_around_text_and_prompt() -> None:
    encoder = Encoder(tiny_tokenizer(), append_eos=True, template="is {prompt} the")
    row = UnrelatedPool(TEXTS[:1], encoder).behind(encoder.pair("Ada was born in", "Ebor", "Ada"), 0)
    assert said(row) == "is Bob is in Norland. Ada was born in the Ebor"


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is. It was", "It is."),
        ('"It is," he says. "No."', '"It is," he says. "No."'),
        ("3.5 kings", ""),
        ("日本。東京", "日本。"),
        ("It is. So did J. R", "It is."),
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
    behind = [trainer.unrelated.behind(row, number) for number in range(2)]
    assert None not in behind and set(trainer.unrelated.texts) == set(UNRELATED)
    lessons = [trainer.lesson([row]) for _ in range(20)]
    assert all(lesson.edits[0] == row and len(lesson.edits) == 2 for lesson in lessons)
    assert {lesson.edits[1] for lesson in lessons} == set(behind)
    known = [trainer.lesson([row], known=[row]).edits for _ in range(40)]
    assert {edits[0] for edits in known} == {row, *behind}
    assert len(tiny_editor(contexts=0, subject_texts=0)._begin().lesson([row]).edits) == 1
