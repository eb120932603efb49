"""BERTs that somebody has changed, or built into something larger, before the line."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.autograd import forward_ad
from transformers import AttentionInterface, EncoderDecoderModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import fastbert
from fastbert.hf import layers

from .berts import VOCAB, assert_close, assert_same_training, batch, bert, config, gradients, pair


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
            x = super().forward(*args, **kwargs)
            return x + x[:, :1]

    theirs, ours = pair("BertForMaskedLM")
    for model in (theirs, ours):
        layer = copy.deepcopy(theirs.bert.encoder.layer[1])
        layer.__class__ = Louder
        model.bert.encoder.layer[1] = layer
    fastbert.accelerate(ours)
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))


class Mixing(nn.Module):
    """Before what a module did, each token gets some of its sequence's first."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args):
        return self.inner(x + x[:, :1], *args)


@pytest.mark.parametrize(
    "path",
    ["encoder.layer.0.output", "encoder.layer.1.attention.output", "encoder.layer.1.intermediate"],
)
def test_modules_that_look_at_other_tokens(path):
    theirs, ours = pair("BertForMaskedLM")
    for model in (theirs, ours):
        model.bert.set_submodule(path, Mixing(model.bert.get_submodule(path)))
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))


def test_embeddings_of_ones_own():
    class Shifted(transformers.models.bert.modeling_bert.BertEmbeddings):
        def forward(self, *args, **kwargs):
            x = super().forward(*args, **kwargs)
            return x + x.roll(1, 1)

    theirs, ours = pair("BertForMaskedLM")
    for model in (theirs, ours):
        model.bert.embeddings.__class__ = Shifted
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForPreTraining"])
def test_a_pooler_of_ones_own(head):
    class Mean(nn.Module):
        def forward(self, x):
            return x[:, :3].mean(1)

    theirs, ours = pair(head)
    for model in (theirs, ours):
        model.bert.pooler = Mean()
    assert_same_training(theirs, ours, batch(head))


def test_scores_of_ones_own(said):
    class Neighbours(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x + x[:, :1])

    theirs, ours = pair("BertForMaskedLM")
    for model in (theirs, ours):
        model.cls = Neighbours(model.cls)
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))
    assert "BertForMaskedLM: every token is scored: a Neighbours does it" in said
    for model in (theirs, ours):
        model.zero_grad()
        torch.manual_seed(4)
        model.cls = nn.Linear(32, VOCAB)
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))


def test_modules_that_have_other_attributes():
    theirs, ours = pair("BertForMaskedLM")
    for model in (theirs, ours):
        layer = model.bert.encoder.layer[1]
        layer.output.dropout = layer.attention.output.dropout = nn.Identity()
        layer.intermediate.dense = Wrapped(layer.intermediate.dense)
        layer.attention.output.LayerNorm = Wrapped(layer.attention.output.LayerNorm)
        predictions = model.cls.predictions
        predictions.transform.dense = Wrapped(predictions.transform.dense)
        predictions.decoder = Wrapped(predictions.decoder)
        embeddings = model.bert.embeddings
        embeddings.position_embeddings = Wrapped(embeddings.position_embeddings)
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))


def test_dropout_of_attention_is_on_where_transformers_has_it_on():
    _, ours = pair("BertModel", attention_probs_dropout_prob=0.5)
    ours.eval()
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert torch.equal(*(ours(**batch()).last_hidden_state for _ in range(2)))
    ours.encoder.layer[0].attention.self.train()
    assert not torch.equal(*(ours(**batch()).last_hidden_state for _ in range(2)))


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


@pytest.mark.parametrize(
    "path",
    [
        *("embeddings", "encoder", "encoder.layer.0", "encoder.layer.1.attention"),
        *("encoder.layer.0.attention.self", "encoder.layer.0.attention.output"),
        *("encoder.layer.1.intermediate", "encoder.layer.1.output"),
    ],
)
def test_a_hook_that_takes_a_token_away(path, said):
    def without_first(_module, _given, out):
        if isinstance(out, torch.Tensor):
            return out * (torch.arange(out.shape[1]) > 0)[None, :, None]
        if isinstance(out, tuple):
            return (without_first(_module, _given, out[0]), *out[1:])
        out.last_hidden_state = without_first(_module, _given, out.last_hidden_state)
        return out

    theirs, ours = pair("BertForMaskedLM")
    for model in (theirs, ours):
        model.bert.get_submodule(path).register_forward_hook(without_first)
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))
    assert any("transformers' own path: a hook on Bert" in line for line in said)


@pytest.mark.parametrize(
    ("head", "path"),
    [
        ("BertForPreTraining", "bert.pooler"),
        ("BertForPreTraining", "cls"),
        ("BertForMaskedLM", "cls.predictions.transform"),
        ("ElectraForMaskedLM", "generator_predictions"),
        ("RobertaForMaskedLM", "lm_head"),
        ("RobertaForSequenceClassification", "classifier"),
        ("ElectraForSequenceClassification", "classifier"),
    ],
)
def test_a_hook_on_a_head_sees_what_it_sees_in_transformers(head, path):
    given, seen = batch(head.replace("Electra", "Bert").replace("Roberta", "Bert")), []
    kind = getattr(transformers, head)
    theirs = kind(kind.config_class(**config().to_dict() | {"pad_token_id": 0})).train()
    for model in (theirs, fastbert.accelerate(copy.deepcopy(theirs))):
        part = model.get_submodule(path)
        part.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].shape))
        model(**given)
    assert seen[0] == seen[1] == (*given["input_ids"].shape, 32)


class Mean(nn.Module):
    def forward(self, states):
        return states[:, :3].mean(1)


@pytest.mark.parametrize("kind", ["Roberta", "Electra"])
def test_a_classifier_of_ones_own_sees_every_token(kind):
    kind = getattr(transformers, f"{kind}ForSequenceClassification")
    torch.manual_seed(0)
    theirs = kind(kind.config_class(**config().to_dict() | {"pad_token_id": 0})).eval()
    theirs.classifier = nn.Sequential(Mean(), nn.Linear(32, 2))
    ours = fastbert.accelerate(copy.deepcopy(theirs))
    given = batch(labels=False)
    given["attention_mask"][:, :3] = 1
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_labels_laid_flat(training):
    theirs, ours = pair("BertForMaskedLM")
    given = batch("BertForMaskedLM")
    for on_padding in (False, True):
        if on_padding:
            given["labels"][1, -1] = 5
        flat = given | {"labels": given["labels"].flatten()}
        losses = [model.train(training)(**flat).loss for model in (theirs, ours)]
        torch.testing.assert_close(losses[1], losses[0])


def test_forward_mode_gradients_are_those_of_transformers():
    given = batch()
    embeds = torch.randn(*given.pop("input_ids").shape, 32)
    found = []
    for model in pair("BertModel"):
        model.set_attn_implementation("eager")
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(embeds, embeds.cos())
            states = model(inputs_embeds=dual, **given).pooler_output
            found.append(forward_ad.unpack_dual(states).tangent)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_what_is_as_asked_for_is_no_warning(caplog):
    layers._say.cache_clear()
    _, ours = pair("BertModel")
    with caplog.at_level(logging.WARNING, "fastbert"):
        ours(**batch())
        assert not caplog.records
        ours(**batch(), output_attentions=True)
    with caplog.at_level(logging.INFO, "fastbert"):
        for _ in range(2):
            ours(**batch())
    own_path, fast = [one for one in caplog.records if one.name == "fastbert"]
    assert (own_path.levelname, fast.levelname) == ("WARNING", "INFO")
    assert "output_attentions" in own_path.getMessage()
    assert fast.getMessage() == "BertModel: no padding is computed, on cpu"


def test_kernels_read_ordinary_products_only():
    class Quantised(torch.Tensor):
        pass

    assert layers.is_product(nn.Linear(8, 8))
    assert layers.is_norm(nn.LayerNorm(8))
    weight = torch.randn(8, 8).as_subclass(Quantised)
    odd = nn.Linear(8, 8)
    odd.weight = nn.Parameter(weight, requires_grad=False)
    assert not layers.is_product(odd)
    assert not layers.is_product(nn.Linear(8, 8, bias=False))
    assert not layers.is_norm(nn.LayerNorm(8, bias=False))


def test_a_graphics_card_without_kernels_is_told_of(said):
    layers._kernels.cache_clear()
    assert layers._kernels(torch.device("cpu"), "ieee") is None
    assert said == ["no kernels on cpu, plain PyTorch: they need a GPU"]


def test_precisions_set_by_their_new_names(monkeypatch):
    """torch then refuses to tell `allow_tf32`; a kernel's precision is found all the same."""
    found = []
    monkeypatch.setattr(layers, "_kernels", lambda device, precision: found.append(precision))
    x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, numel=lambda: 1)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            layers.kernels_for(x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.get_float32_matmul_precision() == before
    assert found == ["tf32", "ieee"]
