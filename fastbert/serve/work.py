"""What a service does for a request: inputs to sequences, sequences to outputs, outputs to answers.

The first and the last step are one request's own; the one between, which needs the model, takes
sequences of any requests at once, end to end.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from fastbert.errors import RunError, UserError
from fastbert.finetune.infer import autocast, infer_batch
from fastbert.finetune.predict import READ_IN_WINDOWS, Pipeline, told
from fastbert.finetune.tasks.base import Feature
from fastbert.hf.fill_mask import Guesses, MaskFiller

_MOST_GUESSES = 50_000
"""Of a request: 3 MB of JSON, for which a second is taken; 1 MB of masks could ask for 9 GB."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be computed.

    Attributes:
        sequences: each with its `length` in tokens; outputs are given in their order.
        truncated: how many of its texts were cut.
        context: what `Work.finish` needs beside the outputs.
    """

    sequences: Sequence[Any]
    truncated: int = 0
    context: Any = None

    @property
    def tokens(self) -> int:
        """Of all its sequences."""
        return sum(one.length for one in self.sequences)


class Work(ABC):
    """One thing that a model can be asked for. Each step is called by one thread at a time."""

    name: ClassVar[str]

    @abstractmethod
    def prepare(self, inputs: Sequence[Any], options: Mapping[str, Any]) -> Prepared:
        """Tokenizes the inputs of a request.

        Raises:
            UserError: one cannot be read, or is longer than allowed.
        """

    @abstractmethod
    def compute(self, sequences: Sequence[Any]) -> list[Any]:
        """What the model says of each sequence.

        Raises:
            RunError: an output is not finite.
        """

    @abstractmethod
    def finish(self, prepared: Prepared, outputs: Sequence[Any]) -> list[Any]:
        """The answer to each input."""


class Predict(Work):
    """The task that a model was fine-tuned for.

    Args:
        pipe: of any task.
        truncate: whether a text that is too long is cut, rather than refused.
        max_text_tokens: that are read of a text which is read in windows; a text of the other tasks
            is one sequence.
    """

    name = "predict"

    def __init__(self, pipe: Pipeline, truncate: bool, max_text_tokens: int) -> None:
        self.pipe, self.truncate, self.max_text_tokens = pipe, truncate, max_text_tokens

    def prepare(self, inputs: Sequence[Any], options: Mapping[str, Any]) -> Prepared:
        task = self.pipe.task
        examples = self.pipe.examples(inputs)
        before = task.cut
        features = self._features(examples)
        cut = task.cut - before
        if task.name in READ_IN_WINDOWS:
            features, cut = self._first_windows(features)
        elif cut and not self.truncate:
            raise self._too_long(examples)
        of_words = [isinstance(one, Mapping) and "tokens" in one for one in inputs]
        return Prepared(features, cut, (examples, options, of_words))

    def _features(self, examples: Sequence[Any]) -> list[Feature]:
        """Of single texts and of pairs, which a tokenizer does not take together."""
        pairs = ["text_pair" in one.fields for one in examples]
        if len({*pairs}) < 2:
            return self.pipe.task.features(examples, False)
        found = []
        for kind in (False, True):
            places = [place for place, is_pair in enumerate(pairs) if is_pair == kind]
            of_kind = self.pipe.task.features([examples[place] for place in places], False)
            found += [replace(one, example=places[one.example]) for one in of_kind]
        return sorted(found, key=lambda one: one.example)

    def _too_long(self, examples: Sequence[Any]) -> UserError:
        task = self.pipe.task
        for example in examples:
            before = task.cut
            task.features([example], False)
            if task.cut > before:
                return _refused(example.where, task.max_length)
        raise AssertionError("none was cut")

    def _first_windows(self, features: Sequence[Feature]) -> tuple[list[Feature], int]:
        """Windows of each text until it has been read as far as allowed; texts with more."""
        kept, cut, read = [], set[int](), dict[int, int]()
        for feature in features:
            before = read.get(feature.example, 0)
            read[feature.example] = before + feature.length
            if before and read[feature.example] > self.max_text_tokens:
                if not self.truncate:
                    raise _refused(f"inputs[{feature.example}]", self.max_text_tokens)
                cut.add(feature.example)
            else:
                kept.append(feature)
        return kept, len(cut)

    def compute(self, sequences: Sequence[Any]) -> list[Any]:
        outputs, _ = infer_batch(self.pipe.task, self.pipe.model, sequences, self.pipe.dtype)
        if not all(np.isfinite(one).all() for one in outputs):
            raise _not_finite()
        return outputs

    def finish(self, prepared: Prepared, outputs: Sequence[Any]) -> list[Any]:
        examples, options, of_words = prepared.context
        found = self.pipe.task.predictions(examples, prepared.sequences, outputs)
        top_k = options.get("top_k")
        return [told(one, words, top_k) for one, words in zip(found, of_words, strict=True)]


class Embed(Predict):
    """A vector for each text, or for each list of tokens of the model's own."""

    name = "embed"

    def __init__(self, pipe: Pipeline, truncate: bool) -> None:
        super().__init__(pipe, truncate, 0)
        found = pipe.task.tokenizer("a", return_special_tokens_mask=True)
        special = found["special_tokens_mask"]
        first = special.index(0)
        last = len(special) - special[::-1].index(0)
        ids = found["input_ids"]
        self._around = ids[:first], ids[last:]
        self._has_types = "token_type_ids" in found

    def prepare(self, inputs: Sequence[Any], options: Mapping[str, Any]) -> Prepared:
        if isinstance(inputs[0], str):
            return super().prepare(inputs, options)
        longest = self.pipe.task.max_length - sum(map(len, self._around))
        cut, features = 0, []
        for number, tokens in enumerate(inputs):
            if len(tokens) > longest:
                if not self.truncate:
                    raise _refused(f"inputs[{number}]", self.pipe.task.max_length)
                cut += 1
            ids = [*self._around[0], *tokens[:longest], *self._around[1]]
            types = {"token_type_ids": [0] * len(ids)} if self._has_types else {}  # as texts have
            features.append(Feature(number, [{"input_ids": ids} | types]))
        return Prepared(features, cut, (None, options))

    def finish(self, prepared: Prepared, outputs: Sequence[Any]) -> list[Any]:
        """(H,) float32 of each."""
        vectors = [output[0] for output in outputs]
        asked = prepared.context[1].get("normalize")
        if self.pipe.task.normalize if asked is None else asked:
            return [one / max(float(np.linalg.norm(one)), 1e-12) for one in vectors]
        return vectors


@dataclass(frozen=True, slots=True)
class _Masked:
    tokens: list[int]
    top_k: int

    @property
    def length(self) -> int:
        return len(self.tokens)


class FillMask(Work):
    """What a model would say for each mask of a text."""

    name = "fill-mask"

    def __init__(self, fill: MaskFiller, dtype: torch.dtype) -> None:
        self.fill, self.dtype = fill, dtype

    def prepare(self, inputs: Sequence[Any], options: Mapping[str, Any]) -> Prepared:
        names = [f"inputs[{number}]" for number in range(len(inputs))]
        top_k = options.get("top_k") or 5
        tokens = self.fill.tokens(inputs, names)
        mask = self.fill.tokenizer.mask_token_id
        guesses = top_k * sum(one.count(mask) for one in tokens)
        if guesses > _MOST_GUESSES:
            raise UserError(
                f"inputs: {guesses:,} guesses are asked for (masks x top_k), more than "
                f"{_MOST_GUESSES:,}"
            )
        return Prepared([_Masked(one, top_k) for one in tokens])

    def compute(self, sequences: Sequence[Any]) -> list[Any]:
        top_k = max(one.top_k for one in sequences)
        with autocast(self.fill.device, self.dtype):
            found = self.fill.guesses([one.tokens for one in sequences], top_k)
        if not all(np.isfinite(chances).all() for text in found for _, chances in text):
            raise _not_finite()
        return found

    def finish(self, prepared: Prepared, outputs: Sequence[Sequence[Guesses]]) -> list[Any]:
        names = ("token_str", "token", "score")
        return [
            {
                "masks": [
                    [
                        dict(zip(names, guess, strict=True))
                        for guess in self.fill.words((ids[: one.top_k], chances[: one.top_k]))
                    ]
                    for ids, chances in text
                ]
            }
            for one, text in zip(prepared.sequences, outputs, strict=True)
        ]


def _refused(where: str, most: int) -> UserError:
    return UserError(f"{where}: has more than {most} tokens, which is what is read of a text")


def _not_finite() -> RunError:
    return RunError("the model's output is not finite: its weights are broken, or it needs fp32")
