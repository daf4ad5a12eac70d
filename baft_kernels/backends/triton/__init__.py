"""The Triton backend: portable GPU kernels for any width. Importing this package needs no triton; using it does.

``forward``, ``backward`` and ``retract`` take the parameters as ``pack`` lays them out, once for each version of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from baft_kernels.backends.triton.launch import MAX_RANK, MAX_RETRACTION_RANK
from baft_kernels.backends.triton.layout import TritonPack, fill, pack, room

if TYPE_CHECKING:
    from baft_kernels.backends.triton.kernels.backward import backward
    from baft_kernels.backends.triton.kernels.forward import forward
    from baft_kernels.backends.triton.kernels.retraction import retract

__all__ = [
    "MAX_RANK",
    "MAX_RETRACTION_RANK",
    "TritonPack",
    "backward",
    "fill",
    "forward",
    "interpreted",
    "pack",
    "retract",
    "room",
    "why_unusable",
]

_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # at once: a compiler can't trace an import
_KERNELS = {"forward": "forward", "backward": "backward", "retract": "retraction"}


def why_unusable() -> str | None:
    """Why this machine can't run the kernels; None if it can."""
    if not interpreted() and not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None if _IS_INSTALLED else "triton isn't installed"


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for, which runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def __getattr__(name: str) -> Any:
    # At first use, so that the package can be imported without triton, and before TRITON_INTERPRET is set.
    if name not in _KERNELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f"{__name__}.kernels.{_KERNELS[name]}"), name)
    globals()[name] = function
    return function
