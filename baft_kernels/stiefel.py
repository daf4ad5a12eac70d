"""Orthonormal bases: the Stiefel manifold of r orthonormal rows in R^d.

A basis is an ordinary parameter. After each optimiser step it is moved back to the nearest orthonormal frame, its polar
factor ``(R R^T)^(-1/2) R``. That costs two products with r x r matrices, where the orthogonal parametrisation of torch
recomputes a d x d matrix at each access. The polar factor rather than QR: QR depends on the order of the rows and would
favour the first ones, whose gates are tied to their rows.

What is computed here is computed in float64 and rounded once. The matrices are small, and products in float32 would
fall under autocast and under the TF32 switches that training scripts set for their model. A backend may have a kernel
for the bases of all layers at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from baft_kernels.backends import candidates
from baft_kernels.packing import repack

__all__ = [
    "ITERATIONS",
    "NEAR",
    "orthogonal_rows",
    "orthonormal_basis",
    "orthonormality_error",
    "project_to_tangent",
    "retract_",
    "retract_after_step",
    "retract_all_",
    "retract_near_",
]

# ||R R^T - I||_F up to which the inverse root is taken by Newton-Schulz, which from there reaches float64's rounding in
# ITERATIONS. An optimiser step stays below: one of a tenth of the basis' length gives 0.04 at r = 12, d = 4096.
NEAR = 0.5
ITERATIONS = 6
# Smallest singular value, relative to the largest, that still counts as full rank: below it lies float32's rounding.
_RANK_TOLERANCE = 1e-6


def orthonormal_basis(
    rank: int,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A uniformly drawn basis [rank, dim] with orthonormal rows.

    It is drawn on the CPU, so that one seed gives one basis on every device; ``generator`` must be a CPU generator.

    Raises:
        ValueError: unless 1 <= rank <= dim.
    """
    if not 1 <= rank <= dim:
        raise ValueError(f"rank: expected 1 <= rank <= dim = {dim}, got {rank}")
    drawn = torch.randn(rank, dim, dtype=torch.float64, device="cpu", generator=generator)
    u, _, v = torch.linalg.svd(drawn, full_matrices=False)
    basis: Tensor = u @ v
    return basis.to(dtype=dtype, device=torch.get_default_device() if device is None else device)


def orthogonal_rows(basis: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Uniformly drawn rows [count, d] that are orthonormal, and orthogonal to those of ``basis`` [r, d].

    Like ``orthonormal_basis`` they are drawn on the CPU; they come in ``basis``' dtype, on its device.

    Raises:
        ValueError: unless 1 <= count <= d - r.
    """
    rank, dim = basis.shape
    if not 1 <= count <= dim - rank:
        raise ValueError(f"count: expected 1 <= count <= {dim - rank}, what {rank} rows of {dim} leave, got {count}")
    old = basis.detach().to("cpu", torch.float64)
    rows = torch.randn(count, dim, dtype=torch.float64, device="cpu", generator=generator)
    for _ in range(2):  # what the first time leaves along the old rows, for they are rounded, the second one takes
        rows = _polar_by_svd(rows - rows @ old.mT @ old)
    return rows.to(basis)


def orthonormality_error(basis: Tensor) -> float:
    """``max |R R^T - I|`` over all entries (and leading axes)."""
    r = basis.detach().double()
    return float((r @ r.mT - _eye_like(r)).abs().max())


@torch.no_grad()
def retract_(basis: Tensor) -> Tensor:
    """Move ``basis`` [..., r, d] in place to its polar factor, the nearest basis with orthonormal rows.

    Near an orthonormal basis the inverse root of the r x r Gram matrix is found by Newton-Schulz iterations, products
    only; elsewhere the polar factor comes from a singular value decomposition.

    Returns:
        ``basis`` itself.

    Raises:
        TypeError: if ``basis`` isn't floating point.
        ValueError: if r > d, an entry isn't finite, or the rows are linearly dependent: then no basis is the nearest.
    """
    _check(basis)
    r = basis.double()
    gram = r @ r.mT
    # NaN and infinity take the second way, which reports them: they compare as false.
    polar = _inverse_root(gram) @ r if bool((_distance(gram) <= NEAR).all()) else _polar_by_svd(r)
    return basis.copy_(polar)


@torch.no_grad()
def retract_all_(bases: Sequence[Tensor], *, backend: str = "auto") -> None:
    """``retract_`` on each of ``bases`` [r, d]: in one launch where the backend has a kernel for them all.

    Args:
        bases: on one device for one launch; what is far from orthonormal is retracted on its own.
        backend: as for ``baft``.

    Raises:
        TypeError, ValueError: as ``retract_``; for a backend that isn't usable here.
    """
    if not bases:
        return
    for basis, distance in zip(bases, retract_near_(bases, backend=backend).tolist(), strict=True):
        if not distance <= NEAR:
            retract_(basis)


@torch.no_grad()
def retract_near_(bases: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """``retract_`` on those of ``bases`` [r, d] that are near to an orthonormal one, without waiting for any value.

    So it can run ahead on a GPU, or in a CUDA graph; the others are left to whoever reads the distances later.

    Args:
        bases: at least one.
        backend: as for ``baft``.

    Returns:
        ||R R^T - I||_F of each before, [L], float32, on the device of the first. Where it isn't at most ``NEAR``, the
        basis is as it was.

    Raises:
        TypeError, ValueError: as ``retract_``, but for entries and ranks.
    """
    attempts = (serving.retract(bases) for serving in candidates(backend))
    distances = next((found for found in attempts if found is not None), None)
    if distances is not None:
        return distances
    return torch.stack([_retract_if_near_(basis).to(bases[0].device) for basis in bases])


def _retract_if_near_(basis: Tensor) -> Tensor:
    """``retract_near_`` of one."""
    _check(basis)
    if basis.ndim != 2:
        raise ValueError(f"bases: expected shapes [r, d], got {list(basis.shape)}")
    r = basis.double()
    gram = r @ r.mT
    distance = _distance(gram).float()
    if _is_on_host(distance):
        if distance <= NEAR:
            basis.copy_(_inverse_root(gram, _iterations(float(distance), basis.dtype)) @ r)
    else:
        basis.copy_(torch.where(distance <= NEAR, _inverse_root(gram) @ r, r))
    return distance


def _is_on_host(value: Tensor) -> bool:
    """Whether reading it makes nobody wait: then needless iterations, half of them and more, can be left out."""
    return value.device.type == "cpu"


def _iterations(distance: float, dtype: torch.dtype) -> int:
    """How many Newton-Schulz iterations bring a Gram matrix so far from I to below float32's rounding, or float64's."""
    enough = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 16
    error, count = distance, 1
    while count < ITERATIONS and (error := 0.25 * error**2 * (3 + error)) > enough:
        count += 1
    return count


def _check(basis: Tensor) -> None:
    if not basis.is_floating_point():
        raise TypeError(f"basis: expected a floating point tensor, got {basis.dtype}")
    if basis.ndim < 2 or basis.shape[-2] > basis.shape[-1]:
        raise ValueError(f"basis: expected shape [..., r, d] with r <= d, got {list(basis.shape)}")


def _distance(gram: Tensor) -> Tensor:
    """||R R^T - I||_F."""
    return torch.linalg.matrix_norm(gram - _eye_like(gram))


def _inverse_root(gram: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """``gram^(-1/2)`` of a matrix near the identity: coupled Newton-Schulz iteration (Higham 2008, section 6.7).

    It begins with y = gram and z = I, and turns them into gram^(1/2) and gram^(-1/2): an iteration multiplies both by
    1.5 I - 0.5 z y.
    """
    eye = _eye_like(gram)
    z = step = 1.5 * eye - 0.5 * gram
    y = gram
    for _ in range(iterations - 1):
        y = y @ step
        step = 1.5 * eye - 0.5 * (z @ y)
        z = step @ z
    return z


def _polar_by_svd(r: Tensor) -> Tensor:
    if not bool(torch.isfinite(r).all()):
        raise ValueError("basis: expected finite entries, got NaN or infinity")
    u, singular, v = torch.linalg.svd(r, full_matrices=False)
    smallest, largest = singular[..., -1], singular[..., 0]
    if bool((smallest <= _RANK_TOLERANCE * largest).any()):
        raise ValueError("basis: expected linearly independent rows, got dependent ones: there is no nearest basis")
    polar: Tensor = u @ v
    return polar


def _eye_like(r: Tensor) -> Tensor:
    """The r x r identity for [..., r, d]."""
    return torch.eye(r.shape[-2], dtype=r.dtype, device=r.device)


def project_to_tangent(gradient: Tensor, basis: Tensor) -> Tensor:
    """``G - sym(G R^T) R``: the part of ``gradient`` [..., r, d] along the manifold at ``basis``.

    At an orthonormal basis this equals the gradient taken through the polar factor.
    """
    g, r = gradient.double(), basis.double()
    product = g @ r.mT
    return (g - 0.5 * (product + product.mT) @ r).to(gradient.dtype)


def retract_after_step(
    optimizer: torch.optim.Optimizer,
    bases: Iterable[Tensor],
    *,
    project_gradients: bool = False,
    backend: str = "auto",
) -> list[RemovableHandle]:
    """Keep ``bases`` orthonormal under any torch optimiser: retract each after every ``optimizer.step()``.

    Then what was packed of their layers is renewed, too: see ``packing.repack``. A parameter that another optimiser
    changes later is noticed as ever.

    Args:
        optimizer: the optimiser that updates the bases.
        bases: parameters [r, d].
        project_gradients: also project each basis' gradient to the tangent space before the step.
        backend: what retracts them, as for ``baft``.

    Returns:
        Handles whose ``remove()`` undoes it.
    """
    bases = list(bases)

    def project(*_: object) -> None:
        with torch.no_grad():
            for basis in bases:
                if basis.grad is not None:
                    basis.grad.copy_(project_to_tangent(basis.grad, basis))

    def retract(*_: object) -> None:
        retract_all_(bases, backend=backend)
        repack(bases)

    handles = [optimizer.register_step_post_hook(retract)]
    if project_gradients:
        handles.append(optimizer.register_step_pre_hook(project))
    return handles
