"""What the model says under whatever edit is on: batched generation with the KV cache, and teacher forcing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from baft.attach import Attachment
from baft.bank import AdapterBank
from baft.engine.decoding import ends_of, generate, greedily_continued
from baft.engine.encoding import Encoder, TokenBatch
from baft.engine.modes import evaluating
from baft.placement import device_of

__all__ = ["OnBatch", "batches_by_length", "force_answers", "generate_texts"]

OnBatch = Callable[[int, int], None]
"""Called with (prompts in the batch that is done, prompts in all)."""


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    attachment: Attachment,
    encoder: Encoder,
    prompts: Sequence[str],
    *,
    subjects: Sequence[str | None] | None = None,
    adapters: AdapterBank | None = None,
    adapter_ids: Sequence[int] | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 64,
    on_batch: OnBatch | None = None,
    **options: Any,
) -> list[str]:
    """Continue each of ``prompts``, greedily, or as ``options`` for transformers' ``generate`` say.

    With options the model's own generation configuration counts, but for its sampling; without, nothing but the model.

    Prompts of like length share a batch, padded on the left, which leaves their continuations as they would be alone
    (within rounding).

    Args:
        subjects: the subject of each prompt, for ``positions="subject"``; "" where there is none.
        adapters: several edited models; None is the one that ``attachment`` holds.
        adapter_ids: which of ``adapters`` continues each prompt.
        on_batch: called after each batch.

    Returns:
        The continuations, in the order of ``prompts``, without special tokens.

    Raises:
        ValueError: for options that ask for more than one text of each prompt, or for something else.
    """
    _check_one_text(options)
    subjects = subjects or [None] * len(prompts)
    rows = [encoder.prompt(prompt, subject) for prompt, subject in zip(prompts, subjects, strict=True)]
    texts = [""] * len(rows)
    edited_by = _chooser(attachment, adapters, adapter_ids, len(rows))
    for chosen in batches_by_length([len(row.ids) for row in rows], batch_size):
        batch = encoder.batch([rows[index] for index in chosen], device_of(model), side="left")

        @contextmanager
        def edited(lines: Sequence[int], part: TokenBatch, chosen: Sequence[int] = chosen) -> Iterator[None]:
            with attachment.prompts(part.tokens), edited_by([chosen[line] for line in lines]):
                yield

        with evaluating(model):
            if options:
                # A configuration of the caller's says itself where texts end.
                own_end = {} if "generation_config" in options else {"eos_token_id": ends_of(model, encoder) or None}
                with edited(range(len(chosen)), batch):
                    how = {"max_new_tokens": max_new_tokens, **own_end, **options}
                    generated = generate(model, encoder, batch.ids, batch.attention_mask, **how)
                new = generated[:, batch.ids.shape[1] :].tolist()
            else:
                new = greedily_continued(model, encoder, batch, max_new_tokens, edited)
        continuations = encoder.tokenizer.batch_decode(new, skip_special_tokens=True)
        for index, text in zip(chosen, continuations, strict=True):
            texts[index] = text
        if on_batch:
            on_batch(len(chosen), len(rows))
    return texts


@torch.no_grad()
def force_answers(
    model: PreTrainedModel,
    attachment: Attachment,
    encoder: Encoder,
    pairs: Sequence[tuple[str, str]],
    *,
    subjects: Sequence[str | None] | None = None,
    adapters: AdapterBank | None = None,
    adapter_ids: Sequence[int] | None = None,
    batch_size: int = 64,
) -> list[tuple[list[int], list[int]]]:
    """Teacher forcing: for each (prompt, answer) the model's arg max at each token of the answer, and those tokens.

    Other arguments are those of ``generate_texts``.
    """
    subjects = subjects or [None] * len(pairs)
    rows = [
        encoder.pair(prompt, answer, subject, append_eos=False)
        for (prompt, answer), subject in zip(pairs, subjects, strict=True)
    ]
    forced: list[tuple[list[int], list[int]]] = [([], [])] * len(rows)
    edited_by = _chooser(attachment, adapters, adapter_ids, len(rows))
    for chosen in batches_by_length([len(row.ids) for row in rows], batch_size):
        batch = encoder.batch([rows[index] for index in chosen], device_of(model))
        with evaluating(model), attachment.prompts(batch.tokens), edited_by(chosen):
            logits = model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits
        predicted = logits.argmax(-1).tolist()
        for line, index in enumerate(chosen):
            split, end = rows[index].prompt_length, len(rows[index].ids)
            forced[index] = predicted[line][split - 1 : end - 1], list(rows[index].ids[split:end])
    return forced


def _check_one_text(options: Mapping[str, Any]) -> None:
    own = options.get("generation_config")
    said = {**(own.to_dict() if own else {}), **options}
    if (texts := said.get("num_return_sequences") or 1) != 1:
        raise ValueError(
            f"num_return_sequences: expected 1, since each prompt gets one text, got {texts}; for several texts of a "
            "prompt, give it several times"
        )
    if said.get("return_dict_in_generate"):
        raise ValueError("return_dict_in_generate: expected False, since texts are what is returned, got True")


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The indices of texts that are so long, in batches of like length, which need little padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _chooser(
    attachment: Attachment, adapters: AdapterBank | None, adapter_ids: Sequence[int] | None, rows: int
) -> Callable[[Sequence[int]], AbstractContextManager[None]]:
    """What has the given rows edited, each by its own adapter, if there are any."""
    if adapters is None:
        if adapter_ids is not None:
            raise ValueError("adapter_ids: expected adapters that they are numbers of, got none")
        return lambda _: nullcontext()
    if adapter_ids is None or len(adapter_ids) != rows:
        got = None if adapter_ids is None else len(adapter_ids)
        raise ValueError(f"adapter_ids: expected one for each of {rows} prompts, got {got}")
    return lambda chosen: adapters.on(attachment, [adapter_ids[index] for index in chosen])
