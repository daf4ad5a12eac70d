"""Several edited models in one: each sequence of a batch says what its own state would have it say alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import REQUESTS, WIDTH, attach, random_interventions, tiny_editor, tiny_model
from tiny import one_thread as one_thread
from torch import Tensor

from baft import BaftEditor, EditRequest, Probe
from baft.bank import AdapterBank
from baft.evaluation.measures import Evaluator
from baft.positions import PromptTokens
from baft_kernels import BaftIntervention, GroupedBaftIntervention
from baft_kernels.reference import GATE_FNS

POSITIONS = ("all", "prompt", "last", "subject", "f2+l1")

# Of several lengths, so that batches are padded, and each asked of several states.
PROMPTS = ["Norland", "The capital of Norland is", "The king of Sudland? The king of Sudland is in", "Bob was born in"]
SUBJECTS = ["Norland", "Norland", "Sudland", "Bob"]
ANSWERS = ["Arvik", "Ebor", "Ada Lund", "Paris"]
ASKED = [(prompt, state) for state in (2, 0, 1) for prompt in range(len(PROMPTS))]

State = dict[str, Tensor]


def random_state(seed: int, layers: tuple[int, ...] = (0, 1), **options: Any) -> State:
    interventions = random_interventions(layers, rank=8, seed=seed, **options)
    return {
        f"layers.{layer}.{name}": p.detach() for layer, i in interventions.items() for name, p in i.named_parameters()
    }


STATES = [random_state(seed) for seed in range(3)]


def editor_for(positions: str = "all", **changes: Any) -> BaftEditor:
    return tiny_editor(positions=positions, **{"layers": (0, 1), **changes})


def ask_each(editor: BaftEditor, ask: Callable[[int], Any]) -> list[Any]:
    """What ``ask`` gives for each asked prompt, with the state of its own loaded."""
    answers = []
    for prompt, state in ASKED:
        editor.load_state(STATES[state])
        answers.append(ask(prompt))
    editor.load_state(random_state(9))  # what is loaded has no part in what a bank says
    return answers


# -- generation and forcing --


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_each_prompt_is_continued_by_its_own_state(positions: str, num_beams: int) -> None:
    editor = editor_for(positions)
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": num_beams}
    expected = ask_each(
        editor, lambda k: editor.generate([PROMPTS[k]], subjects=[SUBJECTS[k]], batch_size=1, **options)[0]
    )
    asked = {
        "adapters": editor.bank(STATES),
        "adapter_ids": [state for _, state in ASKED],
        "subjects": [SUBJECTS[prompt] for prompt, _ in ASKED],
    }
    for batch_size in (1, 5, 64):
        prompts = [PROMPTS[prompt] for prompt, _ in ASKED]
        assert editor.generate(prompts, batch_size=batch_size, **asked, **options) == expected
    assert len(set(expected)) > len(PROMPTS), "states that say different things"


@pytest.mark.parametrize("positions", POSITIONS)
def test_each_answer_is_forced_on_its_own_state(positions: str) -> None:
    editor = editor_for(positions)
    expected = ask_each(editor, lambda k: editor.force([(PROMPTS[k], ANSWERS[k])], subjects=[SUBJECTS[k]])[0])
    pairs = [(PROMPTS[prompt], ANSWERS[prompt]) for prompt, _ in ASKED]
    asked = {
        "adapters": editor.bank(STATES),
        "adapter_ids": [state for _, state in ASKED],
        "subjects": [SUBJECTS[prompt] for prompt, _ in ASKED],
    }
    for batch_size in (1, 5, 64):
        assert editor.force(pairs, batch_size=batch_size, **asked) == expected


@pytest.mark.parametrize("gate_fn", GATE_FNS)
def test_every_gate_can_be_banked(gate_fn: str) -> None:
    editor = editor_for(gate_fn=gate_fn)
    states = [random_state(seed, gate_fn=gate_fn) for seed in range(2)]
    expected = []
    for state in states:
        editor.load_state(state)
        expected.append(editor.generate(PROMPTS[1]))
    assert editor.generate([PROMPTS[1]] * 2, adapters=editor.bank(states), adapter_ids=[0, 1]) == expected


def test_the_logits_are_those_of_each_state() -> None:
    """Texts that say the same might still be off: here nothing is rounded to a token."""
    editor = editor_for("f2+l1")
    ids = torch.randint(3, 128, (3, 9), generator=torch.Generator().manual_seed(0))
    prompt = torch.ones(3, 9, dtype=torch.bool)
    prompt[1, :3] = prompt[2, :5] = False

    @torch.no_grad()
    def logits(row: slice) -> Tensor:
        with editor.attachment.prompts(PromptTokens(prompt[row])):
            return editor.model(input_ids=ids[row], attention_mask=prompt[row].long()).logits

    with editor.bank(STATES).on(editor.attachment, [2, 0, 2]):
        banked = logits(slice(0, 3))
    for row, state in enumerate((2, 0, 2)):
        editor.load_state(STATES[state])
        real = prompt[row]
        expected = logits(slice(row, row + 1))[0][real]
        torch.testing.assert_close(banked[row][real], expected, rtol=1e-4, atol=1e-4)


def test_a_bank_is_on_for_its_own_batches_only() -> None:
    editor = editor_for()
    editor.load_state(STATES[0])
    own = editor.generate(PROMPTS[1])
    bank = editor.bank(STATES)
    assert editor.generate([PROMPTS[1]], adapters=bank, adapter_ids=[1]) != [own]
    assert editor.generate(PROMPTS[1]) == own
    with editor.disabled():
        unedited = editor.generate(PROMPTS[1])
        assert editor.generate([PROMPTS[1]], adapters=bank, adapter_ids=[1]) == [unedited]
    with pytest.raises(KeyError), bank.on(editor.attachment, [0]):
        raise KeyError
    assert editor.generate(PROMPTS[1]) == own


def test_a_bank_is_a_copy_that_nothing_trains() -> None:
    editor = editor_for()
    states = [{name: value.clone() for name, value in state.items()} for state in STATES]
    bank = editor.bank(states)
    said = editor.generate([PROMPTS[1]], adapters=bank, adapter_ids=[1])
    for value in states[1].values():
        value.zero_()
    editor.edit(REQUESTS[:1])
    assert editor.generate([PROMPTS[1]], adapters=bank, adapter_ids=[1]) == said
    assert len(bank) == 3


# -- errors --


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([0, 3], "^adapter_ids: expected numbers from 0 to 2, got 3$"),
        ([-1, 0], "^adapter_ids: expected numbers from 0 to 2, got -1$"),
        ([0], "^adapter_ids: expected one for each of 2 prompts, got 1$"),
        ([0, 1, 2], "^adapter_ids: expected one for each of 2 prompts, got 3$"),
        (None, "^adapter_ids: expected one for each of 2 prompts, got None$"),
    ],
)
def test_wrong_adapter_ids(ids: list[int] | None, says: str) -> None:
    editor = editor_for()
    asked: dict[str, Any] = {"adapters": editor.bank(STATES), "adapter_ids": ids}
    with pytest.raises(ValueError, match=says):
        editor.generate(PROMPTS[:2], **asked)
    with pytest.raises(ValueError, match=says):
        editor.force([("Ada is", "Bob"), ("Bob is", "Ada")], **asked)


def test_adapter_ids_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"^adapter_ids: expected adapters that they are numbers of, got none$"):
        editor_for().generate(PROMPTS[:2], adapter_ids=[0, 0])


def without(name: str) -> State:
    return {key: value for key, value in STATES[0].items() if key != name}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (without("layers.1.gate"), r"^states\[1\], layers\.1\.gate: expected shape \[8, 32\], got None"),
        (
            {**STATES[0], "layers.0.source": torch.zeros(4, WIDTH)},
            r"^states\[1\], layers\.0\.source: expected shape \[8, 32\], got \[4, 32\]",
        ),
        (random_state(0, layers=(0, 1, 2)), r"^states\[1\], layers\.2\.basis: expected"),
        ({**STATES[0], "layers.0.scale": torch.zeros(8)}, r"^states\[1\], layers\.0\.scale: expected"),
    ],
)
def test_a_state_of_another_editor(bad: State, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        editor_for().bank([STATES[0], bad])


def test_no_states() -> None:
    with pytest.raises(ValueError, match=r"^states: expected at least one, got none$"):
        AdapterBank(random_interventions((1,)), [])


# -- measures --

MEASURED = [
    request.model_copy(
        update={
            "rephrases": (f"Is it known that {request.prompt}",),
            "locality": {"near": (Probe(prompt="Where is the king?", answers=("Ebor",)), Probe(prompt="1 2 3"))},
            "portability": {"hop": (Probe(prompt=f"{request.target} and", answers=("Arvik",)),)},
        }
    )
    for request in REQUESTS[:3]
]


@pytest.mark.parametrize("positions", ["all", "subject"])
def test_states_are_measured_side_by_side_as_one_at_a_time(positions: str) -> None:
    editor = editor_for(positions, max_steps=6)
    outcomes = sorted(editor.edit_each(MEASURED), key=lambda outcome: outcome.index)
    states = [outcome.state for outcome in outcomes if outcome.state is not None]
    together = Evaluator(editor, max_new_tokens=5).measure(MEASURED, states=states)
    before = editor.state()
    alone = []
    for request, state in zip(MEASURED, states, strict=True):
        editor.load_state(state)
        alone += Evaluator(editor, max_new_tokens=5).measure([request])
        editor.load_state(before)
    assert together == alone
    assert any(result.text != result.before for results in together for result in results)


def test_states_are_asked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    editor = editor_for(max_steps=6)
    outcomes = sorted(editor.edit_each(MEASURED), key=lambda outcome: outcome.index)
    states = [outcome.state for outcome in outcomes if outcome.state is not None]
    passes, forward = [], type(editor.model).forward

    def counted(self: object, *args: object, **kwargs: object) -> object:
        passes.append(1)
        return forward(editor.model, *args, **kwargs)

    monkeypatch.setattr(type(editor.model), "forward", counted)

    def count(requests: list[EditRequest], states: list[dict[str, Tensor]]) -> int:
        passes.clear()
        Evaluator(editor, max_new_tokens=5).measure(requests, states=states)
        return len(passes)

    # Three take as many passes as one: one for each token that is generated, two for the forced answers.
    assert count(MEASURED, states) <= count(MEASURED[:1], states[:1]) + 5


def test_the_unedited_models_answers_are_its_own_under_a_bank() -> None:
    editor = editor_for()
    with editor.disabled():
        unedited = editor.generate("Where is the king?", max_new_tokens=5)
    editor.load_state(STATES[0])
    request = EditRequest(prompt="Ada is", target="Bob", locality=["Where is the king?"])
    results = Evaluator(editor, max_new_tokens=5).measure([request], states=[STATES[1]])[0]
    of_locality = [result for result in results if result.question.measure == "locality"]
    assert [result.before for result in of_locality] == [unedited]


# -- grouped interventions --


def assert_same_by_sequence(grouped: GroupedBaftIntervention, own: list[BaftIntervention], rows: Tensor | None) -> None:
    h = torch.randn(4, 6, WIDTH)
    ids = torch.tensor([1, 0, 1, 2])
    together = grouped.edit(h, ids, rows)
    for sequence, index in enumerate(ids.tolist()):
        alone = own[index].edit(h[sequence], None if rows is None else rows[sequence])
        for name, value in alone._asdict().items():
            torch.testing.assert_close(getattr(together, name)[sequence], value)
    if rows is None:
        assert torch.equal(grouped(h, ids), together.out)


@pytest.mark.parametrize("gate_fn", GATE_FNS)
def test_a_grouped_intervention_edits_each_sequence_by_its_own_set(gate_fn: str) -> None:
    own = [random_interventions((1,), seed=seed, gate_fn=gate_fn)[1] for seed in range(3)]
    grouped = GroupedBaftIntervention(own[0], 3)
    assert [name for name, _ in grouped.named_parameters()] == [name for name, _ in own[0].named_parameters()]
    assert_same_by_sequence(grouped, [own[0]] * 3, None)  # all start as copies
    with torch.no_grad():
        for name, parameter in grouped.named_parameters():
            parameter.copy_(torch.stack([getattr(one, name) for one in own]))
    assert_same_by_sequence(grouped, own, None)
    assert_same_by_sequence(grouped, own, torch.rand(4, 6) < 0.5)


def test_only_the_sets_that_are_named_are_trained() -> None:
    own = random_interventions((1,))[1]
    grouped = GroupedBaftIntervention(own, 4)
    grouped(torch.randn(3, 5, WIDTH), torch.tensor([3, 1, 3])).square().sum().backward()
    for name, parameter in grouped.named_parameters():
        assert parameter.grad is not None, name
        assert [bool(gradient.any()) for gradient in parameter.grad] == [False, True, False, True], name
    assert own.basis.grad is None
    assert grouped.basis.data_ptr() != own.basis.data_ptr()


@pytest.mark.parametrize("sets", [0, -1])
def test_a_grouped_intervention_of_no_sets(sets: int) -> None:
    with pytest.raises(ValueError, match=f"^sets: expected at least 1, got {sets}$"):
        GroupedBaftIntervention(random_interventions((1,))[1], sets)


@pytest.mark.parametrize(("batch", "beams"), [(3, 1), (3, 2), (1, 4)])
def test_beams_of_a_sequence_share_its_set(batch: int, beams: int) -> None:
    """As transformers lays them out: those of a sequence next to each other."""
    model = tiny_model()
    attachment = attach(model)
    grouped = GroupedBaftIntervention(attachment.interventions[1], batch)
    with torch.no_grad():
        for k in range(batch):
            grouped.source_bias[k] += k + 1
    ids = torch.randint(3, 128, (batch, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with attachment.sets({1: grouped}, torch.arange(batch)):
            wide = model(input_ids=ids.repeat_interleave(beams, 0)).logits
        for k in range(batch):
            with attachment.sets({1: grouped}, torch.tensor([k])):
                alone = model(input_ids=ids[k : k + 1]).logits
            for beam in range(beams):
                torch.testing.assert_close(wide[k * beams + beam], alone[0], rtol=1e-4, atol=1e-4)
