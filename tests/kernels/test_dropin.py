"""transformers' models over our kernels, in Triton's interpreter: what a GPU will run."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import fastbert
from fastbert.hf import layers, models
from fastbert.ops import triton_ops

B, S, V = 3, 20, 64
MASK = (torch.arange(S) < torch.tensor([20, 3, 11])[:, None]).long()
ZERO_ROW = MASK.flip(1)
ZERO_ROW[1] = 0


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def use() -> None:
        ops = triton_ops()

        def kernels_for(x: torch.Tensor, *_: int) -> Any:
            return ops if x.numel() else None

        for module in (layers, models):
            monkeypatch.setattr(module, "kernels_for", kernels_for)

    return use


def config(**changes: Any) -> BertConfig:
    values = {
        "vocab_size": V, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 96, "max_position_embeddings": 24, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return BertConfig(**values | changes)


@pytest.mark.parametrize("mask", [MASK, ZERO_ROW], ids=["right", "left and a row of zeros"])
@pytest.mark.parametrize("head", [BertForMaskedLM, BertForSequenceClassification])
def test_loss_and_gradients(head: Any, mask: torch.Tensor, kernels: Callable[[], None]) -> None:
    theirs = head(config()).train()
    ours = fastbert.accelerate(copy.deepcopy(theirs))
    ids = torch.randint(0, V, (B, S))
    labels = torch.where((mask != 0) & (torch.rand(B, S) < 0.3), ids, -100)
    if head is BertForSequenceClassification:
        labels = torch.tensor([0, 1, 1])
    want = theirs(ids, attention_mask=mask, labels=labels).loss
    kernels()
    got = ours(ids, attention_mask=mask, labels=labels).loss
    assert abs(got - want) < 1e-5
    for loss in (want, got):
        loss.backward()
    for (name, parameter), mine in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert parameter.grad is not None and mine.grad is not None
        scale = parameter.grad.abs().max().clamp(min=1e-2)
        assert (mine.grad - parameter.grad).abs().max() < 1e-4 * scale, name


def test_autocast_dropout_and_checkpoints(kernels: Callable[[], None]) -> None:
    """Under autocast the kernels get fp16 rows and fp32 parameters; a layer that is made
    again draws the same dropout, whose words come from torch's generator."""
    model = fastbert.BertForMaskedLM(
        config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    ).train()
    kernels()
    ids = torch.randint(0, V, (B, S))
    labels = torch.where((MASK != 0) & (torch.rand(B, S) < 0.3), ids, -100)
    checkpoint = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    found = []
    for seed, checkpointing in ((0, False), (0, True), (1, False)):
        for layer in model.bert.encoder.layer:
            layer.gradient_checkpointing = checkpointing
            layer._gradient_checkpointing_func = checkpoint
        model.zero_grad()
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.float16):
            loss = model(ids, attention_mask=MASK, labels=labels).loss
        assert loss.dtype == torch.float32
        loss.backward()
        gradient = model.bert.encoder.layer[0].attention.self.query.weight.grad
        assert gradient is not None and gradient.dtype == torch.float32
        found.append((loss.item(), gradient.clone()))
    (first, gradient), (again, made_again), (other, _) = found
    assert first == again and torch.equal(gradient, made_again)
    assert first != other
