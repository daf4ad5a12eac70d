"""What a model is told apart by: sums of its weights, wherever they are, and the measures of its architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from baft.placement import at_hand

__all__ = ["Fingerprint", "fingerprint_of", "hash_of_weights"]

# Bytes that are summed at a time, so that a model of any size needs little memory beside its own.
_PIECE = 1 << 26

# Of a model's configuration, by the names that all of them have in common: what no other dtype, quantisation or version
# of transformers changes.
_ARCHITECTURE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)


@torch.no_grad()
def hash_of_weights(module: nn.Module) -> str:
    """A hash of all weights: of each the name, dtype, shape, and two sums over its bytes, one by place.

    Sums rather than a hash of all bytes, because the device that holds the weights can make them. It tells models apart
    that differ by accident, and not by intent. Where weights are makes no difference: those that accelerate has put
    aside are brought one module at a time, and those that lie in parts in several processes one at a time, for which
    all the processes have to call this.

    Raises:
        ValueError: for weights that can't be read: they are on the meta device, and nothing brings them from elsewhere.
    """
    hashed = hashlib.sha256()
    for name, weight in _weights(module):
        hashed.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        for part in _plain(weight.detach()):
            if part.is_meta:
                raise ValueError(f"model: expected weights that can be read, got {name} on the meta device alone")
            hashed.update(str(_sums(part.contiguous())).encode())
    return hashed.hexdigest()


def _weights(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers with their names; one that several modules share comes with each.

    Buffers that a model isn't saved with are computed of its configuration, by each version of transformers others.
    """
    with at_hand(module):
        for name, weight in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}{name}", weight
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.")


def _plain(weight: Tensor) -> Iterator[Tensor]:
    """What a weight is made of: that of a quantised model is several tensors, that of a distributed one is gathered."""
    if isinstance(weight, DTensor):
        yield weight.full_tensor()
    elif is_traceable_wrapper_subclass(weight):
        names, _ = weight.__tensor_flatten__()
        for name in names:
            yield from _plain(getattr(weight, name))
    else:
        yield weight


def _sums(weight: Tensor) -> list[int]:
    total = torch.zeros(2, dtype=torch.int64, device=weight.device)
    place = 1
    for piece in weight.reshape(-1).view(torch.uint8).split(_PIECE):
        words = _words(piece)
        places = torch.arange(place, place + len(words), device=weight.device)
        total += torch.stack((words.sum(), (words * places).sum()))  # what overflows is as good as any bits
        place += len(words)
    return total.tolist()


def _words(piece: Tensor) -> Tensor:
    """Bytes as numbers of eight bytes each, of which there are fewer to be added."""
    if missing := -len(piece) % 8:
        piece = pad(piece, (0, missing))
    elif piece.storage_offset() % 8:
        piece = piece.clone()
    return piece.view(torch.int64)


class Fingerprint(BaseModel):
    """What is kept of a model to know it again, however it is loaded then.

    Attributes:
        architecture: measures of its configuration, by name.
        weights: of some of its parts the dtype and a hash; none of a part that isn't plain floating tensors of one
            dtype, all in this process, as a quantised one isn't.
    """

    model_config = ConfigDict(frozen=True)

    architecture: dict[str, Any]
    weights: dict[str, tuple[str, str]]

    def differences(self, other: Fingerprint) -> list[str]:
        """In what ``other`` is a different model, in words, as far as both can be compared.

        Weights are where both have a part in the same dtype: the same model in another, or quantised, has other bytes.
        """
        found = [
            f"{name} {other.architecture[name]} in place of {value}"
            for name, value in self.architecture.items()
            if name in other.architecture and other.architecture[name] != value
        ]
        others = []
        for part, (dtype, hashed) in self.weights.items():
            dtype_there, hashed_there = other.weights.get(part, (None, None))
            if dtype == dtype_there and hashed != hashed_there:
                others.append(part)
        return found + ([f"other weights in {', '.join(others)}"] if others else [])


def fingerprint_of(model: PreTrainedModel, parts: Mapping[str, nn.Module]) -> Fingerprint:
    """The fingerprint of a model of transformers, with the weights of ``parts`` of it, by name."""
    config = model.config.get_text_config()
    architecture = {name: value for name in _ARCHITECTURE if (value := getattr(config, name, None)) is not None}
    weights = {name: (dtype, hash_of_weights(part)) for name, part in parts.items() if (dtype := _plain_dtype(part))}
    return Fingerprint(architecture=architecture, weights=weights)


def _plain_dtype(module: nn.Module) -> str | None:
    """The dtype of all weights, if they are plain floating tensors that can be read here."""
    dtypes = set()
    for _, weight in _weights(module):
        if is_traceable_wrapper_subclass(weight) or weight.is_meta or not weight.is_floating_point():
            return None
        dtypes.add(weight.dtype)
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None
