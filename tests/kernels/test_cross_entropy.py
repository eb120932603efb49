"""Linear cross-entropy: loss and every gradient against the reference in double precision."""

import pytest
import torch
from torch import Tensor

from fastbert_kernels import cross_entropy, reference
from fastbert_kernels.cross_entropy import linear_cross_entropy
from fastbert_kernels.main_grad import MainGrad

DTYPES = [torch.float32, torch.float16]
NAMES = ("x", "weight", "bias")


def inputs(M: int, V: int, H: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    tensors = [torch.randn(M, H), torch.randn(V, H) / H**0.5 * 3, torch.randn(V)]
    labels = torch.randint(V, (M,))
    labels[::3] = -100
    labels[-1:] = V - 1
    return [t.to(dtype).requires_grad_() for t in tensors], labels


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    # The upstream scalar of a mean, times a loss scale.
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, tensors)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "V", "H", "smoothing", "z_loss", "chunk_rows"),
    [
        (1, 7, 8, 0.0, 0.0, 4096),
        (7, 64, 384, 0.1, 0.0, 4096),
        (40, 129, 768, 0.0, 1e-2, 4096),
        (33, 1000, 1024, 0.1, 1e-3, 16),
        (18, 30522, 128, 0.0, 0.0, 4096),
        (18, 30522, 16, 0.2, 1e-3, 7),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_against_double_precision(
    dtype: torch.dtype, M: int, V: int, H: int, smoothing: float, z_loss: float, chunk_rows: int
) -> None:
    tensors, labels = inputs(M, V, H, dtype)
    extra = (labels, smoothing, z_loss)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    want = gradients(reference.linear_cross_entropy(*wide, *extra), wide)
    plain = gradients(reference.linear_cross_entropy(*tensors, *extra), tensors)
    found = gradients(linear_cross_entropy(*tensors, *extra, chunk_rows), tensors)
    assert found[0].dtype == torch.float32
    for name, a, b, c in zip(("loss", *NAMES), found, plain, want, strict=True):
        assert a.shape == c.shape
        # One rounding of the largest value on top: the few rows here may be lucky in PyTorch.
        limit = 2 * (b - c).abs().max() + torch.finfo(dtype).eps * c.abs().max()
        assert (a - c).abs().max() <= limit, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("V", "rows"), [(7, 8), (129, 136), (130, 192), (64, 64)])
@pytest.mark.usefixtures("poisoned")
def test_rows_of_zeros_behind_the_words(dtype: torch.dtype, V: int, rows: int) -> None:
    """Products take them along: gradients as without, zeros for them, nothing behind them."""
    M, H, behind = 40, 32, 3
    tensors, labels = inputs(M, V, H, dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    want = gradients(reference.linear_cross_entropy(*wide, labels, 0.1, 1e-3), wide)
    plain = gradients(linear_cross_entropy(*tensors, labels, 0.1, 1e-3), tensors)
    table = torch.full((rows + behind, H), torch.nan, dtype=dtype)
    table[:V], table[V:rows] = tensors[1].detach(), 0.0
    word = table[:V].requires_grad_()
    flat = torch.full((rows + behind, H), torch.nan, dtype=dtype)
    word.main_grad = MainGrad(flat[:V], rows)  # type: ignore[attr-defined]
    leaves = [tensors[0], tensors[2]]
    for times in (1, 2):  # the second gradient adds to the first
        loss = linear_cross_entropy(tensors[0], word, tensors[2], labels, 0.1, 1e-3)
        dx, dbias = torch.autograd.grad(loss * 0.37, leaves)
        found = [loss, dx, flat[:V] / times, dbias]
        for name, a, b, c in zip(("loss", *NAMES), found, plain, want, strict=True):
            limit = 2 * (b - c).abs().max() + times * torch.finfo(dtype).eps * c.abs().max()
            assert (a - c).abs().max() <= limit, name
        assert not flat[V:rows].any() and flat[rows:].isnan().all()


@pytest.mark.usefixtures("poisoned")
def test_unlabelled_rows_count_nothing() -> None:
    tensors, labels = inputs(9, 50, 8, torch.float32)
    dx = gradients(linear_cross_entropy(*tensors, labels), tensors)[1]
    assert not dx[labels == -100].any() and dx[labels != -100].any(1).all()
    nothing = gradients(linear_cross_entropy(*tensors, torch.full((9,), -100)), tensors)
    assert not any(t.any() for t in nothing)


def test_large_logits_and_unknown_labels() -> None:
    tensors, labels = inputs(6, 300, 8, torch.float32)
    large = [(t * 300).detach().requires_grad_() for t in tensors]
    found = gradients(linear_cross_entropy(*large, labels), large)
    want = gradients(reference.linear_cross_entropy(*large, labels), large)
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-3)
    for label in (300, -1):
        labels[2] = label
        assert linear_cross_entropy(*tensors, labels).isnan()


def test_without_gradient_goes_by_chunks() -> None:
    tensors, labels = inputs(20, 100, 16, torch.float32)
    want = linear_cross_entropy(*tensors, labels)
    with torch.no_grad():
        found = linear_cross_entropy(*tensors, labels, chunk_rows=6)
    assert torch.equal(found, want.detach())


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(gradient: bool) -> None:
    tensors, labels = inputs(10, 50, 8, torch.float32)
    tensors = [t.requires_grad_(gradient) for t in tensors]
    torch.library.opcheck(cross_entropy._whole, (*tensors, labels, 0.1, 1e-3, 10, gradient))
    if gradient:
        torch.library.opcheck(cross_entropy._chunked, (*tensors, labels, 0.1, 1e-3, 4))


@pytest.mark.parametrize("chunk_rows", [16, 5])
def test_compiles_without_a_graph_break(chunk_rows: int) -> None:
    tensors, labels = inputs(10, 50, 8, torch.float32)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    found = gradients(compiled(*tensors, labels, chunk_rows=chunk_rows), tensors)
    want = gradients(linear_cross_entropy(*tensors, labels, chunk_rows=chunk_rows), tensors)
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


def test_bad_arguments() -> None:
    (x, weight, bias), labels = inputs(4, 30, 8, torch.float32)
    bad = {
        "weight has shape": (x, weight[:, :4], bias, labels),
        "bias has shape": (x, weight, bias[:-1], labels),
        "weight is torch.float16": (x, weight.half(), bias, labels),
        "x has no rows": (x[:0], weight, bias, labels[:0]),
        "label_smoothing": (x, weight, bias, labels, 1.5),
        "z_loss": (x, weight, bias, labels, 0.0, -1.0),
        "chunk_rows": (x, weight, bias, labels, 0.0, 0.0, 0),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments)  # type: ignore[arg-type]
