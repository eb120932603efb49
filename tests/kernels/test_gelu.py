"""bias_gelu and gelu_layer_norm against the reference in fp64, forward and every gradient.

A kernel may not err more than twice as much as plain PyTorch in the same dtype.
"""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert_kernels import gelu, reference

# exp overflows to infinity where 1 / (1 + exp) is to be 0; numpy, which interprets, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

TINY = {torch.float32: 1e-6, torch.float16: 1e-3}
SHAPES = [(1, 128), (35, 384), (18, 768), (9, 1024), (5, 1032)]
DTYPES = [torch.float32, torch.float16]


def results(
    op: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype, *args: object
) -> dict[str, Tensor]:
    """Output and gradients by all inputs, for a fixed random output gradient."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    y = op(*leaves.values(), *args)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    dy = dy.to(tensors["x"].dtype).to(dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def compare(name: str, tensors: dict[str, Tensor], *args: object) -> None:
    dtype = tensors["x"].dtype
    found = results(getattr(gelu, name), tensors, dtype, *args)
    plain = results(getattr(reference, name), tensors, dtype, *args)
    want = results(getattr(reference, name), tensors, torch.float64, *args)
    for key, exact in want.items():
        assert found[key].dtype == dtype and found[key].shape == exact.shape
        error, allowed = ((t[key].double() - exact).abs().max() for t in (found, plain))
        tiny = TINY[dtype] * exact.abs().max()
        assert error <= 2 * allowed + tiny, (key, float(error), float(allowed))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("R", "H", "approximate"), [*((R, H, "none") for R, H in SHAPES), (17, 3072, "tanh")]
)
def test_bias_gelu(R: int, H: int, approximate: str, dtype: torch.dtype) -> None:
    x, bias = (2 * torch.randn(R, H)).to(dtype), torch.randn(H).to(dtype)
    compare("bias_gelu", {"x": x, "bias": bias}, approximate)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("R", "H", "approximate"), [*((R, H, "none") for R, H in SHAPES), (17, 768, "tanh")]
)
def test_gelu_layer_norm(R: int, H: int, approximate: str, dtype: torch.dtype) -> None:
    x, bias = (2 * torch.randn(R, H)).to(dtype), torch.randn(H).to(dtype)
    weight, beta = (torch.randn(H) + 1).to(dtype), torch.randn(H).to(dtype)
    tensors = {"x": x, "bias": bias, "weight": weight, "beta": beta}
    compare("gelu_layer_norm", tensors, 1e-12, approximate)


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, slope_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y, slope = gelu.gelu_slope(x, False)
    tl.store(y_ptr + i, tl.where(i % 2 == 0, y, gelu.gelu(x, False)))
    tl.store(slope_ptr + i, slope)


def test_the_exact_gelu_is_exact() -> None:
    """Within two roundings of fp32, near 0 and in the tails."""
    N = 1 << 16
    x = torch.linspace(-12, 12, N)
    x[0], x[1], x[N // 2] = -1e4, 1e4, 0.0
    y, slope = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    _gelu_kernel[(1,)](x, y, slope, N)
    exact = x.double().requires_grad_()
    want = torch.nn.functional.gelu(exact)
    (want_slope,) = torch.autograd.grad(want.sum(), exact)
    epsilon = torch.finfo(torch.float32).eps
    assert ((y - want).abs() <= 2 * epsilon * want.abs().clamp(min=0.5)).all()
    assert (slope - want_slope).abs().max() <= 2 * epsilon


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_backward_of_a_kept_pre_activation(dtype: torch.dtype) -> None:
    x, bias, dy = (torch.randn(shape).to(dtype) for shape in ((21, 264), (264,), (21, 264)))
    total = x + bias
    found = gelu.gelu_backward(dy, total, None)
    exact = total.double().requires_grad_()
    (dx,) = torch.autograd.grad(reference.gelu(exact), exact, dy.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    assert torch.allclose(found[0].double(), dx, rtol=tolerance, atol=tolerance)
    assert torch.allclose(found[1].double(), dx.sum(0), rtol=tolerance, atol=4 * tolerance)
    with_bias = gelu.gelu_backward(dy, x, bias)
    assert torch.allclose(with_bias[0].double(), dx, rtol=tolerance, atol=4 * tolerance)


def test_no_rows() -> None:
    for name, count, args in (("bias_gelu", 1, ()), ("gelu_layer_norm", 3, (1e-5,))):
        tensors = {"x": torch.empty(0, 64)} | {str(i): torch.ones(64) for i in range(count)}
        found = results(getattr(gelu, name), tensors, torch.float32, *args)
        assert found["y"].shape == found["x"].shape == (0, 64) and not found["0"].any()


@pytest.mark.parametrize("name", ["bias_gelu", "gelu_layer_norm"])
def test_opcheck_and_compile(name: str) -> None:
    tensors = [torch.randn(5, 128), *(torch.randn(128) for _ in range(3))]
    tensors = [t.requires_grad_() for t in (tensors[:2] if name == "bias_gelu" else tensors)]
    args = (*tensors, *(() if name == "bias_gelu" else (1e-5,)), "none")
    torch.library.opcheck(getattr(torch.ops.fastbert, name).default, args)
    op = getattr(gelu, name)
    y, want = torch.compile(op, fullgraph=True, backend="aot_eager")(*args), op(*args)
    dy = torch.randn_like(y)
    assert torch.equal(y, want)
    for ours, theirs in zip(
        torch.autograd.grad(y, tensors, dy), torch.autograd.grad(want, tensors, dy), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bias", [None, torch.randn(64)])
def test_gelu_backward_in_a_graph(bias: Tensor | None) -> None:
    args = (torch.randn(5, 64), torch.randn(5, 64), bias, "none")
    torch.library.opcheck(torch.ops.fastbert.gelu_backward.default, args)
    compiled = torch.compile(gelu.gelu_backward, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(compiled(*args), gelu.gelu_backward(*args), strict=True):
        assert torch.equal(traced, eager)


def test_refusals() -> None:
    x, bias = torch.randn(4, 64), torch.randn(64)
    for args, message in (
        ((x, bias[:8]), r"bias_gelu: bias has shape \(8,\), expected \(64\)"),
        ((x, bias.int()), "bias is torch.int32, expected float32 or float16 or bfloat16"),
        ((x[:, :60].contiguous(), bias), "60 columns, expected a multiple of 8"),
        ((x, bias, "fast"), "approximate = 'fast', expected 'none' or 'tanh'"),
    ):
        with pytest.raises(ValueError, match=message):
            gelu.bias_gelu(*args)
    with pytest.raises(ValueError, match=r"weight is torch\.float16"):
        gelu.gelu_layer_norm(x, bias, bias.half(), bias, 1e-5)
    with pytest.raises(ValueError, match=r"gelu_backward: dy has shape \(3, 64\)"):
        gelu.gelu_backward(x[:3], x, bias)
