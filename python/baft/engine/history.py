"""The requests that are edited in, as training sees them: each encoded once, however often it is come back to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

from baft.engine.encoding import Encoded
from baft.requests import EditRequest

__all__ = ["History", "latest"]

Chunks = Sequence[Encoded]
"""A request, encoded: one row, or one for each chunk of its target (``baft.engine.encoding.in_chunks``)."""


def latest(requests: Sequence[EditRequest], rows: Sequence[Chunks]) -> list[Chunks]:
    """Of requests that are edited together, the rows of those whose prompt no later one asks."""
    return list({request.prompt: chunks for request, chunks in zip(requests, rows, strict=True)}.values())


class History:
    """Requests, and their rows.

    A request that asks the prompt of an earlier one takes its place in training too: of two that contradict each other
    the later wins, and rehearsing the earlier would undo it. Rows keep their numbers.

    Args:
        encode: encodes a request.

    Attributes:
        requests: in order. The list may be changed by whoever goes back to an earlier state: rows follow it.
    """

    def __init__(self, encode: Callable[[EditRequest], Chunks]) -> None:
        self.requests: list[EditRequest] = []
        self._encode = encode
        self._encoded: list[EditRequest] = []
        self._chunks: list[Chunks] = []
        self._rows: list[Encoded] = []
        self._places: dict[str, list[range]] = {}

    def add(self, request: EditRequest, chunks: Chunks) -> None:
        """Append a request that was encoded."""
        self.rows()
        self.requests.append(request)
        self._append(request, chunks)

    def rows(self) -> Sequence[Encoded]:
        """All rows of all requests, in order; the same list each time, which grows with the history."""
        # Lists compare by identity before they look into their items, so this is quick where nothing was changed.
        if self._encoded != self.requests:
            pairs = zip(self._encoded, self.requests, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], pairs))
            known = self._chunks[:same]
            for what in (self._encoded, self._chunks, self._rows, self._places):
                what.clear()
            for request, chunks in zip(self.requests, known, strict=False):
                self._append(request, chunks)
            for request in self.requests[same:]:
                self._append(request, self._encode(request))
        return self._rows

    def _append(self, request: EditRequest, chunks: Chunks) -> None:
        places = self._places.setdefault(request.prompt, [])
        for place in places:
            for number, row in enumerate(place):
                self._rows[row] = chunks[number % len(chunks)]
        places.append(range(len(self._rows), len(self._rows) + len(chunks)))
        self._encoded.append(request)
        self._chunks.append(chunks)
        self._rows += chunks
