"""Dropout on a CPU: what is drawn, and attention with it beside the same in fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastbert.hf import dropout, layers
from fastbert.hf.dropout import draws_bytes, dropped_attention, keeps, rescale
from fastbert_kernels.philox import keep_threshold


@pytest.mark.parametrize("p", [1 / 64, 0.1, 0.25, 0.5, 0.9, 63 / 64])
def test_the_share_kept_is_that_of_the_threshold(p):
    torch.manual_seed(0)
    N = 2**20 + 3  # no multiple of the 8 bytes of a word
    kept = keeps((N,), p, torch.float32)
    assert kept.shape == (N,) and kept.dtype == torch.float32
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    share = keep_threshold(p) / 256
    for byte in range(8):  # of each word
        of_byte = kept[byte::8]
        error = (share * (1 - share) / len(of_byte)) ** 0.5
        assert abs(of_byte.mean().item() - share) < 5 * error
    assert rescale(p) * share == 1


def test_neighbours_are_independent():
    torch.manual_seed(1)
    kept = keeps((4096, 256), 0.5, torch.float32) - 0.5
    for step in (1, 2, 7, 8, 256):
        flat = kept.flatten()
        assert abs((flat[step:] * flat[:-step]).mean() * 4) < 5 / 2**10


def test_the_generator_decides():
    torch.manual_seed(2)
    first, second = keeps((999,), 0.3, torch.float32), keeps((999,), 0.3, torch.float32)
    torch.manual_seed(2)
    assert torch.equal(keeps((999,), 0.3, torch.float32), first)
    assert not torch.equal(first, second)


def test_rows():
    x = torch.randn(300, 40, requires_grad=True)
    torch.manual_seed(3)
    out = dropout.dropout(x, 0.1)
    kept = out != 0
    assert torch.equal(out, torch.where(kept, x * (256 / 230), 0.0))
    out.backward(torch.ones_like(out))
    assert torch.equal(x.grad, torch.where(kept, 256 / 230, 0.0).float())


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked):
    """Values and gradients are those of fp64 with the same weights dropped."""
    torch.manual_seed(4)
    n, A, s, D, p = 3, 2, 17, 8, 0.25
    q, k, v = (torch.randn(n, s, A, D).transpose(1, 2).requires_grad_() for _ in range(3))
    mask = torch.ones(n, 1, 1, s, dtype=torch.bool)
    mask[1, ..., 5:] = False
    mask[2, ..., 0] = False
    torch.manual_seed(5)
    out = dropped_attention(q, k, v, mask if masked else None, p, 0.3)
    torch.manual_seed(5)
    kept = keeps((n, A, s, s), p, torch.float64)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = wide[0] @ wide[1].transpose(2, 3) * 0.3
    if masked:
        scores = scores.masked_fill(~mask, -torch.inf)
    want = (scores.softmax(-1) * kept * (256 / 192)) @ wide[2]
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    for mine, theirs in zip(found, torch.autograd.grad(want, wide, dout.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


def test_second_gradients():
    q, k, v = (torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attend(*qkv):
        torch.manual_seed(6)
        return dropped_attention(*qkv, None, 0.5, 1.0)

    assert torch.autograd.gradgradcheck(attend, (q, k, v))


@pytest.mark.parametrize(
    ("p", "dtype"), [(0.0, None), (0.001, None), (0.999, None), (1.0, None), (0.1, torch.bfloat16)]
)
def test_what_is_left_to_torch(p, dtype):
    assert not draws_bytes(torch.ones(2, dtype=dtype), p)


def test_what_is_recorded_is_left_to_torch():
    x = torch.ones(2, 3)
    assert draws_bytes(x, 0.1)
    answers = []
    torch.func.vmap(lambda row: answers.append(draws_bytes(row, 0.1)) or row)(x)
    torch.jit.trace(
        lambda row: answers.append(draws_bytes(row, 0.1)) or row + 1, x, check_trace=False
    )
    assert answers and not any(answers)


@pytest.mark.parametrize("p", [0.25, 0.001])
def test_the_end_of_a_layer(p):
    """By bytes where that is good for it, else by the module."""
    dense, norm, drop = nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(p)
    x, residual = torch.randn(50, 4), torch.randn(50, 8)
    torch.manual_seed(7)
    found = layers.add_norm(x, residual, dense, norm, drop)
    torch.manual_seed(7)
    dropped = dropout.dropout(dense(x), p) if p == 0.25 else F.dropout(dense(x), p)
    assert torch.equal(found, norm(dropped + residual))
    drop.eval()
    assert torch.equal(layers.add_norm(x, residual, dense, norm, drop), norm(dense(x) + residual))


def test_sequences_without_a_key_are_torch_s():
    """Of the first token, which asks without being one: torch's softmax of nothing is 0."""
    from fastbert.hf.packing import Plan, attend

    plan = Plan.of(torch.tensor([[0, 0, 0], [1, 1, 0]]), (2, 3), torch.device("cpu"))
    x = torch.randn(3, 8)
    out = attend(plan, x, x, x, 2, 0.25, 1.0)
    assert out.isfinite().all() and not out[0].any()
