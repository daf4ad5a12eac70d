"""A request in other words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from baft.engine.encoding import Encoded

__all__ = ["Retellings"]


class Retellings:
    """A request as others tell it; and behind unrelated texts, each of these and the request itself.

    Those behind texts are made when they are asked for, which few of them ever are. Where no text will do, it is the
    wording by itself.

    Args:
        row: the request.
        told: it in other words.
        contexts: behind how many texts each wording comes that is known in words.
        behind: makes a wording stand behind a text that has a number.
    """

    def __init__(
        self,
        row: Encoded,
        told: Sequence[Encoded],
        contexts: int,
        behind: Callable[[Encoded, int], Encoded | None],
    ) -> None:
        self._told = told
        self._in_words = [wording for wording in (row, *told) if wording.words]
        self._contexts = contexts
        self._behind = behind

    def __len__(self) -> int:
        return len(self._told) + self._contexts * len(self._in_words)

    def __getitem__(self, number: int) -> Encoded:
        number = range(len(self))[number]
        if number < len(self._told):
            return self._told[number]
        which, context = divmod(number - len(self._told), self._contexts)
        wording = self._in_words[which]
        return self._behind(wording, context) or wording
