"""Settings: bounds, presets, config.json in and out, TOML round trip."""

import dataclasses
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbert.commands.options import _parse
from fastbert.config import PRESETS, ModelConfig, PretrainConfig, model_config, to_hf_dict
from fastbert.errors import UserError, did_you_mean
from fastbert.settings import Setting, load_config, settings, to_toml
from fastbert_bench.config import (
    ConvergenceBenchConfig,
    DataBenchConfig,
    DropinBenchConfig,
    EstimateConfig,
    InferenceBenchConfig,
    KernelBenchConfig,
    ProfileKernelConfig,
    ProfileStepConfig,
    ReportConfig,
    StepBenchConfig,
)

CONFIGS = [
    ModelConfig,
    PretrainConfig,
    StepBenchConfig,
    KernelBenchConfig,
    DataBenchConfig,
    InferenceBenchConfig,
    ConvergenceBenchConfig,
    DropinBenchConfig,
    ReportConfig,
    EstimateConfig,
    ProfileStepConfig,
    ProfileKernelConfig,
]


def parameters(config: ModelConfig) -> int:
    """Weights of BertModel with its pooler, biases included."""
    H, F = config.hidden_size, config.intermediate_size
    rows = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    layer = 4 * (H * H + H) + (H * F + F) + (F * H + H) + 2 * 2 * H
    return rows * H + 2 * H + config.num_hidden_layers * layer + H * H + H


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_setting_is_described(config_class: type) -> None:
    for setting in settings(config_class):
        assert setting.type in (bool, int, float, str)
        assert setting.group.name and setting.group.help
        assert setting.help
        assert len(setting.help) <= 90
        assert "\n" not in setting.help


NUMBERS = [
    pytest.param(config_class, setting, id=f"{config_class.__name__}.{setting.name}")
    for config_class in CONFIGS
    for setting in settings(config_class)
    if setting.type in (int, float)
]


@pytest.mark.parametrize(("config_class", "setting"), NUMBERS)
def test_every_number_has_bounds_that_its_message_names(
    config_class: type, setting: Setting, tmp_path: Path
) -> None:
    top = setting.at_most if setting.at_most is not None else setting.less_than
    assert top is not None
    if setting.type is int:
        assert type(top) is int and setting.at_least is not None
        wrong: list[Any] = [top + 1, 2**63, 10**20, 10**2000, -1, -(2**63)]
        wrong += [2**31] if top < 2**31 else []
    else:
        wrong = [math.inf, -math.inf, math.nan, 1e308, 10**400, -1.0, -5e-324]
    path = tmp_path / "run.toml"
    for value in wrong:
        if isinstance(value, float):
            path.write_text(f"{setting.name} = {value!r}\n")
        else:
            path.write_text(f"{setting.name} = {hex(value) if value > 0 else value}\n")
        typed = {setting.name: value}
        for toml, overrides in ((path, {}), (None, typed)):
            with pytest.raises(UserError) as raised:
                load_config(config_class, toml, overrides)
            message = str(raised.value)
            assert f"{setting.name} = " in message and len(message) < 400
            if math.isfinite(value) if isinstance(value, float) else value.bit_length() < 64:
                bound = str(top) if type(top) is int else f"{top:g}"
                assert message.endswith((f" at most {bound}", f" less than {bound}"))
    for value in (2**31, 2**63, 10**20) if setting.type is int else ():
        if value > top:
            typed = {setting.name: _parse(setting, str(value))}
            with pytest.raises(UserError, match=f"{setting.name} = {value} must be at least"):
                load_config(config_class, None, typed)


@pytest.mark.parametrize(
    ("config_class", "name"),
    [
        (PretrainConfig, "curriculum"),
        (PretrainConfig, "mlm_probability"),
        (DataBenchConfig, "num_workers"),
        (DataBenchConfig, "max_seq_lengths"),
        (ProfileKernelConfig, "shape"),
    ],
)
@pytest.mark.parametrize("number", [-1, 2**31, 2**63, 10**20, "9" * 5000])
def test_numbers_inside_a_text_have_bounds(config_class: type, name: str, number: Any) -> None:
    forms = {"curriculum": "{}:0.5", "shape": "T={}", "num_workers": "0,{}"}
    forms |= {"mlm_probability": "{}:0.5,0.1"}
    with pytest.raises(UserError) as raised:
        config_class(**{name: forms.get(name, "{}").format(number)})
    assert str(raised.value).startswith(f"{name} = ") and len(str(raised.value)) < 400


@pytest.mark.parametrize("config_class", [StepBenchConfig, InferenceBenchConfig, ProfileStepConfig])
def test_products_have_bounds(config_class: type) -> None:
    with pytest.raises(UserError, match="T x S must be at most 8589934592"):
        ProfileKernelConfig(shape="T=16777216,S=1048576,A=64")
    config_class(batch_size=2**16, max_seq_length=2**8)
    with pytest.raises(UserError, match="tokens must be at most 16777216"):
        config_class(batch_size=2**16, max_seq_length=2**9)
    with pytest.raises(UserError, match=r"max_seq_length = 1048576 must be at most 512, max_pos"):
        config_class(batch_size=2**16, max_seq_length=2**20)


@pytest.mark.parametrize("sizes", [ModelConfig(), ModelConfig(99, 16, 3, 2, 40, type_vocab_size=5)])
@pytest.mark.parametrize("nsp", [True, False])
def test_parameters_are_counted_without_making_them(sizes: ModelConfig, nsp: bool) -> None:
    from fastbert.model.bert import Bert

    with torch.device("meta"):
        model = Bert(sizes, pooler=nsp, next_sentence=nsp)
    made = sum(parameter.numel() for parameter in model.parameters())
    assert made == sizes.num_parameters(nsp=nsp)


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "heads", "millions"),
    [
        ("tiny", 2, 128, 2, 4.4),
        ("mini", 4, 256, 4, 11),
        ("small", 4, 512, 8, 29),
        ("medium", 8, 512, 8, 41),
        ("base", 12, 768, 12, 109),
        ("large", 24, 1024, 16, 335),
    ],
)
def test_presets_are_googles(
    name: str, layers: int, hidden: int, heads: int, millions: float
) -> None:
    config = model_config(name)
    assert (config.num_hidden_layers, config.hidden_size) == (layers, hidden)
    assert (config.num_attention_heads, config.intermediate_size) == (heads, 4 * hidden)
    assert config.head_size == 64
    assert parameters(config) / 1e6 == pytest.approx(millions, rel=0.02)


def test_model_defaults_are_those_of_transformers() -> None:
    from transformers import BertConfig

    theirs = BertConfig()
    for setting in settings(ModelConfig):
        assert setting.default == getattr(theirs, setting.name), setting.name


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_our_config_json(name: str, tmp_path: Path) -> None:
    from transformers import BertConfig

    ours = dataclasses.replace(model_config(name), vocab_size=8192, hidden_act="gelu_new")
    (tmp_path / "config.json").write_text(json.dumps(to_hf_dict(ours, "BertForPreTraining")))
    theirs = BertConfig.from_pretrained(tmp_path)
    for setting in settings(ModelConfig):
        assert getattr(theirs, setting.name) == getattr(ours, setting.name)
    assert theirs.architectures == ["BertForPreTraining"]
    assert str(theirs.dtype).removeprefix("torch.") == "float32"
    assert theirs.tie_word_embeddings

    theirs.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "theirs"):
        assert model_config(str(path)) == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 100}, "hidden_size = 100 must be a multiple of num_attention_heads = 12"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 must be at least 1 and at most 1000"),
        ({"vocab_size": 7.5}, "vocab_size = 7.5 must be an integer"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' must be gelu, gelu_new or gelu_pytorch_tanh"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob = 1 must be at least 0 and at most 0.99"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps = nan must be a finite number"),
        ({"pad_token_id": 30522}, "pad_token_id = 30522 must be less than vocab_size = 30522"),
    ],
)
def test_model_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        ModelConfig(**changes)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bsae", "model = 'bsae' is not a preset: did you mean 'base'? (presets: tiny, mini,"),
        ("qqqqq", "model = 'qqqqq' is not a preset (presets: tiny,"),
        ("", "model = '' is not a preset (presets: tiny,"),
        ("no/such", "model = 'no/such': no such file or folder (nothing is downloaded)"),
        ("x.json", "model = 'x.json': no such file or folder"),
        ("a\0b", "model = 'a\\x00b' is not a preset"),
    ],
)
def test_unknown_model_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        model_config(name)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{\n  'a'", ":2:3: not JSON: "),
        ("", ":1:1: not JSON: "),
        ("[1]", ": must hold one JSON object, not list"),
        ("[" * 100_000, ": not JSON: "),
        ("\xff", ": not JSON: it must be text in UTF-8"),
        ("\xff\xfe{\0}\0", ": not JSON: it looks like UTF-16"),
        ('{"model_type": "bert", "vocab_size": ' + "9" * 9000 + "}", ": not JSON: "),
        ('{"model_type": "bert", "vocab_size": 1e400}', ": vocab_size = inf must be an integer"),
        ('{"model_type": "bert", "vocab_size": NaN}', ": vocab_size = nan must be an integer"),
        (
            '{"model_type": "bert", "layer_norm_eps": -0.0}',
            ": layer_norm_eps = -0.0 must be at least",
        ),
        ('{"model_type": ["bert"]}', ": model_type = ['bert'] must be"),
        ('{"hidden_size": 768}', ': model_type is missing: it must be "bert"'),
        ('{"model_type": "roberta"}', ': model_type = "roberta" must be "bert"'),
        (
            '{"model_type": "bert", "position_embedding_type": "relative_key"}',
            ': position_embedding_type = "relative_key" must be "absolute"',
        ),
        ('{"model_type": "bert", "is_decoder": true}', ": is_decoder = true must be false"),
        (
            '{"model_type": "bert", "tie_word_embeddings": false}',
            ": tie_word_embeddings = false must be true",
        ),
        (
            '{"model_type": "bert", "hidden_size": "768"}',
            ": hidden_size = '768' must be an integer",
        ),
        (
            '{"model_type": "bert", "hidden_size": 770}',
            ": hidden_size = 770 must be a multiple of num_attention_heads = 12",
        ),
    ],
)
def test_broken_config_json_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as raised:
        model_config(str(path))
    assert str(raised.value).startswith(f"{path}{message}")
    assert "\n" not in str(raised.value)


def test_folder_without_config_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder holds no config\.json$"):
        model_config(str(tmp_path))


def test_unknown_keys_of_config_json_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "bert", "vocab_size": 99, "gradient_checkpointing": false}')
    assert model_config(str(path)) == ModelConfig(vocab_size=99)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1e-3}, "learning_rate = -0.001 must be more than 0"),
        ({"learning_rate": math.nan}, "learning_rate = nan must be a finite number"),
        ({"learning_rate": 10**400}, "must be a finite number"),
        ({"learning_rate": "1e-3"}, "learning_rate = '1e-3' must be a number"),
        ({"adam_beta2": 1.0}, "adam_beta2 = 1.0 must be at least 0 and less than 1"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1 must be at least 0"),
        ({"mlm_probability": 1.5}, "mlm_probability = 1.5 must be more than 0 and less than 1"),
        ({"short_seq_prob": 1.5}, "short_seq_prob = 1.5 must be at least 0 and at most 1"),
        ({"hidden_dropout_prob": -1}, "hidden_dropout_prob = -1 must be at least 0 and at"),
        ({"max_steps": True}, "max_steps = true must be an integer"),
        ({"nsp": 1}, "nsp = 1 must be true or false"),
        ({"max_steps": None}, "max_steps = None must be an integer"),
        ({"max_seq_length": 7}, "max_seq_length = 7 must be at least 8"),
        (
            {"tokens_per_batch": 100},
            "tokens_per_batch = 100 must be at least max_seq_length = 128",
        ),
        ({"vocab_size": 99}, "vocab_size = 99 must be at least 100"),
        (
            {"decay_steps": 10},
            "decay_steps = 10 belongs to lr_scheduler_type = 'warmup_stable_decay': it must be 0",
        ),
        ({"seed": -1}, "seed = -1 must be at least 0 and at most"),
        ({"device": "cuda:a"}, "device = 'cuda:a' must be auto, cpu, cuda or cuda:N"),
        ({"precision": "fp8"}, "precision = 'fp8' must be auto, fp32, tf32, bf16 or fp16"),
        ({"curriculum": "128"}, "curriculum = '128': '128' must be LENGTH:SHARE, e.g. 128:0.9"),
        ({"curriculum": "256:0.5"}, "curriculum = '256:0.5': length 256 must be at least 8 and at"),
        ({"curriculum": "64:0.5,128:0.5"}, "shares must be more than 0 and sum to less than 1"),
        ({"batch_ramp_steps": 9}, "batch_ramp_steps = 9 needs gradient_accumulation_steps of 2"),
        ({"torch_compile": "yes"}, "torch_compile = 'yes' must be auto, on or off"),
        ({"report_to": "wandb"}, "report_to = 'wandb' must be tensorboard or none"),
        ({"out": ""}, "out = '' must not be empty"),
        ({"data": "a\0b"}, "data = 'a\\x00b' must be text in UTF-8 without NUL"),
        ({"data": "\udcff"}, "data = '\\udcff' must be text in UTF-8"),
    ],
)
def test_pretrain_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        PretrainConfig(**changes)
    assert message in str(raised.value)


def test_values_at_their_bounds_are_fine() -> None:
    PretrainConfig(max_seq_length=8, tokens_per_batch=8, warmup_steps=2000, device="cuda:12")
    PretrainConfig(short_seq_prob=1, validation_fraction=0, max_grad_norm=0, weight_decay=0)
    PretrainConfig(lr_scheduler_type="warmup_stable_decay", decay_steps=1400)
    assert StepBenchConfig(against="none").against == "none"
    with pytest.raises(UserError, match=r"'hf' must be one of hf-eager, hf-sdpa,"):
        StepBenchConfig(against="hf-sdpa,hf")


def test_an_int_becomes_the_float_it_stands_for() -> None:
    config = PretrainConfig(learning_rate=1)
    assert type(config.learning_rate) is float


def test_stable_decay_is_a_tenth_by_default() -> None:
    config = PretrainConfig(lr_scheduler_type="warmup_stable_decay", max_steps=1001)
    assert config.stable_decay_steps == 101
    assert dataclasses.replace(config, decay_steps=7).stable_decay_steps == 7


def test_command_line_beats_toml_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("max_steps = 700\nlearning_rate = 1\nnsp = false\nseed = 1\n")
    config = load_config(PretrainConfig, path, {"seed": 2, "hidden_dropout_prob": None})
    assert (config.max_steps, config.learning_rate, config.nsp, config.seed) == (700, 1.0, False, 2)
    assert config == PretrainConfig(max_steps=700, learning_rate=1.0, nsp=False, seed=2)
    assert load_config(PretrainConfig, None, {}) == PretrainConfig()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lerning_rate = 1", ": unknown setting 'lerning_rate': did you mean 'learning_rate'?"),
        ("qqqqqqq = 1", ": unknown setting 'qqqqqqq'"),
        ("max_steps = 'x'", ": max_steps = 'x' must be an integer"),
        ("max_steps = 1.0", ": max_steps = 1.0 must be an integer"),
        ("max_steps = true", ": max_steps = true must be an integer"),
        ("learning_rate = true", ": learning_rate = true must be a number"),
        ("learning_rate = nan", ": learning_rate = nan must be a finite number"),
        ("learning_rate = -1", ": learning_rate = -1 must be more than 0"),
        ("nsp = 'no'", ": nsp = 'no' must be true or false"),
        ("data = [1]", ": data = [1] must be a string"),
        ("[train]\nmax_steps = 1", ": [train] is a table: settings stand at the top"),
        ("seed = 1\nmax_steps = = 2", ":2:13: not TOML: Invalid value"),
        ("seed = 1\nseed = 2\n", ":2:9: not TOML: Cannot overwrite a value"),
        ("\xff", ": not TOML: it must be text in UTF-8, which byte 0 is not"),
        ("\xff\xfes\0e\0e\0d\0", ": not TOML: it looks like UTF-16 or UTF-32; convert it to UTF-8"),
        ("s\0e\0e\0d\0", ": not TOML: it looks like UTF-16"),
        ("#" * 2**20 + "\n", ": not TOML: it is larger than 1 MiB"),
        (
            "seed = 0x" + "f" * 9000,
            ": seed = a number of 36000 bits must be at least 0 and at most",
        ),
        ("seed = " + "9" * 9000, ": not TOML: "),
        ("seed = " + "[" * 100_000, ": not TOML: "),
        (f"seed = '{'x' * 9000}'", ": seed = 'xxxx"),
        (f"{'x' * 9000} = 1", ": unknown setting 'xxxx"),
    ],
)
def test_broken_toml_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as raised:
        load_config(PretrainConfig, path, {})
    assert str(raised.value).startswith(f"{path}{message}")
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_is_no_setting(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfseed = 7\r\nnsp = false\r\n")
    assert load_config(PretrainConfig, tmp_path / "run.toml", {}) == PretrainConfig(
        seed=7, nsp=False
    )
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "bert", "vocab_size": 99}')
    assert model_config(str(tmp_path)) == ModelConfig(vocab_size=99)


def test_missing_toml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.toml: cannot be read: No such file"):
        load_config(PretrainConfig, tmp_path / "no.toml", {})
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(PretrainConfig, tmp_path, {})


def test_unknown_override() -> None:
    with pytest.raises(
        UserError, match=r"^unknown setting 'max_step': did you mean 'max_steps'\?$"
    ):
        load_config(PretrainConfig, None, {"max_step": 1})


@pytest.mark.parametrize("config_class", CONFIGS)
def test_toml_holds_every_setting(config_class: type) -> None:
    text = to_toml(config_class())
    for setting in settings(config_class):
        assert f"\n{setting.name} = " in text or f"\n# {setting.name} =\n" in text
        assert f"# {setting.help}" in text
    for group in {setting.group for setting in settings(config_class)}:
        assert text.count(f"## {group.name}: {group.help}\n") == 1


def values(setting: Setting) -> st.SearchStrategy[Any]:
    if setting.choices:
        strategy: st.SearchStrategy[Any] = st.sampled_from(setting.choices)
    elif setting.type is bool:
        strategy = st.booleans()
    elif setting.type is str:
        text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
        strategy = text.filter(bool)
    elif setting.type is int:
        strategy = st.integers(int(setting.at_least or 0), int(setting.at_most or 0))
    else:
        high = setting.less_than or setting.at_most
        high = high if high is None else float(high)
        strategy = st.floats(
            setting.more_than if setting.more_than is not None else setting.at_least,
            high,
            exclude_min=setting.more_than is not None,
            exclude_max=setting.less_than is not None,
            allow_nan=False,
            allow_infinity=False,
        )
    return st.none() | strategy if setting.optional else strategy


# These hang together; the rest may take any value of their own.
BOUND = {"max_seq_length", "tokens_per_batch", "decay_steps", "curriculum", "batch_ramp_steps"}
BOUND |= {"add_tokens", "decay_type", "recipe"}
FREE = {s.name: values(s) for s in settings(PretrainConfig) if s.name not in BOUND}


@given(st.fixed_dictionaries(FREE))
def test_toml_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, given: Any) -> None:
    config = PretrainConfig(**given)
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(to_toml(config), encoding="utf-8", newline="")
    loaded = load_config(PretrainConfig, path, {})
    assert loaded == config
    assert repr(loaded) == repr(config)  # the sign of -0.0, the type of 1.0


@pytest.mark.parametrize("text", ["\x7f", "\x1b[0m", "a\r\nb", 'q"\\', "é😀", "\u2028", "'''"])
def test_toml_escapes(text: str) -> None:
    assert tomllib.loads(to_toml(PretrainConfig(data=text)))["data"] == text


def test_did_you_mean() -> None:
    assert did_you_mean("tran", ["train", "test"]) == ": did you mean 'train'?"
    assert did_you_mean("--tran", ["--train"]) == ": did you mean --train?"
    assert did_you_mean("xyz", ["train"]) == ""


def test_no_name_of_another_program_is_one_of_ours() -> None:
    for config_class in CONFIGS:
        names = {one.name for one in settings(config_class)}
        others = [name for one in settings(config_class) for name in one.aka]
        assert len(others) == len(set(others))
        if config_class is PretrainConfig:
            assert not names & set(others)
