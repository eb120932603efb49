"""linear_gelu and gelu_linear_backward against the reference in fp64, by both backends.

They may not err more than twice as much as plain PyTorch in the same dtype.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastbert_kernels import linear, reference
from fastbert_kernels.linear import feed_forward, gelu_linear_backward, linear_gelu
from fastbert_kernels.main_grad import MainGrad

# exp overflows to infinity where 1 / (1 + exp) is to be 0; numpy, which interprets, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")

TINY = {torch.float32: 1e-6, torch.float16: 1e-3}
DTYPES = [torch.float32, torch.float16]
BACKENDS = ["triton", "cublas"]
# Every two of approximation, dtype and backend meet, and over two shapes all three.
WAYS = [
    [("none", torch.float32, "triton"), ("none", torch.float16, "cublas"),
     ("tanh", torch.float32, "cublas"), ("tanh", torch.float16, "triton")],
    [("none", torch.float32, "cublas"), ("none", torch.float16, "triton"),
     ("tanh", torch.float32, "triton"), ("tanh", torch.float16, "cublas")],
]  # fmt: skip
SHAPES = [
    (1, 128, 256), (7, 8, 1024), (63, 384, 136), (65, 72, 200), (129, 768, 384), (33, 1024, 128),
]  # fmt: skip


def make(R: int, H: int, F: int, dtype: torch.dtype) -> list[Tensor]:
    """x, W and b of a pre-activation of size 1 or so."""
    return [t.to(dtype) for t in (torch.randn(R, H), torch.randn(F, H) / H**0.5, torch.randn(F))]


def results(
    op: Callable[..., Tensor], tensors: list[Tensor], dy: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and gradients by all inputs."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    y = op(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy.to(dtype))
    return dict(zip(("y", "dx", "dweight", "dbias"), (y.detach(), *gradients), strict=True))


def compare(R: int, H: int, F: int, approximate: str, dtype: torch.dtype, backend: str) -> None:
    tensors, dy = make(R, H, F, dtype), torch.randn(R, F).to(dtype)
    ours = functools.partial(linear_gelu, approximate=approximate, backend=backend)
    theirs = functools.partial(reference.linear_gelu, approximate=approximate)
    found, plain = results(ours, tensors, dy, dtype), results(theirs, tensors, dy, dtype)
    for name, exact in results(theirs, tensors, dy, torch.float64).items():
        assert found[name].dtype == dtype and found[name].shape == exact.shape
        error, allowed = ((t[name].double() - exact).abs().max() for t in (found, plain))
        tiny = TINY[dtype] * exact.abs().max()
        assert error <= 2 * allowed + tiny, (name, float(error), float(allowed))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("R", "H", "F", "approximate", "dtype", "backend"),
    [(*shape, *way) for index, shape in enumerate(SHAPES) for way in WAYS[index % 2]],
)
def test_linear_gelu(
    R: int, H: int, F: int, approximate: str, dtype: torch.dtype, backend: str
) -> None:
    compare(R, H, F, approximate, dtype, backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("R", "H", "F"), [(7, 8, 1024), (129, 200, 264), (300, 64, 392)])
def test_the_tiles_of_an_a100(monkeypatch: pytest.MonkeyPatch, R: int, H: int, F: int) -> None:
    tiles = linear.TILES[80, True]
    assert not tiles.tma
    monkeypatch.setattr(linear, "_tiles", lambda device, dtype: tiles)
    compare(R, H, F, "none", torch.float16, "triton")


def backward(
    tensors: list[Tensor], dy: Tensor, dtype: torch.dtype, approximate: str
) -> tuple[Tensor, Tensor]:
    """The reference's: dx and dbias."""
    x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in tensors)
    y = reference.gelu_linear(x, weight, bias, approximate)
    dx, dbias = torch.autograd.grad(y, (x, bias), dy.to(dtype))
    return dx, dbias


def compare_backward(
    R: int, H: int, F: int, approximate: str, dtype: torch.dtype, backend: str, *, bias: bool = True
) -> None:
    tensors = [t.to(dtype) for t in (torch.randn(R, F), torch.randn(H, F) / H**0.5, torch.randn(F))]
    if not bias:
        tensors[2].zero_()
    dy, (x, weight, b) = torch.randn(R, H).to(dtype), tensors
    found = gelu_linear_backward(dy, weight, x, b if bias else None, approximate, backend=backend)
    plain, want = (backward(tensors, dy, kind, approximate) for kind in (dtype, torch.float64))
    for name, ours, theirs, exact in zip(("dx", "dbias"), found, plain, want, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        error, allowed = ((t.double() - exact).abs().max() for t in (ours, theirs))
        tiny = TINY[dtype] * exact.abs().max()
        assert error <= 2 * allowed + tiny, (name, float(error), float(allowed))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("R", "H", "F"),
    [(1, 128, 256), (7, 8, 1024), (63, 384, 136), (65, 72, 200), (129, 64, 8), (300, 40, 264)],
)
def test_gelu_linear_backward(R: int, H: int, F: int, dtype: torch.dtype, backend: str) -> None:
    compare_backward(R, H, F, "none", dtype, backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_linear_backward_of_a_whole_pre_activation(backend: str) -> None:
    compare_backward(33, 64, 128, "none", torch.float16, backend, bias=False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("R", "H", "F"), [(7, 8, 1024), (129, 200, 264), (300, 64, 392)])
def test_the_backward_tiles_of_an_a100(
    monkeypatch: pytest.MonkeyPatch, R: int, H: int, F: int
) -> None:
    monkeypatch.setattr(linear, "_tiles", lambda device, dtype: linear.TILES[80, True])
    compare_backward(R, H, F, "none", torch.float16, "triton")


def test_gelu_linear_backward_by_tanh_is_cublass() -> None:
    compare_backward(33, 64, 128, "tanh", torch.float16, "auto")
    x, weight, bias = torch.randn(4, 128), torch.randn(64, 128), torch.randn(128)
    with pytest.raises(ValueError, match="backend = 'triton' takes approximate = 'none', not"):
        gelu_linear_backward(torch.randn(4, 64), weight, x, bias, "tanh", backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gelu_linear_backward_without_rows_and_opcheck(backend: str) -> None:
    x, weight, bias = torch.randn(5, 128), torch.randn(64, 128), torch.randn(128)
    dx, dbias = gelu_linear_backward(torch.empty(0, 64), weight, x[:0], bias, backend=backend)
    assert dx.shape == (0, 128) and dbias.shape == (128,) and not dbias.any()
    op = torch.ops.fastbert.gelu_linear_backward.default
    for maybe in (bias, None):
        torch.library.opcheck(op, (torch.randn(5, 64), weight, x, maybe, "none", backend))


def test_refusals_of_the_backward() -> None:
    x, weight, bias, dy = (torch.randn(s) for s in ((4, 128), (64, 128), (128,), (4, 64)))
    odd = torch.randn(4 * 64 + 1)[1:].view(4, 64)
    for args, backend, message in (
        ((dy[:3], weight, x, bias), "auto", r"dy has shape \(3, 64\), expected \(4, 64\)"),
        ((dy, weight[:, :8], x, bias), "auto", r"weight has shape \(64, 8\), expected \(any, 128"),
        ((dy, weight, x, bias[:8]), "auto", r"bias has shape \(8,\), expected \(128\)"),
        ((dy, weight.half(), x, bias), "auto", "weight is torch.float16, expected float32"),
        ((dy, weight, x.double(), bias), "auto", "x is torch.float64, expected float32 or"),
        (
            (dy[:, :60].contiguous(), weight[:60], x, bias),
            "auto",
            r"weight is \(60, 128\), expected",
        ),
        ((dy, weight, x, bias, "fast"), "auto", "approximate = 'fast', expected"),
        ((dy, weight, x, bias), "cuda", "backend = 'cuda', expected one of"),
        ((odd, weight, x, bias), "triton", "dy does not start at a multiple of 16 bytes"),
    ):
        with pytest.raises(ValueError, match=f"^gelu_linear_backward: {message}"):
            gelu_linear_backward(*args, backend=backend)  # type: ignore[arg-type]


def feed_forward_gradients(
    op: Callable[..., tuple[Tensor, Tensor]], tensors: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients by x, up, bias and down, twice: the second adds to the weights'."""
    x, up, bias, down = (t.detach().to(dtype).requires_grad_() for t in tensors)
    for weight in (up, down):
        weight.main_grad = MainGrad(torch.full_like(weight, torch.nan))  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        out, residual = op(x * 1, up, bias, down)
        dout, dresidual = (
            torch.randn(out.shape, generator=generator).to(tensors[0].dtype).to(dtype)
            for _ in range(2)
        )
        torch.autograd.backward((out, residual), (dout, dresidual))
    assert x.grad is not None and bias.grad is not None
    grads = [w.main_grad.buffer if w.grad is None else w.grad for w in (up, down)]  # type: ignore[attr-defined]
    return [out.detach(), x.grad, bias.grad, *grads]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_feed_forward(dtype: torch.dtype) -> None:
    R, H, F = 70, 40, 136
    up, down = torch.randn(F, H) / H**0.5, torch.randn(H, F) / F**0.5
    tensors = [t.to(dtype) for t in (torch.randn(R, H), up, torch.randn(F), down)]

    def plain(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return reference.linear_gelu(x, up, bias) @ down.t(), x

    found = feed_forward_gradients(feed_forward, tensors, dtype)
    theirs, want = (feed_forward_gradients(plain, tensors, kind) for kind in (dtype, torch.float64))
    names = ("out", "dx", "dbias", "dup", "ddown")
    for name, ours, plainly, exact in zip(names, found, theirs, want, strict=True):
        error, allowed = ((t.double() - exact).abs().max() for t in (ours, plainly))
        assert error <= 2 * allowed + TINY[dtype] * exact.abs().max(), name


def test_feed_forward_without_main_grad_and_refusals() -> None:
    x, up, bias, down = (torch.randn(s) for s in ((9, 16), (24, 16), (24,), (16, 24)))
    with torch.no_grad():
        out, residual = feed_forward(x, up, bias, down)
    assert residual is x
    assert torch.allclose(out, reference.linear_gelu(x, up, bias) @ down.t(), atol=1e-5)
    leaves = [t.requires_grad_() for t in (x, up, bias, down)]
    want = torch.autograd.grad((reference.linear_gelu(x, up, bias) @ down.t()).sum(), leaves)
    found = torch.autograd.grad(feed_forward(x, up, bias, down)[0].sum(), leaves)
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    with pytest.raises(ValueError, match="feed_forward: approximate = 'tanh', expected 'none'"):
        feed_forward(x, up, bias, down, "tanh")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    op = functools.partial(linear_gelu, backend=backend)
    found = results(op, make(0, 64, 128, torch.float16), torch.empty(0, 128), torch.float16)
    assert found["y"].shape == (0, 128) and found["dx"].shape == (0, 64)
    assert not found["dweight"].any() and not found["dbias"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_pre_activation_is_kept(backend: str) -> None:
    """Beside the inputs, the backward needs one (R, F) tensor in the storage type."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    tensors = [t.requires_grad_() for t in make(5, 64, 128, torch.float16)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear_gelu(*tensors, backend=backend)
    inputs = {t.data_ptr() for t in tensors}
    new = [(t.shape, t.dtype) for t in kept if t.data_ptr() not in inputs]
    assert new == [((5, 128), torch.float16)]


def test_auto_is_one_of_the_others() -> None:
    tensors = make(5, 64, 128, torch.float16)
    found, want = (linear_gelu(*tensors, backend=name) for name in ("auto", linear.AUTO))
    assert linear.AUTO in BACKENDS and torch.equal(found, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend: str) -> None:
    tensors = [t.requires_grad_() for t in make(5, 64, 128, torch.float32)]
    torch.library.opcheck(torch.ops.fastbert.linear_gelu.default, (*tensors, "none", backend))
    op = functools.partial(linear_gelu, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    dy = torch.randn(5, 128)
    found, want = (results(f, tensors, dy, torch.float32) for f in (compiled, op))
    for name, tensor in want.items():
        assert torch.equal(found[name], tensor), name


def test_opcheck_of_the_backward() -> None:
    x, weight, bias = make(5, 64, 128, torch.float32)
    dy, pre = torch.randn(5, 128), torch.randn(5, 128)
    for args in ((dy, x, weight, pre, bias, "none"), (dy, x, weight, pre, None, "tanh")):
        torch.library.opcheck(torch.ops.fastbert.linear_gelu_backward.default, args)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = make(4, 64, 128, torch.float16)
    odd = torch.randn(4 * 64 + 1, dtype=torch.float16)[1:].view(4, 64)
    for args, backend, message in (
        ((x, weight[:, :8], bias), "auto", r"weight has shape \(128, 8\), expected \(any, 64\)"),
        ((x, weight, bias[:8]), "auto", r"bias has shape \(8,\), expected \(128\)"),
        ((x.double(), weight, bias), "auto", "x is torch.float64, expected float32 or"),
        ((x, weight.float(), bias), "auto", "weight is torch.float32, expected float16"),
        ((x, weight, bias.float()), "auto", "bias is torch.float32, expected float16"),
        ((x, weight.t().contiguous().t(), bias), "auto", "weight is not contiguous"),
        ((x, weight[:126], bias[:126]), "auto", r"weight is \(126, 64\), expected multiples of 8"),
        ((x[:, :0], weight[:, :0], bias), "auto", r"weight is \(128, 0\), expected multiples of 8"),
        ((x, weight, bias, "fast"), "auto", "approximate = 'fast', expected 'none' or 'tanh'"),
        ((x, weight, bias), "cuda", "backend = 'cuda', expected one of auto, triton, cublas"),
        ((odd, weight, bias), "triton", "x does not start at a multiple of 16 bytes"),
    ):
        with pytest.raises(ValueError, match=f"^linear_gelu: {message}"):
            linear_gelu(*args, backend=backend)
    with pytest.raises(ValueError, match=r"use fastbert_kernels\.reference\.linear_gelu"):
        linear_gelu(*(t.to("meta") for t in (x, weight, bias)))
