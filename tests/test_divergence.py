"""Divergences that are computed piece by piece: those of all logits at once, and their gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from baft.engine.divergence import FEWEST_ROWS, PIECE_BYTES, divergence_in_pieces, rows_of_a_piece
from baft.objective import kl_to_base

TOKENS, WIDTH, VOCABULARY = 23, 16, 50


def frozen_head(dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype).requires_grad_(False)


def hidden(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(divergence: Tensor) -> Tensor:
    """One that asks something else of each token."""
    return (divergence * torch.linspace(-2.0, 3.0, TOKENS)).sum()


@pytest.mark.parametrize("rows", [1, 7, TOKENS, 1000])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_pieces_give_the_divergences_and_the_gradient_of_all_logits(
    dtype: torch.dtype, rounding: float, rows: int
) -> None:
    head, base = frozen_head(dtype), hidden(1, dtype)
    whole, pieces = (hidden(0, dtype).requires_grad_() for _ in range(2))
    expected = kl_to_base(head(whole), head(base))
    actual = divergence_in_pieces(head, pieces, base, rows)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=rounding, atol=rounding)
    loss_of(expected).backward()
    loss_of(actual).backward()
    assert whole.grad is not None and pieces.grad is not None and pieces.grad.dtype == dtype
    assert (pieces.grad - whole.grad).norm() <= rounding * whole.grad.norm()


def test_no_more_than_a_piece_is_given_to_the_head() -> None:
    head, seen = frozen_head(torch.float32), []
    head.register_forward_hook(lambda _, inputs, logits: seen.append(tuple(logits.shape)))
    divergence_in_pieces(head, hidden(0, torch.float32).requires_grad_(), hidden(1, torch.float32), 10)
    assert seen == [(rows, VOCABULARY) for rows in (10, 10, 10, 10, 3, 3)]


def test_nothing_else_gets_a_gradient() -> None:
    head, base = frozen_head(torch.float32), hidden(1, torch.float32).requires_grad_()
    loss_of(divergence_in_pieces(head, hidden(0, torch.float32).requires_grad_(), base, 10)).backward()
    assert base.grad is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("vocabulary", [1200, 32_000, 128_256, 10**9])
def test_a_piece_is_as_large_as_its_logits_may_be(vocabulary: int, device: str) -> None:
    rows = rows_of_a_piece(vocabulary, torch.device(device))
    if rows == FEWEST_ROWS:
        assert PIECE_BYTES[device] < (rows + 1) * vocabulary * 4
    else:
        assert rows > FEWEST_ROWS and rows * vocabulary * 4 <= PIECE_BYTES[device] < (rows + 1) * vocabulary * 4
