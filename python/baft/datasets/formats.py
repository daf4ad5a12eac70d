"""The table of the known formats, and how the format of a record is recognised by its fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from baft.datasets import converters
from baft.datasets.errors import DatasetError, describe
from baft.datasets.fields import Fields
from baft.requests import EditRequest

__all__ = ["FORMATS", "Format", "recognise"]

_TYPE_NAMES: dict[type, str] = {dict: "an object", list: "a list"}


@dataclass(frozen=True)
class Format:
    """A format, recognised by the fields that its records can't do without.

    Attributes:
        name: what users call it.
        required: these fields, and the type of the one whose name alone is ambiguous (else ``object``: any).
        optional: its other fields; they tell which format a broken record was meant to be in.
        convert: turns a record into edit requests.
        strict: a record with any other field is in another format.
    """

    name: str
    required: Mapping[str, type]
    optional: AbstractSet[str]
    convert: Callable[[Fields], list[EditRequest]]
    strict: bool = False

    def problem(self, record: Mapping[str, Any]) -> str | None:
        """What is wrong with the first required field that is not as it should be; None if the record fits."""
        if self.strict and (foreign := record.keys() - self.required.keys() - self.optional):
            return f"field '{min(foreign)}' is not one of its fields"
        for field, kind in self.required.items():
            if field not in record:
                return f"field '{field}' is missing"
            if not isinstance(record[field], kind):
                return f"field '{field}': expected {_TYPE_NAMES[kind]}, got {describe(record[field])}"
        return None

    def likeness(self, record: Mapping[str, Any]) -> int:
        """How many of this format's fields the record has."""
        return len(record.keys() & (self.required.keys() | self.optional))


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
        optional=EditRequest.model_fields.keys() - {"prompt", "target"},
        convert=converters.own,
        strict=True,
    ),
    Format(
        "QAEdit",
        required={"prompt": object, "target": object},
        optional={"id", "source", "subject", "rephrase", "locality"},
        convert=converters.qaedit,
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
        DatasetError: the record is in no known format; the message names the nearest one and what it lacks for that.
    """
    if not isinstance(record, Mapping):
        raise DatasetError(f"expected an object, got {describe(record)}")
    for known in FORMATS:
        if known.problem(record) is None:
            return known
    nearest = max(FORMATS, key=lambda known: known.likeness(record))
    if nearest.likeness(record):
        raise DatasetError(f"fits no known format; in the nearest, {nearest.name}, {nearest.problem(record)}")
    needs = "; ".join(f"{known.name}: {', '.join(known.required)}" for known in FORMATS)
    raise DatasetError(f"fits no known format; expected the fields of one of ({needs}), got {describe(sorted(record))}")
