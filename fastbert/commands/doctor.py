"""`fastbert doctor`: what this machine has, and which implementation of each op will run on it."""

import json
import os
import platform
import shutil
from argparse import Namespace
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from typing import Any

from fastbert import __version__
from fastbert.commands.options import Commands


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add(
        "doctor", "what this machine has and what will run on it", run, usage="[--json]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: Namespace) -> None:
    """Prints it, as lines or as JSON."""
    report = diagnose()
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        width = max(map(len, report))
        for item, finding in report.items():
            print(f"{item:<{width}}  {finding}")


def diagnose() -> dict[str, str]:
    """Returns what this machine has, one line per item, and which implementation each op takes."""
    report = {
        "fastbert": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    report |= _describe_torch()
    for package in ("triton", "transformers", "tokenizers"):
        report[package] = _version(package) or "not installed"
    report["flash-attn"] = _version("flash-attn") or "not installed (optional, not needed)"
    report["apex"] = "present" if _has_nvidia_apex() else "not installed (optional, not needed)"
    compiler = _cxx_compiler()
    report["C++ compiler"] = compiler or "none (torch.compile cannot run on this CPU)"
    return report | _describe_ops()


def _describe_torch() -> dict[str, str]:
    try:
        import torch

        from fastbert.train.device import fast_bf16
    except ImportError as error:
        return {"torch": f"not usable: {error}"}
    report = {"torch": str(torch.__version__)}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            report[f"cuda:{i}"] = (
                f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, "
                f"compute capability {gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}"
            )
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else ""
        report["cuda"] = "no GPU" + (f" ({built})" if built else " (torch is built without CUDA)")
    report["cpu"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    hardware = fast_bf16(torch.device("cpu"))
    report["bf16 on CPU"] = "in hardware" if hardware else "emulated (precision = auto takes fp32)"
    return report


def _version(distribution: str) -> str | None:
    from importlib import metadata  # a third of the time that help takes

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _has_nvidia_apex() -> bool:
    """Tells NVIDIA's apex, which has optimizers, from PyPI's package of that name."""
    spec = find_spec("apex")
    folders = spec.submodule_search_locations if spec else None
    return any(os.path.exists(os.path.join(f, "optimizers", "__init__.py")) for f in folders or ())


def _cxx_compiler() -> str | None:
    return next(filter(None, (shutil.which(name) for name in ("g++", "clang++"))), None)


def _describe_ops() -> dict[str, str]:
    try:
        from fastbert import ops
    except ImportError as error:
        return {"ops": f"not usable: {error}"}
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    why_not = ops.why_no_kernels(device, hidden_size=768, intermediate_size=3072, head_size=64)
    compiled = _cxx_compiler() is not None
    bundle = ops.choose_ops(device.type if not why_not else "cpu", compiled)
    found = {field.name: getattr(bundle, field.name) for field in fields(bundle)}
    report = {"Triton kernels": f"not used: {why_not}" if why_not else "used"}
    return report | {f"op {name}": _home(op) for name, op in found.items() if callable(op)}


def _home(op: Any) -> str:
    op = op.func if isinstance(op, partial) else op
    return f"{op.__module__}.{op.__qualname__}"
