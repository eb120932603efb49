"""How a setting is made, checked, read and written; each one itself stands with its owner.

A configuration is a frozen dataclass whose fields carry name, default, unit, bounds and help as
metadata. Command-line options, TOML files, `--print-config` and validation all derive from the
fields (`settings`), so a new setting is one new line. Standard library only, so that a mistake is
told at once.
"""

import codecs
import hashlib
import json
import math
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, NamedTuple, Self, TypeVar, get_args

from fastbert.errors import UserError, did_you_mean

# Upper bounds far beyond every use, and far below what would fill a memory by a typing mistake.
MOST_TOKENS = 2**24  # of a batch: an H100 holds 2**17 of BERT base
LONGEST = 2**20  # tokens of a sequence
MOST_STEPS = 10**7  # BERT has 10**6, and each step's learning rate is kept
MOST = 2**31 - 1  # of what only counts
MOST_WORDS = 10**6  # that a tokenizer can learn
MOST_WORKERS = 256
MOST_AHEAD = 256
LARGEST_SEED = 2**63 - 1
MOST_DROPOUT = 0.99  # the kernels keep no bit beyond 0.998


class Group(NamedTuple):
    """Settings that stand together in `--help` and in a TOML file."""

    name: str
    help: str


_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
}


@dataclass(frozen=True)
class Setting:
    """One field of a configuration, as the command line, TOML and validation see it."""

    name: str
    type: type
    """bool, int, float or str."""
    optional: bool
    """Whether None is allowed."""
    default: Any
    help: str
    group: Group
    choices: tuple[str, ...] = ()
    pattern: str = ""
    """Regular expression of values allowed beside `choices`."""
    at_least: float | None = None
    more_than: float | None = None
    at_most: float | None = None
    less_than: float | None = None
    number_too: bool = False
    """Whether text may be given as a number."""
    schedule_too: bool = False
    """Whether text may stand for the number: what `fastbert.schedules.numbers` reads."""
    share_too: bool = False
    """Whether an integer may be given as a share of the whole, a number between 0 and 1."""
    aka: tuple[str, ...] = ()
    """Names that other programs give it: refused, and answered with ours."""

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")


def setting(default: Any, help: str, group: Group, **more: Any) -> Any:
    """A field of a configuration; what `more` may hold are the last fields of `Setting`."""
    return field(default=default, metadata={"help": help, "group": group, **more})


def settings(config_class: type) -> tuple[Setting, ...]:
    """Returns the settings of a configuration class, in the order of its fields."""
    found = []
    for f in fields(config_class):
        kinds = [kind for kind in (get_args(f.type) or (f.type,)) if kind is not NoneType]
        optional = NoneType in get_args(f.type)
        found.append(Setting(f.name, kinds[0], optional, f.default, **f.metadata))
    return tuple(found)


def known_as(name: str, known: Iterable[Setting]) -> Setting | None:
    """The setting that other programs call `name`, if there is one."""
    return next((one for one in known if name in one.aka), None)


def show(value: Any) -> str:
    """The value as a message shows it: what a file holds may be of any length and depth."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except RecursionError:
        return f"a deep {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:120]} ... ({len(text)} characters)"


def _bound(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def checked(setting: Setting, value: Any, where: str = "") -> Any:
    """Returns `value` in the setting's type once it is within bounds.

    An int is fine for a float, a whole float for an int that may be a share, a `pathlib.Path` for
    text, and "none", as on the command line, for None: TOML has no other word for it.

    Args:
        setting: what the value is for.
        value: what a file, the command line or a caller gave.
        where: "run.toml: " or the like, the start of the message.

    Raises:
        UserError: the type is wrong, or the value is out of bounds.
    """
    if setting.optional and (value is None or (isinstance(value, str) and value == "none")):
        return None
    shown = f"{where}{setting.name} = {show(value)}"
    if setting.schedule_too and type(value) is str:
        try:
            value = float(value)
        except ValueError:
            _check_text(setting, value, shown)
            return value
        shown = f"{where}{setting.name} = {value}"
    if setting.share_too and type(value) is float:
        if 0 < value < 1:
            return value
        value = int(value) if value.is_integer() else value
    if setting.type is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise UserError(f"{shown} must be a finite number") from None
    if setting.type is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if setting.number_too and type(value) in (int, float):
        value = repr(value)
    if type(value) is not setting.type:
        share = "whole steps, or a share of them between 0 and 1"
        raise UserError(f"{shown} must be {share if setting.share_too else _KINDS[setting.type]}")
    if isinstance(value, str):
        _check_text(setting, value, shown)
    elif isinstance(value, int | float):
        check_number(setting, value, shown)
    return value


def _check_text(setting: Setting, value: str, shown: str) -> None:
    if "\0" in value or not _is_utf8(value):
        raise UserError(f"{shown} must be text in UTF-8 without NUL characters")
    if not setting.choices or value in setting.choices:
        return
    if setting.pattern and re.fullmatch(setting.pattern, value):
        return
    raise UserError(f"{shown} must be {choices_text(setting)}")


def _is_utf8(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # a file name of undecodable bytes, which no TOML file can hold
        return False
    return True


def choices_text(setting: Setting) -> str:
    """Returns "auto, cpu, cuda or cuda:N"; empty where everything is allowed."""
    allowed = [*setting.choices]
    if setting.pattern:
        allowed.append(pattern_text(setting).replace("LANGUAGE", "a language's code (de, hi ...)"))
    return " or ".join(filter(None, [", ".join(allowed[:-1]), *allowed[-1:]]))


def pattern_text(setting: Setting) -> str:
    """Returns "cuda:N" for the pattern of a device, "LANGUAGE" for that of a code like "de"."""
    return re.sub(r"\[0-9\]\S*", "N", re.sub(r"\[a-z\]\S*", "LANGUAGE", setting.pattern))


def check_number(setting: Setting, value: float, shown: str) -> None:
    """Checks a number against the bounds of a setting.

    Args:
        setting: whose bounds.
        value: the number.
        shown: what the message begins with.

    Raises:
        UserError: it is out of bounds, or not finite.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{shown} must be a finite number")
    bounds = [
        (setting.at_least, "at least", lambda bound: value >= bound),
        (setting.more_than, "more than", lambda bound: value > bound),
        (setting.at_most, "at most", lambda bound: value <= bound),
        (setting.less_than, "less than", lambda bound: value < bound),
    ]
    given = [(bound, words, holds) for bound, words, holds in bounds if bound is not None]
    if not all(holds(bound) for bound, _, holds in given):
        raise UserError(f"{shown} must be " + " and ".join(f"{w} {_bound(b)}" for b, w, _ in given))


def check_fields(config: Any) -> None:
    """Checks each setting by itself, for `__post_init__`.

    Raises:
        UserError: the first that has a wrong type or is out of bounds.
    """
    for one in settings(type(config)):
        object.__setattr__(config, one.name, checked(one, getattr(config, one.name)))


def check_not_empty(config: Any, *names: str) -> None:
    """Refuses settings of text that are ''.

    Raises:
        UserError: one is.
    """
    for name in names:
        if not getattr(config, name):
            raise UserError(f"{name} = '' must not be empty")


def exists(path: str) -> bool:
    """Whether such a file or folder is there; no name is too odd to ask."""
    try:
        return os.path.exists(path)
    except ValueError:  # a NUL, or what no file name can hold
        return False


def read_text(path: str, kind: str, most_bytes: int) -> str:
    """A whole text file in UTF-8, with or without a byte order mark; line ends become "\\n".

    Raises:
        UserError: it cannot be read, or is something else; `kind` names what it should be.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > most_bytes:
        raise UserError(f"{path}: not {kind}: it is larger than {most_bytes >> 20} MiB")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise UserError(f"{path}: not {kind}: it looks like UTF-16 or UTF-32; convert it to UTF-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not {kind}: it must be text in UTF-8, which byte {error.start} is not"
        ) from None


def read_json(path: str) -> dict[str, Any]:
    """The one object that a JSON file holds.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    text = read_text(path, "JSON", 2**24)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # absurd numbers or nesting
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold one JSON object, not {type(content).__name__}")
    return content


class Config:
    """Base of configurations made by keywords, which answers one that is no setting."""

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Looks at the names only.

        Raises:
            UserError: there is no such setting; it says which one was meant.
        """
        if not given.keys() <= {one.name for one in fields(cls)}:  # type: ignore[arg-type]
            _known_values(cls, given, "")
        return super().__new__(cls)


Loaded = TypeVar("Loaded")


def load_config(
    config_class: type[Loaded],
    toml_path: str | os.PathLike[str] | None,
    overrides: Mapping[str, Any],
    *,
    sealed: bool = False,
) -> Loaded:
    """Returns the defaults, overridden by a TOML file, overridden by the command line.

    Args:
        config_class: a dataclass of settings.
        toml_path: file of flat `name = value` lines, or None.
        overrides: settings by name, already of their types.
        sealed: the file must be as `sealed_toml` made it.

    Raises:
        UserError: the file is missing or broken, a name is unknown, a value is wrong.
    """
    values: dict[str, Any] = {}
    if toml_path is not None:
        path = os.fspath(toml_path)
        whole = _has_seal(read_text(path, "TOML", _MOST_TOML))
        if sealed and not whole:
            raise UserError(
                f"{path}: was damaged or changed since the run wrote it: put it back or, if that "
                f"was you, give it as --config {path}"
            )
        if whole:  # what the version that wrote it did not know was as the defaults are
            values |= {one.name: one.default for one in settings(config_class)}
        values |= read_settings(config_class, path)
    values |= _known_values(config_class, overrides, "")
    return config_class(**values)


def read_settings(config_class: type, path: str) -> dict[str, Any]:
    """The settings by name that a TOML file holds, each checked by itself.

    Raises:
        UserError: the file is missing or broken, a name is unknown, a value is wrong.
    """
    return _known_values(config_class, _read_toml(path), f"{path}: ")


def _read_toml(path: str) -> dict[str, Any]:
    text = read_text(path, "TOML", _MOST_TOML)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        told = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error))
        if told:
            path, error_text = f"{path}:{told[2]}:{told[3]}", told[1]
        else:
            error_text = str(error)
        raise UserError(f"{path}: not TOML: {error_text}") from None


def _known_values(config_class: type, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    by_name = {one.name: one for one in settings(config_class)}
    for name, value in given.items():
        if name in by_name:
            continue
        if isinstance(value, dict):
            raise UserError(
                f"{where}[{name[:100]}] is a table: settings stand at the top, as name = value"
            )
        meant = known_as(name, by_name.values())
        told = f": did you mean {meant.name!r}?" if meant else did_you_mean(name, by_name)
        raise UserError(f"{where}unknown setting {show(name)}{told}")
    return {name: checked(by_name[name], value, where) for name, value in given.items()}


def to_toml(config: Any) -> str:
    """Returns the configuration as TOML that `load_config` reads back exactly.

    Settings stand in their groups, each below its help.
    """
    lines: list[str] = []
    group = None
    for one in settings(type(config)):
        if one.group != group:
            group = one.group
            lines += [*([""] if lines else []), f"## {group.name}: {group.help}"]
        allowed = choices_text(one)
        lines += ["", f"# {one.help}" + (f": {allowed}" if allowed else "")]
        lines.append(f"{one.name} = {toml_value(getattr(config, one.name))}")
    return "\n".join(lines) + "\n"


_SEAL = "\n# SHA-256 of what stands above: "
_MOST_TOML = 2**20


def sealed_toml(config: Any) -> str:
    """Returns `to_toml` with a last line that tells whether the file is still that."""
    text = to_toml(config)
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def _has_seal(text: str) -> bool:
    text, _, digest = text.rpartition(_SEAL)
    return digest == hashlib.sha256(text.encode()).hexdigest() + "\n"


def toml_value(value: bool | int | float | str | None) -> str:
    """A setting's value as TOML; None is "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # JSON's escapes are TOML's, but TOML escapes DEL as well
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
