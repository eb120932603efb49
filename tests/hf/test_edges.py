"""An accelerated BERT under what PyTorch lets one do with a model: copies, hooks, transforms."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, RobertaConfig
from transformers.models.bert.modeling_bert import BertLayer

import fastbert

from .berts import (
    HEADS,
    assert_close,
    assert_same_training,
    batch,
    bert,
    gradients,
    loss_of,
    pair,
)


def fast(model) -> bool:
    return type(model).__module__ == "fastbert.hf.models"


# The same model


@pytest.mark.parametrize("head", HEADS)
def test_signature_state_dict_and_copies_stay(head):
    theirs, ours = pair(head)
    assert inspect.signature(theirs.forward) == inspect.signature(ours.forward)
    assert [n for n, _ in theirs.named_modules()] == [n for n, _ in ours.named_modules()]
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert theirs.state_dict()._metadata == ours.state_dict()._metadata
    given = batch(head)
    want = loss_of(ours.eval(), given)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(file, weights_only=False),
    ):
        assert type(copied) is type(ours)
        assert all(
            torch.equal(a, b) for a, b in zip(ours.parameters(), copied.parameters(), strict=True)
        )
        assert torch.equal(loss_of(copied, given), want)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    assert type(fastbert.decelerate(ours)) is type(theirs)


def test_accelerating_twice_changes_nothing_and_back_is_back():
    model = bert("BertForMaskedLM")
    kinds = [type(module) for module in model.modules()]
    assert fastbert.accelerate(model) is model
    once = [type(module) for module in model.modules()]
    assert once != kinds
    assert [type(module) for module in fastbert.accelerate(model).modules()] == once
    assert [type(module) for module in fastbert.decelerate(model).modules()] == kinds


def test_what_is_no_bert_is_refused():
    with pytest.raises(TypeError, match="takes a torch module, not a str"):
        fastbert.accelerate("bert")
    with pytest.raises(ValueError, match="Linear holds no model of transformers"):
        fastbert.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="takes a BertConfig, not a RobertaConfig"):
        fastbert.BertModel(RobertaConfig())


def test_other_vocabularies_are_read_at_each_call():
    theirs, ours = pair("BertForMaskedLM")
    given = batch("BertForMaskedLM")
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(113)
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight
    given["input_ids"][0, 0] = 110
    given["labels"][0, 1] = 111
    assert_same_training(theirs, ours, given)
    for model in (theirs, ours):
        model.set_output_embeddings(nn.Linear(32, 113, bias=False))
        nn.init.ones_(model.get_output_embeddings().weight)
        model.cls.predictions.decoder.bias = nn.Parameter(torch.arange(113) / 100)
        model.zero_grad()
    assert_same_training(theirs, ours, given)


# Numbers of other kinds


@pytest.mark.parametrize("head", HEADS)
def test_autocast_to_bf16(head):
    theirs, ours = pair(head)
    given = batch(head)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = loss_of(theirs, given), loss_of(ours, given)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0.03, atol=0.03)
    a.backward()
    b.backward()
    want, found = gradients(theirs), gradients(ours)
    assert want.keys() == found.keys()
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (want, found)]
    assert F.cosine_similarity(*flat, dim=0) > 0.995
    for name in want:
        assert want[name].dtype == found[name].dtype == torch.float32


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05), (torch.float16, 0.01)]
)
def test_models_of_another_dtype(dtype, tolerance):
    theirs, ours = (model.to(dtype) for model in pair("BertForMaskedLM"))
    given = batch("BertForMaskedLM")
    a, b = loss_of(theirs, given), loss_of(ours, given)
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    b.backward()
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in gradients(ours).values())
    states = ours.eval().bert(**batch()).last_hidden_state
    assert states.dtype == dtype
    assert ours.float()(**given).loss.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_and_parametrised_products_are_called():
    given = batch("BertForSequenceClassification")
    theirs, ours = (m.eval() for m in pair("BertForSequenceClassification"))
    for model in (theirs, ours):
        nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[0].output.dense)
        nn.utils.parametrizations.orthogonal(model.bert.encoder.layer[1].attention.self.query)
    assert_same_training(theirs, ours, given)
    theirs, ours = (m.eval() for m in pair("BertForSequenceClassification"))
    theirs, ours = (
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
        for model in (theirs, ours)
    )
    assert fast(ours)
    with torch.no_grad():
        # What a product is scaled by is the largest value of all rows: padding's are among theirs.
        torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, atol=0.05, rtol=0)


# Gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    theirs, ours = (model.eval() for model in pair("BertForMaskedLM"))
    given = batch("BertForMaskedLM")
    with mode():
        a, b = theirs(**given), ours(**given)
    assert not b.logits.requires_grad
    real = given["attention_mask"].bool()
    torch.testing.assert_close(b.logits[real], a.logits[real], atol=1e-5, rtol=0)


def test_functional_call_and_transforms_of_functions():
    theirs, ours = (model.eval() for model in pair("BertForSequenceClassification"))
    given = batch("BertForSequenceClassification")
    other = {name: p * 1.1 for name, p in theirs.named_parameters()}
    a, b = (torch.func.functional_call(m, other, kwargs=given)["loss"] for m in (theirs, ours))
    torch.testing.assert_close(a, b)

    def loss(model):
        return lambda parameters: torch.func.functional_call(model, parameters, kwargs=given)[
            "loss"
        ]

    other = {name: p.detach() for name, p in other.items()}
    assert_close(torch.func.grad(loss(theirs))(other), torch.func.grad(loss(ours))(other))


@pytest.mark.parametrize("head", HEADS)
def test_frozen_layers(head):
    theirs, ours = pair(head)
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "layer.1" in name or ".bias" in name
    assert_same_training(theirs, ours, batch(head))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_of_gradients(implementation):
    """A penalty on the gradient by the embeddings, as in adversarial training."""
    found = []
    for model in pair("BertForSequenceClassification", attn_implementation=implementation):
        given = batch("BertForSequenceClassification")
        embeds = model.get_input_embeddings()(given.pop("input_ids")).detach().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = model(inputs_embeds=embeds, **given).loss
            (slope,) = torch.autograd.grad(loss, embeds, create_graph=True)
            real = given["attention_mask"][..., None]
            (loss + (slope * real).square().sum()).backward()
        found.append(gradients(model))
    assert_close(*found)


def test_gradients_of_gradients_that_torch_does_not_have_are_an_error():
    _, ours = pair("BertForSequenceClassification", attn_implementation="eager")
    loss = ours(**batch("BertForSequenceClassification")).loss
    slopes = torch.autograd.grad(loss, ours.bert.encoder.parameters(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        sum(slope.square().sum() for slope in slopes).backward()


def test_arguments_by_position():
    theirs, ours = (model.eval() for model in pair("BertForMaskedLM"))
    given = batch("BertForMaskedLM")
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
    names += ("encoder_hidden_states", "encoder_attention_mask", "labels")
    args = [given.get(name) for name in names]
    torch.testing.assert_close(ours(*args).loss, theirs(*args).loss)
    with pytest.raises(TypeError, match=r"takes 8 positional arguments, not 9"):
        ours(*args, None)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'input_ids'"):
        ours(args[0], input_ids=args[0])


def test_nothing_labelled_is_nan_as_in_transformers():
    theirs, ours = pair("BertForMaskedLM")
    given = batch("BertForMaskedLM")
    given["labels"].fill_(-100)
    a, b = theirs(**given).loss, ours(**given).loss
    assert a.isnan()
    assert b.isnan()
    a.backward()
    b.backward()
    for name, parameter in ours.named_parameters():
        of_theirs = theirs.get_parameter(name).grad
        assert (parameter.grad is None) == (of_theirs is None), name
        if of_theirs is not None and of_theirs.isfinite().all():
            assert parameter.grad.isfinite().all(), name


# Odd batches


@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
def test_a_negative_id_is_refused(name):
    _, ours = pair("BertModel")
    given = batch()
    given["position_ids"] = torch.arange(12).expand(4, 12).clone()
    given[name][1, 1] = -1
    with pytest.raises(IndexError, match=f"{name} holds -1"):
        ours(**given)


@pytest.mark.parametrize("head", HEADS)
def test_a_wholly_masked_sequence_does_not_depend_on_its_neighbours(head):
    _, ours = pair(head)
    ours.eval()
    given = batch(head, labels=False)
    given["attention_mask"][1] = 0
    once = ours(**given)
    other = {name: x.clone() for name, x in given.items()}
    other["input_ids"][[0, 2, 3]] = 5
    other["attention_mask"][2, ..., :2] = 1
    again = ours(**other)
    for a, b in zip(once.to_tuple(), again.to_tuple(), strict=True):
        if len(a) == 4:
            torch.testing.assert_close(a[1], b[1])
        else:  # multiple choice: rows of choices
            torch.testing.assert_close(a[2:4], b[2:4])
    given["attention_mask"].zero_()
    for value in ours(**given).to_tuple():
        assert value.isfinite().all()


def test_what_lies_at_padding_has_no_influence():
    _, ours = pair("BertForPreTraining")
    given = batch("BertForPreTraining")
    loss = ours(**given).loss
    given["input_ids"] = torch.where(given["attention_mask"].bool(), given["input_ids"], 96)
    assert torch.equal(ours(**given).loss, loss)
    loss.backward()
    assert ours.bert.embeddings.word_embeddings.weight.grad[96].abs().max() > 0  # by the decoder


# Dropout


def test_dropout_keeps_rates_follows_the_seed_and_differs_by_layer():
    ours = fastbert.accelerate(
        bert("BertModel", hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.25)
    ).train()
    kept = {}
    for name, module in ours.named_modules():
        if name.endswith("output.dropout"):
            module.register_forward_hook(
                lambda _m, _i, out, name=name: kept.update({name: out.detach().squeeze(0) != 0})
            )
    given = batch()
    torch.manual_seed(3)
    first = ours(**given).last_hidden_state
    torch.manual_seed(3)
    assert torch.equal(ours(**given).last_hidden_state, first)
    assert not torch.equal(ours(**given).last_hidden_state, first)
    masks = list(kept.values())
    assert len(masks) == 4
    for mask in masks:
        assert abs(mask.float().mean() - 0.75) < 0.06
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert 0.5 < (mask == other).float().mean() < 0.75
    given = {name: x.repeat(100, 1) for name, x in given.items()}
    theirs = fastbert.decelerate(copy.deepcopy(ours))
    many, want = (
        model(**given).last_hidden_state.detach().unflatten(0, (100, 4)) for model in (ours, theirs)
    )
    real = given["attention_mask"][:4].bool()
    assert (many.mean(0) - want.mean(0))[real].abs().mean() < 0.12
    assert abs(many.std(0)[real].mean() / want.std(0)[real].mean() - 1) < 0.05


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_dropout_again(reentrant):
    ours = fastbert.accelerate(
        bert("BertForMaskedLM", hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.25)
    ).train()
    given = batch("BertForMaskedLM")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ours.zero_grad()
        torch.manual_seed(5)
        ours(**given).loss.backward()
        found.append(gradients(ours))
    assert_close(*found, tolerance=1e-5)


# Compiled, traced, exported


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_exported_and_traced_it_is_transformers_own(said):
    theirs, ours = (model.eval() for model in pair("BertForSequenceClassification"))
    given = batch("BertForSequenceClassification", labels=False)
    with torch.no_grad():
        want = theirs(**given).logits
        exported = torch.export.export(ours, (), given).module()
        torch.testing.assert_close(exported(**given).logits, want)
        ours.config.return_dict = False
        traced = torch.jit.trace(ours, tuple(given.values())[:2], check_trace=False)
        torch.testing.assert_close(
            traced(given["input_ids"], given["attention_mask"])[0],
            theirs(given["input_ids"], given["attention_mask"]).logits,
        )
    assert "transformers' own path: it is compiled or traced" in " ".join(said)


@pytest.mark.parametrize("head", HEADS)
def test_tensors_without_values(said, head):
    """As where memory is estimated before anything is loaded."""
    theirs, ours = pair(head, num_hidden_layers=1)
    want = theirs(**batch(head))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = ours(**{name: mode.from_tensor(x) for name, x in batch(head).items()})
    assert {n: x.shape for n, x in want.items()} == {n: x.shape for n, x in found.items()}
    assert "transformers' own path: tensors without values" in " ".join(said)
    states = ours.to("meta").base_model(torch.ones(2, 3).long().to("meta"))[0]
    assert states.is_meta
    assert states.shape == (2, 3, 32)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForQuestionAnswering"])
def test_training_compiled_whole(head):
    theirs, ours = pair(head, num_hidden_layers=1)
    given = batch(head)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    a, b = theirs(**given).loss, compiled(**given).loss
    torch.testing.assert_close(b, a)
    a.backward()
    b.backward()
    assert_close(gradients(theirs), gradients(ours))


# Hooks


def test_hooks_see_every_module_that_is_called():
    calls = {}
    given = batch("BertForMaskedLM")
    for name, model in zip(("theirs", "ours"), pair("BertForMaskedLM"), strict=True):
        seen = calls[name] = {"forward": [], "before": [], "backward": []}
        for path, module in model.named_modules():
            module.register_forward_pre_hook(
                lambda _m, _i, path=path, seen=seen: seen["before"].append(path)
            )
            module.register_forward_hook(
                lambda _m, _i, _o, path=path, seen=seen: seen["forward"].append(path)
            )
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.Dropout | BertLayer):
                module.register_full_backward_hook(
                    lambda _m, _i, _o, path=path, seen=seen: seen["backward"].append(path)
                )
        model(**given).loss.backward()
    for kind, paths in calls["theirs"].items():
        assert sorted(paths) == sorted(calls["ours"][kind]), kind


def test_a_hook_may_change_what_it_sees():
    theirs, ours = pair("BertForMaskedLM")
    for model in (theirs, ours):
        model.bert.encoder.layer[0].register_forward_hook(lambda _m, _i, out: out * 1.5)
        model.bert.encoder.layer[1].attention.self.value.register_forward_hook(
            lambda _m, _i, out: out + 1
        )
        model.cls.predictions.decoder.register_forward_hook(lambda _m, _i, out: out * 2)
        model.bert.encoder.layer[1].output.LayerNorm.register_forward_pre_hook(
            lambda _m, given: (given[0] + 0.1,)
        )
    assert_same_training(theirs, ours, batch("BertForMaskedLM"))


# Outputs


@pytest.mark.parametrize(
    "flags",
    [
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"return_dict": False, "output_hidden_states": True},
        {"output_hidden_states": True, "output_attentions": True},
    ],
    ids=lambda flags: "-".join(flags),
)
@pytest.mark.parametrize("head", ["BertModel", "BertForTokenClassification"])
@pytest.mark.parametrize("by_config", [False, True])
def test_outputs_that_are_asked_for(head, flags, by_config):
    changes = flags if by_config else {}
    theirs, ours = (m.eval() for m in pair(head, attn_implementation="eager", **changes))
    given = batch(head) | ({} if by_config else flags)
    want, found = theirs(**given), ours(**given)
    assert type(want) is type(found)
    real = batch()["attention_mask"].bool()
    names = range(len(want)) if isinstance(want, tuple) else list(want)
    assert len(names) == len(found)
    for name in names:
        a, b = (x if isinstance(x, tuple) else (x,) for x in (want[name], found[name]))
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape
            if x.shape[:2] == real.shape:
                x, y = x[real], y[real]
            torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("asked", [1, [0, 2]])
def test_some_hidden_states(asked):
    theirs, ours = (model.eval() for model in pair("BertModel"))
    real = batch()["attention_mask"].bool()
    for a, b in zip(
        theirs(**batch(), output_hidden_states=asked).hidden_states,
        ours(**batch(), output_hidden_states=asked).hidden_states,
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b[real], a[real], atol=1e-5, rtol=0)


def test_a_decoder_generates_as_in_transformers(said):
    theirs, ours = (
        model.eval() for model in pair("BertLMHeadModel", is_decoder=True, pad_token_id=0)
    )
    prompt = {"input_ids": torch.tensor([[2, 5, 7]]), "attention_mask": torch.ones(1, 3).long()}
    a, b = (m.generate(**prompt, max_new_tokens=5, do_sample=False) for m in (theirs, ours))
    assert torch.equal(a, b)
    assert "transformers' own path: a decoder" in " ".join(said)


# Folders


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_a_folder_goes_through_our_classes_unchanged(tmp_path, head):
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    changes = {"id2label": labels, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}
    changes |= {"pad_token_id": None, "my_key": {"a": [1, 2]}}
    made = bert(head, **changes).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "made", max_shard_size="8KB")
    assert len(list((tmp_path / "made").glob("*.safetensors"))) > 1
    kinds = {"theirs": getattr(transformers, head), "ours": getattr(fastbert, head)}
    for name, kind in kinds.items():
        model = kind.from_pretrained(tmp_path / "made", dtype="auto")
        assert type(model) is kind
        assert model.dtype == torch.bfloat16
        assert model.config.my_key == {"a": [1, 2]}
        assert model.config.id2label == labels
        assert model.config.pad_token_id is None
        model.save_pretrained(tmp_path / name, max_shard_size="8KB")
        assert model.config.architectures == [head]
        for key, value in made.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key
    for path in (tmp_path / "theirs").iterdir():
        assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes(), path.name
    found = AutoModel.from_pretrained(tmp_path / "ours")
    assert type(found) is transformers.BertModel
    assert type(fastbert.accelerate(found)) is fastbert.BertModel
