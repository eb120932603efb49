"""A tag for each word of a text: entities, parts of speech.

A word's tag is that of its first piece (Devlin et al. 2019). A text longer than a sequence is read
in windows that overlap; a word is read where it has most text around it.

B windows padded to S, K tags.
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
from fastbert.finetune import metrics, tags
from fastbert.finetune.columns import Columns
from fastbert.finetune.inputs import Row
from fastbert.finetune.metrics import Evaluation
from fastbert.finetune.tasks.base import (
    Example,
    Feature,
    Prediction,
    Task,
    as_inputs,
    label_names,
    model_inputs,
    tokens_of,
    unknown_label,
)
from fastbert.finetune.values import read_tagged

_NONE = -100
_OF_SPAN = re.compile("[BIESLU]-.")


class Tag(Task):
    """Token classification, as transformers' heads do it."""

    name = "tag"
    head = "TokenClassification"
    roles = ("text",)

    def __init__(self, tokenizer: Any, max_length: int, description: Mapping[str, Any]) -> None:
        super().__init__(tokenizer, max_length, description)
        self.labels = list(description.get("labels") or [])
        self.stride = int(description.get("doc_stride", 64))
        tokenizer.truncation_side = "right"  # windows are counted from there, and hold all
        self.smoothing = 0.0
        self.scheme = ""

    def example(self, row: Row, columns: Columns, labelled: bool) -> Example:
        found = read_tagged(row, columns)
        made: dict[str, Any] = {
            "text": found.text,
            "tokens": [found.text[begin:end] for begin, end in found.words],
            "spans": found.words,
        }
        if labelled:
            if found.tags is None:
                raise UserError(f"{row.where}: has neither tags nor entities")
            made["tags"], made["lines"] = found.tags, found.lines
        return Example(row.where, made)

    def classes(self, examples: Sequence[Example], asked: Any) -> list[Sequence[str]]:
        return [tags.kinds(one.fields["tags"]) for one in examples]

    def _settle(self, examples: Sequence[Example]) -> None:
        """Checks the scheme of the tags, and makes them IOB2."""
        scheme = self.scheme or tags.scheme_of(one.fields["tags"] for one in examples)
        for one in examples:
            given = one.fields["tags"]
            tags.check(given, scheme, one.where, one.fields["lines"])
            one.fields["tags"] = tags.to_iob2(given, scheme)

    def learn(self, examples: Sequence[Example], asked: Any) -> None:
        self.smoothing, self.stride = asked.label_smoothing_factor, asked.doc_stride
        self.scheme = tags.scheme_of(one.fields["tags"] for one in examples)
        self._settle(examples)
        given = {tag for one in examples for tag in one.fields["tags"]}
        self.labels = label_names(given, self.order)
        if self.order and given.issubset(self.order):
            self.labels = list(self.order)
        elif self.is_entities:
            # An inside tag that training lacks may be needed: B-x in, I-x out. "O" is number 0.
            types = sorted({tag[2:] for tag in given if tag != "O"})
            self.labels = ["O", *(f"{kind}-{name}" for name in types for kind in "BI")]
        if len(given) < 2:
            raise UserError(
                f"all words have the tag {min(given)!r}: there is nothing to learn; name "
                "another column with --tags-column"
            )
        if asked.class_weight == "balanced":
            counts = Counter(tag for one in examples for tag in one.fields["tags"])
            total, seen = sum(counts.values()), len(counts)
            self.weight_of = {
                tag: total / (seen * counts[tag]) if counts[tag] else 1.0 for tag in self.labels
            }

    @property
    def is_entities(self) -> bool:
        """Whether tags are those of spans: B-x, I-x, O, and of others' models E-x, S-x and such."""
        return all(tag == "O" or _OF_SPAN.match(tag) for tag in self.labels)

    def check(self, examples: Sequence[Example]) -> None:
        self._settle(examples)
        known = set(map(self._type, self.labels))
        for one in examples:
            for place, tag in enumerate(one.fields["tags"]):
                if self._type(tag) not in known:
                    lines = one.fields["lines"]
                    file = one.where.rpartition(":")[0]
                    where = f"{file}:{lines[place]}" if lines else one.where
                    raise unknown_label(tag, where, self.labels)

    def _type(self, tag: str) -> str:
        return tag[2:] if self.is_entities and _OF_SPAN.match(tag) else tag

    @property
    def changes(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: number for number, name in enumerate(self.labels)},
        }

    @property
    def description(self) -> dict[str, Any]:
        return super().description | {"doc_stride": self.stride}

    def features(self, examples: Sequence[Example], labelled: bool) -> list[Feature]:
        if not examples:
            return []
        special = self.tokenizer.num_special_tokens_to_add()
        stride = min(self.stride, (self.max_length - special) // 2)
        found = self.tokenizer(
            self._words(examples),
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
            stride=stride,
            return_overflowing_tokens=True,
            verbose=False,
        )
        numbers = {tag: number for number, tag in enumerate(self.labels)}
        of_row = found["overflow_to_sample_mapping"]
        self.cut += sum(count > 1 for count in Counter(of_row).values())
        made: list[Feature] = []
        # A window may begin amid a word, whose first piece then lies in the one before: of each
        # word which of its text's pieces it begins with, and with which piece a text's next window.
        firsts: dict[tuple[int, int], int] = {}
        starts: Counter[int] = Counter()
        for row, example in enumerate(of_row):
            read: list[int | None] = []
            piece = starts[example]
            for word in found.word_ids(row):
                is_first = word is not None and firsts.setdefault((example, word), piece) == piece
                read.append(word if is_first else None)
                piece += word is not None
            starts[example] = piece - stride
            label = None
            if labelled:
                given = examples[example].fields["tags"]
                label = [_NONE if word is None else numbers[given[word]] for word in read]
            made.append(Feature(example, [as_inputs(found, row)], label, read))
        return made

    def _words(self, examples: Sequence[Example]) -> list[list[str]]:
        """Their words, with the space before them where a tokenizer tells words by it."""
        first, second = self.tokenizer(
            [["a", "a"], ["a", " a"]], is_split_into_words=True, verbose=False
        )["input_ids"]
        if first == second:
            return [one.fields["tokens"] for one in examples]
        found = []
        for one in examples:
            text, spans = one.fields["text"], one.fields["spans"]
            spaces = ["" if b and not text[b - 1].isspace() else " " for b, _ in spans]
            words = zip(spaces, one.fields["tokens"], strict=True)
            found.append([space + word for space, word in words])
        return found

    def label_tensor(self, features: Sequence[Feature], longest: int) -> Tensor:
        labels = torch.full((len(features), longest), _NONE)
        for row, one in enumerate(features):
            labels[row, : len(one.label)] = torch.tensor(one.label)
        return labels

    def outputs(self, model: nn.Module, batch: dict[str, Any], unpad: bool) -> Tensor:
        logits: Tensor = model(**model_inputs(batch)).logits  # (B, S, K), or (1, T, K)
        return logits.float()

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        weights = self.weights(outputs.device)
        return F.cross_entropy(
            outputs.flatten(0, 1), batch["labels"].flatten(), weights, reduction="sum",
            label_smoothing=self.smoothing,
        )  # fmt: skip

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"][batch["labels"] != _NONE]
        weights = self.weights(labels.device)
        if weights is not None:
            return weights[labels].sum()
        return torch.tensor(float(len(labels)))

    def distributions(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return outputs[batch["labels"] != _NONE]

    def raw(self, outputs: Tensor, batch: dict[str, Any]) -> list[np.ndarray]:
        chances = outputs.softmax(-1).cpu().numpy()
        return [chances[row, tokens] for row, tokens in tokens_of(batch)]

    def _of_words(
        self, examples: Sequence[Example], features: Sequence[Feature], raws: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """(words, K) of each example: from the window where a word has most around it.

        A word that no window holds, because it is of no piece, is surely "O", or the first tag.
        """
        made, none = [], self.labels.index("O") if "O" in self.labels else 0
        for one in examples:
            chances = np.zeros((len(one.fields["tokens"]), len(self.labels)), np.float32)
            chances[:, none] = 1.0
            made.append(chances)
        around: dict[tuple[int, int], int] = {}
        for feature, raw in zip(features, raws, strict=True):
            for place, word in enumerate(feature.extra):
                if word is None:
                    continue
                margin = min(place, len(feature.extra) - place)
                if margin > around.get((feature.example, word), -1):
                    around[feature.example, word] = margin
                    made[feature.example][word] = raw[place]
        return made

    def predictions(
        self, examples: Sequence[Example], features: Sequence[Feature], raws: Sequence[np.ndarray]
    ) -> list[Prediction]:
        found = []
        for one, chances in zip(examples, self._of_words(examples, features, raws), strict=True):
            given = [self.labels[number] for number in chances.argmax(1)]
            if self.is_entities and any(tag[0] in "ESLU" for tag in given):
                given = tags.to_iob2(given, tags.IOBES)
            found.append({"entities": self._entities(one, given, chances.max(1)), "tags": given})
        return found

    def _entities(
        self, one: Example, given: Sequence[str], chances: np.ndarray | None = None
    ) -> list[dict[str, Any]]:
        text, spans = one.fields["text"], one.fields["spans"]
        pieces = tags.spans(given)
        if not self.is_entities:
            pieces = [(tag, place, place + 1) for place, tag in enumerate(given)]
        found = []
        for kind, first, behind in pieces:
            begin, end = spans[first][0], spans[behind - 1][1]
            entity = {"type": kind, "text": text[begin:end], "start": begin, "end": end}
            if chances is not None:
                entity["score"] = float(chances[first:behind].mean())
            found.append(entity)
        return found

    @property
    def kind(self) -> str:
        return "tag" if self.is_entities else "tag tokens"

    def evaluate(
        self,
        examples: Sequence[Example],
        features: Sequence[Feature],
        raws: Sequence[np.ndarray],
        predictions: Sequence[Prediction],
    ) -> Evaluation:
        wanted = [one.fields["tags"] for one in examples]
        given = [one["tags"] for one in predictions]
        sure = [chances.max(1) for chances in self._of_words(examples, features, raws)]
        if self.is_entities:
            types = sorted({tag[2:] for tag in self.labels if tag != "O"})
            return metrics.entities(wanted, given, types, sure)
        return metrics.token_labels(wanted, given, self.labels, sure)

    def mistake(self, example: Example, prediction: Prediction) -> dict[str, Any] | None:
        wanted, given = example.fields["tags"], prediction["tags"]
        wrong = sum(a != b for a, b in zip(wanted, given, strict=True))
        if not wrong:
            return None
        expected, predicted = ({"entities": self._entities(example, x)} for x in (wanted, given))
        shown = self.shown(example)
        return {**shown, "expected": expected, "predicted": predicted, "badness": float(wrong)}
