"""Does the main job train? The stage `pretrain` of `python -m fastbert_bench.gpu`: about a minute.

`fastbert pretrain` itself, on the text that every Python carries: a BERT of base size, killed after
its first checkpoint and resumed; and beside it the first steps again in fp32, by plain PyTorch,
with the same weights, batches and dropout bits, so that the losses must lie on each other.
"""

import json
import pydoc_data.topics
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastbert_bench.gpu import part
from fastbert_bench.measure.places import importable, module_command
from fastbert_bench.measure.processes import STDERR_LINES

# 8,192 tokens, for plain PyTorch makes whole matrices of scores of them: at 32,768 those that it
# keeps for the backward would take some 80 GB in fp32.
BASE = (
    "--model", "base", "--max-seq-length", "512", "--tokens-per-batch", "8192",
    "--vocab-size", "8192", "--learning-rate", "2e-4", "--warmup-steps", "10",
    "--max-steps", "400", "--save-steps", "150", "--logging-steps", "1", "--eval-steps", "0",
    "--report-to", "none",
)  # fmt: skip
TINY = (
    "--model", "tiny", "--max-seq-length", "32", "--tokens-per-batch", "512",
    "--vocab-size", "400", "--learning-rate", "3e-3", "--warmup-steps", "5", "--max-steps", "60",
    "--save-steps", "20", "--logging-steps", "1", "--eval-steps", "0", "--report-to", "none",
)  # fmt: skip
# On the demo, bf16 stays within 0.02% of fp32 over 300 steps; a fault of one op shows in the third
# digit at once, when the loss begins to fall.
COMPARED_STEPS, ALLOWED = 20, 0.005
TOPICS = 30  # of Python's own help: a rehearsal's text
SECONDS = 120.0


def command(device: str, run: Path, *more: str) -> list[str]:
    """The command line of one call; a rehearsal reads a text of its own, which takes less long."""
    sizes = BASE if device == "cuda" else (*TINY, "--data", str(run.parent / "text.txt"))
    settings = ("--device", device, "--out", str(run), *sizes, *more)
    return module_command("fastbert", "pretrain", *settings)


def _environment() -> dict[str, str]:
    environment = importable()
    environment.pop("TRITON_INTERPRET", None)
    return environment


def _start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            arguments, env=_environment(), stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _told(log: Path) -> str:
    """The last lines of a call, without the bar."""
    return " | ".join(line.strip()[:200] for line in _lines(log)[-STDERR_LINES:] if line.strip())


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, of a run's metrics."""
    return {row["step"]: row["loss"] for row in _metrics(run) if "loss" in row}


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in _lines(path) if line] if path.exists() else []


def _rate(run: Path) -> float | None:
    """Median tokens/s; each step is logged, and so waited for: less than a run reaches else."""
    rates = sorted(r["tokens_per_second"] for r in _metrics(run) if "tokens_per_second" in r)
    return rates[len(rates) // 2] if rates else None


def measure(device: str, folder: Path, seconds: float = SECONDS) -> Iterator[dict[str, Any]]:
    """What is known, again and again as more is found.

    Args:
        device: "cuda" or "cpu".
        folder: an empty one for the runs.
        seconds: after which a call is ended.
    """
    found: dict[str, Any] = {"stage": "pretrain", "checks": [], "seconds": {}}
    began = time.monotonic()
    run, log = folder / "run", folder / "run.log"
    folder.mkdir(parents=True, exist_ok=True)
    if device == "cpu":
        topics = list(pydoc_data.topics.topics.values())[:TOPICS]
        (folder / "text.txt").write_text("\n\n".join(topics), encoding="utf-8")

    def check(name: str, ok: bool, **numbers: Any) -> None:
        found["checks"].append({"check": name, "ok": ok, **numbers})

    first = _start(command(device, run), log)
    checkpoint = None
    while first.poll() is None and checkpoint is None and time.monotonic() - began < seconds:
        time.sleep(0.1)
        checkpoint = next((run / "checkpoints").glob("step-*[0-9]/state.json"), None)
    killed = first.poll() is None
    if killed:
        first.send_signal(signal.SIGKILL)
    first.wait()
    found["seconds"]["to the first checkpoint"] = time.monotonic() - began
    check("a checkpoint was written, then the run was killed", killed and checkpoint is not None,
          **({} if killed and checkpoint else {"why": _told(log)}))  # fmt: skip
    before = losses(run)
    found["losses"] = before
    found["log"] = _head(log)
    yield found
    if checkpoint is None:
        return

    began = time.monotonic()
    resumed = _call(command(device, run, "--resume", "auto"), folder / "resume.log", seconds)
    after = losses(run)
    found["seconds"]["resumed, to the end"] = time.monotonic() - began
    steps = sorted(after)
    check("it was resumed and ran to its end", resumed == 0 and steps[-1:] == [max(after)],
          **({} if resumed == 0 else {"why": _told(folder / "resume.log")}))  # fmt: skip
    went_on = any("going on from step" in line for line in _lines(folder / "resume.log"))
    check("it went on from the checkpoint", went_on)
    check("the trained model was written", (run / "hf" / "model.safetensors").exists())
    tenth = max(1, len(steps) // 10)
    early, late = (sum(after[s] for s in part) / tenth for part in (steps[:tenth], steps[-tenth:]))
    check("the loss fell", late < early - 0.3, first=early, last=late)
    found |= {"losses": after, "tokens_per_second": _rate(run), "held_out": _held_out(run)}
    yield found

    began = time.monotonic()
    exact, shown = folder / "fp32", folder / "fp32.log"
    plain = ("--precision", "fp32", "--kernels", "reference", "--step", "eager",
             "--tokenizer", str(run / "tokenizer"),
             "--stop-at-step", str(COMPARED_STEPS))  # fmt: skip
    done = _call(command(device, exact, *plain), shown, seconds)
    found["seconds"]["the same steps in fp32"] = time.monotonic() - began
    wanted = losses(exact)
    both = sorted(after.keys() & wanted.keys())[:COMPARED_STEPS]
    worst = max((abs(after[s] - wanted[s]) / wanted[s] for s in both), default=float("inf"))
    check(f"the losses of {len(both)} steps are those of fp32 in plain PyTorch",
          done == 0 and len(both) == COMPARED_STEPS and worst <= ALLOWED,
          error=worst, allowed=ALLOWED, **({} if done == 0 else {"why": _told(shown)}))  # fmt: skip
    found["fp32_losses"] = wanted
    yield found


def _call(arguments: Sequence[str], log: Path, seconds: float) -> int | None:
    """A call's exit code; None where it was ended."""
    process = _start(arguments, log)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()


def _head(log: Path) -> list[str]:
    """What the run said of its choices."""
    starts = ("device:", "precision:", "ops:", "step:", "model:")
    return [line[:200] for line in _lines(log) if line.startswith(starts)]


def _held_out(run: Path) -> dict[str, float]:
    """The last evaluation."""
    rows = reversed(_metrics(run))
    return next((row for row in rows if any("eval" in key for key in row)), {})


def table(found: dict[str, Any]) -> list[str]:
    """One line, and one for each failure."""
    line, failures = part.verdict("pretrain", found["checks"])
    numbers = {row["check"]: row for row in found["checks"]}
    for row in numbers.values():
        if "first" in row:
            line += f"; loss {row['first']:.3f} to {row['last']:.3f}"
        if "allowed" in row:
            line += f"; off from fp32 by {row['error']:.3%}"
    if found.get("tokens_per_second"):
        line += f"; {found['tokens_per_second']:,.0f} tok/s"
    return [line, *failures]


def main(argv: Sequence[str] | None = None) -> int:
    args = part.parser("pretrain").parse_args(argv)
    device = part.device_of(args).type
    with tempfile.TemporaryDirectory(prefix="fastbert-pretrain-") as folder:
        return part.checked(measure(device, Path(folder)), args.out)


if __name__ == "__main__":
    sys.exit(main())
