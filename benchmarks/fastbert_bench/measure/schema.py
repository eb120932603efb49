"""Whether a result fits `schema.json`: the keywords of JSON Schema that it uses, and no other.

Written here because a host that measures may lack the package jsonschema, and no measured figure
may wait for a package. `tests/bench/measure/test_result.py` holds it against that package.
"""

import json
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SCHEMA: Mapping[str, Any] = json.loads(
    Path(__file__).with_name("schema.json").read_text(encoding="utf-8")
)
NOTES = frozenset({"$schema", "$defs", "title", "description", "format"})
"""Keywords that ask for nothing; `format` neither, as in the package's default."""

Place = tuple[str | int, ...]


class MisfitError(ValueError):
    """Where a value does not fit a schema, and why: one line."""

    def __init__(self, place: Place, why: str) -> None:
        super().__init__(f"{'/'.join(map(str, place)) or 'the file'}: {why}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": lambda value: _is_number(value) and value % 1 == 0,
}


def _has_type(value: Any, types: str | list[str]) -> bool:
    return any(_TYPES[one](value) for one in ([types] if isinstance(types, str) else types))


def _equal(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


# Keyword -> whether a value and what stands beside the keyword agree, and what to say if not.
_RULES: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "type": (_has_type, "is not of type {}"),
    "const": (_equal, "is not {}"),
    "enum": (lambda value, known: any(_equal(value, one) for one in known), "is not one of {}"),
    "minimum": (lambda value, least: not _is_number(value) or value >= least, "is less than {}"),
    "maximum": (lambda value, most: not _is_number(value) or value <= most, "is more than {}"),
    "exclusiveMinimum": (
        lambda value, bound: not _is_number(value) or value > bound,
        "is not more than {}",
    ),
    "minLength": (
        lambda value, least: not isinstance(value, str) or len(value) >= least,
        "is shorter than {}",
    ),
}


def check(value: Any, schema: Mapping[str, Any] = SCHEMA) -> None:
    """Compares a value, as JSON gives it, with a schema.

    Args:
        value: a whole result, or another value for another schema.
        schema: with the keywords of `schema.json` and `$defs` of its own.

    Raises:
        MisfitError: it does not fit.
        KeyError: the schema uses another keyword.
    """
    _check(value, schema, schema, ())


def _check(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], place: Place) -> None:
    for keyword, asked in schema.items():
        if keyword in NOTES:
            continue
        if keyword == "$ref":
            _check(value, root["$defs"][asked.removeprefix("#/$defs/")], root, place)
        elif keyword == "properties":
            for key in asked if isinstance(value, dict) else ():
                if key in value:
                    _check(value[key], asked[key], root, (*place, key))
        elif keyword == "items":
            for index, item in enumerate(value if isinstance(value, list) else ()):
                _check(item, asked, root, (*place, index))
        elif keyword == "required":
            for key in asked if isinstance(value, dict) else ():
                if key not in value:
                    raise MisfitError(place, f"{key!r} is a required property")
        else:
            agrees, complaint = _RULES[keyword]
            if not agrees(value, asked):
                raise MisfitError(place, f"{reprlib.repr(value)} {complaint.format(asked)}")
