"""The span of a paragraph that answers a question, or that there is none (Rajpurkar et al. 2016).

A paragraph longer than a sequence is read in windows that overlap by `doc_stride` pieces; an answer
that a window lacks is its first token (Rajpurkar et al. 2018).

B windows padded to S.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.errors import UserError
from fastbert.finetune import metrics, squad
from fastbert.finetune.columns import Columns
from fastbert.finetune.inputs import Row
from fastbert.finetune.metrics import Evaluation
from fastbert.finetune.tasks.base import (
    Example,
    Feature,
    Prediction,
    Task,
    as_inputs,
    model_inputs,
    tokens_of,
)
from fastbert.finetune.values import read_answers

_NO_ANSWER = 0.5
"""Probability from which a question counts as one without an answer."""


class Answer(Task):
    """Question answering, as transformers' heads do it."""

    name = "answer"
    head = "QuestionAnswering"
    roles = ("question", "context")

    def __init__(self, tokenizer: Any, max_length: int, description: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, max_length, description)
        self.stride = int(description.get("doc_stride", 128))
        self.longest = int(description.get("max_answer_length", 30))
        self.n_best = int(description.get("n_best", 20))
        self.unanswerable = bool(description.get("unanswerable", False))
        """Whether some questions of training had no answer: only then is that a prediction."""

    def example(self, row: Row, columns: Columns, labelled: bool) -> Example:
        made: dict[str, Any] = {role: columns.value(row, role) for role in self.roles}
        made["id"] = columns.value(row, "id")
        if labelled:
            made["answers"] = read_answers(row, columns)
        return Example(row.where, made)

    def classes(self, examples: Sequence[Example], asked: Any) -> list[Sequence[str]]:
        return [["answer" if one.fields["answers"] else "no answer"] for one in examples]

    def learn(self, examples: Sequence[Example], asked: Any) -> None:
        self.stride, self.n_best = asked.doc_stride, asked.n_best
        self.longest = asked.max_answer_length
        without = sum(not one.fields["answers"] for one in examples)
        if without == len(examples):
            raise UserError(f"none of the {without} questions has an answer")
        self.unanswerable = without > 0

    @property
    def changes(self) -> dict[str, Any]:
        return {"num_labels": 2}  # starts and ends, however many classes a checkpoint was for

    @property
    def description(self) -> dict[str, Any]:
        return super().description | {
            "doc_stride": self.stride,
            "max_answer_length": self.longest,
            "n_best": self.n_best,
            "unanswerable": self.unanswerable,
        }

    def features(self, examples: Sequence[Example], labelled: bool) -> list[Feature]:
        if not examples:
            return []
        questions = [one.fields["question"].lstrip() for one in examples]
        rooms = self._rooms(examples, questions)
        of_stride: dict[int, list[int]] = {}
        for place, room in enumerate(rooms):  # a window must go on by more than it shares
            of_stride.setdefault(min(self.stride, room // 2), []).append(place)
        made = []
        for stride, places in of_stride.items():
            found = self.tokenizer(
                [questions[place] for place in places],
                [examples[place].fields["context"] for place in places],
                truncation="only_second",
                max_length=self.max_length,
                stride=stride,
                return_overflowing_tokens=True,
                verbose=False,
            )
            of_row = found["overflow_to_sample_mapping"]
            self.cut += sum(count > 1 for count in Counter(of_row).values())
            for row, (place, encoding) in enumerate(zip(of_row, found.encodings, strict=True)):
                example = places[place]
                spans = [
                    span if part == 1 else None
                    for span, part in zip(encoding.offsets, encoding.sequence_ids, strict=True)
                ]
                label = _target(examples[example], spans) if labelled else None
                made.append(Feature(example, [as_inputs(found, row)], label, spans))
        return sorted(made, key=lambda one: one.example)

    def _rooms(self, examples: Sequence[Example], questions: list[str]) -> list[int]:
        """Pieces of a paragraph beside each question, of which it must leave a quarter."""
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        tokens = self.tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
        for one, ids in zip(examples, tokens, strict=True):
            if len(ids) + special > self.max_length * 3 // 4:
                raise UserError(
                    f"{one.where}: the question has {len(ids)} pieces of the {self.max_length} of "
                    "a sequence, which leaves too few for the paragraph"
                )
        return [self.max_length - special - len(ids) for ids in tokens]

    def label_tensor(self, features: Sequence[Feature], longest: int) -> Tensor:  # (B, 2)
        return torch.tensor([one.label for one in features])

    def outputs(self, model: nn.Module, batch: dict[str, Any], unpad: bool) -> Tensor:
        options = {"fastbert_unpadded": True} if unpad else {}
        found = model(**model_inputs(batch), **options)
        return torch.stack((found.start_logits, found.end_logits), dim=1).float()  # (B, 2, S|T)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        each = F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        return each / 2

    def distributions(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs.flatten(0, 1)

    def raw(self, outputs: Tensor, batch: dict[str, Any]) -> list[np.ndarray]:
        logits = outputs.cpu().numpy()
        return [logits[row, :, tokens] for row, tokens in tokens_of(batch)]

    def predictions(
        self, examples: Sequence[Example], features: Sequence[Feature], raws: Sequence[np.ndarray]
    ) -> list[Prediction]:
        return [
            one | {"answer": "", "start": 0, "end": 0, "score": one["no_answer"]}
            if one["no_answer"] > _NO_ANSWER
            else one
            for one in self._spans_of(examples, features, raws)
        ]

    def _spans_of(
        self, examples: Sequence[Example], features: Sequence[Feature], raws: Sequence[np.ndarray]
    ) -> list[Prediction]:
        candidates: list[list[tuple[float, int, int]]] = [[] for _ in examples]
        nulls = [float("inf")] * len(examples)
        for feature, (start, end) in zip(features, raws, strict=True):
            nulls[feature.example] = min(nulls[feature.example], float(start[0] + end[0]))
            candidates[feature.example] += self._spans(feature.extra, start, end)
        return [
            self._prediction(one, found, null)
            for one, found, null in zip(examples, candidates, nulls, strict=True)
        ]

    def _spans(
        self, spans: Sequence[tuple[int, int] | None], start: np.ndarray, end: np.ndarray
    ) -> list[tuple[float, int, int]]:
        """The best spans of a window: sum of logits, first and last character."""
        inside = np.array([span is not None for span in spans])
        starts, ends = (_best(np.where(inside, x, -np.inf), self.n_best) for x in (start, end))
        found = []
        for first in starts:
            for last in ends:
                begin, stop = spans[first], spans[last]
                if begin and stop and first <= last < first + self.longest and begin[0] < stop[1]:
                    found.append((float(start[first] + end[last]), begin[0], stop[1]))
        return sorted(found, reverse=True)[: self.n_best]

    def _prediction(
        self, one: Example, candidates: list[tuple[float, int, int]], null: float
    ) -> Prediction:
        """The best span, whatever is likelier: that there is none is for `predictions` to say."""
        seen: dict[tuple[int, int], float] = {}
        for score, begin, end in candidates:
            seen[begin, end] = max(score, seen.get((begin, end), score))
        best = sorted(((score, span) for span, score in seen.items()), reverse=True)[: self.n_best]
        if not best:
            return {"answer": "", "start": 0, "end": 0, "score": 0.0, "no_answer": 1.0}
        logits = np.array([score for score, _ in best])
        chances = np.exp(logits - logits[0])
        begin, end = best[0][1]
        begin, end = _stripped(one.fields["context"][begin:end], begin)
        # Of the two, not of all spans: more than a half is what SQuAD 2.0's rule calls no answer.
        no_answer = 1.0 / (1.0 + float(np.exp(np.clip(logits[0] - null, -80.0, 80.0))))
        return {
            "answer": one.fields["context"][begin:end],
            "start": begin,
            "end": end,
            "score": float(chances[0] / chances.sum()),
            "no_answer": no_answer if self.unanswerable else 0.0,
        }

    def evaluate(
        self,
        examples: Sequence[Example],
        features: Sequence[Feature],
        raws: Sequence[np.ndarray],
        predictions: Sequence[Prediction],
    ) -> Evaluation:
        best = self._spans_of(examples, features, raws)
        # By place: ids may be missing, or come twice.
        return metrics.answers(
            {str(i): [text for text, _ in e.fields["answers"]] for i, e in enumerate(examples)},
            {str(i): one["answer"] for i, one in enumerate(best)},
            {str(i): one["no_answer"] for i, one in enumerate(best)} if self.unanswerable else None,
            threshold=_NO_ANSWER,
        )

    def mistake(self, example: Example, prediction: Prediction) -> dict[str, Any] | None:
        texts = [text for text, _ in example.fields["answers"]]
        f1 = squad.score(prediction["answer"], texts, not texts).f1
        if f1 == 1.0:
            return None
        wanted = {"answer": "", "start": 0, "end": 0}
        if texts:
            text, start = example.fields["answers"][0]
            wanted = {"answer": text, "start": start, "end": start + len(text)}
        badness = (1.0 - f1) * prediction["score"]
        shown = self.shown(example)
        return {**shown, "expected": wanted, "predicted": prediction, "badness": badness}


def _stripped(text: str, begin: int) -> tuple[int, int]:
    """Where a text that begins there does without the space around it: few pieces hold space."""
    begin += len(text) - len(text.lstrip())
    return begin, begin + len(text.strip())


def _best(logits: np.ndarray, count: int) -> list[int]:
    return [int(place) for place in np.argsort(-logits, kind="stable")[:count]]


def _target(one: Example, spans: Sequence[tuple[int, int] | None]) -> list[int]:
    """First and last token of the first answer; the first token of all where it is not whole."""
    if not one.fields["answers"]:
        return [0, 0]
    text, begin = one.fields["answers"][0]
    begin, end = _stripped(text, begin)
    inside = [
        place for place, span in enumerate(spans) if span and span[0] < end and span[1] > begin
    ]
    context = [span for span in spans if span]
    if not inside or not context or context[0][0] > begin or context[-1][1] < end:
        return [0, 0]
    return [inside[0], inside[-1]]
