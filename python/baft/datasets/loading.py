"""``load_dataset``: from a path or a name to edit requests."""

from __future__ import annotations

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

__all__ = ["NAMED_DATASETS", "load_dataset"]


def _requests_of(world: Callable[[], FactWorld], limit: int | None) -> list[EditRequest]:
    return world().requests(limit)


NAMED_DATASETS: dict[str, Callable[[int | None], list[EditRequest]]] = {
    name: partial(_requests_of, world) for name, world in WORLDS.items()
}
"""Data sets that need no file, by name; each is called with ``limit``."""


def load_dataset(source: str | Path, *, limit: int | None = None) -> list[EditRequest]:
    """Load a benchmark as edit requests.

    The format is recognised by the fields of the records (:data:`baft.datasets.formats.FORMATS`), never by the file's
    name. Nothing is downloaded.

    Args:
        source: a JSON file (one list of objects, or JSON Lines) in any of the known formats, or the name of a data set
            that needs no file. A name comes first; write ``./name`` for a file that is called like one.
        limit: load only this many records, the first ones. An MQuAKE record holds several edits, which only make sense
            together; elsewhere one record is one edit.

    Raises:
        DatasetError: the source can't be used; the message is one line and says which record and field are to blame.
    """
    if limit is not None and limit < 1:
        raise DatasetError(f"limit: expected a positive number of records or None, got {limit}")
    if isinstance(source, str) and source in NAMED_DATASETS:
        return NAMED_DATASETS[source](limit)
    path = Path(source)
    if not path.exists():
        names = ", ".join(sorted(NAMED_DATASETS)) or "none"
        raise DatasetError(f"{source}: expected a file or the name of a data set ({names}), found neither")
    return _convert(path, read_records(path)[:limit])


def _convert(path: Path, records: list[Any]) -> list[EditRequest]:
    requests: list[EditRequest] = []
    file_format: Format | None = None
    for index, record in enumerate(records):
        with _blaming(f"{path}: record {index}", record):
            record_format = recognise(record)
            file_format = file_format or record_format
            if record_format is not file_format:
                raise DatasetError(
                    f"has the fields of {record_format.name}, but record 0 has those of {file_format.name}:"
                    " expected one format in a file"
                )
            requests += record_format.convert(Fields(record))
    return requests


@contextmanager
def _blaming(where: str, record: Any) -> Iterator[None]:
    """Put the record in front of any error about it, on one line."""
    try:
        yield
    except (DatasetError, ValidationError) as error:
        identifier = Fields(record).id if isinstance(record, Mapping) else None
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
