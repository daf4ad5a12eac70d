"""What is timed against what: the op on each backend, and how one would write it without this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from baft_kernels import BaftIntervention, baft
from baft_kernels.backends import KNOWN_BACKENDS, resolve_backend

__all__ = ["RIVALS", "Case", "Operands", "Variant", "draw", "fused_backends", "op_on"]


@dataclass(frozen=True)
class Case:
    """One size of the op: T rows of width d, r bases. ``training`` is forward and backward, all gradients."""

    rows: int
    d: int
    r: int
    dtype: torch.dtype
    training: bool

    @property
    def bytes(self) -> int:
        """What has to move at least, whatever the kernel.

        Forward: h in, out out, the parameters (D, G, R) in the dtype of h, w and u out in float32. Backward: h and the
        gradient of out in, that of h out, the parameters again, their gradients in float32 out, w and u in.
        """
        item = self.dtype.itemsize
        rows, matrices, low = self.rows * self.d * item, 3 * self.r * self.d * item, 8 * self.rows * self.r
        forward = 2 * rows + matrices + low
        return forward + (3 * rows + matrices + 12 * self.r * self.d + low if self.training else 0)

    @property
    def name(self) -> str:
        what = "forward+backward" if self.training else "forward"
        return f"{what} T={self.rows} d={self.d} r={self.r} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Operands:
    """The parameters of a case, R, A, b, G, c: as float32 masters, as copies in h's dtype, and packed beforehand."""

    masters: tuple[Tensor, ...]
    copies: tuple[Tensor, ...]
    packed: tuple[Tensor, Tensor, Tensor]


def draw(case: Case, device: torch.device) -> Operands:
    """Parameters like those of an intervention in training."""
    generator = torch.Generator().manual_seed(0)
    layer = BaftIntervention(case.d, case.r, generator=generator)
    with torch.no_grad():
        layer.source += 0.5 * torch.randn(case.r, case.d, generator=generator) / case.d**0.5
        layer.source_bias += 0.5 * torch.randn(case.r, generator=generator)
    masters = [layer.basis, layer.source, layer.source_bias, layer.gate, layer.gate_bias]
    placed = tuple(m.detach().to(device).requires_grad_(case.training) for m in masters)
    copies = tuple(m.detach().to(case.dtype, copy=True).requires_grad_(case.training) for m in placed)
    with torch.no_grad():
        return Operands(placed, copies, _pack(placed, case.dtype))


def _pack(masters: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[D; G], [b; c] and R in ``dtype``."""
    basis, source, source_bias, gate, gate_bias = masters
    return torch.cat([source - basis, gate]).to(dtype), torch.cat([source_bias, gate_bias]).to(dtype), basis.to(dtype)


Variant = Callable[[Tensor, Operands], Tensor]


def eager(h: Tensor, operands: Operands) -> Tensor:
    """The formula as it is written, parameters in the dtype of h."""
    basis, source, source_bias, gate, gate_bias = operands.copies
    p = F.linear(h, source, source_bias) - F.linear(h, basis)
    w = torch.sigmoid(F.linear(h, gate, gate_bias))
    return h + (w * p) @ basis


def tuned_eager(h: Tensor, operands: Operands) -> Tensor:
    """By someone who counts passes: one projection, one product that adds h. In training the packing is part of it."""
    training = operands.masters[0].requires_grad
    projection, bias, basis = _pack(operands.masters, h.dtype) if training else operands.packed
    p, z = F.linear(h, projection, bias).chunk(2, dim=-1)
    return torch.addmm(h, torch.sigmoid(z) * p, basis)


def op_on(backend: str) -> Variant:
    """The op on one backend."""

    def variant(h: Tensor, operands: Operands) -> Tensor:
        return baft(h, *operands.masters, backend=backend)  # type: ignore[call-overload, no-any-return]

    return variant


def fused_backends(h: Tensor, rank: int) -> list[str]:
    """The fused backends that serve ``h`` here, with so many bases."""
    served = []
    for name in KNOWN_BACKENDS:
        try:
            resolve_backend(name, h, rank)
        except ValueError:
            continue
        if name != "reference":
            served.append(name)
    return served


RIVALS: dict[str, Variant] = {"eager": eager, "tuned eager": tuned_eager, "torch.compile": torch.compile(eager)}
"""How one does it without this package."""
