"""Bidirectional attention over packed sequences, dropout inside: O = dropout(softmax(QKᵀ/√D)) V.

Vaswani et al. 2017, equation 1, computed tile by tile as in FlashAttention-2 (Dao 2023). Nothing is
added atomically, so both directions are bitwise deterministic. Three backwards, by length:

* "tile", S ≤ 128: a tile holds a whole head. One program does everything and reads no O.
* "head", S ≤ 512: one program walks a head, columns of blocks outside, rows inside. dK and dV stay
  in registers; dQ is summed in an fp32 scratch that no other program touches (128 KB at S = 512,
  so it lives in L2): 5 products a tile where separate kernels for dQ and for dK, dV need 7.
* "split": those separate kernels, for longer sequences, of which there would be too few programs,
  and wherever registers do not suffice for the others (`attention_config`).

Dropout spends one Philox counter for 16 elements, in the thread that holds them (see `philox`).
Its rescaling by 256 / threshold is folded into the outputs' scale. All exponentials are powers of
2: log2(e) is folded into the scale of the scores, and `lse` is a base-2 logarithm.

N sequences packed, T tokens packed, S longest sequence, A heads, D head dimension; a plane is one
head of one sequence; rows are queries, columns are keys.
"""

from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels import attention_flash
from fastbert_kernels.attention_config import (
    HEAD_SIZES,
    TABLES,
    Tiles,
    backward_path,
    choose_backend,
    choose_tiles,
)
from fastbert_kernels.checks import (
    STORAGE_DTYPES,
    kernel_signature,
    require,
    require_launchable,
    require_seed,
    require_tensor,
    triton_name,
)
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.philox import keep_threshold
from fastbert_kernels.philox_triton import dropout_key, philox_words
from fastbert_kernels.reference import sequence_lengths
from fastbert_kernels.triton_import import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
DELTA_ROWS = 64


# Pieces


@triton.jit
def _load_rows(
    base_ptr,  # row 0 of one head of one sequence
    first,  # row to begin with
    length,
    stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(ROWS, D) rows of a head; beyond the sequence zeros, whatever its neighbour holds."""
    # The row to begin with goes into a scalar pointer: what is left differs from thread to thread,
    # but not from block to block, and fits 32 bits.
    row = tl.arange(0, ROWS)
    block_ptr = base_ptr + tl.cast(first, tl.int64) * stride
    offset = row[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(block_ptr + offset, mask=(row < length - first)[:, None], other=0.0)


@triton.jit
def _store_rows(base_ptr, first, length, stride, tile, D: tl.constexpr, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    block_ptr = base_ptr + tl.cast(first, tl.int64) * stride
    offset = row[:, None] * stride + tl.arange(0, D)[None, :]
    tile = tile.to(base_ptr.dtype.element_ty)
    tl.store(block_ptr + offset, tile, mask=(row < length - first)[:, None])


@triton.jit
def _load_statistic(base_ptr, first, length, missing, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    return tl.load(base_ptr + first + row, mask=row < length - first, other=missing)


@triton.jit
def _store_statistic(base_ptr, first, length, values, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    tl.store(base_ptr + first + row, values, mask=row < length - first)


@triton.jit
def _zero_tail(
    base_ptr,  # row 0 of one head of the whole tensor
    first,  # program's first row to clear
    step,  # rows that all programs of a head clear in one go
    T,
    stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Zeros in the rows that belong to no sequence; usually there are none."""
    for start in range(first, T, step):
        _store_rows(base_ptr, start, T, stride, tl.zeros((ROWS, D), tl.float32), D, ROWS)


@triton.jit
def _dropped(word, THRESHOLD: tl.constexpr):
    """Bit 7 of each byte of a uint32 set where byte >= THRESHOLD: four comparisons in three steps.

    The sum cannot carry from byte to byte: its terms are at most 127 and 128.
    """
    low = word & 0x7F7F7F7F
    if THRESHOLD <= 128:
        return (low + (128 - THRESHOLD) * 0x01010101) | word
    return (low + (256 - THRESHOLD) * 0x01010101) & word


@triton.jit
def _keep(
    row,  # (R,)
    first_column,  # a multiple of COLUMNS
    plane,
    site,
    key0,
    key1,
    THRESHOLD: tl.constexpr,
    COLUMNS: tl.constexpr,  # 32, 64 or 128
):
    """(R, COLUMNS) booleans of `philox.keep_mask`, in the accumulator's own layout.

    Choosing a word by the byte's number costs nothing: that number is known of every register when
    the kernel is compiled. (Joining the words instead, as a row-wise layout wants it, made sm_80
    exchange them between threads: 2,901 against 3,162 instructions, 128 x 128, 4 warps.)
    """
    R: tl.constexpr = row.shape[0]
    group = first_column // 128 * 8 + tl.arange(0, 8)
    w0, w1, w2, w3 = philox_words(row[:, None], group[None, :], plane, site, key0, key1)
    part = first_column % 128 // COLUMNS
    byte = tl.arange(0, COLUMNS // 8)[None, :, None]
    if COLUMNS == 128:
        w01 = tl.where(byte < 4, _dropped(w0, THRESHOLD)[:, None], _dropped(w1, THRESHOLD)[:, None])
        w23 = tl.where(
            byte < 12, _dropped(w2, THRESHOLD)[:, None], _dropped(w3, THRESHOLD)[:, None]
        )
        word = tl.where(byte < 8, w01, w23)
    elif COLUMNS == 64:
        low = _dropped(tl.where(part == 0, w0, w2), THRESHOLD)
        high = _dropped(tl.where(part == 0, w1, w3), THRESHOLD)
        word = tl.where(byte < 4, low[:, None], high[:, None])
    else:
        pair = tl.where(part == 0, w0, tl.where(part == 1, w1, tl.where(part == 2, w2, w3)))
        word = tl.broadcast_to(_dropped(pair, THRESHOLD)[:, None], (R, 4, 8))
    bit = (word >> (byte % 4 * 8 + 7).to(tl.uint32)) & 1
    return tl.reshape(bit == 0, (R, COLUMNS))


# Forward


@triton.jit
def _attend(
    q,  # (BLOCK_M, D)
    total,  # (BLOCK_M, D) fp32: sum of p · v so far
    normalizer,  # (BLOCK_M,) sum of p so far
    highest,  # (BLOCK_M,) largest score so far, in powers of 2
    k_ptr,
    v_ptr,
    row,
    first_column,
    length,
    stride,
    plane,
    site,
    key0,
    key1,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTIAL: tl.constexpr,  # the block passes the sequence's end
    ONLY: tl.constexpr,  # there is no other block
):
    """One block of columns: softmax going on from what was seen before."""
    SCALE: tl.constexpr = LOG2E * D**-0.5
    k = _load_rows(k_ptr, first_column, length, stride, D, BLOCK_N)
    v = _load_rows(v_ptr, first_column, length, stride, D, BLOCK_N)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if PARTIAL:
        here = tl.arange(0, BLOCK_N) < length - first_column
        scores = tl.where(here[None, :], scores, float("-inf"))
    block_highest = tl.max(scores, 1) * SCALE
    if not ONLY:
        block_highest = tl.maximum(block_highest, highest)
        shrink = tl.exp2(highest - block_highest)
        normalizer *= shrink
        total *= shrink[:, None]
    p = tl.exp2(scores * SCALE - block_highest[:, None])
    normalizer += tl.sum(p, 1)
    if THRESHOLD < 256:
        keep = _keep(row, first_column, plane, site, key0, key1, THRESHOLD, BLOCK_N)
        p = tl.where(keep, p, 0.0)
    total = tl.dot(p.to(v.dtype), v, total, input_precision=PRECISION)
    return total, normalizer, block_highest


@triton.jit(do_not_specialize=["seed_ptr", "T", "N", "A", "blocks", "stream"])
def attention_forward_kernel(
    qkv_ptr,  # (T, 3, A, D)
    cu_seqlens_ptr,  # (N + 1,) int32
    seed_ptr,  # (3,) int64
    out_ptr,  # (T, A, D)
    lse_ptr,  # (A, T) fp32
    T,
    N,
    A,
    blocks,  # of BLOCK_M rows in the longest sequence
    stream,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,  # 256: no dropout
    PRECISION: tl.constexpr,
    ONE_TILE: tl.constexpr,  # no sequence is longer than BLOCK_M or BLOCK_N
):
    """A program makes BLOCK_M rows of one head's output; (N + 1) A blocks of them."""
    if ONE_TILE:
        blocks = 1  # known to the compiler, it takes two divisions, 4% of the instructions
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    sequence, head = plane // A, plane % A
    start = tl.load(cu_seqlens_ptr + sequence)
    out_stride = A * D
    if sequence == N:
        first = start + block * BLOCK_M
        _zero_tail(out_ptr + head * D, first, blocks * BLOCK_M, T, out_stride, D, BLOCK_M)
        return
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    if block * BLOCK_M >= length:
        return

    stride = 3 * A * D
    q_ptr = qkv_ptr + start.to(tl.int64) * stride + head * D
    k_ptr, v_ptr = q_ptr + A * D, q_ptr + 2 * A * D
    first_row = block * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    key0, key1, site = dropout_key(seed_ptr, stream)
    q = _load_rows(q_ptr, first_row, length, stride, D, BLOCK_M)
    total = tl.zeros((BLOCK_M, D), tl.float32)
    normalizer = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if ONE_TILE:
        total, normalizer, highest = _attend(
            q, total, normalizer, highest, k_ptr, v_ptr, row, 0, length, stride,
            plane, site, key0, key1, D, BLOCK_N, THRESHOLD, PRECISION, True, True,
        )  # fmt: skip
    else:
        whole = length // BLOCK_N * BLOCK_N
        for first_column in range(0, whole, BLOCK_N):
            total, normalizer, highest = _attend(
                q, total, normalizer, highest, k_ptr, v_ptr, row, first_column, length, stride,
                plane, site, key0, key1, D, BLOCK_N, THRESHOLD, PRECISION, False, False,
            )  # fmt: skip
        # At most once. A loop of its own, so that the one above compares no column with the length.
        for first_column in tl.range(whole, length, BLOCK_N, num_stages=1):
            total, normalizer, highest = _attend(
                q, total, normalizer, highest, k_ptr, v_ptr, row, first_column, length, stride,
                plane, site, key0, key1, D, BLOCK_N, THRESHOLD, PRECISION, True, False,
            )  # fmt: skip

    total *= ((256 / THRESHOLD) / normalizer)[:, None]
    out_head_ptr = out_ptr + start.to(tl.int64) * out_stride + head * D
    _store_rows(out_head_ptr, first_row, length, out_stride, total, D, BLOCK_M)
    lse_head_ptr = lse_ptr + head.to(tl.int64) * T + start
    _store_statistic(lse_head_ptr, first_row, length, highest + tl.log2(normalizer), BLOCK_M)


# Backward


@triton.jit
def _delta(
    out_ptr,
    dout_ptr,
    first,
    length,
    stride,
    D: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """(ROWS,) rowsum(dO · O), less dropout's scale, which the gradients get at the end."""
    out = _load_rows(out_ptr, first, length, stride, D, ROWS).to(tl.float32)
    dout = _load_rows(dout_ptr, first, length, stride, D, ROWS).to(tl.float32)
    return tl.sum(out * dout, 1) * (THRESHOLD / 256)


@triton.jit
def _tile_gradients(
    q,  # (BLOCK_M, D)
    k,  # (BLOCK_N, D)
    v,  # (BLOCK_N, D)
    dout,  # (BLOCK_M, D)
    lse,  # (BLOCK_M,) +inf in rows beyond the sequence, which makes their p zero
    delta,  # (BLOCK_M,)
    row,
    first_column,
    plane,
    site,
    key0,
    key1,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_TILE: tl.constexpr,  # whole rows are here: delta is made of p and dp
):
    """(BLOCK_M, BLOCK_N) dropped p and gradient of the scores, less dropout's scale."""
    SCALE: tl.constexpr = LOG2E * D**-0.5
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    # A probability is at most 1. Columns beyond the sequence have score 0 and could pass it, up to
    # infinity; limited, they do no harm: k = v = 0 there, and their dk, dv are not stored.
    p = tl.exp2(tl.minimum(scores * SCALE - lse[:, None], 0.0))
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    kept = p
    if THRESHOLD < 256:
        keep = _keep(row, first_column, plane, site, key0, key1, THRESHOLD, BLOCK_N)
        dp = tl.where(keep, dp, 0.0)
        kept = tl.where(keep, p, 0.0)
    if ONE_TILE:
        delta = tl.sum(p * dp, 1)
    return kept.to(q.dtype), (p * (dp - delta[:, None])).to(q.dtype)


@triton.jit(do_not_specialize=["T", "A"])
def attention_delta_kernel(
    out_ptr,  # (T, A, D)
    dout_ptr,  # (T, A, D)
    delta_ptr,  # (A, T) fp32
    T,
    A,
    D: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A program makes BLOCK_M values of one head; rows of no sequence get some, read by nobody."""
    blocks = tl.cdiv(T, BLOCK_M)
    head = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK_M
    delta = _delta(out_ptr + head * D, dout_ptr + head * D, first, T, A * D, D, THRESHOLD, BLOCK_M)
    _store_statistic(delta_ptr + head.to(tl.int64) * T, first, T, delta, BLOCK_M)


@triton.jit(do_not_specialize=["seed_ptr", "T", "N", "A", "blocks", "stream"])
def attention_backward_kernel(
    qkv_ptr,  # (T, 3, A, D)
    out_ptr,  # (T, A, D)
    dout_ptr,  # (T, A, D)
    lse_ptr,  # (A, T) fp32
    delta_ptr,  # (A, T) fp32, filled here when WHOLE_HEAD
    dq_ptr,  # (A, T, D) fp32 scratch, used when WHOLE_HEAD
    cu_seqlens_ptr,  # (N + 1,) int32
    seed_ptr,  # (3,) int64
    dqkv_ptr,  # (T, 3, A, D)
    T,
    N,
    A,
    blocks,  # programs a head: 1, or blocks of BLOCK_N columns in the longest sequence
    stream,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_TILE: tl.constexpr,  # no sequence is longer than BLOCK_M or BLOCK_N
    WHOLE_HEAD: tl.constexpr,  # a program walks all columns and makes dQ too
):
    """dK and dV of one block of columns, or all of dQ, dK, dV of one head."""
    if ONE_TILE:  # not where WHOLE_HEAD: by the constant, sm_80 spills with D = 32 and Triton 3.6
        blocks = 1
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    sequence, head = plane // A, plane % A
    start = tl.load(cu_seqlens_ptr + sequence)
    stride, out_stride = 3 * A * D, A * D
    if sequence == N:
        for part in tl.static_range(3):
            base_ptr = dqkv_ptr + part * A * D + head * D
            first = start + block * BLOCK_M
            _zero_tail(base_ptr, first, blocks * BLOCK_M, T, stride, D, BLOCK_M)
        return
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    if block * BLOCK_N >= length:
        return

    start = start.to(tl.int64)
    q_ptr = qkv_ptr + start * stride + head * D
    k_ptr, v_ptr = q_ptr + A * D, q_ptr + 2 * A * D
    dq_out_ptr = dqkv_ptr + start * stride + head * D
    dk_ptr, dv_ptr = dq_out_ptr + A * D, dq_out_ptr + 2 * A * D
    out_ptr += start * out_stride + head * D
    dout_ptr += start * out_stride + head * D
    lse_ptr += head.to(tl.int64) * T + start
    delta_ptr += head.to(tl.int64) * T + start
    dq_ptr += (head.to(tl.int64) * T + start) * D
    key0, key1, site = dropout_key(seed_ptr, stream)
    WEIGHT: tl.constexpr = 256 / THRESHOLD
    SCORE_WEIGHT: tl.constexpr = WEIGHT * D**-0.5

    if ONE_TILE:
        row = tl.arange(0, BLOCK_M)
        q = _load_rows(q_ptr, 0, length, stride, D, BLOCK_M)
        k = _load_rows(k_ptr, 0, length, stride, D, BLOCK_N)
        v = _load_rows(v_ptr, 0, length, stride, D, BLOCK_N)
        dout = _load_rows(dout_ptr, 0, length, out_stride, D, BLOCK_M)
        lse = _load_statistic(lse_ptr, 0, length, float("inf"), BLOCK_M)
        kept, ds = _tile_gradients(
            q, k, v, dout, lse, lse, row, 0, plane, site, key0, key1,
            D, BLOCK_N, THRESHOLD, PRECISION, True,
        )  # fmt: skip
        dv = tl.dot(tl.trans(kept), dout, input_precision=PRECISION) * WEIGHT
        _store_rows(dv_ptr, 0, length, stride, dv, D, BLOCK_N)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * SCORE_WEIGHT
        _store_rows(dk_ptr, 0, length, stride, dk, D, BLOCK_N)
        dq = tl.dot(ds, k, input_precision=PRECISION) * SCORE_WEIGHT
        _store_rows(dq_out_ptr, 0, length, stride, dq, D, BLOCK_M)
        return

    end = (block + 1) * BLOCK_N
    if WHOLE_HEAD:
        end = length
        for first_row in range(0, length, BLOCK_M):
            delta = _delta(out_ptr, dout_ptr, first_row, length, out_stride, D, THRESHOLD, BLOCK_M)
            _store_statistic(delta_ptr, first_row, length, delta, BLOCK_M)

    for first_column in tl.range(block * BLOCK_N, end, BLOCK_N, num_stages=1):
        if WHOLE_HEAD:
            # Other threads of this program may read what this one stored: delta and the dQ so far.
            tl.debug_barrier()
        k = _load_rows(k_ptr, first_column, length, stride, D, BLOCK_N)
        v = _load_rows(v_ptr, first_column, length, stride, D, BLOCK_N)
        dk = tl.zeros((BLOCK_N, D), tl.float32)
        dv = tl.zeros((BLOCK_N, D), tl.float32)
        for first_row in range(0, length, BLOCK_M):
            row = first_row + tl.arange(0, BLOCK_M)
            q = _load_rows(q_ptr, first_row, length, stride, D, BLOCK_M)
            dout = _load_rows(dout_ptr, first_row, length, out_stride, D, BLOCK_M)
            lse = _load_statistic(lse_ptr, first_row, length, float("inf"), BLOCK_M)
            delta = _load_statistic(delta_ptr, first_row, length, 0.0, BLOCK_M)
            kept, ds = _tile_gradients(
                q, k, v, dout, lse, delta, row, first_column, plane, site, key0, key1,
                D, BLOCK_N, THRESHOLD, PRECISION, False,
            )  # fmt: skip
            dv = tl.dot(tl.trans(kept), dout, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
            if WHOLE_HEAD:
                # A length of 0 switches the load off: the first blocks find nothing there.
                before = tl.where(first_column == 0, 0, length)
                dq = tl.dot(ds, k, input_precision=PRECISION)
                dq += _load_rows(dq_ptr, first_row, before, D, D, BLOCK_M)
                _store_rows(dq_ptr, first_row, length, D, dq, D, BLOCK_M)
        _store_rows(dk_ptr, first_column, length, stride, dk * SCORE_WEIGHT, D, BLOCK_N)
        _store_rows(dv_ptr, first_column, length, stride, dv * WEIGHT, D, BLOCK_N)

    if WHOLE_HEAD:
        tl.debug_barrier()
        for first_row in range(0, length, BLOCK_M):
            dq = _load_rows(dq_ptr, first_row, length, D, D, BLOCK_M) * SCORE_WEIGHT
            _store_rows(dq_out_ptr, first_row, length, stride, dq, D, BLOCK_M)


@triton.jit(do_not_specialize=["seed_ptr", "T", "A", "blocks", "stream"])
def attention_backward_query_kernel(
    qkv_ptr,  # (T, 3, A, D)
    dout_ptr,  # (T, A, D)
    lse_ptr,  # (A, T) fp32
    delta_ptr,  # (A, T) fp32
    cu_seqlens_ptr,  # (N + 1,) int32
    seed_ptr,  # (3,) int64
    dqkv_ptr,  # (T, 3, A, D)
    T,
    A,
    blocks,  # of BLOCK_M rows in the longest sequence
    stream,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program makes BLOCK_M rows of one head's dQ; N A blocks of them."""
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    sequence, head = plane // A, plane % A
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
    if block * BLOCK_M >= length:
        return

    stride, out_stride = 3 * A * D, A * D
    q_ptr = qkv_ptr + start * stride + head * D
    first_row = block * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    key0, key1, site = dropout_key(seed_ptr, stream)
    q = _load_rows(q_ptr, first_row, length, stride, D, BLOCK_M)
    dout_ptr += start * out_stride + head * D
    dout = _load_rows(dout_ptr, first_row, length, out_stride, D, BLOCK_M)
    statistic = head.to(tl.int64) * T + start
    lse = _load_statistic(lse_ptr + statistic, first_row, length, float("inf"), BLOCK_M)
    delta = _load_statistic(delta_ptr + statistic, first_row, length, 0.0, BLOCK_M)
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for first_column in range(0, length, BLOCK_N):
        k = _load_rows(q_ptr + A * D, first_column, length, stride, D, BLOCK_N)
        v = _load_rows(q_ptr + 2 * A * D, first_column, length, stride, D, BLOCK_N)
        _, ds = _tile_gradients(
            q, k, v, dout, lse, delta, row, first_column, plane, site, key0, key1,
            D, BLOCK_N, THRESHOLD, PRECISION, False,
        )  # fmt: skip
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    dq *= (256 / THRESHOLD) * D**-0.5
    dq_out_ptr = dqkv_ptr + start * stride + head * D
    _store_rows(dq_out_ptr, first_row, length, stride, dq, D, BLOCK_M)


# Launches


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90  # the interpreter
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@torch.library.custom_op("fastbert::attention", mutates_args=())
def _attention(
    qkv: Tensor,  # (T, 3, A, D)
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    threshold: int,
    seed: Tensor,  # (3,) int64
    stream: int,
    precision: str,
) -> tuple[Tensor, Tensor]:  # (T, A, D), (A, T) fp32 base-2 log-sum-exp of the scores
    T, _, A, D = qkv.shape
    N = cu_seqlens.numel() - 1
    if qkv.device.type == "cpu":
        sequence_lengths(cu_seqlens, max_seqlen, T)  # here, where no tracing meets it
    out = torch.empty((T, A, D), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((A, T), dtype=torch.float32, device=qkv.device)
    tiles = choose_tiles("forward", D, qkv.dtype, _capability(qkv.device))
    blocks = triton.cdiv(max_seqlen, tiles.block_m)
    attention_forward_kernel[((N + 1) * A * blocks,)](
        qkv, cu_seqlens, seed, out, lse, T, N, A, blocks, stream,
        D, tiles.block_m, tiles.block_n, threshold, precision,
        max_seqlen <= min(tiles.block_m, tiles.block_n),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse


@_attention.register_fake
def _(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    threshold: int,
    seed: Tensor,
    stream: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    T, _, A, D = qkv.shape
    return qkv.new_empty(T, A, D), qkv.new_empty(A, T, dtype=torch.float32)


@torch.library.custom_op("fastbert::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,  # (T, A, D)
    qkv: Tensor,  # (T, 3, A, D)
    out: Tensor,  # (T, A, D)
    lse: Tensor,  # (A, T) fp32
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    threshold: int,
    seed: Tensor,  # (3,) int64
    stream: int,
    precision: str,
) -> Tensor:  # (T, 3, A, D)
    T, _, A, D = qkv.shape
    N = cu_seqlens.numel() - 1
    capability = _capability(qkv.device)
    path = backward_path(max_seqlen, D, qkv.dtype, capability)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    # What a path does not use stands in for itself as some tensor of the right type.
    delta = lse if path == "tile" else torch.empty_like(lse)
    dq = lse
    if path == "head":
        dq = torch.empty((A, T, D), dtype=torch.float32, device=qkv.device)
    if path == "split":
        attention_delta_kernel[(A * triton.cdiv(T, DELTA_ROWS),)](
            out, dout, delta, T, A, D, threshold, DELTA_ROWS, num_warps=4
        )
    tiles = choose_tiles("columns" if path == "split" else path, D, qkv.dtype, capability)
    blocks = triton.cdiv(max_seqlen, tiles.block_n) if path == "split" else 1
    attention_backward_kernel[((N + 1) * A * blocks,)](
        qkv, out, dout, lse, delta, dq, cu_seqlens, seed, dqkv, T, N, A, blocks, stream,
        D, tiles.block_m, tiles.block_n, threshold, precision, path == "tile", path == "head",
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if path == "split":
        tiles = choose_tiles("query", D, qkv.dtype, capability)
        blocks = triton.cdiv(max_seqlen, tiles.block_m)
        attention_backward_query_kernel[(N * A * blocks,)](
            qkv, dout, lse, delta, cu_seqlens, seed, dqkv, T, A, blocks, stream,
            D, tiles.block_m, tiles.block_n, threshold, precision,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return dqkv


@_attention_backward.register_fake
def _(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    threshold: int,
    seed: Tensor,
    stream: int,
    precision: str,
) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen, ctx.threshold, seed, ctx.stream, ctx.precision = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens, seed)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout, dlse):
    nothing = (None,) * 6
    if dout is None:
        return None, *nothing
    qkv, out, lse, cu_seqlens, seed = ctx.saved_tensors
    dqkv = _attention_backward(
        dout.contiguous(), qkv, out, lse, cu_seqlens,
        ctx.max_seqlen, ctx.threshold, seed, ctx.stream, ctx.precision,
    )  # fmt: skip
    return dqkv, *nothing


_attention.register_autograd(_gradient, setup_context=_save)


def _case(
    fn: Any,
    label: str,
    dtype: torch.dtype,
    capability: int,
    tiles: Tiles,
    constexprs: dict[str, Any],
) -> CompileCase:
    fp32 = dict.fromkeys(("lse_ptr", "delta_ptr", "dq_ptr"), "*fp32")
    return CompileCase(
        name=fn.__name__,
        configuration=label,
        fn=fn,
        signature=kernel_signature(fn, constexprs, dtype, cu_seqlens_ptr="*i32", **fp32),
        constexprs=constexprs,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        needs_wgmma=dtype != torch.float32 and fn is not attention_delta_kernel,
        archs=(capability,),
    )


def compile_cases() -> list[CompileCase]:
    """Every kernel in every configuration of the tables, with and without dropout."""
    kernels = {
        "forward": attention_forward_kernel,
        "tile": attention_backward_kernel,
        "head": attention_backward_kernel,
        "columns": attention_backward_kernel,
        "query": attention_backward_query_kernel,
    }
    cases = []
    for capability, table in TABLES.items():
        for kernel, configurations in table.items():
            for ((D, half), tiles), threshold in product(configurations.items(), (230, 256)):
                dtype = torch.bfloat16 if half else torch.float32
                constexprs: dict[str, Any] = {
                    "D": D,
                    "BLOCK_M": tiles.block_m,
                    "BLOCK_N": tiles.block_n,
                    "THRESHOLD": threshold,
                    "PRECISION": "ieee",
                }
                one_tile = {"forward": (False, True), "query": ()}.get(kernel, (kernel == "tile",))
                if kernel not in ("forward", "query"):
                    constexprs["WHOLE_HEAD"] = kernel == "head"
                label = f"{kernel} {triton_name(dtype)} D={D} p={1 - threshold / 256:.1f}"
                for one in one_tile or (None,):
                    extra = {} if one is None else {"ONE_TILE": one}
                    suffix = " one tile" if one and kernel == "forward" else ""
                    cases.append(
                        _case(kernels[kernel], label + suffix, dtype, capability, tiles,
                              constexprs | extra)
                    )  # fmt: skip
        tiles = Tiles(DELTA_ROWS, 0, 4, 1)
        for D in HEAD_SIZES:
            constexprs = {"D": D, "THRESHOLD": 230, "BLOCK_M": DELTA_ROWS}
            label = f"bf16 D={D}"
            cases.append(
                _case(attention_delta_kernel, label, torch.bfloat16, capability, tiles, constexprs)
            )
    return cases


def attention(
    qkv: Tensor,  # (T, 3, A, D)
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor,  # (3,) int64
    stream: int,
    *,
    backend: str = "auto",
    precision: str = "ieee",
    check: bool = False,
) -> Tensor:  # (T, A, D)
    """softmax(Q Kᵀ / √D) V within each sequence, dropout on the probabilities.

    Meaning of `reference.attention`, dropout bits included. On a GPU, `cu_seqlens` is taken as it
    is, and a sequence longer than `max_seqlen` would be cut short silently: `check` finds out.

    Args:
        qkv: fp32, fp16 or bf16, D one of 32, 64, 128.
        cu_seqlens: where each sequence starts, and the end; unused tail entries repeat the end.
        max_seqlen: a bound of the lengths; it fixes the grid.
        dropout_p: in [0, 1), taken to the next multiple of 1/256.
        seed: the run's seed, the step, the layer, on the device.
        stream: which dropout of the layer.
        backend: see `choose_backend`. All but "triton" draw dropout bits of their own.
        precision: of fp32 products: "ieee", or "tf32" (faster, 10 bits of mantissa).
        check: read `cu_seqlens` and verify it, which waits for a GPU; on a CPU always done.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, or not contiguous; a backend that
            cannot serve this call; where checked, sequences that do not fit.
    """
    device = qkv.device
    chosen = choose_backend(
        backend, qkv.dtype, device.type, dropout_p, _capability(device), qkv.shape[-1], max_seqlen
    )
    if chosen == "triton":
        require_launchable("attention", attention_forward_kernel, device)
    require_tensor("attention", "qkv", qkv, (None, 3, None, None), STORAGE_DTYPES, device)
    require_tensor("attention", "cu_seqlens", cu_seqlens, (None,), torch.int32, device)
    require_seed("attention", seed, device, stream)
    T, _, A, D = qkv.shape
    require(D in HEAD_SIZES, f"attention: qkv has head size {D}, expected one of {HEAD_SIZES}")
    require(T > 0 and A > 0, f"attention: qkv is empty: shape {tuple(qkv.shape)}")
    require(cu_seqlens.numel() > 1, "attention: cu_seqlens holds no sequence")
    require(max_seqlen > 0, f"attention: max_seqlen = {max_seqlen}, expected at least 1")
    require(
        precision in ("ieee", "tf32"),
        f"attention: precision = {precision!r}, expected 'ieee' or 'tf32'",
    )
    threshold = keep_threshold(dropout_p)
    if check:
        sequence_lengths(cu_seqlens, max_seqlen, T)
    if chosen != "triton":
        return attention_flash.attention(qkv, cu_seqlens, max_seqlen, dropout_p, chosen)
    out, _ = _attention(qkv, cu_seqlens, max_seqlen, threshold, seed, stream, precision)
    return out
