"""Steps captured and replayed, on a stand-in for CUDA graphs: bit for bit the eager steps, or eager and saying why."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tape import CaptureError, capture_on_tape
from tiny import REQUESTS, poison, tiny_editor, tiny_model
from torch import Tensor

from baft import BaftEditor, EditRequest, objective
from baft.engine import graphs
from baft.engine.buckets import rounded_up
from baft.engine.graphs import Capture, CudaCapture, Graphs
from baft.engine.options import EngineOptions
from baft.engine.step import Found, StepInputs, TrainingStep
from baft_kernels import retract_near_, stiefel


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is at hand before the device has computed it."""
    monkeypatch.setattr(stiefel, "_is_on_host", lambda value: False)


class Eager(Graphs):
    """Takes inputs in few shapes, as graphs do, and computes them as they come."""

    used = True  # type: ignore[assignment]

    def __call__(self, inputs: StepInputs) -> Found:
        return self._step.compute(inputs)


def editor_with(
    kind: type[Graphs], capture: Capture = capture_on_tape, *, ahead: int = 0, model: Any = None, **changes: Any
) -> BaftEditor:
    """An editor whose steps are computed so."""
    options = changes.pop("options", EngineOptions())
    editor = tiny_editor(model, options=options, **{"max_steps": 8, "batch_passes": 6, **changes})
    trainer = editor._begin()
    trainer.graphs_for = lambda step, **given: kind(step, capture, **given)  # type: ignore[method-assign]
    trainer.graphs, trainer.ahead = trainer.graphs_for(trainer.step), ahead
    return editor


def captured(editor: BaftEditor, *, abreast: bool = False) -> int:
    """How many shapes were, and no reason against more was found."""
    report = editor.engine_report()
    said = str(report["abreast"]["graphs"] if abreast else report["graphs"])
    assert said.startswith("captured ") and said.endswith(("shape", "shapes")), said
    return int(said.split()[1])


def assert_same(actual: BaftEditor, expected: BaftEditor) -> None:
    states = actual.state(), expected.state()
    assert [name for name, value in states[1].items() if not torch.equal(states[0][name], value)] == []


def losses(outcomes: Sequence[Any]) -> list[list[float]]:
    return [outcome.curve.losses for outcome in outcomes]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("sequential", {}),
        ("sequential", {"backend": "reference"}),
        ("sequential", {"locality_loss": "update", "locality_margin": 0.01, "balance_weight": 0.1}),
        ("sequential", {"positions": "subject", "layers": (0, 2), "balance_weight": 0.1}),
        ("sequential", {"positions": "subject", "locality_loss": "update", "backend": "reference"}),
        ("sequential", {"locality_weight": 0.0, "gate_fn": "none", "project_gradients": True}),
        ("sequential", {"consolidate_every": 2, "consolidation_steps": 6, "batch_size": 2, "weight_decay": 0.01}),
        ("sequential", {"learning_rate": 30.0, "max_steps": 4}),  # some bases are left for the host to retract
        ("batch", {"batch_size": 2, "stop_below": 1.0, "batch_passes": 9}),
        ("batch", {}),
    ],
)
def test_replays_are_the_eager_steps_bit_for_bit(mode: Any, changes: Any, ahead: int) -> None:
    taped, eager = (editor_with(kind, ahead=ahead, **changes) for kind in (Graphs, Eager))
    assert losses(taped.edit(REQUESTS, mode)) == losses(eager.edit(REQUESTS, mode))
    assert_same(taped, eager)
    assert captured(taped) >= (2 if mode == "sequential" else 1)


ABREAST: dict[str, Any] = {"options": EngineOptions(slots=2)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backend": "reference", "stop_below": 0.8},
        {"locality_loss": "update", "locality_margin": 0.01, "balance_weight": 0.1},
        {"positions": "subject", "layers": (0, 2), "weight_decay": 0.01, "project_gradients": True},
        {"learning_rate": 30.0, "max_steps": 4},
    ],
)
def test_edits_abreast_by_graphs_are_the_eager_ones_bit_for_bit(changes: Any) -> None:
    taped, eager = (editor_with(kind, **ABREAST, **changes) for kind in (Graphs, Eager))
    outcomes, expected = (sorted(e.edit_each(REQUESTS), key=lambda o: o.index) for e in (taped, eager))
    assert losses(outcomes) == losses(expected)
    for one, other in zip(outcomes, expected, strict=True):
        assert one.state and other.state and all(torch.equal(one.state[name], v) for name, v in other.state.items())
    assert 0 < captured(taped, abreast=True) < sum(outcome.curve.steps for outcome in outcomes) / 2  # passes


def test_edits_abreast_are_captured_where_every_slot_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    by_graphs: list[int] = []
    call = Graphs.__call__

    def watch(self: Graphs, inputs: StepInputs) -> Found:
        by_graphs.append(len(inputs.sets))
        return call(self, inputs)

    monkeypatch.setattr(Graphs, "__call__", watch)
    editor = editor_with(Graphs, **ABREAST, stop_below=0.0)
    editor.edit(REQUESTS, "single")  # two at a time, and the fifth by itself
    assert by_graphs == [2] * 2 * editor.config.max_steps
    assert not editor._begin().step.sets.grouped


def test_how_many_go_abreast_is_planned_before_any_is_captured() -> None:
    taped, eager = (editor_with(kind, options=EngineOptions(), stop_below=0.0, max_steps=6) for kind in (Graphs, Eager))
    outcomes, expected = (sorted(e.edit_each(REQUESTS), key=lambda o: o.index) for e in (taped, eager))
    assert losses(outcomes) == losses(expected)
    assert 0 < captured(taped, abreast=True) <= 4  # of six steps the first two plan, and a shape is first seen


def test_where_memory_runs_out_graphs_go_too(monkeypatch: pytest.MonkeyPatch) -> None:
    call = TrainingStep.__call__

    def small(step: TrainingStep, lessons: Sequence[Any], *rest: Any, **options: Any) -> Any:
        if len(lessons) > 2:
            raise torch.OutOfMemoryError("pretended")
        return call(step, lessons, *rest, **options)

    monkeypatch.setattr(TrainingStep, "__call__", small)
    editor, alone = (editor_with(kind, options=EngineOptions(slots=n)) for kind, n in ((Graphs, 5), (Eager, 2)))
    with pytest.warns(RuntimeWarning, match="going on with 2 edits at a time"):
        outcomes = sorted(editor.edit_each(REQUESTS), key=lambda o: o.index)
    expected = sorted(alone.edit_each(REQUESTS), key=lambda o: o.index)
    assert losses(outcomes) == losses(expected)
    assert captured(editor, abreast=True) > 0


def test_an_edit_that_diverges_in_a_graph_leaves_its_neighbour_alone() -> None:
    def outcomes(kind: type[Graphs], **changes: Any) -> list[Any]:
        model = tiny_model()
        bad = EditRequest(prompt=f"Ada {poison(model)} is", target="Ebor")
        editor = editor_with(kind, model=model, **ABREAST, **changes)
        return sorted(editor.edit_each([bad, *REQUESTS[:3]]), key=lambda outcome: outcome.index)

    stopped, *others = outcomes(Graphs, stop_below=0.0)
    assert stopped.curve.diverged and stopped.curve.steps == 1
    assert losses(others) == losses(outcomes(Eager, stop_below=0.0)[1:])
    assert all(torch.isfinite(value).all() for other in others for value in other.state.values())


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2", "gpt_neox"])
def test_other_families(family: str) -> None:
    taped, eager = (editor_with(kind, model=tiny_model(family)) for kind in (Graphs, Eager))
    assert losses(taped.edit(REQUESTS[:2])) == losses(eager.edit(REQUESTS[:2]))
    assert captured(taped) > 0


def test_a_shape_is_captured_once_and_replayed_ever_after(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = 0
    compute = TrainingStep.compute

    def count(step: TrainingStep, inputs: StepInputs) -> Found:
        nonlocal computed
        computed += 1
        return compute(step, inputs)

    monkeypatch.setattr(TrainingStep, "compute", count)
    editor = editor_with(Graphs, stop_below=0.0)
    editor.edit(REQUESTS)
    assert computed == captured(editor) < 8 * len(REQUESTS) / 2


def test_graphs_go_when_the_models_weights_do() -> None:
    taped, eager = (editor_with(kind, rehearsal=0, stop_below=0.0) for kind in (Graphs, Eager))
    for editor in (taped, eager):
        editor.edit(REQUESTS[:1])
        head = editor.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(2 * head.weight.detach())
        editor.edit(REQUESTS[:1])
    assert_same(taped, eager)


def test_replays_are_counted_as_writes() -> None:
    # Or else what was packed outside of graphs would pass for fresh.
    editor = editor_with(Graphs)
    inputs = arranged(editor, [0], 1.0, (1, True, True))
    editor._begin().graphs(inputs)
    before = [parameter._version for parameter in editor.interventions.parameters()]
    editor._begin().graphs(inputs)
    assert all(p._version > version for p, version in zip(editor.interventions.parameters(), before, strict=True))


# -- inputs --


def arranged(editor: BaftEditor, requests: Sequence[int], rate: float, watched: tuple[int, bool, bool]) -> StepInputs:
    trainer = editor._begin()
    lesson = trainer.lesson([editor._encode(REQUESTS[k]) for k in requests])
    return trainer.step.arrange([lesson], rate=rate, watched=watched, few_shapes=True)


def names(inputs: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where tensors are in a dataclass."""
    found = []
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, Tensor):
            found.append((*path, field.name))
        elif dataclasses.is_dataclass(value):
            found += names(value, (*path, field.name))
    return found


def with_one_of(inputs: Any, other: Any, path: tuple[str, ...]) -> Any:
    """``inputs`` with a tensor of ``other``."""
    name, *rest = path
    theirs = getattr(other, name)
    return dataclasses.replace(
        inputs, **{name: with_one_of(getattr(inputs, name), theirs, tuple(rest)) if rest else theirs}
    )


CHANGES = {"learning_rate": 0.01, "positions": "prompt", "balance_weight": 0.5, "stop_below": 20.0, "rehearsal": 0}


def two_of_one_shape(editor: BaftEditor) -> tuple[StepInputs, StepInputs]:
    """Inputs that differ in what each loss looks at."""
    pairs = [*itertools.combinations(range(len(REQUESTS)), 2)] * 2  # the second time with other unrelated texts
    drawn = [arranged(editor, pair, 1.0, (2, True, True)) for pair in pairs]
    others = [arranged(editor, pair, 0.5, (1, False, False)) for pair in pairs]

    def differ(one: StepInputs, other: StepInputs) -> bool:
        count = int(one.unrelated_tokens[0])
        cells = (int(inputs.texts.unrelated_cells[:count].sum()) for inputs in (one, other))
        return len(set(cells)) == 2 and not torch.equal(one.wanted, other.wanted)

    return next(
        (one, other)
        for one, other in itertools.product(drawn, others)
        if graphs._shape(one) == graphs._shape(other) and differ(one, other)
    )


# Blocks that are replaced by their outputs see the ones, only grouped interventions the others.
UNUSED = {"ids", "sets"}


@pytest.mark.parametrize("locality_loss", ["kl", "update"])
def test_every_input_comes_from_the_step_and_not_from_the_capture(locality_loss: str) -> None:
    teller, taped, eager = (editor_with(Graphs, locality_loss=locality_loss, **CHANGES) for _ in range(3))
    teller.edit(REQUESTS[:1])
    one, other = two_of_one_shape(teller)
    start = teller.state()
    changed = set()

    def after(compute: Callable[[StepInputs], Found], editor: BaftEditor, inputs: StepInputs) -> list[Tensor]:
        editor.load_state(start)
        ending = editor._begin().step.ending
        assert ending is not None
        ending.release()
        ending._highest.fill_(30.0)
        found = [value.clone() for value in compute(inputs)]
        return [*found, *editor.state().values(), ending.held.clone(), ending._highest.clone()]

    after(taped._begin().graphs, taped, one)
    base = after(eager._begin().step.compute, eager, one)
    for path in names(one):
        inputs = with_one_of(one, other, path)
        actual = after(taped._begin().graphs, taped, inputs)
        expected = after(eager._begin().step.compute, eager, inputs)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)), path
        if not all(torch.equal(a, e) for a, e in zip(actual, base, strict=True)):
            changed.add(path[-1])
    assert captured(taped) == 1
    # Lest the test show nothing: each input that differs makes a difference.
    differing = {path[-1] for path in names(one) if not torch.equal(_at(one, path), _at(other, path))}
    assert differing - changed <= UNUSED
    assert {"prefix", "wanted", "rates", "last", "answer_cells", "unrelated_cells"} <= changed


def _at(inputs: Any, path: tuple[str, ...]) -> Tensor:
    for name in path:
        inputs = getattr(inputs, name)
    assert isinstance(inputs, Tensor)
    return inputs


@pytest.mark.parametrize("options", [EngineOptions(), EngineOptions(side_by_side=False), EngineOptions(replay=False)])
@pytest.mark.parametrize("locality_loss", ["kl", "update"])
def test_padding_changes_no_loss_and_no_gradient(locality_loss: str, options: EngineOptions) -> None:
    editor = tiny_editor(options=options, locality_loss=locality_loss, balance_weight=0.5, unrelated_per_step=3)
    editor.edit(REQUESTS[:1])
    trainer = editor._begin()
    lesson = trainer.lesson([editor._encode(request) for request in REQUESTS])
    found = []
    for few_shapes in (False, True):
        inputs = trainer.step.arrange([lesson], few_shapes=few_shapes)
        per_edit, loss = trainer.step._differentiate(inputs)
        gradients = {name: p.grad.clone() for name, p in editor.interventions.named_parameters()}
        trainer.step.sets.drop_gradients()
        found.append((inputs, per_edit, loss, gradients))
    (narrow, *expected), (wide, per_edit, loss, gradients) = found
    assert len(wide.wanted) > len(narrow.wanted) and len(per_edit) == 8
    torch.testing.assert_close(per_edit[:5], expected[0])
    torch.testing.assert_close(loss, expected[1])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[2][name], rtol=1e-4, atol=1e-6)


def test_buckets() -> None:
    assert [rounded_up(count, 1) for count in (0, 1, 2, 3, 5, 8, 9)] == [0, 1, 2, 4, 8, 8, 16]
    assert sorted({rounded_up(count, 4) for count in range(1, 33)}) == [*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32]
    assert all(count <= rounded_up(count, 4) <= max(count + 1, 1.25 * count) for count in range(1, 1000))


# -- where there can be no graph --


def test_a_step_that_waits_for_the_device_is_found_and_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    mean_of = objective.mean_of

    def waiting(values: Tensor, counts: Tensor) -> Tensor:
        assert int(counts.sum()) == len(values)
        return mean_of(values, counts)

    monkeypatch.setattr(objective, "mean_of", waiting)
    taped, eager = editor_with(Graphs), editor_with(Eager)
    with pytest.warns(RuntimeWarning, match="without CUDA graphs: CaptureError: "):
        found = losses(taped.edit(REQUESTS[:3]))
    assert taped.engine_report()["graphs"].startswith("no: CaptureError: ")
    for actual, expected in zip(found, losses(eager.edit(REQUESTS[:3])), strict=True):
        assert actual == pytest.approx(expected, rel=1e-2)  # other shapes, other roundings


def test_a_capture_that_fails_leaves_everything_as_it_was() -> None:
    def failing_late(function: Callable[[], Found]) -> Any:
        function()  # up to the end
        raise torch.OutOfMemoryError("no more\nof it")

    editor = editor_with(Graphs, failing_late, balance_weight=0.1)
    inputs = arranged(editor, [0, 1], 1.0, (1, True, True))
    before, trainer = editor.state(), editor._begin()
    assert trainer.step.ending is not None
    with pytest.warns(RuntimeWarning):
        trainer.graphs._add("a shape", inputs)
    after = editor.state()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in editor.interventions.parameters())
    assert trainer.step.ending.held.item() == 0
    assert editor.engine_report()["graphs"] == "no: OutOfMemoryError: no more"


def test_a_capture_that_fails_halfway_leaves_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = editor_with(Graphs)
    trainer = editor._begin()

    def fail(*_: Any) -> None:
        raise RuntimeError("in the optimiser")

    inputs = arranged(editor, [0], 1.0, (1, True, True))
    with monkeypatch.context() as patched, pytest.warns(RuntimeWarning):
        patched.setattr(trainer.step.sets, "update", fail)
        trainer.graphs._add("a shape", inputs)
    assert all(parameter.grad is None for parameter in editor.interventions.parameters())


def test_graphs_made_before_a_capture_fails_go_on() -> None:
    left = 2

    def capture(function: Callable[[], Found]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("enough")
        return capture_on_tape(function)

    taped, eager = editor_with(Graphs, capture), editor_with(Eager)
    with pytest.warns(RuntimeWarning):
        found = taped.edit(REQUESTS)
    assert losses(found) == losses(eager.edit(REQUESTS))
    assert taped.engine_report()["graphs"] == "captured 2 shapes, no more: ValueError: enough"


def test_there_are_not_more_graphs_than_are_useful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST", 2)
    editor = editor_with(Graphs)
    editor.edit(REQUESTS)
    assert editor.engine_report()["graphs"] == "captured 2 shapes, no more: 2 are enough"
    trainer = editor._begin()
    trainer.graphs.forget()
    assert trainer.graphs.report() == "captured 0 shapes"
    editor.edit(REQUESTS)
    assert editor.engine_report()["graphs"] == "captured 2 shapes, no more: 2 are enough"


def test_what_can_not_be_captured_is_not_tried_again() -> None:
    tried = 0

    def refuse(_: Any) -> Any:
        nonlocal tried
        tried += 1
        raise ValueError("never")

    editor = editor_with(Graphs, refuse)
    with pytest.warns(RuntimeWarning):
        editor.edit(REQUESTS[:1])
    editor._begin().graphs.forget()
    editor.edit(REQUESTS[1:2])
    assert (tried, editor.engine_report()["graphs"]) == (1, "no: ValueError: never")


def test_models_that_make_masks_which_wait() -> None:
    # Sliding windows that are shorter than the texts: the grid can't carry the mask.
    editor = editor_with(Graphs, model=tiny_model("gemma2"), max_steps=2)
    with pytest.warns(RuntimeWarning):
        editor.edit(REQUESTS[:1])
    assert editor.engine_report()["graphs"].startswith("no: CaptureError: ")


def test_it_says_why_there_are_none_here() -> None:
    for options, reason in ((EngineOptions(), "switched off"), (EngineOptions(graphs=True), "expected the model on")):
        editor = tiny_editor(options=options, max_steps=1)
        editor.edit(REQUESTS[:1])
        assert editor.engine_report()["graphs"].startswith(f"no: {reason}")
    assert CudaCapture.why_not([torch.device("cuda:0")]) is None
    assert CudaCapture.why_not([torch.device("cuda:0"), torch.device("cuda:1")]).endswith("got it on cuda:0, cuda:1")


# -- the stand-in --


def test_the_tape_runs_again_what_was_recorded_on_what_there_is_now() -> None:
    x, total = torch.arange(4.0), torch.zeros(2)
    host = []

    def function() -> Tensor:
        host.append(1)
        y = x.view(2, 2).clone()
        y[0].mul_(10)
        total.add_(y.sum(0))
        return y.softmax(-1)

    replay, result = capture_on_tape(function)
    for value in (3.0, 5.0):
        x[0] = value
        before = total.clone()
        replay()
        rows = x.view(2, 2) * torch.tensor([[10.0], [1.0]])
        torch.testing.assert_close(result, rows.softmax(-1))
        torch.testing.assert_close(total, before + rows.sum(0))
    assert len(host) == 1


@pytest.mark.parametrize(
    "look",
    [
        Tensor.tolist,
        Tensor.item,
        Tensor.numpy,
        Tensor.nonzero,
        Tensor.unique,
        bool,
        float,
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0]) + x,
        lambda x: torch.equal(x, x),
        lambda x: torch.segment_reduce(x, "sum", lengths=torch.ones(1, dtype=torch.long)),
    ],
)
def test_the_tape_lets_nobody_look(look: Callable[[Tensor], Any]) -> None:
    with pytest.raises(CaptureError):
        capture_on_tape(lambda: look(torch.ones(1)))


def test_a_retraction_looks_at_nothing() -> None:
    bases = [torch.eye(2, 5) * scale for scale in (1.01, 3.0)]
    replay, distances = capture_on_tape(lambda: retract_near_(bases))
    torch.testing.assert_close(bases, [torch.eye(2, 5), 3 * torch.eye(2, 5)])
    torch.testing.assert_close(distances, torch.tensor([0.0201, 8.0]) * 2**0.5)
    bases[1].copy_(0.99 * torch.eye(2, 5))
    replay()
    torch.testing.assert_close(bases[1], torch.eye(2, 5))
