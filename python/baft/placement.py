"""Where a model, or a part of it, computes."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["device_of"]


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
