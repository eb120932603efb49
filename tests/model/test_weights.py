"""Files of weights, as others and we ourselves write them, into the packed model of a run.

Beside transformers' model of the same folder: fp32, dropout 0.
"""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from fastbert.config import ModelConfig, model_config
from fastbert.errors import UserError
from fastbert.hf.initial import read_initial
from fastbert.hf.weights import save_folder, to_hf
from fastbert.model.bert import Bert
from fastbert.train.initial import NewTokens, begin_with

V = 31
NONE = NewTokens(0, ())


def hf_config(**changes):
    values = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "intermediate_size": 64,
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
    return model.eval()


def loaded(folder, *, nsp=True, new=NONE, rows=0):
    """The model of a run that begins with a folder, and what its log says."""
    sizes = model_config(str(folder))
    initial = read_initial(folder, sizes, nsp)
    if rows:
        sizes = type(sizes)(**{**vars(sizes), "vocab_size": rows})
    model = Bert(sizes, pooler=nsp, next_sentence=nsp).eval()
    return model, begin_with(initial, model, new)


def named(model):
    return to_hf(dict(model.named_parameters()), model.config)


def assert_same_logits(theirs, ours, lengths=(9, 5)):
    sequences = [torch.randint(0, V, (length,)) for length in lengths]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.cat(sequences)
    types = torch.randint(0, 2, ids.shape)
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        got = ours.predict(
            ids, types, positions, starts.int(), max(lengths), torch.arange(len(ids))
        )
        for index, (start, end) in enumerate(pairwise(starts)):
            want = theirs(ids[None, start:end], token_type_ids=types[None, start:end])
            assert (got.mlm[start:end] - want.prediction_logits[0]).abs().max() < 1e-5
            assert (got.next_sentence[index] - want.seq_relationship_logits[0]).abs().max() < 1e-5


def variants(theirs):
    """By name: weights that a folder may hold, all of which transformers 5 loads as we do."""
    plain = {name: t.clone() for name, t in theirs.state_dict().items() if "decoder" not in name}
    word = plain["bert.embeddings.word_embeddings.weight"]
    no_word = {name: t for name, t in plain.items() if t is not word}
    no_bias = {name: t for name, t in plain.items() if name != "cls.predictions.bias"}
    bias = torch.randn(len(word))
    return {
        "as it is saved": dict(plain),
        "two biases": {**plain, "cls.predictions.decoder.bias": bias},
        "two biases, the other order": {"cls.predictions.decoder.bias": bias, **plain},
        "the decoder's bias alone": {**no_bias, "cls.predictions.decoder.bias": bias},
        "the decoder's matrix alone": {**no_word, "cls.predictions.decoder.weight": word},
        "no prefix": {name.removeprefix("bert."): t for name, t in plain.items()},
        "gamma and beta": {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): t
            for name, t in plain.items()
        },
        "fp16": {name: t.half() for name, t in plain.items()},
        "fp64": {name: t.double() for name, t in plain.items()},
        "more than is read": {
            **plain,
            "bert.encoder.layer.9.output.dense.bias": bias,
            "lm.weight": bias.long(),
        },
    }


VARIANTS = tuple(variants(BertForPreTraining(hf_config())))


FILES = [*((name, "safetensors") for name in VARIANTS), ("as it is saved", "bin"), ("fp16", "bin")]


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_every_form_of_the_names_gives_transformers_logits(tmp_path, name, kind):
    state = variants(randomized(BertForPreTraining(hf_config())))[name]
    hf_config().save_pretrained(tmp_path)
    if kind == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = BertForPreTraining.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours, said = loaded(tmp_path)
    assert_same_logits(theirs, ours)
    assert said[-1].startswith(f"init: 46 weights of {tmp_path}; new, set at random: none")
    assert len(said) == (2 if name.startswith("two biases") else 1)


def test_what_we_write_ourselves_comes_back_bit_for_bit(tmp_path):
    wrote = Bert(ModelConfig(V, 16, 2, 1, 64, max_position_embeddings=64))
    save_folder(tmp_path, dict(wrote.named_parameters()), wrote.config, "BertForPreTraining")
    ours, _ = loaded(tmp_path)
    for mine, other in zip(ours.parameters(), wrote.parameters(), strict=True):
        assert torch.equal(mine, other)


_TRANSFORM = "cls.predictions.transform"
_SENTENCES = {"bert.pooler.dense", "cls.seq_relationship"}
HEADS = {
    BertModel: (
        39,
        {
            "cls.predictions",
            f"{_TRANSFORM}.dense",
            f"{_TRANSFORM}.LayerNorm",
            "cls.seq_relationship",
        },
    ),
    BertForMaskedLM: (42, _SENTENCES),
    BertForPreTraining: (46, {""}),
}


@pytest.mark.parametrize("theirs_class", HEADS)
def test_what_a_head_lacks_is_named_and_random(tmp_path, theirs_class):
    theirs = randomized(theirs_class(hf_config()))
    theirs.save_pretrained(tmp_path)
    ours, (line,) = loaded(tmp_path)
    state = {
        name if name.startswith(("bert.", "cls.")) else f"bert.{name}": tensor
        for name, tensor in theirs.state_dict().items()
    }
    count, lacking = HEADS[theirs_class]
    start = f"init: {count} weights of {tmp_path}; new, set at random: "
    assert line.startswith(start)
    told = line.removeprefix(start).split(", ")
    assert sorted(told) == sorted(named(ours).keys() - state.keys() or ["none"])
    assert {name.rpartition(".")[0] for name in told} == lacking
    for name, tensor in named(ours).items():
        if name in state:
            assert torch.equal(tensor, state[name]), name


def test_heads_that_are_not_trained_are_named(tmp_path):
    theirs = randomized(BertForPreTraining(hf_config()))
    with torch.no_grad():
        theirs.cls.seq_relationship.bias[0] = torch.nan  # nobody will know
    theirs.save_pretrained(tmp_path)
    _, (line,) = loaded(tmp_path, nsp=False)
    assert line == (
        f"init: 42 weights of {tmp_path}; new, set at random: none; not used: "
        "bert.pooler.dense.weight, bert.pooler.dense.bias, cls.seq_relationship.weight, "
        "cls.seq_relationship.bias"
    )


def test_new_rows_are_the_mean_of_their_pieces(tmp_path):
    theirs = randomized(BertForPreTraining(hf_config()))
    theirs.save_pretrained(tmp_path)
    word, bias = theirs.bert.embeddings.word_embeddings.weight, theirs.cls.predictions.bias
    for first, rows in ((V, V + 2), (V - 1, V + 1), (V - 5, V)):
        ours, _ = loaded(tmp_path, new=NewTokens(first, ([3, 4, 9], [7])), rows=rows)
        for mine, old in ((ours.embeddings.word, word), (ours.mlm.bias, bias)):
            assert torch.equal(mine[:first], old[:first])
            assert torch.equal(mine[first], old[[3, 4, 9]].mean(0))
            assert torch.equal(mine[first + 1], old[7])
            assert torch.equal(mine[first + 2 :], old[first + 2 :])
            assert len(mine) == rows


def test_two_biases_are_told(tmp_path):
    hf_config().save_pretrained(tmp_path)
    save_file(
        variants(BertForPreTraining(hf_config()))["two biases"], tmp_path / "model.safetensors"
    )
    _, said = loaded(tmp_path)
    assert said[0].startswith(f"init: {tmp_path}: cls.predictions.bias and ")
    assert "decoder.bias differ: the second is taken" in said[0]


def test_the_encoder_is_required(tmp_path):
    BertModel(hf_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"12 weights are missing, layers\.2\."):
        loaded(tmp_path)


BAD_WEIGHTS = {
    "another matrix": ({"cls.predictions.decoder.weight": torch.ones(V, 16)}, "is not tied"),
    "integers": (
        {"bert.embeddings.word_embeddings.weight": torch.ones(V, 16).long()},
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
    "another vocabulary": (
        {"bert.embeddings.word_embeddings.weight": torch.ones(V + 1, 16)},
        "word_embeddings.weight has shape (32, 16), but config.json asks for (31, 16)",
    ),
    "old and new": (
        {"bert.embeddings.LayerNorm.gamma": torch.full((16,), 7.0)},
        "bert.embeddings.LayerNorm.weight is there twice",
    ),
    "not a number": (
        {"bert.pooler.dense.bias": torch.full((16,), torch.nan)},
        "bert.pooler.dense.bias holds NaN or infinity: a run cannot begin with it",
    ),
    "infinite, amid a fused matrix": (
        {"bert.encoder.layer.1.attention.self.key.bias": torch.full((16,), torch.inf)},
        "bert.encoder.layer.1.attention.self.key.bias holds NaN or infinity",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_cannot_be_taken_are_named(tmp_path, changes, message):
    hf_config().save_pretrained(tmp_path)
    state = {**variants(BertForPreTraining(hf_config()))["as it is saved"], **changes}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as raised:
        loaded(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: ") and message in str(raised.value)


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_weights_of_both_kinds(tmp_path, whole):
    theirs = randomized(BertModel(hf_config()))
    hf_config().save_pretrained(tmp_path)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    weight_map = {}
    for part in (0, 1):
        shard = {name: t for index, (name, t) in enumerate(state.items()) if index % 2 == part}
        file = f"part-{part}.{whole.rpartition('.')[2]}"
        (torch.save if whole.endswith(".bin") else save_file)(shard, tmp_path / file)
        weight_map |= dict.fromkeys(shard, file)
    index = tmp_path / f"{whole}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    ours = named(loaded(tmp_path)[0])
    for name, tensor in state.items():
        assert torch.equal(ours["bert." + name], tensor), name
    for wrong in ("../x.bin", "..", ".", "", 5, None, ["a"]):
        index.write_text(json.dumps({"weight_map": {"a": wrong}}))
        with pytest.raises(UserError):
            loaded(tmp_path)
    for wrong in ("[]", "{}", '{"weight_map": []}', "[" * 10**5, "\0", '{"weight_map": 1'):
        index.write_text(wrong)
        with pytest.raises(UserError, match="cannot be read"):
            loaded(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.ones(1)}, torch.ones(3), None])
def test_a_bin_file_of_something_else(tmp_path, content):
    hf_config().save_pretrained(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as raised:
        loaded(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: ") and "\n" not in str(raised.value)


class _Exploit:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_is_not_executed(tmp_path, capsys):
    hf_config().save_pretrained(tmp_path)
    torch.save({"x": _Exploit()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read"):
        loaded(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_a_file_cut_short_or_missing(tmp_path):
    BertModel(hf_config()).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        loaded(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds neither model\.safetensors"):
        loaded(tmp_path)
