"""The Triton backend as the tests run it: on the GPU if there is one, and else in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from baft_kernels import BaftOutput
from baft_kernels.backends import triton as backend

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def interpret() -> None:
    """Import the kernels for the interpreter, and nothing else: other tests see the environment as it was."""
    import triton
    import triton.language as tl

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Triton's own functions were decorated without the flag if transformers has imported them already. Gluon,
        # which the interpreter imports at its first call, then asks for the flag.
        for module in (tl, tl.standard):
            for name, function in list(vars(module).items()):
                if isinstance(function, triton.JITFunction):
                    setattr(module, name, triton.jit(function.fn))
        importlib.import_module("triton.experimental.gluon")
        for function_of_backend in ("forward", "backward", "retract"):
            getattr(backend, function_of_backend)


def mend_bfloat16() -> None:
    """Round to bfloat16 as the hardware does, and multiply bfloat16 matrices by their values.

    The interpreter rounds towards zero, and its products take the bit patterns for integers.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def mended_cast(self: Any, source: Any, target: Any) -> Any:
        dtypes = (source.dtype.scalar, target.scalar)
        if dtypes == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        if dtypes == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return cast(self, source, target)

    def mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(operand, tl.float32) for operand in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = mended_cast, mended_dot


if DEVICE == "cpu":
    interpret()
    mend_bfloat16()


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Triton:
    """The Triton backend with the arguments of ``baft_reference``, and gradients.

    Args:
        listed: hand the rows over as a list of their indices.
        adapters: integers [B], for parameters with a leading axis.
        by_rows, by_columns: launches instead of those that the backend chooses.
    """

    def __init__(
        self, *, listed: bool = False, adapters: Tensor | None = None, by_rows: Any = None, by_columns: Any = None
    ) -> None:
        self.listed, self.adapters = listed, adapters
        self.by_rows, self.by_columns = by_rows, by_columns

    def __call__(
        self,
        h: Tensor,
        basis: Tensor,
        source: Tensor,
        source_bias: Tensor,
        gate: Tensor | None,
        gate_bias: Tensor | None,
        gate_fn: str,
        rows: Tensor | None = None,
    ) -> BaftOutput:
        if rows is not None:
            rows = rows.flatten().to(DEVICE)
            rows = rows.nonzero().flatten() if self.listed else rows
        tensors = (h.flatten(0, -2), basis, source, source_bias, gate, gate_bias)
        here = (tensor if tensor is None else tensor.to(DEVICE) for tensor in tensors)
        outputs = _Baft.apply(*here, rows, gate_fn, self)
        return BaftOutput(*(output.unflatten(0, h.shape[:-1]).to(h.device) for output in outputs))


class _Baft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, *arguments: Any) -> Any:
        *parameters, rows, gate_fn, options = arguments
        packed = backend.pack(*parameters, h.dtype)
        call = {"gate_fn": gate_fn, "rows": rows, "adapters": options.adapters}
        with poisoned():
            out, weights, update = backend.forward(h, packed, **call, launch=options.by_rows)
        ctx.save_for_backward(h, weights, update)
        ctx.packed, ctx.call, ctx.options = packed, call, options
        ctx.shapes = [parameter if parameter is None else parameter.shape for parameter in parameters]
        if gate_fn == "none":
            ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        return out, weights, update

    @staticmethod
    def backward(ctx: Any, *incoming: Any) -> Any:
        launches = {"by_rows": ctx.options.by_rows, "by_columns": ctx.options.by_columns}
        with poisoned():
            of_h, *of_parameters = backend.backward(*incoming, *ctx.saved_tensors, ctx.packed, **ctx.call, **launches)
        shaped = (g if g is None else g.view(shape) for g, shape in zip(of_parameters, ctx.shapes, strict=True))
        return of_h, *shaped, None, None, None
