"""How far predictions have gone from the unedited model's, a piece at a time: all logits are never there at once.

The head is frozen and works on each token by itself, so that what a token's divergence asks of its hidden vector is
known as soon as the divergence is, but for a factor that the loss brings. A piece's logits, [rows, V], of both models
live until its gradient, [rows, d], is made of them, in the forward pass. With a vocabulary of 128,000 all logits of a
step would take gigabytes; and where it is small, a piece stays in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from baft import objective

__all__ = ["FEWEST_ROWS", "PIECE_BYTES", "divergence_in_pieces", "rows_of_a_piece"]

Head = Callable[[Tensor], Tensor]

PIECE_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""By device the bytes of a piece's logits in float32, of which there are a few copies at a time; unless it has then
fewer rows than ``FEWEST_ROWS``."""

FEWEST_ROWS = 256
"""Rows of a piece at least: each piece reads the whole head, three times, and that is to be worth it."""


def rows_of_a_piece(vocabulary: int, device: torch.device) -> int:
    """How many tokens go into a piece."""
    allowed = PIECE_BYTES[device.type if device.type in PIECE_BYTES else "cuda"]
    return max(FEWEST_ROWS, allowed // (4 * vocabulary))


def divergence_in_pieces(head: Head, x: Tensor, base: Tensor, rows: int) -> Tensor:
    """``objective.kl_to_base(head(x), head(base))``, and the same gradient.

    Args:
        head: makes logits of hidden vectors, row by row; nothing in it is trained.
        x: what it is given in the edited model, [K, d].
        base: and in the unedited one, [K, d], a constant.
        rows: of a piece.

    Returns:
        [K], float32.
    """
    divergence: Tensor = _InPieces.apply(x, base, head, rows)
    return divergence


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, head: Head, rows: int) -> Tensor:
        divergences, gradients = [], []
        for piece, unedited in zip(x.split(rows), base.split(rows), strict=True):
            expected = head(unedited)
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                divergence = objective.kl_to_base(head(leaf), expected)
                gradients.append(torch.autograd.grad(divergence.sum(), leaf)[0])
            divergences.append(divergence.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(divergences)

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # The factor is float32, and so is the product before it is rounded.
        return (gradient * factor.unsqueeze(-1)).to(gradient.dtype), None, None, None
