"""Vectors that lie near each other for texts that belong together (Reimers and Gurevych 2019).

Each text's pair shall be nearer to it than all others of the batch, and than its negative if there
is one: cross-entropy over scaled cosines (Henderson et al. 2017). With a score instead: squared
error of the cosine.

B pairs, G texts of each (2, or 3 with a negative), H hidden size.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.errors import UserError
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
from fastbert.settings import show


class Embed(Task):
    """The encoder alone."""

    name = "embed"
    head = ""
    roles = ("text", "text_pair", "negative")

    def __init__(self, tokenizer: Any, max_length: int, description: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, max_length, description)
        self.pooling = str(description.get("pooling", "mean"))
        self.normalize = bool(description.get("normalize", False))
        self.scale = 20.0
        self.scored = False

    def example(self, row: Row, columns: Columns, labelled: bool) -> Example:
        roles = self.roles if labelled else ("text",)
        made = {role: columns.value(row, role) for role in roles if role in columns}
        if labelled and "label" in columns:
            made["score"] = _score(columns.value(row, "label"), row.where)
        return Example(row.where, made)

    def learn(self, examples: Sequence[Example], asked: Any) -> None:
        self.pooling, self.scale = asked.pooling, asked.scale
        self.scored = "score" in examples[0].fields
        if self.scored:
            if asked.rdrop_alpha:
                raise UserError("rdrop_alpha: a score has no distribution: leave it out")
            self.check(examples)
            if len({one.fields["score"] for one in examples}) == 1 < len(examples):
                raise UserError(
                    f"all {len(examples)} scores are the same: there is nothing to learn; without "
                    "scores, the other pairs of a batch are what does not belong together"
                )

    def check(self, examples: Sequence[Example]) -> None:
        if not self.scored:
            return
        least, most = (f(one.fields["score"] for one in examples) for f in (min, max))
        if most > 1.0 or least < -1.0:
            raise UserError(
                f"{examples[0].where}: scores go from {least:g} to {most:g}: a cosine lies between "
                "-1 and 1, divide them"
            )

    def meet(self, examples: Sequence[Example]) -> None:
        self.scored = "score" in examples[0].fields

    @property
    def description(self) -> dict[str, Any]:
        return super().description | {"pooling": self.pooling}

    def features(self, examples: Sequence[Example], labelled: bool) -> list[Feature]:
        if not examples:
            return []
        roles = [role for role in self.roles if role in examples[0].fields]
        sides = []
        for role in roles:
            found, cut = cut_to(
                self.tokenizer, self.max_length, [one.fields[role] for one in examples]
            )
            self.cut += cut
            sides.append(found)
        return [
            Feature(
                row,
                [as_inputs(found, row) for found in sides],
                (one.fields["score"] if self.scored else 0.0) if labelled else None,
            )
            for row, one in enumerate(examples)
        ]

    def label_tensor(self, features: Sequence[Feature], longest: int) -> Tensor:
        return torch.tensor([one.label for one in features], dtype=torch.float32)

    def outputs(self, model: nn.Module, batch: dict[str, Tensor], unpad: bool) -> Tensor:
        states = model(**model_inputs(batch)).last_hidden_state.float()  # (B G, S, H)
        if self.pooling == "cls":
            return states[:, 0]
        mask = batch["attention_mask"][:, :, None].to(states.dtype)
        pooled: Tensor = (states * mask).sum(1) / mask.sum(1)
        return pooled

    def _sides(self, outputs: Tensor, count: int) -> Tensor:  # (B, G, H), of length 1
        return F.normalize(outputs, dim=1).view(count, -1, outputs.shape[1])

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        sides = self._sides(outputs, len(batch["labels"]))
        if self.scored:
            return F.mse_loss((sides[:, 0] * sides[:, 1]).sum(1), batch["labels"], reduction="sum")
        return F.cross_entropy(
            self.distributions(outputs, batch),
            torch.arange(len(sides), device=sides.device),
            reduction="sum",
        )

    def distributions(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        sides = self._sides(outputs, len(batch["labels"]))
        others = sides[:, 1:].transpose(0, 1).flatten(0, 1)  # pairs, then negatives
        return self.scale * sides[:, 0] @ others.T  # (B, B) or (B, 2 B)

    def raw(self, outputs: Tensor, batch: dict[str, Tensor]) -> list[np.ndarray]:
        count = len(batch["labels"]) if "labels" in batch else len(outputs)
        return list(outputs.view(count, -1, outputs.shape[1]).cpu().numpy())

    def predictions(
        self, examples: Sequence[Example], features: Sequence[Feature], raws: Sequence[np.ndarray]
    ) -> list[Prediction]:
        if self.normalize:
            raws = [raw / max(float(np.linalg.norm(raw[0])), 1e-12) for raw in raws]
        return [{"embedding": raw[0].tolist()} for raw in raws]

    @property
    def kind(self) -> str:
        return "embed score" if self.scored else "embed"

    def evaluate(
        self,
        examples: Sequence[Example],
        features: Sequence[Feature],
        raws: Sequence[np.ndarray],
        predictions: Sequence[Prediction],
    ) -> Evaluation:
        sides = np.stack([raw[:2] for raw in raws])
        sides = sides / np.linalg.norm(sides, axis=2, keepdims=True)
        if self.scored:
            cosines = (sides[:, 0] * sides[:, 1]).sum(1)
            return metrics.similarity([one.fields["score"] for one in examples], cosines)
        found = metrics.retrieval(sides[:, 0] @ sides[:, 1].T)
        # Among all: the negatives of a batch are whatever happens to be computed with it.
        outputs = torch.from_numpy(np.stack(raws)).float().flatten(0, 1)
        total = self.loss(outputs, {"labels": torch.zeros(len(raws))})
        found.metrics["loss"] = float(total) / len(raws)
        return found

    def mistake(self, example: Example, prediction: Prediction) -> dict[str, Any] | None:
        return None


def _score(value: Any, where: str) -> float:
    with suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(score := float(value)):
            return score
    raise UserError(f"{where}: score {show(value)} must be a number")
