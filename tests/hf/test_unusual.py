"""BERTs that somebody has changed, or built into something larger, before the line."""

import copy
import logging

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, EncoderDecoderModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastbert
from fastbert.hf import layers

from .berts import assert_close, assert_same_training, batch, bert, config, gradients, pair


@pytest.fixture
def said():
    """What the log says, as if in a new process."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    layers._say.cache_clear()
    logging.getLogger("fastbert").addHandler(handler)
    yield lines
    logging.getLogger("fastbert").removeHandler(handler)


def test_one_layer_that_is_run_twice():
    theirs, ours = pair("BertForMaskedLM")
    for model in (theirs, ours):
        model.bert.encoder.layer = nn.ModuleList([model.bert.encoder.layer[0]] * 2)
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))


@pytest.mark.parametrize("head", ["BertModel", "BertForSequenceClassification"])
def test_no_layers(head):
    assert_same_training(*pair(head, num_hidden_layers=0), batch(head))


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("where", [0, 1])
def test_layers_in_a_module_of_ones_own(where, said):
    theirs, ours = pair("BertForMaskedLM")
    for model in (theirs, ours):
        model.bert.encoder.layer[where] = Wrapped(model.bert.encoder.layer[where])
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))


def test_a_layer_of_ones_own_class():
    class Louder(transformers.models.bert.modeling_bert.BertLayer):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) * 1.5

    theirs, ours = pair("BertForMaskedLM")
    for model in (theirs, ours):
        layer = copy.deepcopy(theirs.bert.encoder.layer[1])
        layer.__class__ = Louder
        model.bert.encoder.layer[1] = layer
    fastbert.accelerate(ours)
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))


def test_an_attention_that_somebody_registered(said):
    def halved(module, q, k, v, *args, **kwargs):
        return sdpa_attention_forward(module, q, k, v / 2, *args, **kwargs)

    AttentionInterface.register("halved", halved)
    transformers.AttentionMaskInterface.register(
        "halved", transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    theirs, ours = pair("BertForMaskedLM", attn_implementation="halved")
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))
    assert "BertModel: transformers' own path: attn_implementation 'halved'" in said


def test_parts_called_by_themselves():
    theirs, ours = (model.eval() for model in pair("BertForPreTraining"))
    given = batch()
    a, b = theirs.bert.embeddings(given["input_ids"]), ours.bert.embeddings(given["input_ids"])
    torch.testing.assert_close(a, b)
    mask = (given["attention_mask"][:, None, None, :] != 0).expand(4, 1, 12, 12)
    for x in (None, mask):
        one, other = (m.bert.encoder(a, x).last_hidden_state for m in (theirs, ours))
        torch.testing.assert_close(one, other)
        one, other = (m.bert.encoder.layer[1](a, x) for m in (theirs, ours))
        torch.testing.assert_close(one, other)
    for one, other in zip(theirs.cls(a, a[:, 0]), ours.cls(a, a[:, 0]), strict=True):
        torch.testing.assert_close(one, other)


def test_a_class_of_ones_own_of_ours(tmp_path):
    class Weighted(fastbert.BertForMaskedLM):
        def forward(self, input_ids, weight=1.0, **kwargs):
            output = super().forward(input_ids, **kwargs)
            output["loss"] = output["loss"] * weight
            return output

    class Plain(fastbert.BertForSequenceClassification):
        pass

    theirs = bert("BertForMaskedLM")
    ours = Weighted(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    given = batch("BertForMaskedLM")
    torch.testing.assert_close(ours(**given, weight=3.0).loss, theirs(**given).loss * 3)
    ours.save_pretrained(tmp_path)
    assert type(Weighted.from_pretrained(tmp_path)) is Weighted
    given = batch("BertForSequenceClassification")
    theirs = bert("BertForSequenceClassification")
    plain = Plain(theirs.config)
    plain.load_state_dict(theirs.state_dict())
    assert_same_training(theirs, plain, given)


def test_an_encoder_and_a_decoder(said):
    torch.manual_seed(1)
    theirs = EncoderDecoderModel(
        encoder=transformers.BertModel(config()),
        decoder=transformers.BertLMHeadModel(config(is_decoder=True, add_cross_attention=True)),
    )
    theirs.config.decoder_start_token_id, theirs.config.pad_token_id = 2, 0
    ours = fastbert.accelerate(copy.deepcopy(theirs))
    given = batch()
    del given["token_type_ids"]
    given["labels"] = given["input_ids"].clone()
    a, b = theirs(**given).loss, ours(**given).loss
    torch.testing.assert_close(b, a)
    a.backward()
    b.backward()
    assert_close(gradients(theirs), gradients(ours))
    assert any("no padding is computed" in line for line in said)
    assert "BertModel: transformers' own path: a decoder" in said
