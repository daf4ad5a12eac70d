"""LoRA on the blocks that BaFT edits, by peft, with as many parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from baft.attach import find_blocks
from baft.baselines.linear import features, linear_layers
from baft.baselines.weights import WeightEditor, save_baseline
from baft.config import BaftConfig
from baft.editor import resolve_layers
from baft_kernels import BaftIntervention

__all__ = ["Lora", "LoraOptions"]


class LoraOptions(BaseModel):
    """LoRA's own choices.

    Attributes:
        learning_rate: AdamW's. On a dozen FactWorld requests of a seed that no table has, 2.5e-3 did as well as any of
            5e-3 and 1e-2, and at 2e-2 the model broke. ``bench/baselines.py --tune`` is the longer trial.
        rank: of each change; None chooses it so that all together have as many parameters as BaFT would.
        alpha: changes are scaled by ``alpha / rank``; None scales them by 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.5e-3
    rank: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Lora(WeightEditor):
    """Trains low-rank changes of the edited blocks' weights.

    All linear layers of a block get one: on the attention alone, at an equal number of parameters, LoRA is known to
    learn less (arXiv 2305.14314, 2405.09673), and the rival should be a strong one.

    Args:
        model: peft puts its modules in the place of the model's own until ``remove``.
        tokenizer, config, unrelated: as ``BaftEditor``'s; ``config.rank`` is BaFT's.
        options: LoRA's own.

    Raises:
        ValueError: where peft isn't installed, for a model that peft is on already, for blocks that can't be found.
    """

    name = "LoRA"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: BaftConfig | None = None,
        *,
        unrelated: Sequence[str] | None = None,
        options: LoraOptions | None = None,
    ) -> None:
        options, config, peft = options or LoraOptions(), config or BaftConfig(), _peft()
        if hasattr(model, "peft_config"):
            raise ValueError("model: expected one without an adapter of peft's, got one that has some")
        blocks = find_blocks(model, config.blocks)
        chosen = resolve_layers(config.layers, len(blocks.modules))
        linear = {
            f"{blocks.path}.{layer}.{name}": module
            for layer in chosen
            for name, module in linear_layers(blocks.modules[layer]).items()
        }
        budget = len(chosen) * _parameters_of_baft(blocks.width, config)
        rank = options.rank or max(1, round(budget / sum(sum(features(module)) for module in linear.values())))
        super().__init__(model, tokenizer, config, unrelated, options, options.learning_rate)
        lora = peft.LoraConfig(
            r=rank,
            lora_alpha=options.alpha or rank,
            target_modules=list(linear),
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in linear.values()),
        )
        trained_by_others = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self._peft = peft.get_peft_model(model, lora)
        for layer in chosen:
            for name, parameter in self.blocks.modules[layer].named_parameters():
                if ".lora_" in name:
                    parameter.requires_grad_(False)
                    self._weights[f"layers.{layer}.{name}"] = parameter
        for parameter in trained_by_others:
            parameter.requires_grad_(True)
        self._layers = chosen

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks whose weights are changed."""
        return self._layers

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, exactly, while this context lasts; may be nested."""
        try:
            with self._peft.disable_adapter():
                yield
        finally:  # peft leaves them to be trained
            for weight in self._weights.values():
                weight.requires_grad_(False)

    def remove(self) -> None:
        """Take peft's modules off the model for good."""
        super().remove()
        self._peft.unload()

    def save_pretrained(self, folder: str | Path) -> None:
        """Save what peft's ``from_pretrained`` loads, and what was edited as JSON.

        Raises:
            OSError: if it can't be written.
        """
        self._peft.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        save_baseline(folder, self, self.options, {})


def _parameters_of_baft(width: int, config: BaftConfig) -> int:
    """How many parameters BaFT trains in each block."""
    generator = torch.Generator().manual_seed(0)
    intervention = BaftIntervention(width, config.rank, gate_fn=config.gate_fn, generator=generator)
    return sum(parameter.numel() for parameter in intervention.parameters())


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ValueError('method: expected peft to be installed for lora: pip install "baft-kernels[bench]"') from error
    return peft
