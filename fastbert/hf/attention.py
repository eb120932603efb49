"""`attn_implementation="fastbert"`: attention without padding for any encoder of transformers.

transformers looks an attention up by name, and by the same name the function that makes its masks.
For padding alone ours makes a mask that is the same for every query: a view, so that whatever a
model does to it stays right. The attention knows that view by its strides, computes the tokens that
it keeps, and leaves zeros at the others, as flash attention does there. All else (causal, sliding,
grouped heads, position biases, cross attention, a compiled model) is transformers' own `sdpa`, and
the log says so once.

B sequences padded to S, A heads, D head dimension, T tokens kept.
"""

import inspect
import re
import sys
from functools import cache
from logging import INFO
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from fastbert.hf.layers import kernels_for, note
from fastbert.hf.packing import Plan, attend_padded, attend_with
from fastbert.hf.recorded import is_traced
from fastbert_kernels.attention_config import HEAD_SIZES

NAME = "fastbert"


def register_attention() -> None:
    """Makes `attn_implementation="fastbert"` known to transformers; again does no harm.

    Importing `fastbert.hf.models` or calling `fastbert.accelerate` does this, too.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(**given: Any) -> Tensor | None:  # (B, 1, S, S) bool
    """The mask that transformers' `sdpa` gets, or None if nothing is padded.

    What only says which keys are padding is a view of it, the same for each query.

    Args:
        given: what transformers hands to the functions that make masks.

    Raises:
        ValueError: a model that looks up no attention, and would add this mask to its scores.
    """
    config: Any = given.get("config")
    if not _looks_up(type(config).__module__):
        raise ValueError(
            f'{config.model_type} has an attention of its own: attn_implementation="{NAME}" '
            'cannot replace it, "eager" is what it has'
        )
    padding, S = given.get("attention_mask"), given.get("q_length")
    if (
        padding is None
        or given.get("mask_function") is not bidirectional_mask_function
        or padding.shape != (given["batch_size"], S)
        or S != given["kv_length"]
        or given.get("kv_offset")
        or is_traced()
    ):
        made: Tensor | None = sdpa_mask(**given)
        return made
    if given.get("allow_is_bidirectional_skip") and bool(padding.all()):
        return None
    return _for_all_queries(padding, S)


def attention(
    module: nn.Module,
    query: Tensor,  # (B, A, S, D)
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # (B, S, A, D)
    """softmax(Q Kᵀ · scaling) V of the tokens that are no padding, zeros at the others."""
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = _for_all_queries(attention_mask != 0, query.shape[2])
    why = _why_not(module, query, key, value, attention_mask, dropout, kwargs)
    if why:
        note(f'{type(module).__name__}, attn_implementation="{NAME}": sdpa of transformers: {why}')
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    assert attention_mask is not None
    note(f"{type(module).__name__}: attention leaves the padding out, on {query.device.type}", INFO)
    B, A, S, D = query.shape
    plan = _plan(attention_mask).to(query.device)
    q, k, v = (x.transpose(1, 2).reshape(B * S, -1) for x in (query, key, value))
    scale = D**-0.5 if scaling is None else scaling
    ops = kernels_for(q) if D in HEAD_SIZES and scale == D**-0.5 else None
    if ops is None:
        return attend_padded(plan, q, k, v, A, dropout, scale).view(B, S, A, D), None
    rows = [x if plan.slots is None else plan.slots.collect(x) for x in (q, k, v)]
    qkv = torch.stack([x.view(-1, A, D) for x in rows], dim=1)
    context = attend_with(ops, plan, qkv, dropout).flatten(1)
    return plan.pad(context[None]).view(B, S, A, D), None


def _for_all_queries(attention_mask: Tensor, queries: int) -> Tensor:  # (B, S) -> (B, 1, S, S)
    return attention_mask[:, None, None, :].expand(-1, 1, queries, -1)


def _why_not(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> str:
    """Why the padding cannot be left out; empty: it can."""
    if is_traced() or torch._C._functorch.maybe_current_level() is not None:
        return "it is compiled, traced or transformed"
    if attention_mask is None:
        return "it has no mask"
    B, _, S, _ = query.shape
    if not query.shape == key.shape == value.shape:
        return "queries, keys and values of different shapes"
    by_key = attention_mask.shape == (B, 1, S, S) and attention_mask.stride(2) == 0
    if not by_key or attention_mask.dtype != torch.bool or S < 2:
        return "a mask of more than padding"
    for name in ("position_bias", "softcap", "cache", "output_attentions"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            return name
    if dropout >= 1.0:
        return "dropout of everything"
    kind: Any = type(module)
    if not asks_itself(kind):
        return "cross attention or convolutions, or it cannot be told"
    return ""


# A padded key's query is left out with it, which is right only where both are one token. Nothing
# says so, and lengths can be equal by chance. A convolution reads padding beside real tokens, too.
_CROSS = re.compile(r"cross_?att|encoder_(hidden_states|attention_mask)|key_value_states|kv_states")


@cache
def asks_itself(kind: Any) -> bool:
    """Whether a class attends from a sequence to itself, and nothing reads what padding gives.

    Its source says so: of the class if that is called self attention, else of the whole file.
    transformers reads a model's source for what it can do, too (`set_attn_implementation`).
    """
    if kind.__module__.startswith("fastbert."):
        kind = next(base for base in kind.__mro__ if base.__module__.startswith("transformers."))
    try:
        file = inspect.getsource(sys.modules[kind.__module__])
        own = inspect.getsource(kind) if "SelfAttention" in kind.__name__ else file
    except (KeyError, OSError, TypeError):
        return False
    return not _CROSS.search(own.lower()) and "Conv1d" not in file


@torch.compiler.assume_constant_result
def _looks_up(configuration: str) -> bool:
    """Whether models look attention up by name, as far as that is known of their configuration.

    transformers takes any registered name for any model.
    """
    return _files_look_up(configuration.rpartition(".")[0])


@cache
def _files_look_up(package: str) -> bool:
    files = [m for name, m in sys.modules.items() if name.startswith(f"{package}.modeling_")]
    try:
        sources = [inspect.getsource(file) for file in files]
    except OSError:  # there is none to be read
        return True
    return all("masking_utils" not in s or "ALL_ATTENTION_FUNCTIONS" in s for s in sources)


def _plan(attention_mask: Tensor) -> Plan:
    """The plan of a mask, made by the first layer that sees it and kept on it."""
    version = None if attention_mask.is_inference() else attention_mask._version
    known: tuple[int | None, Plan] | None = getattr(attention_mask, "_fastbert_plan", None)
    if known is None or known[0] != version:
        B, _, _, S = attention_mask.shape
        known = version, Plan.of(attention_mask[:, 0, 0], (B, S), attention_mask.device)
        attention_mask._fastbert_plan = known  # type: ignore[attr-defined]
    return known[1]


register_attention()
