"""Whether a model's weights are still those that something was computed with."""

from __future__ import annotations

from torch import nn

__all__ = ["Versions", "versions_of"]

Versions = list[tuple[int, int]]
"""Of each weight where it is, and how often it was written to."""


def versions_of(model: nn.Module) -> Versions:
    return [(weight.data_ptr(), weight._version) for weight in model.parameters()]
