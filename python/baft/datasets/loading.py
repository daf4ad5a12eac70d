"""``load_dataset``: from a path or a name to edit requests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from baft.datasets.errors import DatasetError, describe
from baft.datasets.factworld import WORLDS, FactWorld
from baft.datasets.fields import Fields
from baft.datasets.files import read_records
from baft.datasets.formats import Format, recognise
from baft.requests import EditRequest

__all__ = ["NAMED_DATASETS", "load_dataset", "load_with_rest", "split_stretch"]


def _requests_of(world: Callable[[], FactWorld]) -> list[EditRequest]:
    return world().requests()


NAMED_DATASETS: dict[str, Callable[[], list[EditRequest]]] = {
    name: partial(_requests_of, world) for name, world in WORLDS.items()
}
"""Data sets that need no file, by name."""

# A stretch of a file's records, as Python and Hugging Face's datasets write one: facts.json[:300], facts.json[300:].
_STRETCH = re.compile(r"(?P<path>.+)\[(?P<first>\d*):(?P<end>\d*)\]", re.DOTALL)


def load_dataset(source: str | Path) -> list[EditRequest]:
    """Load a benchmark as edit requests.

    The format is recognised by the fields of the records (:data:`baft.datasets.formats.FORMATS`), never by the file's
    name. Nothing is downloaded.

    Args:
        source: a JSON file (one list of objects, or JSON Lines) in any of the known formats, or the name of a data set
            that needs no file. A name comes first; write ``./name`` for a file that is called like one. ``FILE[:N]`` is
            the file's first N records, ``FILE[M:N]`` and ``FILE[M:]`` are others; it has to have them. An MQuAKE record
            holds several edits, which only make sense together; elsewhere one record is one edit.

    Raises:
        DatasetError: the source can't be used; the message is one line and says which record and field are to blame.
    """
    if isinstance(source, str) and source in NAMED_DATASETS:
        return NAMED_DATASETS[source]()
    path, records, first, end = _stretch(source)
    return _convert(path, records, first, end)


def load_with_rest(source: str | Path) -> tuple[list[EditRequest], list[EditRequest]]:
    """What ``load_dataset`` loads, and the requests of the file's other records, if ``source`` is a stretch of one.

    Raises:
        DatasetError: as ``load_dataset`` does, of every record.
    """
    if isinstance(source, str) and source in NAMED_DATASETS:
        return NAMED_DATASETS[source](), []
    path, records, first, end = _stretch(source)
    rest = _convert(path, records, 0, first) + _convert(path, records, end, len(records))
    return _convert(path, records, first, end), rest


def split_stretch(source: str | Path) -> tuple[Path, int, int | None]:
    """``FILE[M:N]`` as the file, M and N: 0 and None where they aren't said, or ``source`` is a file itself."""
    found = _STRETCH.fullmatch(str(source))
    if found is None or Path(source).exists():
        return Path(source), 0, None
    return Path(found["path"]), int(found["first"] or 0), int(found["end"]) if found["end"] else None


def _stretch(source: str | Path) -> tuple[Path, list[Any], int, int]:
    """A file, its records, and which of them are meant."""
    path, first, end = split_stretch(source)
    if not path.exists():
        names = ", ".join(sorted(NAMED_DATASETS)) or "none"
        raise DatasetError(
            f"{source}: expected a file, a stretch of one (FILE[:300]) or the name of a data set ({names}), found none"
        )
    records = read_records(path)
    end = len(records) if end is None else end
    if not first < end <= len(records):
        raise DatasetError(f"{source}: expected a stretch of the file's {len(records)} records, got {first} to {end}")
    return path, records, first, end


def _convert(path: Path, records: list[Any], first: int, end: int) -> list[EditRequest]:
    """Requests of a file's records from ``first`` up to ``end``."""
    requests: list[EditRequest] = []
    file_format: Format | None = None
    for index, record in enumerate(records[first:end], first):
        with _blaming(f"{path}: record {index}", record):
            record_format = recognise(record)
            file_format = file_format or record_format
            if record_format is not file_format:
                raise DatasetError(
                    f"has the fields of {record_format.name}, but record {first} has those of {file_format.name}:"
                    " expected one format in a file"
                )
            requests += record_format.convert(Fields(record, number=index))
    return requests


@contextmanager
def _blaming(where: str, record: Any) -> Iterator[None]:
    """Put the record in front of any error about it, on one line."""
    try:
        yield
    except (DatasetError, ValidationError) as error:
        identifier = Fields(record).own_id if isinstance(record, Mapping) else None
        where = f"{where} (id {identifier})" if identifier else where
        problem = _first_problem(error) if isinstance(error, ValidationError) else error
        raise DatasetError(f"{where}: {problem}") from None  # all of it is in the one line


def _first_problem(error: ValidationError) -> str:
    """Say in one line what pydantic says in many.

    ``Fields`` hands over nothing but clean texts, so little is left for pydantic to refuse (half of a surrogate pair).
    """
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    return f"{error.title}.{place}: {problem['msg']}, got {describe(problem['input'])}"
