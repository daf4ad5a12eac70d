"""How many texts a model under measurement is given at a time: fewer from then on, once memory has run out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from baft.engine.slots import ran_out

__all__ = ["Portions"]

T = TypeVar("T")


class Portions:
    """Keeps what is asked of a model within the memory that there is.

    In smaller portions texts have other company, as they have among other questions: where two next tokens are as
    likely as each other within rounding, an answer may come out another, and likelihoods differ in their last digits.

    Args:
        size: texts at a time, as long as memory doesn't run out.
        together: other processes hold parts of the same model, and would wait for one that asks again: none does.
        say: is told, in words, when it is fewer from then on.

    Attributes:
        size: texts at a time by now.
    """

    def __init__(self, size: int, *, together: bool = False, say: Callable[[str], None] = lambda _: None) -> None:
        self.size = size
        self._together = together
        self._say = say

    def ask(self, what: str, ask: Callable[[int], T]) -> T:
        """``ask``, told how many texts to take at a time; where memory runs out, once more, told half as many.

        Args:
            what: is measured, for people.

        Raises:
            RuntimeError: if there is too little memory for one text, or the process may not ask again.
        """
        before = self.size
        while (found := self._attempt(what, ask)) is None:
            self.size //= 2  # out here, where the error no longer holds what the attempt had
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if self.size < before:
            self._say(f"memory ran out while measuring {what}, {before} texts at a time: from now on {self.size} are")
        return found[0]

    def _attempt(self, what: str, ask: Callable[[int], T]) -> tuple[T] | None:
        """What it gave; None where memory ran out, and fewer texts at a time may do."""
        try:
            return (ask(self.size),)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            if self.size == 1 or self._together:
                texts = "one text alone" if self.size == 1 else f"{self.size} texts at a time"
                raise RuntimeError(
                    f"memory ran out while measuring {what}, {texts}: less for what the engine remembers (--remember, "
                    "in MiB) leaves more for that"
                ) from error
            return None
