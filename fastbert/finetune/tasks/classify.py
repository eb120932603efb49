"""A label for a text or a pair of texts: one of several, any number of them, or a score.

B texts, K labels.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
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
    label_names,
    model_inputs,
    unknown_label,
    unnamed,
)
from fastbert.finetune.values import decoded
from fastbert.settings import show

ONE, SEVERAL, SCORE = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
_MARKER = re.compile(r"</?e[12]>|\[/?E[12]\]")


class Classify(Task):
    """Sequence classification, as transformers' heads do it."""

    name = "classify"
    head = "SequenceClassification"
    roles = ("text", "text_pair")

    def __init__(self, tokenizer: Any, max_length: int, description: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, max_length, description)
        self.labels = list(description.get("labels") or [])
        self.problem = description.get("problem_type") or ONE
        self.threshold = float(description.get("threshold", 0.5))
        self.separator = str(description.get("label_separator", ""))
        self.smoothing = 0.0
        self.markers: list[str] = []

    def example(self, row: Row, columns: Columns, labelled: bool) -> Example:
        found: dict[str, Any] = {
            role: columns.value(row, role) for role in self.roles if role in columns
        }
        if labelled:
            found["label"] = _label(columns.value(row, "label"), self.separator, row.where)
        return Example(row.where, found)

    def classes(self, examples: Sequence[Example], asked: Any) -> list[Sequence[str]]:
        labels = [one.fields["label"] for one in examples]
        problem = _problem(labels) if asked.problem_type == "auto" else asked.problem_type
        return [() if problem == SCORE else _listed(label) for label in labels]

    def learn(self, examples: Sequence[Example], asked: Any) -> None:
        labels = [one.fields["label"] for one in examples]
        self.smoothing, self.threshold = asked.label_smoothing_factor, asked.threshold
        self.problem = _problem(labels) if asked.problem_type == "auto" else asked.problem_type
        self.markers = _markers(examples, asked.entity_markers)
        if self.problem == SCORE:
            for name in ("rdrop_alpha", "label_smoothing_factor"):
                if getattr(asked, name):
                    raise UserError(f"{name}: a score has no distribution: leave it out")
            if asked.class_weight != "none":
                raise UserError("class_weight: a score has no classes: leave it out")
            self.labels = ["score"]
            self._check_scores(examples)
            if len({float(label) for label in labels}) == 1:
                raise UserError(
                    f"all {len(labels)} examples have the score {labels[0]}: there is nothing to "
                    "learn; name another column with --label-column"
                )
            return
        if self.problem == ONE:
            several = next((e for e in examples if isinstance(e.fields["label"], list)), None)
            if several is not None:
                raise UserError(f"{several.where}: has a list of labels where one is expected")
            self.labels = label_names(labels, self.order)
            if len(self.labels) < 2:
                raise UserError(
                    f"all {len(labels)} examples have the label {self.labels[0]!r}: there is "
                    "nothing to learn; name another column with --label-column"
                )
            if len(self.labels) > max(100, len(labels) // 2):
                raise UserError(
                    f"{len(self.labels)} different labels in {len(labels)} examples: name another "
                    "column with --label-column, or give --problem-type regression for numbers"
                )
        else:
            named = (name for label in labels for name in _listed(label))
            self.labels = label_names(named, self.order)
            if len({frozenset(_listed(label)) for label in labels}) < 2:
                raise UserError(
                    f"all {len(labels)} examples have the labels {', '.join(self.labels) or 'none'}"
                    ": there is nothing to learn; name another column with --label-column"
                )
        if asked.class_weight == "balanced":
            counts = Counter(name for label in labels for name in _listed(label))
            total = sum(counts.values())
            self.weight_of = {
                name: total / (len(self.labels) * counts[name]) for name in self.labels
            }

    def _check_scores(self, examples: Sequence[Example]) -> None:
        for one in examples:
            if _number(one.fields["label"]) is None:
                raise UserError(f"{one.where}: label {one.fields['label']!r} must be a number")

    def check(self, examples: Sequence[Example]) -> None:
        if self.problem == SCORE:
            self._check_scores(examples)
            return
        known = set(self.labels)
        for one in examples:
            if self.problem == ONE and isinstance(one.fields["label"], list):
                raise UserError(f"{one.where}: has a list of labels where one is expected")
            for name in _listed(one.fields["label"]):
                if name not in known:
                    raise unknown_label(name, one.where, self.labels)

    def meet(self, examples: Sequence[Example]) -> None:
        named = (name for one in examples for name in _listed(one.fields["label"]))
        given = list(self.order) or label_names(named)
        known = set(self.labels)
        if self.problem != SCORE and unnamed(self.labels) and not known.issuperset(given):
            numbers = [str(number) for number in range(len(self.labels))]
            if set(given) <= set(numbers):  # some may be missing
                given = numbers
            if len(given) != len(self.labels):
                raise UserError(
                    f"the model has {len(self.labels)} labels, none with a name of its own, and "
                    f"the data {len(given)}: {', '.join(given[:20])}"
                )
            self.labels = given  # in the order that whoever numbered them most likely used
        self.check(examples)

    @property
    def changes(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: number for number, name in enumerate(self.labels)},
            "problem_type": self.problem,
        }

    @property
    def description(self) -> dict[str, Any]:
        separator = {"label_separator": self.separator} if self.separator else {}
        return super().description | {"threshold": self.threshold} | separator

    def features(self, examples: Sequence[Example], labelled: bool) -> list[Feature]:
        if not examples:
            return []
        texts: list[Any] = [[one.fields["text"] for one in examples]]
        if "text_pair" in examples[0].fields:
            texts.append([one.fields["text_pair"] for one in examples])
        found, cut = cut_to(self.tokenizer, self.max_length, *texts)
        self.cut += cut
        return [
            Feature(row, [as_inputs(found, row)], self._target(one) if labelled else None)
            for row, one in enumerate(examples)
        ]

    def _target(self, one: Example) -> Any:
        label = one.fields["label"]
        if self.problem == SCORE:
            return float(label)
        if self.problem == ONE:
            return self.labels.index(label)
        names = set(_listed(label))
        return [float(name in names) for name in self.labels]

    def label_tensor(self, features: Sequence[Feature], longest: int) -> Tensor:
        dtype = torch.long if self.problem == ONE else torch.float32
        return torch.tensor([one.label for one in features], dtype=dtype)

    def outputs(self, model: nn.Module, batch: dict[str, Any], unpad: bool) -> Tensor:
        logits: Tensor = model(**model_inputs(batch)).logits  # (B, K)
        return logits.float()

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"]
        weights = self.weights(outputs.device)
        if self.problem == SCORE:
            return F.mse_loss(outputs[:, 0], labels, reduction="sum")
        if self.problem == ONE:
            return F.cross_entropy(
                outputs, labels, weights, reduction="sum", label_smoothing=self.smoothing
            )
        smooth = labels * (1.0 - self.smoothing) + 0.5 * self.smoothing
        return F.binary_cross_entropy_with_logits(
            outputs, smooth, pos_weight=weights, reduction="none"
        ).mean(1).sum()  # fmt: skip

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        weights = self.weights(batch["labels"].device)
        if self.problem == ONE and weights is not None:
            return weights[batch["labels"]].sum()
        return super().items(batch)

    def distributions(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        if self.problem == ONE:
            return outputs
        return torch.stack((outputs, torch.zeros_like(outputs)), dim=-1).flatten(0, 1)

    def raw(self, outputs: Tensor, batch: dict[str, Any]) -> list[np.ndarray]:
        if self.problem == ONE:
            outputs = outputs.softmax(1)
        elif self.problem == SEVERAL:
            outputs = outputs.sigmoid()
        return list(outputs.cpu().numpy())

    def predictions(
        self, examples: Sequence[Example], features: Sequence[Feature], raws: Sequence[np.ndarray]
    ) -> list[Prediction]:
        return [self._prediction(raw) for raw in raws]

    def _prediction(self, raw: np.ndarray) -> Prediction:
        if self.problem == SCORE:
            return {"score": float(raw[0])}
        chances = dict(zip(self.labels, map(float, raw), strict=True))
        if self.problem == ONE:
            best = self.labels[int(raw.argmax())]
            return {"label": best, "score": chances[best], "probabilities": chances}
        return {
            "labels": [name for name, chance in chances.items() if chance >= self.threshold],
            "probabilities": chances,
        }

    @property
    def kind(self) -> str:
        return {ONE: "classify", SEVERAL: "classify several", SCORE: "classify score"}[self.problem]

    def evaluate(
        self,
        examples: Sequence[Example],
        features: Sequence[Feature],
        raws: Sequence[np.ndarray],
        predictions: Sequence[Prediction],
    ) -> Evaluation:
        targets, found = [self._target(one) for one in examples], np.stack(raws)
        if self.problem == SCORE:
            return metrics.scores(targets, found[:, 0])
        if self.problem == ONE:
            return metrics.classification(targets, found, self.labels)
        return metrics.multi_label(np.array(targets), found, self.labels, self.threshold)

    def mistake(self, example: Example, prediction: Prediction) -> dict[str, Any] | None:
        label = example.fields["label"]
        if self.problem == SCORE:
            wanted: Prediction = {"score": float(label)}
            badness = abs(prediction["score"] - wanted["score"])
        elif self.problem == ONE:
            wanted = {"label": label}
            badness = prediction["score"] if prediction["label"] != label else 0.0
        else:
            names = set(_listed(label))
            wanted = {"labels": [name for name in self.labels if name in names]}
            right = wanted["labels"] == prediction["labels"]
            chances = prediction["probabilities"].items()
            badness = 0 if right else max(abs(chance - (name in names)) for name, chance in chances)
        if not badness:
            return None
        shown = self.shown(example)
        return {**shown, "expected": wanted, "predicted": prediction, "badness": badness}


def _label(value: Any, separator: str, where: str) -> str | list[str]:
    """A label's name, or several; an empty list says that none applies."""
    value = decoded(value, where)
    if isinstance(value, list):
        return [_name(one, where) for one in value]
    if separator and isinstance(value, str):
        return [part.strip() for part in value.split(separator) if part.strip()]
    return _name(value, where)


def _name(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    number = value if isinstance(value, float) else None
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,15}\.0+\s*", value):
        number = float(value)  # as tables write whole numbers where one is missing
    if number is not None and number.is_integer():
        return str(int(number))
    name = str(value).strip()
    if isinstance(value, dict | list | bytes) or value is None or not name:
        raise UserError(f"{where}: label {show(value)} must be text or a number")
    if number is not None and not np.isfinite(number):
        raise UserError(f"{where}: label {name} must be a finite number")
    return name


def _listed(label: str | list[str]) -> list[str]:
    return label if isinstance(label, list) else [label]


def _number(label: Any) -> float | None:
    try:
        value = float(label)
    except (TypeError, ValueError):
        return None
    return value if np.isfinite(value) else None


def _problem(labels: Sequence[str | list[str]]) -> str:
    if any(isinstance(label, list) for label in labels):
        return SEVERAL
    numbers = [_number(label) for label in labels]
    whole = [number is None or number == round(number) for number in numbers]
    return ONE if None in numbers or all(whole) else SCORE


def _markers(examples: Sequence[Example], asked: str) -> list[str]:
    """Marks of entities that become tokens of their own: those named, or found in most examples."""
    if asked not in ("auto", "none", ""):
        named = [mark.strip() for mark in asked.split(",") if mark.strip()]
        for mark in named:
            if not any(mark in one.fields["text"] for one in examples):
                raise UserError(f"entity_markers: {mark!r} stands in no text")
        return named
    found = [set(_MARKER.findall(one.fields["text"])) for one in examples]
    marked = [marks for marks in found if len(marks) >= 4]
    if asked != "auto" or 2 * len(marked) <= len(examples):
        return []
    return sorted(set().union(*marked))
