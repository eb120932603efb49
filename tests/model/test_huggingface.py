"""Against transformers' BERT with the same weights: fp32, dropout 0, every output and gradient."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BertConfig
from transformers import BertForMaskedLM as HFMaskedLM
from transformers import BertForPreTraining as HFPreTraining
from transformers import BertModel as HFModel

import fastbert
from fastbert.config import ModelConfig
from fastbert.errors import UserError

SHAPES = [(2, 32), (2, 64), (1, 64), (4, 32)]  # heads, head size
LENGTHS = {
    "full": [24, 24, 24],
    "ragged": [24, 3, 17, 9],
    "length_1": [1, 24, 1, 2],
    "single": [1],
}


def hf_config(heads=2, head_size=32, **changes):
    values = {
        "vocab_size": 311,
        "hidden_size": heads * head_size,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "intermediate_size": 4 * heads * head_size,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 64,
    }
    return BertConfig(**(values | changes))


def randomized(model):
    """Weights large enough that a wrong LayerNorm, bias or scale shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def padded_batch(lengths, vocab_size=311):
    S = max(lengths)
    attention_mask = (torch.arange(S) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(0, vocab_size, (len(lengths), S)) * attention_mask
    token_type_ids = torch.randint(0, 2, input_ids.shape) * attention_mask
    chosen = (torch.rand(input_ids.shape) < 0.3) & attention_mask.bool()
    chosen[0, 0] = True
    labels = torch.where(chosen, torch.randint(0, vocab_size, input_ids.shape), -100)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "labels": labels,
        "next_sentence_label": torch.randint(0, 2, (len(lengths),)),
    }


def both(tmp_path, theirs_class, ours_class, config=None):
    theirs = randomized(theirs_class(config or hf_config())).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, ours_class.from_pretrained(tmp_path / "theirs")


def largest(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("heads", "head_size"), SHAPES)
@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_new"])
def test_pretraining_outputs_loss_and_every_gradient(
    tmp_path, lengths, heads, head_size, hidden_act
):
    config = hf_config(heads, head_size, hidden_act=hidden_act)
    theirs, ours = both(tmp_path, HFPreTraining, fastbert.BertForPreTraining, config)
    batch = padded_batch(lengths)
    want = theirs(**batch, output_hidden_states=True)
    got = ours(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    assert largest(got.prediction_logits[real], want.prediction_logits[real]) < 1e-5
    assert largest(got.seq_relationship_logits, want.seq_relationship_logits) < 1e-5
    assert len(got.hidden_states) == len(want.hidden_states)
    for mine, other in zip(got.hidden_states, want.hidden_states, strict=True):
        assert largest(mine[real], other[real]) < 1e-5
        assert not mine[~real].any()
    assert abs(got.loss / want.loss - 1) < 1e-6

    want.loss.backward()
    ours.train()
    sparse = ours(**batch)  # the road that computes labelled and [CLS] rows only
    assert sparse.prediction_logits is None
    assert abs(sparse.loss / want.loss - 1) < 1e-6
    sparse.loss.backward()
    gradients = ours.hf_gradients()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().clamp(min=1e-3)  # a key's bias has gradient 0 exactly
        assert largest(gradient, expected[name]) < 1e-4 * scale, name


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_encoder_and_pooler(tmp_path, lengths):
    theirs, ours = both(tmp_path, HFModel, fastbert.BertModel)
    batch = {k: v for k, v in padded_batch(lengths).items() if "label" not in k}
    want, got = theirs(**batch), ours(**batch)
    real = batch["attention_mask"].bool()
    assert largest(got.last_hidden_state[real], want.last_hidden_state[real]) < 1e-5
    assert largest(got.pooler_output, want.pooler_output) < 1e-5
    assert type(got) is type(want)


def test_masked_lm(tmp_path):
    theirs, ours = both(tmp_path, HFMaskedLM, fastbert.BertForMaskedLM)
    batch = padded_batch([24, 7, 13])
    del batch["next_sentence_label"]
    want, got = theirs(**batch), ours(**batch)
    assert type(got) is type(want)
    assert abs(got.loss / want.loss - 1) < 1e-6
    assert ours(**batch, return_dict=False)[0] == got.loss
    del batch["labels"]
    assert largest(ours(**batch).logits[0], theirs(**batch).logits[0]) < 1e-5


def test_holes_in_the_attention_mask_keep_their_positions(tmp_path):
    theirs, ours = both(tmp_path, HFModel, fastbert.BertModel)
    batch = {k: v for k, v in padded_batch([24, 24]).items() if "label" not in k}
    batch["attention_mask"][:, 5:9] = 0
    real = batch["attention_mask"].bool()
    difference = ours(**batch).last_hidden_state - theirs(**batch).last_hidden_state
    assert difference[real].abs().max() < 1e-5


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
def test_round_trip_is_exact_and_key_sets_are_equal(tmp_path, name):
    import transformers

    theirs, ours = both(tmp_path, getattr(transformers, name), getattr(fastbert, name))
    ours.save_pretrained(tmp_path / "ours")
    with (
        safe_open(tmp_path / "theirs/model.safetensors", "pt") as a,
        safe_open(tmp_path / "ours/model.safetensors", "pt") as b,
    ):
        assert set(a.keys()) == set(b.keys())
        assert a.metadata() == b.metadata() == {"format": "pt"}
        for key in a.keys():  # noqa: SIM118 (not a dict)
            assert torch.equal(a.get_tensor(key), b.get_tensor(key)), key
    again, info = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (key, mine), other in zip(
        again.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, other), key
    second = getattr(fastbert, name).from_pretrained(tmp_path / "ours")
    for mine, other in zip(second.parameters(), ours.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_pretrained_heads_are_optional_but_the_encoder_is_not(tmp_path):
    HFModel(hf_config()).save_pretrained(tmp_path / "encoder")
    with pytest.warns(UserWarning, match=r"cls\.predictions\.bias.*cls\.seq_relationship\.bias"):
        fastbert.BertForPreTraining.from_pretrained(tmp_path / "encoder")
    config = json.loads((tmp_path / "encoder/config.json").read_text())
    config["num_hidden_layers"] = 4
    (tmp_path / "encoder/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"12 weights are missing, layers\.3\."):
        fastbert.BertModel.from_pretrained(tmp_path / "encoder")


def test_old_names_and_bin_files_load(tmp_path):
    theirs = randomized(HFPreTraining(hf_config()))
    theirs.save_pretrained(tmp_path)
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in theirs.state_dict().items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    ours = fastbert.BertForPreTraining.from_pretrained(tmp_path).hf_state_dict()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours[name], parameter), name


def variants(theirs):
    """By name: weights that a folder may hold, and whether transformers 5 loads them as we do."""
    plain = {name: t.clone() for name, t in theirs.state_dict().items() if "decoder" not in name}
    word = plain["bert.embeddings.word_embeddings.weight"]
    no_word = {name: t for name, t in plain.items() if t is not word}
    no_bias = {name: t for name, t in plain.items() if name != "cls.predictions.bias"}
    bias = torch.randn(len(word))
    return {
        "no decoder": plain,
        "two biases": {**plain, "cls.predictions.decoder.bias": bias},
        "two biases, the other order": {"cls.predictions.decoder.bias": bias, **plain},
        "the decoder's bias alone": {**no_bias, "cls.predictions.decoder.bias": bias},
        "the decoder's matrix alone": {**no_word, "cls.predictions.decoder.weight": word},
        "no prefix": {name.removeprefix("bert."): t for name, t in plain.items()},
        "fp16": {name: t.half() for name, t in plain.items()},
        "fp64": {name: t.double() for name, t in plain.items()},
        "more than is read": {
            **plain,
            "bert.encoder.layer.9.output.dense.bias": bias,
            "lm.weight": bias.long(),
        },
    }


VARIANTS = tuple(variants(HFPreTraining(hf_config(1, 16, vocab_size=31, num_hidden_layers=1))))


@pytest.mark.filterwarnings("ignore:.*differ. the second is taken, as transformers 5 does")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_form_of_the_names_gives_transformers_logits(tmp_path, name):
    config = hf_config(1, 16, vocab_size=31, num_hidden_layers=1)
    state = variants(randomized(HFPreTraining(config)))[name]
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = HFPreTraining.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = fastbert.BertForPreTraining.from_pretrained(tmp_path)
    batch = {k: v for k, v in padded_batch([9, 5], 31).items() if "label" not in k}
    real = batch["attention_mask"].bool()
    want, got = theirs(**batch), ours(**batch)
    assert largest(got.prediction_logits[real], want.prediction_logits[real]) < 1e-5
    assert largest(got.seq_relationship_logits, want.seq_relationship_logits) < 1e-5


def test_two_biases_are_told(tmp_path):
    config = hf_config(1, 16, vocab_size=31, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    state = variants(HFPreTraining(config))["two biases"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=r"decoder\.bias differ: the second is taken"):
        fastbert.BertForPreTraining.from_pretrained(tmp_path)
    fastbert.BertModel.from_pretrained(tmp_path)  # has no use for either


BAD_WEIGHTS = {
    "another matrix": ({"cls.predictions.decoder.weight": torch.ones(31, 16)}, "is not tied"),
    "integers": (
        {"bert.embeddings.word_embeddings.weight": torch.ones(31, 16).long()},
        "word_embeddings.weight is int64: weights must be fp32",
    ),
    "a part's shape": (
        {"bert.encoder.layer.0.attention.self.query.weight": torch.ones(16, 8)},
        "query.weight has shape (16, 8), but config.json asks for (16, 16)",
    ),
    "parts that add up": (
        {
            "bert.encoder.layer.0.attention.self.query.weight": torch.ones(8, 16),
            "bert.encoder.layer.0.attention.self.key.weight": torch.ones(24, 16),
        },
        "query.weight has shape (8, 16)",
    ),
    "a number": ({"bert.pooler.dense.bias": torch.tensor(1.0)}, "has shape ()"),
    "old and new": (
        {"bert.embeddings.LayerNorm.gamma": torch.full((16,), 7.0)},
        "bert.embeddings.LayerNorm.weight is there twice",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_cannot_be_taken_are_named(tmp_path, changes, message):
    config = hf_config(1, 16, vocab_size=31, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    state = {**variants(HFPreTraining(config))["no decoder"], **changes}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as raised:
        fastbert.BertForPreTraining.from_pretrained(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: ") and message in str(raised.value)


def test_weights_that_are_not_finite_are_told(tmp_path):
    theirs = HFPreTraining(hf_config(1, 16, vocab_size=31, num_hidden_layers=1))
    with torch.no_grad():
        theirs.bert.pooler.dense.bias[0] = torch.nan
    theirs.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"1 weights hold NaN or infinity, bert\.pooler\.dense\.bias"
    ):
        fastbert.BertForPreTraining.from_pretrained(tmp_path)


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_weights_of_both_kinds(tmp_path, whole):
    theirs = randomized(HFModel(hf_config()))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    weight_map = {}
    for part in (0, 1):
        shard = {name: t for index, (name, t) in enumerate(state.items()) if index % 2 == part}
        file = f"part-{part}.{whole.rpartition('.')[2]}"
        (torch.save if whole.endswith(".bin") else save_file)(shard, tmp_path / file)
        weight_map |= dict.fromkeys(shard, file)
    index = tmp_path / f"{whole}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    ours = fastbert.BertModel.from_pretrained(tmp_path).hf_state_dict()
    for name, tensor in state.items():
        assert torch.equal(ours["bert." + name], tensor), name
    for wrong in ("../x.bin", "..", ".", "", 5, None, ["a"]):
        index.write_text(json.dumps({"weight_map": {"a": wrong}}))
        with pytest.raises(UserError):
            fastbert.BertModel.from_pretrained(tmp_path)
    for wrong in ("[]", "{}", '{"weight_map": []}', "[" * 10**5, "\0", '{"weight_map": 1'):
        index.write_text(wrong)
        with pytest.raises(UserError, match="cannot be read"):
            fastbert.BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.ones(1)}, torch.ones(3), None])
def test_a_bin_file_of_something_else(tmp_path, content):
    hf_config().save_pretrained(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as raised:
        fastbert.BertModel.from_pretrained(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: ") and "\n" not in str(raised.value)


class _Exploit:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_is_not_executed(tmp_path, capsys):
    HFModel(hf_config()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": _Exploit()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read"):
        fastbert.BertModel.from_pretrained(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_bad_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match="not a folder, and not to be had from a hub"):
        fastbert.BertModel.from_pretrained(tmp_path / "nowhere")
    HFModel(hf_config()).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        fastbert.BertModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds neither model\.safetensors"):
        fastbert.BertModel.from_pretrained(tmp_path)


def test_wrong_inputs_are_value_errors():
    model = fastbert.BertForMaskedLM(
        ModelConfig(64, 32, 1, 1, 64, max_position_embeddings=16, hidden_dropout_prob=0.0)
    )
    ids = torch.ones(2, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, attention_mask=torch.ones(2, 7))
    with pytest.raises(ValueError, match="the model has 16 positions"):
        model(torch.ones(1, 17, dtype=torch.long))
    mask = torch.tensor([[1] * 7 + [0]] * 2)
    with pytest.raises(ValueError, match="-100 wherever attention_mask is 0"):
        model(ids, attention_mask=mask, labels=ids)


def test_torch_seed_governs_dropout():
    model = fastbert.BertModel(ModelConfig(64, 32, 2, 1, 64)).train()
    ids = torch.randint(0, 64, (2, 8))
    torch.manual_seed(1)
    first, second = model(ids).last_hidden_state, model(ids).last_hidden_state
    torch.manual_seed(1)
    assert torch.equal(model(ids).last_hidden_state, first)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)
