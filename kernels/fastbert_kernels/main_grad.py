"""Weight gradients straight into a flat buffer: the product dW = dyᵀ x adds to it as it ends.

A weight that carries `main_grad` gets no `.grad` from the ops here: no tensor of its own, no cast
to fp32, no pass that adds. Known as gradient accumulation fusion (Megatron-LM, Shoeybi et al.
2019). At 110 M weights in bf16 it saves 220 MB of gradients and 1.3 GB of traffic a step.

R rows, H columns of the input, F of the output, V rows of a table, T tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert_kernels import reference


class MainGrad:
    """The place of one parameter in a flat gradient buffer.

    Attributes:
        buffer: a view of the flat buffer in the parameter's shape; fp32, or the weights' dtype.
        empty: whether the next gradient overwrites what the buffer holds instead of adding to it.
        rows: of the parameter and of the buffer, with the rows of zeros that lie behind either.
    """

    __slots__ = ("buffer", "empty", "rows")

    def __init__(self, buffer: Tensor, rows: int | None = None) -> None:
        self.buffer, self.empty = buffer, True
        self.rows = buffer.shape[0] if rows is None else rows

    def split(self, rows: tuple[int, ...]) -> list["MainGrad"]:
        """Parts of so many rows, which get the next gradient in place of the whole."""
        parts = [MainGrad(buffer) for buffer in self.buffer.split(rows)]
        for part in parts:
            part.empty = self.empty
        self.empty = False
        return parts

    def _filled(self) -> int:
        """0 before the first gradient, 1 from then on."""
        filled, self.empty = int(not self.empty), False
        return filled

    @torch.no_grad()
    def add_product(
        self,
        dy: Tensor,  # (R, F), or more columns: of zeros, for the rows behind
        x: Tensor,  # (R, H)
    ) -> None:
        """Adds dyᵀ x, accumulated in fp32."""
        buffer, rows = with_rows(self.buffer, dy.shape[1]), dy.t()
        if buffer.dtype == x.dtype:
            torch.addmm(buffer, rows, x, beta=self._filled(), out=buffer)
        elif buffer.is_cuda:
            torch.ops.aten.addmm.dtype_out(
                buffer, rows, x, buffer.dtype, beta=self._filled(), out=buffer
            )
        else:
            # A CPU has no product of bf16 into fp32, and one in fp32 takes four times as long where
            # bf16 is in hardware (95 against 430 GFLOP/s a core): rounded twice, as by autograd.
            self.add((rows @ x)[: self.buffer.shape[0]])

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """Adds a gradient of the parameter's shape."""
        if self._filled():
            # Mixed-dtype add_ is not vectorised on CPUs (14.8 ms against 3 for 11M elements).
            self.buffer.add_(gradient if gradient.is_cuda else gradient.to(self.buffer.dtype))
        else:
            self.buffer.copy_(gradient)

    @torch.no_grad()
    def add_rows(
        self,
        index: Tensor,  # (R,) each row once
        rows: Tensor,  # (R, H)
    ) -> None:
        """Adds rows of a gradient whose other rows are zero."""
        if not self._filled():
            self.buffer.zero_()
        self.buffer.index_add_(0, index, rows.to(self.buffer.dtype))


def with_rows(
    matrix: Tensor,  # (V, H), contiguous
    rows: int,
) -> Tensor:  # (rows, H)
    """A matrix with what lies behind it in its buffer."""
    if rows == matrix.shape[0]:
        return matrix
    return matrix.detach().as_strided((rows, matrix.shape[1]), matrix.stride())


def main_grad_of(parameter: Tensor) -> MainGrad | None:
    """Where the gradient of a parameter goes; None: autograd's way."""
    found: MainGrad | None = getattr(parameter, "main_grad", None)
    return found if torch.is_grad_enabled() else None


class _Linear(torch.autograd.Function):
    """(x Wᵀ + b, x). The gradient of the second is overwritten with the sum that is x's gradient.

    Nobody misses it: LayerNorm makes it, and shares it at most (without dropout) with the product
    before it, which has read it when dy, its consequence, comes here.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, main_grad):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.main_grad = main_grad
        return F.linear(x, weight, bias), x

    @staticmethod
    def backward(ctx, dy, dresidual):  # type: ignore[no-untyped-def]
        if dy is None:
            return dresidual, None, None, None
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        ctx.main_grad.add_product(dy, x)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight if dresidual is None else plus_product(dresidual, dy, weight)
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, None, dbias, None


def plus_product(
    dresidual: Tensor,  # (R, H)
    dy: Tensor,  # (R, F)
    weight: Tensor,  # (F, H)
) -> Tensor:  # (R, H)
    """dresidual + dy W, in place of dresidual."""
    own = dresidual.clone() if dresidual.data_ptr() == dy.data_ptr() else dresidual.contiguous()
    return torch.addmm(own, dy, weight, out=own)


def linear(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (F, H)
    bias: Tensor | None = None,  # (F,)
) -> Tensor:  # (R, F)
    """x Wᵀ + b."""
    return linear_residual(x, weight, bias)[0]


def linear_residual(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (F, H)
    bias: Tensor | None = None,  # (F,)
) -> tuple[Tensor, Tensor]:  # (R, F), (R, H)
    """x Wᵀ + b, and x for who adds it as a residual: the product dy W adds the residual's gradient.

    That saves a pass of 6 bytes an element in bf16, and a rounding. With `main_grad`, the gradient
    of the second output is overwritten: let an op read it that makes a new one, as LayerNorm does,
    and no hook keep it.
    """
    main_grad = main_grad_of(weight)
    if main_grad is None:
        return reference.linear_residual(x, weight, bias)
    product, residual = _Linear.apply(x, weight, bias, main_grad)
    return product, residual


def linear_gelu_residual(
    x: Tensor,  # (R, H)
    weight: Tensor,  # (F, H)
    bias: Tensor,  # (F,)
    approximate: str = "none",
) -> tuple[Tensor, Tensor]:  # (R, F), (R, H)
    """GELU(x Wᵀ + b), and x as from `linear_residual`."""
    product, residual = linear_residual(x, weight, bias)
    return reference.gelu(product, approximate), residual


class _QkvLinearAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, weight, bias, main_grad):  # type: ignore[no-untyped-def]
        q, kv, rows = reference.qkv_linear_at(x, positions, weight, bias)
        ctx.save_for_backward(x, rows, positions, weight)
        ctx.main_grad = main_grad
        return q, kv, rows

    @staticmethod
    def backward(ctx, dq, dkv, drows):  # type: ignore[no-untyped-def]
        x, rows, positions, weight = ctx.saved_tensors
        dq, dkv = dq.contiguous(), dkv.contiguous()
        (for_q, for_kv), (q_weight, kv_weight) = (
            whole.split((dq.shape[1], dkv.shape[1])) for whole in (ctx.main_grad, weight)
        )
        for_q.add_product(dq, rows)
        for_kv.add_product(dkv, x)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dkv @ kv_weight
            # Unused positions, which stand for the last token here, have gradients of 0.
            at = positions.clamp(max=len(x) - 1)
            dx.index_add_(0, at, plus_product(drows, dq, q_weight))
        if ctx.needs_input_grad[3]:
            dbias = torch.cat((dq.sum(0), dkv.sum(0)))
        return dx, None, None, dbias, None


def qkv_linear_at(
    x: Tensor,  # (T, H)
    positions: Tensor,  # (R,) int64; T or more: unused
    weight: Tensor,  # (3 F, H)
    bias: Tensor,  # (3 F,)
) -> tuple[Tensor, Tensor, Tensor]:  # (R, F), (T, 2 F), (R, H)
    """Queries of the tokens at `positions`, keys and values of all; x at `positions`.

    As in `linear_residual`, a product adds the gradient of the last, and overwrites it.
    """
    main_grad = main_grad_of(weight)
    if main_grad is None:
        return reference.qkv_linear_at(x, positions, weight, bias)
    q, kv, rows = _QkvLinearAt.apply(x, positions, weight, bias, main_grad)
    return q, kv, rows


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, ids, skip_id, main_grad):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids)
        ctx.skip_id, ctx.main_grad = skip_id, main_grad
        return reference.accumulate(table[ids])

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        (ids,) = ctx.saved_tensors
        used, compact = torch.unique(ids, return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(dout, compact, used.numel(), -1, False)
        sums[used == ctx.skip_id] = 0.0
        ctx.main_grad.add_rows(used, sums)
        return None, None, None, None


def embedding(
    table: Tensor,  # (V, H)
    ids: Tensor,  # (T,)
    skip_id: int = -1,
) -> Tensor:  # (T, H) in fp32
    """table[ids], its gradient summed in fp32; the row `skip_id` gets none. For a CPU."""
    main_grad = main_grad_of(table)
    out: Tensor
    if main_grad is None:
        out = reference.embedding(table, ids, skip_id)
    else:
        out = _Embedding.apply(table, ids, skip_id, main_grad)
    return out
