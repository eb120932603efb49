"""A tiny BERT as transformers makes it, the same one accelerated, and batches for every head."""

import copy
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import BertConfig

import fastbert

HEADS = (
    *("BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForNextSentencePrediction"),
    *("BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering"),
    "BertForMultipleChoice",
)
LENGTHS = (12, 3, 7, 5)
VOCAB = 97


def config(**changes: Any) -> BertConfig:
    """Two layers by 32; no dropout."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**(values | changes))


def bert(head: str, **changes: Any) -> Any:
    """transformers' own, with weights large enough that a mistake shows."""
    torch.manual_seed(1)
    model = getattr(transformers, head)(config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pair(head: str, **changes: Any) -> tuple[Any, Any]:
    """The same model twice: transformers' own, and accelerated."""
    theirs = bert(head, **changes)
    return theirs, fastbert.accelerate(copy.deepcopy(theirs))


def batch(head: str = "BertModel", labels: bool = True, seed: int = 2) -> dict[str, Tensor]:
    """Four sequences of other lengths, and what the head is trained on."""
    generator = torch.Generator().manual_seed(seed)

    def draw(top: int, *shape: int) -> Tensor:
        return torch.randint(0, top, shape, generator=generator)

    B, S = len(LENGTHS), max(LENGTHS)
    mask = (torch.arange(S) < torch.tensor(LENGTHS)[:, None]).long()
    given = {
        "input_ids": draw(VOCAB, B, S) * mask,
        "attention_mask": mask,
        "token_type_ids": draw(2, B, S) * mask,
    }
    chosen = (torch.rand(B, S, generator=generator) < 0.3) & mask.bool()
    chosen[:, 1] = True
    if head == "BertForMultipleChoice":
        given = {name: torch.stack((x, x.roll(1, 0)), 1) for name, x in given.items()}
    if not labels or head == "BertModel":
        return given
    if head in ("BertForMaskedLM", "BertForPreTraining"):
        given["labels"] = torch.where(chosen, draw(VOCAB, B, S), -100)
    if head == "BertForPreTraining":
        given["next_sentence_label"] = draw(2, B)
    elif head == "BertForTokenClassification":
        given["labels"] = torch.where(mask.bool(), draw(2, B, S), -100)
    elif head == "BertForQuestionAnswering":
        given |= {"start_positions": draw(3, B), "end_positions": draw(3, B)}
    elif head != "BertForMaskedLM":
        given["labels"] = draw(2, B)
    return given


def loss_of(model: Any, given: dict[str, Any]) -> Tensor:
    """The loss, or something that depends on every output a BertModel gives."""
    output = model(**given)
    if "loss" in output:
        return output["loss"]
    states = output["last_hidden_state"] * given["attention_mask"][..., None]
    return states.sin().sum() + (output["pooler_output"].square().sum() if len(output) > 1 else 0)


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Each of the same names, within a part of its own largest value."""
    assert a.keys() == b.keys()
    assert a
    for name in a:
        scale = float(a[name].float().abs().max().clamp(min=1e-2))
        assert float((a[name] - b[name]).abs().max()) <= tolerance * scale, name


def assert_same_training(theirs: Any, ours: Any, given: dict[str, Any], **tolerance: float) -> None:
    """Losses and every gradient."""
    a, b = loss_of(theirs, given), loss_of(ours, given)
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    a.backward()
    b.backward()
    assert_close(gradients(theirs), gradients(ours), **tolerance)
