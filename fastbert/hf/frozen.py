"""Weights that change no more, laid out once as a CPU's products read them.

torch's product of fp32 is MKL's, which finds the matrix as it lies; oneDNN takes one that was
packed before, and adds the bias, GELU or the residual on its way. Rows by 768 x 3,072 on one core
of an EPYC: 7 rows took 1.35 ms and take 0.61, 64 rows 3.9 and 2.9, 1,024 rows 50 and 43; in bf16
0.31, 1.5 and 22. The packed weights are a second copy.

T tokens, H hidden size, F width of the MLP.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16)
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
"""Of a product's largest value."""


class Product:
    """x W + b with a packed W, for inputs of its dtype; no gradient.

    Args:
        weights, biases: whose outputs come side by side.
        dtype: that it computes in.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype):
        weight = torch.cat([one.detach() for one in weights]).to(dtype)
        self.bias = torch.cat([one.detach() for one in biases]).to(dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "none", [], ""
        )
        return found

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """GELU of it."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "gelu", [], approximate
        )
        return found

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """It and what is added."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self.weight, self.bias, "add"
        )
        return found


class PackedLayer:
    """The products of a layer.

    Args:
        read: of each module with parameters, in `Stack`'s order, the dictionary of them.
        dtype: that they compute in.
    """

    def __init__(self, read: Sequence[dict[str, Any]], dtype: torch.dtype) -> None:
        query, key, value, out, _, up, down, _ = (state["_parameters"] for state in read)
        projections = query, key, value
        self.joined = Product(
            [one["weight"] for one in projections], [one["bias"] for one in projections], dtype
        )
        self.out, self.up, self.down = (
            Product([one["weight"]], [one["bias"]], dtype) for one in (out, up, down)
        )
        self._sources = [
            (one, name, one[name], one[name]._version)
            for one in (*projections, out, up, down)
            for name in ("weight", "bias")
        ]

    def is_current(self) -> bool:
        """Whether the weights are those that were packed."""
        return all(
            one[name] is source and source._version == version
            for one, name, source, version in self._sources
        )


def why_not(weight: Tensor, dtype: torch.dtype) -> str:
    """Why weights cannot be packed here; "" where they can.

    Args:
        weight: the first of them.
        dtype: that is to be computed in.
    """
    if weight.device.type != "cpu":
        return "not on a CPU"
    if weight.dtype != torch.float32 or dtype not in _DTYPES:
        return f"{weight.dtype} computed in {dtype}"
    if weight.is_inference():
        return "weights made in inference mode"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "torch without oneDNN"
    try:
        with torch.no_grad():
            x = torch.linspace(-1, 1, 8 * 64).view(8, 64).to(dtype)
            matrix, bias = torch.linspace(-1, 1, 32 * 64).view(32, 64), torch.linspace(-1, 1, 32)
            product = Product([matrix], [bias], dtype)
            wanted = F.linear(x.float(), matrix, bias)
            found = (product(x), product.gelu(x, "none"), product.plus(x, product(x)))
            for one, other in zip(found, (wanted, F.gelu(wanted), 2 * wanted), strict=True):
                gap = (one.float() - other).abs().max() / other.abs().max()
                if not gap < _TOLERANCE[dtype]:
                    return f"oneDNN's product is off by {gap:.1e}"
    except (RuntimeError, AttributeError) as error:  # another torch, or another CPU
        return str(error).splitlines()[0][:200]
    return ""
