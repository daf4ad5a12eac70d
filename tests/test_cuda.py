"""The CUDA backend behind the public functions, bindings and all, on the emulated GPU: it passes on the right things.

What the kernels compute is the subject of test_cuda_forward, _decode, _backward and _retraction.
"""

from __future__ import annotations

import copy
import re
import shutil
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from sysconfig import get_paths
from typing import Any

import pytest
import test_grouped
import torch
from op_calls import Call, draw_call
from tolerance import assert_accurate, assert_within_rule, outputs_and_gradients, plain_torch
from torch import Tensor

from baft_kernels import (
    BaftIntervention,
    BaftOutput,
    baft,
    baft_,
    grouped_baft,
    orthonormal_basis,
    orthonormality_error,
    repack,
    retract_,
    retract_after_step,
    retract_all_,
)
from baft_kernels.backends import FUSED, cuda, resolve_backend
from baft_kernels.reference import GATE_FNS, baft_reference

if shutil.which("g++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

import cuda_emulation as emulation  # after it is known that it can be built

# Width, rank before padding, dtype.
SHAPES = [
    (128, 5, torch.bfloat16),
    (256, 12, torch.bfloat16),
    (512, 16, torch.float16),
    (128, 8, torch.float32),
    (256, 13, torch.float32),
]
POSITIONS = {
    "all": None,
    "mask": torch.tensor([False, True, False, False, True]).repeat(2, 1),
    "the same of each": torch.tensor([4, 1]),
    "its own of each": torch.tensor([[1, 4], [4, 1]]),
}
every_shape = pytest.mark.parametrize(("d", "r", "dtype"), SHAPES)
both_sizes = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)  # of a number
every_choice = pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)


@pytest.fixture(scope="module")
def bindings() -> Any:
    """csrc/cuda_bindings.cpp, its operators registered for CPU tensors: what they launch runs on the emulated GPU."""
    loader = ExtensionFileLoader("_cuda", emulation.built("bindings", *torch_flags()))
    module = module_from_spec(spec_from_loader("_cuda", loader))
    loader.exec_module(module)
    return module


def torch_flags() -> list[str]:
    """As setup.py compiles the bindings."""
    torch_folder = Path(torch.__file__).parent
    headers = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include", get_paths()["include"]]
    versions = dict(re.findall(r'^(\w+_TARGET_VERSION) = "(\w+)"$', (emulation.ROOT / "setup.py").read_text(), re.M))
    return [
        *(f"-isystem{folder}" for folder in headers),
        f"-DTORCH_TARGET_VERSION={versions['TORCH_TARGET_VERSION']}",
        f"-DPy_LIMITED_API={versions['PYTHON_TARGET_VERSION']}",
        f"-L{torch_folder / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]


@pytest.fixture(autouse=True)
def emulated_gpu(bindings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_LIBRARY", bindings)
    monkeypatch.setattr(cuda, "_SERVED", cuda._served(bindings))
    monkeypatch.setattr(cuda, "_runs_on", lambda device: None)
    monkeypatch.setattr(cuda, "_architecture", lambda device: 900)
    monkeypatch.setattr(cuda.CudaBackend, "why_unusable", lambda self: None)


def on_cuda(*arguments: Any, **options: Any) -> BaftOutput:
    call = Call(*arguments)
    options = {"gate_fn": call.gate_fn, "positions": call.rows, "backend": "cuda"} | options
    return baft(*call[:6], return_aux=True, **options)


def calls_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of each call of an operator from now on."""
    calls: list[Any] = []
    operator = getattr(torch.ops.baft_kernels, name)

    def remembered(*arguments: Any) -> None:
        calls.append(arguments)
        operator(*arguments)

    monkeypatch.setattr(torch.ops.baft_kernels, name, remembered)
    return calls


# -- accuracy --


@every_shape
@pytest.mark.parametrize("gate_fn", GATE_FNS)
def test_it_is_accurate(d: int, r: int, dtype: torch.dtype, gate_fn: str) -> None:
    assert_accurate(on_cuda, *(draw_call((2, 19), d, r, gate_fn=gate_fn, dtype=dtype, seed=seed) for seed in range(3)))


@pytest.mark.parametrize("gate_fn", GATE_FNS)
@pytest.mark.parametrize("listed", [False, True])
def test_a_set_for_each_sequence(gate_fn: str, listed: bool) -> None:
    positions = torch.tensor([3, 17, 0])
    rows = torch.zeros(3, 20, dtype=torch.bool).index_fill(1, positions, True) if listed else None
    call = test_grouped.draw((3, 20), 256, 12, 3, gate_fn=gate_fn, dtype=torch.bfloat16, rows=rows)
    ids = torch.tensor([2, 0, 2])
    given = {"positions": positions} if listed else {}
    actual = test_grouped.with_gradients(call, lambda c: test_grouped.grouped(c, ids, "cuda", **given))
    plain = test_grouped.with_gradients(call, lambda c: test_grouped.by_sequence(c, ids, plain_torch))
    exact = test_grouped.with_gradients(call.double(), lambda c: test_grouped.by_sequence(c, ids, baft_reference))
    for name in exact:
        assert_within_rule(name, actual[name], plain[name], exact[name])
    assert not any(bool(actual[f"gradient of {name}"][1].any()) for name in ("basis", "source", "source_bias"))


def test_set_numbers_of_any_layout() -> None:
    call = test_grouped.draw((3, 20), 256, 12, 3, dtype=torch.bfloat16)
    for ids in (torch.tensor([2, 1, 0, 1, 2])[::2], torch.tensor(1).expand(3)):
        found = [grouped_baft(*call[:6], given, backend="cuda") for given in (ids, ids.contiguous())]
        assert torch.equal(*found)


# -- rows and layouts --


@every_choice
def test_positions(positions: Tensor | None) -> None:
    chosen = None if positions is None else POSITIONS["mask"]
    call = draw_call((2, 5), 256, 12, dtype=torch.bfloat16, rows=chosen)
    actual = outputs_and_gradients(on_cuda, call._replace(rows=positions))
    plain, exact = outputs_and_gradients(plain_torch, call), outputs_and_gradients(baft_reference, call.double())
    for name in exact:
        assert_within_rule(name, actual[name], plain[name], exact[name])
    if chosen is not None:
        assert torch.equal(actual["out"][~chosen], call.h[~chosen])


@every_choice
@both_sizes
def test_in_place_on_any_layout(positions: Tensor | None, dtype: torch.dtype) -> None:
    call = draw_call((2, 5), 256, 12, dtype=dtype)
    expected = baft(*call[:6], positions=positions, backend="cuda")
    layouts = {
        "dense": torch.empty(2, 5, 256),
        "wide": torch.empty(2, 5, 264)[..., :256],
        "less wide": torch.empty(2, 5, 260)[..., :256],  # a multiple of 16 bytes in float32
        "rows at odd places": torch.empty(2, 5, 259)[..., 1:257],
        "turned": torch.empty(2, 256, 5).mT,
    }
    for layout in layouts.values():
        h = (
            layout.to(dtype)
            if layout.is_contiguous()
            else torch.empty_strided(layout.shape, layout.stride(), dtype=dtype)
        )
        h.copy_(call.h)
        assert baft_(h, *call[1:6], positions=positions, backend="cuda") is h
        assert torch.equal(h, expected)


@both_sizes
def test_gradients_of_any_layout(dtype: torch.dtype) -> None:
    call = draw_call((40,), 256, 12, dtype=dtype)
    leaves = call._replace(**{name: value.requires_grad_() for name, value in call.floats().items()})
    inputs = list(leaves.floats().values())
    out = on_cuda(*leaves).out
    one, turned, wide = (torch.randn(shape).to(dtype) for shape in ((1, 1), (256, 40), (40, 259)))
    for gradient in (one.expand(40, 256), turned.mT, wide[:, 1:257]):
        assert not cuda._is_aligned(gradient)
        found = [
            torch.autograd.grad(out, inputs, given, retain_graph=True) for given in (gradient, gradient.contiguous())
        ]
        for actual, expected in zip(*found, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("positions", [None, torch.empty(0, dtype=torch.int64)])
def test_no_rows(positions: Tensor | None) -> None:
    call = draw_call((0 if positions is None else 3,), 256, 12, dtype=torch.bfloat16)
    results = outputs_and_gradients(on_cuda, call._replace(rows=positions))
    assert torch.equal(results["out"], call.h)
    assert not any(bool(results[f"gradient of {name}"].any()) for name in ("basis", "source", "gate"))


def test_only_what_is_wanted() -> None:
    call = draw_call((9,), 256, 12, dtype=torch.bfloat16)
    leaves = {name: value.requires_grad_() for name, value in call.floats().items()}
    whole = torch.autograd.grad(on_cuda(*call._replace(**leaves)).out.float().sum(), list(leaves.values()))
    by_name = dict(zip(leaves, whole, strict=True))
    for names in (["h"], ["basis", "gate_bias"]):
        chosen = {name: value if name in names else value.detach() for name, value in leaves.items()}
        out = on_cuda(*call._replace(**chosen)).out
        for name, one in zip(names, torch.autograd.grad(out.float().sum(), [leaves[n] for n in names]), strict=True):
            assert torch.equal(one, by_name[name])


# -- what calls it --


def test_it_compiles_whole_and_once_for_every_length() -> None:
    """What chooses the backend can be traced: nothing of it calls the compiled library."""
    torch._dynamo.reset()
    layer = BaftIntervention(256, 12, backend="cuda")
    compiled = torch.compile(lambda h: layer.edit(h).out, backend="eager", fullgraph=True, dynamic=True)
    for length in (5, 6, 40):
        h = torch.randn(2, length, 256, dtype=torch.bfloat16)
        assert torch.equal(compiled(h), layer.edit(h).out)


def test_a_module_trains_on_it() -> None:
    losses = []
    for served in ("cuda", "reference"):
        layer = BaftIntervention(256, 12, backend=served, generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        h, target = (
            torch.randn(20, 256, generator=torch.Generator().manual_seed(s), dtype=torch.bfloat16) for s in (1, 2)
        )
        of_steps = []
        for _ in range(4):
            loss = (layer(h) - target).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            retract_all_([layer.basis], backend=served)
            of_steps.append(loss.item())
        losses.append(of_steps)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def test_a_step_packs_all_layers_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [
        BaftIntervention(256, 12, backend="cuda"),
        BaftIntervention(256, 9, gate_fn="none", backend="cuda"),
        BaftIntervention(128, 5, gate_fn="softmax", dtype=torch.float64, backend="cuda"),
    ]
    hs = [torch.randn(20, layer.embed_dim, dtype=torch.bfloat16) for layer in layers]
    launches = calls_of("cuda_pack", monkeypatch)

    def gradients(of: list[BaftIntervention]) -> list[Tensor]:
        losses = [layer(h).float().square().mean() for layer, h in zip(of, hs, strict=True)]
        pairs = zip(losses, of, strict=True)
        return [gradient for loss, layer in pairs for gradient in torch.autograd.grad(loss, list(layer.parameters()))]

    def memory() -> set[int]:
        return {form.data_ptr() for call in launches for forms in call[5:10] for form in forms if form is not None}

    gradients(layers)
    assert [len(call[0]) for call in launches] == [1] * 6
    first = memory()
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1)
    retract_after_step(optimizer, [layer.basis for layer in layers], backend="cuda")
    for _ in range(2):
        for layer in layers:
            for parameter in layer.parameters():
                parameter.grad = 0.1 * torch.randn_like(parameter)
        launches.clear()
        optimizer.step()
        found = gradients(layers)
        assert [len(call[0]) for call in launches] == [3]
        assert memory() == first
        for actual, expected in zip(found, gradients(copy.deepcopy(layers)), strict=True):
            assert torch.equal(actual, expected)


def test_a_kernel_reads_parameters_early_only_if_they_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    call = draw_call((5,), 256, 12, dtype=torch.bfloat16)
    none = call.h[:0]
    launches = calls_of("cuda_forward", monkeypatch)

    def assert_right(*, settled: bool) -> None:
        fresh = [value.clone() for value in call[1:6] if value is not None]
        assert torch.equal(baft(*call[:6], backend="cuda"), baft(call.h, *fresh, backend="cuda"))
        assert [arguments[-1] for arguments in launches] == [settled, False]
        launches.clear()

    assert_right(settled=False)
    assert_right(settled=True)
    call.source.add_(1)
    assert_right(settled=False)
    assert_right(settled=True)
    call.basis.add_(0.1)
    repack([call.basis])
    assert not baft(none, *call[1:6], backend="cuda").numel()  # launches nothing that could have waited
    launches.clear()
    assert_right(settled=False)
    assert_right(settled=True)
    call.basis.add_(0.1)
    with monkeypatch.context() as captured:
        captured.setattr(cuda, "_is_captured", lambda x: True)  # into a graph, which runs later
        assert_right(settled=False)
    assert_right(settled=False)
    sets = test_grouped.draw((3, 2), 256, 12, 2, dtype=torch.bfloat16)
    for _ in range(2):
        grouped_baft(*sets[:6], torch.tensor([0, 1, 0]), backend="cuda")
    assert [arguments[-1] for arguments in launches] == [False, False]  # the adapters may be new


def test_bases_near_and_far_are_retracted() -> None:
    bases = [orthonormal_basis(r, 40) for r in (3, 5, 8)]
    for basis, step in zip(bases, (0.01, 0.3, 0.02), strict=True):
        basis += step * torch.randn_like(basis)
    expected = [retract_(basis.clone()) for basis in bases]
    versions = [basis._version for basis in bases]
    retract_all_(bases, backend="cuda")
    for basis, wanted, version in zip(bases, expected, versions, strict=True):
        torch.testing.assert_close(basis, wanted, rtol=0, atol=2e-7)
        assert basis._version > version
    large = torch.eye(65) * 1.01
    retract_all_([large], backend="cuda")  # by torch
    assert orthonormality_error(large) < 1e-6


# -- what it can't serve --


def test_info_names_the_shapes_that_are_compiled() -> None:
    table = (emulation.ROOT / "csrc/cuda/instances.h").read_text()
    for bits, dtypes in ((16, "bfloat16 and float16 on NVIDIA GPUs from sm_90 on"), (32, "float32")):
        highest: dict[int, int] = {}
        for name in ("FORWARD_DECODE", "FORWARD_STREAM", "BACKWARD_STREAM"):
            lines = table.partition(f"#define BAFT_{name}(DO)")[2].partition("\n\n")[0]
            ranks: dict[int, int] = {}
            for width, rank in re.findall(rf"DO\({bits}, (\d+), (\d+),", lines):
                ranks[int(width)] = max(int(rank), ranks.get(int(width), 0))
            highest = ranks if not highest else {d: min(r, highest[d]) for d, r in ranks.items()}
        by_rank = {rank: ", ".join(str(d) for d, r in highest.items() if r == rank) for rank in (32, 16, 8)}
        said = f"{dtypes}, r up to 32 at d = {by_rank[32]}, up to 16 at {by_rank[16]}, up to 8 at {by_rank[8]};"
        assert said in cuda.CudaBackend.serves


@pytest.mark.parametrize(
    ("h", "rank", "says"),
    [
        (torch.ones(1, 256).double(), 8, "it serves float32, bfloat16 and float16, and h is float64"),
        (torch.ones(1, 257, dtype=torch.bfloat16), 8, "its kernels aren't compiled for bfloat16, d = 257 and r = 8"),
        (torch.ones(1, 256, dtype=torch.bfloat16), 33, "its kernels aren't compiled for bfloat16, d = 256 and r = 33"),
        (torch.ones(1, 512), 16, "its kernels aren't compiled for float32, d = 512 and r = 16"),
    ],
)
def test_what_it_cannot_serve(h: Tensor, rank: int, says: str) -> None:
    with pytest.raises(ValueError, match=f"backend: expected one that serves this call, got 'cuda': {says}"):
        resolve_backend("cuda", h, rank)


def test_auto_waits_for_a_run_on_a_gpu() -> None:
    assert FUSED["cuda"].unproven
    assert resolve_backend("auto", torch.empty(1, 256, dtype=torch.bfloat16), 8) != "cuda"


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (ModuleNotFoundError("No module named 'baft_kernels._cuda'"), "csrc/cuda wasn't built: it takes nvcc"),
        (ImportError("_cuda.abi3.so: undefined symbol: torch_call"), "doesn't load: _cuda.abi3.so: undefined symbol"),
    ],
)
def test_a_library_that_is_missing_or_broken_says_so(
    result: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        raise result

    monkeypatch.setattr(cuda.importlib, "import_module", fail)
    problem = cuda._load()
    assert says in str(problem)
    monkeypatch.undo()
    monkeypatch.setattr(cuda, "_LIBRARY", problem)
    assert cuda.CudaBackend().why_unusable() == problem
    with pytest.raises(ValueError, match="backend: expected a usable one"):
        grouped_baft(*test_grouped.draw((1, 2), 256, 8, 1)[:6], torch.tensor([0]), backend="cuda")
