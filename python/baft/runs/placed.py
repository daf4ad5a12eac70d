"""Models too large for a device, and how they are made to fit: spread over several, or quantised, by transformers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["QUANTISATIONS", "default_device", "placement"]

QUANTISATIONS = ("bnb-4bit", "bnb-8bit", "torchao-int8")
"""NF4 and LLM.int8() of bitsandbytes, and torchao's 8-bit weights, which are multiplied in the model's own dtype."""


def default_device() -> str:
    """Where a model goes that is to be on one device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def placement(
    config: PreTrainedConfig, device_map: str | None, tensor_parallel: bool, quantise: str | None
) -> dict[str, Any]:
    """What ``from_pretrained`` needs to know; see ``baft.runs.inputs.load_model``.

    Returns:
        Nothing for a model on one device, which is to be brought there.

    Raises:
        ValueError: for what isn't known, doesn't go together, or needs what isn't installed.
    """
    options: dict[str, Any] = {}
    if tensor_parallel:
        if device_map or quantise:
            raise ValueError("tensor_parallel: expected no device_map and no quantise beside it")
        if not torch.distributed.is_initialized():
            raise ValueError("tensor_parallel: expected several processes, started by torchrun, got one")
        options["tp_plan"] = "auto"
    elif device_map or quantise:
        _require("accelerate", "device_map" if device_map else f"quantise={quantise}", "large")
        options["device_map"] = device_map or {"": default_device()}
    if quantise:
        options["quantization_config"] = _quantisation(quantise, config.dtype)
    return options


def _quantisation(name: str, dtype: object) -> QuantizationConfigMixin:
    if name not in QUANTISATIONS:
        raise ValueError(f"quantise: expected one of {', '.join(QUANTISATIONS)}, got {name!r}")
    if name.startswith("bnb"):
        _require("bitsandbytes", f"quantise={name}", "quantised")
        if name == "bnb-8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        computes_in = dtype if isinstance(dtype, torch.dtype) else torch.float32
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes_in)
    _require("torchao", f"quantise={name}", "quantised")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _require(library: str, purpose: str, extra: str) -> None:
    if find_spec(library) is None:
        raise ValueError(f"{purpose}: expected {library} to be installed: pip install 'baft-kernels[{extra}]'")
