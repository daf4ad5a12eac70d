"""What the kernels share: which rows a program works on, and how it moves and multiplies tiles of them.

Shapes in comments: BT rows and BD columns of a tile, C coefficients of a row (R_PAD, or 2 R_PAD interleaved ones).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """The rows of one call, as ``sequences`` of ``length`` items each; an item is a row, or a place in a list of rows.

    ``kind`` is "all", "mask" (``selection`` is a uint8 mask [T]) or "list" (``selection`` is int64 [K]).
    """

    kind: str
    selection: Tensor | None
    adapters: Tensor | None
    sequences: int
    length: int

    @classmethod
    def of(cls, total: int, rows: Tensor | None, adapters: Tensor | None) -> Rows:
        """The rows of a call on h [total, d].

        Raises:
            NotImplementedError: for a list of rows of grouped calls, since its tiles would depend on the data.
            ValueError: if the rows can't be cut into one sequence for each adapter.
        """
        if total == 0:
            adapters = None  # nor is there anything to cut into sequences
        sequences = 1 if adapters is None else adapters.shape[0]
        if sequences == 0 or total % sequences:
            raise ValueError(f"adapters: expected a number that divides the {total} rows of h, got {sequences}")
        if adapters is not None:
            adapters = adapters.contiguous()
        if rows is None:
            return cls("all", None, adapters, sequences, total // sequences)
        if rows.dtype == torch.bool:
            # Bytes, because one-bit integers are loaded through them anyway.
            return cls("mask", rows.contiguous().view(torch.uint8), adapters, sequences, total // sequences)
        if adapters is not None:
            raise NotImplementedError("rows: expected a mask beside adapters, got a list of rows")
        return cls("list", rows.to(torch.int64).contiguous(), None, 1, rows.shape[0])

    @property
    def items(self) -> int:
        return self.sequences * self.length

    def tiles(self, rows_of_tile: int) -> int:
        """How many tiles there are; none spans two sequences."""
        return self.sequences * triton.cdiv(self.length, rows_of_tile)


@triton.jit
def items_of_tile(i_tile, length, BT: tl.constexpr):
    """The sequence of tile ``i_tile``, the items in it, int64 [BT], and which of them exist [BT]."""
    tiles = tl.cdiv(length, BT)
    i_sequence = (i_tile // tiles).to(tl.int64)
    o_t = i_tile % tiles * BT + tl.arange(0, BT)
    return i_sequence, i_sequence * length + o_t, o_t < length


@triton.jit
def rows_of_items(p_rows, o_item, m_item, ROWS: tl.constexpr):
    """The rows of ``o_item``, int64 [BT], and which of them are edited [BT]."""
    o_row = o_item
    m_row = m_item
    if ROWS == "mask":
        # [BT]
        m_row = m_item & (tl.load(p_rows + o_item, mask=m_item, other=0) != 0)
    elif ROWS == "list":
        # [BT]
        o_row = tl.load(p_rows + o_item, mask=m_item, other=0)
    return o_row, m_row


@triton.jit
def set_of_sequence(p_adapters, i_sequence):
    """The parameter set that a sequence uses, int64."""
    i_set = tl.zeros((), tl.int64)
    if p_adapters is not None:
        i_set = tl.load(p_adapters + i_sequence).to(tl.int64)
    return i_set


@triton.jit
def load_rows(p_x, stride, o_row, m_row, i_d, DIM: tl.constexpr, BD: tl.constexpr):
    """Columns ``i_d : i_d + BD`` of some rows [BT, BD]; zeros where there are none."""
    o_d = i_d + tl.arange(0, BD)
    # [BT, BD]
    return tl.load(p_x + o_row[:, None] * stride + o_d[None, :], mask=m_row[:, None] & (o_d < DIM)[None, :], other=0.0)


@triton.jit
def load_matrix(p_matrix, i_d, DIM: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """Columns ``i_d : i_d + BD`` of a matrix of ``COUNT`` rows, padded with zeros to [C, BD]."""
    o_c = tl.arange(0, C)
    o_d = i_d + tl.arange(0, BD)
    # [C, BD]
    return tl.load(
        p_matrix + o_c[:, None] * DIM + o_d[None, :], mask=(o_c < COUNT)[:, None] & (o_d < DIM)[None, :], other=0.0
    )


@triton.jit
def load_row_blocks(p_x, stride, o_row, m_row, DIM: tl.constexpr, BD: tl.constexpr):
    """Whole rows on the chip: a tuple of blocks [BT, BD]."""
    b_xs = ()  # Triton's language has no lists, and no unpacking
    for i in tl.static_range((DIM + BD - 1) // BD):
        b_xs = b_xs + (load_rows(p_x, stride, o_row, m_row, i * BD, DIM, BD),)  # noqa: RUF005
    return b_xs


@triton.jit
def matmul(b_a, b_b, b_sum):
    """``b_sum + b_a b_b``, accumulated in float32; float32 operands are not rounded to TF32."""
    return tl.dot(b_a, b_b, b_sum, input_precision="ieee")


@triton.jit
def add_matmul(b_a, b_b, b_sum, length):
    """``b_sum + a b`` of one block of many: a product of float32 is summed up by itself before it is added.

    One chain of additions over all blocks would lose more than plain torch does, which adds up parts. The compiler
    would make such a chain of it if it knew that the product begins at zeros: that no ``length`` is negative.
    """
    if b_a.dtype == tl.float32:
        b_zero = tl.zeros(b_sum.shape, tl.float32) + tl.where(length < 0, 1.0, 0.0)
        return b_sum + matmul(b_a, b_b, b_zero)
    return matmul(b_a, b_b, b_sum)


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """``b_x`` as operand of a product. float16 saturates: an infinity would make NaN of every zero that it meets."""
    if dtype == tl.float16:
        b_x = tl.where(b_x > 65504.0, 65504.0, b_x)
        b_x = tl.where(b_x < -65504.0, -65504.0, b_x)
    return b_x.to(dtype)


@triton.jit
def store_rows(p_x, stride, b_x, o_row, m_row, i_d, DIM: tl.constexpr, BD: tl.constexpr):
    """The reverse of ``load_rows``."""
    o_d = i_d + tl.arange(0, BD)
    tl.store(p_x + o_row[:, None] * stride + o_d[None, :], b_x, mask=m_row[:, None] & (o_d < DIM)[None, :])


@triton.jit
def load_low(p_x, o_row, m_row, COUNT: tl.constexpr, C: tl.constexpr):
    """Some rows of a contiguous [*, COUNT], padded with zeros to [BT, C]."""
    o_c = tl.arange(0, C)
    # [BT, C]
    return tl.load(p_x + o_row[:, None] * COUNT + o_c[None, :], mask=m_row[:, None] & (o_c < COUNT)[None, :], other=0.0)


@triton.jit
def store_low(p_x, b_x, o_row, m_row, COUNT: tl.constexpr, C: tl.constexpr):
    """The reverse of ``load_low``."""
    o_c = tl.arange(0, C)
    tl.store(p_x + o_row[:, None] * COUNT + o_c[None, :], b_x, mask=m_row[:, None] & (o_c < COUNT)[None, :])
