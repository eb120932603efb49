"""Vectors that lie near each other for texts that belong together (Reimers and Gurevych 2019).

Each text's pair shall be nearer to it than all others of the batch, and than its negative if there
is one: cross-entropy over scaled cosines (Henderson et al. 2017). A text that belongs to it in
another pair of the batch counts as no other. With a score instead: squared error of the cosine.

B pairs, G texts of each (2, or 3 with a negative), H hidden size, Q queries, C texts to find.
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
from fastbert.hf.load import sentence_layout
from fastbert.hf.together import means
from fastbert.settings import show

_LEAST = torch.finfo(torch.float32).min
_QUERIES = 256
"""Of an evaluation that are compared with all texts at once."""


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
        self.scale = asked.scale
        layout = sentence_layout(asked.model) if asked.pooling == "auto" else {}
        self.pooling = layout.get("pooling", "mean") if asked.pooling == "auto" else asked.pooling
        self.normalize = layout.get("normalize", False)
        self.scored = "score" in examples[0].fields
        if self.scored:
            self._learn_scores(examples, asked)
        elif len({one.fields["text_pair"] for one in examples}) < 2:
            raise UserError(
                f"all {len(examples)} pairs have the same second text: there is nothing to learn; "
                "name another column with --text-pair-column"
            )
        elif asked.per_device_train_batch_size == 1 and "negative" not in examples[0].fields:
            raise UserError(
                "per_device_train_batch_size = 1: the other pairs of a batch are what a pair is "
                "told from: it must be at least 2"
            )

    def _learn_scores(self, examples: Sequence[Example], asked: Any) -> None:
        if asked.rdrop_alpha:
            raise UserError("rdrop_alpha: a score has no distribution: leave it out")
        if "negative" in examples[0].fields:
            raise UserError(
                "the data has both a negative and a score: leave one of the columns out, or name "
                "another with --score-column"
            )
        self.check(examples)
        scores = {one.fields["score"] for one in examples}
        if len(scores) == 1:
            raise UserError(
                f"all {len(examples)} scores are {scores.pop():g}: there is nothing to learn; "
                "without scores, the other pairs of a batch are what does not belong together"
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
        return super().description | {"pooling": self.pooling, "normalize": self.normalize}

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

    def batch(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        found = super().batch(features)
        if "labels" in found and not self.scored:
            found["texts"] = torch.from_numpy(_numbers(features))
        return found

    def label_tensor(self, features: Sequence[Feature], longest: int) -> Tensor:
        return torch.tensor([one.label for one in features], dtype=torch.float32)

    def outputs(self, model: nn.Module, batch: dict[str, Any], unpad: bool) -> Tensor:
        states = model(**model_inputs(batch)).last_hidden_state.float()  # (B G, S, H)
        if "fastbert_plan" in batch:  # (1, T, H)
            plan, rows = batch["fastbert_plan"], states.squeeze(0)
            return rows[plan.first] if self.pooling == "cls" else means(rows, plan)
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
        cosines = self.scale * sides[:, 0] @ others.T  # (B, B) or (B, 2 B)
        return cosines.masked_fill(_also_right(batch["texts"]), _LEAST)

    def raw(self, outputs: Tensor, batch: dict[str, Any]) -> list[np.ndarray]:
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
        sides = np.stack(raws)  # (B, G, H)
        sides = sides / np.maximum(np.linalg.norm(sides, axis=2, keepdims=True), 1e-12)
        if self.scored:
            cosines = (sides[:, 0] * sides[:, 1]).sum(1)
            return metrics.similarity([one.fields["score"] for one in examples], cosines)
        return _retrieval(_numbers(features), sides, self.scale)

    def mistake(self, example: Example, prediction: Prediction) -> dict[str, Any] | None:
        return None


def _numbers(features: Sequence[Feature]) -> np.ndarray:  # (B, G) int64
    """Which text each is: the same number where tokens are the same."""
    known: dict[tuple[int, ...], int] = {}
    return np.array(
        [
            [known.setdefault(tuple(side["input_ids"]), len(known)) for side in one.inputs]
            for one in features
        ]
    )


def _also_right(texts: Tensor) -> Tensor:  # (B, G) -> (B, B) or (B, 2 B)
    """Pairs and negatives of a batch that belong to a text beside its own pair."""
    anchors, pairs = texts[:, 0, None], texts[:, 1, None]
    same, found = anchors == anchors.T, pairs == texts[:, 1:].T.flatten()
    right = (same.float() @ found.float()) > 0
    return right.fill_diagonal_(False)


def _retrieval(texts: np.ndarray, sides: np.ndarray, scale: float) -> Evaluation:
    """Each first text once, among all second ones; the loss with the negatives among them, too.

    Args:
        texts: (B, G), see `_numbers`.
        sides: (B, G, H), of length 1.
        scale: of cosines in the loss.
    """
    _, first = np.unique(texts, return_index=True)
    vectors = sides.reshape(-1, sides.shape[2])[first]  # by number
    wanted = np.unique(texts[:, 1])
    candidates = np.concatenate((wanted, np.setdiff1d(texts[:, 2:], wanted)))  # (C,)
    column = np.full(len(vectors), -1)
    column[candidates] = np.arange(len(candidates))
    order = np.argsort(texts[:, 0], kind="stable")
    rows_of = np.split(order, np.unique(texts[order, 0], return_index=True)[1][1:])
    before, equal, loss = [], [], 0.0
    for begin in range(0, len(rows_of), _QUERIES):
        block = rows_of[begin : begin + _QUERIES]
        query = np.repeat(np.arange(len(block)), [len(rows) for rows in block])
        own = column[texts[np.concatenate(block), 1]]
        cosines = vectors[[texts[rows[0], 0] for rows in block]] @ vectors[candidates].T  # (Q, C)
        right = np.zeros(cosines.shape, bool)
        right[query, own] = True
        nearer, as_near = metrics.places(cosines[:, : len(wanted)], right[:, : len(wanted)])
        before.append(nearer)
        equal.append(as_near)
        scaled = torch.from_numpy(scale * cosines)
        wrong = scaled.masked_fill(torch.from_numpy(right), -torch.inf).logsumexp(1)[query]
        pair = scaled[query, own]
        loss += float((torch.logaddexp(pair, wrong) - pair).sum())
    found = metrics.retrieval(np.concatenate(before), np.concatenate(equal))
    found.metrics["loss"] = loss / len(texts)
    return found


def _score(value: Any, where: str) -> float:
    with suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(score := float(value)):
            return score
    raise UserError(f"{where}: score {show(value)} must be a number")
