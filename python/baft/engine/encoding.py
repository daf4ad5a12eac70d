"""Text to tokens: prompts as generation sees them, targets as it should continue them, padded batches of both."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from baft.positions import PromptTokens
from baft.spacing import separator

__all__ = [
    "IGNORED",
    "Encoded",
    "Encoder",
    "TokenBatch",
    "Tokens",
    "Words",
    "in_chunks",
    "known_ids",
    "most_tokens",
]

Tokens = tuple[int, ...]
"""Token ids."""

IGNORED = -100
"""The label of a token that no loss looks at, as torch's cross entropy has it."""


class Words(NamedTuple):
    """What was encoded."""

    prompt: str
    target: str
    subject: str | None


def most_tokens(model: PreTrainedModel) -> int | None:
    """How long a text the model takes, in tokens; None where it doesn't say."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit


def known_ids(model: PreTrainedModel) -> int | None:
    """How many token ids the model has embeddings of, from 0; None where it doesn't say."""
    count: int | None = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return count


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence: a prompt and what follows it.

    Attributes:
        ids: its tokens.
        prompt_length: how many of them, the first, are the prompt.
        subject: the subject's columns, first and last + 1; None if unknown. A subject "" is known not to be there: no
            columns.
        given: how many tokens behind the prompt are given as the prompt is, and not learned.
        about: the subject that the unedited model wrote it of; None if it wasn't written so.
        words: what it was encoded from, where that was a prompt and its whole target; two are equal by their tokens.
    """

    ids: Tokens
    prompt_length: int
    subject: tuple[int, int] | None = None
    given: int = 0
    about: str | None = None
    words: Words | None = field(default=None, compare=False, repr=False)

    @property
    def answer_start(self) -> int:
        """The column of the first token that is learned; those behind it are, too."""
        return self.prompt_length + self.given

    def cut(self, limit: int | None) -> Encoded:
        """The first ``limit`` tokens; itself if it has no more."""
        if limit is None or len(self.ids) <= limit:
            return self
        return Encoded(self.ids[:limit], min(self.prompt_length, limit), self.subject)

    @property
    def asked(self) -> Tokens:
        """The tokens that the learned ones follow."""
        return self.ids[: self.answer_start]


def in_chunks(row: Encoded, size: int | None) -> tuple[Encoded, ...]:
    """``row`` as one for each ``size`` tokens of what follows its prompt, each behind all that comes before it.

    A long text is edited so: each chunk is what a model says that has said the earlier ones (after arXiv 2502.05628).
    """
    length = len(row.ids) - row.prompt_length
    if size is None or length <= size:
        return (row,)
    return tuple(
        Encoded(row.ids[: row.prompt_length + first + size], row.prompt_length, row.subject, first)
        for first in range(0, length, size)
    )


@dataclass(frozen=True)
class TokenBatch:
    """A padded batch; all tensors [B, S]. ``labels`` are the ids that are learned, and IGNORED elsewhere."""

    ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    tokens: PromptTokens

    def __getitem__(self, rows: slice | list[int]) -> TokenBatch:
        subject = None if self.tokens.subject is None else self.tokens.subject[rows]
        tokens = PromptTokens(self.tokens.prompt[rows], subject)
        return TokenBatch(self.ids[rows], self.attention_mask[rows], self.labels[rows], tokens)


class Encoder:
    """Encodes for one tokenizer.

    A prompt is encoded alone, exactly as it is for generation. The target's tokens are those that follow it when both
    are encoded together; where tokens would merge across the boundary, the target is encoded by itself, so that the
    prompt stays what generation sees.

    Args:
        tokenizer: a Hugging Face tokenizer with an EOS or a pad token.
        append_eos: end every target with EOS, so that generation learns to stop there.
        template: what surrounds each prompt, with ``{prompt}`` in it.
        ids: how many token ids the model has embeddings of; None takes any.

    Raises:
        ValueError: if the tokenizer has neither a pad nor an EOS token, or the model no embedding of its EOS token. So
            do ``prompt`` and ``pair`` for a text with a token that the model has none of.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        append_eos: bool,
        template: str = "{prompt}",
        ids: int | None = None,
    ) -> None:
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        if pad is None and eos is None:
            raise ValueError("tokenizer: expected a pad token or an EOS token to pad with, got neither")
        self.tokenizer = tokenizer
        self._known = sys.maxsize if ids is None else ids
        if eos is not None:
            self._check([eos], "every text's end")
        # Padding is known by the attention mask alone, so a pad token that equals EOS does no harm. One that was added
        # to the tokenizer and not to the model is passed over, for any special one that decoding leaves out as well.
        padding = [token for token in (pad, eos, *tokenizer.all_special_ids) if token is not None]
        self.pad_id = next((token for token in padding if token < self._known), pad)
        self._check([self.pad_id], "padding")
        self.append_eos = append_eos and tokenizer.eos_token_id is not None
        self.template = template

    @property
    def has_template(self) -> bool:
        """Whether anything stands around prompts."""
        return self.template != "{prompt}"

    def prompt(self, text: str, subject: str | None = None) -> Encoded:
        ids = self._ids(self._in_template(text))
        self._check(ids, repr(text))
        return Encoded(tuple(ids), len(ids), None if subject is None else self._span(text, subject))

    def pair(self, prompt: str, target: str, subject: str | None = None, *, append_eos: bool | None = None) -> Encoded:
        """A prompt and what shall follow it, with ``separator`` between them."""
        head, asked = self.prompt(prompt, subject), self._in_template(prompt)
        answer = separator(asked, target) + target
        joint = self._ids(asked + answer)
        if tuple(joint[: head.prompt_length]) == head.ids and len(joint) > head.prompt_length:
            tail = joint[head.prompt_length :]
        else:
            tail = self.following(answer)
        if self.append_eos if append_eos is None else append_eos:
            tail = [*tail, self.tokenizer.eos_token_id]
        self._check(tail, repr(target))
        words = Words(prompt, target, subject)
        return Encoded((*head.ids, *tail), head.prompt_length, head.subject, words=words)

    def following(self, text: str) -> list[int]:
        """The tokens of a text that doesn't begin anything, by itself."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _in_template(self, prompt: str) -> str:
        return self.template.replace("{prompt}", prompt)

    def _check(self, ids: Sequence[int], where: str) -> None:
        """Refuse what the model can't look up: a GPU would end the process, without a word of it."""
        unknown = next((token for token in ids if token >= self._known), None)
        if unknown is not None:
            raise ValueError(
                f"tokenizer: expected ids below {self._known}, as many as the model has embeddings, got {unknown} "
                f"({self.tokenizer.convert_ids_to_tokens(unknown)!r}) in {where}: "
                "model.resize_token_embeddings(len(tokenizer)) adds what is missing, before the editor is made"
            )

    def _ids(self, text: str) -> list[int]:
        ids = self._tokenized(text)["input_ids"]
        if ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers end every text so
            ids = ids[:-1]
        return list(ids)

    def _tokenized(self, text: str, **options: Any) -> BatchEncoding:
        """With the tokenizer's special tokens, unless a chat's template has written them already."""
        begun = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        return self.tokenizer(text, add_special_tokens=not begun, **options)

    def _span(self, prompt: str, subject: str) -> tuple[int, int] | None:
        """The subject's columns in the templated prompt, first and last + 1; None if it doesn't stand there."""
        found = prompt.find(subject)
        if found < 0:
            return None
        if not subject:
            return 0, 0
        if not self.tokenizer.is_fast:
            raise ValueError(
                "tokenizer: expected a fast one, which says where in a prompt its subject stands, got "
                f"{type(self.tokenizer).__name__}: load the model's fast one, or leave out the requests' subjects"
            )
        start = self.template.index("{prompt}") + found
        encoding = self._tokenized(self._in_template(prompt), return_offsets_mapping=True)
        columns = [
            column
            for column, (first, last) in enumerate(encoding["offset_mapping"])
            if first < start + len(subject) and last > start
        ]
        return columns[0], columns[-1] + 1

    def batch(self, rows: Sequence[Encoded], device: torch.device | str, *, side: str = "right") -> TokenBatch:
        """Pad ``rows`` to one batch on ``device``; ``side`` is where the padding goes."""
        width = max(len(row.ids) for row in rows)
        shape = (len(rows), width)
        ids = torch.full(shape, self.pad_id)
        labels = torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        prompt = torch.zeros(shape, dtype=torch.bool)
        subject = torch.zeros(shape, dtype=torch.bool)
        for index, row in enumerate(rows):
            start = 0 if side == "right" else width - len(row.ids)
            end, split = start + len(row.ids), start + row.prompt_length
            learned = start + row.answer_start
            ids[index, start:end] = torch.tensor(row.ids)
            labels[index, learned:end] = ids[index, learned:end]
            mask[index, start:end] = 1
            prompt[index, start:split] = True
            if row.subject is not None:
                subject[index, start + row.subject[0] : start + row.subject[1]] = True
        known = all(row.subject is not None for row in rows)
        tokens = PromptTokens(prompt.to(device), subject.to(device) if known else None)
        return TokenBatch(ids.to(device), mask.to(device), labels.to(device), tokens)
