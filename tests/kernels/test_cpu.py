"""The CPU's ops against the reference: same numbers, same gradients, same dropout bits."""

import pytest
import torch

from fastbert_kernels import reference
from fastbert_kernels.cpu import CpuOps

SEED = torch.tensor([2**40 + 5, 7, 3])
EPS = 1e-12
LENGTHS = {
    "ragged": [1, 7, 63, 64, 65, 127, 128],
    "one": [128],
    "ones": [1, 1, 1],
    "equal": [32, 32],
    "empty tail": [40, 3, 0, 0],
    "long": [511, 12, 300],
}


@pytest.fixture(scope="module")
def ops():
    return CpuOps(compiled=False)


def gradients(out, inputs, dout):
    return torch.autograd.grad(out, inputs, dout)


def compare(ours, reference_, inputs, tolerance=1e-12):
    dout = torch.randn_like(reference_)
    assert (ours - reference_).abs().max() <= tolerance
    pairs = zip(gradients(ours, inputs, dout), gradients(reference_, inputs, dout), strict=True)
    for index, (mine, theirs) in enumerate(pairs):
        assert (mine - theirs).abs().max() <= tolerance, index


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention(ops, lengths, dropout_p):
    T, A, D = sum(lengths), 2, 32
    qkv = torch.randn(T, 3, A, D, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    args = (cu_seqlens, max(lengths), dropout_p, SEED, 0)
    compare(ops.attention(qkv, *args), reference.attention(qkv, *args), [qkv])


def test_attention_leaves_rows_of_no_sequence_at_zero(ops):
    qkv = torch.randn(20, 3, 2, 32, requires_grad=True)
    cu_seqlens = torch.tensor([0, 5, 12], dtype=torch.int32)
    out = ops.attention(qkv, cu_seqlens, 8, 0.1, SEED, 0)
    assert not out[12:].any()
    (dqkv,) = torch.autograd.grad(out.sum(), qkv)
    assert not dqkv[12:].any() and dqkv[:12].any()


def test_attention_does_not_see_another_sequence_s_nan(ops):
    qkv = torch.randn(20, 3, 2, 32)
    cu_seqlens = torch.tensor([0, 5, 12, 20], dtype=torch.int32)
    clean = ops.attention(qkv, cu_seqlens, 8, 0.1, SEED, 0)
    qkv[5:12] = torch.nan
    poisoned = qkv.requires_grad_()
    out = ops.attention(poisoned, cu_seqlens, 8, 0.1, SEED, 0)
    others = [*range(5), *range(12, 20)]
    assert torch.equal(out[others], clean[others])
    (dqkv,) = torch.autograd.grad(out[others].sum(), poisoned)
    assert torch.isfinite(dqkv[others]).all()


def test_attention_regroups_when_the_lengths_change_in_place(ops):
    qkv = torch.randn(12, 3, 2, 32)
    cu_seqlens = torch.tensor([0, 4, 12], dtype=torch.int32)
    ops.attention(qkv, cu_seqlens, 12, 0.0, SEED, 0)
    cu_seqlens.copy_(torch.tensor([0, 9, 12]))
    expected = reference.attention(qkv, cu_seqlens, 12, 0.0, SEED, 0)
    assert (ops.attention(qkv, cu_seqlens, 12, 0.0, SEED, 0) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_dropout_add_layer_norm(ops, dropout_p):
    x, residual = (torch.randn(9, 136, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias, weight, beta = (
        torch.randn(136, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    args = (x, bias, residual, weight, beta, EPS, dropout_p, SEED, 2)
    compare(
        ops.dropout_add_layer_norm(*args),
        reference.dropout_add_layer_norm(*args),
        [x, bias, residual, weight, beta],
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_embed_layer_norm(ops, dropout_p):
    word, kind, position = (
        torch.randn(rows, 64, dtype=torch.float64, requires_grad=True) for rows in (50, 2, 16)
    )
    weight, beta = (torch.randn(64, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ids, types = torch.randint(0, 50, (30,)), torch.randint(0, 2, (30,))
    args = (ids, types, torch.arange(30) % 16, word, kind, position, weight, beta, 0, EPS)
    compare(
        ops.embed_layer_norm(*args, dropout_p, SEED, 0),
        reference.embed_layer_norm(*args, dropout_p, SEED, 0),
        [word, kind, position, weight, beta],
    )


@pytest.mark.parametrize(("M", "V"), [(1, 7), (40, 507), (129, 1000)])
def test_linear_cross_entropy(ops, M, V):
    x = torch.randn(M, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 24, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (M,))
    labels[1::3] = -100
    args = (x, weight, bias, labels)
    expected = torch.nn.functional.cross_entropy(x @ weight.T + bias, labels, reduction="sum")
    compare(ops.linear_cross_entropy(*args), expected, [x, weight, bias], tolerance=1e-11)


def test_compiled_pieces_draw_the_same_bits():
    compiled = CpuOps(compiled=True)
    x, residual = torch.randn(33, 128), torch.randn(33, 128)
    row = [torch.randn(128) for _ in range(3)]
    args = (x, row[0], residual, *row[1:], EPS, 0.1, SEED, 1)
    try:
        ours = compiled.dropout_add_layer_norm(*args)
    except torch._inductor.exc.InductorError as error:  # no C++ compiler here
        pytest.skip(f"torch.compile does not work here: {error}".splitlines()[0])
    assert (ours - reference.dropout_add_layer_norm(*args)).abs().max() < 1e-5


def test_more_shapes_than_torch_compile_keeps_by_default():
    """A curriculum of four lengths, an evaluation and a prediction in one process need 12."""
    with torch._dynamo.config.patch(recompile_limit=8):
        CpuOps(compiled=False)
        assert torch._dynamo.config.recompile_limit == 8
        CpuOps(compiled=True)
        assert torch._dynamo.config.recompile_limit >= 32


def test_sequences_made_in_inference_mode(ops):
    with torch.inference_mode():
        qkv, cu_seqlens = torch.randn(9, 3, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
        first = ops.attention(qkv, cu_seqlens, 8, 0.0, SEED, 0)
        cu_seqlens[1] = 7  # nothing tells that it changed
        again = ops.attention(qkv, cu_seqlens, 8, 0.0, SEED, 0)
        want = reference.attention(qkv, cu_seqlens, 8, 0.0, SEED, 0)
    assert (again - want).abs().max() < 1e-6 < (first - want).abs().max()
