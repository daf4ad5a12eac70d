"""The plumbing of training: checkpointing changes no gradient, dropout is off, the base model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from tiny import REQUESTS, attach, tiny_editor, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from baft.attach import find_blocks
from baft.engine.encoding import Encoder
from baft.engine.generation import force_answers, generate_texts
from baft.engine.modes import evaluating, frozen_for_editing
from baft.engine.sets import ParameterSets

# With dropout wherever the family has it; OPT's blocks apply theirs without a module.
DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
}


def enable_checkpointing(model: PreTrainedModel) -> None:
    # The first name is that of newer releases, in which the second one warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def trained(model: PreTrainedModel, **changes: Any) -> tuple[list[float], list[Tensor]]:
    """Edit ``model`` in a few steps: the losses, and the gradients of all parameters in all steps."""
    options = {"layers": (0, 1), "balance_weight": 0.1, "stop_below": 0.0, "max_steps": 3, **changes}
    editor = tiny_editor(model, **options)
    gradients: list[Tensor] = []

    update = ParameterSets.update

    def collect(sets: ParameterSets, *arguments: Any) -> Tensor:
        for parameter in editor.interventions.parameters():
            assert parameter.grad is not None
            gradients.append(parameter.grad.clone())
        return update(sets, *arguments)

    with mock.patch.object(ParameterSets, "update", collect):
        outcomes = editor.edit(REQUESTS[:2])
    editor.remove()
    assert gradients
    return [loss for outcome in outcomes for loss in outcome.curve.losses], gradients


@contextmanager
def counted_passes(model: nn.Module) -> Iterator[list[int]]:
    """Counts, in ``[0]``, how often the last block runs, recomputation included."""
    count = [0]

    def tick(*_: object) -> None:
        count[0] += 1

    handle = next(find_blocks(model).modules[-1].children()).register_forward_hook(tick)
    try:
        yield count
    finally:
        handle.remove()


# -- checkpointing and dropout --


@pytest.mark.parametrize("positions", ["all", "last", "f1+l1"])
@pytest.mark.parametrize("family", DROPOUT)
def test_checkpointing_and_dropout_change_no_loss_and_no_gradient(family: str, positions: str) -> None:
    with counted_passes(plain := tiny_model(family)) as plain_passes:
        expected_losses, expected = trained(plain, positions=positions)
    # As it comes from a training run: in training mode, with dropout.
    model = tiny_model(family, **DROPOUT[family]).train()
    enable_checkpointing(model)
    with counted_passes(model) as passes:
        losses, gradients = trained(model, positions=positions)
    assert passes[0] > plain_passes[0]
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(gradients, expected)


def test_the_locality_loss_by_updates_is_checkpointed_alike() -> None:
    expected = trained(tiny_model(), positions="last", locality_loss="update")
    model = tiny_model()
    enable_checkpointing(model)
    torch.testing.assert_close(trained(model, positions="last", locality_loss="update"), expected)


# -- the modes --


def switches(model: nn.Module) -> list[object]:
    """All that a mode may touch: training flags, gradient flags, and every dropout rate."""
    rates = [
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if "drop" in key or key == "p"
    ]
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        rates,
    ]


def oddly_set(family: str) -> PreTrainedModel:
    """A model that is partly in training mode and partly frozen, with dropout and checkpointing."""
    model = tiny_model(family, **DROPOUT[family]).train()
    enable_checkpointing(model)
    model.get_input_embeddings().eval()
    model.get_input_embeddings().requires_grad_(False)
    return model


@pytest.mark.parametrize("family", DROPOUT)
def test_frozen_for_editing_is_deterministic_and_restores_everything(family: str) -> None:
    model, ids = oddly_set(family), torch.tensor([[5, 6, 7, 8]])
    before = switches(model)
    expected = tiny_model(family)(input_ids=ids, use_cache=False).logits
    with frozen_for_editing(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        for _ in range(2):
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    assert switches(model) == before
    with pytest.raises(KeyError), frozen_for_editing(model):
        raise KeyError
    assert switches(model) == before


def test_evaluating_restores_every_mode() -> None:
    model = oddly_set("opt")
    before = switches(model)
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert switches(model) == before
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert switches(model) == before


def test_generation_and_forcing_do_not_depend_on_the_mode() -> None:
    calm, wild = tiny_model("opt"), oddly_set("opt")
    encoder, prompts = Encoder(tiny_tokenizer(), append_eos=True), [request.prompt for request in REQUESTS]
    pairs = [(request.prompt, request.target) for request in REQUESTS]
    on_calm, on_wild = attach(calm), attach(wild)
    assert generate_texts(wild, on_wild, encoder, prompts, max_new_tokens=6) == generate_texts(
        calm, on_calm, encoder, prompts, max_new_tokens=6
    )
    assert force_answers(wild, on_wild, encoder, pairs) == force_answers(calm, on_calm, encoder, pairs)


# -- the base model --


@pytest.mark.parametrize("family", DROPOUT)
def test_editing_leaves_the_base_model_as_it_was(family: str) -> None:
    model = oddly_set(family)
    before, state = switches(model), copy.deepcopy(model.state_dict())
    trained(model)
    assert switches(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
