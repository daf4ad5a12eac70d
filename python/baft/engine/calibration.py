"""Sets the gates to the model's own scale before the first edit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from baft.attach import Attachment
from baft.engine.encoding import Encoded, Encoder
from baft.placement import device_of

__all__ = ["calibrate_gates"]


@torch.no_grad()
def calibrate_gates(
    model: PreTrainedModel,
    attachment: Attachment,
    encoder: Encoder,
    texts: Sequence[Encoded],
    *,
    scale: float,
    bias: float,
    first: int = 0,
) -> None:
    """Give the logits ``z = G h + c`` of every gate from number ``first`` on the mean ``bias`` and the standard
    deviation ``scale`` over the tokens of ``texts``.

    Hidden vectors differ by orders of magnitude between models, layers and directions. A gate drawn without looking
    would be stuck open, stuck shut or linear; calibrated, it cuts the model's own inputs in two, and different ones
    differently.
    """
    batch = encoder.batch(texts, device_of(model))
    mask = batch.attention_mask.bool()
    inputs: dict[int, Tensor] = {}

    def watch(layer: int) -> RemovableHandle:
        def hook(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            h = output[0] if isinstance(output, tuple) else output
            inputs[layer] = h[mask.to(h.device)].float()

        return attachment.blocks.modules[layer].register_forward_hook(hook)

    handles = [watch(layer) for layer in attachment.interventions]
    try:
        with attachment.disabled():
            # Not the head, whose logits of so many texts would take more memory than all else.
            model.base_model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer, intervention in attachment.interventions.items():
        if intervention.gate is None:
            continue
        gate = intervention.gate[first:]
        logits = inputs[layer].to(gate) @ gate.T
        factor = scale / logits.std(0).clamp(min=1e-12)
        gate.mul_(factor.unsqueeze(-1))
        intervention.gate_bias[first:] = bias - factor * logits.mean(0)
