"""Texts that the unedited model writes from nothing: what it knows, in its own words."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from baft.engine.decoding import ends_of, generate
from baft.engine.encoding import Encoder
from baft.engine.modes import evaluating
from baft.placement import device_of

__all__ = ["write_texts"]

_TOKENS = 32  # of a text, at most

# What many models were trained to see between documents, whatever their tokenizer has for BOS and EOS.
_BETWEEN_DOCUMENTS = "<|endoftext|>"


@torch.no_grad()
def write_texts(model: PreTrainedModel, encoder: Encoder, number: int, seed: int) -> list[str]:
    """Sample so many texts of ``model`` as it is, less blank ones.

    Raises:
        ValueError: if the tokenizer knows nothing that a text could begin behind.
    """
    start = _start(encoder.tokenizer)
    ids = torch.tensor([start] * number, device=device_of(model))
    with torch.random.fork_rng(), evaluating(model):
        torch.manual_seed(seed)
        written = generate(model, encoder, ids, torch.ones_like(ids), do_sample=True, max_new_tokens=_TOKENS)
    # What follows the first special token is no part of the text: padding, another document, or a turn of a chat, whose
    # "user" and "assistant" would be left of it without the special tokens.
    ends = {*_special_tokens(encoder.tokenizer).values(), *ends_of(model, encoder)}
    own = [_before(ends, ids[len(start) :]) for ids in written.tolist()]
    return [text.strip() for text in encoder.tokenizer.batch_decode(own) if text.strip()]


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a text begins behind; not what may end a chat's turn, behind which another turn would begin."""
    special = _special_tokens(tokenizer)
    if _BETWEEN_DOCUMENTS in special:
        return [special[_BETWEEN_DOCUMENTS]]
    if tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    if tokenizer.eos_token_id is not None and tokenizer.chat_template is None:
        return [tokenizer.eos_token_id]
    line_end: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    if not line_end:
        raise ValueError("unrelated: expected texts, since the tokenizer knows nothing that one could begin behind")
    return line_end


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Those that the tokenizer can leave out of what it decodes."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**added, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}


def _before(ends: set[int], ids: list[int]) -> list[int]:
    return ids[: next((column for column, token in enumerate(ids) if token in ends), len(ids))]
