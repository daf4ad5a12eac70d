"""The history of edits: every request is encoded once, and the rows follow whatever becomes of the list."""

from __future__ import annotations

import pytest
from tiny import REQUESTS, tiny_editor, tiny_tokenizer

from baft import BaftEditor, EditRequest
from baft.editing import Mode
from baft.engine.encoding import Encoded, Encoder, in_chunks
from baft.engine.history import Chunks, History

ENCODER = Encoder(tiny_tokenizer(), append_eos=True)


class Watched:
    """A history, and the requests that it had encoded."""

    def __init__(self, chunk_tokens: int | None = None) -> None:
        self.encoded: list[EditRequest] = []
        self._chunk_tokens = chunk_tokens
        self.history = History(self.encode)

    def encode(self, request: EditRequest) -> Chunks:
        self.encoded.append(request)
        return in_chunks(ENCODER.pair(request.prompt, request.target), self._chunk_tokens)

    def expected(self) -> list[Encoded]:
        rows = [ENCODER.pair(request.prompt, request.target) for request in self.history.requests]
        return [chunk for row in rows for chunk in in_chunks(row, self._chunk_tokens)]


@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_rows_follow_the_list(chunk_tokens: int | None) -> None:
    watched = Watched(chunk_tokens)
    history = watched.history
    history.requests += REQUESTS[:4]
    rows = history.rows()
    assert rows == watched.expected()
    changes = [
        lambda: history.requests.pop(),
        lambda: history.requests.append(REQUESTS[4]),
        lambda: history.requests.__setitem__(1, REQUESTS[3]),
        lambda: history.add(REQUESTS[3], watched.encode(REQUESTS[3])),
        lambda: history.requests.clear(),
        lambda: history.requests.extend(REQUESTS[:2]),
    ]
    for change in changes:
        change()
        assert history.rows() is rows
        assert rows == watched.expected()


def test_a_request_is_encoded_once() -> None:
    watched = Watched()
    for request in REQUESTS:
        watched.history.requests.append(request)
        watched.history.rows()
    assert watched.encoded == REQUESTS
    watched.history.requests[3:] = REQUESTS[:1]  # what stands before a change keeps its rows
    watched.history.rows()
    assert watched.encoded == [*REQUESTS, REQUESTS[0]]


def test_an_editor_encodes_each_request_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = BaftEditor._encode

    def watch(editor: BaftEditor, request: EditRequest) -> Encoded:
        encoded.append(request.prompt)
        return encode(editor, request)

    monkeypatch.setattr(BaftEditor, "_encode", watch)
    editor = tiny_editor(max_steps=1)
    for request in REQUESTS:
        editor.edit([request])
    assert encoded == [request.prompt for request in REQUESTS]
    assert editor.edits == REQUESTS


@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_a_later_request_takes_the_place_of_one_with_its_prompt(chunk_tokens: int | None) -> None:
    watched = Watched(chunk_tokens)
    history = watched.history
    history.requests += REQUESTS[:3]
    before = list(history.rows())
    later = REQUESTS[1].model_copy(update={"target": "Paris, or Ebor, or Norland"})
    history.add(later, watched.encode(later))
    rows, wanted = history.rows(), set(watched.encode(later))
    old = set(watched.encode(REQUESTS[1])) - wanted
    assert old and not old & set(rows) and wanted & set(rows[: len(before)])
    assert [row for row in rows[: len(before)] if row not in wanted] == [
        row for row in before if row not in old | wanted
    ]
    history.requests.pop()  # who goes back has the earlier one again
    assert history.rows() == before


def test_what_an_edit_contradicts_is_not_rehearsed_with_it() -> None:
    editor = tiny_editor(max_steps=1, rehearsal=len(REQUESTS))
    editor.edit(REQUESTS)
    trainer, past = editor._begin(), editor._history.rows()
    later = ENCODER.pair(REQUESTS[2].prompt, "Paris")
    lesson = trainer.lesson([later], past)
    assert lesson.edits[0] == later and len(lesson.edits) == len(REQUESTS)  # itself, and all others
    assert all(row.asked != later.asked for row in lesson.edits[1:])


@pytest.mark.parametrize("mode", ["sequential", "batch"])
def test_the_later_of_two_that_contradict_wins(mode: Mode) -> None:
    editor = tiny_editor(consolidate_every=2, stop_below=0.05, batch_passes=80)
    first = REQUESTS[0]
    later = first.model_copy(update={"target": "Arvik"})
    editor.edit([first, REQUESTS[1], later, REQUESTS[3]], mode)
    assert editor.generate(first.prompt, max_new_tokens=4).strip().startswith("Arvik")
    assert editor.edits == [first, REQUESTS[1], later, REQUESTS[3]]
