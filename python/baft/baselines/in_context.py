"""The facts are told to the model before each prompt; nothing else of it changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft.baselines.facts import Facts
from baft.baselines.no_edit import NoEdit
from baft.config import BaftConfig
from baft.requests import EditRequest
from baft.sentences import closed
from baft.spacing import joined

__all__ = ["InContext", "InContextOptions"]


class InContextOptions(BaseModel):
    """What is told.

    Attributes:
        facts: how many facts a prompt is told at most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    facts: Annotated[int, Field(ge=1)] = 4


class InContext(NoEdit):
    """Keeps the facts, and looks up those that a prompt is about: the ones whose subject stands in it.

    A model that were told every fact each time would be measured by how much it can read, and one that were told just
    the one that the measure is about would have been told which questions are about no edit. By their subjects it finds
    them as a user's system could; a prompt without any edited subject is asked as it is.

    Of more than ``facts`` facts, or more than the model's context leaves room for, the latest are told, the last one
    nearest to the prompt; of two with one prompt only the later is kept.

    Only ``generate`` and ``force`` know of the facts: who runs the model by other means runs the base model.

    Args:
        model, tokenizer, config: as ``BaftEditor``'s.
        unrelated: not looked at.
        options: what is told.
    """

    name = "in-context"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: BaftConfig | None = None,
        *,
        unrelated: Sequence[str] | None = None,
        options: InContextOptions | None = None,
    ) -> None:
        options = options or InContextOptions()
        super().__init__(model, tokenizer, config, options=options)
        self._at_most = options.facts
        self._limit = getattr(model.config, "max_position_embeddings", None)
        self._told = True
        self._facts = Facts()

    def _check(self, requests: Sequence[EditRequest]) -> None:
        for request in requests:
            if not request.subject:
                raise ValueError(f"subject: expected one, to find the fact by, of the request {request.prompt!r}")

    def _take(self, request: EditRequest) -> None:
        assert request.subject is not None
        self._facts.add(request.prompt, request.subject, request.target)

    def _asked(self, prompt: str, room: int) -> str:
        about = self._facts.about(prompt)[-self._at_most :] if self._told else []
        told = [closed(joined(fact.prompt.rstrip(), fact.target.strip()), fact.prompt) for fact in about]
        while told and not self._fits(asked := joined(*told, prompt), room):
            del told[0]
        return asked if told else prompt

    def _fits(self, prompt: str, room: int) -> bool:
        return self._limit is None or len(self.encoder.prompt(prompt).ids) + room <= self._limit

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Nothing is told while this context lasts; may be nested."""
        before, self._told = self._told, False
        try:
            yield
        finally:
            self._told = before

    def state(self) -> dict[str, Tensor]:
        """The facts, as JSON in bytes: states are tensors."""
        return {"facts": self._facts.record}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go to a state that ``state()`` returned; ``edits`` isn't part of it."""
        self._facts = Facts(state["facts"])
