"""Muon's part of the trainer: which matrices it takes, in which groups, and what that costs.

The equations are `fastbert_kernels.reference_optimizer.muon_step`'s. Matrices of one shape are
orthogonalized together: m is the smaller side of one, n the larger. H hidden size, F intermediate
size, L layers.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastbert.config import ModelConfig, PretrainConfig
from fastbert.errors import UserError
from fastbert.train.flat import FlatParameters
from fastbert_kernels.reference_optimizer import MuonGroup, MuonHyperparameters, Orthogonalize

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Spread = Callable[[Orthogonalize, Tensor], Tensor]
_QKV = ".qkv.weight"
# Of the two learning rates. In fp32, a ratio of 1e38 were inf, and 0 x inf in warm-up's first step
# NaN; and a rate of 1e-38, as beside a ratio of 1e36, were not exact any more.
_MOST_RATIO = 1e20


def names(model: nn.Module) -> list[str]:
    """The matrices that Muon takes: the layers' and the MLM transform.

    Embeddings, pooler, next-sentence head, biases and LayerNorms are AdamW's.
    """
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name.startswith(("layers.", "mlm.transform."))
    ]


def groups(flat: FlatParameters, split_qkv: bool) -> tuple[MuonGroup, ...]:
    """The matrices behind `flat.last_begin`, those of one shape together, in buffer order.

    Args:
        flat: its matrices are (out, in); query, key and value stand one below the other.
        split_qkv: whether these are three matrices or one.
    """
    found: dict[tuple[int, int], list[int]] = {}
    views = flat.views(flat.master)
    for name, (start, _) in zip(flat.names, flat.spans, strict=True):
        if start >= flat.last_begin:
            rows, columns = views[name].shape
            parts = 3 if split_qkv and name.endswith(_QKV) else 1
            starts = [start + part * rows // parts * columns for part in range(parts)]
            found.setdefault((rows // parts, columns), []).extend(starts)
    return tuple(MuonGroup(*shape, tuple(starts)) for shape, starts in found.items())


def hyperparameters(flat: FlatParameters, config: PretrainConfig) -> MuonHyperparameters:
    """What `muon_step` is told, Newton-Schulz in bf16 on a GPU and in fp32 on a CPU.

    Raises:
        UserError: `learning_rate` is too small to follow.
    """
    assert config.learning_rate is not None, "the configuration must be resolved"
    assert flat.last_begin < len(flat.master), "made for another optimizer"
    rate = config.muon_learning_rate
    if rate > _MOST_RATIO * config.learning_rate:
        raise UserError(
            f"learning_rate = {config.learning_rate:g} must be at least {rate / _MOST_RATIO:g} "
            f"beside muon_learning_rate = {rate:g}, which follows it over time"
        )
    return MuonHyperparameters(
        begin=flat.last_begin,
        groups=groups(flat, config.muon_split_qkv),
        lr_ratio=rate / config.learning_rate,
        momentum=config.muon_momentum,
        nesterov=config.muon_nesterov,
        ns_steps=config.muon_ns_steps,
        weight_decay=config.muon_weight_decay,
        adjust_lr_fn=config.muon_adjust_lr_fn,
        dtype=torch.bfloat16 if flat.master.is_cuda else torch.float32,
    )


def spread_over(group: "ProcessGroup") -> Spread:
    """Divides the matrices of a group among processes: each orthogonalizes its share.

    All of them must hold the same gradients; each gets all results. Where the matrices do not go
    round, the last processes have fewer or none.
    """
    from torch import distributed

    rank, count = distributed.get_rank(group), distributed.get_world_size(group)

    def spread(orthogonalize: Orthogonalize, x: Tensor) -> Tensor:  # (B, rows, columns), both ways
        each = -(-len(x) // count)
        mine = x[rank * each : (rank + 1) * each]
        share = x.new_zeros(each, *x.shape[1:])
        if len(mine):
            share[: len(mine)] = orthogonalize(mine)
        whole = x.new_empty(count * each, *x.shape[1:])
        distributed.all_gather_into_tensor(whole, share, group=group)
        return whole[: len(x)]

    return spread


# What it costs, from sizes alone


def shapes(sizes: ModelConfig, split_qkv: bool) -> dict[tuple[int, int], int]:
    """(rows, columns) -> how many matrices Muon takes of that shape."""
    H, F, L = sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers
    found = Counter({(H, H): L + 1})
    found.update({(H, H): 3 * L} if split_qkv else {(3 * H, H): L})
    for shape in ((F, H), (H, F)):
        found[shape] += L
    return dict(found)


def num_parameters(sizes: ModelConfig) -> int:
    """Of all the matrices that Muon takes."""
    return sum(math.prod(shape) * count for shape, count in shapes(sizes, False).items())


def newton_schulz_flops(sizes: ModelConfig, split_qkv: bool = True, ns_steps: int = 5) -> float:
    """FLOPs of a step's orthogonalization, a multiply-add counted as 2.

    Of a matrix and step 2 m² n for A = X Xᵀ, 2 m³ for A A and 2 m² n for B X; that A and A A are
    symmetric is not used.
    """
    flops = 0.0
    for shape, count in shapes(sizes, split_qkv).items():
        m, n = sorted(map(float, shape))
        flops += count * ns_steps * (4 * m * m * n + 2 * m**3)
    return flops


def scratch_bytes(sizes: ModelConfig, split_qkv: bool, itemsize: int) -> int:
    """The least that orthogonalizing the largest group takes: X, the next X, A and B.

    Args:
        sizes, split_qkv: of which matrices.
        itemsize: bytes of an element in Newton-Schulz.
    """
    return itemsize * max(
        count * (2 * rows * columns + 2 * min(rows, columns) ** 2)
        for (rows, columns), count in shapes(sizes, split_qkv).items()
    )
