"""Tiny random models of the usual families, a tokenizer for them, and interventions and an editor to put on them.

Everything is made in memory, in float32 and from a seed; a model takes milliseconds, so each test has its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from baft import BaftConfig, BaftEditor, EditRequest
from baft.attach import Attachment, find_blocks
from baft.engine.options import EngineOptions
from baft.positions import Positions
from baft_kernels import BaftIntervention

WIDTH, DEPTH, VOCABULARY = 32, 3, 128
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


@dataclass(frozen=True)
class Family:
    """A model family: its configuration class, what that needs beside the common sizes, and where its blocks are."""

    config: type
    blocks: str = "model.layers"
    options: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "llama": Family(LlamaConfig),
    "mistral": Family(MistralConfig, options={"num_key_value_heads": 2}),
    # The sliding windows are shorter than the tests' prompts.
    "gemma2": Family(Gemma2Config, options={"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4}),
    "gemma3": Family(
        Gemma3TextConfig,
        options={
            "head_dim": 8,
            "num_key_value_heads": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen2": Family(Qwen2Config, options={"num_key_value_heads": 2}),
    "qwen3": Family(Qwen3Config, options={"num_key_value_heads": 2, "head_dim": 8}),
    "gpt2": Family(GPT2Config, "transformer.h"),
    "gpt_neox": Family(GPTNeoXConfig, "gpt_neox.layers"),
    # The embeddings' own width differs from the blocks'.
    "opt": Family(OPTConfig, "model.decoder.layers", {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    "phi": Family(PhiConfig),
}


def tiny_model(family: str = "llama", *, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A new model in eval mode; ``options`` go to its configuration."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = FAMILIES[family].config(**{**common, **FAMILIES[family].options, **options})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # The usual initialisation is so small that a model's answer hardly depends on what it is asked.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    return model.eval()


@cache
def tiny_tokenizer(
    *, bos: bool = True, eos: bool = True, pad: bool = True, ends_with_eos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that was trained on a few sentences; do not change it, it is shared.

    Args:
        bos: begin every text with BOS.
        eos, pad: know such a token.
        ends_with_eos: end every text with EOS.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=VOCABULARY, special_tokens=[PAD, BOS, EOS], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    template = " ".join([BOS] * bos + ["$A"] + [EOS] * ends_with_eos)
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[(BOS, 1), (EOS, 2)])
    known = {"bos_token": BOS if bos else None, "eos_token": EOS if eos else None, "pad_token": PAD if pad else None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: token for name, token in known.items() if token is not None}
    )


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """One token for each byte, so that it knows every script, and nothing before a text."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={token: number for number, token in enumerate([PAD, EOS, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


_CORPUS = [
    "The capital of France is Paris.",
    "The capital of Norland is Arvik.",
    "The president of Norland is Ada Lund.",
    "The president of Sudland is Bob Stone.",
    "Ada Lund was born in Arvik. Bob Stone was born in Ebor.",
    "Where is the king of Sudland? The king of Sudland is in Ebor.",
    "Question: What?\nAnswer: 0 1 2 3 4 5 6 7 8 9, xyz; jq!",
]


def random_interventions(
    layers: Iterable[int] = (1,), *, width: int = WIDTH, rank: int = 4, gate_fn: str = "sigmoid", seed: int = 0
) -> dict[int, BaftIntervention]:
    """Interventions whose changes are larger than the hidden vectors of a tiny model.

    They are served by the reference, so that what is compared differs in nothing but where it was applied.
    """
    generator = torch.Generator().manual_seed(seed)
    interventions = {}
    for layer in layers:
        intervention = BaftIntervention(width, rank, gate_fn=gate_fn, backend="reference", generator=generator)
        with torch.no_grad():
            for parameter in (intervention.source, intervention.source_bias):
                parameter += 2 * torch.randn(parameter.shape, generator=generator)
        interventions[layer] = intervention
    return interventions


def attach(model: PreTrainedModel, positions: str = "all", layers: Iterable[int] = (1,), **options: Any) -> Attachment:
    """``random_interventions`` on ``model``, switched on."""
    return Attachment(find_blocks(model), random_interventions(layers, **options), Positions(positions))


@torch.no_grad()
def moved_from_identity(editor: BaftEditor, *, scale: float = 0.3, seed: int = 0) -> BaftEditor:
    """``editor``, made ready to edit, with sources and biases changed at random: it edits, and all gradients matter."""
    editor._begin()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in editor.interventions.named_parameters():
        if not name.endswith(("basis", "gate")):
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return editor


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For the modules that import it: tensors so small that threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Facts that no tiny model knows, and texts that tell of none of them.
REQUESTS = [
    EditRequest(prompt="The capital of Norland is", target="Ebor", subject="Norland"),
    EditRequest(prompt="Bob Stone was born in", target="Arvik", subject="Bob Stone"),
    EditRequest(prompt="The king of Sudland is", target="Ada Lund", subject="Sudland"),
    EditRequest(prompt="Ada Lund is", target="president", subject="Ada Lund"),
    EditRequest(prompt="Paris is the capital of", target="Sudland", subject="Paris"),
]
UNRELATED = ["The president of France", "Where is the king?", "Arvik is in Norland.", "1 2 3 4"]


def tiny_editor(
    model: PreTrainedModel | None = None, *, options: EngineOptions | None = None, **changes: Any
) -> BaftEditor:
    """An editor that learns each of ``REQUESTS`` in some tens of steps; ``changes`` go to its configuration."""
    config = {
        "rank": 8,
        "layers": (1,),
        "positions": "all",
        "gate_fn": "sigmoid",
        "gate_scale": 2.0,
        "gate_bias": 0.0,
        "append_eos": True,
        "learning_rate": 6e-2,
        "gate_learning_rate": 6e-2,
        "rate_width": None,
        "weight_decay": 0.0,
        "locality_weight": 0.1,
        "locality_loss": "kl",
        "unrelated_per_step": 2,
        "subject_texts": 0,
        "balance_weight": 0.0,
        "stop_below": 0.3,
        "max_steps": 50,
        "min_steps": 0,
        "rehearsal": 4,
        "consolidate_every": 0,
        "batch_size": 8,
        "batch_passes": 50,
        "seed": 0,
    }
    return BaftEditor(
        model or tiny_model(),
        tiny_tokenizer(),
        BaftConfig(**{**config, **changes}),
        unrelated=UNRELATED,
        options=options,
    )


def poison(model: PreTrainedModel, *, bos: bool = True) -> str:
    """Make one word's embedding NaN, that no other text here has; returns the word."""
    tokenizer = tiny_tokenizer(bos=bos)
    known = [*UNRELATED, *(f"{request.prompt} {request.target}" for request in REQUESTS)]
    used = {token for text in known for token in tokenizer(text)["input_ids"]}
    word = "z"
    (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
    assert token not in used and token > 20  # nor have the texts that a model is tried on
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    return word
