"""Settings as command-line options, and commands as what may stand after `fastbert`.

Options come from the fields of a configuration. Whoever owns commands adds them to a `Commands`.
"""

import argparse
import re
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn

from fastbert.config import PretrainConfig
from fastbert.errors import UserError, did_you_mean
from fastbert.settings import Setting, known_as, load_config, pattern_text, settings

Run = Callable[[Namespace], None]
_METAVARS = {int: "N", float: "X", str: "TEXT"}


class Parser(argparse.ArgumentParser):
    """One whose complaint is a `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


class Commands:
    """The commands that may stand after `fastbert`, or below one of those.

    Args:
        parser: what they stand below.
        title, metavar: what `--help` calls them.
        path: what is typed before them.
    """

    def __init__(self, parser: Parser, title: str, metavar: str, path: str = "fastbert") -> None:
        self._parsers = parser.add_subparsers(title=title, metavar=metavar)
        self.path = path
        self.names: dict[str, Commands | None] = {}

    def add(
        self, name: str, help: str, run: Run, config_class: type | None = None, usage: str = ""
    ) -> argparse.ArgumentParser:
        """Adds a command and returns its parser.

        Args:
            name: of the command.
            help: what it does, in a few words.
            run: takes what was parsed; see `given`.
            config_class: its settings become options.
            usage: what stands before the settings.
        """
        self.names[name] = None
        more = "[--SETTING VALUE ...]" if config_class else ""
        parser: argparse.ArgumentParser = self._parsers.add_parser(
            name,
            help=help,
            usage=" ".join(filter(None, [self.path, name, usage, more])),
            description=help[0].upper() + help[1:] + ".",
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
        )
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        parser.set_defaults(run=run, config_class=config_class, parser=parser)
        if config_class is not None:
            _add_settings(parser, config_class)
        return parser

    def group(self, name: str, help: str, title: str, metavar: str) -> "Commands":
        """Adds a word that commands stand below."""
        parser = self._parsers.add_parser(name, help=help, allow_abbrev=False)
        below = self.names[name] = Commands(parser, title, metavar, f"{self.path} {name}")
        return below

    def check(self, argv: list[str], missing: dict[str, str]) -> None:
        """Says in one line which command was meant; argparse would list them all.

        Args:
            argv: what stands after `path`, not empty.
            missing: commands that are not there, and why.

        Raises:
            UserError: there is no such command.
        """
        command, *rest = argv
        known = ", ".join(self.names)
        what = " ".join(self.path.split()[1:])
        if command.startswith("-") and what:
            first = next(iter(self.names))
            raise UserError(f"{what} needs one of {known}: {self.path} {first}")
        if command.startswith("-"):
            right = f"write fastbert COMMAND {command}"
            raise UserError(f"{command} stands before the command: {right}")
        if command in missing:
            raise UserError(f"{self.path} {command}: {missing[command]}")
        if command not in self.names:
            meant = did_you_mean(command, self.names)
            raise UserError(f"unknown {what or 'command'} {command!r}{meant} ({known})")
        below = self.names[command]
        if below is not None and rest[:1] not in (["-h"], ["--help"]):
            below.check(rest or ["-"], {})


def _add_settings(parser: argparse.ArgumentParser, config_class: type) -> None:
    groups: dict[str, Any] = {}
    for setting in settings(config_class):
        name, help = setting.group
        if name not in groups:
            groups[name] = parser.add_argument_group(f"{name}: {help}")
        # Absent options leave no trace, so that a TOML file is overridden only by what was typed.
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(setting)}
        if setting.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif setting.choices:
            allowed = [*setting.choices, *filter(None, [pattern_text(setting)])]
            options["metavar"] = "{" + ",".join(allowed) + "}"
        else:
            options["metavar"] = _METAVARS[setting.type]
        groups[name].add_argument(setting.flag, **options)


def _help(setting: Setting) -> str:
    text = setting.help
    if setting.default not in (None, ""):
        default = setting.default
        text += f" (default: {str(default).lower() if setting.type is bool else default})"
    return text.replace("%", "%%")


def typed(args: Namespace) -> dict[str, Any]:
    """The settings that were typed, by name, in their types.

    Raises:
        UserError: one is no number, but must be.
    """
    known, values = settings(args.config_class), vars(args)
    return {one.name: _parse(one, values[one.name]) for one in known if one.name in values}


def _parse(setting: Setting, text: str | bool) -> Any:
    if isinstance(text, bool) or setting.type is str:
        return text
    if setting.optional and text == "none":
        return None
    for kind in (int, float) if setting.share_too else (setting.type,):
        with suppress(ValueError):
            return kind(text)
    if setting.schedule_too:
        return text
    wanted = "an integer" if setting.type is int and not setting.share_too else "a number"
    raise UserError(f"{setting.flag} {text}: must be {wanted}")


def given(args: Namespace) -> Any:
    """The command's configuration, as its options say.

    Raises:
        UserError: a setting is wrong.
    """
    return load_config(args.config_class, None, typed(args))


def refuse(argument: str, args: Namespace) -> NoReturn:
    """Says which option was meant.

    Raises:
        UserError: always.
    """
    if not argument.startswith("-"):
        raise UserError(f"unexpected argument {argument!r}")
    option = argument.split("=")[0]
    known: Iterable[Setting] = settings(args.config_class) if args.config_class else ()
    name = option.lstrip("-").replace("-", "_")
    meant = known_as(name, known)
    if meant is not None:
        value = f" {name}" if name in meant.choices else ""
        raise UserError(f"unknown option {option}: did you mean {meant.flag}{value}?")
    flags = dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]+", args.parser.format_help()))
    pretrains = settings(PretrainConfig)
    other = known_as(name, pretrains) or next((one for one in pretrains if one.name == name), None)
    none = ""
    if other and other.flag not in flags:
        none = f": {args.parser.prog} has no {other.name.replace('_', ' ')}"
    raise UserError(f"unknown option {option}{none}{did_you_mean(option, flags)}")


def join_negative_numbers(argv: list[str]) -> list[str]:
    """Turns `--x -1e-3` into `--x=-1e-3`: argparse takes -1e-3 for an option."""
    joined: list[str] = []
    for token in argv:
        is_negative = re.fullmatch(r"-(\.?\d.*|inf|nan)", token)
        if is_negative and joined and re.fullmatch(r"--[a-z0-9-]+", joined[-1]):
            joined[-1] += f"={token}"
        else:
            joined.append(token)
    return joined
