"""Nothing is edited: what measures say of the model as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft.attach import Attachment, find_blocks
from baft.baselines.plain import answer_losses, logits_of
from baft.baselines.weights import save_baseline
from baft.config import BaftConfig
from baft.editing import EditOutcome, Mode, OnEdit, check_mode, check_requests, try_each
from baft.engine.encoding import Encoder, known_ids
from baft.engine.generation import force_answers, generate_texts
from baft.engine.modes import evaluating
from baft.engine.schedule import Curve, OnStep
from baft.placement import device_of
from baft.positions import Positions
from baft.requests import EditRequest

__all__ = ["NoEdit", "NoOptions"]


class NoOptions(BaseModel):
    """Nothing to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NoEdit:
    """Takes requests, and leaves everything as it is; the base of methods that train nothing.

    Args:
        model, tokenizer, config: as ``BaftEditor``'s.
        unrelated: not looked at.
        options: none.
    """

    name = "no edit"
    layers: tuple[int, ...] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: BaftConfig | None = None,
        *,
        unrelated: Sequence[str] | None = None,
        options: BaseModel | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config = config or BaftConfig()
        self.options = options or NoOptions()
        self.encoder = Encoder(
            tokenizer, append_eos=config.append_eos, template=config.prompt_template, ids=known_ids(model)
        )
        self.edits: list[EditRequest] = []
        # Generation asks who is attached; nobody is.
        self.attachment = Attachment(find_blocks(model, config.blocks), {}, Positions("all"))

    def edit(
        self,
        requests: Sequence[EditRequest],
        mode: Mode = "sequential",
        *,
        on_edit: OnEdit | None = None,
        on_step: OnStep | None = None,
    ) -> list[EditOutcome]:
        """Take ``requests``; each curve has one loss, what it is with the request taken, and no step.

        Raises:
            ValueError: for an unknown mode, what is no list of requests, or a request that can't be taken.
        """
        check_mode(mode)
        check_requests(requests)
        self._check(requests)
        if mode == "single":
            return try_each(self, requests, on_edit, on_step)
        outcomes: list[EditOutcome] = []
        together = [requests] if mode == "batch" else [[request] for request in requests]
        for group in together:
            for request in group:
                self._take(request)
                self.edits.append(request)
            for request in group:
                outcomes.append(EditOutcome(len(outcomes), request, self._curve(request)))
                if on_edit:
                    on_edit(outcomes[-1])
        return outcomes

    def edit_each(self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None) -> Iterator[EditOutcome]:
        """Take each of ``requests`` alone, and leave the editor as it was."""
        check_requests(requests)
        self._check(requests)
        before = self.state()
        for index, request in enumerate(requests):
            self._take(request)
            curve, state = self._curve(request), self.state()
            self.load_state(before)
            yield EditOutcome(index, request, curve, state)

    def _check(self, requests: Sequence[EditRequest]) -> None:
        """Refuse requests that ``_take`` couldn't take."""

    def _take(self, request: EditRequest) -> None:
        """What editing is here: nothing."""

    def _asked(self, prompt: str, room: int) -> str:
        """What the model is asked in place of ``prompt``, with ``room`` tokens to follow."""
        return prompt

    @torch.no_grad()
    def _curve(self, request: EditRequest) -> Curve:
        target = self.encoder.pair(request.prompt, request.target)
        room = len(target.ids) - target.prompt_length
        row = self.encoder.pair(self._asked(request.prompt, room), request.target)
        batch = self.encoder.batch([row], device_of(self.model))
        with evaluating(self.model):
            loss = float(answer_losses(logits_of(self.model, batch), batch.labels))
        return Curve([loss], converged=loss < self.config.stop_below)

    # -- using the model -------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompts: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]: ...
    def generate(self, prompts: str | Sequence[str], **options: Any) -> str | list[str]:
        """Continue one prompt, or each of several; ``options`` as ``BaftEditor``'s."""
        several = [prompts] if isinstance(prompts, str) else prompts
        options = {"max_new_tokens": 32, **options}
        asked = [self._asked(prompt, options["max_new_tokens"]) for prompt in several]
        texts = generate_texts(self.model, self.attachment, self.encoder, asked, **options)
        return texts[0] if isinstance(prompts, str) else texts

    def force(self, pairs: Sequence[tuple[str, str]], **options: Any) -> list[tuple[list[int], list[int]]]:
        """Teacher forcing; see ``baft.engine.generation.force_answers``."""
        asked = []
        for prompt, answer in pairs:
            row = self.encoder.pair(prompt, answer, append_eos=False)
            asked.append((self._asked(prompt, len(row.ids) - row.prompt_length), answer))
        return force_answers(self.model, self.attachment, self.encoder, asked, **options)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, as ever."""
        yield

    def remove(self) -> None:
        """Take the editor off the model for good."""
        self.attachment.remove()

    # -- state -----------------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, Tensor]:
        """None are trained."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Nothing changes."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go to a state that ``state()`` returned; ``edits`` isn't part of it."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the requests as JSON.

        Raises:
            OSError: if it can't be written.
        """
        save_baseline(folder, self, self.options, {})

    def engine_report(self) -> dict[str, Any]:
        """No engine works here."""
        return {}
