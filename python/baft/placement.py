"""Where a model computes, and what has to be seen to so that gradients go through it there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["at_hand", "device_of", "keep_differentiable"]

_PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' 4-bit layers


def device_of(module: nn.Module) -> torch.device:
    """The device that ``module`` computes on, or begins on: its weights', or the one that they are brought to.

    Where accelerate offloads weights to memory or disk, they are on "meta" but while their module runs; its hook knows
    the device.
    """
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Weights of ``module`` itself that accelerate has put aside are where it computes, while this context lasts."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not any(weight.is_meta for weight in module.parameters(recurse=False)):
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights that are on a CPU, which it does in a model's first forward pass.

    It does so on CPUs with AVX512-BF16, outside training mode. No gradient goes through packed ones, and nothing says
    so: edits below would learn from a part of their loss.

    Raises:
        ValueError: if they have been packed.
    """
    for module in model.modules():
        if getattr(module, _PACKS, False):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    "model: expected 4-bit weights that gradients go through, got ones that bitsandbytes has packed: "
                    "make the editor before the model's first forward pass"
                )
            setattr(module, _PACKS, False)
