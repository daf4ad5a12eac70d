"""Facts that can be told: found by the subjects that stand in a prompt, and kept in a record that only grows."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from baft.spacing import is_unspaced

__all__ = ["Fact", "Facts"]

# What is no part of a word; and letters and digits that are as wide as Chinese ones, and make words all the same.
_BETWEEN = re.compile(r"\W")
_WIDE = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a]")


class Fact(NamedTuple):
    """A prompt with what follows it; ``number`` counts those that came before."""

    number: int
    prompt: str
    subject: str
    target: str


class Facts:
    """What is known: of two facts with one prompt the later alone.

    Neither a fact more nor a question costs what all facts would: questions go by subjects, and a state is as much of
    the record of all additions as there is by then.

    Args:
        record: bytes that ``record`` returned: the same facts again.
    """

    def __init__(self, record: Tensor | None = None) -> None:
        self._by_prompt: dict[str, Fact] = {}
        self._by_subject: dict[str, dict[str, Fact]] = {}
        self._longest = self._added = 0
        self._buffer = torch.empty(0, dtype=torch.uint8) if record is None else record.cpu()
        self._length = len(self._buffer)
        for line in self._buffer.numpy().tobytes().splitlines():
            self._know(*json.loads(line))

    @property
    def record(self) -> Tensor:
        """Bytes, a line of JSON for each addition, that stay as they are whatever is added later."""
        return self._buffer[: self._length]

    def add(self, prompt: str, subject: str, target: str) -> None:
        self._know(prompt, subject, target)
        line = torch.frombuffer(bytearray(json.dumps([prompt, subject, target]).encode() + b"\n"), dtype=torch.uint8)
        end = self._length + len(line)
        if end > len(self._buffer):  # into one twice as large, so that a line is copied but a few times
            self._buffer = torch.cat([self.record, line, torch.empty_like(self.record)])
        else:
            self._buffer[self._length : end] = line
        self._length = end

    def about(self, prompt: str) -> list[Fact]:
        """Those whose subject stands in a prompt, in the order in which they came."""
        subjects = {subject for subject in self._parts(prompt) if subject in self._by_subject}
        return sorted(fact for subject in subjects for fact in self._by_subject[subject].values())

    def _know(self, prompt: str, subject: str, target: str) -> None:
        if (earlier := self._by_prompt.pop(prompt, None)) is not None:
            del self._by_subject[earlier.subject][prompt]
        fact = Fact(self._added, prompt, subject, target)
        self._by_prompt[prompt] = self._by_subject.setdefault(subject, {})[prompt] = fact
        self._longest = max(self._longest, len(subject))
        self._added += 1

    def _parts(self, text: str) -> Iterator[str]:
        """Whatever of a text could be a subject: it isn't part of a longer word, and no longer than subjects are.

        Where words have no spaces between them any character may be one.
        """
        between = {place for place, character in enumerate(text) if _BETWEEN.match(character)}
        alone = {place for place, character in enumerate(text) if is_unspaced(character) and not _WIDE.match(character)}
        firsts = sorted({0, *(place + 1 for place in between | alone), *alone})
        ends = sorted({len(text), *between, *alone, *(place + 1 for place in alone)})
        for first in firsts:
            for end in ends[bisect_right(ends, first) : bisect_right(ends, first + self._longest)]:
                yield text[first:end]
