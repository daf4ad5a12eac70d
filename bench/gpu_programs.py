"""What bench/gpu_suite.py runs, each program in a process of its own: ``python bench/gpu_programs.py NAME ...``."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import report  # noqa: E402  # after the folders of this checkout are known
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from variants import Case, draw, fused_backends  # noqa: E402

from baft_kernels import baft, baft_, grouped_baft  # noqa: E402

MARK = "NUMBERS "  # stands before the JSON that they print for the suite
NOBODY = "no fused backend serves here; python -m baft_kernels.info says why"
REPEATED = (
    Case(1, 4096, 16, torch.bfloat16, training=True),
    Case(17, 130, 3, torch.float32, training=True),
    Case(1024, 4096, 16, torch.bfloat16, training=True),
)


def tests(reports: str) -> None:
    """pytest in as many processes as there are processors, since most of the time goes into compiling.

    Each has its share of the tests, and writes what came of them to a file in ``reports``, even if it is stopped.
    """
    folder = ROOT / "tests"
    files = [*sorted(folder.glob("test_triton*.py")), folder / "test_gpu.py", folder / "test_gpu_engine.py"]
    count = min(16, os.cpu_count() or 1)
    options = "-v --tb=short -p no:cacheprovider -o faulthandler_timeout=60".split()
    command = [sys.executable, "-m", "pytest", *options]
    processes = [
        subprocess.Popen(
            [*command, f"--shard={index}/{count}", f"--junitxml={reports}/{index}.xml", *map(str, files)],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(count)
    ]  # fmt: skip
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only they are to stop

    def relay(index: int) -> int:
        for line in processes[index].stdout or ():
            sys.stdout.write(f"{index}: {line}")
        return processes[index].wait()

    with ThreadPoolExecutor(count) as pool:
        ends = dict(enumerate(pool.map(relay, range(count))))
    if bad := {index: end for index, end in ends.items() if end not in (0, 5)}:  # 5: none of the tests was its
        sys.exit(f"exit status of pytest by process: {bad}")


def few_calls() -> None:
    """Every pair of eight choices, in sixteen of their combinations; and each call in place, too."""
    counts: Counter[str] = Counter()
    for a, b, c, common in itertools.product((0, 1), repeat=4):
        # Of the widths that models have, one; few rows and many have kernels of their own.
        rows, d = ((3, 50)[a], 768) if common else ((1, 17)[a], (96, 130)[b])
        case = Case(rows, d, (3, 16)[c], (torch.float32, torch.bfloat16)[a ^ b], training=True)
        gate_fn, listed, grouped = ("sigmoid", "softmax")[b ^ c], a ^ c, a ^ b ^ c
        h, parameters = _arguments(2, case)
        every_third = torch.arange(0, case.rows, 3) if listed else torch.arange(2 * case.rows).view(2, -1) % 3 == 0
        sets = [torch.stack([value, value]).detach().requires_grad_() for value in parameters]
        for backend in fused_backends(h, case.r):
            print(f"{backend}: {case.name} {gate_fn}{' listed' * listed}{' grouped' * grouped}")
            options = {"gate_fn": gate_fn, "positions": every_third.to(h.device), "backend": backend}
            results = [baft_(h.clone(), *parameters, **options)]
            if grouped:
                results += _results(grouped_baft, h, sets, adapter_ids=torch.tensor([1, 0], device=h.device), **options)
            else:
                results += _results(baft, h, parameters, **options)
            if not all(bool(result.isfinite().all()) for result in results):
                sys.exit(f"{backend}: not finite: {case.name}")
            counts[backend] += 1
    _print_numbers(calls=counts)
    if not counts:
        sys.exit(NOBODY)


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
    program.__name__: program for program in (tests, few_calls, repeated_calls, script)
}


if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
