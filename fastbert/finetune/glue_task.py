"""One task of GLUE: the settings that are tried, then the seeds, a run each; none is run twice.

`python -m fastbert.finetune.glue_task OUT TASK FOLDER DEVICE THREADS` is a task in a process of its
own, which `fastbert glue` starts where several run at once. It ends when its stdin does.
"""

import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastbert.errors import FastbertError, RunError, UserError
from fastbert.finetune.data import Data
from fastbert.finetune.glue_config import MNLI_MM, GlueConfig
from fastbert.finetune.glue_data import GlueData, read_task
from fastbert.finetune.infer import infer
from fastbert.finetune.runs import Runs, dtype_of
from fastbert.finetune.tasks.base import Example
from fastbert.finetune.tasks.classify import Classify
from fastbert.hf.accelerate import accelerate
from fastbert.hf.load import load_head, load_tokenizer, longest_sequence
from fastbert.settings import load_config, read_json
from fastbert.train import lock
from fastbert.train.device import choose_device, keep_freed_memory
from fastbert.train.energy import EnergyCounter
from fastbert.train.interrupts import interruptible, noting_signals
from fastbert.train.prepare import say, write_whole

RECORD = "glue.json"
"""What a run found, in its folder; what a task found, in that of all its runs."""
_LENGTH = 128
_MOST_STEPS_AT_STAKE = 2000  # between checkpoints, where an epoch is longer
_RESUMED = "a run was resumed"


def sequence_length(config: GlueConfig, tokenizer: Any) -> int:
    """Tokens of a sequence.

    Raises:
        UserError: more than the model takes.
    """
    longest = longest_sequence(config.model, tokenizer)
    if config.max_seq_length and config.max_seq_length > longest:
        raise UserError(
            f"max_seq_length = {config.max_seq_length}: the model takes at most {longest}"
        )
    return config.max_seq_length or min(_LENGTH, longest)


def run_task(
    config: GlueConfig, name: str, source: Path, device: torch.device, stop: Callable[[], str]
) -> None:
    """Runs what is left of a task, and writes what it found into OUT/TASK.

    Args:
        config: of all tasks, with `out` a folder.
        name: one of `TASKS`.
        source: the folder of its data.
        device: where it computes.
        stop: names the signal that has come, if one has.

    Raises:
        UserError: its data or settings do not do.
        RunError: a run failed, or a signal stopped it, and it has saved itself.
    """
    folder = Path(config.out) / name
    folder.mkdir(exist_ok=True)
    with lock.locked(folder, say):
        _Task(config, read_task(name, source), folder, device, stop).run()


class _Task:
    """The runs of a task."""

    def __init__(
        self,
        config: GlueConfig,
        data: GlueData,
        folder: Path,
        device: torch.device,
        stop: Callable[[], str],
    ) -> None:
        self.config, self.data, self.folder = config, data, folder
        self.name, self.device, self.stop = data.task.name, device, stop
        if device.type == "cpu":
            keep_freed_memory()
        tokenizer = load_tokenizer(config.model)
        self.classify = Classify(tokenizer, sequence_length(config, tokenizer), {})
        first = self._asked(config.settings_tried[0], config.seed)
        self.classify.learn(data.train, first)
        self.dtype = dtype_of(first, device)
        held_out = data.evals[data.task.splits[0]]
        self.runs = Runs(
            first, self.classify, Data(data.train, held_out), folder, device, self.dtype, stop
        )
        self.meter = EnergyCounter(device)

    def _asked(self, tried: dict[str, Any], seed: int) -> Any:
        asked = self.config.classify(self.name, tried, seed)
        batch = asked.per_device_train_batch_size * asked.gradient_accumulation_steps
        epoch = -(-len(self.data.train) // batch)
        often = self.config.save_steps or min(epoch, _MOST_STEPS_AT_STAKE)
        return replace(asked, train=str(self.data.folder), save_steps=often)

    def run(self) -> None:
        """Each setting with the first seed, then the best with the others."""
        config, tried = self.config, []
        for one in config.settings_tried:
            tried.append({**one, "score": self._one(one, config.seed)["score"]})
        best = max(range(len(tried)), key=lambda place: tried[place]["score"])
        setting = config.settings_tried[best]
        seeds = range(config.seed, config.seed + config.seeds)
        found = {
            "task": self.name,
            "train": len(self.data.train),
            "eval": {split: len(part) for split, part in self.data.evals.items()},
            "setting": setting,
            "tried": tried if len(tried) > 1 else [],
            "runs": [self._one(setting, seed) for seed in seeds],
        }
        write_whole(self.folder / RECORD, json.dumps(found, indent=1))

    def _one(self, setting: dict[str, Any], seed: int) -> dict[str, Any]:
        """What a run found, now or before."""
        folder = self.folder / _named(setting) if self.config.grid != "none" else self.folder
        folder = folder / f"seed-{seed}"
        if (folder / RECORD).is_file():
            return read_json(str(folder / RECORD))
        if self.stop():
            raise RunError(f"stopped by {self.stop()}")
        say(f"{self.name}: seed {seed}, {', '.join(f'{k} = {v:g}' for k, v in setting.items())}")
        begun_before = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        joules = self.meter.joules()
        result = self.runs.one(self._asked(setting, seed), folder)
        metrics = dict(result.metrics)
        if self.name == "MNLI":
            metrics[MNLI_MM] = self._accuracy(result.hf, self.data.evals["_mismatched"])
        joules = self.meter.joules() - joules
        official = {key: metrics[key] for key in self.data.task.metrics}
        why_not = self.meter.why_not or (_RESUMED if begun_before else "")
        record = {
            "seed": seed,
            "metrics": official,
            "score": sum(official.values()) / len(official),
            "steps": result.steps,
            "seconds": result.seconds,
            "joules": None if why_not else joules,
            "why_no_joules": why_not,
            "report": os.path.relpath(folder / "report.html", self.folder.parent),
        }
        write_whole(folder / RECORD, json.dumps(record, indent=1))
        if not self.config.keep_models:
            for part in ("hf", "adapter"):
                shutil.rmtree(folder / part, ignore_errors=True)
        return record

    def _accuracy(self, hf: Path, examples: list[Example]) -> float:
        """Of a run's model on other examples."""
        task, config = self.classify, self.config
        model = load_head(hf, task.head)
        if config.unpad:
            accelerate(model)
        features = task.features(examples, True)
        model = model.to(self.device)
        raws, _ = infer(task, model, features, self.dtype, unpad=config.unpad)
        predictions = task.predictions(examples, features, raws)
        return task.evaluate(examples, features, raws, predictions).metrics["accuracy"]


def _named(setting: dict[str, Any]) -> str:
    rate, batch, epochs = setting.values()
    return f"lr-{rate:g}-batch-{batch}-epochs-{epochs:g}"


def main(argv: list[str]) -> int:
    """Runs a task and returns the exit code; an error is the last line on stderr."""
    out, name, source, device, threads = argv
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        with interruptible(last=True), noting_signals() as stop:
            torch.set_num_threads(int(threads))
            config = replace(
                load_config(GlueConfig, Path(out) / "config.toml", {}, sealed=True), out=out
            )
            try:
                run_task(config, name, Path(source), choose_device(device), stop)
            except RunError as error:
                if not stop():
                    raise
                again = f"go on with fastbert glue --resume --out {shlex.quote(out)}"
                raise RunError(f"{name}: stopped by {stop()}: {again}") from error
    except FastbertError as error:
        print(f"fastbert: error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        print(f"fastbert: {reason(error)}", file=sys.stderr)
        return 1
    return 0


def reason(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, FastbertError):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _end_with_stdin() -> None:
    """Whoever started this process is gone: it saves itself, and ends."""
    while os.read(0, 1024):  # not sys.stdin, whose lock would hold up the end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
