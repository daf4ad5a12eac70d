"""What the unedited model says of an edit's subject: of the edited fact it shall say otherwise, and all else again."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from baft.engine.encoding import Encoded, Encoder
from baft.engine.modes import evaluating
from baft.placement import device_of

__all__ = ["Surroundings"]

# Tokens that are written of a subject, and requests whose texts are remembered.
_LENGTH = 12
_REMEMBERED = 1 << 14

# Where an answer ends; the marks of Chinese and Japanese too.
_END = re.compile("[.,;:!?\n\u3002\uff0c\uff1b\uff1a\uff01\uff1f]")


class Surroundings:
    """Texts about the subjects of edits, written by the unedited model.

    A text begins with the subject, goes on with one of the model's likeliest next tokens, another for each text, and
    then greedily. One that has the model's own answer to an edit's prompt in it tells of a fact that is edited, this
    one or another of the same subject, and can't stay as it is. Up to that answer it is the model's own rephrasing of
    the edit's prompt, which the target should follow too. Nothing is drawn, and a subject's texts are computed in no
    other company: they are the same bits each time, whatever was written before.

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
        self._branches = lru_cache(_REMEMBERED)(self._write)
        self._answer = lru_cache(_REMEMBERED)(self._answer_to)
        # By subject, the prompts of all edits of ``_known``, as far as they have been looked at.
        self._asked: dict[str, set[tuple[int, ...]]] = {}
        self._known: Sequence[Encoded] = ()
        self._seen = 0

    def know(self, edits: Sequence[Encoded]) -> None:
        """Be told all edits that there are so far: a list that may have grown since the last time, or another."""
        if not self._count:
            return
        if edits is not self._known or len(edits) < self._seen:
            self._asked.clear()
            self._known, self._seen = edits, 0
        for row in edits[self._seen :]:
            self._asked.setdefault(self._subject(row), set()).add(row.ids[: row.prompt_length])
        self._seen = len(edits)

    def of(self, row: Encoded) -> tuple[Encoded, ...]:
        """The texts about a request's subject that tell of no edit; none if it has no subject."""
        subject = self._subject(row) if self._count else ""
        if not subject:
            return ()
        edited = self._edited(subject, row)
        texts = ((branch, self._text(branch).casefold()) for branch in self._branches(subject))
        kept = [branch for branch, text in texts if not any(answer in text for answer in edited)]
        return tuple(Encoded(branch, len(branch), (0, 0)) for branch in kept)

    def retold(self, row: Encoded) -> tuple[Encoded, ...]:
        """The texts that tell of a request's fact and of no other edit, each with the target instead of the old answer.

        Like ``row`` they are prompts with what shall follow; none of a later chunk of a target.
        """
        subject = self._subject(row) if self._count else ""
        answer = self._answer(row.ids[: row.prompt_length])
        if not subject or not answer or row.given:
            return ()
        others = self._edited(subject, row) - {answer}
        start = self._encoder.prompt(subject, subject)
        found = []
        for branch in self._branches(subject):
            column = self._column_of(answer, branch, len(start.ids))
            if column is not None and not any(other in self._text(branch[:column]).casefold() for other in others):
                found.append(Encoded((*branch[:column], *row.ids[row.prompt_length :]), column, start.subject))
        return tuple(found)

    def _edited(self, subject: str, row: Encoded) -> set[str]:
        """The unedited model's answers to the prompts of all edits of a subject."""
        prompts = {row.ids[: row.prompt_length], *self._asked.get(subject, ())}
        return {answer for prompt in prompts if (answer := self._answer(prompt))}

    def _column_of(self, answer: str, branch: tuple[int, ...], first: int) -> int | None:
        """Where in a text an answer begins, as words of their own, from a column on; None if it doesn't."""
        whole = self._text(branch).casefold()
        for column in range(first, len(branch)):
            told = self._text(branch[:column]).casefold()
            rest = whole[len(told) :].lstrip() if whole.startswith(told) else ""
            if rest.startswith(answer) and not rest[len(answer) : len(answer) + 1].isalnum():
                return column
        return None

    def _subject(self, row: Encoded) -> str:
        """ "" if it has none."""
        return "" if row.subject is None else self._text(row.ids[slice(*row.subject)]).strip()

    @torch.no_grad()
    def _write(self, subject: str) -> list[tuple[int, ...]]:
        start = torch.tensor([self._encoder.prompt(subject, "").ids], device=device_of(self._model))
        with evaluating(self._model), self._disabled():
            likeliest = self._model(input_ids=start).logits[0, -1].topk(self._count).indices
            branches = self._continue(torch.cat((start.expand(self._count, -1), likeliest[:, None]), 1))
        return [branch for branch in branches if len(branch) > start.shape[1] + 1]

    @torch.no_grad()
    def _answer_to(self, prompt: tuple[int, ...]) -> str:
        """What the unedited model answers to an edit's prompt."""
        with evaluating(self._model), self._disabled():
            (known,) = self._continue(torch.tensor([prompt], device=device_of(self._model)))
        return _END.split(self._text(known[len(prompt) :]).strip(), maxsplit=1)[0].strip().casefold()

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
