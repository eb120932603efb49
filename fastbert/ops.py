"""The only door to kernels: a frozen bundle of ops, chosen once and passed down to the model."""

import importlib.util
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fastbert_kernels import main_grad, reference, reference_optimizer
from fastbert_kernels.attention_config import HEAD_SIZES
from fastbert_kernels.cpu import CpuOps
from fastbert_kernels.main_grad import MainGrad as MainGrad  # for the flat buffers
from fastbert_kernels.reference_optimizer import Buffers as Buffers
from fastbert_kernels.reference_optimizer import Hyperparameters as Hyperparameters

Op = Callable[..., Tensor]
OpAndResidual = Callable[..., tuple[Tensor, Tensor]]

MAX_WIDTH = 4096


@dataclass(frozen=True)
class Ops:
    """One implementation of every fused op; the signatures are those of `reference`."""

    name: str
    attention: Op
    attention_at: Op
    dropout_add_layer_norm: Op
    gelu_layer_norm: Op
    embed_layer_norm: Op
    linear_cross_entropy: Op
    # Products are the vendor's library's everywhere; ours only add gradients where they belong.
    linear: Op = main_grad.linear
    linear_residual: OpAndResidual = main_grad.linear_residual
    linear_gelu_residual: OpAndResidual = main_grad.linear_gelu_residual
    qkv_linear_at: Callable[..., tuple[Tensor, Tensor, Tensor]] = main_grad.qkv_linear_at
    adamw_step: Callable[..., None] = reference_optimizer.adamw_step
    lamb_step: Callable[..., None] = reference_optimizer.lamb_step
    muon_step: Callable[..., None] = reference_optimizer.muon_step
    kernels: bool = False
    """Whether these are our Triton kernels."""
    gelu_in_products: bool = False
    """Whether the products of the feed-forward do GELU, too, and are ours: it must be exact."""

    def feed_forward(
        self,
        x: Tensor,  # (R, H)
        up: Tensor,  # (F, H)
        bias: Tensor,  # (F,)
        down: Tensor,  # (H, F)
        approximate: str,
    ) -> tuple[Tensor, Tensor]:  # (R, H), (R, H)
        """GELU(x Uᵀ + b) Dᵀ, and x for who adds it as a residual."""
        if self.gelu_in_products:
            from fastbert_kernels.linear import feed_forward

            return feed_forward(x, up, bias, down, approximate)
        hidden, residual = self.linear_gelu_residual(x, up, bias, approximate)
        return self.linear(hidden, down), residual


def _ops_of(home: Any, name: str) -> Ops:
    """The ops that have no default, each by its name from a module or an object."""
    needed = [field.name for field in fields(Ops)[1:] if field.default is MISSING]
    return Ops(name, *(getattr(home, op) for op in needed))


REFERENCE = _ops_of(reference, "plain PyTorch")


def cpu_ops(compiled: bool) -> Ops:
    """The ops as a CPU wants them.

    Args:
        compiled: fuse pointwise chains with torch.compile (needs a C++ compiler).
    """
    name = "plain PyTorch for a CPU" + (", pointwise chains compiled" if compiled else "")
    return _ops_of(CpuOps(compiled), name)


def triton_ops(
    attn_implementation: str = "auto", precision: str = "ieee", gelu_in_products: bool = False
) -> Ops:
    """Our Triton kernels.

    Args:
        attn_implementation: a backend of `attention_config.choose_backend`.
        precision: of fp32 products inside attention: "ieee" or "tf32".
        gelu_in_products: see `Ops`; no GPU has timed it yet.

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    from fastbert_kernels import attention, cross_entropy, embedding, gelu, layer_norm, optimizer
    from fastbert_kernels.muon import muon_step

    def linear_gelu_residual(
        x: Tensor, weight: Tensor, bias: Tensor, approximate: str = "none"
    ) -> tuple[Tensor, Tensor]:
        product, residual = main_grad.linear_residual(x, weight)
        return gelu.bias_gelu(product, bias, approximate), residual

    @lru_cache(maxsize=1)
    def lamb_table(spans: tuple[tuple[int, int], ...], device: torch.device) -> Any:
        return optimizer.lamb_table(list(spans), device)

    def lamb_step(buffers: Buffers, hyper: Hyperparameters, spans: list[tuple[int, int]]) -> None:
        optimizer.lamb_step(buffers, hyper, lamb_table(tuple(spans), buffers.master.device))

    chosen: Any = {"backend": attn_implementation, "precision": precision}
    return Ops(
        name="Triton kernels",
        attention=partial(attention.attention, **chosen),
        attention_at=partial(attention.attention_at, **chosen),
        dropout_add_layer_norm=layer_norm.dropout_add_layer_norm,
        linear_gelu_residual=linear_gelu_residual,
        gelu_layer_norm=gelu.gelu_layer_norm,
        embed_layer_norm=embedding.embed_layer_norm,
        linear_cross_entropy=cross_entropy.linear_cross_entropy,
        adamw_step=optimizer.adamw_step,
        lamb_step=lamb_step,
        muon_step=muon_step,
        kernels=True,
        gelu_in_products=gelu_in_products,
    )


def why_no_kernels(
    device: torch.device, hidden_size: int, intermediate_size: int, head_size: int
) -> str:
    """What keeps our Triton kernels from running a model on a device; empty where nothing does."""
    if device.type != "cuda":
        return "they need a GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "they need an A100 or newer"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if head_size not in HEAD_SIZES:
        return f"heads of {head_size} are none of {', '.join(map(str, HEAD_SIZES))}"
    if hidden_size % 8 or intermediate_size % 8 or hidden_size > MAX_WIDTH:
        return f"widths must be multiples of 8, and hidden_size at most {MAX_WIDTH}"
    return ""


def choose_ops(device_type: str, compiled: bool) -> Ops:
    """The ops for a device: Triton's on a GPU, else a CPU's own."""
    return cpu_ops(compiled) if device_type == "cpu" else triton_ops()
