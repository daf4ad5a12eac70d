"""The CUDA kernels of csrc/cuda: packing, and calls of the operators that they register."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from baft_kernels.backends.protocol import Backend
from baft_kernels.backends.unfused import as_mask
from baft_kernels.packing import Held, Parameters, packed

__all__ = ["CudaBackend"]

# As in csrc/cuda/kernels.h; the last is of the calls below, and csrc/cuda_bindings.cpp must have the same.
_GATES = ("sigmoid", "softmax", "none")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTERFACE = 5

_library = torch.library.Library("baft_kernels", "FRAGMENT")
_library.define(
    "cuda_forward(Tensor h, Tensor(a!) out, Tensor(b!) weights, Tensor(c!) update, Tensor? list, Tensor? mask,"
    " Tensor? adapters, Tensor projection, Tensor basis, Tensor bias, int gate, bool settled) -> ()"
)
_library.define(
    "cuda_backward(Tensor grad_out, Tensor? grad_weights, Tensor? grad_update, Tensor h, Tensor weights, Tensor update,"
    " Tensor? list, Tensor? mask, Tensor? adapters, Tensor basis, Tensor projection, int gate, Tensor(a!)? grad_input,"
    " Tensor(b!)? partial, Tensor(c!)? partial_bias, Tensor(d!)? slot_sets, int sets) -> ()"
)
_library.define(
    "cuda_backward_reduce(Tensor partial, Tensor partial_bias, Tensor slot_sets, Tensor(a!) basis, Tensor(b!) source,"
    " Tensor(c!) source_bias, Tensor(d!)? gate, Tensor(e!)? gate_bias) -> ()"
)
_library.define("cuda_retract(Tensor(a!)[] bases, Tensor(b!) distances, int iterations, float near) -> ()")
_library.define(
    "cuda_pack(Tensor[] basis, Tensor[] source, Tensor[] source_bias, Tensor?[] gate, Tensor?[] gate_bias,"
    " Tensor(a!)?[] forward_projection, Tensor(b!)?[] forward_basis, Tensor(c!)?[] bias,"
    " Tensor(d!)?[] backward_basis, Tensor(e!)?[] backward_projection, int dtype) -> ()"
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


def _served(library: Any) -> dict[int, set[tuple[int, int, int]]]:
    """By architecture, every (d, r, dtype) that the library has kernels for: compilers can't trace a call of it."""
    return {
        architecture: set() if isinstance(library, str) else library.served(architecture)
        for architecture in (900, 1000)
    }


_LIBRARY = _load()  # at once: not while a call is traced
_SERVED = _served(_LIBRARY)


@dataclass
class _ForwardPack:
    """(D, G) and R in the order in which lanes read them; b and c."""

    tensors: tuple[Tensor, Tensor, Tensor]
    settled: bool = False
    """Whether a call has read it that waited for the packing to end before it let the next kernel begin.

    A kernel begins after its predecessor in the stream, if not always after its end. So all that come after that call
    may read the pack at once, without waiting for theirs, whatever kernels have come in between.
    """


class _BackwardPack(NamedTuple):
    """R and (D, G) likewise, for the other products that the backward pass takes."""

    basis: Tensor
    projection: Tensor


def _room_forward(parameters: Parameters, dtype: torch.dtype) -> _ForwardPack:
    biases = parameters.basis.new_empty(_sets(parameters), 2 * parameters.basis.shape[-2], dtype=torch.float32)
    return _ForwardPack((_words(parameters, 2, dtype), _words(parameters, 1, dtype), biases))


def _room_backward(parameters: Parameters, dtype: torch.dtype) -> _BackwardPack:
    return _BackwardPack(_words(parameters, 1, dtype), _words(parameters, 2, dtype))


def _words(parameters: Parameters, matrices: int, dtype: torch.dtype) -> Tensor:
    """Room for one or two matrices of padded rank, in words of four bytes."""
    rank, width = parameters.basis.shape[-2:]
    words = _sets(parameters) * matrices * _LIBRARY.padded_rank(rank) * width * dtype.itemsize // 4
    return parameters.basis.new_empty(words, dtype=torch.int32)


@torch.no_grad()
def _fill(held: Sequence[Held]) -> None:
    """Pack: all layers of a device and dtype in one launch, forward and backward."""
    launches: dict[tuple[torch.device, torch.dtype], dict[tuple[int, ...], list[Tensor | None]]] = {}
    for parameters, dtype, pack in held:
        layers = launches.setdefault((parameters.basis.device, dtype), {})
        which = tuple(map(id, parameters))
        if which not in layers:
            layers[which] = [*_floats(parameters), *[None] * 5]
        layer = layers[which]
        if isinstance(pack, _ForwardPack):
            layer[5:8] = pack.tensors
            pack.settled = False
        else:
            layer[8:] = pack
    for (_, dtype), layers in launches.items():
        columns = [list(column) for column in zip(*layers.values(), strict=True)]
        with torch.cuda.device_of(columns[0][0]):
            torch.ops.baft_kernels.cuda_pack(*columns, _DTYPES.index(dtype))


def _floats(parameters: Parameters) -> Iterator[Tensor | None]:
    """As the kernel reads them, float32 without gaps: mostly as they are."""
    for value in parameters:
        if value is None or (value.dtype == torch.float32 and value.is_contiguous()):
            yield value
        else:
            yield value.float().contiguous()


def _sets(parameters: Parameters) -> int:
    return parameters.basis.shape[:-2].numel()


def _with_sets(parameters: Parameters) -> Parameters:
    """With a leading axis, of one set if there is none."""
    if parameters.basis.ndim == 3:
        return parameters
    return Parameters(*(None if v is None else v.unsqueeze(0) for v in parameters))  # type: ignore[arg-type]


def _gradients(parameters: Parameters, make: Callable[..., Tensor]) -> Parameters:
    """Room for the gradients, float32."""
    device = parameters.basis.device
    return Parameters(
        *(None if v is None else make(v.shape, dtype=torch.float32, device=device) for v in parameters)  # type: ignore[arg-type]
    )


def _runs_on(device: torch.device) -> str | None:
    """Why the kernels don't run on a device; None if they do."""
    if device.type != "cuda":
        return f"it serves tensors on an NVIDIA GPU, and h is on {device}"
    if _architecture(device) < 900:
        return "it serves GPUs from sm_90 on, and this one is older"
    return None


def _architecture(device: torch.device) -> int:
    """As compilers number it: 900 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 100 * major + 10 * minor


class CudaBackend(Backend):
    """Serves float32, bfloat16 and float16 on NVIDIA GPUs from sm_90 on, in the shapes of csrc/cuda/instances.h."""

    name = "cuda"
    serves = (
        "bfloat16 and float16 on NVIDIA GPUs from sm_90 on, r up to 32 at d = 768, 1024, 2048, 2560, 3072, 3584, 4096,"
        " up to 16 at 5120, up to 8 at 8192; float32, r up to 32 at d = 768, 1024, up to 16 at 2048, 2560, 3072, 3584,"
        " 4096, up to 8 at 5120; triton serves the rest"
    )
    unproven = "its kernels have run on an emulated GPU and through nvcc, but not yet on a GPU"

    def why_unusable(self) -> str | None:
        if isinstance(_LIBRARY, str):
            return _LIBRARY
        if not torch.cuda.is_available():
            return "no CUDA device"
        return None

    def why_not(self, h: Tensor, rank: int) -> str | None:
        if (reason := _runs_on(h.device)) is not None:
            return reason
        dtype = str(h.dtype).removeprefix("torch.")
        if h.dtype not in _DTYPES:
            return f"it serves float32, bfloat16 and float16, and h is {dtype}"
        generation = 900 if _architecture(h.device) < 1000 else 1000
        if (h.shape[-1], rank, _DTYPES.index(h.dtype)) not in _SERVED[generation]:
            return f"its kernels aren't compiled for {dtype}, d = {h.shape[-1]} and r = {rank}"
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
        pack = packed(_room_forward, parameters, h.dtype, _fill)
        settled = pack.settled and adapters is None  # a kernel may have written these just before
        with torch.cuda.device_of(h):
            torch.ops.baft_kernels.cuda_forward(
                h, out, weights, update, *chosen, *pack.tensors, _GATES.index(gate_fn), settled
            )
        if not pack.settled:  # without rows nothing is launched, and while a graph is captured nothing runs
            pack.settled = chosen.items(h.shape[0]) > 0 and not _is_captured(h)
        return out, weights, update

    def backward(
        self,
        incoming: tuple[Tensor, Tensor | None, Tensor | None],
        h: Tensor,
        weights: Tensor,
        update: Tensor,
        parameters: Parameters,
        rows: Tensor | None,
        adapters: Tensor | None,
        gate_fn: str,
        input_gradient: bool,
        parameter_gradients: bool,
    ) -> tuple[Tensor | None, Parameters | None]:
        grad_out, *aux = incoming
        h, grad_out = _aligned(h), _aligned(grad_out)
        low = [None if v is None else v.contiguous() for v in aux]
        chosen = _Rows.of(rows, adapters, h.shape[0])
        of_h = partial = None
        if input_gradient:  # the kernel sees no other row than those of a list
            of_h = torch.empty_like(h) if chosen.list is None else grad_out.clone(memory_format=torch.contiguous_format)
        if chosen.items(h.shape[0]) == 0:
            return of_h, _gradients(parameters, torch.zeros) if parameter_gradients else None
        with torch.cuda.device_of(h):
            if parameter_gradients:
                partial = _Partial.of(chosen, h, parameters)
            torch.ops.baft_kernels.cuda_backward(
                grad_out,
                *low,
                h,
                weights.contiguous(),
                update.contiguous(),
                *chosen,
                *packed(_room_backward, parameters, h.dtype, _fill),
                _GATES.index(gate_fn),
                of_h,
                *(partial or (None, None, None)),
                _sets(parameters),
            )
            if partial is None:
                return of_h, None
            gradients = _gradients(parameters, torch.empty)
            torch.ops.baft_kernels.cuda_backward_reduce(*partial, *_with_sets(gradients))
        return of_h, gradients

    def retract(self, bases: Sequence[Tensor]) -> Tensor | None:
        here = bases[0].device
        if self.why_unusable() is not None or _runs_on(here) is not None:
            return None
        if not all(b.dtype == torch.float32 and b.is_contiguous() and b.device == here and len(b) <= 64 for b in bases):
            return None
        from baft_kernels.stiefel import ITERATIONS, NEAR  # here, since it imports the backends

        distances = torch.empty(len(bases), device=here)
        with torch.cuda.device_of(distances):
            torch.ops.baft_kernels.cuda_retract(list(bases), distances, ITERATIONS, NEAR)
        # What is packed is known to be stale by the version, which the operator doesn't raise.
        for basis in bases:
            if not basis.is_inference():
                torch.autograd.graph.increment_version(basis)
        return distances


def _is_captured(x: Tensor) -> bool:
    """Whether the kernels that are launched now become part of a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class _Rows(NamedTuple):
    """Which rows a call works on, as the operators take them."""

    list: Tensor | None
    mask: Tensor | None
    adapters: Tensor | None

    @classmethod
    def of(cls, rows: Tensor | None, adapters: Tensor | None, total: int) -> _Rows:
        adapters = None if adapters is None else adapters.contiguous()
        if rows is None or rows.dtype == torch.bool:
            return cls(None, None if rows is None else rows.contiguous(), adapters)
        if adapters is None:
            return cls(rows.contiguous(), None, None)
        return cls(None, as_mask(rows, total), adapters)

    def items(self, total: int) -> int:
        """How many rows the kernels look at, of so many."""
        return total if self.list is None else self.list.numel()


class _Partial(NamedTuple):
    """Where the clusters of the backward pass leave their sums: see csrc/cuda/kernels.h."""

    matrices: Tensor
    biases: Tensor
    sets: Tensor

    @classmethod
    def of(cls, rows: _Rows, h: Tensor, parameters: Parameters) -> _Partial:
        rank, width = parameters.basis.shape[-2:]
        padded = _LIBRARY.padded_rank(rank)
        sequences = 1 if rows.adapters is None else rows.adapters.numel()
        length = rows.items(h.shape[0]) // sequences
        slots, parts = _LIBRARY.backward_slots(width, rank, _DTYPES.index(h.dtype), sequences, length)
        return cls(
            matrices=h.new_empty(slots * 3 * padded * width, dtype=torch.float32),
            biases=h.new_empty(slots * parts * 2 * padded, dtype=torch.float32),
            sets=h.new_empty(slots, dtype=torch.int32),
        )


def _is_aligned(x: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, and has no gaps."""
    return x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == 0 and x.data_ptr() % 16 == 0


def _aligned(x: Tensor) -> Tensor:
    return x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)
