"""The face of the pipeline: edit a model, use it, save what was edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft import storage
from baft.attach import Attachment, find_blocks
from baft.bank import AdapterBank
from baft.config import BaftConfig
from baft.editing import EditOutcome, Mode
from baft.engine.abreast import EditsAbreast
from baft.engine.calibration import calibrate_gates
from baft.engine.encoding import Encoded, Encoder
from baft.engine.generation import force_answers, generate_texts
from baft.engine.modes import evaluating, frozen_for_editing
from baft.engine.options import EngineOptions
from baft.engine.passes import Passes
from baft.engine.schedule import Curve, OnStep, consolidate, edit_batch, edit_next
from baft.engine.trainer import Trainer
from baft.engine.unrelated import UnrelatedPool
from baft.positions import Positions
from baft.requests import EditRequest
from baft_kernels import BaftIntervention

__all__ = ["BaftEditor", "EditOutcome", "Mode"]

# Texts that the unedited model writes where none are given, and that the gates are calibrated on.
_SELF_WRITTEN = 256
_CALIBRATION_TEXTS = 256


class BaftEditor:
    """Edits facts in a Hugging Face causal language model, outside its weights.

    The model object stays the caller's: its weights, modules and state dict aren't touched, and while the editor is on
    it, everything that runs the model runs it edited, the caller's own ``model.generate`` included.

    Args:
        model: a decoder-only model; its blocks are found by structure (``baft.attach.find_blocks``).
        tokenizer: the model's.
        config: how to edit.
        unrelated: texts whose continuations shall stay as they are, for the locality loss and to calibrate the gates.
            None lets the unedited model write them itself, at the first edit.
        options: how the work is done; the result is the same, within rounding.

    Attributes:
        interventions: the trained modules, by block index as a string.
        edits: the requests that are edited in, in order.

    Raises:
        ValueError: for blocks that can't be found, a layer out of range, a rank above the model's width, a tokenizer
            that can't pad.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: BaftConfig | None = None,
        *,
        unrelated: Sequence[str] | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config = config or BaftConfig()
        self.encoder = Encoder(tokenizer, append_eos=config.append_eos, template=config.prompt_template)
        self.edits: list[EditRequest] = []
        blocks = find_blocks(model, config.blocks)
        generator = torch.Generator().manual_seed(config.seed)
        interventions: dict[int, BaftIntervention] = {}
        for layer in resolve_layers(config.layers, len(blocks.modules)):
            intervention = BaftIntervention(
                blocks.width,
                config.rank,
                gate_fn=config.gate_fn,
                backend=config.backend,
                generator=generator,
            )
            interventions[layer] = intervention.to(blocks.device(layer))
        self.interventions = nn.ModuleDict({str(layer): i for layer, i in interventions.items()})
        self.attachment = Attachment(blocks, interventions, Positions(config.positions))
        self._options = options or EngineOptions()
        self._unrelated = unrelated
        self._trainer: Trainer | None = None

    @property
    def name(self) -> str:
        """The method's name in tables: without gates it is LoReFT."""
        return "LoReFT" if self.config.gate_fn == "none" else "BaFT"

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited blocks, counted from 0."""
        return tuple(self.attachment.interventions)

    # -- editing ---------------------------------------------------------------------------------------------------

    def edit(
        self,
        requests: Sequence[EditRequest],
        mode: Mode = "sequential",
        *,
        on_edit: Callable[[EditOutcome], None] | None = None,
        on_step: OnStep | None = None,
    ) -> list[EditOutcome]:
        """Edit ``requests``.

        ``sequential`` edits one after another, so that all hold at the end; ``batch`` edits all at once, on top of what
        was edited before; ``single`` tries each alone, as ``edit_each`` does, and leaves the editor as it was: the edit
        is on only while ``on_edit`` runs, and comes back with ``load_state(outcome.state)``.

        Args:
            on_edit: called after each edit (of a batch: for each request after all of them), with the edit on.
            on_step: called after each training step of an edit.

        Returns:
            One outcome for each request, in order.

        Raises:
            ValueError: for an unknown mode, a request longer than the model's context, or, with
                ``positions="subject"``, a request without a subject in its prompt.
            RuntimeError: if the loss of a batched or sequential edit is no finite number any more.
        """
        if mode not in ("single", "batch", "sequential"):
            raise ValueError(f"mode: expected single, batch or sequential, got {mode!r}")
        rows = [self._encode(request) for request in requests]
        if not rows:
            return []
        if mode == "single":
            return self._try_each(requests, on_edit, on_step)
        trainer = self._begin()
        past = [self._encode(request) for request in self.edits]
        outcomes: list[EditOutcome] = []

        def finish(request: EditRequest, curve: Curve) -> None:
            outcomes.append(EditOutcome(len(outcomes), request, curve))
            if on_edit:
                on_edit(outcomes[-1])

        if mode == "batch":
            with frozen_for_editing(self.model):
                curve = edit_batch(trainer, rows, on_step)
            self.edits += requests
            for request in requests:
                finish(request, curve)
            return outcomes
        for request, row in zip(requests, rows, strict=True):
            with frozen_for_editing(self.model):
                curve = edit_next(trainer, row, past, on_step)
            self.edits.append(request)
            past.append(row)
            self._consolidate(trainer, past, on_step)
            finish(request, curve)
        return outcomes

    def edit_each(self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None) -> Iterator[EditOutcome]:
        """Edit each of ``requests`` alone, from where the editor stands, and leave the editor as it was.

        Several are trained at a time, in one pass through the model, and each ends when its own loss is low enough.

        Yields:
            Outcomes as they come, in no certain order. One that ``curve.diverged`` has done no harm to others.

        Raises:
            ValueError: as ``edit``.
        """
        rows = [self._encode(request) for request in requests]
        if not rows:
            return
        past = [self._encode(request) for request in self.edits]
        edits = EditsAbreast(self._begin(), rows, past, self._options.slots)
        while edits.left:
            with frozen_for_editing(self.model):
                finished = edits.advance(on_step)
            for one in finished:
                yield EditOutcome(one.request, requests[one.request], one.curve, one.state)

    def gate_usage(self, requests: Sequence[EditRequest]) -> dict[int, Tensor]:
        """By block the share of each basis in what the gates let through on prompts and targets of ``requests``.

        Returns:
            Shares [r] that sum to 1; nothing where there are no gates.
        """
        if self.config.gate_fn == "none" or not requests:
            return {}
        with frozen_for_editing(self.model):
            usage = self._begin().step.usage_of([self._encode(request) for request in requests])
        return {layer: weights / weights.sum() for layer, weights in usage.items()}

    def engine_report(self) -> dict[str, Any]:
        """How the engine worked so far: how texts were laid out, and whether steps were replayed as graphs."""
        return self._trainer.report() if self._trainer else {}

    def _try_each(
        self, requests: Sequence[EditRequest], on_edit: Callable[[EditOutcome], None] | None, on_step: OnStep | None
    ) -> list[EditOutcome]:
        """``edit_each`` in the order of ``requests``, each edit on while ``on_edit`` runs."""
        outcomes = sorted(self.edit_each(requests, on_step=on_step), key=lambda outcome: outcome.index)
        if on_edit:
            before = self.state()
            for outcome in outcomes:
                assert outcome.state is not None
                self.edits.append(outcome.request)
                self.load_state(outcome.state)
                on_edit(outcome)
                self.load_state(before)
                self.edits.pop()
        return outcomes

    def _consolidate(self, trainer: Trainer, past: Sequence[Encoded], on_step: OnStep | None) -> None:
        """By the number of edits, and not at the end of a call, so that it doesn't matter how many calls there are."""
        every = self.config.consolidate_every
        if every and len(self.edits) % every == 0:
            with frozen_for_editing(self.model):
                consolidate(trainer, past, on_step)

    def _begin(self) -> Trainer:
        """Make ready for the first edit: unrelated texts, gates on the model's scale, the training step."""
        if self._trainer is not None:
            self._trainer.refresh()
            return self._trainer
        with evaluating(self.model):
            self._trainer = trainer = self._make_trainer()
            calibrate_gates(
                self.model,
                self.attachment,
                self.encoder,
                trainer.unrelated.draw(_CALIBRATION_TEXTS, torch.Generator().manual_seed(self.config.seed)),
                scale=self.config.gate_scale,
                bias=self.config.gate_bias,
            )
        return trainer

    def _make_trainer(self) -> Trainer:
        if not self._unrelated:
            self._unrelated = self._write_unrelated()
        pool = UnrelatedPool(self._unrelated, self.encoder)
        passes = Passes(self.model, self.attachment, self.encoder, pool, self._options)
        return Trainer(passes, self.config, pool)

    def _encode(self, request: EditRequest) -> Encoded:
        row = self.encoder.pair(request.prompt, request.target, request.subject)
        if self.config.positions == "subject" and row.subject is None:
            raise ValueError(
                f'positions="subject": expected a subject in the prompt {request.prompt!r}, got {request.subject!r}'
            )
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and len(row.ids) > limit:
            raise ValueError(
                f"prompt: expected at most {limit} tokens with its target, got {len(row.ids)} in {request.prompt!r}"
            )
        return row

    def _write_unrelated(self) -> list[str]:
        """Texts that the unedited model writes from nothing: what it knows, in its own words."""
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        ids = torch.full((_SELF_WRITTEN, 1), start, device=self.model.device)
        with torch.random.fork_rng(), self.disabled(), torch.no_grad():
            torch.manual_seed(self.config.seed)
            written = self.model.generate(  # type: ignore[operator]  # transformers types it as a tensor or module
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                max_new_tokens=32,
                pad_token_id=self.encoder.pad_id,
            )
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            raise ValueError("unrelated: expected texts, since the unedited model wrote none of its own")
        return texts

    # -- using the edited model ------------------------------------------------------------------------------------

    @overload
    def generate(self, prompts: str, **options: Any) -> str: ...
    @overload
    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]: ...
    def generate(self, prompts: str | Sequence[str], **options: Any) -> str | list[str]:
        """Continue one prompt, or each of several, under the edits; greedy by default.

        Args:
            prompts: a text, or a sequence of texts.
            options: ``subjects`` (one for each prompt, for ``positions="subject"``), ``adapters`` and ``adapter_ids``
                (a ``bank``, and the number of the edited model that continues each prompt), ``max_new_tokens`` (32),
                ``batch_size`` (64), ``on_batch`` (called after each), and all that transformers' ``generate`` takes.

        Returns:
            The continuation, or a list of them, without the prompts.
        """
        if isinstance(prompts, str):
            return generate_texts(self.model, self.attachment, self.encoder, [prompts], **options)[0]
        return generate_texts(self.model, self.attachment, self.encoder, prompts, **options)

    def bank(self, states: Sequence[Mapping[str, Tensor]]) -> AdapterBank:
        """Edited models side by side: ``generate(prompts, adapters=bank, adapter_ids=...)`` asks each prompt of one.

        Args:
            states: as ``EditOutcome.state``, ``state()`` or ``parameters()``.

        Raises:
            ValueError: for no states, or one of another editor.
        """
        return AdapterBank(self.attachment.interventions, states)

    def force(self, pairs: Sequence[tuple[str, str]], **options: Any) -> list[tuple[list[int], list[int]]]:
        """Teacher forcing under the edits; see ``baft.engine.generation.force_answers``."""
        return force_answers(self.model, self.attachment, self.encoder, pairs, **options)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, exactly, while this context lasts."""
        with self.attachment.disabled():
            yield

    def remove(self) -> None:
        """Take the editor off the model for good."""
        self.attachment.remove()

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Copies of all that editing changes: parameters, optimiser moments, gate usage, random generator."""
        return {**self.parameters(), **(self._trainer.state() if self._trainer else {})}

    def parameters(self) -> dict[str, Tensor]:
        """Copies of the interventions' parameters, as ``layers.{block}.{name}``."""
        return {f"layers.{name}": p.detach().clone() for name, p in self.interventions.named_parameters()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go to a state that ``state()`` returned; ``edits`` isn't part of it.

        Raises:
            ValueError: if its parameters are others than this editor's, by name or by shape.
        """
        own = {f"layers.{name}": parameter for name, parameter in self.interventions.named_parameters()}
        wanted = {name: list(parameter.shape) for name, parameter in own.items()}
        got = {name: list(tensor.shape) for name, tensor in state.items() if name.startswith("layers.")}
        if got != wanted:
            name = next(name for name in [*wanted, *got] if got.get(name) != wanted.get(name))
            raise ValueError(f"{name}: expected shape {wanted.get(name)}, got {got.get(name)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        if "generator" in state:
            self._trainer = self._trainer or self._make_trainer()
            self._trainer.load_state(state)
        else:  # it was taken before the first edit
            self._trainer = None

    def save_pretrained(self, folder: str | Path) -> None:
        """Save everything that using and continuing these edits needs; see ``baft.storage`` for the files.

        Raises:
            OSError: if it can't be written; files saved before are then still whole.
        """
        unrelated = self._trainer.unrelated.texts if self._trainer else self._unrelated
        storage.save_editor(
            folder,
            storage.SavedEditor(
                config=self.config,
                width=self.attachment.blocks.width,
                layers=self.layers,
                parameters=self.parameters(),
                training_state=self._trainer.state() if self._trainer else {},
                edits=self.edits,
                unrelated=None if unrelated is None else list(unrelated),
                base_model=str(self.model.config.name_or_path),
            ),
        )

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
    ) -> BaftEditor:
        """The editor that ``save_pretrained`` saved, on ``model``; editing goes on as if it had never stopped.

        Raises:
            ValueError: for a folder that can't be read, or that was saved for a model of other width or depth.
        """
        saved = storage.load_editor(folder)
        width = find_blocks(model, saved.config.blocks).width
        if saved.width != width:
            raise ValueError(
                f"{folder}: expected an adapter for hidden vectors of width {width}, got one for {saved.width}"
            )
        config = saved.config.model_copy(update={"layers": saved.layers})
        editor = cls(model, tokenizer, config, unrelated=saved.unrelated)
        try:
            editor.load_state({**saved.parameters, **saved.training_state})
        except (KeyError, ValueError, RuntimeError) as error:
            editor.remove()
            raise ValueError(
                f"{folder}: expected the tensors of {len(saved.layers)} layers, got others ({error})"
            ) from error
        editor.edits = list(saved.edits)
        return editor


def resolve_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The configured blocks, or the default ones for a model of ``count`` blocks.

    Raises:
        ValueError: for a block that the model hasn't, or one that is named twice.
    """
    if layers is None:
        chosen = min(4, count)
        layers = [(2 * k + 1) * count // (2 * chosen) for k in range(chosen)]
    bad = [layer for layer in layers if not 0 <= layer < count]
    if bad or len(set(layers)) != len(layers) or not layers:
        raise ValueError(f"layers: expected different blocks from 0 to {count - 1}, got {list(layers)}")
    return tuple(layers)
