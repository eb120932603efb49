"""`fastbert glue`: the tasks, one after the other or one a device, and the table of all.

Below the run's folder stand TASK/seed-42/ (with a grid TASK/lr-...-batch-...-epochs-.../seed-42/),
each a run of `fastbert finetune classify`, then glue.json, glue.md and report.html.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from fastbert.data.parallel import available_cores
from fastbert.errors import RunError, UserError
from fastbert.finetune.glue_config import FREE, TASKS, GlueConfig
from fastbert.finetune.glue_data import other_folders, read_task, task_folders
from fastbert.finetune.glue_table import GlueResult, collect, write_tables
from fastbert.finetune.glue_task import reason, run_task, sequence_length
from fastbert.finetune.needs import needs
from fastbert.hf.load import load_tokenizer
from fastbert.settings import load_config, read_text, sealed_toml, settings, show
from fastbert.train.device import choose_device
from fastbert.train.interrupts import interruptible, noting_signals
from fastbert.train.prepare import held_run, say, write_whole

_DIGEST = "data.sha256"
_MODULE = "fastbert.finetune.glue_task"
_LOG = "log.txt"
_LOOK = 0.1  # seconds between looks at what the processes do


def glue(config: GlueConfig) -> GlueResult:
    """Runs the tasks as `config` says; one that fails does not stop the others.

    Returns:
        What they found; `failed` says why the others did not.

    Raises:
        UserError: a bad request: data, model, settings, or a run that began with other ones.
        RunError: a signal stopped it, and everything is saved.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    with interruptible(), held_run(config) as out:
        config = replace(config, out=str(out))
        needs("sklearn.metrics")
        sequence_length(config, load_tokenizer(config.model))
        devices = _devices(config)
        _check_same(config, out)
        sources = task_folders(config.data, config.names)
        missing = [name for name in config.names if name not in sources]
        if missing:
            say(f"data: {config.data} has no {', '.join(missing)}: left out")
        if others := other_folders(config.data):
            say(f"data: {', '.join(others)}: none of the {len(TASKS)} tasks, ignored")
        sizes, digests = _check_data(sources, out)
        write_whole(out / "config.toml", sealed_toml(replace(config, resume=False)))
        for name, digest in digests.items():
            (out / name).mkdir(exist_ok=True)
            write_whole(out / name / _DIGEST, f"{digest}\n")
        order = sorted(sources, key=lambda name: -sizes[name])
        failed = _Tasks(config, sources, devices).run(order)
        result = collect(config, [*sources], failed, missing)
        write_tables(config, result)
        return result


def _devices(config: GlueConfig) -> list[str]:
    """The device of each task that runs at the same time as others."""
    first = choose_device(config.device)
    if first.type == "cpu":
        return ["cpu"] * max(1, config.parallel)
    if config.device in ("auto", "cuda"):
        there = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    else:
        there = [str(first)]
    return [there[number % len(there)] for number in range(config.parallel or len(there))]


def _check_same(config: GlueConfig, out: Path) -> None:
    """What goes on must go on as it began: its runs stand in one table."""
    path = out / "config.toml"
    if not path.exists():
        return
    before = load_config(GlueConfig, path, {}, sealed=True)
    for one in settings(GlueConfig):
        now, was = getattr(config, one.name), getattr(before, one.name)
        if one.name not in FREE and now != was:
            raise UserError(
                f"{one.name} = {show(now)} differs from {show(was)} of the runs in {out}: leave it "
                "out to go on, or name another --out"
            )


def _check_data(sources: Mapping[str, Path], out: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Reads everything once, so that what is wrong is told before anything is trained.

    Returns:
        Characters of training text by task, and a digest of all examples.
    """
    sizes: dict[str, int] = {}
    digests: dict[str, str] = {}
    for name, folder in sources.items():
        data = read_task(name, folder)
        counts = "/".join(f"{len(part):,}" for part in data.evals.values())
        say(f"{name}: {folder}: {len(data.train):,} examples, {counts} to evaluate with")
        for note in data.notes:
            say(note)
        sizes[name], digests[name] = data.characters, data.digest
        kept = out / name / _DIGEST
        if kept.is_file() and read_text(str(kept), "a digest", 2**10).strip() != digests[name]:
            raise UserError(
                f"{folder}: holds other examples than the runs in {out / name} were trained with: "
                "put them back, or name another --out"
            )
    return sizes, digests


@dataclass
class _Process:
    """A task in a process of its own."""

    process: subprocess.Popen[bytes]
    name: str
    device: str
    log: IO[bytes]


class _Tasks:
    """Tasks, and where they run."""

    def __init__(
        self, config: GlueConfig, sources: Mapping[str, Path], devices: Sequence[str]
    ) -> None:
        self.config, self.sources, self.devices = config, sources, devices
        self.out = Path(config.out)
        self.failed: dict[str, str] = {}

    def run(self, order: Sequence[str]) -> dict[str, str]:
        """Runs them in this order, as many at once as there are devices; why some failed."""
        with noting_signals() as stop:
            if min(len(self.devices), len(order)) == 1:
                self._here(order, stop)
            else:
                self._in_processes(order, stop)
            if stop():
                raise RunError(
                    f"stopped by {stop()}; everything is saved: go on with the same command and "
                    f"--resume --out {self.out}"
                )
        return self.failed

    def _here(self, order: Sequence[str], stop: Callable[[], str]) -> None:
        device = choose_device(self.devices[0])
        for name in order:
            if stop():
                return
            try:
                run_task(self.config, name, self.sources[name], device, stop)
            except Exception as error:
                self._fail(name, reason(error), stop)

    def _fail(self, name: str, why: str, stop: Callable[[], str]) -> None:
        if not stop():
            self.failed[name] = why
            say(f"{name}: failed: {why}")

    def _in_processes(self, order: Sequence[str], stop: Callable[[], str]) -> None:
        waiting, free = [*order], [*self.devices]
        running: list[_Process] = []
        told = False
        try:
            while running or (waiting and not stop()):
                while waiting and free and not stop():
                    running.append(self._start(waiting.pop(0), free.pop(0)))
                if stop() and not told:
                    told = True
                    for one in running:
                        one.process.terminate()
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    free.append(one.device)
                    self._ended(one, stop)
                time.sleep(_LOOK)
        finally:
            for one in running:  # only where this process is interrupted once more
                one.process.terminate()
                _close(one)

    def _start(self, name: str, device: str) -> _Process:
        folder = self.out / name
        cores = self.config.num_threads or max(1, available_cores() // len(self.devices))
        log = (folder / _LOG).open("ab")
        given = [str(self.out), name, str(self.sources[name]), device, str(cores)]
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, *given],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # a terminal's Ctrl-C comes once, from here
        )
        say(f"{name}: begins on {device} (its log: {folder / _LOG})")
        return _Process(process, name, device, log)

    def _ended(self, one: _Process, stop: Callable[[], str]) -> None:
        _close(one)
        code = one.process.returncode
        if code == 0:
            say(f"{one.name}: is done")
            return
        lines = read_text(one.log.name, "a log", 2**30).splitlines() or [""]
        why = lines[-1].removeprefix("fastbert: ").removeprefix("error: ")
        self._fail(one.name, f"ended by signal {-code}" if code < 0 else why, stop)


def _close(one: _Process) -> None:
    one.log.close()
    if one.process.stdin is not None:
        with suppress(OSError):
            one.process.stdin.close()
