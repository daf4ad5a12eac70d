"""The one tolerance rule of the op's tests, for every output and every gradient:

    |actual - exact| <= 2 |plain - exact| + one rounding

``exact`` is the reference in float64, ``plain`` is plain torch in the dtype of the call, and the rounding is that of
the actual result's own dtype. The norms are the largest entry and the root mean square: the first sees a single wrong
entry, the second an error spread over entries that are small beside the largest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from op_calls import Call
from torch import Tensor

from baft_kernels import BaftOutput
from baft_kernels.reference import accumulation_dtype, baft_reference

# A backend takes the arguments of baft_reference.
Backend = Callable[..., BaftOutput]


def assert_accurate(backend: Backend, *calls: Call) -> None:
    """Hold ``backend`` to the rule: out, w, u, and the gradients of h and of each parameter.

    The errors of several calls of one kind are taken together. Of a few numbers, plain torch may by chance have all
    nearly right, and no other order of summation could then keep to the rule.
    """
    actual = [outputs_and_gradients(backend, call) for call in calls]
    plain = [outputs_and_gradients(plain_torch, call) for call in calls]
    exact = [outputs_and_gradients(baft_reference, call.double()) for call in calls]
    for call, results, wanted in zip(calls, actual, exact, strict=True):
        assert results["out"].dtype == call.h.dtype
        assert results["weights"].dtype == results["update"].dtype == accumulation_dtype(call.h)
        assert {name: value.shape for name, value in results.items()} == {n: value.shape for n, value in wanted.items()}
    for name in exact[0]:
        assert_within_rule(name, *(torch.cat([r[name].flatten() for r in all_]) for all_ in (actual, plain, exact)))


def assert_within_rule(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Hold one tensor to the rule, and print its errors and budgets."""
    assert actual.shape == exact.shape, f"{name}: expected shape {list(exact.shape)}, got {list(actual.shape)}"
    assert bool(torch.isfinite(actual).all()), f"{name}: expected finite values"
    for label, norm in (("largest", _largest), ("rms", _rms)):
        error = norm(actual.double() - exact)
        plain_error = norm(plain.double() - exact)
        rounding = torch.finfo(actual.dtype).eps / 2 * norm(exact)
        budget = 2 * plain_error + rounding
        report = f"{name}: {label} error {error:.2e}, budget {budget:.2e} = 2 x {plain_error:.2e} + {rounding:.2e}"
        print(report)
        assert error <= budget, report


def outputs_and_gradients(backend: Backend, call: Call) -> dict[str, Tensor]:
    """out, weights and update, and the gradient of each floating point argument when all three outputs have one."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in call.floats().items()}
    outputs = backend(*call._replace(**leaves))
    generator = torch.Generator().manual_seed(0)
    # Multiples of 1/8 are exact in every dtype, so that all dtypes are given the same gradients.
    incoming = [(torch.randint(-8, 9, output.shape, generator=generator) / 8).to(output) for output in outputs]
    # Without a gate the weights are constant.
    pairs = [pair for pair in zip(outputs, incoming, strict=True) if pair[0].requires_grad]
    gradients = torch.autograd.grad(
        [output for output, _ in pairs], list(leaves.values()), [gradient for _, gradient in pairs]
    )
    results = {name: output.detach() for name, output in outputs._asdict().items()}
    return results | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def plain_torch(
    h: Tensor,
    basis: Tensor,
    source: Tensor,
    source_bias: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    gate_fn: str,
    rows: Tensor | None = None,
) -> BaftOutput:
    """The op as one would write it by hand, in h's own dtype throughout: what a backend's error is measured against."""
    dtype = h.dtype
    # Formed before it is rounded: bfloat16 sources would cancel, and make this a yardstick that anything passes.
    p = F.linear(h, (source - basis).to(dtype), source_bias.to(dtype))
    if gate is None or gate_bias is None:
        w = torch.ones_like(p)
    else:
        z = F.linear(h, gate.to(dtype), gate_bias.to(dtype))
        w = torch.sigmoid(z) if gate_fn == "sigmoid" else torch.softmax(z, dim=-1)
    if rows is not None:
        w = w * rows.unsqueeze(-1)
    u = w * p
    return BaftOutput(h + u @ basis.to(dtype), w, u)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
