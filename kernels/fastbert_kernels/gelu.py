"""GELU(x + bias), and LayerNorm of it, in one pass each way; Hendrycks & Gimpel 2016.

R rows, H columns, P partial sums. Bound by memory. Bytes an element in bf16: forward 4 (reads x,
writes y), backward 6 (reads dy, x; writes dx), for `bias_gelu` and `gelu_layer_norm` alike: x is
what the layer before left behind, so nothing else of that size is saved. At 65,536 x 3,072 and
3.0 TB/s that is a floor of 0.27 and 0.40 ms.
"""

import math

import torch
from torch import Tensor

from fastbert_kernels import rowwise
from fastbert_kernels.checks import kernel_signature, require_tensor
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.reduce import multiprocessors, reduce_rows
from fastbert_kernels.triton_import import tl, triton

# Tiles of `bias_gelu`: 256 columns divide every BERT's widths; a warp takes them in one load of 16
# bytes a thread, and has as many loads in flight as rows.
BLOCK_C = 256
FORWARD_R, BACKWARD_R, SUM_R, NUM_WARPS = 16, 8, 4, 4
BACKWARD_PROGRAMS = 8  # a multiprocessor: what fits at 64 registers a thread

_RSQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
_SQRT_8_PI = tl.constexpr(math.sqrt(8 / math.pi))
_HALF_LOG2_E = tl.constexpr(0.5 / math.log(2))


@triton.jit
def _upper_tail(x):
    """1 - Φ(|x|) in fp32: exp2 of a polynomial, exactly 1/2 at 0.

    The coefficients are a minimax fit of log2(1 - Φ), weighted by what the error does to GELU:
    1.1e-8 at most, a sixth of fp32's rounding at 1. Bytes leave 38 instructions an element on an
    H100 in the forward; the library's erf alone brought that kernel to 38.
    """
    x = tl.abs(x)
    p = -2.0762909116456285e-06 * x + 3.041225681954529e-05
    p = p * x - 0.00014429974544327706
    p = p * x - 0.00023586131283082068
    p = p * x + 0.00718868151307106
    p = p * x - 0.052578847855329514
    p = p * x - 0.45918309688568115
    p = p * x - 1.151107668876648
    return tl.exp2(p * x - 1.0)


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """GELU of fp32 values."""
    if TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u), and needs no libdevice
        return x * tl.sigmoid(x * _SQRT_8_PI * (1.0 + 0.044715 * x * x))
    return tl.maximum(x, 0.0) - tl.abs(x) * _upper_tail(x)


@triton.jit
def gelu_slope(x, TANH: tl.constexpr):
    """(GELU, its derivative) of fp32 values."""
    if TANH:
        share = tl.sigmoid(x * _SQRT_8_PI * (1.0 + 0.044715 * x * x))
        inner = x * _SQRT_8_PI * (1.0 + 3 * 0.044715 * x * x)
        return x * share, share + share * (1.0 - share) * inner
    tail = _upper_tail(x)
    share = tl.where(x >= 0.0, 1.0 - tail, tail)
    return x * share, share + x * _RSQRT_2PI * tl.exp2(x * x * -_HALF_LOG2_E)


@triton.jit(do_not_specialize=["R"])
def _bias_gelu_kernel(
    x_ptr,  # (R, H)
    bias_ptr,  # (H,)
    y_ptr,  # (R, H)
    R,
    H,
    TANH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(H, BLOCK_C)  # neighbours in a row run side by side
    row = (tl.program_id(0) // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask, offset = rowwise.tile_at(row, column, R, H)
    x = tl.load(x_ptr + offset, mask, other=0.0).to(tl.float32)
    bias = rowwise.load_parameter(bias_ptr, column, H)
    tl.store(y_ptr + offset, gelu(x + bias[None, :], TANH).to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["R"])
def _gelu_backward_kernel(
    dy_ptr,  # (R, H)
    x_ptr,  # (R, H)
    bias_ptr,  # (H,), or any pointer: x then holds the sum already
    dx_ptr,  # (R, H)
    partials_ptr,  # (P, H) fp32: of dbias
    R,
    H,
    HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dbias = tl.zeros((SUM_R, BLOCK_C), tl.float32)
    if HAS_BIAS:
        bias = rowwise.load_parameter(bias_ptr, column, H)
    blocks = tl.cdiv(R, BLOCK_R)
    for block in tl.range(tl.program_id(1), blocks, tl.num_programs(1), num_stages=2):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask, offset = rowwise.tile_at(row, column, R, H)
        dy = tl.load(dy_ptr + offset, mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offset, mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias[None, :]
        _, slope = gelu_slope(x, TANH)
        dx = dy * slope
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask)
        dbias = rowwise.add_rows(dbias, dx)
    partials_ptr += tl.program_id(1).to(tl.int64) * H + column
    tl.store(partials_ptr, tl.sum(dbias, axis=0), column < H)


@triton.jit(do_not_specialize=["R"])
def _gelu_layer_norm_kernel(
    x_ptr,  # (R, H)
    bias_ptr,  # (H,)
    weight_ptr,  # (H,)
    beta_ptr,  # (H,)
    y_ptr,  # (R, H)
    mean_ptr,  # (R,) fp32
    rstd_ptr,  # (R,) fp32
    R,
    eps,
    TANH: tl.constexpr,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_H)
    mask, offset = rowwise.tile_at(row, column, R, H)
    x = tl.load(x_ptr + offset, mask, other=0.0).to(tl.float32)
    bias = rowwise.load_parameter(bias_ptr, column, H)
    weight = rowwise.load_parameter(weight_ptr, column, H)
    beta = rowwise.load_parameter(beta_ptr, column, H)
    mean, rstd, xhat = rowwise.normalize(gelu(x + bias[None, :], TANH), mask, eps, H)
    y = xhat * weight[None, :] + beta[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask)
    tl.store(mean_ptr + row, mean, row < R)
    tl.store(rstd_ptr + row, rstd, row < R)


@triton.jit(do_not_specialize=["R"])
def _gelu_layer_norm_backward_kernel(
    dy_ptr,  # (R, H)
    x_ptr,  # (R, H)
    bias_ptr,  # (H,)
    weight_ptr,  # (H,)
    mean_ptr,  # (R,) fp32
    rstd_ptr,  # (R,) fp32
    dx_ptr,  # (R, H)
    partials_ptr,  # (P, 3, H) fp32: of dbias, dweight, dbeta
    R,
    TANH: tl.constexpr,
    H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUM_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    column = tl.arange(0, BLOCK_H)
    bias = rowwise.load_parameter(bias_ptr, column, H)
    weight = rowwise.load_parameter(weight_ptr, column, H)
    dbias = tl.zeros((SUM_R, BLOCK_H), tl.float32)
    dweight = tl.zeros((SUM_R, BLOCK_H), tl.float32)
    dbeta = tl.zeros((SUM_R, BLOCK_H), tl.float32)
    blocks = tl.cdiv(R, BLOCK_R)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=2):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask, offset = rowwise.tile_at(row, column, R, H)
        dy = tl.load(dy_ptr + offset, mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offset, mask, other=0.0).to(tl.float32)
        mean, rstd = rowwise.load_statistics(mean_ptr, rstd_ptr, row, R)

        activated, slope = gelu_slope(x + bias[None, :], TANH)
        xhat = (activated - mean[:, None]) * rstd[:, None]
        dx = rowwise.normalize_gradient(dy * weight[None, :], xhat, rstd, H) * slope
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask)
        dbias = rowwise.add_rows(dbias, dx)
        dweight = rowwise.add_rows(dweight, dy * xhat)
        dbeta = rowwise.add_rows(dbeta, dy)

    rowwise.store_sums(partials_ptr, column, (dbias, dweight, dbeta), 3, H)


def _is_tanh(op: str, approximate: str) -> bool:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate = {approximate!r}, expected 'none' or 'tanh'")
    return approximate == "tanh"


# bias_gelu


@torch.library.custom_op("fastbert::bias_gelu", mutates_args=())
def _bias_gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    y = torch.empty_like(x)
    R, H = x.shape
    if R:
        _bias_gelu_kernel[(triton.cdiv(R, FORWARD_R) * triton.cdiv(H, BLOCK_C),)](
            x, bias, y, R, H, approximate == "tanh", FORWARD_R, BLOCK_C, num_warps=NUM_WARPS
        )
    return y


@_bias_gelu.register_fake
def _(x, bias, approximate):
    return torch.empty_like(x)


@torch.library.custom_op("fastbert::gelu_backward", mutates_args=())
def _gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str
) -> tuple[Tensor, Tensor]:
    R, H = x.shape
    dx = torch.empty_like(x)
    columns = triton.cdiv(H, BLOCK_C)
    programs = multiprocessors(x.device) * BACKWARD_PROGRAMS // columns
    programs = max(1, min(programs, triton.cdiv(R, BACKWARD_R)))
    partials = torch.empty(programs, H, dtype=torch.float32, device=x.device)
    like_bias = x if bias is None else bias
    _gelu_backward_kernel[(columns, programs)](
        dy, x, like_bias, dx, partials, R, H, bias is not None, approximate == "tanh",
        BACKWARD_R, SUM_R, BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dx, reduce_rows(partials, like_bias.dtype)


@_gelu_backward.register_fake
def _(dy, x, bias, approximate):
    return torch.empty_like(x), (x if bias is None else bias).new_empty(x.shape[1])


def _save_bias_gelu(ctx, inputs, output):
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _bias_gelu_gradients(ctx, dy):
    return *_gelu_backward(dy.contiguous(), *ctx.saved_tensors, ctx.approximate), None


_bias_gelu.register_autograd(_bias_gelu_gradients, setup_context=_save_bias_gelu)


def bias_gelu(
    x: Tensor,  # (R, H)
    bias: Tensor,  # (H,)
    approximate: str = "none",
) -> Tensor:  # (R, H)
    """GELU(x + bias): exact, or by tanh for the models trained so. H is a multiple of 8.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, or not contiguous.
    """
    op = "bias_gelu"
    rowwise.require_rows(op, _bias_gelu_kernel, x)
    rowwise.require_parameters(op, x, bias=bias)
    _is_tanh(op, approximate)
    out: Tensor = _bias_gelu(x, bias, approximate)
    return out


def gelu_backward(
    dy: Tensor,  # (R, H)
    x: Tensor,  # (R, H) before the bias, or the whole pre-activation where bias is None
    bias: Tensor | None,  # (H,)
    approximate: str = "none",
) -> tuple[Tensor, Tensor]:  # dx (R, H), dbias (H,)
    """Gradients of GELU(x + bias): for an op that keeps its own pre-activation.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, or not contiguous.
    """
    op = "gelu_backward"
    rowwise.require_rows(op, _gelu_backward_kernel, x, reference="reference.bias_gelu")
    if bias is not None:
        rowwise.require_parameters(op, x, bias=bias)
    require_tensor(op, "dy", dy, tuple(x.shape), x.dtype, x.device)
    _is_tanh(op, approximate)
    dx, dbias = _gelu_backward(dy, x, bias, approximate)
    return dx, dbias


# gelu_layer_norm


@torch.library.custom_op("fastbert::gelu_layer_norm", mutates_args=())
def _gelu_layer_norm(
    x: Tensor, bias: Tensor, weight: Tensor, beta: Tensor, eps: float, approximate: str
) -> tuple[Tensor, Tensor, Tensor]:  # y, mean, rstd
    R, H = x.shape
    y = torch.empty_like(x)
    tensors, numbers = (x, bias, weight, beta, y), (R, eps, approximate == "tanh")
    return y, *rowwise.launch_forward(_gelu_layer_norm_kernel, tensors, numbers, H)


@_gelu_layer_norm.register_fake
def _(x, bias, weight, beta, eps, approximate):
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


@torch.library.custom_op("fastbert::gelu_layer_norm_backward", mutates_args=())
def _gelu_layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    approximate: str,
) -> tuple[Tensor, Tensor]:  # dx, (3, H) of the parameters
    R, H = x.shape
    dx = torch.empty_like(x)
    tensors, numbers = (dy, x, bias, weight, mean, rstd, dx), (R, approximate == "tanh")
    kernel = _gelu_layer_norm_backward_kernel
    return dx, rowwise.launch_backward(kernel, tensors, numbers, H, 3, weight.dtype)


@_gelu_layer_norm_backward.register_fake
def _(dy, x, bias, weight, mean, rstd, approximate):
    return torch.empty_like(x), weight.new_empty(3, x.shape[1])


def _save_gelu_layer_norm(ctx, inputs, output):
    x, bias, weight, _, _, ctx.approximate = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, bias, weight, *output[1:])


def _gelu_layer_norm_gradients(ctx, dy, *_):
    if dy is None:
        return (None,) * 6
    dx, dparameters = _gelu_layer_norm_backward(
        dy.contiguous(), *ctx.saved_tensors, ctx.approximate
    )
    return dx, *dparameters.unbind(0), None, None


_gelu_layer_norm.register_autograd(_gelu_layer_norm_gradients, setup_context=_save_gelu_layer_norm)


def gelu_layer_norm(
    x: Tensor,  # (R, H)
    bias: Tensor,  # (H,)
    weight: Tensor,  # (H,)
    beta: Tensor,  # (H,)
    eps: float,
    approximate: str = "none",
) -> Tensor:  # (R, H)
    """LayerNorm(GELU(x + bias)): the transform of BERT's masked-word head.

    H is a multiple of 8 up to 4096.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, or not contiguous.
    """
    op = "gelu_layer_norm"
    rowwise.require_rows(op, _gelu_layer_norm_kernel, x, rowwise.MAX_WIDTH)
    rowwise.require_parameters(op, x, bias=bias, weight=weight, beta=beta)
    _is_tanh(op, approximate)
    out: Tensor = _gelu_layer_norm(x, bias, weight, beta, eps, approximate)[0]
    return out


def compile_cases() -> list[CompileCase]:
    """Every kernel in every shipped configuration, for the compile report."""
    kinds = []
    for approximate in ("none", "tanh"):
        tanh = {"TANH": approximate == "tanh", "BLOCK_C": BLOCK_C}
        back = tanh | {"HAS_BIAS": True, "BLOCK_R": BACKWARD_R, "SUM_R": SUM_R}
        kinds += [
            ("bias_gelu", _bias_gelu_kernel, approximate, tanh | {"BLOCK_R": FORWARD_R}, NUM_WARPS),
            ("gelu_backward", _gelu_backward_kernel, approximate, back, NUM_WARPS),
        ]
        for H in (128, 256, 384, 512, 768, 1024) if approximate == "none" else (768,):
            BLOCK_R, num_warps = rowwise.forward_config(H)
            BACK_R, sum_rows, back_warps = rowwise.backward_config(H)
            row = {"TANH": approximate == "tanh", "H": H, "BLOCK_H": rowwise.block_width(H)}
            back = row | {"BLOCK_R": BACK_R, "SUM_R": sum_rows}
            row |= {"BLOCK_R": BLOCK_R}
            label = f"{approximate} H={H}"
            kinds += [
                ("gelu_layer_norm", _gelu_layer_norm_kernel, label, row, num_warps),
                ("gelu_layer_norm_backward", _gelu_layer_norm_backward_kernel, label, back,
                 back_warps),
            ]  # fmt: skip
    return [
        CompileCase(
            name, f"bf16 {label}", kernel, kernel_signature(kernel, constexprs, torch.bfloat16),
            constexprs, num_warps, divisible_by_16=() if "H" in constexprs else ("H",),
        )
        for name, kernel, label, constexprs, num_warps in kinds
    ]  # fmt: skip
