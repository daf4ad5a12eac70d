"""Puts interventions on the decoder blocks of any Hugging Face model, and takes them off again.

Forward hooks on the blocks edit their outputs; the model's weights, modules and state dict stay as they are. A
pre-hook on the blocks' parent sees each forward pass begin and works out which rows are to be edited.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baft.placement import device_of
from baft.positions import Positions, PromptTokens
from baft_kernels import BaftIntervention, BaftOutput, GroupedBaftIntervention

__all__ = ["Attachment", "Blocks", "LayerRecord", "find_blocks"]


@dataclass(frozen=True)
class Blocks:
    """A model's decoder blocks: their module path, the list itself, the module that calls them, and their width d."""

    path: str
    modules: nn.ModuleList
    parent: nn.Module
    width: int

    def device(self, layer: int) -> torch.device:
        return device_of(self.modules[layer])


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """Find the decoder blocks by structure: the one module list that has ``num_hidden_layers`` blocks of one class.

    Args:
        model: a Hugging Face causal language model, or anything with a ``config`` that has ``num_hidden_layers`` and
            ``hidden_size``.
        path: the list's module path ("model.layers"), for models where the search fails.

    Raises:
        ValueError: if there is no such list, or more than one; the message names what was found.
    """
    config: Any = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if path is not None:
        if path not in lists:
            raise ValueError(f"blocks: expected one of {', '.join(lists) or 'no module lists at all'}, got {path!r}")
        found = [path]
    else:
        found = [
            name
            for name, blocks in lists.items()
            if len(blocks) == config.num_hidden_layers
            and len({type(block) for block in blocks}) == 1
            and not any(name.startswith(f"{outer}.") for outer in lists)
        ]
        if len(found) != 1:
            sizes = ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items()) or "none"
            raise ValueError(
                f"blocks: expected one module list of {config.num_hidden_layers} decoder blocks in "
                f"{type(model).__name__}, found {len(found)}; its module lists are: {sizes}. Name one as blocks=..."
            )
    name = found[0]
    parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
    return Blocks(name, lists[name], parent, config.hidden_size)


@dataclass(frozen=True)
class LayerRecord:
    """What one intervention did in one forward pass: w and u, [B, S, r], and ||h||^2 of its input, [B, S]."""

    weights: Tensor
    update: Tensor
    squared_norm: Tensor


class Attachment:
    """Interventions on some blocks of a model, switched on.

    Args:
        blocks: where the decoder blocks are.
        interventions: by block index.
        positions: which rows they edit.

    Raises:
        ValueError: for a model that another one is on, whose edits would pass for the model's own.
    """

    def __init__(self, blocks: Blocks, interventions: Mapping[int, BaftIntervention], positions: Positions) -> None:
        # The hooks themselves tell, which outlive an editor that nobody holds any more.
        hooks = blocks.parent._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in hooks):
            raise ValueError(
                "model: expected one without an editor, got one that has one already: call that one's remove(), or "
                "load the model anew"
            )
        self.blocks = blocks
        self.interventions = dict(interventions)
        self.positions = positions
        self.enabled = True
        self._tokens: PromptTokens | None = None
        self._sets: tuple[Mapping[int, GroupedBaftIntervention], Tensor] | None = None
        self._rows_are_given = False
        self._rows: Tensor | None = None
        self._records: dict[int, LayerRecord] | None = None
        self._parent_signature = inspect.signature(blocks.parent.forward)
        self._handles = [blocks.parent.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        for layer in self.interventions:
            self._handles.append(blocks.modules[layer].register_forward_hook(self._edit_block(layer)))

    @property
    def rank(self) -> int:
        """The number of bases in each edited block."""
        return next(iter(self.interventions.values())).low_rank_dimension

    def remove(self) -> None:
        """Take the interventions off the model for good."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, exactly; may be nested."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def prompts(self, tokens: PromptTokens) -> Iterator[None]:
        """Say what the columns of the batches in this context are; without it, a first forward pass is all prompt."""
        before, self._tokens = self._tokens, tokens
        try:
            yield
        finally:
            self._tokens = before

    @contextmanager
    def rows(self, edited: Tensor | None) -> Iterator[None]:
        """Say which tokens are edited, boolean [B, S], or None for all, whatever the positions are."""
        before = self._rows_are_given, self._rows
        self._rows_are_given, self._rows = True, edited
        try:
            yield
        finally:
            self._rows_are_given, self._rows = before

    @contextmanager
    def sets(self, interventions: Mapping[int, GroupedBaftIntervention], of_sequence: Tensor) -> Iterator[None]:
        """Edit by other interventions, of several parameter sets: sequence i of a batch by set ``of_sequence[i]``.

        That each is the number of a set is the caller's to check. A batch that is a multiple of the known one holds
        beams, each sequence's next to each other.
        """
        before, self._sets = self._sets, (interventions, of_sequence)
        try:
            yield
        finally:
            self._sets = before

    @contextmanager
    def recording(self) -> Iterator[dict[int, LayerRecord]]:
        """Collect, by layer, what the interventions do in the last forward pass of this context."""
        before, self._records = self._records, {}
        try:
            yield self._records
        finally:
            self._records = before

    def _before_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.enabled or self._rows_are_given or self.positions.every_token:
            return  # and keep the last edited pass's rows: checkpointing may run its blocks once more, to go backward
        given = self._parent_signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        ids = given.get("input_ids")
        inputs: Tensor = given["inputs_embeds"] if ids is None else ids
        batch, width = inputs.shape[:2]
        cache = given.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        tokens = self._tokens or self._all_prompt(given.get("attention_mask"), inputs, past)
        self._rows = self.positions.rows(tokens, past, batch, width)

    @staticmethod
    def _all_prompt(mask: object, inputs: Tensor, past: int) -> PromptTokens:
        """Tokens of a pass with an empty cache are the prompt, later ones are generated.

        A mask that isn't [B, S] says nothing of padding: static caches come with 4-D masks, or a dict of them.
        """
        batch, width = inputs.shape[:2]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            prompt = mask.bool()
        else:
            prompt = torch.ones(batch, past + width, dtype=torch.bool, device=inputs.device)
        return PromptTokens(prompt[:, :0] if past else prompt)

    def _edit_block(self, layer: int) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            if not self.enabled:
                return None
            h = output[0] if isinstance(output, tuple) else output
            edited = self._edit(layer, h)
            if self._records is not None:
                squared_norm = h.detach().float().square().sum(-1)
                self._records[layer] = LayerRecord(edited.weights, edited.update, squared_norm)
            return (edited.out, *output[1:]) if isinstance(output, tuple) else edited.out

        return hook

    def _edit(self, layer: int, h: Tensor) -> BaftOutput:
        rows = None if self._rows is None else self._rows.to(h.device)
        if self._sets is None:
            return self.interventions[layer].edit(h, rows)
        interventions, of_sequence = self._sets
        beams = h.shape[0] // of_sequence.shape[0]
        # Who set them knows them to be right: to look at them here would wait for the device, in every layer.
        return interventions[layer].edit(h, of_sequence.repeat_interleave(beams).to(h.device), rows, ids_in_range=True)
