"""An encoder's layers evaluated by reading their parameters instead of calling their modules.

Of a short text, a third of the time on a CPU is Python's: 20 modules a layer, each called through
torch's and transformers' wrappers. Here a layer is 16 calls of torch. What was found of the modules
is kept, and looked at again before every use: a module that was exchanged, subclassed, patched,
hooked or put into training sends the whole to the modules themselves.

T tokens, H hidden size.
"""

from itertools import chain, repeat
from operator import contains, itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import output_capturing

from fastbert.hf import layers
from fastbert.hf.packing import Plan, attend
from fastbert.hf.recorded import is_traced

_children_of = itemgetter("_modules")
_PROJECTIONS = ("query", "key", "value")
_WEIGHTS = {"weight", "bias"}
_disturbed = itemgetter("training", *layers.HOOKS)


class _Parts:
    """The modules of one layer that hold parameters, as the dictionaries these lie in."""

    def __init__(self, layer: Any) -> None:
        attention, first, last = layer.attention.self, layer.attention.output, layer.output
        self.layer, self.attention = layer, attention
        self.intermediate = layer.intermediate
        self.norms = first.LayerNorm, last.LayerNorm
        self.parameters = [
            vars(module)
            for module in (
                *(getattr(attention, name) for name in _PROJECTIONS),
                *(first.dense, first.LayerNorm),
                *(layer.intermediate.dense, last.dense, last.LayerNorm),
            )
        ]

    @staticmethod
    def can_be_read(layer: Any) -> bool:
        """Whether a layer is made of nothing but what `Stack` computes."""
        if not _is_made_of(layer, layers.Layer):
            return False
        end = {"dense": nn.Linear, "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout}
        parts: tuple[tuple[Any, type, dict[str, type]], ...] = (
            (layer.attention.self, layers.SelfAttention, dict.fromkeys(_PROJECTIONS, nn.Linear)),
            (layer.attention.output, layers.AddNorm, end),
            (layer.intermediate, layers.Intermediate, {"dense": nn.Linear}),
            (layer.output, layers.AddNorm, end),
        )
        return all(
            _is_made_of(part, mixin)
            and all(type(getattr(part, name)) is kind for name, kind in inside.items())
            for part, mixin, inside in parts
        )


def _is_idle(state: dict[str, Any]) -> bool:
    """Whether a module is in evaluation, and its hooks record for nobody."""
    nobody = output_capturing._active_collector.get() is None
    return nobody and not state["training"] and layers.only_records(state)


def _has_parameters(state: dict[str, Any]) -> bool:
    """False of a weight that was put in a parameter's place as a tensor of its own."""
    return state["_parameters"].keys() == _WEIGHTS


def _is_made_of(module: nn.Module, mixin: type) -> bool:
    """Whether a module's class is a mixin of ours and transformers' class, and no subclass."""
    return type(module).__mro__[1] is mixin


class Stack:
    """The layers of an encoder, as far as they can be read."""

    def __init__(self, stack: Any) -> None:
        self.stack = stack
        self.modules = list(stack.modules())
        self.kinds = [type(module) for module in self.modules]
        self.states = [vars(module) for module in self.modules]
        self.children = self._children()
        readable = all(map(_Parts.can_be_read, stack.layer))
        self.parts = [_Parts(layer) for layer in stack.layer] if readable else []
        self.read = list(chain.from_iterable(part.parameters for part in self.parts))

    def __reduce__(self) -> Any:
        """A copy, or what is read from a file, begins without one."""
        return type(None), ()

    def _children(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, map(_children_of, self.states))))

    @classmethod
    def of(cls, owner: Any, stack: Any, device: torch.device) -> "Stack | None":
        """What is kept with an encoder; None where the modules must be called.

        Args:
            owner: the encoder, where it is kept.
            stack: its module whose `layer` holds the layers.
            device: of the hidden states.
        """
        if device.type != "cpu" or is_traced() or layers.hooked_everywhere():
            return None
        kept: Stack | None = vars(owner).get("_fastbert_stack")
        if kept is None or not kept._is_of(stack):
            kept = vars(owner)["_fastbert_stack"] = cls(stack)
        disturbed = any(chain.from_iterable(map(_disturbed, kept.states)))
        if disturbed and not all(map(_is_idle, kept.states)):
            return None
        if any(map(contains, kept.states, repeat("forward"))):
            return None
        return kept if kept.parts and all(map(_has_parameters, kept.read)) else None

    def _is_of(self, stack: Any) -> bool:
        return (
            self.stack is stack
            and self._children() == self.children
            and list(map(type, self.modules)) == self.kinds
        )

    def __call__(self, x: Tensor, plan: Plan) -> Tensor:  # (T, H) -> (T, H), or what is wanted
        """The last hidden states."""
        for part in self.parts:
            wanted = plan.wanted if plan.last is part.layer else None
            x = _layer(part, x, plan, wanted)
        return x


def _layer(part: _Parts, x: Tensor, plan: Plan, wanted: Tensor | None) -> Tensor:
    query, key, value, out, norm, up, down, last_norm = (
        state["_parameters"] for state in part.parameters
    )
    context = attend(
        plan,
        F.linear(x, query["weight"], query["bias"]),
        F.linear(x, key["weight"], key["bias"]),
        F.linear(x, value["weight"], value["bias"]),
        part.attention.num_attention_heads,
        0.0,
        part.attention.scaling,
    )
    if wanted is not None:
        context, x = context.index_select(0, wanted), x.index_select(0, wanted)
    x = _add_norm(F.linear(context, out["weight"], out["bias"]), x, norm, part.norms[0])
    inner = part.intermediate.intermediate_act_fn(F.linear(x, up["weight"], up["bias"]))
    return _add_norm(F.linear(inner, down["weight"], down["bias"]), x, last_norm, part.norms[1])


def _add_norm(x: Tensor, residual: Tensor, norm: dict[str, Any], module: nn.LayerNorm) -> Tensor:
    return torch.layer_norm(
        x + residual, module.normalized_shape, norm["weight"], norm["bias"], module.eps
    )
