"""The Triton kernels of `attention`: what one program computes, and nothing of who launches it.

Pieces that load and store rows of a head, the forward, and the backward's three kernels; the file
`attention.py` says how they go together. N sequences packed, T tokens packed, R queries, A heads,
D head dimension; a plane is one head of one sequence; rows are queries, columns are keys.
"""

from fastbert_kernels.philox_triton import drop_scores, dropout_key, dropped_scores
from fastbert_kernels.triton_import import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
# Columns of a sequence's last blocks where nothing is kept by columns: at mean length 278, 64 rows
# at a time compute 1.19 times the scores that exist, and 1.29 times with 128.
TAIL = tl.constexpr(64)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_NOT_SPECIALIZED = ["seed_ptr", "T", "R", "N", "blocks", "stream"]


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
def _load_block(
    base_ptr,
    first,
    length,
    stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """`_load_rows`, without a comparison where not PARTIAL: all rows are the sequence's."""
    if PARTIAL:
        return _load_rows(base_ptr, first, length, stride, D, ROWS)
    offset = tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(base_ptr + tl.cast(first, tl.int64) * stride + offset)


@triton.jit
def _load_repeated(base_ptr, first, length, stride, D: tl.constexpr, ROWS: tl.constexpr):
    """(ROWS, D) rows of a head; beyond the sequence its last row."""
    row = tl.minimum(tl.arange(0, ROWS), length - first - 1)
    block_ptr = base_ptr + tl.cast(first, tl.int64) * stride
    return tl.load(block_ptr + row[:, None] * stride + tl.arange(0, D)[None, :])


@triton.jit
def _store_rows(base_ptr, first, length, stride, tile, D: tl.constexpr, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    block_ptr = base_ptr + tl.cast(first, tl.int64) * stride
    offset = row[:, None] * stride + tl.arange(0, D)[None, :]
    tile = tile.to(base_ptr.dtype.element_ty)
    tl.store(block_ptr + offset, tile, mask=(row < length - first)[:, None])


@triton.jit
def _scratch(base_ptr, first, D: tl.constexpr, ROWS: tl.constexpr):
    """Pointers to (ROWS, D) rows that lie behind each other."""
    return base_ptr + first * D + tl.arange(0, ROWS)[:, None] * D + tl.arange(0, D)[None, :]


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
def _bounds(cu_seqlens_ptr, cu_queries_ptr, sequence, AT: tl.constexpr):
    """(first token, tokens, first query, queries) of a sequence."""
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    first_query, rows = start, length
    if AT:
        first_query = tl.load(cu_queries_ptr + sequence)
        rows = tl.load(cu_queries_ptr + sequence + 1) - first_query
    return start.to(tl.int64), length, first_query.to(tl.int64), rows


@triton.jit
def _row_numbers(
    positions_ptr,  # of the sequence's first query
    start,  # the sequence's first token
    first,
    rows,
    BLOCK_M: tl.constexpr,
    AT: tl.constexpr,
):
    """(BLOCK_M,) rows of the scores' matrix that queries `first` and following stand for."""
    if AT:
        return (_load_statistic(positions_ptr, first, rows, start, BLOCK_M) - start).to(tl.int32)
    return first + tl.arange(0, BLOCK_M)


# Forward


@triton.jit
def _attend(
    q,  # (BLOCK_M, D)
    total,  # (BLOCK_M, D) fp32: sum of p · v so far
    normalizer,  # (BLOCK_M,) sum of p so far
    highest,  # (BLOCK_M,) largest score so far, in powers of 2
    k_ptr,
    v_ptr,
    first_row,
    row,
    first_column,
    length,
    plane,
    site,
    key0,
    key1,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    AT: tl.constexpr,
    PARTIAL: tl.constexpr,  # the block passes the sequence's end
    ONLY: tl.constexpr,  # there is no other block
):
    """One block of columns: softmax going on from what was seen before."""
    SCALE: tl.constexpr = LOG2E * D**-0.5
    k = _load_block(k_ptr, first_column, length, STRIDE, D, BLOCK_N, PARTIAL)
    v = _load_block(v_ptr, first_column, length, STRIDE, D, BLOCK_N, PARTIAL)
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
    p = p.to(v.dtype)
    if THRESHOLD < 256:
        dropped = dropped_scores(
            first_row, row, first_column, plane, site, key0, key1, THRESHOLD, BLOCK_N, AT
        )
        p = drop_scores(p, dropped, p.dtype.primitive_bitwidth == 16 and not INTERPRETED)
    total = tl.dot(p, v, total, input_precision=PRECISION)
    return total, normalizer, block_highest


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_forward_kernel(
    q_ptr,  # (T, 3, A, D), queries first; AT: (R, A, D)
    kv_ptr,  # the same; AT: (T, 2, A, D)
    cu_seqlens_ptr,  # (N + 1,) int32
    cu_queries_ptr,  # (N + 1,) int32, of queries; only AT, like the next
    positions_ptr,  # (R,) int64: the tokens that ask
    seed_ptr,  # (3,) int64
    out_ptr,  # (R, A, D)
    lse_ptr,  # (A, R) fp32
    R,  # T where not AT
    N,
    blocks,  # of BLOCK_M rows in the longest sequence
    stream,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,  # 256: no dropout
    PRECISION: tl.constexpr,
    AT: tl.constexpr,  # queries have a tensor of their own
    ONE_TILE: tl.constexpr,  # no sequence is longer than BLOCK_M or BLOCK_N
):
    """A program makes BLOCK_M rows of one head's output; (N + 1) A blocks of them."""
    Q_STRIDE: tl.constexpr = (1 if AT else 3) * A * D
    KV_STRIDE: tl.constexpr = (2 if AT else 3) * A * D
    OUT_STRIDE: tl.constexpr = A * D
    if ONE_TILE:
        blocks = 1  # known to the compiler, it takes two divisions, 4% of the instructions
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    sequence, head = plane // A, plane % A
    if sequence == N:
        end = tl.load((cu_queries_ptr if AT else cu_seqlens_ptr) + N)
        first = end + block * BLOCK_M
        _zero_tail(out_ptr + head * D, first, blocks * BLOCK_M, R, OUT_STRIDE, D, BLOCK_M)
        return
    start, length, first_query, rows = _bounds(cu_seqlens_ptr, cu_queries_ptr, sequence, AT)
    if block * BLOCK_M >= rows:
        return

    q_ptr += first_query * Q_STRIDE + head * D
    v_ptr = kv_ptr + start * KV_STRIDE + KV_STRIDE - (A - head) * D  # values come last
    k_ptr = v_ptr - A * D
    first_row = block * BLOCK_M
    row = _row_numbers(positions_ptr + first_query, start, first_row, rows, BLOCK_M, AT)
    key0, key1, site = dropout_key(seed_ptr, stream)
    q = _load_rows(q_ptr, first_row, rows, Q_STRIDE, D, BLOCK_M)
    total = tl.zeros((BLOCK_M, D), tl.float32)
    normalizer = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if ONE_TILE:
        total, normalizer, highest = _attend(
            q, total, normalizer, highest, k_ptr, v_ptr, first_row, row, 0, length,
            plane, site, key0, key1, KV_STRIDE, D, BLOCK_N, THRESHOLD, PRECISION, AT, True, True,
        )  # fmt: skip
    else:
        LAST: tl.constexpr = BLOCK_N if BLOCK_N < TAIL else TAIL
        whole = length // BLOCK_N * BLOCK_N
        for first_column in range(0, whole, BLOCK_N):
            total, normalizer, highest = _attend(
                q, total, normalizer, highest, k_ptr, v_ptr, first_row, row, first_column, length,
                plane, site, key0, key1, KV_STRIDE, D, BLOCK_N, THRESHOLD, PRECISION, AT, False,
                False,
            )  # fmt: skip
        # A loop of its own, so that the one above compares no column with the length.
        for first_column in tl.range(whole, length, LAST, num_stages=1):
            total, normalizer, highest = _attend(
                q, total, normalizer, highest, k_ptr, v_ptr, first_row, row, first_column, length,
                plane, site, key0, key1, KV_STRIDE, D, LAST, THRESHOLD, PRECISION, AT, True, False,
            )  # fmt: skip

    total *= ((256 / THRESHOLD) / normalizer)[:, None]
    out_ptr += first_query * OUT_STRIDE + head * D
    _store_rows(out_ptr, first_row, rows, OUT_STRIDE, total, D, BLOCK_M)
    lse_ptr += head.to(tl.int64) * R + first_query
    _store_statistic(lse_ptr, first_row, rows, highest + tl.log2(normalizer), BLOCK_M)


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
    first_row,
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
    AT: tl.constexpr,
    ONE_TILE: tl.constexpr,  # whole rows are here: delta is made of p and dp
    PARTIAL: tl.constexpr,  # k is zero beyond the sequence
):
    """(BLOCK_M, BLOCK_N) dropped p and gradient of the scores, less dropout's scale.

    Columns beyond the sequence get finite ones, which do no harm: v = 0 there, k = 0 where dQ is
    made, and their dk, dv are not stored. To be finite takes a score of a real column, so k repeats
    the last one; or, where zeros score 0 and p could be infinite, a minimum for each element (128
    instructions a tile of 128 x 128).
    """
    SCALE: tl.constexpr = LOG2E * D**-0.5
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    exponent = scores * SCALE - lse[:, None]
    if PARTIAL:
        exponent = tl.minimum(exponent, 0.0)
    p = tl.exp2(exponent)
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    kept = p.to(q.dtype)
    if THRESHOLD < 256:
        dropped = dropped_scores(
            first_row, row, first_column, plane, site, key0, key1, THRESHOLD, BLOCK_N, AT
        )
        kept = drop_scores(kept, dropped, kept.dtype.primitive_bitwidth == 16 and not INTERPRETED)
        dp = drop_scores(dp, dropped, False)
    if ONE_TILE:
        delta = tl.sum(p * dp, 1)
    return kept, (p * (dp - delta[:, None])).to(q.dtype)


@triton.jit
def _store_sum(
    partials_ptr,  # (N blocks, 3, A, D) fp32
    index,  # of this program's sequence and block
    head,
    part: tl.constexpr,  # of q, k, v
    total,  # (D,)
    A: tl.constexpr,
    D: tl.constexpr,
):
    row = (index.to(tl.int64) * 3 + part) * A + head
    tl.store(partials_ptr + row * D + tl.arange(0, D), total)


@triton.jit
def _store_sums(
    partials_ptr,
    index,
    head,
    part: tl.constexpr,
    base_ptr,  # a head of a sequence in a gradient that this program has stored
    first,
    end,  # the rows to sum are first, ..., end - 1
    stride,
    A: tl.constexpr,
    D: tl.constexpr,
):
    """Column sums of rows read back from L2: those of an accumulator took 6 times the code."""
    ROWS: tl.constexpr = 64
    total = tl.zeros((ROWS, D), tl.float32)
    for row in range(first, end, ROWS):
        total += _load_rows(base_ptr, row, end, stride, D, ROWS).to(tl.float32)
    _store_sum(partials_ptr, index, head, part, tl.sum(total, 0), A, D)


@triton.jit(do_not_specialize=["T"])
def attention_delta_kernel(
    out_ptr,  # (T, A, D)
    dout_ptr,  # (T, A, D)
    delta_ptr,  # (A, T) fp32
    T,
    A: tl.constexpr,
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


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_backward_kernel(
    q_ptr,  # as in the forward
    kv_ptr,
    out_ptr,  # (R, A, D)
    dout_ptr,  # (R, A, D)
    lse_ptr,  # (A, R) fp32
    delta_ptr,  # (A, R) fp32, filled here when WHOLE_HEAD
    scratch_ptr,  # (A, R + N BLOCK_M, D) fp32, dQ in whole blocks, used when WHOLE_HEAD
    cu_seqlens_ptr,  # (N + 1,) int32
    cu_queries_ptr,
    positions_ptr,
    seed_ptr,  # (3,) int64
    dq_ptr,  # as q; not written by blocks of a head
    dkv_ptr,  # as kv
    partials_ptr,  # (N blocks, 3, A, D) fp32: column sums, those of dK left 0
    T,
    R,
    N,
    blocks,  # programs a head: 1, or blocks of BLOCK_N columns in the longest sequence
    stream,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    AT: tl.constexpr,
    ONE_TILE: tl.constexpr,  # no sequence is longer than BLOCK_M or BLOCK_N
    WHOLE_HEAD: tl.constexpr,  # a program walks all columns and makes dQ too
):
    """dK and dV of one block of columns, or all of dQ, dK, dV of one head."""
    Q_STRIDE: tl.constexpr = (1 if AT else 3) * A * D
    KV_STRIDE: tl.constexpr = (2 if AT else 3) * A * D
    OUT_STRIDE: tl.constexpr = A * D
    WEIGHT: tl.constexpr = 256 / THRESHOLD
    SCORE_WEIGHT: tl.constexpr = WEIGHT * D**-0.5
    if ONE_TILE:  # not where WHOLE_HEAD: by the constant, sm_80 spills with D = 32 and Triton 3.6
        blocks = 1
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    sequence, head = plane // A, plane % A
    LAST_V: tl.constexpr = KV_STRIDE - A * D
    if sequence == N:
        first = tl.load(cu_seqlens_ptr + N) + block * BLOCK_M
        step = blocks * BLOCK_M
        base_ptr = dkv_ptr + LAST_V + head * D
        _zero_tail(base_ptr, first, step, T, KV_STRIDE, D, BLOCK_M)
        _zero_tail(base_ptr - A * D, first, step, T, KV_STRIDE, D, BLOCK_M)
        if AT:
            first = tl.load(cu_queries_ptr + N) + block * BLOCK_M
        _zero_tail(dq_ptr + head * D, first, step, R, Q_STRIDE, D, BLOCK_M)
        return
    start, length, first_query, rows = _bounds(cu_seqlens_ptr, cu_queries_ptr, sequence, AT)
    index = sequence * blocks + block
    for part in tl.static_range(3):
        _store_sum(partials_ptr, index, head, part, tl.zeros((D,), tl.float32), A, D)
    if block * BLOCK_N >= length:
        return

    q_ptr += first_query * Q_STRIDE + head * D
    v_ptr = kv_ptr + start * KV_STRIDE + LAST_V + head * D
    k_ptr = v_ptr - A * D
    dq_ptr += first_query * Q_STRIDE + head * D
    dv_ptr = dkv_ptr + start * KV_STRIDE + LAST_V + head * D
    dk_ptr = dv_ptr - A * D
    out_ptr += first_query * OUT_STRIDE + head * D
    dout_ptr += first_query * OUT_STRIDE + head * D
    lse_ptr += head.to(tl.int64) * R + first_query
    delta_ptr += head.to(tl.int64) * R + first_query
    scratch_ptr += (head.to(tl.int64) * (R + N * BLOCK_M) + first_query + sequence * BLOCK_M) * D
    positions_ptr += first_query
    key0, key1, site = dropout_key(seed_ptr, stream)

    if ONE_TILE:
        row = _row_numbers(positions_ptr, start, 0, rows, BLOCK_M, AT)
        q = _load_rows(q_ptr, 0, rows, Q_STRIDE, D, BLOCK_M)
        k = _load_rows(k_ptr, 0, length, KV_STRIDE, D, BLOCK_N)
        k_scores = _load_repeated(k_ptr, 0, length, KV_STRIDE, D, BLOCK_N)
        v = _load_rows(v_ptr, 0, length, KV_STRIDE, D, BLOCK_N)
        dout = _load_rows(dout_ptr, 0, rows, OUT_STRIDE, D, BLOCK_M)
        lse = _load_statistic(lse_ptr, 0, rows, float("inf"), BLOCK_M)
        kept, ds = _tile_gradients(
            q, k_scores, v, dout, lse, lse, 0, row, 0, plane, site, key0, key1,
            D, BLOCK_N, THRESHOLD, PRECISION, AT, True, False,
        )  # fmt: skip
        dv = tl.dot(tl.trans(kept), dout, input_precision=PRECISION) * WEIGHT
        _store_rows(dv_ptr, 0, length, KV_STRIDE, dv, D, BLOCK_N)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * SCORE_WEIGHT
        _store_rows(dk_ptr, 0, length, KV_STRIDE, dk, D, BLOCK_N)
        dq = tl.dot(ds, k, input_precision=PRECISION) * SCORE_WEIGHT
        _store_rows(dq_ptr, 0, rows, Q_STRIDE, dq, D, BLOCK_M)
        tl.debug_barrier()
        _store_sums(partials_ptr, index, head, 0, dq_ptr, 0, rows, Q_STRIDE, A, D)
        _store_sums(partials_ptr, index, head, 2, dv_ptr, 0, length, KV_STRIDE, A, D)
        return

    end = (block + 1) * BLOCK_N
    if WHOLE_HEAD:
        end = length
        for first_row in range(0, rows, BLOCK_M):
            delta = _delta(out_ptr, dout_ptr, first_row, rows, OUT_STRIDE, D, THRESHOLD, BLOCK_M)
            _store_statistic(delta_ptr, first_row, rows, delta, BLOCK_M)
        zeros = tl.zeros((BLOCK_M, D), tl.float32)
        for first_row in range(0, rows, BLOCK_M):  # in the loop above, it made the one below spill
            tl.store(_scratch(scratch_ptr, first_row, D, BLOCK_M), zeros)
        tl.debug_barrier()  # other threads of this program read what this one stored

    for first_column in tl.range(block * BLOCK_N, end, BLOCK_N, num_stages=1):
        k = _load_rows(k_ptr, first_column, length, KV_STRIDE, D, BLOCK_N)
        k_scores = _load_repeated(k_ptr, first_column, length, KV_STRIDE, D, BLOCK_N)
        v = _load_rows(v_ptr, first_column, length, KV_STRIDE, D, BLOCK_N)
        dk = tl.zeros((BLOCK_N, D), tl.float32)
        dv = tl.zeros((BLOCK_N, D), tl.float32)
        for first_row in range(0, rows, BLOCK_M):
            row = _row_numbers(positions_ptr, start, first_row, rows, BLOCK_M, AT)
            q = _load_rows(q_ptr, first_row, rows, Q_STRIDE, D, BLOCK_M)
            dout = _load_rows(dout_ptr, first_row, rows, OUT_STRIDE, D, BLOCK_M)
            lse = _load_statistic(lse_ptr, first_row, rows, float("inf"), BLOCK_M)
            delta = _load_statistic(delta_ptr, first_row, rows, 0.0, BLOCK_M)
            kept, ds = _tile_gradients(
                q, k_scores, v, dout, lse, delta, first_row, row, first_column,
                plane, site, key0, key1, D, BLOCK_N, THRESHOLD, PRECISION, AT, False, False,
            )  # fmt: skip
            dv = tl.dot(tl.trans(kept), dout, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
            if WHOLE_HEAD:
                # The same thread at the same address, block after block: one order of adding.
                dq = tl.dot(ds, k, input_precision=PRECISION)
                tl.atomic_add(_scratch(scratch_ptr, first_row, D, BLOCK_M), dq, sem="relaxed")
        _store_rows(dk_ptr, first_column, length, KV_STRIDE, dk * SCORE_WEIGHT, D, BLOCK_N)
        _store_rows(dv_ptr, first_column, length, KV_STRIDE, dv * WEIGHT, D, BLOCK_N)

    tl.debug_barrier()
    if WHOLE_HEAD:
        for first_row in range(0, rows, BLOCK_M):
            # Past L1, which knows nothing of what was added in L2.
            dq = tl.load(_scratch(scratch_ptr, first_row, D, BLOCK_M), cache_modifier=".cg")
            _store_rows(dq_ptr, first_row, rows, Q_STRIDE, dq * SCORE_WEIGHT, D, BLOCK_M)
        tl.debug_barrier()
        _store_sums(partials_ptr, index, head, 0, dq_ptr, 0, rows, Q_STRIDE, A, D)
    end = tl.minimum(end, length)
    _store_sums(partials_ptr, index, head, 2, dv_ptr, block * BLOCK_N, end, KV_STRIDE, A, D)


@triton.jit
def _add_query_gradient(
    dq,  # (BLOCK_M, D) fp32
    q,
    k_ptr,
    v_ptr,
    dout,
    lse,
    delta,
    first_row,
    row,
    first_column,
    length,
    plane,
    site,
    key0,
    key1,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    AT: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """dQ with one more block of columns."""
    k = _load_block(k_ptr, first_column, length, STRIDE, D, BLOCK_N, PARTIAL)
    v = _load_block(v_ptr, first_column, length, STRIDE, D, BLOCK_N, PARTIAL)
    _, ds = _tile_gradients(
        q, k, v, dout, lse, delta, first_row, row, first_column,
        plane, site, key0, key1, D, BLOCK_N, THRESHOLD, PRECISION, AT, False, PARTIAL,
    )  # fmt: skip
    return tl.dot(ds, k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def attention_backward_query_kernel(
    q_ptr,  # as in the forward
    kv_ptr,
    dout_ptr,  # (R, A, D)
    lse_ptr,  # (A, R) fp32
    delta_ptr,  # (A, R) fp32
    cu_seqlens_ptr,  # (N + 1,) int32
    cu_queries_ptr,
    positions_ptr,
    seed_ptr,  # (3,) int64
    dq_ptr,  # as q
    partials_ptr,  # (N blocks, 3, A, D) fp32
    R,
    blocks,  # at least those of BLOCK_M rows in the longest sequence
    stream,
    A: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    AT: tl.constexpr,
):
    """A program makes BLOCK_M rows of one head's dQ; N A blocks of them."""
    Q_STRIDE: tl.constexpr = (1 if AT else 3) * A * D
    KV_STRIDE: tl.constexpr = (2 if AT else 3) * A * D
    OUT_STRIDE: tl.constexpr = A * D
    LAST: tl.constexpr = BLOCK_N if BLOCK_N < TAIL else TAIL
    block = tl.program_id(0) % blocks
    plane = tl.program_id(0) // blocks
    sequence, head = plane // A, plane % A
    start, length, first_query, rows = _bounds(cu_seqlens_ptr, cu_queries_ptr, sequence, AT)
    first_row = block * BLOCK_M
    index = sequence * blocks + block
    if first_row >= rows:
        return

    v_ptr = kv_ptr + start * KV_STRIDE + KV_STRIDE - (A - head) * D
    k_ptr = v_ptr - A * D
    row = _row_numbers(positions_ptr + first_query, start, first_row, rows, BLOCK_M, AT)
    key0, key1, site = dropout_key(seed_ptr, stream)
    q_ptr += first_query * Q_STRIDE + head * D
    q = _load_rows(q_ptr, first_row, rows, Q_STRIDE, D, BLOCK_M)
    dout_ptr += first_query * OUT_STRIDE + head * D
    dout = _load_rows(dout_ptr, first_row, rows, OUT_STRIDE, D, BLOCK_M)
    statistic = head.to(tl.int64) * R + first_query
    lse = _load_statistic(lse_ptr + statistic, first_row, rows, float("inf"), BLOCK_M)
    delta = _load_statistic(delta_ptr + statistic, first_row, rows, 0.0, BLOCK_M)
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    whole = length // BLOCK_N * BLOCK_N
    for first_column in range(0, whole, BLOCK_N):
        dq = _add_query_gradient(
            dq, q, k_ptr, v_ptr, dout, lse, delta, first_row, row, first_column, length,
            plane, site, key0, key1, KV_STRIDE, D, BLOCK_N, THRESHOLD, PRECISION, AT, False,
        )  # fmt: skip
    for first_column in tl.range(whole, length, LAST, num_stages=1):
        dq = _add_query_gradient(
            dq, q, k_ptr, v_ptr, dout, lse, delta, first_row, row, first_column, length,
            plane, site, key0, key1, KV_STRIDE, D, LAST, THRESHOLD, PRECISION, AT, True,
        )  # fmt: skip
    dq *= (256 / THRESHOLD) * D**-0.5
    dq_ptr += first_query * Q_STRIDE + head * D
    _store_rows(dq_ptr, first_row, rows, Q_STRIDE, dq, D, BLOCK_M)
    tl.debug_barrier()
    end = tl.minimum(first_row + BLOCK_M, rows)
    _store_sums(partials_ptr, index, head, 0, dq_ptr, first_row, end, Q_STRIDE, A, D)
