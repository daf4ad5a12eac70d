"""The CUDA kernels of csrc/cuda: packing, and calls of the operators that they register."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baft_kernels.backends.protocol import Backend
from baft_kernels.packing import Parameters, packed

__all__ = ["CudaBackend"]

# As in csrc/cuda/kernels.h; the last is of the calls below, and csrc/cuda_bindings.cpp must have the same.
_GATES = ("sigmoid", "softmax", "none")
_INTERFACE = 1

_library = torch.library.Library("baft_kernels", "FRAGMENT")
_library.define(
    "cuda_forward(Tensor h, Tensor(a!) out, Tensor(b!) weights, Tensor(c!) update, Tensor? list, Tensor? mask,"
    " Tensor? adapters, Tensor projection, Tensor basis, Tensor bias, int gate) -> ()"
)
_library.define(
    "cuda_pack(Tensor basis, Tensor source, Tensor source_bias, Tensor? gate, Tensor? gate_bias,"
    " Tensor(a!)? forward_projection, Tensor(b!)? forward_basis, Tensor(c!)? backward_basis,"
    " Tensor(d!)? backward_projection, Tensor(e!) bias, bool half) -> ()"
)


def _load() -> Any:
    """The compiled library, or what is wrong with it."""
    try:
        library = importlib.import_module("baft_kernels._cuda")  # registers the operators
    except ModuleNotFoundError:
        return "csrc/cuda wasn't built: it takes nvcc, and BAFT_BUILD_CUDA=1 where torch is a CPU build"
    except ImportError as error:
        return f"the compiled library doesn't load: {error}"
    if library.INTERFACE != _INTERFACE:
        return (
            f"the compiled library is of another version ({library.INTERFACE}, expected {_INTERFACE}): build it again"
        )
    return library


_LIBRARY = _load()  # at once: not while a call is traced


class _ForwardPack(NamedTuple):
    """(D, G) and R in the order in which lanes read them; b and c."""

    projection: Tensor
    basis: Tensor
    bias: Tensor


def _pack_forward(parameters: Parameters, dtype: torch.dtype) -> _ForwardPack:
    sets = [None if v is None else v.detach().float().contiguous() for v in parameters]
    if parameters.basis.ndim == 2:
        sets = [None if v is None else v[None] for v in sets]
    basis = sets[0]
    assert basis is not None
    count, rank, width = basis.shape
    padded = _LIBRARY.padded_rank(rank)
    pack = _ForwardPack(
        projection=basis.new_empty(count * width * padded, dtype=torch.int32),
        basis=basis.new_empty(count * width * padded // 2, dtype=torch.int32),
        bias=basis.new_empty(count, 2 * rank),
    )
    with torch.cuda.device_of(basis):
        torch.ops.baft_kernels.cuda_pack(*sets, *pack[:2], None, None, pack.bias, dtype == torch.float16)
    return pack


class CudaBackend(Backend):
    """Serves bfloat16 and float16 on NVIDIA GPUs from sm_90 on, for the widths and ranks of csrc/cuda/instances.h."""

    name = "cuda"
    unproven = "its kernels have run on an emulated GPU and through nvcc, but not yet on a GPU"

    def why_unusable(self) -> str | None:
        if isinstance(_LIBRARY, str):
            return _LIBRARY
        if not torch.cuda.is_available():
            return "no CUDA device"
        return None

    def why_not(self, h: Tensor, rank: int) -> str | None:
        if h.device.type != "cuda":
            return f"it serves tensors on an NVIDIA GPU, and h is on {h.device}"
        if torch.cuda.get_device_capability(h.device) < (9, 0):
            return "it serves GPUs from sm_90 on, and this one is older"
        if h.dtype not in (torch.bfloat16, torch.float16):
            return f"it serves bfloat16 and float16, and h is {str(h.dtype).removeprefix('torch.')}"
        if not _LIBRARY.has_forward(h.shape[-1], rank):
            return f"its kernels aren't compiled for d = {h.shape[-1]} and r = {rank}"
        return None

    def forward(
        self,
        h: Tensor,
        parameters: Parameters,
        rows: Tensor | None,
        adapters: Tensor | None,
        gate_fn: str,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if out is not None and not _is_aligned(out):
            made, weights, update = self.forward(h, parameters, rows, adapters, gate_fn, None)
            return out.copy_(made), weights, update
        h = _aligned(h)
        chosen = _Rows.of(rows, adapters, h.shape[0])
        if out is None:
            # The kernel sees no other row than those of a list.
            out = h.new_empty(h.shape) if chosen.list is None else h.clone(memory_format=torch.contiguous_format)
        new = h.new_empty if chosen.list is None else h.new_zeros
        weights, update = (new(h.shape[0], parameters.basis.shape[-2], dtype=torch.float32) for _ in range(2))
        pack = packed(_pack_forward, parameters, h.dtype)
        with torch.cuda.device_of(h):
            torch.ops.baft_kernels.cuda_forward(h, out, weights, update, *chosen, *pack, _GATES.index(gate_fn))
        return out, weights, update


class _Rows(NamedTuple):
    """Which rows a call works on, as the operators take them."""

    list: Tensor | None
    mask: Tensor | None
    adapters: Tensor | None

    @classmethod
    def of(cls, rows: Tensor | None, adapters: Tensor | None, total: int) -> _Rows:
        if rows is None or rows.dtype == torch.bool:
            return cls(None, None if rows is None else rows.contiguous(), adapters)
        if adapters is None:
            return cls(rows.contiguous(), None, None)
        mask = torch.zeros(total, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
        return cls(None, mask, adapters)


def _is_aligned(x: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, and has no gaps."""
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def _aligned(x: Tensor) -> Tensor:
    return x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
