"""The editor: each mode makes the model say the targets, nothing else of it changes, and states come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from looks import assert_same_state, logits, said, targets, trained_batches
from tiny import REQUESTS, WIDTH, tiny_editor, tiny_model, tiny_tokenizer

from baft import BaftConfig, BaftEditor, EditRequest
from baft.editing import Mode
from baft.editor import EditOutcome
from baft.engine.growth import set_new_gates
from baft.engine.options import EngineOptions
from baft_kernels import orthonormality_error
from baft_kernels.reference import GATE_FNS

TWO, THREE = REQUESTS[:2], REQUESTS[:3]


# -- every mode --


def test_sequential_edits_all_hold_at_the_end() -> None:
    editor = tiny_editor()
    assert said(editor, REQUESTS) != targets(REQUESTS)
    outcomes = editor.edit(REQUESTS, "sequential")
    assert said(editor, REQUESTS) == targets(REQUESTS)
    assert editor.edits == REQUESTS
    assert [outcome.request for outcome in outcomes] == REQUESTS
    assert all(outcome.state is None and outcome.curve.converged for outcome in outcomes)


def test_a_batch_is_edited_together_on_top_of_what_was_edited_before() -> None:
    editor = tiny_editor(stop_below=0.1)
    editor.edit(REQUESTS[3:4])
    outcomes = editor.edit(THREE, "batch")
    assert said(editor, THREE) == targets(THREE)
    assert editor.edits == [REQUESTS[3], *THREE]
    assert all(outcome.curve is outcomes[0].curve for outcome in outcomes)
    assert len({id(outcome.request) for outcome in outcomes}) == 3


def test_a_single_edit_is_on_while_it_is_looked_at_and_then_gone() -> None:
    editor = tiny_editor()
    editor.edit(REQUESTS[3:])
    before, base = editor.state(), logits(editor)
    looked_at: list[bool] = []

    def look(outcome: EditOutcome) -> None:
        assert editor.edits == [*REQUESTS[3:], outcome.request]
        looked_at.append(said(editor, [outcome.request]) == [outcome.request.target])

    outcomes = editor.edit(THREE, "single", on_edit=look)
    assert looked_at == [True] * 3
    assert_same_state(editor.state(), before)
    assert torch.equal(logits(editor), base)
    assert editor.edits == REQUESTS[3:]
    for outcome in outcomes:
        assert said(editor, [outcome.request]) != [outcome.request.target]
        editor.load_state(outcome.state)
        assert said(editor, [outcome.request]) == [outcome.request.target]
        editor.load_state(before)


def test_single_edits_do_not_depend_on_their_order() -> None:
    forward, backward = (tiny_editor(options=EngineOptions(slots=1)) for _ in range(2))
    for one, other in zip(forward.edit(TWO, "single"), reversed(backward.edit(TWO[::-1], "single")), strict=True):
        assert one.request == other.request
        assert one.curve.losses == other.curve.losses
        assert_same_state(one.state, other.state)


@pytest.mark.parametrize("gate_fn", GATE_FNS)
def test_every_gate_learns(gate_fn: str) -> None:
    editor = tiny_editor(gate_fn=gate_fn, batch_passes=80)
    editor.edit(THREE, "batch")
    assert said(editor, THREE) == targets(THREE)


@pytest.mark.parametrize(
    "changes",
    [
        {"locality_loss": "update", "locality_margin": 0.1},
        {"locality_weight": 0.0},
        {"balance_weight": 0.1},
        {"weight_decay": 0.01, "project_gradients": True},
        {"layers": (0, 1, 2)},
        {"prompt_template": "Question: {prompt}"},
    ],
)
def test_every_loss_and_every_choice_learns(changes: dict[str, Any]) -> None:
    editor = tiny_editor(**changes)
    editor.edit(TWO)
    assert said(editor, TWO) == targets(TWO)


@pytest.mark.parametrize("positions", ["prompt", "last", "subject", "f1+l2"])
@pytest.mark.parametrize("locality_loss", ["kl", "update"])
def test_every_position_learns(positions: str, locality_loss: str) -> None:
    # Where only the prompt is edited a tiny random model can't be brought to say much: the loss falls, and that is all.
    editor = tiny_editor(positions=positions, locality_loss=locality_loss, layers=(0, 1), max_steps=15)
    losses = editor.edit(TWO[:1])[0].curve.losses
    assert losses[-1] < 0.8 * losses[0]


def test_one_seed_gives_one_result() -> None:
    first, again, other = (tiny_editor(seed=seed) for seed in (3, 3, 4))
    for editor in (first, again, other):
        torch.rand(7)  # the global generator has no part in it
        editor.edit(TWO)
    assert_same_state(again.state(), first.state())
    assert not torch.equal(logits(other), logits(first))


def test_nothing_to_edit_is_nothing_done() -> None:
    editor = tiny_editor()
    before = editor.state()
    assert editor.edit([]) == []
    assert_same_state(editor.state(), before)


# -- the loops --


def test_an_edit_stops_at_the_first_step_that_finds_its_loss_low_enough() -> None:
    for stop_below, steps in ((1e9, 1), (0.0, 7)):
        curve = tiny_editor(stop_below=stop_below, max_steps=7).edit(TWO[:1])[0].curve
        assert curve.steps == len(curve.losses) == steps
        assert curve.converged == (steps == 1)
    curve = tiny_editor(stop_below=1.0).edit(TWO[:1])[0].curve
    assert curve.losses[-1] < 1.0 <= min(curve.losses[:-1])
    assert curve.seconds > 0


def test_a_single_edit_goes_on_for_the_sake_of_other_texts() -> None:
    def steps(mode: Mode, **changes: Any) -> int:
        editor = tiny_editor(**{"stop_below": 1e9, "min_steps": 5, **changes})
        curve = editor.edit(TWO[:1], mode)[0].curve
        assert curve.converged and not curve.diverged
        return curve.steps

    assert steps("single") == 5
    assert steps("single", max_steps=3) == 3
    assert steps("single", locality_weight=0.0) == 1
    assert steps("single", unrelated_per_step=0) == 1
    chunks = tiny_editor(chunk_tokens=1)._chunks(TWO[0])
    assert len(chunks) > 1 and steps("single", chunk_tokens=1) == 5 * len(chunks)
    assert steps("sequential") == 1


def test_a_single_edit_that_needs_more_steps_takes_them() -> None:
    curve = tiny_editor(stop_below=0.3, min_steps=2).edit(TWO[:1], "single")[0].curve
    assert curve.steps > 2 and curve.losses[-1] < 0.3 <= min(curve.losses[:-1])


@pytest.mark.parametrize(("alone", "expected"), [(True, (20, 20)), (False, (0, 10))])
def test_how_many_steps_an_edit_takes_where_nothing_is_said(alone: bool, expected: tuple[int, int]) -> None:
    assert BaftConfig().steps_of_an_edit(alone=alone) == expected
    assert BaftConfig(max_steps=7).steps_of_an_edit(alone=alone) == (7 if alone else 0, 7)
    assert BaftConfig(max_steps=30).steps_of_an_edit(alone=alone) == (20 if alone else 0, 30)


def test_each_step_rehearses_some_earlier_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    for rehearsal, sizes in ((0, [1, 1, 1, 1]), (2, [1, 2, 3, 3])):
        editor = tiny_editor(rehearsal=rehearsal, locality_weight=0.0, max_steps=2, stop_below=0.0)
        with trained_batches(editor, monkeypatch) as batches:
            editor.edit(REQUESTS[:4])
        assert [len(batch) for batch in batches] == [size for size in sizes for _ in range(2)]
        for index, batch in enumerate(batches):
            new, *rehearsed = batch
            request, earlier = REQUESTS[index // 2], REQUESTS[: index // 2]
            assert new == f"{request.prompt} {request.target}"
            assert set(rehearsed) <= {f"{past.prompt} {past.target}" for past in earlier}
            assert len(set(rehearsed)) == len(rehearsed)


def test_a_batch_visits_each_edit_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(batch_size=2, batch_passes=3, locality_weight=0.0, stop_below=0.0)
    with trained_batches(editor, monkeypatch) as batches:
        curve = editor.edit(REQUESTS, "batch")[0].curve
    assert [len(batch) for batch in batches] == [2, 2, 1] * 3
    for first in range(0, 9, 3):
        visited = [text for batch in batches[first : first + 3] for text in batch]
        assert sorted(visited) == sorted(f"{request.prompt} {request.target}" for request in REQUESTS)
    assert (curve.steps, len(curve.losses), curve.converged) == (9, 3, False)


def test_unrelated_texts_are_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(unrelated_per_step=3, max_steps=2, stop_below=0.0)
    with trained_batches(editor, monkeypatch) as batches:
        editor.edit(TWO[:1])
    assert [len(batch) for batch in batches] == [4, 4]


def test_few_edits_in_a_step_have_few_unrelated_texts_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(unrelated_per_step=3, unrelated_per_edit=2, rehearsal=4, max_steps=1, stop_below=0.0)
    with trained_batches(editor, monkeypatch) as batches:
        editor.edit(REQUESTS[:3])
    assert [len(batch) for batch in batches] == [1 + 2, 2 + 3, 3 + 3]


def test_the_locality_loss_keeps_unrelated_texts() -> None:
    def distance(weight: float) -> float:
        editor = tiny_editor(locality_weight=weight, unrelated_per_step=4, stop_below=0.0, max_steps=20)
        with editor.disabled():
            base = logits(editor)
        editor.edit(TWO[:1])
        return float((logits(editor) - base).norm())

    assert distance(10.0) < 0.7 * distance(0.0)


@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_a_run_goes_on_in_a_new_editor_bit_for_bit(chunk_tokens: int | None) -> None:
    changes: dict[str, Any] = {
        "consolidate_every": 2,
        "consolidation_steps": 3,
        "batch_size": 2,
        "rehearsal": 2,
        "rehearsal_buffer": 3,
        "balance_weight": 0.1,
        "max_steps": 3,
        "grow_every": 2,
        "grow_by": 3,
        "max_rank": 12,
        "chunk_tokens": chunk_tokens,
    }
    whole = tiny_editor(**changes)
    whole.edit(REQUESTS)
    stepwise = tiny_editor(**changes)
    for request in REQUESTS:
        last, stepwise = stepwise, tiny_editor(**changes)
        stepwise.load_state(last.state())
        stepwise.edits = last.edits
        stepwise.edit([request])
    assert_same_state(stepwise.state(), whole.state())
    assert torch.equal(logits(stepwise), logits(whole))


def test_only_a_sample_is_rehearsed_where_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(rehearsal=4, rehearsal_buffer=2, locality_weight=0.0, max_steps=2, stop_below=0.0)
    with trained_batches(editor, monkeypatch) as batches:
        editor.edit(REQUESTS)
    assert [len(batch) for batch in batches] == [1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    for step in range(0, len(batches), 2):
        assert set(batches[step]) == set(batches[step + 1])


# -- targets in chunks --

LONG = EditRequest(prompt="Ada Lund was", target="president of Norland and Sudland", subject="Ada Lund")


def test_a_long_target_is_learned_chunk_by_chunk_with_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tiny_editor(chunk_tokens=2, locality_weight=0.0)
    whole = editor._encode(LONG)
    with trained_batches(editor, monkeypatch) as batches:
        curve = editor.edit([LONG])[0].curve
    chunks = [
        editor.tokenizer.decode(whole.ids[:end], skip_special_tokens=True)
        for end in [*range(whole.prompt_length + 2, len(whole.ids), 2), len(whole.ids)]
    ]
    assert len(chunks) > 2
    taught = [(batch[0], *sorted(batch[1:])) for batch in batches]
    assert list(dict.fromkeys(taught)) == [(text, *sorted(chunks[:k])) for k, text in enumerate(chunks)]
    assert len(batches) == curve.steps == len(curve.losses)
    assert curve.converged
    answer = editor.generate(LONG.prompt, max_new_tokens=len(whole.ids)).strip()
    assert answer == LONG.target


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_chunks_in_the_other_modes(mode: Any) -> None:
    editor = tiny_editor(chunk_tokens=4, stop_below=0.1)
    said: list[str] = []
    editor.edit([LONG, REQUESTS[3]], mode, on_edit=lambda o: said.append(editor.generate(o.request.prompt).strip()))
    assert said == [LONG.target, REQUESTS[3].target]


# -- on the way --


def test_steps_are_told() -> None:
    told: list[tuple[int, int, float]] = []
    outcomes = tiny_editor(max_steps=3, stop_below=0.0).edit(TWO, on_step=lambda *step: told.append(step))
    losses = [loss for outcome in outcomes for loss in outcome.curve.losses]
    assert told == [(index % 3 + 1, 3, loss) for index, loss in enumerate(losses)]


def test_bases_stay_orthonormal() -> None:
    editor = tiny_editor(layers=(0, 2), rank=16, max_steps=20, stop_below=0.0)
    editor.edit(REQUESTS)
    for intervention in editor.interventions.values():
        assert orthonormality_error(intervention.basis) <= 1e-6


# -- on, off and away --


def test_disabled_and_remove_give_the_base_model_bit_for_bit() -> None:
    editor = tiny_editor()
    base = logits(editor)
    editor.edit(TWO)
    edited = logits(editor)
    with editor.disabled():
        assert torch.equal(logits(editor), base)
    assert torch.equal(logits(editor), edited)
    assert not torch.equal(edited, base)
    editor.remove()
    assert torch.equal(logits(editor), base)


def test_two_editors_on_two_models_do_not_meet() -> None:
    alone = tiny_editor()
    alone.edit(TWO)
    one, other = tiny_editor(), tiny_editor(seed=1)
    one.edit(TWO[:1])
    other.edit(REQUESTS[3:])
    one.edit(TWO[1:])
    assert_same_state(one.state(), alone.state())
    assert torch.equal(logits(one), logits(alone))


def test_one_prompt_gives_a_text_and_several_give_a_list() -> None:
    editor = tiny_editor()
    editor.edit(TWO)
    prompts = [request.prompt for request in TWO]
    texts = editor.generate(prompts, max_new_tokens=6)
    assert isinstance(texts, list)
    assert [editor.generate(prompt, max_new_tokens=6) for prompt in prompts] == texts


def test_forcing_agrees_with_the_edit() -> None:
    editor = tiny_editor()
    editor.edit(TWO)
    for predicted, wanted in editor.force([(request.prompt, request.target) for request in TWO]):
        assert predicted == wanted


# -- states --


def test_going_back_to_a_state_takes_everything_back() -> None:
    editor = tiny_editor(balance_weight=0.1)
    editor.edit(TWO[:1])
    between = editor.state()
    first = editor.edit(TWO[1:])[0]
    after = editor.state()
    editor.load_state(between)
    editor.edits.pop()
    assert_same_state(editor.state(), between)
    again = editor.edit(TWO[1:])[0]
    assert again.curve.losses == first.curve.losses
    assert_same_state(editor.state(), after)


def test_going_back_to_before_the_first_edit_is_like_a_new_editor() -> None:
    editor = tiny_editor(balance_weight=0.1)
    before = editor.state()
    editor.edit(TWO)
    after = editor.state()
    editor.load_state(before)
    editor.edits.clear()
    assert_same_state(editor.state(), before)
    editor.edit(TWO)
    assert_same_state(editor.state(), after)


def test_edits_go_on_from_parameters_alone() -> None:
    editor = tiny_editor()
    editor.edit(TWO)
    parameters = editor.parameters()
    editor.load_state(parameters)
    editor._begin()
    assert_same_state(editor.parameters(), parameters)
    assert said(editor, TWO) == targets(TWO)


def test_a_state_is_a_copy() -> None:
    editor = tiny_editor()
    editor.edit(TWO[:1])
    state = editor.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    editor.edit(TWO[1:])
    assert_same_state(state, kept)


# -- errors --


@pytest.mark.parametrize(("unrelated", "got"), [([], "an empty list"), ("Ada is", "the one text 'Ada is'")])
def test_unrelated_texts_that_are_none_or_no_list(unrelated: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"^unrelated: expected .*, got {got}"):
        BaftEditor(tiny_model(), tiny_tokenizer(), unrelated=unrelated)


@pytest.mark.parametrize("layers", [(3,), (0, 3), (1, 1), ()])
def test_layers_that_the_model_has_not(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^layers: expected different blocks from 0 to 2, got"):
        tiny_editor(layers=layers)


def test_a_rank_above_the_width() -> None:
    with pytest.raises(ValueError, match=str(WIDTH)):
        tiny_editor(rank=WIDTH + 1)


def test_an_editor_that_could_not_be_made_leaves_nothing_on_the_model() -> None:
    model = tiny_model()
    for changes in ({"rank": WIDTH + 1}, {"layers": (3,)}, {"blocks": "nowhere"}):
        with pytest.raises(ValueError):
            tiny_editor(model, **changes)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match=r"^mode: expected single, batch or sequential, got 'parallel'$"):
        tiny_editor().edit(TWO, "parallel")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("requests", "got"),
    [
        (TWO[0], "EditRequest"),
        (iter(TWO), "list_iterator"),
        ([TWO[0], {"prompt": "Ada is", "target": "Bob"}], "dict at 1"),
        ("Ada is", "str at 0"),
    ],
)
def test_what_is_no_list_of_requests(requests: Any, got: str) -> None:
    editor = tiny_editor()
    for edit in (editor.edit, lambda some: list(editor.edit_each(some))):
        with pytest.raises(ValueError, match=f"^requests: expected a list of EditRequest, got {got}$"):
            edit(requests)


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_a_request_that_can_not_be_edited_is_refused_before_any_is(mode: Any) -> None:
    for positions, bad, message in (
        ("all", EditRequest(prompt="Ada " * 40, target="Bob"), "^prompt: expected at most 64 tokens with its target"),
        ("subject", EditRequest(prompt="Ada is", target="Bob"), "expected a subject in the prompt 'Ada is', got None"),
        ("subject", EditRequest(prompt="Ada is", target="Bob", subject="Ebor"), "'Ada is', got 'Ebor'"),
    ):
        editor = tiny_editor(positions=positions)
        before = editor.state()
        with pytest.raises(ValueError, match=message):
            editor.edit([TWO[0], bad], mode)
        assert editor.edits == []
        assert_same_state(editor.state(), before)


def test_generating_without_the_subject_that_the_positions_need() -> None:
    with pytest.raises(ValueError, match=r'^positions="subject": expected to be told'):
        tiny_editor(positions="subject").generate("Ada is")


def test_a_calibration_that_failed_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    calibrated, editor = tiny_editor(), tiny_editor()
    calibrated._begin()
    with monkeypatch.context() as patched:
        patched.setattr("baft.engine.growth.calibrate_gates", run_out)
        with pytest.raises(torch.OutOfMemoryError):
            editor.edit(TWO[:1])
    editor._begin()
    assert_same_state(editor.state(), calibrated.state())


def test_gates_are_calibrated_without_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of hundreds of texts would take more memory than all else."""
    editor = tiny_editor()
    head = editor.model.get_output_embeddings()
    trainer = editor._begin()
    before = editor.parameters()["layers.1.gate"]

    def refuse(*_: Any) -> None:
        raise AssertionError("the head was run")

    monkeypatch.setattr(head, "forward", refuse)
    set_new_gates(trainer, 0.0)
    torch.testing.assert_close(editor.parameters()["layers.1.gate"], before)
