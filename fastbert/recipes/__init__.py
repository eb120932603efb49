"""Recipes: settings that belong together, by name or in a file; each given beside one overrides it.

Those of the package are the TOML files beside this one. Standard library only, so that a mistake is
told at once.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from fastbert.errors import UserError, did_you_mean
from fastbert.settings import exists, read_settings, settings, show, toml_value

CLASSIC = "classic"
RECIPES = (CLASSIC, "fast")
_NO_GROUPS = ("run", "logs")
_NO_SETTINGS = ("recipe", "data", "init_from")
Made = TypeVar("Made")


def read_recipe(config_class: type, name: str) -> Mapping[str, Any]:
    """The settings of a recipe, each checked by itself.

    Args:
        config_class: whose settings they are.
        name: one of `RECIPES`, or the path of a TOML file.

    Raises:
        UserError: there is no such recipe, the file is broken, or it says where a run works.
    """
    return _read_ours(config_class, name) if name in RECIPES else _read(config_class, name)


@functools.cache
def _read_ours(config_class: type, name: str) -> Mapping[str, Any]:
    return _read(config_class, os.path.join(os.path.dirname(__file__), f"{name}.toml"))


def _read(config_class: type, path: str) -> Mapping[str, Any]:
    if not exists(path):
        if path.endswith(".toml") or os.path.dirname(path):
            raise UserError(f"recipe = {show(path)}: no such file")
        raise UserError(
            f"recipe = {show(path)} is not a recipe{did_you_mean(path, RECIPES)} "
            f"(recipes: {', '.join(RECIPES)}; else the path of a TOML file)"
        )
    found = read_settings(config_class, path)
    settable = _settable(config_class)
    for name in found:
        if name not in settable:
            raise UserError(
                f"{path}: {name} is no part of a recipe, it says where and on what a run works: "
                "give it beside the recipe"
            )
    return found


def _settable(config_class: type) -> set[str]:
    """The settings that a recipe may hold."""
    return {
        one.name
        for one in settings(config_class)
        if one.group.name not in _NO_GROUPS and one.name not in _NO_SETTINGS
    }


def with_recipes(config_class: type[Made]) -> type[Made]:
    """Has a dataclass of settings take from its `recipe` what it is not given.

    A value that is given counts, the default's as well, and what of the recipe does not fit it
    gives way; whoever gives all, as `dataclasses.replace` and a run's config.toml do, needs no
    recipe any more, and none is read.
    """
    plain: Any = config_class.__init__
    signature, settable = inspect.signature(plain), _settable(config_class)
    defaults = {one.name: one.default for one in fields(config_class)}  # type: ignore[arg-type]

    @functools.wraps(plain)
    def made(self: Any, *values: Any, **named: Any) -> None:
        given = dict(signature.bind(self, *values, **named).arguments)
        del given["self"]
        name = given.get("recipe", defaults["recipe"])
        name = os.fspath(name) if isinstance(name, os.PathLike) else name
        taken: dict[str, Any] = {}
        if isinstance(name, str) and not settable <= given.keys():  # else the check of types tells
            recipe = read_recipe(config_class, name)
            taken = {one: value for one, value in recipe.items() if one not in given}
        while True:
            try:
                return plain(self, **given, **taken)
            except UserError as error:
                unfit = [one for one in taken if f"{one} = " in str(error)]
                unfit = [one for one in unfit if taken[one] != defaults[one]]
                if not unfit:
                    raise
                _check_alone(config_class, plain, name, recipe)
            taken = {one: value for one, value in taken.items() if one not in unfit}

    config_class.__init__ = made  # type: ignore[method-assign]
    return config_class


def _check_alone(
    config_class: type, plain: Callable[..., None], name: str, recipe: Mapping[str, Any]
) -> None:
    """Raises UserError where the settings of a recipe do not fit each other."""
    try:
        plain(object.__new__(config_class), **recipe)
    except UserError as error:
        raise UserError(f"recipe = {show(name)}: {error}") from None


def of_recipe(config: Any) -> str:
    """One line: a configuration's recipe, what it changes, and what is otherwise.

    That was given, or is the default as the recipe's did not fit what was given.
    """
    try:
        recipe = read_recipe(type(config), config.recipe)
    except UserError:  # of a configuration that was written down whole
        return f"{config.recipe}, which cannot be read any more: all settings are given"
    defaults = {one.name: one.default for one in fields(config)}
    kept = {name: value for name, value in recipe.items() if getattr(config, name) == value}
    changes = {name: value for name, value in kept.items() if value != defaults[name]}
    others = {name: getattr(config, name) for name in recipe if name not in kept}
    line = config.recipe + (f": {_shown(changes)}" if changes else ", the defaults")
    return line + (f"; otherwise here: {_shown(others)}" if others else "")


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {toml_value(value)}" for name, value in values.items())
