"""Decides on the device when an edit ends, so that the host may begin a step without having seen the one before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from baft_kernels.stiefel import NEAR

__all__ = ["Ending", "Watch"]


@dataclass(frozen=True)
class Watch:
    """Which losses end an edit. It ends with a stretch of steps that found none of them at ``stop_below`` or above.

    Attributes:
        edits: the losses of a step that count, boolean [E].
        first, last: whether the step is the first, the last one of a stretch, boolean [].
    """

    edits: Tensor
    first: Tensor
    last: Tensor


class Ending:
    """Whether steps still change anything: one that is on hold leaves no trace, and those after it are on hold too.

    Args:
        stop_below: a loss below it is low enough.
        device: where it is decided.

    Attributes:
        held: 1 if the next step is on hold, else 0; float32 [], as AdamW takes it.
        by_host: whether the host has put steps on hold: then those heed ``held`` that no loss is to end, too.
    """

    def __init__(self, stop_below: float, device: torch.device) -> None:
        self.stop_below = stop_below
        self.held = torch.zeros((), device=device)
        self.by_host = False
        self._highest = torch.zeros((), device=device)

    def release(self) -> None:
        """Let the next step count."""
        self.held.zero_()

    @contextmanager
    def on_hold(self) -> Iterator[None]:
        """What is run meanwhile leaves no trace, and what is captured meanwhile can be put on hold."""
        before = self.held.clone()
        self.held.fill_(1.0)
        self.by_host = True
        try:
            yield
        finally:
            self.by_host = False
            self.held.copy_(before)

    @torch.no_grad()
    def judge(self, per_edit: Tensor, loss: Tensor, watch: Watch) -> Tensor:
        """Look at what a step found.

        Args:
            per_edit: each edit's loss, [E].
            loss: all that the step is to lower, [].
            watch: which of ``per_edit`` count.

        Returns:
            1 if this step's update is to be left out, else 0, as ``held``: it is on hold, or ``loss`` isn't finite.
        """
        here = self.held.device  # which isn't the losses' where a model is spread over several
        left_out = torch.maximum(self.held, (~loss.isfinite()).float().to(here))
        highest = torch.where(watch.edits, per_edit.to(here), -torch.inf).max()
        highest = torch.where(watch.first, highest, torch.maximum(self._highest, highest))
        self._highest.copy_(torch.where(self.held > 0, self._highest, highest))
        # In float64, as the host compares: of a stretch that both have seen whole the two never disagree. Of a settling
        # round that another process began this one hasn't, but nothing follows its last step that could be held.
        over = watch.last & (highest.double() < self.stop_below)
        self.held.copy_(torch.maximum(left_out, over.float()))
        return left_out

    @torch.no_grad()
    def await_retraction(self, distances: Tensor) -> None:
        """Hold what comes after bases that were left as they are, by the distances that ``retract_near_`` returned."""
        far = (~(distances <= NEAR)).any()
        self.held.copy_(torch.maximum(self.held, far.float().to(self.held.device)))
