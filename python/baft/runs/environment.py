"""What every result says of how it came about: versions, the code's commit, memory."""

from __future__ import annotations

import platform
import resource
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["commit_of", "peak_memory_bytes", "versions"]


def versions() -> dict[str, str | None]:
    """Versions of everything that may move a result."""
    packages = ("baft-kernels", "torch", "transformers", "tokenizers", "safetensors", "triton")
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of code was checked out at, "-dirty" if a file of that checkout was changed since.

    None for an installed copy, which may lie in the checkout of something else, and where there is no git.
    """
    if not shutil.which("git") or not _git(folder, "ls-files", "."):
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


def peak_memory_bytes() -> dict[str, int | None]:
    """Highest memory so far: of the process, and of the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there and in KiB elsewhere
    return {
        "process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "gpu": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
