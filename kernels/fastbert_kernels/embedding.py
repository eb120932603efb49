"""Embeddings of BERT: three gathers, LayerNorm and dropout in one pass, and the way back.

T tokens packed, H hidden size, V vocabulary, P positions. Bound by memory. Forward: reads a row of
`word` for each token and writes one, 4 bytes an element in bf16 (the position and type rows come
from L2). Backward: a pass over rows reads dy and gathers again (cheaper than storing the sum),
writes its gradient dz, and keeps dweight, dbeta and the two type rows in fp32 registers: 6 bytes.
Then ids and positions, laid behind each other as the rows of one table of V + P, are sorted
(stable), and equal keys are summed in fp32 in the order of the tokens: 4 bytes, and the dense table
once. At 65,536 x 768 and 3.0 TB/s: 0.067 ms forward, 0.17 + 0.03 ms back, without the sort.

A key of thousands of tokens ([MASK], [SEP]) would keep one program busy for a millisecond. So the
sorted keys are cut into chunks, and the sums of a key's pieces are added by a second kernel. No
atomics: the same bits every run.
"""

import torch
from torch import Tensor

from fastbert_kernels import checks, rowwise
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.philox import keep_threshold
from fastbert_kernels.philox_triton import dropout_key, keep_columns
from fastbert_kernels.triton_import import tl, triton

_CHUNK = 64  # sorted keys that one program sums at most: 100 KB of rows at H = 768 in bf16
_PIECES = 16  # partial sums of a key that are loaded at a time
_PIECE_WIDTH = 128  # columns of a program that adds partial sums


@triton.jit
def _gather(
    table_ptr,  # (ROWS, H)
    ids,  # (BLOCK_R,) int64
    ROWS,
    mask,
    column,
    H: tl.constexpr,
):
    # An id outside the table reads nothing and gives NaN: neither a fault nor a silent zero.
    known = (ids >= 0) & (ids < ROWS)
    rows = tl.load(table_ptr + ids[:, None] * H + column[None, :], mask & known[:, None], other=0.0)
    return tl.where(known[:, None], rows.to(tl.float32), float("nan"))


@triton.jit
def _embed(
    input_ids_ptr,  # (T,) int64
    token_type_ids_ptr,  # (T,) int64
    position_ids_ptr,  # (T,) int64
    word_ptr,  # (V, H)
    token_type_ptr,  # (TYPES, H)
    position_ptr,  # (P, H)
    row,
    column,
    mask,
    T,
    V,
    P,
    TYPES: tl.constexpr,
    H: tl.constexpr,
):
    """(types, sum of the three rows of each token), 0 outside the mask."""
    ids = tl.load(input_ids_ptr + row, row < T, other=0)
    types = tl.load(token_type_ids_ptr + row, row < T, other=0)
    positions = tl.load(position_ids_ptr + row, row < T, other=0)
    z = _gather(word_ptr, ids, V, mask, column, H)
    z += _gather(token_type_ptr, types, TYPES, mask, column, H)
    z += _gather(position_ptr, positions, P, mask, column, H)
    return types, tl.where(mask, z, 0.0)


@triton.jit(do_not_specialize=["seed_ptr", "T", "V", "P", "stream"])
def _forward_kernel(
    input_ids_ptr,  # (T,) int64
    token_type_ids_ptr,  # (T,) int64
    position_ids_ptr,  # (T,) int64
    word_ptr,  # (V, H)
    token_type_ptr,  # (TYPES, H)
    position_ptr,  # (P, H)
    weight_ptr,  # (H,)
    beta_ptr,  # (H,)
    seed_ptr,  # (3,) int64
    y_ptr,  # (T, H)
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    T,
    V,
    P,
    stream,
    eps,
    THRESHOLD: tl.constexpr,  # of 256 bytes, how many keep; 256: no dropout
    TYPES: tl.constexpr,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_H)
    mask = (row < T)[:, None] & (column < H)[None, :]
    _, z = _embed(
        input_ids_ptr, token_type_ids_ptr, position_ids_ptr, word_ptr, token_type_ptr,
        position_ptr, row, column, mask, T, V, P, TYPES, H,
    )  # fmt: skip
    mean, rstd, xhat = rowwise.normalize(z, mask, eps, H)
    weight = rowwise.load_parameter(weight_ptr, column, H)
    beta = rowwise.load_parameter(beta_ptr, column, H)
    y = xhat * weight[None, :] + beta[None, :]
    if THRESHOLD < 256:
        key0, key1, site = dropout_key(seed_ptr, stream)
        plane = tl.zeros((), tl.uint32)
        keep = keep_columns(row, 0, plane, site, key0, key1, THRESHOLD, BLOCK_H // 128)
        y = tl.where(keep, y * (256 / THRESHOLD), 0.0)
    offset = row.to(tl.int64)[:, None] * H + column[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(mean_ptr + row, mean, row < T)
    tl.store(rstd_ptr + row, rstd, row < T)


@triton.jit(do_not_specialize=["seed_ptr", "T", "V", "P", "stream"])
def _rows_backward_kernel(
    dy_ptr,  # (T, H)
    input_ids_ptr,  # (T,) int64
    token_type_ids_ptr,  # (T,) int64
    position_ids_ptr,  # (T,) int64
    word_ptr,  # (V, H)
    token_type_ptr,  # (TYPES, H)
    position_ptr,  # (P, H)
    weight_ptr,  # (H,)
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    seed_ptr,  # (3,) int64
    dz_ptr,  # (T, H)
    partials_ptr,  # (programs, 4, H) fp32: of dweight, dbeta, and the two rows of dtoken_type
    T,
    V,
    P,
    stream,
    THRESHOLD: tl.constexpr,
    TYPES: tl.constexpr,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    column = tl.arange(0, BLOCK_H)
    weight = rowwise.load_parameter(weight_ptr, column, H)
    dweight = tl.zeros((SUM_R, BLOCK_H), tl.float32)
    dbeta = tl.zeros((SUM_R, BLOCK_H), tl.float32)
    dtype0 = tl.zeros((SUM_R, BLOCK_H), tl.float32)
    dtype1 = tl.zeros((SUM_R, BLOCK_H), tl.float32)
    if THRESHOLD < 256:
        key0, key1, site = dropout_key(seed_ptr, stream)
        plane = tl.zeros((), tl.uint32)
    for block in range(tl.program_id(0), tl.cdiv(T, BLOCK_R), tl.num_programs(0)):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask, offset = rowwise.tile_at(row, column, T, H)
        dy = tl.load(dy_ptr + offset, mask, other=0.0).to(tl.float32)
        types, z = _embed(
            input_ids_ptr, token_type_ids_ptr, position_ids_ptr, word_ptr, token_type_ptr,
            position_ptr, row, column, mask, T, V, P, TYPES, H,
        )  # fmt: skip
        mean, rstd = rowwise.load_statistics(mean_ptr, rstd_ptr, row, T)
        if THRESHOLD < 256:
            keep = keep_columns(row, 0, plane, site, key0, key1, THRESHOLD, BLOCK_H // 128)
            dy = tl.where(keep, dy * (256 / THRESHOLD), 0.0)
        xhat = (z - mean[:, None]) * rstd[:, None]  # where masked off, dy is 0: nothing adds
        dz = rowwise.normalize_gradient(dy * weight[None, :], xhat, rstd, H)
        dz = tl.where(mask, dz, 0.0)
        tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), mask)
        dweight = rowwise.add_rows(dweight, dy * xhat)
        dbeta = rowwise.add_rows(dbeta, dy)
        if TYPES == 1:
            dtype0 = rowwise.add_rows(dtype0, dz)
        else:
            dtype0 = rowwise.add_rows(dtype0, tl.where((types == 0)[:, None], dz, 0.0))
            dtype1 = rowwise.add_rows(dtype1, tl.where((types == 1)[:, None], dz, 0.0))

    rowwise.store_sums(partials_ptr, column, (dweight, dbeta, dtype0, dtype1), 4, H)


@triton.jit(do_not_specialize=["T", "ROWS", "skip_key"])
def _sum_pieces_kernel(
    dz_ptr,  # (T, H)
    keys_ptr,  # (2 T,) int64, sorted
    order_ptr,  # (2 T,) int64: where the key stood before; modulo T, its token
    dtables_ptr,  # (ROWS, H), zeros
    partials_ptr,  # (chunks, 2, H) fp32
    T,
    ROWS,
    skip_key,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A piece, the equal keys of one chunk, is summed by the program of its first key.

    A key that lies in one chunk goes to the table. Else its piece is kept: in place 0 of the chunk
    if it begins there, in place 1 if it ends there only.
    """
    first = tl.program_id(0)
    key = tl.load(keys_ptr + first)
    before = tl.load(keys_ptr + first - 1, first > 0, other=-1)
    begins_chunk = first % CHUNK == 0
    if (key == before) & (not begins_chunk):
        return
    if (key == skip_key) | (key < 0) | (key >= ROWS):
        return
    chunk = first // CHUNK
    entry = chunk * CHUNK + tl.arange(0, CHUNK)
    count = tl.sum((tl.load(keys_ptr + entry, entry < 2 * T, other=-1) == key).to(tl.int32), 0)
    after = tl.load(keys_ptr + first + count, first + count < 2 * T, other=-1)

    column = tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for start in range(0, count, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        place = tl.load(order_ptr + first + row, row < count, other=0)
        token = tl.where(place < T, place, place - T)
        mask = (row < count)[:, None] & (column < H)[None, :]
        total += tl.load(dz_ptr + token[:, None] * H + column[None, :], mask, other=0.0)
    sums = tl.sum(total, axis=0)
    if (key != before) & (key != after):
        out_ptr = dtables_ptr + key * H + column
        tl.store(out_ptr, sums.to(dtables_ptr.dtype.element_ty), column < H)
    else:
        place = chunk.to(tl.int64) * 2 + tl.where(begins_chunk, 0, 1)
        tl.store(partials_ptr + place * H + column, sums, column < H)


@triton.jit(do_not_specialize=["ROWS", "skip_key"])
def _join_pieces_kernel(
    keys_ptr,  # (2 T,) int64, sorted
    dtables_ptr,  # (ROWS, H)
    partials_ptr,  # (chunks, 2, H) fp32
    ROWS,
    skip_key,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds the pieces of a key that begins in this chunk and goes on in the next."""
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    if chunk + 1 == chunks:
        return
    first = chunk * CHUNK
    key = tl.load(keys_ptr + first + CHUNK - 1)
    whole_chunk = tl.load(keys_ptr + first) == key
    before = tl.load(keys_ptr + first - 1, first > 0, other=-1)
    if (tl.load(keys_ptr + first + CHUNK) != key) | (whole_chunk & (before == key)):
        return
    if (key == skip_key) | (key < 0) | (key >= ROWS):
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    place = chunk.to(tl.int64) * 2 + tl.where(whole_chunk, 0, 1)
    total = tl.load(partials_ptr + place * H + column, column < H, other=0.0)
    next_chunk = chunk + 1
    found = PIECES
    while found == PIECES:
        pieces = next_chunk + tl.arange(0, PIECES)
        same = tl.load(keys_ptr + pieces * CHUNK, pieces < chunks, other=-1) == key
        offset = pieces.to(tl.int64)[:, None] * (2 * H) + column[None, :]
        sums = tl.load(partials_ptr + offset, same[:, None] & (column < H)[None, :], other=0.0)
        total += tl.sum(sums, axis=0)
        found = tl.sum(same.to(tl.int32), 0)
        next_chunk += PIECES
    tl.store(dtables_ptr + key * H + column, total.to(dtables_ptr.dtype.element_ty), column < H)


def _pieces_config(BLOCK_H: int) -> tuple[int, int]:
    """(rows of a turn, warps): four 16-byte loads of bf16 in flight a thread."""
    # With four warps and 256 columns, sm_80 spills with Triton 3.9.
    num_warps = 8 if BLOCK_H > 2048 else 4 if BLOCK_H > 256 else 2
    return num_warps * 1024 // BLOCK_H, num_warps


@torch.library.custom_op("fastbert::embed_layer_norm", mutates_args=())
def _forward(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    beta: Tensor,
    pad_token_id: int,
    eps: float,
    dropout_p: float,
    seed: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (T,), (V, H) = input_ids.shape, word.shape
    y = torch.empty(T, H, dtype=word.dtype, device=word.device)
    tensors = (
        input_ids, token_type_ids, position_ids, word, token_type, position, weight, beta, seed, y
    )  # fmt: skip
    P, types = position.shape[0], token_type.shape[0]
    numbers = (T, V, P, stream, eps, keep_threshold(dropout_p), types)
    return y, *rowwise.launch_forward(_forward_kernel, tensors, numbers, H)


@_forward.register_fake
def _(
    input_ids, token_type_ids, position_ids, word, token_type, position, weight, beta,
    pad_token_id, eps, dropout_p, seed, stream,
):  # fmt: skip
    T = input_ids.shape[0]
    statistics = word.new_empty(T, dtype=torch.float32)
    return word.new_empty(T, word.shape[1]), statistics, torch.empty_like(statistics)


@torch.library.custom_op("fastbert::embed_layer_norm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    pad_token_id: int,
    dropout_p: float,
    seed: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor]:  # (V + P, H) of word and position; (4, H) of weight, beta, token_type
    (T,), (V, H), P = input_ids.shape, word.shape, position.shape[0]
    dz = torch.empty_like(dy)
    tensors = (
        dy, input_ids, token_type_ids, position_ids, word, token_type, position, weight,
        mean, rstd, seed, dz,
    )  # fmt: skip
    numbers = (T, V, P, stream, keep_threshold(dropout_p), token_type.shape[0])
    kernel = _rows_backward_kernel
    dparameters = rowwise.launch_backward(kernel, tensors, numbers, H, 4, weight.dtype)

    keys, order = torch.cat((input_ids, position_ids + V)).sort(stable=True)
    dtables = torch.zeros(V + P, H, dtype=dy.dtype, device=dy.device)
    chunks = triton.cdiv(2 * T, _CHUNK)
    pieces = torch.empty(chunks, 2, H, dtype=torch.float32, device=dy.device)
    BLOCK_H = rowwise.block_width(H)
    BLOCK_R, num_warps = _pieces_config(BLOCK_H)
    _sum_pieces_kernel[(2 * T,)](
        dz, keys, order, dtables, pieces, T, V + P, pad_token_id, H, _CHUNK, BLOCK_R, BLOCK_H,
        num_warps=num_warps,
    )  # fmt: skip
    _join_pieces_kernel[(chunks, triton.cdiv(H, _PIECE_WIDTH))](
        keys, dtables, pieces, V + P, pad_token_id, H, _CHUNK, _PIECES, _PIECE_WIDTH, num_warps=4
    )
    return dtables, dparameters


@_backward.register_fake
def _(
    dy, input_ids, token_type_ids, position_ids, word, token_type, position, weight, mean, rstd,
    pad_token_id, dropout_p, seed, stream,
):  # fmt: skip
    H = word.shape[1]
    return word.new_empty(word.shape[0] + position.shape[0], H), weight.new_empty(4, H)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    *tensors, _, ctx.pad_token_id, _, ctx.dropout_p, seed, ctx.stream = inputs
    ctx.save_for_backward(*tensors, output[1], output[2], seed)


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 13
    *saved, seed = ctx.saved_tensors
    dtables, dparameters = _backward(
        dy.contiguous(), *saved, ctx.pad_token_id, ctx.dropout_p, seed, ctx.stream
    )
    V, types = saved[3].shape[0], saved[4].shape[0]
    dword, dposition = dtables[:V], dtables[V:]
    dweight, dbeta, dtypes = dparameters[0], dparameters[1], dparameters[2 : 2 + types]
    return None, None, None, dword, dtypes, dposition, dweight, dbeta, *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_save)


def embed_layer_norm(
    input_ids: Tensor,  # (T,) int64
    token_type_ids: Tensor,  # (T,) int64
    position_ids: Tensor,  # (T,) int64
    word: Tensor,  # (V, H)
    token_type: Tensor,  # (2, H), or (1, H)
    position: Tensor,  # (P, H)
    weight: Tensor,  # (H,)
    beta: Tensor,  # (H,)
    pad_token_id: int,
    eps: float,
    dropout_p: float,
    seed: Tensor,  # (3,) int64
    stream: int,
) -> Tensor:  # (T, H)
    """dropout(LayerNorm(word[ids] + token_type[types] + position[positions])).

    `word[pad_token_id]` is used but gets no gradient. An id outside its table gives a row of NaN.
    The parameters have one dtype, fp32, fp16 or bf16; H is a multiple of 8 up to 4096.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, or not contiguous.
    """
    op, device, T = "embed_layer_norm", word.device, input_ids.numel()
    checks.require_launchable(op, _forward_kernel, device)
    checks.require_tensor(op, "word", word, (None, None), checks.STORAGE_DTYPES, device)
    H = word.shape[1]
    rowwise.require_width(op, H)
    checks.require(T > 0, f"{op}: input_ids is empty")
    for name, ids in {
        "input_ids": input_ids, "token_type_ids": token_type_ids, "position_ids": position_ids
    }.items():  # fmt: skip
        checks.require_tensor(op, name, ids, (T,), torch.int64, device)
    checks.require_tensor(op, "token_type", token_type, (None, H), word.dtype, device)
    checks.require(token_type.shape[0] in (1, 2), f"{op}: token_type needs 1 or 2 rows")
    checks.require_tensor(op, "position", position, (None, H), word.dtype, device)
    checks.require_tensor(op, "weight", weight, (H,), word.dtype, device)
    checks.require_tensor(op, "beta", beta, (H,), word.dtype, device)
    checks.require_seed(op, seed, device, stream)
    out: Tensor = _forward(
        input_ids, token_type_ids, position_ids, word, token_type, position, weight, beta,
        pad_token_id, eps, dropout_p, seed, stream,
    )[0]  # fmt: skip
    return out


def compile_cases() -> list[CompileCase]:
    """Every kernel in every shipped configuration, for the compile report."""
    others = dict.fromkeys(
        ("input_ids_ptr", "token_type_ids_ptr", "position_ids_ptr", "keys_ptr", "order_ptr"), "*i64"
    )
    cases = []
    # At 256, 512 and 2048 a program holds as many elements as at 1024.
    for H in (128, 256, 384, 512, 768, 1024, 4096):
        BLOCK_H = rowwise.block_width(H)
        BLOCK_R, warps = rowwise.forward_config(H)
        BACK_R, SUM_R, back_warps = rowwise.backward_config(H)
        PIECES_R, piece_warps = _pieces_config(BLOCK_H)
        row = {"H": H, "BLOCK_H": BLOCK_H, "TYPES": 2}
        pieces = {"H": H, "BLOCK_R": PIECES_R, "BLOCK_H": BLOCK_H, "CHUNK": _CHUNK}
        join = {"H": H, "CHUNK": _CHUNK, "PIECES": _PIECES, "WIDTH": _PIECE_WIDTH}
        kernels = [
            ("sum_pieces", _sum_pieces_kernel, pieces, piece_warps),
            ("join_pieces", _join_pieces_kernel, join, 4),
        ]
        # Without dropout a kernel is a subset of the one with it: one width stands for all.
        for p in (0.0, 0.1) if H == 768 else (0.1,):
            front = row | {"THRESHOLD": keep_threshold(p), "BLOCK_R": BLOCK_R}
            back = front | {"BLOCK_R": BACK_R, "SUM_R": SUM_R}
            kernels += [
                (f"embed_layer_norm p={p}", _forward_kernel, front, warps),
                (f"embed_layer_norm_backward p={p}", _rows_backward_kernel, back, back_warps),
            ]
        for dtype in checks.STORAGE_DTYPES if H == 768 else (torch.bfloat16,):
            cases += [
                CompileCase(
                    name, f"{checks.triton_name(dtype)} H={H}", kernel,
                    checks.kernel_signature(kernel, constexprs, dtype, **others),
                    constexprs, num_warps,
                )
                for name, kernel, constexprs, num_warps in kernels
            ]  # fmt: skip
    return cases
