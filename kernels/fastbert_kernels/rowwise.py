"""What the kernels that pass over rows share: launches, tiles, and the norm of a row.

R rows, H columns, P programs of a backward. A forward's program takes a few rows. A backward's
programs, a few a multiprocessor, walk over the rows and keep sums over them in fp32 registers, as
gradients of parameters are; `reduce` adds up what each has left behind.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert_kernels.checks import STORAGE_DTYPES, require_launchable, require_tensor
from fastbert_kernels.philox import TILE
from fastbert_kernels.reduce import multiprocessors, reduce_rows
from fastbert_kernels.triton_import import tl, triton

MAX_WIDTH = 4096


def block_width(H: int) -> int:
    """The block a row of H columns is held in."""
    return max(TILE, triton.next_power_of_2(H))


def forward_config(H: int) -> tuple[int, int]:
    """(rows of a program, warps): at least two 16-byte loads of each tensor in flight a thread,
    and parameters read once for several rows."""
    BLOCK_H = block_width(H)
    if H < BLOCK_H and BLOCK_H in (512, 1024):
        # Where one warp owns the row, the compiler drops the columns beyond H: at H = 768 with
        # dropout 28 instructions an element, against 42 with four warps.
        return 2, 1
    num_warps = 8 if BLOCK_H > 2048 else 4
    return num_warps * 1024 // BLOCK_H, num_warps


def backward_config(H: int) -> tuple[int, int, int]:
    """(rows of a turn, rows of partial sums, warps): the three partial sums take 24 registers."""
    BLOCK_H = block_width(H)
    num_warps = min(16, max(4, BLOCK_H // 256))
    sum_rows = max(1, num_warps * 256 // BLOCK_H)
    return 2 * sum_rows, sum_rows, num_warps


def launch_forward(
    kernel: Any,
    tensors: tuple[Tensor, ...],  # all of the kernel's but the last two, mean_ptr and rstd_ptr
    numbers: tuple[Any, ...],  # R, and what else comes before H
    H: int,
) -> tuple[Tensor, Tensor]:  # mean (R,), rstd (R,) in fp32
    """Launches a kernel that normalizes rows: its last arguments are H, BLOCK_R, BLOCK_H."""
    R, device = numbers[0], tensors[0].device
    mean, rstd = (torch.empty(R, dtype=torch.float32, device=device) for _ in range(2))
    BLOCK_R, num_warps = forward_config(H)
    if R:
        kernel[(triton.cdiv(R, BLOCK_R),)](
            *tensors, mean, rstd, *numbers, H, BLOCK_R, block_width(H), num_warps=num_warps
        )
    return mean, rstd


def launch_backward(
    kernel: Any,
    tensors: tuple[Tensor, ...],  # all of the kernel's but the last, partials_ptr
    numbers: tuple[Any, ...],  # R, and what else comes before H
    H: int,
    sums: int,  # how many a program leaves behind
    dtype: torch.dtype,  # that they are wanted in
    warps: int = 16,  # of a multiprocessor: what fits at 128 registers a thread
    maxnreg: int | None = None,
) -> Tensor:  # (sums, H)
    """Launches the way back, whose last arguments are H, BLOCK_R, SUM_R, BLOCK_H; the sums."""
    R, device = numbers[0], tensors[0].device
    BLOCK_R, SUM_R, num_warps = backward_config(H)
    here = multiprocessors(device) * max(1, warps // num_warps)
    programs = max(1, min(here, triton.cdiv(R, BLOCK_R)))
    partials = torch.empty(programs, sums, H, dtype=torch.float32, device=device)
    kernel[(programs,)](
        *tensors, partials, *numbers, H, BLOCK_R, SUM_R, block_width(H),
        num_warps=num_warps, maxnreg=maxnreg,
    )  # fmt: skip
    return reduce_rows(partials, dtype)


@triton.jit
def tile_at(
    row,  # (BLOCK_R,)
    column,  # (BLOCK_C,)
    R,
    H,
):
    """(mask, offset), both (BLOCK_R, BLOCK_C), of a tile of an (R, H) tensor."""
    mask = (row < R)[:, None] & (column < H)[None, :]
    return mask, row.to(tl.int64)[:, None] * H + column[None, :]


@triton.jit
def load_parameter(ptr, column, H):
    """(BLOCK_C,) of a parameter (H,), in fp32; zeros beyond it."""
    return tl.load(ptr + column, column < H, other=0.0).to(tl.float32)


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, row, R):
    """(mean, rstd) of rows; 0 beyond R, so that what is multiplied with rstd adds nothing."""
    mean = tl.load(mean_ptr + row, row < R, other=0.0)
    return mean, tl.load(rstd_ptr + row, row < R, other=0.0)


@triton.jit
def store_sums(
    partials_ptr,  # (P, sums, H) fp32
    column,
    sums,  # tuple of (SUM_R, BLOCK_H) fp32
    SUMS: tl.constexpr,  # how many
    H: tl.constexpr,
):
    """What a program of a backward leaves behind."""
    partials_ptr += tl.program_id(0).to(tl.int64) * (SUMS * H) + column
    for i in tl.static_range(SUMS):
        tl.store(partials_ptr + i * H, tl.sum(sums[i], axis=0), column < H)


@triton.jit
def normalize(
    z,  # (BLOCK_R, BLOCK_H) fp32, 0 outside the mask
    mask,
    eps,
    H: tl.constexpr,
):
    """(mean, rstd, (z - mean) rstd). The second pass over registers keeps the variance exact."""
    mean = tl.sum(z, axis=1) / H
    centered = tl.where(mask, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1) / H + eps)
    return mean, rstd, centered * rstd[:, None]


@triton.jit
def normalize_gradient(
    dxhat,  # (BLOCK_R, BLOCK_H) fp32, 0 outside the mask
    xhat,
    rstd,  # (BLOCK_R,)
    H: tl.constexpr,
):
    """Gradient of `normalize` by z: rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat))."""
    # Joined, the two sums cross the warps together: one barrier, not two.
    sums = tl.sum(tl.join(dxhat, dxhat * xhat), axis=1) / H
    mean, mean_xhat = tl.split(sums)
    return dxhat * rstd[:, None] - (mean * rstd)[:, None] - xhat * (mean_xhat * rstd)[:, None]


@triton.jit
def add_rows(
    total,  # (SUM_R, BLOCK_H) fp32
    addend,  # (BLOCK_R, BLOCK_H) fp32
):
    """Adds rows SUM_R apart, which one thread holds: nothing crosses threads inside the loop."""
    SUM_R: tl.constexpr = total.shape[0]
    BLOCK_H: tl.constexpr = total.shape[1]
    TURNS: tl.constexpr = addend.shape[0] // SUM_R
    return total + tl.sum(tl.reshape(addend, (TURNS, SUM_R, BLOCK_H)), axis=0)


def require_rows(
    op: str,
    kernel: Any,
    x: Tensor,  # (R, H)
    max_width: int | None = None,
    reference: str | None = None,
) -> None:
    """A launch over rows: where it runs, and a width that fits."""
    require_launchable(op, kernel, x.device, reference)
    require_tensor(op, "x", x, (None, None), STORAGE_DTYPES, x.device)
    require_width(op, x.shape[1], max_width)


def require_width(op: str, H: int, max_width: int | None = MAX_WIDTH) -> None:
    """Rows of H columns fit 16-byte loads and, unless `max_width` is None, a block."""
    if H % 8 or H == 0 or (max_width is not None and H > max_width):
        limit = "" if max_width is None else f" up to {max_width}"
        raise ValueError(f"{op}: x has {H} columns, expected a multiple of 8{limit}")


def require_parameters(op: str, x: Tensor, **parameters: Tensor) -> None:
    """Each is (H,), all of one dtype, which may be wider than `x`'s."""
    dtypes: tuple[torch.dtype, ...] = STORAGE_DTYPES
    for name, parameter in parameters.items():
        require_tensor(op, name, parameter, (x.shape[1],), dtypes, x.device)
        dtypes = (parameter.dtype,)
