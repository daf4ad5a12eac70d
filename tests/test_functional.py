"""The public functions: what they refuse and how they say so, in-place editing, and the choice of a backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_backend import FakeBackend
from op_calls import Call, draw_call
from torch import Tensor

from baft_kernels import BaftOutput, baft, baft_
from baft_kernels.backends import FUSED, KNOWN_BACKENDS
from baft_kernels.reference import baft_reference

PARAMETERS = ("basis", "source", "source_bias", "gate", "gate_bias")
FUSED_NAMES = [name for name in KNOWN_BACKENDS if name != "reference"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAFT_BACKEND", raising=False)
    monkeypatch.delenv("BAFT_CHECK_FINITE", raising=False)


def apply(call: Call, **options: Any) -> BaftOutput:
    """``baft`` on a call, by name, with aux outputs."""
    arguments = call._asdict()
    return baft(positions=arguments.pop("rows"), return_aux=True, **arguments, **options)


def draw(**changes: Any) -> Call:
    """A call on h [2, 4, 6] with r = 3, with some arguments changed."""
    return draw_call((2, 4), 6, 3)._replace(**changes)


# -- results --


def test_return_aux_adds_weights_and_update() -> None:
    call = draw()
    expected = baft_reference(*call)
    out = baft(*call[:6], backend="reference")
    assert isinstance(out, Tensor)
    assert torch.equal(out, expected.out)
    result = baft(*call[:6], return_aux=True, backend="reference")
    assert isinstance(result, BaftOutput)
    for actual, wanted in zip(result, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_the_gate_function_is_passed_on() -> None:
    call = draw(gate_fn="softmax")
    torch.testing.assert_close(apply(call).weights.sum(-1), torch.ones(2, 4))
    loreft = draw(gate_fn="none", gate=None, gate_bias=None)
    assert torch.equal(apply(loreft).weights, torch.ones(2, 4, 3))


@pytest.mark.parametrize("positions", [None, torch.tensor([0, 2]), torch.eye(2, 4, dtype=torch.bool)])
def test_it_compiles_into_one_graph(positions: Tensor | None) -> None:
    call = draw(rows=positions)
    # The eager backend traces the whole function and compiles nothing.
    compiled = torch.compile(apply, fullgraph=True, backend="eager")
    for actual, expected in zip(compiled(call), apply(call), strict=True):
        torch.testing.assert_close(actual, expected)


# -- in place --


@pytest.mark.parametrize("positions", [None, torch.tensor([0, 2]), torch.eye(2, 4, dtype=torch.bool)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_equals_out_of_place(positions: Tensor | None, dtype: torch.dtype) -> None:
    call = draw_call((2, 4), 6, 3, dtype=dtype)
    expected = baft(*call[:6], positions=positions)
    h = call.h.clone()
    assert baft_(h, *call[1:6], positions=positions) is h
    assert torch.equal(h, expected)


def test_in_place_on_a_slice_leaves_its_neighbours() -> None:
    call = draw()
    wide = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    before = wide.clone()
    baft_(wide[..., 2:8], *call[1:6])
    torch.testing.assert_close(wide[..., 2:8], baft(before[..., 2:8], *call[1:6]))
    assert torch.equal(wide[..., :2], before[..., :2])
    assert torch.equal(wide[..., 8:], before[..., 8:])


def test_in_place_records_no_gradient_of_the_parameters() -> None:
    call = draw()
    parameters = [tensor.requires_grad_() for tensor in call[1:6]]
    assert not baft_(call.h.clone(), *parameters).requires_grad


def test_in_place_refuses_a_tensor_that_needs_a_gradient() -> None:
    call = draw()
    before = call.h.clone()
    with pytest.raises(ValueError, match=r"^h: expected requires_grad=False, .*, got True$"):
        baft_(call.h.requires_grad_(), *call[1:6])
    assert torch.equal(call.h, before)


# -- refusals --


def indices(*values: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {"rows": torch.tensor(values, dtype=dtype)}


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gate_fn": "relu"}, ValueError, "gate_fn: expected one of sigmoid, softmax, none, got 'relu'"),
    (
        {"h": torch.ones(2, 6, dtype=torch.int64)},
        TypeError,
        "h: expected float32, bfloat16, float16 or float64, got torch.int64",
    ),
    ({"h": torch.tensor(1.0)}, ValueError, "h: expected shape [..., d] with d >= 1, got []"),
    ({"h": torch.ones(3, 0)}, ValueError, "h: expected shape [..., d] with d >= 1, got [3, 0]"),
    ({"basis": torch.ones(6)}, ValueError, "basis: expected shape [r, 6] with 1 <= r <= 6, got [6]"),
    ({"basis": torch.ones(3, 5)}, ValueError, "basis: expected shape [r, 6] with 1 <= r <= 6, got [3, 5]"),
    ({"basis": torch.ones(7, 6)}, ValueError, "basis: expected shape [r, 6] with 1 <= r <= 6, got [7, 6]"),
    ({"basis": torch.ones(0, 6)}, ValueError, "basis: expected shape [r, 6] with 1 <= r <= 6, got [0, 6]"),
    ({"source": torch.ones(2, 6)}, ValueError, "source: expected shape [3, 6], got [2, 6]"),
    ({"source_bias": torch.ones(1, 3)}, ValueError, "source_bias: expected shape [3], got [1, 3]"),
    ({"gate": torch.ones(6, 3)}, ValueError, "gate: expected shape [3, 6], got [6, 3]"),
    ({"gate_bias": torch.ones(1)}, ValueError, "gate_bias: expected shape [3], got [1]"),
    ({"gate": None}, ValueError, "gate, gate_bias: expected tensors with gate_fn='sigmoid', got None"),
    ({"gate_bias": None}, ValueError, "gate, gate_bias: expected tensors with gate_fn='sigmoid', got None"),
    ({"gate_fn": "none"}, ValueError, 'gate, gate_bias: expected None with gate_fn="none", got a tensor'),
    ({"gate_fn": "none", "gate": None}, ValueError, 'gate, gate_bias: expected None with gate_fn="none", got a tensor'),
    (indices(0.0), TypeError, "positions: expected an integer or boolean tensor, got torch.float32"),
    (indices(0, dtype=torch.complex64), TypeError, "positions: expected an integer or boolean tensor, got torch.compl"),
    (indices(True, False), ValueError, "positions: expected a boolean mask of shape [2, 4], got [2]"),
    ({"rows": torch.tensor(1)}, ValueError, "positions: expected shape [k] or [2, k] for h of shape [2, 4, 6], got []"),
    (indices([1]), ValueError, "positions: expected shape [k] or [2, k] for h of shape [2, 4, 6], got [1, 1]"),
    (indices([[1]], [[1]]), ValueError, "positions: expected shape [k] or [2, k] for h of shape [2, 4, 6], got [2, 1,"),
    ({"h": torch.ones(6), **indices(0)}, ValueError, "positions: expected None for a single vector h, got indices"),
    (indices(1, 4), ValueError, "positions: expected indices from 0 to 3, got 1 to 4"),
    (indices(3, -1), ValueError, "positions: expected indices from 0 to 3, got -1 to 3"),
    (indices(2, 0, 2), ValueError, "positions: expected each index once in a sequence, got a repeated index"),
    (indices([0, 1], [2, 2]), ValueError, "positions: expected each index once in a sequence, got a repeated index"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
@pytest.mark.parametrize("function", [baft, baft_])
def test_refusals_name_the_argument(function: Any, changes: dict[str, Any], error: type, message: str) -> None:
    arguments = draw(**changes)._asdict()
    with pytest.raises(error) as raised:
        function(positions=arguments.pop("rows"), **arguments)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_must_be_floating_point(name: str) -> None:
    call = draw()
    with pytest.raises(TypeError, match=rf"^{name}: expected a floating point tensor, got torch\.int32$"):
        apply(call._replace(**{name: getattr(call, name).int()}))


@pytest.mark.parametrize("name", [*PARAMETERS, "positions"])
def test_everything_must_be_on_one_device(name: str) -> None:
    call = draw(rows=torch.tensor([1]))
    field = "rows" if name == "positions" else name
    with pytest.raises(ValueError, match=f"^{name}: expected device cpu as h has, got meta$"):
        apply(call._replace(**{field: getattr(call, field).to("meta")}))


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_parameters_are_refused_on_request(name: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    call = draw()
    getattr(call, name).view(-1)[1] = value
    apply(call)
    monkeypatch.setenv("BAFT_CHECK_FINITE", "0")
    apply(call)
    monkeypatch.setenv("BAFT_CHECK_FINITE", "1")
    with pytest.raises(ValueError, match=f"^{name}: expected finite values, got NaN or infinity$"):
        apply(call)


def test_a_non_finite_h_is_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAFT_CHECK_FINITE", "1")
    assert apply(draw(h=torch.full((2, 4, 6), float("nan")))).out.isnan().all()


# -- backends --


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts a fake in the place of every fused backend; the list says which of them served."""
    names: list[str] = []
    for name in FUSED_NAMES:
        monkeypatch.setitem(FUSED, name, FakeBackend(name, names))
    return names


def test_a_named_backend_serves_the_call(served: list[str]) -> None:
    call = draw(rows=torch.tensor([1, 3]))
    expected = apply(call, backend="reference")
    assert served == []
    for name in FUSED_NAMES:
        for actual, wanted in zip(apply(call, backend=name), expected, strict=True):
            assert torch.equal(actual, wanted)
    assert served == FUSED_NAMES


def test_the_environment_overrides_auto_and_nothing_else(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = FUSED_NAMES[-1]
    monkeypatch.setenv("BAFT_BACKEND", name)
    apply(draw(), backend="reference")
    assert served == []
    apply(draw(), backend="auto")
    apply(draw())
    assert served == [name, name]


def test_auto_takes_the_first_that_is_usable_and_fits(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(FUSED):
        monkeypatch.delitem(FUSED, name)
    for backend in (
        FakeBackend("cuda", served, unusable="no device"),
        FakeBackend("triton", served, unfit="h is elsewhere"),
        FakeBackend("cpu", served),
    ):
        monkeypatch.setitem(FUSED, backend.name, backend)
    apply(draw())
    assert served == ["cpu"]
    monkeypatch.setitem(FUSED, "cpu", FakeBackend("cpu", served, unusable="not built"))
    assert torch.equal(apply(draw()).out, baft_reference(*draw()).out)
    assert served == ["cpu"]


@pytest.mark.parametrize("value", ["", "auto"])
def test_the_environment_may_leave_the_choice(value: str, served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAFT_BACKEND", value)
    apply(draw())
    assert served == [next(iter(FUSED))]


def test_the_environment_may_ask_for_the_reference(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAFT_BACKEND", "reference")
    assert torch.equal(apply(draw()).out, baft_reference(*draw()).out)
    assert served == []


@pytest.mark.parametrize("name", FUSED_NAMES)
def test_a_backend_that_does_not_fit_raises_rather_than_fall_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSED, name, FakeBackend(name, [], unfit="h is too wide"))
    with pytest.raises(ValueError, match=f"^backend: expected one that serves this call, got '{name}': h is too wide$"):
        apply(draw(), backend=name)


@pytest.mark.parametrize("name", FUSED_NAMES)
def test_a_missing_backend_raises_rather_than_fall_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSED, name, FakeBackend(name, [], unusable="not built"))
    reason = rf"expected a usable one \(.*\), got '{name}': not built$"
    with pytest.raises(ValueError, match=f"^backend: {reason}"):
        apply(draw(), backend=name)
    monkeypatch.setenv("BAFT_BACKEND", name)
    with pytest.raises(ValueError, match=f"^BAFT_BACKEND: {reason}"):
        apply(draw())


def test_an_unknown_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "expected auto or one of reference, cpu, triton, cuda, got 'gpu'$"
    with pytest.raises(ValueError, match=f"^backend: {expected}"):
        apply(draw(), backend="gpu")
    monkeypatch.setenv("BAFT_BACKEND", "gpu")
    with pytest.raises(ValueError, match=f"^BAFT_BACKEND: {expected}"):
        apply(draw())
