"""The interpreter with its shortcuts computes what Triton's own does, to the bit."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels.attention import attention
from fastbert_kernels.gelu import gelu_layer_norm
from fastbert_kernels.layer_norm import dropout_add_layer_norm

SEED = torch.tensor([2**40 + 9, 3, 5])


def results(dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of three ops, with dropout: integers that wrap, sums, products, exp."""
    torch.manual_seed(0)
    H = 64
    qkv = torch.randn(70, 3, 1, 32)
    bounds = torch.tensor([0, 1, 40, 70]).int()
    rows, row = torch.randn(5, H), [torch.randn(H) for _ in range(3)]
    found = []
    for op, tensors in (
        (lambda qkv: attention(qkv, bounds, 64, 0.1, SEED, 0), [qkv]),
        (lambda *t: gelu_layer_norm(*t, 1e-5), [rows, *row]),
        (lambda x, r, *t: dropout_add_layer_norm(x, t[0], r, *t[1:], 1e-5, 0.1, SEED, 1),
         [rows, rows + 1, *row]),
    ):  # fmt: skip
        leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        out = op(*leaves)
        found += [out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_bits_are_tritons_own(dtype: torch.dtype, tritons_own: Callable[[], None]) -> None:
    short = results(dtype)
    tritons_own()
    own = results(dtype)
    assert len(short) == 2 + 5 + 6
    for a, b in zip(short, own, strict=True):
        assert a.dtype == b.dtype == dtype and torch.equal(a, b) and a.any()


@triton.jit
def _half(x_ptr, fail: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 4)
    tl.store(x_ptr + i, tl.load(x_ptr + i) / 2)
    tl.static_assert(not fail)


def test_a_launch_that_fails_leaves_the_language_as_it_was() -> None:
    def language() -> tuple[object, ...]:
        return tl.load, tl.core.tensor.__init__, tl.core.block_type.__init__

    before, x = language(), torch.ones(4)
    with pytest.raises(triton.runtime.errors.InterpreterError, match="AssertionError"):
        _half[(1,)](x, True)
    assert language() == before
    _half[(1,)](x, False)
    assert language() == before and (x == 0.25).all()
