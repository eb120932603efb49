"""Every head, mask and flag beside transformers' own class: fp32, dropout 0, every gradient."""

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig

import fastbert
from fastbert.hf import layers, models
from fastbert.ops import REFERENCE

HEADS = (
    *("BertModel", "BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction"),
    *("BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering"),
    "BertForMultipleChoice",
)
B, S, V = 4, 16, 97
RIGHT = (torch.arange(S) < torch.tensor([16, 3, 11, 7])[:, None]).long()
HOLES = RIGHT.clone()
HOLES[:, 2:5] = 0
ZERO_ROW = RIGHT.clone()
ZERO_ROW[2] = 0
MASKS = {
    "none": None,
    "full": torch.ones(B, S).long(),
    "right": RIGHT,
    "left": RIGHT.flip(1),
    "holes, float": HOLES * 0.5,
    "a row of zeros, bool": ZERO_ROW.bool(),
    "zeros": torch.zeros(B, S).long(),
    "length 1": (torch.arange(S) < torch.ones(B)[:, None]).long(),
}


CHECKPOINT = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


def small(**changes: Any) -> BertConfig:
    values = {
        "vocab_size": V, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 96, "max_position_embeddings": 20, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return BertConfig(**values | changes)


def pair(head: str, **changes: Any) -> tuple[Any, Any]:
    """transformers' model and the same accelerated, weights so large that a wrong scale shows."""
    theirs = getattr(transformers, head)(small(**changes))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return theirs, fastbert.accelerate(copy.deepcopy(theirs))


def inputs(head: str, mask: torch.Tensor | None, labelled: bool) -> dict[str, torch.Tensor]:
    real = torch.ones(B, S).bool() if mask is None else mask != 0
    ids = torch.randint(0, V, (B, S))
    batch = {"input_ids": ids, "token_type_ids": torch.randint(0, 2, (B, S))}
    if mask is not None:
        batch["attention_mask"] = mask
    if head == "BertForMultipleChoice":
        batch = {name: torch.stack((x, x.flip(0)), 1) for name, x in batch.items()}
    if labelled:
        words = torch.where(real & (torch.rand(B, S) < 0.4), torch.randint(0, V, (B, S)), -100)
        twos = torch.randint(0, 2, (B,))
        batch |= {
            "BertModel": {},
            "BertForPreTraining": {"labels": words, "next_sentence_label": twos},
            "BertForMaskedLM": {"labels": words},
            "BertForTokenClassification": {"labels": torch.where(words < 0, words, words % 2)},
            "BertForQuestionAnswering": {"start_positions": twos, "end_positions": twos + 3},
        }.get(head, {"labels": twos})
    return batch


def compare(theirs: Any, ours: Any, batch: dict[str, torch.Tensor], real: torch.Tensor) -> None:
    """Outputs within 1e-5 at real tokens, and everything that has no tokens."""
    absent = set(theirs) - set(ours)
    assert absent <= {"logits", "prediction_logits"} and list(ours) == [
        name for name in theirs if name not in absent
    ]
    for name, mine in ours.items():
        states = name == "hidden_states"
        assert not states or len(mine) == len(theirs[name])
        for one, other in (
            zip(mine, theirs[name], strict=True) if states else [(mine, theirs[name])]
        ):
            assert one.shape == other.shape and one.dtype == other.dtype, name
            if one.shape[:2] == (B, S):
                one, other = one[real], other[real]
            elif states:  # of multiple choice
                one, other = (x[batch["attention_mask"].flatten(0, 1) != 0] for x in (one, other))
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0, equal_nan=True)


def total(output: Any, real: torch.Tensor) -> torch.Tensor:
    """Something to take gradients of."""
    if "loss" in output:
        loss: torch.Tensor = output.loss
        return loss
    return output.last_hidden_state[real].sin().sum() + output.pooler_output.square().sum()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("path", "name"),
    [
        *(("plain", name) for name in MASKS),
        *(("kernels", name) for name in ("none", "left", "a row of zeros, bool", "zeros")),
    ],
)
def test_outputs_and_gradients(
    head: str, name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the way that a GPU goes, with the reference in place of each kernel, too."""
    if path == "kernels":
        for module in (layers, models):
            monkeypatch.setattr(module, "kernels_for", lambda *_: REFERENCE)
    if head == "BertForMultipleChoice" and name == "none":
        pytest.skip("its hidden states have no mask to be compared by")
    mask = MASKS[name]
    real = torch.ones(B, S).bool() if mask is None else mask != 0
    theirs, ours = pair(head)
    # labels, training, checkpointing, hidden states
    flags = [(False, False, False, True), (True, True, False, False), (True, True, True, True)]
    flags = flags if path == "plain" else flags[1:2]
    if name == "right":
        flags.append((True, False, False, False))
    for labelled, training, checkpointing, states in flags:
        for model in (theirs, ours):
            model.train(training)
            model.zero_grad()
            for module in model.modules():  # what gradient_checkpointing_enable sets
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = checkpointing
                    module._gradient_checkpointing_func = CHECKPOINT
        batch = inputs(head, mask, labelled)
        want, got = (m(**batch, output_hidden_states=states) for m in (theirs, ours))
        compare(want, got, batch, real)
        if not labelled:
            continue
        for output in (want, got):
            total(output, real).backward()
        for (key, parameter), mine in zip(
            theirs.named_parameters(), ours.parameters(), strict=True
        ):
            if parameter.grad is None or mine.grad is None:
                assert parameter.grad is mine.grad, key
                continue
            # A key's bias has gradient 0 but for rounding.
            scale = parameter.grad.abs().max().clamp(min=1e-2)
            assert (mine.grad - parameter.grad).abs().max() < 1e-4 * scale, key


@pytest.mark.parametrize("head", HEADS)
def test_names_classes_and_the_way_back(head: str) -> None:
    theirs, ours = pair(head)
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    assert type(ours) is getattr(fastbert, head) and isinstance(ours, type(theirs))
    fresh = getattr(fastbert, head)(small())
    assert list(map(type, fresh.modules())) == list(map(type, ours.modules()))
    assert fastbert.accelerate(ours) is ours
    assert fastbert.decelerate(ours) is ours
    assert list(map(type, ours.modules())) == list(map(type, theirs.modules()))


def test_arguments_by_place_and_tuples() -> None:
    theirs, ours = pair("BertForSequenceClassification")
    batch = inputs("BertForSequenceClassification", RIGHT, False)
    places = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    for model, changes in itertools.product((theirs, ours), ({}, {"return_dict": False})):
        model.eval()
        logits = model(*places, **changes)[0]
        torch.testing.assert_close(logits, theirs(**batch).logits)
    encoder = ours.bert(**batch, return_dict=False)
    assert isinstance(encoder, tuple) and len(encoder) == 2


def test_what_cannot_be_right_is_refused() -> None:
    model = fastbert.BertModel(small()).eval()
    ids = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="the model has 20 positions"):
        model(torch.ones(1, 21, dtype=torch.long))
    for name in ("input_ids", "token_type_ids", "position_ids"):
        with pytest.raises(IndexError, match=f"{name} holds -1"):
            model(**{"input_ids": ids, name: torch.tensor([[0] * 7 + [-1]] * 2)})
    with pytest.raises(IndexError):
        model(torch.full((1, 2), V))
    with pytest.raises(TypeError, match="BertModel takes a BertConfig, not a RobertaConfig"):
        fastbert.BertModel(transformers.RobertaConfig())
    with pytest.raises(ValueError, match="Linear holds no model of transformers"):
        fastbert.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="not a str"):
        fastbert.accelerate("bert-base-uncased")  # type: ignore[type-var]
