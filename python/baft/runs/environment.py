"""What every result says of how it came about: versions, the machine, the code's commit, memory."""

from __future__ import annotations

import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from baft_kernels.info import cpu_kernels, processor

__all__ = ["commit_of", "in_place_of", "machine", "peak_memory_bytes", "versions"]


# What of a ``machine`` is counted, by the name for one.
_COUNTED = {"threads": "thread", "processes": "process"}


def versions() -> dict[str, str | None]:
    """Versions of everything that may move a result."""
    packages = ("baft-kernels", "torch", "transformers", "tokenizers", "safetensors", "triton")
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(processes: int) -> dict[str, Any]:
    """What the last bits of a result depend on beside versions.

    Args:
        processes: how many share the work.

    Returns:
        gpu: the name of the one that this process computes on, None without.
        processor: its name.
        kernels, torch_kernels: the instruction set of our CPU kernels, and that of torch's.
        threads: of torch, in this process.
        processes: as they are given.
    """
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processor": processor(),
        "kernels": cpu_kernels(),
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def in_place_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what a ``machine`` is another than the one before, in words; empty if nothing differs, or nothing is known.

    What only a processor's results depend on isn't told of two GPUs.
    """
    if not before:
        return ""
    compared = ("gpu", "processes") if before["gpu"] and now["gpu"] else tuple(now)
    found = []
    for name in compared:
        here, there = now[name], before[name]
        if here != there and name in _COUNTED:
            found.append(f"{here} {_COUNTED[name] if here == 1 else name} in place of {there}")
        elif here != there:
            found.append(f"{name.replace('_', ' ')} {here or 'none'} in place of {there or 'none'}")
    return ", ".join(found)


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
