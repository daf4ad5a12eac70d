"""The wordings of a benchmark: sentence patterns with a place for the subject, and which of them say the same.

A model that has read each fact in one wording knows texts, not facts, and an edit of the one wording can't be expected
to reach the others. Benchmarks state a record's fact in two wordings, but share their wordings among thousands of
records: put together, they say every fact in many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from baft.requests import EditRequest

__all__ = ["SLOT", "Statement", "Wordings"]

SLOT = "{}"


class Statement(NamedTuple):
    """A text taken apart: ``prefix`` (unrelated words in front), then ``wording`` with ``subject`` in its slot."""

    prefix: str
    wording: str
    subject: str

    @property
    def text(self) -> str:
        return self.prefix + self.wording.replace(SLOT, self.subject)


class Wordings:
    """The wordings that the prompts of ``requests`` are made of.

    A wording is a prompt with its subject taken out. Two wordings are siblings if some record uses one for its prompt
    and the other for a rephrasing.

    Attributes:
        siblings: for each wording, all that can stand for it, itself first.
        prefixes: the unrelated words found in front of rephrasings (CounterFact has them), each once.
    """

    def __init__(self, requests: Sequence[EditRequest]) -> None:
        own = [_wording(request) for request in requests]
        # A text is matched from its end, where wordings differ; the longest match is the most telling.
        self._known = sorted({wording for wording in own if wording}, key=lambda wording: (-len(wording), wording))
        siblings: dict[str, dict[str, None]] = {wording: {wording: None} for wording in self._known}
        prefixes: dict[str, None] = {}
        for request, wording in zip(requests, own, strict=True):
            if not wording or not request.subject:
                continue
            for text in request.rephrases:
                if statement := self.of_subject(text, request.subject):
                    siblings[wording][statement.wording] = None
                    siblings[statement.wording][wording] = None
                    if statement.prefix:
                        prefixes[statement.prefix] = None
        self.siblings = {wording: tuple(others) for wording, others in siblings.items()}
        self.prefixes = tuple(prefixes)

    def of_subject(self, text: str, subject: str) -> Statement | None:
        """``text`` taken apart, if it ends in a known wording of ``subject``."""
        for wording in self._known:
            statement = wording.replace(SLOT, subject)
            if text.endswith(statement):
                return Statement(text[: len(text) - len(statement)], wording, subject)
        return None

    def of_any_subject(self, text: str) -> Statement | None:
        """``text`` taken apart, if the whole of it is a known wording of some subject."""
        for wording in self._known:
            head, _, tail = wording.partition(SLOT)
            subject = text[len(head) : len(text) - len(tail)]
            if subject.strip() and text.startswith(head) and text.endswith(tail):
                return Statement("", wording, subject)
        return None


def _wording(request: EditRequest) -> str | None:
    if not request.subject or request.prompt.count(request.subject) != 1 or SLOT in request.prompt:
        return None
    return request.prompt.replace(request.subject, SLOT)
