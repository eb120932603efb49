"""GELU beside the products of BERT's feed-forward, in the kernels that multiply.

`linear_gelu`: GELU(x Wᵀ + b), which keeps its pre-activation. `gelu_linear_backward`: through the
second product of the feed-forward and GELU, to the pre-activation and the bias. `feed_forward`: all
of it, with both.

R rows, H columns in, F columns out. A product is 2 R H F operations; at R = 65,536, H = 768,
F = 3,072 309 GFLOP, 0.39 ms at 800 TFLOP/s. Bytes in bf16: x 101 MB, W 5 MB, output and
pre-activation 403 MB each, 0.30 ms at 3.0 TB/s, in both directions. "triton" works on the product
while it is in registers; "cublas" stores it, and `bias_gelu` (0.27 ms) or `gelu_backward` (0.40 ms)
reads it again. kernels/README.md says what that should bring.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels import checks
from fastbert_kernels.checks import capability
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.gelu import bias_gelu, gelu, gelu_backward, gelu_slope
from fastbert_kernels.main_grad import main_grad_of, plus_product
from fastbert_kernels.reduce import multiprocessors, reduce_rows
from fastbert_kernels.triton_import import TensorDescriptor, tl, triton

BACKENDS = ("auto", "triton", "cublas")
AUTO = "cublas"  # neither has been timed on a GPU: a measured winner belongs here


@dataclass(frozen=True)
class Tiles:
    """How the product is cut, warps of a program, pipelining depth, TMA or pointers, programs that
    a multiprocessor holds."""

    block_r: int
    block_f: int
    block_h: int
    num_warps: int
    num_stages: int
    tma: bool
    programs: int


# (compute capability, half precision?), for both directions: none spills in the loop, with Triton
# 3.6 to 3.9. An H100's L2 feeds 128 x 128 tiles with 474 TFLOP/s at most, 128 x 256 with 632, but
# then a program is alone, and the matrix units wait while it does GELU (4,500 of 23,000 cycles at
# H = 768). Elsewhere one of two programs does it beside the other's products.
TILES = {
    (90, True): Tiles(128, 256, 64, 8, 3, True, 1),
    (90, False): Tiles(128, 64, 16, 8, 3, False, 2),
    (80, True): Tiles(128, 128, 32, 4, 4, False, 2),
    (80, False): Tiles(128, 64, 16, 8, 3, False, 2),
}


@triton.jit
def _load_tile(
    source,  # (ROWS, COLUMNS): descriptor or pointer
    row,
    column,
    ROWS,
    COLUMNS,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TMA: tl.constexpr,
):
    """Zeros beyond the last column; rows beyond the last one are of no use to anyone."""
    if TMA:
        return source.load([row, column])
    else:
        source += tl.cast(row, tl.int64) * COLUMNS  # what is left fits in 32 bits
        r = tl.minimum(tl.arange(0, BLOCK_R), ROWS - 1 - row)
        c = column + tl.arange(0, BLOCK_C)
        address = source + r[:, None] * COLUMNS + c[None, :]
        return tl.load(address, (c < COLUMNS)[None, :], other=0.0)


@triton.jit
def _store_tile(
    out,  # (ROWS, COLUMNS): descriptor or pointer
    tile,
    row,
    column,
    ROWS,
    COLUMNS,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TMA: tl.constexpr,
):
    if TMA:
        out.store([row, column], tile)
    else:
        out += row.to(tl.int64) * COLUMNS
        r = tl.arange(0, BLOCK_R)
        c = column + tl.arange(0, BLOCK_C)
        mask = (r < ROWS - row)[:, None] & (c < COLUMNS)[None, :]
        tl.store(out + r[:, None] * COLUMNS + c[None, :], tile, mask)


@triton.jit
def _finish(
    product,  # (BLOCK_R, BLOCK_C) fp32
    bias_ptr,  # (F,)
    pre,  # (R, F)
    y,  # (R, F)
    row,
    column,
    R,
    F,
    TANH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TMA: tl.constexpr,
):
    c = column + tl.arange(0, BLOCK_C)
    total = product + tl.load(bias_ptr + c, c < F, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = bias_ptr.dtype.element_ty
    _store_tile(pre, total.to(dtype), row, column, R, F, BLOCK_R, BLOCK_C, TMA)
    _store_tile(y, gelu(total, TANH).to(dtype), row, column, R, F, BLOCK_R, BLOCK_C, TMA)


@triton.jit
def _halves(tile):  # (ROWS, COLUMNS) -> two of (ROWS, COLUMNS / 2)
    HALF: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.reshape(tile, (tile.shape[0], 2, HALF)).permute(0, 2, 1))


@triton.jit(do_not_specialize=["R", "H_EIGHTHS"])
def _linear_gelu_kernel(
    x,  # (R, H): descriptor of (BLOCK_R, BLOCK_H) tiles, or pointer where not TMA
    weight,  # (F, H): (BLOCK_F, BLOCK_H)
    bias_ptr,  # (F,)
    pre,  # (R, F): (BLOCK_R, BLOCK_F / 2)
    y,  # (R, F): (BLOCK_R, BLOCK_F / 2)
    R,
    F_EIGHTHS,  # so that the compiler knows rows to start at 16 bytes
    H_EIGHTHS,
    TANH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TMA: tl.constexpr,
):
    """Columns go fastest: W (8 MB in BERT-large) stays in L2, and x is read once."""
    F = F_EIGHTHS * 8
    H = H_EIGHTHS * 8
    HALF: tl.constexpr = BLOCK_F // 2
    blocks = tl.cdiv(F, BLOCK_F)
    for tile in tl.range(tl.program_id(0), tl.cdiv(R, BLOCK_R) * blocks, tl.num_programs(0)):
        row = (tile // blocks) * BLOCK_R
        column = (tile % blocks) * BLOCK_F
        product = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
        for h in tl.range(0, H, BLOCK_H):
            a = _load_tile(x, row, h, R, H, BLOCK_R, BLOCK_H, TMA)
            b = _load_tile(weight, column, h, F, H, BLOCK_F, BLOCK_H, TMA)
            product = tl.dot(a, b.T, product, input_precision="ieee")
        # By halves, 32 KB of shared memory carry the results out: with 64 KB they would not fit.
        left, right = _halves(product)
        _finish(left, bias_ptr, pre, y, row, column, R, F, TANH, BLOCK_R, HALF, TMA)
        _finish(right, bias_ptr, pre, y, row, column + HALF, R, F, TANH, BLOCK_R, HALF, TMA)


@triton.jit
def _finish_backward(
    product,  # (BLOCK_R, BLOCK_C) fp32
    x,  # (BLOCK_R, BLOCK_C)
    bias_ptr,  # (F,)
    dx,  # (R, F)
    partials_ptr,  # (cdiv(R, BLOCK_R), F) fp32
    row,
    column,
    R,
    F,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TMA: tl.constexpr,
):
    c = column + tl.arange(0, BLOCK_C)
    x = x.to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + c, c < F, other=0.0).to(tl.float32)[None, :]
    _, slope = gelu_slope(x, False)
    gradient = product * slope
    dtype: tl.constexpr = bias_ptr.dtype.element_ty
    _store_tile(dx, gradient.to(dtype), row, column, R, F, BLOCK_R, BLOCK_C, TMA)
    inside = (tl.arange(0, BLOCK_R) < R - row)[:, None]
    partials_ptr += (row // BLOCK_R).to(tl.int64) * F
    tl.store(partials_ptr + c, tl.sum(tl.where(inside, gradient, 0.0), axis=0), c < F)


@triton.jit(do_not_specialize=["R", "H_EIGHTHS"])
def _gelu_linear_backward_kernel(
    dy,  # (R, H): descriptor of (BLOCK_R, BLOCK_H) tiles, or pointer where not TMA
    weight,  # (H, F): (BLOCK_H, BLOCK_F)
    x_ptr,  # (R, F)
    bias_ptr,  # (F,), or any pointer to its dtype: x then holds the sum already
    dx,  # (R, F): (BLOCK_R, BLOCK_F / 4)
    partials_ptr,  # (cdiv(R, BLOCK_R), F) fp32: of dbias
    R,
    F_EIGHTHS,
    H_EIGHTHS,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TMA: tl.constexpr,
):
    """Every tile has a row of partial sums of its own: no atomics, and a fixed order."""
    F = F_EIGHTHS * 8
    H = H_EIGHTHS * 8
    PART: tl.constexpr = BLOCK_F // 4
    blocks = tl.cdiv(F, BLOCK_F)
    for tile in tl.range(tl.program_id(0), tl.cdiv(R, BLOCK_R) * blocks, tl.num_programs(0)):
        row = (tile // blocks) * BLOCK_R
        column = (tile % blocks) * BLOCK_F
        # Where a program is alone, a part of x is on its way while it works on the one before, the
        # first while it multiplies: all of x at once would spill.
        if TMA:
            ahead = _load_tile(x_ptr, row, column, R, F, BLOCK_R, PART, False)
        product = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
        for h in tl.range(0, H, BLOCK_H):
            a = _load_tile(dy, row, h, R, H, BLOCK_R, BLOCK_H, TMA)
            b = _load_tile(weight, h, column, H, F, BLOCK_H, BLOCK_F, TMA)
            product = tl.dot(a, b, product, input_precision="ieee")
        left, right = _halves(product)
        p0, p1 = _halves(left)
        p2, p3 = _halves(right)
        parts = (p0, p1, p2, p3)
        for i in tl.static_range(4):
            c = column + i * PART
            if not TMA:
                x = _load_tile(x_ptr, row, c, R, F, BLOCK_R, PART, False)
            else:
                x = ahead
                if i < 3:
                    ahead = _load_tile(x_ptr, row, c + PART, R, F, BLOCK_R, PART, False)
            _finish_backward(
                parts[i], x, bias_ptr, dx, partials_ptr, row, c, R, F,
                HAS_BIAS, BLOCK_R, PART, TMA,
            )  # fmt: skip


def _tiles(device: torch.device, dtype: torch.dtype) -> Tiles:
    return TILES[90 if capability(device) >= 90 else 80, dtype != torch.float32]


@torch.library.custom_op("fastbert::linear_gelu", mutates_args=())
def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, approximate: str, backend: str
) -> tuple[Tensor, Tensor]:  # y; pre-activation, for "cublas" without bias
    if backend == "cublas":
        product = x @ weight.t()
        return bias_gelu(product, bias, approximate), product
    (R, H), F = x.shape, weight.shape[0]
    y, pre = (torch.empty(R, F, dtype=x.dtype, device=x.device) for _ in range(2))
    for name, tensor in (("x", x), ("weight", weight)):
        aligned = tensor.data_ptr() % 16 == 0
        checks.require(aligned, f"linear_gelu: {name} does not start at a multiple of 16 bytes")
    tiles = _tiles(x.device, x.dtype)

    def argument(tensor: Tensor, rows: int, columns: int) -> Any:
        return TensorDescriptor.from_tensor(tensor, [rows, columns]) if tiles.tma else tensor

    if R:
        count = triton.cdiv(R, tiles.block_r) * triton.cdiv(F, tiles.block_f)
        _linear_gelu_kernel[(min(count, tiles.programs * multiprocessors(x.device)),)](
            argument(x, tiles.block_r, tiles.block_h),
            argument(weight, tiles.block_f, tiles.block_h),
            bias,
            argument(pre, tiles.block_r, tiles.block_f // 2),
            argument(y, tiles.block_r, tiles.block_f // 2),
            R, F // 8, H // 8, approximate == "tanh",
            tiles.block_r, tiles.block_f, tiles.block_h, tiles.tma,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return y, pre


@_linear_gelu.register_fake
def _(x, weight, bias, approximate, backend):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y)


@torch.library.custom_op("fastbert::linear_gelu_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor, Tensor]:
    dpre, dbias = gelu_backward(dy, pre, bias, approximate)
    return dpre @ weight, dpre.t() @ x, dbias


@_backward.register_fake
def _(dy, x, weight, pre, bias, approximate):
    return torch.empty_like(x), torch.empty_like(weight), x.new_empty(weight.shape[0])


def _save(ctx, inputs, output):
    x, weight, bias, ctx.approximate, backend = inputs
    ctx.set_materialize_grads(False)  # zeros for the pre-activation would be 403 MB
    ctx.save_for_backward(x, weight, output[1], bias if backend == "cublas" else None)


def _gradients(ctx, dy, _):
    if dy is None:
        return (None,) * 5
    return *_backward(dy.contiguous(), *ctx.saved_tensors, ctx.approximate), None, None


_linear_gelu.register_autograd(_gradients, setup_context=_save)


def _chosen(op: str, weight: Tensor, approximate: str, backend: str) -> str:
    """The backend, after what both ops refuse."""
    if any(size % 8 or size == 0 for size in weight.shape):
        raise ValueError(f"{op}: weight is {tuple(weight.shape)}, expected multiples of 8")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate = {approximate!r}, expected 'none' or 'tanh'")
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend = {backend!r}, expected one of {', '.join(BACKENDS)}")
    return AUTO if backend == "auto" else backend


def linear_gelu(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (F, H)
    bias: Tensor,  # (F,)
    approximate: str = "none",
    *,
    backend: str = "auto",
) -> Tensor:  # (R, F)
    """GELU(x Wᵀ + b): exact, or by tanh for the models trained so. H and F are multiples of 8.

    All tensors share one dtype; products are summed in fp32. `backend` "triton" is one kernel,
    "cublas" a product of cuBLAS and `bias_gelu`. "auto" is "cublas": neither has been timed on a
    GPU yet.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, not contiguous or, for "triton",
            not aligned to 16 bytes; an unknown backend or approximation; no GPU.
    """
    op = "linear_gelu"
    checks.require_launchable(op, _linear_gelu_kernel, x.device)
    checks.require_tensor(op, "x", x, (None, None), checks.STORAGE_DTYPES, x.device)
    checks.require_tensor(op, "weight", weight, (None, x.shape[1]), x.dtype, x.device)
    checks.require_tensor(op, "bias", bias, (weight.shape[0],), x.dtype, x.device)
    backend = _chosen(op, weight, approximate, backend)
    y: Tensor = _linear_gelu(x, weight, bias, approximate, backend)[0]
    return y


# gelu_linear


@torch.library.custom_op("fastbert::gelu_linear_backward", mutates_args=())
def _gelu_linear_backward(
    dy: Tensor, weight: Tensor, x: Tensor, bias: Tensor | None, approximate: str, backend: str
) -> tuple[Tensor, Tensor]:  # dx, dbias
    if backend == "cublas":
        return gelu_backward(dy @ weight, x, bias, approximate)
    (R, H), F = dy.shape, x.shape[1]
    for name, tensor in (("dy", dy), ("weight", weight)):
        aligned = tensor.data_ptr() % 16 == 0
        why = f"gelu_linear_backward: {name} does not start at a multiple of 16 bytes"
        checks.require(aligned, why)
    tiles, dx = _tiles(x.device, x.dtype), torch.empty_like(x)

    def argument(tensor: Tensor, rows: int, columns: int) -> Any:
        return TensorDescriptor.from_tensor(tensor, [rows, columns]) if tiles.tma else tensor

    blocks = triton.cdiv(R, tiles.block_r)
    partials = torch.empty(blocks, F, dtype=torch.float32, device=x.device)
    if R:
        count = blocks * triton.cdiv(F, tiles.block_f)
        _gelu_linear_backward_kernel[(min(count, tiles.programs * multiprocessors(x.device)),)](
            argument(dy, tiles.block_r, tiles.block_h),
            argument(weight, tiles.block_h, tiles.block_f),
            x,
            x if bias is None else bias,
            argument(dx, tiles.block_r, tiles.block_f // 4),
            partials,
            R, F // 8, H // 8, bias is not None,
            tiles.block_r, tiles.block_f, tiles.block_h, tiles.tma,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return dx, reduce_rows(partials, x.dtype)


@_gelu_linear_backward.register_fake
def _(dy, weight, x, bias, approximate, backend):
    return torch.empty_like(x), x.new_empty(x.shape[1])


def gelu_linear_backward(
    dy: Tensor,  # (R, H)
    weight: Tensor,  # (H, F)
    x: Tensor,  # (R, F) before the bias, or the whole pre-activation where bias is None
    bias: Tensor | None,  # (F,)
    approximate: str = "none",
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # dx (R, F), dbias (F,)
    """Gradients of GELU(x + bias) Wᵀ by x and bias. H and F are multiples of 8.

    All tensors share one dtype. `backend` "triton" is one kernel and a sum over rows, for the exact
    GELU; "cublas" a product and `gelu_backward`, which write and read 4 F bytes a token more in
    bf16. "auto" is "cublas": neither has been timed on a GPU yet.

    Raises:
        ValueError: as `linear_gelu`; "triton" where `approximate` is "tanh".
    """
    op = "gelu_linear_backward"
    checks.require_launchable(
        op, _gelu_linear_backward_kernel, dy.device, "reference.gelu_linear and autograd"
    )
    checks.require_tensor(op, "x", x, (None, None), checks.STORAGE_DTYPES, dy.device)
    F = x.shape[1]
    checks.require_tensor(op, "weight", weight, (None, F), x.dtype, x.device)
    checks.require_tensor(op, "dy", dy, (x.shape[0], weight.shape[0]), x.dtype, x.device)
    if bias is not None:
        checks.require_tensor(op, "bias", bias, (F,), x.dtype, x.device)
    backend = _chosen(op, weight, approximate, backend)
    if backend == "triton" and approximate == "tanh":  # with Triton 3.9 it spills
        raise ValueError(f"{op}: backend = 'triton' takes approximate = 'none', not 'tanh'")
    dx, dbias = _gelu_linear_backward(dy, weight, x, bias, approximate, backend)
    return dx, dbias


class _FeedForward(torch.autograd.Function):
    """(GELU(x Uᵀ + b) Dᵀ, x); as in `main_grad`, a product adds the second's gradient."""

    @staticmethod
    def forward(ctx, x, up, bias, down, up_grad, down_grad):
        y, pre = _linear_gelu(x, up, bias, "none", "triton")
        ctx.save_for_backward(x, up, down, y, pre)
        ctx.set_materialize_grads(False)
        ctx.main_grads = up_grad, down_grad
        return y @ down.t(), x

    @staticmethod
    def backward(ctx, dout, dresidual):
        if dout is None:
            return dresidual, *(None,) * 5
        x, up, down, y, pre = ctx.saved_tensors
        up_grad, down_grad = ctx.main_grads
        dout = dout.contiguous()
        down_grad.add_product(dout, y)
        dpre, dbias = gelu_linear_backward(dout, down, pre, None, backend="triton")
        up_grad.add_product(dpre, x)
        dx = dpre @ up if dresidual is None else plus_product(dresidual, dpre, up)
        return dx, None, dbias, *(None,) * 3


def feed_forward(
    x: Tensor,  # (R, H)
    up: Tensor,  # (F, H)
    bias: Tensor,  # (F,)
    down: Tensor,  # (H, F)
    approximate: str = "none",
) -> tuple[Tensor, Tensor]:  # (R, H), (R, H)
    """GELU(x Uᵀ + b) Dᵀ with GELU inside the products, both ways; and x as from `linear_residual`.

    Without `main_grad` the backward is `linear_gelu`'s.

    Raises:
        ValueError: as `linear_gelu`; `approximate` is "tanh".
    """
    why = f"feed_forward: approximate = {approximate!r}, expected 'none'"
    checks.require(approximate == "none", why)
    main_grads = main_grad_of(up), main_grad_of(down)
    if None in main_grads:
        return linear_gelu(x, up, bias, backend="triton") @ down.t(), x
    checks.require_launchable("feed_forward", _linear_gelu_kernel, x.device)
    product, residual = _FeedForward.apply(x, up, bias, down, *main_grads)
    return product, residual


def compile_cases() -> list[CompileCase]:
    """Both kernels in every shipped configuration, for the compile report."""
    kinds = [(dtype, "none") for dtype in checks.STORAGE_DTYPES] + [(torch.bfloat16, "tanh")]
    return [
        _case(backward, dtype, approximate, arch, tiles)
        for backward in (False, True)
        for dtype, approximate in kinds
        for (arch, half), tiles in TILES.items()
        if half == (dtype != torch.float32) and not (backward and approximate == "tanh")
    ]


def _case(
    backward: bool, dtype: torch.dtype, approximate: str, arch: int, tiles: Tiles
) -> CompileCase:
    t = checks.triton_name(dtype)

    def argument(rows: int, columns: int) -> str:
        return f"tensordesc<{t}[{rows},{columns}]>" if tiles.tma else f"*{t}"

    R, F, H = tiles.block_r, tiles.block_f, tiles.block_h
    constexprs = {"BLOCK_R": R, "BLOCK_F": F, "BLOCK_H": H, "TMA": tiles.tma}
    if backward:
        name, kernel = "gelu_linear_backward", _gelu_linear_backward_kernel
        constexprs |= {"HAS_BIAS": True}
        tensors = {"dy": argument(R, H), "weight": argument(H, F), "dx": argument(R, F // 4)}
    else:
        name, kernel = "linear_gelu", _linear_gelu_kernel
        constexprs |= {"TANH": approximate == "tanh"}
        out = argument(R, F // 2)
        tensors = {"x": argument(R, H), "weight": argument(F, H), "pre": out, "y": out}
    return CompileCase(
        name=name,
        configuration=f"{t} {approximate}",
        fn=kernel,
        signature=checks.kernel_signature(kernel, constexprs, dtype, **tensors),
        constexprs=constexprs,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        needs_wgmma=tiles.tma,
        divisible_by_16=("F_EIGHTHS",),
        archs=(arch,),
    )  # fmt: skip
