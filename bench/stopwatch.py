"""Where the time of a training step goes: the seconds between the places that a step passes by."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["SECTIONS", "WRITING", "Stopwatch"]

WRITING = "writing texts"
SECTIONS = (
    "lower blocks",
    "upper blocks",
    "interventions",
    "head and losses",
    "backward",
    "optimiser",
    WRITING,
    "host",
)


class Stopwatch:
    """Seconds by section; time that no section claims is the host's: drawing texts, laying them out, Python.

    While texts are written, the model's blocks belong to that.

    On a GPU it waits for the device at each border, which takes from what runs ahead: shares are right, sums are not.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._section = "host"
        self._since = time.perf_counter()
        self._writing = 0

    def switch(self, section: str) -> str:
        """From here on ``section`` runs; returns the one before."""
        if self._writing:
            return self._section
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        before, self._section = self._section, section
        self.seconds[before] += now - self._since
        self._since = now
        return before

    @contextmanager
    def on(
        self, model: nn.Module, blocks: nn.ModuleList, first: int, calls: list[tuple[Any, str, str]]
    ) -> Iterator[None]:
        """Watch a model's passes.

        Args:
            blocks: its decoder blocks.
            first: the first one that is edited; it counts as a lower one.
            calls: functions to watch as well: the object or class that has it, its name there, and its section.
        """

        def at(section: str) -> Callable[..., None]:
            return lambda *_: self.switch(section) and None

        head = model.get_output_embeddings()
        handles = [
            blocks[0].register_forward_pre_hook(at("lower blocks")),
            blocks[first].register_forward_hook(at("upper blocks"), prepend=True),
            head.register_forward_pre_hook(at("head and losses")),
        ]
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in calls]
        for owner, name, section in [*calls, (torch.Tensor, "backward", "backward")]:
            originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, self._watched(getattr(owner, name), section))
        self.switch("host")
        self.seconds.clear()
        try:
            yield
        finally:
            self.switch("host")
            for handle in handles:
                handle.remove()
            for owner, name, original in reversed(originals):
                setattr(owner, name, original)

    def _watched(self, function: Callable[..., Any], section: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            before = self.switch(section)
            self._writing += section == WRITING
            try:
                return function(*args, **kwargs)
            finally:
                self._writing -= section == WRITING
                self.switch("host" if section in ("backward", "optimiser") else before)

        return watched
