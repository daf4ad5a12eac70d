"""The torch operators: one forward, one backward. Schemas and fakes; which backend serves is decided on real tensors.

The schemas live here and not in C++, so that the operators exist, and can be traced, where nothing was compiled. All
tensors are flat: ``h`` is [T, d]. ``rows`` are the rows to edit: a boolean mask [T], or their indices, int64 [K], or
None for all. With ``adapters`` [B], int64, every parameter has a leading axis N, T is B sequences of equal length, and
sequence i uses parameter set ``adapters[i]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baft_kernels.backends import backend_of
from baft_kernels.packing import Parameters

__all__ = ["backward", "forward", "forward_", "library"]

_PARAMETERS = "Tensor basis, Tensor source, Tensor source_bias, Tensor? gate, Tensor? gate_bias"
_CALL = f"{_PARAMETERS}, Tensor? rows, Tensor? adapters, str gate_fn, str backend"

library = torch.library.Library("baft_kernels", "DEF")
library.define(f"forward(Tensor h, {_CALL}) -> (Tensor out, Tensor weights, Tensor update)")
library.define(f"forward_(Tensor(a!) h, {_CALL}) -> ()")
library.define(
    "backward(Tensor grad_out, Tensor? grad_weights, Tensor? grad_update, Tensor h, Tensor weights, Tensor update,"
    f" {_CALL}, bool input_gradient, bool parameter_gradients)"
    " -> (Tensor h, Tensor basis, Tensor source, Tensor source_bias, Tensor gate, Tensor gate_bias)"
)


def _forward(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    rows: Tensor | None,
    adapters: Tensor | None,
    gate_fn: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [T, d] in h's dtype; w and u [T, r], float32, 0 at the rows that aren't edited."""
    parameters = Parameters(basis, source, source_bias, gate, gate_bias)
    return backend_of(backend).forward(h, parameters, rows, adapters, gate_fn, None)


def _forward_(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    rows: Tensor | None,
    adapters: Tensor | None,
    gate_fn: str,
    backend: str,
) -> None:
    """In place on h; no other row is written."""
    parameters = Parameters(basis, source, source_bias, gate, gate_bias)
    backend_of(backend).forward(h, parameters, rows, adapters, gate_fn, h)


def _backward(
    grad_out: Tensor,
    grad_weights: Tensor | None,
    grad_update: Tensor | None,
    h: Tensor,
    weights: Tensor,
    update: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    rows: Tensor | None,
    adapters: Tensor | None,
    gate_fn: str,
    backend: str,
    input_gradient: bool,
    parameter_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of h and of each parameter, in their dtypes; those that aren't wanted have no elements."""
    parameters = Parameters(basis, source, source_bias, gate, gate_bias)
    incoming = (grad_out, grad_weights, grad_update)
    of_h, of_parameters = backend_of(backend).backward(
        incoming, h, weights, update, parameters, rows, adapters, gate_fn, input_gradient, parameter_gradients
    )
    found = (None,) * 5 if of_parameters is None else of_parameters
    results = [  # a tensor of its own for each: outputs of an operator may not be one another
        h.new_empty(0) if gradient is None or value is None else gradient.to(value.dtype)
        for gradient, value in zip(found, parameters, strict=True)
    ]
    return (h.new_empty(0) if of_h is None else of_h, *results)  # type: ignore[return-value]


for _name, _function in (("forward", _forward), ("forward_", _forward_), ("backward", _backward)):
    library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("baft_kernels::forward", lib=library)
def _(h: Tensor, basis: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    low = (h.shape[0], basis.shape[-2])
    return h.new_empty(h.shape), h.new_empty(low, dtype=torch.float32), h.new_empty(low, dtype=torch.float32)


@torch.library.register_fake("baft_kernels::forward_", lib=library)
def _(*_: object) -> None:
    return None


@torch.library.register_fake("baft_kernels::backward", lib=library)
def _(grad_out: Tensor, _w: object, _u: object, h: Tensor, _1: object, _2: object, *rest: object) -> tuple[Tensor, ...]:
    parameters, (input_gradient, parameter_gradients) = rest[:5], rest[-2:]
    of_h = h.new_empty(h.shape if input_gradient else 0)
    return of_h, *(
        p.new_empty(p.shape) if isinstance(p, Tensor) and parameter_gradients else h.new_empty(0) for p in parameters
    )


# -- calls of the operators --


def forward(
    h: Tensor, parameters: Parameters, rows: Tensor | None, adapters: Tensor | None, gate_fn: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward operator, called directly where nothing watches: the dispatcher would take longer than one row."""
    if _is_watched(h):
        return torch.ops.baft_kernels.forward.default(h, *parameters, rows, adapters, gate_fn, backend)
    return backend_of(backend).forward(h, parameters, rows, adapters, gate_fn, None)


def forward_(
    h: Tensor, parameters: Parameters, rows: Tensor | None, adapters: Tensor | None, gate_fn: str, backend: str
) -> None:
    """The forward operator in place on h."""
    if _is_watched(h):
        torch.ops.baft_kernels.forward_.default(h, *parameters, rows, adapters, gate_fn, backend)
    else:
        backend_of(backend).forward(h, parameters, rows, adapters, gate_fn, h)
        torch.autograd.graph.increment_version(h)


def backward(
    incoming: tuple[Tensor, Tensor | None, Tensor | None],
    saved: tuple[Tensor, Tensor, Tensor],
    parameters: Parameters,
    rows: Tensor | None,
    adapters: Tensor | None,
    gate_fn: str,
    backend: str,
    input_gradient: bool,
    parameter_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward operator: gradients of h and the parameters, from those of out, w and u, and from h, w and u."""
    call = (*incoming, *saved, *parameters, rows, adapters, gate_fn, backend, input_gradient, parameter_gradients)
    return (torch.ops.baft_kernels.backward.default if _is_watched(saved[0]) else _backward)(*call)


def _is_watched(h: Tensor) -> bool:
    """Whether something traces or intercepts operators: a compiler, a mode, a transform, or a subclass of Tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or type(h) not in (Tensor, torch.nn.Parameter)
    )
