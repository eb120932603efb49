"""Bidirectional attention over packed sequences, dropout inside: O = dropout(softmax(QKᵀ/√D)) V.

Vaswani et al. 2017, equation 1, computed tile by tile as in FlashAttention-2 (Dao 2023). Both
directions are bitwise deterministic. Three backwards, by length:

* "tile", S ≤ 128: a tile holds a whole head. One program does everything and reads no O.
* "head", S ≤ 512: one program walks a head, columns of blocks outside, rows inside. dK and dV stay
  in registers; dQ is added up in an fp32 scratch that no other program touches (128 KB at S = 512,
  so it lives in L2), by reductions in memory that one thread issues in order: 5 products a tile
  where separate kernels for dQ and for dK, dV need 7.
* "split": those separate kernels, for longer sequences, of which there would be too few programs,
  and wherever registers do not suffice for the others (`attention_config`).

Dropout spends one Philox counter for 16 elements, in the thread that holds them (see `philox`).
Its rescaling by 256 / threshold is folded into the outputs' scale. All exponentials are powers of
2: log2(e) is folded into the scale of the scores, and `lse` is a base-2 logarithm.

Queries may be fewer than keys (`attention_at`): what the last layer of an encoder wants. Each
backward also leaves column sums of dQ and dV, of which the bias of the projection has its gradient.

N sequences packed, T tokens packed, R queries (T where each token asks), S longest sequence,
A heads, D head dimension; a plane is one head of one sequence; rows are queries, columns are keys.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels import attention_flash, checks
from fastbert_kernels.attention_config import (
    HEAD_SIZES,
    TABLES,
    Tiles,
    backward_path,
    choose_backend,
    choose_tiles,
    forward_kernel,
)
from fastbert_kernels.attention_kernels import (
    attention_backward_kernel,
    attention_backward_query_kernel,
    attention_delta_kernel,
    attention_forward_kernel,
)
from fastbert_kernels.checks import capability
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.philox import keep_threshold
from fastbert_kernels.reduce import reduce_rows
from fastbert_kernels.reference import sequence_lengths, with_bias_gradient, with_bias_gradients
from fastbert_kernels.triton_import import triton

DELTA_ROWS = 64


# Launches


def _launch_forward(
    q: Tensor,  # as the kernel's
    kv: Tensor,
    at: tuple[Tensor, Tensor] | None,  # positions, cu_queries
    cu_seqlens: Tensor,
    max_seqlen: int,
    threshold: int,
    seed: Tensor,
    stream: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    R, A, D = q.shape[0], q.shape[-2], q.shape[-1]
    N = cu_seqlens.numel() - 1
    if q.device.type == "cpu":
        sequence_lengths(cu_seqlens, max_seqlen, len(kv))  # here, where no tracing meets it
    out = torch.empty((R, A, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((A, R), dtype=torch.float32, device=q.device)
    positions, cu_queries = at or (cu_seqlens, cu_seqlens)
    kernel = forward_kernel(max_seqlen, D, q.dtype, capability(q.device))
    tiles = choose_tiles(kernel, D, q.dtype, capability(q.device))
    blocks = triton.cdiv(max_seqlen, tiles.block_m)
    attention_forward_kernel[((N + 1) * A * blocks,)](
        q, kv, cu_seqlens, cu_queries, positions, seed, out, lse, R, N, blocks, stream,
        A, D, tiles.block_m, tiles.block_n, threshold, precision, at is not None,
        kernel == "short", num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse


def _launch_backward(
    dout: Tensor,  # (R, A, D)
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,  # as q, to fill
    dkv: Tensor,  # as kv, to fill
    at: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    threshold: int,
    seed: Tensor,
    stream: int,
    precision: str,
) -> Tensor:  # (P, 3, A, D) fp32: of each program that has any, column sums of dq, 0, dv
    (R, A, D), T = dout.shape, len(kv)
    N = cu_seqlens.numel() - 1
    arch = capability(q.device)
    path = backward_path(max_seqlen, D, q.dtype, arch)
    tiles = choose_tiles("columns" if path == "split" else path, D, q.dtype, arch)
    query_tiles = choose_tiles("query", D, q.dtype, arch)
    positions, cu_queries = at or (cu_seqlens, cu_seqlens)
    # What a path does not use stands in for itself as some tensor of the right type.
    delta = lse if path == "tile" else torch.empty_like(lse)
    scratch, blocks = lse, 1
    if path == "head":
        scratch = torch.empty(A, R + N * tiles.block_m, D, dtype=torch.float32, device=q.device)
    if path == "split":
        attention_delta_kernel[(A * triton.cdiv(R, DELTA_ROWS),)](
            out, dout, delta, R, A, D, threshold, DELTA_ROWS, num_warps=4
        )
        blocks = triton.cdiv(max_seqlen, min(tiles.block_n, query_tiles.block_m))
    partials = torch.empty(N * blocks, 3, A, D, dtype=torch.float32, device=q.device)
    attention_backward_kernel[((N + 1) * A * blocks,)](
        q, kv, out, dout, lse, delta, scratch, cu_seqlens, cu_queries, positions, seed,
        dq, dkv, partials, T, R, N, blocks, stream, A, D, tiles.block_m, tiles.block_n,
        threshold, precision, at is not None, path == "tile", path == "head",
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if path == "split":
        attention_backward_query_kernel[(N * A * blocks,)](
            q, kv, dout, lse, delta, cu_seqlens, cu_queries, positions, seed, dq, partials,
            R, blocks, stream, A, D, query_tiles.block_m, query_tiles.block_n,
            threshold, precision, at is not None,
            num_warps=query_tiles.num_warps, num_stages=query_tiles.num_stages,
        )  # fmt: skip
    return partials


def _bias_gradient(partials: Tensor, qkv_bias: Tensor | None) -> Tensor:
    """Of the projection's bias; empty where there is none."""
    if qkv_bias is None:
        return partials.new_empty(0)
    return reduce_rows(partials, qkv_bias.dtype).view(qkv_bias.shape)


# Every token asks


@torch.library.custom_op("fastbert::attention", mutates_args=())
def _attention(
    qkv: Tensor,  # (T, 3, A, D)
    qkv_bias: Tensor | None,
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    threshold: int,
    seed: Tensor,  # (3,) int64
    stream: int,
    precision: str,
) -> tuple[Tensor, Tensor]:  # (T, A, D), (A, T) fp32 base-2 log-sum-exp of the scores
    return _launch_forward(
        qkv, qkv, None, cu_seqlens, max_seqlen, threshold, seed, stream, precision
    )


@_attention.register_fake
def _(qkv, qkv_bias, cu_seqlens, max_seqlen, threshold, seed, stream, precision):
    T, _, A, D = qkv.shape
    return qkv.new_empty(T, A, D), qkv.new_empty(A, T, dtype=torch.float32)


@torch.library.custom_op("fastbert::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor,  # (T, A, D)
    qkv: Tensor,  # (T, 3, A, D)
    qkv_bias: Tensor | None,
    out: Tensor,  # (T, A, D)
    lse: Tensor,  # (A, T) fp32
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    threshold: int,
    seed: Tensor,  # (3,) int64
    stream: int,
    precision: str,
) -> tuple[Tensor, Tensor]:  # dqkv, and the bias's gradient
    dqkv = torch.empty_like(qkv)
    partials = _launch_backward(
        dout, qkv, qkv, out, lse, dqkv, dqkv, None,
        cu_seqlens, max_seqlen, threshold, seed, stream, precision,
    )  # fmt: skip
    return dqkv, _bias_gradient(partials, qkv_bias)


@_attention_backward.register_fake
def _(dout, qkv, qkv_bias, out, lse, cu_seqlens, max_seqlen, threshold, seed, stream, precision):
    dbias = lse.new_empty(0) if qkv_bias is None else torch.empty_like(qkv_bias)
    return torch.empty_like(qkv), dbias


def _save(ctx, inputs, output):
    qkv, bias, cu_seqlens, ctx.max_seqlen, ctx.threshold, seed, ctx.stream, ctx.precision = inputs
    ctx.save_for_backward(qkv, bias, *output, cu_seqlens, seed)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout, dlse):
    nothing = (None,) * 6
    if dout is None:
        return None, None, *nothing
    qkv, bias, out, lse, cu_seqlens, seed = ctx.saved_tensors
    dqkv, dbias = _attention_backward(
        dout.contiguous(), qkv, bias, out, lse, cu_seqlens,
        ctx.max_seqlen, ctx.threshold, seed, ctx.stream, ctx.precision,
    )  # fmt: skip
    return dqkv, None if bias is None else dbias, *nothing


_attention.register_autograd(_gradient, setup_context=_save)


# Some tokens ask


@torch.library.custom_op("fastbert::attention_at", mutates_args=())
def _attention_at(
    q: Tensor,  # (R, A, D)
    kv: Tensor,  # (T, 2, A, D)
    qkv_bias: Tensor | None,
    positions: Tensor,  # (R,) int64
    cu_queries: Tensor,  # (N + 1,) int32
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    threshold: int,
    seed: Tensor,  # (3,) int64
    stream: int,
    precision: str,
) -> tuple[Tensor, Tensor]:  # (R, A, D), (A, R) fp32
    return _launch_forward(
        q, kv, (positions, cu_queries), cu_seqlens, max_seqlen, threshold, seed, stream, precision
    )


@_attention_at.register_fake
def _(
    q, kv, qkv_bias, positions, cu_queries, cu_seqlens, max_seqlen, threshold, seed, stream,
    precision,
):  # fmt: skip
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastbert::attention_at_backward", mutates_args=())
def _attention_at_backward(
    dout: Tensor,  # (R, A, D)
    q: Tensor,
    kv: Tensor,
    qkv_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    positions: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    threshold: int,
    seed: Tensor,
    stream: int,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # dq, dkv, and the bias's gradient
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    partials = _launch_backward(
        dout, q, kv, out, lse, dq, dkv, (positions, cu_queries),
        cu_seqlens, max_seqlen, threshold, seed, stream, precision,
    )  # fmt: skip
    return dq, dkv, _bias_gradient(partials, qkv_bias)


@_attention_at_backward.register_fake
def _(
    dout, q, kv, qkv_bias, out, lse, positions, cu_queries, cu_seqlens, max_seqlen, threshold,
    seed, stream, precision,
):  # fmt: skip
    dbias = lse.new_empty(0) if qkv_bias is None else torch.empty_like(qkv_bias)
    return torch.empty_like(q), torch.empty_like(kv), dbias


def _save_at(ctx, inputs, output):
    q, kv, bias, *index, ctx.max_seqlen, ctx.threshold, seed, ctx.stream, ctx.precision = inputs
    ctx.save_for_backward(q, kv, bias, *output, *index, seed)
    ctx.set_materialize_grads(False)


def _gradient_at(ctx, dout, dlse):
    nothing = (None,) * 8
    if dout is None:
        return None, None, None, *nothing
    q, kv, bias, out, lse, *index, seed = ctx.saved_tensors
    dq, dkv, dbias = _attention_at_backward(
        dout.contiguous(), q, kv, bias, out, lse, *index,
        ctx.max_seqlen, ctx.threshold, seed, ctx.stream, ctx.precision,
    )  # fmt: skip
    return dq, dkv, None if bias is None else dbias, *nothing


_attention_at.register_autograd(_gradient_at, setup_context=_save_at)


# What the user calls


def _backend(op: str, asked: str, q: Tensor, max_seqlen: int, dropout_p: float) -> str:
    """What serves a call, known to be there."""
    D, device = q.shape[-1], q.device
    chosen = choose_backend(
        asked, q.dtype, device.type, dropout_p, capability(device), D, max_seqlen
    )
    if chosen == "triton":
        checks.require_launchable(op, attention_forward_kernel, device)
    return chosen


def _check(
    op: str,
    q: Tensor,
    cu_seqlens: Tensor,
    tokens: int,
    max_seqlen: int,
    seed: Tensor,
    stream: int,
    qkv_bias: Tensor | None,
    precision: str,
) -> None:
    """What both ops ask of their arguments."""
    device, A, D = q.device, q.shape[-2], q.shape[-1]
    checks.require_tensor(op, "cu_seqlens", cu_seqlens, (None,), torch.int32, device)
    checks.require_seed(op, seed, device, stream)
    checks.require(D in HEAD_SIZES, f"{op}: head size {D}, expected one of {HEAD_SIZES}")
    checks.require(tokens > 0 and A > 0, f"{op}: no tokens or no heads: {tokens} tokens, {A} heads")
    checks.require(cu_seqlens.numel() > 1, f"{op}: cu_seqlens holds no sequence")
    checks.require(max_seqlen > 0, f"{op}: max_seqlen = {max_seqlen}, expected at least 1")
    checks.require(
        precision in ("ieee", "tf32"),
        f"{op}: precision = {precision!r}, expected 'ieee' or 'tf32'",
    )
    if qkv_bias is not None:
        size, want = qkv_bias.numel(), 3 * A * D
        checks.require(size == want, f"{op}: qkv_bias has {size} elements, expected {want}")


def attention(
    qkv: Tensor,  # (T, 3, A, D)
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor,  # (3,) int64
    stream: int,
    *,
    qkv_bias: Tensor | None = None,  # (3 A D,) or (3, A, D)
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
        qkv_bias: the bias that `qkv` contains already. It is not added; its gradient, the column
            sums of dqkv, is made where dqkv is. That of the keys is exactly 0: a bias of all keys
            moves all scores of a query alike, and softmax does not see it.
        backend: see `choose_backend`. All but "triton" draw dropout bits of their own.
        precision: of fp32 products: "ieee", or "tf32" (faster, 10 bits of mantissa).
        check: read `cu_seqlens` and verify it, which waits for a GPU; on a CPU always done.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, or not contiguous; a backend that
            cannot serve this call; where checked, sequences that do not fit.
    """
    op = "attention"
    chosen = _backend(op, backend, qkv, max_seqlen, dropout_p)
    checks.require_tensor(op, "qkv", qkv, (None, 3, None, None), checks.STORAGE_DTYPES, qkv.device)
    _check(op, qkv, cu_seqlens, len(qkv), max_seqlen, seed, stream, qkv_bias, precision)
    threshold = keep_threshold(dropout_p)
    if check:
        sequence_lengths(cu_seqlens, max_seqlen, len(qkv))
    if chosen != "triton":
        if qkv_bias is not None:
            qkv = with_bias_gradient(qkv, qkv_bias)
        return attention_flash.attention(qkv, cu_seqlens, max_seqlen, dropout_p, chosen)
    out, _ = _attention(qkv, qkv_bias, cu_seqlens, max_seqlen, threshold, seed, stream, precision)
    return out


def attention_at(
    q: Tensor,  # (R, A, D)
    kv: Tensor,  # (T, 2, A, D)
    positions: Tensor,  # (R,) int64
    cu_queries: Tensor,  # (N + 1,) int32
    cu_seqlens: Tensor,  # (N + 1,) int32
    max_seqlen: int,
    dropout_p: float,
    seed: Tensor,  # (3,) int64
    stream: int,
    *,
    qkv_bias: Tensor | None = None,  # (3 A D,) or (3, A, D)
    backend: str = "auto",
    precision: str = "ieee",
) -> Tensor:  # (R, A, D)
    """`attention` where only the tokens `positions` ask; all tokens of a sequence answer.

    Meaning of `reference.attention_at`: the rows that `attention` gives at those tokens, dropout
    bits included. What `attention` says of its arguments holds here.

    Args:
        q: of the tokens that ask.
        kv: of all tokens.
        positions: those tokens, each once and in order.
        cu_queries: where each sequence's queries start, and the end; rows beyond it give 0.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, or not contiguous; a backend that
            cannot serve this call.
    """
    op, device = "attention_at", q.device
    chosen = _backend(op, backend, q, max_seqlen, dropout_p)
    checks.require_tensor(op, "q", q, (None, None, None), checks.STORAGE_DTYPES, device)
    checks.require_tensor(op, "kv", kv, (None, 2, *q.shape[1:]), q.dtype, device)
    checks.require_tensor(op, "positions", positions, (len(q),), torch.int64, device)
    shape = tuple(cu_seqlens.shape)
    checks.require_tensor(op, "cu_queries", cu_queries, shape, torch.int32, device)
    _check(op, q, cu_seqlens, len(kv), max_seqlen, seed, stream, qkv_bias, precision)
    threshold = keep_threshold(dropout_p)
    if chosen != "triton":
        if qkv_bias is not None:
            q, kv = with_bias_gradients(q, kv, qkv_bias)
        return attention_flash.attention_at(
            q, kv, cu_queries, cu_seqlens, max_seqlen, dropout_p, chosen
        )
    out, _ = _attention_at(
        q, kv, qkv_bias, positions, cu_queries, cu_seqlens, max_seqlen, threshold,
        seed, stream, precision,
    )  # fmt: skip
    return out


# The compile report

_HEADS = 12  # of BERT-base: a constant of the kernels, like the head's size

_KERNELS = {
    "forward": attention_forward_kernel,
    "short": attention_forward_kernel,
    "tile": attention_backward_kernel,
    "head": attention_backward_kernel,
    "columns": attention_backward_kernel,
    "query": attention_backward_query_kernel,
}


def _case(
    fn: Any, label: str, dtype: torch.dtype, capability: int, tiles: Tiles, **constexprs: Any
) -> CompileCase:
    constexprs = {"A": _HEADS, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n} | constexprs
    constexprs = {name: value for name, value in constexprs.items() if name in fn.arg_names}
    types = dict.fromkeys(("lse_ptr", "delta_ptr", "scratch_ptr"), "*fp32")
    types |= dict.fromkeys(("cu_seqlens_ptr", "cu_queries_ptr"), "*i32")
    return CompileCase(
        name=fn.__name__,
        configuration=label,
        fn=fn,
        signature=checks.kernel_signature(fn, constexprs, dtype, positions_ptr="*i64", **types),
        constexprs=constexprs,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        needs_wgmma=dtype != torch.float32 and fn is not attention_delta_kernel,
        archs=(capability,),
    )


def compile_cases() -> list[CompileCase]:
    """Every kernel in every configuration of the tables: with dropout; without it, a subset, for
    BERT's heads of 64; and in half precision where only some tokens ask."""
    cases = []
    for arch, table in TABLES.items():
        for kernel, configurations in table.items():
            for (D, half), tiles in configurations.items():
                dtype = torch.bfloat16 if half else torch.float32
                variants = [(230, False)] + [(256, False)] * (D == 64) + [(230, True)] * half
                for threshold, at in variants:
                    p = 1 - threshold / 256
                    label = f"{kernel} {checks.triton_name(dtype)} D={D} p={p:.1f}"
                    cases.append(
                        _case(
                            _KERNELS[kernel], label + " some" * at, dtype, arch, tiles,
                            D=D, THRESHOLD=threshold, PRECISION="ieee", AT=at,
                            ONE_TILE=kernel in ("short", "tile"), WHOLE_HEAD=kernel == "head",
                        )
                    )  # fmt: skip
        tiles = Tiles(DELTA_ROWS, 0, 4, 1)
        for D in HEAD_SIZES:
            cases.append(
                _case(
                    attention_delta_kernel, f"bf16 D={D}", torch.bfloat16, arch, tiles,
                    D=D, THRESHOLD=230,
                )
            )  # fmt: skip
    return cases
