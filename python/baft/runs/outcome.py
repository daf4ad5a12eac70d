"""What a finished run has found, to hold one run against another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from baft.runs.folder import EDITS, RESULTS

__all__ = ["outcome"]

# Of results.json what doesn't tell of time, memory or machine.
_FOUND = ("edits", "metrics", "fluency", "training", "settling", "conflicts", "dropped")


def outcome(folder: Path) -> dict[str, Any]:
    """All that the run in ``folder`` has found, bit for bit, without what differs from one time to the next.

    Two runs of equal outcome trained the same curves, heard the same texts, and ended with the same parameters.
    """
    records = [json.loads(line) for line in (folder / EDITS).read_text("utf-8").splitlines()]
    for record in records:
        del record["seconds"], record["training"]["seconds"]
    results = json.loads((folder / RESULTS).read_text("utf-8"))
    for point in results["retention"]:
        del point["seconds"], point["memory"]
    for curve in results["settling"]:
        del curve["seconds"]
    tensors = {
        f"{file.stem}.{name}": (str(tensor.dtype), tensor.shape, tensor.tobytes())
        for file in sorted((folder / "adapter").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    found = {name: results[name] for name in _FOUND}
    return {"records": records, "retention": results["retention"], "tensors": tensors, **found}
