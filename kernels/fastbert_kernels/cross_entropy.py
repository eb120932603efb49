"""The masked-word loss: tied linear layer + softmax cross-entropy, its gradient made in place.

With logits z = x Wᵀ + b, p = softmax(z), lse = log Σ exp z, label t, smoothing ε and z-loss ζ,
a row's loss and the gradient of its logits are

    loss = (1 - ε) (lse - z_t) + ε (lse - Σ_v z_v / V) + ζ lse²
    dz_v = p_v (1 + 2 ζ lse) - ε / V - (1 - ε) [v = t]

(Szegedy et al. 2016, section 7; Chowdhery et al. 2022, section 5). The forward already knows the
gradient up to a scalar, so it overwrites the logits: one buffer in the storage type, no fp32 logits
and no second product. At M = 2,500, V = 30522, H = 768 in bf16: three products of 117 GFLOP,
0.44 ms at 800 TFLOP/s, beside 153 MB of logits read and written once here and read once for dbias,
0.15 ms at 3 TB/s. M masked tokens, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels import checks
from fastbert_kernels.compile_cases import CompileCase
from fastbert_kernels.main_grad import main_grad_of, with_rows
from fastbert_kernels.triton_import import tl, triton

CHUNK_ROWS = 4096
"""Rows whose logits are held at a time (250 MB in bf16); more rows go chunk by chunk."""

_IGNORE = tl.constexpr(-100)
_SPLITS = 16  # of the rows, in the sum over columns: 120 x 16 programs at V = 30522


@triton.jit
def _softmax_gradient_kernel(
    logits_ptr,  # (M, V_PADDED) without bias; overwritten by the gradient, padding by zeros
    bias_ptr,  # (V_PADDED,)
    labels_ptr,  # (M,) int64
    losses_ptr,  # (M,) fp32
    LABEL_SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    V: tl.constexpr,
    V_PADDED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    """One row: its second read comes from L2 (4 rows of 61 KB per multiprocessor are 32 MB)."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * V_PADDED
    label = tl.load(labels_ptr + row)
    if label == _IGNORE:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, V_PADDED, BLOCK_V):
                cols = start + tl.arange(0, BLOCK_V)
                zeros = tl.zeros((BLOCK_V,), logits_ptr.dtype.element_ty)
                tl.store(row_ptr + cols, zeros, mask=cols < V_PADDED)
        return

    # Loads are masked by V_PADDED, a multiple of 64, because a mask by V would make them 4 bytes
    # wide; what the padding holds is replaced after the load. The sums stay spread over the
    # threads until the end: a block costs one reduction, its maximum.
    largest = float("-inf")
    totals = tl.zeros((BLOCK_V,), tl.float32)
    z_sums = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, V_PADDED, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = _biased_logits(row_ptr, bias_ptr, cols, V, V_PADDED)
        larger = tl.maximum(largest, tl.max(z, 0))
        totals = totals * tl.exp(largest - larger) + tl.exp(z - larger)
        if LABEL_SMOOTHING > 0:
            z_sums += tl.where(cols < V, z, 0.0)
        largest = larger

    total = tl.sum(totals, 0)
    lse = largest + tl.log(total)
    known = (label >= 0) & (label < V)  # any other label makes the loss NaN: not a silent zero
    target = tl.load(row_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    target += tl.load(bias_ptr + label, mask=known, other=0.0).to(tl.float32)
    loss = lse - (1.0 - LABEL_SMOOTHING) * target + Z_LOSS * lse * lse
    if LABEL_SMOOTHING > 0:
        loss -= LABEL_SMOOTHING / V * tl.sum(z_sums, 0)
    tl.store(losses_ptr + row, loss)

    if GRADIENT:
        tl.debug_barrier()  # every thread reads the target before any thread overwrites it
        factor = (1.0 + 2.0 * Z_LOSS * lse) / total
        for start in range(0, V_PADDED, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            z = _biased_logits(row_ptr, bias_ptr, cols, V, V_PADDED)
            dz = tl.exp(z - largest) * factor - LABEL_SMOOTHING / V
            # p_t - 1 in fp32, then rounded: near convergence p_t rounds to 1 in bf16.
            dz = tl.where(cols == label, dz - (1.0 - LABEL_SMOOTHING), dz)
            dz = tl.where(cols < V, dz, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(row_ptr + cols, dz, mask=cols < V_PADDED)


@triton.jit
def _biased_logits(row_ptr, bias_ptr, cols, V: tl.constexpr, V_PADDED: tl.constexpr):
    z = tl.load(row_ptr + cols, mask=cols < V_PADDED, other=0.0)
    z = tl.where(cols < V, z, float("-inf")).to(tl.float32)
    return z + tl.load(bias_ptr + cols, mask=cols < V_PADDED, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def _column_sums_kernel(
    dlogits_ptr,  # (M, V_PADDED)
    partials_ptr,  # (splits, V_PADDED) fp32
    M,
    rows_per_split,
    V_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """First stage of dbias: the rows of one split, added in fp32 in a fixed order."""
    cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    first = tl.program_id(1) * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    sums = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        addresses = dlogits_ptr + rows.to(tl.int64)[:, None] * V_PADDED + cols[None, :]
        inside = (rows < last)[:, None] & (cols < V_PADDED)[None, :]
        sums += tl.load(addresses, mask=inside, other=0.0).to(tl.float32)
    out = partials_ptr + tl.program_id(1) * V_PADDED + cols
    tl.store(out, tl.sum(sums, 0), mask=cols < V_PADDED)


def linear_cross_entropy(
    x: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor,  # (V,)
    labels: Tensor,  # (M,) int64, -100 where nothing is to be predicted
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:  # () fp32
    """Sum over labelled rows of the loss above; meaning of `reference.linear_cross_entropy`.

    Beyond inputs and gradients, memory holds the logits of min(M, chunk_rows) rows. Where
    M <= chunk_rows, the products of the backward run in the backward and take the upstream scalar
    on their small operands; otherwise they run chunk by chunk in the forward, dW in fp32. A weight
    with `main_grad` gets its gradient there, from one chunk whatever `chunk_rows` says.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, smoothing is outside [0, 1], z_loss is
            negative, or there is no GPU.
    """
    op, device = "linear_cross_entropy", x.device
    checks.require_launchable(op, _softmax_gradient_kernel, device)
    checks.require_tensor(op, "x", x, (None, None), checks.STORAGE_DTYPES, device)
    M, H = x.shape
    checks.require_tensor(op, "weight", weight, (None, H), x.dtype, device)
    checks.require_tensor(op, "bias", bias, (weight.shape[0],), x.dtype, device)
    checks.require_tensor(op, "labels", labels, (M,), torch.int64, device)
    checks.require(M > 0, f"{op}: x has no rows")
    # Not `checks.require`: torch.compile cannot format a number that it traces as a symbol.
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing = {label_smoothing} is outside [0, 1]")
    if z_loss < 0.0:
        raise ValueError(f"{op}: z_loss = {z_loss} is negative")
    if chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows = {chunk_rows} is not positive")
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    main_grad = main_grad_of(weight)
    if gradient and main_grad is not None:
        into: Tensor = _IntoMainGrad.apply(
            x, weight, bias, labels, label_smoothing, z_loss, main_grad
        )
        return into
    if gradient and M > chunk_rows:
        loss, *_ = _chunked(x, weight, bias, labels, label_smoothing, z_loss, chunk_rows)
    else:
        rows = M if gradient else min(M, chunk_rows)
        loss, _ = _whole(x, weight, bias, labels, label_smoothing, z_loss, rows, gradient)
    return loss


def _padded(V: int) -> int:
    # cuBLAS and 16-byte accesses want rows of logits that start on a 128-byte boundary.
    return -(-V // 64) * 64


def _block(V: int) -> tuple[int, int]:
    """BLOCK_V and the number of warps of the row kernel: 16 elements a thread."""
    block = min(triton.next_power_of_2(V), 4096)
    return block, max(block // 512, 1)


def _losses_and_gradient(
    logits: Tensor,  # (rows, V_PADDED): scratch, then the gradient
    losses: Tensor,  # (rows,)
    x: Tensor,  # (rows, H)
    weight: Tensor,  # (V or more, H): what the rows behind give is overwritten
    padded_bias: Tensor,  # (V_PADDED,)
    V: int,
    labels: Tensor,  # (rows,)
    label_smoothing: float,
    z_loss: float,
    gradient: bool,
) -> None:
    torch.mm(x, weight.t(), out=logits[:, : weight.shape[0]])
    block, num_warps = _block(V)
    _softmax_gradient_kernel[(x.shape[0],)](
        logits, padded_bias, labels, losses, LABEL_SMOOTHING=label_smoothing, Z_LOSS=z_loss,
        V=V, V_PADDED=logits.shape[1], BLOCK_V=block, GRADIENT=gradient, num_warps=num_warps,
    )  # fmt: skip


def _column_sums(dlogits: Tensor, V: int) -> Tensor:  # (M, V_PADDED) -> (V,) fp32
    M, V_padded = dlogits.shape
    rows_per_split = -(-M // (_SPLITS * 16)) * 16
    splits = -(-M // rows_per_split)
    partials = torch.empty(splits, V_padded, device=dlogits.device, dtype=torch.float32)
    _column_sums_kernel[(triton.cdiv(V_padded, 256), splits)](
        dlogits, partials, M, rows_per_split,
        V_PADDED=V_padded, BLOCK_M=16, BLOCK_V=256, num_warps=4,
    )  # fmt: skip
    return partials.sum(0)[:V]


@torch.library.custom_op("fastbert::linear_cross_entropy", mutates_args=())
def _whole(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    label_smoothing: float,
    z_loss: float,
    chunk_rows: int,
    gradient: bool,
) -> tuple[Tensor, Tensor]:  # () loss, (M, V_PADDED) dlogits
    M, V_padded = x.shape[0], _padded(bias.numel())
    losses = torch.empty(M, device=x.device, dtype=torch.float32)
    logits = torch.empty(chunk_rows, V_padded, device=x.device, dtype=x.dtype)
    padded_bias = F.pad(bias, (0, V_padded - bias.numel()))
    for start in range(0, M, chunk_rows):
        rows = slice(start, min(start + chunk_rows, M))
        _losses_and_gradient(
            logits[: rows.stop - start], losses[rows], x[rows], weight, padded_bias, bias.numel(),
            labels[rows], label_smoothing, z_loss, gradient,
        )  # fmt: skip
    return losses.sum(), logits if gradient else torch.empty(0, device=x.device, dtype=x.dtype)


@_whole.register_fake
def _(x, weight, bias, labels, label_smoothing, z_loss, chunk_rows, gradient):
    shape = (x.shape[0], _padded(bias.shape[0])) if gradient else (0,)
    return x.new_empty((), dtype=torch.float32), x.new_empty(shape)


@torch.library.custom_op("fastbert::linear_cross_entropy_backward", mutates_args=())
def _whole_backward(
    dloss: Tensor,  # () fp32
    dlogits: Tensor,  # (M, V_PADDED)
    x: Tensor,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight = dlogits[:, : weight.shape[0]].t() @ _scaled(x, dloss)
    dx, dbias = _small_gradients(dloss, dlogits, x, weight, weight.shape[0])
    return dx, dweight, dbias


@_whole_backward.register_fake
def _(dloss, dlogits, x, weight):
    return torch.empty_like(x), torch.empty_like(weight), x.new_empty(weight.shape[0])


def _scaled(x: Tensor, dloss: Tensor) -> Tensor:
    """The small operand of dW takes the upstream scalar, in fp32 and in one pass.

    Not `x * dloss`: beside a 16-bit tensor CUDA rounds a tensor of no dimension to 16 bits, which
    put up to 0.2% on all of dW in bf16. Of one dimension, it makes the product fp32.
    """
    return torch.mul(x, dloss.view(1), out=torch.empty_like(x))


def _small_gradients(
    dloss: Tensor, dlogits: Tensor, x: Tensor, weight: Tensor, V: int
) -> tuple[Tensor, Tensor]:  # dx, dbias
    # dx is a sum over V terms: in fp32, because cuBLAS splits it over programs and would otherwise
    # add their parts in the storage type.
    dx = torch.mul(_mm_fp32(dlogits[:, : len(weight)], weight), dloss, out=torch.empty_like(x))
    return dx, (_column_sums(dlogits, V) * dloss).to(x.dtype)


class _IntoMainGrad(torch.autograd.Function):
    """The whole loss in one chunk, dW added to its place in the flat buffer.

    All three products take the rows of zeros that lie behind W and behind its gradient: V = 30,522
    is no multiple of 8 elements, the 16 bytes that cuBLAS likes to access at once; 30,528 is.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, labels, label_smoothing, z_loss, main_grad):
        weight = with_rows(weight, main_grad.rows)
        loss, dlogits = _whole(x, weight, bias, labels, label_smoothing, z_loss, x.shape[0], True)
        ctx.save_for_backward(dlogits, x, weight)
        ctx.main_grad, ctx.V = main_grad, bias.numel()
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dlogits, x, weight = ctx.saved_tensors
        dx, dbias = _small_gradients(dloss, dlogits, x, weight, ctx.V)
        ctx.main_grad.add_product(dlogits[:, : weight.shape[0]], _scaled(x, dloss))
        return dx, None, dbias, *(None,) * 4


def _mm_fp32(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _add_mm_fp32(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in fp32 and in place."""
    if a.dtype == torch.float32 or not a.is_cuda:
        total.addmm_(a.float(), b.float())
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)


@torch.library.custom_op("fastbert::linear_cross_entropy_chunked", mutates_args=())
def _chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    label_smoothing: float,
    z_loss: float,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # () loss; dx, dweight, dbias of it, fp32
    M, V_padded = x.shape[0], _padded(weight.shape[0])
    losses = torch.empty(M, device=x.device, dtype=torch.float32)
    logits = torch.empty(chunk_rows, V_padded, device=x.device, dtype=x.dtype)
    padded_bias = F.pad(bias, (0, V_padded - bias.numel()))
    dx = torch.empty_like(x, dtype=torch.float32)
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    dbias = torch.zeros_like(bias, dtype=torch.float32)
    for start in range(0, M, chunk_rows):
        rows = slice(start, min(start + chunk_rows, M))
        dlogits = logits[: rows.stop - start]
        _losses_and_gradient(
            dlogits, losses[rows], x[rows], weight, padded_bias, bias.numel(), labels[rows],
            label_smoothing, z_loss, True,
        )  # fmt: skip
        dz = dlogits[:, : weight.shape[0]]
        dx[rows] = _mm_fp32(dz, weight)
        _add_mm_fp32(dweight, dz.t(), x[rows])
        dbias += _column_sums(dlogits, weight.shape[0])
    return losses.sum(), dx, dweight, dbias


@_chunked.register_fake
def _(x, weight, bias, labels, label_smoothing, z_loss, chunk_rows):
    like = [torch.empty_like(t, dtype=torch.float32) for t in (x, weight, bias)]
    return x.new_empty((), dtype=torch.float32), *like


def _save_whole(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], inputs[0], inputs[1])


def _backward_whole(ctx, dloss, _dlogits):
    if dloss is None:
        return (None,) * 8
    return *_whole_backward(dloss, *ctx.saved_tensors), *(None,) * 5


def _save_chunked(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.dtype = inputs[0].dtype


def _backward_chunked(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 7
    return *((saved * dloss).to(ctx.dtype) for saved in ctx.saved_tensors), *(None,) * 4


_whole.register_autograd(_backward_whole, setup_context=_save_whole)
_chunked.register_autograd(_backward_chunked, setup_context=_save_chunked)


def compile_cases() -> list[CompileCase]:
    """Every kernel in every shipped configuration, for the compile report."""
    cases = []
    sums = {"V_PADDED": _padded(30522), "BLOCK_M": 16, "BLOCK_V": 256}
    V = 30522  # larger vocabularies take the same tiles, and more turns
    block, num_warps = _block(V)
    for dtype in checks.STORAGE_DTYPES:
        name = checks.triton_name(dtype)
        for smoothing, gradient in ((0.0, False), (0.0, True), (0.1, True)):
            constexprs = {
                "LABEL_SMOOTHING": smoothing, "Z_LOSS": 0.0, "V": V, "V_PADDED": _padded(V),
                "BLOCK_V": block, "GRADIENT": gradient,
            }  # fmt: skip
            signature = checks.kernel_signature(
                _softmax_gradient_kernel, constexprs, dtype, labels_ptr="*i64", losses_ptr="*fp32"
            )
            label = f"{name} smoothing={smoothing} gradient={gradient}"
            cases.append(
                CompileCase("softmax_gradient", label, _softmax_gradient_kernel, signature,
                            constexprs, num_warps)
            )  # fmt: skip
        signature = checks.kernel_signature(_column_sums_kernel, sums, dtype)
        cases.append(
            CompileCase("column_sums", name, _column_sums_kernel, signature, sums)
        )  # fmt: skip
    return cases
