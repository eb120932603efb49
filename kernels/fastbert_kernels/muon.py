"""Muon over flat buffers: AdamW of what lies before the matrices, Newton-Schulz of the matrices.

The equations are `reference_optimizer`'s; scalars, norm and the skipped update are `optimizer`'s.
Matrices of one shape are one batch: a launch moves their momentum and writes the updates in 16 bits
beside each other, 3 + 3 `ns_steps` launches orthogonalize them, and one applies them: 20 a group
and three of AdamW's. Nothing asks the host, so a CUDA graph may hold it all.

Newton-Schulz is three products a step, and two of them, A = X Xᵀ and b A + c A A (A is symmetric),
have a symmetric result: `symmetric_product` computes its tiles on and below the diagonal alone,
n (n + 1) / 2 of n², and stores each also mirrored. With tiles of 128 x 128:

| m = min(rows, columns) | tiles | as fast as all of them by cuBLAS at |
|---|--:|--:|
| 768 | 21 of 36 | 58% of cuBLAS's speed |
| 1,024 | 36 of 64 | 56% |

Of an (m, k) matrix the three products are 2 m² k, 2 m³ and 2 m² k: the symmetric two are 2/3 of the
FLOPs where k = m, 5/9 where k = 4 m. So a step of BERT-base takes 1.22 TFLOP instead of 1.63, one
of BERT-large 5.70 instead of 7.73: 25% and 26% less (with q, k and v joined 1.16 instead of 1.52
and 5.41 instead of 7.22). By count it multiplies with 474 TFLOP/s at most on an H100, where L2
binds, and 312 on an A100: 59% and 118% of what cuBLAS is taken to reach (798, 265). All tiles of a
matrix run at the same time (264 fit on an H100, a matrix has 36 at most): no order of them would
help L2. Not yet run on a GPU.

B matrices; M and K are m and k in the kernels, P the elements of the flat buffers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels import reference_optimizer
from fastbert_kernels.checks import (
    STORAGE_DTYPES,
    capability,
    kernel_signature,
    require,
    require_launchable,
    require_tensor,
    triton_name,
)
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.optimizer import FACTOR, FINITE, LR, check_buffers, flat_update
from fastbert_kernels.reference_optimizer import (
    Buffers,
    Hyperparameters,
    MuonGroup,
    MuonHyperparameters,
    Orthogonalize,
    muon_lr_factor,
)
from fastbert_kernels.triton_import import tl, triton

_BLOCK, _NUM_WARPS = 1024, 8  # of what is elementwise: as AdamW's


@dataclass(frozen=True)
class Tiles:
    """How the product is cut: rows (and columns) of a tile and its depth, warps of a program,
    pipelining depth, registers that a thread may have."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


# (compute capability, half precision?): a multiprocessor holds two programs, no loop spills.
# Without the limit, `add` would take 174 registers and the place of the second.
TILES = {
    (90, True): Tiles(128, 64, 8, 3, 128),
    (90, False): Tiles(64, 32, 4, 3),
    (80, True): Tiles(128, 32, 4, 3),
    (80, False): Tiles(64, 32, 4, 3),
}


@triton.jit
def _place(t, n):
    """Row and column of tile t of those on and below the diagonal of n x n.

    In lines of n | 1: each is a row of the upper half and the one that fills it up.
    """
    width = n + 1 - n % 2
    short = t // width + 1 - n % 2  # tiles of the first row of the line
    at = t % width
    first = at < short
    return tl.where(first, short, width - short) - 1, tl.where(first, at, at - short)


@triton.jit
def _load_tile(
    x_ptr,  # (M, K), or (K, M) where TRANSPOSED
    row,
    start,
    M,
    K,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # (BLOCK_M, BLOCK_K), zeros beyond the matrix
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    if TRANSPOSED:
        x_ptr += tl.cast(start, tl.int64) * M + row  # what is left fits in 32 bits
        mask = (k < K - start)[:, None] & (m < M - row)[None, :]
        return tl.trans(tl.load(x_ptr + k[:, None] * M + m[None, :], mask, other=0.0))
    else:
        x_ptr += tl.cast(row, tl.int64) * K + start
        mask = (m < M - row)[:, None] & (k < K - start)[None, :]
        return tl.load(x_ptr + m[:, None] * K + k[None, :], mask, other=0.0)


@triton.jit
def _symmetric_product_kernel(
    x_ptr,  # (B, M, K), or (B, K, M) where TRANSPOSED
    add_ptr,  # (B, M, M), not touched unless HAS_ADD
    out_ptr,  # (B, M, M)
    alpha,
    beta,
    M,
    K,
    TRANSPOSED: tl.constexpr,
    HAS_ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A program computes one tile, rounds it, and stores it twice: what is equal is the same bits.

    Of a tile on the diagonal, what lies above it is a copy of what lies below.
    """
    n = tl.cdiv(M, BLOCK_M)
    tiles = n * (n + 1) // 2
    row, column = _place(tl.program_id(0) % tiles, n)
    row *= BLOCK_M
    column *= BLOCK_M
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    x_ptr += batch * M * K
    product = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        a = _load_tile(x_ptr, row, start, M, K, TRANSPOSED, BLOCK_M, BLOCK_K)
        b = _load_tile(x_ptr, column, start, M, K, TRANSPOSED, BLOCK_M, BLOCK_K)
        product = tl.dot(a, b.T, product, input_precision="ieee")
    product *= alpha
    i = tl.arange(0, BLOCK_M)
    local = i[:, None] * M + i[None, :]
    below = batch * M * M + row.to(tl.int64) * M + column  # what is left fits in 32 bits
    inside = (i < M - row)[:, None] & (i < M - column)[None, :]
    if HAS_ADD:
        add = tl.load(add_ptr + below + local, inside, other=0.0)
        product += beta * add.to(tl.float32)
    tile = product.to(out_ptr.dtype.element_ty)
    if row != column:
        above = batch * M * M + column.to(tl.int64) * M + row
        mask = (i < M - column)[:, None] & (i < M - row)[None, :]
        tl.store(out_ptr + above + local, tile.T, mask)
    else:
        tile = tl.where(i[:, None] >= i[None, :], tile, tile.T)
    tl.store(out_ptr + below + local, tile, inside)


@torch.library.custom_op("fastbert::symmetric_product", mutates_args=())
def _symmetric_product(
    x: Tensor, transposed: bool, add: Tensor | None, alpha: float, beta: float
) -> Tensor:
    B, M, K = (x if not transposed else x.mT).shape
    out = torch.empty(B, M, M, dtype=x.dtype, device=x.device)
    # sm_120 has less shared memory than sm_90's tiles and their transposition take.
    hopper = 90 <= capability(x.device) < 120
    tiles = TILES[90 if hopper else 80, x.dtype != torch.float32]
    n = triton.cdiv(M, tiles.block_m)
    if out.numel():
        _symmetric_product_kernel[(B * (n * (n + 1) // 2),)](
            x, x if add is None else add, out, alpha, beta, M, K,
            transposed, add is not None, tiles.block_m, tiles.block_k,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.maxnreg,
        )  # fmt: skip
    return out


@_symmetric_product.register_fake
def _(x, transposed, add, alpha, beta):
    M = x.shape[2 if transposed else 1]
    return x.new_empty(x.shape[0], M, M)


def symmetric_product(
    x: Tensor,  # (B, m, k)
    *,
    transposed: bool = False,  # x is (B, k, m)
    add: Tensor | None = None,  # (B, m, m), symmetric
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:  # (B, m, m)
    """alpha X Xᵀ + beta add of each matrix (XᵀX if transposed), symmetric bit for bit.

    Summed in fp32 and rounded once. Of `add`, what lies below the diagonal is read. No gradients.
    Any m and k will do, but only multiples of 16 are read in 16 bytes, without which it is slow.

    Raises:
        ValueError: a tensor of the wrong shape, dtype or device, or not contiguous; no GPU.
    """
    op, device = "symmetric_product", x.device
    reference = f"reference_optimizer.{op}"
    require_launchable(op, _symmetric_product_kernel, device, reference)
    require_tensor(op, "x", x, (None, None, None), STORAGE_DTYPES, device)
    if add is not None:
        M = x.shape[2 if transposed else 1]
        require_tensor(op, "add", add, (x.shape[0], M, M), x.dtype, device)
    out: Tensor = _symmetric_product(x, transposed, add, alpha, beta)
    return out


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:  # (B, rows, columns), both ways
    """Each matrix U S Vᵀ to about U Vᵀ; `reference_optimizer.newton_schulz` says how.

    Raises:
        ValueError: as `symmetric_product`.
    """
    return reference_optimizer.newton_schulz(x, steps, symmetric_product)


@triton.jit
def _offsets(starts_ptr, size, BLOCK: tl.constexpr):
    """Of this program's elements in the flat buffers, in the updates; and which there are."""
    matrix = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # Without the promise, what comes from memory would make every access 4 bytes wide.
    start = tl.multiple_of(tl.load(starts_ptr + matrix), 16)
    return start + i, matrix.to(tl.int64) * size + i, i < size


@triton.jit
def _momentum_kernel(
    grad_ptr,  # (P,)
    exp_avg_ptr,  # (P,) fp32
    update_ptr,  # (B, size)
    scalars_ptr,  # (SCALARS,) fp32
    starts_ptr,  # (B,) int64
    size,
    momentum,
    decay,  # 1 - momentum
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(scalars_ptr + FINITE) == 0.0:
        return
    flat, own, inside = _offsets(starts_ptr, size, BLOCK)
    g = tl.load(grad_ptr + flat, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg_ptr + flat, mask=inside, other=0.0)
    g *= tl.load(scalars_ptr + FACTOR)
    m += (g - m) * decay
    tl.store(exp_avg_ptr + flat, m, mask=inside)
    if NESTEROV:
        m = g + (m - g) * momentum
    tl.store(update_ptr + own, m.to(update_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _apply_kernel(
    master_ptr,  # (P,) fp32
    weights_ptr,  # (P,), not touched unless WRITE_BACK
    update_ptr,  # (B, size)
    scalars_ptr,  # (SCALARS,) fp32
    starts_ptr,  # (B,) int64
    size,
    lr_ratio,
    lr_factor,
    weight_decay,
    BLOCK: tl.constexpr,
    WRITE_BACK: tl.constexpr,
):
    if tl.load(scalars_ptr + FINITE) == 0.0:
        return
    flat, own, inside = _offsets(starts_ptr, size, BLOCK)
    w = tl.load(master_ptr + flat, mask=inside, other=0.0)
    update = tl.load(update_ptr + own, mask=inside, other=0.0).to(tl.float32)
    lr = tl.load(scalars_ptr + LR) * lr_ratio
    w = w * (1.0 - lr * weight_decay) - lr * lr_factor * update
    tl.store(master_ptr + flat, w, mask=inside)
    if WRITE_BACK:
        tl.store(weights_ptr + flat, w.to(weights_ptr.dtype.element_ty), mask=inside)


@functools.cache
def _on_device(starts: tuple[int, ...], device: torch.device) -> Tensor:  # (B,) int64
    """Made once, as a copy from the host waits for it; kept, as recorded graphs read it."""
    return torch.tensor(starts, dtype=torch.int64, device=device)


@torch.library.custom_op("fastbert::muon_momentum", mutates_args=("exp_avg",))
def _momentum(
    grad: Tensor, exp_avg: Tensor, scalars: Tensor, starts: list[int], rows: int, columns: int,
    momentum: float, nesterov: bool, dtype: torch.dtype,
) -> Tensor:  # (B, rows, columns), anything where the update is skipped  # fmt: skip
    update = torch.empty(len(starts), rows, columns, dtype=dtype, device=grad.device)
    places = _on_device(tuple(starts), grad.device)
    _momentum_kernel[(triton.cdiv(rows * columns, _BLOCK), len(starts))](
        grad, exp_avg, update, scalars, places, rows * columns, momentum, 1 - momentum,
        NESTEROV=nesterov, BLOCK=_BLOCK, num_warps=_NUM_WARPS,
    )  # fmt: skip
    return update


@_momentum.register_fake
def _(grad, exp_avg, scalars, starts, rows, columns, momentum, nesterov, dtype):
    return torch.empty(len(starts), rows, columns, dtype=dtype, device=grad.device)


@torch.library.custom_op("fastbert::muon_apply", mutates_args=("master", "weights"))
def _apply(
    master: Tensor, weights: Tensor | None, update: Tensor, scalars: Tensor, starts: list[int],
    lr_ratio: float, lr_factor: float, weight_decay: float,
) -> None:  # fmt: skip
    size = update[0].numel()
    rounded, write = (master, False) if weights is None else (weights, True)
    places = _on_device(tuple(starts), master.device)
    _apply_kernel[(triton.cdiv(size, _BLOCK), len(starts))](
        master, rounded, update, scalars, places, size, lr_ratio, lr_factor, weight_decay,
        BLOCK=_BLOCK, WRITE_BACK=write, num_warps=_NUM_WARPS,
    )  # fmt: skip


@_apply.register_fake
def _(*args):
    return None


def _check_groups(groups: tuple[MuonGroup, ...], begin: int, end: int) -> None:
    spans = []
    for rows, columns, starts in groups:
        require(bool(starts), f"muon_step: no matrices of {rows} x {columns}")
        spans += [(start, start + rows * columns) for start in starts]
    before = begin
    for start, stop in sorted(spans):
        inside = before <= start < stop <= end
        why = f"a matrix at ({start}, {stop}) is not between {before} and {end}"
        require(inside, f"muon_step: {why}")
        require(start % 16 == 0, f"muon_step: a matrix starts at {start}, no multiple of 16")
        before = stop


@torch.no_grad()
def muon_step(
    buffers: Buffers,
    hyper: Hyperparameters,
    muon: MuonHyperparameters,
    spread: Callable[[Orthogonalize, Tensor], Tensor] | None = None,
) -> None:
    """Muon and AdamW in place; `reference_optimizer.muon_step` says what it computes.

    Matrices start at multiples of 16 elements. The first call copies where they start to the
    device: make it before a CUDA graph is captured.

    Args:
        buffers, hyper, muon: see there.
        spread: as there; called once a group, on the host. Where the update will be skipped, the
            matrices hold anything.

    Raises:
        ValueError: a buffer's shape, dtype or device does not fit, or so with what `spread`
            returns; matrices overlap, or lie outside [begin, P); a setting is out of range.
    """
    op, device = "muon_step", buffers.master.device
    check_buffers(op, buffers, hyper, muon.begin)
    require(muon.dtype in STORAGE_DTYPES, f"{op}: dtype = {muon.dtype}, expected a float")
    factors = [muon_lr_factor(group, muon.adjust_lr_fn) for group in muon.groups]
    _check_groups(muon.groups, muon.begin, buffers.master.numel())
    scalars = flat_update([], *buffers, *hyper, muon.begin)

    def orthogonalize(x: Tensor) -> Tensor:
        return newton_schulz(x, muon.ns_steps)

    for (rows, columns, starts), factor in zip(muon.groups, factors, strict=True):
        x = _momentum(
            buffers.grad, buffers.exp_avg, scalars, [*starts], rows, columns,
            muon.momentum, muon.nesterov, muon.dtype,
        )  # fmt: skip
        x = spread(orthogonalize, x) if spread else orthogonalize(x)
        require_tensor(op, "spread's result", x, (len(starts), rows, columns), muon.dtype, device)
        _apply(
            buffers.master, buffers.weights, x, scalars, [*starts],
            muon.lr_ratio, factor, muon.weight_decay,
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Every kernel in every shipped configuration, for the compile report."""
    cases = [
        _product_case(dtype, transposed, add, arch, tiles)
        for dtype in STORAGE_DTYPES
        for transposed, add in ((False, False), (True, False), (False, True))
        for (arch, half), tiles in TILES.items()
        if half == (dtype != torch.float32)
    ]
    half = torch.bfloat16
    for dtype, updates in ((torch.float32, torch.float32), *((t, half) for t in STORAGE_DTYPES)):
        cases += [
            _elementwise_case(_momentum_kernel, {"NESTEROV": nesterov}, updates, grad=dtype)
            for nesterov in (True, False)
        ]
        write = {"WRITE_BACK": dtype != torch.float32}
        cases.append(_elementwise_case(_apply_kernel, write, updates, weights=dtype))
    return cases


def _product_case(
    dtype: torch.dtype, transposed: bool, add: bool, arch: int, tiles: Tiles
) -> CompileCase:
    kernel = _symmetric_product_kernel
    constexprs = {
        "TRANSPOSED": transposed, "HAS_ADD": add,
        "BLOCK_M": tiles.block_m, "BLOCK_K": tiles.block_k,
    }  # fmt: skip
    signature = kernel_signature(kernel, constexprs, dtype, alpha="fp32", beta="fp32")
    return CompileCase(
        name="symmetric_product",
        configuration=f"{triton_name(dtype)} {'XᵀX' if transposed else 'XXᵀ'}{' + add' * add}",
        fn=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        needs_wgmma=arch == 90 and dtype != torch.float32,
        divisible_by_16=("M", "K"),
        maxnreg=tiles.maxnreg,
        archs=(arch,),
    )


def _elementwise_case(
    kernel: Any, constexprs: dict[str, Any], updates: torch.dtype, **other: torch.dtype
) -> CompileCase:
    ((name, dtype),) = other.items()
    constexprs = constexprs | {"BLOCK": _BLOCK}
    numbers = ("momentum", "decay", "lr_ratio", "lr_factor", "weight_decay")
    types = dict.fromkeys(numbers, "fp32") | {"starts_ptr": "*i64"}
    types |= {"update_ptr": f"*{triton_name(updates)}", f"{name}_ptr": f"*{triton_name(dtype)}"}
    told = f"{name} {triton_name(dtype)}, update {triton_name(updates)}"
    return CompileCase(
        name="muon_momentum" if kernel is _momentum_kernel else "muon_apply",
        configuration=told + ", nesterov" * constexprs.get("NESTEROV", False),
        fn=kernel,
        signature=kernel_signature(kernel, constexprs, torch.float32, **types),
        constexprs=constexprs,
        num_warps=_NUM_WARPS,
        divisible_by_16=("size",),
    )
