"""Packed parameters: D = A - R in float32, casts and layouts, made once for each version of the parameters.

D is formed from the masters and rounded once. Two projections in bfloat16, subtracted afterwards, are wrong by 23 %
where |A - R| is a hundredth of |R|, and an edit starts at zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Fill", "Held", "Parameters", "difference", "packed", "repack"]

P = TypeVar("P")


class Parameters(NamedTuple):
    """R [r, d], A [r, d], b [r], G [r, d], c [r]; of grouped calls each with a leading axis N. G and c may be None."""

    basis: Tensor
    source: Tensor
    source_bias: Tensor
    gate: Tensor | None
    gate_bias: Tensor | None

    def of_set(self, index: int) -> Parameters:
        """One parameter set of grouped ones."""
        return Parameters(*(None if value is None else value[index] for value in self))  # type: ignore[arg-type]


class Held(NamedTuple):
    """A pack, the parameters it is of, and the dtype of the operands it is for."""

    parameters: Parameters
    dtype: torch.dtype
    pack: Any


Fill = Callable[[Sequence[Held]], None]
"""Writes packs where they are, of any number of layers, from what their parameters are now."""


class _Entry:
    """A pack, and the tensors it was made of as they were then."""

    def __init__(self, made: Held, fill: Fill | None, forget: Callable[[object], None]) -> None:
        parameters, self.dtype, self.pack = made
        self.fill = fill
        self.tensors = [None if value is None else weakref.ref(value, forget) for value in parameters]
        self.places = _places(parameters)
        self.mark_fresh(parameters)

    def mark_fresh(self, parameters: Parameters) -> None:
        """The pack is of these tensors as they are now."""
        self.versions = [None if value is None else (value._version, value.data_ptr()) for value in parameters]

    def holds(self, parameters: Parameters) -> bool:
        """Whether these are the same tensors, unchanged."""
        for value, reference, version in zip(parameters, self.tensors, self.versions, strict=True):
            if reference is None or value is None:
                if value is not reference:
                    return False
            elif reference() is not value or version != (value._version, value.data_ptr()):
                return False
        return True

    def can_be_filled(self, parameters: Parameters) -> bool:
        """Whether these are the same tensors in the same memory: then only their numbers have changed."""
        return self.fill is not None and self.places == _places(parameters)

    def parameters(self) -> Parameters:
        """The tensors it was made of; None for those that are gone."""
        return Parameters(*(None if reference is None else reference() for reference in self.tensors))  # type: ignore[arg-type]


def _places(parameters: Parameters) -> list[tuple[int, int, torch.Size] | None]:
    return [None if value is None else (id(value), value.data_ptr(), value.shape) for value in parameters]


# By the identity of the basis, the layout and, on a GPU, the stream; an entry goes when one of its tensors does:
# perhaps while garbage is collected in the middle of a loop, so loops go over a copy.
_entries: dict[tuple[int, Callable[..., Any], torch.dtype, int], _Entry] = {}


def packed(
    pack: Callable[[Parameters, torch.dtype], P],
    parameters: Parameters,
    dtype: torch.dtype,
    fill: Fill | None = None,
) -> P:
    """``pack(parameters, dtype)``, or what it returned for the same version of the same tensors.

    A version is what autograd counts: every in-place change of a parameter, such as an optimiser's step, makes a new
    one. A change through ``.data`` isn't counted, here as there.

    With ``fill``, ``pack`` only makes room: ``fill`` packs into it, and new versions of the same tensors as well.

    While a CUDA graph is captured, parameters that require grad are packed anew, so that the packing is part of the
    graph and a replay sees their values of that time. So are others, unless the stream has packed them before: then the
    graph reads that pack, with the values that ``repack`` gave it last.
    """
    stream, captured = _stream_of(parameters.basis)
    key = (id(parameters.basis), pack, dtype, stream)
    entry = _entries.get(key)
    if entry is not None and entry.holds(parameters):
        known: P = entry.pack
        if not (captured and any(value is not None and value.requires_grad for value in parameters)):
            return known
    if captured:  # nothing runs now: what is made here is there for this graph alone
        return _made(pack, parameters, dtype, fill)
    if entry is not None and entry.can_be_filled(parameters):
        _fill_again([(entry, parameters)])
        renewed: P = entry.pack
        return renewed
    made = _made(pack, parameters, dtype, fill)
    if not any(value is not None and value.is_inference() for value in parameters):  # those have no versions

        def forget(_: object) -> None:
            _entries.pop(key, None)

        _entries[key] = _Entry(Held(parameters, dtype, made), fill, forget)
    return made


def _notice_fused_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Count what a fused optimiser has written: its kernels don't tell autograd, others do."""
    if not any(group.get("fused") for group in optimizer.param_groups):
        return
    held = {id(value) for entry in _entries.copy().values() for value in entry.parameters() if value is not None}
    written = [p for group in optimizer.param_groups if group.get("fused") for p in group["params"] if id(p) in held]
    torch.autograd.graph.increment_version(written)


register_optimizer_step_post_hook(_notice_fused_step)


def repack(bases: Iterable[Tensor]) -> None:
    """Renew what is packed of the layers with these ``bases``; for the CUDA backend, all of them in one launch.

    No call needs this: each use of a layer whose parameters have changed renews its pack. It is for two who know of the
    change before: a training step, after which every layer would otherwise launch a kernel in its forward pass and one
    in its backward pass (``retract_after_step`` calls it); and whoever replays a CUDA graph that reads packs.

    Packs of the CUDA and the Triton backend are renewed so, where they lie, and only those of the current stream. While
    that is captured, none is.

    Args:
        bases: of the layers, the very tensors that calls of ``baft`` get.
    """
    here = {(id(basis), *_stream_of(basis)) for basis in bases}
    stale: dict[Fill, list[tuple[_Entry, Parameters]]] = {}
    for (basis, _, _, stream), entry in _entries.copy().items():
        if entry.fill is None or (basis, stream, False) not in here:
            continue
        parameters = entry.parameters()
        if entry.can_be_filled(parameters) and not entry.holds(parameters):
            stale.setdefault(entry.fill, []).append((entry, parameters))
    for some in stale.values():
        _fill_again(some)


def _stream_of(tensor: Tensor) -> tuple[int, bool]:
    """The stream that work on ``tensor`` goes to, and whether it is captured: what one packs isn't ready on another."""
    if not tensor.is_cuda:
        return 0, False
    return torch.cuda.current_stream(tensor.device).cuda_stream, torch.cuda.is_current_stream_capturing()


def _made(
    pack: Callable[[Parameters, torch.dtype], P], parameters: Parameters, dtype: torch.dtype, fill: Fill | None
) -> P:
    made = pack(parameters, dtype)
    if fill is not None:
        fill([Held(parameters, dtype, made)])
    return made


def _fill_again(stale: Sequence[tuple[_Entry, Parameters]]) -> None:
    """Renew packs that one function fills."""
    fill = stale[0][0].fill
    assert fill is not None
    fill([Held(parameters, entry.dtype, entry.pack) for entry, parameters in stale])
    for entry, parameters in stale:
        entry.mark_fresh(parameters)


def difference(parameters: Parameters) -> Tensor:
    """D = A - R in float32."""
    return parameters.source.detach().float() - parameters.basis.detach().float()
