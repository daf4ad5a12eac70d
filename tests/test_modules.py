"""The intervention as a module: what a new one does, what it holds, and that it travels like any torch module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fake_backend import FakeBackend
from op_calls import seeded
from torch import nn

from baft_kernels import BaftIntervention, baft, orthonormality_error
from baft_kernels.backends import FUSED
from baft_kernels.reference import GATE_FNS

GATED = ("sigmoid", "softmax")


def hidden(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(1)).to(dtype)


def trained(**options: Any) -> BaftIntervention:
    """An intervention [d = 16, r = 3] that is no longer the identity."""
    intervention = BaftIntervention(16, 3, generator=seeded(), **options)
    with torch.no_grad():
        for parameter in (intervention.source, intervention.source_bias):
            parameter += 0.3 * torch.randn(parameter.shape, generator=seeded(2))
    return intervention


# -- a new intervention --


@pytest.mark.parametrize("gate_fn", GATE_FNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_intervention_is_the_identity(gate_fn: str, dtype: torch.dtype) -> None:
    h = hidden(2, 5, 16, dtype=dtype)
    out, _, update = BaftIntervention(16, 3, gate_fn=gate_fn).edit(h)
    assert torch.equal(out, h)
    assert not update.any()


@pytest.mark.parametrize("gate_fn", GATED)
def test_parameters_of_a_gated_intervention(gate_fn: str) -> None:
    intervention = BaftIntervention(16, 3, gate_fn=gate_fn)
    shapes = {name: list(parameter.shape) for name, parameter in intervention.named_parameters()}
    assert shapes == {"basis": [3, 16], "source": [3, 16], "source_bias": [3], "gate": [3, 16], "gate_bias": [3]}
    assert {parameter.dtype for parameter in intervention.parameters()} == {torch.float32}
    assert orthonormality_error(intervention.basis) < 5e-7
    assert intervention.source.data_ptr() != intervention.basis.data_ptr()


def test_without_a_gate_there_are_no_gate_parameters() -> None:
    intervention = BaftIntervention(16, 3, gate_fn="none")
    assert [name for name, _ in intervention.named_parameters()] == ["basis", "source", "source_bias"]
    assert intervention.gate is None
    assert intervention.gate_bias is None
    assert "gate" not in intervention.state_dict()


def test_a_generator_draws_every_parameter() -> None:
    first, again, other = (BaftIntervention(16, 3, generator=seeded(seed)).state_dict() for seed in (7, 7, 8))
    for name in first:
        assert torch.equal(first[name], again[name]), name
    assert not torch.equal(first["basis"], other["basis"])
    assert not torch.equal(first["gate"], other["gate"])


def test_torchs_defaults_change_nothing() -> None:
    # Loaders of large models set both while they build modules.
    expected = BaftIntervention(16, 3, generator=seeded()).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = BaftIntervention(16, 3, generator=seeded()).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for name in expected:
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], expected[name]), name
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in BaftIntervention(16, 3, generator=seeded()).parameters())
        on_cpu = BaftIntervention(16, 3, device="cpu", generator=seeded())
    for name in expected:
        assert torch.equal(on_cpu.state_dict()[name], expected[name]), name
    assert all(parameter.is_meta for parameter in BaftIntervention(16, 3, device="meta").parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": torch.bfloat16}, TypeError, "dtype: expected float32 or float64 for the parameters, got torch.bfl"),
        ({"gate_fn": "relu"}, ValueError, "gate_fn: expected one of sigmoid, softmax, none, got 'relu'"),
        ({"backend": "gpu"}, ValueError, "backend: expected auto or one of reference, cpu, triton, cuda, got 'gpu'"),
        ({"low_rank_dimension": 17}, ValueError, "rank: expected 1 <= rank <= dim = 16, got 17"),
        ({"low_rank_dimension": 0}, ValueError, "rank: expected 1 <= rank <= dim = 16, got 0"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        BaftIntervention(**{"embed_dim": 16, "low_rank_dimension": 3, **options})
    assert str(raised.value).startswith(message)


# -- editing --


@pytest.mark.parametrize("gate_fn", GATE_FNS)
def test_it_applies_the_op_with_its_own_parameters(gate_fn: str) -> None:
    intervention, h = trained(gate_fn=gate_fn), hidden(2, 5, 16)
    parameters = [intervention.basis, intervention.source, intervention.source_bias]
    parameters += [intervention.gate, intervention.gate_bias]
    positions = torch.tensor([[0, 4], [1, 2]])
    expected = baft(h, *parameters, gate_fn=gate_fn, positions=positions, return_aux=True)
    for actual, wanted in zip(intervention.edit(h, positions), expected, strict=True):
        assert torch.equal(actual, wanted)
    assert torch.equal(intervention(h), baft(h, *parameters, gate_fn=gate_fn))
    assert not torch.equal(intervention(h), h)


def test_it_is_called_as_pyvene_calls_interventions() -> None:
    intervention, h = trained(), hidden(2, 5, 16)
    assert torch.equal(intervention(h, None, None), intervention(h))
    assert torch.equal(intervention(base=h, source=None, subspaces=None), intervention(h))
    for unusable in ({"source": h}, {"subspaces": [0]}):
        with pytest.raises(ValueError, match=r"^source, subspaces: expected None"):
            intervention(h, **unusable)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hidden_vectors_train_float32_parameters(dtype: torch.dtype) -> None:
    intervention = trained()
    out = intervention(hidden(2, 5, 16, dtype=dtype))
    assert out.dtype == dtype
    out.float().square().sum().backward()
    for name, parameter in intervention.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any(), name


def test_it_passes_its_backend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    monkeypatch.setitem(FUSED, "cpu", FakeBackend("cpu", served))
    with torch.no_grad():
        trained(backend="reference")(hidden(5, 16))
        assert served == []
        trained(backend="cpu")(hidden(5, 16))
        assert served == ["cpu"]


def test_retraction_makes_the_basis_orthonormal_again() -> None:
    intervention = trained()
    with torch.no_grad():
        intervention.basis += 0.1
    version = intervention.basis._version
    intervention.retract_()
    assert orthonormality_error(intervention.basis) < 5e-7
    # What is cached for a version of the parameter must be seen to be out of date.
    assert intervention.basis._version > version


# -- growing --


@pytest.mark.parametrize("gate_fn", ["sigmoid", "none"])
def test_new_bases_change_nothing_until_they_are_trained(gate_fn: str) -> None:
    intervention, h = trained(gate_fn=gate_fn), hidden(2, 5, 16).double()
    before, parameters = intervention.to(torch.float64)(h), copy.deepcopy(intervention.state_dict())
    intervention.grow(4, generator=seeded(3))
    torch.testing.assert_close(intervention(h), before, rtol=1e-12, atol=1e-12)
    assert intervention.low_rank_dimension == 7
    for name, parameter in intervention.named_parameters():
        assert torch.equal(parameter[:3], parameters[name]), name
        assert len(parameter) == 7 and parameter.requires_grad, name
    assert orthonormality_error(intervention.basis) < 1e-6  # the old ones were rounded to float32
    assert torch.equal(intervention.source[3:], intervention.basis[3:])
    assert not intervention.source_bias[3:].any()
    intervention(h).square().sum().backward()
    assert intervention.source.grad[3:].any(1).all()


def test_a_generator_draws_new_bases() -> None:
    grown = [trained() for _ in range(3)]
    for intervention, seed in zip(grown, (7, 7, 8), strict=True):
        intervention.grow(2, generator=seeded(seed))
    first, again, other = (intervention.state_dict() for intervention in grown)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["basis"], other["basis"])
    assert not torch.equal(first["gate"], other["gate"])


@pytest.mark.parametrize(
    ("gate_fn", "extra", "message"),
    [
        ("sigmoid", 14, "^count: expected 1 <= count <= 13, what 3 rows of 16 leave, got 14$"),
        ("softmax", 1, "^gate_fn: expected sigmoid or none for bases to be added, got softmax"),
    ],
)
def test_what_can_not_grow(gate_fn: str, extra: int, message: str) -> None:
    intervention = trained(gate_fn=gate_fn)
    before = copy.deepcopy(intervention.state_dict())
    with pytest.raises(ValueError, match=message):
        intervention.grow(extra)
    assert all(torch.equal(value, before[name]) for name, value in intervention.state_dict().items())


# -- travelling --


@pytest.mark.parametrize("gate_fn", GATE_FNS)
def test_state_dict_round_trip(gate_fn: str) -> None:
    first, second = trained(gate_fn=gate_fn), BaftIntervention(16, 3, gate_fn=gate_fn, generator=seeded(9))
    h = hidden(2, 5, 16)
    assert not torch.equal(first(h), second(h))
    second.load_state_dict(first.state_dict(), strict=True)
    assert torch.equal(first(h), second(h))


def test_a_copy_is_independent() -> None:
    first, h = trained(gate_fn="softmax"), hidden(2, 5, 16)
    second = copy.deepcopy(first)
    before = first(h)
    assert torch.equal(second(h), before)
    with torch.no_grad():
        second.source += 1
    assert torch.equal(first(h), before)
    assert not torch.equal(second(h), before)


def test_to_another_dtype() -> None:
    intervention, h = trained(), hidden(2, 5, 16)
    single = intervention(h)
    double = intervention.to(torch.float64)(h.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single)


def test_it_works_inside_other_modules() -> None:
    model = nn.Sequential(nn.Linear(8, 16), trained(), nn.Linear(16, 2))
    assert "1.source_bias" in model.state_dict()
    assert model(hidden(4, 8)).shape == (4, 2)
    assert "embed_dim=16, low_rank_dimension=3, gate_fn='sigmoid'" in repr(model)
