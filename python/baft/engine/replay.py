"""Runs a frozen model from its first edited block on, and its head at chosen tokens only.

Below the first intervention nothing changes from step to step: the output of the first edited block, before its edit,
is a constant of the text. Where it is known, the blocks up to there are replaced by it while the model's own forward
runs; embeddings, masks, rotary tables, whatever a family computes between its blocks, and what it does to logits stay
the model's own. No gradient goes below the first edit, since nothing there asks for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from baft.attach import Blocks
from baft.engine.grid import Grid

__all__ = ["Observed", "Ran", "Replay"]

Forward = Callable[..., Any]


class Ran(NamedTuple):
    """Logits at chosen cells, [M, V]; the unedited model's of what its head was given elsewhere, [K, V], or None; and
    what the head would be given at further cells, [N, d], or None."""

    logits: Tensor
    unedited: Tensor | None
    head_input: Tensor | None


class Observed(NamedTuple):
    """What the first edited block returns, before its edit, and what the head is given, or None; both [G, W, d]."""

    prefix: Tensor
    head_input: Tensor | None


class Replay:
    """The replaying of one model.

    Args:
        model: frozen.
        blocks: its decoder blocks.
        first: the first one that is edited.

    Raises:
        ValueError: if the model doesn't say which module is its head.
    """

    def __init__(self, model: PreTrainedModel, blocks: Blocks, first: int) -> None:
        self.model = model
        self.blocks = blocks
        self.first = first
        self.head = _head(model)
        # Known when the model has been observed: whether blocks return tuples, and whether the head's logits are the
        # model's own, on the device of what the head is given: a model may scale or cap them, or spread the head.
        self._returns_tuple = False
        self.ends_with_head = False

    @torch.no_grad()
    def observe(self, grid: Grid, *, to_the_head: bool = True) -> Observed:
        """Run the model as it is on ``grid``, or its blocks up to the first edited one alone.

        Interventions are to be switched off around it.
        """
        seen: dict[str, Tensor] = {}
        block = self.blocks.modules[self.first]
        run_block, run_head = block.forward, self.head.forward

        def watch_block(*args: Any, **kwargs: Any) -> Any:
            output = run_block(*args, **kwargs)
            self._returns_tuple = isinstance(output, tuple)
            seen["prefix"] = output[0] if self._returns_tuple else output
            return output

        def watch_head(x: Tensor) -> Any:
            seen["head_input"] = x
            seen["logits"] = run_head(x[:, :1])
            return seen["logits"]

        skipped = () if to_the_head else tuple(self.blocks.modules[self.first + 1 :])
        through = [(later, self._returning(None)) for later in skipped]
        with _forwards([(block, watch_block), (self.head, watch_head), *through]):
            logits = self.model(**grid.inputs()).logits
        if not to_the_head:
            return Observed(seen["prefix"], None)
        self.ends_with_head = logits is seen["logits"] and logits.device == seen["head_input"].device
        return Observed(seen["prefix"], seen["head_input"])

    @contextmanager
    def run(
        self,
        grid: Grid,
        cells: Tensor,
        *,
        prefix: Tensor | None = None,
        unedited_input: Tensor | None = None,
        further: Tensor | None = None,
        head_everywhere: bool = False,
    ) -> Iterator[Ran]:
        """Run the model; to be left after the backward pass, since checkpointed blocks are run once more in it.

        Args:
            grid: the texts.
            cells: where logits are wanted, [M].
            prefix: of each cell what ``observe`` saw of the first edited block, [G, W, d], at padding anything finite;
                None runs the blocks up to there.
            unedited_input: what the head was given elsewhere by the unedited model, [K, d], or None.
            further: cells where the head's input is wanted, [N], or None.
            head_everywhere: make the logits of every cell, and choose then.

        Yields:
            Logits at ``cells``; of ``unedited_input``, which take no gradient; and the head's input at ``further``.
        """
        run_head, seen = self.head.forward, None

        def head(x: Tensor) -> Tensor:
            nonlocal seen
            x = x.flatten(0, -2)
            if further is not None:
                seen = x.index_select(0, further.to(x.device))
            logits: Tensor = run_head(x if head_everywhere else x.index_select(0, cells.to(x.device)))
            if unedited_input is not None:
                with torch.no_grad():
                    unedited = run_head(unedited_input)
                logits = torch.cat((logits, unedited))
            return logits.unsqueeze(0)  # as a batch of one, for what the model does to logits

        blocks: list[tuple[nn.Module, Forward]] = []
        if prefix is not None:
            blocks += [(block, self._returning(None)) for block in self.blocks.modules[: self.first]]
            blocks.append((self.blocks.modules[self.first], self._returning(prefix)))
        with _forwards(blocks):
            with _forwards([(self.head, head)]):
                logits = self.model(**grid.inputs()).logits.squeeze(0)
            unedited = None
            if unedited_input is not None:
                logits, unedited = logits.split((len(logits) - len(unedited_input), len(unedited_input)))
            yield Ran(
                logits.index_select(0, cells.to(logits.device)) if head_everywhere else logits,
                None if unedited is None else unedited.detach(),
                seen,
            )

    def _returning(self, h: Tensor | None) -> Forward:
        """A block's forward that returns ``h``, or what it is given."""

        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            out = hidden_states if h is None else h
            return (out,) if self._returns_tuple else out

        return forward


def _head(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: expected one that knows its head (get_output_embeddings), got {type(model).__name__}")
    return head


@contextmanager
def _forwards(replaced: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Let modules run other forwards than their own; their hooks stay."""
    before = [(module, vars(module).get("forward")) for module, _ in replaced]
    try:
        for module, forward in replaced:
            module.forward = forward  # on the object: its class keeps its own
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own
