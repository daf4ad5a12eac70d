"""Texts that an edit must leave alone: the pool that the locality loss draws from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from baft.engine.draws import draw_indices
from baft.engine.encoding import Encoded, Encoder

__all__ = ["UnrelatedPool"]


class UnrelatedPool:
    """Encoded texts to draw from.

    A prompt is enough, without what follows it: the loss looks at the model's distribution over the next token at each
    position, and what the unedited model would answer is in that at the last one.

    Args:
        texts: the texts; duplicates count once.
        encoder: encodes them.
    """

    def __init__(self, texts: Sequence[str], encoder: Encoder) -> None:
        self.texts = tuple(dict.fromkeys(texts))
        self._encoded = [encoder.prompt(text, subject="") for text in self.texts]

    def __len__(self) -> int:
        return len(self._encoded)

    def draw(self, size: int, generator: torch.Generator) -> list[Encoded]:
        return [self._encoded[index] for index in draw_indices(len(self._encoded), size, generator)]

    def in_chunks(self, size: int) -> Iterator[list[Encoded]]:
        """All texts, ``size`` at a time."""
        return (self._encoded[first : first + size] for first in range(0, len(self._encoded), size))
