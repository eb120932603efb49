"""LayerNorm(dropout(x + bias) + residual) in one pass each way; Ba et al. 2016.

R rows, H columns, P programs of the backward. Bound by memory. Bytes an element in bf16:
forward 6 (reads x, residual; writes y), backward 8 (reads dy, y; writes dx, dresidual), 6 without
dropout, where dx is dresidual. At 65,536 x 768 and 3.0 TB/s that is a floor of 0.101 and 0.134 ms.
The backward takes the normalized row from y, which the next product keeps anyway. Where weight and
beta do not allow it, by 8 columns, the sum z before the norm is written and read for it.
"""

import torch
from torch import Tensor

from fastbert_kernels import checks, rowwise
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.philox import keep_threshold
from fastbert_kernels.philox_triton import dropout_key, keep_columns
from fastbert_kernels.triton_import import tl, triton


def _backward_limits(dtype: torch.dtype) -> tuple[int, int | None]:
    """(warps a multiprocessor, registers a thread): 128 do without a spill, but in fp32."""
    return (12, None) if dtype == torch.float32 else (16, 128)


@triton.jit
def _needs_sum(
    weight,  # (BLOCK_H,) fp32
    beta,  # (BLOCK_H,) fp32
):
    """Of which columns y does not tell the normalized value well; the same for each 8.

    (y - beta) / weight has the rounding error of y, 2^-9 |xhat + beta / weight| in bf16; from z it
    is 2^-9 |z| rstd. Over normal values that is 1.4 times as much at |beta| = |weight|, and 4.3
    times at 4. Weights below 2^-10 would bring fp16 to its subnormals.
    """
    GROUPS: tl.constexpr = weight.shape[0] // 8
    told = (tl.abs(weight) >= 0.0009765625) & (tl.abs(beta) <= tl.abs(weight))
    all_told = tl.min(tl.reshape(told.to(tl.int32), (GROUPS, 8)), axis=1)
    needs = tl.reshape(tl.broadcast_to(all_told[:, None], (GROUPS, 8)), (GROUPS * 8,)) == 0
    return tl.max_constancy(needs, 8)  # so that accesses stay 16 bytes wide


@triton.jit(do_not_specialize=["seed_ptr", "rows_ptr", "R", "stream"])
def _forward_kernel(
    x_ptr,  # (R, H)
    bias_ptr,  # (H,)
    residual_ptr,  # (R, H)
    weight_ptr,  # (H,)
    beta_ptr,  # (H,)
    seed_ptr,  # (3,) int64
    rows_ptr,  # (R,) int64, or any pointer: a row then has its own number
    y_ptr,  # (R, H)
    z_ptr,  # (R, H); written where `_needs_sum` only
    mean_ptr,  # (R,) fp32
    rstd_ptr,  # (R,) fp32
    R,
    stream,
    eps,
    THRESHOLD: tl.constexpr,  # of 256 bytes, how many keep; 256: no dropout
    HAS_ROWS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_H)
    mask, offset = rowwise.tile_at(row, column, R, H)
    x = tl.load(x_ptr + offset, mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offset, mask, other=0.0).to(tl.float32)
    bias = rowwise.load_parameter(bias_ptr, column, H)
    weight = rowwise.load_parameter(weight_ptr, column, H)
    beta = rowwise.load_parameter(beta_ptr, column, H)

    z = x + bias[None, :]
    if THRESHOLD < 256:
        key0, key1, site = dropout_key(seed_ptr, stream)
        plane = tl.zeros((), tl.uint32)
        number = tl.load(rows_ptr + row, row < R, other=0) if HAS_ROWS else row
        keep = keep_columns(number, 0, plane, site, key0, key1, THRESHOLD, BLOCK_H // 128)
        z = tl.where(keep, z * (256 / THRESHOLD), 0.0)
    z += residual
    mean, rstd, xhat = rowwise.normalize(z, mask, eps, H)
    y = xhat * weight[None, :] + beta[None, :]
    needs_sum = _needs_sum(weight, beta)[None, :]
    tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), mask & needs_sum)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(mean_ptr + row, mean, row < R)
    tl.store(rstd_ptr + row, rstd, row < R)


@triton.jit(do_not_specialize=["seed_ptr", "rows_ptr", "R", "stream"])
def _backward_kernel(
    dy_ptr,  # (R, H)
    y_ptr,  # (R, H)
    z_ptr,  # (R, H)
    weight_ptr,  # (H,)
    beta_ptr,  # (H,)
    mean_ptr,  # (R,) fp32
    rstd_ptr,  # (R,) fp32
    seed_ptr,  # (3,) int64
    rows_ptr,  # (R,) int64, or any pointer
    dx_ptr,  # (R, H); not touched without dropout
    dresidual_ptr,  # (R, H)
    partials_ptr,  # (P, 3, H) fp32: of dbias, dweight, dbeta
    R,
    stream,
    THRESHOLD: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # Loads are written out: through functions the compiler orders them otherwise, with up to 9
    # instructions and 3 registers more or less.
    column = tl.arange(0, BLOCK_H)
    weight = tl.load(weight_ptr + column, column < H, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + column, column < H, other=0.0).to(tl.float32)
    needs_sum = _needs_sum(weight, beta)
    source_ptr = tl.where(needs_sum, z_ptr, y_ptr) + column
    dbias = tl.zeros((SUM_R, BLOCK_H), tl.float32)
    dweight = tl.zeros((SUM_R, BLOCK_H), tl.float32)
    dbeta = tl.zeros((SUM_R, BLOCK_H), tl.float32)
    if THRESHOLD < 256:
        key0, key1, site = dropout_key(seed_ptr, stream)
        plane = tl.zeros((), tl.uint32)
    # Two stages: the next turn's rows are on their way while this one's are summed.
    blocks = tl.cdiv(R, BLOCK_R)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=2):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < R)[:, None] & (column < H)[None, :]
        first = row.to(tl.int64)[:, None] * H
        offset = first + column[None, :]
        dy = tl.load(dy_ptr + offset, mask, other=0.0).to(tl.float32)
        source = tl.load(source_ptr[None, :] + first, mask, other=0.0).to(tl.float32)
        # Again in each turn, from L2: in registers they would leave room for 3 programs, not 4.
        weight = tl.load(weight_ptr + column, column < H, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + column, column < H, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, row < R, other=0.0)
        rstd = tl.load(rstd_ptr + row, row < R, other=0.0)  # 0: rows beyond R add nothing

        inverse = 1.0 / tl.where(needs_sum, 1.0, weight)
        from_y = source * inverse[None, :] - (beta * inverse)[None, :]
        from_sum = (source - mean[:, None]) * rstd[:, None]
        xhat = tl.where(needs_sum[None, :], from_sum, from_y)
        dz = rowwise.normalize_gradient(dy * weight[None, :], xhat, rstd, H)
        tl.store(dresidual_ptr + offset, dz.to(dresidual_ptr.dtype.element_ty), mask)
        if THRESHOLD < 256:
            number = tl.load(rows_ptr + row, row < R, other=0) if HAS_ROWS else row
            keep = keep_columns(number, 0, plane, site, key0, key1, THRESHOLD, BLOCK_H // 128)
            dz = tl.where(keep, dz * (256 / THRESHOLD), 0.0)
            tl.store(dx_ptr + offset, dz.to(dx_ptr.dtype.element_ty), mask)
        dbias = rowwise.add_rows(dbias, dz)
        dweight = rowwise.add_rows(dweight, dy * xhat)
        dbeta = rowwise.add_rows(dbeta, dy)

    rowwise.store_sums(partials_ptr, column, (dbias, dweight, dbeta), 3, H)


@torch.library.custom_op("fastbert::dropout_add_layer_norm", mutates_args=())
def _forward(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    beta: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor,
    stream: int,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # y, z, mean, rstd
    R, H = x.shape
    y, z = torch.empty_like(x), torch.empty_like(x)
    tensors = (x, bias, residual, weight, beta, seed, seed if rows is None else rows, y, z)
    numbers = (R, stream, eps, keep_threshold(dropout_p), rows is not None)
    return y, z, *rowwise.launch_forward(_forward_kernel, tensors, numbers, H)


@_forward.register_fake
def _(x, bias, residual, weight, beta, eps, dropout_p, seed, stream, rows):
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), statistics, torch.empty_like(statistics)


@torch.library.custom_op("fastbert::dropout_add_layer_norm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    beta: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor,
    stream: int,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # dx (empty without dropout), dresidual, (3, H) parameters
    R, H = z.shape
    threshold = keep_threshold(dropout_p)
    dx = torch.empty(R if threshold < 256 else 0, H, dtype=z.dtype, device=z.device)
    dresidual = torch.empty_like(z)
    tensors = (
        dy, y, z, weight, beta, mean, rstd, seed, seed if rows is None else rows, dx, dresidual
    )  # fmt: skip
    numbers = (R, stream, threshold, rows is not None)
    limits = _backward_limits(z.dtype)
    sums = rowwise.launch_backward(_backward_kernel, tensors, numbers, H, 3, weight.dtype, *limits)
    return dx, dresidual, sums


@_backward.register_fake
def _(dy, y, z, weight, beta, mean, rstd, dropout_p, seed, stream, rows):
    R, H = z.shape
    dx = z.new_empty(R if keep_threshold(dropout_p) < 256 else 0, H)
    return dx, torch.empty_like(z), weight.new_empty(3, H)


def _save(ctx, inputs, output):
    _, _, _, weight, beta, _, ctx.dropout_p, seed, ctx.stream, rows = inputs
    y, z, mean, rstd = output
    ctx.set_materialize_grads(False)  # zeros for z: 100 MB, 33 us at 65,536 x 768 in bf16
    ctx.save_for_backward(y, z, weight, beta, mean, rstd, seed, rows)


def _gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    *saved, seed, rows = ctx.saved_tensors
    dx, dresidual, dparameters = _backward(
        dy.contiguous(), *saved, ctx.dropout_p, seed, ctx.stream, rows
    )
    if keep_threshold(ctx.dropout_p) == 256:
        dx = dresidual
    dbias, dweight, dbeta = dparameters.unbind(0)
    return dx, dbias, dresidual, dweight, dbeta, *(None,) * 5


_forward.register_autograd(_gradients, setup_context=_save)


def dropout_add_layer_norm(
    x: Tensor,  # (R, H)
    bias: Tensor,  # (H,)
    residual: Tensor,  # (R, H)
    weight: Tensor,  # (H,)
    beta: Tensor,  # (H,)
    eps: float,
    dropout_p: float,
    seed: Tensor,  # (3,) int64
    stream: int,
    *,
    rows: Tensor | None = None,  # (R,) int64
) -> Tensor:  # (R, H)
    """LayerNorm(dropout(x + bias) + residual).

    `rows` are the numbers of the rows of which these were chosen: they draw the same dropout.
    fp32, fp16 or bf16, statistics and sums in fp32. Parameters may be wider than x. H is a
    multiple of 8 up to 4096.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, or not contiguous.
    """
    op = "dropout_add_layer_norm"
    rowwise.require_rows(op, _forward_kernel, x, rowwise.MAX_WIDTH)
    checks.require_tensor(op, "residual", residual, tuple(x.shape), x.dtype, x.device)
    rowwise.require_parameters(op, x, bias=bias, weight=weight, beta=beta)
    checks.require_seed(op, seed, x.device, stream)
    if rows is not None:
        checks.require_tensor(op, "rows", rows, (x.shape[0],), torch.int64, x.device)
    if keep_threshold(dropout_p) == 256:
        rows = None
    out: Tensor = _forward(x, bias, residual, weight, beta, eps, dropout_p, seed, stream, rows)[0]
    return out


def compile_cases() -> list[CompileCase]:
    """Every kernel in every shipped configuration, for the compile report."""
    cases = []
    # Without dropout a kernel is a subset of the one with it: one width stands for all.
    kinds = [(torch.bfloat16, H, 0.1) for H in (128, 256, 384, 512, 768, 1024, 4096)]
    more = [(torch.bfloat16, 0.0), (torch.float16, 0.1), (torch.float32, 0.1)]
    every = [(*kind, False) for kind in [*kinds, *((dtype, 768, p) for dtype, p in more)]]
    every += [(torch.bfloat16, H, 0.1, True) for H in (768, 1024)]
    for dtype, H, dropout_p, has_rows in every:
        BLOCK_R, num_warps = rowwise.forward_config(H)
        BACK_R, SUM_R, back_warps = rowwise.backward_config(H)
        row = {
            "THRESHOLD": keep_threshold(dropout_p), "HAS_ROWS": has_rows, "H": H,
            "BLOCK_H": rowwise.block_width(H),
        }  # fmt: skip
        back = row | {"BLOCK_R": BACK_R, "SUM_R": SUM_R}
        registers = _backward_limits(dtype)[1]
        row |= {"BLOCK_R": BLOCK_R}
        for name, kernel, constexprs, warps, limit in (
            ("dropout_add_layer_norm", _forward_kernel, row, num_warps, None),
            ("dropout_add_layer_norm_backward", _backward_kernel, back, back_warps, registers),
        ):
            signature = checks.kernel_signature(kernel, constexprs, dtype, rows_ptr="*i64")
            label = f"{checks.triton_name(dtype)} H={H} p={dropout_p}" + " rows" * has_rows
            cases.append(
                CompileCase(name, label, kernel, signature, constexprs, warps, maxnreg=limit)
            )
    return cases
