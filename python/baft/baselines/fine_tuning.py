"""Fine-tuning of one block's down projection: the plainest way to put a fact into a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft.attach import find_blocks
from baft.baselines.linear import down_projection, features
from baft.baselines.weights import WeightEditor, save_baseline
from baft.config import BaftConfig
from baft.editor import resolve_layers

__all__ = ["FineTuning", "FineTuningOptions"]


class FineTuningOptions(BaseModel):
    """How to fine-tune, beside what ``BaftConfig`` says.

    Attributes:
        learning_rate: AdamW's. Of 2.5e-3, 5e-3, 1e-2 and 2e-2 the best on 30 FactWorld requests of a seed that no table
            has (``bench/baselines.py --tune``): all learn them, and the lower the rate the better the locality.
        layer: the block; None takes the middle one of those that BaFT would edit.
        projection: the layer's path in the block ("mlp.down_proj"); None finds it by structure.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.5e-3
    layer: Annotated[int, Field(ge=0)] | None = None
    projection: str | None = None


class FineTuning(WeightEditor):
    """Trains the whole weight of one linear layer.

    What is trained is the weight's change, in float32 and beside the weight itself: AdamW on the one is AdamW on the
    other (but for weight decay, which here draws to the old weight). So the model's own weight is never written to,
    may be of a low precision, or quantised, and the base model is a flag away.

    Args:
        model, tokenizer, config, unrelated: as ``BaftEditor``'s.
        options: what is trained, and how.

    Raises:
        ValueError: for blocks that can't be found, a block out of range, or a layer that isn't there.
    """

    name = "fine-tuning"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: BaftConfig | None = None,
        *,
        unrelated: Sequence[str] | None = None,
        options: FineTuningOptions | None = None,
    ) -> None:
        options, config = options or FineTuningOptions(), config or BaftConfig()
        blocks = find_blocks(model, config.blocks)
        depth = len(blocks.modules)
        edited = resolve_layers(config.layers, depth)
        (layer,) = resolve_layers((edited[len(edited) // 2] if options.layer is None else options.layer,), depth)
        block = blocks.modules[layer]
        path = options.projection or down_projection(block, blocks.width)
        projection = dict(block.named_modules()).get(path)
        if projection is None:
            raise ValueError(f"projection: expected a layer of a {type(block).__name__}, got {path!r}")
        super().__init__(model, tokenizer, config, unrelated, options, options.learning_rate)
        into, out = features(projection)
        device = next(projection.parameters()).device
        self._layer = layer
        self._change = nn.Parameter(torch.zeros(out, into, device=device))
        self._weights[f"layers.{layer}.{path}.weight"] = self._change
        self._enabled = True
        self._handle = projection.register_forward_hook(self._add_change)

    @property
    def layers(self) -> tuple[int, ...]:
        """The block whose projection is trained."""
        return (self._layer,)

    def _add_change(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not self._enabled:
            return output
        return output + F.linear(args[0], self._change.to(args[0].dtype))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model, exactly, while this context lasts; may be nested."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def remove(self) -> None:
        """Take the editor off the model for good."""
        super().remove()
        self._handle.remove()

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the weight's change as safetensors, and what was edited as JSON.

        Raises:
            OSError: if it can't be written.
        """
        save_baseline(folder, self, self.options, self.parameters())
