"""The backward pass, in two kernels that need neither p nor the gate's argument (``baft_kernels.autograd``).

The first works on tiles of rows: du = R g + gu, from it dp and dz, and dh = g + D^T dp + G^T dz; few rows are split
like those of the forward pass. It leaves dp and dz, side by side in the order of the packed projection, to the second.
That works on blocks of columns: the gradients of D, G and R are products over all rows. There are no atomics; where
rows are split among programs, the parts are added up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baft_kernels.backends.triton.kernels.forward import project_kernel, sum_partial, write_back
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
)
from baft_kernels.backends.triton.launch import ColumnsLaunch, RowsLaunch, columns_launch, padded_rank, rows_launch
from baft_kernels.backends.triton.layout import TritonPack

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def backward(
    grad_out: Tensor,
    grad_weights: Tensor | None,
    grad_update: Tensor | None,
    h: Tensor,
    weights: Tensor,
    update: Tensor,
    pack: TritonPack,
    *,
    gate_fn: str,
    rows: Tensor | None = None,
    adapters: Tensor | None = None,
    input_gradient: bool = True,
    parameter_gradients: bool = True,
    by_rows: RowsLaunch | None = None,
    by_columns: ColumnsLaunch | None = None,
) -> Gradients:
    """The gradients of h [T, d] in its dtype, of R, A [N, r, d], b [N, r], G and c in float32; None if not asked for.

    Args:
        grad_out: [T, d], contiguous along d. At rows that aren't edited it is the gradient of h, bit for bit.
        grad_weights, grad_update: [T, r] or None.
        h, weights, update: what the forward pass took and gave.
        pack, gate_fn, rows, adapters: as in the forward pass.
        input_gradient, parameter_gradients: which gradients are wanted.
        by_rows, by_columns: instead of the launches that ``launch.py`` chooses.
    """
    total, dim = h.shape
    (sets, rank, _), count = pack.basis.shape, pack.projection.shape[1]
    chosen = Rows.of(total, rows, adapters)
    by_rows = by_rows or rows_launch(chosen.sequences, chosen.length, dim, rank, h.dtype, h.device)
    by_columns = by_columns or columns_launch(chosen.sequences, chosen.length, sets, dim, rank, h.dtype, h.device)
    low = tuple(v if v is None else v.contiguous() for v in (grad_weights, grad_update, weights, update))

    of_h = factors = sums = None
    if input_gradient:
        of_h = h.new_empty(total, dim)
        if chosen.kind == "list":
            of_h.copy_(grad_out)  # the kernel sees no other row
    if parameter_gradients:
        factors = h.new_empty(chosen.items, count)
        sums = torch.empty(chosen.tiles(by_rows.rows), count, dtype=torch.float32, device=h.device)
    if chosen.items and (input_gradient or parameter_gradients):
        with torch.cuda.device_of(h):
            _run_by_rows(grad_out, low, pack, gate_fn, chosen, by_rows, (of_h, factors, sums))
    if factors is None or sums is None:
        return of_h, None, None, None, None, None
    with torch.cuda.device_of(h):
        return of_h, *_run_by_columns(grad_out, h, update, factors, sums, chosen, by_columns, sets, rank)


def _run_by_rows(
    grad_out: Tensor,
    low: tuple[Tensor | None, ...],
    pack: TritonPack,
    gate_fn: str,
    rows: Rows,
    launch: RowsLaunch,
    results: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """``results``: dh [T, d]; dp and dz [items, P] in the operands' dtype; their sums over each tile [tiles, P]."""
    (_, count, dim), rank = pack.projection.shape, pack.basis.shape[1]
    tiles = rows.tiles(launch.rows)
    strides = (rows.length, grad_out.stride(0), dim)
    shape = {"DIM": dim, "COUNT": count, "RANK": rank, "R_PAD": padded_rank(rank), "GATE": gate_fn}
    choice = {"ROWS": rows.kind, "BT": launch.rows, "BD": launch.columns}
    which = (rows.selection, rows.adapters)
    if launch.splits == 1:
        _sweep_kernel[(tiles,)](
            grad_out, pack.basis, pack.projection, *low, *results, *which, *strides,
            **shape, **choice, ON_CHIP=launch.on_chip, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        return
    partial = torch.empty(launch.splits, rows.items, rank, dtype=torch.float32, device=grad_out.device)
    project_kernel[(tiles, launch.splits)](
        grad_out, pack.basis, partial, *which, *strides[:2],
        DIM=dim, COUNT=rank, C=padded_rank(rank), **choice, SPLITS=launch.splits,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    _write_kernel[(tiles, 1 if results[0] is None else triton.cdiv(dim, launch.columns))](
        grad_out, partial, pack.projection, *low, *results, *which, *strides,
        **shape, **choice, SPLITS=launch.splits, num_warps=launch.warps,
    )  # fmt: skip


def _run_by_columns(
    grad_out: Tensor,
    h: Tensor,
    update: Tensor,
    factors: Tensor,
    sums: Tensor,
    rows: Rows,
    launch: ColumnsLaunch,
    sets: int,
    rank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of R, A, b, G and c."""
    dim, count = h.shape[1], factors.shape[1]
    gated = count // rank
    matrices = torch.empty(launch.splits, 1 + gated, sets, rank, dim, dtype=torch.float32, device=h.device)
    biases = torch.empty(gated, sets, rank, dtype=torch.float32, device=h.device)
    # Over the tiles of a sequence. The order of torch's sums depends on nothing but the shape.
    sums = sums.unflatten(0, (rows.sequences, sums.shape[0] // rows.sequences)).sum(1)
    _columns_kernel[(triton.cdiv(dim, launch.columns), launch.splits, sets)](
        grad_out, h, update.contiguous(), factors, sums, matrices, biases, rows.selection, rows.adapters,
        rows.sequences, rows.length, grad_out.stride(0), h.stride(0),
        DIM=dim, COUNT=count, RANK=rank, R_PAD=padded_rank(rank), ROWS=rows.kind, BT=launch.rows, BD=launch.columns,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    summed = matrices[0] if launch.splits == 1 else matrices.sum(0)
    of_gate, of_gate_bias = (summed[2], biases[1]) if gated == 2 else (None, None)
    return summed[0], summed[1], biases[0], of_gate, of_gate_bias


@triton.jit(do_not_specialize=["length"])
def _sweep_kernel(
    p_g, p_basis, p_projection, p_grad_weights, p_grad_update, p_weights, p_update, p_dh, p_factors, p_sums,
    p_rows, p_adapters, length, g_stride, dh_stride,
    DIM: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr, R_PAD: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ON_CHIP: tl.constexpr,
):  # fmt: skip
    """One tile of rows: du, then dp and dz, then dh."""
    C: tl.constexpr = R_PAD * (COUNT // RANK)
    i_sequence, o_item, m_item = items_of_tile(tl.program_id(0), length, BT)
    o_row, m_row = rows_of_items(p_rows, o_item, m_item, ROWS)
    # Where dh is wanted, other rows of it are copies.
    m_g = m_row if p_dh is None else m_item
    i_set = set_of_sequence(p_adapters, i_sequence)
    p_projection += i_set * COUNT * DIM
    p_basis += i_set * RANK * DIM

    b_du = tl.zeros([BT, R_PAD], tl.float32)
    if ON_CHIP:
        b_gs = load_row_blocks(p_g, g_stride, o_row, m_g, DIM, BD)
        for i in tl.static_range((DIM + BD - 1) // BD):
            b_basis = load_matrix(p_basis, i * BD, DIM, RANK, R_PAD, BD)
            b_du = matmul(b_gs[i], b_basis.T, b_du)
    else:
        for i_d in range(0, DIM, BD):
            b_g = load_rows(p_g, g_stride, o_row, m_g, i_d, DIM, BD)
            b_basis = load_matrix(p_basis, i_d, DIM, RANK, R_PAD, BD)
            b_du = add_matmul(b_g, b_basis.T, b_du, length)

    b_factors = chain_rule(b_du, p_grad_weights, p_grad_update, p_weights, p_update, o_row, m_row, RANK, R_PAD, GATE)
    b_narrow = narrow(b_factors, p_g.dtype.element_ty)
    if p_factors is not None:
        store_factors(p_factors, p_sums, b_factors, b_narrow, o_item, m_item, COUNT, C)
    if p_dh is not None:
        if ON_CHIP:
            for i in tl.static_range((DIM + BD - 1) // BD):
                b_projection = load_matrix(p_projection, i * BD, DIM, COUNT, C, BD)
                write_back(p_dh, dh_stride, b_gs[i], b_narrow, b_projection, o_row, m_row, m_g, i * BD, DIM, BD)
        else:
            for i_d in range(0, DIM, BD):
                b_g = load_rows(p_g, g_stride, o_row, m_g, i_d, DIM, BD)
                b_projection = load_matrix(p_projection, i_d, DIM, COUNT, C, BD)
                write_back(p_dh, dh_stride, b_g, b_narrow, b_projection, o_row, m_row, m_g, i_d, DIM, BD)


@triton.jit(do_not_specialize=["length"])
def _write_kernel(
    p_g, p_partial, p_projection, p_grad_weights, p_grad_update, p_weights, p_update, p_dh, p_factors, p_sums,
    p_rows, p_adapters, length, g_stride, dh_stride,
    DIM: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr, R_PAD: tl.constexpr, GATE: tl.constexpr,
    ROWS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One block of columns of one tile of rows, after ``project_kernel``: dp and dz, then dh."""
    C: tl.constexpr = R_PAD * (COUNT // RANK)
    i_sequence, o_item, m_item = items_of_tile(tl.program_id(0), length, BT)
    o_row, m_row = rows_of_items(p_rows, o_item, m_item, ROWS)
    i_d = tl.program_id(1) * BD

    b_du = sum_partial(p_partial, o_item, m_item, length, RANK, R_PAD, BT, SPLITS)
    b_factors = chain_rule(b_du, p_grad_weights, p_grad_update, p_weights, p_update, o_row, m_row, RANK, R_PAD, GATE)
    b_narrow = narrow(b_factors, p_g.dtype.element_ty)
    if p_factors is not None:  # noqa: SIM102  # known while compiling, and the other isn't
        if i_d == 0:
            store_factors(p_factors, p_sums, b_factors, b_narrow, o_item, m_item, COUNT, C)
    if p_dh is not None:
        i_set = set_of_sequence(p_adapters, i_sequence)
        b_g = load_rows(p_g, g_stride, o_row, m_item, i_d, DIM, BD)
        b_projection = load_matrix(p_projection + i_set * COUNT * DIM, i_d, DIM, COUNT, C, BD)
        write_back(p_dh, dh_stride, b_g, b_narrow, b_projection, o_row, m_row, m_item, i_d, DIM, BD)


@triton.jit
def chain_rule(
    b_du, p_grad_weights, p_grad_update, p_weights, p_update, o_row, m_row,
    RANK: tl.constexpr, R_PAD: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """dp and dz [BT, C] from R g [BT, R_PAD], columns 2k = dp_k and 2k + 1 = dz_k; zeros at rows that aren't edited."""
    BT: tl.constexpr = b_du.shape[0]
    # [BT, R_PAD]
    b_w = load_low(p_weights, o_row, m_row, RANK, R_PAD)
    # What was read of other rows may be NaN, which w = 0 wouldn't remove.
    b_du = tl.where(m_row[:, None], b_du, 0.0)
    if p_grad_update is not None:
        # [BT, R_PAD]
        b_du += load_low(p_grad_update, o_row, m_row, RANK, R_PAD)
    b_factors = b_w * b_du
    if GATE != "none":
        # [BT, R_PAD]
        b_s = load_low(p_update, o_row, m_row, RANK, R_PAD) * b_du
        if p_grad_weights is not None:
            # [BT, R_PAD]
            b_s += b_w * load_low(p_grad_weights, o_row, m_row, RANK, R_PAD)
        b_dz = b_s - b_w * (tl.sum(b_s, 1)[:, None] if GATE == "softmax" else b_s)
        b_factors = tl.reshape(tl.join(b_factors, b_dz), [BT, 2 * R_PAD])
    return b_factors


@triton.jit
def store_factors(p_factors, p_sums, b_factors, b_narrow, o_item, m_item, COUNT: tl.constexpr, C: tl.constexpr):
    """dp and dz as operands of the second kernel, and their sums over the tile, which are the biases' gradients."""
    store_low(p_factors, b_narrow, o_item, m_item, COUNT, C)
    o_c = tl.arange(0, C)
    tl.store(p_sums + tl.program_id(0).to(tl.int64) * COUNT + o_c, tl.sum(b_factors, 0), mask=o_c < COUNT)


@triton.jit(do_not_specialize=["length"])
def _columns_kernel(
    p_g, p_h, p_update, p_factors, p_sums, p_matrices, p_biases, p_rows, p_adapters,
    sequences, length, g_stride, h_stride,
    DIM: tl.constexpr, COUNT: tl.constexpr, RANK: tl.constexpr, R_PAD: tl.constexpr, ROWS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One block of columns, one part of the rows, one parameter set: h^T [dp, dz] and g^T u.

    ``sums`` is [sequences, COUNT]; ``matrices`` [splits, 2 or 3 (R, A, G), sets, RANK, DIM] and ``biases``
    [1 or 2 (b, c), sets, RANK] are the gradients.
    """
    C: tl.constexpr = R_PAD * (COUNT // RANK)
    i_d, i_split, i_set = tl.program_id(0) * BD, tl.program_id(1), tl.program_id(2)
    tiles = tl.cdiv(length, BT)
    part = tl.cdiv(tiles, tl.num_programs(1))
    first, last = i_split * part, tl.minimum(i_split * part + part, tiles)
    o_c = tl.arange(0, C)

    b_projection = tl.zeros([C, BD], tl.float32)
    b_basis = tl.zeros([R_PAD, BD], tl.float32)
    b_bias = tl.zeros([C], tl.float32)
    for i_sequence in range(sequences):
        # Sequences of other sets are passed over, by ranges without elements.
        ours = set_of_sequence(p_adapters, i_sequence) == i_set
        # [C]
        b_bias += tl.load(p_sums + i_sequence * COUNT + o_c, mask=o_c < tl.where(ours, COUNT, 0), other=0.0)
        for i_tile in range(first, tl.where(ours, last, first)):
            _, o_item, m_item = items_of_tile(i_sequence * tiles + i_tile, length, BT)
            o_row, m_row = rows_of_items(p_rows, o_item, m_item, ROWS)
            # Zeros stand in for rows that aren't edited: a NaN there would reach the sums as 0 * NaN.
            b_h = load_rows(p_h, h_stride, o_row, m_row, i_d, DIM, BD)
            b_g = load_rows(p_g, g_stride, o_row, m_row, i_d, DIM, BD)
            b_factors = load_low(p_factors, o_item, m_item, COUNT, C)
            b_u = narrow(load_low(p_update, o_row, m_row, RANK, R_PAD), b_g.dtype)
            b_projection = add_matmul(b_factors.T, b_h, b_projection, length)
            b_basis = add_matmul(b_u.T, b_g, b_basis, length)

    sets = tl.num_programs(2).to(tl.int64)
    p_matrices += (i_split * (1 + COUNT // RANK) * sets + i_set) * RANK * DIM
    b_source = b_projection
    if COUNT != RANK:
        b_source, b_gate = tl.split(tl.permute(tl.reshape(b_projection, [R_PAD, 2, BD]), 0, 2, 1))
        store_matrix(p_matrices + 2 * sets * RANK * DIM, b_gate, i_d, DIM, RANK)
    # D = A - R: the basis gets what the source gets, with the other sign.
    store_matrix(p_matrices, b_basis - b_source, i_d, DIM, RANK)
    store_matrix(p_matrices + sets * RANK * DIM, b_source, i_d, DIM, RANK)
    if i_d + i_split == 0:
        # Columns 2k are b_k and 2k + 1 are c_k.
        p_bias = p_biases + i_set * RANK + o_c // (COUNT // RANK) + o_c % (COUNT // RANK) * sets * RANK
        tl.store(p_bias, b_bias, mask=o_c < COUNT)


@triton.jit
def store_matrix(p_matrix, b_x, i_d, DIM: tl.constexpr, RANK: tl.constexpr):
    """Columns of a matrix [RANK, DIM] from a block [R_PAD, BD]."""
    o_r = tl.arange(0, b_x.shape[0])
    o_d = i_d + tl.arange(0, b_x.shape[1])
    tl.store(p_matrix + o_r[:, None] * DIM + o_d[None, :], b_x, mask=(o_r < RANK)[:, None] & (o_d < DIM)[None, :])
