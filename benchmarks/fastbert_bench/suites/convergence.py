"""Loss over wall time, ours beside Hugging Face's: `fastbert bench convergence`.

Everybody trains from the same initial weights on the same batches, with the same dropout
probabilities, AdamW, clipping, schedule and precision: we packed, the rivals padded to the longest
sequence of each batch. `hf-trainer` is transformers' Trainer; it needs the package accelerate.
`hf-loop` is the same step as a plain loop, without Trainer's own work. Before training, the
held-out MLM losses must agree.

The clock stands still while batches are made and while models are evaluated; what compiling costs
counts. Runs follow one another, as Trainer's loop cannot be left and entered, so the ratio is that
of two times and not of pairs of rounds. The time of a step, with its quantiles, is that between two
readings of the clock. On a CPU everybody gets our setting of the allocator. Not yet run on a GPU.

N sequences, S longest sequence, T tokens of a batch.
"""

import dataclasses
import functools
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from fastbert.config import ModelConfig, PretrainConfig, model_config, resolved
from fastbert.data.batch import Batch
from fastbert.data.pack import Packer, evaluation_batches
from fastbert.data.tokenize import WordPiece
from fastbert.errors import RunError, UserError
from fastbert.progress import progress_bar
from fastbert.train.device import Execution, check_memory, choose_execution
from fastbert.train.evaluate import evaluate, unigram_log_probabilities
from fastbert.train.graph import launcher
from fastbert.train.prepare import prepare_data, say_of_warmup
from fastbert.train.schedule import learning_rate
from fastbert.train.step import TrainStep, compile_model
from fastbert_bench.config import CONVERGENCE_RIVAL_NAMES, ConvergenceBenchConfig
from fastbert_bench.measure import result as results
from fastbert_bench.measure.energy import EnergyMeter
from fastbert_bench.measure.flops import flops_per_token, mfu
from fastbert_bench.measure.processes import one_line
from fastbert_bench.measure.result import Row
from fastbert_bench.measure.timing import quantiles, synchronize
from fastbert_bench.suites import contenders as ways
from fastbert_bench.suites.contenders import PaddedBatch, padded, rivals_asked

# Of the held-out MLM loss before training, in nats.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.02}
LOGS_PER_EVALUATION = 5
CURVES = ("steps", "seconds", "losses", "eval_steps", "eval_seconds", "eval_losses")

Made = TypeVar("Made")


class Clock:
    """Seconds of training, and what it spends: stands still while `paused`.

    Attributes:
        seconds: so far.
        joules: of the GPU so far; None where no counter is read.
        peak_bytes: the most that this contender held on the GPU; None on a CPU.
    """

    def __init__(self, device: torch.device, held_before: int = 0) -> None:
        """Starts; `held_before` bytes on the GPU belong to others."""
        self._device, self._cuda, self._held_before = device, device.type == "cuda", held_before
        self._meter = EnergyMeter(device)
        self.reset()

    def reset(self) -> None:
        """Starts anew."""
        self.seconds = 0.0
        self.joules = None if self._meter.why_not else 0.0
        self.peak_bytes = 0 if self._cuda else None
        self._start()

    def _start(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._joules_since, self._since = self._meter.joules(), time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for the device first, so that what was begun is counted."""
        synchronize(self._device)
        self.seconds += time.perf_counter() - self._since
        if self.joules is not None:
            spent = self._meter.joules() - self._joules_since
            self.joules = None if self._meter.why_not else self.joules + spent
        if self.peak_bytes is not None:
            peak = int(torch.cuda.max_memory_allocated(self._device)) - self._held_before
            self.peak_bytes = max(self.peak_bytes, peak)
        try:
            yield
        finally:
            self._start()


class Task:
    """What is to be learnt: data, sizes and recipe, the same for everybody."""

    def __init__(self, config: ConvergenceBenchConfig, folder: Path) -> None:
        asked = model_config(config.model)
        known = {field.name for field in dataclasses.fields(PretrainConfig)}
        shared = {name: vars(config)[name] for name in vars(config) if name in known}
        self.recipe = resolved(PretrainConfig(**shared))
        self.config = config
        say_of_warmup(self.recipe)
        execution = choose_execution(self.recipe, asked)  # a wrong device is told before the work
        if execution.dtype == torch.float16:
            raise UserError("precision = 'auto' is fp16 on this GPU, which has no bf16: use fp32")
        # The tokenizer has a vocabulary of its own.
        least = dataclasses.replace(asked, vocab_size=1, pad_token_id=0)
        check_memory(self.recipe, least, execution.device, execution.dtype)
        self.tokenizer: WordPiece
        self.tokenizer, self.shards, held_out = prepare_data(self.recipe, folder)
        if held_out is None:
            raise UserError(f"data = {config.data!r}: too few documents to hold one out")
        self.sizes = dataclasses.replace(
            asked, vocab_size=self.tokenizer.vocab_size, pad_token_id=self.tokenizer.pad_id
        )
        self.execution: Execution = choose_execution(self.recipe, self.sizes)
        most = self.recipe.max_eval_batches
        self.held_out = evaluation_batches(
            held_out, self.tokenizer.ids, max_batches=most, **self._packing()
        )
        counts = self.shards.token_counts(self.sizes.vocab_size)
        unigram = unigram_log_probabilities(counts, self.tokenizer.special_ids)
        self.unigram = unigram.to(self.execution.device)

    def _packing(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "tokens_per_batch": recipe.tokens_per_batch,
            "max_seq_length": recipe.max_seq_length,
            "short_seq_prob": 0.0 if self.config.lengths == "full" else recipe.short_seq_prob,
            "mlm_probability": recipe.mlm_probability,
            "seed": recipe.seed,
        }

    def batches(self, clock: Clock, form: Callable[[Batch], Made]) -> Iterator[Made]:
        """The training batches in the form wanted, made in advance while the clock stands still."""
        packer = Packer(self.shards, self.tokenizer.ids, **self._packing())
        wanted, most = self.recipe.max_steps, self.config.eval_steps
        for start in range(0, wanted, most):
            with clock.paused():
                ready = [
                    form(batch) for batch in itertools.islice(packer, min(most, wanted - start))
                ]
            yield from ready


@dataclasses.dataclass
class Curve:
    """What a contender reports while it trains."""

    name: str
    clock: Clock
    config: ConvergenceBenchConfig
    held_out_loss: Callable[[], float]
    real_tokens: int = 0
    lengths: list[np.ndarray] = dataclasses.field(default_factory=list)
    """(N,) of each batch so far."""
    steps: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    eval_steps: list[int] = dataclasses.field(default_factory=list)
    eval_seconds: list[float] = dataclasses.field(default_factory=list)
    eval_losses: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._bar = progress_bar(total=self.config.max_steps, desc=self.name, unit="step")

    def begin(self) -> None:
        """Evaluates the initial weights; training begins when this returns."""
        with self.clock.paused():
            self._evaluate(0)
        self.clock.reset()
        self.eval_seconds[0] = 0.0

    def after(self, step: int, loss: Callable[[], float]) -> None:
        """Takes note of step `step`, counted from 1; `loss` may wait for the device."""
        last = step == self.config.max_steps
        evaluates = last or step % self.config.eval_steps == 0
        if evaluates or step % max(1, self.config.eval_steps // LOGS_PER_EVALUATION) == 0:
            with self.clock.paused():
                self._bar.update(step - self._bar.n)
                self.steps.append(step)
                self.seconds.append(self.clock.seconds)
                self.losses.append(loss())
                if evaluates:
                    self._evaluate(step)
        if last:
            self._bar.close()

    def _evaluate(self, step: int) -> None:
        self.eval_steps.append(step)
        self.eval_seconds.append(self.clock.seconds)
        self.eval_losses.append(self.held_out_loss())
        self._bar.set_postfix_str(f"held-out {self.eval_losses[-1]:.3f}")

    def took(self, lengths: Tensor) -> None:
        """Takes note of a batch of such sequences, (N,); [PAD] is in none of them."""
        self.real_tokens += int(lengths.sum())
        self.lengths.append(lengths.numpy())

    def seconds_to(self, loss: float) -> float | None:
        """When the held-out loss was first reached, in a straight line between evaluations."""
        for index, found in enumerate(self.eval_losses):
            if found <= loss:
                near = slice(max(0, index - 1), index + 1)  # before training: that evaluation alone
                falling = np.negative(self.eval_losses[near])
                return float(np.interp(-loss, falling, self.eval_seconds[near]))
        return None


# The contenders


def held(device: torch.device) -> int:
    """Bytes of tensors on a GPU."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def ours(task: Task) -> tuple[Curve, dict[str, Tensor]]:
    """Trains by fastbert's step; returns also the initial weights, by Hugging Face's names."""
    execution, device = task.execution, task.execution.device
    held_before = held(device)
    model = ways.seeded(task.sizes, execution.ops, task.config.seed, device)
    weights = ways.weights_of(model, task.sizes)
    compiled = execution.compile and device.type == "cuda"
    if compiled:
        compile_model(model)
    step = TrainStep(model, task.recipe, execution.dtype, main_grads=not compiled)
    launch = launcher(step, execution.graph, accumulates=False)
    held_out = [batch.to(device) for batch in task.held_out]

    def held_out_loss() -> float:
        return evaluate(model, held_out, task.unigram).mlm_loss

    curve = Curve("fastbert", Clock(device, held_before), task.config, held_out_loss)
    curve.begin()
    for index, batch in enumerate(task.batches(curve.clock, lambda batch: batch), start=1):
        launch([batch.to(device)])
        curve.took(batch.cu_seqlens[: batch.num_sequences + 1].diff())
        curve.after(index, lambda: step.read().loss)
    return curve, weights


class HuggingFace:
    """Hugging Face's model with the initial weights, and the recipe in PyTorch's terms."""

    def __init__(self, name: str, task: Task, weights: dict[str, Tensor]) -> None:
        recipe, device, dtype = task.recipe, task.execution.device, task.execution.dtype
        clock = Clock(device, held(device))
        self.task = task
        self.model: Any = ways._hugging_face("hf-sdpa", task.sizes, weights, dtype).to(device)
        self.optimizer = ways.adamw(self.model, recipe)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate(recipe, step) / (recipe.learning_rate or 1.0)
        )
        packed = (padded(batch, task.sizes.pad_token_id) for batch in task.held_out)
        self._held_out = [{key: one[key].to(device) for key in one} for one in packed]
        self.curve = Curve(name, clock, task.config, self._held_out_loss)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        model = self.model
        was_training = model.training
        model.eval()
        total, count = 0.0, 0
        for batch in self._held_out:
            chosen = batch["labels"] != -100
            inputs = {key: batch[key] for key in ("attention_mask", "token_type_ids")}
            with self.autocast():
                logits = model.cls.predictions(model.bert(batch["input_ids"], **inputs)[0][chosen])
            labels = batch["labels"][chosen]
            total += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            count += labels.numel()
        model.train(was_training)
        return total / max(count, 1)

    def batches(self) -> Iterator[PaddedBatch]:
        pad = self.task.sizes.pad_token_id
        for batch in self.task.batches(self.curve.clock, lambda batch: padded(batch, pad)):
            self.curve.took(batch["attention_mask"].sum(1))
            yield batch

    def autocast(self) -> torch.autocast:
        return ways.autocast(self.task.execution.device, self.task.execution.dtype)


def train_by_loop(hf: HuggingFace) -> None:
    model, recipe, device = hf.model.train(), hf.task.recipe, hf.task.execution.device
    hf.curve.begin()
    for index, batch in enumerate(hf.batches(), start=1):
        with hf.autocast():
            loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        hf.optimizer.step()
        hf.schedule.step()
        hf.optimizer.zero_grad(set_to_none=True)
        hf.curve.after(index, functools.partial(float, loss.detach()))


def why_no_trainer(device: torch.device) -> str:
    """What keeps transformers' Trainer from running here; empty where nothing does."""
    if importlib.util.find_spec("accelerate") is None:
        return "transformers' Trainer needs the package accelerate, which is not installed"
    if device.index:
        return "transformers' Trainer takes the first GPU"
    return ""


def training_arguments(folder: str, device: torch.device, bf16: bool, **more: Any) -> Any:
    """Of a Trainer that only trains: it saves, logs and reports nothing."""
    from transformers import TrainingArguments

    made = TrainingArguments(
        folder, bf16=bf16, use_cpu=device.type == "cpu", logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True, **more,
    )  # fmt: skip
    made._n_gpu = min(1, made.n_gpu)  # it would split each batch over all GPUs
    return made


def train_by_trainer(hf: HuggingFace) -> None:
    """Trainer's own loop, optimizer and schedule given; its batches come ready and in order."""
    from torch.utils.data import DataLoader, IterableDataset
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class Given(IterableDataset[PaddedBatch]):
        def __iter__(self) -> Iterator[PaddedBatch]:
            return hf.batches()

    class Reporting(Trainer):
        last_loss: Tensor

        def get_train_dataloader(self) -> Any:
            return DataLoader(Given(), batch_size=None)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    class Curves(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            hf.curve.begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            hf.curve.after(state.global_step, lambda: float(trainer.last_loss))

    recipe, execution = hf.task.recipe, hf.task.execution
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as folder:
        arguments = training_arguments(
            folder, execution.device, execution.dtype == torch.bfloat16, seed=recipe.seed,
            max_steps=recipe.max_steps, max_grad_norm=recipe.max_grad_norm,
        )  # fmt: skip
        trainer = Reporting(
            hf.model, arguments, optimizers=(hf.optimizer, hf.schedule), callbacks=[Curves()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def check_start(first: Curve, other: Curve, dtype: torch.dtype) -> None:
    """Refuses to compare runs that would not begin alike.

    Raises:
        RunError: the held-out losses of the initial weights differ by more than rounding does.
    """
    difference = abs(first.eval_losses[0] - other.held_out_loss())
    if not difference <= TOLERANCE[dtype]:
        raise RunError(
            f"not comparable: before training, the held-out MLM losses of {other.name} and "
            f"{first.name} differ by {difference:.2g} nats (same weights and batches; rounding "
            f"leaves less than {TOLERANCE[dtype]:g})"
        )


def check_tokens(first: Curve, other: Curve) -> None:
    """Refuses to compare runs on different amounts of data.

    Raises:
        RunError: they did not train on the same number of real tokens.
    """
    if other.real_tokens != first.real_tokens:
        raise RunError(
            f"not comparable: {other.name} and {first.name} trained on {other.real_tokens} and "
            f"{first.real_tokens} tokens; [PAD] is no work"
        )


def trained_rival(name: str, task: Task, weights: dict[str, Tensor], first: Curve) -> Curve:
    """Trains Hugging Face's model from our initial weights, `weights`.

    Raises:
        RunError: it cannot be compared with `first`.
    """
    hf = HuggingFace(name, task, weights)
    check_start(first, hf.curve, task.execution.dtype)
    (train_by_trainer if name == "hf-trainer" else train_by_loop)(hf)
    check_tokens(first, hf.curve)
    return hf.curve


# The result


def figures(curve: Curve, sizes: ModelConfig, device: torch.device) -> Row:
    """What every benchmark tells, of the whole training; times of a step are medians."""
    seconds, lengths = curve.seconds[-1], np.concatenate(curve.lengths)
    times = np.diff(curve.seconds, prepend=0) / np.diff(curve.steps, prepend=0) * 1e3
    joules, rate = curve.clock.joules, curve.real_tokens / seconds
    return {
        **quantiles(times.tolist()),
        "rounds_ms": times.tolist(),
        "real_tokens_per_second": rate,
        "sequences_per_second": len(lengths) / seconds,
        "mfu": mfu(flops_per_token(sizes, lengths) * rate, device),
        "peak_memory_bytes": curve.clock.peak_bytes,
        "watts": None if joules is None else joules / seconds,
        "joules_per_million_tokens": None if joules is None else joules / curve.real_tokens * 1e6,
    }


def summary(
    curves: Sequence[Curve], target: float, sizes: ModelConfig, device: torch.device
) -> list[Row]:
    """One row a contender; the ratio is of the times to the target."""
    first = curves[0].seconds_to(target)
    rows = []
    for curve in curves:
        seconds = curve.seconds_to(target)
        rows.append(
            {
                "name": curve.name,
                **{key: getattr(curve, key) for key in CURVES},
                "train_seconds": curve.seconds[-1],
                **figures(curve, sizes, device),
                "seconds_to_target": seconds,
                **({"ratio": seconds / first} if seconds and first else {}),
            }
        )
    return rows


def table(result: dict[str, Any]) -> str:
    """The rows as text, one line each, and a line for each that is missing."""

    def reached(row: Row) -> str:
        seconds = row["seconds_to_target"]
        return "never" if seconds is None else f"{seconds:.1f}"

    curves: results.Columns = {
        "training s": lambda row: f"{row['train_seconds']:.1f}",
        "loss": lambda row: f"{row['losses'][-1]:.3f}",
        "held-out": lambda row: f"{row['eval_losses'][-1]:.3f}",
        f"s to {result['target_loss']:.3f}": reached,
    }

    def compared(row: Row) -> str:
        return f"{row['ratio']:.2f}x as fast" if "ratio" in row else "-"

    remarks = f"{result['rows'][0]['name']} is", compared
    return results.table(result, "a step", curves, remarks)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws training and held-out loss over wall time.

    Raises:
        UserError: the file cannot be written.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, color in zip(result["rows"], ("#0b6e4f", "#c1121f", "#e09f3e"), strict=False):
        axes.plot(row["seconds"], row["losses"], color=color, linewidth=1, alpha=0.35)
        label = f"{row['name']}, held-out MLM"
        axes.plot(row["eval_seconds"], row["eval_losses"], "o-", color=color, label=label)
    axes.axhline(
        result["target_loss"], color="#666666", linestyle="--", linewidth=1, label="target"
    )
    told, settings = result["conditions"], result["settings"]
    axes.set_title(
        f"{settings['model']}, {settings['max_steps']} steps of {settings['tokens_per_batch']} "
        f"tokens, {result['dtype']}; {told['device']}",
        fontsize=9,
    )
    axes.set_xlabel("seconds of training (pale: training loss, MLM + NSP)")
    axes.set_ylabel("nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"png = {str(path)!r}: {error.strerror}") from None


def run(config: ConvergenceBenchConfig) -> dict[str, Any]:
    """Trains as `config` says and returns the result."""
    missing = []
    with tempfile.TemporaryDirectory(prefix="fastbert-bench-") as folder:
        task = Task(config, Path(folder))
        why_not = why_no_trainer(task.execution.device)
        # The loop stands in for a Trainer that cannot run.
        auto = CONVERGENCE_RIVAL_NAMES if why_not else CONVERGENCE_RIVAL_NAMES[:1]
        first, weights = ours(task)
        curves = [first]
        for name in rivals_asked(config.against, auto):
            if name == "hf-trainer" and why_not:
                missing.append({"name": name, "why": why_not})
                continue
            try:
                curves.append(trained_rival(name, task, weights, first))
            except RunError:
                raise
            except Exception as error:  # an accelerate that does not fit, no memory, …
                missing.append({"name": name, "why": one_line(error)})
    target = config.target_loss or max(curve.eval_losses[-1] for curve in curves)
    for curve in curves:
        if curve.seconds_to(target) is None:
            why = f"held-out loss {target:.3f} was never reached"
            missing.append({"name": f"{curve.name}, seconds_to_target", "why": why})
    device = task.execution.device
    rows = summary(curves, target, task.sizes, device)
    memory = "not traced on a CPU, which would slow training: see bench step"
    return results.of_model(
        "convergence", config, device, task.execution.dtype, task.sizes, rows, missing,
        {"peak_memory_bytes": memory},
        target_loss=target, learning_rate=task.recipe.learning_rate,
    )  # fmt: skip


def asked(config: ConvergenceBenchConfig, result: dict[str, Any]) -> str:
    """The settings that matter, in words."""
    return (
        f"{config.model}, {config.max_steps} steps of {config.tokens_per_batch} tokens, "
        f"{config.lengths} lengths"
    )
