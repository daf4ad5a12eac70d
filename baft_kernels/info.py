"""What is installed and which backend serves a call: ``python -m baft_kernels.info [--json]``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import baft_kernels
from baft_kernels.backends import FUSED, KNOWN_BACKENDS, resolve_backend, why_unusable

__all__ = ["ENVIRONMENT_VARIABLES", "collect", "cpu_kernels", "main", "processor", "render"]

# Every environment variable that the package reads.
ENVIRONMENT_VARIABLES = ("BAFT_BACKEND", "BAFT_CHECK_FINITE", "BAFT_CPU_VARIANT")


def collect() -> dict[str, Any]:
    """The report, of values that JSON can hold.

    Returns:
        versions: of this package, Python, torch, triton (None where it isn't installed) and the CUDA runtime that torch
            was built with (None for none).
        cpu: the instruction set that torch uses.
        gpus: the names of the GPUs that torch sees.
        backends: for each known backend, whether it is usable, the reason if it isn't, which calls it serves, and why
            ``"auto"`` passes over it though it is usable (``unproven``).
        auto: the backend that ``"auto"`` chooses on each kind of device that is here, for a bfloat16 h of width 4096
            and 16 bases; None with a reason if ``BAFT_BACKEND`` asks for one that can't serve.
        environment: each variable of ``ENVIRONMENT_VARIABLES`` with its value, None for unset.
    """
    return {
        "versions": {
            "baft_kernels": baft_kernels.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": _triton_version(),
            "cuda": torch.version.cuda,
        },
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "backends": {name: _state(name) for name in KNOWN_BACKENDS},
        "auto": {device: _choice(device) for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT_VARIABLES},
    }


def _state(backend: str) -> dict[str, Any]:
    reason = why_unusable(backend)
    fused = FUSED.get(backend)
    serves, unproven = ("everything", None) if fused is None else (fused.serves, fused.unproven)
    return {"usable": reason is None, "reason": reason, "serves": serves, "unproven": unproven}


def _choice(device: str) -> dict[str, str | None]:
    try:
        chosen = resolve_backend("auto", torch.empty(1, 4096, dtype=torch.bfloat16, device=device), rank=16)
        return {"backend": chosen, "reason": None}
    except ValueError as error:
        return {"backend": None, "reason": str(error)}


def render(report: dict[str, Any]) -> str:
    """The report of ``collect`` as text, one line for each entry."""
    lines = {name: version or "none" for name, version in report["versions"].items()}
    lines["cpu"] = report["cpu"]
    lines["gpus"] = ", ".join(report["gpus"]) or "none"
    for name, backend in report["backends"].items():
        state = f"serves {backend['serves']}" if backend["usable"] else f"not usable: {backend['reason']}"
        lines[f"backend {name}"] = state
        if backend["usable"] and backend["unproven"]:
            lines[f"backend {name}"] += f'; not chosen by "auto": {backend["unproven"]}'
    for device, auto in report["auto"].items():
        lines[f"auto on {device}"] = auto["backend"] or f"not usable: {auto['reason']}"
    for name, value in report["environment"].items():
        lines[name] = "not set" if value is None else repr(value)
    width = max(map(len, lines))
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines.items())


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def cpu_kernels() -> str | None:
    """The instruction set whose CPU kernels run here, of those that ``BAFT_CPU_VARIANT`` names; None without any."""
    if why_unusable("cpu") is not None:
        return None
    variant: str = importlib.import_module("baft_kernels._cpu").variant()
    return variant


def _triton_version() -> str | None:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m baft_kernels.info", description="What is installed, and which backend serves a call."
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    report = collect()
    print(json.dumps(report, indent=2) if options.json else render(report))


if __name__ == "__main__":
    main()
