"""A step that computes only what it needs: the losses and gradients of the whole model, and no more work than said."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from tiny import FAMILIES, REQUESTS, VOCABULARY, moved_from_identity, tiny_editor, tiny_model
from tiny import one_thread as one_thread
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from baft import BaftEditor
from baft.engine.encoding import Encoded
from baft.engine.modes import frozen_for_editing
from baft.engine.options import EngineOptions
from baft.engine.passes import Passed, PassInputs
from baft.engine.step import Lesson
from baft.objective import kl_to_base

OFF = EngineOptions(replay=False, head_where_needed=False, side_by_side=False)
ON = EngineOptions()
EACH_ALONE = [replace(OFF, **{name: True}) for name in ("replay", "head_where_needed", "side_by_side")]

# A float32 number is known to 6e-8. Sums over tens of tokens and hundreds of entries, three blocks deep and back, lose
# one decimal or two of that; a text mixed up with its neighbour, a row left out or a constant that wasn't one changes
# a gradient in its first digits.
ROUNDING = 1e-5

# By locality loss: edited blocks, and positions.
PLACES: dict[str, list[tuple[tuple[int, ...], str]]] = {
    "kl": [((1,), "subject"), ((2, 1), "all"), ((0, 2), "f1+l2")],
    "update": [((2,), "f1+l2"), ((0, 1), "all"), ((1, 2), "prompt")],
}


def checkpointing(model: PreTrainedModel) -> PreTrainedModel:
    # The first name is that of newer releases, in which the second one warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    return model


def in_training(family: str) -> PreTrainedModel:
    """The tiny model in training mode, with dropout, checkpointing its blocks."""
    rates = {name: 0.5 for name in vars(FAMILIES[family].config()) if "drop" in name}
    model, ids = tiny_model(family, **rates).train(), torch.arange(3, 9).unsqueeze(0)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    return checkpointing(model)


def lesson(editor: BaftEditor) -> Lesson:
    """Two requests, an earlier one, and unrelated texts: of several lengths."""
    first, second, earlier = (editor._encode(request) for request in REQUESTS[:3])
    return editor._begin().lesson([first, second], [earlier], generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Differentiated:
    """The losses of a step's edits, and the gradients of all parameters."""

    losses: Tensor
    gradients: dict[str, Tensor]


def differentiated(model: PreTrainedModel, options: EngineOptions, **changes: Any) -> Differentiated:
    """What a step finds on ``model``, whose interventions edit already; the second time, when it may know something."""
    config = {"rank": 4, "balance_weight": 0.1, "locality_weight": 1.0, "unrelated_per_step": 3, **changes}
    editor = moved_from_identity(tiny_editor(model, options=options, **config))
    step = editor._begin().step
    for usage in step.usage.values():
        usage += torch.arange(4)
    with frozen_for_editing(model):
        for _ in range(2):
            editor.interventions.zero_grad()
            losses, _ = step._differentiate(step.arrange([lesson(editor)]))
    editor.remove()
    gradients = {name: parameter.grad for name, parameter in editor.interventions.named_parameters()}
    assert not any(parameter.grad is not None for parameter in model.parameters())
    return Differentiated(losses, {name: gradient for name, gradient in gradients.items() if gradient is not None})


def assert_same(actual: Differentiated, expected: Differentiated) -> None:
    torch.testing.assert_close(actual.losses, expected.losses, rtol=ROUNDING, atol=0.0)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, wanted in expected.gradients.items():
        assert wanted.norm() > 1e-4, f"{name}: expected a gradient that says something"
        error = (actual.gradients[name] - wanted).norm() / wanted.norm()
        assert error <= ROUNDING, f"{name}: off by {error:.1e}"


# -- the same losses and gradients --


@pytest.mark.parametrize("locality_loss", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_whole_model(family: str, locality_loss: str) -> None:
    for layers, positions in PLACES[locality_loss]:
        changes: dict[str, Any] = {"layers": layers, "positions": positions, "locality_loss": locality_loss}
        expected = differentiated(tiny_model(family), OFF, **changes)
        assert_same(differentiated(tiny_model(family), ON, **changes), expected)
        # As it comes from a training run.
        assert_same(differentiated(in_training(family), ON, **changes), expected)


@pytest.mark.parametrize("options", EACH_ALONE)
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_each_part_alone_changes_nothing_either(family: str, options: EngineOptions) -> None:
    expected = differentiated(tiny_model(family), OFF, layers=(1, 2))
    assert_same(differentiated(tiny_model(family), options, layers=(1, 2)), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_predictions_are_compared_in_pieces_where_the_model_gives_its_heads_logits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baft.engine.passes.rows_of_a_piece", lambda *_: 5)
    at_once: list[int] = []

    def counting(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        at_once.append(inputs[0].shape[:-1].numel())

    model = tiny_model(family, **({"final_logit_softcapping": 0.5} if family == "gemma2" else {}))
    expected = differentiated(model, OFF, layers=(1, 2))
    with model.get_output_embeddings().register_forward_pre_hook(counting):
        assert_same(differentiated(model, ON, layers=(1, 2)), expected)
    assert max(at_once) > 5
    pieces = at_once.count(5)
    assert pieces == 0 if family == "gemma2" else pieces >= 10  # gemma2 caps what its head gives


def test_blocks_that_checkpoint_their_call_are_run_again_as_they_ran() -> None:
    # Up to transformers 5.0 it is a block's call that is checkpointed, hooks and all, and not its forward.
    model = tiny_model()
    block_class = type(model.model.layers[0])

    class Checkpointed(block_class):  # type: ignore[valid-type, misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return checkpoint(partial(super().__call__, **kwargs), *args, use_reentrant=False)

    for block in model.model.layers:
        block.__class__ = Checkpointed
    assert_same(differentiated(model, ON, layers=(1, 2)), differentiated(tiny_model(), OFF, layers=(1, 2)))


# -- the logits, against the model's own --


def logits_alone(editor: BaftEditor, text: Encoded) -> Tensor:
    """Logits of a text that is the whole batch, by the model's own forward."""
    batch = editor.encoder.batch([text], "cpu")
    with torch.no_grad(), editor.attachment.prompts(batch.tokens):
        return editor.model(input_ids=batch.ids, use_cache=False).logits[0]


def assert_logits_are_those_of_each_text_alone(editor: BaftEditor) -> None:
    drawn = lesson(editor)
    with passed(editor, drawn) as seen:
        answers, divergence = seen.answers, seen.divergence
    assert divergence is not None and divergence.requires_grad
    of_answers = [logits_alone(editor, text)[text.prompt_length - 1 : -1] for text in drawn.edits]
    of_unrelated = [logits_alone(editor, text) for text in drawn.unrelated]
    with editor.disabled():
        of_base = [logits_alone(editor, text) for text in drawn.unrelated]
    torch.testing.assert_close(answers, torch.cat(of_answers), rtol=1e-4, atol=1e-4)
    expected = kl_to_base(torch.cat(of_unrelated), torch.cat(of_base))
    assert expected.max() > 0.01
    torch.testing.assert_close(divergence, expected, rtol=1e-4, atol=1e-4)


def arranged(editor: BaftEditor, drawn: Lesson) -> PassInputs:
    count = len(drawn.edits) + len(drawn.unrelated)
    return editor._begin().passes.arrange(drawn.edits, drawn.unrelated, [0] * count, predictions=True)


@contextmanager
def passed(editor: BaftEditor, drawn: Lesson) -> Iterator[Passed]:
    with editor._begin().passes.run(arranged(editor, drawn), records=False) as seen:
        yield seen


@pytest.mark.parametrize("options", [OFF, *EACH_ALONE])
@pytest.mark.parametrize("family", ["gemma3", "opt"])
def test_logits_are_those_of_each_text_alone(family: str, options: EngineOptions) -> None:
    editor = moved_from_identity(tiny_editor(tiny_model(family), options=options, positions="f2+l1"))
    assert_logits_are_those_of_each_text_alone(editor)


@pytest.mark.parametrize("options", [ON, OFF])
def test_what_a_family_does_to_its_logits_is_done(options: EngineOptions) -> None:
    model = tiny_model("gemma2", final_logit_softcapping=1.5)
    editor = moved_from_identity(tiny_editor(model, options=options))
    with passed(editor, lesson(editor)) as seen:
        assert 1.0 < seen.answers.abs().max() < 1.5
    assert_logits_are_those_of_each_text_alone(editor)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_texts_side_by_side_and_keeps_them_apart(family: str) -> None:
    model = tiny_model(family)
    for attention in (model.config._attn_implementation, "eager"):
        model.set_attn_implementation(attention)
        editor = moved_from_identity(tiny_editor(model, positions="f2+l1"))
        assert editor.engine_report()["texts_side_by_side"]
        assert_logits_are_those_of_each_text_alone(editor)
        editor.remove()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_that_can_not_keep_texts_apart_has_one_a_row(family: str) -> None:
    """OPT takes a mask, but where it must make its own it doesn't look at positions; Llama does."""
    model = tiny_model(family)
    model.config.sliding_window = 4  # as far as one can see from outside
    editor = moved_from_identity(tiny_editor(model))
    assert editor.engine_report()["texts_side_by_side"] == (family == "llama")
    assert_logits_are_those_of_each_text_alone(editor)


def attention_of_single_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor | None = None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers has FlashAttention: texts are told apart by positions in a batch of one, and in no other."""
    batch, _, width, _ = query.shape
    seen = torch.ones(batch, 1, width, width, dtype=torch.bool).tril()
    if attention_mask is not None:
        seen = seen & attention_mask[:, None, None, :].bool()
    elif batch == 1 and position_ids is not None:
        of_text = (position_ids == 0).cumsum(-1)
        seen = seen & (of_text[:, None, :, None] == of_text[:, None, None, :])
    out = nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return out.transpose(1, 2), None


def test_attention_that_tells_texts_apart_in_a_single_row_alone() -> None:
    AttentionInterface.register("single_rows", attention_of_single_rows)
    AttentionMaskInterface.register("single_rows", flash_attention_mask)
    model = tiny_model()
    model.set_attn_implementation("single_rows")
    editor = moved_from_identity(tiny_editor(model))
    report = editor.engine_report()
    assert not report["texts_side_by_side"]
    assert re.match(
        r"with single_rows attention LlamaForCausalLM mixes texts up: .* [12]\.\d stand", report["why_one_a_row"]
    )
    assert_logits_are_those_of_each_text_alone(editor)


def test_rounding_is_not_taken_for_texts_that_are_mixed_up() -> None:
    """Among thousands of logits some are off by much where all are off by little."""
    editor = moved_from_identity(tiny_editor(tiny_model(num_hidden_layers=16, vocab_size=4096).bfloat16()))
    assert editor.engine_report()["texts_side_by_side"]
    assert editor.engine_report()["why_one_a_row"] is None


def test_one_text_a_row_where_that_is_asked_for() -> None:
    report = moved_from_identity(tiny_editor(options=OFF)).engine_report()
    assert (report["texts_side_by_side"], report["why_one_a_row"]) == (False, "switched off")


@pytest.mark.parametrize(
    ("family", "options", "longest"),
    [
        ("llama", {}, None),
        ("qwen2", {"max_window_layers": 1}, None),
        ("qwen3", {"max_window_layers": 1, "use_sliding_window": False, "sliding_window": 4}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, 8),
        ("mistral", {"sliding_window": 8}, 8),
        ("gemma3", {"sliding_window": 8, "sliding_window_pattern": 2}, 8),
        ("llama", {"attention_chunk_size": 8}, 8),
    ],
)
def test_texts_are_given_their_mask_up_to_the_length_of_a_window(
    family: str, options: dict[str, Any], longest: int | None
) -> None:
    passes = tiny_editor(tiny_model(family, **options))._begin().passes
    assert passes._takes_mask(longest or 60)
    assert passes._takes_mask(9) == (longest is None)


def test_a_model_in_training_keeps_texts_apart_as_well() -> None:
    # A state that is loaded makes an editor ready without an edit.
    editor = tiny_editor(max_steps=1)
    editor.edit(REQUESTS[:1])
    loaded = tiny_editor(in_training("llama"))
    loaded.load_state(editor.state())
    assert loaded.engine_report()["texts_side_by_side"]


def test_the_share_of_padding_is_reported() -> None:
    editor = moved_from_identity(tiny_editor(options=OFF))
    assert editor.engine_report()["padding"] is None
    drawn = lesson(editor)
    with passed(editor, drawn):
        pass
    lengths = [len(text.ids) for text in (*drawn.edits, *drawn.unrelated)]
    assert editor.engine_report()["padding"] == pytest.approx(1 - sum(lengths) / (len(lengths) * max(lengths)))


# -- no more work than said --


@contextmanager
def work_of(model: PreTrainedModel) -> Iterator[dict[str, int]]:
    """How many tokens each block, and the head, computes something of."""
    work: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            work[name] = work.get(name, 0) + given.shape[:-1].numel()

        return hook

    head = model.get_output_embeddings()
    own = head.forward

    def counted_head(x: Tensor) -> Tensor:
        work["head"] = work.get("head", 0) + x.shape[:-1].numel()
        return own(x)

    blocks = model.model.layers
    hooks = [b.self_attn.register_forward_pre_hook(count(f"{k}"), with_kwargs=True) for k, b in enumerate(blocks)]
    head.forward = counted_head
    try:
        yield work
    finally:
        del head.forward
        for handle in hooks:
            handle.remove()


@pytest.mark.parametrize("first", [0, 1, 2])
def test_only_blocks_above_the_first_edited_one_run_again(first: int) -> None:
    editor = moved_from_identity(tiny_editor(layers=(first, 2) if first < 2 else (2,)))
    drawn = lesson(editor)
    cells = arranged(editor, drawn).grid.ids.numel()
    with work_of(editor.model) as work, passed(editor, drawn):
        pass
    answers = sum(len(text.ids) - text.prompt_length for text in drawn.edits)
    unrelated = sum(len(text.ids) for text in drawn.unrelated)
    # The head sees each answer's tokens, and those of unrelated texts of the edited and of the unedited model.
    assert work == {**{str(layer): cells for layer in range(first + 1, 3)}, "head": answers + 2 * unrelated}


def test_with_all_off_everything_runs() -> None:
    editor = moved_from_identity(tiny_editor(layers=(2,), options=OFF))
    drawn = lesson(editor)
    cells = arranged(editor, drawn).grid.ids.numel()
    with work_of(editor.model) as work, passed(editor, drawn):
        pass
    unrelated = len(drawn.unrelated) * max(len(text.ids) for text in drawn.unrelated)
    assert work == dict.fromkeys(("0", "1", "2", "head"), cells + unrelated)


# -- the model stays whole --


def own_forwards(model: nn.Module) -> dict[str, Any]:
    """The forwards that modules have of their own, beside their class's."""
    return {name: vars(module)["forward"] for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("options", [ON, OFF])
def test_forwards_are_given_back(options: EngineOptions) -> None:
    editor = moved_from_identity(tiny_editor(options=options))
    drawn = lesson(editor)
    with passed(editor, drawn):
        pass
    assert own_forwards(editor.model) == {}


@pytest.mark.parametrize("known", [False, True])
def test_forwards_are_given_back_after_an_error(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that stood there before are, too: some libraries put their own on single modules."""
    editor = moved_from_identity(tiny_editor(layers=(1,)))
    model, drawn = editor.model, lesson(editor)
    wrapped: Sequence[nn.Module] = [model.model.layers[0], model.model.layers[1], model.lm_head]
    for module in wrapped:
        module.forward = partial(type(module).forward, module)
    before = own_forwards(model)
    assert len(before) == 3
    if known:
        with passed(editor, drawn):
            pass

    def fail(*_: object) -> None:
        raise KeyError("in the forward")

    with monkeypatch.context() as patched:
        patched.setattr(type(model.model.norm), "forward", fail)
        with pytest.raises(KeyError, match="in the forward"), passed(editor, drawn):
            pass
    assert own_forwards(model) == before
    assert_logits_are_those_of_each_text_alone(editor)


@pytest.mark.parametrize("where", ["model.embed_tokens", "model.layers.0.mlp.up_proj", "lm_head"])
def test_weights_that_change_between_two_edits_are_noticed(where: str) -> None:
    def losses(options: EngineOptions) -> list[float]:
        editor = tiny_editor(options=options, max_steps=2, stop_below=0.0, locality_weight=10.0, layers=(1, 2))
        found = editor.edit(REQUESTS[:1])[0].curve.losses
        weight = editor.model.get_submodule(where).weight
        with torch.no_grad():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        return found + editor.edit(REQUESTS[:2])[0].curve.losses

    torch.testing.assert_close(losses(ON), losses(OFF), rtol=1e-4, atol=1e-4)


def test_a_model_that_changes_its_dtype_between_two_edits_is_noticed() -> None:
    editor = tiny_editor(max_steps=1)
    editor.edit(REQUESTS[:1])
    editor.model.bfloat16()
    editor.edit(REQUESTS[:1])
    with passed(editor, lesson(editor)) as seen:
        assert seen.answers.dtype == torch.bfloat16


def test_a_vocabulary_is_never_needed_where_nobody_looks() -> None:
    """The logits that the losses are made of: one line for each token that they look at."""
    editor = moved_from_identity(tiny_editor())
    drawn = lesson(editor)
    passes = editor._begin().passes
    count = len(drawn.edits) + len(drawn.unrelated)
    inputs = passes.arrange(drawn.edits, drawn.unrelated, [0] * count, predictions=False)
    with passes.run(inputs, records=False) as seen:
        assert seen.answers.shape == (sum(len(t.ids) - t.prompt_length for t in drawn.edits), VOCABULARY)
        assert seen.divergence is None
