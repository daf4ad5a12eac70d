"""What the unedited model writes behind a prompt: for many prompts at a time, and once for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from baft.engine.decoding import ends_of, generate_greedily, greedily_continued
from baft.engine.encoding import Encoded, Encoder, TokenBatch, Tokens, most_tokens
from baft.engine.generation import batches_by_length
from baft.engine.modes import evaluating
from baft.engine.weights import Versions, versions_of
from baft.placement import device_of

__all__ = ["Asked", "Continuations", "KeptContinuations", "RememberedContinuations"]

# Tokens that are written behind a prompt; texts that are written in one batch.
_LENGTH = 12
_TOGETHER = 128

# Prompts that are remembered, by who keeps them in memory, and in front of who keeps them elsewhere, where one takes
# tens of microseconds to be found, and here some kilobytes.
_REMEMBERED = 1 << 17
_RECENT = 1 << 12


class Asked(NamedTuple):
    """A prompt to continue.

    Attributes:
        prompt: its tokens.
        branches: continue it so many times, each with another one of the likeliest next tokens, and then greedily; a
            text that ends with that token is left out. 0 continues it once, greedily, perhaps with nothing.
    """

    prompt: Tokens
    branches: int = 0


class KeptContinuations(Protocol):
    """Where continuations are kept; None is one that isn't there."""

    def continued(self, asked: Asked) -> list[Tokens] | None:
        """The prompt with what was written behind it, of each text."""

    def add_continued(self, found: Mapping[Asked, Sequence[Tokens]]) -> None:
        """Keep more of them."""


class RememberedContinuations:
    """``KeptContinuations`` in memory; of many the oldest are forgotten."""

    def __init__(self) -> None:
        self._found: dict[Asked, list[Tokens]] = {}

    def continued(self, asked: Asked) -> list[Tokens] | None:
        return self._found.get(asked)

    def add_continued(self, found: Mapping[Asked, Sequence[Tokens]]) -> None:
        self._found.update({asked: list(texts) for asked, texts in found.items()})
        while len(self._found) > _REMEMBERED:
            del self._found[next(iter(self._found))]


class Continuations:
    """Continuations of the unedited model.

    Nothing is drawn, but texts that are written together may differ from those that each would be alone: where two next
    tokens are as likely as each other within rounding, which in bfloat16 is one text in a hundred or so.

    Args:
        model: writes.
        disabled: switches what edits it off.
        encoder: knows the tokens.
    """

    def __init__(
        self, model: PreTrainedModel, disabled: Callable[[], AbstractContextManager[None]], encoder: Encoder
    ) -> None:
        self._model = model
        self._disabled = disabled
        self._encoder = encoder
        self._recent = lru_cache(_RECENT)(self._find)
        self._weights: Versions | None = None
        self.keep_in(None)

    def keep_in(self, kept: KeptContinuations | None) -> None:
        """Keep them in ``kept``, and take them from there; None remembers those to come."""
        self._kept = RememberedContinuations() if kept is None else kept
        self._recent.cache_clear()

    def of(self, asked: Asked) -> list[Tokens]:
        """Each text, its prompt included; what isn't known is written, in no other company."""
        return self._recent(asked)

    def write(self, asked: Iterable[Asked]) -> None:
        """Write together what ``of`` will be asked for, as far as it isn't known."""
        missing = [one for one in dict.fromkeys(asked) if self._kept.continued(one) is None]
        if missing:
            self._kept.add_continued(self._written(missing))

    def forget(self) -> None:
        """The model has changed: what it wrote is no longer what it writes."""
        self.keep_in(None)

    def forget_if_changed(self) -> None:
        """``forget``, if the model's weights aren't those that it last wrote with."""
        if self._weights is not None and self._weights != versions_of(self._model):
            self.forget()

    def _find(self, asked: Asked) -> list[Tokens]:
        found = self._kept.continued(asked)
        if found is None:
            found = self._written([asked])[asked]
            self._kept.add_continued({asked: found})
        return found

    @torch.no_grad()
    def _written(self, asked: Sequence[Asked]) -> dict[Asked, list[Tokens]]:
        self._weights = versions_of(self._model)
        with evaluating(self._model), self._disabled():
            branching = [one for one in asked if one.branches]
            likeliest = dict(zip(branching, self._likeliest(branching), strict=True))
            begun = [(one, (*one.prompt, *next_)) for one in asked for next_ in likeliest.get(one, [()])]
            written = self._continued([text for _, text in begun])
        found: dict[Asked, list[Tokens]] = {one: [] for one in asked}
        for (one, start), text in zip(begun, written, strict=True):
            if not one.branches or len(text) > len(start):
                found[one].append(text)
        return found

    def _likeliest(self, asked: Sequence[Asked]) -> list[list[Tokens]]:
        """Of each the likeliest next tokens, the likeliest first; the end is none."""
        found: list[list[Tokens]] = [[] for _ in asked]
        for chosen in batches_by_length([len(one.prompt) for one in asked], _TOGETHER):
            batch = self._batch([asked[k].prompt for k in chosen])
            how = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
            written = generate_greedily(self._model, self._encoder, batch.ids, batch.attention_mask, **how)
            scores = written.logits[0]
            scores[:, ends_of(self._model, self._encoder)] = -torch.inf
            for line, k in enumerate(chosen):
                found[k] = [(token,) for token in scores[line].topk(asked[k].branches).indices.tolist()]
        return found

    def _continued(self, texts: Sequence[Tokens]) -> list[Tokens]:
        """Greedily, as far as the model has positions, and without what comes behind an end."""
        limit, ends = most_tokens(self._model), ends_of(self._model, self._encoder)
        rooms = [_LENGTH if limit is None else min(_LENGTH, limit - len(text)) for text in texts]
        found = list(texts)
        for room in {room for room in rooms if room > 0}:
            alike = [k for k, own in enumerate(rooms) if own == room]
            for chosen in batches_by_length([len(texts[k]) for k in alike], _TOGETHER):
                batch = self._batch([texts[alike[c]] for c in chosen])
                written = greedily_continued(self._model, self._encoder, batch, room)
                for c, new in zip(chosen, written, strict=True):
                    end = next((column for column, token in enumerate(new) if token in ends), len(new))
                    found[alike[c]] = (*texts[alike[c]], *new[:end])
        return found

    def _batch(self, texts: Sequence[Tokens]) -> TokenBatch:
        return self._encoder.batch([Encoded(text, len(text)) for text in texts], device_of(self._model), side="left")
