"""Updates of flat buffers and MLM masking in plain PyTorch: oracle of `optimizer`, `muon`, `mask`.

P elements of all parameters laid end to end, T tokens packed, V vocabulary. The updates change
their buffers in place and, unlike the kernels, read the device (`bool(finite)`).

Before an update, the gradient is divided by `grad_scale` and clipped: with norm n over all of it,
g ← g · min(1, max_grad_norm / (n + 1e-6)), as torch.nn.utils.clip_grad_norm_ does;
max_grad_norm <= 0 clips nothing. A gradient that holds an inf or a nan changes nothing but
`grad_norm`, and adds 1 to `skipped`.
"""

from collections.abc import Callable
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
    exp_avg_sq: Tensor  # (P,) fp32; of `muon_step` as long as what AdamW updates
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
    embedding_end: int = 0  # elements [0, embedding_end) have a learning rate of their own:
    embedding_lr_factor: float = 1.0  # times lr


class MuonGroup(NamedTuple):
    """Matrices of one shape, each (rows, columns) = (out, in) of a linear map."""

    rows: int
    columns: int
    starts: tuple[int, ...]  # of each in the flat buffers


class MuonHyperparameters(NamedTuple):
    """What Muon needs beside AdamW's `Hyperparameters`."""

    begin: int  # AdamW updates [0, begin), Muon the groups, which lie in [begin, P)
    groups: tuple[MuonGroup, ...]
    lr_ratio: float = 1.0  # Muon's learning rate over lr
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    weight_decay: float = 0.0
    adjust_lr_fn: str = "original"  # or match_rms_adamw
    dtype: torch.dtype = torch.bfloat16  # of Newton-Schulz


NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPS = 1e-7

Orthogonalize = Callable[[Tensor], Tensor]
"""(B, rows, columns) matrices to the same of orthogonalized ones, each by itself."""


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
    _adamw(buffers, hyper, g, g.numel())
    if buffers.weights is not None:
        buffers.weights.copy_(buffers.master)


def _adamw(buffers: Buffers, hyper: Hyperparameters, grad: Tensor, end: int) -> None:
    """Of the elements before `end`; embeddings take lr times their factor."""
    correction1, correction2 = _corrections(buffers, hyper)
    whole = (buffers.master, buffers.exp_avg, buffers.exp_avg_sq, grad)
    tables = min(hyper.embedding_end, end)
    for start, stop, factor in ((0, tables, hyper.embedding_lr_factor), (tables, end, 1.0)):
        w, m, v, g = (buffer[start:stop] for buffer in whole)
        lr = buffers.lr * factor
        w[: max(hyper.decay_end - start, 0)].mul_(1 - lr * hyper.weight_decay)
        m.lerp_(g, 1 - hyper.beta1)
        v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2)
        w -= lr / correction1 * m / (v.sqrt() / correction2**0.5 + hyper.eps)


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
        factor = hyper.embedding_lr_factor if start < hyper.embedding_end else 1.0
        w -= buffers.lr * factor * ratio * update
    if buffers.weights is not None:
        buffers.weights.copy_(buffers.master)


@torch.no_grad()
def symmetric_product(
    x: Tensor,  # (B, m, k)
    *,
    transposed: bool = False,  # x is (B, k, m)
    add: Tensor | None = None,  # (B, m, m), symmetric
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:  # (B, m, m)
    """alpha X Xᵀ + beta add of each matrix; XᵀX where transposed."""
    left, right = (x.mT, x) if transposed else (x, x.mT)
    if add is None:
        return left @ right if alpha == 1 else alpha * (left @ right)
    return torch.baddbmm(add, left, right, beta=beta, alpha=alpha)


@torch.no_grad()
def newton_schulz(
    x: Tensor,  # (B, rows, columns)
    steps: int = 5,
    product: Callable[..., Tensor] = symmetric_product,
) -> Tensor:  # (B, rows, columns)
    """Each matrix U S Vᵀ to about U Vᵀ, by a quintic iteration (Jordan et al. 2024, "Muon").

    X ← X / ‖X‖_F, then `steps` times A = X Xᵀ, B = b A + c A², X ← a X + B X, of the smaller side:
    a matrix with more rows than columns takes A = Xᵀ X and X ← a X + X B. The coefficients are
    torch.optim.Muon's: singular values end within about 0.7 and 1.2, not at 1. Computes in x's
    dtype, as it does, and its symmetric products by `product`.
    """
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=NS_EPS)
    for _ in range(steps):
        x = _newton_schulz_step(x, product)
    return x


def _newton_schulz_step(x: Tensor, product: Callable[..., Tensor]) -> Tensor:
    """A function of its own, so that one step's A and B are free in the next."""
    a, b, c = NS_COEFFICIENTS
    tall = x.shape[1] > x.shape[2]
    gram = product(x, transposed=tall)
    update = product(gram, add=gram, alpha=c, beta=b)
    left, right = (x, update) if tall else (update, x)
    return torch.baddbmm(x, left, right, beta=a)


def muon_lr_factor(group: MuonGroup, adjust_lr_fn: str) -> float:
    """What torch.optim.Muon's `adjust_lr_fn` multiplies the learning rate with.

    Raises:
        ValueError: there is no such function.
    """
    rows, columns = group.rows, group.columns
    if adjust_lr_fn == "original":
        return max(1.0, rows / columns) ** 0.5
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    raise ValueError(f"adjust_lr_fn = {adjust_lr_fn!r} must be original or match_rms_adamw")


@torch.no_grad()
def muon_step(
    buffers: Buffers,
    hyper: Hyperparameters,
    muon: MuonHyperparameters,
    spread: Callable[[Orthogonalize, Tensor], Tensor] | None = None,
) -> None:
    """Muon (Jordan et al. 2024) of the groups' matrices, AdamW of all before them, as one update.

    In torch.optim.Muon's order of operations, of the clipped gradient g of a matrix:
    m ← μ m + (1 - μ) g,  u = μ m + (1 - μ) g (m without nesterov),
    w ← (1 - lr' λ) w - lr' f NS(u), with lr' = lr times `lr_ratio` and f of `muon_lr_factor`.
    What lies between the matrices is left alone.

    Args:
        buffers, hyper, muon: see there.
        spread: runs the function it is given on the matrices it is given, (B, rows, columns):
            where processes divide them, each calls it with a part. None: it is called.

    Raises:
        ValueError: `adjust_lr_fn` is no such function.
    """
    grad = _clipped(buffers, hyper.max_grad_norm)
    if grad is None:
        return
    _adamw(buffers, hyper, grad, muon.begin)
    update_matrices(buffers, grad, muon, spread)
    if buffers.weights is not None:
        buffers.weights.copy_(buffers.master)


@torch.no_grad()
def update_matrices(
    buffers: Buffers,
    grad: Tensor,  # (P,) fp32, clipped
    muon: MuonHyperparameters,
    spread: Callable[[Orthogonalize, Tensor], Tensor] | None = None,
) -> None:
    """What `muon_step` does to the groups' matrices, the rounded copy aside."""
    lr = buffers.lr * muon.lr_ratio

    def orthogonalize(x: Tensor) -> Tensor:
        return newton_schulz(x, muon.ns_steps)

    for group in muon.groups:
        rows, columns, starts = group
        spans = [slice(start, start + rows * columns) for start in starts]
        x = grad.new_empty(len(starts), rows * columns, dtype=muon.dtype)
        for span, update in zip(spans, x, strict=True):
            g, m = grad[span], buffers.exp_avg[span]
            m.lerp_(g, 1 - muon.momentum)
            update.copy_(g.lerp(m, muon.momentum) if muon.nesterov else m)
        x = x.view(-1, rows, columns)
        x = spread(orthogonalize, x) if spread else orthogonalize(x)
        factor = muon_lr_factor(group, muon.adjust_lr_fn)
        for span, update in zip(spans, x.flatten(1), strict=True):
            w = buffers.master[span]
            w.mul_(1 - lr * muon.weight_decay).sub_(lr * factor * update)


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
