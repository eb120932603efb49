"""One fine-tuning: a model, examples in a fixed order, AdamW; the best of its evaluations is kept.

A run's folder: config.toml, metrics.jsonl, tensorboard/, checkpoints/step-000010/, hf/ (the best
model), adapter/ (LoRA's), eval.json, report.html.

B sequences of a micro-batch; a step has `gradient_accumulation_steps` of them.
"""

import copy
import dataclasses
import hashlib
import json
import math
import random
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.errors import RunError, UserError
from fastbert.finetune import metrics
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.data import Data
from fastbert.finetune.demo import verdict
from fastbert.finetune.infer import autocast, infer
from fastbert.finetune.metrics import DivergedError, Evaluation
from fastbert.finetune.report import Report, write_report
from fastbert.finetune.start import Start, start
from fastbert.finetune.tasks.base import Example, Feature, Prediction, Task
from fastbert.finetune.tracking import Wandb
from fastbert.hf.save import recover, replaced, save_model
from fastbert.hf.weights import local_folder
from fastbert.progress import progress_bar
from fastbert.settings import settings
from fastbert.train import checkpoint
from fastbert.train.device import is_out_of_memory
from fastbert.train.report import Reporter, read_metrics
from fastbert.train.schedule import share_of_peak

_MAX_SKIPPED_IN_A_ROW = 3
_MOST_MISTAKES = 200  # in eval.json; the page shows the first 50
_NO_DECAY = ("bias", "layernorm", "layer_norm", "norm.weight")
_AGAIN = "--resume"
_NONE: Mapping[str, Mapping[str, float]] = {}
_OF_MODELS = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model")
_BAR_FROM = 512  # features of an evaluation that takes seconds


@dataclass
class FinetuneResult:
    """What a fine-tuning found.

    Attributes:
        folder: of the run.
        hf: the best model and its tokenizer, for transformers and `fastbert predict`.
        evaluation: of that model.
        best_step: of its training.
        steps: that were done.
        seconds: of training, evaluations left out.
        losses: of each logged stretch, by step.
        seeds: metrics over several seeds.
    """

    folder: Path
    hf: Path
    evaluation: Evaluation
    best_step: int
    steps: int
    seconds: float
    losses: dict[int, float] = field(default_factory=dict)
    seeds: dict[str, metrics.Spread] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Of the evaluation."""
        return self.evaluation.metrics


def epoch_order(examples: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch sees its examples: transformers' Trainer's for the same seed."""
    generator = torch.Generator().manual_seed(seed + epoch)
    order: list[int] = torch.randperm(examples, generator=generator).tolist()
    return order


def metric_of(config: FinetuneConfig, task: Task) -> str:
    """The metric by which the best model is chosen, of a task that has learnt its labels.

    Raises:
        UserError: the evaluation of such a task has no such metric.
    """
    asked, known = config.metric_for_best_model, list(metrics.METRICS[task.kind])
    if task.kind == "classify" and len(task.labels) != 2:
        known = [name for name in known if name not in metrics.OF_TWO_CLASSES]
    if task.kind == "answer" and not task.description["unanswerable"]:
        known = ["f1", "exact_match", "loss"]
    if asked == "auto":
        return known[0]
    if asked not in known:
        raise UserError(
            f"metric_for_best_model = {asked!r}: such labels are judged by {', '.join(known)}"
        )
    return asked


def begun_with(config: FinetuneConfig, data: Data) -> dict[str, str]:
    """Digests of the examples and the model's folder: a run goes on with these, or not at all."""
    content = [[one.fields for one in part] for part in (data.train, data.eval)]
    model = hashlib.sha256()
    folder = local_folder(config.model)
    files = {path for kind in _OF_MODELS for path in folder.glob(kind) if path.is_file()}
    for path in sorted(files):
        with path.open("rb") as file:
            model.update(hashlib.file_digest(file, "sha256").digest())
    examples = hashlib.sha256(json.dumps(content, default=repr).encode())
    return {"examples": examples.hexdigest(), "model": model.hexdigest()}


def check_begun_with(
    kept: Mapping[str, str], found: Mapping[str, str], config: FinetuneConfig, run: Path
) -> None:
    """Compares what a run in a folder began with, and what is there now; see `begun_with`.

    Raises:
        UserError: it is not the same.
    """
    for name, what in (
        ("model", f"{config.model} is not the model that"),
        ("examples", f"{config.train} and {config.eval} do not hold what"),
    ):
        if kept[name] != found[name]:
            raise UserError(
                f"{what} the run in {run} began with: put that back, or name another --out"
            )


class Trainer:
    """The state of a run between steps.

    Args:
        config: of the task.
        task: that has learnt its labels.
        data: examples.
        run: the folder, locked by the caller.
        device: where it computes.
        dtype: in what.
        resume: whether to go on from the newest checkpoint there.
        say: gets lines until the bar is there.
        fresh: see `start`.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        task: Task,
        data: Data,
        run: Path,
        device: torch.device,
        dtype: torch.dtype,
        resume: bool,
        say: Callable[[str], None],
        fresh: bool = False,
    ) -> None:
        self.config, self.task, self.data, self.folder = config, task, data, run
        self.device, self.dtype, self.notes = device, dtype, list(data.notes)
        self.metric = metric_of(config, task)
        self.hf, self.adapter = run / "hf", run / "adapter"
        for folder in (self.hf, self.adapter):
            recover(folder)
        self.begun_with = begun_with(config, data)
        begun: Start = start(config, task, fresh)
        self.model, self.depth, self.layers = begun.model.to(device), begun.depth, begun.layers
        self.train = task.features(data.train, True)
        cut_in_training, task.cut = task.cut, 0
        self.eval = task.features(data.eval, True)
        for line in (*begun.notes, *self._said_of_lengths(cut_in_training)):
            self.notes.append(line)
            say(line)
        accumulation = config.gradient_accumulation_steps
        self.batches_per_epoch = math.ceil(len(self.train) / config.per_device_train_batch_size)
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / accumulation)
        self.max_steps = config.max_steps or math.ceil(
            config.num_train_epochs * self.steps_per_epoch
        )
        self.eval_every = config.eval_steps or self.steps_per_epoch
        self.save_every = config.save_steps or self.eval_every
        self.rising_steps = config.rising_steps(self.max_steps)
        self.optimizer = self._optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.step = self.skipped = self.streak = self.stale = 0
        self.best: dict[str, Any] = {}
        """Of the best evaluation so far: step, value, and what a report shows of it."""
        self.window = [0.0, 0]
        self.seconds = self.norm = 0.0
        self.tokens = 0
        self.split = 1
        """Parts that a batch is cut into for want of memory."""
        self.order: tuple[int, list[int]] | None = None
        _seed(config.seed)
        restored = checkpoint.load_newest(run, say, _what_is_wrong) if resume else None
        if restored is not None:
            self._restore(restored)
            if self.best.get("step") == self.step:
                self._keep()  # killed before that
            say(f"resume: goes on at step {self.step}")
        board = config.report_to == "tensorboard"
        self.wandb = Wandb(run, dataclasses.asdict(config)) if config.report_to == "wandb" else None
        self.reporter = Reporter(run, self.step, self.max_steps, board, "finetune", again=_AGAIN)

    def _said_of_lengths(self, cut_in_training: int) -> Iterator[str]:
        long = cut_in_training + self.task.cut
        if long:
            windows = self.task.name in ("tag", "answer")
            what = "are read in windows" if windows else "were cut"
            yield f"{long} texts of more than {self.task.max_length} tokens {what}"
        lengths = [one.length for one in self.train]
        yield (
            f"data: {len(self.data.train):,} examples for training, {len(self.data.eval):,} for "
            f"evaluation; sequences of {np.mean(lengths):.0f} tokens, at most {max(lengths)}"
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW; biases and LayerNorm without decay, each layer with its rate."""
        config = self.config
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                decays = not any(part in name.lower() for part in _NO_DECAY)
                groups.setdefault((self.depth[name], decays), []).append(parameter)
        if not groups:
            raise UserError("freeze_layers: nothing is left to train")
        return torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "weight_decay": config.weight_decay if decays else 0.0,
                    "peak": config.learning_rate
                    * config.layerwise_lr_decay ** (self.layers + 1 - depth),
                }
                for (depth, decays), parameters in sorted(groups.items())
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )

    # Checkpoints

    def _named(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _save(self) -> None:
        moments = {}
        for name, parameter in self._named().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{key}.{name}"] = value.detach().cpu()
        moments["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            moments["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        weights = {name: p.detach().cpu() for name, p in self._named().items()}
        scale = self.scaler.state_dict() if self.scaler.is_enabled() else {}
        state = {
            "skipped": self.skipped,
            "streak": self.streak,
            "stale": self.stale,
            "best": self.best,
            "window": self.window,
            "seconds": self.seconds,
            "scale": [scale["scale"], scale["_growth_tracker"]] if scale else None,
            "begun_with": self.begun_with,
        }
        found = checkpoint.Checkpoint(self.step, weights, moments, state)
        checkpoint.save(self.folder, found, 1, again=_AGAIN)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        state = found.state
        check_begun_with(state["begun_with"], self.begun_with, self.config, self.folder)
        named = self._named()
        try:
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(found.weights[name])
            for name, parameter in named.items():
                of_one = {
                    key: found.optimizer[f"{key}.{name}"]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in found.optimizer
                }
                if of_one:
                    self.optimizer.state[parameter] = {
                        key: value.to(self.device) for key, value in of_one.items()
                    }
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"the checkpoint of step {found.step} in {self.folder} does not fit: {error}"
            ) from None
        torch.set_rng_state(found.optimizer["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in found.optimizer:
            torch.cuda.set_rng_state(found.optimizer["rng.cuda"], self.device)
        if state["scale"] and self.scaler.is_enabled():
            scale = self.scaler.state_dict()
            scale["scale"], scale["_growth_tracker"] = state["scale"]
            self.scaler.load_state_dict(scale)
        self.step, self.skipped, self.streak = found.step, state["skipped"], state["streak"]
        self.stale, self.best, self.seconds = state["stale"], state["best"], state["seconds"]
        self.window = state["window"]

    # The loop

    def run(self, stop_signal: Callable[[], str]) -> None:
        """Trains to the end, or until a signal, which saves a checkpoint.

        Raises:
            RunError: a signal came, the disk is full, or gradients are not finite.
        """
        try:
            self._run(stop_signal)
        finally:
            self.reporter.close()
            if self.wandb is not None:
                self.wandb.close()

    def _run(self, stop_signal: Callable[[], str]) -> None:
        config, rate = self.config, None
        began_at, tokens = self.seconds, self.tokens
        while self.step < self.max_steps and not self._is_stale():
            began = time.perf_counter()
            loss = self._one_step()
            self.seconds += time.perf_counter() - began
            if self.step % config.logging_steps == 0 or self.step == self.max_steps:
                rate = (self.tokens - tokens) / (self.seconds - began_at)
                began_at, tokens = self.seconds, self.tokens
                self._log(rate)
            self.reporter.advance(loss, rate)
            is_last, is_best = self.step == self.max_steps, False
            if self.step % self.eval_every == 0 or is_last:
                is_best = self._evaluate()
            stop = stop_signal()
            # A checkpoint says which model is the best: never another than hf/ holds, whatever a
            # run that goes on finds of later ones.
            if stop or is_best or self.step % self.save_every == 0 or is_last:
                self._save()
            if is_best:
                self._keep()
            if stop and self.step < self.max_steps:
                raise RunError(
                    f"stopped by {stop} at step {self.step}; everything is saved: go on with "
                    f"fastbert finetune {self.task.name} --resume --out "
                    f"{shlex.quote(config.out)}"
                )

    def _is_stale(self) -> bool:
        patience = self.config.early_stopping_patience
        if patience and self.stale >= patience:
            self.reporter.say(
                f"step {self.step}: {self.metric} was not better in {self.stale} evaluations: "
                f"stopped; the best is that of step {self.best['step']}"
            )
            return True
        return False

    def _step_batches(self) -> Iterator[list[Feature]]:
        """The micro-batches of the next step."""
        config = self.config
        epoch, of_epoch = divmod(self.step, self.steps_per_epoch)
        if self.order is None or self.order[0] != epoch:
            self.order = epoch, epoch_order(len(self.train), config.seed, epoch)
        size, count = config.per_device_train_batch_size, config.gradient_accumulation_steps
        for number in range(of_epoch * count, min((of_epoch + 1) * count, self.batches_per_epoch)):
            places = self.order[1][number * size : (number + 1) * size]
            part = math.ceil(len(places) / self.split)
            for begin in range(0, len(places), part):
                yield [self.train[place] for place in places[begin : begin + part]]

    def _one_step(self) -> float:
        """One update; returns its loss. What does not fit the memory is cut into halves."""
        config, model = self.config, self.model
        share = share_of_peak(
            config.lr_scheduler_type, self.step, self.rising_steps, self.max_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        model.train()
        while True:
            try:
                found = self._gradients()
                break
            except RuntimeError as error:
                parts = config.per_device_train_batch_size // (2 * self.split)
                if not is_out_of_memory(error) or not parts or self.task.name == "embed":
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            self.split *= 2
            self.reporter.say(f"step {self.step}: out of memory: going on with {parts} at a time")
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = config.max_grad_norm or math.inf
        self.norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        if math.isfinite(self.norm) and math.isfinite(found):
            self.scaler.step(self.optimizer)
            self.streak = 0
        else:
            self._skip(found)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if math.isfinite(found):
            self.window[0] += found
            self.window[1] += 1
        return found

    def _gradients(self) -> float:
        """Adds the gradients of a step's batches; returns its loss."""
        batches = [self.task.batch(features) for features in self._step_batches()]
        # None where a batch is one sequence without a word of its own.
        items = sum(float(self.task.items(batch)) for batch in batches) or 1.0
        total = torch.zeros((), device=self.device)
        for batch in batches:
            batch = {name: value.to(self.device) for name, value in batch.items()}
            words = self.model.get_input_embeddings().weight if self.config.fgm_epsilon else None
            if words is not None:  # the step against the loss goes by this batch's gradient alone
                earlier, words.grad = words.grad, None
            loss = self._loss(batch) / items
            self.scaler.scale(loss).backward()
            total += loss.detach()
            if words is not None:
                self._adversarial(words, batch, items)
                if earlier is not None:
                    words.grad.add_(earlier)
        self.tokens += sum(int(batch["attention_mask"].sum()) for batch in batches)
        return float(total)

    def _skip(self, loss: float) -> None:
        """Of a loss or gradient that is not finite; fp16 meets some as it looks for its scale."""
        self.skipped += 1
        if self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() >= 1.0:
            return
        self.streak += 1
        what = "gradient" if math.isfinite(loss) else "loss"
        self.reporter.say(f"step {self.step + 1}: the {what} was not finite, update skipped")
        if self.streak >= _MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"the {what} was not finite in {self.streak} steps in a row: start a new run "
                "with a lower --learning-rate"
            )

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The sum of the losses of a micro-batch; with R-Drop of two forwards and between them.

        Liang et al. 2021, equation 4, halved: so the loss is on the scale of one forward.
        """
        task, alpha = self.task, self.config.rdrop_alpha
        with autocast(self.device, self.dtype):
            outputs = task.outputs(self.model, batch, self.config.unpad)
            if not alpha:
                return task.loss(outputs, batch)
            again = task.outputs(self.model, batch, self.config.unpad)
            one, other = (task.distributions(x, batch).log_softmax(-1) for x in (outputs, again))
            divergence = sum(
                F.kl_div(a, b, reduction="sum", log_target=True)
                for a, b in ((one, other), (other, one))
            )
            # As the loss, of which each of `items` may have several rows: starts and ends.
            divergence = divergence * task.items(batch) / max(1, len(one))
            both = task.loss(outputs, batch) + task.loss(again, batch)
            return both / 2 + alpha * divergence / 4

    def _adversarial(self, weight: nn.Parameter, batch: dict[str, Tensor], items: float) -> None:
        """Adds the gradient at embeddings moved against the loss (Miyato et al. 2017)."""
        assert weight.grad is not None
        length = weight.grad.norm()
        if not bool(length.isfinite()) or not float(length):
            return
        before = weight.detach().clone()
        try:
            with torch.no_grad():
                weight.add_(self.config.fgm_epsilon * weight.grad / length)
            self.scaler.scale(self._loss(batch) / items).backward()
        finally:  # out of memory: the step is tried again from where it was
            with torch.no_grad():
                weight.copy_(before)

    def _log(self, rate: float) -> None:
        row = {
            "tokens_per_second": rate,
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "grad_norm": self.norm,
            "epoch": self.step / self.steps_per_epoch,
            "seconds": self.seconds,
        }
        if self.window[1]:
            row = {"loss": self.window[0] / self.window[1], **row}
        self.window = [0.0, 0]
        self._tell({name: value for name, value in row.items() if math.isfinite(value)})

    def _tell(self, row: dict[str, float]) -> None:
        self.reporter.log(self.step, row)
        if self.wandb is not None:
            self.wandb.log(self.step, row)

    def _evaluate(self) -> bool:
        """Whether this is the best so far."""
        found, predictions = self._evaluation()
        name = self.metric
        if name not in found.metrics:
            raise UserError(
                f"metric_for_best_model = {name!r}: this evaluation has {', '.join(found.metrics)}"
            )
        self._tell({f"eval/{key}": value for key, value in found.metrics.items()})
        value = found.metrics[name]
        sign = -1 if name in metrics.LESS_IS_BETTER else 1
        is_better = not self.best or sign * value > sign * self.best["value"]
        self.stale = 0 if is_better else self.stale + 1
        mark = ", the best so far" if is_better else ""
        self.reporter.say(
            f"step {self.step} (epoch {self.step / self.steps_per_epoch:.2f}): {name} "
            f"{value:.4g}, loss {found.metrics['loss']:.4g}{mark}"
        )
        if is_better:
            self.best = {
                "step": self.step,
                "value": value,
                "metrics": found.metrics,
                "details": found.details,
                "mistakes": worst_mistakes(self.task, self.data.eval, predictions),
            }
        return is_better

    def _evaluation(self) -> tuple[Evaluation, list[Prediction]]:
        self.model.eval()
        bar = None
        if len(self.eval) > _BAR_FROM:
            bar = progress_bar(total=len(self.eval), desc="evaluate", unit="text", leave=False)
        try:
            raws, loss = infer(
                self.task, self.model, self.eval, self.dtype, unpad=self.config.unpad, progress=bar
            )
        finally:
            if bar is not None:
                bar.close()
        assert loss is not None
        if not math.isfinite(loss):  # no number to choose the best model by, nor one for JSON
            raise DivergedError(
                f"the loss of the evaluation of step {self.step} is not a finite number: start a "
                "new run with a lower --learning-rate"
            )
        predictions = self.task.predictions(self.data.eval, self.eval, raws)
        found = self.task.evaluate(self.data.eval, self.eval, raws, predictions)
        found.metrics.setdefault("loss", loss)
        return found, predictions

    def _keep(self) -> None:
        """Writes the model as it is now: `hf/`, and LoRA's adapter beside it."""
        model = self.model
        if self.config.lora_r:
            with replaced(self.adapter) as temporary:
                # Rows that were added are among the adapters; the others are as they were.
                model.save_pretrained(str(temporary), save_embedding_layers=False)
            model = copy.deepcopy(model).merge_and_unload()
        save_model(self.hf, model, self.task.tokenizer, self.task.description)

    # The end

    def finish(self, baselines: Mapping[str, Mapping[str, float]] = _NONE) -> FinetuneResult:
        """Writes the report of the best model, which is in `hf/`.

        Args:
            baselines: metrics of others, shown beside ours.
        """
        found = Evaluation(self.best["metrics"], self.best["details"])
        history = read_metrics(self.folder / "metrics.jsonl")
        notes = [*self.notes, f"The best of the evaluations was that of step {self.best['step']}."]
        if baselines:
            notes.append(verdict(self.metric, found.metrics, baselines)[-1])
        write_report(
            self.folder,
            Report(
                title=f"{self.task.name}: {self.config.train}",
                task=self.task.kind,
                settings=_shown(self.config),
                evaluation=found,
                mistakes=self.best["mistakes"],
                history=history,
                notes=notes,
                baselines=baselines,
            ),
        )
        losses = {row["step"]: row["loss"] for row in history if "loss" in row}
        return FinetuneResult(
            self.folder, self.hf, found, self.best["step"], self.step, self.seconds, losses
        )


def _seed(seed: int) -> None:
    """All generators, as transformers' Trainer does where it begins."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _shown(config: FinetuneConfig) -> dict[str, Any]:
    return {one.name: getattr(config, one.name) for one in settings(type(config))}


_OF_BEGINNING = {"examples", "model"}
_OF_BEST = {"step", "value", "metrics", "details", "mistakes"}


def _what_is_wrong(state: Mapping[str, Any]) -> str:
    """What no checkpoint of fine-tuning says; empty: nothing is."""
    for name in ("step", "skipped", "streak", "stale"):
        if type(state.get(name)) is not int or state[name] < 0:
            return f"{name} must be a count"
    best, begun = state.get("best"), state.get("begun_with")
    if not isinstance(best, dict) or (best and not best.keys() >= _OF_BEST):
        return f"best must be empty or have {', '.join(sorted(_OF_BEST))}"
    if not isinstance(begun, dict) or not begun.keys() >= _OF_BEGINNING:
        return f"begun_with must have {', '.join(sorted(_OF_BEGINNING))}"
    window = state.get("window")
    if not isinstance(window, list) or len(window) != 2 or "scale" not in state:
        return "window and scale must be there"
    return "" if isinstance(state.get("seconds"), float | int) else "seconds must be a number"


def worst_mistakes(
    task: Task, examples: list[Example], predictions: list[Prediction]
) -> list[dict[str, Any]]:
    """What a report shows of wrong predictions: `Task.mistake`, the worst first."""
    found = [
        mistake
        for one, prediction in zip(examples, predictions, strict=True)
        if (mistake := task.mistake(one, prediction)) is not None
    ]
    found.sort(key=lambda mistake: -mistake["badness"])
    return found[:_MOST_MISTAKES]
