"""The training losses, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from baft.objective import answer_nll, balance, kl_to_base, mean_of, relative_update, smoothed_nll, sum_of


def logs(*probabilities: list[float]) -> Tensor:
    """Logits of some tokens that softmax to ``probabilities``; their own scale is arbitrary."""
    return torch.tensor(probabilities).log() + 3.0


# -- groups of tokens --


def test_means_and_sums_are_taken_within_groups() -> None:
    values = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0], requires_grad=True)
    counts = torch.tensor([2, 0, 3])
    torch.testing.assert_close(sum_of(values, counts), torch.tensor([4.0, 0.0, 21.0]))
    means = mean_of(values, counts)
    torch.testing.assert_close(means, torch.tensor([2.0, 0.0, 7.0]))
    means.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3]))


def test_a_group_that_is_not_finite_leaves_the_others_finite() -> None:
    values = torch.tensor([1.0, math.nan, 5.0], requires_grad=True)
    means = mean_of(values, torch.tensor([1, 1, 1]))
    assert means.isfinite().tolist() == [True, False, True]
    means.sum().backward()
    assert values.grad.isfinite().all()


def test_sums_keep_the_other_axes() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    torch.testing.assert_close(sum_of(values, torch.tensor([1, 2])), torch.tensor([[1.0, 2.0], [8.0, 10.0]]))


# -- the edit --


def test_the_edit_loss_is_that_of_the_wanted_tokens() -> None:
    loss = answer_nll(logs([0.25, 0.75], [0.5, 0.5]), torch.tensor([1, 0]))
    torch.testing.assert_close(loss, torch.tensor([-math.log(0.75), -math.log(0.5)]))


def test_the_edit_loss_is_computed_in_float32() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = torch.tensor([7, 8, 9, 3])
    loss = answer_nll(logits, wanted)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, answer_nll(logits.float(), wanted))


# -- the edit, smoothed --

# The last token is less than a hundredth as likely as the first, and 0.7 + 0.2 + 0.095 = 0.995.
PREDICTED = [0.7, 0.2, 0.095, 0.005]


def test_without_smoothing_it_is_the_edit_loss_bit_for_bit() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    wanted = torch.cat((logits[:3].argmax(-1), torch.tensor([1, 2, 3])))
    assert torch.equal(smoothed_nll(logits, wanted, 0.0, 10.0), answer_nll(logits, wanted))


def test_a_token_that_is_predicted_already_is_drawn_to_a_softer_target() -> None:
    logits = logs(PREDICTED).requires_grad_()
    target = torch.tensor([[0.6 + 0.4 * 0.7 / 0.995, 0.4 * 0.2 / 0.995, 0.4 * 0.095 / 0.995, 0.0]])
    loss = smoothed_nll(logits, torch.tensor([0]), 0.4, 0.0)
    expected = sum(q * math.log(q / p) for q, p in zip(target[0].tolist(), PREDICTED, strict=True) if q > 0)
    torch.testing.assert_close(loss, torch.tensor([expected]))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([PREDICTED]) - target)


@pytest.mark.parametrize(("smoothing", "enough"), [(0.4, 1.0), (1.0, 0.01)])
def test_a_token_that_is_predicted_well_enough_is_let_be(smoothing: float, enough: float) -> None:
    logits = logs(PREDICTED).requires_grad_()
    loss = smoothed_nll(logits, torch.tensor([0]), smoothing, enough)
    torch.testing.assert_close(loss, torch.tensor([enough]))
    loss.sum().backward()
    assert not logits.grad.any()


def test_a_token_that_is_not_predicted_yet_is_trained_as_ever() -> None:
    both = [logs(PREDICTED).requires_grad_() for _ in range(2)]
    losses = smoothed_nll(both[0], torch.tensor([1]), 0.4, 5.0), answer_nll(both[1], torch.tensor([1]))
    for loss in losses:
        loss.sum().backward()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(both[0].grad, both[1].grad)


# -- load balancing --


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ([2.0, 2.0, 2.0, 2.0], 0.0),
        ([5.0, 0.0, 0.0, 0.0], 3.0),
        # Shares 1/2, 1/4, 1/8, 1/8: 4 * (16 + 4 + 1 + 1) / 64 - 1.
        ([4.0, 2.0, 1.0, 1.0], 0.375),
    ],
)
def test_balance_is_the_squared_coefficient_of_variation(usage: list[float], expected: float) -> None:
    now = torch.tensor(usage)
    torch.testing.assert_close(balance(torch.zeros(4), now), torch.tensor(expected))
    torch.testing.assert_close(torch.tensor(expected), (now.std(correction=0) / now.mean()).square())


def test_balance_adds_earlier_usage_to_each_edits_own() -> None:
    # Usage (1 + 3, 1 + 0) and (0 + 3, 3 + 0): shares 4/5, 1/5 and 1/2, 1/2.
    actual = balance(torch.tensor([3.0, 0.0]), torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
    torch.testing.assert_close(actual, torch.tensor([2 * (16 + 1) / 25 - 1, 0.0]))


def test_balance_pushes_towards_bases_that_earlier_edits_used_little() -> None:
    usage = torch.full((3,), 0.5, requires_grad=True)
    balance(torch.tensor([9.0, 3.0, 0.0]), usage).backward()
    most, middle, least = usage.grad
    assert most > middle > least
    assert most > 0 > least


# -- locality --


def test_relative_update_is_a_ratio_of_squared_lengths() -> None:
    change = relative_update(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([50.0, 4.0]))
    torch.testing.assert_close(change, torch.tensor([0.5, 0.25]))


def test_a_margin_lets_small_updates_pass() -> None:
    update = torch.tensor([[3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    change = relative_update(update, torch.tensor([50.0, 4.0]), margin=0.3)
    torch.testing.assert_close(change, torch.tensor([0.5 - 0.3, 0.0]))
    change.sum().backward()
    assert update.grad[0].any()
    assert not update.grad[1].any()


def test_kl_is_measured_from_the_base_model() -> None:
    base, edited = [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]
    expected = sum(b * math.log(b / e) for b, e in zip(base, edited, strict=True))
    torch.testing.assert_close(kl_to_base(logs(edited), logs(base) - 1.0), torch.tensor([expected]))
