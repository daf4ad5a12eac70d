"""The baselines: each learns what it should, gives the base model back exactly, and goes on where it stopped."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from looks import assert_same_state, logits, said, targets
from safetensors.torch import load_file
from tiny import FAMILIES, REQUESTS, UNRELATED, tiny_editor, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from baft import EditOutcome, EditRequest
from baft.baselines.facts import Facts
from baft.baselines.fine_tuning import FineTuning, FineTuningOptions
from baft.baselines.lora import Lora, LoraOptions
from baft.baselines.methods import METHODS, make_editor
from baft.cli import options
from baft.editing import Editor
from baft.evaluation.measures import Evaluator
from baft.runs.run import run_edits

TWO, THREE = REQUESTS[:2], REQUESTS[:3]
TRAINED = ("lora", "ft")
LEARNS = {"lora": LoraOptions(learning_rate=3e-2, rank=4), "ft": FineTuningOptions(learning_rate=3e-2)}


def editor_of(method: str, model: PreTrainedModel | None = None, options: Any = None, **changes: Any) -> Editor:
    """A tiny editor of ``method`` that learns each of ``REQUESTS``, if it learns at all."""
    config = tiny_editor(**changes).config
    options = options or LEARNS.get(method)
    return make_editor(method, model or tiny_model(), tiny_tokenizer(), config, unrelated=UNRELATED, options=options)


def to_be_trained(model: nn.Module) -> set[int]:
    """Which parameters take a gradient, whatever their names are by now."""
    return {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


# -- those that train --


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", TRAINED)
def test_it_learns_one_after_another(method: str, family: str) -> None:
    editor = editor_of(method, tiny_model(family))
    outcomes = editor.edit(REQUESTS)
    assert said(editor, REQUESTS) == targets(REQUESTS)
    assert editor.edits == REQUESTS
    assert all(outcome.curve.converged and outcome.curve.steps > 1 for outcome in outcomes)


@pytest.mark.parametrize("method", TRAINED)
def test_it_learns_a_batch(method: str) -> None:
    editor = editor_of(method)
    outcomes = editor.edit(THREE, "batch")
    assert said(editor, THREE) == targets(THREE)
    assert all(outcome.curve is outcomes[0].curve for outcome in outcomes)


@pytest.mark.parametrize("method", TRAINED)
def test_a_single_edit_is_on_while_it_is_looked_at_and_then_gone(method: str) -> None:
    editor = editor_of(method)
    editor.edit(REQUESTS[3:4])
    before, looked_at = editor.state(), []

    def look(outcome: EditOutcome) -> None:
        looked_at.append(said(editor, [outcome.request]) == [outcome.request.target])

    outcomes = editor.edit(TWO, "single", on_edit=look)
    assert looked_at == [True] * 2
    assert_same_state(editor.state(), before)
    assert editor.edits == REQUESTS[3:4]
    # Asked in turn by their states, they answer alike.
    states = [outcome.state or {} for outcome in outcomes]
    assert not any(name.startswith("optimizer.") for state in states for name in state)
    measured = Evaluator(editor, max_new_tokens=6).measure(TWO, states=states)
    assert [results[0].generation for results in measured] == [True] * 2
    assert_same_state(editor.state(), before)


@pytest.mark.parametrize("method", [*TRAINED, "none"])
def test_one_request_is_no_list_of_them(method: str) -> None:
    editor = editor_of(method)
    for edit in (editor.edit, lambda one: list(editor.edit_each(one))):
        with pytest.raises(ValueError, match=r"^requests: expected a list of EditRequest, got EditRequest$"):
            edit(REQUESTS[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", TRAINED)
def test_a_single_edit_takes_as_many_steps_as_it_would_with_baft(method: str) -> None:
    editor = editor_of(method, min_steps=3, stop_below=1e9)
    assert [outcome.curve.steps for outcome in editor.edit(TWO, "single")] == [3, 3]
    assert [outcome.curve.steps for outcome in editor.edit(TWO)] == [1, 1]


@pytest.mark.parametrize("method", TRAINED)
def test_it_goes_on_from_a_state_bit_for_bit(method: str) -> None:
    changes = {"consolidate_every": 2, "consolidation_steps": 2, "max_steps": 6}
    editor = editor_of(method, **changes)
    editor.edit(TWO)
    between = editor.state()
    first = editor.edit(REQUESTS[2:4])
    after = editor.state()
    resumed = editor_of(method, **changes)
    for other in (editor, resumed):
        other.load_state(between)
        other.edits = list(TWO)
        assert_same_state(other.state(), between)
        again = other.edit(REQUESTS[2:4])
        assert [outcome.curve.losses for outcome in again] == [outcome.curve.losses for outcome in first]
        assert_same_state(other.state(), after)


@pytest.mark.parametrize("method", TRAINED)
def test_going_back_to_before_the_first_edit_is_like_a_new_editor(method: str) -> None:
    editor = editor_of(method, max_steps=4)
    before = editor.state()
    editor.edit(TWO)
    after = editor.state()
    editor.load_state(before)
    editor.edits.clear()
    assert_same_state(editor.state(), before)
    torch.rand(7)  # the global generator has no part in it
    editor.edit(TWO)
    assert_same_state(editor.state(), after)


@pytest.mark.parametrize("method", TRAINED)
def test_the_locality_loss_keeps_unrelated_texts(method: str) -> None:
    def distance(weight: float) -> float:
        editor = editor_of(method, locality_weight=weight, unrelated_per_step=4, stop_below=0.0, max_steps=20)
        with editor.disabled():
            base = logits(editor)
        editor.edit(TWO[:1])
        return float((logits(editor) - base).norm())

    assert distance(10.0) < 0.7 * distance(0.0)


@pytest.mark.parametrize("method", TRAINED)
def test_a_loss_that_is_not_finite_ends_it(method: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    editor = editor_of(method, model)
    before = editor.parameters()
    with pytest.raises(RuntimeError, match="became nan after 1 steps; expected a finite one: lower learning_rate"):
        editor.edit(TWO)
    assert_same_state(editor.parameters(), before)
    assert editor.edits == []


@pytest.mark.parametrize("method", TRAINED)
def test_a_model_of_16_bits_is_trained_in_32(method: str) -> None:
    editor = editor_of(method, tiny_model().bfloat16())
    losses = editor.edit(TWO[:1])[0].curve.losses
    assert losses[-1] < 0.5 * losses[0]
    assert {tensor.dtype for tensor in editor.parameters().values()} == {torch.float32}


# -- on, off and away --


@pytest.mark.parametrize("method", METHODS)
def test_the_base_model_comes_back_bit_for_bit(method: str) -> None:
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)  # as its owner left it
    weights, trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}, to_be_trained(model)
    unedited = editor_of("none", model)
    base = logits(unedited)
    unedited.remove()
    editor = editor_of(method, model)
    assert to_be_trained(model) == trained
    editor.edit(TWO)
    edited = logits(editor)
    assert torch.equal(edited, base) == (method in ("none", "in-context"))
    with editor.disabled():
        with editor.disabled():
            assert torch.equal(logits(editor), base)
        assert torch.equal(logits(editor), base)
    assert torch.equal(logits(editor), edited)
    assert to_be_trained(model) == trained
    editor.remove()
    assert torch.equal(logits(editor), base)
    assert_same_state(model.state_dict(), weights)
    assert to_be_trained(model) == trained


@pytest.mark.parametrize("method", METHODS)
def test_a_run_takes_any_method(method: str) -> None:
    editor = editor_of(method, max_steps=2, batch_passes=2)
    results = run_edits(editor, TWO, "sequential").results
    assert results["metrics"]["final"]["reliability"] is not None
    assert results["config"]["layers"] == list(editor.layers)


# -- what is trained --


def test_lora_changes_every_linear_layer_of_the_edited_blocks() -> None:
    model = tiny_model()
    linear = [name for name, module in model.model.layers[0].named_modules() if isinstance(module, nn.Linear)]
    editor = editor_of("lora", model, layers=(0, 2))
    expected = {f"layers.{layer}.{name}" for layer in (0, 2) for name in linear}
    assert {name.partition(".lora_")[0] for name in editor.parameters()} == expected
    assert editor.layers == (0, 2)


def test_rivals_are_as_large_as_baft() -> None:
    def size(method: str, options: Any = None) -> int:
        config = tiny_editor(rank=16).config
        editor = make_editor(method, tiny_model(), tiny_tokenizer(), config, unrelated=UNRELATED, options=options)
        return sum(tensor.numel() for tensor in editor.parameters().values())

    of_one_rank = size("lora", LoraOptions(rank=1))
    assert abs(size("lora") - size("baft")) <= of_one_rank / 2
    assert size("loreft") == pytest.approx(size("baft"), rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_down_projection_is_found_by_structure(family: str) -> None:
    names = {"gpt2": "mlp.c_proj", "opt": "fc2", "gpt_neox": "mlp.dense_4h_to_h", "phi": "mlp.fc2"}
    editor = editor_of("ft", tiny_model(family))
    assert list(editor.parameters()) == [f"layers.1.{names.get(family, 'mlp.down_proj')}.weight"]


def test_fine_tuning_trains_the_weight_itself() -> None:
    """The change beside the weight is one of the weight: put into it, it gives the same model."""
    model, plain = tiny_model(), tiny_model()
    editor = editor_of("ft", model)
    editor.edit(TWO)
    with torch.no_grad():
        plain.model.layers[1].mlp.down_proj.weight += editor.parameters()["layers.1.mlp.down_proj.weight"]
    expected = logits(editor_of("none", plain))
    torch.testing.assert_close(logits(editor), expected)


# -- those that don't train --


def test_no_edit_changes_nothing_and_says_how_far_the_model_is() -> None:
    editor = editor_of("none")
    base = said(editor, TWO)
    outcomes = editor.edit(TWO)
    assert said(editor, TWO) == base
    assert editor.edits == TWO
    assert (editor.state(), editor.parameters()) == ({}, {})
    trained = editor_of("ft", max_steps=1).edit(TWO[:1])[0]
    assert outcomes[0].curve.losses == pytest.approx(trained.curve.losses, rel=1e-5)
    assert outcomes[0].curve.steps == 0


def asked(editor: Editor, prompt: str) -> str:
    """What an in-context editor puts to the model in place of ``prompt``, seen by what the model makes of it."""
    facts = [f"{request.prompt} {request.target}." for request in editor.edits]
    unedited = editor_of("none")
    told = {
        unedited.generate(context, max_new_tokens=6): context
        for first in range(len(facts) + 1)
        for last in range(first, len(facts) + 1)
        for context in [" ".join([*facts[first:last], prompt])]
    }
    return told[editor.generate(prompt, max_new_tokens=6)]


def test_a_prompt_is_told_the_facts_about_its_subject_and_no_others() -> None:
    editor = editor_of("in-context")
    editor.edit(TWO)
    assert asked(editor, "Where is Norland?") == "The capital of Norland is Ebor. Where is Norland?"
    assert asked(editor, "Bob Stone is") == "Bob Stone was born in Arvik. Bob Stone is"
    assert asked(editor, "Where is Norlandia?") == "Where is Norlandia?"
    with editor.disabled():
        assert asked(editor, "Where is Norland?") == "Where is Norland?"
    ((predicted, wanted),) = editor.force([("Norland is", "in Ebor")])
    assert [(predicted, wanted)] == editor_of("none").force([("The capital of Norland is Ebor. Norland is", "in Ebor")])


def test_the_latest_facts_are_told_as_many_as_there_is_room_for() -> None:
    facts = [EditRequest(prompt=f"Ebor {k} is", target="Arvik", subject="Ebor") for k in range(4)]
    editor = editor_of("in-context", options=METHODS["in-context"].options(facts=2))
    editor.edit(facts)
    assert asked(editor, "Ebor") == "Ebor 2 is Arvik. Ebor 3 is Arvik. Ebor"
    room_for_one = 64 - len(editor.encoder.prompt("Ebor 3 is Arvik. Ebor").ids)
    put = [editor._asked("Ebor", room_for_one + more) for more in (0, 1)]  # type: ignore[attr-defined]
    assert put == ["Ebor 3 is Arvik. Ebor", "Ebor"]


def test_of_two_facts_with_one_prompt_the_later_is_told() -> None:
    editor = editor_of("in-context")
    other = EditRequest(prompt="The king of Norland is", target="Bob", subject="Norland")
    editor.edit([TWO[0], other, TWO[0].model_copy(update={"target": "Paris"})])
    expected = "The king of Norland is Bob. The capital of Norland is Paris. Norland is"
    assert asked(editor, "Norland is") == expected


def test_facts_are_found_by_subjects_that_are_no_part_of_a_word() -> None:
    facts = Facts()
    subjects = [
        "Ada",
        "Ada Lund",
        "\uff21\uff44\uff41",
        "C",
        "C++",
        ".NET",
        "Lund, Ada",
        "O'Neill",
        "Zürich",
        "a_b",
        "Ada Lund of Arvik",
    ]
    for subject in subjects:
        facts.add(f"{subject} is", subject, "here")
    words = "Ada|Adam and Ada Lund|Lund, Ada Lund!|C++ and C#|C|ASP.NET|the .NET|O'Neill's|mr. O'Neill (Ada)|in Zürich."
    others = (
        "Zürichs|a_b|a_b_c|\nAda\n|Ada  Lund||Ada Lund of Arvik's|\uff21\uff44\uff41 is|\uff21\uff44\uff41\uff4d is"
    )
    for text in f"{words}|{others}".split("|"):
        expected = [s for s in subjects if re.search(rf"(?<!\w){re.escape(s)}(?!\w)", text)]
        assert [fact.subject for fact in facts.about(text)] == expected, text


def test_facts_are_found_and_told_where_words_have_no_spaces_between_them() -> None:
    france, president = "\u6cd5\u56fd\u7684\u9996\u90fd\u662f", "\u6cd5\u56fd\u603b\u7edf\u662f"
    editor = editor_of("in-context")
    editor._take(EditRequest(prompt=france, target="\u5df4\u9ece", subject="\u6cd5\u56fd"))  # type: ignore[attr-defined]
    told = editor._asked(f"\u73b0\u4efb{president}", 1)  # type: ignore[attr-defined]
    assert told == f"{france}\u5df4\u9ece\u3002\u73b0\u4efb{president}"
    assert editor._asked("\u5fb7\u56fd\u7684\u9996\u90fd\u662f", 1) == "\u5fb7\u56fd\u7684\u9996\u90fd\u662f"  # type: ignore[attr-defined]


def test_neither_a_state_nor_a_question_costs_what_all_facts_would() -> None:
    def seconds(number: int) -> float:
        facts = Facts()
        for k in range(number):
            facts.add(f"Person {k} lives in", f"Person {k}", "Norland")
        start = time.perf_counter()
        for k in range(200):
            facts.record, facts.about(f"Where does Person {k} live?")
        return time.perf_counter() - start

    # A hundred times as many would take a hundred times as long.
    assert min(seconds(10_000) for _ in range(3)) < 20 * min(seconds(100) for _ in range(3))


def test_a_record_stays_as_it_is_whatever_is_added_later() -> None:
    facts, records = Facts(), []
    for k in range(50):
        facts.add(f"{k} is", str(k), "Norland")
        records.append((facts.record, facts.record.clone()))
    branch = Facts(records[3][0])
    branch.add("7 is", "7", "Sudland")
    assert all(torch.equal(record, then) for record, then in records)
    assert [fact.target for fact in branch.about("3 and 7 and 9")] == ["Norland", "Sudland"]


def test_facts_come_back_with_a_state() -> None:
    editor = editor_of("in-context")
    editor.edit(TWO)
    between, said_then = editor.state(), said(editor, TWO)
    editor.edit([TWO[0].model_copy(update={"target": "Paris"})])
    assert said(editor, TWO) != said_then
    resumed = editor_of("in-context")
    for other in (editor, resumed):
        other.load_state(between)
        assert said(other, TWO) == said_then
    singles = resumed.edit(REQUESTS[2:4], "single")
    assert_same_state(resumed.state(), between)
    resumed.load_state(singles[0].state or {})
    assert resumed._asked("Sudland", 1) == "The king of Sudland is Ada Lund. Sudland"  # type: ignore[attr-defined]


# -- folders --


def test_lora_is_saved_as_peft_loads_it(tmp_path: Path) -> None:
    import peft

    editor = editor_of("lora")
    editor.edit(TWO)
    editor.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    with torch.no_grad():
        actual: Tensor = loaded(input_ids=torch.tensor([[1, 20, 30, 40, 50]])).logits
    assert torch.equal(actual, logits(editor))


@pytest.mark.parametrize("method", ["lora", "ft", "in-context", "none"])
def test_a_folder_says_what_was_edited_and_holds_no_pickles(method: str, tmp_path: Path) -> None:
    editor = editor_of(method, max_steps=2)
    editor.edit(TWO)
    editor.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "baseline.json").read_text())
    assert said["method"] == editor.name
    assert [EditRequest(**request) for request in said["edits"]] == TWO
    assert {file.suffix for file in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}
    if method == "ft":
        assert_same_state(load_file(tmp_path / "adapter_model.safetensors"), editor.parameters())


# -- errors --


def test_an_unknown_method() -> None:
    known = "baft, loreft, lora, ft, in-context, none"
    with pytest.raises(ValueError, match=rf"^method: expected one of {known}, got 'rome'$"):
        editor_of("rome")
    assert ", ".join(get_args(get_args(options.Method)[0])) == known


def test_options_of_another_method() -> None:
    with pytest.raises(ValueError, match=r"^options: expected FineTuningOptions for ft, got LoraOptions$"):
        editor_of("ft", options=LoraOptions())


def test_lora_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ValueError, match=r'expected peft to be installed for lora: pip install "baft-kernels\[bench\]"'
    ):
        editor_of("lora")


def test_lora_on_a_model_that_has_one() -> None:
    model = tiny_model()
    editor_of("lora", model)
    with pytest.raises(ValueError, match="expected one without an adapter"):
        editor_of("lora", model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, r"^layers: expected different blocks from 0 to 2, got \[3\]$"),
        ({"projection": "mlp.out"}, "^projection: expected a layer of a LlamaDecoderLayer, got 'mlp.out'$"),
    ],
)
def test_a_projection_that_is_not_there(options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        editor_of("ft", model, FineTuningOptions(**options))
    assert editor_of("ft", model)  # the other has left nothing on it


def test_a_block_without_a_down_projection() -> None:
    model = tiny_model(intermediate_size=32)
    with pytest.raises(ValueError, match="expected a linear layer from another width to 32 in a LlamaDecoderLayer"):
        editor_of("ft", model)


@pytest.mark.parametrize("method", TRAINED)
def test_a_locality_loss_that_only_bases_have(method: str) -> None:
    with pytest.raises(ValueError, match=r"^locality_loss: expected kl, of a method without bases, got 'update'$"):
        editor_of(method, locality_loss="update").edit(TWO)


def test_a_fact_that_nobody_could_look_up() -> None:
    editor = editor_of("in-context")
    with pytest.raises(ValueError, match=r"^subject: expected one, to find the fact by, of the request 'Ada is'$"):
        editor.edit([TWO[0], EditRequest(prompt="Ada is", target="Bob")])
    assert editor.edits == []


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_mode(method: str) -> None:
    with pytest.raises(ValueError, match=r"^mode: expected single, batch or sequential, got 'parallel'$"):
        editor_of(method).edit(TWO, "parallel")


def test_classes_are_their_methods() -> None:
    assert isinstance(editor_of("lora"), Lora) and isinstance(editor_of("ft"), FineTuning)
    names = ["BaFT", "LoReFT", "LoRA", "fine-tuning", "in-context", "no edit"]
    assert [editor_of(method).name for method in METHODS] == names
