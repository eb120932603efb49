"""Recipes: what overrides what, in all three ways in; what a file may say; the start of weights."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastbert
from fastbert.cli import main
from fastbert.config import RECIPE, ModelConfig, PretrainConfig, model_config, resolved
from fastbert.errors import UserError
from fastbert.model.embeddings import sinusoids
from fastbert.recipes import RECIPES, of_recipe, read_recipe
from fastbert.settings import load_config, sealed_toml, settings, to_toml
from fastbert.train.checkpoint import check_recipe

Ways = Callable[..., PretrainConfig]
MINE = """
nsp = false
curriculum = "64:0.5"
hidden_dropout_prob = 0
base_learning_rate = 4e-3
initializer_range = 0.05
position_init = "sinusoidal"
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    return str(path)


def by_python(folder: Path, recipe: str, **given: Any) -> PretrainConfig:
    return PretrainConfig(recipe=recipe, **given)


def by_file(folder: Path, recipe: str, **given: Any) -> PretrainConfig:
    path = folder / "run.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in given.items()]
    path.write_text("\n".join([f"recipe = {json.dumps(recipe)}", *lines]))
    return PretrainConfig.load(path)


def by_command(
    folder: Path, recipe: str, capsys: pytest.CaptureFixture[str], **given: Any
) -> PretrainConfig:
    argv = ["pretrain", "--print-config", "--recipe", recipe]
    for name, value in given.items():
        flag = name.replace("_", "-")
        argv += [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert f"\nrecipe = {json.dumps(recipe)}\n" in shown
    path = folder / "shown.toml"
    path.write_text(shown)
    return load_config(PretrainConfig, path, {})


@pytest.fixture(params=["python", "file", "command"])
def ask(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ways:
    """A configuration by one of the three ways in."""

    def asked(recipe: str, **given: Any) -> PretrainConfig:
        if request.param == "python":
            return by_python(tmp_path, recipe, **given)
        if request.param == "file":
            return by_file(tmp_path, recipe, **given)
        return by_command(tmp_path, recipe, capsys, **given)

    return asked


def test_what_is_given_overrides_the_recipe_and_that_the_defaults(ask: Ways, mine: str) -> None:
    config = ask(mine, nsp=True, hidden_dropout_prob="none", mlm_probability=0.3)
    assert config.nsp is True  # given, though it equals the default
    assert config.hidden_dropout_prob is None  # the same
    assert config.mlm_probability == PretrainConfig(mlm_probability=0.3).mlm_probability
    assert (config.curriculum, config.base_learning_rate) == ("64:0.5", 4e-3)
    assert (config.initializer_range, config.position_init) == ("0.05", "sinusoidal")
    mine_alone = {*read(mine), "recipe", "mlm_probability"}
    default = dataclasses.asdict(PretrainConfig())
    for name in default.keys() - mine_alone:
        assert getattr(config, name) == default[name]


def read(path: str) -> dict[str, Any]:
    return dict(read_recipe(PretrainConfig, path))


def test_options_override_the_file_which_overrides_its_recipe(mine: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"recipe = {json.dumps(mine)}\nnsp = true\ncurriculum = '32:0.5'\n")
    config = load_config(PretrainConfig, path, {"curriculum": ""})
    assert (config.nsp, config.curriculum, config.base_learning_rate) == (True, "", 4e-3)


def test_who_holds_every_setting_needs_no_recipe(mine: str, tmp_path: Path) -> None:
    config = PretrainConfig(recipe=Path(mine), nsp=True, hidden_dropout_prob=None)
    path = tmp_path / "whole.toml"
    path.write_text(to_toml(config))
    Path(mine).unlink()
    assert load_config(PretrainConfig, path, {}) == config
    again = dataclasses.replace(config, max_steps=7, curriculum="")
    assert (again.nsp, again.curriculum, again.position_init) == (True, "", "sinusoidal")
    assert resolved(config).learning_rate == 4e-3
    assert of_recipe(config) == f"{mine}, which cannot be read any more: all settings are given"
    with pytest.raises(UserError, match=r"mine\.toml': no such file$"):
        PretrainConfig(recipe=mine)


def test_a_run_of_an_earlier_version_takes_nothing_new_from_its_recipe(
    mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.toml"
    text = to_toml(PretrainConfig(recipe=mine)).replace('\nposition_init = "sinusoidal"\n', "\n")
    monkeypatch.setattr("fastbert.settings.to_toml", lambda config: text)
    path.write_text(sealed_toml(None))
    config = load_config(PretrainConfig, path, {}, sealed=True)
    assert (config.position_init, config.nsp) == ("normal", False)
    path.write_text(text)  # no run's file
    assert load_config(PretrainConfig, path, {}).position_init == "sinusoidal"


def test_classic_is_the_defaults() -> None:
    classic = read("classic")
    defaults = {one.name: one.default for one in settings(PretrainConfig)}
    assert classic == {name: defaults[name] for name in classic}
    assert len(classic) > 15
    assert PretrainConfig() == PretrainConfig(recipe="classic")
    assert defaults["recipe"] == "classic" and RECIPE.name == "recipe"


def test_fast_is_whole_and_classic_has_all_it_sets() -> None:
    fast = PretrainConfig(recipe="fast", max_steps=100)
    assert (fast.nsp, fast.optim, fast.max_steps) == (False, "muon", 100)
    assert fast.hidden_dropout_prob is not None and float(fast.hidden_dropout_prob) == 0
    assert read("fast").keys() <= read("classic").keys()
    assert resolved(fast).learning_rate == fast.base_learning_rate  # of a model 128 wide
    told = of_recipe(fast)
    assert told.startswith("fast: nsp = false, curriculum = ") and "otherwise" not in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lerning_rate = 1", ": unknown setting 'lerning_rate': did you mean 'learning_rate'?"),
        ("nsp = 'no'", ": nsp = 'no' must be true or false"),
        ("nsp = = 1", ":1:7: not TOML: Invalid value"),
        ("nsp = true\ndevice = 'cpu'", ": device is no part of a recipe, it says where and on"),
        ("save_steps = 1", ": save_steps is no part of a recipe"),
        ("data = 'x'", ": data is no part of a recipe"),
        ("init_from = 'x'", ": init_from is no part of a recipe"),
        ("recipe = 'fast'", ": recipe is no part of a recipe"),
    ],
)
def test_a_wrong_file_is_one_line(content: str, message: str, mine: str) -> None:
    Path(mine).write_text(content)
    with pytest.raises(UserError) as raised:
        PretrainConfig(recipe=mine)
    assert str(raised.value).startswith(f"{mine}{message}")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("fsat", "recipe = 'fsat' is not a recipe: did you mean 'fast'? (recipes: classic, fast; "),
        ("", "recipe = '' is not a recipe (recipes: classic, fast; else the path of a TOML file)"),
        ("a\0b", "recipe = 'a\\x00b' is not a recipe (recipes:"),
        ("no/such", "recipe = 'no/such': no such file"),
        (5, "recipe = 5 must be a string"),
    ],
)
def test_an_unknown_recipe_is_one_line(recipe: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        PretrainConfig(recipe=recipe)
    assert str(raised.value).startswith(message)


def test_what_does_not_fit_an_explicit_setting_gives_way(mine: str, tmp_path: Path) -> None:
    config = PretrainConfig(recipe=mine, max_seq_length=32)  # the recipe's curriculum is 64:0.5
    assert (config.max_seq_length, config.curriculum) == (32, "")
    assert 'otherwise here: curriculum = ""' in of_recipe(config)
    linear = PretrainConfig(recipe="fast", lr_scheduler_type="linear")
    assert (linear.optim, linear.lr_scheduler_type) == ("muon", "linear")
    assert (linear.decay_steps, linear.decay_type) == (0, "cosine")
    with pytest.raises(UserError, match=r"max_seq_length = 32$"):  # both explicit
        PretrainConfig(recipe=mine, max_seq_length=32, curriculum="64:0.5")
    torn = tmp_path / "torn.toml"  # in itself
    torn.write_text("decay_steps = 10\n")
    for given in ({}, {"max_steps": 100}):
        with pytest.raises(UserError, match=r"^recipe = '.*torn.toml': decay_steps = 10 belongs"):
            PretrainConfig(recipe=str(torn), **given)
    with pytest.raises(TypeError, match="multiple values for argument 'out'"):
        PretrainConfig("a", out="b")


def test_the_line_of_the_log(mine: str) -> None:
    assert of_recipe(PretrainConfig()) == "classic, the defaults"
    assert of_recipe(PretrainConfig(nsp=False, max_steps=3)) == (
        "classic, the defaults; otherwise here: nsp = false"
    )
    config = PretrainConfig(recipe=mine, curriculum="", hidden_dropout_prob=None)
    assert of_recipe(config) == (
        f'{mine}: nsp = false, base_learning_rate = 0.004, initializer_range = "0.05", '
        'position_init = "sinusoidal"; otherwise here: curriculum = "", '
        'hidden_dropout_prob = "none"'
    )


def test_checkpoints_of_before_recipes_are_classic() -> None:
    assert check_recipe({"nsp": True}, {"recipe": "classic", "nsp": True}, "it") == []
    with pytest.raises(UserError, match=r"^recipe = 'fast' differs from 'classic' in it: leave it"):
        check_recipe({"nsp": True}, {"recipe": "fast", "nsp": False}, "it")


def test_every_recipe_stands_in_its_folder() -> None:
    found = (Path(fastbert.__file__).parent / "recipes").glob("*.toml")
    assert {path.stem for path in found} == {*RECIPES}


# How weights start


@pytest.mark.parametrize(
    ("hidden", "std"), [(64, 0.069282), (128, 0.048990), (768, 0.02), (1024, 0.02)]
)
def test_auto_grows_below_base(hidden: int, std: float) -> None:
    sizes = ModelConfig(hidden_size=hidden, num_attention_heads=1)
    found = PretrainConfig(initializer_range="auto").initialized(sizes)
    assert found.initializer_range == pytest.approx(std, abs=1e-6)
    assert dataclasses.replace(found, initializer_range=0.02) == sizes
    if hidden >= 768:
        assert found == sizes
    assert PretrainConfig().initialized(sizes) is sizes


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("x", "initializer_range = 'x' must be model, auto or N"),
        (-1, "initializer_range = -1 must be model, auto or N"),
        (math.nan, "initializer_range = nan must be model, auto or N"),
        (101, "initializer_range = 101.0 must be at least 0 and at most 100"),
        ("1e999", "initializer_range = inf must be a finite number"),
        (True, "initializer_range = true must be a string"),
    ],
)
def test_a_wrong_deviation_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        PretrainConfig(initializer_range=value)
    assert str(raised.value) == message
    assert PretrainConfig(initializer_range=1e-5).initializer_range == "1e-05"


def test_the_rate_follows_its_base() -> None:
    for name, width in (("tiny", 128), ("base", 768)):
        assert resolved(PretrainConfig(model=name)).learning_rate == 2e-3 * 128 / width
        doubled = resolved(PretrainConfig(model=name, base_learning_rate=4e-3))
        assert doubled.learning_rate == pytest.approx(4e-3 * 128 / width, rel=1e-15)
        given = PretrainConfig(model=name, base_learning_rate=4e-3, learning_rate=1e-4)
        assert resolved(given).learning_rate == 1e-4
    assert model_config("base").hidden_size == 768


@pytest.mark.parametrize("hidden", [8, 7])
def test_sinusoids_are_those_of_the_formula(hidden: int) -> None:
    table = sinusoids(50, hidden, 0.03)
    assert table.dtype == torch.float32 and table.shape == (50, hidden)
    literal = [
        [
            math.sin(p / 10000 ** (c / hidden))
            if c % 2 == 0
            else math.cos(p / 10000 ** ((c - 1) / hidden))
            for c in range(hidden)
        ]
        for p in range(50)
    ]
    wanted = torch.tensor(literal)
    scale = 0.03 / wanted.square().mean().sqrt()
    torch.testing.assert_close(table, wanted * scale, rtol=0, atol=1e-7)
    assert table.square().mean().sqrt().item() == pytest.approx(0.03)


SIZES = ModelConfig(200, 32, 2, 2, 64, max_position_embeddings=16)
SMALL: dict[str, Any] = {
    "max_seq_length": 16, "tokens_per_batch": 64, "max_steps": 6, "device": "cpu",
    "precision": "fp32", "torch_compile": "off",
}  # fmt: skip


def test_only_the_positions_start_otherwise() -> None:
    steps = [
        fastbert.make_step(
            PretrainConfig(position_init=start, initializer_range=0.05, **SMALL), SIZES
        )
        for start in ("normal", "sinusoidal")
    ]
    normal, sinusoidal = (dict(step.model.named_parameters()) for step in steps)
    for name, parameter in normal.items():
        same = torch.equal(parameter, sinusoidal[name])
        assert same == (name != "embeddings.position"), name
    table = sinusoidal["embeddings.position"]
    assert torch.equal(table, sinusoids(16, 32, 0.05))
    assert normal["embeddings.word"][5:].std().item() == pytest.approx(0.05, rel=0.05)
    masters = steps[1].flat.views(steps[1].flat.master)
    assert torch.equal(masters["embeddings.position"], table)
    assert steps[1].model.config.initializer_range == 0.05


def test_given_weights_stay_and_it_is_said(tmp_path: Path) -> None:
    given = fastbert.make_step(PretrainConfig(**SMALL), SIZES).model
    config = PretrainConfig(position_init="sinusoidal", seed=1, **SMALL)
    step = fastbert.make_step(config, given)
    assert step.notes[-1] == (
        "position_init = 'sinusoidal' is not used: the position table is given"
    )
    weights = dict(given.named_parameters())
    for name, parameter in step.model.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_the_exported_model_keeps_its_own_dropout(tmp_path: Path) -> None:
    """A fine-tuner needs it, even where the pre-training had none."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    step = fastbert.make_step(PretrainConfig(**SMALL, **none), SIZES)
    fastbert.save_pretrained(step, tmp_path / "hf")
    for _ in range(2):
        content = json.loads((tmp_path / "hf/config.json").read_text())
        assert [content[name] for name in none] == [0.1, 0.1]
        again = fastbert.make_step(
            PretrainConfig(**SMALL, **none), fastbert.load_pretrained(tmp_path / "hf")
        )
        fastbert.save_pretrained(again, tmp_path / "hf")
