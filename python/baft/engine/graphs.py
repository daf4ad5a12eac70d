"""Steps as CUDA graphs: what a step launches is captured once for each shape of its inputs, and then replayed.

A step of a small model, or with few tokens, takes longer to launch than to run. A graph has all its launches in one.
It reads its inputs where they were when it was captured, so those of each step are copied there.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baft.engine.step import Found, StepInputs, TrainingStep

__all__ = ["Capture", "CudaCapture", "Graphs"]

Capture = Callable[[Callable[[], Found]], tuple[Callable[[], None], Found]]
"""Captures a function. Returns what replays it, and what it returned: tensors that a replay writes anew."""

# Each takes memory for its inputs and its launches. Steps of shapes beyond these are rare, and run without.
_MOST = 64

# Shapes that are remembered in case they come again. On a model of long texts hardly any may.
_SEEN = 1024


class _Graph(NamedTuple):
    inputs: StepInputs
    replay: Callable[[], None]
    found: Found


class Graphs:
    """Computes a training step's inputs: by a graph where there is one or one can be made, else as they come.

    Args:
        step: the step; it must have an ``ending``.
        capture: captures on the step's device.
        why_not: why nothing is captured; None tries it.
        at_first: capture a shape when it is first seen, rather than when it comes again.
    """

    def __init__(
        self, step: TrainingStep, capture: Capture, why_not: str | None = None, *, at_first: bool = True
    ) -> None:
        self._step = step
        self._capture = capture
        self._why_not = self._why_never = why_not
        self._at_first = at_first
        self._seen: set[object] = set()
        self._graphs: dict[object, _Graph] = {}

    @property
    def used(self) -> bool:
        """Whether inputs should come in few shapes."""
        return self._why_not is None or bool(self._graphs)

    def __call__(self, inputs: StepInputs) -> Found:
        """``step.compute(inputs)``; what a graph returns is overwritten by its next replay."""
        if not self.used:
            return self._step.compute(inputs)
        shape = _shape(inputs)
        if shape not in self._graphs and self._why_not is None and self._is_worth_it(shape):
            self._add(shape, inputs)
        graph = self._graphs.get(shape)
        if graph is None:
            return self._step.compute(inputs)
        for (_, static), (_, given) in zip(_tensors(graph.inputs), _tensors(inputs), strict=True):
            static.copy_(given)
        graph.replay()
        self._step.sets.mark_written()
        return graph.found

    def _is_worth_it(self, shape: object) -> bool:
        """Whether a shape may be expected to come again."""
        if self._at_first or shape in self._seen:
            return True
        if len(self._seen) == _SEEN:
            self._seen.clear()
        self._seen.add(shape)
        return False

    def forget(self) -> None:
        """Drop all graphs: what they read lies elsewhere now. Others may be captured, if any ever could."""
        self._graphs.clear()
        self._why_not = self._why_never

    def report(self) -> str:
        """How many shapes were captured, and why no more or none, for people."""
        count = len(self._graphs)
        captured = f"captured {count} shape{'' if count == 1 else 's'}"
        if self._why_not is None:
            return captured
        return f"{captured}, no more: {self._why_not}" if count else f"no: {self._why_not}"

    def _add(self, shape: object, inputs: StepInputs) -> None:
        """Capture a step with such inputs. It is on hold meanwhile, so that running it leaves no trace."""
        assert self._step.ending is not None
        if len(self._graphs) == _MOST:
            self._why_not = f"{_MOST} are enough"
            return
        try:
            static = _copied(inputs)
            with self._step.ending.on_hold():
                replay, found = self._capture(lambda: self._step.compute(static))
        # Whatever it was: if the step itself is at fault, it will say so when it is run without a graph.
        except Exception as error:
            self._step.sets.drop_gradients()
            self._why_not = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if not isinstance(error, torch.OutOfMemoryError):  # after which smaller ones may do
                self._why_never = self._why_not
            warnings.warn(f"steps run without CUDA graphs: {self._why_not}", RuntimeWarning, stacklevel=2)
        else:
            self._graphs[shape] = _Graph(static, replay, found)


class CudaCapture:
    """Captures on one GPU. All graphs share their memory, since no two of them run at the same time."""

    _WARM_UPS = 2  # what is done once (libraries' handles, kernels compiled) is done before a capture

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, function: Callable[[], Found]) -> tuple[Callable[[], None], Found]:
        with torch.cuda.device(self._device):
            # One stream for all captures, as what is remembered for each stream is then remembered once.
            self._stream = stream = self._stream or torch.cuda.Stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            outside = torch.cuda.current_stream()
            stream.wait_stream(outside)
            with torch.cuda.stream(stream):
                for _ in range(self._WARM_UPS):
                    function()
            outside.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                found = function()
            return graph.replay, found

    @staticmethod
    def why_not(devices: Sequence[torch.device]) -> str | None:
        """Why a model on ``devices`` can't be captured; None if it can."""
        if len(devices) != 1 or devices[0].type != "cuda":
            return f"expected the model on one NVIDIA GPU, got it on {', '.join(map(str, devices))}"
        return None


def _tensors(inputs: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a dataclass, and of those in it, with their names."""
    for field in dataclasses.fields(inputs):
        value, name = getattr(inputs, field.name), f"{path}.{field.name}"
        if isinstance(value, Tensor):
            yield name, value
        elif dataclasses.is_dataclass(value):
            yield from _tensors(value, name)


def _copied(inputs: Any) -> Any:
    """The same dataclass with tensors of its own."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.clone()
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _copied(value)
    return dataclasses.replace(inputs, **changes)


def _shape(inputs: StepInputs) -> object:
    """What a graph holds fixed: which tensors there are, their shapes, and which parameter sets are trained."""
    return inputs.sets, tuple((name, value.shape, value.dtype) for name, value in _tensors(inputs))
