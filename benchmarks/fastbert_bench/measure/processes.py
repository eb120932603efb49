"""Processes that take turns on a GPU: each imports while it waits, and begins when it is told to.

A process of its own for each part keeps a crash, a hang, a failed capture or a full memory with the
part that had it. The child calls `wait` after its imports and before its first word to the GPU.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert_bench.measure.places import importable, module_command

STDERR_LINES = 5

Process = subprocess.Popen[str]


def start(module: str, arguments: Sequence[str], device_type: str, **variables: str) -> Process:
    """Starts `python -m MODULE ARGUMENTS --wait` with our packages on its path.

    Args:
        module: one whose `main` knows `--wait`.
        arguments: paths among them are absolute.
        device_type: "cuda", or "cpu" for a rehearsal in Triton's interpreter.
        variables: of its environment.
    """
    environment = importable(TQDM_DISABLE="1", **variables)
    environment.pop("TRITON_INTERPRET", None)
    if device_type == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.Popen(
        module_command(module, *arguments, "--wait"), env=environment, text=True,
        errors="replace", process_group=0,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait() -> None:
    """The child's side: returns when the GPU is ours; ends the process if nobody is left to say."""
    if not sys.stdin.readline():
        sys.exit(1)


def go(process: Process) -> None:
    """Lets a waiting process begin; one that has died meanwhile is told of by `finish`."""
    assert process.stdin is not None
    try:
        process.stdin.write("go\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass


def finish(process: Process, seconds: float) -> str | None:
    """Lets a waiting process go and waits for it; what went wrong, if anything."""
    seconds = max(0.0, seconds)
    try:
        _, errors = process.communicate("go\n", timeout=seconds)
    except subprocess.TimeoutExpired as error:
        stop(process)
        said: object = error.stderr or b""  # bytes, whatever the stub says
        text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        return f"stopped after {seconds:.0f} s: {last_lines(text)}"
    except BaseException:  # we are being ended ourselves
        stop(process)
        raise
    if process.returncode == 0:
        return None
    return f"exit code {process.returncode}: {last_lines(errors)}"


def stop(process: Process) -> None:
    """Ends a process that runs, and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stderr):
        if pipe is not None:
            pipe.close()


def last_lines(text: str) -> str:
    """The last line, which names an error, and then those before it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(reversed(lines[-STDERR_LINES:]))[:1000]


def one_line(error: Exception) -> str:
    """An error's type and first line."""
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0][:200]


def failed(checks: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each check {"check", "ok", numbers} that does not hold."""
    lines = []
    for check in checks:
        if check["ok"] is False:
            numbers = {k: v for k, v in check.items() if k not in ("check", "ok", "why")}
            told = [f"{k} {v:.2e}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in numbers.items()]  # fmt: skip
            told = [str(check["why"]), *told] if "why" in check else told
            lines.append(f"{check['check']}: {', '.join(told) or 'does not hold'}")
    return lines


def write_json(path: Path, content: object) -> None:
    """At once or not at all: a reader never finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    partial.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """What a part has left; empty where it left nothing."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
