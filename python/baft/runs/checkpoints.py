"""An editor's state on disk, now and then: where a run goes on, and how it gets back to an earlier request.

    checkpoints/000000120/checkpoint.json      what its other file must be like
    checkpoints/000000120/state.safetensors    ``editor.state()`` after 120 edits

Those of a run's settling rounds are counted on behind its last edit.

A checkpoint appears whole or not at all, and goes likewise. Between two of them nothing is lost: editing again from
the earlier one gives the same bits. One that is found damaged is set aside, as ``000000120.damaged``, until the run has
come as far again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from baft.storage import naming

__all__ = ["Checkpoint", "Checkpoints", "kept"]

STATE, DESCRIPTION = "state.safetensors", "checkpoint.json"
DAMAGED = ".damaged"
FORMAT = 2

# Writing takes about a hundredth of the run.
_WORK_PER_WRITE = 100


@dataclass(frozen=True)
class Checkpoint:
    """A state of the editor.

    Attributes:
        done: after so many edits and settling rounds.
        state: the editor's.
    """

    done: int
    state: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they are.
        every: edits, or rounds, between two; None writes them as often as costs next to nothing.

    Attributes:
        damaged: what was found damaged, in words.
    """

    def __init__(self, folder: Path, every: int | None = None) -> None:
        self.folder = folder
        self.damaged: list[str] = []
        if folder.is_dir():  # what a killed process left half written, or half removed
            for path in folder.glob(".*"):
                shutil.rmtree(path, ignore_errors=True)
        self._every = every
        self._last_done = max(self.counts(), default=0)
        self._last_written = time.monotonic()
        self._cost = 0.0

    def counts(self) -> list[int]:
        """After how many edits and rounds there is one, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def due(self, done: int) -> bool:
        """Whether it is time to write one, after so many edits and rounds."""
        if self._every is not None:
            return done - self._last_done >= self._every
        return time.monotonic() - self._last_written >= _WORK_PER_WRITE * self._cost

    def write(self, done: int, state: Mapping[str, Tensor]) -> None:
        """Write one, and remove those that are too many, and damaged ones of no more edits and rounds.

        Raises:
            OSError: if it can't be written; those that are there stay.
        """
        began = time.monotonic()
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
        description = {"format": FORMAT, "done": done, "sha256": hashlib.sha256(content).hexdigest()}
        self.folder.mkdir(exist_ok=True)
        beside, place = self.folder / f".{done}.{os.getpid()}", self._place(done)
        try:
            with naming(place):
                beside.mkdir()
                _write_through(beside / STATE, content)
                _write_through(beside / DESCRIPTION, (json.dumps(description) + "\n").encode())
                _put(beside, place)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        counts = self.counts()
        for count in set(counts) - kept(counts):
            _remove(self._place(count))
        for path, count in self._set_aside():
            if count <= done:
                _remove(path)
        self._last_done = done
        self._last_written = time.monotonic()
        self._cost = self._last_written - began

    def newest(self, at_most: int) -> Checkpoint | None:
        """The newest whole one of no more than ``at_most`` edits and rounds; newer ones that are damaged are set aside,
        and named in ``damaged``.

        Raises:
            OSError: if one can't be read, which says nothing of what is in it.
        """
        for done in reversed([count for count in self.counts() if count <= at_most]):
            try:
                return Checkpoint(done, self._read(done))
            except ValueError as error:
                self.damaged.append(str(error))
                place = self._place(done)
                aside = place.with_suffix(DAMAGED)
                _remove(aside)
                place.rename(aside)
        return None

    def cut(self, done: int) -> None:
        """Remove those of more, damaged ones too."""
        for path, count in [*((self._place(count), count) for count in self.counts()), *self._set_aside()]:
            if count > done:
                _remove(path)
        self._last_done = min(self._last_done, done)

    def _set_aside(self) -> list[tuple[Path, int]]:
        """Those that were found damaged, and after how many edits and rounds they were written."""
        return [(path, int(path.stem)) for path in self.folder.glob(f"*{DAMAGED}") if path.stem.isdigit()]

    def _place(self, done: int) -> Path:
        return self.folder / f"{done:09d}"

    def _read(self, done: int) -> dict[str, Tensor]:
        place = self._place(done)
        try:
            content = (place / STATE).read_bytes()
            _check(content, (place / DESCRIPTION).read_bytes(), done)
            return load(content)
        except FileNotFoundError as error:
            raise ValueError(f"checkpoint {place} is damaged: it has no {Path(error.filename).name}") from error
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"checkpoint {place} is damaged: {error}") from error
        except OSError as error:
            raise OSError(f"checkpoint {place} can't be read: {error}; nothing was changed") from error


def _check(content: bytes, described: bytes, done: int) -> None:
    """Make sure that a state is the one of ``done`` edits and rounds that was written with its description."""
    try:
        description = dict(json.loads(described))
    except (TypeError, ValueError):
        raise ValueError(f"{DESCRIPTION} describes nothing") from None
    if description.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT} in {DESCRIPTION}, got {description.get('format')!r}")
    if description.get("done") != done:
        raise ValueError(f"{DESCRIPTION} is that of another one, after {description.get('done')} edits and rounds")
    if description.get("sha256") != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{STATE} isn't what was written: it has another sum than in {DESCRIPTION}")


def kept(counts: list[int]) -> set[int]:
    """Which checkpoints to keep of those after ``counts`` edits and rounds, in order.

    The newest two, and of those before, the oldest and the newest of each age: 1, 2 or 3, 4 to 7, ... of them. So their
    number grows with the logarithm of the run, and going back costs at most about as much as was edited since.
    """
    newest = counts[-1]
    by_age: dict[int, list[int]] = {}
    for count in counts:
        by_age.setdefault((newest - count).bit_length(), []).append(count)
    return {*counts[-2:], *(ages[0] for ages in by_age.values()), *(ages[-1] for ages in by_age.values())}


def _remove(place: Path) -> None:
    """Remove a checkpoint, if it is there; under another name first, lest a kill leave half of one."""
    if hidden := _hide(place):
        shutil.rmtree(hidden)


def _put(new: Path, place: Path) -> None:
    """Put a checkpoint where it belongs; one that is there is removed only then, lest a kill leave neither."""
    hidden = _hide(place)
    try:
        new.rename(place)
    except BaseException:  # an interrupt too
        if hidden and not place.exists():
            hidden.rename(place)
        raise
    _sync_folder(place.parent)
    if hidden:
        shutil.rmtree(hidden)


def _hide(place: Path) -> Path | None:
    """Rename a checkpoint to what is removed at the next start; None if there is none."""
    if not place.exists():
        return None
    hidden = place.with_name(f".{place.name}")
    place.rename(hidden)
    return hidden


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make sure of the names in a folder too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
