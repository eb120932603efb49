"""Dropout on a CPU for an eighth of the time: a byte of randomness decides, as in our kernels.

`bernoulli_` draws a double for each element, one after the other: 5.6 of the 9.4 ns that
`F.dropout` takes for an element. A byte of a 64-bit word costs 0.4, and all of it 1.1.
"""

import math

import torch
from torch import Tensor

from fastbert.hf.recorded import unreadable
from fastbert_kernels.philox import keep_threshold

_LEAST = 1 / 64
"""Below, rounding would change a probability by more than an eighth."""


def keeps(shape: tuple[int, ...], dropout_p: float, dtype: torch.dtype) -> Tensor:
    """1 for what stays and 0 for what is dropped, by torch's generator, on the CPU.

    Args:
        shape: any.
        dropout_p: rounded to a 256th.
        dtype: of the result.
    """
    count, threshold = math.prod(shape), keep_threshold(dropout_p)
    words = torch.empty(-(-count // 8), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    drawn = words.view(torch.uint8)[:count].view(shape)
    # Of bytes, clamp and subtraction are vectorised, and comparison is not: 0.07 ns against 0.55.
    dropped = 256 - threshold
    return drawn.clamp_(dropped - 1, dropped).sub_(dropped - 1).to(dtype)


def rescale(dropout_p: float) -> float:
    """What survivors are multiplied by: one over the chance to be kept, a multiple of 1/256."""
    return 256 / keep_threshold(dropout_p)


def draws_bytes(x: Tensor, dropout_p: float) -> bool:
    """Whether `x` is one for the functions below: what nothing records, in fp32 or fp64.

    Probabilities near 0 and 1 are left to torch: see `_LEAST`.
    """
    usual = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return usual and _LEAST <= dropout_p <= 1 - _LEAST and not unreadable({})


def dropout(x: Tensor, dropout_p: float) -> Tensor:
    """x · keep / P(keep), elementwise."""
    return x * keeps(tuple(x.shape), dropout_p, x.dtype).mul_(rescale(dropout_p))


def dropped_attention(
    q: Tensor,  # (n, A, s, D)
    k: Tensor,  # (n, A, s, D)
    v: Tensor,  # (n, A, s, D)
    mask: Tensor | None,  # (n, 1, 1, s) bool: which are keys, at least one of each sequence
    dropout_p: float,
    scale: float,
) -> Tensor:  # (n, A, s, D)
    """dropout(softmax(Q Kᵀ · scale)) V, as torch computes it where its flash attention cannot.

    Forward and backward of 16 x 192 tokens, 12 heads of 32: 81 ms where torch takes 132 (one core).
    """
    n, A, s, D = q.shape
    q, k, v = (x.reshape(n * A, s, D) for x in (q * scale, k, v * rescale(dropout_p)))
    scores = torch.bmm(q, k.transpose(1, 2)).view(n, A, s, s)
    if mask is not None:
        scores = scores + q.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    dropped = torch.softmax(scores, -1) * keeps(tuple(scores.shape), dropout_p, scores.dtype)
    return torch.bmm(dropped.view(n * A, s, s), v).view(n, A, s, D)
