"""What bench/gpu_suite.py runs, each program in a process of its own: ``python bench/gpu_programs.py NAME ...``.

Its tests are run by gpu_tests.py.
"""

from __future__ import annotations

import itertools
import json
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import report  # noqa: E402  # after the folders of this checkout are known
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from variants import Case, draw, fused_backends  # noqa: E402

from baft_kernels import (  # noqa: E402
    baft,
    baft_,
    grouped_baft,
    orthonormal_basis,
    orthonormality_error,
    retract_all_,
)

MARK = "NUMBERS "  # stands before the JSON that they print for the suite
NOBODY = "no fused backend serves here; python -m baft_kernels.info says why"
REPEATED = (
    Case(1, 4096, 16, torch.bfloat16, training=True),
    Case(17, 130, 3, torch.float32, training=True),
    Case(1024, 4096, 16, torch.bfloat16, training=True),
)


def few_calls(backend: str) -> None:
    """Every pair of eight choices, in sixteen of their combinations; each call in place, too; and retractions."""
    count = 0
    for a, b, c, common in itertools.product((0, 1), repeat=4):
        # Of the widths that models have, a narrow and a wide one; few rows and many have kernels of their own.
        rows, d = ((3, 50)[a], (768, 4096)[b]) if common else ((1, 17)[a], (96, 130)[b])
        case = Case(rows, d, (3, 16)[c], (torch.float32, torch.bfloat16)[a ^ b], training=True)
        gate_fn, listed, grouped = ("sigmoid", "softmax")[b ^ c], a ^ c, a ^ b ^ c
        h, parameters = _arguments(2, case)
        if backend not in fused_backends(h, case.r):
            continue
        every_third = torch.arange(0, case.rows, 3) if listed else torch.arange(2 * case.rows).view(2, -1) % 3 == 0
        sets = [torch.stack([value, value]).detach().requires_grad_() for value in parameters]
        print(f"{backend}: {case.name} {gate_fn}{' listed' * listed}{' grouped' * grouped}")
        options = {"gate_fn": gate_fn, "positions": every_third.to(h.device), "backend": backend}
        results = [baft_(h.clone(), *parameters, **options)]
        if grouped:
            results += _results(grouped_baft, h, sets, adapter_ids=torch.tensor([1, 0], device=h.device), **options)
        else:
            results += _results(baft, h, parameters, **options)
        if not all(bool(result.isfinite().all()) for result in results):
            sys.exit(f"{backend}: not finite: {case.name}")
        count += 1
    _print_numbers(calls=count)
    if not count:
        sys.exit(NOBODY)
    print(f"{backend}: retraction")
    bases = [
        orthonormal_basis(r, d, device=device()).mul_(1.01) for r, d in ((3, 96), (12, 768), (16, 4096), (64, 130))
    ]
    retract_all_(bases, backend=backend)
    if any(orthonormality_error(basis) > 1e-5 for basis in bases):
        sys.exit(f"{backend}: bases that were retracted aren't orthonormal")


def repeated_calls(launches: str) -> None:
    """How many of so many calls, of each kind and on each backend, don't give the bits of the first one."""
    differing: dict[str, int] = {}
    for case in REPEATED:
        h, parameters = _arguments(1, case)
        for backend in fused_backends(h, case.r):
            first = _results(baft, h, parameters, backend=backend)
            again = (_results(baft, h, parameters, backend=backend) for _ in range(int(launches)))
            differing[f"{backend}, {case.name}"] = sum(not all(map(_same_bits, first, results)) for results in again)
            _print_numbers(launches=int(launches), differing=differing)
    if not differing or any(differing.values()):
        sys.exit(f"not the same bits: {differing}" if differing else NOBODY)


def script(name: str, results: str, *arguments: str) -> None:
    """A script of this folder, with its results elsewhere."""
    report.RESULTS = Path(results)
    sys.argv = [str(HERE / name), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _arguments(sequences: int, case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(sequences, case.rows, case.d, generator=generator).to(device(), case.dtype)
    return h, draw(case, device()).masters


def _results(function: Callable[..., Any], h: Tensor, parameters: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """out, w and u of a call, and the gradients of h and of each parameter, with the outputs as what comes in."""
    leaves = [h.detach().requires_grad_(), *parameters]
    outputs = function(*leaves, return_aux=True, **options)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [output.detach() for output in outputs])]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(tensor.contiguous().view(torch.uint8) for tensor in (one, other)))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _print_numbers(**numbers: Any) -> None:
    print(MARK + json.dumps(numbers))


PROGRAMS: dict[str, Callable[..., None]] = {
    program.__name__: program for program in (few_calls, repeated_calls, script)
}


if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
