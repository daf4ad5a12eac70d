"""Continues a batch of prompts, greedily and with the KV cache; texts that have ended leave it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from baft.engine.encoding import Encoder, TokenBatch

__all__ = ["ends_of", "generate", "generate_greedily", "greedily_continued"]

# Texts below which none leaves before all have ended: going on without some takes longer than a step with them.
_FEW = 8

# Layers of a cache whose every tensor is one row a text.
_PARTED = (DynamicLayer, DynamicSlidingWindowLayer)


def ends_of(model: PreTrainedModel, encoder: Encoder) -> list[int]:
    """The tokens that a text ends with: the tokenizer's, and what else the model's configuration names."""
    of_model = model.generation_config.eos_token_id if model.generation_config else None
    ends = of_model if isinstance(of_model, list) else [of_model]
    return sorted({token for token in (encoder.tokenizer.eos_token_id, *ends) if token is not None})


def generate(model: PreTrainedModel, encoder: Encoder, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    """transformers' ``generate``, in the model's own way; without sampling unless ``options`` for it say otherwise."""
    return model.generate(  # type: ignore[operator]  # transformers' class doesn't declare it
        input_ids=ids, attention_mask=mask, pad_token_id=encoder.pad_id, **{"do_sample": False, **options}
    )


def generate_greedily(model: PreTrainedModel, encoder: Encoder, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    """The same, but with the model's likeliest token each time, whatever its own way is.

    A model may come with penalties, beams or tokens to avoid, which would be measured, and learned from, in its place.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        return generate(model, encoder, ids, mask, **options)
    finally:
        model.generation_config = own


def greedily_continued(
    model: PreTrainedModel,
    encoder: Encoder,
    batch: TokenBatch,
    max_new_tokens: int,
    meanwhile: Callable[[Sequence[int], TokenBatch], AbstractContextManager[None]] = lambda *_: nullcontext(),
) -> list[list[int]]:
    """The new tokens of each text of ``batch``, which is padded on the left.

    A batch runs for as long as its longest text. As soon as half of the texts have ended, the others go on without
    them, with their part of the cache.

    Args:
        meanwhile: what the model runs in; told the numbers of the texts that are left, and their part of the batch.

    Returns:
        Up to ``max_new_tokens`` each. Behind the end of a text, which is there, may stand padding.
    """
    ends, width = ends_of(model, encoder), batch.ids.shape[1]
    ids, mask, cache = batch.ids, batch.attention_mask, None
    found: list[list[int]] = [[]] * len(ids)
    left = list(range(len(ids)))
    while left:
        enough = _HalfHaveEnded(torch.tensor(ends, device=ids.device), width)
        with meanwhile(left, batch[left]):
            generated = generate_greedily(
                model,
                encoder,
                ids,
                mask,
                past_key_values=cache,
                max_new_tokens=width + max_new_tokens - ids.shape[1],
                eos_token_id=ends or None,
                stopping_criteria=[enough] if len(left) >= _FEW else [],
                return_dict_in_generate=True,
            )
        ids = generated.sequences
        new: list[list[int]] = ids[:, width:].tolist()
        going_on = [
            line for line, own in enumerate(new) if len(own) < max_new_tokens and not any(end in own for end in ends)
        ]
        for number, own in zip(left, new, strict=True):
            found[number] = own
        left = [left[line] for line in going_on]
        if left:
            chosen = torch.tensor(going_on, device=ids.device)
            cache = _part_of(generated.past_key_values, chosen, ids.shape[1] - 1)
            ids = ids[chosen]
            mask = torch.nn.functional.pad(mask[chosen], (0, ids.shape[1] - mask.shape[1]), value=1)
    return found


def _part_of(cache: Any, chosen: Tensor, length: int) -> DynamicCache | None:
    """The cache of the chosen texts' first ``length`` tokens; None where there is none such, and it is made anew."""
    if type(cache) is not DynamicCache or cache.get_seq_length() != length:
        return None
    layers: list[Any] = cache.layers
    if any(type(layer) not in _PARTED for layer in layers):
        return None
    for layer in layers:
        layer.batch_select_indices(chosen.to(layer.keys.device))
    return cache


class _HalfHaveEnded(StoppingCriteria):
    """Stops all texts when half of them have ended.

    Args:
        ends: the tokens that a text ends with.
        width: of the prompts.
    """

    def __init__(self, ends: Tensor, width: int) -> None:
        self._ends = ends
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended = torch.isin(input_ids[:, self._width :], self._ends).any(-1)
        return (2 * ended.sum() >= len(ended)).expand(len(ended))
