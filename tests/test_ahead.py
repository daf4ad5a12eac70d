"""Steps begun before it is known what the last one found: those that were too many leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import REQUESTS, UNRELATED, tiny_editor, tiny_model
from torch import Tensor

from baft import EditRequest
from baft.engine.ending import Ending, Watch
from baft.engine.step import TrainingStep

SEVERAL_A_PASS = {"batch_size": 2, "batch_passes": 9, "stop_below": 1.0}


class Run:
    """An editor that has edited ``REQUESTS``, its steps begun so many ahead, and all that came of it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, ahead: int, mode: Any, model: Any = None, **changes: Any
    ) -> None:
        self.editor = tiny_editor(model, **{"max_steps": 12, "balance_weight": 0.01, **changes})
        self.editor._begin().ahead = ahead
        self.begun, self.told, self.error = 0, [], ""
        arrange = TrainingStep.arrange

        def watch(*args: Any, **kwargs: Any) -> Any:
            self.begun += 1
            return arrange(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(TrainingStep, "arrange", watch)
            try:
                outcomes = self.editor.edit(REQUESTS, mode, on_step=lambda *step: self.told.append(step))
            except (RuntimeError, ValueError) as error:
                self.error, outcomes = str(error), []
        self.curves = [(o.curve.losses, o.curve.steps, o.curve.converged) for o in outcomes]
        self.steps = len(self.told)

    def assert_same(self, other: Run) -> None:
        assert (self.curves, self.told, self.error) == (other.curves, other.told, other.error)
        expected = other.editor.state()
        assert [name for name, value in self.editor.state().items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("sequential", {}),
        ("sequential", {"locality_loss": "update", "layers": (0, 2), "project_gradients": True, "weight_decay": 0.01}),
        ("sequential", {"positions": "subject", "gate_fn": "none"}),
        ("sequential", {"stop_below": 1e9}),
        ("sequential", {"stop_below": 0.0, "consolidate_every": 2, "consolidation_steps": 6, "batch_size": 2}),
        ("sequential", {"stop_below": 1.5, "consolidate_every": 2, "consolidation_steps": 18, "batch_size": 2}),
        ("batch", SEVERAL_A_PASS),
        ("batch", {"stop_below": 1.0}),
        ("batch", {"stop_below": 0.0, "batch_passes": 2}),
    ],
)
def test_it_makes_no_difference(monkeypatch: pytest.MonkeyPatch, mode: str, changes: Any, ahead: int) -> None:
    known, early = (Run(monkeypatch, steps, mode, **changes) for steps in (0, ahead))
    early.assert_same(known)
    assert known.begun == known.steps
    if changes.get("stop_below") != 0.0:
        assert early.begun > early.steps


def test_bases_that_only_the_host_can_retract(monkeypatch: pytest.MonkeyPatch) -> None:
    known, early = (Run(monkeypatch, ahead, "sequential", learning_rate=30.0, max_steps=4) for ahead in (0, 1))
    early.assert_same(known)
    assert early.begun > early.steps + len(REQUESTS)  # steps on hold were taken anew


@pytest.mark.parametrize("mode", ["sequential", "batch"])
def test_a_loss_that_is_not_finite_ends_it(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    runs = []
    for ahead in (0, 1):
        model = tiny_model()
        with torch.no_grad():
            model.get_input_embeddings().weight[_token_of_one(REQUESTS[2])] = torch.nan
        runs.append(Run(monkeypatch, ahead, mode, model=model, batch_size=2, rehearsal=0, locality_weight=0.0))
    known, early = runs
    early.assert_same(known)
    assert early.error.startswith("the edit loss became nan after ")
    assert all(value.isfinite().all() for value in early.editor.parameters().values())


def test_a_single_edit_that_diverges_harms_no_other() -> None:
    def edited(requests: list[EditRequest]) -> dict[str, Any]:
        model = tiny_model()
        with torch.no_grad():
            model.get_input_embeddings().weight[_token_of_one(REQUESTS[2])] = torch.nan
        editor = tiny_editor(model, max_steps=5, rehearsal=0, locality_weight=0.0)
        return {outcome.request.prompt: outcome for outcome in editor.edit(requests, "single")}

    outcomes = edited(REQUESTS)
    assert [request for request in REQUESTS if outcomes[request.prompt].curve.diverged] == [REQUESTS[2]]
    assert outcomes[REQUESTS[2].prompt].curve.steps == 1
    for prompt, alone in edited([*REQUESTS[:2], *REQUESTS[3:]]).items():
        assert outcomes[prompt].curve.losses == pytest.approx(alone.curve.losses, rel=1e-4)
        for name, value in alone.state.items():
            torch.testing.assert_close(outcomes[prompt].state[name], value, rtol=1e-3, atol=1e-4)


def _token_of_one(request: EditRequest) -> int:
    """A token that stands in this one's text and in no other."""
    editor = tiny_editor()
    others = {token for other in REQUESTS if other is not request for token in editor._encode(other).ids}
    others.update(token for text in UNRELATED for token in editor.encoder.prompt(text).ids)
    return next(token for token in editor._encode(request).ids if token not in others)


# -- the decision itself --


def judged(ending: Ending, losses: list[float], watched: list[bool], *, last: bool, first: bool = False) -> float:
    """Whether the step after one that found ``losses`` is on hold."""
    per_edit = torch.tensor(losses)
    ending.judge(per_edit, per_edit.sum(), Watch(*(torch.tensor(flag) for flag in (watched, first, last))))
    return ending.held.item()


def test_all_watched_losses_of_a_stretch_must_be_low() -> None:
    ending = Ending(0.5, torch.device("cpu"))
    two, one = [True, True], [True, False]
    assert not judged(ending, [0.1, 0.6], two, first=True, last=False)
    assert not judged(ending, [0.1, 0.1], two, last=True)  # an earlier one wasn't
    assert not judged(ending, [0.1, 0.1], two, first=True, last=False)  # not known before its end
    assert judged(ending, [0.1, 0.1], two, last=True)
    ending.release()
    assert judged(ending, [0.1, 0.6], one, first=True, last=True)


@pytest.mark.parametrize("stop_below", [0.05, 0.3, 0.7, 0.1])
def test_the_device_decides_as_the_host_does(stop_below: float) -> None:
    near = torch.tensor(stop_below)
    for loss in (near, torch.nextafter(near, torch.tensor(0.0)), torch.nextafter(near, torch.tensor(1.0))):
        ending = Ending(stop_below, torch.device("cpu"))
        assert judged(ending, [loss.item()], [True], first=True, last=True) == (loss.item() < stop_below)


def test_what_is_on_hold_leaves_no_trace() -> None:
    ending = Ending(0.5, torch.device("cpu"))
    judged(ending, [0.4], [True], first=True, last=False)
    with ending.on_hold():
        judged(ending, [9.0], [True], first=True, last=False)
        assert ending.held.item() == 1
    assert ending.held.item() == 0
    assert judged(ending, [0.4], [True], last=True)
    assert judged(ending, [9.0], [True], first=True, last=True)  # still


def test_bases_far_from_orthonormal_put_on_hold() -> None:
    def held(distances: Tensor) -> float:
        ending = Ending(0.5, torch.device("cpu"))
        ending.await_retraction(distances)
        return ending.held.item()

    assert held(torch.tensor([0.1, 0.5])) == 0
    assert held(torch.tensor([0.1, 0.51])) == held(torch.tensor([torch.nan, 0.1])) == 1
