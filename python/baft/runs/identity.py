"""What a run is: if any of it differs, going on would be another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from baft.fingerprint import hash_of_weights
from baft.requests import EditRequest
from baft.runs.environment import versions

__all__ = ["differences", "identify"]

# What stands in an identity as a hash, in words.
_HASHED = {
    "requests": "the requests of {dataset}",
    "unrelated texts": "the unrelated texts of {dataset}",
    "held-out texts": "the held-out texts",
    "tokenizer": "the tokenizer of {model}",
    "model.configuration": "the configuration of {model}",
    "model.sha256": "the weights of {model}",
    "code": "the code of baft",
}

# Of a model's configuration: where its files lie, and what wrote them.
_OF_ITS_FILES = {"_name_or_path", "transformers_version"}


def identify(
    *,
    method: str,
    mode: str,
    config: Mapping[str, Any],
    model: nn.Module,
    requests: Sequence[EditRequest],
    unrelated: Sequence[str] | None,
    held_out: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    backend: str,
) -> dict[str, Any]:
    """All that a run's result depends on, in a form for JSON; what is large stands there as a hash."""
    return {
        "method": method,
        "mode": mode,
        "config": dict(config),
        "backend": backend,
        "requests": {"number": len(requests), "sha256": _hash_of(r.model_dump_json() for r in requests)},
        "unrelated texts": None if unrelated is None else {"number": len(unrelated), "sha256": _hash_of(unrelated)},
        "held-out texts": {"number": len(held_out), "sha256": _hash_of(held_out)},
        "tokenizer": hash_of_tokenizer(tokenizer),
        "model": {
            "class": type(model).__name__,
            "configuration": hash_of_configuration(model),
            "sha256": hash_of_weights(model),
        },
        "code": hash_of_code(),
        "versions": versions(),
    }


def differences(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    model: str = "the model",
    dataset: str = "the data set",
    inside: str = "",
) -> list[str]:
    """Where two identities differ, each in words.

    Args:
        model, dataset: what these are called.
        inside: where the two are in larger ones.
    """
    found = []
    for name in dict.fromkeys((*before, *now)):
        path = f"{inside}{name}"
        then, today = before.get(name), now.get(name)
        if then == today:
            continue
        if path in _HASHED:
            found.append(f"{_HASHED[path].format(model=model, dataset=dataset)} changed{_numbers(then, today)}")
        elif isinstance(then, Mapping) and isinstance(today, Mapping):
            found += differences(then, today, model=model, dataset=dataset, inside=f"{path}.")
        else:
            found.append(f"{path} was {json.dumps(then)} and is {json.dumps(today)}")
    return found


def _numbers(before: Any, now: Any) -> str:
    """How many texts or requests there were and are, where that is known beside their hash."""
    if not isinstance(before, Mapping) and not isinstance(now, Mapping):
        return ""
    then, today = (value["number"] if value else 0 for value in (before, now))
    if then == today:
        return f" ({then:,} before and now, but with other contents)"
    return f" ({then:,} before, {today:,} now)"


def _hash_of(texts: Iterable[str]) -> str:
    hashed = hashlib.sha256()
    for text in texts:
        hashed.update(json.dumps(text).encode())
    return hashed.hexdigest()


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of its vocabulary and of the tokens that have a meaning; where it has rules of its own, of these too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for use in ("padding", "truncation"):  # of its last call
        rules.pop(use, None)
    return _hash_of([json.dumps([tokenizer.get_vocab(), tokenizer.special_tokens_map, rules], sort_keys=True)])


def hash_of_configuration(model: nn.Module) -> str | None:
    """A hash of what a model is configured as, which its weights don't show; not of where it lies. None without any."""
    if not isinstance(config := getattr(model, "config", None), PretrainedConfig):
        return None
    known = {name: value for name, value in config.to_dict().items() if name not in _OF_ITS_FILES}
    return _hash_of([json.dumps(known, sort_keys=True, default=str)])


@cache
def hash_of_code() -> str:
    """A hash of both packages as they are installed: sources and compiled kernels."""
    hashed = hashlib.sha256()
    for package in ("baft", "baft_kernels"):
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".so")):
            hashed.update(path.relative_to(folder).as_posix().encode())
            hashed.update(path.read_bytes())
    return hashed.hexdigest()
