"""Text to tokens: prompts as generation sees them, targets as they follow, the subject's columns, padded batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, attach, tiny_model, tiny_tokenizer, tokenizer_of_bytes
from torch import Tensor
from transformers import ByT5Tokenizer

from baft import BaftConfig, BaftEditor, EditRequest
from baft.engine.encoding import IGNORED, Encoded, Encoder, in_chunks
from baft.engine.generation import generate_texts
from baft.engine.grid import _edited
from baft.positions import Positions

PROMPT = "The capital of Norland is"


def encoder(*, append_eos: bool = True, template: str = "{prompt}", **tokens: bool) -> Encoder:
    return Encoder(tiny_tokenizer(**tokens), append_eos=append_eos, template=template)


def names(ids: Sequence[int]) -> list[str]:
    """The tokens, with the byte-level mark of a space shown as an underscore, newlines as such."""
    return [token.replace("Ġ", "_").replace("Ċ", "\n") for token in tiny_tokenizer().convert_ids_to_tokens(list(ids))]


def prompt_and_target(row: Encoded) -> tuple[list[str], list[str]]:
    return names(row.ids[: row.prompt_length]), names(row.ids[row.prompt_length :])


def subject_tokens(row: Encoded) -> list[str]:
    assert row.subject is not None
    return names(row.ids[slice(*row.subject)])


# -- prompts --


def test_a_prompt_is_what_the_tokenizer_makes_of_it() -> None:
    row = encoder().prompt(PROMPT)
    assert list(row.ids) == tiny_tokenizer()(PROMPT)["input_ids"]
    assert names(row.ids) == ["<s>", "The", "_capital", "_of", "_Norland", "_is"]
    assert row.prompt_length == 6
    assert row.subject is None


def test_a_pair_begins_with_exactly_what_generation_sees() -> None:
    model = tiny_model()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    attachment = attach(model)
    for tokens in ({}, {"bos": False}, {"ends_with_eos": True}, {"pad": False}):
        for prompt in (PROMPT, "The capital of Norland is ", "Ada\n", "x"):
            subject_of_test = encoder(template="Question: {prompt}", **tokens)
            seen.clear()
            generate_texts(model, attachment, subject_of_test, [prompt], max_new_tokens=1)
            row = subject_of_test.pair(prompt, "Arvik")
            assert seen[0].tolist() == [list(row.ids[: row.prompt_length])], (tokens, prompt)


@pytest.mark.parametrize(("bos", "first"), [(True, ["<s>", "The"]), (False, ["The", "_capital"])])
def test_bos_is_there_once_if_the_tokenizer_has_one(bos: bool, first: list[str]) -> None:
    ids = encoder(bos=bos).pair(PROMPT, "Arvik").ids
    assert names(ids[:2]) == first
    assert names(ids).count("<s>") == bos


def test_an_eos_that_the_tokenizer_appends_is_not_part_of_the_prompt() -> None:
    row = encoder(ends_with_eos=True).pair(PROMPT, "Arvik", "Norland")
    assert prompt_and_target(row) == (["<s>", "The", "_capital", "_of", "_Norland", "_is"], ["_Arvik", "</s>"])
    assert subject_tokens(row) == ["_Norland"]
    assert "</s>" not in names(encoder(ends_with_eos=True, append_eos=False).pair(PROMPT, "Arvik").ids)


# -- targets --


@pytest.mark.parametrize(
    ("prompt", "target", "whole"),
    [
        ("\u6cd5\u56fd\u7684\u9996\u90fd\u662f", "\u5df4\u9ece", "\u6cd5\u56fd\u7684\u9996\u90fd\u662f\u5df4\u9ece"),
        ("Norland (", "Arvik)", "Norland (Arvik)"),
        (PROMPT, "Arvik", f"{PROMPT} Arvik"),
    ],
)
def test_a_pair_says_what_belongs_there(prompt: str, target: str, whole: str) -> None:
    row = Encoder(tokenizer_of_bytes(), append_eos=False).pair(prompt, target)
    assert tokenizer_of_bytes().decode(row.ids) == whole
    assert tokenizer_of_bytes().decode(row.ids[: row.prompt_length]) == prompt


@pytest.mark.parametrize(
    ("prompt", "target", "tail"),
    [
        (PROMPT, "Arvik", ["_Arvik"]),
        (PROMPT, "Ada Lund", ["_A", "da", "_Lund"]),
        # No second space where there is one.
        (PROMPT, " Arvik", ["_Arvik"]),
        # Together they would give "_Bob", but generation sees a prompt that ends with a token for the space.
        (PROMPT + " ", "Bob", ["Bo", "b"]),
        (PROMPT + "\n", "Bob", ["Bo", "b"]),
    ],
)
def test_a_target_is_what_follows_the_prompt(prompt: str, target: str, tail: list[str]) -> None:
    row = encoder(append_eos=False).pair(prompt, target)
    head = encoder().prompt(prompt)
    assert row.ids[: row.prompt_length] == head.ids
    assert prompt_and_target(row)[1] == tail


@pytest.mark.parametrize(("append_eos", "override", "expected"), [(True, None, 1), (False, None, 0), (True, False, 0)])
def test_eos_ends_a_target_if_asked(append_eos: bool, override: bool | None, expected: int) -> None:
    row = encoder(append_eos=append_eos).pair(PROMPT, "Arvik", append_eos=override)
    assert names(row.ids).count("</s>") == expected
    assert (names(row.ids)[-1] == "</s>") == bool(expected)
    assert row.prompt_length == 6


def test_without_an_eos_token_none_is_appended() -> None:
    row = encoder(eos=False).pair(PROMPT, "Arvik")
    assert names(row.ids)[-1] == "_Arvik"


# -- padding tokens --


def test_padding_is_the_pad_token_or_else_eos() -> None:
    assert encoder().pad_id == tiny_tokenizer().pad_token_id == 0
    assert encoder(pad=False).pad_id == tiny_tokenizer().eos_token_id == 2


def test_a_tokenizer_that_can_not_pad_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^tokenizer: expected a pad token or an EOS token to pad with, got neither$"):
        encoder(pad=False, eos=False)


def test_padding_is_a_token_that_the_model_knows() -> None:
    """A pad token is often added to a tokenizer and not to the model."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id == VOCABULARY
    assert Encoder(tokenizer, append_eos=True).pad_id == VOCABULARY
    assert Encoder(tokenizer, append_eos=True, ids=VOCABULARY).pad_id == tokenizer.eos_token_id
    tokenizer.eos_token = None  # BOS is left, which isn't decoded either
    assert Encoder(tokenizer, append_eos=True, ids=VOCABULARY).pad_id == tokenizer.bos_token_id


def test_tokens_that_the_model_does_not_know_are_refused() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(["Atlantis"])
    model, config = tiny_model(), BaftConfig(rank=2, layers=(1,))
    editor = BaftEditor(model, tokenizer, config)
    message = (
        rf"tokenizer: expected ids below {VOCABULARY}, .*, got {VOCABULARY} \('Atlantis'\) in '{{}}': model.resize"
    )
    with pytest.raises(ValueError, match=f"^request 0: {message.format('Atlantis is in')}"):
        editor.check([EditRequest(prompt="Atlantis is in", target="Ebor")])
    with pytest.raises(ValueError, match=f"^{message.format('Atlantis')}"):
        editor.edit([EditRequest(prompt="Ebor is in", target="Atlantis")])
    with pytest.raises(ValueError, match=f"^{message.format('Is it Atlantis')}"):
        editor.generate("Is it Atlantis")
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    with pytest.raises(ValueError, match=r"got 129 \('<new>'\) in every text's end: "):
        BaftEditor(tiny_model(), tokenizer, config)


def test_a_pad_token_that_is_also_eos_is_learned_at_the_end_and_nowhere_else() -> None:
    one_for_both = encoder(pad=False)
    batch = one_for_both.batch([one_for_both.pair("Bob", "Ada"), one_for_both.pair(PROMPT, "Arvik")], "cpu")
    end = one_for_both.pad_id
    assert batch.labels[0].tolist().count(end) == 1
    assert int(batch.attention_mask[0].sum()) == len(one_for_both.pair("Bob", "Ada").ids)


# -- subjects --


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        (PROMPT, "Norland", ["_Norland"]),
        ("Ada Lund was born in", "Ada Lund", ["Ada", "_Lund"]),
        ("The king of Sudland", "Sudland", ["_Sudland"]),
        ("Sudland", "Sudland", ["S", "udland"]),
        # A part of a token has all of it.
        (PROMPT, "Nor", ["_Norland"]),
        ("Bob is Bob", "Bob", ["Bo", "b"]),
    ],
)
def test_a_subject_has_the_columns_of_its_tokens(prompt: str, subject: str, expected: list[str]) -> None:
    row = encoder().pair(prompt, "Arvik", subject)
    assert subject_tokens(row) == expected
    assert row.subject is not None
    assert "".join(names(row.ids[1 : row.subject[0]])) == prompt.partition(subject)[0].rstrip().replace(" ", "_")


@pytest.mark.parametrize("ends_with_eos", [False, True])
def test_a_template_that_begins_with_bos_brings_the_only_one(ends_with_eos: bool) -> None:
    """As those do that ``apply_chat_template`` writes."""
    templated = encoder(template="<s>Where is {prompt}?\n", ends_with_eos=ends_with_eos)
    row = templated.pair("Ada Lund", "in Arvik", "Ada Lund")
    assert row == encoder(template="Where is {prompt}?\n").pair("Ada Lund", "in Arvik", "Ada Lund")
    assert names(row.ids).count("<s>") == 1 and subject_tokens(row) == ["_A", "da", "_Lund"]
    assert templated.prompt("Ada Lund").ids == row.ids[: row.prompt_length]


def test_a_subject_is_looked_for_in_the_prompt_and_not_in_the_template() -> None:
    row = encoder(template="Question Ada: {prompt}? Answer Ada:").prompt("Where was Ada", "Ada")
    assert row.subject is not None
    assert "".join(names(row.ids[: row.subject[0]])) == "<s>Question_Ada:_Where_was"
    assert subject_tokens(row) == ["_A", "da"]


@pytest.mark.parametrize("subject", [None, "Ebor"])
def test_a_subject_that_is_not_in_the_prompt_is_unknown(subject: str | None) -> None:
    assert encoder().pair(PROMPT, "Ebor", subject).subject is None


def test_a_tokenizer_that_can_not_tell_where_a_subject_stands() -> None:
    editor = BaftEditor(tiny_model(vocab_size=384), ByT5Tokenizer(), BaftConfig(rank=2, layers=(1,)))
    editor.check([EditRequest(prompt=PROMPT, target="Ebor")])
    with pytest.raises(ValueError, match=r"^request 0: tokenizer: expected a fast one, .* got ByT5Tokenizer: load"):
        editor.check([EditRequest(prompt=PROMPT, target="Ebor", subject="Norland")])


# -- templates --


def test_a_template_surrounds_the_prompt_and_the_target_follows_it() -> None:
    row = encoder(template="Where is {prompt}?\n").pair("Ada", "in Arvik")
    assert "".join(prompt_and_target(row)[0]) == "<s>Where_is_Ada?\n"
    assert prompt_and_target(row)[1] == ["in", "_Arvik", "</s>"]


# -- batches --


def batch_of(side: str) -> Any:
    encode = encoder()
    rows = [encode.pair("Bob", "Ada", "Bob"), encode.pair(PROMPT, "Ada", "Norland")]
    return encode.batch(rows, "cpu", side=side)


def marks(mask: Tensor) -> list[str]:
    return ["".join("x" if cell else "." for cell in row) for row in mask.tolist()]


def test_a_batch_padded_on_the_right() -> None:
    batch = batch_of("right")
    assert ["".join(names(row)) for row in batch.ids.tolist()] == [
        "<s>Bob_Ada</s><pad><pad><pad>",
        "<s>The_capital_of_Norland_is_Ada</s>",
    ]
    assert marks(batch.attention_mask) == ["xxxxxx...", "xxxxxxxxx"]
    assert marks(batch.tokens.prompt) == ["xxx......", "xxxxxx..."]
    assert marks(batch.tokens.subject) == [".xx......", "....x...."]
    assert marks(batch.labels != IGNORED) == ["...xxx...", "......xxx"]
    assert torch.equal(batch.labels[batch.labels != IGNORED], batch.ids[batch.labels != IGNORED])


def test_a_batch_padded_on_the_left() -> None:
    batch = batch_of("left")
    assert ["".join(names(row)) for row in batch.ids.tolist()] == [
        "<pad><pad><pad><s>Bob_Ada</s>",
        "<s>The_capital_of_Norland_is_Ada</s>",
    ]
    assert marks(batch.attention_mask) == ["...xxxxxx", "xxxxxxxxx"]
    assert marks(batch.tokens.prompt) == ["...xxx...", "xxxxxx..."]
    assert marks(batch.tokens.subject) == ["....xx...", "....x...."]
    assert marks(batch.labels != IGNORED) == ["......xxx", "......xxx"]


def test_dtypes_of_a_batch() -> None:
    batch = batch_of("right")
    assert batch.ids.dtype == batch.labels.dtype == batch.attention_mask.dtype == torch.long
    assert batch.tokens.prompt.dtype == batch.tokens.subject.dtype == torch.bool


def test_the_subjects_of_a_batch_are_known_if_each_is() -> None:
    encode = encoder()
    rows = [encode.prompt("Bob", "Bob"), encode.prompt("Ada")]
    assert encode.batch(rows[:1], "cpu").tokens.subject is not None
    assert encode.batch(rows, "cpu").tokens.subject is None


def test_a_batch_can_be_cut() -> None:
    for batch in (batch_of("right"), encoder().batch([encoder().prompt("Bob"), encoder().prompt("Ada")], "cpu")):
        part = batch[1:]
        assert torch.equal(part.ids, batch.ids[1:])
        assert torch.equal(part.attention_mask, batch.attention_mask[1:])
        assert torch.equal(part.labels, batch.labels[1:])
        assert torch.equal(part.tokens.prompt, batch.tokens.prompt[1:])
        assert (part.tokens.subject is None) == (batch.tokens.subject is None)


# -- chunks --


def test_a_target_in_chunks_each_behind_those_before_it() -> None:
    row = encoder().pair(PROMPT, "Ada Lund, Bob Stone", "Norland")
    chunks = in_chunks(row, 3)
    learned = [chunk.ids[chunk.answer_start :] for chunk in chunks]
    assert [len(ids) for ids in learned[:-1]] == [3] * (len(chunks) - 1)
    assert 0 < len(learned[-1]) <= 3 < len(row.ids) - row.prompt_length
    assert sum(learned, ()) == row.ids[row.prompt_length :]
    for chunk in chunks:
        assert chunk.ids == row.ids[: len(chunk.ids)]
        assert (chunk.prompt_length, chunk.subject) == (row.prompt_length, row.subject)
    assert chunks[-1].ids == row.ids
    batch = encoder().batch(chunks, "cpu")
    for chunk, ids, labels in zip(chunks, batch.ids, batch.labels, strict=True):
        assert labels[labels != IGNORED].tolist() == list(chunk.ids[chunk.answer_start :])
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED])


@pytest.mark.parametrize("size", [None, 100])
def test_a_target_that_is_one_chunk(size: int | None) -> None:
    row = encoder().pair(PROMPT, "Ada Lund, Bob Stone", "Norland")
    assert in_chunks(row, size) == (row,)


@pytest.mark.parametrize("positions", ["all", "prompt", "last", "subject", "f1+l2"])
def test_a_chunk_is_edited_at_the_places_of_the_whole(positions: str) -> None:
    row = encoder().pair(PROMPT, "Ada Lund, Bob Stone", "Norland")
    whole = _edited(row, Positions(positions))
    for chunk in in_chunks(row, 2):
        assert _edited(chunk, Positions(positions)) == whole[: len(chunk.ids)]
