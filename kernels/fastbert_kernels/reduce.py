"""Sums over rows without atomics, in two stages and a fixed order: gradients of biases and scales.

Stage one lives in each backward kernel: a few programs per multiprocessor walk over the rows and
keep fp32 partial sums in registers. Stage two is here: one kernel adds the programs' partial sums.

P programs, W columns.
"""

import functools

import torch
from torch import Tensor

from fastbert_kernels.checks import STORAGE_DTYPES, kernel_signature, triton_name
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.triton_import import tl, triton

# 96 programs at W = 3 x 1024, with eight 16-byte loads in flight a thread.
_BLOCK_P, _BLOCK_W, _NUM_WARPS = 128, 32, 4


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 stand for the interpreter, so that loops over rows take more than one turn."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["P"])
def _reduce_rows_kernel(
    partials_ptr,  # (P, W) fp32
    out_ptr,  # (W,)
    P,
    W,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.arange(0, BLOCK_P)
    column = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros((BLOCK_P, BLOCK_W), tl.float32)
    for first in range(0, P, BLOCK_P):
        mask = (first + row < P)[:, None] & (column < W)[None, :]
        offset = (first + row).to(tl.int64)[:, None] * W + column[None, :]
        total += tl.load(partials_ptr + offset, mask, other=0.0)
    out = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, out, column < W)


def reduce_rows(
    partials: Tensor,  # (P, ..., H) fp32
    dtype: torch.dtype,
) -> Tensor:  # (..., H)
    """Sum over the first dimension, in `dtype`."""
    out = torch.empty(partials.shape[1:], dtype=dtype, device=partials.device)
    W = out.numel()
    _reduce_rows_kernel[(triton.cdiv(W, _BLOCK_W),)](
        partials, out, partials.shape[0], W, _BLOCK_P, _BLOCK_W, num_warps=_NUM_WARPS
    )
    return out


def compile_cases() -> list[CompileCase]:
    """Every kernel in every shipped configuration, for the compile report."""
    constexprs = {"BLOCK_P": _BLOCK_P, "BLOCK_W": _BLOCK_W}
    return [
        CompileCase(
            "reduce_rows", f"to {triton_name(dtype)}", _reduce_rows_kernel,
            kernel_signature(_reduce_rows_kernel, constexprs, dtype), constexprs, _NUM_WARPS,
            divisible_by_16=("W",),
        )
        for dtype in STORAGE_DTYPES
    ]  # fmt: skip
