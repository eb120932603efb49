"""The bundle of Triton kernels in the model and the training step, against plain PyTorch's."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from fastbert.config import ModelConfig, PretrainConfig
from fastbert.data.batch import Batch
from fastbert.model.bert import Bert
from fastbert.ops import REFERENCE, Ops, cpu_ops, triton_ops
from fastbert.train.flat import FlatParameters
from fastbert.train.optimizer import FlatOptimizer, make_optimizer
from fastbert.train.step import TrainStep

SIZES = ModelConfig(83, 64, 2, 2, 64, max_position_embeddings=40)


def batch() -> Batch:
    """Three sequences and [PAD] in a fourth; tail slots empty."""
    generator = torch.Generator().manual_seed(1)
    T, lengths = 64, (33, 1, 20, 10)
    starts = [0, 33, 34, 54, 64, 64]
    masked = torch.tensor([2, 5, 31, 35, 40, 0, 0])
    return Batch(
        torch.randint(1, 83, (T,), generator=generator),
        torch.randint(0, 2, (T,), generator=generator),
        torch.cat([torch.arange(n) for n in lengths]),
        torch.tensor(starts, dtype=torch.int32),
        masked,
        torch.tensor([7, 8, 9, 7, 82, -100, -100]),
        torch.tensor([1, 0, -100, -100, -100]),
        40, 54, 3,
    )  # fmt: skip


def trained(ops: Ops, steps: int = 2, **changes: Any) -> TrainStep:
    torch.manual_seed(0)
    config = PretrainConfig(
        **{"learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 10, "max_grad_norm": 0.5}
        | changes
    )
    step = TrainStep(Bert(SIZES, ops), config)
    for _ in range(steps):
        step([batch()])
    return step


@pytest.mark.parametrize(
    "changes",
    [{"optim": "adamw"}, {"optim": "lamb"}, {"optim": "muon", "muon_ns_steps": 1}],
    ids=["adamw", "lamb", "muon"],
)
def test_steps_on_kernels_lie_on_those_in_plain_pytorch(changes: dict[str, Any]) -> None:
    """Dropout on: the same bits. Weight gradients go straight to the flat buffer in both."""
    kernels, cpu = trained(triton_ops(), **changes), trained(cpu_ops(False), **changes)
    assert math.isclose(kernels.read().loss, cpu.read().loss, rel_tol=1e-5)
    assert math.isclose(kernels.read().grad_norm, cpu.read().grad_norm, rel_tol=1e-4)
    # AdamW's first steps divide rounding by rounding: compare where the gradient is no rounding.
    clear = cpu.flat.grad.abs() > 1e-5
    assert clear.float().mean() > 0.5
    difference = (kernels.flat.master - cpu.flat.master).abs()
    assert difference[clear].max() < 2e-5
    assert kernels.read().updates == 2


def test_gradients_without_flat_buffers_are_the_same() -> None:
    def gradients(ops: Ops) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = Bert(SIZES, ops)
        b = batch()
        sums = model(
            b.input_ids, b.token_type_ids, b.position_ids, b.cu_seqlens, b.max_seqlen,
            b.masked_positions, b.masked_labels, b.next_sentence_labels,
        )  # fmt: skip
        (sums.mlm + sums.next_sentence).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    ours, theirs = gradients(triton_ops()), gradients(REFERENCE)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < 2e-4 * gradient.abs().max() + 1e-5, name


def optimizer(ops: Ops, optim: str, dtype: torch.dtype) -> FlatOptimizer:
    torch.manual_seed(0)
    config = PretrainConfig(optim=optim, weight_decay=0.1, adam_beta2=0.98)
    return make_optimizer(FlatParameters(Bert(SIZES, ops), dtype), config, ops)


@pytest.mark.parametrize("optim", ["adamw", "lamb"])
def test_kernels_update_as_plain_pytorch_does(optim: str) -> None:
    ours, theirs = (optimizer(ops, optim, torch.float16) for ops in (triton_ops(), REFERENCE))
    generator = torch.Generator().manual_seed(1)
    for step in range(5):
        gradient = torch.randn(ours.flat.grad.shape, generator=generator)
        if step == 3:
            gradient[1234] = math.inf
        for rule in (ours, theirs):
            rule.flat.grad.copy_(gradient)
            rule.lr.fill_(1e-2)
            rule.update(torch.tensor(4.0))
    assert int(ours.updates) == int(theirs.updates) == 4 and int(ours.skipped) == 1
    for mine, wanted in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-4, atol=1e-8)
    for name, view in ours.flat.views(ours.flat.weights).items():
        wanted = theirs.flat.views(theirs.flat.weights)[name]
        assert (view - wanted).abs().max() <= 2e-3 * wanted.abs().max(), name


def test_dataclass_names_every_op() -> None:
    names = {field.name for field in dataclasses.fields(Ops)}
    assert all(getattr(triton_ops(), name) is not None for name in names)
    assert triton_ops().kernels and not cpu_ops(False).kernels
