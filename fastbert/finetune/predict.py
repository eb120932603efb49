"""What a trained model says of any number of rows: `fastbert.pipeline`, `fastbert predict`.

Rows are taken a window at a time and sorted by length there; answers come in the order of the rows.
A row that cannot be read is answered by {"error": "..."}, so that each keeps its place.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
import torch

from fastbert.errors import FastbertError, RunError, UserError, did_you_mean
from fastbert.finetune.columns import Columns
from fastbert.finetune.infer import infer
from fastbert.finetune.inputs import Row
from fastbert.finetune.metrics import Evaluation
from fastbert.finetune.report import Report, write_report
from fastbert.finetune.tasks import TASKS
from fastbert.finetune.tasks.base import Example, Feature, Prediction
from fastbert.finetune.tasks.classify import ONE, SCORE, SEVERAL, Classify
from fastbert.finetune.tasks.embed import Embed
from fastbert.hf.accelerate import accelerate
from fastbert.hf.encode import DTYPES, TOKENS_PER_BATCH
from fastbert.hf.load import (
    load_head,
    load_model,
    load_tokenizer,
    longest_sequence,
    saved_head,
    sentence_layout,
)
from fastbert.hf.save import DESCRIPTION
from fastbert.hf.stack import freeze
from fastbert.hf.weights import local_folder
from fastbert.settings import show
from fastbert.train.device import choose_device, choose_dtype, is_out_of_memory

logger = logging.getLogger("fastbert")

WINDOW = 4096
"""Rows that are sorted together."""
MOST_CHARACTERS = 2**21
"""Of a window's rows: half a million tokens, which take some 150 MB with their offsets."""

_ROLES = {
    "classify": ("text", "text_pair"),
    "tag": ("text", "tokens"),
    "answer": ("question", "context"),
    "choose": ("context", "question", "choices"),
    "embed": ("text",),
}
_LONGEST = {"answer": 384}  # where a folder says nothing
READ_IN_WINDOWS = ("tag", "answer")
"""Tasks that read a long text to its end; the others cut it."""


def pipeline(
    task: str | None = None,
    model: str | os.PathLike[str] = "",
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_seq_length: int | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
) -> "Pipeline":
    """Loads a trained model, accelerated, to be called with texts; see `Pipeline`.

    Args:
        task: "classify", "tag", "answer", "choose" or "embed"; None: what the folder is for.
        model: a folder of a run of `fastbert finetune`, of a checkpoint of Hugging Face with the
            head of a task, or of sentence-transformers.
        device: "cpu", "cuda", "cuda:N"; None: the GPU if there is one.
        dtype: "fp32", "bf16", "fp16" or torch's; None: fp32 on a CPU, bf16 on a GPU that has it.
        max_seq_length: tokens of a sequence; None: what the model was trained with.
        threshold: probability from which one of several labels is given; None: the folder's.
        top_k: of "classify": so many of the probabilities, the largest first; None: all.

    Raises:
        UserError: no such folder, a model for another task, or a setting out of bounds.
    """
    if not os.path.isdir(model):
        raise UserError(f"model = {show(os.fspath(model))}: no such folder")
    where = os.fspath(model)
    saved, config = saved_head(where)
    name = _task_of(where, task, saved, config)
    if name != "embed" and TASKS[name].head != saved:
        kind = f"for {_FOR[saved]}" if saved in _FOR else "without the head of a task"
        raise UserError(f"task = {name!r}: {where} holds a model {kind}")
    made = make_task(name, where, config, load_tokenizer(where), max_seq_length)
    several = isinstance(made, Classify) and made.problem == SEVERAL
    if threshold is not None:
        if not several:
            raise UserError(f"threshold = {threshold:g}: {where} gives no several labels")
        if not 0 < threshold < 1:
            raise UserError(f"threshold = {threshold:g} must be more than 0 and less than 1")
        made.threshold = threshold
    if top_k is not None and (name != "classify" or top_k < 1):
        raise UserError(f"top_k = {top_k}: must be at least 1, and the task classify")
    place = choose_device(device or "auto")
    network = load_head(where, made.head) if made.head else load_model(where)
    try:
        accelerate(network)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    # Weights stay fp32, as they did when it was trained and evaluated: of 200 texts, logits in bf16
    # were 0.00023 from those in fp32, and 0.00038 with the weights cast, which took 8% less time.
    network, computed = network.to(place, torch.float32), compute_dtype(dtype, place)
    freeze(network, computed)
    return Pipeline(made, network, computed, top_k)


_FOR = {
    **{task.head: name for name, task in TASKS.items() if task.head},
    "MaskedLM": "masked words",
}


def described(where: str, config: Any) -> dict[str, Any]:
    """What the folder says of its task, and its labels, by the names that tasks know."""
    told = getattr(config, DESCRIPTION, None) or {}
    if not isinstance(told, dict):
        raise UserError(f"{where}: config.json: {DESCRIPTION} = {show(told)} must be an object")
    found = dict(told)
    found["labels"] = [str(config.id2label[number]) for number in sorted(config.id2label)]
    default = SCORE if len(found["labels"]) == 1 else ONE
    found["problem_type"] = getattr(config, "problem_type", None) or default
    return found


def _check_labels(where: str, task: Any) -> None:
    if isinstance(task, Classify) and task.problem == SCORE and len(task.labels) > 1:
        raise UserError(
            f"{where}: gives {len(task.labels)} scores (problem_type = 'regression'), not one"
        )
    twice = [name for name, count in Counter(task.labels).items() if count > 1]
    if task.name in ("classify", "tag") and twice:
        raise UserError(f"{where}: config.json: several labels are named {show(twice[0])}")


def make_task(
    name: str, where: str, config: Any, tokenizer: Any, max_seq_length: int | None
) -> Any:
    """A task as a folder describes it.

    Args:
        name: of the task.
        where: the folder.
        config: of its model.
        tokenizer: of the folder.
        max_seq_length: see `pipeline`.

    Raises:
        UserError: a slow tokenizer, a length out of bounds, or a description that is damaged.
    """
    description = described(where, config)
    if name == "embed":
        description = sentence_layout(where) | description
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{where}: {type(tokenizer).__name__} is no fast tokenizer")
    limit = longest_sequence(where, tokenizer)
    least = tokenizer.num_special_tokens_to_add(pair=True) + 4
    if max_seq_length is not None and not least <= max_seq_length <= limit:
        raise UserError(f"max_seq_length = {max_seq_length}: must be from {least} to {limit}")
    try:
        told = int(description.get("max_seq_length") or _LONGEST.get(name, limit))
        if told < least:
            raise ValueError(f"max_seq_length = {told}")
        made = TASKS[name](tokenizer, max_seq_length or min(told, limit), description)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: config.json: {DESCRIPTION} is damaged: {error}") from None
    _check_labels(where, made)
    return made


def _task_of(where: str, asked: str | None, saved: str, config: Any) -> str:
    if asked is not None:
        if asked not in TASKS:
            meant = did_you_mean(asked, TASKS)
            raise UserError(f"task = {show(asked)}: must be one of {', '.join(TASKS)}{meant}")
        return asked
    told = described(where, config).get("task")
    if told in TASKS:
        return str(told)
    if saved in _FOR and saved != "MaskedLM":
        return _FOR[saved]
    is_bare = (config.architectures or [""])[0].endswith("Model")
    if is_bare or (local_folder(where) / "modules.json").exists():
        return "embed"
    raise UserError(
        f"{where}: a pre-trained model without a task: fine-tune it first (fastbert finetune), or "
        "ask for its vectors (--task embed, task='embed')"
    )


def compute_dtype(asked: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """What a model computes in on a device, see `pipeline`.

    Raises:
        UserError: none of these, or one that the device has not.
    """
    if isinstance(asked, torch.dtype):
        asked = next((name for name, dtype in DTYPES.items() if dtype == asked), str(asked))
    if asked not in (None, "auto", *DTYPES):
        raise UserError(f"dtype = {show(asked)}: must be one of auto, {', '.join(DTYPES)}")
    if asked == "fp16" and device.type == "cpu":
        raise UserError("precision = 'fp16' needs a GPU: use bf16 or fp32")
    if asked in (None, "auto") and device.type == "cpu":
        return torch.float32
    return choose_dtype(asked or "auto", device)[0]


class Pipeline:
    """A model that is called with texts: `pipe("text")` is one answer, `pipe(["a", "b"])` a list.

    An iterator is answered by an iterator, a window of `WINDOW` at a time. What an input is:

    - classify: a text, or a pair: ("a", "b") or {"text": "a", "text_pair": "b"};
    - tag: a text, or its words: a tuple, inside a list also a list;
    - answer: {"question": ..., "context": ...} or pipe(question=..., context=...);
    - choose: {"question": ..., "context": ..., "choices": [...]}, one of the first two at least;
    - embed: a text.

    All of a call are of the kind of the first. Answers are those of `fastbert predict`; offsets
    count characters (Python's: code points) of the text that was given. An input that cannot be
    read, such as an empty text, is answered by {"error": "..."} within a list, and alone raises
    `UserError`. Several threads may call at once.

    Attributes:
        task: what reads inputs and outputs; `task.name`, `task.labels`.
        model: with its head, in fp32; on a CPU its layers' weights are kept packed as well.
        dtype: that it computes in.
    """

    def __init__(
        self,
        task: Any,
        model: Any,
        dtype: torch.dtype = torch.float32,
        top_k: int | None = None,
    ) -> None:
        self.task, self.model, self.dtype, self.top_k = task, model, dtype, top_k
        self.device = next(model.parameters()).device
        self.tokens = TOKENS_PER_BATCH.get(self.device.type, 16384)
        """Of a batch; fewer once memory was short."""
        self._tokenizing = Lock()  # a tokenizer's truncation is part of its state

    def __call__(self, inputs: Any = None, /, **fields: Any) -> Any:
        """Answers one input, a list of them, or an iterator.

        Raises:
            UserError: it is none of these, or the only one cannot be read.
            RunError: an output is not finite, or memory lacks even for one text.
        """
        if (inputs is None) == (not fields):
            raise UserError("give inputs, or the fields of one by name")
        one = fields or inputs
        if isinstance(one, str | tuple | Mapping):
            (answer,) = self._many([one])
            if "error" in answer:
                raise UserError(answer["error"].removeprefix("inputs[0]: "))
            return answer
        if not isinstance(one, Iterable) or isinstance(one, bytes | bytearray):
            raise UserError(f"inputs = {show(one)}: must be a text, or several")
        answers = self._many(one)
        return list(answers) if isinstance(one, Sized) else answers

    def _many(self, inputs: Iterable[Any]) -> Iterator[Prediction]:
        columns: Columns | None = None

        def rows() -> Iterator[Row]:
            nonlocal columns
            for place, one in enumerate(inputs):
                values = self._values(one, f"inputs[{place}]")
                if columns is None:
                    columns = self._columns(values)
                beyond = [name for name in values if name not in (*columns.of, *columns.choices)]
                if beyond:
                    raise UserError(
                        f"inputs[{place}]: has {beyond[0]}, which the first input lacks: those of "
                        "a call are of one kind"
                    )
                yield Row(values, f"inputs[{place}]")

        before = self.task.cut
        for window in _windows(rows()):
            assert columns is not None
            for row, answer in self.answers(window, columns):
                yield {"id": row.values["id"], **answer} if "id" in row.values else answer
        cut = self.task.cut - before
        if cut and self.task.name not in READ_IN_WINDOWS:
            logger.warning("%d texts were cut to %d tokens", cut, self.task.max_length)

    def examples(self, inputs: Sequence[Any]) -> list[Example]:
        """Inputs as the task reads them, each of any kind: the first step of an answer.

        Raises:
            UserError: the first that cannot be read.
        """
        found = []
        for place, one in enumerate(inputs):
            values = self._values(one, f"inputs[{place}]")
            found.append(self._example(Row(values, f"inputs[{place}]"), self._columns(values)))
        return found

    def _values(self, one: Any, where: str) -> dict[str, Any]:
        roles = _ROLES[self.task.name]
        if isinstance(one, Mapping):
            unknown = [str(name) for name in one if name not in (*roles, "id")]
            if unknown:
                meant = did_you_mean(unknown[0], roles) or f": it takes {', '.join(roles)}"
                raise UserError(f"{where}: {self.task.name} has no {show(unknown[0])}{meant}")
            if self.task.name == "tag" and one.keys() >= {*roles}:
                raise UserError(f"{where}: has both text and tokens: give one of them")
            return {name: value for name, value in one.items() if value is not None}
        if self.task.name == "tag" and isinstance(one, tuple | list):
            return {"tokens": list(one)}
        if isinstance(one, tuple):
            if len(one) != len(roles):
                raise UserError(f"{where}: a tuple must hold {' and '.join(roles)}")
            return dict(zip(roles, one, strict=True))
        return {roles[0]: one}

    def _columns(self, first: Mapping[str, Any]) -> Columns:
        name, among = self.task.name, tuple(first)
        roles = [role for role in _ROLES[name] if role in first]
        if name == "answer":
            roles = ["question", "context"]
        elif not {*roles} - {"choices"}:  # so that it is missed
            roles = ["question" if name == "choose" else "text"]
        of = {role: role for role in roles if role != "choices"}
        if "id" in first:
            of["id"] = "id"
        return Columns(name, of, ("choices",) if name == "choose" else (), among)

    def windows(
        self, rows: Iterator[Row], columns: Columns, progress: Any = None
    ) -> Iterator[list[tuple[Row, Prediction]]]:
        """Rows with their answers, in order, as many at once as are sorted together.

        Args:
            rows: any number.
            columns: of the task.
            progress: a bar that is moved by rows.

        Raises:
            FastbertError: what reading rows raises, once those before it are answered; see
                `__call__`.
        """
        for window in _windows(rows):
            yield self.answers(window, columns, progress)

    def answers(
        self, rows: Sequence[Row], columns: Columns, progress: Any = None
    ) -> list[tuple[Row, Prediction]]:
        """As `windows`, of one window."""
        found: list[Prediction] = [{} for _ in rows]
        examples, places = [], []
        for place, row in enumerate(rows):
            try:
                examples.append(self._example(row, columns))
                places.append(place)
            except UserError as error:
                found[place] = {"error": str(error)}
        kept, features, errors = self._features(examples)
        for number, why in errors.items():
            found[places[number]] = {"error": why}
        readable = [examples[number] for number in kept]
        bar = _Rows(progress, len(kept), len(features))
        raws = self._finite(readable, features, bar)
        with_tags = "tokens" in columns
        made = self.task.predictions(readable, features, raws)
        for number, prediction in zip(kept, made, strict=True):
            found[places[number]] = told(prediction, with_tags, self.top_k)
        bar.end(len(rows))
        return list(zip(rows, found, strict=True))

    def _example(self, row: Row, columns: Columns) -> Example:
        reason = columns.missing(row)
        if reason is not None:
            raise UserError(f"{row.where}: a row {reason}")
        example: Example = self.task.example(row, columns, False)
        for value in example.fields.values():
            if not _is_unicode(value):
                raise UserError(f"{row.where}: holds half of a surrogate pair, no character")
        return example

    def _features(
        self, examples: Sequence[Example]
    ) -> tuple[list[int], list[Feature], dict[int, str]]:
        """Sequences of examples, which examples those are, and why others have none."""
        with self._tokenizing:
            try:
                return list(range(len(examples))), self.task.features(examples, False), {}
            except UserError:  # of one of them
                kept: list[int] = []
                features: list[Feature] = []
                errors = {}
                for number, one in enumerate(examples):
                    try:
                        of_one = self.task.features([one], False)
                    except UserError as error:
                        errors[number] = str(error)
                    else:
                        features += [replace(feature, example=len(kept)) for feature in of_one]
                        kept.append(number)
                return kept, features, errors

    def _finite(
        self, examples: Sequence[Example], features: Sequence[Feature], progress: "_Rows"
    ) -> list[np.ndarray]:
        raws = self._infer(features, progress)
        for feature, raw in zip(features, raws, strict=True):
            if not np.isfinite(raw).all():
                raise RunError(
                    f"{examples[feature.example].where}: the model's outputs are not finite: its "
                    "weights are broken, or it needs --precision fp32"
                )
        return raws

    def _infer(self, features: Sequence[Feature], progress: "_Rows") -> list[np.ndarray]:
        """The longest come first: if memory lacks, it lacks at once, and little is done twice."""
        while True:
            tokens = self.tokens
            try:
                return infer(
                    self.task, self.model, features, self.dtype, progress=progress, tokens=tokens
                )[0]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                longest = max(feature.length for feature in features)
                if tokens <= longest:
                    raise RunError(
                        f"out of memory with a single text of {longest} tokens: give a lower "
                        "--max-seq-length"
                    ) from None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.tokens == TOKENS_PER_BATCH.get(self.device.type, 16384):
                logger.warning("out of memory: going on with fewer than %d tokens at once", tokens)
            self.tokens = tokens // 2
            progress = progress.again()

    def evaluate(
        self,
        rows: Sequence[Row],
        columns: Columns,
        folder: str | os.PathLike[str],
        *,
        title: str,
        settings: Mapping[str, Any],
        notes: Sequence[str] = (),
        progress: Any = None,
    ) -> Evaluation:
        """Compares with the labels of rows, and writes the report's page.

        Args:
            rows: that `fastbert.finetune.columns.usable` has let through.
            columns: labels among them.
            folder: of the report.
            title, settings, notes: see `Report`.
            progress: a bar that is moved by rows.

        Raises:
            UserError: an unknown label, or more labels than the model has.
        """
        from fastbert.finetune.loop import worst_mistakes

        task = self.task
        examples, predictions, found = self.judge(rows, columns, progress)
        mistakes = worst_mistakes(task, examples, predictions)
        write_report(
            folder,
            Report(title, task.kind, settings, found, mistakes=mistakes, notes=list(notes)),
        )
        return found

    def judge(
        self, rows: Sequence[Row], columns: Columns, progress: Any = None
    ) -> tuple[list[Example], list[Prediction], Evaluation]:
        """As `evaluate`, without a page.

        Returns:
            The rows as the task reads them, what is said of each, and what that is worth.
        """
        task = self.task
        examples = [task.example(row, columns, True) for row in rows]
        task.meet(examples)
        # Only pairs need to be told that they are: a loss is not reported.
        features = task.features(examples, isinstance(task, Embed))
        raws = self._finite(examples, features, _Rows(progress, len(rows), len(features)))
        predictions = task.predictions(examples, features, raws)
        return examples, predictions, task.evaluate(examples, features, raws, predictions)


def told(prediction: Prediction, with_tags: bool, top_k: int | None) -> Prediction:
    """What is said of a task's prediction.

    Args:
        prediction: which is changed.
        with_tags: whether words were given: else the tags are of words that only we have seen.
        top_k: see `pipeline`.
    """
    if not with_tags:
        prediction.pop("tags", None)
    if top_k is not None and isinstance(prediction.get("probabilities"), dict):
        order = sorted(prediction["probabilities"].items(), key=lambda one: -one[1])
        prediction["probabilities"] = dict(order[:top_k])
    return prediction


def _is_unicode(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_unicode, value))
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
    return True


def _windows(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows that are sorted together; where reading fails, those before it come first."""
    window: list[Row] = []
    characters = 0
    try:
        for row in rows:
            window.append(row)
            characters += _size(row.values)
            if len(window) == WINDOW or characters >= MOST_CHARACTERS:
                yield window
                window, characters = [], 0
    except FastbertError:
        if window:
            yield window
        raise
    if window:
        yield window


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 1
    return 1 + sum(map(_size, value))


class _Rows:
    """Moves a bar of rows by what is done of their sequences."""

    def __init__(self, bar: Any, rows: int, features: int) -> None:
        self.bar, self.rows, self.features = bar, rows, max(features, 1)
        self.done = self.moved = 0

    def update(self, features: int) -> None:
        self.done += features
        self._move(self.done * self.rows // self.features)

    def end(self, rows: int) -> None:
        self._move(rows)

    def again(self) -> "_Rows":
        """Of the same rows from their beginning: the bar waits until it is passed."""
        self.done = 0
        return self

    def _move(self, to: int) -> None:
        if self.bar is not None and to > self.moved:
            self.bar.update(to - self.moved)
            self.moved = to
