"""Every op at shapes that nobody chose, against the reference in fp64: values and every gradient.

A kernel may not err more than twice as much as plain PyTorch in the same dtype, plus two roundings
of the largest value: with few rows PyTorch's own error can be zero.
"""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from fastbert_kernels import reference, reference_optimizer
from fastbert_kernels.attention import attention
from fastbert_kernels.cross_entropy import linear_cross_entropy
from fastbert_kernels.embedding import embed_layer_norm
from fastbert_kernels.gelu import bias_gelu, gelu_layer_norm
from fastbert_kernels.layer_norm import dropout_add_layer_norm
from fastbert_kernels.linear import linear_gelu
from fastbert_kernels.mask import mask_tokens
from fastbert_kernels.optimizer import adamw_step, lamb_step, lamb_table
from fastbert_kernels.reference_optimizer import Buffers, Hyperparameters

# exp overflows to infinity where 1 / (1 + exp) is to be 0; numpy, which interprets, warns of it.
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]
any_shape = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
DROPOUT = st.sampled_from([0.0, 0.1, 0.4, 0.8])
ROWS = st.integers(1, 70)
WIDTHS = st.integers(1, 100).map(lambda n: 8 * n)
APPROXIMATE = st.sampled_from(["none", "tanh"])
SEED = torch.tensor([2**41 + 9, 3, 5])


def results(
    op: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype, call: dict[str, Any]
) -> list[Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    y = op(*leaves, **call)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def agree(
    op: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    tensors: list[Tensor],
    dtype: torch.dtype,
    own: dict[str, Any] | None = None,  # arguments that only the kernel takes
    **call: Any,
) -> None:
    tensors = [t.to(dtype) for t in tensors]
    found = results(op, tensors, dtype, call | (own or {}))
    plain = results(oracle, tensors, dtype, call)
    want = results(oracle, tensors, torch.float64, call)
    for i, (a, b, c) in enumerate(zip(found, plain, want, strict=True)):
        assert a.shape == c.shape and a.dtype == b.dtype
        rounding = 2 * torch.finfo(dtype).eps * c.abs().max()
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + rounding, f"result {i}"


def columns(H: int, count: int) -> list[Tensor]:
    return [torch.randn(H) + 0.5 for _ in range(count)]


@both_dtypes
@any_shape
@given(
    lengths=st.lists(st.integers(0, 45), min_size=1, max_size=3),
    unused=st.integers(0, 40),
    slack=st.sampled_from([0, 1, 60, 500]),
    A=st.integers(1, 2),
    D=st.sampled_from([32, 64, 128]),
    p=DROPOUT,
)
def test_attention(
    lengths: list[int], unused: int, slack: int, A: int, D: int, p: float, dtype: torch.dtype
) -> None:
    if dtype == torch.float16:  # whose tiles are larger
        lengths = [length and length + 90 for length in lengths]
    T = max(1, sum(lengths) + unused)
    call = {
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": max(1, *lengths) + slack,
    }
    qkv = torch.randn(T, 3, A, D)
    agree(attention, reference.attention, [qkv], dtype, **call, dropout_p=p, seed=SEED, stream=2)


@both_dtypes
@any_shape
@given(R=ROWS, H=WIDTHS, p=DROPOUT)
def test_dropout_add_layer_norm(R: int, H: int, p: float, dtype: torch.dtype) -> None:
    bias, weight, beta = columns(H, 3)
    tensors = [torch.randn(R, H), bias, torch.randn(R, H), weight, beta]
    call = {"eps": 1e-12, "dropout_p": p, "seed": SEED, "stream": 3}
    agree(dropout_add_layer_norm, reference.dropout_add_layer_norm, tensors, dtype, **call)


@both_dtypes
@any_shape
@given(R=ROWS, H=WIDTHS, approximate=APPROXIMATE)
def test_bias_gelu(R: int, H: int, approximate: str, dtype: torch.dtype) -> None:
    tensors = [2 * torch.randn(R, H), *columns(H, 1)]
    agree(bias_gelu, reference.bias_gelu, tensors, dtype, approximate=approximate)


@both_dtypes
@any_shape
@given(
    R=ROWS,
    H=WIDTHS,
    F=WIDTHS,
    approximate=APPROXIMATE,
    backend=st.sampled_from(["triton", "cublas"]),
)
def test_linear_gelu(
    R: int, H: int, F: int, approximate: str, backend: str, dtype: torch.dtype
) -> None:
    tensors = [torch.randn(R, H), torch.randn(F, H) / H**0.5, *columns(F, 1)]
    own, call = {"backend": backend}, {"approximate": approximate}
    agree(linear_gelu, reference.linear_gelu, tensors, dtype, own, **call)


@both_dtypes
@any_shape
@given(R=ROWS, H=WIDTHS, approximate=APPROXIMATE)
def test_gelu_layer_norm(R: int, H: int, approximate: str, dtype: torch.dtype) -> None:
    tensors = [2 * torch.randn(R, H), *columns(H, 3)]
    call = {"eps": 1e-12, "approximate": approximate}
    agree(gelu_layer_norm, reference.gelu_layer_norm, tensors, dtype, **call)


@both_dtypes
@any_shape
@given(
    T=st.integers(1, 30),
    V=st.integers(1, 80),
    P=ROWS,
    H=WIDTHS,
    types=st.integers(1, 2),
    p=DROPOUT,
)
def test_embed_layer_norm(
    T: int, V: int, P: int, H: int, types: int, p: float, dtype: torch.dtype
) -> None:
    tables = [torch.randn(count, H) for count in (V, types, P)] + columns(H, 2)
    ids = {"input_ids": V, "token_type_ids": types, "position_ids": P}
    call = {name: torch.randint(count, (T,)) for name, count in ids.items()}
    call |= {"pad_token_id": 0, "eps": 1e-12, "dropout_p": p, "seed": SEED, "stream": 1}

    def by_name(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        names = ("word", "token_type", "position", "weight", "beta")
        return lambda *tables, **call: op(**dict(zip(names, tables, strict=True)), **call)

    agree(by_name(embed_layer_norm), by_name(reference.embed_layer_norm), tables, dtype, **call)


@both_dtypes
@any_shape
@given(
    M=ROWS,
    V=st.integers(1, 600),
    H=WIDTHS,
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 1e-2]),
    chunk_rows=st.sampled_from([7, 64, 4096]),
)
def test_linear_cross_entropy(
    M: int, V: int, H: int, label_smoothing: float, z_loss: float, chunk_rows: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    tensors = [torch.randn(M, H), torch.randn(V, H) / H**0.5 * 3, torch.randn(V)]
    labels = torch.randint(V, (M,))
    labels[1::3] = -100
    call = {"labels": labels, "label_smoothing": label_smoothing, "z_loss": z_loss}
    own = {"chunk_rows": chunk_rows}
    agree(linear_cross_entropy, reference.linear_cross_entropy, tensors, dtype, own, **call)


@both_dtypes
@any_shape
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=4),
    decayed=st.integers(0, 4),
    rounded=st.booleans(),
    max_grad_norm=st.sampled_from([0.0, 1.0, 1e4]),
)
def test_adamw_and_lamb(
    sizes: list[int], decayed: int, dtype: torch.dtype, rounded: bool, max_grad_norm: float
) -> None:
    spans, P = [], 0
    for size in sizes:
        spans.append((P, P + size))
        P += -(-size // 64) * 64
    inside = torch.zeros(P)
    for start, stop in spans:
        inside[start:stop] = 1
    start = {
        "master": torch.randn(P) * inside,
        "exp_avg": torch.randn(P) * inside,
        "exp_avg_sq": torch.rand(P) * inside,
        "weights": torch.zeros(P, dtype=torch.float16) if rounded else None,
        **{name: torch.tensor(value) for name, value in (("lr", 0.02), ("grad_scale", 4.0))},
        "grad_norm": torch.tensor(0.0),
        **{name: torch.tensor(3) for name in ("step", "skipped")},
    }
    grad = (torch.randn(P) * inside).to(dtype)
    hyper = Hyperparameters(
        [*(begin for begin, _ in spans), P][min(decayed, len(spans))],
        beta2=0.98,
        weight_decay=0.1,
        max_grad_norm=max_grad_norm,
    )
    for step, own, oracle, theirs in (
        (adamw_step, (), reference_optimizer.adamw_step, ()),
        (lamb_step, (lamb_table(spans, "cpu"),), reference_optimizer.lamb_step, (spans,)),
    ):
        found = {n: t if t is None else t.clone() for n, t in start.items()}
        want = {
            n: t.double()
            if n in ("master", "exp_avg", "exp_avg_sq", "grad_norm", "lr") and t is not None
            else t
            if t is None
            else t.clone()
            for n, t in start.items()
        }
        step(Buffers(grad=grad, **found), hyper, *own)
        oracle(Buffers(grad=grad, **want), hyper, *theirs)
        for name in ("master", "exp_avg", "exp_avg_sq", "grad_norm"):
            error = (found[name] - want[name]).abs().max()
            assert error <= 1e-5 * want[name].abs().max(), name
        assert found["step"] == 4 and found["skipped"] == 3
        if rounded:
            assert torch.equal(found["weights"], found["master"].half())


@any_shape
@given(T=st.integers(0, 2000), V=st.integers(1, 40_000), probability=st.floats(0, 1))
def test_mask_tokens(T: int, V: int, probability: float) -> None:
    call = (torch.randint(V, (T,)), torch.rand(V) < 0.1, SEED, probability, V // 2)
    found, want = mask_tokens(*call), reference_optimizer.mask_tokens(*call)
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)
