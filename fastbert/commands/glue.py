"""`fastbert glue`: what people judge an encoder by, in one command."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any, ClassVar

from fastbert.commands.checks import check_folder, check_path
from fastbert.commands.options import Commands, typed
from fastbert.errors import RunError, UserError
from fastbert.finetune.glue_config import GlueConfig
from fastbert.settings import load_config, to_toml
from fastbert.train.interrupts import held_signals

if TYPE_CHECKING:
    from fastbert.finetune.glue_table import GlueResult


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add(
        "glue",
        "fine-tune a model for each of GLUE's tasks, and print the table",
        run,
        GlueConfig,
        "--model DIR --data DIR [--config FILE]",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file of settings; options override it"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings as TOML and stop"
    )


def run(args: Namespace) -> None:
    """Runs the tasks and prints the table.

    Raises:
        FastbertError: see `glue`; a task failed.
    """
    config = _asked(args.config, typed(args))
    if args.print_config:
        print(to_toml(config), end="")
        return
    result = glue(config)
    print(result.markdown)
    print(f"report: {result.folder / 'report.html'}")
    if result.failed:
        whys = "; ".join(f"{name}: {why}" for name, why in result.failed.items())
        count = len(result.failed) + len(result.tasks)
        raise RunError(f"{len(result.failed)} of {count} tasks failed: {whys}")


def glue(config: GlueConfig) -> "GlueResult":
    """Runs GLUE's tasks, exactly as `fastbert glue` does.

    Args:
        config: of all tasks.

    Raises:
        UserError: a bad request: data, model, settings.
        RunError: a signal stopped it.
    """
    check_path("model", config.model, words=())
    check_path("data", config.data, words=())
    check_folder("out", config.out)
    with held_signals():
        from fastbert.finetune.glue import glue as run_all

    return run_all(config)


def _asked(file: str | None, overrides: dict[str, Any]) -> GlueConfig:
    """Without a file, runs that go on keep their settings: only what was typed changes."""
    if file is None and overrides.get("resume"):
        from fastbert.train.prepare import run_folder

        out = run_folder(_Where(overrides.get("out", "auto")))
        if not (out / "config.toml").exists():
            raise UserError(f"resume: {out} holds no runs of fastbert glue")
        return load_config(
            GlueConfig, out / "config.toml", overrides | {"out": str(out)}, sealed=True
        )
    return load_config(GlueConfig, file, overrides)


class _Where:
    """What the runs' folder is found by, before its settings are read."""

    command: ClassVar[str] = GlueConfig.command
    resume = True

    def __init__(self, out: str) -> None:
        self.out = out
