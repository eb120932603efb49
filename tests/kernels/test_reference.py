"""Every op against a naive formula, sequence by sequence and row by row, and its gradients.

Run for the reference and for the CPU's own ops, which must mean the same.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastbert.ops import REFERENCE, Ops, choose_ops
from fastbert_kernels.philox import keep_mask, keep_threshold, score_mask

BUNDLES = {"reference": REFERENCE, "cpu": choose_ops("cpu", False)}
LENGTHS = {
    "ragged": [5, 1, 9, 3],
    "one": [9],
    "length 1": [1, 1, 1],
    "empty tail": [4, 7, 0, 0],
    "full": [9, 9],
}
S, A, D = 9, 3, 4


@pytest.fixture(params=BUNDLES.values(), ids=BUNDLES)
def ops(request: pytest.FixtureRequest) -> Ops:
    found: Ops = request.param
    return found


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def seed() -> Tensor:
    return torch.tensor([11, 5, 2])


def factors(shape: tuple[int, ...], p: float, stream: int) -> Tensor:
    """What dropout multiplies with."""
    if p == 0:
        return torch.ones(shape, dtype=torch.float64)
    return keep_mask(shape, p, seed(), stream).double() * 256 / keep_threshold(p)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def naive_attention(qkv: Tensor, lengths: list[int], p: float, stream: int) -> Tensor:
    out = torch.zeros(qkv.shape[0], A, D, dtype=qkv.dtype)
    threshold = keep_threshold(p)
    drop = score_mask((len(lengths), A, S, S), threshold, seed(), seed()[2] * 4 + stream)
    drop = drop.double() * 256 / threshold
    start = 0
    for n, length in enumerate(lengths):
        rows = slice(start, start + length)
        for a in range(A):
            q, k, v = (qkv[rows, part, a] for part in range(3))
            probabilities = torch.softmax(q @ k.T / math.sqrt(D), dim=-1)
            out[rows, a] = (probabilities * drop[n, a, :length, :length].to(qkv.dtype)) @ v
        start += length
    return out


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attention(ops: Ops, lengths: list[int], p: float) -> None:
    qkv = double(sum(lengths), 3, A, D)
    dout = torch.randn(sum(lengths), A, D, dtype=torch.float64)
    found = ops.attention(qkv, bounds(lengths), S, p, seed(), 1)
    want = naive_attention(qkv, lengths, p, 1)
    assert torch.allclose(found, want, rtol=1e-12, atol=1e-12)
    (dfound,) = torch.autograd.grad(found, qkv, dout)
    (dwant,) = torch.autograd.grad(want, qkv, dout)
    assert torch.allclose(dfound, dwant, rtol=1e-11, atol=1e-11)


def test_attention_in_bf16_is_near(ops: Ops) -> None:
    lengths = [9, 4, 7]
    qkv = double(20, 3, A, D)
    found = ops.attention(qkv.bfloat16(), bounds(lengths), S, 0.3, seed(), 1)
    assert found.dtype == torch.bfloat16
    want = naive_attention(qkv.bfloat16().double(), lengths, 0.3, 1)
    assert (found.double() - want).abs().max() < 0.03 * want.abs().max()


def test_attention_of_large_scores_is_finite(ops: Ops) -> None:
    qkv = (torch.randn(12, 3, A, D) * 1e3).requires_grad_()
    found = ops.attention(qkv, bounds([9, 3]), S, 0.0, seed(), 0)
    found.sum().backward()
    assert found.isfinite().all() and qkv.grad is not None and qkv.grad.isfinite().all()


def test_tokens_beyond_the_last_sequence_are_zero(ops: Ops) -> None:
    qkv = double(12, 3, A, D)
    found = ops.attention(qkv, bounds([5, 3]), S, 0.0, seed(), 0)
    assert torch.equal(found[8:], torch.zeros(4, A, D, dtype=torch.float64))
    found.sum().backward()
    assert qkv.grad is not None and not qkv.grad[8:].any()


@pytest.mark.parametrize("shape", [(3 * A * D,), (3, A, D)])
def test_attention_gives_the_bias_in_qkv_its_gradient(ops: Ops, shape: tuple[int, ...]) -> None:
    product, bias = double(12, 3, A, D), double(*shape)
    dout = torch.randn(12, A, D, dtype=torch.float64)
    rest = (bounds([5, 3]), S, 0.3, seed(), 1)
    added = product + bias.view(3, A, D)
    want = torch.autograd.grad(ops.attention(added, *rest), (product, bias), dout)
    added = product + bias.detach().view(3, A, D)
    found = torch.autograd.grad(ops.attention(added, *rest, qkv_bias=bias), (product, bias), dout)
    for a, b in zip(found, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


CHOSEN = {
    "some of each": ([5, 1, 9, 3], [0, 2, 5, 6, 13, 14, 17]),
    "none of some": ([5, 1, 9, 3, 0], [3, 4, 16]),
    "all": ([4, 7, 0, 0], list(range(11))),
    "tokens of no sequence": ([5, 3], [1, 6, 8, 10]),
}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("lengths", "chosen"), CHOSEN.values(), ids=CHOSEN)
def test_attention_at_some_tokens(
    ops: Ops, lengths: list[int], chosen: list[int], p: float
) -> None:
    T, spare, cu_seqlens = max(sum(lengths), chosen[-1] + 2), 3, bounds(lengths)
    qkv, bias = double(T, 3, A, D), double(3, A, D)
    positions = torch.tensor(chosen + [T] * spare)
    cu_queries = torch.searchsorted(torch.tensor(chosen), cu_seqlens).int()
    whole = qkv + bias
    want = naive_attention(whole, lengths, p, 1)[chosen]
    here = whole - bias + bias.detach()
    q = torch.cat((here[chosen, 0], double(spare, A, D)))
    found = ops.attention_at(
        q, here[:, 1:], positions, cu_queries, cu_seqlens, S, p, seed(), 1, qkv_bias=bias
    )
    assert torch.allclose(found[: len(chosen)], want, rtol=1e-12, atol=1e-12)
    assert not found[len(chosen) :].any()
    dout = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (qkv, bias, q), dout)
    wanted = torch.autograd.grad(want, (qkv, bias), dout[: len(chosen)])
    for a, b in zip(gradients, wanted, strict=False):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)
    assert not gradients[2][len(chosen) :].any()


def naive_layer_norm(x: Tensor, weight: Tensor, beta: Tensor, eps: float) -> Tensor:
    rows = []
    for row in x:
        mean = row.sum() / len(row)
        variance = ((row - mean) ** 2).sum() / len(row)
        rows.append((row - mean) / torch.sqrt(variance + eps) * weight + beta)
    return torch.stack(rows)


def naive_gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "none":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def check(found: Tensor, want: Tensor, inputs: dict[str, Tensor]) -> None:
    """Values and every gradient."""
    assert found.shape == want.shape
    assert torch.allclose(found, want, rtol=1e-11, atol=1e-11)
    dout = torch.randn_like(found)
    dfound = torch.autograd.grad(found, list(inputs.values()), dout)
    dwant = torch.autograd.grad(want, list(inputs.values()), dout)
    for name, a, b in zip(inputs, dfound, dwant, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10), name


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("rows", [1, 7])
def test_dropout_add_layer_norm(ops: Ops, rows: int, p: float) -> None:
    H = 13
    x, residual = double(rows, H), double(rows, H)
    bias, weight, beta = double(H), double(H), double(H)
    found = ops.dropout_add_layer_norm(x, bias, residual, weight, beta, 1e-5, p, seed(), 2)
    total = (x + bias) * factors((rows, H), p, 2) + residual
    names = {"x": x, "bias": bias, "residual": residual, "weight": weight, "beta": beta}
    check(found, naive_layer_norm(total, weight, beta, 1e-5), names)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_linear_gelu(ops: Ops, approximate: str) -> None:
    x, weight, bias = double(6, 5), double(8, 5), double(8)
    found, residual = ops.linear_gelu_residual(x, weight, bias, approximate)
    assert torch.equal(residual, x)
    want = torch.stack([naive_gelu(weight @ row + bias, approximate) for row in x])
    check(found, want, {"x": x, "weight": weight, "bias": bias})


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_layer_norm(ops: Ops, approximate: str) -> None:
    x, bias, weight, beta = double(6, 9), double(9), double(9), double(9)
    found = ops.gelu_layer_norm(x, bias, weight, beta, 1e-5, approximate)
    want = naive_layer_norm(naive_gelu(x + bias, approximate), weight, beta, 1e-5)
    check(found, want, {"x": x, "bias": bias, "weight": weight, "beta": beta})


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_embed_layer_norm(ops: Ops, p: float) -> None:
    T, V, P, H, pad = 9, 7, 6, 5, 3
    word, types, position = double(V, H), double(2, H), double(P, H)
    weight, beta = double(H), double(H)
    ids = torch.tensor([0, 3, 3, 6, 1, 0, 0, 2, 3])  # 4 and 5 are never read
    kinds, positions = torch.arange(T) % 2, torch.arange(T) % 4
    found = ops.embed_layer_norm(
        ids, kinds, positions, word, types, position, weight, beta, pad, 1e-5, p, seed(), 0
    )
    # [PAD]'s row is read but not trained.
    rows = [word[i].detach() if i == pad else word[i] for i in ids.tolist()]
    total = torch.stack(rows) + torch.stack([types[int(k)] for k in kinds])
    total = total + torch.stack([position[int(k)] for k in positions])
    want = naive_layer_norm(total, weight, beta, 1e-5) * factors((T, H), p, 0)
    names = {"word": word, "types": types, "position": position, "weight": weight, "beta": beta}
    check(found, want, names)
    dword = torch.autograd.grad(
        ops.embed_layer_norm(
            ids, kinds, positions, word, types, position, weight, beta, pad, 1e-5, p, seed(), 0
        ).sum(),
        word,
    )[0]
    assert not dword[[3, 4, 5]].any()


@pytest.mark.parametrize("labels", [[2, -100, 0, 9, -100], [-100] * 5, [3] * 5])
def test_linear_cross_entropy(ops: Ops, labels: list[int]) -> None:
    x, weight, bias = double(5, 4), double(10, 4), double(10)
    found = ops.linear_cross_entropy(x, weight, bias, torch.tensor(labels))
    want = (x * 0).sum() + (weight * 0).sum() + (bias * 0).sum()
    for row, label in zip(x, labels, strict=True):
        if label != -100:
            logits = weight @ row + bias
            want = want + logits.exp().sum().log() - logits[label]
    check(found, want, {"x": x, "weight": weight, "bias": bias})


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 0.01), (0.2, 0.03)])
def test_label_smoothing_and_z_loss(ops: Ops, smoothing: float, z_loss: float) -> None:
    x, weight, bias = double(5, 4), double(10, 4), double(10)
    labels = [2, -100, 0, 9, -100]
    found = ops.linear_cross_entropy(x, weight, bias, torch.tensor(labels), smoothing, z_loss)
    want = torch.zeros((), dtype=torch.float64)
    for row, label in zip(x, labels, strict=True):
        if label != -100:
            logits = weight @ row + bias
            normalizer = logits.exp().sum().log()
            target = (1 - smoothing) * logits[label] + smoothing * logits.mean()
            want = want + normalizer - target + z_loss * normalizer**2
    check(found, want, {"x": x, "weight": weight, "bias": bias})


def test_cross_entropy_of_large_logits_is_finite(ops: Ops) -> None:
    x = torch.full((2, 4), 1e4, requires_grad=True)
    weight, bias = torch.eye(6, 4) * 10, torch.zeros(6)
    loss = ops.linear_cross_entropy(x, weight, bias, torch.tensor([0, 5]))
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_of_results_and_gradients(ops: Ops, dtype: torch.dtype) -> None:
    def make(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    x, residual, weight, beta = make(6, 8), make(6, 8), make(8), make(8)
    table, logits_bias = make(20, 8), make(20)
    ids = torch.tensor([1, 2, 2, 0, 5, 19])
    found = {
        "dropout_add_layer_norm": ops.dropout_add_layer_norm(
            x, weight, residual, weight, beta, 1e-12, 0.1, seed(), 1
        ),
        "linear_gelu_residual": ops.linear_gelu_residual(x, make(12, 8), make(12), "none")[0],
        "gelu_layer_norm": ops.gelu_layer_norm(x, weight, weight, beta, 1e-12, "none"),
        "embed_layer_norm": ops.embed_layer_norm(
            ids, ids % 2, ids % 3, table, make(2, 8), make(3, 8), weight, beta, 0, 1e-12, 0.1,
            seed(), 0,
        ),
    }  # fmt: skip
    assert {name: out.dtype for name, out in found.items()} == dict.fromkeys(found, dtype)
    loss = ops.linear_cross_entropy(x, table, logits_bias, ids)
    assert loss.dtype == torch.float32 and loss.shape == ()
    sum(out.float().sum() for out in [*found.values(), loss]).backward()  # type: ignore[union-attr]
    for tensor in (x, residual, weight, beta, table, logits_bias):
        assert tensor.grad is not None and tensor.grad.dtype == dtype


def test_a_frequent_token_in_bf16_sums_its_gradient_in_fp32(ops: Ops) -> None:
    T, H = 2000, 4
    word = torch.zeros(3, H, dtype=torch.bfloat16, requires_grad=True)
    ids, kinds = torch.ones(T, dtype=torch.int64), torch.zeros(T, dtype=torch.int64)
    other = torch.randn(1, H).bfloat16()
    weight, beta = torch.ones(H).bfloat16(), torch.zeros(H).bfloat16()
    out = ops.embed_layer_norm(
        ids, kinds, kinds, word, other, other, weight, beta, 0, 1e-12, 0.0, seed(), 0
    )
    dout = torch.randn(H).bfloat16().expand(T, H)
    (dword,) = torch.autograd.grad(out, word, dout)
    row = (2 * other[0].float()).requires_grad_()
    normed = torch.nn.functional.layer_norm(row, (H,), eps=1e-12)
    (want,) = torch.autograd.grad(normed, row, dout[0].float())
    assert torch.allclose(dword[1].float(), want * T, rtol=0.02, atol=0.02 * T * want.abs().max())


GRADCHECKS: dict[str, Callable[[Ops], tuple[Callable[..., Tensor], tuple[Tensor, ...]]]] = {
    "attention": lambda ops: (
        lambda qkv: ops.attention(qkv, bounds([4, 1, 0]), 4, 0.3, seed(), 1),
        (double(5, 3, 2, 3),),
    ),
    "dropout_add_layer_norm": lambda ops: (
        lambda *args: ops.dropout_add_layer_norm(
            *args, 1e-5, 0.3, seed(), 1, rows=torch.tensor([7, 2, 9])
        ),
        (double(3, 5), double(5), double(3, 5), double(5), double(5)),
    ),
    "linear_gelu_residual": lambda ops: (
        lambda *args: ops.linear_gelu_residual(*args, "none")[0],
        (double(3, 4), double(5, 4), double(5)),
    ),
    "gelu_layer_norm": lambda ops: (
        lambda *args: ops.gelu_layer_norm(*args, 1e-5, "tanh"),
        (double(3, 5), double(5), double(5), double(5)),
    ),
    "embed_layer_norm": lambda ops: (
        lambda *args: ops.embed_layer_norm(
            torch.tensor([1, 2, 1, 3]), torch.tensor([0, 1, 1, 0]), torch.arange(4), *args,
            0, 1e-5, 0.3, seed(), 1,
        ),
        (double(5, 4), double(2, 4), double(4, 4), double(4), double(4)),
    ),
    "linear_cross_entropy": lambda ops: (
        lambda *args: ops.linear_cross_entropy(*args, torch.tensor([1, -100, 4])),
        (double(3, 4), double(6, 4), double(6)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradients_are_the_slopes(ops: Ops, name: str) -> None:
    function, inputs = GRADCHECKS[name](ops)
    assert torch.autograd.gradcheck(function, inputs)
