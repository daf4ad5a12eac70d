"""Sets the gates to the model's own scale before the first edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from baft.attach import Attachment
from baft.engine.encoding import Encoded, Encoder
from baft.placement import device_of

__all__ = ["calibrate_gates"]

# Many models put their attention sinks on a text's first token, and on some others that say little: there hidden
# vectors are hundreds of times as long as elsewhere (Sun et al., arXiv 2402.17762), and a few of them would outweigh
# all other tokens. So those more than so many times as long as the median are left out.
_LONGEST = 10.0
_CELLS = 2**16  # of a pass, padding and all


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
    deviation ``scale`` over the tokens of ``texts``, attention sinks apart.

    Hidden vectors differ by orders of magnitude between models, layers and directions. A gate drawn without looking
    would be stuck open, stuck shut or linear; calibrated, it cuts the model's own inputs in two, and different ones
    differently.

    Raises:
        ValueError: if ``texts`` have fewer than two tokens.
    """
    gated = {layer: i for layer, i in attachment.interventions.items() if i.gate is not None}
    logits: dict[int, list[Tensor]] = {layer: [] for layer in gated}
    lengths: dict[int, list[Tensor]] = {layer: [] for layer in gated}

    def watch(layer: int, gate: Tensor) -> RemovableHandle:
        def hook(_: object, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
            h = output[0] if isinstance(output, tuple) else output
            h = h[mask.to(h.device)].float().to(gate)
            logits[layer].append(h @ gate.T)
            lengths[layer].append(torch.linalg.vector_norm(h, dim=-1))

        return attachment.blocks.modules[layer].register_forward_hook(hook)

    handles = [watch(layer, intervention.gate[first:]) for layer, intervention in gated.items()]
    try:
        with attachment.disabled():
            for part in _parts(texts):
                batch = encoder.batch(part, device_of(model))
                mask = batch.attention_mask.bool()
                # Not the head, whose logits of so many texts would take more memory than all else.
                model.base_model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer, intervention in gated.items():
        length = torch.cat(lengths[layer])
        usual = torch.cat(logits[layer])[length <= _LONGEST * length.median()]
        if len(usual) < 2:
            raise ValueError(f"unrelated: expected texts of two tokens or more to calibrate gates on, got {len(usual)}")
        factor = scale / usual.std(0).clamp(min=1e-12)
        intervention.gate[first:].mul_(factor.unsqueeze(-1))
        intervention.gate_bias[first:] = bias - factor * usual.mean(0)


def _parts(texts: Sequence[Encoded]) -> Iterator[list[Encoded]]:
    """So many at a time as one pass takes."""
    part: list[Encoded] = []
    longest = 0
    for text in texts:
        longest = max(longest, len(text.ids))
        if part and longest * (len(part) + 1) > _CELLS:
            yield part
            part, longest = [], len(text.ids)
        part.append(text)
    if part:
        yield part
