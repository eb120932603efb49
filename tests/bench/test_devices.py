"""A GPU that is asked for and not there is a bad request, whichever command was asked."""

import pytest
import torch

from fastbert import cli

COMMANDS = (
    "bench step", "bench kernels", "bench data", "bench inference", "bench convergence",
    "bench dropin",
    "profile step", "profile kernel gelu_layer_norm",
)  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_gpu_is_a_bad_request(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split(), "--device", "cuda"]) == 2
    said = capsys.readouterr().err.splitlines()
    told = "device = 'cuda': this torch sees no GPU; use device = 'cpu' or 'auto'"
    assert said == [f"fastbert: error: {told}"]
    assert not list(tmp_path.iterdir())
