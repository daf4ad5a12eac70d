"""What LoRA and fine-tuning have in common: weights, trained by plain steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft.attach import Attachment, find_blocks
from baft.baselines.plain import PlainTrainer
from baft.config import BaftConfig
from baft.editing import Editor
from baft.positions import Positions
from baft.storage import atomic_write
from baft.trained import TrainedEditor

__all__ = ["WeightEditor", "save_baseline"]


class WeightEditor(TrainedEditor):
    """An editor that trains weights.

    Args:
        model, tokenizer, config, unrelated: as ``BaftEditor``'s.
        options: the method's own.
        learning_rate: AdamW's, in place of the configuration's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: BaftConfig,
        unrelated: Sequence[str] | None,
        options: BaseModel,
        learning_rate: float,
    ) -> None:
        super().__init__(model, tokenizer, config, unrelated)
        self.options = options
        self.blocks = find_blocks(model, config.blocks)
        # Generation asks who is attached; nobody is.
        self.attachment = Attachment(self.blocks, {}, Positions("all"))
        self._learning_rate = learning_rate
        self._weights: dict[str, nn.Parameter] = {}

    def _own(self) -> Mapping[str, nn.Parameter]:
        return self._weights

    def _begin(self) -> PlainTrainer:
        self._trainer = trainer = self._trainer or self._make_trainer()
        return trainer

    _trainer: PlainTrainer | None

    def _make_trainer(self) -> PlainTrainer:
        return PlainTrainer(
            self.model,
            self.encoder,
            self._weights,
            self.disabled,
            self.config,
            self._unrelated_texts(),
            self._surroundings(),
            self._learning_rate,
        )

    def remove(self) -> None:
        """Take the editor off the model for good."""
        self.attachment.remove()


def save_baseline(folder: str | Path, editor: Editor, options: BaseModel, weights: Mapping[str, Tensor]) -> None:
    """Write ``baseline.json``, which says what it is, and what was edited, and ``weights``, if there are any.

    Raises:
        OSError: if it can't be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "method": editor.name,
        "base_model_name_or_path": str(editor.model.config.name_or_path),
        "layers": editor.layers,
        "baft": editor.config.model_dump(mode="json"),
        "options": options.model_dump(mode="json"),
        "edits": [request.model_dump(mode="json") for request in editor.edits],
    }
    if weights:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        atomic_write(folder / "adapter_model.safetensors", lambda path: path.write_bytes(save(tensors)))
    text = json.dumps(description, ensure_ascii=False, indent=1) + "\n"
    atomic_write(folder / "baseline.json", lambda path: path.write_text(text, "utf-8"))
