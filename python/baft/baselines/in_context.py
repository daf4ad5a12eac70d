"""The facts are told to the model before each prompt; nothing else of it changes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft.baselines.no_edit import NoEdit
from baft.config import BaftConfig
from baft.requests import EditRequest

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
        # Of each prompt the subject and the target, in the order of editing.
        self._facts: dict[str, tuple[str, str]] = {}

    def _check(self, requests: Sequence[EditRequest]) -> None:
        for request in requests:
            if not request.subject:
                raise ValueError(f"subject: expected one, to find the fact by, of the request {request.prompt!r}")

    def _take(self, request: EditRequest) -> None:
        assert request.subject is not None
        self._facts.pop(request.prompt, None)
        self._facts[request.prompt] = request.subject, request.target

    def _asked(self, prompt: str, room: int) -> str:
        about = [
            f"{known.rstrip()} {target.strip()}."
            for known, (subject, target) in self._facts.items()
            if self._told and _stands_in(subject, prompt)
        ]
        told = about[-self._at_most :]
        while told and not self._fits(asked := " ".join([*told, prompt]), room):
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
        text = json.dumps(list(self._facts.items()))
        return {"facts": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go to a state that ``state()`` returned; ``edits`` isn't part of it."""
        facts = json.loads(state["facts"].cpu().numpy().tobytes())
        self._facts = {prompt: (subject, target) for prompt, (subject, target) in facts}


def _stands_in(subject: str, prompt: str) -> bool:
    """Whether ``prompt`` names ``subject``, and not just a word that has it in it."""
    return subject in prompt and re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt) is not None
