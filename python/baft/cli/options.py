"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from baft.datasets.factworld import WORLDS

__all__ = [
    "Adapter",
    "AnswerTokens",
    "AnyModel",
    "Backend",
    "Config",
    "Dataset",
    "DeviceMap",
    "Edits",
    "Json",
    "Method",
    "Model",
    "OptionalDataset",
    "OptionalModel",
    "OptionalSeed",
    "Out",
    "Quantise",
    "Seed",
    "TensorParallel",
]

_MODEL = typer.Option(help=f"A folder, a Hugging Face name, or one of {', '.join(WORLDS)}.")
_DATASET = typer.Option(help=f"A benchmark file, or its first records: FILE[:300]; or one of {', '.join(WORLDS)}.")
Model = Annotated[str, _MODEL]
OptionalModel = Annotated[str | None, _MODEL]
Dataset = Annotated[str, _DATASET]
OptionalDataset = Annotated[str | None, _DATASET]
Adapter = Annotated[Path, typer.Option(help="A folder that save_pretrained or a run wrote.")]
AnyModel = Annotated[
    bool, typer.Option("--any-model", help="Take another model than the adapter was saved for: a fine-tuned variant.")
]
Edits = Annotated[int | None, typer.Option(help="How many requests to edit; all by default.")]
_SEED = "Of the choice of requests, of the bases, and of training"
Seed = Annotated[int, typer.Option(help=f"{_SEED}.")]
OptionalSeed = Annotated[int | None, typer.Option(help=f"{_SEED}; by default the configuration's.")]
AnswerTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of a generated answer, at most; by default what the longest accepted one needs.", min=1),
]
Backend = Annotated[str | None, typer.Option(help="auto, reference, cpu, triton or cuda.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file with fields of BaftConfig.")]
Out = Annotated[Path, typer.Option(help="A new or empty folder for everything that the run writes.")]
Method = Annotated[
    Literal["baft", "loreft", "lora", "ft", "in-context", "none"],
    typer.Option(help="What edits: BaFT, or a baseline with its losses and its schedule."),
]
DeviceMap = Annotated[str | None, typer.Option(help="Spread the model over devices, memory and disk: auto.")]
TensorParallel = Annotated[
    bool, typer.Option("--tensor-parallel", help="Spread the model over the processes that torchrun started.")
]
Quantise = Annotated[str | None, typer.Option(help="Load the model as bnb-4bit, bnb-8bit or torchao-int8.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
