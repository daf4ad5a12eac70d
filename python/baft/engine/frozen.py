"""Remembers what a frozen model computes of a text, for as long as it is asked for again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from baft.attach import Attachment
from baft.engine.encoding import Encoded
from baft.engine.grid import Grid
from baft.engine.replay import Replay
from baft.engine.transfer import sent

__all__ = ["FrozenStates"]

Tokens = tuple[int, ...]


class FrozenStates:
    """By text, what the first edited block returns before its edit, and what the unedited model's head is given.

    A text is always computed in the same company, so that what is remembered doesn't depend on what was asked for
    before: a run that was interrupted and resumed gets the same bits. When ``budget`` is used up all is forgotten.

    Args:
        replay: runs the model.
        attachment: its interventions, which are switched off meanwhile.
        lay_out: makes a grid of texts.
        company: texts that are computed together; every other text is computed alone.
        budget: bytes to remember in.
    """

    def __init__(
        self,
        replay: Replay,
        attachment: Attachment,
        lay_out: Callable[[Sequence[Encoded]], Grid],
        company: Iterable[Sequence[Encoded]],
        budget: int,
    ) -> None:
        self._replay = replay
        self._attachment = attachment
        self._lay_out = lay_out
        self._company = {text.ids: texts for texts in company for text in texts}
        self._prefixes = _Vectors(budget // 2)
        self._head_inputs = _Vectors(budget // 2)
        self._weights = self._versions()

    def prefix(self, texts: Sequence[Encoded], grid: Grid) -> Tensor:
        """The first edited block's output at each cell of the grid that ``texts`` lie on, [G, W, d]."""
        self._know(texts)
        # At padding stands a token of the row's own: nobody looks, but one that isn't finite would spread in the row.
        width = grid.ids.shape[1]
        index = [self._prefixes.start(texts[0].ids)] * grid.ids.numel()
        for text, start in zip(texts, grid.starts, strict=True):
            row = start - start % width
            index[row : row + width] = [self._prefixes.start(text.ids)] * width
        for text, start in zip(texts, grid.starts, strict=True):
            first = self._prefixes.start(text.ids)
            index[start : start + len(text.ids)] = range(first, first + len(text.ids))
        return self._prefixes.rows(index).view(*grid.ids.shape, -1)

    def head_input(self, texts: Sequence[Encoded], rows: int | None = None) -> Tensor:
        """What the unedited model's head is given at the tokens of ``texts``, one text behind the other.

        Returns:
            [rows, d], by default one for each token; those behind the last token repeat the first.
        """
        self._know(texts)
        index: list[int] = []
        for text in texts:
            first = self._head_inputs.start(text.ids)
            index += range(first, first + len(text.ids))
        return self._head_inputs.rows(index + index[:1] * (0 if rows is None else rows - len(index)))

    def forget_if_changed(self) -> bool:
        """Forget all if the model's weights are others than they were, or were written to; returns whether they are."""
        weights = self._versions()
        changed = weights != self._weights
        if changed:
            self._prefixes.clear()
            self._head_inputs.clear()
            self._weights = weights
        return changed

    def _versions(self) -> list[tuple[int, int]]:
        return [(weight.data_ptr(), weight._version) for weight in self._replay.model.parameters()]

    def _know(self, texts: Sequence[Encoded]) -> None:
        missing = self._missing(texts)
        tokens = sum(len(text.ids) for group in missing for text in group)
        if missing and not (self._prefixes.has_room(tokens) and self._head_inputs.has_room(tokens)):
            self._prefixes.clear()
            self._head_inputs.clear()
            missing = self._missing(texts)
        for group in missing:
            grid = self._lay_out(group)
            with self._attachment.disabled():
                observed = self._replay.observe(grid)
            for text, start in zip(group, grid.starts, strict=True):
                cells = slice(start, start + len(text.ids))
                self._prefixes.add(text.ids, observed.prefix.flatten(0, 1)[cells])
                self._head_inputs.add(text.ids, observed.head_input.flatten(0, 1)[cells])

    def _missing(self, texts: Sequence[Encoded]) -> list[Sequence[Encoded]]:
        """Groups of texts to compute, so that all of ``texts`` are known."""
        groups: dict[Tokens, Sequence[Encoded]] = {}
        for text in texts:
            if not self._prefixes.knows(text.ids):
                group = self._company.get(text.ids, (text,))
                groups.setdefault(group[0].ids, group)
        return list(groups.values())


class _Vectors:
    """Vectors of the tokens of texts, one behind the other in one tensor that grows."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._buffer: Tensor | None = None
        self._starts: dict[Tokens, int] = {}
        self._used = 0

    def knows(self, text: Tokens) -> bool:
        return text in self._starts

    def start(self, text: Tokens) -> int:
        return self._starts[text]

    def rows(self, index: Sequence[int]) -> Tensor:
        assert self._buffer is not None
        return self._buffer.index_select(0, sent(index, self._buffer.device))

    def has_room(self, tokens: int) -> bool:
        """Whether so many more fit into the budget; what a single step needs is taken beyond it."""
        if self._buffer is None or not self._used:
            return True
        return (self._used + tokens) * self._buffer[0].nbytes <= self._budget

    def add(self, text: Tokens, vectors: Tensor) -> None:
        if text in self._starts:
            return
        end = self._used + len(vectors)
        if self._buffer is None or end > len(self._buffer):
            # Twice the room, but not beyond the budget for more than is needed.
            room = max(end, min(2 * end, self._budget // vectors[0].nbytes))
            grown = vectors.new_empty(room, vectors.shape[-1])
            if self._buffer is not None:
                grown[: self._used] = self._buffer[: self._used]
            self._buffer = grown
        self._buffer[self._used : end] = vectors
        self._starts[text] = self._used
        self._used = end

    def clear(self) -> None:
        self._buffer = None
        self._starts.clear()
        self._used = 0
