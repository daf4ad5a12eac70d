"""What the unedited model answers, recorded once: locality is judged against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["BaseAnswers", "Forced", "RememberedAnswers"]


@dataclass(frozen=True)
class Forced:
    """Teacher forcing of one answer: the model's arg max at each of its tokens, and the tokens."""

    predicted: tuple[int, ...]
    wanted: tuple[int, ...]


class BaseAnswers(Protocol):
    """Where the unedited model's answers are kept; None is one that isn't there."""

    def text(self, prompt: str) -> str | None:
        """What it generated."""

    def forced(self, prompt: str, answer: str) -> Forced | None:
        """What it predicted at the tokens of a benchmark's answer."""

    def add_base(self, texts: Mapping[str, str], forced: Mapping[tuple[str, str], Forced]) -> None:
        """Keep generated texts by prompt, and forced answers by prompt and answer."""


@dataclass
class RememberedAnswers:
    """``BaseAnswers`` in memory."""

    texts: dict[str, str] = field(default_factory=dict)
    by_pair: dict[tuple[str, str], Forced] = field(default_factory=dict)

    def text(self, prompt: str) -> str | None:
        return self.texts.get(prompt)

    def forced(self, prompt: str, answer: str) -> Forced | None:
        return self.by_pair.get((prompt, answer))

    def add_base(self, texts: Mapping[str, str], forced: Mapping[tuple[str, str], Forced]) -> None:
        self.texts.update(texts)
        self.by_pair.update(forced)
