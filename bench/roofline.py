"""How fast is the op, against the copy of the same bytes and against what one would write without it?

    python bench/roofline.py                     the grid of this machine's kind (GPU or CPU)
    python bench/roofline.py --rows 1 256 --dtypes float32 --d 4096 --r 16

For each case: the bytes that have to move at least (``Case.bytes``), and for every variant the median time with the
20th and 80th percentile, the rate at which it moves those bytes, and its share of the rate of a plain copy of as many
bytes in the same run. Whoever's result isn't as accurate as plain torch's (the tests' tolerance rule), or who raises,
gets no time but a line that says why.
h rotates past the caches; the parameters, less than a megabyte, may stay in them. Results go to bench/results/ as JSON,
Markdown and PNG, with commit and versions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]

from op_calls import Call  # noqa: E402  # after the folders of this checkout are known
from report import RESULTS, markdown, provenance  # noqa: E402
from terminal import plain_console  # noqa: E402
from timing import PAST_CACHES, Spread, Work, interleaved  # noqa: E402
from tolerance import assert_accurate  # noqa: E402
from variants import RIVALS, Case, Operands, Variant, draw, fused_backends, op_on  # noqa: E402

from baft_kernels import BaftOutput, baft  # noqa: E402

COPY = "copy"
HEADER = ["case", "variant", "µs", "p20", "p80", "MB", "GB/s", "of copy", "times eager"]
GRIDS: dict[str, dict[str, list[Any]]] = {
    "cpu": {"rows": [1, 16, 256, 2048], "d": [768, 4096], "r": [16], "dtypes": ["float32", "bfloat16"]},
    "cuda": {"rows": [1, 16, 256, 4096, 32768, 131072], "d": [4096], "r": [8, 16, 32], "dtypes": ["bfloat16"]},
}


@dataclass(frozen=True)
class Row:
    """One variant of one case; without a time if its result is wrong, or if it raised."""

    case: Case
    variant: str
    spread: Spread | None
    problem: str | None = None

    def rate(self) -> float:
        """Bytes a second."""
        return self.case.bytes / self.spread.median if self.spread else float("nan")


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grid = GRIDS[device.type]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=grid["rows"], metavar="T")
    parser.add_argument("--d", type=int, nargs="+", default=grid["d"])
    parser.add_argument("--r", type=int, nargs="+", default=grid["r"])
    parser.add_argument("--dtypes", nargs="+", default=grid["dtypes"], choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=15, help="batches of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--name", default=f"roofline_{device.type}", help="of the files in bench/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = plain_console(200)
    cases = [
        Case(rows, d, r, getattr(torch, dtype), training)
        for training, dtype, d, r, rows in itertools.product(
            (False, True), options.dtypes, options.d, options.r, options.rows
        )
    ]
    rivals = {name: rival for name, rival in RIVALS.items() if not (options.no_compile and name == "torch.compile")}
    rows: list[Row] = []
    for number, case in enumerate(cases, 1):
        console.print(f"[{number} of {len(cases)}] {case.name}", style="dim")
        rows += measure(case, rivals, device, options.rounds)
        paths = save(options.name, rows, device)  # each time: a run may be cut off
    console.print(table_of(rows))
    for path in (*paths, plot(rows, provenance(device), paths[0].with_suffix(".png"))):
        console.print(f"Saved: {path}")


def measure(case: Case, rivals: dict[str, Variant], device: torch.device, rounds: int) -> list[Row]:
    """Check the op on each backend, then time everything that is right, and runs."""
    operands = draw(case, device)
    backends = fused_backends(torch.empty(1, case.d, dtype=case.dtype, device=device), case.r)
    problems = {name: _problem(case, operands, name, device) for name in backends}
    variants = rivals | {name: op_on(name) for name in backends if problems[name] is None}
    rotation = max(1, min(4096, PAST_CACHES // (case.rows * case.d * case.dtype.itemsize)))
    inputs = torch.randn(rotation, case.rows, case.d, device=device).to(case.dtype)
    works = {name: _work(case, variant, inputs, operands) for name, variant in variants.items()}
    problems |= {name: _raised(work) for name, work in works.items()}
    works = {name: work for name, work in works.items() if problems[name] is None}
    source = torch.empty(max(1, case.bytes // 2), dtype=torch.uint8, device=device).random_(256)
    copies = max(1, PAST_CACHES // source.numel()) if source.numel() < PAST_CACHES else 1
    sources = [source.clone() for _ in range(min(copies, 256))]
    target = torch.empty_like(source)
    works[COPY] = lambda number: target.copy_(sources[number % len(sources)])
    try:
        spreads = interleaved(works, rotation=rotation, rounds=rounds, device=device)
    except RuntimeError as error:  # of one of them, while it is captured or replayed
        spreads = {}
        problems |= dict.fromkeys(works, _named(error))
    wrong = [Row(case, name, None, problem) for name, problem in problems.items() if problem]
    return [Row(case, name, spread) for name, spread in spreads.items()] + wrong


def _work(case: Case, variant: Variant, inputs: Tensor, operands: Operands) -> Work:
    if not case.training:

        def forward(number: int) -> Tensor:
            with torch.no_grad():
                return variant(inputs[number], operands)

        return forward
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    gradient = torch.randn_like(inputs[0])
    # Each variant differentiates what it uses; gradients are returned, not added up.
    used = operands.copies if variant in RIVALS.values() and variant is not RIVALS["tuned eager"] else operands.masters

    def training(number: int) -> object:
        return torch.autograd.grad(variant(leaves[number], operands), [leaves[number], *used], gradient)

    return training


def _problem(case: Case, operands: Operands, backend: str, device: torch.device) -> str | None:
    """What is wrong with the op's results at this size, by the tests' own rule; at most 512 rows are looked at."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(min(case.rows, 512), case.d, generator=generator).to(device, case.dtype)

    def served(*arguments: Any) -> BaftOutput:
        *call, gate_fn, rows = arguments
        return baft(*call, gate_fn=gate_fn, positions=rows, return_aux=True, backend=backend)

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every error and budget
            assert_accurate(served, *(Call(h + shift, *operands.masters, "sigmoid") for shift in (0, 1)))
    except AssertionError as error:
        return str(error)
    except Exception as error:  # a launch that fails, memory that runs out, a kernel that doesn't compile
        return _named(error)
    return None


def _raised(work: Work) -> str | None:
    """What a first call raises."""
    try:
        work(0)
    except Exception as error:
        return _named(error)
    return None


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


# -- what is shown and kept --


def table_of(rows: list[Row]) -> Table:
    table = Table(*HEADER)
    for case, of_case in itertools.groupby(rows, lambda row: row.case):
        for cells in _cells(case, list(of_case)):
            table.add_row(*cells)
        table.add_section()
    return table


def _cells(case: Case, rows: list[Row]) -> list[list[str]]:
    rates = {name: float("nan") for name in (COPY, "eager")} | {row.variant: row.rate() for row in rows}
    cells = []
    for row in rows:
        if row.spread is None:
            cells.append([case.name, row.variant, "no time", "", "", "", "", "", row.problem or ""])
            continue
        micro = [f"{seconds * 1e6:,.1f}" for seconds in (row.spread.median, row.spread.p20, row.spread.p80)]
        shares = [f"{rates[row.variant] / rates[other]:.2f}" for other in (COPY, "eager")]
        cells.append([case.name, row.variant, *micro, f"{case.bytes / 1e6:.3f}", f"{row.rate() / 1e9:.1f}", *shares])
    return cells


def save(name: str, rows: list[Row], device: torch.device) -> list[Path]:
    """Write JSON and Markdown; returns their paths."""
    RESULTS.mkdir(exist_ok=True)
    paths = [RESULTS / f"{name}.{kind}" for kind in ("json", "md")]
    about = provenance(device)
    report = {**about, "rows": [_plain(row) for row in rows]}
    paths[0].write_text(json.dumps(report, indent=1) + "\n")
    lines = [HEADER]
    for case, of_case in itertools.groupby(rows, lambda row: row.case):
        lines += _cells(case, list(of_case))
    paths[1].write_text(markdown(lines, about))
    return paths


def _plain(row: Row) -> dict[str, Any]:
    case = {**asdict(row.case), "dtype": str(row.case.dtype).removeprefix("torch."), "bytes": row.case.bytes}
    return {
        "case": case,
        "variant": row.variant,
        "seconds": asdict(row.spread) if row.spread else None,
        "problem": row.problem,
    }


def plot(rows: list[Row], about: dict[str, Any], path: Path) -> Path:
    """GB/s over T, a panel for each dtype, d, r and direction; returns ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def panel(row: Row) -> tuple[Any, ...]:
        return row.case.training, str(row.case.dtype), row.case.d, row.case.r

    keys = sorted({panel(row) for row in rows})
    columns = min(4, len(keys))
    lines = -(-len(keys) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3.2 * lines), squeeze=False, layout="constrained", sharey=True
    )
    for axis in axes.flat[len(keys) :]:
        axis.set_visible(False)
    for key, axis in zip(keys, axes.flat, strict=False):
        training, dtype, d, r = key
        for variant in dict.fromkeys(row.variant for row in rows if panel(row) == key):
            points = sorted(
                (row.case.rows, row.rate() / 1e9) for row in rows if panel(row) == key and row.variant == variant
            )
            style = {"color": "0.6", "linestyle": "--"} if variant == COPY else {"marker": "o", "markersize": 4}
            axis.plot(*zip(*points, strict=True), label=variant, **style)
        what = "forward and backward" if training else "forward"
        axis.set_title(f"{what}, {dtype.removeprefix('torch.')}, d = {d}, r = {r}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(True, which="major", alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("rows T", fontsize=9)
    figure.supylabel("GB/s of the bytes that must move", fontsize=9)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=8)
    figure.suptitle(f"{about['device']}, torch {about['versions']['torch']}, commit {about['commit']}", fontsize=9)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
