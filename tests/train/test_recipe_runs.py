"""Runs by a recipe: what they say and keep, how they go on, what starts beside given weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastbert.config import PretrainConfig
from fastbert.settings import load_config

pytestmark = pytest.mark.usefixtures("undrawn")
Run = Callable[..., Path]
MINE = 'nsp = false\ncurriculum = "16:0.5"\ninitializer_range = 0.05\nmlm_probability = 0.3\n'


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/weights.safetensors")


def test_a_run_by_a_recipe_and_one_that_begins_with_it(
    pretrain: Run, resume: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(MINE)
    run = pretrain("run", f"--recipe {mine} --max-steps 4 --stop-at-step 2")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recipe:")]
    assert lines == [
        f'recipe: {mine}: nsp = false, curriculum = "16:0.5", initializer_range = "0.05"; '
        "otherwise here: mlm_probability = 0.15"
    ]
    kept = load_config(PretrainConfig, run / "config.toml", {})
    assert (kept.recipe, kept.nsp, kept.initializer_range) == (str(mine), False, "0.05")

    # It goes on without the file, and by no other recipe.
    mine.unlink()
    resume("run", "--resume auto --recipe classic", exit_code=2)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"fastbert: error: recipe = 'classic' differs from {str(mine)!r} in the checkpoint of step "
        "2: leave it out to go on, or start a new run with another --out"
    )
    resume("run", f"--resume auto --recipe {mine}")
    assert f"recipe: {mine}, which cannot be read any more" in capsys.readouterr().err
    config = json.loads((run / "hf/config.json").read_text())
    assert config["initializer_range"] == 0.05

    # Given weights stay: what is new is drawn as the settings say.
    more = "--init-from {} --model auto --position-init sinusoidal --initializer-range auto"
    other = pretrain("other", f"{more.format(run)} --max-steps 1")
    assert (
        "\nposition_init = 'sinusoidal' is not used: the position table is given\n"
        in capsys.readouterr().err
    )
    old, new = weights(run, 4), weights(other, 0)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert new["pooler.weight"].std().item() == pytest.approx(0.02 * 24**0.5, rel=0.1)

    # Before the first checkpoint the folder itself tells.
    shutil.rmtree(other / "checkpoints")
    resume("other", "--resume auto --recipe fast", exit_code=2)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"fastbert: error: recipe = 'fast', but the run in {other} began with 'classic': leave it "
        "out to go on, or start a new run with another --out"
    )
