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
from torch import Tensor

from fastbert_kernels.checks import (
    STORAGE_DTYPES,
    kernel_signature,
    require,
    require_launchable,
    require_tensor,
)
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.reference_optimizer import Buffers, Hyperparameters
from fastbert_kernels.triton_import import tl, triton

# 4 elements a thread, 16 bytes of each fp32 buffer: with 8, Triton loads as the bf16 store wants it
# and sends m, v and w through shared memory before storing them.
_BLOCK, _NUM_WARPS = 1024, 8
_NORM_PROGRAMS, _NORM_BLOCK, _NORM_WARPS = 1024, 4096, 8  # 7 programs a multiprocessor
_LAMB_BLOCK = 4096  # 27,000 blocks in BERT-base, so partial norms are 0.02% of the bytes

# Places in the fp32 scalars that the finishing program leaves for the update.
FINITE = tl.constexpr(0)  # 1 where the update is to be made
FACTOR = tl.constexpr(1)  # what the gradient is multiplied with
LR = tl.constexpr(2)
STEP_SIZE = tl.constexpr(3)  # lr / (1 - beta1^t), for AdamW; 1 / (1 - beta1^t), for LAMB
ROOT = tl.constexpr(4)  # sqrt(1 - beta2^t)
SCALARS = 5


@triton.jit
def _square_sums_kernel(
    grad_ptr,  # (P,)
    partials_ptr,  # (programs,) fp32
    P,
    BLOCK: tl.constexpr,
):
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
    scalars_ptr,  # (SCALARS,) fp32
    programs,
    MAX_GRAD_NORM: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    LR_IN_STEP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    tl.store(scalars_ptr + FINITE, finite.to(tl.float32))
    tl.store(scalars_ptr + FACTOR, clip / scale)
    tl.store(scalars_ptr + LR, lr)
    tl.store(scalars_ptr + STEP_SIZE, step_size)
    tl.store(scalars_ptr + ROOT, tl.sqrt_rn(correction2))
    tl.store(grad_norm_ptr, norm)
    tl.store(step_ptr, step)
    tl.store(skipped_ptr, tl.load(skipped_ptr) + 1 - finite.to(tl.int64))


@triton.jit
def _moments(grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, offsets, inside, decay1, decay2):
    """Updates both moments and returns them; decay1 = 1 - beta1, decay2 = 1 - beta2."""
    g = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg_ptr + offsets, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq_ptr + offsets, mask=inside, other=0.0)
    g *= tl.load(scalars_ptr + FACTOR)
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
    scalars_ptr,  # (SCALARS,) fp32
    P,
    decay_end,
    decay1,
    decay2,
    eps,
    weight_decay,
    embedding_end,
    embedding_factor,
    BLOCK: tl.constexpr,
    WRITE_BACK: tl.constexpr,
):
    if tl.load(scalars_ptr + FINITE) == 0.0:
        return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < P
    w = tl.load(master_ptr + offsets, mask=inside, other=0.0)
    m, v = _moments(
        grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, scalars_ptr, offsets, inside, decay1, decay2
    )
    factor = tl.where(offsets < embedding_end, embedding_factor, 1.0)
    shrink = 1.0 - tl.load(scalars_ptr + LR) * factor * weight_decay
    w = tl.where(offsets < decay_end, w * shrink, w)
    step_size, root = tl.load(scalars_ptr + STEP_SIZE), tl.load(scalars_ptr + ROOT)
    w -= step_size * factor * (m / (tl.sqrt(v) / root + eps))
    tl.store(master_ptr + offsets, w, mask=inside)
    if WRITE_BACK:
        tl.store(weights_ptr + offsets, w.to(weights_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lamb_update(w, m, v, scalars_ptr, weight_decay, eps):
    step_size, root = tl.load(scalars_ptr + STEP_SIZE), tl.load(scalars_ptr + ROOT)
    return step_size * (m / (tl.sqrt(v) / root + eps)) + weight_decay * w


@triton.jit
def _bounds(bounds_ptr, block):
    # Without the promise, what comes from memory would make every access 4 bytes wide.
    start, stop = tl.load(bounds_ptr + block * 2), tl.load(bounds_ptr + block * 2 + 1)
    return tl.multiple_of(start, 16), tl.multiple_of(stop, 16)


@triton.jit(do_not_specialize=["decay_end"])
def _lamb_moments_kernel(
    master_ptr,  # (P,) fp32
    grad_ptr,  # (P,)
    exp_avg_ptr,  # (P,) fp32
    exp_avg_sq_ptr,  # (P,) fp32
    scalars_ptr,  # (SCALARS,) fp32
    bounds_ptr,  # (blocks, 2) int64: where each block starts and its parameter stops
    partials_ptr,  # (2, blocks) fp32: of w² and of u²
    decay_end,
    decay1,
    decay2,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Moments, and the partial norms of weights and updates; a block lies in one parameter."""
    if tl.load(scalars_ptr + FINITE) == 0.0:
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


@triton.jit(do_not_specialize=["blocks", "decay_end", "embedding_end"])
def _lamb_ratios_kernel(
    partials_ptr,  # (2, blocks) fp32
    first_block_ptr,  # (parameters + 1,) int32
    bounds_ptr,  # (blocks, 2) int64
    scalars_ptr,  # (SCALARS,) fp32
    rates_ptr,  # (parameters,) fp32: lr times the trust ratio
    blocks,
    decay_end,
    embedding_end,
    embedding_factor,
    BLOCK: tl.constexpr,
):
    if tl.load(scalars_ptr + FINITE) == 0.0:
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
    start = tl.load(bounds_ptr + first * 2)
    trusted = (start < decay_end) & (w_norm > 0) & (u_norm > 0)
    ratio = tl.where(trusted, w_norm / tl.where(trusted, u_norm, 1.0), 1.0)
    ratio *= tl.where(start < embedding_end, embedding_factor, 1.0)
    tl.store(rates_ptr + parameter, tl.load(scalars_ptr + LR) * ratio)


@triton.jit(do_not_specialize=["decay_end"])
def _lamb_apply_kernel(
    master_ptr,  # (P,) fp32
    exp_avg_ptr,  # (P,) fp32
    exp_avg_sq_ptr,  # (P,) fp32
    weights_ptr,  # (P,), not touched unless WRITE_BACK
    scalars_ptr,  # (SCALARS,) fp32
    bounds_ptr,  # (blocks, 2) int64
    parameter_ptr,  # (blocks,) int32: which parameter a block belongs to
    rates_ptr,  # (parameters,) fp32
    decay_end,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    WRITE_BACK: tl.constexpr,
):
    if tl.load(scalars_ptr + FINITE) == 0.0:
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


_MUTATED = ("master", "exp_avg", "exp_avg_sq", "weights", "step", "skipped", "grad_norm")


@torch.library.custom_op("fastbert::optimizer_step", mutates_args=_MUTATED)
def flat_update(
    table: list[Tensor],  # of LAMB; empty for AdamW. Then `Buffers`, then `Hyperparameters`
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
    decay_end: int,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float,
    embedding_end: int,
    embedding_lr_factor: float,
    end: int,  # AdamW updates [0, end)
) -> Tensor:  # (SCALARS,) fp32
    """One update of everything but Muon's matrices, whose kernels read the scalars, too."""
    programs = min(triton.cdiv(grad.numel(), _NORM_BLOCK), _NORM_PROGRAMS)
    partials, scalars = (_fp32(master.device, size) for size in (programs, SCALARS))
    _square_sums_kernel[(programs,)](
        grad, partials, grad.numel(), BLOCK=_NORM_BLOCK, num_warps=_NORM_WARPS
    )
    _prepare_kernel[(1,)](
        partials, lr, step, skipped, grad_scale, grad_norm, scalars, programs,
        MAX_GRAD_NORM=max_grad_norm, LOG_BETA1=math.log(beta1), LOG_BETA2=math.log(beta2),
        LR_IN_STEP_SIZE=not table, BLOCK=_NORM_PROGRAMS, num_warps=4,
    )  # fmt: skip
    moments = (master, grad, exp_avg, exp_avg_sq)
    rounded, write = (master, False) if weights is None else (weights, True)
    factors = (decay_end, 1 - beta1, 1 - beta2, eps, weight_decay)
    embeddings = (embedding_end, embedding_lr_factor)
    if not table:
        if end:
            _adamw_kernel[(triton.cdiv(end, _BLOCK),)](
                *moments, rounded, scalars, end, *factors, *embeddings,
                BLOCK=_BLOCK, WRITE_BACK=write, num_warps=_NUM_WARPS,
            )  # fmt: skip
        return scalars
    bounds, parameter, first_block = table
    blocks, parameters = bounds.shape[0], first_block.numel() - 1
    partials, rates = _fp32(master.device, 2 * blocks), _fp32(master.device, parameters)
    _lamb_moments_kernel[(blocks,)](
        *moments, scalars, bounds, partials, *factors,
        BLOCK=_LAMB_BLOCK, PIECE=_BLOCK, num_warps=_NUM_WARPS,
    )  # fmt: skip
    _lamb_ratios_kernel[(parameters,)](
        partials, first_block, bounds, scalars, rates, blocks, decay_end, *embeddings,
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    _lamb_apply_kernel[(blocks,)](
        master, exp_avg, exp_avg_sq, rounded, scalars, bounds, parameter, rates,
        decay_end, eps, weight_decay,
        BLOCK=_LAMB_BLOCK, PIECE=_BLOCK, WRITE_BACK=write, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return scalars


@flat_update.register_fake
def _(table, master, *args):
    return _fp32(master.device, SCALARS)


def _fp32(device: torch.device, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=device)


def check_buffers(
    op: str, buffers: Buffers, hyper: Hyperparameters, end: int | None = None
) -> None:
    """Raises ValueError unless `op` can update these buffers, [0, end) of them by AdamW."""
    device, P = buffers.master.device, buffers.master.numel()
    require_launchable(op, _adamw_kernel, device, f"reference_optimizer.{op}")
    kinds: dict[str, tuple[tuple[int | None, ...], Any]] = {
        "master": ((None,), torch.float32),
        "exp_avg": ((P,), torch.float32),
        "exp_avg_sq": ((P if end is None else end,), torch.float32),
        **dict.fromkeys(("grad", "weights"), ((P,), STORAGE_DTYPES)),
        **dict.fromkeys(("lr", "grad_scale", "grad_norm"), ((), torch.float32)),
        **dict.fromkeys(("step", "skipped"), ((), torch.int64)),
    }
    for name, (shape, dtype) in kinds.items():
        tensor = getattr(buffers, name)
        if tensor is not None:
            require_tensor(op, name, tensor, shape, dtype, device)
    require(P > 0, f"{op}: master is empty")
    betas = (hyper.beta1, hyper.beta2)
    inside = all(0 < beta < 1 for beta in betas)
    require(inside, f"{op}: betas {betas[0]}, {betas[1]} are not inside (0, 1)")
    for name in ("decay_end", "embedding_end"):
        end = getattr(hyper, name)
        require(0 <= end <= P, f"{op}: {name} = {end} is outside [0, {P}]")


def adamw_step(buffers: Buffers, hyper: Hyperparameters) -> None:
    """AdamW in place and in three launches; `reference_optimizer.adamw_step` says what it computes.

    Raises:
        ValueError: a buffer's shape, dtype or device does not fit, or a setting is out of range.
    """
    check_buffers("adamw_step", buffers, hyper)
    flat_update([], *buffers, *hyper, buffers.master.numel())


def lamb_step(
    buffers: Buffers,
    hyper: Hyperparameters,
    table: LambTable,  # of the same buffers
) -> None:
    """LAMB in place and in five launches; `reference_optimizer.lamb_step` says what it computes.

    Raises:
        ValueError: a buffer's shape, dtype or device does not fit, or a setting is out of range.
    """
    op, P, device = "lamb_step", buffers.master.numel(), buffers.master.device
    check_buffers(op, buffers, hyper)
    blocks = table.bounds.shape[0]
    require_tensor(op, "table.bounds", table.bounds, (None, 2), torch.int64, device)
    require_tensor(op, "table.parameter", table.parameter, (blocks,), torch.int32, device)
    require_tensor(op, "table.first_block", table.first_block, (None,), torch.int32, device)
    require(table.end <= P, f"lamb_step: table needs {table.end} elements, the buffers have {P}")
    flat_update([table.bounds, table.parameter, table.first_block], *buffers, *hyper, P)


def compile_cases() -> list[CompileCase]:
    """Every kernel in every shipped configuration, for the compile report."""
    others = dict.fromkeys(("bounds_ptr", "step_ptr", "skipped_ptr"), "*i64")
    others |= dict.fromkeys(("parameter_ptr", "first_block_ptr"), "*i32")
    factors = ("decay1", "decay2", "weight_decay", "embedding_factor")
    others |= dict.fromkeys(factors, "fp32")
    lamb = {"BLOCK": _LAMB_BLOCK, "PIECE": _BLOCK}
    prepare = {
        "MAX_GRAD_NORM": 1.0, "LOG_BETA1": math.log(0.9), "LOG_BETA2": math.log(0.999),
        "LR_IN_STEP_SIZE": True, "BLOCK": _NORM_PROGRAMS,
    }  # fmt: skip
    # (name, kernel, type of grad, type of weights, constexprs, warps)
    kinds: list[tuple[str, Any, str, str, dict[str, Any], int]] = [
        ("prepare", _prepare_kernel, "fp32", "fp32", prepare, 4),
        ("lamb_ratios", _lamb_ratios_kernel, "fp32", "fp32", {"BLOCK": _BLOCK}, 4),
    ]
    for grad, weights in (("fp32", "bf16"), ("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16")):
        write = {"WRITE_BACK": weights != "fp32"}
        kinds += [
            ("adamw", _adamw_kernel, grad, weights, {"BLOCK": _BLOCK} | write, _NUM_WARPS),
            ("lamb_apply", _lamb_apply_kernel, grad, weights, lamb | write, _NUM_WARPS),
        ]
        if grad == weights:  # these kernels write no weights
            kinds += [
                (
                    "square_sums",
                    _square_sums_kernel,
                    grad,
                    "-",
                    {"BLOCK": _NORM_BLOCK},
                    _NORM_WARPS,
                ),
                ("lamb_moments", _lamb_moments_kernel, grad, "-", lamb, _NUM_WARPS),
            ]
    cases = []
    for name, kernel, grad, weights, constexprs, num_warps in kinds:
        types = others | {"grad_ptr": f"*{grad}", "weights_ptr": f"*{weights}"}
        signature = kernel_signature(kernel, constexprs, torch.float32, **types)
        label = f"grad {grad}, weights {weights}"
        cases.append(
            CompileCase(name, label, kernel, signature, constexprs, num_warps,
                        divisible_by_16=("P", "decay_end", "embedding_end", "programs"))
        )  # fmt: skip
    return cases
