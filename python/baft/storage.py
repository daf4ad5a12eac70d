"""An editor's folder: what is in it, written so that a full disk leaves the old one, read without executing anything.

    adapter_config.json          what it is: method, width, layers, configuration without its backend, base model and
                                 what that is known by
    adapter_model.safetensors    the interventions' parameters
    training_state.safetensors   what continuing needs: optimiser moments, gate usage, random generator
    edits.json                   the requests that are edited in, and the unrelated texts

The first two names are peft's. Only safetensors and JSON are ever read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from baft.config import BaftConfig
from baft.fingerprint import Fingerprint
from baft.requests import EditRequest

__all__ = ["SavedEditor", "atomic_write", "load_editor", "naming", "save_editor"]

CONFIG, PARAMETERS = "adapter_config.json", "adapter_model.safetensors"
TRAINING_STATE, EDITS = "training_state.safetensors", "edits.json"
FORMAT = 1


@dataclass(frozen=True)
class SavedEditor:
    """All that a folder holds; ``width`` is that of the hidden vectors it was made for.

    ``fingerprint`` is the base model's, None in a folder of an older version.
    """

    config: BaftConfig
    width: int
    layers: tuple[int, ...]
    parameters: dict[str, Tensor]
    training_state: dict[str, Tensor]
    edits: list[EditRequest]
    unrelated: list[str] | None
    base_model: str
    fingerprint: Fingerprint | None = None


def save_editor(folder: str | Path, saved: SavedEditor) -> None:
    """Write ``saved`` into ``folder``, which is made if need be; each file is replaced in one step.

    Raises:
        OSError: if it can't be written (a full disk, say); the files that were there before are then as they were.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "peft_type": "BAFT",
        "format": FORMAT,
        "base_model_name_or_path": saved.base_model,
        "fingerprint": saved.fingerprint and saved.fingerprint.model_dump(mode="json"),
        "width": saved.width,
        "layers": saved.layers,
        "baft": saved.config.model_dump(mode="json", exclude={"backend"}),
    }
    edits = {"edits": [request.model_dump(mode="json") for request in saved.edits], "unrelated": saved.unrelated}
    _replace_files(
        {
            folder / PARAMETERS: lambda path: path.write_bytes(_as_safetensors(saved.parameters)),
            folder / TRAINING_STATE: lambda path: path.write_bytes(_as_safetensors(saved.training_state)),
            folder / EDITS: lambda path: path.write_text(json.dumps(edits, ensure_ascii=False, indent=1), "utf-8"),
            folder / CONFIG: lambda path: path.write_text(json.dumps(description, indent=2) + "\n", "utf-8"),
        }
    )


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file beside ``path``, then put it in ``path``'s place; an error leaves nothing behind."""
    _replace_files({path: write})


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of writing, which says of a full disk no more than that it is full, name what was written.

    Raises:
        OSError: as it came, and in place of safetensors' own error.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def _replace_files(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """``atomic_write`` for files that belong together: none is put in place before all are on the disk."""
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in writers}
    try:
        for path, write in writers.items():
            with naming(path):
                write(beside[path])
                with beside[path].open("rb+") as file:
                    os.fsync(file.fileno())
        for path, new in beside.items():
            new.replace(path)
    finally:
        for new in beside.values():
            new.unlink(missing_ok=True)


def _as_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    # Not save_file, which tells of a full disk by an error of its own that is no OSError.
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def load_editor(folder: str | Path) -> SavedEditor:
    """Read what ``save_editor`` wrote.

    Raises:
        ValueError: if a file is missing, damaged, or in another format; the message names the file. A folder that has
            pickled weights instead ("adapter_model.bin") is refused: they are never loaded.
    """
    folder = Path(folder)
    description = _read_json(folder / CONFIG)
    if description.get("peft_type") != "BAFT" or description.get("format") != FORMAT:
        got = f"{description.get('peft_type')!r}, format {description.get('format')!r}"
        raise ValueError(
            f"{folder / CONFIG}: expected peft_type 'BAFT', format {FORMAT}, got {got}: other methods' adapters "
            "aren't loaded here"
        )
    history = _read_json(folder / EDITS)
    fingerprint = description.get("fingerprint")
    try:
        return SavedEditor(
            config=BaftConfig(**description["baft"]),
            width=description["width"],
            layers=tuple(description["layers"]),
            parameters=_read_tensors(folder / PARAMETERS),
            training_state=_read_tensors(folder / TRAINING_STATE),
            edits=[EditRequest(**request) for request in history["edits"]],
            unrelated=history["unrelated"],
            base_model=description["base_model_name_or_path"],
            fingerprint=fingerprint and Fingerprint(**fingerprint),
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"{folder}: expected an adapter as save_pretrained writes it, got {error!r}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: expected an adapter's file, found none") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected JSON, got a file that can't be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        pickled = sorted(p.name for p in path.parent.glob("*.bin")) + sorted(p.name for p in path.parent.glob("*.pt"))
        found = f"only {', '.join(pickled)}, and pickled files are never loaded" if pickled else "none"
        raise ValueError(f"{path}: expected a safetensors file, found {found}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a whole safetensors file, got one that can't be read ({error})") from error
