"""What does it cost to keep a basis orthonormal?

    python bench/retraction.py

One training step's share of it, for a basis of r rows of width d: a retraction after the step, against a forward and
a backward pass through ``torch.nn.utils.parametrizations.orthogonal``, which is what pyreft's LoReFT uses. How far from
orthonormal the basis is in the end stands beside it. Then what the bases of 32 layers cost together, by plain torch and
by each backend that has a kernel for them.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402  # after the folders of this checkout are known
from report import RESULTS, markdown, provenance  # noqa: E402
from terminal import plain_console, show  # noqa: E402
from timing import Work, interleaved  # noqa: E402
from torch import nn  # noqa: E402

from baft_kernels import orthonormal_basis, orthonormality_error, retract_, retract_near_  # noqa: E402
from baft_kernels.backends import FUSED, REFERENCE  # noqa: E402

LAYERS = 32
HEADER_OF_LAYERS = ["r", "d", "backend", "µs", "largest |R R^T - I|"]
HEADER = ["r", "d", "retract_, µs", "parametrization, µs", "ratio", "|R R^T - I|, ours", "theirs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--r", type=int, nargs="+", default=[12, 64])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, raw = [HEADER], []
    for d in options.d:
        for r in options.r:
            ours, theirs = _retraction(r, d, device), _parametrization(r, d, device)
            # The parametrization can't be captured in a CUDA graph: wall-clock time, on a GPU too.
            spreads = interleaved(
                {"ours": ours.work, "theirs": theirs.work},
                rotation=1,
                rounds=options.rounds,
                device=torch.device("cpu"),
            )
            errors = orthonormality_error(ours.basis()), orthonormality_error(theirs.basis())
            raw.append({"r": r, "d": d, "errors": errors} | {name: asdict(spread) for name, spread in spreads.items()})
            micro = [spreads[name].median * 1e6 for name in ("ours", "theirs")]
            rows.append(
                [
                    str(r),
                    str(d),
                    *(f"{m:,.0f}" for m in micro),
                    f"{micro[1] / micro[0]:,.0f}",
                    *(f"{e:.1e}" for e in errors),
                ]
            )
    of_layers = [found for d in options.d for r in options.r for found in _layers(r, d, options.rounds, device)]
    together = [HEADER_OF_LAYERS]
    for found in of_layers:
        shape, micro = [str(found[name]) for name in ("r", "d", "backend")], found["seconds"]["median"] * 1e6
        together.append([*shape, f"{micro:,.0f}", f"{found['error']:.1e}"])
    console = plain_console(120)
    show(rows, console)
    show(together, console)
    about = provenance(device)
    name = f"retraction_{device.type}"
    results = {**about, "rows": raw, "layers": LAYERS, "rows_of_layers": of_layers}
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    note = f"{LAYERS} layers at once. "
    (RESULTS / f"{name}.md").write_text(f"{markdown(rows, about)}\n{markdown(together, about, note)}")
    console.print(f"Saved: {RESULTS / name}.md")


def _layers(r: int, d: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """The bases of all layers, retracted at once by each backend that has a kernel for them, and by plain torch."""
    bases = [orthonormal_basis(r, d, device=device) for _ in range(LAYERS)]
    step = 1e-3 * torch.randn(r, d, device=device)
    having = [
        name for name, backend in FUSED.items() if backend.why_unusable() is None and backend.retract(bases) is not None
    ]

    def work_of(name: str) -> Work:
        def work(_: int) -> None:
            for basis in bases:
                basis.add_(step)
            retract_near_(bases, backend=name)
            _finish(device)

        return work

    works = {name: work_of(name) for name in (REFERENCE, *having)}
    errors = {}
    for name, work in works.items():
        work(0)
        errors[name] = max(map(orthonormality_error, bases))
    spreads = interleaved(works, rotation=1, rounds=rounds, device=torch.device("cpu"))
    return [{"r": r, "d": d, "backend": n, "seconds": asdict(spreads[n]), "error": errors[n]} for n in works]


class _Subject:
    """Something that keeps a basis, and the work of one step on it."""

    def __init__(self, work: Work, basis: torch.Tensor | nn.Linear) -> None:
        self.work = work
        self._kept = basis

    def basis(self) -> torch.Tensor:
        return self._kept.weight if isinstance(self._kept, nn.Linear) else self._kept


def _retraction(r: int, d: int, device: torch.device) -> _Subject:
    generator = torch.Generator().manual_seed(0)
    basis = orthonormal_basis(r, d, generator=generator, device=device)
    step = 1e-3 * torch.randn(r, d, generator=generator).to(device)

    def work(_: int) -> None:
        retract_(basis.add_(step))
        _finish(device)

    return _Subject(work, basis)


def _parametrization(r: int, d: int, device: torch.device) -> _Subject:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(d, r, bias=False, device=device))
    gradient = 1e-3 * torch.randn(r, d, device=device)

    def work(_: int) -> None:
        layer.weight.backward(gradient)
        layer.zero_grad()
        _finish(device)

    return _Subject(work, layer)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
