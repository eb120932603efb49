"""BERT's relatives: transformers' numbers at every token that is read, labels and gradients too."""

import copy
import pickle
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fastbert.hf import layers, models, relatives
from fastbert.hf.accelerate import accelerate, decelerate
from fastbert.hf.models import Encoder
from fastbert.ops import REFERENCE

B, S, V = 3, 9, 37
SIZES = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 1,
    "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "summary_last_dropout": 0.0,
}  # fmt: skip
DISTIL = {
    "vocab_size": V, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "num_labels": 3,
    "max_position_embeddings": 16, "dropout": 0.0, "attention_dropout": 0.0, "qa_dropout": 0.0,
    "seq_classif_dropout": 0.0, "pad_token_id": 1,
}  # fmt: skip
HEADS = [name for name in relatives._FAMILY_OF if name.endswith("Model") or "For" in name]


def masks() -> dict[str, Tensor | None]:
    right = (torch.arange(S) < torch.tensor([S, 4, 1])[:, None]).long()
    holes = right.clone()
    holes[0, 3:5], holes[1, 0] = 0, 0
    zero = right.clone()
    zero[1] = 0
    left = right.flip(1)
    return {"none": None, "right": right, "left": left, "holes": holes, "zero row": zero}


def model_of(name: str, **changes: Any) -> Any:
    """transformers' model of that name, with weights that make every token count."""
    torch.manual_seed(0)
    sizes = DISTIL if name.startswith("Distil") else SIZES
    if name.startswith("Electra"):
        sizes = sizes | {"embedding_size": 8}
    if name.endswith("QuestionAnswering"):
        sizes = sizes | {"num_labels": 2}
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**sizes | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs_of(name: str, mask: Tensor | None) -> dict[str, Any]:
    torch.manual_seed(1)
    real = torch.ones(B, S) if mask is None else mask
    ids = torch.randint(2, V, (B, S)).masked_fill(real == 0, 1)
    given: dict[str, Any] = {"input_ids": ids}
    if not name.startswith("Distil"):
        given["token_type_ids"] = torch.randint(0, 2, (B, S))
    if mask is not None:
        given["attention_mask"] = mask
    if name.endswith("MultipleChoice"):
        given = {key: torch.stack([value, value.flip(0)], 1) for key, value in given.items()}
    return given


def labels_of(name: str, mask: Tensor | None) -> dict[str, Tensor]:
    words = torch.randint(0, V, (B, S))
    real = torch.ones(B, S) if mask is None else mask
    some = words.masked_fill((torch.rand(B, S) < 0.5) | (real == 0), -100)
    of_each = torch.randint(0, 2, (B,))
    if name.endswith("QuestionAnswering"):
        return {"start_positions": of_each, "end_positions": of_each + 1}
    of_head = {
        "MaskedLM": some,
        "TokenClassification": some.where(some < 0, some % 3),
        "ElectraForPreTraining": words % 2,
    }
    return {"labels": next((one for end, one in of_head.items() if name.endswith(end)), of_each)}


def close(name: str, mask: Tensor | None, wanted: Any, got: Any) -> None:
    """Compares all that is read: at padding no value of a token counts."""
    real = torch.ones(B, S).bool() if mask is None else mask != 0
    for key, value in got.items():
        pairs = [(wanted[key], value)]
        if key == "hidden_states":
            assert len(value) == len(wanted[key])
            pairs = list(zip(wanted[key], value, strict=True))
        for theirs, ours in pairs:
            assert theirs.shape == ours.shape, key
            if theirs.shape[:2] == real.shape:
                theirs, ours = theirs[real], ours[real]
            if theirs.dim() < 3 or len(theirs) != 2 * B:  # states of choices: by their logits
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=f"{name} {key}")


@pytest.mark.parametrize("name", HEADS)
def test_numbers_and_gradients_are_those_of_transformers(name: str) -> None:
    theirs = model_of(name)
    ours = accelerate(copy.deepcopy(theirs))
    assert type(ours) is getattr(relatives, name) and type(ours).__name__ == name
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    some = masks()
    if name.startswith(("XLMRoberta", "Camembert")):  # the same mixins as RoBERTa's
        some = {"holes": some["holes"]}
    for mask in some.values():
        given = inputs_of(name, mask)
        with torch.no_grad():
            theirs.eval(), ours.eval()
            close(name, mask, theirs(**given), ours(**given))
            if mask is some["holes"]:
                more = {"output_hidden_states": True}
                close(name, mask, theirs(**given, **more), ours(**given, **more))
        theirs.train(), ours.train()
        if name.endswith("Model"):
            read = torch.ones(B, S).bool() if mask is None else mask != 0
            read[:, 0] = True  # where poolers read
            outputs = [model(**given) for model in (theirs, ours)]
            losses = [out[0][read].sin().sum() for out in outputs]
            if "pooler_output" in outputs[0]:
                losses = [x + out[1].sum() for x, out in zip(losses, outputs, strict=True)]
        else:
            given |= labels_of(name, mask)
            wanted, got = (model(**given) for model in (theirs, ours))
            close(name, mask, wanted, got)
            losses = [wanted.loss, got.loss]
        for model, loss in zip((theirs, ours), losses, strict=True):
            model.zero_grad()
            loss.backward()
        for (part, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), part
            if a.grad is not None:
                torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-4, msg=part)


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "ElectraModel", "DistilBertForMaskedLM"])
def test_padding_is_left_out_of_each_layer(name: str) -> None:
    model = accelerate(model_of(name)).train()
    base = getattr(model, model.base_model_prefix, model)
    seen: list[int] = []
    norm = next(m for m in base._stack().layer[0].modules() if isinstance(m, torch.nn.LayerNorm))
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    mask = masks()["right"]
    model(**inputs_of(name, mask))
    assert seen == [int(mask.sum())]  # type: ignore[union-attr]


@pytest.mark.parametrize("family", relatives.FAMILIES, ids=lambda one: one.module)
def test_every_class_is_found_by_pickle_and_goes_back(family: relatives.Family) -> None:
    for name in family.mixins:
        ours = getattr(relatives, name)
        assert pickle.loads(pickle.dumps(ours)) is ours
        assert ours.__module__ == relatives.__name__ and ours.__qualname__ == name
    name = next(one for one in family.mixins if one.endswith("ForSequenceClassification"))
    model = accelerate(model_of(name)).eval()
    kinds = [type(module) for module in model.modules()]
    given = inputs_of(name, masks()["right"])
    logits = model(**given).logits
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert [type(module) for module in again.modules()] == kinds
        assert torch.equal(again(**given).logits, logits)
    decelerate(model)
    assert {type(m).__module__.split(".")[0] for m in model.modules()} <= {"transformers", "torch"}
    torch.testing.assert_close(model(**given).logits, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["RobertaForMaskedLM", "ElectraForMaskedLM", "DistilBertForMaskedLM", "DistilBertModel"],
)
def test_where_there_are_kernels_they_get_what_the_reference_wants(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()

    def counted(op: str) -> Any:
        real = getattr(REFERENCE, op)
        return lambda *args, **kwargs: (called.add(op), real(*args, **kwargs))[1]

    fused = ["attention", "dropout_add_layer_norm", "linear_gelu_residual"]
    heads = ["gelu_layer_norm", "linear_cross_entropy"]
    ops = replace(REFERENCE, **{op: counted(op) for op in fused + heads})
    for module in (layers, models):
        monkeypatch.setattr(module, "kernels_for", lambda *_: ops)
    wide: dict[str, Any] = {"hidden_size": 64}
    theirs = model_of(name, **{"dim": 64} if name.startswith("Distil") else wide)
    ours = accelerate(copy.deepcopy(theirs))
    mask = masks()["right"]
    given = inputs_of(name, mask)
    if name.endswith("Model"):
        losses = [model(**given)[0][:, 0].sin().sum() for model in (theirs, ours)]
    else:
        given |= labels_of(name, mask)
        losses = [model(**given).loss for model in (theirs.train(), ours.train())]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for (part, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None or b.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-4, msg=part)
    assert called == {*fused, *(heads if "For" in name else ())}


def test_a_class_is_built_and_loaded_by_itself(tmp_path: Any) -> None:
    ours = relatives.RobertaForTokenClassification
    model = ours(ours.config_class(**SIZES)).eval()
    assert isinstance(model.roberta, Encoder)
    model.save_pretrained(tmp_path)
    again = ours.from_pretrained(tmp_path).eval()
    given = inputs_of(ours.__name__, masks()["right"])
    assert torch.equal(again(**given).logits, model(**given).logits)
    plain = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert type(plain) is transformers.RobertaForTokenClassification


def test_roberta_counts_positions_as_transformers_does() -> None:
    theirs = model_of("RobertaModel").eval()
    ours = accelerate(copy.deepcopy(theirs))
    mask = masks()["left"]
    assert mask is not None
    given = inputs_of("RobertaModel", mask)
    ids = given.pop("input_ids")
    ids[0, 6] = 1  # a padding token that is real
    for more in (
        {"input_ids": ids},
        {"inputs_embeds": torch.randn(B, S, 16)},
        {"input_ids": ids, "position_ids": torch.arange(S)[None]},
    ):
        close("RobertaModel", mask, theirs(**given, **more), ours(**given, **more))
    long = torch.full((1, 20), 1)
    long[:, :14] = 5  # 16 positions begin after the padding token's
    close("RobertaModel", long == 5, theirs(long, long == 5), ours(long, long == 5))
    long[:, 14] = 5
    with pytest.raises(ValueError, match="sequences of 15 tokens: the model has 14 positions"):
        ours(long, long == 5)


@pytest.mark.parametrize("summary", ["last", "mean", "cls_index"])
def test_a_summary_of_other_tokens_is_that_of_transformers(summary: str) -> None:
    name = "ElectraForMultipleChoice"
    theirs = model_of(name, summary_type=summary).eval()
    ours = accelerate(copy.deepcopy(theirs))
    for mask in (None, masks()["right"]):
        given = inputs_of(name, mask)
        torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, atol=1e-5, rtol=0)


def test_a_loss_that_was_replaced_is_the_one_that_is_taken() -> None:
    theirs = model_of("DistilBertForMaskedLM")
    theirs.mlm_loss_fct = torch.nn.CrossEntropyLoss(label_smoothing=0.3)
    ours = accelerate(copy.deepcopy(theirs))
    mask = masks()["right"]
    given = inputs_of("DistilBertForMaskedLM", mask) | labels_of("DistilBertForMaskedLM", mask)
    torch.testing.assert_close(ours(**given).loss, theirs(**given).loss)


def test_distilbert_with_a_part_of_ones_own_calls_it() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    theirs = model_of("DistilBertModel").eval()
    for layer in theirs.transformer.layer:
        layer.attention.out_lin.__class__ = Doubled
        layer.ffn.lin2.__class__ = Doubled
    ours = accelerate(copy.deepcopy(theirs))
    mask = masks()["right"]
    given = inputs_of("DistilBertModel", mask)
    calls: list[int] = []
    for layer in (ours.transformer.layer[0].attention, ours.transformer.layer[1].ffn):
        layer.register_forward_hook(lambda *_: calls.append(1))
    close("DistilBertModel", mask, theirs(**given), ours(**given))
    assert len(calls) == 2


def test_only_families_that_are_there_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {family.source: set(relatives.classes_of(family)) for family in relatives.FAMILIES}
    for family in relatives.FAMILIES[1:]:
        monkeypatch.delitem(sys.modules, family.source)
    assert set(relatives.imported()) == ours[relatives.FAMILIES[0].source]
    assert not sys.modules.keys() & [family.source for family in relatives.FAMILIES[1:]]


_ADVICE = '; attn_implementation="fastbert" leaves the padding out of attention here, too'
REFUSED = {
    **dict.fromkeys(("AlbertModel", "ModernBertModel"), _ADVICE),
    **dict.fromkeys(("MPNetModel", "DebertaV2Model", "LongformerModel", "BigBirdModel"), ""),
    **dict.fromkeys(("GPT2Model", "T5EncoderModel", "EsmModel", "ViTModel"), ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name(name: str) -> None:
    kind = getattr(transformers, name)
    special = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    small = {"n_embd": 16, "n_head": 2, "n_layer": 1, "d_model": 16, "d_ff": 16, "num_layers": 1}
    model = kind(kind.config_class(**SIZES | special | small, attention_window=4, image_size=32))
    with pytest.raises(ValueError, match=f"^{name}.* cannot be accelerated") as error:
        accelerate(model)
    line = str(error.value)
    assert line.endswith("RoBERTa, XLM-R, CamemBERT, ELECTRA and DistilBERT" + REFUSED[name])
    assert "\n" not in line


def test_a_subclass_is_refused_before_anything_is_swapped() -> None:
    class Mine(transformers.RobertaModel):
        pass

    model = Mine(transformers.RobertaConfig(**SIZES))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="no subclass such as Mine of RobertaModel"):
        accelerate(model)
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(ValueError, match="Linear holds no model of transformers"):
        accelerate(torch.nn.Linear(2, 2))


def test_an_unknown_name_is_none_of_the_module() -> None:
    with pytest.raises(AttributeError, match="no attribute 'AlbertModel'"):
        relatives.AlbertModel  # noqa: B018
    assert "DistilBertModel" in dir(relatives)
