"""Editing as one would write it first: the yardstick of bench/edit_throughput.py.

Forward hooks with torch's own orthogonal parametrisation, a whole forward pass of padded texts at each step and one
more of the unedited model for the locality loss, one request at a time; answers are generated one prompt at a time,
and without a KV cache. The losses, their weights, the texts drawn, the optimiser and the stopping rule are those of
the editor that it is measured against, so that both do the same edits. Only this file knows none of its code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from baft import BaftConfig

__all__ = ["PlainEditor", "Text", "generate_one_by_one", "generate_with_cache"]


class Text:
    """Token ids, the first ``prompt_length`` of which are the prompt."""

    def __init__(self, ids: Sequence[int], prompt_length: int) -> None:
        self.ids = list(ids)
        self.prompt_length = prompt_length


class PlainIntervention(nn.Module):
    """h + R^T (w * (A h + b - R h)) in plain torch, R orthonormal by parametrisation."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.basis = parametrizations.orthogonal(nn.Linear(width, rank, bias=False))
        self.source = nn.Linear(width, rank)
        self.gate = nn.Linear(width, rank)
        self.enabled = True

    def start(self, basis: Tensor, gate: Tensor, gate_bias: Tensor) -> None:
        """As the editor starts: the source equal to the basis, gates as calibrated."""
        with torch.no_grad():
            self.basis.weight = basis
            self.source.weight.copy_(basis)
            self.source.bias.zero_()
            self.gate.weight.copy_(gate)
            self.gate.bias.copy_(gate_bias)

    def forward(self, h: Tensor) -> Tensor:
        if not self.enabled:
            return h
        x = h.float()
        basis = self.basis.weight
        update = torch.sigmoid(self.gate(x)) * (self.source(x) - x @ basis.T)
        return (x + update @ basis).to(h.dtype)


class PlainEditor:
    """Edits one request after another with hooks on a model's blocks.

    Args:
        model: frozen while it is edited.
        blocks: its decoder blocks, by the index that ``starts`` names.
        starts: by block index the first basis, gate and gate bias.
        config: the editor's.
        pad_id: a token to pad with.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        starts: dict[int, tuple[Tensor, Tensor, Tensor]],
        config: BaftConfig,
        pad_id: int,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.config = config
        self.pad_id = pad_id
        self.starts = starts
        self.interventions = {}
        self._handles = []
        for layer, (basis, _, _) in starts.items():
            device = next(blocks[layer].parameters()).device
            intervention = PlainIntervention(basis.shape[1], basis.shape[0]).to(device)
            self.interventions[layer] = intervention
            self._handles.append(blocks[layer].register_forward_hook(self._hook(intervention)))
        self.restart()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def restart(self) -> None:
        """Back to no edit, with a new optimiser."""
        for layer, intervention in self.interventions.items():
            intervention.start(*self.starts[layer])
        gates = [p for i in self.interventions.values() for p in i.gate.parameters()]
        others = [p for i in self.interventions.values() for m in (i.basis, i.source) for p in m.parameters()]
        rate, gate_rate = self.config.rates(gates[0].shape[-1])
        self.optimizer = torch.optim.AdamW(
            [{"params": others, "lr": rate}, {"params": gates, "lr": gate_rate}],
            betas=(0.9, 0.99),
            weight_decay=self.config.weight_decay,
        )

    def edit(self, draw: Callable[[], tuple[list[Text], list[Text]]], *, alone: bool) -> tuple[int, float]:
        """Train until the first text's loss is low enough.

        Args:
            draw: called before each step; returns the step's edits, the new request first, and its unrelated texts.
            alone: whether it is a single edit, which goes on for other texts' sake.

        Returns:
            Steps taken, and the last loss.
        """
        (least, most), steps, loss = self.config.steps_of_an_edit(alone=alone), 0, math.inf
        while steps < least or (steps < most and not loss < self.config.stop_below):
            loss = self.step(*draw())
            steps += 1
        return steps, loss

    def step(self, edits: list[Text], unrelated: list[Text]) -> float:
        """One step; returns the first text's loss before it."""
        ids, mask, labels = self._pad([*edits, *unrelated])
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        count = len(edits)
        wanted = labels[:count, 1:]
        nll = F.cross_entropy(logits[:count, :-1].transpose(1, 2).float(), wanted, reduction="none")
        per_edit = nll.sum(-1) / (wanted != -100).sum(-1)
        loss = per_edit.mean()
        if unrelated:
            with torch.no_grad(), self.disabled():
                base = self.model(input_ids=ids[count:], attention_mask=mask[count:]).logits
            change = F.kl_div(
                F.log_softmax(logits[count:].float(), -1),
                F.log_softmax(base.float(), -1),
                reduction="none",
                log_target=True,
            ).sum(-1)
            loss = loss + self.config.locality_weight * (change * mask[count:]).sum() / mask[count:].sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return per_edit[0].item()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        for intervention in self.interventions.values():
            intervention.enabled = False
        yield
        for intervention in self.interventions.values():
            intervention.enabled = True

    @staticmethod
    def _hook(intervention: PlainIntervention) -> Callable[..., object]:
        def hook(_: nn.Module, __: object, output: object) -> object:
            if isinstance(output, tuple):
                return intervention(output[0]), *output[1:]
            return intervention(output)

        return hook

    def _pad(self, texts: list[Text]) -> tuple[Tensor, Tensor, Tensor]:
        width = max(len(text.ids) for text in texts)
        device = self.model.device
        ids = torch.tensor([text.ids + [self.pad_id] * (width - len(text.ids)) for text in texts], device=device)
        mask = torch.tensor([[1] * len(t.ids) + [0] * (width - len(t.ids)) for t in texts], device=device)
        labels = ids.masked_fill(mask == 0, -100)
        for row, text in enumerate(texts):
            labels[row, : text.prompt_length] = -100
        return ids, mask, labels


@torch.no_grad()
def generate_one_by_one(model: nn.Module, prompts: Sequence[Text], new_tokens: int, eos_id: int | None) -> list[Text]:
    """Greedy continuations, each prompt alone, the whole text run again for each token."""
    continued = []
    for prompt in prompts:
        ids = list(prompt.ids)
        for _ in range(new_tokens):
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == eos_id:
                break
        continued.append(Text(ids, len(prompt.ids)))
    return continued


@torch.no_grad()
def generate_with_cache(model: Any, prompts: Sequence[Text], new_tokens: int, eos_id: int | None) -> list[Text]:
    """The same, as transformers' ``generate`` does it with a KV cache."""
    continued = []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids], device=model.device)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=eos_id,
            pad_token_id=0,
        )
        continued.append(Text(found[0].tolist(), len(prompt.ids)))
    return continued
