"""Remembers what a frozen model computes of a text, for as long as it is asked for again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

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

    What is given doesn't depend on what was asked for before: a run that was interrupted and resumed gets the same
    bits. So each text is always computed in the same company, or alone. When ``budget`` is used up what was computed
    longest ago makes room, half of all at a time; where that isn't enough for a single step, everything does.

    Of a text whose head's input nobody asks for, an edit's own, no more is computed than up to the first edited block.
    Should somebody ask later, it is computed once more.

    Texts with company are asked for all the time, a few of many at each step. They stay, if they take no more than half
    of the budget. Where they take more, none of them is remembered: to compute one with all its company, and forget it
    before it comes again, would be tens of texts for each. Those of a step are then computed together, at each step.

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
        self._passing: _Passing | None = None
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
        self._know(texts, heads=False)
        places = [self._places_of(text) for text in texts]
        # At padding stands a token of the row's own: nobody looks, but one that isn't finite would spread in the row.
        width = grid.ids.shape[1]
        index = [places[0][0]] * grid.ids.numel()
        for own, start in zip(places, grid.starts, strict=True):
            row = start - start % width
            index[row : row + width] = [own[0]] * width
        for own, start in zip(places, grid.starts, strict=True):
            index[start : start + len(own)] = own
        passing = None if self._passing is None else self._passing.prefix
        return _gathered(self._prefixes, passing, index).view(*grid.ids.shape, -1)

    def head_input(self, texts: Sequence[Encoded], rows: int | None = None) -> Tensor:
        """What the unedited model's head is given at the tokens of ``texts``, one text behind the other.

        Returns:
            [rows, d], by default one for each token; those behind the last token repeat the first.
        """
        self._know(texts, heads=True)
        index = [place for text in texts for place in self._places_of(text)]
        passing = None if self._passing is None else self._passing.head_input
        padding = index[:1] * (0 if rows is None else rows - len(index))
        return _gathered(self._head_inputs, passing, index + padding)

    def forget_if_changed(self) -> bool:
        """Forget all if the model's weights are others than they were, or were written to; returns whether they are."""
        weights = self._versions()
        changed = weights != self._weights
        if changed:
            self._forget()
            self._passing = None
            self._weights = weights
        return changed

    def _forget(self) -> None:
        each = 2 * self._attachment.blocks.width * self._replay.model.dtype.itemsize
        self._places = _Places({text: len(text) for text in self._company}, self._budget // each)
        self._prefixes = _Rows()
        self._head_inputs = _Rows()
        # Of the texts that are known, those whose head's input is.
        self._to_the_head: set[Tokens] = set()

    def _versions(self) -> list[tuple[int, int]]:
        return [(weight.data_ptr(), weight._version) for weight in self._replay.model.parameters()]

    def _places_of(self, text: Encoded) -> range:
        """The numbers of a text's vectors: from 0 of those that are remembered, from -1 down of those that pass."""
        if self._passing is not None and text.ids in self._passing.starts:
            first = ~self._passing.starts[text.ids]
            return range(first, first - len(text.ids), -1)
        first = self._places.start(text.ids)
        return range(first, first + len(text.ids))

    def _know(self, texts: Sequence[Encoded], *, heads: bool) -> None:
        if not self._places.favours:
            self._pass([text for text in texts if text.ids in self._company])
            texts = [text for text in texts if text.ids not in self._company]
        missing = self._missing(texts, heads)
        if not self._places.have_room(missing):
            if self._places.overfull:
                self._forget()
            else:
                self._places.forget_older_half()
            missing = self._missing(texts, heads)  # some of ``texts`` may have been in what was forgotten
            if not self._places.have_room(missing):
                self._forget()
                missing = self._missing(texts, heads)
        for group in missing:
            # Company are unrelated texts, whose predictions will be asked for.
            starts, prefix, head_input = self._observed(group, to_the_head=heads or group[0].ids in self._company)
            for text, start in zip(group, starts, strict=True):
                cells = slice(start, start + len(text.ids))
                self._remember(text, prefix[cells], None if head_input is None else head_input[cells])

    def _remember(self, text: Encoded, prefix: Tensor, head_input: Tensor | None) -> None:
        known = self._places.knows(text.ids)
        place = self._places.start(text.ids) if known else self._places.next(text.ids)
        if not known:
            self._to_the_head.discard(text.ids)  # from before it was forgotten
            self._prefixes.put(place, prefix, self._places.limit)
        if head_input is not None:
            self._head_inputs.put(place, head_input, self._places.limit)
        # Only now that all is there: memory may have run out.
        if not known:
            self._places.add(text.ids, place)
        if head_input is not None:
            self._to_the_head.add(text.ids)

    def _pass(self, texts: Sequence[Encoded]) -> None:
        """Compute texts together, for now: the same ones may be asked for once more, and no others."""
        unique = {text.ids: text for text in texts}
        if self._passing is not None and [*self._passing.starts] == [*unique]:
            return
        self._passing = None
        if unique:
            starts, prefix, head_input = self._observed([*unique.values()], to_the_head=True)
            assert head_input is not None
            self._passing = _Passing(dict(zip(unique, starts, strict=True)), prefix, head_input)

    def _observed(self, texts: Sequence[Encoded], *, to_the_head: bool) -> tuple[Sequence[int], Tensor, Tensor | None]:
        """What the model computes of texts together: where each begins among the vectors, [cells, d], and those."""
        grid = self._lay_out(texts)
        with self._attachment.disabled():
            observed = self._replay.observe(grid, to_the_head=to_the_head)
        head_input = observed.head_input
        return grid.starts, observed.prefix.flatten(0, 1), None if head_input is None else head_input.flatten(0, 1)

    def _missing(self, texts: Sequence[Encoded], heads: bool) -> list[Sequence[Encoded]]:
        """Groups of texts to compute, so that all of ``texts`` are known, and if asked for their heads' input."""
        groups: dict[Tokens, Sequence[Encoded]] = {}
        for text in texts:
            if not self._places.knows(text.ids) or (heads and text.ids not in self._to_the_head):
                group = self._company.get(text.ids, (text,))
                groups.setdefault(group[0].ids, group)
        return list(groups.values())


@dataclass(frozen=True)
class _Passing:
    """Vectors of texts that aren't remembered, and the row at which each text begins."""

    starts: Mapping[Tokens, int]
    prefix: Tensor
    head_input: Tensor


class _Places:
    """Where texts stand, one behind the other, each with as many rows as it has tokens.

    Args:
        favoured: texts that have places of their own, if these are no more than half of all, and their tokens.
        limit: rows that there are, but for what a single step needs beyond.

    Attributes:
        favours: whether the favoured have places of their own.
    """

    def __init__(self, favoured: Mapping[Tokens, int], limit: int) -> None:
        self.limit = limit
        wanted = sum(favoured.values())
        self.favours = wanted <= limit // 2
        self._favoured = favoured if self.favours else {}
        self._favoured_starts: dict[Tokens, int] = {}
        self._next_favoured = 0
        # The favoured have the rows before ``_first``. The others are filled up to ``_end``: all of them at first, then
        # one half after the other.
        self._first = wanted if self.favours else 0
        self._starts: dict[Tokens, int] = {}
        self._next = self._first
        self._end = limit

    def knows(self, text: Tokens) -> bool:
        return text in self._starts or text in self._favoured_starts

    def start(self, text: Tokens) -> int:
        return self._starts[text] if text in self._starts else self._favoured_starts[text]

    @property
    def overfull(self) -> bool:
        """Whether a step needed more than the limit."""
        return self._next > self.limit

    def have_room(self, groups: Sequence[Sequence[Encoded]]) -> bool:
        """Whether so many more texts fit; where nothing is, there always is room."""
        texts = (text.ids for group in groups for text in group)
        tokens = sum(len(text) for text in texts if not (text in self._favoured or self.knows(text)))
        return not tokens or not self._starts or self._next + tokens <= self._end

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
        half = (self._first + self.limit) // 2
        if self._next > half:
            self._starts = {text: start for text, start in self._starts.items() if start >= half}
            self._next, self._end = self._first, half
        else:
            self._starts = {text: start for text, start in self._starts.items() if start < half}
            self._next, self._end = half, self.limit


def _gathered(remembered: _Rows, passing: Tensor | None, index: Sequence[int]) -> Tensor:
    """Vectors by number, those that pass by ``~row``."""
    cells = [cell for cell, place in enumerate(index) if place < 0]
    if not cells:
        return remembered.at(index)
    assert passing is not None
    rows = passing.index_select(0, sent([~index[cell] for cell in cells], passing.device))
    if len(cells) == len(index):
        return rows
    return remembered.at([max(place, 0) for place in index]).index_copy_(0, sent(cells, rows.device), rows)


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
