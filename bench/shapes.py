"""Models of real shapes with random weights, built from a configuration: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen2Config

from baft.datasets.factworld import FactWorld
from baft.requests import EditRequest
from baft.testbed.training import train_tokenizer

__all__ = ["SHAPES", "build"]

# Widths, depths and heads as in the published configurations of these models; "tiny" is to try the benchmark out.
SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "tiny": (
        LlamaConfig,
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "vocab_size": 1200,
        },
    ),
    "llama-2-7b": (
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32000,
        },
    ),
    "llama-3-8b": (
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "gemma-7b": (
        GemmaConfig,
        {
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "vocab_size": 256000,
        },
    ),
    "qwen2.5-7b": (
        Qwen2Config,
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
}


def build(shape: str, requests: int) -> tuple[Any, Any, list[EditRequest], list[str], dict[str, Any]]:
    """A model in bfloat16 on the GPU if there is one, a tokenizer, FactWorld's requests and texts, and overrides.

    The overrides are the task of published figures: rank 12, four layers, 25 steps for every edit.
    """
    config_class, sizes = SHAPES[shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_class(**sizes), dtype=torch.bfloat16)
    world = FactWorld()
    texts = list(world.unrelated())
    tokenizer = train_tokenizer(texts, 1200)
    depth = sizes["num_hidden_layers"]
    layers = tuple(layer * depth // 32 for layer in (9, 18, 24, 28))
    overrides = {"rank": 12, "layers": layers, "max_steps": 25, "batch_passes": 25, "stop_below": 0.0}
    return model.eval(), tokenizer, world.requests(requests), texts[:2048], overrides
