"""What a step on an H100 was expected to take, before one had run: by family of kernels.

`PREDICTED` was counted from compiled code, before any measurement, 2026-11: attention's kernels
compiled for sm_90 and disassembled, the instructions of their inner loops added up by the pipe that
issues them, the slowest pipe taken for the loop's time; the rest argued from bytes, and from tiles
that do not fill 132 multiprocessors. It stays as it was written: a wrong prediction is worth as
much as a right one. `estimated` is the roofline of `fastbert estimate` for the same families.
"""

import re

import numpy as np

from benchmarks.estimate import DEVICES, Device, Lengths, Op, step_ops
from fastbert.config import ModelConfig

TOKENS = 65_536
"""Real tokens of the step that every figure here stands for."""

GEMM_FORWARD, GEMM_BACKWARD, MLM = "GEMM forward", "GEMM dgrad + wgrad", "MLM products"
ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention forward", "attention backward"
PASSES, OPTIMIZER = "memory-bound passes", "optimizer"
RESIDUAL_ADDS, QKV_BIAS = "residual-gradient adds", "sum of dy, QKV bias"
FAMILIES = (
    GEMM_FORWARD, GEMM_BACKWARD, MLM, ATTENTION_FORWARD, ATTENTION_BACKWARD, PASSES, RESIDUAL_ADDS,
    QKV_BIAS, OPTIMIZER,
)  # fmt: skip

# Milliseconds; AdamW, dropout 0.1, bf16, natural lengths of mean 278.
PREDICTED = {
    "base-512-full": dict(
        zip(FAMILIES, (17.7, 36.6, 2.6, 5.4, 16.3, 17.3, 2.9, 1.8, 1.5), strict=True)
    ),
    "large-512-natural": dict(
        zip(FAMILIES, (60.5, 123.0, 3.4, 14.0, 36.2, 45.8, 7.7, 4.8, 4.5), strict=True)
    ),
}
PREDICTED_RANGE = {"base-512-full": (93.0, 115.0), "large-512-natural": (278.0, 325.0)}
"""Of the whole step, milliseconds."""


def device_of(name: str) -> Device | None:
    """What `fastbert estimate` knows of a device by that name."""
    return next((one for one in DEVICES.values() if re.search(one.names, name)), None)


def estimated(
    sizes: ModelConfig,
    lengths: np.ndarray,  # (B,)
    device: Device,
) -> dict[str, float]:
    """Milliseconds of a step of `TOKENS` by the roofline; 0 for what it does not know of.

    Returns:
        By family, and for the passes also by op and direction, as "bias_gelu forward".
    """
    found = dict.fromkeys(FAMILIES, 0.0)
    for op in step_ops(sizes, TOKENS, Lengths.of(lengths)):
        milliseconds = op.seconds(device) * 1e3
        family = _family(op)
        found[family] += milliseconds
        if family == PASSES:
            detail = f"{op.name} {op.direction}"
            found[detail] = found.get(detail, 0.0) + milliseconds
    return found


def _family(op: Op) -> str:
    if op.part == "optimizer":
        return OPTIMIZER
    if op.part == "passes":
        return PASSES
    forward = op.direction == "forward"
    if op.part == "attention":
        return ATTENTION_FORWARD if forward else ATTENTION_BACKWARD
    if op.name in ("linear_cross_entropy", "transform"):
        return MLM
    return GEMM_FORWARD if forward else GEMM_BACKWARD
