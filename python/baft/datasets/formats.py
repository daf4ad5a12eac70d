"""The table of the known formats, and how the format of a record is recognised by its fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from baft.datasets import converters
from baft.datasets.errors import DatasetError, describe
from baft.datasets.fields import Fields
from baft.requests import EditRequest

__all__ = ["FORMATS", "Format", "recognise"]

# How alike a field's name and a known one are where it is a misspelt one: 1 is the same. "rephrase" and "rephrases" are
# at 0.94, "subject_id" and "subject", of which the first may be anything, at 0.82.
_MISSPELT = 0.85

_TYPE_NAMES: dict[type, str] = {dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Format:
    """A format, recognised by the fields that its records can't do without.

    Attributes:
        name: what users call it.
        required: these fields, and the type of the one whose name alone is ambiguous (else ``object``: any).
        optional: its other fields; they tell which format a broken record was meant to be in.
        convert: turns a record into edit requests.
        foreign: another format's fields, which tell a record that has the required ones of both.
        own: fields that this one alone has of the two: with any of them a record is in it.
        written_by_hand: the fields of records that people write themselves: what is nearly called so is misspelt. None
            where records come from elsewhere, with whatever else they have.
    """

    name: str
    required: Mapping[str, type]
    optional: AbstractSet[str]
    convert: Callable[[Fields], list[EditRequest]]
    foreign: AbstractSet[str] = frozenset()
    own: AbstractSet[str] = frozenset()
    written_by_hand: AbstractSet[str] = frozenset()

    def problem(self, record: Mapping[str, Any]) -> str | None:
        """What is wrong with the first required field that is not as it should be; None if the record fits."""
        if (foreign := record.keys() & self.foreign) and not record.keys() & self.own:
            return f"field '{min(foreign)}' is not one of its fields"
        for field, kind in self.required.items():
            if field not in record:
                return f"field '{field}' is missing"
            if not isinstance(record[field], kind):
                return f"field '{field}': expected {_TYPE_NAMES[kind]}, got {describe(record[field])}"
        return None

    def likeness(self, record: Mapping[str, Any]) -> int:
        """How many of this format's fields the record has."""
        return len(record.keys() & self.fields)

    @property
    def fields(self) -> AbstractSet[str]:
        """All of its fields."""
        return self.required.keys() | self.optional

    def check_names(self, record: Mapping[str, Any]) -> None:
        """Make sure that no field is misspelt, and passed over for that.

        Raises:
            DatasetError: if one is nearly called like a known one that the record doesn't have.
        """
        missing = sorted(self.written_by_hand - record.keys())
        for name in sorted(record.keys() - self.fields):
            for meant in get_close_matches(name.casefold(), missing, 1, _MISSPELT):
                raise DatasetError(f"expected the field '{meant}', got '{name}', which nothing reads")


# What tells our own records from QAEdit's.
_OWN = EditRequest.model_fields.keys()
_QAEDIT = {"prompt", "target", "id", "source", "subject", "rephrase", "locality"}


FORMATS = (
    Format(
        "ZsRE",
        required={"src": object, "alt": object},
        optional={"subject", "pred", "rephrase", "answers", "loc", "loc_ans", "cond", "portability"},
        convert=converters.zsre,
    ),
    Format(
        "CounterFact",
        required={"requested_rewrite": dict},
        optional={"case_id", "paraphrase_prompts", "neighborhood_prompts", "attribute_prompts", "generation_prompts"},
        convert=converters.counterfact,
    ),
    Format(
        "MQuAKE",
        required={"requested_rewrite": list},
        optional={"case_id", "questions", "new_answer", "new_answer_alias", "single_hops", "new_single_hops", "orig"},
        convert=converters.mquake,
    ),
    Format(
        "WikiBio",
        required={"text": object, "labels": object, "concept": object},
        optional={"locality"},
        convert=converters.wikibio,
    ),
    Format(
        "ConvSent",
        required={"ent": object, "pos": list, "neg": list},
        optional=frozenset(),
        convert=converters.convsent,
    ),
    Format(
        "WikiBigEdit",
        required={"update": object, "ans": object},
        optional={"subject", "rephrase", "personas", "mhop", "mhop_ans", "loc", "loc_ans"},
        convert=converters.wikibigedit,
    ),
    Format(
        "EditRequest",
        required={"prompt": object, "target": object},
        optional=_OWN - {"prompt", "target"},
        convert=converters.own,
        foreign=_QAEDIT - _OWN,
        own=_OWN - _QAEDIT,
        written_by_hand=_OWN,
    ),
    Format(
        "QAEdit",
        required={"prompt": object, "target": object},
        optional=_QAEDIT - {"prompt", "target"},
        convert=converters.qaedit,
        written_by_hand=_OWN | _QAEDIT,
    ),
    Format(
        "EasyEdit (flat CounterFact and WikiBigEdit, KnowEdit, WISE)",
        required={"prompt": object, "target_new": object},
        optional={
            *("case_id", "subject", "ground_truth", "rephrase_prompt", "rephrase", "ood_rephrase", "cond"),
            *("locality_prompt", "locality_ground_truth", "locality", "portability"),
        },
        convert=converters.easyedit,
    ),
)
"""Every known format. Only a record with the required fields of two fits two; the first of them is then meant."""


def recognise(record: Any) -> Format:
    """Tell the format of a record by its fields.

    Raises:
        DatasetError: the record is in no known format; the message names the nearest one and what it lacks for that. Or
            it has a misspelt field.
    """
    if not isinstance(record, Mapping):
        raise DatasetError(f"expected an object, got {describe(record)}")
    for known in FORMATS:
        if known.problem(record) is None:
            known.check_names(record)
            return known
    nearest = max(FORMATS, key=lambda known: known.likeness(record))
    if nearest.likeness(record):
        raise DatasetError(f"fits no known format; in the nearest, {nearest.name}, {nearest.problem(record)}")
    needs = "; ".join(f"{known.name}: {', '.join(known.required)}" for known in FORMATS)
    raise DatasetError(f"fits no known format; expected the fields of one of ({needs}), got {describe(sorted(record))}")
