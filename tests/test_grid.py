"""The grid of tokens: every text at its cells, apart from its neighbours, edited as if alone, little padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baft.engine.encoding import Encoded
from baft.engine.grid import Grid, lay_out
from baft.positions import Positions, PromptTokens

PAD = 0
SPECS = ("all", "prompt", "last", "subject", "f1+l2", "f3", "l9")


def text(
    length: int, first: int = 1, *, prompt: int | None = None, subject: tuple[int, int] | None = (0, 0)
) -> Encoded:
    """A text of ``length`` tokens, none of them padding."""
    return Encoded(tuple(range(first, first + length)), length if prompt is None else prompt, subject)


def texts_of(lengths: Sequence[int]) -> list[Encoded]:
    return [text(length, 1 + 100 * index) for index, length in enumerate(lengths)]


def grid_of(texts: Sequence[Encoded], sets: Sequence[int] | None = None, **options: Any) -> Grid:
    given = {"positions": Positions("all"), "pad_id": PAD, "device": torch.device("cpu"), "side_by_side": True}
    return lay_out(texts, sets or [0] * len(texts), **{**given, **options})


def runs(row: Sequence[int]) -> list[int]:
    """Lengths of what attention keeps apart in a row: each stretch in which positions count up by one."""
    starts = [column for column, at in enumerate(row) if column == 0 or at != row[column - 1] + 1]
    assert all(row[start] == 0 for start in starts)
    return [end - start for start, end in zip(starts, [*starts[1:], len(row)], strict=True)]


@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(0, 3)), min_size=1, max_size=12),
    st.booleans(),
)
def test_every_text_is_whole_at_its_cells_in_a_row_of_its_set(drawn: list[tuple[int, int]], side_by_side: bool) -> None:
    texts, sets = texts_of([length for length, _ in drawn]), [chosen for _, chosen in drawn]
    grid = grid_of(texts, sets, side_by_side=side_by_side)
    rows, width = grid.ids.shape
    taken: list[int] = []
    for number, one in enumerate(texts):
        cells = grid.cells(number, 0, len(one.ids))
        taken += cells
        assert tuple(grid.ids.flatten()[cells].tolist()) == one.ids
        assert cells[0] // width == cells[-1] // width, "no text goes beyond its row"
        assert grid.sets[cells[0] // width] == sets[number]
        assert grid.cells(number, 1, 3) == range(cells[0] + 1, cells[0] + 3)
    assert len(set(taken)) == len(taken) == grid.tokens
    padding = sorted(set(range(rows * width)) - set(taken))
    assert not (grid.ids.flatten()[padding] != PAD).any()
    assert grid.edited is None


@given(st.lists(st.integers(1, 70), min_size=1, max_size=12))
def test_positions_start_anew_at_each_text_and_at_the_padding_behind(lengths: list[int]) -> None:
    grid = grid_of(texts_of(lengths))
    assert grid.positions is not None
    width = grid.ids.shape[1]
    of_texts: list[int] = []
    for row, (ids, positions) in enumerate(zip(grid.ids.tolist(), grid.positions.tolist(), strict=True)):
        parts = runs(positions)
        inside = [k for k, start in enumerate(grid.starts) if start // width == row]
        used = [lengths[k] for k in sorted(inside, key=lambda k: grid.starts[k])]
        assert parts[: len(used)] == used
        assert sum(parts[len(used) :]) == ids.count(PAD)
        of_texts += used
    assert sorted(of_texts) == sorted(lengths)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_padding_has_no_position_that_no_text_has(lengths: list[int]) -> None:
    # A model's table of learned positions may end at the longest text.
    grid = grid_of(texts_of(lengths))
    assert grid.positions is not None
    assert int(grid.positions.max()) < max(lengths)


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ([7], (1, 7)),
        ([100], (1, 100)),
        ([100, 60, 40, 30], (3, 100)),
        ([9, 7], (1, 16)),
        ([5, 3], (2, 5)),
        ([8, 8, 8, 8], (1, 32)),
        ([17, 16, 15], (1, 48)),
    ],
)
def test_rows_are_as_wide_as_leaves_the_least_padding(lengths: list[int], shape: tuple[int, int]) -> None:
    assert grid_of(texts_of(lengths)).ids.shape == shape


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=10))
def test_texts_side_by_side_never_take_more_cells_than_one_a_row(drawn: list[tuple[int, int]]) -> None:
    texts, sets = texts_of([length for length, _ in drawn]), [chosen for _, chosen in drawn]
    assert grid_of(texts, sets).ids.numel() <= grid_of(texts, sets, side_by_side=False).ids.numel()


def test_texts_of_different_sets_never_share_a_row() -> None:
    texts = texts_of([9, 7, 9, 7])
    grid = grid_of(texts, [3, 3, 1, 1])
    assert (grid.ids.shape, grid.sets.tolist()) == ((2, 16), [3, 1])
    assert grid_of(texts, [3, 1, 0, 2]).ids.shape == (4, 9)


def test_one_text_a_row_is_masked_behind_its_end() -> None:
    grid = grid_of(texts_of([3, 5, 2]), [2, 0, 2], side_by_side=False)
    assert grid.starts == (0, 5, 10)
    assert grid.sets.tolist() == [2, 0, 2]
    assert grid.positions is None
    assert grid.attention_mask is not None
    assert grid.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert grid.tokens == 10
    inputs = grid.inputs()
    assert inputs.keys() == {"input_ids", "attention_mask", "use_cache"}
    assert inputs["attention_mask"] is grid.attention_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_lets_each_token_see_its_text_up_to_itself(dtype: torch.dtype) -> None:
    lengths = [5, 4, 9, 3]
    grid = grid_of(texts_of(lengths), [0, 0, 1, 0], masked_in=dtype)
    rows, width = grid.ids.shape
    assert grid.attention_mask is not None
    assert (grid.attention_mask.shape, grid.attention_mask.dtype) == ((rows, 1, width, width), dtype)
    seen = grid.attention_mask == 0
    assert (grid.attention_mask[~seen] == torch.finfo(dtype).min).all()
    for number, length in enumerate(lengths):
        for k, cell in enumerate(grid.cells(number, 0, length)):
            of_token = seen[cell // width, 0, cell % width].nonzero().flatten() + cell // width * width
            assert of_token.tolist() == list(grid.cells(number, 0, k + 1))
    # A softmax over nothing is NaN: padding sees itself.
    assert seen.any(-1).all()


def test_side_by_side_a_model_is_given_positions_and_what_mask_there_is() -> None:
    for masked_in in (None, torch.float32):
        grid = grid_of(texts_of([9, 7]), masked_in=masked_in)
        inputs = grid.inputs()
        assert inputs["position_ids"] is grid.positions
        assert inputs["attention_mask"] is grid.attention_mask
        assert (grid.attention_mask is None) == (masked_in is None)
        assert inputs["use_cache"] is False


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_each_text_is_edited_where_it_would_be_alone(spec: str, side_by_side: bool) -> None:
    texts = [
        text(9, 1, prompt=6, subject=(1, 3)),
        text(4, 20, prompt=1, subject=(0, 1)),
        text(12, 40, subject=(0, 0)),
        text(7, 60, prompt=6, subject=(5, 6)),
    ]
    positions = Positions(spec)
    grid = grid_of(texts, positions=positions, side_by_side=side_by_side)
    edited = torch.ones_like(grid.ids, dtype=torch.bool) if grid.edited is None else grid.edited
    assert (grid.edited is None) == (spec == "all")
    expected = torch.zeros_like(edited).flatten() if spec != "all" else torch.ones_like(edited).flatten()
    for number, one in enumerate(texts):
        columns = torch.arange(len(one.ids)).unsqueeze(0)
        assert one.subject is not None
        subject = (columns >= one.subject[0]) & (columns < one.subject[1])
        alone = positions.select(PromptTokens(columns < one.prompt_length, subject))
        expected[grid.cells(number, 0, len(one.ids))] = alone[0]
    assert torch.equal(edited.flatten(), expected)


def test_a_text_whose_subject_is_not_known() -> None:
    texts = [text(5, subject=(1, 2)), text(5, 9, subject=None)]
    with pytest.raises(ValueError, match=r'^positions="subject": expected to be told where the subject stands'):
        grid_of(texts, positions=Positions("subject"))
    assert grid_of(texts, positions=Positions("last")).edited is not None
