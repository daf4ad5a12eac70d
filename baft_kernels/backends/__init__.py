"""Which backend serves a call: the plain torch reference, or fused kernels for the device that h is on."""

from __future__ import annotations

import os

from torch import Tensor

from baft_kernels.backends.cpu import CpuBackend
from baft_kernels.backends.cuda import CudaBackend
from baft_kernels.backends.protocol import Backend
from baft_kernels.backends.triton.backend import TritonBackend

__all__ = ["FUSED", "KNOWN_BACKENDS", "REFERENCE", "backend_of", "candidates", "resolve_backend", "why_unusable"]

REFERENCE = "reference"
KNOWN_BACKENDS = (REFERENCE, "cpu", "triton", "cuda")

# Fastest first: "auto" takes the first one that is proven, usable and serves the call, and else the reference.
FUSED: dict[str, Backend] = {backend.name: backend for backend in (CpuBackend(), CudaBackend(), TritonBackend())}


def candidates(name: str = "auto") -> list[Backend]:
    """The fused backends that ``name`` may mean here, fastest first; as for ``resolve_backend`` without an h."""
    chosen = resolve_backend(name)
    if name != "auto" or os.environ.get("BAFT_BACKEND"):
        return [FUSED[chosen]] if chosen in FUSED else []
    return [backend for backend in FUSED.values() if not backend.unproven and backend.why_unusable() is None]


def backend_of(name: str) -> Backend:
    """The fused backend ``name``."""
    return FUSED[name]


def why_unusable(name: str) -> str | None:
    """Why this installation can't use the known backend ``name``; None if it can."""
    if name == REFERENCE:
        return None
    return FUSED[name].why_unusable() if name in FUSED else "not part of this version"


def resolve_backend(name: str = "auto", h: Tensor | None = None, rank: int = 1) -> str:
    """The backend that serves a call which asks for ``name``; ``BAFT_BACKEND`` overrides ``"auto"``.

    Args:
        name: ``"auto"`` or a backend.
        h: the call's hidden vectors; None asks only whether ``name`` can be meant at all, and leaves ``"auto"`` open
            between the fused backends and the reference: it is the first that is proven and usable.
        rank: how many bases the call has.

    Raises:
        ValueError: if ``name`` isn't a backend, is one that this installation can't use, or can't serve ``h``.
    """
    asked, asker = name, "backend"
    if name == "auto":
        asked, asker = os.environ.get("BAFT_BACKEND") or "auto", "BAFT_BACKEND"
    if asked == "auto":
        for backend in FUSED.values():
            if backend.unproven or backend.why_unusable() is not None:
                continue
            if h is None or backend.why_not(h, rank) is None:
                return backend.name
        return REFERENCE
    if asked not in KNOWN_BACKENDS:
        raise ValueError(f"{asker}: expected auto or one of {', '.join(KNOWN_BACKENDS)}, got {asked!r}")
    if asked == REFERENCE:
        return asked
    reason = why_unusable(asked)
    if reason is not None:
        usable = ", ".join(known for known in KNOWN_BACKENDS if why_unusable(known) is None)
        raise ValueError(f"{asker}: expected a usable one ({usable}), got {asked!r}: {reason}")
    if h is not None and (reason := FUSED[asked].why_not(h, rank)) is not None:
        raise ValueError(f"{asker}: expected one that serves this call, got {asked!r}: {reason}")
    return asked
