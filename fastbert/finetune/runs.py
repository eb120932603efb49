"""`fastbert finetune`: one run, several with other seeds, or a search; each goes on where it died.

Runs of several stand below the folder: seed-42/, seed-43/ or trial-000/. What is the best of them
becomes `hf/` of the whole.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fastbert.errors import RunError, UserError
from fastbert.finetune import metrics
from fastbert.finetune.augment import augmented
from fastbert.finetune.config import DEMO, ClassifyConfig, FinetuneConfig
from fastbert.finetune.data import Data, read_data
from fastbert.finetune.demo import RANDOM, verdict, yardsticks
from fastbert.finetune.demo_data import write_demo
from fastbert.finetune.loop import (
    FinetuneResult,
    Trainer,
    begun_with,
    check_begun_with,
    metric_of,
)
from fastbert.finetune.metrics import DivergedError, Evaluation
from fastbert.finetune.needs import needs
from fastbert.finetune.report import Report, write_report
from fastbert.finetune.tasks import TASKS
from fastbert.finetune.tasks.base import Task
from fastbert.hf.load import load_tokenizer, longest_sequence
from fastbert.hf.save import replaced
from fastbert.settings import load_config, sealed_toml, settings
from fastbert.train.device import choose_device, choose_dtype, keep_freed_memory
from fastbert.train.interrupts import interruptible, noting_signals
from fastbert.train.prepare import held_run, say, taken_back_on_failure, write_whole

_NONE: Mapping[str, Mapping[str, float]] = {}
_MOST_LENGTH = {"answer": 384}
"""Tokens of a sequence where nothing is said: a window of a paragraph; others take what fits."""

_FREE = {
    *("out", "device", "resume", "num_threads", "report_to", "logging_steps", "save_steps"),
    *("model", "train", "eval", "seeds"),
}
"""What may be other when a run goes on, as long as model and examples are what they were."""
_BEGUN = ("config.toml", "data", "metrics.jsonl", "tensorboard", "wandb")


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Fine-tunes as `config` says.

    Raises:
        UserError: a bad request: files, columns, labels, a model that is none.
        RunError: the run failed, or was stopped by a signal and has saved itself.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    with interruptible(), held_run(config) as run, ExitStack() as beginning:
        # Until training begins, a new run leaves nothing behind that was asked for wrongly.
        first = (f"seed-{config.seed}", "trial-000", "random")
        beginning.enter_context(taken_back_on_failure(run, (*_BEGUN, *first)))
        device = choose_device(config.device)
        dtype = dtype_of(config, device)
        if device.type == "cpu":
            keep_freed_memory()
        tokenizer = load_tokenizer(config.model)
        longest = longest_sequence(config.model, tokenizer)
        asked = config.max_seq_length or min(longest, _MOST_LENGTH.get(config.task, longest))
        if asked > longest:
            raise UserError(f"max_seq_length = {asked}: the model takes at most {longest}")
        config = dataclasses.replace(config, out=str(run))
        if config.resume:
            _check_same(config, run)
        task = TASKS[config.task](tokenizer, asked, {})
        asked_for = config
        if config.train == DEMO:
            made = run / "data"
            made.mkdir(exist_ok=True)
            train, held_out = map(str, write_demo(config.task, made, config.seed))
            config = dataclasses.replace(config, train=train, eval=held_out)
        data = read_data(config, task, say)
        if isinstance(config, ClassifyConfig) and config.augment:
            _augment(config, task, data, device)
        kept = sealed_toml(dataclasses.replace(asked_for, resume=False))

        def begun() -> None:
            write_whole(run / "config.toml", kept)  # a run that goes on has been checked by now
            beginning.close()

        if not config.resume:
            write_whole(run / "config.toml", kept)
        with noting_signals() as stop:
            runs = Runs(config, task, data, run, device, dtype, stop, begun)
            if config.search:
                return runs.search()
            if config.seeds > 1:
                return runs.seeds()
            if asked_for.train == DEMO:
                return runs.demo()
            return runs.one(config, run)


def _augment(config: ClassifyConfig, task: Task, data: Data, device: torch.device) -> None:
    asked, markers = round(config.augment * len(data.train)), getattr(task, "markers", [])
    more = augmented(
        data.train, "text", asked, config.model, config.seed, markers=markers, device=device
    )
    data.train += more
    note = f"{len(more)} examples were made by replacing words."
    if len(more) < asked:
        note += f" {asked - len(more)} were not: no word to replace, or a text that is too long."
    say(note)
    data.notes.append(note)


def _check_same(config: FinetuneConfig, run: Path) -> None:
    """Refuses settings that a run cannot change half-way."""
    path = run / "config.toml"
    if not path.exists():
        return
    before = load_config(type(config), path, {}, sealed=True)
    for name in (one.name for one in settings(type(config)) if one.name not in _FREE):
        asked, kept = getattr(config, name), getattr(before, name)
        if asked != kept:
            raise UserError(
                f"{name} = {asked!r} differs from {kept!r} of the run in {run}: leave it out to go "
                "on, or name another --out"
            )
    if (config.seeds > 1) != (before.seeds > 1):
        raise UserError(
            f"seeds = {config.seeds}: the run in {run} was begun with {before.seeds}, and one does "
            "not become several, nor several one: name another --out"
        )


def dtype_of(config: FinetuneConfig, device: torch.device) -> torch.dtype:
    """What `precision` asks for, said; fp32 on a CPU where nothing is."""
    if config.precision == "auto" and device.type == "cpu":
        dtype, reason = torch.float32, "fp32 (auto on a CPU)"
    else:
        dtype, reason = choose_dtype(config.precision, device)
    say(f"device: {device}, precision: {reason}")
    return dtype


class Runs:
    """What runs of a request share.

    Args:
        config: of the request.
        task: that has learnt its labels.
        data: examples.
        folder: of all runs.
        device: where they compute.
        dtype: in what.
        stop: names the signal that has come, if one has.
        begun: called before a run's first step.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        task: Task,
        data: Data,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        stop: Callable[[], str],
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.task, self.data, self.folder = config, task, data, folder
        self.device, self.dtype, self.stop = device, dtype, stop
        self.begun = begun

    def one(
        self,
        config: FinetuneConfig,
        folder: Path,
        *,
        fresh: bool = False,
        baselines: Mapping[str, Mapping[str, float]] = _NONE,
    ) -> FinetuneResult:
        """One run, or what it found when it was done before."""
        done = self._done(config, folder) if config.resume else None
        if done is not None:
            say(f"{folder}: is done")
            return done
        folder.mkdir(exist_ok=True)
        self.task.cut = 0
        trainer = Trainer(
            config, self.task, self.data, folder, self.device, self.dtype, config.resume, say, fresh
        )
        self.begun()
        trainer.run(self.stop)
        result = trainer.finish(baselines)
        found = {**_as_json(result), "begun_with": trainer.begun_with}
        write_whole(folder / "result.json", json.dumps(found))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return result

    def _done(self, config: FinetuneConfig, folder: Path) -> FinetuneResult | None:
        """What a run found that ended; None of one that did not."""
        path = folder / "result.json"
        if not path.is_file():
            return None
        found = begun_with(config, self.data)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            check_begun_with(kept["begun_with"], found, config, folder)
            return FinetuneResult(
                folder,
                folder / "hf",
                Evaluation(kept["metrics"], kept["details"]),
                kept["best_step"],
                kept["steps"],
                kept["seconds"],
                {int(step): loss for step, loss in kept["losses"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}: is damaged: delete it, and the run goes on") from None

    def demo(self) -> FinetuneResult:
        """The same network from random weights first, then the model; both beside yardsticks."""
        baselines = yardsticks(self.config, self.data, say)
        random = self.one(self.config, self.folder / "random", fresh=True)
        baselines[RANDOM] = random.metrics
        result = self.one(self.config, self.folder, baselines=baselines)
        for line in verdict(metric_of(self.config, self.task), result.metrics, baselines):
            print(line)
        return result

    def seeds(self) -> FinetuneResult:
        """Several runs, and what is common to them."""
        config, found = self.config, []
        for seed in range(config.seed, config.seed + config.seeds):
            say(f"seed {seed}")
            of_seed = dataclasses.replace(config, seed=seed, seeds=1)
            found.append(self.one(of_seed, self.folder / f"seed-{seed}"))
        spreads = metrics.mean_and_deviation([one.evaluation for one in found])
        return self._best(found, spreads, [])

    def search(self) -> FinetuneResult:
        """Runs with settings that Optuna proposes (Akiba et al. 2019, tree-structured Parzen)."""
        optuna = needs("optuna")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space, config, found = self.config.search_space, self.config, []
        name = metric_of(config, self.task)
        study = optuna.create_study(
            direction="minimize" if name in metrics.LESS_IS_BETTER else "maximize",
            sampler=optuna.samplers.TPESampler(seed=config.seed % 2**32),
        )
        notes, proposed = [], []
        # What was found before is told again in the same order, so the proposals are the same.
        for number in range(config.search):
            trial = study.ask()
            low, high = space["learning_rate"]
            values = {"learning_rate": trial.suggest_float("learning_rate", low, high, log=True)}
            for setting in ("num_train_epochs", "per_device_train_batch_size"):
                values[setting] = trial.suggest_categorical(setting, space[setting])
            shown = ", ".join(f"{key} = {value:.3g}" for key, value in values.items())
            say(f"trial {number}: {shown}")
            asked: Any = {**values, "search": 0}
            try:
                result = self.one(
                    dataclasses.replace(config, **asked), self.folder / f"trial-{number:03d}"
                )
            except DivergedError as error:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                notes.append(f"Trial {number}: {shown}: diverged.")
                say(f"trial {number}: diverged: {error}")
                continue
            study.tell(trial, result.metrics[name])
            found.append(result)
            proposed.append(shown)
            notes.append(f"Trial {number}: {shown}: {name} {result.metrics[name]:.4g}")
        if not found:
            raise RunError("each trial diverged: name another --out and lower learning rates")
        return self._best(found, {}, notes, proposed)

    def _best(
        self,
        found: list[FinetuneResult],
        spreads: dict[str, metrics.Spread],
        notes: list[str],
        proposed: Sequence[str] = (),
    ) -> FinetuneResult:
        """Makes the best run's model that of the whole, and writes the report of all."""
        name = metric_of(self.config, self.task)
        sign = -1 if name in metrics.LESS_IS_BETTER else 1
        best = max(found, key=lambda one: sign * one.metrics[name])
        if proposed:
            notes.append(f"The best: {proposed[found.index(best)]}.")
            say(notes[-1])
        for part in ("hf", "adapter") if self.config.lora_r else ("hf",):
            with replaced(self.folder / part) as temporary:
                shutil.copytree(best.folder / part, temporary)
        write_report(
            self.folder,
            Report(
                title=f"{self.task.name}: {self.config.train}",
                task=self.task.kind,
                settings=dataclasses.asdict(self.config),
                evaluation=best.evaluation,
                notes=[*self.data.notes, *notes, f"What is shown is of {best.folder.name}."],
                seeds=spreads,
            ),
        )
        return dataclasses.replace(best, folder=self.folder, hf=self.folder / "hf", seeds=spreads)


def _as_json(result: FinetuneResult) -> dict[str, Any]:
    return {
        "metrics": result.metrics,
        "details": result.evaluation.details,
        "best_step": result.best_step,
        "steps": result.steps,
        "seconds": result.seconds,
        "losses": {str(step): loss for step, loss in result.losses.items()},
    }
