"""Unrelated texts that the unedited model writes itself: what they begin behind, and where they end."""

from __future__ import annotations

import copy
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from looks import assert_same_state
from tiny import BOS, EOS, PAD, REQUESTS, UNRELATED, tiny_editor, tiny_model, tiny_tokenizer
from tokenizers import normalizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from baft import BaftConfig, BaftEditor, EditRequest
from baft.engine import self_written
from baft.engine.encoding import Encoder
from baft.engine.self_written import write_texts
from baft.runs.folder import RunFolder
from baft.runs.start import RunWords, start


def tokenizer_of(*special: str, chat: bool = False, **tokens: bool) -> PreTrainedTokenizerFast:
    """One that knows these special tokens, which are none of the model's."""
    tokenizer = copy.deepcopy(tiny_tokenizer(**tokens))
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = "{{ messages }}" if chat else None
    return tokenizer


def begun_behind(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens that the model is given, with no model that would have to know them."""
    seen: list[list[int]] = []

    def write(model: object, encoder: Encoder, ids: torch.Tensor, *_: object, **__: Any) -> torch.Tensor:
        seen.extend(ids.tolist())
        return torch.cat([ids, torch.full((len(ids), 1), tokenizer("Ada")["input_ids"][-1])], 1)

    monkeypatch.setattr(self_written, "generate", write)
    assert set(write_texts(tiny_model(), Encoder(tokenizer, append_eos=True), 256, 0)) != {""}
    assert all(ids == seen[0] for ids in seen)
    return tokenizer.convert_ids_to_tokens(seen[0])


@pytest.mark.parametrize(
    ("special", "chat", "tokens", "expected"),
    [
        ((), False, {}, [BOS]),
        ((), True, {}, [BOS]),
        ((), False, {"bos": False}, [EOS]),
        # In a chat EOS ends a turn.
        ((), True, {"bos": False}, ["\u010a"]),
        (("<|endoftext|>",), True, {"bos": False}, ["<|endoftext|>"]),
        # Where <|im_start|> is BOS.
        (("<|endoftext|>",), True, {}, ["<|endoftext|>"]),
        ((), False, {"bos": False, "eos": False}, ["\u010a"]),
    ],
)
def test_texts_begin_behind_what_a_document_begins_behind(
    special: tuple[str, ...],
    chat: bool,
    tokens: dict[str, bool],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert begun_behind(tokenizer_of(*special, chat=chat, **tokens), monkeypatch) == expected


def test_a_tokenizer_with_nothing_to_begin_behind_is_refused() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer(bos=False, eos=False))
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(ValueError, match=r"^unrelated: expected texts, since the tokenizer knows nothing"):
        write_texts(tiny_model(), Encoder(tokenizer, append_eos=True), 256, 0)


@pytest.mark.parametrize("end", ["<|im_start|>", BOS, EOS, PAD])
def test_a_text_ends_before_the_first_special_token(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chat's next turn the words "user" and "assistant" would be left."""
    tokenizer = tokenizer_of("<|im_start|>")
    rows = [f"{BOS}{text}" for text in (f"Bob is king{end}user\n", f"{end}Ada", "1 2", f"{end}", f" {end}")]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows]
    width = max(map(len, ids))
    padded = torch.tensor([[*own, *[tokenizer.pad_token_id] * (width - len(own))] for own in ids])
    monkeypatch.setattr(self_written, "generate", lambda *_, **__: padded)
    assert write_texts(tiny_model(), Encoder(tokenizer, append_eos=True), 256, 0) == ["Bob is king", "1 2"]


def test_a_model_that_writes_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_written, "generate", lambda *_, **__: torch.tensor([[1, 2], [1, 2]]))
    editor = BaftEditor(tiny_model(), tiny_tokenizer(), BaftConfig(rank=2, layers=(1,)))
    with pytest.raises(
        ValueError, match=r"^unrelated: expected texts, since the unedited model wrote none of its own$"
    ):
        editor.edit([EditRequest(prompt="Ada is", target="Bob")])


# -- in an editor that was given none, or few --


def test_the_unedited_model_writes_unrelated_texts_itself() -> None:
    def written(training: bool) -> dict[str, Tensor]:
        model = tiny_model("opt", dropout=0.3).train(training)
        config = BaftConfig(rank=2, layers=(1,), locality_weight=1.0, unrelated_per_step=2, max_steps=1)
        editor = BaftEditor(model, tiny_tokenizer(), config)
        editor.edit(REQUESTS[:1])
        return editor.state()

    expected = written(training=False)
    torch.rand(5)
    assert_same_state(written(training=True), expected)


def test_no_unrelated_texts_are_allowed_where_no_loss_looks_at_them() -> None:
    config = BaftConfig(rank=2, layers=(1,), locality_weight=0.0, max_steps=1)
    editor = BaftEditor(tiny_model(), tiny_tokenizer(), config, unrelated=[])
    editor.edit(REQUESTS[:1])  # with gates that were made for texts of the model's own


def test_few_unrelated_texts_are_filled_up_with_what_the_model_writes_of_other_things() -> None:
    editor = tiny_editor()
    assert editor.unrelated_texts == (len(UNRELATED), 0)
    editor.fill_unrelated(REQUESTS)
    assert editor.unrelated_texts is not None
    given, written = editor.unrelated_texts
    assert given == len(UNRELATED) and 100 < written <= 256 - given
    editor.edit(REQUESTS[:1])
    assert editor._trainer is not None
    texts = editor._trainer.unrelated.texts
    assert texts[:given] == tuple(UNRELATED) and len(texts) > 100
    subjects = [request.subject for request in REQUESTS]
    assert not [text for text in texts[given:] if any(subject and subject in text for subject in subjects)]


def test_where_the_model_writes_of_nothing_but_the_edits_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaftEditor, "_write_unrelated", lambda self, number: ["In Norland."] * number)
    editor = tiny_editor()
    editor.fill_unrelated(REQUESTS)
    assert editor.unrelated_texts == (len(UNRELATED), 0)
    editor = BaftEditor(tiny_model(), tiny_tokenizer(), BaftConfig(rank=2, layers=(1,)))
    assert editor.unrelated_texts is None
    editor.fill_unrelated(REQUESTS)
    assert editor.unrelated_texts == (0, 256)


def test_a_run_that_goes_on_has_the_texts_of_its_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another number of threads, say, it would write others, and train on them."""
    tiny_model(max_position_embeddings=128).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    requests = tmp_path / "requests.jsonl"
    requests.write_text("\n".join(request.model_dump_json() for request in REQUESTS))
    words = RunWords(
        model=str(tmp_path / "model"),
        dataset=str(requests),
        mode="sequential",
        config=BaftConfig(rank=2, layers=(1,)),
        edits=2,
    )

    def pool(out: Path) -> list[str]:
        with RunFolder(out) as folder:
            editor = start(words, folder).editor
        assert isinstance(editor, BaftEditor) and editor._unrelated
        return list(editor._unrelated)

    first = pool(tmp_path / "run")
    assert len(first) > 100

    def write(*_: object) -> list[str]:
        return ["Otherwise."] * 200

    monkeypatch.setattr("baft.trained.write_texts", write)
    assert pool(tmp_path / "run") == first
    with closing(sqlite3.connect(tmp_path / "run" / "journal.sqlite", isolation_level=None)) as journal:
        journal.execute("DELETE FROM self_written")  # as an older version, or a process that was killed that early
    assert "Otherwise." in pool(tmp_path / "run")
    monkeypatch.undo()
    assert "Otherwise." in pool(tmp_path / "run")


def test_enough_unrelated_texts_are_left_as_they_are() -> None:
    texts = [f"{number} is a number." for number in range(256)]
    editor = BaftEditor(tiny_model(), tiny_tokenizer(), BaftConfig(rank=2, layers=(1,)), unrelated=texts)
    editor.fill_unrelated(REQUESTS)
    assert editor.unrelated_texts == (256, 0)
