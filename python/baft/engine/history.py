"""The requests that are edited in, as training sees them: each encoded once, however often it is come back to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

from baft.engine.encoding import Encoded
from baft.requests import EditRequest

__all__ = ["History"]

Chunks = Sequence[Encoded]
"""A request, encoded: one row, or one for each chunk of its target (``baft.engine.encoding.chunks``)."""


class History:
    """Requests, and their rows.

    Args:
        encode: encodes a request.
        requests: those that are edited in already.

    Attributes:
        requests: in order. The list may be changed by whoever goes back to an earlier state: rows follow it.
    """

    def __init__(self, encode: Callable[[EditRequest], Chunks], requests: Iterable[EditRequest] = ()) -> None:
        self.requests = list(requests)
        self._encode = encode
        self._encoded: list[EditRequest] = []
        self._rows: list[Encoded] = []
        self._ends: list[int] = []

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
            del self._encoded[same:], self._ends[same:]
            del self._rows[self._ends[-1] if self._ends else 0 :]
            for request in self.requests[same:]:
                self._append(request, self._encode(request))
        return self._rows

    def _append(self, request: EditRequest, chunks: Chunks) -> None:
        self._encoded.append(request)
        self._rows += chunks
        self._ends.append(len(self._rows))
