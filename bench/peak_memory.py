"""How much memory a piece of work takes at most, beyond what is held when it begins."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

__all__ = ["PeakMemory"]

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Watches from now on: on a GPU what torch allocates there, under Linux else what the process holds.

    The high-water mark that the device, or the system, keeps starts anew, for whoever else reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux":
            _give_back_what_is_free()
            try:
                Path("/proc/self/clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
            except OSError:
                return  # a kernel, or a container, without it
            self._before = _held("VmRSS")

    def bytes(self) -> int | None:
        """Of the highest point so far; None where nothing tells."""
        if self._before is None:
            return None
        on_gpu = self._device.type == "cuda"
        return (torch.cuda.max_memory_allocated(self._device) if on_gpu else _held("VmHWM")) - self._before


def _give_back_what_is_free() -> None:
    """Else the work fills first what earlier work left, and seems to take nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _held(field: str) -> int:
    """Bytes, from a line like ``VmHWM:     220 kB``."""
    lines = (line.partition(":") for line in _STATUS.read_text().splitlines())
    return next(int(value.split()[0]) * 1024 for name, _, value in lines if name == field)
