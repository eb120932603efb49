"""Every example runs as it is, without a network, and takes transformers' path nowhere."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
PRINTED = {
    "embeddings": "tensor([[1.0",
    "lora": "step 20: loss",
    "loop": "epoch 10: loss",
    "trainer": "'eval_loss'",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, monkeypatch, tmp_path, capsys, said):
    monkeypatch.setattr(sys, "argv", [str(path)])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert PRINTED[path.stem] in capsys.readouterr().out
    assert said
    assert not any("own path" in line for line in said)


def test_all_of_them_are_told_of():
    assert [path.stem for path in EXAMPLES] == sorted(PRINTED)
