"""The CUDA kernels on a CPU: built with tests/emulator/emulator.h in place of the machine, called with torch tensors.

The kernels' source is the one that nvcc compiles. Every lane of every warp of a cluster runs, interleaved at random.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BackwardShape",
    "DecodeShape",
    "EmulatedParameters",
    "Gradients",
    "Rows",
    "Shape",
    "backward",
    "backward_shapes",
    "decode_shapes",
    "forward_decode",
    "forward_stream",
    "library",
    "pack",
    "pointer",
    "run",
    "shapes",
]

ROOT = Path(__file__).parents[1]
GATES = ("sigmoid", "softmax", "none")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # as csrc/cuda/kernels.h counts them


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
        ("settled", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("projection", "basis", "bias", "weights", "update")),
    ]


class Unfinished(ctypes.Structure):
    """What a kernel that still runs writes, and what lies there until it has ended."""

    _fields_ = [("at", ctypes.c_void_p), ("before", ctypes.c_void_p), ("bytes", ctypes.c_int64)]


class Backward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad_out", "h", "grad_input")),
        *((name, ctypes.c_int64) for name in ("grad_out_stride", "h_stride", "grad_input_stride")),
        ("rows", Rows),
        *((name, ctypes.c_int) for name in ("rank", "gate")),
        *((name, ctypes.c_void_p) for name in ("basis", "projection", "weights", "update")),
        *((name, ctypes.c_void_p) for name in ("grad_weights", "grad_update")),
        *((name, ctypes.c_void_p) for name in ("partial", "partial_bias", "slot_sets")),
    ]


class BackwardReduce(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("partial", "partial_bias", "slot_sets")),
        *((name, ctypes.c_int) for name in ("slots", "parts")),
        *((name, ctypes.c_int64) for name in ("sets", "rank", "padded_rank", "width")),
        *((name, ctypes.c_void_p) for name in ("basis", "source", "source_bias", "gate", "gate_bias")),
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


class DecodeShape(NamedTuple):
    """What a kernel for few rows was compiled for; its tiles have at most so many ``rows``."""

    number: int
    width: int
    rank: int
    dtype: torch.dtype
    rows: int


class BackwardShape(NamedTuple):
    """What a backward kernel was compiled for; its partial sums for the biases have so many ``parts``."""

    number: int
    width: int
    rank: int
    dtype: torch.dtype
    parts: int


class Gradients(NamedTuple):
    """Of h in its dtype, and of N parameter sets in float32. None: not wanted, or without a gate."""

    h: Tensor | None
    basis: Tensor | None = None
    source: Tensor | None = None
    source_bias: Tensor | None = None
    gate: Tensor | None = None
    gate_bias: Tensor | None = None


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
    return ctypes.CDLL(built(name))


def built(name: str, *options: str) -> str:
    """The path of tests/emulator/NAME.cpp as a shared library, which lasts as long as this process."""
    folder = tempfile.mkdtemp(prefix="baft-emulator-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = f"{folder}/{name}.so"
    folders = [f"-I{ROOT / 'tests/emulator'}", f"-I{ROOT / 'csrc/cuda'}"]
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-DBAFT_EMULATED", *folders]
    subprocess.run([*command, str(ROOT / f"tests/emulator/{name}.cpp"), "-o", path, *options], check=True)
    return path


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
    per_row = sets * width * dtype.itemsize // 4
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
    call, out, weights, update = _forward(h, parameters, rank, gate_fn, rows, adapters, out)
    run(library("forward").emulate_forward_stream, ctypes.byref(call), shape.number, clusters, ctypes.c_uint64(seed))
    return out, weights, update


def decode_shapes() -> list[DecodeShape]:
    """What the forward kernel for few rows was compiled for."""
    found: list[DecodeShape] = []
    values = [ctypes.c_int() for _ in range(4)]
    while library("decode").forward_decode_shape(len(found), *map(ctypes.byref, values)):
        width, rank, dtype, rows = (value.value for value in values)
        found.append(DecodeShape(len(found), width, rank, DTYPES[dtype], rows))
    return found


def forward_decode(
    h: Tensor,
    parameters: EmulatedParameters,
    rank: int,
    shape: DecodeShape,
    *,
    gate_fn: str,
    rows: Tensor | None = None,
    adapters: Tensor | None = None,
    out: Tensor | None = None,
    tile_rows: int | None = None,
    settled: bool = False,
    unfinished: Sequence[tuple[Tensor, Tensor]] = (),
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, w and u by the kernel for few rows: a cluster for each ``tile_rows`` of them, or for as many as it can.

    With ``unfinished``, the kernel begins while the previous one still runs, which writes these tensors: the second of
    each pair is what lies in the first until it has ended. The memory of the results is the previous one's as well.
    """
    call, out, weights, update = _forward(h, parameters, rank, gate_fn, rows, adapters, out, settled)
    if unfinished:
        results = (weights, update) if out.data_ptr() == h.data_ptr() else (out, weights, update)
        unfinished = [*unfinished, *((result, torch.zeros_like(result)) for result in results)]
    table = (Unfinished * len(unfinished))(
        *(Unfinished(now.data_ptr(), before.data_ptr(), now.numel() * now.itemsize) for now, before in unfinished)
    )
    arguments = (shape.number, tile_rows or shape.rows, table, len(unfinished), ctypes.c_uint64(seed))
    run(library("decode").emulate_forward_decode, ctypes.byref(call), *arguments)
    return out, weights, update


def _forward(
    h: Tensor,
    parameters: EmulatedParameters,
    rank: int,
    gate_fn: str,
    rows: Tensor | None,
    adapters: Tensor | None,
    out: Tensor | None,
    settled: bool = False,
) -> tuple[Forward, Tensor, Tensor, Tensor]:
    """A call and where its results go; NaN wherever a kernel has to write."""
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
        h.data_ptr(), out.data_ptr(), h.stride(0), out.stride(0), which, rank, GATES.index(gate_fn), settled,
        *map(pointer, (parameters.forward_projection, parameters.forward_basis, parameters.bias, weights, update)),
    )  # fmt: skip
    return call, out, weights, update


def backward_shapes() -> list[BackwardShape]:
    """What the backward kernel was compiled for."""
    found: list[BackwardShape] = []
    values = [ctypes.c_int() for _ in range(4)]
    while library("backward").backward_stream_shape(len(found), *map(ctypes.byref, values)):
        width, rank, dtype, parts = (value.value for value in values)
        found.append(BackwardShape(len(found), width, rank, DTYPES[dtype], parts))
    return found


def backward(
    grad_out: Tensor,
    grad_weights: Tensor | None,
    grad_update: Tensor | None,
    h: Tensor,
    weights: Tensor,
    update: Tensor,
    parameters: EmulatedParameters,
    shape: BackwardShape,
    *,
    gate_fn: str,
    rows: Tensor | None = None,
    adapters: Tensor | None = None,
    grad_input: Tensor | None = None,
    wants_input: bool = True,
    wants_parameters: bool = True,
    clusters: int = 2,
    seed: int = 0,
) -> Gradients:
    """The gradients by the streaming kernel and the reduction; arguments as of the Triton backend's ``backward``.

    Whatever the kernels have to write is filled with NaN, or with a set that isn't there, before they run.
    """
    rank, sets = weights.shape[1], parameters.bias.shape[0]
    listed = rows if rows is not None and rows.dtype != torch.bool else None
    mask = rows.view(torch.uint8) if rows is not None and listed is None else None
    if grad_input is None and wants_input:
        grad_input = torch.full_like(grad_out, torch.nan) if listed is None else grad_out.clone()
    sequences = 1 if adapters is None else adapters.shape[0]
    items = h.shape[0] if listed is None else listed.shape[0]
    slots = sequences + clusters
    partial = torch.full((slots, 3 * shape.rank, shape.width), torch.nan) if wants_parameters else None
    partial_bias = torch.full((slots, shape.parts, 2 * shape.rank), torch.nan) if wants_parameters else None
    slot_sets = torch.full((slots,), 1 << 20, dtype=torch.int32) if wants_parameters else None
    call = Backward(
        grad_out.data_ptr(), h.data_ptr() if wants_parameters else None, pointer(grad_input),
        grad_out.stride(0), h.stride(0), 0 if grad_input is None else grad_input.stride(0),
        Rows(pointer(listed), pointer(mask), pointer(adapters), sequences, items // sequences),
        rank, GATES.index(gate_fn),
        *map(pointer, (parameters.backward_basis, parameters.backward_projection, weights, update)),
        *map(pointer, (grad_weights, grad_update, partial, partial_bias, slot_sets)),
    )  # fmt: skip
    arguments = (shape.number, clusters, ctypes.c_uint64(seed))
    run(library("backward").emulate_backward_stream, ctypes.byref(call), *arguments)
    if partial is None or slot_sets is None:
        return Gradients(grad_input)
    assert slot_sets.lt(sets).all(), "a slot that no cluster marked"
    matrices = [torch.full((sets, rank, shape.width), torch.nan) for _ in range(2 if gate_fn == "none" else 3)]
    vectors = [torch.full((sets, rank), torch.nan) for _ in matrices[1:]]
    gradients = Gradients(grad_input, *matrices[:2], vectors[0], *matrices[2:], *vectors[1:])
    reduce = BackwardReduce(
        *map(pointer, (partial, partial_bias, slot_sets)), slots, shape.parts,
        sets, rank, shape.rank, shape.width, *map(pointer, gradients[1:]),
    )  # fmt: skip
    run(library("backward").emulate_backward_reduce, ctypes.byref(reduce), ctypes.c_uint64(seed))
    return gradients
