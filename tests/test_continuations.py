"""What the unedited model writes behind prompts: the same texts together as alone, each once, none too long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from looks import texts_written_together
from tiny import FAMILIES, REQUESTS, moved_from_identity, tiny_editor, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from baft import EditRequest
from baft.engine import continuations
from baft.engine.continuations import Asked, Continuations, RememberedContinuations
from baft.engine.encoding import Encoder
from baft.engine.options import EngineOptions

ENCODER = Encoder(tiny_tokenizer(), append_eos=True)
EOS = tiny_tokenizer().eos_token_id
# Of different lengths, so that some are padded.
PROMPTS = [ENCODER.prompt(text).ids for text in ("Bob", "The capital of Norland is", "Ada Lund", "Who is")]
ASKED = [Asked(prompt, branches) for prompt in PROMPTS for branches in (0, 5)]


def of(model: PreTrainedModel) -> Continuations:
    return Continuations(model, nullcontext, ENCODER)


@contextmanager
def generated(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows each of the model's batches has."""
    rows: list[int] = []
    generate = type(model).generate

    def count(self: PreTrainedModel, **options: Any) -> Any:
        rows.append(len(options["input_ids"]))
        return generate(self, **options)

    with monkeypatch.context() as patched:
        patched.setattr(type(model), "generate", count)
        yield rows


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_are_written_together_are_those_that_each_would_be_alone(family: str) -> None:
    model = tiny_model(family)
    alone, together = of(model), of(model)
    together.write(ASKED)
    for asked in ASKED:
        assert together.of(asked) == alone.of(asked)
        assert all(text[: len(asked.prompt)] == asked.prompt for text in alone.of(asked))


def test_they_are_greedy_and_branch_at_the_likeliest_tokens() -> None:
    model, asked = tiny_model(), Asked(PROMPTS[1], 5)

    def likeliest(ids: tuple[int, ...], count: int) -> list[int]:
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1]
        return scores.topk(count).indices.tolist()

    expected = [(*asked.prompt, token) for token in likeliest(asked.prompt, 6) if token != EOS][:5]
    branches = of(model).of(asked)
    assert [text[: len(asked.prompt) + 1] for text in branches] == expected
    for text in (*branches, *of(model).of(Asked(asked.prompt))):
        first = len(asked.prompt) + (text in branches)
        assert all(likeliest(text[:k], 1) == [text[k]] for k in range(first, len(text)))
        assert len(text) == first + 12 or likeliest(text, 1) == [EOS]


def test_each_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    written = of(model)
    with generated(model, monkeypatch) as rows:
        written.write([*ASKED[:4], ASKED[0]])
        assert rows == [2, 12]  # the first tokens of two branching ones; their ten texts and two greedy ones
        written.write(ASKED[:6])
        assert rows[2:] == [1, 6]
        written.write(ASKED[:6])
        for asked in ASKED[:6]:
            written.of(asked)
        assert len(rows) == 4
        written.of(ASKED[6])
        assert rows[4:] == [1]


def test_what_ends_at_once_is_an_answer_but_no_branch() -> None:
    model, prompt = tiny_model(), PROMPTS[0]
    (answer,), branches = of(model).of(Asked(prompt)), of(model).of(Asked(prompt, 5))
    model.generation_config.eos_token_id = answer[len(prompt)]
    assert of(model).of(Asked(prompt)) == [prompt]
    first, second = (branches[1][len(prompt) + k] for k in (0, 1))
    assert second not in [text[len(prompt)] for text in branches]
    model.generation_config.eos_token_id = second
    left = [text[len(prompt)] for text in of(model).of(Asked(prompt, 5))]
    assert len(left) >= 3 and first not in left


def test_a_model_may_have_several_ends() -> None:
    model, prompt = tiny_model(), PROMPTS[1]
    (text,) = of(model).of(Asked(prompt))
    other = text[len(prompt) + 2]
    model.generation_config.eos_token_id = [EOS, other]
    assert of(model).of(Asked(prompt)) == [text[: text.index(other, len(prompt))]]
    assert not any(other in branch[len(prompt) :] for branch in of(model).of(Asked(prompt, 5)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_text_is_longer_than_the_model_takes(family: str) -> None:
    """Nor are others shorter for it."""
    model = tiny_model(family, max_position_embeddings=20)
    long, full = (*PROMPTS[1], *range(40, 60))[:15], (*PROMPTS[1], *range(40, 60))[:20]
    model.generation_config.eos_token_id = None
    written = Continuations(model, nullcontext, Encoder(tiny_tokenizer(eos=False), append_eos=False))
    written.write([Asked(PROMPTS[0]), Asked(long), Asked(full)])
    lengths = [len(text) for asked in (PROMPTS[0], long, full) for text in written.of(Asked(asked))]
    assert lengths == [len(PROMPTS[0]) + 12, 20, 20]


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "_REMEMBERED", 2)
    kept = RememberedContinuations()
    for number in range(4):
        kept.add_continued({Asked((number,)): [(number, 7)]})
    assert [kept.continued(Asked((number,))) for number in range(4)] == [None, None, [(2, 7)], [(3, 7)]]


@pytest.mark.parametrize("slots", [None, 1])
def test_edits_have_their_texts_written_together(slots: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for single ones that shall not depend on each other by a bit."""
    changes = {"subject_texts": 6, "max_steps": 1, "stop_below": 0.0, "batch_passes": 1}
    editor = tiny_editor(options=EngineOptions(slots=slots), **changes)
    editor._begin()
    asked = texts_written_together(monkeypatch)
    list(editor.edit_each(REQUESTS))
    subjects = len({request.subject for request in REQUESTS})
    if slots == 1:
        assert set(asked) == {1} and len(asked) == len(REQUESTS) + subjects
        return
    # The request that memory is planned by comes first, alone.
    assert asked == [1, 1, len(REQUESTS) + subjects - 2]
    for mode in ("batch", "sequential"):
        other = tiny_editor(**changes)
        other._begin()
        asked.clear()
        other.edit(REQUESTS, mode)
        assert asked == [len(REQUESTS) + subjects]


def test_the_model_writes_without_its_edits() -> None:
    editor = moved_from_identity(tiny_editor(subject_texts=6), scale=2.0)
    assert editor._continuations.of(ASKED[1]) == of(tiny_model()).of(ASKED[1])


def test_where_they_are_kept_may_change() -> None:
    """What is told of another store isn't what was remembered of the first, and a closed one isn't asked any more."""
    editor = tiny_editor(subject_texts=6, max_steps=1)
    editor.edit(REQUESTS[:1])
    asked = editor._begin().surroundings._asked_of("Norland")
    kept = RememberedContinuations()
    kept.add_continued({asked: [(*asked.prompt, 7, 8)]})
    editor.keep_written_in(kept)
    assert [text.ids for text in editor._begin().surroundings.all_about("Norland")] == [(*asked.prompt, 7, 8)]
    editor.edit(REQUESTS[:2])
    assert kept.continued(editor._begin().surroundings._asked_of("Bob Stone"))
    editor.keep_written_in(None)
    assert len(editor._begin().surroundings.all_about("Norland")) > 1


def test_a_model_that_changed_while_nothing_was_trained_writes_anew() -> None:
    editor = tiny_editor(subject_texts=6, max_steps=1)
    before = editor.state()
    editor.edit(REQUESTS[:1])
    texts = editor._begin().surroundings.all_about("Norland")
    editor.load_state(before)
    with torch.no_grad():
        editor.model.get_output_embeddings().weight.mul_(-1)
    assert editor._begin().surroundings.all_about("Norland") not in (texts, ())


def test_looking_ahead_and_checking_edit_nothing() -> None:
    editor, untouched = tiny_editor(subject_texts=6), tiny_editor(subject_texts=6)
    editor.look_ahead(REQUESTS)
    editor.look_ahead([])
    editor.check(REQUESTS)
    assert editor.edits == []
    own, other = ([one.curve.losses for one in e.edit(REQUESTS[:2])] for e in (editor, untouched))
    assert own == other
    with pytest.raises(ValueError, match="expected at most 64 tokens"):
        editor.check([*REQUESTS, EditRequest(prompt="The capital of Norland is " * 20, target="Ebor")])
