"""What every result says of how it came about: versions, memory."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

__all__ = ["peak_memory_bytes", "versions"]


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
