"""`fastbert pretrain` and `fastbert.pretrain`: check the request, and hand it to the loop."""

from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastbert.commands.checks import check_folder, check_path
from fastbert.commands.options import Commands, typed
from fastbert.config import PretrainConfig, check_positions
from fastbert.errors import UserError
from fastbert.settings import load_config, to_toml
from fastbert.train.interrupts import held_signals

if TYPE_CHECKING:
    from fastbert.train.callbacks import Callback, PretrainResult


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add(
        "pretrain", "train a BERT from raw text", run, PretrainConfig, "[--config FILE]"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file of settings; options override it"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print all settings as TOML and stop"
    )


def run(args: Namespace) -> None:
    """Trains, or prints what it would train with.

    Raises:
        FastbertError: see `pretrain`.
    """
    config = _asked(args.config, typed(args))
    if args.print_config:
        print(to_toml(config), end="")
        return
    pretrain(config)


def pretrain(config: PretrainConfig, callbacks: "Iterable[Callback]" = ()) -> "PretrainResult":
    """Trains a BERT from raw text, exactly as `fastbert pretrain` does.

    In the main thread a signal (Ctrl-C, SIGTERM, SIGHUP) saves a checkpoint and ends the run with
    a `RunError`, as it ends the command; in others signals are the program's own.

    Args:
        config: everything there is to set.
        callbacks: `fastbert.Callback` objects that are told what the run logs, evaluates and
            saves, and may stop it.

    Raises:
        UserError: a bad request: missing files, a folder that holds another run, a model that
            cannot fit.
        RunError: the run failed (disk full, gradients not finite) or a signal stopped it.
        Interrupted: a `KeyboardInterrupt`: a signal came before or after the training.
        Exception: a callback raised it; the run has saved a checkpoint.
    """
    if not isinstance(config, PretrainConfig):
        raise UserError("config must be a fastbert.PretrainConfig")
    check(config)
    with held_signals():
        from fastbert.hf.export import check_tokenizer, export_run
        from fastbert.hf.initial import read_initial
        from fastbert.train import loop

    return loop.pretrain(config, export_run, check_tokenizer, read_initial, callbacks)


def _asked(file: str | None, overrides: dict[str, Any]) -> PretrainConfig:
    """Without a file, a run that goes on keeps its settings: only what was typed changes."""
    if file is None and overrides.get("resume"):
        check_path("resume", overrides["resume"], words=("auto",))
        from fastbert.train.prepare import run_folder

        where = {name: value for name, value in overrides.items() if name in ("resume", "out")}
        run = run_folder(load_config(PretrainConfig, None, where))
        if (run / "config.toml").exists():
            overrides = overrides | {"out": str(run)}
            return load_config(PretrainConfig, run / "config.toml", overrides, sealed=True)
    return load_config(PretrainConfig, file, overrides)


def check(config: PretrainConfig) -> None:
    """Checks what only the file system can tell, before anything slow is imported.

    Raises:
        UserError: a path does not exist, or the model cannot take the sequences.
    """
    check_path("data", config.data, words=("builtin",))
    if not config.resume:  # a run keeps its own
        check_positions(config.sizes_from, config.max_seq_length)
        check_path("tokenizer", config.tokenizer, words=("auto", "train"))
        if not config.add_tokens.isdecimal():
            check_path("add_tokens", config.add_tokens, words=("",))
    check_path("resume", config.resume, words=("", "auto"))
    check_folder("out", config.out)
