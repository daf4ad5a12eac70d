"""Texts that an edit must leave alone: the pool that the locality loss draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from baft.engine.draws import draw_indices
from baft.engine.encoding import Encoded, Encoder

__all__ = ["UnrelatedPool"]

# Tokens that a text before a prompt may have, and how many requests' are remembered.
_SHORT = 40
_REMEMBERED = 1 << 17

_ENDS = (".", "!", "?")


class UnrelatedPool:
    """Encoded texts to draw from.

    A prompt is enough, without what follows it: the loss looks at the model's distribution over the next token at each
    position, and what the unedited model would answer is in that at the last one.

    Args:
        texts: the texts; duplicates count once.
        encoder: encodes them.
        limit: how many tokens a text and a request behind it may have, as the model has no more positions.
    """

    def __init__(self, texts: Sequence[str], encoder: Encoder, limit: int | None = None) -> None:
        self.texts = tuple(dict.fromkeys(texts))
        self._encoder = encoder
        self._limit = limit
        self._encoded = [encoder.prompt(text, subject="") for text in self.texts]
        self._behind = lru_cache(_REMEMBERED)(self._put_behind)

    def __len__(self) -> int:
        return len(self._encoded)

    def draw(self, size: int, generator: torch.Generator) -> list[Encoded]:
        return [self._encoded[index] for index in draw_indices(len(self._encoded), size, generator)]

    def in_chunks(self, size: int) -> Iterator[list[Encoded]]:
        """All texts, ``size`` at a time."""
        return (self._encoded[first : first + size] for first in range(0, len(self._encoded), size))

    def behind(self, row: Encoded, count: int) -> tuple[Encoded, ...]:
        """A request behind ``count`` of the texts, one each, with what it wants: for the same request the same ones.

        Fewer where few texts are short, and none of a request in chunks. Those that name its subject are left out.
        """
        return self._behind(row, count) if count else ()

    def _put_behind(self, row: Encoded, count: int) -> tuple[Encoded, ...]:
        if row.words is None:
            return ()
        prompt, target, subject = row.words
        short = [
            text
            for text, encoded in zip(self.texts, self._encoded, strict=True)
            if len(encoded.ids) <= _SHORT and not (subject and subject in text)
        ]
        # Drawn by the request alone, so that it doesn't matter what was edited before.
        chosen = random.Random(repr(row.ids)).sample(short, min(count, len(short)))
        pairs = (self._encoder.pair(f"{_sentence(text)} {prompt}", target, subject) for text in chosen)
        return tuple(pair for pair in pairs if self._limit is None or len(pair.ids) <= self._limit)


def _sentence(text: str) -> str:
    text = text.rstrip()
    return text if text.endswith(_ENDS) else f"{text}."
