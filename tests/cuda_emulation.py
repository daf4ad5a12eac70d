"""The CUDA kernels on a CPU: built with tests/emulator/emulator.h in place of the machine, called with torch tensors.

The kernels' source is the one that nvcc compiles. Every lane of every warp of a cluster runs, interleaved at random.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["EmulatedParameters", "Rows", "Shape", "forward_stream", "library", "pack", "pointer", "run", "shapes"]

ROOT = Path(__file__).parents[1]
GATES = ("sigmoid", "softmax", "none")
DTYPES = (torch.bfloat16, torch.float16)


class Rows(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("list", "mask", "adapters")),
        *((name, ctypes.c_int64) for name in ("sequences", "length")),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("h", "out")),
        *((name, ctypes.c_int64) for name in ("h_stride", "out_stride")),
        ("rows", Rows),
        *((name, ctypes.c_int) for name in ("rank", "gate")),
        *((name, ctypes.c_void_p) for name in ("projection", "basis", "bias", "weights", "update")),
    ]


class Pack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("basis", "source", "source_bias", "gate", "gate_bias")),
        *((name, ctypes.c_int64) for name in ("sets", "rank", "width")),
        ("padded_rank", ctypes.c_int),
        *(
            (name, ctypes.c_void_p)
            for name in ("forward_projection", "forward_basis", "backward_basis", "backward_projection", "bias")
        ),
    ]


class Shape(NamedTuple):
    """What a kernel was compiled for."""

    number: int
    width: int
    rank: int
    dtype: torch.dtype


class EmulatedParameters(NamedTuple):
    """N parameter sets as the kernels read them."""

    forward_projection: Tensor
    forward_basis: Tensor
    backward_basis: Tensor
    backward_projection: Tensor
    bias: Tensor


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """tests/emulator/NAME.cpp, built once in a process, in a few seconds."""
    folder = Path(tempfile.mkdtemp(prefix="baft-emulator-"))
    try:
        built = folder / "kernels.so"
        folders = [f"-I{ROOT / 'tests/emulator'}", f"-I{ROOT / 'csrc/cuda'}"]
        command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-DBAFT_EMULATED", *folders]
        subprocess.run([*command, str(ROOT / f"tests/emulator/{name}.cpp"), "-o", str(built)], check=True)
        return ctypes.CDLL(str(built))
    finally:
        shutil.rmtree(folder)


def run(function: Any, *arguments: Any) -> None:
    """Call a function of a library that returns what went wrong, or null.

    Raises:
        RuntimeError: what went wrong: a hang, an address that is off, a store that comes too early.
    """
    function.restype = ctypes.c_char_p
    problem = function(*arguments)
    if problem is not None:
        raise RuntimeError(problem.decode())


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def shapes() -> list[Shape]:
    """What the forward kernel was compiled for."""
    found: list[Shape] = []
    values = [ctypes.c_int() for _ in range(3)]
    while library("forward").forward_stream_shape(len(found), *map(ctypes.byref, values)):
        width, rank, dtype = (value.value for value in values)
        found.append(Shape(len(found), width, rank, DTYPES[dtype]))
    return found


def pack(parameters: Any, padded_rank: int, dtype: torch.dtype, *, seed: int = 0) -> EmulatedParameters:
    """Parameters [N, r, d] and [N, r], float32, by the packing kernel."""
    basis = parameters[0]
    sets, rank, width = basis.shape
    per_row = sets * width // 16 * 32 // 4
    words = {name: torch.full((per_row * rows,), -1, dtype=torch.int32) for name, rows in (
        ("forward_projection", 2 * padded_rank), ("forward_basis", padded_rank),
        ("backward_basis", padded_rank), ("backward_projection", 2 * padded_rank),
    )}  # fmt: skip
    bias = torch.full((sets, 2 * rank), torch.nan)
    layer = Pack(
        *map(pointer, parameters), sets, rank, width, padded_rank, *map(pointer, words.values()), pointer(bias)
    )
    run(library("forward").emulate_pack, ctypes.byref(layer), DTYPES.index(dtype), ctypes.c_uint64(seed))
    return EmulatedParameters(**words, bias=bias)


def forward_stream(
    h: Tensor,
    parameters: EmulatedParameters,
    rank: int,
    shape: Shape,
    *,
    gate_fn: str,
    rows: Tensor | None = None,
    adapters: Tensor | None = None,
    out: Tensor | None = None,
    clusters: int = 2,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, w and u by the streaming kernel; arguments as of the Triton backend's ``forward``."""
    total = h.shape[0]
    listed = rows if rows is not None and rows.dtype != torch.bool else None
    mask = rows.view(torch.uint8) if rows is not None and listed is None else None
    if out is None:
        out = torch.full_like(h, torch.nan) if listed is None else h.clone()
    weights, update = (torch.full((total, rank), torch.nan if listed is None else 0.0) for _ in range(2))
    sequences = 1 if adapters is None else adapters.shape[0]
    items = total if listed is None else listed.shape[0]
    which = Rows(pointer(listed), pointer(mask), pointer(adapters), sequences, items // sequences)
    call = Forward(
        h.data_ptr(), out.data_ptr(), h.stride(0), out.stride(0), which, rank, GATES.index(gate_fn),
        *map(pointer, (parameters.forward_projection, parameters.forward_basis, parameters.bias, weights, update)),
    )  # fmt: skip
    run(library("forward").emulate_forward_stream, ctypes.byref(call), shape.number, clusters, ctypes.c_uint64(seed))
    return out, weights, update
