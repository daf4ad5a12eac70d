"""Reading the fields of a record: clean texts from whatever benchmarks put there, or an error that names the field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from baft.datasets.errors import MISSING, DatasetError, describe

__all__ = ["Fields"]


@dataclass(frozen=True)
class Fields:
    """One JSON object of a record, and its path in the record for errors.

    Texts come out stripped: benchmarks have trailing spaces in prompts and targets, and whoever joins a prompt and its
    target must know that no space is there yet. Null, blank, empty and absent are the same: nothing.

    Attributes:
        number: the record's place in its file, from 0.
    """

    values: Mapping[str, Any]
    path: str = ""
    number: int = 0

    @property
    def own_id(self) -> str | None:
        """The record's own identifier, under either of the names that benchmarks use."""
        for name in ("case_id", "id"):
            value = self.values.get(name)
            if isinstance(value, str | int) and (text := str(value).strip()):
                return text
        return None

    @property
    def id(self) -> str:
        """What the record is found again by: its own identifier, or else its place in the file, as ``record-17``."""
        return self.own_id or f"record-{self.number}"

    def texts(self, *names: str) -> tuple[str, ...]:
        """Every text under these fields, in order: a field holds a text, a number, or lists of them, nested at will."""
        return tuple(text for name in names for text in self._flatten(name, self.values.get(name)))

    def required_texts(self, name: str) -> tuple[str, ...]:
        """As :meth:`texts`, for a field that must hold at least one."""
        texts = self.texts(name)
        if not texts:
            raise self.error(name, "a text that is not empty")
        return texts

    def text(self, name: str) -> str | None:
        """The one text of a field, or None."""
        texts = self.texts(name)
        if len(texts) > 1:
            raise self.error(name, "one text")
        return texts[0] if texts else None

    def required_text(self, name: str) -> str:
        """As :meth:`text`, for a field that must hold it."""
        text = self.text(name)
        if text is None:
            raise self.error(name, "a text that is not empty")
        return text

    def child(self, name: str) -> Fields:
        """The object under a field; one without fields when there is none."""
        value = self.values.get(name) or {}
        if not isinstance(value, Mapping):
            raise self.error(name, "an object")
        return Fields(value, f"{self.path}{name}.")

    def children(self, name: str) -> list[Fields]:
        """The list of objects under a field; empty when there is none."""
        value = self.values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise self.error(name, "a list of objects")
        return [Fields(item, f"{self.path}{name}[{index}].") for index, item in enumerate(value)]

    def error(self, name: str, expected: str) -> DatasetError:
        """The error of a field that does not hold what it should."""
        got = describe(self.values.get(name, MISSING))
        return DatasetError(f"field '{self.path}{name}': expected {expected}, got {got}")

    def _flatten(self, name: str, value: Any) -> Iterator[str]:
        if isinstance(value, list):
            for item in value:
                yield from self._flatten(name, item)
        elif isinstance(value, str):
            if stripped := value.strip():
                yield stripped
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield str(value)
        elif value is not None:
            raise self.error(name, "text")
