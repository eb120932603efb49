"""AdamW and LAMB over flat buffers: unscale, clip, update, write back, without asking the host.

P elements of all parameters laid end to end; the equations are `reference_optimizer`'s. Learning
rate, step, scale and the decision to skip live in device memory, so one CUDA graph serves a run.

AdamW is three launches whatever the number of parameters: partial sums of g² (4 bytes an element
in fp32), one program that turns them into norm, clipping factor and bias corrections, and the
update (reads g, m, v, w, writes m, v, w and bf16 weights: 30 bytes). 34 bytes an element, 110 M
elements of BERT-base: a floor of 1.25 ms at 3.0 TB/s. LAMB cannot move a parameter before it knows
the norm of all its updates, so it reads m, v, w again (18 bytes with the writes): five launches, 46
bytes, 1.35 times AdamW's.

Sums go through per-program partial sums and a fixed order: the same bits every run.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.checks import require, require_launchable, require_tensor, triton_name
from fastbert_kernels.compile_cases import CompileCase

_GRAD_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# 4 elements a thread, 16 bytes of each fp32 buffer: with 8, Triton loads as the bf16 store wants it
# and sends m, v and w through shared memory before storing them.
_BLOCK, _NUM_WARPS = 1024, 8
_NORM_PROGRAMS, _NORM_BLOCK, _NORM_WARPS = 1024, 4096, 8  # 7 programs a multiprocessor
_LAMB_BLOCK = 4096  # 27,000 blocks in BERT-base, so partial norms are 0.02% of the bytes

# Places in the fp32 scalars that the finishing program leaves for the update.
_FINITE = tl.constexpr(0)  # 1 where the update is to be made
_FACTOR = tl.constexpr(1)  # what the gradient is multiplied with
_LR = tl.constexpr(2)
_STEP_SIZE = tl.constexpr(3)  # lr / (1 - beta1^t), for AdamW; 1 / (1 - beta1^t), for LAMB
_ROOT = tl.constexpr(4)  # sqrt(1 - beta2^t)
_SCALARS = 5


@triton.jit
def _square_sums_kernel(
    grad_ptr,  # (P,)
    partials_ptr,  # (programs,) fp32
    P,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Partial sums of g². An inf or a nan anywhere makes the sum inf or nan."""
    sums = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(first, P, stride):
        offsets = start + tl.arange(0, BLOCK)
        g = tl.load(grad_ptr + offsets, mask=offsets < P, other=0.0).to(tl.float32)
        sums += g * g
    tl.store(partials_ptr + tl.program_id(0), tl.sum(sums, 0))


@triton.jit
def _prepare_kernel(
    partials_ptr,  # (programs,) fp32
    lr_ptr,  # () fp32
    step_ptr,  # () int64
    skipped_ptr,  # () int64
    grad_scale_ptr,  # () fp32
    grad_norm_ptr,  # () fp32
    scalars_ptr,  # (_SCALARS,) fp32
    programs,
    MAX_GRAD_NORM: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    LR_IN_STEP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """One program: the norm, whether it is finite, and every scalar of the update."""
    cols = tl.arange(0, BLOCK)
    partials = tl.load(partials_ptr + cols, mask=cols < programs, other=0.0)
    scale = tl.load(grad_scale_ptr)
    norm = tl.sqrt_rn(tl.sum(partials, 0)) / scale
    finite = (norm == norm) & (norm < float("inf"))
    clip = 1.0
    if MAX_GRAD_NORM > 0:
        clip = tl.minimum(MAX_GRAD_NORM / (norm + 1e-6), 1.0)
    step = tl.load(step_ptr) + finite.to(tl.int64)
    # 1 - beta^t in fp64: 0.999 in fp32 would be wrong by 3e-5 of 1 - 0.999 at the first step.
    t = step.to(tl.float64)
    correction1 = (1.0 - tl.exp(t * LOG_BETA1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(t * LOG_BETA2)).to(tl.float32)
    lr = tl.load(lr_ptr)
    step_size = 1.0 / correction1
    if LR_IN_STEP_SIZE:
        step_size = lr / correction1
    tl.store(scalars_ptr + _FINITE, finite.to(tl.float32))
    tl.store(scalars_ptr + _FACTOR, clip / scale)
    tl.store(scalars_ptr + _LR, lr)
    tl.store(scalars_ptr + _STEP_SIZE, step_size)
    tl.store(scalars_ptr + _ROOT, tl.sqrt_rn(correction2))
    tl.store(grad_norm_ptr, norm)
    tl.store(step_ptr, step)
    tl.store(skipped_ptr, tl.load(skipped_ptr) + 1 - finite.to(tl.int64))


@triton.jit
def _moments(grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, offsets, inside, decay1, decay2):  # type: ignore[no-untyped-def]
    """Updates both moments and returns them; decay1 = 1 - beta1, decay2 = 1 - beta2."""
    g = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg_ptr + offsets, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq_ptr + offsets, mask=inside, other=0.0)
    g *= tl.load(scalars_ptr + _FACTOR)
    m += (g - m) * decay1
    v += (g * g - v) * decay2
    tl.store(exp_avg_ptr + offsets, m, mask=inside)
    tl.store(exp_avg_sq_ptr + offsets, v, mask=inside)
    return m, v


@triton.jit
def _adamw_kernel(
    master_ptr,  # (P,) fp32
    grad_ptr,  # (P,)
    exp_avg_ptr,  # (P,) fp32
    exp_avg_sq_ptr,  # (P,) fp32
    weights_ptr,  # (P,), not touched unless WRITE_BACK
    scalars_ptr,  # (_SCALARS,) fp32
    P,
    decay_end,
    decay1,
    decay2,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
    WRITE_BACK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    if tl.load(scalars_ptr + _FINITE) == 0.0:
        return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < P
    w = tl.load(master_ptr + offsets, mask=inside, other=0.0)
    m, v = _moments(
        grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, offsets, inside, decay1, decay2
    )
    shrink = 1.0 - tl.load(scalars_ptr + _LR) * weight_decay
    w = tl.where(offsets < decay_end, w * shrink, w)
    step_size, root = tl.load(scalars_ptr + _STEP_SIZE), tl.load(scalars_ptr + _ROOT)
    w -= step_size * (m / (tl.sqrt(v) / root + eps))
    tl.store(master_ptr + offsets, w, mask=inside)
    if WRITE_BACK:
        tl.store(weights_ptr + offsets, w.to(weights_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lamb_update(w, m, v, scalars_ptr, weight_decay, eps):  # type: ignore[no-untyped-def]
    step_size, root = tl.load(scalars_ptr + _STEP_SIZE), tl.load(scalars_ptr + _ROOT)
    return step_size * (m / (tl.sqrt(v) / root + eps)) + weight_decay * w


@triton.jit
def _bounds(bounds_ptr, block):  # type: ignore[no-untyped-def]
    # Without the promise, what comes from memory would make every access 4 bytes wide.
    start, stop = tl.load(bounds_ptr + block * 2), tl.load(bounds_ptr + block * 2 + 1)
    return tl.multiple_of(start, 16), tl.multiple_of(stop, 16)


@triton.jit
def _lamb_moments_kernel(
    master_ptr,  # (P,) fp32
    grad_ptr,  # (P,)
    exp_avg_ptr,  # (P,) fp32
    exp_avg_sq_ptr,  # (P,) fp32
    scalars_ptr,  # (_SCALARS,) fp32
    bounds_ptr,  # (blocks, 2) int64: where each block starts and its parameter stops
    partials_ptr,  # (2, blocks) fp32: of w² and of u²
    decay_end,
    decay1,
    decay2,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):  # type: ignore[no-untyped-def]
    """Moments, and the partial norms of weights and updates; a block lies in one parameter."""
    if tl.load(scalars_ptr + _FINITE) == 0.0:
        return
    block = tl.program_id(0)
    start, stop = _bounds(bounds_ptr, block)
    weight_decay = tl.where(start < decay_end, weight_decay, 0.0)
    w_squares = tl.zeros((PIECE,), tl.float32)
    u_squares = tl.zeros((PIECE,), tl.float32)
    for piece in range(0, BLOCK, PIECE):
        offsets = start + piece + tl.arange(0, PIECE)
        inside = offsets < stop
        w = tl.load(master_ptr + offsets, mask=inside, other=0.0)
        m, v = _moments(
            grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, offsets, inside, decay1, decay2
        )
        u = _lamb_update(w, m, v, scalars_ptr, weight_decay, eps)
        w_squares += w * w
        u_squares += tl.where(inside, u * u, 0.0)
    tl.store(partials_ptr + block, tl.sum(w_squares, 0))
    tl.store(partials_ptr + tl.num_programs(0) + block, tl.sum(u_squares, 0))


@triton.jit
def _lamb_ratios_kernel(
    partials_ptr,  # (2, blocks) fp32
    first_block_ptr,  # (parameters + 1,) int32
    bounds_ptr,  # (blocks, 2) int64
    scalars_ptr,  # (_SCALARS,) fp32
    rates_ptr,  # (parameters,) fp32: lr times the trust ratio
    blocks,
    decay_end,
    BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    if tl.load(scalars_ptr + _FINITE) == 0.0:
        return
    parameter = tl.program_id(0)
    first, last = tl.load(first_block_ptr + parameter), tl.load(first_block_ptr + parameter + 1)
    w_squares = tl.zeros((BLOCK,), tl.float32)
    u_squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        w_squares += tl.load(partials_ptr + cols, mask=cols < last, other=0.0)
        u_squares += tl.load(partials_ptr + blocks + cols, mask=cols < last, other=0.0)
    w_norm, u_norm = tl.sqrt_rn(tl.sum(w_squares, 0)), tl.sqrt_rn(tl.sum(u_squares, 0))
    trusted = (tl.load(bounds_ptr + first * 2) < decay_end) & (w_norm > 0) & (u_norm > 0)
    ratio = tl.where(trusted, w_norm / tl.where(trusted, u_norm, 1.0), 1.0)
    tl.store(rates_ptr + parameter, tl.load(scalars_ptr + _LR) * ratio)


@triton.jit
def _lamb_apply_kernel(
    master_ptr,  # (P,) fp32
    exp_avg_ptr,  # (P,) fp32
    exp_avg_sq_ptr,  # (P,) fp32
    weights_ptr,  # (P,), not touched unless WRITE_BACK
    scalars_ptr,  # (_SCALARS,) fp32
    bounds_ptr,  # (blocks, 2) int64
    parameter_ptr,  # (blocks,) int32: which parameter a block belongs to
    rates_ptr,  # (parameters,) fp32
    decay_end,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    WRITE_BACK: tl.constexpr,
):  # type: ignore[no-untyped-def]
    if tl.load(scalars_ptr + _FINITE) == 0.0:
        return
    # Backwards: what the first pass read last is still in L2.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    start, stop = _bounds(bounds_ptr, block)
    rate = tl.load(rates_ptr + tl.load(parameter_ptr + block))
    weight_decay = tl.where(start < decay_end, weight_decay, 0.0)
    for piece in range(0, BLOCK, PIECE):
        offsets = start + piece + tl.arange(0, PIECE)
        inside = offsets < stop
        w = tl.load(master_ptr + offsets, mask=inside, other=0.0)
        m = tl.load(exp_avg_ptr + offsets, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq_ptr + offsets, mask=inside, other=0.0)
        w -= rate * _lamb_update(w, m, v, scalars_ptr, weight_decay, eps)
        tl.store(master_ptr + offsets, w, mask=inside)
        if WRITE_BACK:
            tl.store(weights_ptr + offsets, w.to(weights_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class LambTable:
    """The blocks of a flat buffer that LAMB works on, each inside one parameter.

    Attributes:
        bounds: (blocks, 2) int64, where a block starts and where its parameter stops.
        parameter: (blocks,) int32, which parameter a block belongs to.
        first_block: (parameters + 1,) int32.
        end: elements that the buffers must have.
    """

    bounds: Tensor
    parameter: Tensor
    first_block: Tensor
    end: int


def lamb_table(spans: list[tuple[int, int]], device: torch.device | str) -> LambTable:
    """The table for parameters that start and stop at `spans`; made once per model.

    Starts are multiples of 16 elements, for the width of accesses (`FlatParameters` aligns to 64).
    Up to the next such multiple, what follows a parameter is taken for a part of it: in a buffer
    whose gaps hold zeros that changes nothing.

    Raises:
        ValueError: spans are empty, overlap or are not sorted, or a start is no multiple of 16.
    """
    bounds, parameter, first_block, end = [], [], [0], 0
    for index, (start, stop) in enumerate(spans):
        require(end <= start < stop, f"lamb_table: span {index} is ({start}, {stop}) after {end}")
        require(start % 16 == 0, f"lamb_table: span {index} starts at {start}, no multiple of 16")
        starts = range(start, stop, _LAMB_BLOCK)
        end = -(-stop // 16) * 16
        bounds += [(first, end) for first in starts]
        parameter += [index] * len(starts)
        first_block.append(len(bounds))
    require(bool(bounds), "lamb_table: no spans")
    return LambTable(
        torch.tensor(bounds, dtype=torch.int64, device=device),
        torch.tensor(parameter, dtype=torch.int32, device=device),
        torch.tensor(first_block, dtype=torch.int32, device=device),
        end,
    )


def _check(
    op: str,
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor | None,
    fp32_scalars: dict[str, Tensor],
    counters: dict[str, Tensor],
    beta1: float,
    beta2: float,
    decay_end: int,
) -> None:
    device, P = master.device, master.numel()
    require_launchable(op, _adamw_kernel, device)
    for name, tensor in {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items():
        require_tensor(op, name, tensor, (P,), torch.float32, device)
    require_tensor(op, "grad", grad, (P,), _GRAD_DTYPES, device)
    if weights is not None:
        require_tensor(op, "weights", weights, (P,), _GRAD_DTYPES, device)
    for name, tensor in fp32_scalars.items():
        require_tensor(op, name, tensor, (), torch.float32, device)
    for name, tensor in counters.items():
        require_tensor(op, name, tensor, (), torch.int64, device)
    require(P > 0, f"{op}: master is empty")
    require(0 < beta1 < 1 and 0 < beta2 < 1, f"{op}: betas {beta1}, {beta2} are not inside (0, 1)")
    require(0 <= decay_end <= P, f"{op}: decay_end = {decay_end} is outside [0, {P}]")


def _prepare(
    grad: Tensor,
    lr: Tensor,
    step: Tensor,
    skipped: Tensor,
    grad_scale: Tensor,
    grad_norm: Tensor,
    beta1: float,
    beta2: float,
    max_grad_norm: float,
    lr_in_step_size: bool,
) -> Tensor:
    """The first two launches; returns the scalars of the update."""
    P = grad.numel()
    programs = min(triton.cdiv(P, _NORM_BLOCK), _NORM_PROGRAMS)
    partials = torch.empty(programs, device=grad.device, dtype=torch.float32)
    scalars = torch.empty(_SCALARS, device=grad.device, dtype=torch.float32)
    _square_sums_kernel[(programs,)](grad, partials, P, BLOCK=_NORM_BLOCK, num_warps=_NORM_WARPS)
    _prepare_kernel[(1,)](
        partials, lr, step, skipped, grad_scale, grad_norm, scalars, programs,
        MAX_GRAD_NORM=max_grad_norm, LOG_BETA1=math.log(beta1), LOG_BETA2=math.log(beta2),
        LR_IN_STEP_SIZE=lr_in_step_size, BLOCK=_NORM_PROGRAMS, num_warps=4,
    )  # fmt: skip
    return scalars


_MUTATED = ("master", "exp_avg", "exp_avg_sq", "weights", "step", "skipped", "grad_norm")


@torch.library.custom_op("fastbert::adamw_step", mutates_args=_MUTATED)
def adamw_step(
    master: Tensor,  # (P,) fp32
    grad: Tensor,  # (P,) fp32, bf16 or fp16: grad_scale times the gradient
    exp_avg: Tensor,  # (P,) fp32
    exp_avg_sq: Tensor,  # (P,) fp32
    weights: Tensor | None,  # (P,) the rounded copy to compute with, if any
    lr: Tensor,  # () fp32
    step: Tensor,  # () int64: updates made so far
    skipped: Tensor,  # () int64: updates skipped so far
    grad_scale: Tensor,  # () fp32
    grad_norm: Tensor,  # () fp32, set to the norm before clipping
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay_end: int,  # elements [0, decay_end) are decayed
    max_grad_norm: float,  # 0: no clipping
) -> None:
    """AdamW in place and in three launches; `reference_optimizer.adamw_step` says what it computes.

    Raises:
        ValueError: a buffer's shape, dtype or device does not fit, or a setting is out of range.
    """
    _check(
        "adamw_step", master, grad, exp_avg, exp_avg_sq, weights,
        {"lr": lr, "grad_scale": grad_scale, "grad_norm": grad_norm},
        {"step": step, "skipped": skipped}, beta1, beta2, decay_end,
    )  # fmt: skip
    scalars = _prepare(
        grad, lr, step, skipped, grad_scale, grad_norm, beta1, beta2, max_grad_norm, True
    )
    P = master.numel()
    _adamw_kernel[(triton.cdiv(P, _BLOCK),)](
        master, grad, exp_avg, exp_avg_sq, master if weights is None else weights, scalars,
        P, decay_end, 1 - beta1, 1 - beta2, eps, weight_decay,
        BLOCK=_BLOCK, WRITE_BACK=weights is not None, num_warps=_NUM_WARPS,
    )  # fmt: skip


@torch.library.custom_op("fastbert::lamb_step", mutates_args=_MUTATED)
def _lamb_step(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor | None,
    lr: Tensor,
    step: Tensor,
    skipped: Tensor,
    grad_scale: Tensor,
    grad_norm: Tensor,
    bounds: Tensor,
    parameter: Tensor,
    first_block: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay_end: int,
    max_grad_norm: float,
) -> None:
    scalars = _prepare(
        grad, lr, step, skipped, grad_scale, grad_norm, beta1, beta2, max_grad_norm, False
    )
    blocks, parameters = bounds.shape[0], first_block.numel() - 1
    partials = torch.empty(2, blocks, device=master.device, dtype=torch.float32)
    rates = torch.empty(parameters, device=master.device, dtype=torch.float32)
    _lamb_moments_kernel[(blocks,)](
        master, grad, exp_avg, exp_avg_sq, scalars, bounds, partials,
        decay_end, 1 - beta1, 1 - beta2, eps, weight_decay,
        BLOCK=_LAMB_BLOCK, PIECE=_BLOCK, num_warps=_NUM_WARPS,
    )  # fmt: skip
    _lamb_ratios_kernel[(parameters,)](
        partials, first_block, bounds, scalars, rates, blocks, decay_end, BLOCK=_BLOCK, num_warps=4
    )
    _lamb_apply_kernel[(blocks,)](
        master, exp_avg, exp_avg_sq, master if weights is None else weights, scalars, bounds,
        parameter, rates, decay_end, eps, weight_decay,
        BLOCK=_LAMB_BLOCK, PIECE=_BLOCK, WRITE_BACK=weights is not None, num_warps=_NUM_WARPS,
    )  # fmt: skip


@adamw_step.register_fake
@_lamb_step.register_fake
def _(*args, **kwargs) -> None:  # type: ignore[no-untyped-def]
    return None


def lamb_step(
    master: Tensor,  # (P,) fp32
    grad: Tensor,  # (P,) fp32, bf16 or fp16: grad_scale times the gradient
    exp_avg: Tensor,  # (P,) fp32
    exp_avg_sq: Tensor,  # (P,) fp32
    weights: Tensor | None,  # (P,) the rounded copy to compute with, if any
    lr: Tensor,  # () fp32
    step: Tensor,  # () int64: updates made so far
    skipped: Tensor,  # () int64: updates skipped so far
    grad_scale: Tensor,  # () fp32
    grad_norm: Tensor,  # () fp32, set to the norm before clipping
    table: LambTable,  # of the same buffers
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay_end: int,  # parameters before it are decayed and take a trust ratio
    max_grad_norm: float,  # 0: no clipping
) -> None:
    """LAMB in place and in five launches; `reference_optimizer.lamb_step` says what it computes.

    Raises:
        ValueError: a buffer's shape, dtype or device does not fit, or a setting is out of range.
    """
    _check(
        "lamb_step", master, grad, exp_avg, exp_avg_sq, weights,
        {"lr": lr, "grad_scale": grad_scale, "grad_norm": grad_norm},
        {"step": step, "skipped": skipped}, beta1, beta2, decay_end,
    )  # fmt: skip
    require_tensor("lamb_step", "table", table.bounds, (None, 2), torch.int64, master.device)
    P = master.numel()
    require(table.end <= P, f"lamb_step: table needs {table.end} elements, the buffers have {P}")
    _lamb_step(
        master, grad, exp_avg, exp_avg_sq, weights, lr, step, skipped, grad_scale, grad_norm,
        table.bounds, table.parameter, table.first_block,
        beta1, beta2, eps, weight_decay, decay_end, max_grad_norm,
    )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Every kernel in every shipped configuration, for the compile report."""
    fp32, floats = "*fp32", dict.fromkeys(("decay1", "decay2", "eps", "weight_decay"), "fp32")
    pointers = {
        "bounds_ptr": "*i64", "parameter_ptr": "*i32", "first_block_ptr": "*i32",
        "lr_ptr": fp32, "step_ptr": "*i64", "skipped_ptr": "*i64", "grad_scale_ptr": fp32,
        "grad_norm_ptr": fp32, "scalars_ptr": fp32, "partials_ptr": fp32, "rates_ptr": fp32,
        "master_ptr": fp32, "exp_avg_ptr": fp32, "exp_avg_sq_ptr": fp32,
    }  # fmt: skip
    integers = dict.fromkeys(("P", "decay_end", "programs", "blocks"), "i32")

    def case(
        name: str, grad: str, weights: str, fn: Any, constexprs: dict[str, Any], warps: int
    ) -> CompileCase:
        types = pointers | integers | floats
        types |= {"grad_ptr": f"*{grad}", "weights_ptr": f"*{weights}"}
        signature = {n: types[n] for n in fn.arg_names if n not in constexprs}
        configuration = f"grad {grad}, weights {weights}"
        return CompileCase(
            name, configuration, fn, signature, constexprs, warps, divisible_by_16=("P",)
        )

    cases = []
    blocks = {"BLOCK": _LAMB_BLOCK, "PIECE": _BLOCK}
    for dtype in _GRAD_DTYPES:
        grad = triton_name(dtype)
        for weights in ("bf16", "fp32") if dtype == torch.float32 else (grad,):
            write = {"WRITE_BACK": weights != "fp32"}
            cases += [
                case(name, grad, weights, fn, constexprs, warps)
                for name, fn, constexprs, warps in (
                    ("square_sums", _square_sums_kernel, {"BLOCK": _NORM_BLOCK}, _NORM_WARPS),
                    ("adamw", _adamw_kernel, {"BLOCK": _BLOCK} | write, _NUM_WARPS),
                    ("lamb_moments", _lamb_moments_kernel, blocks, _NUM_WARPS),
                    ("lamb_apply", _lamb_apply_kernel, blocks | write, _NUM_WARPS),
                )
            ]
    prepare = {
        "MAX_GRAD_NORM": 1.0,
        "LOG_BETA1": math.log(0.9),
        "LOG_BETA2": math.log(0.999),
        "LR_IN_STEP_SIZE": True,
        "BLOCK": _NORM_PROGRAMS,
    }
    cases.append(case("prepare", "fp32", "fp32", _prepare_kernel, prepare, 4))
    cases.append(case("lamb_ratios", "fp32", "fp32", _lamb_ratios_kernel, {"BLOCK": _BLOCK}, 4))
    return cases
