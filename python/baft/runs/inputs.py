"""From the words on a command line to a model, requests, and a configuration."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from baft.config import BaftConfig
from baft.datasets.factworld import WORLDS
from baft.datasets.loading import load_with_rest
from baft.distributed import ALONE, World
from baft.evaluation.probes import old_answers, questions
from baft.requests import EditRequest
from baft.runs.placed import default_device, placement
from baft.testbed.folder import RECIPES, factworld_folder, without_progress_bars
from baft.testbed.training import OnProgress

__all__ = ["Assignment", "load_assignment", "load_config", "load_held_out", "load_model"]

# A long run draws hundreds of thousands of unrelated texts, so it matters that they aren't always the same few. Of more
# than this the engine could no longer keep the states that it replays, at the width of a model of billions. A FactWorld
# has as many as it has: its models are small.
_POOL = 1 << 12
# Texts that general ability is measured on, at most.
_HELD_OUT = 200


@dataclass(frozen=True)
class Assignment:
    """What is to be edited, and texts that shall stay as they are.

    Attributes:
        requests: to be edited, in this order.
        unrelated: what training looks at, to leave alone, as far as there is any; None for nothing.
        held_out: what no training looks at, for general ability.
    """

    requests: list[EditRequest]
    unrelated: list[str] | None
    held_out: list[str]


def load_model(
    name: str,
    *,
    device_map: str | None = None,
    tensor_parallel: bool = False,
    quantise: str | None = None,
    on_training: OnProgress | None = None,
    world: World = ALONE,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: a folder, a Hugging Face name, or a FactWorld's, whose model is trained at its first use.
        device_map: spread it over the devices, with what doesn't fit in memory and on disk ("auto", or another that
            transformers knows); by default it is on one.
        tensor_parallel: spread each of its matrices over the processes that torchrun started, by the model's own plan.
        quantise: make its weights small while loading (``baft.runs.placed.QUANTISATIONS``); they stay so.
        on_training: is told how the training of a FactWorld's model goes.
        world: processes that each load it; one trains a FactWorld's model.

    Raises:
        ValueError: if it can't be loaded, or something for it isn't installed.
    """
    source = name
    if name in WORLDS:
        with world.one_first():
            source = str(factworld_folder(WORLDS[name](), RECIPES[name], on_progress=on_training))
    with _blaming(name):
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
    options = placement(config, device_map, tensor_parallel, quantise)
    with _blaming(name), without_progress_bars() if name in WORLDS else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", **options)
    if not options:
        model.to(default_device())  # type: ignore[arg-type]  # transformers' decorator hides its signature
    return model.eval(), tokenizer


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Name the model in what goes wrong with its files, or for want of a library that they need."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model: expected a folder, a Hugging Face name or one of {', '.join(WORLDS)}, got {name!r} ({reason})"
        ) from error


def load_assignment(dataset: str, edits: int | None, seed: int) -> Assignment:
    """Choose ``edits`` requests of a data set, and unrelated texts from what is left.

    The order of the requests is drawn from ``seed``; those of one prompt come among themselves as the data set has
    them, so that of two that contradict each other the one that stands later there is also the later one here.
    Unrelated texts are the prompts, and the locality prompts, of records that aren't edited, each with its old answer,
    less every prompt that an edited record is measured with. Held-out texts are what other such records say: prompts
    alone where none has an old answer. Of a file of which only a stretch is named, all records of the rest are such
    records. A FactWorld has people set apart for each, and strangers.

    Raises:
        ValueError: if the data set has fewer records than ``edits``.
    """
    requests, others = load_with_rest(dataset)
    edits = len(requests) if edits is None else edits
    if not 1 <= edits <= len(requests):
        raise ValueError(f"edits: expected 1 to {len(requests)}, the requests in {dataset}, got {edits}")
    draw = random.Random(seed)
    order = list(range(len(requests)))
    draw.shuffle(order)
    chosen = _in_turn(order[:edits], requests)
    rest = [requests[index] for index in order[edits:]]
    if dataset in WORLDS:
        world = WORLDS[dataset]()
        pool, held_out = list(world.unrelated()), world.held_out()
    else:
        measured = {question.prompt for request in chosen for question in questions(request)}
        # Texts are held out of the requests themselves, as far as these go, since a model that is made to know a
        # stretch of a file knows nothing of the others; and of few records not all.
        draw.shuffle(others)
        rest = others + rest
        unasked = [r for r in rest if r.prompt not in measured]
        # A prompt says less of a model than what follows it, but a data set may know no more.
        unasked = [r for r in unasked if old_answers(r)] or unasked
        apart = unasked[-min(_HELD_OUT, len(unasked) // 2) :] if len(unasked) > 1 else []
        held_out = [_sentence(request.prompt, old_answers(request)) for request in apart]
        measured |= {request.prompt for request in apart}
        said = (pair for request in rest for pair in _statements(request))
        pool = [sentence for prompt, sentence in said if prompt not in measured]
        draw.shuffle(pool)
        pool = pool[:_POOL]
    return Assignment(chosen, pool or None, held_out[:_HELD_OUT])


def _in_turn(order: Sequence[int], requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Requests in an order, but those of one prompt take the places that these have in it as they follow each other."""
    places: dict[str, list[int]] = {}
    for index in order:
        places.setdefault(requests[index].prompt, []).append(index)
    turns = {prompt: iter(sorted(indices)) for prompt, indices in places.items()}
    return [requests[next(turns[requests[index].prompt])] for index in order]


def _statements(request: EditRequest) -> Iterator[tuple[str, str]]:
    """What a record says of the world as it was: prompts, and sentences of them and their answers where it knows them.

    A sentence holds how an answer goes on and ends, which a prompt leaves open.
    """
    yield request.prompt, _sentence(request.prompt, old_answers(request))
    for probes in request.locality.values():
        for probe in probes:
            yield probe.prompt, _sentence(probe.prompt, probe.answers)


def _sentence(prompt: str, answers: Sequence[str]) -> str:
    return f"{prompt} {answers[0]}." if answers else prompt


def load_held_out(path: Path) -> list[str]:
    """The lines of a text file that aren't blank.

    Raises:
        ValueError: if there are none, or the file can't be read.
    """
    try:
        texts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"held-out: expected a text file, got {path} ({error})") from error
    if not texts:
        raise ValueError(f"held-out: expected a text a line, got {path}, in which there are none")
    return texts


def load_config(path: Path | None, **overrides: Any) -> BaftConfig:
    """A configuration from a YAML file (or the defaults), with those ``overrides`` that aren't None.

    Raises:
        ValueError: for a file that isn't YAML, or a field that doesn't exist or fit, in one line.
    """
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"config: expected a YAML file, got {path} ({' '.join(str(error).split())})") from error
        if not isinstance(values, dict):
            raise ValueError(f"config: expected a mapping in {path}, got {type(values).__name__}")
    values |= {name: value for name, value in overrides.items() if value is not None}
    try:
        return BaftConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ValueError(f"config: {field}: {first['msg']}, got {first['input']!r}") from error
