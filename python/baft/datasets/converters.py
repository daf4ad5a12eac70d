"""What the records of each public benchmark mean: one function a format, from a record to its edit requests.

What holds for all:

- Every alias is an accepted answer, in whatever nesting a benchmark keeps them.
- A record without rephrases, locality or portability is measured without them; nothing is made up.
- A locality probe needs no answer, since locality compares with the unedited model's own; a portability probe without
  one can't be scored and is left out.
- Kinds of probes keep the benchmark's own names. Where a benchmark gives none, the names are EasyEdit's, so that result
  tables line up: ``neighborhood`` for locality, ``one_hop``, ``personas`` and ``mhop`` for portability.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Mapping

from baft.datasets.fields import Fields
from baft.requests import EditRequest, Probe

__all__ = ["convsent", "counterfact", "easyedit", "mquake", "own", "qaedit", "wikibigedit", "wikibio", "zsre"]

Texts = tuple[str, ...]
Probes = tuple[Probe, ...]

NEIGHBORHOOD = "neighborhood"

# ConvSent gives a topic and opinions but no prompt. The first question is edited, the others are its rephrases.
OPINION_QUESTIONS = (
    "What do you think of {}?",
    "What is your opinion of {}?",
    "How do you feel about {}?",
    "What are your thoughts on {}?",
)


# -- one function a format ---------------------------------------------------------------------------------------------


def zsre(record: Fields) -> list[EditRequest]:
    """ZsRE in MEND's fields: the edit is ``src`` -> ``alt``, also where ``answers``, the truth, says otherwise.

    ``loc`` keeps its prefix "nq question: ", as EasyEdit does, so that locality is measured on the same text there and
    here. ``pred`` is the answer of some other model, and ``cond`` only says it all again. A record whose ``alt`` is
    among its ``answers`` stays as it is.
    """
    answers = record.required_texts("alt")
    hop = record.child("portability")
    return [
        EditRequest(
            prompt=record.required_text("src"),
            target=answers[0],
            target_aliases=answers[1:],
            subject=record.text("subject"),
            ground_truth=record.texts("answers"),
            rephrases=record.texts("rephrase"),
            locality={NEIGHBORHOOD: _probes(record.texts("loc"), record.texts("loc_ans"))},
            portability=_answered({"one_hop": _probes(hop.texts("New Question"), hop.texts("New Answer"))}),
            id=record.id,
        )
    ]


def counterfact(record: Fields) -> list[EditRequest]:
    """CounterFact in ROME's and MEMIT's fields.

    Neighbours share the old object with the subject; ``attribute_prompts`` ask about others that have the new object
    anyway. Both are true before the edit and must stay so.
    """
    rewrite = record.child("requested_rewrite")
    answers = rewrite.child("target_new").required_texts("str")
    ground_truth = rewrite.child("target_true").texts("str")
    return [
        EditRequest(
            prompt=_rewrite_prompt(rewrite),
            target=answers[0],
            target_aliases=answers[1:],
            subject=rewrite.text("subject"),
            ground_truth=ground_truth,
            rephrases=record.texts("paraphrase_prompts"),
            locality={
                NEIGHBORHOOD: _probes(record.texts("neighborhood_prompts"), ground_truth),
                "attribute": _probes(record.texts("attribute_prompts"), answers),
            },
            generation_prompts=record.texts("generation_prompts"),
            id=record.id,
        )
    ]


def mquake(record: Fields) -> list[EditRequest]:
    """MQuAKE: each rewrite of a case is an edit of its own, with ids ``<case_id>/0``, ``<case_id>/1``, ...

    What follows from a case holds only once all of its rewrites are made, and so it belongs to the last one:
    ``multi_hop`` is one question in three wordings, right if any is; ``single_hop`` are the facts on the way. A rewrite
    says nothing of aliases, but the hop that asks its question does.
    """
    rewrites = record.children("requested_rewrite")
    if not rewrites:
        raise record.error("requested_rewrite", "at least one rewrite")
    case = record.id
    old_hops, new_hops = record.children("single_hops"), record.children("new_single_hops")
    consequences = {
        "multi_hop": _probes(record.texts("questions"), record.texts("new_answer", "new_answer_alias"), group=case),
        "single_hop": _join(_probes(hop.texts("question"), _hop_answers(hop)) for hop in new_hops),
    }
    requests = []
    for index, rewrite in enumerate(rewrites):
        target = rewrite.child("target_new").required_text("str")
        requests.append(
            EditRequest(
                prompt=_rewrite_prompt(rewrite),
                target=target,
                target_aliases=tuple(alias for alias in _answers_asked_by(rewrite, new_hops) if alias != target),
                subject=rewrite.text("subject"),
                ground_truth=rewrite.child("target_true").texts("str") + _answers_asked_by(rewrite, old_hops),
                rephrases=rewrite.texts("question"),
                portability=_answered(consequences) if rewrite is rewrites[-1] else {},
                id=f"{case}/{index}",
            )
        )
    return requests


def wikibio(record: Fields) -> list[EditRequest]:
    """KnowEdit's WikiBio: the biography so far is the prompt, its true next sentence is the target.

    It is about hallucination in long texts. The target is a whole sentence, for which perplexity says more than exact
    match; there is no other wording of it, and nothing that follows from it.
    """
    answers = record.required_texts("labels")
    return [
        EditRequest(
            prompt=record.required_text("text"),
            target=answers[0],
            target_aliases=answers[1:],
            subject=record.text("concept"),
            locality=_probes_by_kind(record.child("locality")),
            id=record.id,
        )
    ]


def convsent(record: Fields) -> list[EditRequest]:
    """KnowEdit's ConvSent: edit the sentiment about a topic, by the first opinion of the wanted sentiment.

    A record doesn't say which sentiment is wanted (EasyEdit draws one each run). Here a checksum of the topic decides:
    always the same for a topic, and each sentiment for about half of them. The other opinions of that sentiment are
    aliases, those of the opposite one the ground truth. The prompt doesn't name the sentiment, unlike EasyEdit's: told
    to "answer positively", a model needs no edit. Locality is empty: no record knows an unrelated topic.
    """
    topic = record.required_text("ent")
    is_positive = zlib.crc32(topic.encode(errors="replace")) % 2 == 1
    wanted, opposite = ("pos", "neg") if is_positive else ("neg", "pos")
    answers = record.required_texts(wanted)
    questions = tuple(question.format(topic) for question in OPINION_QUESTIONS)
    return [
        EditRequest(
            prompt=questions[0],
            target=answers[0],
            target_aliases=answers[1:],
            subject=topic,
            ground_truth=record.texts(opposite),
            rephrases=questions[1:],
            id=record.id,
        )
    ]


def wikibigedit(record: Fields) -> list[EditRequest]:
    """WikiBigEdit as published: ``personas`` asks in somebody's voice, ``mhop`` for what follows."""
    answers = record.required_texts("ans")
    return [
        EditRequest(
            prompt=record.required_text("update"),
            target=answers[0],
            target_aliases=answers[1:],
            subject=record.text("subject"),
            rephrases=record.texts("rephrase"),
            locality={NEIGHBORHOOD: _probes(record.texts("loc"), record.texts("loc_ans"))},
            portability=_answered(
                {
                    "personas": _probes(record.texts("personas"), answers),
                    "mhop": _probes(record.texts("mhop"), record.texts("mhop_ans")),
                }
            ),
            id=record.id,
        )
    ]


def own(record: Fields) -> list[EditRequest]:
    """Our own: the fields of ``EditRequest``, as its ``model_dump`` writes them or with its shorthands for probes.

    Other fields are passed over.
    """
    known = {name: value for name, value in record.values.items() if name in EditRequest.model_fields}
    own_id = next(iter(record.texts("id")), record.id)
    return [EditRequest.model_validate({**known, "id": own_id})]


def qaedit(record: Fields) -> list[EditRequest]:
    """QAEdit: questions from question-answering benchmarks, with several unrelated ones each."""
    answers = record.required_texts("target")
    unrelated = record.children("locality")
    return [
        EditRequest(
            prompt=record.required_text("prompt"),
            target=answers[0],
            target_aliases=answers[1:],
            subject=record.text("subject"),
            rephrases=record.texts("rephrase"),
            locality={NEIGHBORHOOD: _join(_probes(pair.texts("loc"), pair.texts("loc_ans")) for pair in unrelated)},
            id=record.id,
        )
    ]


def easyedit(record: Fields) -> list[EditRequest]:
    """The fields that EasyEdit gives to flat CounterFact, flattened WikiBigEdit, WISE, and most of KnowEdit.

    These benchmarks differ only in which of the fields they have. WISE's ``ood_rephrase`` is a rephrase here, as in
    EasyEdit, though WISE scores it by the perplexity of the text itself.
    """
    answers = record.required_texts("target_new")
    neighborhood = _probes(record.texts("locality_prompt"), record.texts("locality_ground_truth"))
    return [
        EditRequest(
            prompt=record.required_text("prompt"),
            target=answers[0],
            target_aliases=answers[1:],
            subject=record.text("subject"),
            ground_truth=record.texts("ground_truth"),
            rephrases=record.texts("rephrase_prompt", "rephrase", "ood_rephrase"),
            locality={NEIGHBORHOOD: neighborhood, **_probes_by_kind(record.child("locality"))},
            portability=_answered(_probes_by_kind(record.child("portability"))),
            id=record.id,
        )
    ]


# -- parts of several formats ------------------------------------------------------------------------------------------


def _probes(prompts: Texts, answers: Texts, group: str | None = None) -> Probes:
    return tuple(Probe(prompt=prompt, answers=answers, group=group) for prompt in prompts)


def _join(parts: Iterable[Probes]) -> Probes:
    return tuple(itertools.chain.from_iterable(parts))


def _answered(kinds: Mapping[str, Probes]) -> dict[str, Probes]:
    """Only the probes that have an answer to be scored by."""
    return {kind: tuple(probe for probe in probes if probe.answers) for kind, probes in kinds.items()}


def _probes_by_kind(kinds: Fields) -> dict[str, Probes]:
    """KnowEdit's ``{kind: [{prompt, ground_truth}, ...]}``."""
    return {
        kind: _join(_probes(ask.texts("prompt"), ask.texts("ground_truth")) for ask in kinds.children(kind))
        for kind in kinds.values
    }


def _rewrite_prompt(rewrite: Fields) -> str:
    """The prompt of a CounterFact or MQuAKE rewrite, with the subject in the place of its ``{}``."""
    template = rewrite.required_text("prompt")
    if "{}" not in template:
        return template
    subject = rewrite.text("subject")
    if subject is None:
        raise rewrite.error("subject", "the subject that belongs in the {} of the prompt")
    return template.replace("{}", subject)  # not str.format: the prompt may have other braces


def _hop_answers(hop: Fields) -> Texts:
    return hop.texts("answer", "answer_alias")


def _answers_asked_by(rewrite: Fields, hops: list[Fields]) -> Texts:
    """The answers to those of the hops that ask what the rewrite states."""
    question = rewrite.text("question")
    asked = [hop for hop in hops if question and hop.text("question") == question]
    return tuple(answer for hop in asked for answer in _hop_answers(hop))
