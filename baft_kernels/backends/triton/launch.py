"""Launch configurations: functions of shapes, dtype and device alone. Nothing is tuned at the first call, and the order
of a sum never depends on the data.

No choice has been measured on a GPU yet. The reasons beside them are counts of bytes, and what the compiler reports:
all that is chosen here compiles without a register spill (``tests/test_triton_compile.py``), but for the retraction of
ranks above 32. The kernels' functions take a launch as an argument, so that a measurement can try others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = [
    "MAX_RANK",
    "MAX_RETRACTION_RANK",
    "ColumnsLaunch",
    "RetractionLaunch",
    "RowsLaunch",
    "columns_launch",
    "padded_rank",
    "retraction_launch",
    "rows_launch",
]

# Above, the coefficients of a tile no longer fit in registers; of a retraction, whole r x r matrices.
MAX_RANK = 128
MAX_RETRACTION_RANK = 64


@dataclass(frozen=True)
class RowsLaunch:
    """Of a kernel that gives each program a tile of rows.

    Attributes:
        rows, columns: the tile, and the blocks that it is worked on in; powers of two, at least 16.
        warps, stages: as Triton means them.
        on_chip: keep the whole tile in registers between the two products, rather than read it again.
        splits: into how many ranges of columns the first product is cut, each with a program of its own.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1
    on_chip: bool = False
    splits: int = 1


@dataclass(frozen=True)
class ColumnsLaunch:
    """Of the kernel that gives each program a block of columns, over ``rows`` rows at a time.

    Attributes:
        rows, columns: powers of two, at least 16.
        warps, stages: as Triton means them.
        splits: into how many parts the rows are cut, each with a program of its own.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    splits: int = 1


@dataclass(frozen=True)
class RetractionLaunch:
    """Of the retraction, which gives each program a basis, in blocks of ``columns``."""

    columns: int
    warps: int


class Device(NamedTuple):
    """What a choice depends on: streaming multiprocessors, and bytes of shared memory that a program can have."""

    multiprocessors: int
    shared_memory: int


# Tiles that are kept on the chip take half of the registers of a multiprocessor: 256 threads with 128 of 4 bytes each.
_ON_CHIP_BYTES = 128 << 10
# What a program adds up of partial sums: read from the L2 cache in about the time that a launch takes.
_PARTIAL_BYTES = 64 << 10
# Below, as on sm_86, sm_89 and sm_120 with their 99 KiB, tiles on the chip and deep pipelines don't fit.
_ROOMY = 160 << 10


def padded_rank(rank: int, highest: int = MAX_RANK) -> int:
    """The power of two that r is padded to: at least 16, the shortest inner dimension of a product.

    Raises:
        NotImplementedError: if r is above ``highest``.
    """
    if rank > highest:
        raise NotImplementedError(f"rank: expected at most {highest} for the Triton kernels, got {rank}")
    return max(16, _power_of_two(rank))


def rows_launch(
    sequences: int, length: int, dim: int, rank: int, dtype: torch.dtype, device: torch.device
) -> RowsLaunch:
    """For the forward pass, and the first kernel of the backward pass."""
    multiprocessors, shared_memory = _device(device)
    half, roomy = dtype != torch.float32, shared_memory >= _ROOMY

    def tiles(rows: int) -> int:
        return sequences * -(-length // rows)

    # Too few tiles for the multiprocessors, even of the lowest: cut d, so that each gets one program. The second launch
    # adds the partial sums up in every program, so there shouldn't be many.
    columns, warps = (64, 4) if half else (32, 8)
    blocks, sums = -(-dim // 64), 2 * padded_rank(rank) * min(16, length) * 4
    splits = min(blocks, multiprocessors // max(1, tiles(16)), _PARTIAL_BYTES // max(1, sums))
    if splits > 1 and (half or rank <= 64):
        even = -(-blocks // -(-blocks // splits))  # as many as are busy when each has equally many blocks
        return RowsLaunch(rows=16, columns=columns, warps=warps, stages=2, splits=even)

    # A tile reads all weights from the L2 cache, so high tiles are good, but all multiprocessors should have one, and
    # registers for its coefficients.
    highest = min(64 if half and rank <= 64 else 32, max(16, _power_of_two(length)))
    rows = next((rows for rows in (64, 32) if rows <= highest and 4 * tiles(rows) >= 3 * multiprocessors), 16)
    if half and roomy and rank <= 32:
        # In units of a row of h, a row of a tile costs 3 r / rows of weights, and 1 more if h is read twice.
        fitting = _ON_CHIP_BYTES // (dtype.itemsize * 256 * -(-dim // 256))
        low = min(rows, 1 << fitting.bit_length() >> 1)
        if low >= 16 and low * padded_rank(rank) <= 1024 and 3 * rank / low < 1 + 3 * rank / rows:
            # Long blocks mean fewer barriers, but many coefficients leave no registers for them.
            longest = 256 if low * padded_rank(rank) <= 512 else 128
            return RowsLaunch(rows=low, columns=min(longest, max(16, _power_of_two(dim))), warps=8, on_chip=True)
    if not half:
        # Without tensor cores, the operands of a product sit in registers: longer blocks would spill.
        return RowsLaunch(rows=rows, columns=32, warps=8, stages=2)
    # Three blocks under way hide the latency of memory. From rank 33 on, eight warps share the coefficients' registers.
    return RowsLaunch(rows=rows, columns=64, warps=4 if rank <= 32 else 8, stages=3)


def columns_launch(
    sequences: int, length: int, sets: int, dim: int, rank: int, dtype: torch.dtype, device: torch.device
) -> ColumnsLaunch:
    """For the second kernel of the backward pass."""
    # Each block of columns reads all dp, dz and u, from the L2 cache: wide blocks, as far as there are registers.
    if dtype == torch.float32:
        rows, columns, warps, stages = 16, 64 if rank <= 64 else 32, 8, 2
    else:
        rows, columns, warps, stages = 32, 128 if rank <= 64 else 64, 4 if rank <= 16 else 8, 3
    # As many programs as run at a time. Each part of the rows costs partial sums, 3 r d numbers written and read again.
    programs = sets * -(-dim // columns)
    at_a_time = _device(device).multiprocessors * (2 if rank <= 32 else 1)
    tiles = -(-length // rows)
    return ColumnsLaunch(rows, columns, warps, stages, splits=max(1, min(at_a_time // programs, tiles // 8)))


def retraction_launch(rank: int) -> RetractionLaunch:
    """For bases whose largest padded rank is ``rank``: the widest blocks that don't spill."""
    return {16: RetractionLaunch(64, 8), 32: RetractionLaunch(64, 16), 64: RetractionLaunch(32, 16)}[rank]


@functools.cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(132, 227 << 10)  # the interpreter plays an H100
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _power_of_two(number: int) -> int:
    """The lowest power of two that isn't below ``number``."""
    return 1 << max(0, number - 1).bit_length()
