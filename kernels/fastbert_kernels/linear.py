"""GELU(x Wᵀ + b) that keeps its pre-activation: the first linear layer of BERT's feed-forward.

R rows, H columns in, F columns out. Forward 2 R H F operations, backward twice that; at R = 65,536,
H = 768, F = 3,072 a forward is 309 GFLOP, 0.39 ms at 800 TFLOP/s. Bytes in bf16: x 101 MB, W 5 MB,
output and pre-activation 403 MB each, 0.30 ms at 3.0 TB/s. "triton" adds bias and GELU to the
product while it is in registers; "cublas" stores the bare product and reads it again for
`bias_gelu`, 0.27 ms more. The backward is one for both: GELU's and the bias's gradient from the
pre-activation (0.40 ms), then two products by cuBLAS.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels.checks import (
    STORAGE_DTYPES,
    kernel_signature,
    require,
    require_launchable,
    require_tensor,
    triton_name,
)
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.gelu import bias_gelu, gelu, gelu_backward
from fastbert_kernels.reduce import multiprocessors
from fastbert_kernels.triton_import import TensorDescriptor, tl, triton

BACKENDS = ("auto", "triton", "cublas")
AUTO = "cublas"  # neither has been timed on a GPU: a measured winner belongs here

# A multiprocessor holds two programs: the GELU of one (about 18 instructions an element, 0.12 ms of
# the whole at H = 768) can run beside the matrix units' work for the other.
_PROGRAMS = 2


@dataclass(frozen=True)
class Tiles:
    """How the product is cut, warps of a program, pipelining depth, and TMA or pointers."""

    block_r: int
    block_f: int
    block_h: int
    num_warps: int
    num_stages: int
    tma: bool


# (compute capability, half precision?): none spills, and two programs fit on a multiprocessor by
# registers and shared memory, with Triton 3.6 and 3.7.
TILES = {
    (90, True): Tiles(128, 128, 64, 8, 3, True),
    (90, False): Tiles(128, 64, 16, 8, 3, False),
    (80, True): Tiles(128, 128, 32, 4, 4, False),
    (80, False): Tiles(128, 64, 16, 8, 3, False),
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
        source += row.to(tl.int64) * COLUMNS  # what is left fits in 32 bits
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
        # By halves, 16 KB of shared memory carry the results out: with 32 KB one program fits.
        left, right = tl.split(tl.reshape(product, (BLOCK_R, 2, HALF)).permute(0, 2, 1))
        _finish(left, bias_ptr, pre, y, row, column, R, F, TANH, BLOCK_R, HALF, TMA)
        _finish(right, bias_ptr, pre, y, row, column + HALF, R, F, TANH, BLOCK_R, HALF, TMA)


def _tiles(device: torch.device, dtype: torch.dtype) -> Tiles:
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    return TILES[90 if hopper else 80, dtype != torch.float32]


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
        require(aligned, f"linear_gelu: {name} does not start at a multiple of 16 bytes")
    tiles = _tiles(x.device, x.dtype)

    def argument(tensor: Tensor, rows: int, columns: int) -> Any:
        return TensorDescriptor.from_tensor(tensor, [rows, columns]) if tiles.tma else tensor

    if R:
        count = triton.cdiv(R, tiles.block_r) * triton.cdiv(F, tiles.block_f)
        _linear_gelu_kernel[(min(count, _PROGRAMS * multiprocessors(x.device)),)](
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
    require_launchable(op, _linear_gelu_kernel, x.device)
    require_tensor(op, "x", x, (None, None), STORAGE_DTYPES, x.device)
    require_tensor(op, "weight", weight, (None, x.shape[1]), x.dtype, x.device)
    require_tensor(op, "bias", bias, (weight.shape[0],), x.dtype, x.device)
    if any(size % 8 or size == 0 for size in weight.shape):
        raise ValueError(f"{op}: weight is {tuple(weight.shape)}, expected multiples of 8")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate = {approximate!r}, expected 'none' or 'tanh'")
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend = {backend!r}, expected one of {', '.join(BACKENDS)}")
    backend = AUTO if backend == "auto" else backend
    y: Tensor = _linear_gelu(x, weight, bias, approximate, backend)[0]
    return y


def compile_cases() -> list[CompileCase]:
    """The kernel in every shipped configuration, for the compile report."""
    kinds = [(dtype, "none") for dtype in STORAGE_DTYPES] + [(torch.bfloat16, "tanh")]
    return [
        _case(dtype, approximate, arch, tiles)
        for dtype, approximate in kinds
        for (arch, half), tiles in TILES.items()
        if half == (dtype != torch.float32)
    ]


def _case(dtype: torch.dtype, approximate: str, arch: int, tiles: Tiles) -> CompileCase:
    t = triton_name(dtype)

    def argument(rows: int, columns: int) -> str:
        return f"tensordesc<{t}[{rows},{columns}]>" if tiles.tma else f"*{t}"

    out = argument(tiles.block_r, tiles.block_f // 2)
    constexprs = {
        "TANH": approximate == "tanh", "BLOCK_R": tiles.block_r, "BLOCK_F": tiles.block_f,
        "BLOCK_H": tiles.block_h, "TMA": tiles.tma,
    }  # fmt: skip
    return CompileCase(
        name="linear_gelu",
        configuration=f"{t} {approximate}",
        fn=_linear_gelu_kernel,
        signature=kernel_signature(
            _linear_gelu_kernel, constexprs, dtype,
            x=argument(tiles.block_r, tiles.block_h),
            weight=argument(tiles.block_f, tiles.block_h), pre=out, y=out,
        ),
        constexprs=constexprs,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        needs_wgmma=tiles.tma,
        divisible_by_16=("F_EIGHTHS",),
        archs=(arch,),
    )  # fmt: skip
