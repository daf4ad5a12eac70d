"""Whether a model still writes naturally: its free text's n-gram entropy, and its perplexity to the unedited model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import torch

from baft import objective
from baft.editing import Editor
from baft.engine.encoding import IGNORED
from baft.requests import EditRequest

__all__ = ["fluency", "ngram_entropy"]

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


def fluency(
    editor: Editor, requests: Sequence[EditRequest], *, max_new_tokens: int = 48, batch_size: int = 64
) -> dict[str, float]:
    """Free text of the edited model about ``requests``, continued from their generation prompts, else their prompts.

    Returns:
        ``ngram_entropy`` of the prompt with its continuation, and ``perplexity``, under the unedited model, of the
        continuations.
    """
    subjects = {prompt: r.subject or "" for r in requests for prompt in (r.generation_prompts or (r.prompt,))}
    prompts = list(subjects)
    known = [subject if subject in prompt else "" for prompt, subject in subjects.items()]
    texts = editor.generate(prompts, subjects=known, max_new_tokens=max_new_tokens, batch_size=batch_size)
    with editor.disabled():
        nll = _mean_nll(editor, [(p, t) for p, t in zip(prompts, texts, strict=True) if t.strip()], batch_size)
    entropy = fmean(ngram_entropy(prompt + text) for prompt, text in zip(prompts, texts, strict=True))
    return {"ngram_entropy": entropy, "perplexity": math.exp(nll)}


@torch.no_grad()
def _mean_nll(editor: Editor, pairs: Sequence[tuple[str, str]], batch_size: int) -> float:
    rows = [editor.encoder.pair(prompt, text, append_eos=False) for prompt, text in pairs]
    nlls: list[float] = []
    for first in range(0, len(rows), batch_size):
        batch = editor.encoder.batch(rows[first : first + batch_size], editor.model.device)
        logits = editor.model(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False).logits
        wanted = batch.labels[:, 1:]
        nll = objective.answer_nll(logits[:, :-1].flatten(0, 1), wanted.flatten()).view(wanted.shape)
        nlls += (nll.sum(-1) / (wanted != IGNORED).sum(-1)).tolist()
    return fmean(nlls) if nlls else math.nan
