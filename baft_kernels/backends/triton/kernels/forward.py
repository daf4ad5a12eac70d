"""The forward pass: p = D h + b and the gate w from one product, u = w p, out = h + R^T u (``baft_kernels.reference``).

Two forms. A sweep gives each tile of rows to one program, which reads h once if the tile fits on the chip, and else a
second time, from the L2 cache. Few rows can't fill a GPU so: for them d is split among programs, in two launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baft_kernels.backends.triton.kernels.tiles import (
    Rows,
    add_matmul,
    items_of_tile,
    load_low,
    load_matrix,
    load_row_blocks,
    load_rows,
    matmul,
    narrow,
    rows_of_items,
    set_of_sequence,
    store_low,
    store_rows,
)
from baft_kernels.backends.triton.launch import RowsLaunch, padded_rank, rows_launch
from baft_kernels.backends.triton.layout import TritonPack


def forward(
    h: Tensor,
    pack: TritonPack,
    *,
    gate_fn: str,
    rows: Tensor | None = None,
    adapters: Tensor | None = None,
    out: Tensor | None = None,
    launch: RowsLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [T, d] in h's dtype; w and u [T, r] in float32, zero at the rows that aren't edited.

    Args:
        h: [T, d], float32, bfloat16 or float16, contiguous along d.
        pack: the parameters in h's dtype.
        gate_fn: ``"sigmoid"``, ``"softmax"`` or ``"none"``.
        rows: the rows to edit: a boolean mask [T], or distinct indices, int64 [K], or None for all.
        adapters: integers [B] with T = B S: rows of sequence i use parameter set ``adapters[i]``. None: set 0.
        out: None for a new tensor, whose other rows are copies of h's, or h itself to edit in place: then other rows
            are neither read nor written.
        launch: instead of the launch that ``launch.py`` chooses.
    """
    total, dim = h.shape
    count, rank = pack.projection.shape[1], pack.basis.shape[1]
    rank_padded = padded_rank(rank)
    chosen = Rows.of(total, rows, adapters)
    in_place = out is h
    if out is None:
        out = h.new_empty(total, dim)
    if chosen.kind == "list" and not in_place:
        out.copy_(h)  # the kernel sees no other row
    new = torch.zeros if chosen.kind == "list" else torch.empty
    weights, update = (new(total, rank, dtype=torch.float32, device=h.device) for _ in range(2))
    if chosen.items == 0:
        return out, weights, update

    launch = launch or rows_launch(chosen.sequences, chosen.length, dim, rank, h.dtype, h.device)
    tiles = chosen.tiles(launch.rows)
    shape = {"DIM": dim, "COUNT": count, "RANK": rank, "R_PAD": rank_padded, "GATE": gate_fn}
    choice = {"ROWS": chosen.kind, "COPY": not in_place, "BT": launch.rows, "BD": launch.columns}
    matrices = (pack.projection, pack.basis, pack.bias)
    results = (out, weights, update, chosen.selection, chosen.adapters)
    with torch.cuda.device_of(h):
        if launch.splits == 1:
            _sweep_kernel[(tiles,)](
                h, *matrices, *results, chosen.length, h.stride(0), out.stride(0),
                **shape, **choice, ON_CHIP=launch.on_chip, num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
        else:
            partial = torch.empty(launch.splits, chosen.items, count, dtype=torch.float32, device=h.device)
            project_kernel[(tiles, launch.splits)](
                h, pack.projection, partial, chosen.selection, chosen.adapters, chosen.length, h.stride(0),
                DIM=dim, COUNT=count, C=rank_padded * (count // rank), ROWS=chosen.kind,
                BT=launch.rows, BD=launch.columns, SPLITS=launch.splits,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
            _write_kernel[(tiles, triton.cdiv(dim, launch.columns))](
                h, partial, *matrices, *results, chosen.length, h.stride(0), out.stride(0),
                **shape, **choice, SPLITS=launch.splits, num_warps=launch.warps,
            )  # fmt: skip
    return out, weights, update


@triton.jit(do_not_specialize=["length"])
def _sweep_kernel(
    p_h, p_projection, p_basis, p_bias, p_out, p_weights, p_update, p_rows, p_adapters, length, h_stride, out_stride,
    DIM: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr, R_PAD: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, COPY: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ON_CHIP: tl.constexpr,
):  # fmt: skip
    """One tile of rows: project, gate, write back."""
    C: tl.constexpr = R_PAD * (COUNT // RANK)
    i_sequence, o_item, m_item = items_of_tile(tl.program_id(0), length, BT)
    o_row, m_row = rows_of_items(p_rows, o_item, m_item, ROWS)
    # Rows that aren't edited are copied, or left alone.
    m_out = m_item if COPY else m_row
    i_set = set_of_sequence(p_adapters, i_sequence)
    p_projection += i_set * COUNT * DIM
    p_basis += i_set * RANK * DIM

    b_sum = tl.zeros([BT, C], tl.float32)
    if ON_CHIP:
        b_hs = load_row_blocks(p_h, h_stride, o_row, m_out, DIM, BD)
        for i in tl.static_range((DIM + BD - 1) // BD):
            b_projection = load_matrix(p_projection, i * BD, DIM, COUNT, C, BD)
            b_sum = matmul(b_hs[i], b_projection.T, b_sum)
    else:
        for i_d in range(0, DIM, BD):
            b_h = load_rows(p_h, h_stride, o_row, m_out, i_d, DIM, BD)
            b_projection = load_matrix(p_projection, i_d, DIM, COUNT, C, BD)
            b_sum = add_matmul(b_h, b_projection.T, b_sum, length)

    b_weights, b_update = gated_update(b_sum, p_bias + i_set * COUNT, m_row, COUNT, RANK, R_PAD, GATE)
    store_low(p_weights, b_weights, o_row, m_item, RANK, R_PAD)
    store_low(p_update, b_update, o_row, m_item, RANK, R_PAD)

    b_u = narrow(b_update, p_h.dtype.element_ty)
    if ON_CHIP:
        for i in tl.static_range((DIM + BD - 1) // BD):
            b_basis = load_matrix(p_basis, i * BD, DIM, RANK, R_PAD, BD)
            write_back(p_out, out_stride, b_hs[i], b_u, b_basis, o_row, m_row, m_out, i * BD, DIM, BD)
    else:
        for i_d in range(0, DIM, BD):
            b_h = load_rows(p_h, h_stride, o_row, m_out, i_d, DIM, BD)
            b_basis = load_matrix(p_basis, i_d, DIM, RANK, R_PAD, BD)
            write_back(p_out, out_stride, b_h, b_u, b_basis, o_row, m_row, m_out, i_d, DIM, BD)


@triton.jit(do_not_specialize=["length"])
def project_kernel(
    p_x, p_matrix, p_partial, p_rows, p_adapters, length, stride,
    DIM: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Of x M^T [items, COUNT], the part that one range of columns gives: ``partial`` is [SPLITS, items, COUNT]."""
    BLOCKS: tl.constexpr = (DIM + BD - 1) // BD
    COLUMNS: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS * BD
    i_sequence, o_item, m_item = items_of_tile(tl.program_id(0), length, BT)
    o_row, m_row = rows_of_items(p_rows, o_item, m_item, ROWS)
    i_split = tl.program_id(1)
    p_matrix += set_of_sequence(p_adapters, i_sequence) * COUNT * DIM

    b_sum = tl.zeros([BT, C], tl.float32)
    for i in range(0, COLUMNS, BD):
        i_d = i_split * COLUMNS + i
        b_x = load_rows(p_x, stride, o_row, m_row, i_d, DIM, BD)
        b_matrix = load_matrix(p_matrix, i_d, DIM, COUNT, C, BD)
        b_sum = add_matmul(b_x, b_matrix.T, b_sum, length)
    items = (tl.num_programs(0) // tl.cdiv(length, BT)).to(tl.int64) * length
    store_low(p_partial + i_split * items * COUNT, b_sum, o_item, m_item, COUNT, C)


@triton.jit
def sum_partial(
    p_partial, o_item, m_item, length, COUNT: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr
):
    """What the programs of ``project_kernel`` found for a tile, added up in the order of the columns: [BT, C]."""
    items = (tl.num_programs(0) // tl.cdiv(length, BT)).to(tl.int64) * length
    b_sum = tl.zeros([BT, C], tl.float32)
    for i_split in tl.static_range(SPLITS):
        b_sum += load_low(p_partial + i_split * items * COUNT, o_item, m_item, COUNT, C)
    return b_sum


@triton.jit(do_not_specialize=["length"])
def _write_kernel(
    p_h, p_partial, p_projection, p_basis, p_bias, p_out, p_weights, p_update, p_rows, p_adapters,
    length, h_stride, out_stride,
    DIM: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr, R_PAD: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, COPY: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One block of columns of one tile of rows, after ``project_kernel``: gate and write back."""
    C: tl.constexpr = R_PAD * (COUNT // RANK)
    i_sequence, o_item, m_item = items_of_tile(tl.program_id(0), length, BT)
    o_row, m_row = rows_of_items(p_rows, o_item, m_item, ROWS)
    m_out = m_item if COPY else m_row
    i_set = set_of_sequence(p_adapters, i_sequence)
    i_d = tl.program_id(1) * BD

    # Asked for first: neither needs the sum.
    b_h = load_rows(p_h, h_stride, o_row, m_out, i_d, DIM, BD)
    b_basis = load_matrix(p_basis + i_set * RANK * DIM, i_d, DIM, RANK, R_PAD, BD)
    b_sum = sum_partial(p_partial, o_item, m_item, length, COUNT, C, BT, SPLITS)
    b_weights, b_update = gated_update(b_sum, p_bias + i_set * COUNT, m_row, COUNT, RANK, R_PAD, GATE)
    if i_d == 0:
        store_low(p_weights, b_weights, o_row, m_item, RANK, R_PAD)
        store_low(p_update, b_update, o_row, m_item, RANK, R_PAD)
    b_u = narrow(b_update, p_h.dtype.element_ty)
    write_back(p_out, out_stride, b_h, b_u, b_basis, o_row, m_row, m_out, i_d, DIM, BD)


@triton.jit
def gated_update(
    b_sum, p_bias, m_row, COUNT: tl.constexpr, RANK: tl.constexpr, R_PAD: tl.constexpr, GATE: tl.constexpr
):
    """w and u [BT, R_PAD] from the products [BT, C], columns 2k = D_k h and 2k + 1 = G_k h; zeros at other rows."""
    BT: tl.constexpr = b_sum.shape[0]
    C: tl.constexpr = b_sum.shape[1]
    o_c = tl.arange(0, C)
    m_r = (tl.arange(0, R_PAD) < RANK)[None, :]
    # [C]
    b_sum += tl.load(p_bias + o_c, mask=o_c < COUNT, other=0.0)[None, :]
    if GATE == "none":
        b_p = b_sum
        b_w = tl.full([BT, R_PAD], 1.0, tl.float32)
    else:
        b_p, b_z = tl.split(tl.reshape(b_sum, [BT, R_PAD, 2]))
        if GATE == "softmax":
            b_z = tl.where(m_r, b_z, float("-inf"))
            b_w = tl.exp(b_z - tl.max(b_z, 1)[:, None])
            b_w = b_w / tl.sum(b_w, 1)[:, None]
        else:
            b_w = tl.sigmoid(b_z)
    b_w = tl.where(m_row[:, None], b_w, 0.0)
    return b_w, tl.where(m_row[:, None], b_w * b_p, 0.0)


@triton.jit
def write_back(p_out, stride, b_h, b_u, b_basis, o_row, m_row, m_out, i_d, DIM: tl.constexpr, BD: tl.constexpr):
    """out = h + R^T u in a block [BT, BD]; a row that isn't edited keeps its bits, those of a NaN too."""
    b_out = matmul(b_u, b_basis, b_h.to(tl.float32)).to(b_h.dtype)
    store_rows(p_out, stride, tl.where(m_row[:, None], b_out, b_h), o_row, m_out, i_d, DIM, BD)
