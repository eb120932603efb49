"""One line for a model of transformers that is there already: its classes are swapped in place."""

from types import MethodType
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from fastbert.hf import models, relatives
from fastbert.hf.attention import asks_itself
from fastbert.hf.layers import note, own_forward
from fastbert.hf.models import Encoder

Model = TypeVar("Model", bound=nn.Module)


def theirs(ours: type) -> type:
    """transformers' class that one of ours is made of."""
    return next(base for base in ours.__mro__ if base.__module__.startswith("transformers."))


_BERT = {
    theirs(ours): ours
    for ours in vars(models).values()
    if isinstance(ours, type) and issubclass(ours, nn.Module)
}


def table() -> dict[type, type]:
    """Ours for each class of transformers, of BERT and all relatives that were imported."""
    return _BERT | relatives.imported()


def accelerate(model: Model) -> Model:
    """Makes every BERT inside a model fast, in place, and RoBERTa, ELECTRA and other relatives.

    Parameters, their names, configuration and outputs stay what they were: only the class of each
    module that is exactly one of transformers' becomes fastbert's of the same name. What is around
    it (PEFT, sentence-transformers, a Trainer's model) is left alone. Calling it again changes
    nothing.

    Args:
        model: any module with a BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA or DistilBERT inside.

    Returns:
        The same object.

    Raises:
        TypeError: `model` is no module.
        ValueError: none of these is inside.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch module, not a {type(model).__name__}")
    swaps = table()
    encoders = [
        module
        for module in model.modules()
        if issubclass(swaps.get(type(module), type(module)), Encoder)
    ]
    if encoders and not any(map(own_forward, encoders)):
        kind = type(encoders[0]).__name__
        raise ValueError(f"the forward of {kind} was replaced: accelerate it before that")
    if not encoders:
        raise ValueError(_refusal(model))
    _swap(model, swaps)
    return model


def _refusal(model: nn.Module) -> str:
    """Why a model cannot be accelerated, and what would help."""
    titles = ["BERT", *(family.title for family in relatives.FAMILIES)]
    takes = f"accelerate knows {', '.join(titles[:-1])} and {titles[-1]}"
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not found:
        return f"{type(model).__name__} holds no model of transformers: {takes}"
    names = ", ".join(dict.fromkeys(type(module).__name__ for module in found))
    known = table()
    for kind in (type(module) for module in found):
        near = next((base for base in kind.__mro__ if base in known), None)
        if near is not None:
            return f"{names}: {takes}, but no subclass such as {kind.__name__} of {near.__name__}"
    attentions: set[tuple[Any, bool]] = {
        (type(module), bool(module.is_causal))
        for module in model.modules()
        if hasattr(module, "is_causal")
    }
    own = any(causal or not asks_itself(kind) for kind, causal in attentions)
    reads = all(m._supports_attention_backend and m.main_input_name == "input_ids" for m in found)
    if attentions and reads and not own:
        takes += '; attn_implementation="fastbert" leaves the padding out of attention here, too'
    return f"{names} cannot be accelerated: {takes}"


def decelerate(model: Model) -> Model:
    """Gives every module that `accelerate` changed its class back; returns the same object."""
    _swap(model, {ours: base for base, ours in table().items()})
    return model


def _swap(model: nn.Module, swaps: dict[type, type]) -> None:
    for module in model.modules():
        other = swaps.get(type(module))
        if other is not None and _follows(module, other):
            module.__class__ = other
            vars(module).pop("_fastbert_stack", None)
        if isinstance(module, PreTrainedModel):
            # transformers looks up by the class's name what a model can record.
            registry: Any = output_capturing._CAN_RECORD_REGISTRY
            key = str(type(module)) if type(registry) is dict else module
            registry[key] = module._can_record_outputs


def _follows(module: nn.Module, other: type) -> bool:
    """Whether a call of a module will end in its new class's forward."""
    if "forward" not in vars(module):
        return True
    if own_forward(module):  # a hook of accelerate keeps it, for whole modules
        vars(module)["_old_forward"] = MethodType(other.forward, module)  # type: ignore[attr-defined]
        return True
    whose = "transformers' own" if other.__module__.startswith("fastbert.") else "fastbert's"
    note(f"{type(module).__name__}: its forward was replaced: it stays {whose}")
    return False
