"""Remembers what a frozen model computes of a text, for as long as it is asked for again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from baft.attach import Attachment
from baft.engine.encoding import Encoded
from baft.engine.grid import Grid
from baft.engine.kept import Kept, Tokens
from baft.engine.replay import Replay
from baft.engine.transfer import sent

__all__ = ["FrozenStates"]


class FrozenStates:
    """By text, what the first edited block returns before its edit, and what the unedited model's head is given.

    What is given doesn't depend on what was asked for before: a run that was interrupted and resumed gets the same
    bits. So each text is always computed in the same company, or alone. When ``budget`` is used up what was computed
    longest ago makes room, half of all at a time; where that isn't enough for a single step, everything does.

    Of a text whose head's input nobody asks for, an edit's own, no more is computed and kept than of the blocks up to
    the first edited one.

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
        self._know(self._prefixes, texts)
        places = [self._places_of(text, self._prefixes) for text in texts]
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

        Of texts that are in a pass, to be asked before ``prefix``: both come of one run of the model.

        Returns:
            [rows, d], by default one for each token; those behind the last token repeat the first.
        """
        self._know(self._head_inputs, texts)
        index = [place for text in texts for place in self._places_of(text, self._head_inputs)]
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
        company = {text: len(text) for text in self._company}
        rows = self._budget // (2 * self._attachment.blocks.width * self._replay.model.dtype.itemsize)
        self._prefixes, self._head_inputs = Kept(company, rows), Kept(company, rows)

    def _versions(self) -> list[tuple[int, int]]:
        return [(weight.data_ptr(), weight._version) for weight in self._replay.model.parameters()]

    def _places_of(self, text: Encoded, kept: Kept) -> range:
        """The numbers of a text's vectors: from 0 of those that are kept, from -1 down of those that pass."""
        if self._passing is not None and text.ids in self._passing.starts:
            first = ~self._passing.starts[text.ids]
            return range(first, first - len(text.ids), -1)
        first = kept.start(text.ids)
        return range(first, first + len(text.ids))

    def _know(self, wanted: Kept, texts: Sequence[Encoded]) -> None:
        """See to it that one of both, prefixes or head inputs, is kept of all ``texts``, or passes."""
        if not wanted.favours:
            self._pass([text for text in texts if text.ids in self._company])
            texts = [text for text in texts if text.ids not in self._company]
        missing = self._missing(wanted, texts)
        for forget in (wanted.forget_older, wanted.forget):
            if wanted.has_room(_tokens(missing)):
                break
            forget()
            missing = self._missing(wanted, texts)  # some of ``texts`` may have been in what was forgotten
        for group in missing:
            # Company are unrelated texts, of which as a rule both are asked.
            to_the_head = wanted is self._head_inputs or group[0].ids in self._company
            starts, prefix, head_input = self._observed(group, to_the_head=to_the_head)
            for kept, vectors in ((self._prefixes, prefix), (self._head_inputs, head_input)):
                if vectors is None:
                    continue
                if kept is not wanted and not kept.has_room(_tokens([group])):
                    kept.forget_older()
                    if not kept.has_room(_tokens([group])):
                        continue  # nobody has asked for it yet
                for text, start in zip(group, starts, strict=True):
                    if not kept.knows(text.ids):
                        kept.put(text.ids, vectors[start : start + len(text.ids)])

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

    def _missing(self, kept: Kept, texts: Sequence[Encoded]) -> list[Sequence[Encoded]]:
        """Groups of texts to compute, so that all of ``texts`` are kept."""
        groups: dict[Tokens, Sequence[Encoded]] = {}
        for text in texts:
            if not kept.knows(text.ids):
                group = self._company.get(text.ids, (text,))
                groups.setdefault(group[0].ids, group)
        return list(groups.values())


@dataclass(frozen=True)
class _Passing:
    """Vectors of texts that aren't remembered, and the row at which each text begins."""

    starts: Mapping[Tokens, int]
    prefix: Tensor
    head_input: Tensor


def _tokens(groups: Sequence[Sequence[Encoded]]) -> list[Tokens]:
    return [text.ids for group in groups for text in group]


def _gathered(kept: Kept, passing: Tensor | None, index: Sequence[int]) -> Tensor:
    """Vectors by number, those that pass by ``~row``."""
    cells = [cell for cell, place in enumerate(index) if place < 0]
    if not cells:
        return kept.at(index)
    assert passing is not None
    rows = passing.index_select(0, sent([~index[cell] for cell in cells], passing.device))
    if len(cells) == len(index):
        return rows
    return kept.at([max(place, 0) for place in index]).index_copy_(0, sent(cells, rows.device), rows)
