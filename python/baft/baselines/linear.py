"""The linear layers of a decoder block, whatever its family calls them."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["down_projection", "features", "linear_layers"]


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of ``block`` by its path in it, in order; quantised ones too, which are torch's by descent.

    Raises:
        ValueError: if there are none.
    """
    layers: dict[str, nn.Module] = {
        name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    if not layers:
        raise ValueError(f"blocks: expected linear layers in a {type(block).__name__}, found none")
    return layers


def features(layer: nn.Module) -> tuple[int, int]:
    """How wide the vectors are that go in and come out; a weight's shape doesn't tell where it is packed."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, Conv1D)
    return layer.nx, layer.nf


def down_projection(block: nn.Module, width: int) -> str:
    """The path of the layer by which a block's MLP writes to the stream: its last one to ``width`` from another width.

    Raises:
        ValueError: if there is none.
    """
    layers = {name: features(layer) for name, layer in linear_layers(block).items()}
    down = [name for name, (into, out) in layers.items() if out == width != into]
    if not down:
        found = ", ".join(f"{name} ({into} to {out})" for name, (into, out) in layers.items())
        raise ValueError(
            f"projection: expected a linear layer from another width to {width} in a {type(block).__name__}, found "
            f"{found}. Name one as projection=..."
        )
    return down[-1]
