"""A run's folder: ``results.json`` for the figures, ``edits.jsonl`` for what was said, and with what it was made."""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from baft.engine.schedule import Curve
from baft.evaluation.probes import ProbeResult
from baft.requests import EditRequest
from baft.storage import atomic_write

__all__ = ["EditRecord", "RunFolder", "peak_memory_bytes", "versions"]

RESULTS, EDITS, PICTURE, ADAPTER = "results.json", "edits.jsonl", "report.png", "adapter"


@dataclass
class EditRecord:
    """All that is known of one request in a run; ``final`` is filled in at the run's end."""

    index: int
    request: EditRequest
    curve: Curve
    immediate: list[ProbeResult] = field(default_factory=list)
    final: list[ProbeResult] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "id": self.request.id,
            "prompt": self.request.prompt,
            "target": self.request.target,
            "subject": self.request.subject,
            "training": {
                "steps": self.curve.steps,
                "converged": self.curve.converged,
                "diverged": self.curve.diverged,
                "seconds": round(self.curve.seconds, 4),
                # JSON knows no NaN: a loss that is none is null.
                "losses": [round(loss, 5) if math.isfinite(loss) else None for loss in self.curve.losses],
            },
            "immediate": [_probe_as_json(result) for result in self.immediate],
            "final": [_probe_as_json(result) for result in self.final],
        }


def _probe_as_json(result: ProbeResult) -> dict[str, Any]:
    question = result.question
    return {
        "measure": question.measure,
        "kind": question.kind,
        "prompt": question.prompt,
        "answers": question.answers,
        "text": result.text,
        "before": result.before,
        "generation": result.generation,
        "token": result.token,
        "sequence": result.sequence,
    }


class RunFolder:
    """The folder that a run writes to.

    Each edit's line is appended when it is done, so that a run that breaks off keeps what it did; at the end the
    lines are written anew, with the final measures.

    Raises:
        ValueError: if the folder holds anything already, or can't be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(f"out: expected a new or empty folder, got {self.path}, which is in use")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out: expected a folder that can be made, got {self.path} ({error})") from error

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER

    @property
    def picture(self) -> Path:
        return self.path / PICTURE

    @property
    def results(self) -> Path:
        return self.path / RESULTS

    @property
    def edits(self) -> Path:
        return self.path / EDITS

    def append(self, record: EditRecord) -> None:
        with self.edits.open("a") as file:
            file.write(_line(record))

    def finish(self, records: Sequence[EditRecord], results: dict[str, Any]) -> None:
        lines = "".join(map(_line, records))
        atomic_write(self.edits, lambda path: path.write_text(lines))
        text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        atomic_write(self.results, lambda path: path.write_text(text))


def _line(record: EditRecord) -> str:
    return json.dumps(record.as_json(), ensure_ascii=False) + "\n"


def versions() -> dict[str, str | None]:
    """Versions of everything that may move a result."""
    packages = ("baft-kernels", "torch", "transformers", "tokenizers", "safetensors", "triton")
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peak_memory_bytes() -> dict[str, int | None]:
    """Highest memory so far: of the process, and of the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there and in KiB elsewhere
    return {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "gpu": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
