"""Interventions as torch modules: the parameters of one edited layer, one set or several."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from baft_kernels.arguments import check_gate_fn
from baft_kernels.backends import resolve_backend
from baft_kernels.functional import baft, grouped_baft
from baft_kernels.reference import BaftOutput
from baft_kernels.stiefel import orthogonal_rows, orthonormal_basis, retract_

__all__ = ["BaftIntervention", "GroupedBaftIntervention"]


class BaftIntervention(nn.Module):
    """Basis-level representation fine-tuning of one layer's hidden vectors (arXiv 2503.00306).

    A new intervention is the identity: the source starts equal to the basis and its bias at 0, so that p = 0.

    Args:
        embed_dim: d, the width of the hidden vectors.
        low_rank_dimension: r, the number of bases, 1 <= r <= d.
        gate_fn: ``"sigmoid"``, ``"softmax"`` or ``"none"`` (LoReFT: the gate has no parameters).
        device: of the parameters.
        dtype: of the parameters, float32 (default) or float64. Hidden vectors may be in any dtype; the masters stay in
            float32, because A - R cancels when it is formed from rounded ones.
        backend: passed on to ``baft``.
        generator: draws the basis and the gate, on the CPU whatever the device; torch's global one if None.

    Attributes:
        basis: R, [r, d].
        source: A, [r, d]; source_bias: b, [r].
        gate: G, [r, d]; gate_bias: c, [r]; both None with ``gate_fn="none"``.

    Raises:
        ValueError: for a rank, a gate or a backend that doesn't exist.
        TypeError: for a dtype other than float32 and float64.
    """

    def __init__(
        self,
        embed_dim: int,
        low_rank_dimension: int,
        *,
        gate_fn: str = "sigmoid",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.float32
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype: expected float32 or float64 for the parameters, got {dtype}")
        check_gate_fn(gate_fn)
        resolve_backend(backend)
        self.embed_dim = embed_dim
        self.low_rank_dimension = low_rank_dimension
        self.gate_fn = gate_fn
        self.backend = backend
        basis = orthonormal_basis(low_rank_dimension, embed_dim, dtype=dtype, device=device, generator=generator)
        self.basis = nn.Parameter(basis)
        self.source = nn.Parameter(basis.clone())
        self.source_bias = nn.Parameter(basis.new_zeros(low_rank_dimension))
        if gate_fn == "none":
            self.register_parameter("gate", None)
            self.register_parameter("gate_bias", None)
        else:
            self.gate = nn.Parameter(_drawn_gate(basis, generator))
            self.gate_bias = nn.Parameter(basis.new_zeros(low_rank_dimension))

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: object = None) -> Tensor:
        """Edit every row of ``base`` [..., d]. ``source`` and ``subspaces`` are pyvene's, and must be None."""
        if source is not None or subspaces is not None:
            raise ValueError("source, subspaces: expected None, since a BaFT intervention takes neither")
        return self.edit(base).out

    def edit(self, base: Tensor, positions: Tensor | None = None) -> BaftOutput:
        """Edit the rows of ``base`` at ``positions`` and return w and u as well; arguments as in ``baft``."""
        return baft(
            base,
            self.basis,
            self.source,
            self.source_bias,
            self.gate,
            self.gate_bias,
            gate_fn=self.gate_fn,
            positions=positions,
            return_aux=True,
            backend=self.backend,
        )

    @property
    def can_grow(self) -> bool:
        """Whether bases can be added to the old ones without changing their gates: softmax gates share a sum of 1."""
        return self.gate_fn != "softmax"

    @torch.no_grad()
    def grow(self, extra: int, *, generator: torch.Generator | None = None) -> None:
        """Append bases that are orthogonal to the old ones. They change nothing before they are trained.

        New rows of the source equal those of the basis, new biases are 0, new gates are drawn as the first ones were.
        All parameters are new tensors then: an optimiser, or a graph that was captured, has the old ones.

        Args:
            extra: how many.
            generator: as for a new intervention.

        Raises:
            ValueError: unless 1 <= extra <= d - r; for softmax gates.
        """
        if not self.can_grow:
            raise ValueError("gate_fn: expected sigmoid or none for bases to be added, got softmax, which sums to 1")
        rows = orthogonal_rows(self.basis, extra, generator=generator)
        zeros = rows.new_zeros(extra)
        new = {"basis": rows, "source": rows, "source_bias": zeros}
        if self.gate is not None:
            new |= {"gate": _drawn_gate(rows, generator), "gate_bias": zeros}
        self.replace({name: torch.cat((parameter, new[name])) for name, parameter in self.named_parameters()})

    def replace(self, parameters: Mapping[str, Tensor]) -> None:
        """Take others for all parameters, copied, and the rank with them."""
        for name, parameter in list(self.named_parameters()):
            value = parameters[name].detach().to(parameter, copy=True)
            self.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        self.low_rank_dimension = len(self.basis)

    def retract_(self) -> None:
        """Make the basis orthonormal again, after its parameter was changed by anything but ``retract_after_step``."""
        retract_(self.basis)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, low_rank_dimension={self.low_rank_dimension}, gate_fn={self.gate_fn!r}"


def _drawn_gate(basis: Tensor, generator: torch.Generator | None) -> Tensor:
    """A new gate for the rows of ``basis`` [r, d]."""
    drawn = torch.randn(basis.shape, dtype=torch.float32, device="cpu", generator=generator)
    return (drawn / math.sqrt(basis.shape[-1])).to(basis)


class GroupedBaftIntervention(nn.Module):
    """N interventions on one layer side by side: each sequence of a batch is edited by the one that it names.

    All start as copies of one. Each is trained by the sequences that name it, and by no others.

    Args:
        original: what each set starts as.
        sets: N >= 1.

    Attributes:
        basis: R, [N, r, d].
        source: A, [N, r, d]; source_bias: b, [N, r].
        gate: G, [N, r, d]; gate_bias: c, [N, r]; both None with ``gate_fn="none"``.

    Raises:
        ValueError: if ``sets`` isn't positive.
    """

    basis: Tensor
    source: Tensor
    source_bias: Tensor
    gate: Tensor | None
    gate_bias: Tensor | None

    def __init__(self, original: BaftIntervention, sets: int) -> None:
        super().__init__()
        if sets < 1:
            raise ValueError(f"sets: expected at least 1, got {sets}")
        self.sets = sets
        self.gate_fn = original.gate_fn
        self.backend = original.backend
        for name in ("basis", "source", "source_bias", "gate", "gate_bias"):
            value = getattr(original, name)
            stacked = None if value is None else nn.Parameter(torch.stack([value.detach()] * sets))
            self.register_parameter(name, stacked)

    def edit(
        self, base: Tensor, adapter_ids: Tensor, positions: Tensor | None = None, *, ids_in_range: bool = False
    ) -> BaftOutput:
        """Edit sequence i of ``base`` [B, ..., d] by set ``adapter_ids[i]``; arguments as in ``grouped_baft``."""
        return grouped_baft(
            base,
            self.basis,
            self.source,
            self.source_bias,
            self.gate,
            self.gate_bias,
            adapter_ids,
            ids_in_range=ids_in_range,
            gate_fn=self.gate_fn,
            positions=positions,
            return_aux=True,
            backend=self.backend,
        )

    def forward(self, base: Tensor, adapter_ids: Tensor) -> Tensor:
        """Edit every row of ``base`` [B, ..., d], sequence i by set ``adapter_ids[i]``."""
        return self.edit(base, adapter_ids).out

    def extra_repr(self) -> str:
        _, rank, width = self.basis.shape
        return f"sets={self.sets}, embed_dim={width}, low_rank_dimension={rank}, gate_fn={self.gate_fn!r}"
