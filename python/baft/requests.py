"""What a user asks for: edit requests, and the probes that tell whether an edit did what it should.

Nothing here knows a benchmark's field names (``baft.datasets`` does) or how a probe is scored (``baft.evaluation``
does).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints

__all__ = ["EditRequest", "Probe", "numbered"]

NonEmpty = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


def _as_aliases(value: Any) -> Any:
    """Ground truths come as a string, a list, or a list of lists of aliases: keep every alias, once, in order."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,) if value.strip() else ()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (str(value),)
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        flat = [alias for item in value for alias in _as_aliases(item)]
        return tuple(dict.fromkeys(flat))
    raise ValueError("expected a text, a number, or lists of them")  # pydantic adds what it got


Aliases = Annotated[tuple[NonEmpty, ...], BeforeValidator(_as_aliases)]


class Probe(BaseModel):
    """One question put to the edited model.

    Attributes:
        prompt: the text that the model continues.
        answers: every accepted answer; empty for a locality probe whose only measure is the unedited model's own
            answer.
        group: probes of one request with the same group are one question in several wordings, right if any is right
            (MQuAKE asks each multi-hop question three times).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: NonEmpty
    answers: Aliases = ()
    group: str | None = None


def _as_probe(value: Any) -> Any:
    if isinstance(value, str):
        return Probe(prompt=value)
    if isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[0], str):
        return Probe(prompt=value[0], answers=value[1])
    return value


def _as_probe_groups(value: Any) -> Any:
    """Accept ``{kind: probes}``, or bare probes (kind ``"default"``); a probe may be a text or a pair with answers."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        value = {"default": value}
    groups = {}
    for kind, probes in value.items():
        if isinstance(probes, str | Probe) or (isinstance(probes, Mapping) and "prompt" in probes):
            probes = [probes]
        if not isinstance(probes, Iterable | None) or isinstance(probes, Mapping):
            raise ValueError(f"expected a prompt, a probe, or a list of them as {kind!r}")  # pydantic adds what it got
        groups[kind] = tuple(_as_probe(probe) for probe in probes or ())
    return {kind: probes for kind, probes in groups.items() if probes}


def _blank_as_none(value: Any) -> Any:
    return None if isinstance(value, str) and not value.strip() else value


Subject = Annotated[str | None, BeforeValidator(_blank_as_none)]
ProbeGroups = Annotated[dict[str, tuple[Probe, ...]], BeforeValidator(_as_probe_groups)]


class EditRequest(BaseModel):
    """One fact to change: after the edit, ``prompt`` shall be continued by ``target``.

    Only ``prompt``, ``target`` and ``subject`` are ever trained on; everything else is there to measure.

    Attributes:
        prompt: the text before the fact ("The president of X is").
        target: what the edited model shall say ("Y").
        subject: the entity that the fact is about, as it stands in ``prompt``; needed for ``positions="subject"``.
        target_aliases: other accepted forms of the target.
        ground_truth: what was true before, with all aliases; recorded, never trained on.
        rephrases: other wordings of ``prompt`` that should give the target too (generality).
        locality: probes whose answer must not change, by kind (``{"neighbour": [...]}``); a bare list is one kind.
        portability: probes whose answer should follow from the edit, by kind.
        generation_prompts: texts that the model continues freely, for fluency.
        id: what a person finds the record by: its own identifier, or one that its loader made of its place in the file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: NonEmpty
    target: NonEmpty
    subject: Subject = None
    target_aliases: Aliases = ()
    ground_truth: Aliases = ()
    rephrases: tuple[NonEmpty, ...] = ()
    locality: ProbeGroups = {}
    portability: ProbeGroups = {}
    generation_prompts: tuple[NonEmpty, ...] = ()
    id: str | None = None

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every text that counts as the target: the target itself first, then its aliases."""
        return tuple(dict.fromkeys((self.target, *self.target_aliases)))


def numbered(position: int, request: EditRequest, what: str = "request") -> str:
    """A request as messages name it: ``what`` it is there, its place in the run's order, and what it is found by."""
    return f"{what} {position}" + (f" (id {request.id})" if request.id else "")
