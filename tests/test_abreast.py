"""Single edits abreast: each as if it were the only one, whoever is beside it, and whatever becomes of those."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from looks import assert_same_state
from tiny import REQUESTS, UNRELATED, poison, tiny_editor, tiny_model, tiny_tokenizer
from tiny import one_thread as one_thread
from torch import Tensor
from transformers import PreTrainedModel

from baft import BaftEditor, EditRequest
from baft.editor import EditOutcome
from baft.engine.learner import DivergedError
from baft.engine.options import EngineOptions
from baft.engine.sets import ParameterSets
from baft.engine.step import Lesson, StepInputs, TrainingStep
from baft.evaluation.measures import Evaluator
from baft_kernels import GroupedBaftIntervention

# In batches of different shapes the same sums round differently, by 6e-8. AdamW divides by the gradient's own size,
# which makes more of that where a gradient is nearly 0, and each step starts from what the last one left: after six,
# losses are apart by some 1e-5 and single parameters by some 1e-4 of the largest. A request that had met its
# neighbours would part in its first digits.
ROUNDING = 1e-3

SHORT: dict[str, Any] = {"max_steps": 6, "stop_below": 0.0, "balance_weight": 0.1}


def editor_with(slots: int | None, model: PreTrainedModel | None = None, **changes: Any) -> BaftEditor:
    return tiny_editor(model, options=EngineOptions(slots=slots), **changes)


def edited(editor: BaftEditor, requests: Sequence[EditRequest]) -> list[EditOutcome]:
    """Outcomes in the order of ``requests``."""
    outcomes = sorted(editor.edit_each(requests), key=lambda outcome: outcome.index)
    assert [outcome.index for outcome in outcomes] == list(range(len(requests)))
    assert [outcome.request for outcome in outcomes] == list(requests)
    return outcomes


def state_of(outcome: EditOutcome) -> dict[str, Tensor]:
    assert outcome.state is not None
    return outcome.state


def assert_close(actual: EditOutcome, expected: EditOutcome) -> None:
    """The same steps, and within rounding the same losses and state."""
    one, other = actual.curve, expected.curve
    assert (one.steps, one.converged, one.diverged) == (other.steps, other.converged, other.diverged)
    torch.testing.assert_close(one.losses, other.losses, rtol=ROUNDING, atol=0.0)
    first, second = state_of(actual), state_of(expected)
    assert first.keys() == second.keys()
    assert torch.equal(first["generator"], second["generator"])
    for name, value in second.items():
        largest = float(value.abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(first[name], value, rtol=ROUNDING, atol=ROUNDING * largest)


@dataclass(frozen=True)
class Taught:
    """A lesson: the set that it was for, and its texts, edits first."""

    set: int
    texts: tuple[str, ...]

    def is_of(self, request: EditRequest) -> bool:
        return self.texts[0] == f"{request.prompt} {request.target}"


@contextmanager
def taught(editor: BaftEditor, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Taught]]]:
    """The lessons of each step."""
    steps: list[list[Taught]] = []
    arrange = TrainingStep.arrange

    def watch(step: TrainingStep, lessons: Sequence[Lesson], **options: Any) -> StepInputs:
        decode = editor.tokenizer.batch_decode
        texts = [[text.ids for text in (*lesson.edits, *lesson.unrelated)] for lesson in lessons]
        steps.append(
            [
                Taught(lesson.set, tuple(decode(ids, skip_special_tokens=True)))
                for lesson, ids in zip(lessons, texts, strict=True)
            ]
        )
        return arrange(step, lessons, **options)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingStep, "arrange", watch)
        yield steps


# -- each as if it were alone --


@pytest.mark.parametrize("changes", [{}, {"locality_loss": "update", "layers": (0, 2)}, {"positions": "subject"}])
@pytest.mark.parametrize("slots", [2, 3, 5, 8, None])
def test_results_are_those_of_each_request_edited_alone(slots: int | None, changes: dict[str, Any]) -> None:
    alone = [edited(editor_with(1, **SHORT, **changes), [request])[0] for request in REQUESTS]
    for actual, expected in zip(edited(editor_with(slots, **SHORT, **changes), REQUESTS), alone, strict=True):
        assert_close(actual, expected)


def without_moments(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("optimizer.")}


def test_a_single_edit_ends_where_a_first_sequential_one_does() -> None:
    """In all that editing on would need, the usage of its gates included, but for the optimiser's moments."""
    one, other = editor_with(3, **SHORT), editor_with(None, **SHORT)
    single = edited(one, REQUESTS[:3])[1]
    sequential = other.edit(REQUESTS[1:2])[0]
    assert_close(single, EditOutcome(1, sequential.request, sequential.curve, without_moments(other.state())))


def test_a_single_edit_is_edited_on_with_an_optimiser_that_begins() -> None:
    editor, expected = editor_with(3, **SHORT), editor_with(3, **SHORT)
    outcome = edited(editor, REQUESTS[:3])[1]
    assert not any(name.startswith("optimizer.") for name in state_of(outcome))
    for one in (editor, expected):
        one.edit(REQUESTS[:1])  # so that there are moments, which aren't the single edit's
    editor.load_state(state_of(outcome))
    moments = {name: torch.zeros_like(value) for name, value in expected.state().items() if "optimizer." in name}
    assert moments
    expected.load_state({**state_of(outcome), **moments})
    for one in (editor, expected):
        one.edits = [REQUESTS[1]]
        one.edit(REQUESTS[2:3])
    assert_same_state(editor.state(), expected.state())


def test_one_at_a_time_no_bit_depends_on_the_others_or_their_order() -> None:
    alone = [edited(editor_with(1, **SHORT), [request])[0] for request in REQUESTS[:3]]
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):
        for k, outcome in zip(order, edited(editor_with(1, **SHORT), [REQUESTS[k] for k in order]), strict=True):
            assert outcome.curve.losses == alone[k].curve.losses
            assert_same_state(state_of(outcome), state_of(alone[k]))


def test_each_is_drawn_the_same_texts_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def lessons(slots: int, requests: Sequence[EditRequest]) -> list[tuple[str, ...]]:
        editor = editor_with(slots, **SHORT, rehearsal=1)
        editor.edit(REQUESTS[:2])
        with taught(editor, monkeypatch) as steps:
            edited(editor, requests)
        return [lesson.texts for step in steps for lesson in step if lesson.is_of(REQUESTS[3])]

    expected = lessons(1, [REQUESTS[3]])
    assert len(expected) == SHORT["max_steps"]
    assert len(set(expected)) > 1, "each step draws anew"
    assert lessons(3, REQUESTS[2:]) == lessons(1, REQUESTS[2:]) == expected


def test_on_top_of_earlier_edits_those_are_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    editor, alone = (editor_with(slots, **SHORT, rehearsal=2) for slots in (3, 1))
    for one in (editor, alone):
        one.edit(REQUESTS[:2])
    with taught(editor, monkeypatch) as steps:
        outcomes = edited(editor, REQUESTS[2:])
    earlier = {f"{request.prompt} {request.target}" for request in REQUESTS[:2]}
    assert all(set(lesson.texts[1:3]) == earlier for step in steps for lesson in step)
    for actual, expected in zip(outcomes, edited(alone, REQUESTS[2:]), strict=True):
        assert_close(actual, expected)


def test_the_editor_stays_where_it_was_bit_for_bit() -> None:
    editor = editor_with(2, **SHORT)
    editor.edit(REQUESTS[:1])
    before, edits = editor.state(), list(editor.edits)
    outcomes = edited(editor, REQUESTS[1:])
    assert_same_state(editor.state(), before)
    assert editor.edits == edits
    assert not any(torch.equal(state_of(o)["layers.1.source"], before["layers.1.source"]) for o in outcomes)
    assert all(parameter.grad is None for parameter in editor.interventions.parameters())


def test_edits_that_are_given_up_half_way_leave_the_editor_usable() -> None:
    editor, other = editor_with(2, **SHORT), editor_with(2, **SHORT)
    started = editor.edit_each(REQUESTS)
    next(started)
    started.close()
    editor.edit(REQUESTS[:2])
    other.edit(REQUESTS[:2])
    assert_same_state(editor.state(), other.state())


# -- slots --


def test_what_is_done_leaves_and_what_waits_enters(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = editor_with(2, stop_below=0.8)
    with taught(editor, monkeypatch) as steps:
        outcomes = edited(editor, REQUESTS)
    lengths = [outcome.curve.steps for outcome in outcomes]
    assert len(set(lengths)) > 1, "expected requests that take different numbers of steps"
    # Two lanes: who is next takes the one that is free first.
    lanes: list[list[int]] = [[], []]
    waiting = sorted(range(len(REQUESTS)), key=lambda k: -len(editor._encode(REQUESTS[k]).ids))
    for step in range(len(steps)):
        for lane in lanes:
            if len(lane) == step and waiting:
                lane += [waiting[0]] * lengths[waiting.pop(0)]
        expected = [(number, lane[step]) for number, lane in enumerate(lanes) if len(lane) > step]
        assert [lesson.set for lesson in steps[step]] == [number for number, _ in expected]
        assert all(lesson.is_of(REQUESTS[request]) for lesson, (_, request) in zip(steps[step], expected, strict=True))
    assert not waiting and len(steps) == max(len(lane) for lane in lanes)


def test_there_are_no_more_slots_than_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    for slots in (7, None):
        editor = editor_with(slots, **SHORT)
        with taught(editor, monkeypatch) as steps:
            edited(editor, REQUESTS[:3])
        assert [len(step) for step in steps] == [3] * SHORT["max_steps"]


def test_the_longest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = editor_with(1, **SHORT)
    lengths = {f"{r.prompt} {r.target}": len(editor._encode(r).ids) for r in REQUESTS}
    with taught(editor, monkeypatch) as steps:
        edited(editor, REQUESTS)
    trained = [lengths[lesson.texts[0]] for (lesson,) in steps]
    assert trained == sorted(trained, reverse=True) and trained[0] > trained[-1]


def test_how_many_went_abreast_is_reported() -> None:
    editor = editor_with(2, **SHORT)
    assert "abreast" not in editor.engine_report()
    edited(editor, REQUESTS)
    assert editor.engine_report()["abreast"] == {"slots": 2, "lesson_bytes": None, "graphs": "no: switched off"}


def test_outcomes_come_as_soon_as_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = editor_with(2, stop_below=0.8)
    with taught(editor, monkeypatch) as steps:
        seen = [(len(steps), outcome.curve.steps) for outcome in editor.edit_each(REQUESTS)]
    assert seen[0][0] == seen[0][1]
    assert [at for at, _ in seen] == sorted(at for at, _ in seen)
    assert seen[0][0] < seen[-1][0] == len(steps)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("pretended"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_where_memory_runs_out_half_as_many_go_on(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [edited(editor_with(1, **SHORT), [request])[0] for request in REQUESTS]
    call = TrainingStep.__call__
    tried: list[int] = []

    def small(step: TrainingStep, lessons: Sequence[Lesson], *rest: Any, **options: Any) -> Any:
        tried.append(len(lessons))
        if len(lessons) > 1 and len(tried) > 2:  # at first there was more
            raise error
        return call(step, lessons, *rest, **options)

    monkeypatch.setattr(TrainingStep, "__call__", small)
    with pytest.warns(RuntimeWarning, match=r"^memory ran out: going on with [21] edits at a time$"):
        outcomes = edited(editor_with(5, **SHORT), REQUESTS)
    assert tried[:5] == [5, 5, 5, 2, 1]
    for actual, expected in zip(outcomes, alone, strict=True):
        assert_close(actual, expected)


def test_memory_may_run_out_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ParameterSets.__init__

    def small(sets: ParameterSets, interventions: Any, *rest: Any) -> None:
        if any(isinstance(i, GroupedBaftIntervention) and i.sets > 2 for i in interventions.values()):
            raise torch.OutOfMemoryError("pretended")
        made(sets, interventions, *rest)

    expected = edited(editor_with(2, **SHORT), REQUESTS)
    monkeypatch.setattr(ParameterSets, "__init__", small)
    with pytest.warns(RuntimeWarning, match="going on with 2 edits"):
        outcomes = edited(editor_with(5, **SHORT), REQUESTS)
    for actual, other in zip(outcomes, expected, strict=True):
        assert_close(actual, other)


def test_another_error_is_nobodys_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes don't fit")

    monkeypatch.setattr(TrainingStep, "__call__", fail)
    with pytest.raises(RuntimeError, match="shapes don't fit"):
        edited(editor_with(2, **SHORT), REQUESTS)


def test_where_not_one_edit_fits_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("pretended")

    editor = editor_with(2, **SHORT)
    before = editor.state()
    monkeypatch.setattr(TrainingStep, "__call__", fail)
    with (
        pytest.warns(RuntimeWarning, match="going on with 1"),
        pytest.raises(torch.OutOfMemoryError, match="a single edit needs more memory than there is"),
    ):
        edited(editor, REQUESTS)
    assert_same_state(editor.parameters(), {name: editor.state()[name] for name in before})


def test_what_was_edited_abreast_before_does_not_matter() -> None:
    """What was computed at once for many is computed again for who is edited alone."""
    changes = {**SHORT, "subject_texts": 6, "unrelated_per_step": 8}
    used, fresh = editor_with(4, **changes), editor_with(4, **changes)
    edited(used, REQUESTS)
    for outcome, other in zip(used.edit(REQUESTS), fresh.edit(REQUESTS), strict=True):
        assert outcome.curve.losses == other.curve.losses
    assert_same_state(used.state(), fresh.state())


# -- requests that fail --


@pytest.mark.parametrize("locality_loss", ["kl", "update"])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_loss_that_is_no_number_stops_that_request_only(slots: int, locality_loss: str) -> None:
    options: dict[str, Any] = {**SHORT, "locality_loss": locality_loss, "layers": (0, 1)}
    model = tiny_model()
    bad = EditRequest(prompt=f"Ada {poison(model)} is", target="Ebor", subject="Ada")
    outcomes = edited(editor_with(slots, model, **options), [REQUESTS[0], bad, *REQUESTS[1:3]])
    without = edited(editor_with(slots, **options), REQUESTS[:3])
    stopped = outcomes.pop(1)
    assert (stopped.curve.steps, stopped.curve.converged, stopped.curve.diverged) == (1, False, True)
    assert math.isnan(stopped.curve.losses[0])
    for actual, expected in zip(outcomes, without, strict=True):
        assert_close(
            EditOutcome(expected.index, actual.request, actual.curve, actual.state),
            expected,
        )


@pytest.mark.parametrize("parameter", ["basis", "gate_bias"])
def test_what_its_last_step_undoes_is_stopped_too(parameter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = TrainingStep.__call__
    steps = 0

    def spoil(step: TrainingStep, lessons: Sequence[Lesson], *rest: Any, **options: Any) -> Any:
        nonlocal steps
        losses, steps = call(step, lessons, *rest, **options), steps + 1
        if steps == SHORT["max_steps"]:
            step.sets._values[f"layers.1.{parameter}"][1].fill_(math.nan)
        return losses

    expected = edited(editor_with(3, **SHORT), REQUESTS[:3])
    monkeypatch.setattr(TrainingStep, "__call__", spoil)
    outcomes = edited(editor_with(3, **SHORT), REQUESTS[:3])
    assert [outcome.curve.diverged for outcome in outcomes].count(True) == 1
    for actual, other in zip(outcomes, expected, strict=True):
        if actual.curve.diverged:
            assert not actual.curve.converged and math.isfinite(actual.curve.losses[-1])
        else:
            assert_same_state(state_of(actual), state_of(other))


def test_a_request_that_was_stopped_is_measured_with_the_others() -> None:
    model = tiny_model()
    bad = EditRequest(prompt=f"Ada {poison(model)} is", target="Ebor", subject="Ada")
    editor = editor_with(3, model, **SHORT)
    requests = [REQUESTS[0], bad, REQUESTS[1]]
    states = [state_of(outcome) for outcome in edited(editor, requests)]
    together = Evaluator(editor).measure(requests, states=states)
    alone = [Evaluator(editor).measure([requests[k]], states=[states[k]])[0] for k in (0, 2)]
    assert [together[0], together[2]] == alone
    assert len(together[1]) == 1


def test_its_neighbours_padding_stays_finite_too() -> None:
    """Even where no BOS stands before the text that is no number."""
    model = tiny_model()
    bad = EditRequest(prompt=f"{poison(model, bos=False)} is", target="Ebor")

    def outcomes(model: PreTrainedModel, requests: Sequence[EditRequest]) -> list[EditOutcome]:
        with_bos = editor_with(4, model, **SHORT)
        with_bos.remove()
        without_bos = BaftEditor(
            model, tiny_tokenizer(bos=False), with_bos.config, unrelated=UNRELATED, options=EngineOptions(slots=4)
        )
        return edited(without_bos, requests)

    stopped, *others = outcomes(model, [bad, *REQUESTS[:3]])
    assert stopped.curve.diverged
    for actual, expected in zip(others, outcomes(tiny_model(), REQUESTS[:3]), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("parameter", ["basis", "gate_bias"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mode", ["sequential", "batch"])
def test_an_edit_that_learns_what_is_no_number_is_an_error(
    mode: Any, parameter: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, steps = ParameterSets.update, 0

    def spoil(sets: ParameterSets, *given: Any) -> Tensor:
        nonlocal steps
        distances, steps = update(sets, *given), steps + 1
        if steps == (SHORT["max_steps"] if last else 2):
            sets._values[f"layers.1.{parameter}"].fill_(math.nan)
            return distances.fill_(math.nan) if parameter == "basis" else distances
        return distances

    editor = editor_with(None, **SHORT, batch_passes=SHORT["max_steps"])
    monkeypatch.setattr(ParameterSets, "update", spoil)
    with pytest.raises(DivergedError, match="the edit loss became nan"):
        editor.edit(REQUESTS[:1], mode)
    assert editor.edits == []


def test_a_sequential_edit_whose_loss_is_no_number_is_an_error() -> None:
    model = tiny_model()
    bad = EditRequest(prompt=f"Ada {poison(model)} is", target="Ebor")
    with pytest.raises(RuntimeError, match="the edit loss became nan"):
        editor_with(None, model, **SHORT).edit([bad])


def test_a_request_that_does_not_converge_is_told_and_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    enough = edited(editor_with(2, stop_below=0.8), REQUESTS)
    lengths = [outcome.curve.steps for outcome in enough]
    slow = {k for k, length in enumerate(lengths) if length == max(lengths)}
    assert len(slow) < len(REQUESTS)
    editor = editor_with(2, stop_below=0.8, max_steps=max(lengths) - 1)
    with taught(editor, monkeypatch) as steps:
        outcomes = edited(editor, REQUESTS)
    for k, (actual, expected) in enumerate(zip(outcomes, enough, strict=True)):
        if k not in slow:
            assert actual.curve.converged
            assert_close(actual, expected)
            continue
        assert (actual.curve.steps, actual.curve.converged, actual.curve.diverged) == (max(lengths) - 1, False, False)
        torch.testing.assert_close(actual.curve.losses, expected.curve.losses[:-1], rtol=ROUNDING, atol=0.0)
        assert state_of(actual)
    assert sum(len(step) for step in steps) == sum(lengths) - len(slow)


@pytest.mark.parametrize(
    "bad", [EditRequest(prompt="Ada " * 40, target="Bob"), EditRequest(prompt="Ada", target="B" * 90)]
)
def test_too_long_a_request_is_refused_before_any_is_trained(bad: EditRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = editor_with(2, **SHORT)
    before = editor.state()
    with taught(editor, monkeypatch) as steps, pytest.raises(ValueError, match=r"^prompt: expected at most 64 tokens"):
        next(editor.edit_each([*REQUESTS[:3], bad]))
    assert steps == []
    assert_same_state(editor.state(), before)


def test_no_requests_are_no_work() -> None:
    assert list(editor_with(2).edit_each([])) == []
