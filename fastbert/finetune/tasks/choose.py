"""The right one among several answers (Zellers et al. 2018), whose number may differ.

N choices of B questions, C of one at most.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.finetune import metrics
from fastbert.finetune.columns import Columns
from fastbert.finetune.inputs import Row
from fastbert.finetune.metrics import Evaluation
from fastbert.finetune.tasks.base import (
    Example,
    Feature,
    Prediction,
    Task,
    as_inputs,
    cut_to,
    model_inputs,
)
from fastbert.finetune.values import read_choices

_LEAST = torch.finfo(torch.float32).min


class Choose(Task):
    """Multiple choice, as transformers' heads do it."""

    name = "choose"
    head = "MultipleChoice"
    roles = ("context", "question", "choices")

    def example(self, row: Row, columns: Columns, labelled: bool) -> Example:
        choices, label = read_choices(row, columns)
        made: dict[str, Any] = {
            role: columns.value(row, role) or "" for role in ("context", "question")
        }
        made["choices"] = choices
        if labelled:
            made["label"] = label
        return Example(row.where, made)

    def features(self, examples: Sequence[Example], labelled: bool) -> list[Feature]:
        first, second, sizes = [], [], []
        for one in examples:
            context, question = one.fields["context"], one.fields["question"]
            for choice in one.fields["choices"]:
                first.append(context or question)
                second.append(f"{question} {choice}".strip() if context else choice)
            sizes.append(len(one.fields["choices"]))
        if not first:
            return []
        found, cut = cut_to(self.tokenizer, self.max_length, first, second)
        self.cut += cut
        made, begin = [], 0
        for place, (one, size) in enumerate(zip(examples, sizes, strict=True)):
            inputs = [as_inputs(found, row) for row in range(begin, begin + size)]
            made.append(Feature(place, inputs, one.fields["label"] if labelled else None))
            begin += size
        return made

    def batch(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        return super().batch(features) | {"sizes": _sizes(features)}

    def packed(self, model: nn.Module, features: Sequence[Feature]) -> dict[str, Any] | None:
        found = super().packed(model, features)
        return None if found is None else found | {"sizes": _sizes(features)}

    def label_tensor(self, features: Sequence[Feature], longest: int) -> Tensor:
        return torch.tensor([one.label for one in features])

    def outputs(self, model: nn.Module, batch: dict[str, Any], unpad: bool) -> Tensor:
        inputs = model_inputs(batch)
        # (1, N, S), or (1, 1, T): of the ids alone: DistilBERT leaves positions as they come.
        inputs["input_ids"] = inputs["input_ids"][None]
        logits = model(**inputs).logits.float().flatten().split(batch["sizes"].tolist())
        return nn.utils.rnn.pad_sequence(list(logits), batch_first=True, padding_value=_LEAST)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")

    def distributions(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs

    def raw(self, outputs: Tensor, batch: dict[str, Any]) -> list[np.ndarray]:
        chances = outputs.softmax(1).cpu().numpy()
        sizes = batch["sizes"].tolist()
        return [one[:size] for one, size in zip(chances, sizes, strict=True)]

    def predictions(
        self, examples: Sequence[Example], features: Sequence[Feature], raws: Sequence[np.ndarray]
    ) -> list[Prediction]:
        return [
            {
                "choice": int(raw.argmax()),
                "score": float(raw.max()),
                "probabilities": [float(chance) for chance in raw],
            }
            for raw in raws
        ]

    def evaluate(
        self,
        examples: Sequence[Example],
        features: Sequence[Feature],
        raws: Sequence[np.ndarray],
        predictions: Sequence[Prediction],
    ) -> Evaluation:
        return metrics.choices(
            [one.fields["label"] for one in examples], [raw.tolist() for raw in raws]
        )

    def mistake(self, example: Example, prediction: Prediction) -> dict[str, Any] | None:
        label = example.fields["label"]
        if prediction["choice"] == label:
            return None
        shown = self.shown(example)
        badness = prediction["score"]
        wanted = {"choice": label}
        return {**shown, "expected": wanted, "predicted": prediction, "badness": badness}


def _sizes(features: Sequence[Feature]) -> Tensor:  # (B,)
    return torch.tensor([len(one.inputs) for one in features])
