"""A fused backend that computes by the reference, and remembers that it was asked."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from baft_kernels.backends.protocol import Backend
from baft_kernels.packing import Parameters
from baft_kernels.reference import baft_reference


class FakeBackend(Backend):
    serves = "whatever a test wants"

    def __init__(self, name: str, served: list[str], *, unusable: str | None = None, unfit: str | None = None) -> None:
        self.name = name
        self.served = served
        self.unusable = unusable
        self.unfit = unfit

    def why_unusable(self) -> str | None:
        return self.unusable

    def why_not(self, h: Tensor, rank: int) -> str | None:
        return self.unfit

    def forward(
        self, h: Tensor, parameters: Parameters, rows: Tensor | None, adapters: Tensor | None, gate_fn: str, out: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.served.append(self.name)
        result = baft_reference(h, *parameters, gate_fn, rows)
        return (result if out is None else result._replace(out=out.copy_(result.out)))[:3]

    def backward(self, *arguments: Any) -> Any:
        raise AssertionError("not asked for in these tests")
