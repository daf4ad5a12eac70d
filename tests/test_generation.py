"""Edited models on padded, cached and beam-searched batches: the same as one unpadded sequence at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import FAMILIES, attach, tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from baft.engine.encoding import Encoder
from baft.engine.generation import force_answers, generate_texts

POSITIONS = ("all", "prompt", "last", "subject", "f2+l1")
PROMPTS = ["Norland", "The capital of Norland is", "The king of Sudland? The king of Sudland is in", "Bob was born in"]
SUBJECTS = ["Norland", "Norland", "Sudland", "Bob"]


class Speaker:
    """A tiny model with random interventions on it, and what it says."""

    def __init__(self, family: str, positions: str) -> None:
        self.model = tiny_model(family)
        self.attachment = attach(self.model, positions, layers=(0, 1))
        self.encoder = Encoder(tiny_tokenizer(), append_eos=True)

    def says(self, prompts: list[str] = PROMPTS, subjects: list[str] = SUBJECTS, **options: Any) -> list[str]:
        # Three and one, so that both padding and batches matter.
        options = {"max_new_tokens": 5, "batch_size": 3, **options}
        return generate_texts(self.model, self.attachment, self.encoder, prompts, subjects=subjects, **options)

    def says_one_at_a_time(self, **options: Any) -> list[str]:
        return [self.says([prompt], [subject], **options)[0] for prompt, subject in zip(PROMPTS, SUBJECTS, strict=True)]

    def unedited(self, **options: Any) -> list[str]:
        with self.attachment.disabled():
            return self.says(**options)


# -- generation --


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_says_what_each_prompt_gives_alone(family: str, positions: str) -> None:
    speaker = Speaker(family, positions)
    batched = speaker.says()
    assert batched == speaker.says_one_at_a_time()
    assert batched != speaker.unedited()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_cache_changes_nothing(family: str, positions: str) -> None:
    speaker = Speaker(family, positions)
    assert speaker.says(use_cache=True) == speaker.says(use_cache=False)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beams_of_a_batch_are_those_of_each_prompt_alone(family: str, positions: str) -> None:
    speaker = Speaker(family, positions)
    batched = speaker.says(num_beams=3)
    assert batched == speaker.says_one_at_a_time(num_beams=3)
    assert batched != speaker.unedited(num_beams=3)


def test_generated_tokens_are_edited_with_positions_all_only() -> None:
    """With ``all``, each generated token is edited as it would be in a prompt; with ``prompt`` it is not."""
    for positions, same in (("all", True), ("prompt", False)):
        speaker = Speaker("llama", positions)
        ids = speaker.encoder.batch([speaker.encoder.prompt(PROMPTS[1])], "cpu").ids
        written = speaker.model.generate(ids, max_new_tokens=6, do_sample=False)
        with torch.no_grad():
            reread = speaker.model(input_ids=written).logits[0, ids.shape[1] - 1 : -1].argmax(-1)
        assert (reread.tolist() == written[0, ids.shape[1] :].tolist()) is same, positions


def own_generate(speaker: Speaker, **options: Any) -> list[str]:
    """What transformers' ``generate`` says without any help of ours."""
    batch = speaker.encoder.batch([speaker.encoder.prompt(prompt) for prompt in PROMPTS], "cpu", side="left")
    written = speaker.model.generate(batch.ids, attention_mask=batch.attention_mask, max_new_tokens=5, **options)
    return speaker.encoder.tokenizer.batch_decode(written[:, batch.ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("positions", ["all", "prompt", "last", "f2+l1"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_the_callers_own_generate_is_edited_too(family: str, positions: str) -> None:
    speaker = Speaker(family, positions)
    assert own_generate(speaker) == speaker.says()
    assert own_generate(speaker, num_beams=2) == speaker.says(num_beams=2)


@pytest.mark.parametrize("positions", ["all", "prompt", "last"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_static_caches_work(family: str, positions: str) -> None:
    # Their masks are 4-D, or a dict of such.
    speaker = Speaker(family, positions)
    assert own_generate(speaker, cache_implementation="static") == speaker.says()


def test_answers_come_in_the_order_of_the_prompts() -> None:
    speaker = Speaker("llama", "all")
    assert speaker.says(PROMPTS[::-1], SUBJECTS[::-1]) == speaker.says()[::-1]


def test_sampling_is_up_to_the_caller() -> None:
    speaker = Speaker("llama", "all")
    torch.manual_seed(0)
    sampled = speaker.says(do_sample=True, temperature=5.0)
    assert sampled != speaker.says()
    torch.manual_seed(0)
    assert sampled == speaker.says(do_sample=True, temperature=5.0)


@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"num_return_sequences": 2}, "^num_return_sequences: expected 1, .* got 2"),
        ({"return_dict_in_generate": True}, "^return_dict_in_generate: expected False, .* got True$"),
    ],
)
def test_each_prompt_gets_one_text(option: dict[str, Any], message: str, in_config: bool) -> None:
    options = {"generation_config": GenerationConfig(do_sample=True, **option)} if in_config else option
    with pytest.raises(ValueError, match=message):
        Speaker("llama", "all").says(**options)


# -- plain forward passes --


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_leaves_the_logits_of_real_tokens(family: str, positions: str) -> None:
    speaker = Speaker(family, positions)
    encoder, attachment = speaker.encoder, speaker.attachment
    rows = [encoder.pair(prompt, "Arvik", subject) for prompt, subject in zip(PROMPTS, SUBJECTS, strict=True)]

    @torch.no_grad()
    def logits(*chosen: int) -> torch.Tensor:
        batch = encoder.batch([rows[index] for index in chosen], "cpu")
        with attachment.prompts(batch.tokens):
            return speaker.model(input_ids=batch.ids, attention_mask=batch.attention_mask).logits

    padded = logits(*range(len(rows)))
    for index, row in enumerate(rows):
        torch.testing.assert_close(padded[index, : len(row.ids)], logits(index)[0], rtol=1e-4, atol=1e-4)


# -- teacher forcing --


@pytest.mark.parametrize("positions", POSITIONS)
def test_forced_answers_are_the_models_next_tokens(positions: str) -> None:
    speaker = Speaker("llama", positions)
    pairs = list(zip(PROMPTS, ["Arvik", "Ebor", "Ada Lund", "Paris"], strict=True))
    forced = force_answers(speaker.model, speaker.attachment, speaker.encoder, pairs, subjects=SUBJECTS, batch_size=3)
    for (prompt, answer), subject, (predicted, wanted) in zip(pairs, SUBJECTS, forced, strict=True):
        row = speaker.encoder.pair(prompt, answer, subject, append_eos=False)
        assert wanted == list(row.ids[row.prompt_length :])
        batch = speaker.encoder.batch([row], "cpu")
        with torch.no_grad(), speaker.attachment.prompts(batch.tokens):
            logits = speaker.model(input_ids=batch.ids).logits[0]
        assert predicted == logits[row.prompt_length - 1 : -1].argmax(-1).tolist()
