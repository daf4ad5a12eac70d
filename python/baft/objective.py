"""The losses of training an edit, on tensors: edit + balance_weight * balance + locality_weight * locality.

Each is a value for each token, or for each basis; which tokens belong together is the caller's to say (``mean_of``).
Load balancing and a regulariser for locality are BaFT's (arXiv 2503.00306); their exact forms there are not public,
and these are ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["answer_nll", "balance", "kl_to_base", "mean_of", "relative_update", "smoothed_nll", "sum_of"]

# Of a prediction that is mixed into a target: less likely than this, compared with the likeliest token, is noise.
_PLAUSIBLE = 0.01


def mean_of(values: Tensor, counts: Tensor) -> Tensor:
    """Means of values that lie one group behind the other: values [M], group sizes [K] -> [K]; 0 of an empty group."""
    return sum_of(values, counts) / counts.clamp(min=1)


def sum_of(values: Tensor, counts: Tensor) -> Tensor:
    """Sums likewise: values [M, ...], group sizes [K] -> [K, ...]. Without atomics, so repeatable."""
    return torch.segment_reduce(values, "sum", lengths=counts, axis=0, unsafe=True)


def answer_nll(logits: Tensor, wanted: Tensor) -> Tensor:
    """Negative log-likelihood of each wanted token: logits [M, V], wanted [M] -> [M], float32."""
    return F.cross_entropy(logits.float(), wanted, reduction="none")


def smoothed_nll(logits: Tensor, wanted: Tensor, smoothing: float, enough: float) -> Tensor:
    """``answer_nll``, but for tokens that are predicted already: those are drawn to a softer target, and then let be.

    ``max(KL(q || p), enough)`` where the wanted token is the likeliest one, with p the prediction and
    ``q = (1 - smoothing) one_hot(wanted) + smoothing p'``, a constant; p' is p over the tokens with at least 0.01 of
    the likeliest one's probability, rescaled. So the tokens of a target that are certain don't become more so while
    the others are learned. The idea is OverTone's (arXiv 2502.00602); this form of it is ours.

    Args:
        logits: [M, V].
        wanted: [M].
        smoothing: from 0, which gives ``answer_nll``, to 1.
        enough: a divergence up to which there is no gradient.

    Returns:
        [M], float32.
    """
    nll = answer_nll(logits, wanted)
    if smoothing == 0:
        return nll
    predicted = logits.detach().float().softmax(-1)
    highest, likeliest = predicted.max(-1)
    plausible = predicted.masked_fill(predicted < _PLAUSIBLE * highest.unsqueeze(-1), 0.0)
    own = plausible / plausible.sum(-1, keepdim=True)
    target = smoothing * own + (1 - smoothing) * F.one_hot(wanted, logits.shape[-1])
    divergence = F.kl_div(F.log_softmax(logits.float(), -1), target, reduction="none").sum(-1)
    return torch.where(likeliest == wanted, divergence.clamp(min=enough), nll)


def balance(earlier_usage: Tensor, usage: Tensor) -> Tensor:
    """Incremental load balancing: the squared coefficient of variation of how much each basis is used.

    ``r * sum_k f_k^2 - 1`` with ``f`` the share of basis k in earlier edits and this one together: 0 if all are used
    alike. It steers an edit to bases that earlier ones used little.

    Args:
        earlier_usage: [r], sums of w over the tokens of earlier edits, a constant.
        usage: the same sums of this edit, [..., r].

    Returns:
        [...].
    """
    usage = earlier_usage + usage
    share = usage / usage.sum(-1, keepdim=True)
    return usage.shape[-1] * share.square().sum(-1) - 1.0


def relative_update(update: Tensor, squared_norm: Tensor, margin: float = 0.0) -> Tensor:
    """``||u||^2 / ||h||^2`` beyond ``margin`` of each token: u [M, r], ||h||^2 [M] -> [M].

    ||u|| is the length of the whole change, because the basis is orthonormal.
    """
    return F.relu(update.square().sum(-1) / squared_norm - margin)


def kl_to_base(logits: Tensor, base: Tensor) -> Tensor:
    """KL(base || edited) of each token: logits [M, V] of the edited and of the unedited model -> [M], float32."""
    expected = F.log_softmax(base.float(), -1)
    return F.kl_div(F.log_softmax(logits.float(), -1), expected, reduction="none", log_target=True).sum(-1)
