"""What a model says of sequences, however many: sorted by length, as many at once as tokens allow.

T tokens of a batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from fastbert.finetune.tasks.base import Feature, Task
from fastbert.hf.encode import TOKENS_PER_BATCH


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Computing in `dtype` with the weights in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def batches(features: Sequence[Feature], tokens: int) -> Iterator[list[int]]:
    """Places of features that are computed together, the longest first: memory lacks at once.

    Args:
        features: any number of them.
        tokens: of a batch, padding included, unless a feature alone has more.
    """
    order = sorted(range(len(features)), key=lambda place: -features[place].length)
    batch: list[int] = []
    longest = sequences = 0
    for place in order:
        inputs = features[place].inputs
        longest = max(longest, *(len(one["input_ids"]) for one in inputs))
        if batch and longest * (sequences + len(inputs)) > tokens:
            yield batch
            batch, sequences = [], 0
            longest = max(len(one["input_ids"]) for one in inputs)
        batch.append(place)
        sequences += len(inputs)
    if batch:
        yield batch


@torch.inference_mode()
def infer_batch(
    task: Task,
    model: nn.Module,
    features: Sequence[Feature],
    dtype: torch.dtype = torch.float32,
    unpad: bool = True,
) -> tuple[list[np.ndarray], tuple[float, float] | None]:
    """What is kept of features that are computed together, and the loss of labelled ones.

    Sequences without labels are laid end to end, where the model takes them so.

    Args:
        task, model, features, dtype, unpad: as in `infer`.

    Returns:
        The sum of losses and by what it is divided, two numbers; None without labels.
    """
    batch = task.packed(model, features) if features[0].label is None else None
    device = next(model.parameters()).device
    if batch is None:
        batch = {name: value.to(device) for name, value in task.batch(features).items()}
    with autocast(device, dtype):
        outputs = task.outputs(model, batch, unpad)
    loss = None
    if "labels" in batch:
        loss = float(task.loss(outputs, batch)), float(task.items(batch))
    return task.raw(outputs, batch), loss


def infer(
    task: Task,
    model: nn.Module,
    features: Sequence[Feature],
    dtype: torch.dtype = torch.float32,
    *,
    unpad: bool = True,
    progress: Any = None,
    tokens: int | None = None,
) -> tuple[list[np.ndarray], float | None]:
    """What is kept of each feature, in their order, and the mean loss where they have labels.

    Args:
        task: reads the outputs.
        model: in evaluation.
        features: with labels, or without.
        dtype: that it computes in.
        unpad: see `Task.outputs`.
        progress: a bar that is moved by features.
        tokens: of a batch, see `batches`; None: what the device is used well with.
    """
    device = next(model.parameters()).device
    tokens = tokens or TOKENS_PER_BATCH.get(device.type, 16384)
    raws: list[np.ndarray | None] = [None] * len(features)
    total = items = 0.0
    for places in batches(features, tokens):
        found, loss = infer_batch(task, model, [features[p] for p in places], dtype, unpad)
        if loss is not None:
            total, items = total + loss[0], items + loss[1]
        for place, raw in zip(places, found, strict=True):
            raws[place] = raw
        if progress is not None:
            progress.update(len(places))
    done = [raw for raw in raws if raw is not None]
    assert len(done) == len(features)
    return done, total / items if items else None
