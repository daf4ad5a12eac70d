"""Whether a model still writes naturally: its free text's n-gram entropy, and its perplexity to the unedited model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from baft.editing import Editor
from baft.engine.encoding import most_tokens
from baft.evaluation.likelihood import finite, negative_log_likelihoods, perplexity_of
from baft.requests import EditRequest

__all__ = ["FREE_TOKENS", "fluency", "free_prompts", "ngram_entropy"]

FREE_TOKENS = 48
"""Tokens of a free text, at most."""

# Weights of bigrams and trigrams, and the entropy's base, as in ROME's measure of fluency (arXiv 2202.05262).
_WEIGHTS = {2: 2 / 3, 3: 4 / 3}


def ngram_entropy(text: str) -> float:
    """Weighted mean of the bigram and trigram entropies of ``text``'s words, in bits; low if it repeats itself."""
    words = text.split()
    entropies = []
    for n, weight in _WEIGHTS.items():
        counts = Counter(zip(*(words[k:] for k in range(n)), strict=False))
        total = sum(counts.values())
        entropies.append(weight * -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0)
    return fmean(entropies)


def free_prompts(request: EditRequest) -> tuple[str, ...]:
    """What the model continues freely: a request's generation prompts, else its prompt."""
    return request.generation_prompts or (request.prompt,)


def fluency(
    editor: Editor, requests: Sequence[EditRequest], *, max_new_tokens: int = FREE_TOKENS, batch_size: int = 64
) -> dict[str, float | None]:
    """Free text of the edited model about ``requests``, continued from their ``free_prompts``.

    Returns:
        ``ngram_entropy`` of the prompt with its continuation, and ``perplexity``, under the unedited model, of the
        continuations; None if it wrote none, or if it is no finite number.
    """
    subjects = {prompt: r.subject or "" for r in requests for prompt in free_prompts(r)}
    prompts = list(subjects)
    known = [subject if subject in prompt else "" for prompt, subject in subjects.items()]
    texts = editor.generate(prompts, subjects=known, max_new_tokens=max_new_tokens, batch_size=batch_size)
    with editor.disabled():
        written = [(p, t) for p, t in zip(prompts, texts, strict=True) if t.strip()]
        # What was written may have more tokens when it is read.
        limit = most_tokens(editor.model)
        rows = [editor.encoder.pair(prompt, text, append_eos=False).cut(limit) for prompt, text in written]
        nlls = [nll / tokens for nll, tokens in negative_log_likelihoods(editor, rows, batch_size)]
    entropy = fmean(ngram_entropy(prompt + text) for prompt, text in zip(prompts, texts, strict=True))
    return {"ngram_entropy": entropy, "perplexity": finite(perplexity_of(fmean(nlls))) if nlls else None}
