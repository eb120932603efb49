"""What one line brings to a Trainer script: `fastbert bench dropin`.

transformers' own model (SDPA) and a copy after `fastbert.accelerate`, each inside transformers'
Trainer: AdamW (fused), clipping at 1.0, dropout as the model's config says. Both are in one
process, in turn, round by round; a round is a Trainer of its own on the same model, and counts the
median of its steps but the first. A step's time is that between Trainer's on_step_begin and
on_step_end: the batch is made, and its way to the GPU done, before it. Batches are padded to their
longest sequence and no further, as DataCollatorWithPadding does. The allocator is as PyTorch's
users have it. Before anything is timed, losses and hidden states must agree with dropout off.

With `--shapes` also bare calls without Trainer at small and large shapes, and the worst of them,
of a classifier: its head is small, and so hides nothing.

B sequences, S longest sequence, T real tokens of a batch.
"""

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fastbert.config import ModelConfig, model_config, to_hf_dict
from fastbert.errors import RunError, UserError
from fastbert.hf.accelerate import accelerate
from fastbert.train.device import check_weights, choose_device, choose_dtype
from fastbert_bench.config import DropinBenchConfig
from fastbert_bench.measure import result as results
from fastbert_bench.measure.lengths import lengths_asked
from fastbert_bench.measure.result import Row
from fastbert_bench.measure.timing import figures, in_turn, synchronize, timed
from fastbert_bench.suites.contenders import ACCELERATED, PaddedBatch, autocast, make_batches
from fastbert_bench.suites.convergence import training_arguments, why_no_trainer

THEIRS = "hf-sdpa"
TASKS = {
    "mlm": ("masked words", "BertForMaskedLM"),
    "classification": ("classification", "BertForSequenceClassification"),
}
TOLERANCE = 1e-4  # of a loss or a hidden state, in fp32
IN_TRAINER, BARE = (2.0, 3, 20), (0.2, 1, 50)
"""Of a round: seconds, the fewest steps, the most."""
SHAPES = ((1, 8, "full"), (4, 16, "full"), (8, 64, "full"), (16, 128, "full"), (16, 128, "natural"))

Models = dict[str, Any]
"""Contender -> its model; ours, which ratios are relative to, first."""


def pair(task: str, sizes: ModelConfig, seed: int, device: torch.device) -> Models:
    """Both contenders with the same random weights."""
    import transformers

    name = TASKS[task][1]
    config = transformers.BertConfig(**to_hf_dict(sizes, name))
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    theirs = getattr(transformers, name)(config).to(device)
    return {ACCELERATED: accelerate(copy.deepcopy(theirs)), THEIRS: theirs}


def batches_of(
    task: str, lengths: np.ndarray, vocab_size: int, rng: np.random.Generator
) -> list[PaddedBatch]:
    """Random batches of such sequences, (B,), padded to the longest, with the task's labels."""
    batches, _ = make_batches(lengths, int(lengths.max()), vocab_size, rng)
    for batch in batches:
        kinds = batch.pop("next_sentence_label")
        if task == "classification":
            batch["labels"] = kinds
    return batches


@torch.no_grad()
def check_same(task: str, models: Models, batch: PaddedBatch, device: torch.device) -> None:
    """Refuses to compare models that do not compute the same.

    Raises:
        RunError: with dropout off and in fp32, their losses or the hidden states of real tokens
            differ by more than rounding does.
    """
    there = {key: value.to(device) for key, value in batch.items()}
    inputs = {key: value for key, value in there.items() if key != "labels"}
    answers = [
        (model.eval()(**there).loss, model.bert(**inputs)[0][inputs["attention_mask"] != 0])
        for model in models.values()
    ]
    for what, mine, theirs in zip(("losses", "hidden states"), *answers, strict=True):
        difference = float((mine - theirs).abs().max())
        if not difference <= TOLERANCE:
            raise RunError(
                f"not comparable: in {TASKS[task][0]}, the {what} of {ACCELERATED} and {THEIRS} "
                f"differ by {difference:.2g} (same weights and batch; rounding leaves less than "
                f"{TOLERANCE:g})"
            )


def train(
    model: Any, batches: Sequence[PaddedBatch], device: torch.device, bf16: bool, steps: int
) -> float:
    """Trains by a new Trainer; returns the median seconds of `steps` steps after a first."""
    from torch.utils.data import DataLoader
    from transformers import PrinterCallback, Trainer, TrainerCallback

    count = steps + 1  # the first makes the moments, and finds the caches of another
    begun, seconds = [], []

    class Given(Trainer):
        def get_train_dataloader(self) -> Any:
            given: Any = [batches[index % len(batches)] for index in range(count)]
            return DataLoader(given, batch_size=None)

    class Timing(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            synchronize(device)
            begun.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronize(device)
            seconds.append(time.perf_counter() - begun[-1])

    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as folder:
        arguments = training_arguments(
            folder, device, bf16, max_steps=count, max_grad_norm=1.0, optim="adamw_torch_fused"
        )
        trainer = Given(model, arguments, callbacks=[Timing()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
        vars(model).pop(name, None)  # wrapped for bf16: the next Trainer finds it as this one did
    return float(np.median(seconds[1:]))


def in_rounds(
    calls: Mapping[str, Callable[[int], float]], rounds: int, budget: tuple[float, int, int]
) -> dict[str, list[float]]:
    """Seconds of a step for each contender and round, after a call of each that is not counted.

    Args:
        calls: contender -> runs so many steps; gives the seconds of one.
        rounds: how many.
        budget: seconds that a round should take, the fewest steps in it, the most.
    """
    seconds, fewest, most = budget
    counts = {
        name: max(fewest, min(most, round(seconds / call(2)))) for name, call in calls.items()
    }
    found = {name: list[float]() for name in calls}
    for _, name in in_turn(list(calls), rounds):
        found[name].append(calls[name](counts[name]))
    return found


def rows_of(
    what: str, seconds: Mapping[str, Sequence[float]], lengths: np.ndarray, **more: Any
) -> list[Row]:
    """One row a contender; the ratio is the median of the rounds' own."""
    best = np.array(seconds[ACCELERATED])
    return [
        {
            "name": f"{what}, {name}",
            "contender": name,
            "compared_with": ACCELERATED,
            **more,
            **figures(found, int(lengths.sum()), len(lengths), None),
            "ratio": float(np.median(np.array(found) / best)),
        }
        for name, found in seconds.items()
    ]


def bare(model: Any, batch: PaddedBatch, dtype: torch.dtype, trains: bool, steps: int) -> float:
    """Seconds of a forward, in training of a forward and its backward; mean of `steps`."""
    device = batch["input_ids"].device
    model.train(trains)

    def call(index: int) -> None:
        with torch.set_grad_enabled(trains), autocast(device, dtype):
            loss = model(**batch).loss
        if trains:
            loss.backward()
            model.zero_grad(set_to_none=True)

    timed(call, (0,), device)  # settles caches after the one before
    return timed(call, range(steps), device)


def shapes(
    config: DropinBenchConfig, sizes: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[list[Row], list[dict[str, str]]]:
    """Rows of bare calls, last the one with the least ratio once more, and what is missing."""
    models = pair("classification", sizes, config.seed, device)
    rng = np.random.default_rng(config.seed)
    rows: list[Row] = []
    missing: list[dict[str, str]] = []
    for B, S, kind in SHAPES:
        shape = f"{B} x {S} {kind}"
        if sizes.max_position_embeddings < S:
            why = f"the model has {sizes.max_position_embeddings} positions"
            missing.append({"name": shape, "why": why})
            continue
        lengths = lengths_asked(kind, B, S, rng)
        batch = batches_of("classification", lengths, sizes.vocab_size, rng)[0]
        batch = {key: value.to(device) for key, value in batch.items()}
        for mode in ("evaluation", "training"):
            trains = mode == "training"
            calls = {name: partial(bare, models[name], batch, dtype, trains) for name in models}
            seconds = in_rounds(calls, config.rounds, BARE)
            rows += rows_of(
                f"{shape}, {mode}", seconds, lengths, task="shapes", sizes={"N": B, "S": S},
                direction="both" if trains else "forward",
            )  # fmt: skip
    theirs = [row for row in rows if row["contender"] == THEIRS]
    worst = min(theirs, key=lambda row: row["ratio"])
    return [*rows, {**worst, "name": f"worst shape: {worst['name']}"}], missing


def table(result: dict[str, Any]) -> str:
    """The rows as text, one line each, and a line for each that is missing."""
    remarks = f"{ACCELERATED} is", lambda row: f"{row['ratio']:.2f}x as fast"
    return results.table(result, "a step", {}, remarks)


def run(config: DropinBenchConfig) -> dict[str, Any]:
    """Measures as `config` says and returns the result."""
    device, sizes = choose_device(config.device), model_config(config.model)
    if why_not := why_no_trainer(device):
        raise UserError(why_not)
    # Twice the weights, and what one of both trains with.
    check_weights(config.model, sizes, device, 20)
    dtype, _ = choose_dtype(config.precision, device)
    if dtype == torch.float16:
        raise UserError("precision = 'auto' is fp16 on this GPU, which has no bf16: use fp32")
    rng = np.random.default_rng(config.seed)
    lengths = lengths_asked(config.lengths, config.batch_size, config.max_seq_length, rng)
    rows: list[Row] = []
    missing = [{"name": "MFU, memory, energy", "why": "of a step they are in bench step"}]
    for task in config.tasks():
        models = pair(task, sizes, config.seed, device)
        batches = batches_of(task, lengths, sizes.vocab_size, rng)
        check_same(task, models, batches[0], device)
        bf16 = dtype == torch.bfloat16
        calls = {name: partial(train, models[name], batches, device, bf16) for name in models}
        seconds = in_rounds(calls, config.rounds, IN_TRAINER)
        rows += rows_of(TASKS[task][0], seconds, lengths, task=TASKS[task][0])
        del models, calls  # before the next pair is made
    if config.shapes:
        more, gaps = shapes(config, sizes, device, dtype)
        rows, missing = rows + more, missing + gaps
    return results.make(
        "dropin", dataclasses.asdict(config), device, rows, missing,
        dtype=str(dtype).removeprefix("torch."),
        real_tokens=int(lengths.sum()),
        padded_tokens=int(lengths.max()) * len(lengths),
        lengths=lengths.tolist(),
        model=dataclasses.asdict(sizes),
    )  # fmt: skip


def asked(config: DropinBenchConfig, result: dict[str, Any]) -> str:
    """The settings that matter, in words."""
    share = result["real_tokens"] / result["padded_tokens"]
    return (
        f"{config.model} in Trainer, {config.batch_size} sequences of at most "
        f"{config.max_seq_length}, {result['real_tokens']} real tokens ({share:.0%} of the padded)"
    )
