"""Remembers what a frozen model computes of a text, for as long as it is asked for again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from baft.attach import Attachment
from baft.engine.encoding import Encoded
from baft.engine.grid import Grid
from baft.engine.kept import Kept
from baft.engine.replay import Replay
from baft.engine.weights import versions_of
from baft.transfer import sent

__all__ = ["FrozenStates"]

# So many texts at most are computed together that don't have to be.
_TOGETHER = 256


class FrozenStates:
    """By text, what the first edited block returns before its edit, and what the unedited model's head is given.

    What is given doesn't depend on what was asked for before: a run that was interrupted and resumed gets the same
    bits. So each text is always computed in the same company, or alone; but for who can do without and asks for texts
    ``together``, for whom what is missing is computed at once, and remembered apart. When ``budget`` is used up what
    was computed longest ago makes room, half of all at a time; where that isn't enough for a single step, everything
    does.

    Of a text whose head's input nobody asks for, an edit's own, no more is computed and kept than of the blocks up to
    the first edited one.

    Texts of ``company`` are asked for all the time, a few of many at each step. They stay, if they take no more than
    half of the budget. Where they take more, none of them is remembered: to compute one with all its company, and
    forget it before it comes again, would be tens of texts for each. Those of a step are then computed together, at
    each step.

    Args:
        replay: runs the model.
        attachment: its interventions, which are switched off meanwhile.
        lay_out: makes a grid of texts.
        company: texts that are computed together.
        all_about: likewise, those that the unedited model wrote of a subject; None computes each of them alone, as
            every other text.
        budget: bytes to remember in.
    """

    def __init__(
        self,
        replay: Replay,
        attachment: Attachment,
        lay_out: Callable[[Sequence[Encoded]], Grid],
        company: Iterable[Sequence[Encoded]],
        all_about: Callable[[str], Sequence[Encoded]] | None,
        budget: int,
    ) -> None:
        self._replay = replay
        self._attachment = attachment
        self._lay_out = lay_out
        company = list(company)
        self._company = {_key(text): texts for texts in company for text in texts}
        self._favoured = {_key(text): len(text.ids) for texts in company for text in texts}
        self._all_about = all_about
        self._budget = budget
        self._passing: _Passing | None = None
        self._forget()
        self._weights = versions_of(replay.model)

    @property
    def written_bytes(self) -> int:
        """Bytes of what is set aside that were ever written to: an operating system gives no others away."""
        return self._prefixes.written_bytes + self._head_inputs.written_bytes

    def prefix(self, texts: Sequence[Encoded], grid: Grid, *, together: bool = False) -> Tensor:
        """The first edited block's output at each cell of the grid that ``texts`` lie on, [G, W, d]."""
        self._know(self._prefixes, texts, together)
        places = [self._places_of(text, self._prefixes, together) for text in texts]
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

    def head_input(self, texts: Sequence[Encoded], rows: int | None = None, *, together: bool = False) -> Tensor:
        """What the unedited model's head is given at the tokens of ``texts``, one text behind the other.

        Of texts that are in a pass, to be asked before ``prefix``: both come of one run of the model.

        Returns:
            [rows, d], by default one for each token; those behind the last token repeat the first.
        """
        self._know(self._head_inputs, texts, together)
        index = [place for text in texts for place in self._places_of(text, self._head_inputs, together)]
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
        self._prefixes, self._head_inputs = Kept(self._favoured, rows), Kept(self._favoured, rows)

    def _key(self, text: Encoded, together: bool) -> Hashable:
        """What a text's vectors are known by; those of ``company`` are always computed in it."""
        key = _key(text)
        return (key, "together") if together and key not in self._company else key

    def _places_of(self, text: Encoded, kept: Kept, together: bool) -> range:
        """The numbers of a text's vectors: from 0 of those that are kept, from -1 down of those that pass."""
        key = self._key(text, together)
        if self._passing is not None and key in self._passing.starts:
            first = ~self._passing.starts[key]
            return range(first, first - len(text.ids), -1)
        first = kept.start(key)
        return range(first, first + len(text.ids))

    def _know(self, wanted: Kept, texts: Sequence[Encoded], together: bool) -> None:
        """See to it that one of both, prefixes or head inputs, is kept of all ``texts``, or passes."""
        if not wanted.favours:
            self._pass([text for text in texts if _key(text) in self._company])
            texts = [text for text in texts if _key(text) not in self._company]
        missing = self._missing(wanted, texts, together)
        for forget in (wanted.forget_older, wanted.forget):
            if wanted.has_room(self._sizes(missing, together)):
                break
            forget()
            missing = self._missing(wanted, texts, together)  # some of ``texts`` may have been in what was forgotten
        to_the_head = wanted is self._head_inputs
        for group, (starts, prefix, head_input) in self._all_observed(missing, to_the_head, together):
            for kept, vectors in ((self._prefixes, prefix), (self._head_inputs, head_input)):
                if vectors is None:
                    continue
                if kept is not wanted and not kept.has_room(self._sizes([group], together)):
                    kept.forget_older()
                    if not kept.has_room(self._sizes([group], together)):
                        continue  # nobody has asked for it yet
                for text, start in zip(group, starts, strict=True):
                    key = self._key(text, together)
                    if not kept.knows(key):
                        kept.put(key, vectors[start : start + len(text.ids)])

    def _all_observed(
        self, groups: Sequence[Sequence[Encoded]], to_the_head: bool, together: bool
    ) -> Iterator[tuple[Sequence[Encoded], _Observed]]:
        """Groups of texts with what the model computes of each; a group that comes may be several of ``groups``."""
        for joined in self._joined(groups) if together else [[group] for group in groups]:
            texts = [text for group in joined for text in group]
            # Of texts that shall stay as they are, as a rule both are asked.
            further = to_the_head or self._shall_stay(texts[0])
            observed = self._observed(texts, to_the_head=further)
            if len(joined) == 1 or observed.finite(texts):
                yield texts, observed
            else:  # what isn't finite has spread in its row: to others, who shall not suffer by it
                for group in joined:
                    yield group, self._observed(group, to_the_head=further)

    def _pass(self, texts: Sequence[Encoded]) -> None:
        """Compute texts together, for now: the same ones may be asked for once more, and no others."""
        unique = {_key(text): text for text in texts}
        if self._passing is not None and [*self._passing.starts] == [*unique]:
            return
        self._passing = None
        if unique:
            starts, prefix, head_input = self._observed([*unique.values()], to_the_head=True)
            assert head_input is not None
            self._passing = _Passing(dict(zip(unique, starts, strict=True)), prefix, head_input)

    def _observed(self, texts: Sequence[Encoded], *, to_the_head: bool) -> _Observed:
        """What the model computes of texts together."""
        grid = self._lay_out(texts)
        with self._attachment.disabled():
            observed = self._replay.observe(grid, to_the_head=to_the_head)
        head_input = observed.head_input
        return _Observed(
            grid.starts, observed.prefix.flatten(0, 1), None if head_input is None else head_input.flatten(0, 1)
        )

    def _missing(self, kept: Kept, texts: Sequence[Encoded], together: bool) -> list[Sequence[Encoded]]:
        """Groups of texts to compute, so that all of ``texts`` are kept."""
        groups: dict[Hashable, Sequence[Encoded]] = {}
        for text in texts:
            if not kept.knows(self._key(text, together)):
                group = self._group(text)
                groups.setdefault(_key(group[0]), group)
        return list(groups.values())

    def _group(self, text: Encoded) -> Sequence[Encoded]:
        """A text with its company."""
        if text.about is not None and self._all_about is not None:
            return self._all_about(text.about)
        return self._company.get(_key(text), (text,))

    def _joined(self, groups: Sequence[Sequence[Encoded]]) -> list[list[Sequence[Encoded]]]:
        """Groups that are computed at once: of texts about subjects, or of those without company."""
        joined = [[group] for group in groups if _key(group[0]) in self._company]
        for about in (True, False):
            texts = _TOGETHER
            for group in groups:
                if _key(group[0]) not in self._company and (group[0].about is not None) == about:
                    texts += len(group)
                    if texts > _TOGETHER:
                        joined.append([])
                        texts = len(group)
                    joined[-1].append(group)
        return joined

    def _sizes(self, groups: Iterable[Sequence[Encoded]], together: bool) -> dict[Hashable, int]:
        return {self._key(text, together): len(text.ids) for group in groups for text in group}

    def _shall_stay(self, text: Encoded) -> bool:
        return text.about is not None or _key(text) in self._company


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


def _key(text: Encoded) -> Hashable:
    """What is the same text: also of texts with the same tokens, those of different company are different."""
    return text.ids if text.about is None else (text.about, text.ids)


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
