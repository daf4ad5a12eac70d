"""Remembers what a frozen model computes of a text, for as long as it is asked for again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

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
    before: a run that was interrupted and resumed gets the same bits. When ``budget`` is used up what was computed
    longest ago makes room, half of all at a time; where that isn't enough for a single step, everything does. Texts
    with company, which are asked for all the time, stay until then, if they take no more than half.

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
        self._budget = budget
        self._forget()
        self._weights = self._versions()

    @property
    def nbytes(self) -> int:
        """Bytes that are set aside at present."""
        return self._prefixes.nbytes + self._head_inputs.nbytes

    @property
    def written_bytes(self) -> int:
        """Bytes of these that were ever written to: an operating system gives no others away."""
        return self._prefixes.written_bytes + self._head_inputs.written_bytes

    def prefix(self, texts: Sequence[Encoded], grid: Grid) -> Tensor:
        """The first edited block's output at each cell of the grid that ``texts`` lie on, [G, W, d]."""
        self._know(texts)
        places = self._places
        # At padding stands a token of the row's own: nobody looks, but one that isn't finite would spread in the row.
        width = grid.ids.shape[1]
        index = [places.start(texts[0].ids)] * grid.ids.numel()
        for text, start in zip(texts, grid.starts, strict=True):
            row = start - start % width
            index[row : row + width] = [places.start(text.ids)] * width
        for text, start in zip(texts, grid.starts, strict=True):
            first = places.start(text.ids)
            index[start : start + len(text.ids)] = range(first, first + len(text.ids))
        return self._prefixes.at(index).view(*grid.ids.shape, -1)

    def head_input(self, texts: Sequence[Encoded], rows: int | None = None) -> Tensor:
        """What the unedited model's head is given at the tokens of ``texts``, one text behind the other.

        Returns:
            [rows, d], by default one for each token; those behind the last token repeat the first.
        """
        self._know(texts)
        index: list[int] = []
        for text in texts:
            first = self._places.start(text.ids)
            index += range(first, first + len(text.ids))
        return self._head_inputs.at(index + index[:1] * (0 if rows is None else rows - len(index)))

    def forget_if_changed(self) -> bool:
        """Forget all if the model's weights are others than they were, or were written to; returns whether they are."""
        weights = self._versions()
        changed = weights != self._weights
        if changed:
            self._forget()
            self._weights = weights
        return changed

    def _forget(self) -> None:
        self._places = _Places({text: len(text) for text in self._company})
        self._prefixes = _Rows()
        self._head_inputs = _Rows()

    def _versions(self) -> list[tuple[int, int]]:
        return [(weight.data_ptr(), weight._version) for weight in self._replay.model.parameters()]

    def _know(self, texts: Sequence[Encoded]) -> None:
        missing = self._missing(texts)
        if not self._places.have_room(missing):
            if self._places.overfull:
                self._forget()
            else:
                self._places.forget_older_half()
            missing = self._missing(texts)  # some of ``texts`` may have been in what was forgotten
            if not self._places.have_room(missing):
                self._forget()
                missing = self._missing(texts)
        for group in missing:
            grid = self._lay_out(group)
            with self._attachment.disabled():
                observed = self._replay.observe(grid)
            prefix, head_input = observed.prefix.flatten(0, 1), observed.head_input.flatten(0, 1)
            limit = self._places.limit_to(self._budget // (prefix[0].nbytes + head_input[0].nbytes))
            for text, start in zip(group, grid.starts, strict=True):
                if not self._places.knows(text.ids):
                    cells = slice(start, start + len(text.ids))
                    place = self._places.next(text.ids)
                    self._prefixes.put(place, prefix[cells], limit)
                    self._head_inputs.put(place, head_input[cells], limit)
                    self._places.add(text.ids, place)  # when it is there: memory may have run out

    def _missing(self, texts: Sequence[Encoded]) -> list[Sequence[Encoded]]:
        """Groups of texts to compute, so that all of ``texts`` are known."""
        groups: dict[Tokens, Sequence[Encoded]] = {}
        for text in texts:
            if not self._places.knows(text.ids):
                group = self._company.get(text.ids, (text,))
                groups.setdefault(group[0].ids, group)
        return list(groups.values())


class _Places:
    """Where texts stand, one behind the other, each with as many rows as it has tokens.

    Args:
        favoured: texts that have places of their own, if these are no more than half of all, and their tokens.
    """

    def __init__(self, favoured: Mapping[Tokens, int]) -> None:
        self._limit: int | None = None
        self._favoured = favoured
        self._favoured_starts: dict[Tokens, int] = {}
        self._next_favoured = 0
        # The favoured have the rows before ``_first``. The others are filled up to ``_end``: all of them at first, then
        # one half after the other.
        self._first = sum(favoured.values())
        self._starts: dict[Tokens, int] = {}
        self._next = self._first
        self._end: int | None = None

    def limit_to(self, rows: int) -> int:
        """Have no more rows than these, but for what a single step needs beyond; the first limit counts.

        Returns:
            The limit.
        """
        if self._limit is None:
            self._limit = rows
            if self._first > rows // 2:
                self._favoured, self._first, self._next = {}, 0, 0
            self._end = rows
        return self._limit

    def knows(self, text: Tokens) -> bool:
        return text in self._starts or text in self._favoured_starts

    def start(self, text: Tokens) -> int:
        return self._starts[text] if text in self._starts else self._favoured_starts[text]

    @property
    def overfull(self) -> bool:
        """Whether a step needed more than the limit."""
        return self._limit is not None and self._next > self._limit

    def have_room(self, groups: Sequence[Sequence[Encoded]]) -> bool:
        """Whether so many more texts fit; where nothing is, there always is room."""
        tokens = sum(len(text.ids) for group in groups for text in group if text.ids not in self._favoured)
        return not tokens or not self._starts or self._end is None or self._next + tokens <= self._end

    def next(self, text: Tokens) -> int:
        """A place for a text."""
        return self._next_favoured if text in self._favoured else self._next

    def add(self, text: Tokens, start: int) -> None:
        """Know a text that stands at the place that was the next."""
        if text in self._favoured:
            self._favoured_starts[text], self._next_favoured = start, start + len(text)
        else:
            self._starts[text], self._next = start, start + len(text)

    def forget_older_half(self) -> None:
        """Go on in the half of the rows that was filled longer ago."""
        assert self._limit is not None
        half = (self._first + self._limit) // 2
        if self._next > half:
            self._starts = {text: start for text, start in self._starts.items() if start >= half}
            self._next, self._end = self._first, half
        else:
            self._starts = {text: start for text, start in self._starts.items() if start < half}
            self._next, self._end = half, self._limit


class _Rows:
    """Vectors by number, in one tensor that grows."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._written = 0

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    @property
    def written_bytes(self) -> int:
        return 0 if self._buffer is None else self._buffer[: self._written].nbytes

    def at(self, index: Sequence[int]) -> Tensor:
        assert self._buffer is not None
        return self._buffer.index_select(0, sent(index, self._buffer.device))

    def put(self, start: int, vectors: Tensor, limit: int) -> None:
        """Write vectors; what grows by it grows to twice what is needed, but not beyond ``limit`` for more."""
        end = start + len(vectors)
        if self._buffer is None or end > len(self._buffer):
            grown = vectors.new_empty(max(end, min(2 * end, limit)), vectors.shape[-1])
            if self._buffer is not None:
                grown[: len(self._buffer)] = self._buffer
            self._buffer = grown
        self._buffer[start:end] = vectors
        self._written = max(self._written, end)
