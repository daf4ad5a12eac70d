"""Trains a small Llama-architecture model, with its own tokenizer, until it knows a given set of facts."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from baft.requests import Probe

__all__ = ["Knowledge", "OnProgress", "TestbedRecipe", "TrainingReport", "recall", "train_testbed", "train_tokenizer"]


OnProgress = Callable[[int, int, float, float], None]
"""Called after every training step with (step, steps at most, loss, recall so far)."""


class Knowledge(Protocol):
    """What a testbed model shall know."""

    def corpus(self, draw: random.Random) -> list[str]:
        """Every fact once, as texts for one epoch; wordings and order may be drawn anew each time."""

    def questions(self) -> list[Probe]:
        """Prompts with answers that a model which knows the facts completes correctly."""


@dataclass(frozen=True)
class TestbedRecipe:
    """Size and training of a testbed model.

    The defaults are the smallest that were seen to know FactWorld (300 people) whole on every seed tried; training
    stops as soon as ``recall_wanted`` of the questions are answered.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    hidden_size: int = 256
    layers: int = 3
    heads: int = 4
    vocabulary: int = 1200
    batch_size: int = 128
    learning_rate: float = 6e-3
    warmup_steps: int = 20
    max_epochs: int = 20
    check_every: int = 20
    recall_wanted: float = 0.998
    seed: int = 0


@dataclass(frozen=True)
class TrainingReport:
    """How a testbed was trained: ``recall`` is the share of questions that it answers."""

    parameters: int
    steps: int
    seconds: float
    recall: float


def train_testbed(
    knowledge: Knowledge,
    recipe: TestbedRecipe,
    *,
    on_progress: OnProgress | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, TrainingReport]:
    """Train a model and its tokenizer from nothing.

    Args:
        knowledge: the facts.
        recipe: size and schedule.
        on_progress: called after every step.

    Returns:
        The model in eval mode, its tokenizer, and a report. A model that didn't reach ``recipe.recall_wanted`` is
        returned all the same: the report says so, and the caller decides.
    """
    start = time.perf_counter()
    draw = random.Random(f"testbed-{recipe.seed}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        tokenizer = train_tokenizer([text for _ in range(8) for text in knowledge.corpus(draw)], recipe.vocabulary)
        model = _fresh_model(recipe, tokenizer)
        steps, known = _train(model, tokenizer, knowledge, recipe, draw, on_progress)
    report = TrainingReport(model.num_parameters(), steps, time.perf_counter() - start, known)
    return model, tokenizer, report


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    knowledge: Knowledge,
    recipe: TestbedRecipe,
    draw: random.Random,
    on_progress: OnProgress | None,
) -> tuple[int, float]:
    steps = recipe.max_epochs * math.ceil(len(knowledge.corpus(draw)) / recipe.batch_size)
    optimizers = _optimizers(model, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: _warmup_then_decay(step, recipe.warmup_steps, steps))
        for o in optimizers
    ]
    batches = _batches(knowledge, tokenizer, recipe.batch_size, draw)
    questions = knowledge.questions()
    known = 0.0
    for step in range(1, steps + 1):
        ids, labels = next(batches)
        model.train()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        if step % recipe.check_every == 0 or step == steps:
            known = recall(model, tokenizer, questions)
        if on_progress is not None:
            on_progress(step, steps, loss.item(), known)
        if known >= recipe.recall_wanted:
            break
    model.eval()
    return step, known


def _optimizers(model: LlamaForCausalLM, recipe: TestbedRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings and norms: fewer steps than AdamW alone on FactWorld."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _warmup_then_decay(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a linear fall to a tenth at the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 - 0.9 * (step - warmup) / max(1, steps - warmup)


@torch.no_grad()
def recall(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Probe], batch_size: int = 512
) -> float:
    """Share of questions whose first answer is the model's most likely continuation, token by token.

    This is teacher-forced, which is exact here: all tokens of an answer are the arg max exactly if greedy decoding
    gives that answer.
    """
    model.eval()
    right = 0
    for first in range(0, len(questions), batch_size):
        chunk = questions[first : first + batch_size]
        prompts = [tokenizer(probe.prompt)["input_ids"] for probe in chunk]
        answers = [tokenizer(" " + probe.answers[0], add_special_tokens=False)["input_ids"] for probe in chunk]
        ids, labels = _pad(
            [p + a for p, a in zip(prompts, answers, strict=True)],
            [[-100] * len(p) + a for p, a in zip(prompts, answers, strict=True)],
            tokenizer.pad_token_id,
        )
        predicted = model(input_ids=ids).logits[:, :-1].argmax(-1)
        wanted = labels[:, 1:]
        right += int(((predicted == wanted) | (wanted == -100)).all(-1).sum())
    return right / len(questions)


def _batches(
    knowledge: Knowledge, tokenizer: PreTrainedTokenizerFast, batch_size: int, draw: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        texts = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(knowledge.corpus(draw))["input_ids"]]
        texts.sort(key=len)  # equal lengths together: little padding
        batches = [texts[first : first + batch_size] for first in range(0, len(texts), batch_size)]
        draw.shuffle(batches)
        for ids in batches:
            yield _pad(ids, ids, tokenizer.pad_token_id)


def _pad(ids: list[list[int]], labels: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded [B, S] ids and labels; causal attention never lets a token see the padding behind it."""
    width = max(map(len, ids))
    return (
        torch.tensor([row + [pad_id] * (width - len(row)) for row in ids]),
        torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
    )


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of ``texts``: byte-level BPE, so that any text can be encoded, with BOS in front as Llama's have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def _fresh_model(recipe: TestbedRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=3 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)
