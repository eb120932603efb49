"""The update of flat buffers, and MLM masking, in plain PyTorch: oracle of `optimizer` and `mask`.

P elements of all parameters laid end to end, T tokens packed, V vocabulary. The updates change
their buffers in place and, unlike the kernels, read the device (`bool(finite)`).

Before an update, the gradient is divided by `grad_scale` and clipped: with norm n over all of it,
g ← g · min(1, max_grad_norm / (n + 1e-6)), as torch.nn.utils.clip_grad_norm_ does;
max_grad_norm <= 0 clips nothing. A gradient that holds an inf or a nan changes nothing but
`grad_norm`, and adds 1 to `skipped`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastbert_kernels.philox import philox_4x32

SHARE_MASK = 0.8
"""Of the chosen tokens, those that become [MASK]."""
SHARE_KEPT_BELOW = 0.9
"""From here on, chosen tokens stay as they are; in between they become a random word."""
MASK_GROUP = 0xFFFFFFFF
"""The generator's group that masking draws from; dropout's groups count from 0."""

Spans = list[tuple[int, int]]
"""Where each parameter starts and stops in the flat buffers."""


class Buffers(NamedTuple):
    """What an update reads and writes, all on one device."""

    master: Tensor  # (P,) fp32
    grad: Tensor  # (P,) fp32, bf16 or fp16: grad_scale times the gradient
    exp_avg: Tensor  # (P,) fp32
    exp_avg_sq: Tensor  # (P,) fp32
    weights: Tensor | None  # (P,) the rounded copy to compute with, if any
    lr: Tensor  # () fp32
    step: Tensor  # () int64: updates made so far
    skipped: Tensor  # () int64: updates skipped so far
    grad_scale: Tensor  # () fp32
    grad_norm: Tensor  # () fp32, set to the norm before clipping


class Hyperparameters(NamedTuple):
    """What stays as it is for a whole run; the learning rate does not, and is a buffer."""

    decay_end: int  # elements [0, decay_end) are decayed; of LAMB they take a trust ratio, too
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # 0: no clipping


@torch.no_grad()
def _clipped(buffers: Buffers, max_grad_norm: float) -> Tensor | None:
    """The gradient to use, counted as a step; None where it is not finite."""
    grad_norm = buffers.grad_norm
    grad = buffers.grad.to(grad_norm.dtype) / buffers.grad_scale
    grad_norm.copy_(torch.linalg.vector_norm(grad))
    if not bool(grad_norm.isfinite()):
        buffers.skipped.add_(1)
        return None
    buffers.step.add_(1)
    if max_grad_norm > 0:
        grad = grad * (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    return grad


def _corrections(buffers: Buffers, hyper: Hyperparameters) -> tuple[float, float]:
    """1 - β₁ᵗ and 1 - β₂ᵗ."""
    t = int(buffers.step)
    return 1 - hyper.beta1**t, 1 - hyper.beta2**t


@torch.no_grad()
def adamw_step(buffers: Buffers, hyper: Hyperparameters) -> None:
    """AdamW (Loshchilov & Hutter 2019), in torch.optim.AdamW's order of operations.

    m ← β₁ m + (1 - β₁) g,  v ← β₂ v + (1 - β₂) g²,
    w ← (1 - lr λ) w - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)
    """
    g = _clipped(buffers, hyper.max_grad_norm)
    if g is None:
        return
    correction1, correction2 = _corrections(buffers, hyper)
    w, m, v, lr = buffers.master, buffers.exp_avg, buffers.exp_avg_sq, buffers.lr
    w[: hyper.decay_end].mul_(1 - lr * hyper.weight_decay)
    m.lerp_(g, 1 - hyper.beta1)
    v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
    w -= lr / correction1 * m / (v.sqrt() / correction2**0.5 + hyper.eps)
    if buffers.weights is not None:
        buffers.weights.copy_(w)


@torch.no_grad()
def lamb_step(
    buffers: Buffers,
    hyper: Hyperparameters,
    spans: Spans,  # of the parameters; what lies between them is left alone
) -> None:
    """LAMB (You et al. 2020, algorithm 2), with what NVIDIA's BERT recipe adds to it.

    m and v as AdamW's, u = m / (1 - β₁ᵗ) / (√v / √(1 - β₂ᵗ) + ε) + λ w, and for each parameter
    w ← w - lr · (‖w‖ / ‖u‖) · u. From NVIDIA: the gradient is clipped by its global norm (theirs
    is 1), biases and LayerNorms have neither decay nor trust ratio, and the ratio is 1 where one
    of the norms is 0.
    """
    grad = _clipped(buffers, hyper.max_grad_norm)
    if grad is None:
        return
    correction1, correction2 = _corrections(buffers, hyper)
    whole = (buffers.master, buffers.exp_avg, buffers.exp_avg_sq, grad)
    for start, stop in spans:
        w, m, v, g = (buffer[start:stop] for buffer in whole)
        m.lerp_(g, 1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        update = m / correction1 / (v.sqrt() / correction2**0.5 + hyper.eps)
        ratio = 1.0
        if start < hyper.decay_end:
            update += hyper.weight_decay * w
            norms = torch.linalg.vector_norm(w), torch.linalg.vector_norm(update)
            if all(norms):
                ratio = float(norms[0] / norms[1])
        w -= buffers.lr * ratio * update
    if buffers.weights is not None:
        buffers.weights.copy_(buffers.master)


def share(probability: float) -> int:
    """How many of the 2^32 values of a word lie below a probability."""
    return round(probability * 2**32)


def mask_tokens(
    input_ids: Tensor,  # (T,) int64
    is_special: Tensor,  # (V,) bool: tokens never chosen
    seed: Tensor,  # (3,) int64: the run's seed, the step, the layer
    mlm_probability: float,
    mask_id: int,
) -> tuple[Tensor, Tensor]:  # masked ids (T,), labels (T,): -100 where nothing is to be predicted
    """MLM masking; Devlin et al. 2019, section 3.1, each token chosen independently.

    One counter a token: its first word chooses (below mlm_probability), its second decides between
    [MASK], a random word and the token itself, its third is the random word, uniform over the
    vocabulary (up to 2^-17, as V / 2^32). Ids outside the vocabulary are never chosen.
    """
    token = torch.arange(input_ids.numel(), device=input_ids.device)
    zero = torch.zeros_like(seed[0])
    key = ((seed[0] ^ (seed[0] >> 32)) & 0xFFFFFFFF, seed[1] & 0xFFFFFFFF)
    choice, kind, word, _ = philox_4x32((token, zero + MASK_GROUP, zero, seed[2] * 4), key)
    V = is_special.numel()
    ordinary = (input_ids >= 0) & (input_ids < V) & ~is_special[input_ids.clamp(0, V - 1)]
    chosen = (choice < share(mlm_probability)) & ordinary
    replaced = torch.where(kind < share(SHARE_KEPT_BELOW), (word * V) >> 32, input_ids)
    replaced = torch.where(kind < share(SHARE_MASK), mask_id, replaced)
    return torch.where(chosen, replaced, input_ids), torch.where(chosen, input_ids, -100)
