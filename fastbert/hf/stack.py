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
from fastbert.hf.frozen import PackedLayer, why_not
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
        self.packed: list[PackedLayer] = []
        self.dtype = torch.float32
        """That `packed` computes in."""

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

    def pack(self, dtype: torch.dtype) -> None:
        """Lays out the weights for products in `dtype`; what changes them ends that."""
        self.packed = [PackedLayer(part.parameters, dtype) for part in self.parts]
        self.dtype = dtype

    def __call__(self, x: Tensor, plan: Plan) -> Tensor:  # (T, H) -> (T, H), or what is wanted
        """The last hidden states."""
        packed = self._usable(x)
        for place, part in enumerate(self.parts):
            wanted = plan.wanted if plan.last is part.layer else None
            if packed:
                x = _packed_layer(part, packed[place], x, plan, wanted)
            else:
                x = _layer(part, x, plan, wanted)
        return x

    def _usable(self, x: Tensor) -> list[PackedLayer]:
        if not self.packed or torch.is_grad_enabled() or layers.product_dtype(x) != self.dtype:
            return []
        if not all(map(PackedLayer.is_current, self.packed)):
            self.packed = []
        return self.packed


def _packed_layer(
    part: _Parts, packed: PackedLayer, x: Tensor, plan: Plan, wanted: Tensor | None
) -> Tensor:
    norm, last_norm = (part.parameters[place]["_parameters"] for place in (4, 7))
    dtype = packed.out.bias.dtype
    x = x.to(dtype)
    q, k, v = packed.joined(x).chunk(3, dim=1)
    heads, scale = part.attention.num_attention_heads, part.attention.scaling
    context = attend(plan, q, k, v, heads, 0.0, scale)
    if wanted is not None:
        context, x = context.index_select(0, wanted), x.index_select(0, wanted)
    x = _norm(packed.out.plus(context, x), norm, part.norms[0])
    activation = part.intermediate.intermediate_act_fn
    approximate = layers.gelu_of(activation)
    if approximate is None:
        inner = activation(packed.up(x))
    else:
        inner = packed.up.gelu(x, approximate)
    return _norm(packed.down.plus(inner, x), last_norm, part.norms[1])


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
    return _norm(x + residual, norm, module)


def _norm(x: Tensor, norm: dict[str, Any], module: nn.LayerNorm) -> Tensor:
    return torch.layer_norm(x, module.normalized_shape, norm["weight"], norm["bias"], module.eps)


def freeze(model: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """Lays out the weights of an accelerated model's encoder for a CPU, where that helps.

    Outputs stay what they were, but for rounding. Where a weight is changed in place or exchanged,
    the model goes on without; nothing notices a change through `.data`.

    Args:
        model: whose weights are to stay as they are.
        dtype: that it will be computed in: fp32, or bf16 by autocast.

    Returns:
        Why nothing was done; "" otherwise.
    """
    for owner in (module for module in model.modules() if hasattr(module, "last_states")):
        stack = owner._stack()  # type: ignore[operator]
        weight = next(stack.parameters(), None)
        if weight is None:
            return "it has no layers"
        why = why_not(weight, dtype)
        read = None if why else Stack.of(owner, stack, weight.device)
        if read is None:
            return why or "its layers are called, not read"
        read.pack(dtype)
    return ""
