"""Every measuring command where only the packages of a GPU's host are installed.

What may be missing there must cost neither a command nor a figure. All distributions but those of
`HOST` and what they require are hidden from a process before it imports anything; there every
command runs on the CPU, at small sizes and without a C++ compiler.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OURS = frozenset({"benchmarks", "fastbert", "fastbert_kernels"})
HOST = (
    *("torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "tqdm"),
    *("matplotlib", "tensorboard"),
)
# Python runs it before all else; the finder stands in PathFinder's place and finds less.
SITECUSTOMIZE = """
import sys
from importlib.machinery import PathFinder
from importlib.metadata import Prepared

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {modules}:
            return PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(*args):
        for found in PathFinder.find_distributions(*args):
            if Prepared.normalize(found.name).replace("_", "-") not in {distributions}:
                yield found

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
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
    f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("[!_]*.py")
    if not path.name.startswith("test_")
)  # fmt: skip


def closure(names):
    """The distributions that `names` require, themselves among them, by canonical names."""
    found, todo = set(), [(name, "") for name in names]
    while todo:
        name, extra = todo.pop()
        known = canonicalize_name(name), extra
        if known not in found:
            found.add(known)
            for needed in map(Requirement, importlib.metadata.requires(name) or ()):
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    todo += [(needed.name, wanted) for wanted in ("", *needed.extras)]
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """Runs code in a process that sees the host's packages only, and returns what it prints."""
    allowed = closure(HOST)
    homes = importlib.metadata.packages_distributions()
    modules = {name for name in homes if not allowed & set(map(canonicalize_name, homes[name]))}
    there = {canonicalize_name(one.name) for one in importlib.metadata.distributions()}
    folder = tmp_path_factory.mktemp("site")
    text = SITECUSTOMIZE.replace("{modules}", repr(modules - OURS))
    text = text.replace("{distributions}", repr(there - allowed))
    (folder / "sitecustomize.py").write_text(text)
    places = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": places, "PATH": "", "OMP_NUM_THREADS": "1"}

    def run(code, asked, **options):
        done = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(asked), env=environment, text=True,
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


def test_the_host_is_what_its_packages_require():
    found = closure(HOST)
    assert {*HOST, "huggingface-hub", "werkzeug", "kiwisolver", "sympy"} <= found
    assert not {"jsonschema", "accelerate", "pytest", "nvidia-ml-py", "tyro", "captum"} & found
    assert "colorama" not in found  # tqdm's, on Windows


@pytest.mark.slow  # one test, for it is the imports that take the time
def test_every_command_measures_and_writes(on_host, tmp_path):
    (tmp_path / "MODEL").write_text(json.dumps(MODEL))
    documents = ["We count the same words. So we do!\n" * 4] * 60
    (tmp_path / "TEXT").write_text("\n\n".join(documents))
    files = {name: tmp_path / f"{name}.json" for name in COMMANDS}
    commands = {name: [*COMMANDS[name].split(), "--json", str(files[name])] for name in COMMANDS}
    shown = [str(files[name]) for name in SHOWN]
    commands["report"] = ["bench", "report", *shown, "--out", str(tmp_path / "page")]
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
    missing = {one["name"]: one["why"] for one in results["convergence"]["missing"]}
    needs = "needs the package accelerate, which is not installed"
    assert missing["hf-trainer"].endswith(needs)

    assert (answers["report"]["code"], answers["report"]["err"]) == (0, "")
    page = (tmp_path / "page" / "report.html").read_text()
    assert all(file in page for file in shown)
    assert (tmp_path / "page" / "step.png").stat().st_size > 1000

    assert len(MODULES) > 20
    for module in MODULES:
        assert answers[module] is None
