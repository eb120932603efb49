"""Modules of an encoder layer with transformers' parameters and another forward.

Each is a mixin before transformers' own class, whose forward it calls where it cannot do better:
where no plan comes, because the model runs as in transformers, and where there is no kernel. A
module inside that is not plain (LoRA, quantised, with a hook) is called, never read.

T tokens, H hidden size, F intermediate size, A heads, D head dimension.
"""

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation

from fastbert.hf.dropout import draws_bytes
from fastbert.hf.dropout import dropout as dropped
from fastbert.hf.packing import Plan, attend, attend_with, dropout_seed
from fastbert.hf.recorded import is_traced
from fastbert.ops import MAX_WIDTH, Ops, triton_ops, why_no_kernels
from fastbert_kernels.attention_config import HEAD_SIZES

logger = logging.getLogger("fastbert")

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")


@torch.compiler.assume_constant_result
def note(line: str, level: int = logging.WARNING) -> None:
    """Says something once in a process; while a model is compiled or traced, too.

    Args:
        line: what is said.
        level: INFO for what was asked for; a line that nobody heard is said again.
    """
    if logger.isEnabledFor(level):
        _say(line, level)


@cache
def _say(line: str, level: int) -> None:
    logger.log(level, "%s", line)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether reading a module's parameters does what calling it would do.

    Not so of a subclass (LoRA, quantised, parametrised), with a patched forward (a model spread
    over devices), or with a hook, save transformers' own that record outputs.
    """
    if type(module) is not kind or "forward" in vars(module):
        return False
    return not hooked_everywhere() and only_records(vars(module))


def only_records(state: dict[str, Any]) -> bool:
    """Whether all hooks among a module's attributes are transformers' own that record outputs."""
    return all(
        hook.__module__ == "transformers.utils.output_capturing"
        for name in HOOKS
        for hook in state[name].values()
    )


def is_product(module: nn.Module) -> bool:
    """Whether a kernel may read a product: a plain `Linear` with a bias, of ordinary tensors.

    Quantised or distributed weights are tensors of their own kind in a plain module.
    """
    return is_plain(module, nn.Linear) and _has_tensors(module)


def is_norm(module: nn.Module) -> bool:
    """The same of a LayerNorm."""
    return is_plain(module, nn.LayerNorm) and _has_tensors(module)


def _has_tensors(module: Any) -> bool:
    return {type(module.weight), type(module.bias)} <= {nn.Parameter, Tensor}


def hooked_everywhere() -> bool:
    """Whether every module of the process has a hook."""
    of_all = torch.nn.modules.module
    return any(getattr(of_all, name, None) for name in _GLOBAL_HOOKS)


def own_forward(module: nn.Module) -> bool:
    """Whether a call ends in the class's forward; accelerate's hooks keep that aside."""
    if "forward" not in vars(module):
        return True
    return getattr(vars(module).get("_old_forward"), "__func__", None) is type(module).forward


def is_known(module: nn.Module | None) -> bool:
    """Whether a part treats each token by itself: it is transformers' own, or wrapped by torch.

    One that somebody wrote may look at `x[:, 0]`, or at a token's neighbours.
    """
    if module is None:
        return True
    return _of_known_make(type(module).forward) and own_forward(module)


@cache
def _of_known_make(forward: Any) -> bool:
    return forward.__module__.partition(".")[0] in ("transformers", "fastbert", "torch")


def is_of_libraries(module: nn.Module) -> bool:
    """Whether a module's forward is of those whose modules take whatever a head's input is."""
    make = type(module).forward.__module__.partition(".")[0]
    return own_forward(module) and make in ("fastbert", *_LIBRARIES)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's hook sees what goes in or out, expecting (batch, sequence, width).

    Hooks of libraries, which bring parameters or record outputs, do not count.
    """
    kept = vars(module)
    if not any(kept[name] for name in HOOKS):
        return False
    hooks = [hook for name in HOOKS for hook in kept[name].values()]
    return any((hook.__module__ or "").partition(".")[0] not in _LIBRARIES for hook in hooks)


def kernels_for(x: Tensor, *widths: int) -> Ops | None:
    """Our kernels, for rows of these widths where `x` lies; None: plain PyTorch."""
    if x.device.type != "cuda" or is_traced() or x.dtype == torch.float64:
        return None
    if not x.numel() or any(width % 8 or width > MAX_WIDTH for width in widths):
        return None
    # `allow_tf32` raises where somebody has set precisions by the names of torch 2.9 and newer.
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return _kernels(x.device, "tf32" if tf32 else "ieee")


@cache
def _kernels(device: torch.device, precision: str) -> Ops | None:
    why = why_no_kernels(device, 8, 8, HEAD_SIZES[0])
    note(f"no kernels on {device}, plain PyTorch: {why}" if why else f"Triton kernels on {device}",
         logging.WARNING if why else logging.INFO)  # fmt: skip
    return None if why else triton_ops(precision=precision)


class SelfAttention:
    """Attention over a plan's tokens; the projections are called, or joined for a kernel."""

    def forward(
        self: Any,
        hidden_states: Tensor,  # (1, T, H) with a plan, else (B, S, H)
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        fastbert_plan: Plan | None = None,
        **kwargs: Any,
    ) -> Any:
        if fastbert_plan is None:
            return super().forward(  # type: ignore[misc]
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        plan = fastbert_plan.to(hidden_states.device)
        A, D, x = self.num_attention_heads, self.attention_head_size, hidden_states[0]
        dropout_p = self.dropout.p if self.training else 0.0
        projections = (self.query, self.key, self.value)
        usual = D in HEAD_SIZES and self.scaling == D**-0.5 and dropout_p < 1.0
        ops = kernels_for(x) if usual else None
        if ops is None:
            q, k, v = (project(x) for project in projections)
            return attend(plan, q, k, v, A, dropout_p, self.scaling)[None], None
        if all(map(is_product, projections)):
            weight = torch.cat([one.weight for one in projections])
            qkv = F.linear(x, weight, torch.cat([one.bias for one in projections]))
        else:
            qkv = torch.cat([project(x) for project in projections], dim=1)
        context = attend_with(ops, plan, qkv.view(-1, 3, A, D), dropout_p)
        return context.flatten(1)[None], None


class AddNorm:
    """LayerNorm(dropout(x W + b) + residual), the end of both halves of a layer."""

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Any:
        return add_norm(hidden_states, input_tensor, self.dense, self.LayerNorm, self.dropout)


class Intermediate:
    """GELU(x W + b)."""

    def forward(self: Any, hidden_states: Tensor) -> Any:
        return linear_gelu(hidden_states, self.dense, self.intermediate_act_fn)


class Transform:
    """LayerNorm(GELU(x W + b)), where masked words are predicted from."""

    def forward(self: Any, hidden_states: Tensor) -> Any:
        return gelu_norm(hidden_states, self.dense, self.transform_act_fn, self.LayerNorm)


class Layer:
    """A layer that is the last, where not every token's output is read."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        *args: Any,
        fastbert_plan: Plan | None = None,
        **kwargs: Any,
    ) -> Any:
        plan = fastbert_plan
        if plan is None or plan.wanted is None or plan.last is not self:
            if plan is not None:
                kwargs["fastbert_plan"] = plan
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        wanted = plan.to(hidden_states.device).wanted
        assert wanted is not None
        # Of a token that nobody reads, the others need key and value only.
        context, _ = self.attention.self(hidden_states, fastbert_plan=plan)
        x = self.attention.output(
            context.index_select(1, wanted), hidden_states.index_select(1, wanted)
        )
        return self.feed_forward_chunk(x)


# What the modules above compute, of parts that other families name otherwise


def add_norm(x: Tensor, residual: Tensor, dense: Any, norm: Any, dropout: Any = None) -> Tensor:
    """norm(dropout(dense(x)) + residual), by a kernel where there is one."""
    plain = is_product(dense) and is_norm(norm)
    plain = plain and (dropout is None or is_plain(dropout, nn.Dropout))
    p = dropout.p if plain and dropout is not None and dropout.training else 0.0
    ops = kernels_for(x, residual.shape[-1]) if plain and p < 1.0 else None
    if ops is None:
        out = dense(x)
        if p and draws_bytes(out, p):
            out = dropped(out, p)
        elif dropout is not None:
            out = dropout(out)
        return norm(out + residual)
    x = F.linear(x, dense.weight)
    rows = x.view(-1, x.shape[-1])
    out = ops.dropout_add_layer_norm(
        rows, dense.bias, residual.to(x.dtype).reshape(rows.shape),
        norm.weight, norm.bias, norm.eps, p, dropout_seed(x.device, p), 1,
    )  # fmt: skip
    return out.view(x.shape)


def linear_gelu(x: Tensor, dense: Any, activation: Any) -> Tensor:
    """activation(dense(x)), by a kernel where that is GELU and there is one."""
    approximate = gelu_of(activation)
    ops = kernels_for(x, dense.out_features) if is_product(dense) else None
    if ops is None or approximate is None:
        return activation(dense(x))
    kind = product_dtype(x)
    rows = x.to(kind).reshape(-1, dense.in_features)
    out, _ = ops.linear_gelu_residual(rows, dense.weight.to(kind), dense.bias.to(kind), approximate)
    return out.view(*x.shape[:-1], dense.out_features)


def gelu_norm(x: Tensor, dense: Any, activation: Any, norm: Any) -> Tensor:
    """norm(activation(dense(x))), by a kernel where that is GELU and there is one."""
    approximate = gelu_of(activation)
    ops = kernels_for(x, dense.out_features) if is_product(dense) and is_norm(norm) else None
    if ops is None or approximate is None:
        return norm(activation(dense(x)))
    x = F.linear(x, dense.weight)
    out = ops.gelu_layer_norm(
        x.view(-1, x.shape[-1]), dense.bias, norm.weight, norm.bias, norm.eps, approximate
    )
    return out.view(x.shape)


def gelu_of(activation: Any) -> str | None:
    """How our kernels call an activation of transformers; None: it is none of theirs."""
    if type(activation) is GELUActivation:
        return "none" if activation.act is F.gelu else None
    return "tanh" if type(activation) in (NewGELUActivation, GELUTanh) else None


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of `x` comes in, under autocast or not."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
