"""Measures an edited model: generation first, teacher forcing second, against the unedited model's own answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from baft.distributed import ALONE, World
from baft.editing import Editor, SideBySide
from baft.engine.generation import OnBatch
from baft.evaluation.base_answers import BaseAnswers, Forced, RememberedAnswers
from baft.evaluation.matching import answer_part, matches, normalise
from baft.evaluation.portions import Portions
from baft.evaluation.probes import ASKED, MEASURES, ProbeResult, Question, questions
from baft.evaluation.room import ANSWER_TOKENS
from baft.requests import EditRequest

__all__ = ["Evaluator", "Metrics", "known_before", "shares", "summarise"]

Metrics = dict[str, Any]
"""``{"reliability": {"generation": 0.99, "token": 1.0, ...}, ...}``; a measure without data is None."""

SCORES = ("generation", "token", "sequence", "known")


class Evaluator:
    """Puts probes to an editor's model, in batches.

    The unedited model's answers are recorded with ``record_base``, all edits switched off; one that is missing
    there, when it is first needed.

    Two families of measures (never mixed): *generation*, greedy decoding with the KV cache, where a text counts if it
    answers with an accepted alias and stops (``baft.evaluation.matching``); and teacher forcing of the first accepted
    answer, as token accuracy (*token*) and whole-answer match (*sequence*). For locality both compare with the unedited
    model: its generated answer, and its arg max tokens under the same forced answer.

    Args:
        editor: whose model is measured.
        max_new_tokens: length of the generated answers, at most; ``tokens_needed`` says how much requests need.
        batch_size: sequences at once, to begin with: when memory runs out, half as many from then on.
        base: where the unedited model's answers are kept; by default in memory.
        world: processes whose editors and base answers are alike. Each asks a share of the questions, and all have all
            answers. The states of single edits are each process's own, and so are the questions to them.
        say: is told, in words, when memory has run out.

    Attributes:
        portions: keeps what is asked within memory.
    """

    def __init__(
        self,
        editor: Editor,
        *,
        max_new_tokens: int = ANSWER_TOKENS,
        batch_size: int = 64,
        base: BaseAnswers | None = None,
        world: World = ALONE,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.editor = editor
        self.max_new_tokens = max_new_tokens
        self.portions = Portions(batch_size, together=world.one_model, say=say)
        self.base = base or RememberedAnswers()
        self.world = world

    @property
    def protocol(self) -> dict[str, Any]:
        """What a reader of the results needs to know of how they were measured."""
        return {
            "primary": "generation",
            "generation": {
                "decoding": "greedy, KV cache, batched",
                "max_new_tokens": self.max_new_tokens,
                "stop": "EOS, line end, or sentence end",
                "match": "exact after normalising (case, punctuation, articles, space) against any accepted alias",
                "locality": "same normalised answer as the unedited model",
            },
            "teacher_forced": {
                "token": "share of answer tokens that are the arg max",
                "sequence": "all answer tokens are the arg max",
                "locality": "agreement with the unedited model's arg max under the same forced answer",
            },
            "prompt_template": self.editor.config.prompt_template,
        }

    def record_base(self, requests: Iterable[EditRequest], on_batch: OnBatch | None = None) -> None:
        """Record the unedited model's answers to every question about ``requests``."""
        self._record(requests, self.world, on_batch)

    def _record(self, requests: Iterable[EditRequest], world: World, on_batch: OnBatch | None = None) -> None:
        asked = [question for request in requests for question in questions(request)]
        new = [prompt for prompt in dict.fromkeys(q.prompt for q in asked) if self.base.text(prompt) is None]
        pairs = dict.fromkeys((q.prompt, q.answers[0]) for q in asked if q.measure == "locality" and q.answers)
        unforced = [pair for pair in pairs if self.base.forced(*pair) is None]
        if new or unforced:
            with self.editor.disabled():
                texts = world.merged(self._generate(world.share(new), on_batch))
                forced = world.merged(self._force(world.share(unforced)))
            self.base.add_base(dict(zip(new, texts, strict=True)), dict(zip(unforced, forced, strict=True)))

    def measure(
        self,
        requests: Sequence[EditRequest],
        on_batch: OnBatch | None = None,
        *,
        states: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> list[list[ProbeResult]]:
        """Ask every question about each of ``requests``.

        Args:
            states: of each request the state of the editor that is asked, such as ``EditOutcome.state``: all are asked
                side by side, where the editor can. None asks the model as it is now.
        """
        if states is None:
            self._record(requests, self.world)
            return self.world.merged(self._ask(self.world.share(requests), on_batch))
        self._record(requests, ALONE)
        if isinstance(self.editor, SideBySide):
            return self._ask(requests, on_batch, self.editor.bank(states))
        return self._ask_in_turn(requests, on_batch, states)

    def _ask(
        self, requests: Sequence[EditRequest], on_batch: OnBatch | None, bank: Any = None
    ) -> list[list[ProbeResult]]:
        """Ask about each of ``requests`` the model as it is now, or each a state of its own, of a bank of them."""
        asked = [list(questions(request)) for request in requests]
        flat = [question for group in asked for question in group]
        by = [index for index, group in enumerate(asked) for _ in group]

        def options(chosen: Sequence[int]) -> dict[str, Any]:
            adapters = {} if bank is None else {"adapters": bank, "adapter_ids": [by[index] for index in chosen]}
            return {"subjects": [flat[index].subject or "" for index in chosen], **adapters}

        texts = self._generate([q.prompt for q in flat], on_batch, **options(range(len(flat))))
        forcible = [index for index, question in enumerate(flat) if question.answers]
        pairs = [(flat[index].prompt, flat[index].answers[0]) for index in forcible]
        forced = iter(self._force(pairs, **options(forcible)))
        results = iter(
            [self._judge(q, text, next(forced) if q.answers else None) for q, text in zip(flat, texts, strict=True)]
        )
        return [[next(results) for _ in group] for group in asked]

    def _ask_in_turn(
        self, requests: Sequence[EditRequest], on_batch: OnBatch | None, states: Sequence[Mapping[str, Tensor]]
    ) -> list[list[ProbeResult]]:
        before = self.editor.state()
        results = []
        try:
            for request, state in zip(requests, states, strict=True):
                self.editor.load_state(dict(state))
                results += self._ask([request], on_batch)
        finally:
            self.editor.load_state(before)
        return results

    def _judge(self, question: Question, text: str, forced: Forced | None) -> ProbeResult:
        before = self.base.text(question.prompt)
        assert before is not None, "recorded before any question is put to the edited model"
        if question.measure == "locality":
            right = normalise(answer_part(text)) == normalise(answer_part(before))
            base = self.base.forced(question.prompt, question.answers[0]) if question.answers else None
            wanted = base.predicted if base else ()
        else:
            right = matches(text, question.answers)
            wanted = forced.wanted if forced else ()
        hits = [p == w for p, w in zip(forced.predicted, wanted, strict=True)] if forced else None
        return ProbeResult(question, text, before, right, fmean(hits) if hits else None, all(hits) if hits else None)

    def _generate(self, prompts: Sequence[str], on_batch: OnBatch | None, **options: Any) -> list[str]:
        def ask(size: int) -> list[str]:
            told = on_batch if size == first else None  # what is asked again is told of once
            return self.editor.generate(
                prompts, max_new_tokens=self.max_new_tokens, batch_size=size, on_batch=told, **options
            )

        first = self.portions.size
        return self.portions.ask("answers", ask)

    @torch.no_grad()
    def _force(self, pairs: Sequence[tuple[str, str]], **options: Any) -> list[Forced]:
        found = self.portions.ask(
            "answers by teacher forcing", lambda size: self.editor.force(pairs, batch_size=size, **options)
        )
        return [Forced(tuple(predicted), tuple(wanted)) for predicted, wanted in found]


def summarise(results: Iterable[Sequence[ProbeResult]]) -> Metrics:
    """Average probe results: each request counts once in a measure and in a kind, whatever its number of probes.

    Returns:
        For each measure ``{"generation", "token", "sequence", "known", "kinds": {kind: generation}}``; a family without
        data is None, and so is a measure that no request has a probe for. ``known`` is no measure of an edit: it says
        of what share of the questions the unedited model knew the answer as it was.
    """
    per_request: dict[tuple[str, str], list[float]] = defaultdict(list)
    kinds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for request in results:
        for measure in MEASURES:
            probes = [result for result in request if result.question.measure == measure]
            for score in SCORES:
                found = _scores(probes, score)
                if found:
                    per_request[measure, score].append(fmean(found))
            for kind in dict.fromkeys(result.question.kind for result in probes):
                found = _scores([p for p in probes if p.question.kind == kind], "generation")
                kinds[measure][kind].append(fmean(found))
    metrics: Metrics = {}
    for measure in MEASURES:
        values = {score: per_request[measure, score] for score in SCORES}
        metrics[measure] = None
        if any(values.values()):
            metrics[measure] = {score: fmean(v) if v else None for score, v in values.items()}
            metrics[measure]["kinds"] = {kind: fmean(scores) for kind, scores in kinds[measure].items()}
    return metrics


def known_before(metrics: Metrics) -> dict[str, float]:
    """Of what is asked (``ASKED``) the share that the unedited model answered as it was; what nobody knows isn't there.

    Edits can't be expected to reach a rephrasing in which the model doesn't recognise its own fact.
    """
    known = {asked: metrics[measure].get("known") for measure, asked in ASKED.items() if metrics[measure]}
    return {asked: share for asked, share in known.items() if share is not None}


def shares(known: Mapping[str, float]) -> str:
    """The same in words."""
    return ", ".join(f"{share:.1%} of the {asked}" for asked, share in known.items())


def _scores(probes: Sequence[ProbeResult], score: str) -> list[float]:
    """One score for each question: the best one of those that are the same question in other words."""
    grouped: dict[object, list[float]] = defaultdict(list)
    for index, probe in enumerate(probes):
        value = getattr(probe, score)
        if value is not None:
            grouped[probe.question.group or index].append(float(value))
    return [max(values) for values in grouped.values()]
