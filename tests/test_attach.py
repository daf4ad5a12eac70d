"""Interventions on a model's blocks: where they go, that they do what the op says, that the model stays as it was."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from looks import logits as logits_of
from tiny import (
    DEPTH,
    FAMILIES,
    REQUESTS,
    UNRELATED,
    VOCABULARY,
    WIDTH,
    attach,
    random_interventions,
    tiny_editor,
    tiny_model,
    tiny_tokenizer,
)
from torch import Tensor, nn

from baft.attach import Attachment, find_blocks
from baft.baselines.methods import METHODS, make_editor
from baft.positions import Positions, PromptTokens
from baft_kernels import BaftIntervention
from baft_kernels.reference import GATE_FNS, baft_reference

POSITIONS = ("all", "prompt", "last", "subject", "f2+l1")


def token_batch(batch: int = 2, width: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, width), generator=torch.Generator().manual_seed(0))


def known_tokens() -> PromptTokens:
    """The second sequence is one token shorter, and both end in two tokens that aren't the prompt's."""
    prompt = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0]]).bool()
    subject = torch.tensor([[0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0]]).bool()
    return PromptTokens(prompt, subject)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor | None = None, **inputs: Any) -> Tensor:
    return model(input_ids=token_batch() if ids is None else ids, **inputs).logits


@contextmanager
def block_output(model: nn.Module, layer: int) -> Iterator[list[Tensor]]:
    """What block ``layer`` gives, as a hook sees it that is registered now: before those of later attachments."""
    seen: list[Tensor] = []

    def watch(_: nn.Module, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handle = find_blocks(model).modules[layer].register_forward_hook(watch)
    try:
        yield seen
    finally:
        handle.remove()


class Stub(nn.Module):
    """A model of nothing but module lists, for the search."""

    def __init__(self, wanted: int, **lists: list[nn.Module]) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=wanted, hidden_size=8)
        self.inner = nn.Module()
        for name, modules in lists.items():
            self.inner.add_module(name, nn.ModuleList(modules))


def linears(count: int) -> list[nn.Module]:
    return [nn.Linear(8, 8) for _ in range(count)]


# -- finding the blocks --


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_in_every_family(family: str) -> None:
    model = tiny_model(family)
    blocks = find_blocks(model)
    assert blocks.path == FAMILIES[family].blocks
    assert blocks.modules is model.get_submodule(blocks.path)
    assert blocks.modules in list(blocks.parent.children())
    assert len(blocks.modules) == DEPTH
    assert blocks.width == WIDTH
    assert blocks.device(0) == torch.device("cpu")


def test_lists_of_another_length_or_of_mixed_or_inner_modules_are_not_the_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(linears(3))

    model = Stub(3, short=linears(2), mixed=[*linears(2), nn.ReLU()], blocks=[Block() for _ in range(3)])
    assert find_blocks(model).path == "inner.blocks"


def test_two_candidates_are_an_error_that_names_them() -> None:
    model = Stub(2, left=linears(2), right=linears(2))
    message = r"one module list of 2 decoder blocks in Stub, found 2; .*: inner\.left \(2\), inner\.right \(2\)"
    with pytest.raises(ValueError, match=message):
        find_blocks(model)
    blocks = find_blocks(model, "inner.right")
    assert blocks.modules is model.inner.right
    assert blocks.parent is model.inner


def test_no_candidate_is_an_error_that_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"found 0; its module lists are: inner\.blocks \(2\)"):
        find_blocks(Stub(3, blocks=linears(2)))
    with pytest.raises(ValueError, match="found 0; its module lists are: none"):
        find_blocks(Stub(3))


def test_a_path_that_does_not_exist_is_an_error_that_names_the_ones_that_do() -> None:
    with pytest.raises(ValueError, match=r"^blocks: expected one of model\.layers, got 'model\.layer'$"):
        find_blocks(tiny_model(), "model.layer")


# -- what an attachment does --


def edited_by_hand(model: nn.Module, interventions: dict[int, BaftIntervention], rows: Tensor | None) -> Tensor:
    """Logits of ``model`` with the op's reference applied to its blocks' outputs by hooks of this test's own."""

    def apply(intervention: BaftIntervention) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            i = intervention
            parameters = (i.basis, i.source, i.source_bias, i.gate, i.gate_bias)
            out = baft_reference(h, *parameters, i.gate_fn, rows).out
            return (out, *output[1:]) if isinstance(output, tuple) else out

        return hook

    modules = find_blocks(model).modules
    handles = [modules[layer].register_forward_hook(apply(i)) for layer, i in interventions.items()]
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_outputs_are_edited_as_the_op_says(family: str) -> None:
    model = tiny_model(family)
    base = logits(model)
    interventions = random_interventions((0, DEPTH - 1))
    expected = edited_by_hand(model, interventions, rows=None)
    Attachment(find_blocks(model), interventions, Positions("all"))
    torch.testing.assert_close(logits(model), expected)
    assert (expected - base).abs().max() > 0.1


@pytest.mark.parametrize("gate_fn", GATE_FNS)
def test_every_gate_is_applied(gate_fn: str) -> None:
    model = tiny_model()
    interventions = random_interventions(gate_fn=gate_fn)
    expected = edited_by_hand(model, interventions, rows=None)
    Attachment(find_blocks(model), interventions, Positions("all"))
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_chosen_rows_are_edited_and_the_others_keep_their_bits(positions: str) -> None:
    model = tiny_model()
    rows = Positions(positions).select(known_tokens())
    expected = edited_by_hand(model, random_interventions(), rows)
    with block_output(model, 1) as before:
        attachment = attach(model, positions)
        with block_output(model, 1) as after, attachment.prompts(known_tokens()):
            torch.testing.assert_close(logits(model), expected)
    assert torch.equal(after[0][~rows], before[0][~rows])
    assert (after[0] != before[0]).any(-1)[rows].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_intervention_leaves_the_logits_within_rounding(family: str) -> None:
    model = tiny_model(family)
    base = logits(model)
    identity = {layer: BaftIntervention(WIDTH, 4) for layer in range(DEPTH)}
    Attachment(find_blocks(model), identity, Positions("all"))
    torch.testing.assert_close(logits(model), base)


def test_bfloat16_models_are_edited_in_their_own_dtype() -> None:
    model = tiny_model().bfloat16()
    base = logits(model)
    attach(model)
    edited = logits(model)
    assert edited.dtype == torch.bfloat16
    assert (edited - base).abs().max() > 0.1


# -- what is the prompt, if nobody says --


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_being_told_a_pass_is_all_prompt_but_for_its_padding(side: str) -> None:
    model = tiny_model()
    attachment = attach(model, "f2+l1")
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    untold = logits(model, attention_mask=mask)
    with attachment.prompts(PromptTokens(mask.bool())):
        told = logits(model, attention_mask=mask)
    assert torch.equal(untold, told)


def test_without_a_mask_every_token_is_the_prompts() -> None:
    model = tiny_model()
    attachment = attach(model, "last")
    untold = logits(model)
    with attachment.prompts(PromptTokens(torch.ones(2, 7, dtype=torch.bool))):
        assert torch.equal(untold, logits(model))


def test_embeddings_in_place_of_ids_are_edited_alike() -> None:
    model = tiny_model()
    attach(model, "last")
    embeddings = model.get_input_embeddings()(token_batch())
    with torch.no_grad():
        actual = model(inputs_embeds=embeddings).logits
    torch.testing.assert_close(actual, logits(model))


def test_subjects_cannot_be_guessed() -> None:
    model = tiny_model()
    attach(model, "subject")
    with pytest.raises(ValueError, match="through BaftEditor"):
        logits(model)


# -- on and off --


def test_disabled_gives_the_base_model_bit_for_bit() -> None:
    model = tiny_model()
    base = logits(model)
    attachment = attach(model, layers=range(DEPTH))
    edited = logits(model)
    with attachment.disabled():
        assert torch.equal(logits(model), base)
        with attachment.disabled():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), edited)
    assert not torch.equal(edited, base)


def test_an_error_inside_disabled_switches_the_edit_on_again() -> None:
    model = tiny_model()
    attachment = attach(model)
    edited = logits(model)
    with pytest.raises(KeyError), attachment.disabled():
        raise KeyError
    assert torch.equal(logits(model), edited)


def test_remove_takes_everything_off() -> None:
    model = tiny_model()
    base = logits(model)
    attachment = attach(model, "last")
    attachment.remove()
    assert torch.equal(logits(model), base)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    attachment.remove()


def test_the_models_own_modules_and_state_do_not_change() -> None:
    model = tiny_model()
    model.get_input_embeddings().weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    modules = list(model.modules())
    wants_gradient = [parameter.requires_grad for parameter in model.parameters()]
    attach(model)
    logits(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(module is before for module, before in zip(model.modules(), modules, strict=True))
    assert [parameter.requires_grad for parameter in model.parameters()] == wants_gradient


def test_attachments_on_two_models_do_not_meet() -> None:
    first, second = tiny_model(), tiny_model()
    base = logits(second)
    one = attach(first, "last")
    assert torch.equal(logits(second), base)
    attach(second, "prompt", seed=1)
    edited = logits(second)
    with one.disabled(), one.prompts(known_tokens()):
        assert torch.equal(logits(second), edited)
    one.remove()
    assert torch.equal(logits(second), edited)


# -- records --


def test_records_tell_what_each_layer_did() -> None:
    model = tiny_model()
    with block_output(model, 0) as before:
        attachment = attach(model, "last", layers=(0, 2))
        with block_output(model, 0) as after, attachment.recording() as records, attachment.prompts(known_tokens()):
            logits(model)
    assert list(records) == [0, 2]
    for record in records.values():
        assert record.weights.shape == record.update.shape == (2, 7, 4)
        assert record.squared_norm.shape == (2, 7)
    torch.testing.assert_close(records[0].squared_norm, before[0].square().sum(-1))
    # The basis is orthonormal, so a change is as long as its coordinates.
    torch.testing.assert_close(records[0].update.norm(dim=-1), (after[0] - before[0]).norm(dim=-1))


def test_records_are_of_the_last_pass_and_only_of_edited_ones() -> None:
    model = tiny_model()
    attachment = attach(model)
    with attachment.recording() as records:
        logits(model, token_batch(3, 5))
        logits(model, token_batch(2, 4))
        with attachment.disabled():
            logits(model, token_batch(1, 1))
    logits(model, token_batch(1, 1))
    assert records[1].weights.shape == (2, 4, 4)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_has_an_editor_is_refused(method: str) -> None:
    """It would take the first one's edits for the base model."""
    model = tiny_model()
    first = make_editor(method, model, tiny_tokenizer(), tiny_editor().config, unrelated=UNRELATED)
    base = logits_of(first)
    with pytest.raises(ValueError, match=r"^model: expected one without an editor, got one .* remove\(\)"):
        tiny_editor(model)
    first.remove()
    second = tiny_editor(model)
    torch.testing.assert_close(logits_of(second), base)
    second.edit(REQUESTS[:1])
    edited = logits_of(second)
    del second
    gc.collect()  # and its edits stay
    with pytest.raises(ValueError, match=r"^model: expected one without an editor"):
        make_editor(method, model, tiny_tokenizer(), tiny_editor().config, unrelated=UNRELATED)
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.tensor([[1, 20, 30, 40, 50]])).logits, edited)
