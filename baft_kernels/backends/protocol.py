"""What a backend is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from baft_kernels.packing import Parameters

__all__ = ["Backend"]


class Backend(ABC):
    """Fused kernels for some device. All tensors are flat; ``rows`` and ``adapters`` are as in ``baft_kernels.ops``."""

    name: str
    serves: str
    """Which calls it serves, in words: for ``baft_kernels.info``."""
    unproven: str | None = None
    """Why ``"auto"`` passes it over even where it is usable; None once its tests have passed on its hardware."""

    @abstractmethod
    def why_unusable(self) -> str | None:
        """Why it can't be used in this installation or on this machine; None if it can."""

    @abstractmethod
    def why_not(self, h: Tensor, rank: int) -> str | None:
        """Why it can't serve a call on such an ``h`` with so many bases, though it is usable; None if it can."""

    @abstractmethod
    def forward(
        self,
        h: Tensor,
        parameters: Parameters,
        rows: Tensor | None,
        adapters: Tensor | None,
        gate_fn: str,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """out [T, d], w and u [T, r] float32; into ``out`` where it is given, which may be ``h`` itself."""

    @abstractmethod
    def backward(
        self,
        incoming: tuple[Tensor, Tensor | None, Tensor | None],
        h: Tensor,
        weights: Tensor,
        update: Tensor,
        parameters: Parameters,
        rows: Tensor | None,
        adapters: Tensor | None,
        gate_fn: str,
        input_gradient: bool,
        parameter_gradients: bool,
    ) -> tuple[Tensor | None, Parameters | None]:
        """The gradients of h and of the parameters (float32), each if wanted, from those of out, w and u."""

    def retract(self, bases: Sequence[Tensor]) -> Tensor | None:
        """Move each of ``bases`` [r, d] that is near to its polar factor there, all in one launch.

        Returns:
            ||R R^T - I||_F of each before, [L]; those where it is above ``stiefel.NEAR``, or NaN, are as they were.
            None, and nothing was done, if the backend has no kernel for these bases.
        """
        return None
