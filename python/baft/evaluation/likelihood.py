"""How likely a model finds a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from baft import objective
from baft.editing import Editor
from baft.engine.encoding import IGNORED, Encoded, most_tokens
from baft.engine.modes import evaluating
from baft.placement import device_of

__all__ = ["finite", "negative_log_likelihoods", "perplexity", "perplexity_of"]


def perplexity(editor: Editor, texts: Sequence[str], *, batch_size: int = 64) -> float:
    """exp of the mean negative log-likelihood of all tokens of ``texts`` but each one's first, under the edits.

    Of a text that is too long for the model, what it takes.

    Returns:
        A finite number, or infinity; NaN of no text.
    """
    encoded = [editor.encoder.prompt(text, subject="").cut(most_tokens(editor.model)) for text in texts]
    rows = [Encoded(text.ids, 1, text.subject) for text in encoded if len(text.ids) > 1]
    total, tokens = 0.0, 0
    for nll, count in negative_log_likelihoods(editor, rows, batch_size):
        total, tokens = total + nll, tokens + count
    return perplexity_of(total / tokens) if tokens else math.nan


def perplexity_of(nll: float) -> float:
    """exp of a mean negative log-likelihood; infinity where that is too much for a number."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def finite(value: float) -> float | None:
    """``value`` for JSON, which knows neither infinity nor NaN."""
    return value if math.isfinite(value) else None


@torch.no_grad()
def negative_log_likelihoods(editor: Editor, rows: Sequence[Encoded], batch_size: int) -> Iterator[tuple[float, int]]:
    """Of what follows each row's prompt: the sum over its tokens, under the edits, and how many they are."""
    for first in range(0, len(rows), batch_size):
        batch = editor.encoder.batch(rows[first : first + batch_size], device_of(editor.model))
        with evaluating(editor.model):
            logits = editor.model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits
        wanted = batch.labels[:, 1:]
        nll = objective.answer_nll(logits[:, :-1].flatten(0, 1), wanted.flatten()).view(wanted.shape)
        yield from zip(nll.sum(-1).tolist(), (wanted != IGNORED).sum(-1).tolist(), strict=True)
