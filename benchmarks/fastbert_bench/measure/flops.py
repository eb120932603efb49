"""What a training step must compute, and its share of what the GPU could: MFU."""

import numpy as np
import torch

from fastbert.config import ModelConfig

MLM_PROBABILITY = 0.15
# Dense bf16, from the datasheets of the SXM parts.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def flops_per_token(
    sizes: ModelConfig,
    lengths: np.ndarray,  # (B,)
) -> float:
    """FLOPs of training a token: 72 L H² + 12 L H s + 0.15 · 6 (H² + H V).

    A multiply-add counts as 2, the backward as twice the forward; s is the mean length of the
    sequence that a token stands in. Real tokens only: what a padded batch computes beyond is not
    work. L layers, H hidden size, V vocabulary.
    """
    L, H, V = sizes.num_hidden_layers, sizes.hidden_size, sizes.vocab_size
    s = float((lengths.astype(float) ** 2).sum() / lengths.sum())
    return 72 * L * H**2 + 12 * L * H * s + MLM_PROBABILITY * 6 * (H**2 + H * V)


def executed_flops_per_token(
    sizes: ModelConfig,
    lengths: np.ndarray,  # (B,)
    masked: int,
) -> float:
    """What our step computes of `flops_per_token`: of the last layer keys and values everywhere,
    the rest (60 of 72 H² a token, and attention's 12 H s) only at the `masked` and the B [CLS]
    positions. Recomputation inside attention is not counted."""
    T, H = float(lengths.sum()), sizes.hidden_size
    s = float((lengths.astype(float) ** 2).sum() / T)
    tokens = max(0.0, T - masked - len(lengths))
    attended = max(0.0, s * (T - masked) - T)  # a [CLS] attends to its sequence: T in all
    skipped = (60 * H**2 * tokens + 12 * H * attended) / T
    return flops_per_token(sizes, lengths) - skipped


def peak_flops(device: torch.device) -> float | None:
    """The datasheet's dense bf16 FLOPs a second; None where we do not know them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B); None on a CPU."""
    peak = peak_flops(device)
    return flops_per_second / peak if peak else None
