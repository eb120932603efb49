"""Where things stand: in a checkout, or installed beside the engine."""

import importlib.util
import os
import sys
from pathlib import Path

_ABOVE = Path(__file__).resolve().parents[3]
CHECKOUT = _ABOVE if (_ABOVE / "kernels" / "fastbert_kernels").is_dir() else None
"""The tree that holds this file; None where the package was installed without one."""
ROOT = CHECKOUT or Path.cwd()
"""What paths in a checkout begin with; the working folder where there is none."""
RESULTS = (CHECKOUT / "benchmarks" if CHECKOUT else Path(__file__).parent) / "results"
"""Measured files, committed; no such folder where there is no checkout."""


def importable(**variables: str) -> dict[str, str]:
    """The environment of a process that must find the packages this one has found."""
    specs = map(importlib.util.find_spec, ("fastbert", "fastbert_kernels", "fastbert_bench"))
    homes = [str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin]
    paths = [*dict.fromkeys(homes), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ, PYTHONPATH=os.pathsep.join(paths), **variables)


def module_command(module: str, *arguments: str) -> list[str]:
    """`python -m MODULE ARGUMENTS`, whatever lies in the working folder."""
    return [sys.executable, "-P", "-m", module, *arguments]
