"""What the unedited model says of an edit's subject: the fact is told anew, all else stays, and always the same."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny import REQUESTS, moved_from_identity, tiny_editor, tiny_model, tiny_tokenizer, tokenizer_of_bytes
from tiny import one_thread as one_thread
from tokenizers import normalizers

from baft.engine.continuations import Continuations
from baft.engine.encoding import Encoded, Encoder, Words, in_chunks
from baft.engine.step import Lesson
from baft.engine.surroundings import Surroundings, _goes_on
from baft.engine.unrelated import UnrelatedPool

ENCODER = Encoder(tiny_tokenizer(), append_eos=True)
ROWS = [ENCODER.pair(request.prompt, request.target, request.subject) for request in REQUESTS]


def surroundings(count: int = 6) -> Surroundings:
    return Surroundings(Continuations(tiny_model(), nullcontext, ENCODER), ENCODER, count)


def text_of(row: Encoded) -> str:
    return str(tiny_tokenizer().decode(list(row.ids), skip_special_tokens=True))


def test_texts_begin_with_the_subject_and_go_on_differently() -> None:
    texts = surroundings().of(ROWS[1])
    start = ENCODER.prompt("Bob Stone").ids
    assert len(texts) >= 3
    assert all(text.ids[: len(start)] == start for text in texts)
    assert len({text.ids[len(start)] for text in texts}) == len(texts)


def test_where_the_subject_is_edited_it_is_in_texts_about_it() -> None:
    """Else the locality loss would see nothing of what an edit does to them."""
    editor = moved_from_identity(tiny_editor(positions="subject", subject_texts=6), scale=2.0)
    trainer = editor._begin()
    texts = trainer.surroundings.of(ROWS[1])
    assert {editor.tokenizer.decode(text.ids[slice(*text.subject)]) for text in texts if text.subject} == {"Bob Stone"}

    def loss(*unrelated: Encoded) -> float:
        step = trainer.step
        return float(step._differentiate(step.arrange([Lesson([ROWS[1]], unrelated)]))[1])

    assert loss(*texts) > loss() + 1e-3
    others = trainer.unrelated.draw(3, trainer.generator)
    assert loss(*others) == pytest.approx(loss())  # they are about nobody


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


def written(monkeypatch: pytest.MonkeyPatch, *texts: str, answers: dict[str, str]) -> Surroundings:
    """As if the unedited model wrote these texts of every subject, and gave those answers to prompts."""
    made = surroundings()
    monkeypatch.setattr(made, "_branches", lambda subject: [ENCODER.prompt(text).ids for text in texts])
    prompts = {ENCODER.prompt(prompt).ids: answer for prompt, answer in answers.items()}
    monkeypatch.setattr(made, "_answer", lambda prompt: prompts.get(prompt, ""))
    return made


def test_what_tells_of_the_fact_is_told_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the old answer it is another prompt, which the same target follows."""
    texts = ("Bob Stone was born in Norland.", "Bob Stone is king of France", "Bob Stone, in France, was in Norlandia")
    row = ENCODER.pair("In France, Bob Stone", "Arvik", "Bob Stone")
    made = written(monkeypatch, *texts, answers={"In France, Bob Stone": "norland"})
    assert made.retold(row) == (ENCODER.pair("Bob Stone was born in", "Arvik", "Bob Stone"),)
    # It is known in words, so that it can stand behind others.
    assert [told.words for told in made.retold(row)] == [Words("Bob Stone was born in", "Arvik", "Bob Stone")]
    # A longer word that begins so is another answer; what is left out as telling of the fact is not that careful.
    assert [text_of(text) for text in made.of(row)] == ["Bob Stone is king of France"]


def test_what_the_model_is_too_short_for_is_not_told_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ENCODER.pair("In France, Bob Stone", "Arvik", "Bob Stone")
    made = written(monkeypatch, "Bob Stone was born in Norland.", answers={"In France, Bob Stone": "norland"})
    (told,) = made.retold(row)
    for limit, expected in ((len(told.ids), (told,)), (len(told.ids) - 1, ())):
        monkeypatch.setattr(made, "_limit", limit)
        assert made.retold(row) == expected
    assert tiny_editor(subject_texts=3)._begin().surroundings._limit == 64


def test_what_tells_of_two_edits_is_not_told_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one of its answers changed it would still say the other."""
    rows = [ENCODER.pair("Bob Stone is in", "Ebor", "Bob Stone"), ENCODER.pair("Bob Stone was in", "Ebor", "Bob Stone")]
    made = written(
        monkeypatch,
        "Bob Stone, king of France, is in Norland",
        answers={"Bob Stone is in": "norland", "Bob Stone was in": "france"},
    )
    retold = made.retold(rows[0])
    assert [text_of(text) for text in retold] == ["Bob Stone, king of France, is in Ebor"]
    made.know(rows)
    assert made.retold(rows[0]) == ()
    assert [text_of(text) for text in made.retold(rows[1])] == ["Bob Stone, king of Ebor"]


def test_two_edits_with_the_same_old_answer_are_not_told_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of them a text tells of isn't known; they may want different targets."""
    rows = [
        ENCODER.pair("Bob Stone is in", "Ebor", "Bob Stone"),
        ENCODER.pair("Bob Stone was in", "Arvik", "Bob Stone"),
    ]
    answers = {"Bob Stone is in": "norland", "Bob Stone was in": "norland"}
    made = written(monkeypatch, "Bob Stone was born in Norland", answers=answers)
    assert made.retold(rows[0])
    made.know(rows[:1], new=rows[1:])
    assert made.retold(rows[0]) == made.retold(rows[1]) == ()


def test_what_is_being_edited_is_no_longer_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    new = ENCODER.pair("Bob Stone was in", "Arvik", "Bob Stone")
    rehearsed = ENCODER.pair("Bob Stone is king of", "Ebor", "Bob Stone")
    made = written(monkeypatch, "Bob Stone was born in Norland", answers={"Bob Stone was in": "norland"})
    made.know([rehearsed])
    assert len(made.of(rehearsed)) == 1
    made.know([rehearsed], new=[new])
    assert made.of(rehearsed) == ()


def test_a_target_follows_with_a_space_or_without_as_it_does_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    templated = Encoder(tiny_tokenizer(), append_eos=True, template="The {prompt} ")
    made = Surroundings(Continuations(tiny_model(), nullcontext, templated), templated, 6)
    monkeypatch.setattr(made, "_answer", lambda prompt: "norland")
    texts = ("Bob Stone", "Bob Stone and Norland")
    monkeypatch.setattr(made, "_branches", lambda subject: [ENCODER.prompt(f"The {text}").ids for text in texts])
    row = templated.pair("Bob Stone", "Arvik", "Bob Stone")
    assert text_of(row) == "The Bob Stone Arvik"
    assert made.retold(row) == ()  # it would be "The Bob Stone andArvik"


@pytest.mark.parametrize(
    ("prompt", "answer", "target", "subject", "text", "told"),
    [
        (
            *("\u6cd5\u56fd\u7684\u9996\u90fd\u662f", "\u5df4\u9ece", "\u91cc\u6602", "\u6cd5\u56fd"),
            *("\u6cd5\u56fd\u9996\u90fd\u5df4\u9ece\u3002", "\u6cd5\u56fd\u9996\u90fd\u91cc\u6602"),
        ),
        (
            "The capital of France (",
            "paris",
            "Lyon",
            "France",
            "France has a capital (Paris)",
            "France has a capital (Lyon",
        ),
        # Here it would be "France, orLyon".
        ("The capital of France (", "paris", "Lyon", "France", "France, or Paris", None),
    ],
)
def test_without_a_space_it_is_told_anew_without_one(
    monkeypatch: pytest.MonkeyPatch, prompt: str, answer: str, target: str, subject: str, text: str, told: str | None
) -> None:
    """As in Chinese, and behind a bracket."""
    encoder = Encoder(tokenizer_of_bytes(), append_eos=False)
    made = Surroundings(Continuations(tiny_model(), nullcontext, encoder), encoder, 6)
    monkeypatch.setattr(made, "_answer", lambda prompt: answer)
    monkeypatch.setattr(made, "_branches", lambda subject: [encoder.prompt(text).ids])
    retold = made.retold(encoder.pair(prompt, target, subject))
    assert [encoder.tokenizer.decode(row.ids) for row in retold] == ([] if told is None else [told])


def test_with_a_template_in_it_a_retelling_is_not_known_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoded once more, it would have the template twice."""
    templated = Encoder(tiny_tokenizer(), append_eos=True, template="The {prompt}")
    made = Surroundings(Continuations(tiny_model(), nullcontext, templated), templated, 6)
    monkeypatch.setattr(made, "_answer", lambda prompt: "norland")
    monkeypatch.setattr(made, "_branches", lambda subject: [ENCODER.prompt("The Bob Stone and Norland").ids])
    (told,) = made.retold(templated.pair("Bob Stone", "Arvik", "Bob Stone"))
    assert text_of(told) == "The Bob Stone and Arvik" and told.words is None


def test_a_retelling_behind_a_text_has_its_subject_whatever_the_tokenizer_makes_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lower = copy.deepcopy(tiny_tokenizer())
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    encoder = Encoder(lower, append_eos=True)
    made = Surroundings(Continuations(tiny_model(), nullcontext, encoder), encoder, 6)
    monkeypatch.setattr(made, "_answer", lambda prompt: "norland")
    monkeypatch.setattr(made, "_branches", lambda subject: [encoder.prompt("Bob Stone was born in Norland").ids])
    (told,) = made.retold(encoder.pair("In France, Bob Stone", "Arvik", "Bob Stone"))
    assert told.words == Words("bob stone was born in", "Arvik", "bob stone")
    behind = UnrelatedPool(["It is."], encoder).behind(told, 0)
    assert behind and behind.subject and lower.decode(behind.ids[slice(*behind.subject)]).strip() == "bob stone"


@pytest.mark.parametrize(
    ("rest", "goes_on"), [("", False), (" x", False), (".", False), ("s", True), ("\u5e02", False)]
)
def test_where_a_word_ends(rest: str, goes_on: bool) -> None:
    assert _goes_on(rest) == goes_on


def test_no_text_ends_before_it_begins() -> None:
    """Though the model would say nothing of the subject."""
    model, eos = tiny_model(), tiny_tokenizer().eos_token_id
    start = torch.tensor([ENCODER.prompt("Bob Stone").ids])
    with torch.no_grad():
        model.lm_head.weight[eos] = model.model(start).last_hidden_state[0, -1]
        assert model(start).logits[0, -1].argmax() == eos
    texts = Surroundings(Continuations(model, nullcontext, ENCODER), ENCODER, 6).of(ROWS[1])
    assert texts and not any(eos in text.ids for text in texts)


def test_a_changed_model_is_asked_again() -> None:
    editor = tiny_editor(subject_texts=6)
    before = editor._begin().surroundings.of(ROWS[1])
    with torch.no_grad():
        editor.model.get_output_embeddings().weight.mul_(-1)
    assert editor._begin().surroundings.of(ROWS[1]) not in (before, ())


def test_what_was_chosen_of_other_texts_is_not_remembered_of_these(monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed model may answer as before, and write otherwise of the subject."""
    row, texts = ENCODER.pair("In France, Bob Stone", "Arvik", "Bob Stone"), ["Bob Stone was born in Norland"]
    made = written(monkeypatch, answers={"In France, Bob Stone": "norland"})
    monkeypatch.setattr(made, "_branches", lambda _: [ENCODER.prompt(text).ids for text in texts])
    assert made.of(row) == () and len(made.retold(row)) == 1
    texts[0] = "Bob Stone is king of France"
    assert [text_of(text) for text in made.of(row)] == texts and made.retold(row) == ()


def test_a_later_chunk_of_a_target_is_not_told_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(monkeypatch, "Bob Stone is in Norland", answers={"In France, Bob Stone": "norland"})
    first, second = in_chunks(ENCODER.pair("In France, Bob Stone", "king Ebor", "Bob Stone"), 2)
    assert made.retold(first) and made.retold(second) == ()


def test_a_lesson_tells_in_other_words_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_editor(retellings=2, rehearsal=8, unrelated_per_step=4)._begin()
    other = {row: tuple(ENCODER.pair(f"Tell {k}:", "Arvik") for k in range(3)) for row in ROWS}
    monkeypatch.setattr(trainer.surroundings, "retold", other.__getitem__)
    new, *past = ROWS
    for _ in range(3):
        edits = trainer.lesson([new], past).edits
        assert edits[0] == new and len(set(edits[1:3])) == 2 and set(edits[1:3]) <= set(other[new])
        assert len(edits) == 3 + len(past)
    rehearsed = [edit for _ in range(50) for edit in trainer.lesson([new], past).edits[3:]]
    assert set(rehearsed) == {words for row in past for words in (row, *other[row])}
    own = [edit for edit in rehearsed if edit in past]
    assert 0.35 < len(own) / (50 * len(past)) < 0.65
    again = {edit for _ in range(50) for edit in trainer.lesson(past, known=ROWS).edits}
    assert again == {words for row in past for words in (row, *other[row])}
    other[past[0]] = (ENCODER.pair(REQUESTS[0].prompt, "Arvik"),)  # would undo the new one
    rehearsed = [edit for _ in range(50) for edit in trainer.lesson([new], past).edits[3:]]
    assert past[0] in rehearsed and other[past[0]][0] not in rehearsed
    trainer = tiny_editor(retellings=0)._begin()
    monkeypatch.setattr(trainer.surroundings, "retold", other.__getitem__)
    assert trainer.lesson([new]).edits == [new]
    trainer = tiny_editor(retellings=1, contexts=2)._begin()
    monkeypatch.setattr(trainer.surroundings, "retold", other.__getitem__)
    told = {trainer.lesson([new]).edits[1] for _ in range(100)}
    assert told == {*other[new], *(trainer.unrelated.behind(row, k) for row in (new, *other[new]) for k in range(2))}


def test_surroundings_know_of_all_edits_and_of_those_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(subject_texts=6, max_steps=1, batch_passes=1, consolidate_every=2)
    told: list[tuple[int, int]] = []
    surroundings = editor._begin().surroundings
    monkeypatch.setattr(surroundings, "know", lambda edits, new=(): told.append((len(edits), len(new))))
    editor.edit(REQUESTS[:1])
    editor.edit(REQUESTS[1:2])
    editor.edit(REQUESTS[2:], "batch")
    count = len(REQUESTS)
    assert set(told[:2]) == {(0, 1), (1, 1)} and set(told[2:]) == {(2, 0), (count, 0)}


def test_without_a_subject_or_a_wish_there_are_none() -> None:
    nameless = ENCODER.pair("The capital of Norland is", "Ebor")
    assert surroundings().of(nameless) == () == surroundings().retold(nameless)
    assert surroundings(0).of(ROWS[0]) == () == surroundings(0).retold(ROWS[0])


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


@pytest.mark.parametrize("positions", ["last", "f1+l1", "l2", "all", "prompt", "subject", "f3"])
def test_where_edits_are_at_a_prompts_end_texts_end_anywhere_in_their_second_half(positions: str) -> None:
    """Else none of them would be edited where a question about it is."""
    trainer = tiny_editor(positions=positions, unrelated_per_step=8, subject_texts=6)._begin()
    whole = {text.ids for text in trainer.unrelated.draw(100, trainer.generator)}
    drawn = [text for _ in range(50) for text in trainer.lesson([ROWS[0]]).unrelated]
    ends = {ids: {text.prompt_length for text in drawn if text.ids == ids} for ids in whole}
    for ids, found in ends.items():
        anywhere = {*range((len(ids) + 1) // 2, len(ids) + 1)} - {0}
        assert found == (anywhere if "l" in positions.replace("all", "") else {len(ids)})
    about = [text for text in drawn if text.about]
    assert about and (len({text.prompt_length - len(text.ids) for text in about}) > 1) == trainer._from_the_end


def test_of_more_texts_about_a_subject_than_a_step_has_room_for_each_has_its_turn() -> None:
    trainer = tiny_editor(unrelated_per_step=4, subject_texts=6)._begin()
    row = ROWS[0]
    every = {text.ids for text in trainer.surroundings.of(row)}
    assert len(every) > 2
    generator = torch.Generator().manual_seed(0)
    drawn = [[t.ids for t in trainer.lesson([row], generator=generator).unrelated if t.about] for _ in range(60)]
    assert all(len({*texts}) == len(texts) == 2 for texts in drawn)
    assert {ids for texts in drawn for ids in texts} == every


def test_later_chunks_of_a_target_bring_no_more_unrelated_texts() -> None:
    editor = tiny_editor(unrelated_per_step=4, unrelated_per_edit=1, chunk_tokens=1)
    chunks = editor._chunks(REQUESTS[0])
    assert len(chunks) > 1
    assert len(editor._begin().lesson([chunks[1], chunks[0]]).unrelated) == 1
    assert len(editor._begin().lesson([editor._encode(request) for request in REQUESTS[:2]]).unrelated) == 2
