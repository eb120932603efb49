"""dropout_add_layer_norm against the reference in fp64, forward and every gradient.

A kernel may not err more than twice as much as plain PyTorch in the same dtype.
"""

import pytest
import torch
from torch import Tensor

from fastbert_kernels import reference
from fastbert_kernels.layer_norm import _forward, dropout_add_layer_norm
from fastbert_kernels.philox import keep_mask
from fastbert_kernels.rowwise import block_width

SEED = [12345, 6, 2]
TINY = {torch.float32: 1e-6, torch.float16: 1e-3}


def inputs(R: int, H: int, dtype: torch.dtype) -> list[Tensor]:
    x, residual = torch.randn(R, H), torch.randn(R, H) + 0.5
    bias, weight, beta = torch.randn(H), torch.randn(H) + 1, torch.randn(H)
    return [tensor.to(dtype) for tensor in (x, bias, residual, weight, beta)]


def results(op, tensors: list[Tensor], dtype: torch.dtype, *args) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """Output and gradients by all inputs, for a fixed random output gradient."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    y = op(*leaves, *args)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(tensors[0].dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def assert_close_to_fp64(found: list[Tensor], plain: list[Tensor], want: list[Tensor]) -> None:
    names = ("y", "dx", "dbias", "dresidual", "dweight", "dbeta")
    for name, ours, theirs, exact in zip(names, found, plain, want, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == exact.shape
        error, allowed = ((t.double() - exact).abs().max() for t in (ours, theirs))
        tiny = TINY[ours.dtype] * exact.abs().max()
        assert error <= 2 * allowed + tiny, (name, float(error), float(allowed))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("R", "H", "p"),
    [
        (1, 128, 0.1),
        (35, 384, 0.1),
        (18, 768, 0.0),
        (18, 768, 0.1),
        (9, 1024, 0.1),
        (5, 1032, 0.1),
        (1, 4096, 0.1),
    ],
)
def test_matches_the_reference(R: int, H: int, p: float, dtype: torch.dtype) -> None:
    args = (1e-12, p, torch.tensor(SEED), 1)
    tensors = inputs(R, H, dtype)
    found = results(dropout_add_layer_norm, tensors, dtype, *args)
    plain = results(reference.dropout_add_layer_norm, tensors, dtype, *args)
    want = results(reference.dropout_add_layer_norm, tensors, torch.float64, *args)
    assert_close_to_fp64(found, plain, want)


# Weight and beta of a column, and whether y tells its normalized value.
COLUMNS = {
    "plain": (1.0, 0.0, True),
    "beta as large as a negative weight": (-0.75, 0.75, True),
    "the least weight": (2.0**-10, -(2.0**-10), True),
    "beta larger": (0.75, -0.7505, False),
    "a small weight": (2.0**-10 - 2.0**-20, 0.0, False),
    "no weight": (0.0, 0.0, False),
    "NaN": (torch.nan, 0.0, False),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", COLUMNS)
def test_the_sum_is_kept_where_y_does_not_tell(name: str, dtype: torch.dtype) -> None:
    """By 8 columns: 24 to 31 hang on one of them. What is not written is NaN, and never read."""
    weight, beta, told = COLUMNS[name]
    R, H, args = 13, 264, (1e-12, 0.1, torch.tensor(SEED), 1)
    tensors = inputs(R, H, dtype)
    tensors[3] = (torch.rand(H) + 0.5).to(dtype)
    tensors[4] = (torch.rand(H) - 0.5).to(dtype)
    tensors[3][29], tensors[4][29] = weight, beta
    z = _forward(*tensors, *args, None)[1]
    kept = torch.zeros(R, H, dtype=torch.bool)
    kept[:, 24:32] = not told
    assert torch.equal(z.isfinite(), kept)
    if name == "NaN":
        return
    found = results(dropout_add_layer_norm, tensors, dtype, *args)
    plain = results(reference.dropout_add_layer_norm, tensors, dtype, *args)
    want = results(reference.dropout_add_layer_norm, tensors, torch.float64, *args)
    assert_close_to_fp64(found, plain, want)


def test_y_tells_as_well_as_the_sum() -> None:
    """The worst that is allowed, |beta| = |weight|: 1.4 times the error of a rounded sum."""
    R, H, seed = 64, 768, torch.tensor(SEED)
    tensors = [tensor.half() for tensor in inputs(R, H, torch.float32)]
    weight = torch.rand(H) + 0.5
    errors = []
    for share in (1.0, 1.01):
        tensors[3], tensors[4] = weight.half(), (weight.half() * share).half()
        args = (1e-12, 0.0, seed, 1)
        found = results(dropout_add_layer_norm, tensors, torch.float16, *args)
        want = results(reference.dropout_add_layer_norm, tensors, torch.float64, *args)
        errors.append([float((found[i] - want[i]).pow(2).mean().sqrt()) for i in (1, 4)])
    (dx_y, dweight_y), (dx_z, dweight_z) = errors
    assert dx_y < 1.1 * dx_z and dweight_y < 2 * dweight_z


def test_dropout_bits_are_those_of_the_reference() -> None:
    R, H, seed = 13, 264, torch.tensor(SEED)
    x = torch.ones(R, H, requires_grad=True)
    zeros, ones = torch.zeros(H), torch.ones(H)
    residual = torch.randn(R, H)
    y = dropout_add_layer_norm(x, zeros, residual, ones, zeros, 1e-5, 0.3, seed, 2)
    # Where dropped, x has no gradient; elsewhere it is zero by chance only.
    keep = keep_mask((R, H), 0.3, seed, 2)
    (dx,) = torch.autograd.grad(y, x, torch.randn(R, H))
    assert torch.equal(dx != 0, keep)


def test_chosen_rows_draw_the_bits_of_the_whole() -> None:
    R, H, seed = 13, 264, torch.tensor(SEED)
    rows = torch.tensor([2, 3, 7, 12, 13])
    tensors = [tensor.requires_grad_() for tensor in inputs(R + 1, H, torch.float32)]
    x, bias, residual, weight, beta = tensors
    args = (weight, beta, 1e-5, 0.3, seed, 2)
    whole = dropout_add_layer_norm(x, bias, residual, *args)[rows]
    for op in (dropout_add_layer_norm, reference.dropout_add_layer_norm):
        some = op(x[rows], bias, residual[rows], *args, rows=rows)
        assert (some - whole).abs().max() < 1e-5
        dout = torch.randn(5, H)
        found, want = (torch.autograd.grad(y, tensors, dout, True) for y in (some, whole))
        for ours, theirs in zip(found, want, strict=True):
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_parameters_may_be_wider_than_activations() -> None:
    tensors = inputs(6, 64, torch.float16)
    x, residual = tensors[0].requires_grad_(), tensors[2].requires_grad_()
    bias, weight, beta = (tensors[i].float().requires_grad_() for i in (1, 3, 4))
    y = dropout_add_layer_norm(x, bias, residual, weight, beta, 1e-5, 0.0, torch.tensor(SEED), 1)
    gradients = torch.autograd.grad(y.float().sum(), (x, bias, residual, weight, beta))
    assert y.dtype == torch.float16
    half, full = torch.float16, torch.float32
    assert [g.dtype for g in gradients] == [half, full, half, full, full]


def test_a_large_mean_does_not_spoil_the_variance() -> None:
    tensors = inputs(4, 768, torch.float32)
    tensors[2] += 1000.0
    args = (1e-12, 0.0, torch.tensor(SEED), 1)
    found = results(dropout_add_layer_norm, tensors, torch.float32, *args)
    plain = results(reference.dropout_add_layer_norm, tensors, torch.float32, *args)
    want = results(reference.dropout_add_layer_norm, tensors, torch.float64, *args)
    assert_close_to_fp64(found, plain, want)


def test_no_rows() -> None:
    tensors = inputs(0, 64, torch.float32)
    args = (1e-5, 0.1, torch.tensor(SEED), 1)
    y, dx, dbias, *_ = results(dropout_add_layer_norm, tensors, torch.float32, *args)
    assert y.shape == dx.shape == (0, 64) and not dbias.any()


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_opcheck_and_compile(p: float) -> None:
    x, bias, residual, weight, _ = inputs(5, 128, torch.float32)
    # Beta larger than any weight: no output is left unwritten, so that all can be compared.
    tensors = [t.requires_grad_() for t in (x, bias, residual, weight, weight.abs() + 1)]
    args, rows = (*tensors, 1e-12, p, torch.tensor(SEED), 1), torch.arange(5) * 2
    torch.library.opcheck(torch.ops.fastbert.dropout_add_layer_norm.default, (*args, rows))
    compiled = torch.compile(dropout_add_layer_norm, fullgraph=True, backend="aot_eager")
    y, want = compiled(*args, rows=rows), dropout_add_layer_norm(*args, rows=rows)
    dy = torch.randn_like(y)
    assert torch.equal(y, want)
    for ours, theirs in zip(
        torch.autograd.grad(y, tensors, dy), torch.autograd.grad(want, tensors, dy), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_refusals() -> None:
    x, bias, residual, weight, beta = inputs(4, 64, torch.float32)
    seed = torch.tensor(SEED)

    def call(**changed: Tensor) -> None:
        tensors = {"x": x, "bias": bias, "residual": residual, "weight": weight, "beta": beta}
        dropout_add_layer_norm(
            **{**tensors, "eps": 1e-5, "dropout_p": 0.1, "seed": seed, "stream": 1, **changed}
        )  # type: ignore[arg-type]

    for changed, message in (
        ({"x": x[None]}, r"x has shape \(1, 4, 64\), expected \(any, any\)"),
        ({"residual": residual[:3]}, r"residual has shape \(3, 64\), expected \(4, 64\)"),
        ({"bias": bias[:32]}, r"bias has shape \(32,\), expected \(64\)"),
        ({"weight": weight.half()}, "weight is torch.float16, expected float32"),
        ({"x": x.double()}, "x is torch.float64, expected float32 or float16 or bfloat16"),
        ({"seed": seed[:2]}, r"seed has shape \(2,\)"),
        ({"x": torch.randn(4, 60)}, "60 columns, expected a multiple of 8 up to 4096"),
        ({"x": torch.randn(4, 4104)}, "4104 columns"),
        ({"dropout_p": 1.0}, "dropout_p = 1.0"),
        ({"rows": torch.arange(3)}, r"rows has shape \(3,\), expected \(4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**changed)  # type: ignore[arg-type]


def test_block_width() -> None:
    assert [block_width(H) for H in (8, 128, 136, 768, 4096)] == [128, 128, 256, 1024, 4096]
