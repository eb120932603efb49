"""One line for a model of transformers that is there already: its classes are swapped in place."""

from types import MethodType
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from fastbert.hf import models
from fastbert.hf.layers import note
from fastbert.hf.models import Encoder

Model = TypeVar("Model", bound=nn.Module)


def _table() -> dict[type, type]:
    """transformers' class of each of ours."""
    table = {}
    for ours in vars(models).values():
        if isinstance(ours, type) and issubclass(ours, nn.Module):
            base = next(b for b in ours.__mro__ if b.__module__.startswith("transformers."))
            table[base] = ours
    return table


TABLE = _table()
_BACK = {ours: base for base, ours in TABLE.items()}


def accelerate(model: Model) -> Model:
    """Makes every BERT inside a model fast, in place.

    Parameters, their names, configuration and outputs stay what they were: only the class of each
    module that is exactly one of transformers' BERT classes becomes fastbert's of the same name.
    What is around it (PEFT, sentence-transformers, a Trainer's model) is left alone. Calling it
    again changes nothing.

    Args:
        model: any module with a BERT somewhere inside.

    Returns:
        The same object.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no BERT inside.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch module, not a {type(model).__name__}")
    _swap(model, TABLE)
    if not any(isinstance(module, Encoder) for module in model.modules()):
        kinds = ", ".join(sorted(c.__name__ for c in _BACK if issubclass(c, Encoder)))
        found = {type(m).__name__ for m in model.modules() if isinstance(m, PreTrainedModel)}
        what = f"{', '.join(sorted(found))} in it" if found else "nothing of transformers in it"
        raise ValueError(f"{type(model).__name__} holds none of {kinds}: {what}")
    return model


def decelerate(model: Model) -> Model:
    """Gives every module that `accelerate` changed its class back; returns the same object."""
    _swap(model, _BACK)
    return model


def _swap(model: nn.Module, table: dict[type, type]) -> None:
    for module in model.modules():
        other = table.get(type(module))
        if other is not None and _follows(module, other):
            module.__class__ = other
        if isinstance(module, PreTrainedModel):
            # transformers looks up by the class's name what a model can record.
            registry: Any = output_capturing._CAN_RECORD_REGISTRY
            key = str(type(module)) if type(registry) is dict else module
            registry[key] = module._can_record_outputs


def _follows(module: nn.Module, other: type) -> bool:
    """Whether a call of a module will end in its new class's forward."""
    kept: Any = vars(module).get("_old_forward")  # by a hook of accelerate, for whole modules
    if "forward" not in vars(module):
        return True
    if getattr(kept, "__func__", None) is type(module).forward:
        vars(module)["_old_forward"] = MethodType(other.forward, module)  # type: ignore[attr-defined]
        return True
    whose = "fastbert's" if other in TABLE else "transformers' own"
    note(f"{type(module).__name__}: its forward was replaced: it stays {whose}")
    return False
