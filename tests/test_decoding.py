"""Batches that ended texts leave: what each says is what it says in a batch that runs to its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tiny import FAMILIES, REQUESTS, moved_from_identity, tiny_editor, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, Lfm2Config, PreTrainedModel

from baft.engine import decoding, generation
from baft.engine.continuations import Asked, Continuations
from baft.engine.decoding import ends_of, greedily_continued
from baft.engine.encoding import Encoder, TokenBatch

ENCODER = Encoder(tiny_tokenizer(), append_eos=True)
PROMPTS = [
    *("Bob", "The capital of Norland is", "Ada Lund was born in", "Who is king", "France", "Where is Ebor?"),
    *("The king of Sudland", "Bob Stone is in", "What", "Paris is", "Ebor", "The president of France is Ada"),
]


def batch_of(prompts: Sequence[str] = PROMPTS) -> TokenBatch:
    return ENCODER.batch([ENCODER.prompt(prompt) for prompt in prompts], "cpu", side="left")


def run_to_the_end(model: PreTrainedModel, batch: TokenBatch, new_tokens: int) -> list[list[int]]:
    """What transformers makes of the whole batch, up to each text's end."""
    generated = model.generate(
        input_ids=batch.ids, attention_mask=batch.attention_mask, do_sample=False, max_new_tokens=new_tokens
    )
    return [up_to_end(model, new) for new in generated[:, batch.ids.shape[1] :].tolist()]


def up_to_end(model: PreTrainedModel, new: list[int]) -> list[int]:
    return next((new[: k + 1] for k, token in enumerate(new) if token in ends_of(model, ENCODER)), new)


def ending_early(family: str = "llama") -> PreTrainedModel:
    """A model half of whose texts, at least, have ended after eight tokens, but not all after the first."""
    model = tiny_model(family)
    end_early(model, run_to_the_end(model, batch_of(), 12))
    return model


def end_early(model: PreTrainedModel, whole: Sequence[Sequence[int]]) -> None:
    """Have the model end its texts at such tokens."""
    ends = [2]
    while 2 * sum(bool({*new[1:8]} & {*ends}) for new in whole) < len(whole):
        others = Counter(token for new in whole if not {*new[1:8]} & {*ends} for token in {*new[1:8]})
        ends.append(others.most_common(1)[0][0])
    model.generation_config.eos_token_id = ends


@contextmanager
def passes(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """The shape of the tokens at each pass through the model."""
    shapes: list[tuple[int, int]] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_text_is_what_it_is_in_a_batch_that_runs_to_its_end(family: str) -> None:
    model = ending_early(family)
    expected = run_to_the_end(model, batch_of(), 12)
    with passes(model) as shapes:
        found = greedily_continued(model, ENCODER, batch_of(), 12)
    assert [up_to_end(model, new) for new in found] == expected
    assert min(rows for rows, _ in shapes) < len(PROMPTS)
    # Nothing but one new token of each text is computed after the first pass.
    assert {width for _, width in shapes[1:]} == {1}


def test_a_batch_is_left_when_half_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ending_early()
    lengths = [len(new) for new in run_to_the_end(model, batch_of(), 12)]
    monkeypatch.setattr(decoding, "_FEW", 2)
    with passes(model) as shapes:
        greedily_continued(model, ENCODER, batch_of(), 12)
    expected, left = [], lengths
    for step in range(1, 13):
        if left:
            expected.append(len(left))
            if 2 * sum(length <= step for length in left) >= len(left):
                left = [length for length in left if length > step]
    assert [rows for rows, _ in shapes] == expected[: max(lengths)]


def test_a_few_texts_run_to_their_end() -> None:
    model = ending_early()
    lengths = [len(new) for new in run_to_the_end(model, batch_of(), 12)]
    by_length = sorted(PROMPTS, key=dict(zip(PROMPTS, lengths, strict=True)).__getitem__)
    with passes(model) as shapes:
        greedily_continued(model, ENCODER, batch_of([*by_length[:4], *by_length[-3:]]), 12)
    assert {rows for rows, _ in shapes} == {7} and len(shapes) == max(lengths) > sorted(lengths)[3]


def test_a_cache_that_cannot_be_parted_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ending_early()
    expected = run_to_the_end(model, batch_of(), 12)
    monkeypatch.setattr(decoding, "DynamicCache", int)
    with passes(model) as shapes:
        found = greedily_continued(model, ENCODER, batch_of(), 12)
    assert [up_to_end(model, new) for new in found] == expected
    assert any(width > 1 for _, width in shapes[1:])


def test_a_cache_with_more_than_keys_and_values_is_made_anew() -> None:
    """A convolution's state, for instance."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = Lfm2Config(
        **sizes, num_key_value_heads=2, intermediate_size=64, layer_types=["conv", "full_attention", "conv"]
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = 2
    end_early(model, run_to_the_end(model, batch_of(), 12))
    with passes(model) as shapes:
        found = greedily_continued(model, ENCODER, batch_of(), 12)
    assert [up_to_end(model, new) for new in found] == run_to_the_end(model, batch_of(), 12)
    assert min(rows for rows, _ in shapes) < len(PROMPTS)


WAYS: list[dict[str, Any]] = [
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 1},
    {"num_beams": 3},
    {"min_new_tokens": 6},
    {"begin_suppress_tokens": [*range(3, 60)]},
    {"bad_words_ids": [[token] for token in range(3, 60)]},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_greedy_is_the_likeliest_token_whatever_way_the_model_has(way: dict[str, Any]) -> None:
    model = ending_early()
    expected = run_to_the_end(model, batch_of(), 12)
    written = Continuations(model, nullcontext, ENCODER)
    asked = Asked(ENCODER.prompt(PROMPTS[1]).ids, branches=4)
    texts = written.of(asked)
    for name, value in way.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    assert [up_to_end(model, new) for new in greedily_continued(model, ENCODER, batch_of(), 12)] == expected
    written.forget()
    assert written.of(asked) == texts
    assert model.generation_config is own


def test_the_models_own_way_is_there_for_who_asks_transformers_for_something() -> None:
    editor = tiny_editor()
    plain = editor.generate(PROMPTS, max_new_tokens=12)
    assert editor.generate(PROMPTS, max_new_tokens=12, do_sample=False) == plain
    editor.model.generation_config.repetition_penalty = 3.0
    assert editor.generate(PROMPTS, max_new_tokens=12) == plain
    assert editor.generate(PROMPTS, max_new_tokens=12, do_sample=False) != plain


def test_a_configuration_of_the_callers_says_where_texts_end() -> None:
    editor = tiny_editor()
    whole = editor.generate(PROMPTS[1], max_new_tokens=8)
    ids = greedily_continued(editor.model, ENCODER, batch_of(PROMPTS[1:2]), 8)[0]
    own = GenerationConfig(eos_token_id=ids[3], pad_token_id=0)
    assert editor.generate(PROMPTS[1], max_new_tokens=8, generation_config=own) == tiny_tokenizer().decode(ids[:4])
    assert editor.generate(PROMPTS[1], max_new_tokens=8, eos_token_id=ids[3]) == tiny_tokenizer().decode(ids[:4])
    assert len(whole) > len(tiny_tokenizer().decode(ids[:4]))


@pytest.mark.parametrize("parted", [True, False])
@pytest.mark.parametrize("positions", ["all", "subject", "last"])
def test_each_text_stays_under_its_own_edit(positions: str, parted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has left, and whether or not the cache could be parted."""
    if not parted:
        monkeypatch.setattr(decoding, "DynamicCache", int)
    editor = tiny_editor(positions=positions)
    states = []
    for seed in range(3):
        moved_from_identity(editor, scale=2.0, seed=seed)
        states.append(editor.state())
    prompts = [request.prompt for request in REQUESTS] * 3
    subjects = [request.subject for request in REQUESTS] * 3
    ids = [k % 3 for k in range(len(prompts))]
    bank, whole = editor.bank(states), list[list[int]]()

    def generate(some: slice = slice(None)) -> list[str]:
        return editor.generate(
            prompts[some], subjects=subjects[some], adapters=bank, adapter_ids=ids[some], max_new_tokens=12
        )

    def keep(*args: Any) -> list[list[int]]:
        found = greedily_continued(*args)
        whole.extend(found)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(generation, "greedily_continued", keep)
        generate()
    end_early(editor.model, whole)
    with passes(editor.model) as shapes:
        together = generate()
    assert min(rows for rows, _ in shapes) < len(prompts)
    assert together == [generate(slice(k, k + 1))[0] for k in range(len(prompts))]
    assert len(set(together)) > len(REQUESTS)
