"""Where Triton's interpreter is asked for and cannot work, the import says so in one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert_kernels.triton_import import misfit

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("triton", "numpy"),
    [("3.6.0", "2.4.0"), ("3.6.0", "2.5.5"), ("3.6.0+git1234", "2.4.0rc1"), ("3.5.1", "10.0.0")],
)
def test_versions_that_do_not_fit(triton: str, numpy: str) -> None:
    assert misfit(triton, numpy) == (
        f"fastbert_kernels: the interpreter of Triton {triton} does not work with numpy {numpy}: "
        "pip install 'numpy<2.4' or 'triton>=3.7', or unset TRITON_INTERPRET"
    )


@pytest.mark.parametrize(
    ("triton", "numpy"),
    [("3.6.0", "2.3.5"), ("3.6.0", "1.26.4"), ("3.7.0", "2.4.6"), ("3.10.0", "2.5.5")],
)
def test_versions_that_fit(triton: str, numpy: str) -> None:
    assert misfit(triton, numpy) is None


def test_the_pinned_versions_fit() -> None:
    pins = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert misfit(pins["triton"], pins["numpy"]) is None


@pytest.mark.parametrize("interpret", ["1", "true", "0"])
def test_the_import_asks_only_for_the_interpreter(interpret: str) -> None:
    found = subprocess.run(
        [
            sys.executable, "-c",
            "import numpy, triton\n"
            "triton.__version__, numpy.__version__ = '3.6.0', '2.5.5'\n"
            "try: import fastbert_kernels.triton_import\n"
            "except ImportError as error: print(error)\n",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": interpret},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert not found.returncode, found.stderr
    assert ("of Triton 3.6.0 does not work with numpy 2.5.5" in found.stdout) == (interpret != "0")
    assert found.stdout.count("\n") == (interpret != "0")
