"""What editors have in common that learn edits by training, whatever it is that they train."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft.attach import Attachment
from baft.config import BaftConfig
from baft.editing import EditOutcome, Mode, OnEdit, OnPart, OnRound, check_mode, check_requests, try_each
from baft.engine.continuations import Continuations, KeptContinuations
from baft.engine.encoding import Encoded, Encoder, in_chunks, known_ids, most_tokens
from baft.engine.generation import force_answers, generate_texts
from baft.engine.history import Chunks, History, latest
from baft.engine.learner import DivergedError, Learner
from baft.engine.modes import frozen_for_editing
from baft.engine.schedule import Curve, OnStep, consolidate, edit_batch, edit_next, settle
from baft.engine.self_written import write_texts
from baft.engine.surroundings import WRITTEN_AHEAD, Surroundings
from baft.engine.unrelated import UnrelatedPool
from baft.placement import keep_differentiable
from baft.requests import EditRequest, numbered

__all__ = ["TrainedEditor"]

# Unrelated texts that there are at least, where the unedited model writes some.
_ENOUGH = 256


class TrainedEditor(ABC):
    """An editor that trains; what it trains is its subclass's to say.

    Args:
        model: a decoder-only model.
        tokenizer: the model's.
        config: how to edit.
        unrelated: texts whose continuations shall stay as they are; None lets the unedited model write them itself, at
            the first edit.

    Attributes:
        attachment: what the subclass puts on the model's blocks.

    Raises:
        ValueError: for a tokenizer that can't pad, or whose EOS token the model doesn't know; for a single text in
            place of several, and an empty list of them, unless ``locality_weight`` is 0.
    """

    attachment: Attachment

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: BaftConfig,
        unrelated: Sequence[str] | None,
    ) -> None:
        _check_texts(unrelated, config)
        keep_differentiable(model)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self.encoder = Encoder(
            tokenizer, append_eos=config.append_eos, template=config.prompt_template, ids=known_ids(model)
        )
        self._history = History(self._chunks)
        self._unrelated = unrelated
        self._given = len(unrelated or ())
        self._continuations = Continuations(model, self.disabled, self.encoder)
        self._trainer: Learner | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """The method's name in tables."""

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """The edited blocks, counted from 0."""

    @property
    def edits(self) -> list[EditRequest]:
        """The requests that are edited in, in order; who goes back by ``load_state`` takes back the last ones here."""
        return self._history.requests

    @edits.setter
    def edits(self, requests: Sequence[EditRequest]) -> None:
        self._history.requests = list(requests)

    @property
    def unrelated_texts(self) -> tuple[int, int] | None:
        """How many texts that shall stay as they are were given, and how many the model wrote; None before it does."""
        return None if self._unrelated is None else (self._given, len(self._unrelated) - self._given)

    def fill_unrelated(self, requests: Sequence[EditRequest], written: Sequence[str] | None = None) -> list[str]:
        """Have the unedited model write what is missing where few unrelated texts were given, before the first edit.

        A handful is worse than none, for which it writes hundreds: what they don't speak of isn't left alone. What it
        writes of the subjects of ``requests`` may be what is to change: that is kept only where there is no other text.

        Args:
            written: what it wrote at an earlier time, in place of what it would write now.

        Returns:
            All that it wrote.
        """
        given = list(self._unrelated or ())
        if len(given) >= _ENOUGH:
            return []
        written = self._write_unrelated(_ENOUGH - len(given)) if written is None else list(written)
        subjects = {request.subject.casefold() for request in requests if request.subject}
        others = [text for text in written if not any(subject in text.casefold() for subject in subjects)]
        self._unrelated = given + (others if given else others or written)
        return written

    def engine_report(self) -> dict[str, Any]:
        """How the engine worked so far, for people."""
        return {}

    # -- editing ---------------------------------------------------------------------------------------------------

    def edit(
        self,
        requests: Sequence[EditRequest],
        mode: Mode = "sequential",
        *,
        on_edit: OnEdit | None = None,
        on_step: OnStep | None = None,
    ) -> list[EditOutcome]:
        """Edit ``requests``.

        ``sequential`` edits one after another, so that all hold at the end; ``batch`` edits all at once, on top of what
        was edited before. Of several with the same prompt the last one counts. ``single`` tries each alone, as
        ``edit_each`` does, and leaves the editor as it was: the edit is on only while ``on_edit`` runs, and comes back
        with ``load_state(outcome.state)``.

        An edit that is broken off, by whatever, leaves no trace: the editor is then as it was before that request, or
        before the batch.

        Args:
            on_edit: called after each edit (of a batch: for each request after all of them), with the edit on.
            on_step: called after each training step of an edit.

        Returns:
            One outcome for each request, in order.

        Raises:
            ValueError: for an unknown mode, what is no list of requests, a request longer than the model's context, or,
                with ``positions="subject"``, a request without a subject in its prompt.
            RuntimeError: if the loss of a batched or sequential edit is no finite number any more, or what it learned.
        """
        check_mode(mode)
        check_requests(requests)
        rows = [self._chunks(request) for request in requests]
        if not rows:
            return []
        if mode == "single":
            return try_each(self, requests, on_edit, on_step)
        trainer = self._begin()
        past = self._history.rows()
        trainer.remember(past)
        outcomes: list[EditOutcome] = []

        def keep(request: EditRequest, chunks: Chunks) -> None:
            self._history.add(request, chunks)
            trainer.remember(past)

        def finish(request: EditRequest, curve: Curve) -> None:
            outcomes.append(EditOutcome(len(outcomes), request, curve))
            if on_edit:
                on_edit(outcomes[-1])

        if mode == "batch":
            trainer.surroundings.write_ahead([chunks[0] for chunks in rows])
            with self._whole_or_not_at_all():
                curve = edit_batch(trainer, latest(requests, rows), past, on_step)
                self._check_finite(curve)
                for request, chunks in zip(requests, rows, strict=True):
                    keep(request, chunks)
            for request in requests:
                finish(request, curve)
            return outcomes
        for number, (request, chunks) in enumerate(zip(requests, rows, strict=True)):
            if number % WRITTEN_AHEAD == 0 and len(rows) > 1:
                following = rows[number : number + WRITTEN_AHEAD]
                trainer.surroundings.write_ahead([chunks[0] for chunks in following])
            with self._whole_or_not_at_all():
                curve = edit_next(trainer, chunks, past, on_step)
                self._check_finite(curve)
                keep(request, chunks)
                self._tend(trainer, past, on_step)
            finish(request, curve)
        return outcomes

    def edit_each(self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None) -> Iterator[EditOutcome]:
        """Edit each of ``requests`` alone, from where the editor stands, and leave the editor as it was.

        Raises:
            ValueError, RuntimeError: as ``edit``.
        """
        check_requests(requests)
        rows = [self._chunks(request) for request in requests]
        if not rows:
            return
        past = self._history.rows()
        learner, before = self._begin(), self.state()
        for index, (request, chunks) in enumerate(zip(requests, rows, strict=True)):
            try:
                with frozen_for_editing(self.model):
                    curve = edit_next(learner, chunks, past, on_step, alone=True)
                state = {**self.parameters(), **learner.course()}
            finally:
                self.load_state(before)
            yield EditOutcome(index, request, curve, state)

    def settle(
        self,
        *,
        done: int = 0,
        on_round: OnRound | None = None,
        on_part: OnPart | None = None,
        on_step: OnStep | None = None,
    ) -> list[Curve]:
        """Go through all that is edited in ``settling_rounds`` times more, at most: to be done after the last edit.

        What consolidates a sequence while it is edited has high learning rates again and again, and leaves the newest
        edits best and others less so. Here the rates fall along one cosine, and each round visits every edit once.

        Args:
            done: rounds that are done already, by an editor whose state this one was given.
            on_round: called after each round.
            on_part: called in the middle of a round, now and then if it is long.
            on_step: called after each training step.

        Returns:
            How each round trained, whose one loss is its mean. One that finds all losses below ``stop_below`` is the
            last.

        Raises:
            RuntimeError: if the loss is no finite number any more; the editor is then as it was before that round, or
                before the part of it that did it.
        """
        curves: list[Curve] = []
        for number in range(done, self.config.settling_rounds if self.edits else 0):
            curves.append(self._settle(number, on_part, on_step))
            if on_round:
                on_round(curves[-1])
            if curves[-1].converged:
                break
        return curves

    def _settle(self, number: int, on_part: OnPart | None, on_step: OnStep | None) -> Curve:
        """The settling round of a number, or what is left of it."""
        while True:
            trainer = self._begin()
            try:
                with self._whole_or_not_at_all():
                    curve = settle(trainer, self._history.rows(), number, on_step)
            except DivergedError:
                if self._trainer:
                    self._trainer.round = None  # nobody goes on with it
                raise
            if curve:
                return curve
            if on_part:
                on_part()

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Make sure that each of ``requests`` can be edited.

        Raises:
            ValueError: as ``edit``, with the request's number.
        """
        for number, request in enumerate(requests):
            try:
                self._encode(request)
            except ValueError as error:
                raise ValueError(f"{numbered(number, request)}: {error}") from error

    def look_ahead(self, requests: Sequence[EditRequest]) -> None:
        """Have the unedited model write together what editing each of ``requests`` will ask of it, and do no more.

        Who edits one request at a call, and knows which come next, saves time by it.

        Raises:
            ValueError: as ``edit``.
        """
        if requests:
            self._begin().surroundings.write_ahead([self._encode(request) for request in requests])

    def keep_written_in(self, kept: KeptContinuations | None) -> None:
        """Keep what the unedited model writes in ``kept``, and take it from there; None remembers what is to come."""
        self._continuations.keep_in(kept)

    @abstractmethod
    def _begin(self) -> Learner:
        """Make ready for the first edit."""

    @abstractmethod
    def _make_trainer(self) -> Learner:
        """The training, with nothing trained yet."""

    def _tend(self, trainer: Learner, past: Sequence[Encoded], on_step: OnStep | None) -> None:
        """What is due after an edit of a sequence.

        By the number of edits, and not at the end of a call, so that it doesn't matter how many calls there are, but
        for what texts that are written together may differ in (``Continuations``).
        """
        every = self.config.consolidate_every
        if every and len(self.edits) % every == 0:
            consolidate(trainer, past, on_step)

    @contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """Training on the frozen model that goes to its end, or else leaves the editor as it was."""
        before, held = self.state(), len(self.edits)
        try:
            with frozen_for_editing(self.model):
                yield
        except BaseException:  # an interrupt too
            self.load_state(before)
            del self.edits[held:]
            raise

    def _check_finite(self, curve: Curve) -> None:
        """An edit whose last loss was finite may have learned in that step what isn't."""
        if not all(bool(parameter.isfinite().all()) for parameter in self._own().values()):
            raise DivergedError(math.nan, curve.steps)

    def _chunks(self, request: EditRequest) -> Chunks:
        return in_chunks(self._encode(request), self.config.chunk_tokens)

    def _encode(self, request: EditRequest) -> Encoded:
        row = self.encoder.pair(request.prompt, request.target, request.subject)
        if self.attachment.positions.spec == "subject" and row.subject is None:
            raise ValueError(
                f'positions="subject": expected a subject in the prompt {request.prompt!r}, got {request.subject!r}'
            )
        limit = most_tokens(self.model)
        if limit is not None and len(row.ids) > limit:
            raise ValueError(
                f"prompt: expected at most {limit} tokens with its target, got {len(row.ids)} in "
                f"{shorten(request.prompt, 80)!r}"
            )
        return row

    def _unrelated_texts(self) -> UnrelatedPool:
        self._unrelated = self._unrelated or self._write_unrelated(_ENOUGH)
        if not self._unrelated:
            raise ValueError("unrelated: expected texts, since the unedited model wrote none of its own")
        return UnrelatedPool(self._unrelated, self.encoder, most_tokens(self.model))

    def _surroundings(self) -> Surroundings:
        self._continuations.forget_if_changed()
        wanted = self.config.locality_weight > 0 or self.config.retellings > 0
        count = self.config.subject_texts if wanted else 0
        return Surroundings(self._continuations, self.encoder, count, most_tokens(self.model))

    def _write_unrelated(self, number: int) -> list[str]:
        """What the unedited model writes in place of texts that nobody gave."""
        with self.disabled():
            return write_texts(self.model, self.encoder, number, self.config.seed)

    # -- using the edited model ------------------------------------------------------------------------------------

    @overload
    def generate(self, prompts: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]: ...
    def generate(self, prompts: str | Sequence[str], **options: Any) -> str | list[str]:
        """Continue one prompt, or each of several, under the edits.

        By default greedily: with the likeliest token each time, whatever penalties and the like the model's own
        generation configuration has. With options of transformers' ``generate`` that counts, but for its sampling.

        Args:
            prompts: a text, or a sequence of texts.
            options: ``subjects`` (one for each prompt, for ``positions="subject"``), ``adapters`` and ``adapter_ids``
                (``BaftEditor.bank``, and the number of the edited model that continues each prompt), ``max_new_tokens``
                (32), ``batch_size`` (64), ``on_batch`` (called after each), and what transformers' ``generate`` takes,
                as far as each prompt gets one text.

        Returns:
            The continuation, or a list of them, without the prompts.

        Raises:
            ValueError: for ``num_return_sequences`` above 1, or ``return_dict_in_generate``.
        """
        if isinstance(prompts, str):
            return generate_texts(self.model, self.attachment, self.encoder, [prompts], **options)[0]
        return generate_texts(self.model, self.attachment, self.encoder, prompts, **options)

    def force(self, pairs: Sequence[tuple[str, str]], **options: Any) -> list[tuple[list[int], list[int]]]:
        """Teacher forcing under the edits; see ``baft.engine.generation.force_answers``."""
        return force_answers(self.model, self.attachment, self.encoder, pairs, **options)

    @abstractmethod
    def disabled(self) -> AbstractContextManager[None]:
        """The base model, exactly, while this context lasts."""

    @abstractmethod
    def remove(self) -> None:
        """Take the editor off the model for good."""

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Copies of all that editing changes: parameters, optimiser moments, gate usage, random generator."""
        return {**self.parameters(), **(self._trainer.state() if self._trainer else {})}

    def parameters(self) -> dict[str, Tensor]:
        """Copies of what is trained, as ``layers.{block}.{name}``."""
        return {name: parameter.detach().clone() for name, parameter in self._own().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go to a state that ``state()`` returned; ``edits`` isn't part of it.

        After ``parameters()`` alone the next edit goes on from them with a new optimiser and random generator.

        Raises:
            ValueError: if its parameters are others than this editor's, by name or by shape.
        """
        wanted = self._shapes_in(state)
        got = {name: list(tensor.shape) for name, tensor in state.items() if name.startswith("layers.")}
        if got != wanted:
            name = next(name for name in [*wanted, *got] if got.get(name) != wanted.get(name))
            raise ValueError(f"{name}: expected shape {wanted.get(name)}, got {got.get(name)}")
        self._take(state)
        if "generator" in state:
            self._trainer = self._trainer or self._make_trainer()
            self._trainer.load_state(state)
        else:  # it was taken before the first edit, or is parameters alone
            self._trainer = None

    def _shapes_in(self, state: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """The shapes that the parameters must have in a state, by name."""
        return {name: list(parameter.shape) for name, parameter in self._own().items()}

    @torch.no_grad()
    def _take(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters of a state that was looked at."""
        for name, parameter in self._own().items():
            parameter.copy_(state[name])

    @abstractmethod
    def _own(self) -> Mapping[str, nn.Parameter]:
        """What is trained, as ``layers.{block}.{name}``."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None:
        """Save what using these edits needs."""


def _check_texts(unrelated: Sequence[str] | None, config: BaftConfig) -> None:
    if isinstance(unrelated, str):
        raise ValueError(f"unrelated: expected a list of texts, got the one text {unrelated!r}")
    if unrelated is not None and not len(unrelated) and config.locality_weight > 0:
        raise ValueError(
            "unrelated: expected texts that shall stay as they are, got an empty list; with None the unedited model "
            "writes some, and locality_weight=0 needs none"
        )
