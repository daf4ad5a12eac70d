"""Vectors of texts, one for each token, as many as there is room for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor

from baft.transfer import sent

__all__ = ["Kept"]


class Kept:
    """Texts' vectors, in one tensor that grows, each text's rows one behind the other.

    When the room is used up those make room that were put longest ago, half of all at a time.

    Args:
        favoured: the keys of texts that have rows of their own and stay, if these are no more than half of all; and how
            many tokens each has.
        limit: rows that there are, but for what a single step needs beyond.

    Attributes:
        favours: whether the favoured have rows of their own.
    """

    def __init__(self, favoured: Mapping[Hashable, int], limit: int) -> None:
        wanted = sum(favoured.values())
        self.favours = wanted <= limit // 2
        self._limit = limit
        self._favoured = favoured if self.favours else {}
        # The favoured have the rows before ``_first``.
        self._first = wanted if self.favours else 0
        self.forget()

    def forget(self) -> None:
        """Forget all, and give the memory back."""
        self._favoured_starts: dict[Hashable, int] = {}
        self._next_favoured = 0
        # The others are filled up to ``_end``: all of them at first, then one half after the other.
        self._starts: dict[Hashable, int] = {}
        self._next = self._first
        self._end = self._limit
        self._buffer: Tensor | None = None
        self._written = 0

    @property
    def written_bytes(self) -> int:
        """Bytes of what is set aside that were ever written to: an operating system gives no others away."""
        return 0 if self._buffer is None else self._buffer[: self._written].nbytes

    def knows(self, text: Hashable) -> bool:
        return text in self._starts or text in self._favoured_starts

    def start(self, text: Hashable) -> int:
        """The first row of a text that is known."""
        return self._starts[text] if text in self._starts else self._favoured_starts[text]

    def at(self, index: Sequence[int]) -> Tensor:
        """Rows by number, [len(index), d]."""
        assert self._buffer is not None
        return self._buffer.index_select(0, sent(index, self._buffer.device))

    def has_room(self, texts: Mapping[Hashable, int]) -> bool:
        """Whether texts of so many tokens fit, as far as they aren't known; where nothing is, there always is room."""
        tokens = sum(size for text, size in texts.items() if not (text in self._favoured or self.knows(text)))
        return not tokens or not self._starts or self._next + tokens <= self._end

    def forget_older(self) -> None:
        """Go on in the half of the rows that was filled longer ago; where a step needed more than the limit, in all."""
        half = (self._first + self._limit) // 2
        if self._next > self._limit:
            self.forget()
        elif self._next > half:
            self._starts = {text: start for text, start in self._starts.items() if start >= half}
            self._next, self._end = self._first, half
        else:
            self._starts = {text: start for text, start in self._starts.items() if start < half}
            self._next, self._end = half, self._limit

    def put(self, text: Hashable, vectors: Tensor) -> None:
        """Know a text, as is: whether there is room was asked before."""
        favoured = text in self._favoured
        start = self._next_favoured if favoured else self._next
        self._write(start, vectors)
        # Only now that it is there: memory may have run out.
        if favoured:
            self._favoured_starts[text], self._next_favoured = start, start + len(vectors)
        else:
            self._starts[text], self._next = start, start + len(vectors)

    def _write(self, start: int, vectors: Tensor) -> None:
        """What grows by it grows to twice what is needed, but not beyond the limit for more."""
        end = start + len(vectors)
        if self._buffer is None or end > len(self._buffer):
            grown = vectors.new_empty(max(end, min(2 * end, self._limit)), vectors.shape[-1])
            if self._buffer is not None:
                grown[: self._written] = self._buffer[: self._written]
            self._buffer = grown
        self._buffer[start:end] = vectors
        self._written = max(self._written, end)
