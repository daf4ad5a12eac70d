"""The face of the pipeline: edit a model, use it, save what was edited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft import storage
from baft.attach import Attachment, find_blocks
from baft.bank import AdapterBank
from baft.config import BaftConfig
from baft.editing import EditOutcome, Mode, check_requests
from baft.engine.abreast import EditsAbreast
from baft.engine.encoding import Encoded
from baft.engine.growth import grow, set_new_gates
from baft.engine.history import Chunks
from baft.engine.learner import Learner
from baft.engine.modes import evaluating, frozen_for_editing
from baft.engine.options import EngineOptions
from baft.engine.passes import Passes
from baft.engine.schedule import OnStep
from baft.engine.trainer import Trainer
from baft.fingerprint import Fingerprint, fingerprint_of
from baft.positions import Positions
from baft.requests import EditRequest
from baft.trained import TrainedEditor
from baft_kernels import BaftIntervention

__all__ = ["BaftEditor", "EditOutcome", "Mode"]


class BaftEditor(TrainedEditor):
    """Edits facts in a Hugging Face causal language model, outside its weights.

    The model object stays the caller's: its weights, modules and state dict aren't touched, and while the editor is on
    it, everything that runs the model runs it edited, the caller's own ``model.generate`` included.

    Args:
        model: a decoder-only model; its blocks are found by structure (``baft.attach.find_blocks``).
        tokenizer: the model's.
        config: how to edit.
        unrelated: texts whose continuations shall stay as they are, for the locality loss and to calibrate the gates.
            None lets the unedited model write them itself, at the first edit; so does an empty list, which
            ``locality_weight=0`` allows, for the gates.
        options: how the work is done; the result is the same, within rounding.

    Attributes:
        interventions: the trained modules, by block index as a string.
        edits: the requests that are edited in, in order.

    Raises:
        ValueError: for blocks that can't be found, a layer out of range, a rank (or ``max_rank``) above the model's
            width, a tokenizer that can't pad, unrelated texts that are none or no list.
    """

    _trainer: Trainer | None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: BaftConfig | None = None,
        *,
        unrelated: Sequence[str] | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        config = config or BaftConfig()
        super().__init__(model, tokenizer, config, unrelated)
        blocks = find_blocks(model, config.blocks)
        self._highest_rank = blocks.width if config.max_rank is None else config.max_rank
        if self._highest_rank > blocks.width:
            raise ValueError(f"max_rank: expected at most {blocks.width}, the model's width, got {config.max_rank}")
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

    @property
    def name(self) -> str:
        """The method's name in tables: without gates it is LoReFT."""
        return "LoReFT" if self.config.gate_fn == "none" else "BaFT"

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited blocks, counted from 0."""
        return tuple(self.attachment.interventions)

    def edit_each(self, requests: Sequence[EditRequest], *, on_step: OnStep | None = None) -> Iterator[EditOutcome]:
        """Edit each of ``requests`` alone, from where the editor stands, and leave the editor as it was.

        Several are trained at a time, in one pass through the model. Each ends by itself: with its own loss, from
        ``min_steps`` to ``max_steps``, which by default are both 20. Several processes each give their own part of the
        requests, one perhaps none, and make ready together.

        Returns:
            Outcomes as they come, in no certain order. One that ``curve.diverged`` has done no harm to others.

        Raises:
            ValueError: as ``edit``.
        """
        check_requests(requests)
        rows = [self._chunks(request) for request in requests]
        if rows or self._options.world.size > 1:
            self._begin()  # now: whoever waits for the first outcome may have to wait for other processes, too
        return self._each(requests, rows, on_step)

    def _each(
        self, requests: Sequence[EditRequest], rows: Sequence[Chunks], on_step: OnStep | None
    ) -> Iterator[EditOutcome]:
        if not rows:
            return
        edits = EditsAbreast(self._begin(), rows, self._history.rows(), self._options.slots)
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

    def _begin(self) -> Trainer:
        """Make ready for the first edit: unrelated texts, gates on the model's scale, the training step.

        Parameters that edit already came without what trained them, and keep their gates.
        """
        if self._trainer is not None:
            self._trainer.refresh()
            return self._trainer
        with evaluating(self.model):
            trainer = self._make_trainer()
        if trainer.step.sets.are_identity():
            set_new_gates(trainer, self.config.gate_bias)
        self._trainer = trainer  # last: what is broken off before begins anew
        return trainer

    def _tend(self, trainer: Learner, past: Sequence[Encoded], on_step: OnStep | None) -> None:
        """Growth before consolidation, which then puts the new bases to use."""
        every = self.config.grow_every
        if every and len(self.edits) % every == 0:
            assert isinstance(trainer, Trainer)
            grow(trainer, self._highest_rank)
        super()._tend(trainer, past, on_step)

    def _write_unrelated(self, number: int) -> list[str]:
        return self._options.world.first_ones(super()._write_unrelated(number))

    def _make_trainer(self) -> Trainer:
        pool = self._unrelated_texts()
        surroundings = self._surroundings()
        passes = Passes(self.model, self.attachment, self.encoder, pool, surroundings, self._options)
        return Trainer(passes, self.config, pool, surroundings)

    def bank(self, states: Sequence[Mapping[str, Tensor]]) -> AdapterBank:
        """Edited models side by side: ``generate(prompts, adapters=bank, adapter_ids=...)`` asks each prompt of one.

        Args:
            states: as ``EditOutcome.state``, ``state()`` or ``parameters()``.

        Raises:
            ValueError: for no states, or one of another editor.
        """
        return AdapterBank(self.attachment.interventions, states)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, exactly, while this context lasts."""
        with self.attachment.disabled():
            yield

    def remove(self) -> None:
        """Take the editor off the model for good."""
        self.attachment.remove()

    # -- state -----------------------------------------------------------------------------------------------------

    def _own(self) -> Mapping[str, nn.Parameter]:
        return {f"layers.{name}": parameter for name, parameter in self.interventions.named_parameters()}

    def _shapes_in(self, state: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """As the interventions have them, but for the rank, where growth may have led to another one."""
        rank = self._rank_of(state)
        return {name: [rank, *shape[1:]] for name, shape in super()._shapes_in(state).items()}

    def _rank_of(self, state: Mapping[str, Tensor]) -> int:
        own, config = self.attachment.rank, self.config
        got = next((len(value) for name, value in state.items() if name.endswith(".basis")), own)
        return got if config.grow_every and config.rank <= got <= self._highest_rank else own

    def _take(self, state: Mapping[str, Tensor]) -> None:
        if self._rank_of(state) == self.attachment.rank:
            super()._take(state)
            return
        for layer, intervention in self.attachment.interventions.items():
            prefix = f"layers.{layer}."
            intervention.replace({name.removeprefix(prefix): value for name, value in state.items()})
        if self._trainer:
            self._trainer.renew()

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
                fingerprint=self._fingerprint(),
            ),
        )

    def _fingerprint(self) -> Fingerprint:
        """What the model is known by: of its weights the embedding's and the edited blocks', which are quickly read."""
        blocks = {f"block {layer}": self.attachment.blocks.modules[layer] for layer in self.layers}
        return fingerprint_of(self.model, {"the embedding": self.model.get_input_embeddings(), **blocks})

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: str | Path,
        *,
        options: EngineOptions | None = None,
        backend: str = "auto",
        any_model: bool = False,
    ) -> BaftEditor:
        """The editor that ``save_pretrained`` saved, on ``model``; editing goes on as if it had never stopped.

        Args:
            options: how the work is done here.
            backend: of the op here, in place of that of the editor that was saved: the folder knows nothing of either,
                which are the machine's and no part of what was learned.
            any_model: take another model of the same width and depth than the one that the edits were made on, such as
                a fine-tuned variant. Otherwise its architecture, and its weights in the embedding and the edited
                blocks, have to be the same, as far as they can be compared: those in another dtype, quantised, or in
                parts in several processes can't.

        Raises:
            ValueError: for a folder that can't be read, or that was saved for another model.
        """
        saved = storage.load_editor(folder)
        width = find_blocks(model, saved.config.blocks).width
        if saved.width != width:
            raise ValueError(
                f"{folder}: expected an adapter for hidden vectors of width {width}, got one for {saved.width}"
            )
        config = saved.config.model_copy(update={"layers": saved.layers, "backend": backend})
        editor = cls(model, tokenizer, config, unrelated=saved.unrelated, options=options)
        different = saved.fingerprint.differences(editor._fingerprint()) if saved.fingerprint and not any_model else []
        if different:
            editor.remove()
            raise ValueError(
                f"{folder}: expected the model that it was saved for, {saved.base_model!r}, got "
                f"{model.config.name_or_path!r}, with {'; '.join(different)}: any_model takes it all the same"
            )
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
