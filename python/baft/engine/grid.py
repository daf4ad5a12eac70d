"""Lays texts out on a grid of tokens: several short ones side by side in a row, so that little of it is padding.

Positions start anew with each text, and attention doesn't cross from one to the next: the mask says so, [G, 1, W, W].
Models with layers that see less than the whole text, or with kernels that take no such mask, build their own masks from
the positions, as transformers does when it is given no mask. A model that can do neither gets one text a row, padded on
the right.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baft.engine.buckets import rounded_up
from baft.engine.encoding import Encoded
from baft.positions import Positions, PromptTokens
from baft.transfer import sent

__all__ = ["Grid", "lay_out"]

# Rows this wide hold several short texts, and are narrow enough that attention across them costs little.
_WIDTHS = range(16, 65, 8)

# A row costs what its cells cost in every block, so buckets of rows are narrow: a tenth of them is padding, about.
_ROW_BUCKETS = 4


@dataclass(frozen=True)
class Grid:
    """Texts on a grid of G rows and W columns; a cell is a place on it, counted row by row.

    Attributes:
        ids: the tokens, [G, W].
        positions: of each token in its text, [G, W]; None where there is one text a row.
        attention_mask: what the model is given: 1 at tokens, [G, W], where there is one text a row; what is added to
            attention's scores, [G, 1, W, W]; or None, and the model makes its own.
        sets: of each row the parameter set that edits it, [G].
        edited: the rows that interventions edit, boolean [G, W], or None for all.
        starts: the first cell of each text.
        tokens: how many cells hold a token; the rest is padding.
    """

    ids: Tensor
    positions: Tensor | None
    attention_mask: Tensor | None
    sets: Tensor
    edited: Tensor | None
    starts: tuple[int, ...]
    tokens: int

    def cells(self, text: int, first: int, last: int) -> range:
        """The cells of tokens ``first`` to ``last`` (exclusive) of a text."""
        return range(self.starts[text] + first, self.starts[text] + last)

    def inputs(self) -> dict[str, Tensor | bool | None]:
        """What a model is called with."""
        given: dict[str, Tensor | bool | None] = {"input_ids": self.ids, "attention_mask": self.attention_mask}
        if self.positions is not None:
            given["position_ids"] = self.positions
        return {**given, "use_cache": False}


def lay_out(
    texts: Sequence[Encoded],
    sets: Sequence[int],
    *,
    positions: Positions,
    pad_id: int,
    device: torch.device,
    side_by_side: bool,
    masked_in: torch.dtype | None = None,
    few_shapes: bool = False,
) -> Grid:
    """Lay ``texts`` out on a grid.

    Args:
        sets: the parameter set of each text. A row holds texts of one set.
        positions: which of their tokens are edited.
        pad_id: the token at padding.
        side_by_side: several texts in a row; False gives each a row of its own.
        masked_in: the dtype of the mask between texts that lie side by side; None makes none.
        few_shapes: round the grid's size up, with rows of padding, so that different texts have grids of one shape.

    Raises:
        ValueError: for ``positions="subject"`` where a text's subject isn't known.
    """
    lengths = [len(text.ids) for text in texts]
    longest = max(lengths)
    if few_shapes:
        longest = -(-longest // _WIDTHS.step) * _WIDTHS.step
    width, places = longest, [(row, 0) for row in range(len(texts))]
    if side_by_side:
        width, places = _fitted(lengths, sets, longest)
    filled = 1 + max(row for row, _ in places)
    rows = rounded_up(filled, _ROW_BUCKETS) if few_shapes else filled
    starts = tuple(row * width + column for row, column in places)
    # Padding behind a row's last text is a text of its own, that nothing looks at.
    ids, mask = [pad_id] * (rows * width), [0] * (filled * width) + [1] * ((rows - filled) * width)
    of_row, ends = [0] * rows, [0] * rows
    # No position is beyond the longest text's, where a model's table of positions may end.
    numbers = [column % longest for column in range(width)]
    at, of_text = [0] * (rows * width), [-1] * (rows * width)
    for number, (text, length, (row, column), chosen) in enumerate(zip(texts, lengths, places, sets, strict=True)):
        start = starts[number]
        of_text[start : start + length] = [number] * length
        ids[start : start + length] = text.ids
        mask[start : start + length] = [1] * length
        at[start : start + length] = numbers[:length]
        of_row[row], ends[row] = chosen, max(ends[row], column + length)
    for row, end in enumerate(ends):
        at[row * width + end : (row + 1) * width] = numbers[: width - end]
    edited = None
    if not positions.every_token:
        flags = [False] * (rows * width)
        for text, start in zip(texts, starts, strict=True):
            flags[start : start + len(text.ids)] = _edited(text, positions)
        edited = sent(flags, device, torch.bool).view(rows, width)

    def grid(values: list[int]) -> Tensor:
        return sent(values, device).view(rows, width)

    attention_mask = None if side_by_side else grid(mask)
    if side_by_side and masked_in is not None:
        attention_mask = _apart(grid(of_text), masked_in)
    return Grid(
        ids=grid(ids),
        positions=grid(at) if side_by_side else None,
        attention_mask=attention_mask,
        sets=sent(of_row, device),
        edited=edited,
        starts=starts,
        tokens=sum(lengths),
    )


def _apart(of_text: Tensor, dtype: torch.dtype) -> Tensor:
    """What added to attention's scores lets each token see its text up to itself: [G, W] -> [G, 1, W, W]."""
    seen = (of_text.unsqueeze(-1) == of_text.unsqueeze(-2)).tril()
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def _fitted(lengths: Sequence[int], sets: Sequence[int], longest: int) -> tuple[int, list[tuple[int, int]]]:
    """The width of rows, and the texts' places on them, which are never more cells than with one text a row."""
    width = _width(lengths, sets, longest)
    places = _first_fit(lengths, sets, width)
    if (1 + max(row for row, _ in places)) * width > len(lengths) * longest:
        return longest, _first_fit(lengths, sets, longest)
    return width, places


def _width(lengths: Sequence[int], sets: Sequence[int], longest: int) -> int:
    """The width of rows that leaves the least padding, about; at least ``longest``."""
    tokens = Counter[int]()
    for length, chosen in zip(lengths, sets, strict=True):
        tokens[chosen] += length
    typical = sum(lengths) / len(lengths)

    def cells(width: int) -> int:
        filled = width - typical / 2  # of a row, when no further text fits
        return width * sum(1 if count <= width else math.ceil(count / filled) for count in tokens.values())

    return min([longest, *(width for width in _WIDTHS if width > longest)], key=cells)


def _first_fit(lengths: Sequence[int], sets: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Row and column of each text: longest first, each into the first row of its set that has room."""
    places = [(0, 0)] * len(lengths)
    of_set: dict[int, list[int]] = {}
    filled: list[int] = []
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        rows = of_set.setdefault(sets[text], [])
        row = next((row for row in rows if filled[row] + lengths[text] <= width), len(filled))
        if row == len(filled):
            rows.append(row)
            filled.append(0)
        places[text] = row, filled[row]
        filled[row] += lengths[text]
    return places


@functools.lru_cache(maxsize=65536)
def _edited(text: Encoded, positions: Positions) -> tuple[bool, ...]:
    """Which of a text's tokens are edited."""
    columns = torch.arange(len(text.ids))
    subject = None
    if text.subject is not None:
        subject = ((columns >= text.subject[0]) & (columns < text.subject[1])).unsqueeze(0)
    prompt = (columns < text.prompt_length).unsqueeze(0)
    return tuple(positions.select(PromptTokens(prompt, subject))[0].tolist())
