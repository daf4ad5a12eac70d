"""Remembers what a frozen model computes of a text, for as long as it is asked for again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from baft.attach import Attachment
from baft.engine.company import Company, Group
from baft.engine.encoding import Encoded
from baft.engine.grid import Grid
from baft.engine.kept import Kept
from baft.engine.replay import Replay
from baft.engine.weights import versions_of
from baft.transfer import sent

__all__ = ["FrozenStates"]


class FrozenStates:
    """By text, what the first edited block returns before its edit, and what the unedited model's head is given.

    When ``budget`` is used up what was computed longest ago makes room, half of all at a time; where that isn't enough
    for a single step, everything does.

    Of a text whose head's input nobody asks for, an edit's own, no more is computed and kept than of the blocks up to
    the first edited one.

    Frequent texts stay, if they take no more than half of the budget. Where they take more, none of them is remembered:
    to compute one with all its company, and forget it before it comes again, would be tens of texts for each. Those of
    a step are then computed together, at each step.

    Args:
        replay: runs the model.
        attachment: its interventions, which are switched off meanwhile.
        lay_out: makes a grid of texts.
        frequent_tokens: of frequent texts (``Company``) the keys, and how many tokens each has.
        budget: bytes to remember in.
    """

    def __init__(
        self,
        replay: Replay,
        attachment: Attachment,
        lay_out: Callable[[Sequence[Encoded]], Grid],
        frequent_tokens: Mapping[Hashable, int],
        budget: int,
    ) -> None:
        self._replay = replay
        self._attachment = attachment
        self._lay_out = lay_out
        self._frequent_tokens = frequent_tokens
        self._budget = budget
        self._passing: _Passing | None = None
        self._forget()
        self._weights = versions_of(replay.model)

    @property
    def written_bytes(self) -> int:
        """Bytes of what is set aside that were ever written to: an operating system gives no others away."""
        return self._prefixes.written_bytes + self._head_inputs.written_bytes

    def prefix(self, texts: Sequence[Encoded], grid: Grid, company: Company) -> Tensor:
        """The first edited block's output at each cell of the grid that ``texts`` lie on, [G, W, d]."""
        self._know(self._prefixes, texts, company)
        places = [self._places_of(company.key(text), len(text.ids), self._prefixes) for text in texts]
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

    def head_input(self, texts: Sequence[Encoded], company: Company, rows: int | None = None) -> Tensor:
        """What the unedited model's head is given at the tokens of ``texts``, one text behind the other.

        Of texts that are in a pass, to be asked before ``prefix``: both come of one run of the model.

        Returns:
            [rows, d], by default one for each token; those behind the last token repeat the first.
        """
        self._know(self._head_inputs, texts, company)
        index = [
            place for text in texts for place in self._places_of(company.key(text), len(text.ids), self._head_inputs)
        ]
        passing = None if self._passing is None else self._passing.head_input
        padding = index[:1] * (0 if rows is None else rows - len(index))
        return _gathered(self._head_inputs, passing, index + padding)

    def forget_if_changed(self) -> bool:
        """Forget all if the model's weights are others than they were, or were written to; returns whether they are."""
        weights = versions_of(self._replay.model)
        changed = weights != self._weights
        if changed:
            self._forget()
            self._passing = None
            self._weights = weights
        return changed

    def _forget(self) -> None:
        rows = self._budget // (2 * self._attachment.blocks.width * self._replay.model.dtype.itemsize)
        self._prefixes, self._head_inputs = Kept(self._frequent_tokens, rows), Kept(self._frequent_tokens, rows)

    def _places_of(self, key: Hashable, tokens: int, kept: Kept) -> range:
        """The numbers of a text's vectors: from 0 of those that are kept, from -1 down of those that pass."""
        if self._passing is not None and key in self._passing.starts:
            first = ~self._passing.starts[key]
            return range(first, first - tokens, -1)
        first = kept.start(key)
        return range(first, first + tokens)

    def _know(self, wanted: Kept, texts: Sequence[Encoded], company: Company) -> None:
        """See to it that one of both, prefixes or head inputs, is kept of all ``texts``, or passes."""
        if not wanted.favours:
            self._pass({company.key(text): text for text in texts if company.is_frequent(text)})
            texts = [text for text in texts if not company.is_frequent(text)]
        missing = _missing(wanted, texts, company)
        for forget in (wanted.forget_older, wanted.forget):
            if wanted.has_room(company.sizes(missing)):
                break
            forget()
            missing = _missing(wanted, texts, company)  # some of ``texts`` may have been in what was forgotten
        to_the_head = wanted is self._head_inputs
        for group, (starts, prefix, head_input) in self._all_observed(missing, company, to_the_head=to_the_head):
            for kept, vectors in ((self._prefixes, prefix), (self._head_inputs, head_input)):
                if vectors is None:
                    continue
                if kept is not wanted and not kept.has_room(company.sizes([group])):
                    kept.forget_older()
                    if not kept.has_room(company.sizes([group])):
                        continue  # nobody has asked for it yet
                for text, start in zip(group, starts, strict=True):
                    key = company.key(text)
                    if not kept.knows(key):
                        kept.put(key, vectors[start : start + len(text.ids)])

    def _pass(self, texts: Mapping[Hashable, Encoded]) -> None:
        """Compute texts together, for now: the same ones may be asked for once more, and no others."""
        if self._passing is not None and [*self._passing.starts] == [*texts]:
            return
        self._passing = None
        if texts:
            starts, prefix, head_input = self._observed([*texts.values()], to_the_head=True)
            assert head_input is not None
            self._passing = _Passing(dict(zip(texts, starts, strict=True)), prefix, head_input)

    def _all_observed(
        self, groups: Sequence[Group], company: Company, *, to_the_head: bool
    ) -> Iterator[tuple[Group, _Observed]]:
        """Groups of texts with what the model computes of each; a group that comes may be several of ``groups``."""
        for joined in company.at_once(groups):
            texts = [text for group in joined for text in group]
            # Of texts that shall stay as they are, as a rule both are asked.
            further = to_the_head or company.stays(texts[0])
            observed = self._observed(texts, to_the_head=further)
            if len(joined) == 1 or observed.finite(texts):
                yield texts, observed
            else:  # what isn't finite has spread in its row: to others, who shall not suffer by it
                for group in joined:
                    yield group, self._observed(group, to_the_head=further)

    def _observed(self, texts: Sequence[Encoded], *, to_the_head: bool) -> _Observed:
        """What the model computes of texts together."""
        grid = self._lay_out(texts)
        with self._attachment.disabled():
            observed = self._replay.observe(grid, to_the_head=to_the_head)
        head_input = observed.head_input
        return _Observed(
            grid.starts, observed.prefix.flatten(0, 1), None if head_input is None else head_input.flatten(0, 1)
        )


class _Observed(NamedTuple):
    """Where each text begins among the vectors; what the first edited block returns, and what the head is given, or
    None, [cells, d]."""

    starts: Sequence[int]
    prefix: Tensor
    head_input: Tensor | None

    def finite(self, texts: Sequence[Encoded]) -> bool:
        """Whether all of it is at the texts' tokens; this waits for it."""
        cells = [cell for start, t in zip(self.starts, texts, strict=True) for cell in range(start, start + len(t.ids))]
        known = [vectors for vectors in (self.prefix, self.head_input) if vectors is not None]
        return all(bool(v.index_select(0, sent(cells, v.device)).isfinite().all()) for v in known)


@dataclass(frozen=True)
class _Passing:
    """Vectors of texts that aren't remembered, and the row at which each text begins."""

    starts: Mapping[Hashable, int]
    prefix: Tensor
    head_input: Tensor


def _missing(kept: Kept, texts: Sequence[Encoded], company: Company) -> list[Group]:
    """Groups of texts to compute, so that all of ``texts`` are kept."""
    return company.groups(text for text in texts if not kept.knows(company.key(text)))


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
