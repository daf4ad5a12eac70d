"""What any method of editing has in common: its modes, what comes of a request, and what a run needs of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, overload, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft.config import BaftConfig
from baft.engine.continuations import KeptContinuations
from baft.engine.encoding import Encoder
from baft.engine.schedule import Curve, OnStep
from baft.requests import EditRequest

__all__ = [
    "EditOutcome",
    "Editor",
    "Gated",
    "LooksAhead",
    "Mode",
    "OnEdit",
    "OnPart",
    "OnRound",
    "Settling",
    "SideBySide",
    "check_mode",
    "check_requests",
    "try_each",
]

Mode = Literal["single", "batch", "sequential"]


@dataclass(frozen=True)
class EditOutcome:
    """What became of one request.

    Attributes:
        index: the request's place among those given.
        request: what was asked.
        curve: how it trained; all requests of a batch share one curve.
        state: in single mode, the editor's state with this request alone edited; give it to ``load_state``. It has no
            moments of the optimiser, which are twice as much as all the rest: who edits on begins with none.
    """

    index: int
    request: EditRequest
    curve: Curve
    state: dict[str, Tensor] | None = None


OnEdit = Callable[[EditOutcome], None]
"""Called after each edit, with the edit on."""

OnRound = Callable[[Curve], None]
"""Called after each settling round."""

OnPart = Callable[[], None]
"""Called between the parts of a long settling round: what ``state()`` returns there is gone on from in the middle."""


class Editor(Protocol):
    """A model under edit, by whatever method; ``BaftEditor`` says what each of these does.

    Attributes:
        config: how it edits; a method without bases leaves the fields alone that speak of them.
        encoder: text to tokens, as the method's own training has it.
        edits: the requests that are edited in, in order.
    """

    config: BaftConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    edits: list[EditRequest]

    @property
    def name(self) -> str:
        """The method's name in tables."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited blocks, counted from 0; none if the method edits no block."""

    def edit(
        self,
        requests: Sequence[EditRequest],
        mode: Mode = "sequential",
        *,
        on_edit: OnEdit | None = None,
        on_step: OnStep | None = None,
    ) -> list[EditOutcome]:
        """Edit ``requests``."""

    def edit_each(self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None) -> Iterator[EditOutcome]:
        """Edit each of ``requests`` alone, and leave the editor as it was."""

    @overload
    def generate(self, prompts: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]: ...
    def generate(self, prompts: str | Sequence[str], **options: Any) -> str | list[str]:
        """Continue one prompt, or each of several, under the edits."""

    def force(self, pairs: Sequence[tuple[str, str]], **options: Any) -> list[tuple[list[int], list[int]]]:
        """Teacher forcing under the edits."""

    def disabled(self) -> AbstractContextManager[None]:
        """The base model, exactly, while this context lasts."""

    def remove(self) -> None:
        """Take the editor off the model for good."""

    def parameters(self) -> dict[str, Tensor]:
        """Copies of what is trained."""

    def state(self) -> dict[str, Tensor]:
        """Copies of all that editing changes, ``edits`` apart: what continuing needs."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go to a state that ``state()`` returned."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Save what using these edits needs."""

    def engine_report(self) -> dict[str, Any]:
        """How the engine worked so far, for people."""


@runtime_checkable
class SideBySide(Protocol):
    """An editor that can be asked several of its states in one batch."""

    def bank(self, states: Sequence[Mapping[str, Tensor]]) -> Any:
        """Those states, for ``generate`` and ``force`` as ``adapters``."""


@runtime_checkable
class Gated(Protocol):
    """An editor whose bases have gates."""

    def gate_usage(self, requests: Sequence[EditRequest]) -> dict[int, Tensor]:
        """By block the share that each basis has in all that the gates let through on ``requests``, [r]."""


@runtime_checkable
class LooksAhead(Protocol):
    """An editor that gains by knowing what it will be asked for."""

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Raise what editing each of ``requests`` would: ValueError for one that can't be edited."""

    def look_ahead(self, requests: Sequence[EditRequest]) -> None:
        """Ask the unedited model, together, all that editing each of ``requests`` will ask of it."""

    def keep_written_in(self, kept: KeptContinuations | None) -> None:
        """Keep what it wrote in ``kept``, and ask for nothing that is there; None remembers what is to come."""


@runtime_checkable
class Settling(Protocol):
    """An editor that goes through all its edits once more when there are no others to come."""

    def settle(self, *, done: int = 0, on_round: OnRound | None = None, on_part: OnPart | None = None) -> list[Curve]:
        """``settling_rounds`` of the configuration, or what is left of them."""


def check_mode(mode: str) -> None:
    """Make sure that there is such a mode.

    Raises:
        ValueError: if there isn't.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode: expected single, batch or sequential, got {mode!r}")


def check_requests(requests: Sequence[EditRequest]) -> None:
    """Make sure that they are requests, in a list or another sequence.

    Raises:
        ValueError: if they aren't; one alone isn't either.
    """
    expected = "requests: expected a list of EditRequest"
    if not isinstance(requests, Sequence):
        raise ValueError(f"{expected}, got {type(requests).__name__}")
    for number, request in enumerate(requests):
        if not isinstance(request, EditRequest):
            raise ValueError(f"{expected}, got {type(request).__name__} at {number}")


def try_each(
    editor: Editor, requests: Sequence[EditRequest], on_edit: OnEdit | None = None, on_step: OnStep | None = None
) -> list[EditOutcome]:
    """``edit_each`` in the order of ``requests``, each edit on while ``on_edit`` runs."""
    outcomes = sorted(editor.edit_each(requests, on_step=on_step), key=lambda outcome: outcome.index)
    if on_edit:
        before = editor.state()
        for outcome in outcomes:
            assert outcome.state is not None
            editor.edits.append(outcome.request)
            try:
                editor.load_state(outcome.state)
                on_edit(outcome)
            finally:
                editor.load_state(before)
                editor.edits.pop()
    return outcomes
