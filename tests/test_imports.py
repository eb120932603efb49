"""The import law of CONTRIBUTING.md, read from the source: left never imports right.

And the road that a reader follows, from the command to the launch of a kernel.
"""

import ast
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FACADE = "fastbert"  # fastbert/__init__.py: lends names lazily, and only type checkers follow them
STANDARD = ("errors", "settings", "schedules", "recipes", "config")  # they import nothing else
COMMON = (*STANDARD, "progress")
ORDER = (
    *("fastbert_kernels", "ops", "model", "data", "train", "hf", "finetune", "serve", "commands"),
    "cli",
    "__main__",
)
NEVER = ("tests", "fastbert_bench", "benchmarks")  # by the engine
BENCH = ROOT / "benchmarks" / "fastbert_bench"
BENCH_ORDER = (
    *("config", "measure", "kernels", "estimate", "suites", "profile", "gpu", "report"),
    *("speedrun", "commands"),
)
HOMES = {
    "fastbert": ROOT / "fastbert",
    "fastbert_kernels": ROOT / "kernels" / "fastbert_kernels",
    "fastbert_bench": BENCH,
}
ROAD = (
    *("fastbert/cli.py", "fastbert/commands/pretrain.py", "fastbert/train/loop.py"),
    *("fastbert/train/step.py", "fastbert/model/bert.py", "fastbert/ops.py"),
    "kernels/fastbert_kernels/attention.py",
)
ROAD_LINES = 1900


def sources() -> list[Path]:
    return sorted([*(ROOT / "fastbert").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """fastbert.model.bert -> model, fastbert_kernels.gelu -> fastbert_kernels."""
    top, *below = module.split(".")
    return below[0] if top == "fastbert" and below else top


def names_a_module(value: object) -> bool:
    """Whether it is the full name of a module of ours."""
    if not isinstance(value, str) or not re.fullmatch(r"\w+(\.\w+)+", value):
        return False
    top, *below = value.split(".")
    path = HOMES.get(top, ROOT / "none").joinpath(*below)
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Yields the full names of imported modules; `from a import b` gives a.b."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            words = [one.value for one in given if isinstance(one, ast.Constant)]
            yield from (word for word in words if isinstance(word, str) and "." not in word)
        elif isinstance(node, ast.Constant) and names_a_module(node.value):
            yield node.value  # whoever names one imports it somehow, or starts it


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    """Returns what a module imports against the law."""
    here = room(module)
    found = []
    for name in imports(source, module, is_package):
        top, *below = name.split(".")
        if top == "transformers" and here != "hf":
            found.append(f"{module} imports {name}: only hf may import transformers")
        elif top in NEVER:
            found.append(f"{module} imports {name}")
        elif top in ("fastbert", "fastbert_kernels") and here != FACADE:
            there = room(name)
            if below == ["__version__"] or there == here or may_import(here, there):
                continue
            found.append(f"{module} imports {name}: {here} may not import {there}")
    return found


def may_import(here: str, there: str) -> bool:
    if here in COMMON:
        return there in COMMON[: COMMON.index(here)]
    if there in COMMON:
        return here != "fastbert_kernels"
    return there in ORDER and ORDER.index(there) < ORDER.index(here)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_law_holds(path: Path) -> None:
    module = module_name(path)
    assert room(module) in (FACADE, *COMMON, *ORDER), f"{path.name} is in no room of the law"
    assert breaches(path.read_text("utf-8"), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastbert.errors", "from fastbert import config"),
        ("fastbert.config", "import fastbert.ops"),
        ("fastbert.ops", "from fastbert.model import bert"),
        ("fastbert.model.bert", "from fastbert.data.batch import Batch"),
        ("fastbert.model.bert", "from ..data.batch import Batch"),
        ("fastbert.model.bert", "from fastbert import BertModel"),
        ("fastbert.data.pack", "from fastbert.train import loop"),
        ("fastbert.train.loop", "def f():\n    from fastbert.hf.export import export_run"),
        ("fastbert.train.loop", "import importlib; importlib.import_module('fastbert.hf')"),
        ("fastbert.train.loop", "import transformers"),
        ("fastbert.train.loop", "from importlib import import_module as i; i('fastbert.hf')"),
        ("fastbert.train.loop", "import_module(name='transformers')"),
        ("fastbert.train.loop", "runpy.run_module('fastbert_bench.gpu')"),
        ("fastbert.cli", "from transformers import BertConfig"),
        ("fastbert.hf.load", "from fastbert.finetune.tasks import TASKS"),
        ("fastbert.finetune.loop", "import transformers"),
        ("fastbert.cli", "import tests"),
        ("fastbert.hf.weights", "from fastbert_bench.suites import step"),
        ("fastbert.cli", "import fastbert_bench.commands"),
        ("fastbert.cli", "import importlib; importlib.import_module('fastbert_bench.commands')"),
        ("fastbert.commands.pretrain", "from fastbert.cli import main"),
        ("fastbert.settings", "from fastbert.config import ModelConfig"),
        ("fastbert.recipes", "from fastbert.config import PretrainConfig"),
        ("fastbert_kernels.gelu", "from fastbert.config import ModelConfig"),
    ],
)
def test_a_breach_is_seen(module: str, source: str) -> None:
    assert len(breaches(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastbert.config", "from fastbert.errors import UserError"),
        ("fastbert.ops", "from fastbert_kernels import reference"),
        ("fastbert.model.bert", "from . import heads\nfrom fastbert.ops import Ops"),
        ("fastbert.train.loop", "from fastbert.data.batch import Batch"),
        ("fastbert.hf.weights", "import transformers\nfrom fastbert.model import bert"),
        ("fastbert.cli", "from fastbert import __version__, commands"),
        ("fastbert.cli", "from fastbert.commands import pretrain"),
        ("fastbert.config", "from fastbert.settings import setting"),
    ],
)
def test_what_the_law_allows_passes(module: str, source: str) -> None:
    assert breaches(source, module) == []


def bench_breaches(source: str, module: str) -> list[str]:
    """What a module of the bench imports against its own order; it may import the engine."""
    here = BENCH_ORDER.index(module.split(".")[1])
    found = []
    for name in imports(source, module, False):
        top, *below = name.split(".")
        above = top == "fastbert_bench" and below and below[0] in BENCH_ORDER[: here + 1]
        if top in ("tests", "benchmarks") or (top == "fastbert_bench" and not above):
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize(
    "path",
    sorted(path for path in BENCH.rglob("*.py") if path != BENCH / "__init__.py"),
    ids=lambda path: str(path.relative_to(BENCH)),
)
def test_the_bench_holds_its_own_order(path: Path) -> None:
    module = ".".join(path.relative_to(BENCH.parent).with_suffix("").parts)
    assert bench_breaches(path.read_text("utf-8"), module) == []


def test_a_breach_of_the_bench_is_seen() -> None:
    for source in (
        "def f():\n    from fastbert_bench.suites import step",
        "from fastbert_bench.gpu.step import OURS",
        "import tests",
        "import fastbert_bench",
        "from fastbert_bench import *",
        "from benchmarks.fastbert_bench.measure import timing",
        "run = ['-m', 'fastbert_bench.gpu.step']",
    ):
        assert len(bench_breaches(source, "fastbert_bench.estimate.run")) == 1
    allowed = "from fastbert.hf.weights import to_hf\nfrom fastbert_bench.kernels import costs"
    assert bench_breaches(allowed, "fastbert_bench.estimate.run") == []


def test_settings_config_and_errors_need_only_the_standard_library() -> None:
    ours = {path: module_name(path) for path in sources() if room(module_name(path)) in STANDARD}
    assert sorted(ours.values()) == sorted(f"fastbert.{name}" for name in STANDARD)
    for path, module in ours.items():
        found = imports(path.read_text("utf-8"), module, path.name == "__init__.py")
        assert {one.split(".")[0] for one in found} <= {*sys.stdlib_module_names, "fastbert"}


def test_the_package_itself_imports_nothing_of_ours_at_once() -> None:
    tree = ast.parse((ROOT / "fastbert" / "__init__.py").read_text("utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module in ("importlib", "typing")


def test_kernels_folder_is_no_package() -> None:
    # transformers probes `import kernels` for the hub package of that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_road_from_the_command_to_a_kernel_is_short_and_whole() -> None:
    sources = {path: (ROOT / path).read_text("utf-8") for path in ROAD}
    for here, there in pairwise(ROAD):
        wanted = module_name(ROOT / there)
        found = imports(sources[here], module_name(ROOT / here), False)
        assert any(f"{name}.".startswith(f"{wanted}.") for name in found), f"{here} -> {there}"
    assert "attention_forward_kernel[" in sources[ROAD[-1]], "nothing is launched at its end"
    assert sum(len(source.splitlines()) for source in sources.values()) <= ROAD_LINES
