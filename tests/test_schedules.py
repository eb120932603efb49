"""Schedules as text: what they say at each step, what of them is refused, what phases they make."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fastbert.commands.options import _parse
from fastbert.config import PretrainConfig
from fastbert.errors import UserError
from fastbert.schedules import Phase, changes, phase_at
from fastbert.settings import load_config, settings, to_toml

SETTINGS = {one.name: one for one in settings(PretrainConfig)}


def test_without_schedules_there_is_one_phase() -> None:
    assert PretrainConfig(max_steps=70).phases() == (Phase(128, 0.15, None, None, 70),)
    config = PretrainConfig(mlm_probability=0.3, hidden_dropout_prob=0, max_steps=1)
    assert config.phases() == (Phase(128, 0.3, 0.0, None, 1),)


def test_phases_end_where_any_schedule_changes() -> None:
    config = PretrainConfig(
        max_steps=100,
        curriculum="1/4:0.3, 1/2:0.3",
        mlm_probability="0.30:0.5,0.25:0.15,0.20:0.15,0.15:0.2",
        hidden_dropout_prob="0.0:0.8,0.1",
        attention_probs_dropout_prob="0:0.6,0.1",
    )
    phases = config.phases()
    assert phases == (
        Phase(32, 0.30, 0.0, 0.0, 30),
        Phase(64, 0.30, 0.0, 0.0, 50),
        Phase(64, 0.25, 0.0, 0.0, 60),
        Phase(128, 0.25, 0.0, 0.1, 65),
        Phase(128, 0.20, 0.0, 0.1, 80),
        Phase(128, 0.15, 0.1, 0.1, 100),
    )
    found = [phases.index(phase_at(phases, step)) for step in (0, 29, 30, 64, 65, 99, 100, 500)]
    assert found == [0, 0, 1, 3, 4, 5, 5, 5]
    assert changes(phases[0], phases[1]) == "sequences of up to 64 tokens"
    told = "sequences of up to 128 tokens, dropout of attention 0.1"
    assert changes(phases[2], phases[3]) == told
    assert changes(phases[4], phases[5]) == "15% masked, dropout of hidden states 0.1"
    other = phases[5]._replace(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert changes(phases[5], other) == "dropout 0"


def test_a_boundary_that_changes_nothing_is_none() -> None:
    config = PretrainConfig(curriculum="1/4:0.3,32:0.3", mlm_probability="0.2:0.5,0.2")
    assert [phase.end for phase in config.phases()] == [1440, 2400]


def test_fractions_of_a_length_are_multiples_of_8_and_at_least_8() -> None:
    for longest, wanted in ((512, 128), (128, 32), (100, 24), (16, 8), (8, 8)):
        config = PretrainConfig(curriculum="1/4:0.5", max_seq_length=longest)
        assert config.phases()[0].max_seq_length == wanted


@pytest.mark.parametrize("shares", [("0.7", "0.2", "0.1"), ("0.3333333", "0.3333333", "0.3333333")])
def test_shares_may_miss_1_by_rounding(shares: tuple[str, ...]) -> None:
    text = ",".join(f"0.{n}:{share}" for n, share in enumerate(shares, start=1))
    phases = PretrainConfig(mlm_probability=text, max_steps=10).phases()
    assert [phase.mlm_probability for phase in phases] == [0.1, 0.2, 0.3]
    assert phases[-1].end == 10


MORE = ": give it a larger share, or more steps"
MLM, FORM = "mlm_probability", "must be a number, or NUMBER:SHARE of the steps as in 0.2:0.6,0.1"
BOUNDS = "must be more than 0 and less than 1"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (MLM, "x", f"'x' {FORM}"),
        (MLM, "", f"'' {FORM}"),
        (MLM, "0.3:0.5,", f"'' {FORM}"),
        (MLM, "0.3:0.5:1,0.1", f"'0.3:0.5:1' {FORM}"),
        (MLM, "0.3:-1,0.1", f"'0.3:-1' {FORM}"),
        (MLM, "0.3,0.2:0.5", f"'0.3' {FORM}"),
        (MLM, "0.3:0.5,none", f"'none' {FORM}"),
        (MLM, "1.5:0.5,0.1", f"1.5 {BOUNDS}"),
        (MLM, "0.1:0.5,0", f"0 {BOUNDS}"),
        (MLM, "nan:0.5,0.1", "nan must be a finite number"),
        ("hidden_dropout_prob", "1:0.5,0.1", "1 must be at least 0 and at most 0.99"),
        ("attention_probs_dropout_prob", "-0.1:0.5,0", "-0.1 must be at least 0 and at most 0.99"),
        (MLM, "0.3:0,0.1", "shares must be more than 0 and sum to less than 1"),
        (MLM, "0.3:1,0.1", "shares must be more than 0 and sum to less than 1"),
        (MLM, "0.3:0.5,0.2:0.4", "shares must be more than 0 and sum to 1"),
        (MLM, "0.3:0.5,0.2:0.50001", "shares must be more than 0 and sum to 1"),
        (MLM, "0.3:" + "9" * 900 + ",0.2", "shares must be more than 0 and sum to less than 1"),
        (MLM, "0.3:0.0001,0.1", f"0.3 has not one step of max_steps = 2400{MORE}"),
        (MLM, ",".join(["0.1:0.001"] * 101), "has 101 phases: at most 100"),
        ("curriculum", "5/4:0.5", "length 5/4 must be at least 8 and at most max_seq_length = 128"),
        ("curriculum", "1/0:0.5", "'1/0:0.5' must be LENGTH:SHARE, e.g. 128:0.9"),
        ("curriculum", "0/4:0.5", "'0/4:0.5' must be LENGTH:SHARE, e.g. 128:0.9"),
        ("curriculum", "1/4:0.5,64", "'64' must be LENGTH:SHARE, e.g. 128:0.9"),
        ("curriculum", "64:0.9999", f"128 has not one step of max_steps = 2400{MORE}"),
    ],
)
def test_a_wrong_schedule_is_one_line(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        PretrainConfig(**{name: text})  # type: ignore[arg-type]
    said = str(raised.value)
    assert said.startswith(f"{name} = {text[:100]!r}"[:100]) and said.endswith(f": {message}")
    assert "\n" not in said and len(said) < 400


def test_a_number_is_a_number_however_it_is_given(tmp_path: Path) -> None:
    for text in ("0.30", "3e-1"):
        typed = _parse(SETTINGS[MLM], text)
        assert PretrainConfig(mlm_probability=typed) == PretrainConfig(mlm_probability=0.3)
    assert PretrainConfig(mlm_probability="0.3").mlm_probability == 0.3
    assert _parse(SETTINGS["hidden_dropout_prob"], "none") is None
    for wrong in ("1.5", 1.5):
        with pytest.raises(UserError, match=rf"^mlm_probability = 1\.5 {BOUNDS}$"):
            PretrainConfig(mlm_probability=wrong)  # type: ignore[arg-type]
    path = tmp_path / "run.toml"
    for line in ("mlm_probability = 0.15", 'mlm_probability = "0.3:0.6,0.15"'):
        path.write_text(f"{line}\n")
        assert f"\n{line}\n" in to_toml(load_config(PretrainConfig, path, {}))
    assert "\nmlm_probability = 0.15\n" in to_toml(PretrainConfig())


def test_steps_as_shares() -> None:
    config = PretrainConfig(
        lr_scheduler_type="warmup_stable_decay", warmup_steps=0.06, decay_steps=0.4, max_steps=101
    )
    assert (config.rising_steps, config.stable_decay_steps) == (7, 41)  # rounded up
    longer = dataclasses.replace(config, max_steps=1000)
    assert (longer.rising_steps, longer.stable_decay_steps) == (60, 400)
    whole = PretrainConfig(warmup_steps=_parse(SETTINGS["warmup_steps"], "7.0"))
    assert whole == PretrainConfig(warmup_steps=7) and type(whole.warmup_steps) is int
    text = to_toml(config)
    assert "\nwarmup_steps = 0.06\n" in text and "\ndecay_steps = 0.4\n" in text
    assert "\nwarmup_steps = 200\n" in to_toml(PretrainConfig())


@pytest.mark.parametrize("name", ["warmup_steps", "decay_steps"])
@pytest.mark.parametrize("wrong", ["2.5", "-0.5", "inf", "nan"])
def test_no_half_steps(name: str, wrong: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(PretrainConfig, None, {name: _parse(SETTINGS[name], wrong)})
    said = f"{name} = {wrong} must be whole steps, or a share of them between 0 and 1"
    assert str(raised.value) == said


def test_other_programs_names_are_answered() -> None:
    with pytest.raises(UserError, match=r"^unknown setting 'warmup_ratio': .* 'warmup_steps'"):
        PretrainConfig(warmup_ratio=0.1)  # type: ignore[call-arg]
    with pytest.raises(UserError, match=r"^--warmup-steps some: must be a number$"):
        _parse(SETTINGS["warmup_steps"], "some")


def test_a_fall_of_another_form_belongs_to_one_schedule() -> None:
    for kind in ("1-sqrt", "linear"):
        PretrainConfig(lr_scheduler_type="warmup_stable_decay", decay_type=kind)
        with pytest.raises(UserError, match=rf"^decay_type = '{kind}' belongs to lr_scheduler_typ"):
            PretrainConfig(lr_scheduler_type="cosine", decay_type=kind)


def test_work_and_memory_follow_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fastbert.config import model_config
    from fastbert.train import device

    sizes = dataclasses.replace(model_config("tiny"), vocab_size=10**6)

    def flops(**given: Any) -> float:
        return device.training_flops(sizes, PretrainConfig(**given))

    mixed = "0.4:0.25,0.2"  # 0.25 on average
    assert flops(mlm_probability=mixed) == pytest.approx(flops(mlm_probability=0.25))

    def needed(**given: Any) -> str:
        monkeypatch.setattr(device, "free_memory", lambda _: 17 * sizes.num_parameters())
        with pytest.raises(UserError) as raised:
            device.check_memory(
                PretrainConfig(tokens_per_batch=2**15, **given), sizes, torch.device("cpu"),
                torch.float32,
            )  # fmt: skip
        return str(raised.value)

    assert needed(mlm_probability=mixed) == needed(mlm_probability=0.4)
    never: dict[str, Any] = {"attention_probs_dropout_prob": 0.0}
    late: dict[str, Any] = {"attention_probs_dropout_prob": "0.0:0.9,0.1"}
    assert needed(**late) == needed() != needed(**never)
