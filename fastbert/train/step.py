"""One optimizer step: forward and backward over its micro-batches, then the update."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.config import PretrainConfig
from fastbert.data.batch import Batch
from fastbert.model.bert import Bert
from fastbert.train.flat import FlatParameters
from fastbert.train.optimizer import FlatAdamW


class StepResult(NamedTuple):
    """What a step reports."""

    loss: float  # MLM + next-sentence loss, nats
    grad_norm: float  # before clipping
    updated: bool  # False where the gradient was not finite and the step was skipped


def model_inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor]:
    """What the encoder and the masked-word head read of a batch, in `Bert.predict`'s order."""
    return (
        batch.input_ids, batch.token_type_ids, batch.position_ids,
        batch.cu_seqlens, batch.max_seqlen, batch.masked_positions,
    )  # fmt: skip


class TrainStep:
    """The training step of a model over flat buffers.

    Losses are means over all masked tokens and all labelled sequences of the step, so splitting a
    batch over more micro-batches changes nothing but rounding.
    """

    def __init__(self, model: Bert, config: PretrainConfig, dtype: torch.dtype) -> None:
        self.model, self.config = model, config
        self.flat = FlatParameters(model, dtype)
        self.optimizer = FlatAdamW(self.flat, config)

    def __call__(self, batches: Sequence[Batch], step: int, learning_rate: float) -> StepResult:
        """Trains on the micro-batches of one step (`step` counts from 0 and seeds the dropout)."""
        model = self.model.train()
        masked = sum(int((batch.masked_labels != -100).sum()) for batch in batches)
        labelled = sum(int((batch.next_sentence_labels != -100).sum()) for batch in batches)
        loss = 0.0
        for index, batch in enumerate(batches):
            model.seed_dropout(self.config.seed, step * len(batches) + index)
            sums = model(*model_inputs(batch), batch.masked_labels, batch.next_sentence_labels)
            part = sums.mlm / max(masked, 1) + sums.next_sentence / max(labelled, 1)
            part.backward()
            self.flat.collect_gradients(accumulate=index > 0)
            loss += float(part.detach())
        norm, updated = self.optimizer.step(learning_rate)
        return StepResult(loss, norm, updated)


def compile_model(model: Bert) -> None:
    """Compiles each layer and the masked-word head in place with torch.compile.

    Layers are compiled one by one, so the first serves all of the same shape (the last one differs:
    it keeps masked and [CLS] rows only). Embeddings stay eager: a compiled scatter of their
    gradient adds in whatever order threads arrive.
    """
    for layer in model.layers:
        layer.compile(dynamic=False, fullgraph=True)
    if model.mlm is not None:
        model.mlm.compile(dynamic=False, fullgraph=True)
