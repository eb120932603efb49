"""The wheel, installed in an environment of its own: nothing beside it, nothing missing in it.

tests/bench/gpu/test_main.py rehearses `python -m fastbert_bench.gpu` of the same installation.
"""

import email
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "fastbert": ROOT / "fastbert",
    "fastbert_bench": ROOT / "benchmarks" / "fastbert_bench",
    "fastbert_kernels": ROOT / "kernels" / "fastbert_kernels",
}
MODEL = {
    "model_type": "bert", "vocab_size": 1500, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


def test_nothing_but_our_packages_is_installed(installed):
    information = "fastbert_engine-0.1.0.dist-info"
    assert set(installed.new) == {*PACKAGES, information}
    assert "fastbert" in {path.name for path in installed.python.parent.iterdir()}
    top = (installed.site / information / "top_level.txt").read_text().split()
    assert set(top) == set(PACKAGES)


def test_every_file_of_the_packages_is_in_the_wheel(installed):
    def files(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*")
                if path.is_file() and path.suffix != ".pyc"}  # fmt: skip

    for name, folder in PACKAGES.items():
        assert files(installed.site / name) == files(folder)
        assert len(files(folder)) > 10


def test_its_description_and_its_requirements_hold(installed):
    for tool in (["twine", "check", "--strict", *map(str, installed.distributions)],
                 ["pip", "--python", str(installed.python), "check"]):  # fmt: skip
        done = subprocess.run([sys.executable, "-m", *tool], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.suffix for path in installed.distributions) == [".gz", ".whl"]
    with tarfile.open(installed.distributions[1]) as source:
        assert any(name.endswith("/docs/python.md") for name in source.getnames())
    information = next(installed.site.glob("fastbert_engine-*.dist-info")) / "METADATA"
    metadata = email.message_from_string(information.read_text())
    assert metadata["Description-Content-Type"] == "text/markdown"


@pytest.mark.slow  # each command imports torch
def test_every_command_runs_in_an_empty_folder(installed, tmp_path):
    given = tmp_path / "given"
    here = tmp_path / "here"
    given.mkdir()
    here.mkdir()
    (given / "config.json").write_text(json.dumps(MODEL))
    documents = ["We count the same words. So we do!\n" * 4] * 60
    (given / "text.txt").write_text("\n\n".join(documents))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Without a compiler on the path nothing waits for one.
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": ""}

    def run(line: str) -> str:
        done = subprocess.run(
            [str(installed.python.with_name("fastbert")), *line.split()], cwd=here,
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    assert "bench" in run("--help") and not list(here.iterdir())
    assert "fastbert_kernels" in run("doctor")
    small = f"--device cpu --model {given} --max-seq-length 32"
    run(f"pretrain {small} --data {given / 'text.txt'} --vocab-size 150 --max-steps 5 "
        "--tokens-per-batch 256 --warmup-steps 1 --report-to none")  # fmt: skip
    assert (here / "runs" / "pretrain-001" / "hf" / "model.safetensors").stat().st_size > 1000
    run(f"bench step {small} --batch-size 4 --rounds 1 --precision fp32 --against hf-sdpa "
        "--json step.json")  # fmt: skip
    result = json.loads((here / "step.json").read_text())
    assert {"hf-sdpa", "fastbert-eager"} <= {row["name"] for row in result["rows"]}
    assert result["conditions"]["commit"] == "unknown"  # no checkout, whatever lies around it
    run("bench report step.json --out page")
    assert "hf-sdpa" in (here / "page" / "report.html").read_text()
    run(f"profile step {small} --batch-size 4 --precision fp32")
    assert json.loads((here / "profile-step.json").read_text())["rows"]
    run("estimate --model base --json estimate.json")
    assert json.loads((here / "estimate.json").read_text())["rows"]
    assert {path.name for path in here.iterdir()} == {
        "runs", "step.json", "page", "profile-step.json", "profile-step.trace.json",
        "estimate.json",
    }  # fmt: skip
