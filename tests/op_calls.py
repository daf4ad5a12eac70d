"""Random arguments for one call of the op, with parameters like those of an intervention in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baft_kernels import orthonormal_basis

# (d, r): powers of two and none, vectors of every length left over, the widths that models have.
AWKWARD_WIDTHS = ((1, 1), (96, 3), (96, 33), (768, 8), (768, 12), (2048, 16), (3584, 64), (4128, 16))


class Call(NamedTuple):
    """The arguments of one call, in the order in which every backend takes them."""

    h: Tensor
    basis: Tensor
    source: Tensor
    source_bias: Tensor
    gate: Tensor | None
    gate_bias: Tensor | None
    gate_fn: str
    rows: Tensor | None = None

    def double(self) -> Call:
        """The same numbers in float64."""
        return self._replace(**{name: tensor.double() for name, tensor in self.floats().items()})

    def to(self, device: str) -> Call:
        """The same call on a device."""
        return self._make(value.to(device) if isinstance(value, Tensor) else value for value in self)

    def floats(self) -> dict[str, Tensor]:
        """h and the parameters by name: all that a gradient exists for."""
        return {
            name: value
            for name, value in self._asdict().items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_call(
    lead: Sequence[int],
    d: int,
    r: int,
    *,
    gate_fn: str = "sigmoid",
    dtype: torch.dtype = torch.float32,
    source_distance: float = 0.5,
    rows: Tensor | None = None,
    seed: int = 0,
) -> Call:
    """A call on h of shape [*lead, d] and ``dtype``; parameters are float32, or float64 for a float64 h.

    ``source_distance`` is |A - R| / |R|: small early in training, when p comes from the difference of close matrices.
    """
    generator = seeded(seed)
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    basis = orthonormal_basis(r, d, dtype=torch.float64, generator=generator)
    parameters = {
        "basis": basis,
        # A row of the basis has length 1, so its entries are about 1 / sqrt(d).
        "source": basis + source_distance / math.sqrt(d) * normal(r, d),
        "source_bias": source_distance * normal(r),
        "gate": None if gate_fn == "none" else normal(r, d) / math.sqrt(d),
        "gate_bias": None if gate_fn == "none" else normal(r),
    }
    return Call(
        h=normal(*lead, d).to(dtype),
        gate_fn=gate_fn,
        rows=rows,
        **{name: value if value is None else value.to(parameter_dtype) for name, value in parameters.items()},
    )


def draws(rows: int, d: int, r: int, *, some: bool = False, work: int = 1 << 22, **options: Any) -> list[Call]:
    """Calls of one kind on h [rows, d], more of them the smaller they are; with ``some``, on rows drawn for each.

    Softmax gates now and then put all weight on one basis, and a single such row decides the largest error of all: of
    24 calls with two rows it was once 2.9 times plain torch's, and 0.9 times that of 100, on the same processor.

    Args:
        work: multiplications of a projection, of all calls together, up to 96 calls.
        options: of ``draw_call``.
    """
    calls = []
    size = max(rows, 1) * r * d
    for seed in range(max(2, min(96, work // size))):
        mask = torch.rand(rows, generator=seeded(seed)) < 0.7 if some else None
        calls.append(draw_call((rows,), d, r, rows=mask, seed=seed, **options))
    return calls
