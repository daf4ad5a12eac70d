"""A stand-in for CUDA graphs on a CPU: records what a function runs, and runs just that again.

As with a graph, whatever the host did meanwhile isn't done again, tensors stay where they are, and a function that
looks at a value can't be captured. Other than with a graph, the function runs while it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["CaptureError", "capture_on_tape"]

T = TypeVar("T")
aten = torch.ops.aten

# On a GPU these wait for the device, or copy from memory that isn't pinned, which a capture doesn't allow.
_WAITING = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._unique,
    aten._unique2,
    aten.bincount,
    aten.repeat_interleave,
    aten.linalg_svd,
    aten._linalg_svd,
    aten.lift_fresh,
}
# On a CPU these read memory without an operator.
_READING = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu, Tensor.item}


class CaptureError(RuntimeError):
    """What was captured waits for the device."""


class _NoReading(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READING:
            raise CaptureError(f"Tensor.{func.__name__} while a graph is captured")
        return func(*args, **(kwargs or {}))


class _Tape(TorchDispatchMode):
    """Records operators with their very arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            raise CaptureError(f"{func} while a graph is captured")
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, results in self._calls:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for result, new in zip(results, again, strict=True):
                # A view shows what was written to its base, and what is written in place is where it shall be.
                if result.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    result.copy_(new)


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    if func.overloadpacket is aten.repeat_interleave:
        return kwargs.get("output_size") is None and len(args) < 2
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):  # by a mask: its size is looked up
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if func.overloadpacket is aten.segment_reduce:
        return not kwargs.get("unsafe", False)  # it looks whether sizes fit
    return func.overloadpacket in _WAITING


def capture_on_tape(function: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """Capture ``function``, as ``baft.engine.graphs.Capture`` says.

    Raises:
        CaptureError: if it looks at a value.
    """
    tape = _Tape()
    with tape, _NoReading():
        result = function()
    return tape.replay, result
