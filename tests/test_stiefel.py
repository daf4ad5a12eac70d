"""Orthonormal bases: drawn, retracted to the polar factor, and kept orthonormal through an optimiser's steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_calls import seeded
from torch import Tensor, nn

from baft_kernels import (
    orthonormal_basis,
    orthonormality_error,
    project_to_tangent,
    retract_,
    retract_after_step,
    stiefel,
)
from baft_kernels.stiefel import NEAR, orthogonal_rows, retract_near_

# Of a float32 basis. Its entries' own rounding leaves about 1e-7.
TOLERANCE = 5e-7


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def moved_basis(shape: tuple[int, ...], step: float) -> Tensor:
    """A batch of orthonormal bases, float64, each moved off by ``step`` times its own length."""
    *lead, r, d = shape
    bases = torch.linalg.qr(normal(*lead, d, r, seed=2)).Q.mT
    change = normal(*shape)
    return bases + step * change * (r**0.5 / torch.linalg.matrix_norm(change, keepdim=True))


def polar_factor(r: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(r.double(), full_matrices=False)
    return u @ v


# -- drawing --


def test_a_drawn_basis_is_orthonormal_in_the_asked_dtype() -> None:
    for dtype, tolerance in ((torch.float32, TOLERANCE), (torch.float64, 1e-14)):
        for r, d in ((1, 1), (1, 64), (12, 64), (64, 64)):
            basis = orthonormal_basis(r, d, dtype=dtype, generator=seeded())
            assert basis.shape == (r, d)
            assert basis.dtype == dtype
            assert orthonormality_error(basis) < tolerance


def test_a_seed_gives_one_basis() -> None:
    first, again = (orthonormal_basis(3, 8, generator=seeded(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, orthonormal_basis(3, 8, generator=seeded(6)))
    torch.manual_seed(5)
    assert torch.equal(first, orthonormal_basis(3, 8))


def test_bases_are_drawn_uniformly() -> None:
    # QR without a correction of signs would fail here: its first entry is never positive.
    generator = seeded()
    drawn = torch.stack([orthonormal_basis(2, 3, generator=generator) for _ in range(3000)])
    torch.testing.assert_close(drawn.mean(0), torch.zeros(2, 3), rtol=0, atol=0.05)
    torch.testing.assert_close((drawn.mT @ drawn).mean(0), torch.eye(3) * 2 / 3, rtol=0, atol=0.05)


def test_a_basis_goes_to_the_asked_device_or_the_default_one() -> None:
    assert orthonormal_basis(2, 4, device="meta").is_meta
    with torch.device("meta"):
        assert orthonormal_basis(2, 4).is_meta
        assert not orthonormal_basis(2, 4, device="cpu").is_meta


@pytest.mark.parametrize("rank", [0, 9, -1])
def test_a_rank_that_no_basis_has_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"^rank: expected 1 <= rank <= dim = 8, got {rank}$"):
        orthonormal_basis(rank, 8)


def test_the_orthonormality_error_is_the_largest_of_all_entries() -> None:
    bases = torch.eye(3, 5).repeat(2, 1, 1)
    assert orthonormality_error(bases) == 0
    bases[1, 2, 2] = 2
    assert orthonormality_error(bases) == 3
    bases[1, 2, 2] = 1
    bases[0, 1, 0] = -0.5
    assert orthonormality_error(bases) == 0.5


def test_rows_that_are_added_to_a_basis_make_it_a_larger_one() -> None:
    for dtype, tolerance in ((torch.float32, TOLERANCE), (torch.float64, 1e-14)):
        for r, extra, d in ((1, 1, 2), (12, 4, 64), (12, 52, 64), (63, 1, 64)):
            basis = orthonormal_basis(r, d, dtype=dtype, generator=seeded())
            rows = orthogonal_rows(basis, extra, generator=seeded(1))
            assert (rows.shape, rows.dtype) == ((extra, d), dtype)
            assert orthonormality_error(torch.cat((basis, rows))) < tolerance
            assert torch.equal(rows, orthogonal_rows(basis, extra, generator=seeded(1)))
            if r + extra < d:  # or there is but one direction to draw
                assert not torch.allclose(rows, orthogonal_rows(basis, extra, generator=seeded(2)))


@pytest.mark.parametrize("count", [0, 5])
def test_no_more_rows_than_there_is_room_for(count: int) -> None:
    with pytest.raises(ValueError, match=rf"^count: expected 1 <= count <= 4, what 12 rows of 16 leave, got {count}$"):
        orthogonal_rows(orthonormal_basis(12, 16), count)


# -- retraction --


@pytest.mark.parametrize("shape", [(12, 768), (1, 96), (1, 1), (24, 24), (4, 12, 96), (2, 3, 5, 32)], ids=str)
@pytest.mark.parametrize("step", [0.0, 1e-3, 1e-2, 0.1, 0.3, 1.0, 10.0])
def test_retraction_gives_the_polar_factor(shape: tuple[int, ...], step: float) -> None:
    basis = moved_basis(shape, step).float()
    before = basis.double()
    assert retract_(basis) is basis
    assert orthonormality_error(basis) < TOLERANCE
    torch.testing.assert_close(basis.double(), polar_factor(before), rtol=0, atol=TOLERANCE)
    # What makes it the polar factor, however computed: the factor that remains is symmetric and positive definite.
    stretch = before @ basis.double().mT
    scale = float(stretch.abs().max())
    torch.testing.assert_close(stretch, stretch.mT, rtol=0, atol=scale * TOLERANCE)
    assert (torch.linalg.eigvalsh(stretch) > 0).all()


@pytest.mark.parametrize("step", [1e-3, 0.1, 0.3, 0.5, 0.7, 1.0, 10.0])
def test_float64_bases_are_retracted_in_float64(step: float) -> None:
    basis = moved_basis((12, 96), step)
    expected = polar_factor(basis)
    retract_(basis)
    assert orthonormality_error(basis) < 1e-14
    torch.testing.assert_close(basis, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("squared_length", [0.51, 1.49])
def test_the_iteration_converges_as_far_out_as_it_is_used(squared_length: float) -> None:
    expected = moved_basis((12, 96), 0.0)
    basis = expected.clone()
    basis[3] *= squared_length**0.5
    torch.testing.assert_close(retract_(basis), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (12, 96), (16, 16)])
def test_however_near_a_basis_is_it_is_retracted_to_its_rounding(
    shape: tuple[int, int], dtype: torch.dtype, on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stiefel, "_is_on_host", lambda value: on_host)
    for distance in (0.0, 1e-8, 1e-5, 1e-3, 0.02, 0.1, 0.2, 0.3, 0.4, 0.45, 0.97 * NEAR):
        drawn = normal(shape[0], shape[0], seed=3)
        error = (drawn + drawn.mT) * distance / (drawn + drawn.mT).norm()
        exact = orthonormal_basis(*shape, dtype=torch.float64, generator=seeded())
        basis = (torch.linalg.cholesky(torch.eye(shape[0]) + error) @ exact).to(dtype)
        expected = polar_factor(basis)
        (found,) = retract_near_([basis]).tolist()
        assert found == pytest.approx(distance, rel=0.1, abs=4 * torch.finfo(dtype).eps * shape[0])
        # Half a unit in the last place; of float64 the products' own rounding, too.
        rtol, atol = (0.0, 4e-15) if dtype == torch.float64 else (0.51 * torch.finfo(dtype).eps, 4e-9)
        torch.testing.assert_close(basis.double(), expected.double(), rtol=rtol, atol=atol)


def test_what_is_retracted_together_are_single_bases() -> None:
    with pytest.raises(ValueError, match=r"bases: expected shapes \[r, d\], got \[2, 3, 16\]"):
        retract_near_([moved_basis((2, 3, 16), 0.1)])


def test_an_ordinary_step_needs_no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    # They take milliseconds on a GPU, and training retracts after every step.
    bases = [moved_basis((12, 96), step).float() for step in (1e-3, 1e-2, 0.1)]
    monkeypatch.delattr(torch.linalg, "svd")
    for basis in bases:
        retract_(basis)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_are_rounded_once(dtype: torch.dtype) -> None:
    basis = moved_basis((12, 96), 0.05).to(dtype)
    expected = polar_factor(basis).to(dtype)
    torch.testing.assert_close(retract_(basis), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("step", [0.1, 3.0])
def test_autocast_leaves_retraction_and_projection_alone(step: float) -> None:
    basis = moved_basis((12, 96), step).float()
    gradient = normal(12, 96).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        retracted, projected = retract_(basis.clone()), project_to_tangent(gradient, basis)
    assert torch.equal(retracted, retract_(basis.clone()))
    assert torch.equal(projected, project_to_tangent(gradient, basis))


@pytest.mark.parametrize("step", [0.1, 3.0])
def test_retraction_treats_all_rows_and_all_directions_alike(step: float) -> None:
    basis = moved_basis((6, 20), step)
    rotation, turn = torch.linalg.qr(normal(6, 6)).Q, torch.linalg.qr(normal(20, 20)).Q
    expected = rotation @ retract_(basis.clone()) @ turn
    torch.testing.assert_close(retract_(rotation @ basis @ turn), expected, rtol=0, atol=1e-12)


def test_non_contiguous_bases_and_parameters_are_retracted_in_place() -> None:
    storage = moved_basis((12, 96), 0.1).float().mT.contiguous()
    retract_(storage.mT)
    assert orthonormality_error(storage.mT) < TOLERANCE
    parameter = nn.Parameter(moved_basis((12, 96), 0.1).float())
    retract_(parameter)
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    assert orthonormality_error(parameter) < TOLERANCE


def dependent_rows() -> Tensor:
    basis = moved_basis((3, 12, 96), 0.1).float()
    basis[1, 4] = basis[1, 2] - 2 * basis[1, 7]
    return basis


def with_entry(value: float) -> Tensor:
    basis = moved_basis((3, 12, 96), 0.1).float()
    basis[2, 3, 4] = value
    return basis


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (dependent_rows(), "basis: expected linearly independent rows, got dependent ones: there is no nearest basis"),
        (torch.zeros(2, 4), "basis: expected linearly independent rows, got dependent ones: there is no nearest basis"),
        (with_entry(float("nan")), "basis: expected finite entries, got NaN or infinity"),
        (with_entry(float("-inf")), "basis: expected finite entries, got NaN or infinity"),
        (torch.ones(5, 4), "basis: expected shape [..., r, d] with r <= d, got [5, 4]"),
        (torch.ones(4), "basis: expected shape [..., r, d] with r <= d, got [4]"),
    ],
    ids=["dependent rows", "zeros", "NaN", "infinity", "r > d", "vector"],
)
def test_a_basis_that_has_no_polar_factor_is_refused_and_left_as_it_was(basis: Tensor, message: str) -> None:
    before = basis.clone()
    with pytest.raises(ValueError) as raised:
        retract_(basis)
    assert str(raised.value) == message
    assert torch.equal(basis.nan_to_num(7), before.nan_to_num(7))


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^basis: expected a floating point tensor, got torch\.int64$"):
        retract_(torch.eye(3, dtype=torch.int64))


# -- the tangent space --


def test_projection_is_the_gradient_through_the_polar_factor() -> None:
    def polar_by_iteration(r: Tensor) -> Tensor:
        # Differentiable at an orthonormal basis, unlike decompositions: the singular values there are all equal.
        for _ in range(3):
            r = 1.5 * r - 0.5 * r @ r.mT @ r
        return r

    basis = moved_basis((4, 9), 0.0).requires_grad_()
    coefficients, center = normal(4, 9), normal(4, 9, seed=3)

    def loss(r: Tensor) -> Tensor:
        return (coefficients * r).sum() + (r - center).pow(4).sum()

    (direct,) = torch.autograd.grad(loss(basis), basis)
    (through_polar,) = torch.autograd.grad(loss(polar_by_iteration(basis)), basis)
    assert not torch.allclose(direct, through_polar)
    torch.testing.assert_close(project_to_tangent(direct, basis.detach()), through_polar, rtol=1e-12, atol=1e-12)


def test_projected_gradients_are_tangent_and_stay_where_they_are() -> None:
    basis = moved_basis((3, 4, 9), 0.0)
    projected = project_to_tangent(normal(3, 4, 9), basis)
    product = projected @ basis.mT
    torch.testing.assert_close(product, -product.mT, rtol=0, atol=1e-14)
    torch.testing.assert_close(project_to_tangent(projected, basis), projected, rtol=0, atol=1e-14)
    assert project_to_tangent(projected.float(), basis.float()).dtype == torch.float32


# -- training --

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize(("name", "project_gradients"), [("SGD", True), ("Adam", False), ("AdamW", True)])
def test_bases_stay_orthonormal_while_they_learn(name: str, project_gradients: bool) -> None:
    bases = [nn.Parameter(orthonormal_basis(r, d, generator=seeded())) for r, d in ((4, 24), (3, 20))]
    goals = [orthonormal_basis(*basis.shape, generator=seeded(9)) for basis in bases]
    free, idle = nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(orthonormal_basis(2, 4, generator=seeded()))
    optimizer = OPTIMIZERS[name]([*bases, free, idle])
    retract_after_step(optimizer, iter([*bases, idle]), project_gradients=project_gradients)
    losses, errors = [], []
    for _ in range(200):
        optimizer.zero_grad()
        loss = sum(((basis.mT @ basis - goal.mT @ goal) ** 2).sum() for basis, goal in zip(bases, goals, strict=True))
        (loss + free.square().sum()).backward()
        optimizer.step()
        losses.append(loss.item())
        errors += [orthonormality_error(basis) for basis in (*bases, idle)]
    assert max(errors) < 1e-6
    assert losses[-1] < 0.1 * losses[0]
    assert orthonormality_error(free) > 1e-3


def test_projection_takes_place_before_the_step_until_the_handles_are_removed() -> None:
    basis = nn.Parameter(orthonormal_basis(3, 8, dtype=torch.float64, generator=seeded()))
    gradient = normal(3, 8)
    expected = retract_(basis.detach() - 0.1 * project_to_tangent(gradient, basis.detach()))
    unprojected = retract_(basis.detach() - 0.1 * gradient)
    optimizer = torch.optim.SGD([basis], lr=0.1)
    handles = retract_after_step(optimizer, [basis], project_gradients=True)
    basis.grad = gradient
    optimizer.step()
    torch.testing.assert_close(basis.detach(), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(unprojected, expected, atol=1e-3)
    for handle in handles:
        handle.remove()
    basis.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(basis.detach(), expected - 0.1 * gradient, rtol=0, atol=1e-12)
