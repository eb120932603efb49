"""What a task is: rows to examples, examples to sequences, a model's outputs to loss and answers.

B sequences padded to S, K labels, R rows of a distribution.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fastbert.errors import UserError
from fastbert.finetune.columns import Columns
from fastbert.finetune.inputs import Row
from fastbert.finetune.metrics import Evaluation
from fastbert.hf.together import packed_inputs

Prediction = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled or unlabelled record."""

    where: str
    fields: dict[str, Any]
    """What a task made of the row: text, label and so on."""


@dataclass(frozen=True, slots=True)
class Feature:
    """A sequence of tokens, or several that belong together, of one example."""

    example: int
    """Its place in the list of examples."""
    inputs: list[dict[str, list[int]]]
    """Of each sequence, by the names of a model's arguments; without padding."""
    label: Any = None
    extra: Any = None
    """What a task needs to read the outputs: offsets, words."""

    @property
    def length(self) -> int:
        """Tokens of all its sequences."""
        return sum(len(one["input_ids"]) for one in self.inputs)


class Task(ABC):
    """One kind of fine-tuning.

    Args:
        tokenizer: of transformers, fast.
        max_length: tokens of a sequence at most, special ones included.
        description: what a model's folder says of the task beside the weights; see `description`.
    """

    name: ClassVar[str]
    head: ClassVar[str]
    """Which of `fastbert.hf.load.HEADS`; "" for the encoder alone."""
    roles: ClassVar[tuple[str, ...]]
    """Fields of an example that are its input, as a report shows them."""

    def __init__(self, tokenizer: Any, max_length: int, description: Mapping[str, Any]) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.cut = 0
        """Examples that were longer than a sequence may be."""
        self.labels: list[str] = []
        self.order: Sequence[str] = ()
        """Of the labels, where the data has one."""
        self.weight_of: dict[str, float] = {}
        """Of each label in the loss; empty: all are 1."""
        self._weight: dict[Any, Tensor] = {}

    # Of data

    @abstractmethod
    def example(self, row: Row, columns: Columns, labelled: bool) -> Example:
        """Reads a row that `Columns.missing` has let through.

        Args:
            row: of the data.
            columns: what is what.
            labelled: whether it has a label.

        Raises:
            UserError: it is broken.
        """

    def classes(self, examples: Sequence[Example], asked: Any) -> list[Sequence[str]]:
        """Of each labelled example what a split should share out evenly; nothing by default.

        Args:
            examples: any.
            asked: the task's settings.
        """
        return [()] * len(examples)

    def learn(self, examples: Sequence[Example], asked: Any) -> None:  # noqa: B027  nothing to learn
        """Decides from training examples what there is to decide: labels, kind of problem.

        Args:
            examples: for training.
            asked: the task's settings.

        Raises:
            UserError: nothing can be learnt from them: one class only, for instance.
        """

    def check(self, examples: Sequence[Example]) -> None:  # noqa: B027  nor to check
        """Checks that examples are of what was learnt.

        Raises:
            UserError: one has an unknown label.
        """

    def meet(self, examples: Sequence[Example]) -> None:
        """Takes from labelled examples what a trained model's folder does not tell; checks them.

        Raises:
            UserError: as `check`.
        """
        self.check(examples)

    @abstractmethod
    def features(self, examples: Sequence[Example], labelled: bool) -> list[Feature]:
        """Tokenizes examples, which are all there is in `Feature.example`; counts in `cut`."""

    # Of a model

    def weights(self, device: torch.device) -> Tensor | None:
        """`weight_of` in the order of `labels`, (K,); made once for a device."""
        if not self.weight_of:
            return None
        key = device, *self.labels  # a head that goes on with its training brings another order
        if key not in self._weight:
            found = [self.weight_of[name] for name in self.labels]
            with torch.inference_mode(False):  # an evaluation may ask first, and then a backward
                self._weight[key] = torch.tensor(found, device=device)
        return self._weight[key]

    @property
    def changes(self) -> dict[str, Any]:
        """Of a model's configuration: labels and the like."""
        return {}

    @property
    def description(self) -> dict[str, Any]:
        """What is saved in a model's config.json beside what transformers keeps there."""
        return {"task": self.name, "max_seq_length": self.max_length}

    def batch(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """Padded inputs by argument's name, (B, S); `labels` beside them where there are any."""
        sequences = [one for feature in features for one in feature.inputs]
        longest = max(len(one["input_ids"]) for one in sequences)
        fill = {"input_ids": self.tokenizer.pad_token_id or 0}
        found = {}
        for name in sequences[0]:
            padded = np.full((len(sequences), longest), fill.get(name, 0), dtype=np.int64)
            for row, one in enumerate(sequences):
                padded[row, : len(one[name])] = one[name]
            found[name] = torch.from_numpy(padded)
        if features[0].label is not None:
            found["labels"] = self.label_tensor(features, longest)
        return found

    def packed(self, model: nn.Module, features: Sequence[Feature]) -> dict[str, Any] | None:
        """Sequences end to end, on the model's device; None: it needs them padded.

        What `outputs` and `raw` read as they read a `batch` without labels.
        """
        return packed_inputs(model, [one for feature in features for one in feature.inputs])

    @abstractmethod
    def label_tensor(self, features: Sequence[Feature], longest: int) -> Tensor:
        """What `loss` reads."""

    @abstractmethod
    def outputs(self, model: nn.Module, batch: dict[str, Any], unpad: bool) -> Tensor:
        """What a model says of a batch: logits, or vectors.

        Args:
            model: with the task's head.
            batch: on the model's device.
            unpad: whether padding may be left out where that changes a loss.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The sum over what `items` counts."""

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """By what the loss of an optimizer step is divided: examples, or labelled tokens."""
        return torch.tensor(float(len(batch["labels"])))

    @abstractmethod
    def distributions(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Logits (R, K) whose softmax R-Drop compares; `learn` has refused a task of scores."""

    @abstractmethod
    def raw(self, outputs: Tensor, batch: dict[str, Any]) -> list[np.ndarray]:
        """What is kept of each feature, float32."""

    # Of answers

    @abstractmethod
    def predictions(
        self, examples: Sequence[Example], features: Sequence[Feature], raws: Sequence[np.ndarray]
    ) -> list[Prediction]:
        """One for each example."""

    @property
    def kind(self) -> str:
        """Which of `metrics.METRICS` its evaluation has."""
        return self.name

    @abstractmethod
    def evaluate(
        self,
        examples: Sequence[Example],
        features: Sequence[Feature],
        raws: Sequence[np.ndarray],
        predictions: Sequence[Prediction],
    ) -> Evaluation:
        """Compares with the labels."""

    @abstractmethod
    def mistake(self, example: Example, prediction: Prediction) -> dict[str, Any] | None:
        """What a report shows of a wrong prediction, with its `badness`; None of a right one."""

    def shown(self, example: Example) -> dict[str, Any]:
        """Where an example stands, and its input."""
        inputs = {role: example.fields[role] for role in self.roles if example.fields.get(role)}
        return {"where": example.where, "input": inputs}


def label_names(examples: Iterable[str], order: Sequence[str] = ()) -> list[str]:
    """Names in the order given, else of their numbers if all are numbers, else of the alphabet."""
    names = set(examples)
    if order and names.issubset(order):
        return sorted(names, key=list(order).index)
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def cut_to(tokenizer: Any, max_length: int, *texts: Sequence[str]) -> tuple[Any, int]:
    """What a tokenizer makes of texts or pairs, and how many it had to cut."""
    given = texts
    if len(texts) == 1:  # of a pair, which of the two is cut depends on the length of both
        given = ([_front(text, _MOST_OF_TOKEN * max_length) for text in texts[0]],)
    found = tokenizer(*given, truncation=True, max_length=max_length, verbose=False)
    is_cut = [bool(encoding.overflowing) for encoding in found.encodings]
    if any(a is not b and not cut for a, b, cut in zip(given[0], texts[0], is_cut, strict=True)):
        found = tokenizer(*texts, truncation=True, max_length=max_length, verbose=False)
        is_cut = [bool(encoding.overflowing) for encoding in found.encodings]
    return found, sum(is_cut)


def _front(text: str, characters: int) -> str:
    """A text without what no sequence will hold: 10 MB of it take 3 GB as tokens."""
    space = _SPACE.search(text, characters)
    return text[: space.start()] if space else text


_MOST_OF_TOKEN = 16
"""Characters: three times those of a token on average; where that is too few, all are read."""
_SPACE = re.compile(r"\s")


def as_inputs(found: Any, row: int) -> dict[str, list[int]]:
    """A sequence by the names of a model's arguments."""
    names = ("input_ids", "token_type_ids", "attention_mask")
    return {name: found[name][row] for name in names if name in found}


_INPUTS = ("input_ids", "token_type_ids", "attention_mask", "position_ids", "fastbert_plan")


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch without what only a task reads."""
    return {name: batch[name] for name in _INPUTS if name in batch}


def tokens_of(batch: dict[str, Any]) -> list[tuple[int, slice]]:
    """In which row of the outputs each sequence lies, and its tokens there."""
    if "fastbert_plan" in batch:
        bounds = batch["fastbert_plan"].cu_seqlens.tolist()
        return [(0, slice(begin, end)) for begin, end in pairwise(bounds)]
    lengths = batch["attention_mask"].sum(1).tolist()
    return [(row, slice(0, length)) for row, length in enumerate(lengths)]


def unnamed(labels: Sequence[str]) -> bool:
    """Whether a model's labels have the names that transformers gives them."""
    return all(name == f"LABEL_{number}" for number, name in enumerate(labels))


def unknown_label(name: str, where: str, known: Sequence[str]) -> UserError:
    """What is said of a label that training never saw."""
    shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
    return UserError(f"{where}: label {name[:80]!r} is none of training's: {shown}")
