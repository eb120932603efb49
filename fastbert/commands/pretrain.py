"""`fastbert pretrain`: checks the request, and hands it to the training loop."""

from argparse import Namespace
from typing import Any

from fastbert.commands.checks import check_folder, check_path
from fastbert.commands.options import Commands, typed
from fastbert.config import PretrainConfig, check_positions
from fastbert.settings import load_config, to_toml
from fastbert.train.interrupts import held_signals


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
        FastbertError: see `fastbert.train.loop.pretrain`.
    """
    config = _asked(args.config, typed(args))
    if args.print_config:
        print(to_toml(config), end="")
        return
    check(config)
    with held_signals():
        from fastbert.hf.export import check_tokenizer, export_run
        from fastbert.hf.initial import read_initial
        from fastbert.train.loop import pretrain

    pretrain(config, export=export_run, check_tokenizer=check_tokenizer, read_initial=read_initial)


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
