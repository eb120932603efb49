"""Products that add weight gradients to a flat buffer, and residual gradients to their own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastbert_kernels.main_grad import MainGrad, linear, linear_residual, qkv_linear_at

R, H, T = 6, 4, 9
Consumer = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, y, residual), all (R, H)


class Norm(torch.autograd.Function):
    """a + b, one gradient tensor for both: as our LayerNorm has it without dropout."""

    made: Tensor

    @staticmethod
    def forward(ctx, a, b):  # type: ignore[no-untyped-def]
        return a + b

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        Norm.made = dout * 3
        return Norm.made, Norm.made


def weight() -> Tensor:
    made = torch.randn(H, H, dtype=torch.float64, requires_grad=True)
    made.main_grad = MainGrad(torch.zeros(H, H, dtype=torch.float64))  # type: ignore[attr-defined]
    return made


def layer(y: Tensor, residual: Tensor, other: Tensor) -> Tensor:
    """Half an encoder layer: products read the gradient that the residual shares."""
    out: Tensor = Norm.apply(linear(torch.tanh(y), other), residual)
    return out


CONSUMERS: dict[str, Consumer] = {
    "a layer": lambda x, y, residual: layer(y, residual, OTHER).sin(),
    "nothing but y": lambda x, y, residual: y.sin(),
    "nothing but the residual": lambda x, y, residual: residual.sin(),
    "an expanded gradient": lambda x, y, residual: y.sin().sum() + residual.sum(),
    "a gradient by columns": lambda x, y, residual: y.sin().sum() + (residual.t() @ COLUMNS).sum(),
    "one gradient for both": lambda x, y, residual: (y + residual) * COLUMNS,
    "x used again": lambda x, y, residual: layer(y, residual, OTHER).sin() * x,
    "the residual used twice": lambda x, y, residual: layer(y, residual, OTHER) * residual,
    "another dtype": lambda x, y, residual: (y + residual.float().double()).sin(),
    "strided y": lambda x, y, residual: (y.t().contiguous().sin().t() + residual).sin(),
}
OTHER, COLUMNS = weight(), torch.randn(R, H, dtype=torch.float64)


def gradients(
    consumer: Consumer, own: bool, bias: Tensor, w: Tensor, value: Tensor
) -> dict[str, Tensor | None]:
    x = value.clone().requires_grad_()
    before = x * 1  # not a leaf
    before.retain_grad()
    y, residual = linear_residual(before, w, bias) if own else (before @ w.t() + bias, before)
    consumer(before, y, residual).sum().backward()
    found = {"x": x.grad, "before": before.grad, "bias": bias.grad}
    bias.grad = None
    return found


@pytest.mark.parametrize("name", CONSUMERS)
def test_gradients_are_autograds(name: str) -> None:
    w, bias = weight(), torch.randn(H, dtype=torch.float64, requires_grad=True)
    value = torch.randn(R, H, dtype=torch.float64)
    found = gradients(CONSUMERS[name], True, bias, w, value)
    assert w.grad is None
    want = gradients(CONSUMERS[name], False, bias, w, value)
    for key, wanted in want.items():
        mine = found[key]
        assert (mine is None) == (wanted is None), key
        if mine is not None and wanted is not None:
            assert (mine - wanted).abs().max() < 1e-6 * wanted.abs().max(), key
    buffer = w.main_grad.buffer  # type: ignore[attr-defined]
    dweight = torch.zeros_like(buffer) if w.grad is None else w.grad
    assert (buffer - dweight).abs().max() <= 1e-6 * dweight.abs().max()


def test_the_residuals_gradient_becomes_that_of_x() -> None:
    w, x = weight(), torch.randn(R, H, dtype=torch.float64, requires_grad=True)
    y, residual = linear_residual(x, w)
    (dx,) = torch.autograd.grad(layer(y, residual, OTHER).sum(), x)
    assert dx.data_ptr() == Norm.made.data_ptr()


def test_a_graph_may_be_walked_twice_and_checkpointed() -> None:
    w, x = weight(), torch.randn(R, H, dtype=torch.float64, requires_grad=True)
    out = layer(*linear_residual(x, w), OTHER).sin().sum()
    first, again = (torch.autograd.grad(out, x, retain_graph=True)[0] for _ in range(2))
    again_made = checkpoint(lambda x: layer(*linear_residual(x, w), OTHER), x, use_reentrant=False)
    (checkpointed,) = torch.autograd.grad(again_made.sin().sum(), x)
    assert torch.equal(first, again) and torch.equal(first, checkpointed)


def test_a_frozen_input_and_a_frozen_product() -> None:
    w, x = weight(), torch.randn(R, H, dtype=torch.float64)
    layer(*linear_residual(x, w), OTHER).sum().backward()
    assert w.main_grad.buffer.any()  # type: ignore[attr-defined]
    with torch.no_grad():
        y, residual = linear_residual(x, w)
    assert residual is x and torch.equal(y, x @ w.t())


@pytest.mark.parametrize("positions", [[0, 2, 3, 7, 8, 9], [1, 2, 9, 9, 9, 9], [9] * 6])
def test_queries_of_some_tokens_and_keys_of_all(positions: list[int]) -> None:
    x, at = torch.randn(T, H, dtype=torch.float64, requires_grad=True), torch.tensor(positions)
    w = torch.randn(3 * H, H, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3 * H, dtype=torch.float64, requires_grad=True)
    used = (at < T)[:, None]

    def gradients() -> tuple[Tensor, ...]:
        q, kv, rows = qkv_linear_at(x, at, w, bias)
        assert rows.shape == (R, H) and torch.equal(rows[used[:, 0]], x[at[used[:, 0]]])
        out = Norm.apply(linear(torch.tanh(q) + kv.sum() / T, OTHER), rows).sin()
        dx, dbias = torch.autograd.grad((out * used).sum(), (x, bias), retain_graph=True)
        (out * used).sum().backward()
        return dx, dbias

    want = gradients()
    dweight, x.grad, w.grad = w.grad, None, None
    w.main_grad = MainGrad(torch.full((3 * H, H), torch.nan, dtype=torch.float64))  # type: ignore[attr-defined]
    found = gradients()
    assert w.grad is None and dweight is not None
    assert torch.allclose(w.main_grad.buffer, 2 * dweight, rtol=1e-12)  # type: ignore[attr-defined]
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
