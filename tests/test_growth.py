"""A rank that grows with the edits: what is added changes nothing at first, learns, and is taken back with the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from looks import assert_same_state, logits, said, targets
from tiny import REQUESTS, WIDTH, tiny_editor

from baft import BaftEditor, EditRequest
from baft.engine.growth import grow
from baft_kernels import orthonormality_error

TWO, THREE = REQUESTS[:2], REQUESTS[:3]


def ranks(editor: BaftEditor, requests: list[EditRequest]) -> list[int]:
    """The rank after each edit."""
    found: list[int] = []
    editor.edit(requests, on_edit=lambda _: found.append(editor.attachment.rank))
    return found


def test_the_rank_grows_up_to_the_highest() -> None:
    editor = tiny_editor(layers=(0, 2), grow_every=2, grow_by=3, max_rank=12, max_steps=2)
    assert ranks(editor, [*REQUESTS, REQUESTS[0]]) == [8, 11, 11, 12, 12, 12]
    assert all(orthonormality_error(i.basis) <= 1e-6 for i in editor.interventions.values())
    assert ranks(tiny_editor(grow_every=1, grow_by=20, max_steps=1), REQUESTS[:3]) == [28, WIDTH, WIDTH]


@pytest.mark.parametrize("gate_fn", ["sigmoid", "none"])
def test_growth_changes_nothing_but_the_rank(gate_fn: str) -> None:
    editor = tiny_editor(grow_every=99, grow_by=6, growth_gate_bias=-5.0, gate_fn=gate_fn, balance_weight=0.1)
    editor.edit(TWO)
    before, state = logits(editor), editor.state()
    grow(editor._begin(), WIDTH)
    torch.testing.assert_close(logits(editor), before, rtol=1e-4, atol=1e-4)
    assert said(editor, TWO) == targets(TWO)
    grown = editor.state()
    for name, value in state.items():
        if value.ndim and name.startswith(("layers.", "optimizer.", "usage.")):
            assert torch.equal(grown[name][:8], value), name
            assert len(grown[name]) == 14
    if gate_fn == "sigmoid":
        # Over unrelated texts their logits have a mean of -5; w is recorded of the last pass.
        with editor.attachment.recording() as records:
            editor.model(**editor.tokenizer("Arvik is in Norland.", return_tensors="pt"))
        assert records[1].weights[..., 8:].mean() < 0.1 < records[1].weights[..., :8].mean()


def test_new_bases_learn() -> None:
    editor = tiny_editor(grow_every=1, grow_by=4, rank=1, learning_rate=0.1, max_steps=10)
    editor.edit(THREE)
    intervention = editor.attachment.interventions[1]
    assert len(intervention.basis) == 13
    learned = (intervention.source - intervention.basis).norm(dim=-1)
    assert learned[:9].min() > 1e-2  # the last four came after the last edit


def test_going_back_to_a_state_before_growth() -> None:
    editor = tiny_editor(grow_every=2, grow_by=3, max_steps=4, balance_weight=0.1)
    editor.edit(TWO[:1])
    before = editor.state()
    editor.edit(REQUESTS[1:4])
    after = editor.state()
    assert editor.attachment.rank == 14
    editor.load_state(before)
    editor.edits = TWO[:1]
    assert editor.attachment.rank == 8
    assert_same_state(editor.state(), before)
    editor.edit(REQUESTS[1:4])
    assert_same_state(editor.state(), after)


def test_a_state_of_another_rank_where_nothing_grows() -> None:
    state = tiny_editor(rank=9).state()
    for changes in ({}, {"grow_every": 1, "max_rank": 8}, {"grow_every": 1, "rank": 10}):
        editor = tiny_editor(**changes)
        before = editor.state()
        with pytest.raises(ValueError, match=r"^layers.1.basis: expected shape \[\d+, 32\], got \[9, 32\]$"):
            editor.load_state(state)
        assert_same_state(editor.state(), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_rank": 7}, "max_rank: expected at least rank = 8, got 7"),
        ({"max_rank": WIDTH + 1}, f"^max_rank: expected at most {WIDTH}, the model's width, got {WIDTH + 1}$"),
        ({"grow_every": 1, "gate_fn": "softmax"}, "grow_every: expected 0 with softmax gates"),
    ],
)
def test_growth_that_can_not_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_editor(**changes)
