"""What the unedited model says of an edit's subject, the edited fact apart: it shall go on saying so."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from baft.engine.encoding import Encoded, Encoder
from baft.engine.modes import evaluating

__all__ = ["Surroundings"]

# Tokens that are written of a subject, and requests whose texts are remembered.
_LENGTH = 12
_REMEMBERED = 1 << 14

# Where an answer ends; the marks of Chinese and Japanese too.
_END = re.compile("[.,;:!?\n\u3002\uff0c\uff1b\uff1a\uff01\uff1f]")


class Surroundings:
    """Texts about the subjects of edits, written by the unedited model.

    A text begins with the subject, goes on with one of the model's likeliest next tokens, another for each text, and
    then greedily. One that has the model's own answer to the edit's prompt in it tells of the fact that is edited, and
    is left out. Nothing is drawn, and a request's texts are computed in no other company: they are the same bits each
    time, whatever was written before.

    Args:
        model: writes them.
        disabled: switches what edits it off.
        encoder: knows the tokens.
        count: texts of each subject, at most.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        disabled: Callable[[], AbstractContextManager[None]],
        encoder: Encoder,
        count: int,
    ) -> None:
        self._model = model
        self._disabled = disabled
        self._encoder = encoder
        self._count = count
        self._written = lru_cache(_REMEMBERED)(self._write)

    def of(self, row: Encoded) -> tuple[Encoded, ...]:
        """The texts about a request's subject; none if it has no subject."""
        if not self._count or row.subject is None or row.subject[0] == row.subject[1]:
            return ()
        first, end = row.subject
        return self._written(self._text(row.ids[first:end]).strip(), row.ids[: row.prompt_length])

    @torch.no_grad()
    def _write(self, subject: str, prompt: tuple[int, ...]) -> tuple[Encoded, ...]:
        start = self._encoder.prompt(subject, "").ids
        device = self._model.device
        with evaluating(self._model), self._disabled():
            ids = torch.tensor([start], device=device)
            likeliest = self._model(input_ids=ids).logits[0, -1].topk(self._count).indices
            branches = self._continue(torch.cat((ids.expand(self._count, -1), likeliest[:, None]), 1))
            (known,) = self._continue(torch.tensor([prompt], device=device))
        answer = _END.split(self._text(known[len(prompt) :]).strip(), maxsplit=1)[0].strip().casefold()
        kept = [branch for branch in branches if not answer or answer not in self._text(branch).casefold()]
        return tuple(Encoded(branch, len(branch), (0, 0)) for branch in kept if len(branch) > len(start) + 1)

    def _continue(self, ids: torch.Tensor) -> list[tuple[int, ...]]:
        """Greedily, and without what comes behind EOS."""
        eos = self._encoder.tokenizer.eos_token_id
        written = self._model.generate(  # type: ignore[operator]  # transformers' class doesn't declare it
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=_LENGTH,
            pad_token_id=self._encoder.pad_id,
        ).tolist()
        start = ids.shape[1]
        ends = [row.index(eos, start) if eos in row[start:] else len(row) for row in written]
        return [tuple(row[:end]) for row, end in zip(written, ends, strict=True)]

    def _text(self, ids: tuple[int, ...]) -> str:
        return str(self._encoder.tokenizer.decode(list(ids), skip_special_tokens=True))
