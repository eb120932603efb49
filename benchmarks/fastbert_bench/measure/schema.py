"""Whether a result fits `schema.json`: the keywords of JSON Schema that it uses, and no other.

Written here because a host that measures may lack the package jsonschema, and no measured figure
may wait for a package. `tests/bench/measure/test_result.py` holds it against that package.
"""

import json
import operator
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


# Keyword -> the type of value that it speaks of, whether such a value and what stands beside the
# keyword agree, and what to say if not.
_RULES: dict[str, tuple[str, Callable[[Any, Any], bool], str]] = {
    "type": ("", _has_type, "is not of type {}"),
    "const": ("", _equal, "is not {}"),
    "enum": ("", lambda value, known: any(_equal(value, one) for one in known), "is not one of {}"),
    "minimum": ("number", operator.ge, "is less than {}"),
    "maximum": ("number", operator.le, "is more than {}"),
    "exclusiveMinimum": ("number", operator.gt, "is not more than {}"),
    "minLength": ("string", lambda value, least: len(value) >= least, "is shorter than {}"),
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
    is_object, items = isinstance(value, dict), value if isinstance(value, list) else ()
    for keyword, asked in schema.items():
        match keyword:
            case "$ref":
                _check(value, root["$defs"][asked.removeprefix("#/$defs/")], root, place)
            case "properties":
                for key in (one for one in asked if is_object and one in value):
                    _check(value[key], asked[key], root, (*place, key))
            case "items":
                for index, item in enumerate(items):
                    _check(item, asked, root, (*place, index))
            case "required":
                for key in (one for one in asked if is_object and one not in value):
                    raise MisfitError(place, f"{key!r} is a required property")
            case _ if keyword not in NOTES:
                kind, agrees, complaint = _RULES[keyword]
                if (not kind or _TYPES[kind](value)) and not agrees(value, asked):
                    raise MisfitError(place, f"{reprlib.repr(value)} {complaint.format(asked)}")
