"""Which rows of a batch an intervention edits: the specs ``all``, ``prompt``, ``last``, ``subject``, ``f3+l2``."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Positions", "PromptTokens"]

_FIRST_LAST = re.compile(r"(?:f(?P<first>[1-9][0-9]*)(?:\+(?=l)|$))?(?:l(?P<last>[1-9][0-9]*))?")


@dataclass(frozen=True)
class PromptTokens:
    """Which columns of a padded batch are what.

    Attributes:
        prompt: boolean [B, S], true at the prompt's tokens (neither padding nor target).
        subject: boolean [B, S], true at the subject's tokens; None if nobody knows them.
    """

    prompt: Tensor
    subject: Tensor | None = None


@dataclass(frozen=True)
class Positions:
    """A parsed position spec.

    ``all`` means every token, generated ones too; all others choose among the tokens of the prompt: ``prompt`` takes
    each of them, ``last`` the last one, ``subject`` those of the subject, ``fN+lM`` (or ``fN``, ``lM``) the first N and
    last M.

    Raises:
        ValueError: for any other spec.
    """

    spec: str

    def __post_init__(self) -> None:
        match = _FIRST_LAST.fullmatch(self.spec)
        if self.spec not in ("all", "prompt", "last", "subject") and not (self.spec and match):
            raise ValueError(f"positions: expected all, prompt, last, subject or a form like f3+l2, got {self.spec!r}")

    @property
    def every_token(self) -> bool:
        return self.spec == "all"

    @property
    def from_the_end(self) -> bool:
        """Whether it depends on where the prompt ends."""
        return self.spec == "last" or (self.spec not in ("all", "prompt", "subject") and self._first_last()[1] > 0)

    def select(self, tokens: PromptTokens) -> Tensor:
        """The chosen columns, boolean [B, S], in the coordinates of ``tokens``.

        Raises:
            ValueError: for ``subject`` where the subject's tokens aren't known.
        """
        prompt = tokens.prompt
        if self.spec == "all":
            return torch.ones_like(prompt)
        if self.spec == "prompt":
            return prompt
        if self.spec == "subject":
            if tokens.subject is None:
                raise ValueError(
                    'positions="subject": expected to be told where the subject stands; edit and generate through '
                    "BaftEditor with requests (or prompts) that name a subject"
                )
            return tokens.subject
        first, last = (0, 1) if self.spec == "last" else self._first_last()
        from_start = prompt.cumsum(-1)
        from_end = prompt.flip(-1).cumsum(-1).flip(-1)
        return prompt & ((from_start <= first) | (from_end <= last))

    def _first_last(self) -> tuple[int, int]:
        match = _FIRST_LAST.fullmatch(self.spec)
        assert match is not None
        return int(match["first"] or 0), int(match["last"] or 0)

    def rows(self, tokens: PromptTokens, past: int, batch: int, width: int) -> Tensor | None:
        """The rows of one forward pass over columns ``past`` to ``past + width`` of ``batch`` sequences.

        Columns behind the known ones are generated tokens. A batch that is a multiple of the known one holds beams:
        each sequence's copies stand next to each other, as Hugging Face's generate lays them out.

        Returns:
            Boolean [batch, width], or None for every row.

        Raises:
            ValueError: if the batch isn't a multiple of the one that ``tokens`` describes.
        """
        if self.every_token:
            return None
        chosen = self.select(tokens)
        known = chosen.shape[0]
        if batch % known:
            raise ValueError(
                f"positions: expected a batch that is a multiple of {known} prompts, got {batch} sequences"
            )
        chosen = F.pad(chosen, (0, max(0, past + width - chosen.shape[1])))[:, past : past + width]
        return chosen.repeat_interleave(batch // known, dim=0)
