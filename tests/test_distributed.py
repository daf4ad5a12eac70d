"""Several processes do what one does: steps, whole edits, measures and runs; and none waits for one that has failed."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PATIENCE, in_processes
from safetensors.torch import load_file, save_file
from small_runs import ASKED, PLAN, small_editor
from tiny import REQUESTS, UNRELATED, moved_from_identity, one_thread, tiny_editor, tiny_model, tiny_tokenizer
from torch import Tensor

from baft import BaftEditor
from baft.distributed import ALONE, World
from baft.engine.options import EngineOptions
from baft.engine.step import Lesson
from baft.evaluation.measures import Evaluator
from baft.fingerprint import hash_of_weights
from baft.runs.folder import RunFolder
from baft.runs.inputs import load_model
from baft.runs.run import open_context, run_edits
from baft.runs.sequential import SequentialRun
from baft.runs.undo import drop, roll_back

__all__ = ["one_thread"]

# -- shares --


def test_every_item_is_in_one_share() -> None:
    worlds = [World(rank, 3) for rank in range(3)]
    shares = [world.share(list("abcdefg")) for world in worlds]
    assert sorted(item for share in shares for item in share) == list("abcdefg")
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert ALONE.share("abc") == "abc" and ALONE.merged(["a", "b"]) == ["a", "b"]


# -- one step --

# By name: the configuration, and how many requests and unrelated texts the lesson has. One of two processes has no edit
# of "one request", and no unrelated text of "one text".
LESSONS: dict[str, tuple[dict[str, Any], int, int]] = {
    "kl": ({}, 5, 4),
    "update": ({"locality_loss": "update"}, 4, 3),
    "balance": ({"balance_weight": 0.5, "layers": (0, 1)}, 5, 2),
    "smoothed": ({"smoothing": 0.3}, 3, 2),
    "one request": ({"balance_weight": 0.5}, 1, 4),
    "one text": ({}, 3, 1),
    "no texts": ({"locality_weight": 0.0}, 2, 0),
}


def found_by_a_step(name: str, world: World) -> dict[str, Tensor]:
    """What a step finds before it updates: each edit's loss, all that it lowers, and the gradients."""
    changes, edits, texts = LESSONS[name]
    editor = moved_from_identity(tiny_editor(options=EngineOptions(world=world), **changes))
    trainer = editor._begin()
    with torch.no_grad():
        for layer, usage in trainer.step.usage.items():
            usage += torch.arange(len(usage)) + layer
    step = trainer.step
    encoded = [editor._encode(request) for request in REQUESTS[:edits]]
    lesson = Lesson(encoded, [editor.encoder.prompt(text, subject="") for text in UNRELATED[:texts]])
    inputs = step.arrange([lesson], watched=(edits, True, True))
    per_edit, loss = step._differentiate(inputs)
    if inputs.part is not None:
        per_edit, loss = inputs.part.gathered(per_edit, loss, step.sets.gradients())
    assert inputs.watch is not None and len(inputs.watch.edits) == len(per_edit)
    gradients = {f"gradient {k}": gradient.clone() for k, gradient in enumerate(step.sets.gradients())}
    return {"per_edit": per_edit, "loss": loss, **gradients}


# -- whole edits --


def edited(mode: Any, world: World) -> BaftEditor:
    changes = {"batch_size": 4, "consolidate_every": 2, "consolidation_steps": 4, "grow_every": 3, "grow_by": 2}
    editor = tiny_editor(options=EngineOptions(world=world), **changes)
    editor.edit(REQUESTS, mode)
    return editor


def said(editor: BaftEditor) -> list[str]:
    return [text.strip() for text in editor.generate([request.prompt for request in REQUESTS], max_new_tokens=6)]


def answers(editor: BaftEditor, world: World) -> list[Any]:
    measured = Evaluator(editor, max_new_tokens=6, world=world).measure(REQUESTS[:3])
    return [[(r.question.prompt, r.text, r.before, r.token) for r in results] for results in measured]


def ran(mode: Any, world: World) -> dict[str, Any]:
    editor = tiny_editor(options=EngineOptions(world=world), max_steps=20)
    report = run_edits(editor, REQUESTS[:3], mode, world=world)
    return {
        "records": [
            [record.index, record.request.prompt, record.curve.steps, [result.text for result in record.immediate]]
            for record in report.records()
        ],
        "metrics": report.results["metrics"],
        "steps": report.results["timing"]["steps"],
    }


# -- one model in parts --


def edited_in_parts(folder: Path, world: World) -> tuple[BaftEditor, list[float]]:
    """Sequential edits of the saved model, whose matrices lie in parts in the processes; and the first one's losses."""
    model, _ = load_model(str(folder / "model"), tensor_parallel=world.size > 1)
    world = dataclasses.replace(world, one_model=True)
    editor = tiny_editor(model, options=EngineOptions(world=world), layers=(0, 1), rehearsal=2)
    first, *_ = editor.edit(REQUESTS[:3])
    return editor, first.curve.losses


# -- runs that go on --


def gone_on_with(folder: Path, world: World, stops: Sequence[int]) -> tuple[dict[str, Tensor], Any]:
    """A sequential run that stops after some edits, whose last is in no checkpoint, and goes on with new editors.

    Returns:
        The editor's state in the end, and what the journal says of each edit.
    """
    for stop in stops:
        place = RunFolder(folder) if world.writes else None
        if place and not place.begun:
            place.begin({}, {})
        editor = small_editor(options=EngineOptions(world=world))
        plan = dataclasses.replace(PLAN, checkpoint_every=1)
        context = open_context(editor, ASKED[:6], plan=plan, folder=place, world=world)
        context.begin_session()
        run = SequentialRun(context)
        run.restore()
        run.edit(stop)
        texts = [[record.curve.losses, [r.text for r in record.immediate]] for record in context.journal.records()]
        if place:
            place.checkpoints().cut(stop - 1)
            place.close()
    return editor.state(), texts


def taken_back_with(folder: Path, world: World) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A run of six edits, of which those from the fourth on are taken back, and then the second.

    Returns:
        The editor's state in the end, and that of one that was never asked for what was taken back.
    """
    gone_on_with(folder, world, [6])
    place = RunFolder(folder) if world.writes else None
    for take_back, number in ((roll_back, 4), (drop, 1)):
        editor = small_editor(options=EngineOptions(world=world))
        context = open_context(editor, ASKED[:6], plan=PLAN, folder=place, world=world)
        take_back(context, place, number)
    assert context.journal.positions() == [0, 2, 3]
    if place:
        assert len(json.loads((place.adapter / "edits.json").read_text())["edits"]) == 3
        place.close()
    other = small_editor(options=EngineOptions(world=world))
    other.edit([ASKED[0], *ASKED[2:4]])
    return editor.state(), other.state()


def finished_with(folder: Path, world: World) -> list[Any]:
    """Single edits, of which the last is made by a run that goes on: one request for two processes."""
    for count in (2, 3):
        place = RunFolder(folder) if world.writes else None
        if place and not place.begun:
            place.begin({}, {})
        editor = small_editor(options=EngineOptions(world=world, slots=1))
        report = run_edits(editor, ASKED[:count], "single", folder=place, world=world)
        told = [[record.request.prompt, record.curve.losses] for record in report.records()]
        if place:
            place.close()
    return told


def do_everything(rank: int, count: int, folder: Path) -> None:
    """All that is compared, in one start of the processes, as that takes seconds."""
    world = World(rank, count)
    for name in LESSONS:
        save_file(found_by_a_step(name, world), folder / f"{name} {world.rank}.safetensors")
    for mode in ("batch", "sequential"):
        editor = edited(mode, world)
        save_file(editor.state(), folder / f"{mode} {world.rank}.safetensors")
        texts = {"said": said(editor), "measured": answers(editor, world)}
        (folder / f"{mode} {world.rank}.json").write_text(json.dumps(texts))
    runs = {mode: ran(mode, world) for mode in ("single", "batch")}
    (folder / f"runs {world.rank}.json").write_text(json.dumps(runs))
    for name, stops in {"at once": [6], "in parts": [2, 5, 6]}.items():
        state, texts = gone_on_with(folder / name, world, stops)
        save_file(state, folder / f"{name} {world.rank}.safetensors")
        (folder / f"{name} {world.rank}.json").write_text(json.dumps(texts))
    taken_back, never_asked = taken_back_with(folder / "taken back", world)
    save_file(taken_back, folder / f"taken back {world.rank}.safetensors")
    save_file(never_asked, folder / f"never asked {world.rank}.safetensors")
    (folder / f"finished {world.rank}.json").write_text(json.dumps(finished_with(folder / "finished", world)))
    os.environ |= {"LOCAL_RANK": str(world.rank), "RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    editor, losses = edited_in_parts(folder, world)
    weight = next(editor.model.model.layers[0].mlp.parameters())
    save_file(editor.parameters(), folder / f"parts {world.rank}.safetensors")
    if world.writes:  # and no other has to take part
        editor.save_pretrained(folder / "parts")
    part = weight.to_local().numel() / weight.numel()
    texts = {"said": said(editor)[:3], "losses": losses, "part": part, "hash": hash_of_weights(editor.model)}
    (folder / f"parts {world.rank}.json").write_text(json.dumps(texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left."""
    folder = tmp_path_factory.mktemp("two")
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    in_processes(do_everything, folder)
    return folder


def both(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name} {rank}.safetensors") for rank in range(2)]


def both_said(folder: Path, name: str) -> list[Any]:
    return [json.loads((folder / f"{name} {rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", LESSONS)
def test_a_step_of_two_finds_what_one_finds(folder: Path, name: str) -> None:
    expected = found_by_a_step(name, ALONE)
    first, second = both(folder, name)
    assert first.keys() == expected.keys() == second.keys()
    for key, value in expected.items():
        assert torch.equal(first[key], second[key])
        torch.testing.assert_close(first[key], value)


@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_two_end_bitwise_alike_and_say_what_one_says(folder: Path, mode: str) -> None:
    first, second = both(folder, mode)
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = edited(mode, ALONE)
    assert first.keys() == alone.state().keys()
    texts, others = both_said(folder, mode)
    assert texts == others
    assert texts["said"] == said(alone) == [request.target for request in REQUESTS]
    assert texts["measured"] == json.loads(json.dumps(answers(alone, ALONE)))


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_a_run_of_two_reports_what_one_reports(folder: Path, mode: str) -> None:
    first, second = both_said(folder, "runs")
    assert first == second
    assert first[mode] == json.loads(json.dumps(ran(mode, ALONE)))


def test_a_run_of_two_goes_on_as_if_it_had_never_stopped(folder: Path) -> None:
    (whole, _), (first, second) = both(folder, "at once"), both(folder, "in parts")
    assert whole.keys() == first.keys() == second.keys()
    assert all(torch.equal(first[name], whole[name]) and torch.equal(second[name], whole[name]) for name in whole)
    texts, *others = [*both_said(folder, "at once"), *both_said(folder, "in parts")]
    assert len(texts) == 6
    assert others == [texts] * 3


def test_edits_that_two_take_back_are_as_if_never_made(folder: Path) -> None:
    (first, second), (expected, _) = both(folder, "taken back"), both(folder, "never asked")
    assert first.keys() == expected.keys() == second.keys()
    assert all(torch.equal(first[name], expected[name]) and torch.equal(second[name], expected[name]) for name in first)


def test_single_edits_of_two_go_on_with_fewer_requests_than_processes(folder: Path, tmp_path: Path) -> None:
    first, second = both_said(folder, "finished")
    assert first == second
    assert first == json.loads(json.dumps(finished_with(tmp_path, ALONE)))


def test_a_model_in_two_parts_is_edited_as_a_whole_one(folder: Path) -> None:
    first, second = both(folder, "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    texts, others = both_said(folder, "parts")
    assert texts == others
    assert texts["part"] == 0.5
    whole, losses = edited_in_parts(folder, ALONE)
    assert texts["losses"] == pytest.approx(losses, rel=1e-3)
    assert texts["said"] == said(whole)[:3] == [request.target for request in REQUESTS[:3]]
    assert texts["hash"] == hash_of_weights(whole.model)  # of all the parts
    assert BaftEditor.from_pretrained(tiny_model(), tiny_tokenizer(), folder / "parts").edits == REQUESTS[:3]


def test_a_run_needs_a_request_for_each_process() -> None:
    with pytest.raises(ValueError, match="processes: expected at most 2, as many as requests, got 3"):
        run_edits(tiny_editor(), REQUESTS[:2], "batch", world=World(0, 3))


# -- a process that fails --


def fail_in_one(rank: int, count: int, folder: Path) -> None:
    if rank == 1:
        raise ValueError("a process of its own accord")
    try:
        World(rank, count).merged([0])
    except RuntimeError as error:
        (folder / "seen").write_text(str(error))
        raise


def test_a_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Exception, match=r"a process of its own accord|Connection"):
        in_processes(fail_in_one, tmp_path)
    assert time.monotonic() - began < PATIENCE / 2
