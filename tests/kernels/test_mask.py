"""MLM masking on the device: the reference bit for bit, and the proportions of the paper."""

import math

import pytest
import torch
from torch import Tensor

from fastbert_kernels import mask, reference_optimizer
from fastbert_kernels.mask import mask_tokens

V, MASK_ID = 1000, 4


def is_special() -> Tensor:
    special = torch.zeros(V, dtype=torch.bool)
    special[:5] = True
    return special


def seed(step: int = 0) -> Tensor:
    return torch.tensor([2**40 + 3, step, 7])


@pytest.mark.parametrize("T", [0, 1, 511, 513, 4000])
@pytest.mark.parametrize("probability", [0.0, 0.15, 1.0])
@pytest.mark.usefixtures("poisoned")
def test_equals_the_reference(T: int, probability: float) -> None:
    ids = torch.randint(V, (T,))
    ids[5:7] = torch.tensor([-1, V])[: max(0, T - 5)]
    arguments = (ids, is_special(), seed(3), probability, MASK_ID)
    found, want = mask_tokens(*arguments), reference_optimizer.mask_tokens(*arguments)
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


def within(count: float, total: int, probability: float) -> bool:
    """By four standard errors."""
    return abs(count / total - probability) < 4 * math.sqrt(probability * (1 - probability) / total)


def test_proportions() -> None:
    T = 400_000
    ids = torch.randint(V, (T,))
    masked, labels = reference_optimizer.mask_tokens(ids, is_special(), seed(), 0.15, MASK_ID)
    ordinary, chosen = ids > 4, labels != -100
    assert not chosen[~ordinary].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    M = int(chosen.sum())
    assert within(M, int(ordinary.sum()), 0.15)
    is_mask = masked[chosen] == MASK_ID
    assert within(int(is_mask.sum()), M, 0.8 + 0.1 / V)
    assert within(int((masked[chosen] == ids[chosen]).sum()), M, 0.1 + 0.1 / V)
    replaced = masked[chosen][(masked[chosen] != ids[chosen]) & ~is_mask]
    assert replaced.min() == 0 and replaced.max() == V - 1
    assert within(int((replaced < V // 2).sum()), len(replaced), 0.5)


def test_steps_differ() -> None:
    ids = torch.randint(5, V, (20_000,))
    first, second = (mask_tokens(ids, is_special(), seed(s), 0.5, MASK_ID)[1] for s in (0, 1))
    assert within(int(((first == -100) == (second == -100)).sum()), 20_000, 0.5)


def test_opcheck_and_compile() -> None:
    arguments = (torch.randint(V, (40,)), is_special(), seed(), 0.15, MASK_ID)
    torch.library.opcheck(mask._mask_tokens, arguments)
    compiled = torch.compile(mask_tokens, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(*arguments), mask_tokens(*arguments), strict=True):
        assert torch.equal(a, b)


def test_bad_arguments() -> None:
    ids = torch.randint(V, (6,))
    bad = {
        "seed has shape": (ids, is_special(), seed()[:2], 0.15, MASK_ID),
        "mlm_probability": (ids, is_special(), seed(), 1.5, MASK_ID),
        "mask_id": (ids, is_special(), seed(), 0.15, V),
    }
    for message, arguments in bad.items():
        with pytest.raises(ValueError, match=f"mask_tokens: {message}"):
            mask_tokens(*arguments)
