"""`fastbert finetune TASK` and `fastbert.fine_tune`: check the request, and hand it to the runs."""

import tomllib
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastbert.commands.checks import check_folder, check_path
from fastbert.commands.options import Commands, typed
from fastbert.errors import UserError
from fastbert.finetune.config import CONFIGS, DEMO, DEMOS, FinetuneConfig
from fastbert.settings import load_config, settings, to_toml
from fastbert.train.interrupts import held_signals

if TYPE_CHECKING:
    from fastbert.finetune.loop import FinetuneResult

_HELP = {
    "classify": "a label for a text or a pair: one, several, or a number",
    "tag": "a tag for each word: entities, parts of speech",
    "answer": "the span of a paragraph that answers a question",
    "choose": "the right one among several answers",
    "embed": "vectors that lie near each other for texts that belong together",
}


# Of a small model that has learnt little: large rates, chosen for 3 minutes on 2 cores.
_DEMO: dict[str, dict[str, Any]] = {
    "classify": {"learning_rate": 1e-3, "num_train_epochs": 4.0},
    "tag": {"learning_rate": 1e-3, "num_train_epochs": 6.0},
    "answer": {"learning_rate": 1e-3, "num_train_epochs": 3.0, "max_seq_length": 128},
}


def add(commands: Commands) -> None:
    """Adds the command, a task each."""
    tasks = commands.group("finetune", "train a model for a task", "tasks", "TASK")
    for task, config_class in CONFIGS.items():
        parser = tasks.add(
            task, _HELP[task], run, config_class, "--model DIR --train FILE [--config FILE]"
        )
        parser.add_argument(
            "--config", metavar="FILE", help="TOML file of settings; options override it"
        )
        parser.add_argument(
            "--print-config", action="store_true", help="print all settings as TOML and stop"
        )
        if task in DEMOS:
            parser.add_argument(
                "--demo", action="store_true",
                help=f"the same as --train {DEMO}, with the newest model of runs/ and its settings",
            )  # fmt: skip


def run(args: Namespace) -> None:
    """Fine-tunes, or prints what it would do.

    Raises:
        FastbertError: see `fine_tune`.
    """
    overrides = typed(args)
    if getattr(args, "demo", False):
        overrides = {**_DEMO[args.config_class.task], "train": DEMO, **overrides}
        if "model" not in overrides and not overrides.get("resume"):
            overrides["model"] = _newest_model()
    config = _asked(args.config_class, args.config, overrides)
    if args.print_config:
        print(to_toml(config), end="")
        return
    result = fine_tune(config)
    for name, value in result.metrics.items():
        spread = result.seeds.get(name)
        if spread is None or spread.deviation is None:
            print(f"{name}: {value:.4g}")
        else:
            print(f"{name}: {spread.mean:.4g} ± {spread.deviation:.2g}")
    print(f"report: {result.folder / 'report.html'}")
    print(f"model: {result.hf} (fastbert predict --model {result.folder} --input FILE)")


def _newest_model() -> str:
    from fastbert.finetune.demo import newest_model

    return newest_model()


def fine_tune(config: FinetuneConfig) -> "FinetuneResult":
    """Fine-tunes a model, exactly as `fastbert finetune TASK` does.

    Args:
        config: `fastbert.ClassifyConfig`, `TagConfig`, `AnswerConfig`, `ChooseConfig` or
            `EmbedConfig`.

    Raises:
        UserError: a bad request: files, columns or labels, a model that is none.
        RunError: the run failed, or a signal stopped it.
    """
    if not isinstance(config, FinetuneConfig) or not config.task:
        names = ", ".join(one.__name__ for one in CONFIGS.values())
        raise UserError(f"config must be one of fastbert's {names}")
    config.check_given()
    check_path("model", config.model, words=())
    check_folder("out", config.out)
    with held_signals():
        from fastbert.finetune.runs import finetune as run_all

    return run_all(config)


def _asked(
    config_class: type[FinetuneConfig], file: str | None, overrides: dict[str, Any]
) -> FinetuneConfig:
    """Without a file, a run that goes on keeps its settings: only what was typed changes."""
    if file is None and overrides.get("resume"):
        from fastbert.train.prepare import run_folder

        where = _Where(overrides.get("out", "auto"))
        run = run_folder(where)
        if not (run / "config.toml").exists():
            raise UserError(f"resume: {run} holds no run of fastbert finetune")
        _check_task(config_class, run)
        overrides = overrides | {"out": str(run)}
        return load_config(config_class, run / "config.toml", overrides, sealed=True)
    return load_config(config_class, file, overrides)


def _check_task(config_class: type[FinetuneConfig], run: Path) -> None:
    """Refuses the run of another task, by the settings that its config.toml names."""
    with suppress(OSError, ValueError):
        written = tomllib.loads((run / "config.toml").read_text(encoding="utf-8")).keys()
        known = {task: {one.name for one in settings(c)} for task, c in CONFIGS.items()}
        asked = config_class.task
        tasks = [task for task, names in known.items() if written <= names]
        if tasks and asked not in tasks:
            raise UserError(f"{run} is a run of fastbert finetune {tasks[0]}, not of {asked}")


class _Where:
    """What a run's folder is found by, before its settings are read."""

    command: ClassVar[str] = FinetuneConfig.command
    resume = True

    def __init__(self, out: str) -> None:
        self.out = out
