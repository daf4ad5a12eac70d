"""The matrix products of some steps, and how long they take by themselves: what is left if all else cost nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timing import interleaved
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Products", "recorded_products"]

_OPS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1, torch.ops.aten.bmm.default: 0}
"""The products that torch's modules are made of, and where their two factors begin among the arguments."""

# Each kind of product is timed in so many batches of calls.
_ROUNDS = 5


@dataclass(frozen=True)
class _Product:
    """A product by what its time depends on: shapes, strides and dtype of its factors."""

    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    strides: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device

    @property
    def operations(self) -> int:
        *batch, rows, inner = self.shapes[0]
        return 2 * (batch[0] if batch else 1) * rows * inner * self.shapes[1][-1]

    def seconds(self) -> float:
        """Of this product alone."""
        factors = [
            torch.randn(_extent(shape, stride), dtype=self.dtype, device=self.device).as_strided(shape, stride)
            for shape, stride in zip(self.shapes, self.strides, strict=True)
        ]
        multiply = torch.bmm if len(self.shapes[0]) == 3 else torch.mm
        works = {"product": lambda _: multiply(*factors)}
        return interleaved(works, rotation=1, rounds=_ROUNDS, device=self.device)["product"].median


class Products:
    """Products that were recorded, and how often there was each."""

    def __init__(self) -> None:
        self._counts: Counter[_Product] = Counter()

    @property
    def operations(self) -> int:
        """Floating-point operations of all of them."""
        return sum(product.operations * count for product, count in self._counts.items())

    def seconds(self) -> float:
        """How long all of them take, one after the other, with nothing in between."""
        return sum(product.seconds() * count for product, count in self._counts.items())

    def add(self, first: Tensor, second: Tensor) -> None:
        shapes, strides = (tuple(first.shape), tuple(second.shape)), (first.stride(), second.stride())
        self._counts[_Product(shapes, strides, first.dtype, first.device)] += 1


@contextmanager
def recorded_products() -> Iterator[Products]:
    """Record the products that torch does, forward and backward; those inside of custom kernels aren't seen."""
    products = Products()

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func in _OPS:
                first = _OPS[func]
                products.add(args[first], args[first + 1])
            return func(*args, **(kwargs or {}))

    with Recording():
        yield products


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
