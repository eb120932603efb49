"""Layers read rather than called: only where that is the same, whatever was done to them."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import fastbert
from fastbert.hf.stack import Stack

IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))


class Doubled(nn.Linear):
    """What an adapter puts in a layer's place."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def exchange(model: Any) -> None:
    torch.manual_seed(3)
    model.encoder.layer[0].attention.self.query = Doubled(32, 32)


def patch(model: Any) -> None:
    dense = model.encoder.layer[1].output.dense
    dense.forward = lambda x: 2 * nn.functional.linear(x, dense.weight, dense.bias)


def hook(model: Any) -> None:
    model.encoder.layer[1].intermediate.register_forward_hook(lambda *args: 2 * args[-1])


def swap_class(model: Any) -> None:
    model.encoder.layer[0].intermediate.dense.__class__ = Doubled


def new_layers(model: Any) -> None:
    model.encoder.layer = nn.ModuleList([copy.deepcopy(model.encoder.layer[1])]).eval()


def new_weights(model: Any) -> None:
    torch.manual_seed(3)
    model.encoder.layer[0].output.dense.weight = nn.Parameter(torch.randn(32, 64))
    model.encoder.layer[1].output.LayerNorm.weight.data.mul_(2)


def train_one_dropout(model: Any) -> None:
    dropout = model.encoder.layer[0].attention.output.dropout.train()
    dropout.p = 1.0


def a_tensor_for_a_parameter(model: Any) -> None:
    dense = model.encoder.layer[0].output.dense
    weight = dense.weight.detach()
    del dense.weight
    dense.weight = weight * 2


CHANGES = (
    *(exchange, patch, hook, swap_class, new_layers, new_weights, train_one_dropout),
    a_tensor_for_a_parameter,
)
READABLE = (new_layers, new_weights)


@pytest.fixture
def pair() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    theirs = BertModel(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return theirs, fastbert.accelerate(copy.deepcopy(theirs))


def states(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).last_hidden_state


def is_read(model: Any) -> bool:
    return Stack.of(model, model.encoder, torch.device("cpu")) is not None


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_after_the_first_use_is_seen(pair: tuple[Any, Any], change: Any) -> None:
    theirs, ours = pair
    before = states(ours)
    assert is_read(ours)
    torch.testing.assert_close(before, states(theirs), atol=1e-5, rtol=0)
    for model in pair:
        change(model)
    after = states(ours)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, states(theirs), atol=1e-5, rtol=0)
    assert is_read(ours) == (change in READABLE)


def test_a_function_as_activation_is_looked_up_at_each_call(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    for model in pair:
        for layer in model.encoder.layer:
            del layer.intermediate.intermediate_act_fn  # a module of that name
    for function in (torch.tanh, torch.relu):
        for model in pair:
            for layer in model.encoder.layer:
                layer.intermediate.intermediate_act_fn = function
        torch.testing.assert_close(states(ours), states(theirs), atol=1e-5, rtol=0)
        assert is_read(ours)


def test_hooks_that_stay_after_a_recording_change_nothing(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    for _ in range(2):
        recorded = [model(IDS, output_hidden_states=True).hidden_states for model in pair]
        torch.testing.assert_close(recorded[1], recorded[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(states(ours), states(theirs), atol=1e-5, rtol=0)
    assert any(module._forward_hooks for module in ours.modules())
    assert is_read(ours)


def test_a_copy_reads_its_own_weights(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    states(ours)
    second = copy.deepcopy(ours)
    with torch.no_grad():
        for model in (theirs, second):
            model.encoder.layer[0].output.dense.weight.mul_(3)
    torch.testing.assert_close(states(second), states(theirs), atol=1e-5, rtol=0)
    assert (states(second) - states(ours)).abs().max() > 1e-2


def test_gradients_in_evaluation(pair: tuple[Any, Any]) -> None:
    found = []
    for model in pair:
        model(IDS).last_hidden_state.square().sum().backward()
        found.append([p.grad for p in model.encoder.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
