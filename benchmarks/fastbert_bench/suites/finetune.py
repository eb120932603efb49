"""What fine-tuning brings and costs, beside transformers' Trainer: `fastbert bench finetune`.

On a CPU, in fp32. Three data sets of a folder: sentiment of sentences, entities among words,
answers to questions. Ours is the loop of `fastbert finetune`, with its metrics.jsonl and
TensorBoard; Trainer has SDPA and logs nothing; neither evaluates or saves on the way. Both begin
with the same weights, see the same examples in the same order, padded to the longest of a batch and
no further, and have the same settings: the defaults of `fastbert finetune`, but for the learning
rate of questions: F1 of 82 steps at 5e-5 is 8, of 123 at 3e-4 it is 38. What is timed is
the loop from its first batch to its last step: with the making of batches, without tokenization and
evaluation.

All are in one process, a whole training each in turn; a round is a seed, and every other round runs
backwards. `hf-trainer+malloc` is given our setting of the allocator; `hf-trainer` has it as
PyTorch's users do, and trains in the first round only where both are asked for: the allocator
changes nothing but time. Before anything is timed, the losses of the first steps must agree with
dropout off. For questions that holds without unpadding: Trainer's softmax gives padding a share,
that of our timed runs does not. All models are evaluated after their last step, by the same code.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.errors import RunError, UserError
from fastbert.finetune import loop, metrics
from fastbert.finetune.config import CONFIGS, FinetuneConfig
from fastbert.finetune.data import Data, read_data
from fastbert.finetune.infer import infer
from fastbert.finetune.metrics import Evaluation
from fastbert.finetune.tasks import TASKS
from fastbert.finetune.tasks.base import Feature, Task
from fastbert.finetune.yardsticks import YARDSTICKS
from fastbert.hf.load import (
    begin_head,
    dropout_changes,
    load_tokenizer,
    longest_sequence,
    saved_head,
)
from fastbert.train.device import keep_freed_memory
from fastbert_bench.config import FinetuneBenchConfig
from fastbert_bench.measure import result as results
from fastbert_bench.measure.result import Row
from fastbert_bench.measure.timing import figures, in_turn
from fastbert_bench.suites.convergence import training_arguments, why_no_trainer

OURS, CPU = "fastbert", torch.device("cpu")
TOLERANCE, CHECKED_STEPS = 1e-4, 20
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class DataSet:
    """The files of one, how it is learnt, and the metric that is told, in percent."""

    task: str
    ending: str
    epochs: float
    metric: str
    told_as: str
    learning_rate: float = 5e-5
    max_length: int | None = None
    percent: float = 100.0
    """What the metric is multiplied by."""


SETS = {
    "sentiment": DataSet("classify", "tsv", 3.0, "accuracy", "accuracy"),
    "entities": DataSet("tag", "conll", 3.0, "f1", "entity F1"),
    "questions": DataSet("answer", "json", 3.0, "f1", "F1", 3e-4, max_length=384, percent=1.0),
}


@dataclass
class Given:
    """A data set, read."""

    name: str
    asked: FinetuneConfig
    task: Task
    data: Data

    @property
    def of(self) -> DataSet:
        return SETS[self.name]


@dataclass
class Trained:
    """A model after its last step."""

    model: Any
    losses: list[float]
    seconds: float


def read(config: FinetuneBenchConfig, name: str) -> Given:
    """Reads a data set.

    Raises:
        UserError: there is none in the folder, or a file is broken; or the model is none.
    """
    one = SETS[name]
    files = [Path(config.data, f"{name}-{part}.{one.ending}") for part in ("train", "eval")]
    for file in files:
        if not file.is_file():
            raise UserError(f"data = {config.data!r}: holds no {file.name}")
    tokenizer = load_tokenizer(config.model)
    longest = longest_sequence(config.model, tokenizer)
    asked = CONFIGS[one.task](
        model=config.model, train=str(files[0]), eval=str(files[1]), device="cpu",
        seed=config.seed, num_train_epochs=one.epochs, learning_rate=one.learning_rate,
        max_steps=config.max_steps,
        max_seq_length=min(longest, one.max_length or longest),
    )  # fmt: skip
    assert asked.max_seq_length is not None
    task = TASKS[one.task](tokenizer, asked.max_seq_length, {})
    return Given(name, asked, task, read_data(asked, task, lambda line: None))


class _Ours(loop.Trainer):
    """The engine's loop, which neither evaluates nor saves."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.losses: list[float] = []

    def _one_step(self) -> float:
        self.losses.append(super()._one_step())
        return self.losses[-1]

    def _evaluate(self) -> bool:
        return False

    def _save(self) -> None:
        pass


def train_ours(given: Given, asked: FinetuneConfig, folder: Path) -> Trained:
    """Trains by the engine's loop."""
    keep_freed_memory()
    run = _Ours(asked, given.task, given.data, folder, CPU, torch.float32, False, lambda line: None)
    began = time.perf_counter()
    run.run(lambda: "")
    return Trained(run.model, run.losses, time.perf_counter() - began)


def train_theirs(given: Given, asked: FinetuneConfig, folder: Path, keeps_memory: bool) -> Trained:
    """Trains by transformers' Trainer, with its collators.

    Raises:
        RunError: the model has no SDPA.
    """
    from transformers import (
        DataCollatorForTokenClassification,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        TrainerCallback,
    )

    keep_freed_memory(keeps_memory)
    task, losses, times = given.task, list[torch.Tensor](), list[float]()
    torch.manual_seed(asked.seed)  # as their set_seed: it draws the head
    dropouts = {name: getattr(asked, name) for name in _DROPOUTS}
    changes = task.changes | dropout_changes(
        saved_head(asked.model)[1].model_type, task.head, **dropouts
    )
    model: Any = begin_head(asked.model, task.head, changes)[0]
    if model.config._attn_implementation != "sdpa":
        raise RunError(f"{asked.model}: transformers has no SDPA for it")
    features = task.features(given.data.train, True)
    examples: Any = [_example(task, one) for one in features]

    class Recorded(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    class Timing(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    arguments = training_arguments(
        str(folder), CPU, False,
        seed=asked.seed,
        num_train_epochs=asked.num_train_epochs,
        max_steps=asked.max_steps or -1,
        per_device_train_batch_size=asked.per_device_train_batch_size,
        optim="adamw_torch_fused",
        learning_rate=asked.learning_rate,
        lr_scheduler_type=asked.lr_scheduler_type,
        warmup_steps=asked.rising_steps(steps_of(asked, len(features))),
        weight_decay=asked.weight_decay,
        adam_beta1=asked.adam_beta1,
        adam_beta2=asked.adam_beta2,
        adam_epsilon=asked.adam_epsilon,
        max_grad_norm=asked.max_grad_norm,
    )  # fmt: skip
    of_words = task.head == "TokenClassification"
    collator = DataCollatorForTokenClassification if of_words else DataCollatorWithPadding
    trainer = Recorded(
        model, arguments, train_dataset=examples, data_collator=collator(task.tokenizer),
        callbacks=[Timing()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return Trained(model, [float(loss) for loss in losses], times[1] - times[0])


def steps_of(asked: FinetuneConfig, examples: int) -> int:
    """Optimizer steps of a training."""
    per_epoch = math.ceil(examples / asked.per_device_train_batch_size)
    return asked.max_steps or math.ceil(asked.num_train_epochs * per_epoch)


def _example(task: Task, one: Feature) -> dict[str, Any]:
    """A sequence by the names of the arguments of transformers' models, labels among them."""
    if task.head == "QuestionAnswering":
        start, end = one.label
        return {**one.inputs[0], "start_positions": start, "end_positions": end}
    return {**one.inputs[0], "labels": one.label}


CONTENDERS: dict[str, Callable[[Given, FinetuneConfig, Path], Trained]] = {
    OURS: train_ours,
    "hf-trainer": partial(train_theirs, keeps_memory=False),
    "hf-trainer+malloc": partial(train_theirs, keeps_memory=True),
}


def train(name: str, given: Given, asked: FinetuneConfig) -> Trained:
    """A training of a contender, whose files are not kept."""
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as folder:
        return CONTENDERS[name](given, asked, Path(folder))


def check_same(given: Given) -> dict[str, float]:
    """Refuses to compare loops that do not train the same.

    Returns:
        How many steps were compared, and the largest difference of a loss.

    Raises:
        RunError: with dropout off, losses differ by more than rounding does.
    """
    dropouts: dict[str, Any] = dict.fromkeys(_DROPOUTS, 0.0)
    asked = dataclasses.replace(
        given.asked,
        **dropouts,
        unpad=given.task.name != "answer",
        max_steps=min(CHECKED_STEPS, given.asked.max_steps or CHECKED_STEPS),
    )
    ours, theirs = (train(name, given, asked).losses for name in (OURS, "hf-trainer+malloc"))
    gaps = [abs(mine - other) for mine, other in zip(ours, theirs, strict=True)]
    difference = float(np.max(gaps))  # not a number, where one is not
    if not difference <= TOLERANCE:
        raise RunError(
            f"not comparable: on {given.name}, losses of {OURS} and hf-trainer differ by "
            f"{difference:.2g} in {len(gaps)} steps (same weights and batches, no dropout; "
            f"rounding leaves less than {TOLERANCE:g})"
        )
    return {"steps": len(gaps), "difference": difference}


def worth(given: Given, model: Any, features: Sequence[Feature], unpad: bool) -> Evaluation:
    """What a model says of the examples held out, compared with what is right."""
    raws, _ = infer(given.task, model.eval(), features, unpad=unpad)
    predictions = given.task.predictions(given.data.eval, features, raws)
    return given.task.evaluate(given.data.eval, features, raws, predictions)


def measure(given: Given, contenders: Sequence[str], seeds: int) -> list[Row]:
    """A row for each contender."""
    held_out = given.task.features(given.data.eval, True)
    seconds = {name: list[float]() for name in contenders}
    found = {name: list[Evaluation]() for name in contenders}
    for round, name in in_turn(contenders, seeds, given.name):
        if round and f"{name}+malloc" in contenders:
            continue  # it would only find the same models again
        asked = dataclasses.replace(given.asked, seed=given.asked.seed + round)
        trained = train(name, given, asked)
        seconds[name].append(trained.seconds)
        found[name].append(worth(given, trained.model, held_out, name == OURS))
    tokens, sequences = seen(given)
    ours = np.array(seconds[OURS])
    return [
        told(given, name, found[name])
        | figures(seconds[name], tokens, sequences, None)
        | {
            "compared_with": OURS,
            "ratio": float(np.median(np.array(seconds[name]) / ours[: len(seconds[name])])),
        }
        for name in contenders
    ]


def seen(given: Given) -> tuple[int, int]:
    """Real tokens and sequences of a training: of the first seed, where not all are seen."""
    features, asked = given.task.features(given.data.train, True), given.asked
    size = asked.per_device_train_batch_size
    per_epoch, steps = math.ceil(len(features) / size), steps_of(asked, len(features))
    places = [
        place
        for epoch in range(math.ceil(steps / per_epoch))
        for place in loop.epoch_order(len(features), asked.seed, epoch)[
            : size * (steps - epoch * per_epoch)
        ]
    ]
    return sum(features[place].length for place in places), len(places)


def told(given: Given, name: str, found: Sequence[Evaluation]) -> Row:
    """What a contender is worth, in percent."""
    one = given.of
    spread = metrics.mean_and_deviation(found)[one.metric]
    deviation = spread.deviation
    return {
        "name": f"{given.name}, {name}",
        "contender": name,
        "task": given.name,
        "metric": one.told_as,
        "metric_mean": one.percent * spread.mean,
        "metric_deviation": None if deviation is None else one.percent * deviation,
        "metric_of_rounds": [one.percent * value for value in spread.values],
    }


def run(config: FinetuneBenchConfig) -> dict[str, Any]:
    """Measures as `config` says and returns the result."""
    if why_not := why_no_trainer(CPU):
        raise UserError(why_not)
    sets = [read(config, name) for name in config.names()]
    same = {given.name: check_same(given) for given in sets}
    rows: list[Row] = []
    missing = [{"name": "MFU, memory, energy", "why": "of a step they are in bench step"}]
    for given in sets:
        rows += measure(given, [OURS, *config.rivals()], config.seeds)
        for name, found in YARDSTICKS[given.task.name](given.data):
            if isinstance(found, str):
                missing.append({"name": f"{given.name}, {name}", "why": found})
            else:
                rows.append(told(given, name, [found]))
    settings = dataclasses.asdict(config)
    # Where they lie is this machine's business.
    settings["model"] = config.name or Path(config.model).resolve().name
    settings["data"] = Path(config.data).resolve().name
    return results.make(
        "finetune", settings, CPU, rows, missing,
        dtype="float32", same_losses=same, rehearsal=config.max_steps > 0,
    )  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The rows as text, one line each, and a line for each that is missing."""
    remarks = f"{OURS} is", lambda row: f"{row['ratio']:.2f}x as fast" if "ratio" in row else ""
    return results.table(result, "a training", {"held out": results.metric}, remarks)


def asked(config: FinetuneBenchConfig, result: dict[str, Any]) -> str:
    """The settings that matter, in words."""
    same = ", ".join(
        f"{one['difference']:.1e} in {one['steps']} of {name}"
        for name, one in result["same_losses"].items()
    )
    only = f"; a rehearsal of {config.max_steps} steps" if result["rehearsal"] else ""
    return (
        f"{result['settings']['model']}, seeds {config.seed} to {config.seed + config.seeds - 1}, "
        f"losses agree within {same}{only}"
    )
