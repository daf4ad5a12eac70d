"""Sizes rounded up to a few, so that steps with different texts have tensors of the same shapes."""

from __future__ import annotations

__all__ = ["rounded_up"]


def rounded_up(count: int, parts: int) -> int:
    """The least bucket that holds ``count``: between a power of two and the next there are ``parts`` of them."""
    bucket = max(1, (1 << (count - 1).bit_length()) // (2 * parts))
    return -(-count // bucket) * bucket
