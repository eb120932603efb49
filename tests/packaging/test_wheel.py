"""The wheel, installed in an environment of its own: nothing beside it, nothing missing in it.

tests/bench/gpu/test_main.py rehearses `python -m fastbert_bench.gpu` of the same installation, and
tests/bench/test_host_packages.py runs each command of the bench.
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
        for needed in ("/docs/python.md", "/deploy/Dockerfile"):
            assert any(name.endswith(needed) for name in source.getnames())
    information = next(installed.site.glob("fastbert_engine-*.dist-info")) / "METADATA"
    metadata = email.message_from_string(information.read_text())
    assert metadata["Description-Content-Type"] == "text/markdown"


@pytest.mark.slow  # it imports torch
def test_the_command_trains_in_an_empty_folder(installed, tmp_path):
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
    run(f"pretrain --device cpu --model {given} --max-seq-length 32 --vocab-size 150 "
        f"--data {given / 'text.txt'} --max-steps 5 --tokens-per-batch 256 --warmup-steps 1 "
        "--report-to none")  # fmt: skip
    assert (here / "runs" / "pretrain-001" / "hf" / "model.safetensors").stat().st_size > 1000
    assert [path.name for path in here.iterdir()] == ["runs"]
