"""The only door to kernels: a frozen bundle of ops, chosen once and passed down to the model."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastbert_kernels import reference
from fastbert_kernels.cpu import CpuOps

Op = Callable[..., Tensor]


@dataclass(frozen=True)
class Ops:
    """One implementation of every fused op; the signatures are those of `reference`."""

    name: str
    attention: Op
    dropout_add_layer_norm: Op
    linear_gelu: Op
    gelu_layer_norm: Op
    embed_layer_norm: Op
    linear_cross_entropy: Op


REFERENCE = Ops(
    name="reference",
    attention=reference.attention,
    dropout_add_layer_norm=reference.dropout_add_layer_norm,
    linear_gelu=reference.linear_gelu,
    gelu_layer_norm=reference.gelu_layer_norm,
    embed_layer_norm=reference.embed_layer_norm,
    linear_cross_entropy=reference.linear_cross_entropy,
)


def choose_ops(device_type: str, compiled: bool) -> Ops:
    """The fastest implementation there is for a device.

    Args:
        device_type: "cpu" or "cuda".
        compiled: on a CPU, fuse pointwise chains with torch.compile (needs a C++ compiler).
    """
    if device_type != "cpu":
        return REFERENCE
    ops = CpuOps(compiled)
    return Ops(
        name="cpu (pointwise chains compiled)" if compiled else "cpu",
        attention=ops.attention,
        dropout_add_layer_norm=ops.dropout_add_layer_norm,
        linear_gelu=reference.linear_gelu,
        gelu_layer_norm=ops.gelu_layer_norm,
        embed_layer_norm=ops.embed_layer_norm,
        linear_cross_entropy=ops.linear_cross_entropy,
    )
