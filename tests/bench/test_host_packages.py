"""Every measuring command of the wheel, where only the packages of a GPU's host are installed.

What may be missing there must cost neither a command nor a figure. All distributions but those of
`HOST` and what they require are hidden from a process before it imports anything; there every
command runs on the CPU, at small sizes, without a C++ compiler and in a folder of its own.
"""

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOK = """
import importlib.metadata, importlib.util, json, sys
found = {}
for module, distribution in json.load(sys.stdin):
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = None
    try:
        __import__(module)
        error = None
    except ImportError as raised:
        error = type(raised).__name__
    found[module] = [importlib.util.find_spec(module) is not None, version is not None, error]
print(json.dumps(found))
"""
RUN = """
import contextlib, importlib, io, json, sys, traceback
from fastbert.cli import main

answers, asked = {}, json.load(sys.stdin)
for name, argv in asked["commands"].items():
    with contextlib.redirect_stdout(io.StringIO()) as out, \\
            contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(argv)
    answers[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
for name in asked["modules"]:
    try:
        importlib.import_module(name)
        answers[name] = None
    except Exception:
        answers[name] = traceback.format_exc()
print(json.dumps(answers))
"""
MODEL = {
    "model_type": "bert", "vocab_size": 1500, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
SMALL = "--device cpu --model MODEL --max-seq-length 16"
COMMANDS = {
    "step": f"bench step {SMALL} --batch-size 4 --rounds 1 --precision fp32",
    "kernels": "bench kernels --device cpu --quick",
    "data": "bench data --device cpu --max-seq-lengths 64 --num-workers 1 --rounds 1 "
    "--tokens-per-batch 1024 --corpus-tokens 30000 --seconds 0.05",
    "inference": f"bench inference {SMALL} --batch-size 4 --rounds 1 --precision fp32",
    "convergence": f"bench convergence {SMALL} --data TEXT --vocab-size 150 --max-steps 4 "
    "--tokens-per-batch 128 --warmup-steps 1 --eval-steps 2",
    "profile-step": f"profile step {SMALL} --batch-size 4 --precision fp32",
    "profile-kernel": "profile kernel mask_tokens --device cpu",
    "estimate": "estimate --model base",
}
SHOWN = ("step", "estimate")  # each picture costs seconds
TIMES = ("ms", "ms_p20", "ms_p80")
FIGURES = {
    "data": ("ms", "real_tokens_per_second", "cores_used"),
    "convergence": ("ms", "train_seconds", "real_tokens_per_second"),
    "profile-step": ("ms", "calls"),
    "estimate": ("ms", "days", "real_tokens_per_second"),
}
CONTENDERS = {
    "step": {"fastbert-eager", "hf-eager", "hf-sdpa", "torch-encoder", "hf-sdpa+malloc"},
    "data": {"length 64, 1 workers", "length 64, 1 workers, hf-collator"},
    "convergence": {"fastbert", "hf-loop"},
}
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts)
    for path in (ROOT / "benchmarks" / "fastbert_bench").rglob("[!_]*.py")
)  # fmt: skip


@pytest.fixture(scope="module")
def on_host(host_site, installed):
    """Runs code in a process that sees the host's packages only, and returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(host_site), "PATH": "", "OMP_NUM_THREADS": "1"}

    def run(code, asked, **options):
        done = subprocess.run(
            [installed.python, "-c", code], input=json.dumps(asked), env=environment, text=True,
            capture_output=True, **options,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_what_is_no_part_of_the_host_is_hidden(on_host):
    hidden = {"jsonschema": "jsonschema", "accelerate": "accelerate", "hypothesis": "hypothesis"}
    seen = {"packaging": "packaging", "tqdm": "tqdm", "yaml": "pyyaml"}
    found = on_host(LOOK, list((hidden | seen).items()))
    assert importlib.metadata.version("jsonschema")  # here it is
    for module in hidden:
        assert found[module] == [False, False, "ModuleNotFoundError"]
    for module in seen:
        assert found[module] == [True, True, None]


def test_the_host_is_what_its_packages_require(host_packages):
    assert {"torch", "huggingface-hub", "werkzeug", "kiwisolver", "sympy"} <= host_packages
    absent = {"jsonschema", "accelerate", "pytest", "nvidia-ml-py", "tyro", "captum"}
    assert not absent & host_packages
    assert "colorama" not in host_packages  # tqdm's, on Windows


@pytest.mark.slow  # one test, for it is the imports that take the time
def test_every_command_measures_and_writes(on_host, tmp_path):
    (tmp_path / "MODEL").write_text(json.dumps(MODEL))
    documents = ["We count the same words. So we do!\n" * 4] * 60
    (tmp_path / "TEXT").write_text("\n\n".join(documents))
    files = {name: tmp_path / f"{name}.json" for name in COMMANDS}
    commands = {name: [*COMMANDS[name].split(), "--json", str(files[name])] for name in COMMANDS}
    commands["profile-step"] = COMMANDS["profile-step"].split()  # as it is named by itself
    shown = [str(files[name]) for name in SHOWN]
    commands["report"] = ["bench", "report", *shown, "--out", str(tmp_path / "page")]
    commands["dropin"] = f"bench dropin {SMALL}".split()  # which is nothing without Trainer
    answers = on_host(RUN, {"commands": commands, "modules": MODULES}, cwd=tmp_path)

    results = {}
    for name, file in files.items():
        answer = answers[name]
        assert answer["code"] == 0, answer["err"]
        results[name] = result = json.loads(file.read_text())
        assert result["benchmark"] == name and result["rows"]
        for row in result["rows"]:
            assert all(row[key] > 0 for key in FIGURES.get(name, TIMES)), row["name"]
        assert CONTENDERS.get(name, set()) <= {row["name"] for row in result["rows"]}
        if name != "estimate":  # it measures nothing
            assert all(one["why"] in answer["out"] for one in result["missing"])
    # No checkout, whatever lies around it.
    assert {result["conditions"]["commit"] for result in results.values()} == {"unknown"}
    missing = {one["name"]: one["why"] for one in results["convergence"]["missing"]}
    needs = "needs the package accelerate, which is not installed"
    assert missing["hf-trainer"].endswith(needs)
    told = f"fastbert: error: transformers' Trainer {needs}\n"
    assert (answers["dropin"]["code"], answers["dropin"]["err"]) == (2, told)

    assert (answers["report"]["code"], answers["report"]["err"]) == (0, "")
    page = (tmp_path / "page" / "report.html").read_text()
    assert all(file in page for file in shown)
    assert (tmp_path / "page" / "step.png").stat().st_size > 1000
    made = {"MODEL", "TEXT", "page", "profile-step.trace.json", *(f.name for f in files.values())}
    assert {path.name for path in tmp_path.iterdir()} == made

    assert len(MODULES) > 20
    for module in MODULES:
        assert answers[module] is None
