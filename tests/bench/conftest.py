"""A GPU's host, as far as its packages go: what is not there is hidden from whole processes."""

import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = frozenset({"fastbert", "fastbert_bench", "fastbert_kernels"})
HOST = (
    *("torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "tqdm"),
    *("matplotlib", "tensorboard"),
)
# Python runs it before all else; the finder stands in PathFinder's place and finds less, and makes
# Triton's interpreter shorter.
SITECUSTOMIZE = """
import runpy
import sys
from importlib.machinery import PathFinder
from importlib.metadata import Prepared

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {modules}:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if name == "triton.runtime.interpreter":
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                runpy.run_path({shortcuts})["shorten"](module)

            spec.loader.exec_module = exec_module
        return spec

    @staticmethod
    def find_distributions(*args):
        for found in PathFinder.find_distributions(*args):
            if Prepared.normalize(found.name).replace("_", "-") not in {distributions}:
                yield found

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


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


@pytest.fixture(scope="session")
def host_packages():
    """The distributions of the host, by canonical names."""
    return closure(HOST)


@pytest.fixture(scope="session")
def host_site(tmp_path_factory, host_packages):
    """A folder that, on PYTHONPATH, leaves a process and its children the host's packages only."""
    homes = importlib.metadata.packages_distributions()
    modules = {
        name for name in homes if not host_packages & set(map(canonicalize_name, homes[name]))
    }
    there = {canonicalize_name(one.name) for one in importlib.metadata.distributions()}
    folder = tmp_path_factory.mktemp("site")
    text = SITECUSTOMIZE.replace("{modules}", repr(modules - OURS))
    text = text.replace("{distributions}", repr(there - host_packages))
    text = text.replace("{shortcuts}", repr(str(Path(__file__).parents[1] / "interpreter.py")))
    (folder / "sitecustomize.py").write_text(text)
    return folder
