"""Texts that an edit must leave alone: the pool that the locality loss draws from."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

import torch

from baft.engine.draws import draw_indices
from baft.engine.encoding import Encoded, Encoder, Words
from baft.sentences import marks
from baft.spacing import joined

__all__ = ["UnrelatedPool"]

# Characters that a text before a prompt may have, and how many requests behind texts are remembered.
_SHORT = 200
_REMEMBERED = 1 << 15


class UnrelatedPool:
    """Encoded texts to draw from.

    A prompt is enough, without what follows it: the loss looks at the model's distribution over the next token at each
    position, and what the unedited model would answer is in that at the last one.

    Args:
        texts: the texts; duplicates count once.
        encoder: encodes them.
        limit: how many tokens a text may have, as the model has no more positions: longer ones are cut, which leaves
            texts. So many a request behind one may have, too.

    Raises:
        ValueError: if no text has a token.
    """

    def __init__(self, texts: Sequence[str], encoder: Encoder, limit: int | None = None) -> None:
        self.texts = tuple(dict.fromkeys(texts))
        self._encoder = encoder
        self._limit = limit
        # Texts that differ may have the same tokens, and an empty one has none.
        encoded = dict.fromkeys(encoder.prompt(text, subject="").cut(limit) for text in self.texts)
        self._encoded = [text for text in encoded if text.ids]
        if not self._encoded:
            raise ValueError(f"unrelated: expected texts with tokens, got {len(texts)} without any")
        self._behind = lru_cache(_REMEMBERED)(self._put_behind)

    def __len__(self) -> int:
        return len(self._encoded)

    def draw(self, size: int, generator: torch.Generator) -> list[Encoded]:
        return [self._encoded[index] for index in draw_indices(len(self._encoded), size, generator)]

    def in_chunks(self, size: int) -> Iterator[list[Encoded]]:
        """All texts, ``size`` at a time."""
        return (self._encoded[first : first + size] for first in range(0, len(self._encoded), size))

    def behind(self, row: Encoded, number: int, seed: int = 0) -> Encoded | None:
        """A request behind one of the texts, with what it wants: for each number, as far as there are, another text.

        Of the text the whole sentences. None where no text is short and has any without naming the request's subject,
        where both together are too long, and of a request that isn't known in words, such as a chunk.
        """
        return self._behind(row.words, number, seed) if row.words else None

    @cached_property
    def _short(self) -> list[str]:
        """In an order of their own: neighbours among the texts may be about the same."""
        short = [text for text in map(_whole_sentences, self.texts) if 0 < len(text) <= _SHORT]
        random.Random(0).shuffle(short)
        return short

    def _put_behind(self, words: Words, number: int, seed: int) -> Encoded | None:
        prompt, target, subject = words
        # Drawn by the request alone, so that it doesn't matter what was edited before.
        first = random.Random(f"{seed} {words}").randrange(max(1, len(self._short))) + number
        others = (self._short[(first + k) % len(self._short)] for k in range(len(self._short)))
        text = next((text for text in others if not (subject and subject.casefold() in text.casefold())), None)
        if text is None:
            warnings.warn(
                f"contexts: none of {len(self)} unrelated texts has whole sentences of at most {_SHORT} characters"
                " that don't name the subject",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        pair = self._encoder.pair(joined(text, prompt), target, subject)
        return pair if self._limit is None or len(pair.ids) <= self._limit else None


def _whole_sentences(text: str) -> str:
    """Without what stands behind the last sentence's end."""
    return text[: max((mark.end for mark in marks(text) if mark.ends), default=0)].strip()
