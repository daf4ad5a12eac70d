"""Methods of editing by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft.baselines.fine_tuning import FineTuning, FineTuningOptions
from baft.baselines.in_context import InContext, InContextOptions
from baft.baselines.lora import Lora, LoraOptions
from baft.baselines.no_edit import NoEdit, NoOptions
from baft.config import BaftConfig
from baft.editing import Editor
from baft.editor import BaftEditor
from baft.engine.options import EngineOptions

__all__ = ["METHODS", "Method", "make_editor"]


@dataclass(frozen=True)
class Method:
    """How to make a method's editor, and the class of its own options."""

    make: Callable[..., Editor]
    options: type


def _loreft(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: BaftConfig, **others: Any) -> Editor:
    """BaFT without gates: with two rows for each basis in place of three, half as many bases again are as large."""
    return BaftEditor(
        model, tokenizer, config.model_copy(update={"gate_fn": "none", "rank": config.rank * 3 // 2}), **others
    )


METHODS: Mapping[str, Method] = {
    "baft": Method(BaftEditor, EngineOptions),
    "loreft": Method(_loreft, EngineOptions),
    "lora": Method(Lora, LoraOptions),
    "ft": Method(FineTuning, FineTuningOptions),
    "in-context": Method(InContext, InContextOptions),
    "none": Method(NoEdit, NoOptions),
}


def make_editor(
    method: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: BaftConfig | None = None,
    *,
    unrelated: Sequence[str] | None = None,
    options: Any = None,
) -> Editor:
    """The editor of a method.

    Args:
        method: one of ``METHODS``.
        model, tokenizer, unrelated: as ``BaftEditor``'s.
        config: how to edit, as BaFT would: other methods take its schedule and its losses, and are as large as BaFT
            with its rank would be.
        options: the method's own, of ``METHODS[method].options``; None takes its defaults.

    Raises:
        ValueError: for an unknown method, options of another one, and what the method itself refuses.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    wanted = METHODS[method]
    if options is not None and not isinstance(options, wanted.options):
        raise ValueError(f"options: expected {wanted.options.__name__} for {method}, got {type(options).__name__}")
    return wanted.make(model, tokenizer, config or BaftConfig(), unrelated=unrelated, options=options)
