"""A run can die at any moment and go on bit for bit; a damaged checkpoint is never trusted."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastbert.data import pack
from fastbert.train import checkpoint
from fastbert.train.loop import _Trainer
from fastbert.train.report import read_metrics

pytestmark = pytest.mark.usefixtures("undrawn")
ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., Path]


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def state(run: Path, step: int = 20) -> dict[str, Any]:
    found = json.loads((step_folder(run, step) / "state.json").read_text())
    return {key: found[key] for key in ("step", "updates", "data", "tokens", "skipped")}


def assert_same(one: Path, other: Path, step: int = 20) -> None:
    """Weights, moments, data position and the exported model, bit for bit."""
    for name in ("weights.safetensors", "optimizer.safetensors"):
        a, b = (load_file(step_folder(run, step) / name) for run in (one, other))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key
    assert state(one, step) == state(other, step)
    hf = [(run / "hf/model.safetensors").read_bytes() for run in (one, other)]
    assert hf[0] == hf[1]


def assert_steps_once(run: Path, last: int = 20) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, last + 1))
    evaluated = [row["step"] for row in rows if "eval/mlm_loss" in row]
    assert evaluated == list(range(10, last + 1, 10))


KINDS = {
    "plain": "",
    "no nsp": "--no-nsp",
    "whole words": "--whole-word-mask",
    "accumulation": "--gradient-accumulation-steps 2",
    "bf16": "--precision bf16",
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_ten_and_ten_are_twenty(
    plain: Path, pretrain: Run, resume: Run, losses: Callable[..., Any], options: str
) -> None:
    whole = pretrain("whole", options) if options else plain
    assert not step_folder(pretrain("parts", f"{options} --stop-at-step 10"), 15).exists()
    parts = resume("parts")
    assert_same(whole, parts)
    assert losses(whole) == losses(parts)
    assert_steps_once(parts)
    evaluations = [
        [row for row in read_metrics(run / "metrics.jsonl") if "loss" not in row]
        for run in (whole, parts)
    ]
    assert evaluations[0] == evaluations[1]


def test_a_shorter_run_can_be_prolonged(
    pretrain: Run, resume: Run, losses: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--lr-scheduler-type constant"
    whole = pretrain("whole", options)
    pretrain("parts", f"{options} --max-steps 10")
    capsys.readouterr()
    parts = resume("parts", "--resume auto --max-steps 20")
    assert "resume: max_steps is now 20, was 10\n" in capsys.readouterr().err
    assert_same(whole, parts)
    assert losses(whole) == losses(parts)
    assert_steps_once(parts)
    assert "max_steps = 20\n" in (parts / "config.toml").read_text()


def test_a_finished_run_can_be_resumed_and_changes_nothing(
    plain: Path, resume: Run, tmp_path: Path
) -> None:
    run = shutil.copytree(plain, tmp_path / "run")
    before = (run / "metrics.jsonl").read_text()
    weights = (run / "hf/model.safetensors").read_bytes()
    resume("run")
    assert (run / "metrics.jsonl").read_text() == before
    assert (run / "hf/model.safetensors").read_bytes() == weights


def test_seeds(pretrain: Run, losses: Callable[..., Any]) -> None:
    one, same, other = (
        losses(pretrain(name, f"--max-steps 4 --seed {seed}"))
        for name, seed in (("one", 7), ("same", 7), ("other", 8))
    )
    assert one == same
    assert not {loss for _, loss in one} & {loss for _, loss in other}


def test_explicit_checkpoint_replaces_what_came_after(
    pretrain: Run, losses: Callable[..., Any], settings: list[str]
) -> None:
    from fastbert.cli import main

    run = pretrain("run")
    whole = shutil.copytree(run, run.parent / "whole")
    # Were step 20 left as it is, `--resume auto` would then go on from an abandoned branch.
    argv = ["pretrain", "--resume", str(step_folder(run, 5)), "--stop-at-step", "10"]
    assert main(argv) == 0
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-000005",
        "step-000010",
    ]
    assert main(["pretrain", "--resume", str(step_folder(run, 10))]) == 0
    assert_same(whole, run)
    assert losses(whole) == losses(run)
    assert_steps_once(run)


def run_killed(at: int, *options: str) -> None:
    """A run in a process of its own, which SIGKILL ends before step `at`, counted from 0."""
    code = (
        "import os, signal, sys\n"
        "from fastbert.cli import main\n"
        "from fastbert.data import pack\n"
        "from fastbert.train.loop import _Trainer\n"
        f"pack.SAMPLE = {pack.SAMPLE}\n"
        "step = _Trainer._one_step\n"
        "def one_step(self):\n"
        f"    if self.step == {at}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self)\n"
        "_Trainer._one_step = one_step\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "pretrain", *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_and_resumed(
    plain: Path, resume: Run, settings: list[str], losses: Callable[..., Any], tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    run_killed(13, *settings, "--out", str(killed))
    assert losses(killed)[-1][0] == 13
    # As if the kill had come while files were being written.
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')
    left_over = killed / "checkpoints/.step-000012.tmp"
    left_over.mkdir()
    (left_over / "weights.safetensors").write_bytes(b"\0" * 100)
    resume("killed")
    assert_same(plain, killed)
    assert losses(plain) == losses(killed)
    assert_steps_once(killed)
    assert not left_over.exists()
    assert not list(killed.rglob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_says_how_to_go_on(
    plain: Path,
    pretrain: Run,
    resume: Run,
    losses: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    one_step = _Trainer._one_step

    def signalled(self: _Trainer) -> Any:
        if self.step == 6:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # until the handler has run
        return one_step(self)

    monkeypatch.setattr(_Trainer, "_one_step", signalled)
    capsys.readouterr()
    run = pretrain("run", exit_code=1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"fastbert: error: stopped by {number.name} at step 7; everything is saved: go on with: "
        f"fastbert pretrain --resume auto --out {run}"
    )
    assert step_folder(run, 7).is_dir()
    assert not (run / "hf").exists()
    monkeypatch.setattr(_Trainer, "_one_step", one_step)
    resume("run")
    assert_same(plain, run)
    assert losses(plain) == losses(run)
    assert_steps_once(run)


def cut_short(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def change_a_number(path: Path) -> None:
    content = path.read_text()
    assert '"skipped": 0' in content
    path.write_text(content.replace('"skipped": 0', '"skipped": 1'))


DAMAGES = [
    ("weights.safetensors", cut_short),
    ("weights.safetensors", flip_a_bit),
    ("weights.safetensors", Path.unlink),
    ("optimizer.safetensors", cut_short),
    ("optimizer.safetensors", flip_a_bit),
    ("state.json", cut_short),
    ("state.json", flip_a_bit),
    ("state.json", change_a_number),
    ("state.json", Path.unlink),
]


def test_a_damaged_checkpoint_is_passed_over_or_refused(
    pretrain: Run, resume: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--max-steps 6 --save-steps 3 --validation-fraction 0"
    original = pretrain("original", options)
    weights = (original / "hf/model.safetensors").read_bytes()
    for index, (name, damage) in enumerate(DAMAGES):
        case = f"{name} {damage.__name__}"
        run = shutil.copytree(original, original.parent / f"run{index}")
        newest = step_folder(run, 6)
        damage(newest / name)
        capsys.readouterr()

        resume(run.name, f"--resume {newest}", exit_code=2)
        shown = capsys.readouterr().err
        assert shown.startswith("fastbert: error: ") and shown.count("\n") == 1, case
        assert "step-000006" in shown and "--resume auto" in shown, case

        resume(run.name)
        shown = capsys.readouterr().err.splitlines()
        assert shown[0].startswith(f"passed over: {newest}: damaged checkpoint: "), case
        assert shown[1] == "resume: going on from step 3", case
        assert (run / "hf/model.safetensors").read_bytes() == weights, case
        assert_same(original, run, 6)


def rewritten(folder: Path, state: dict[str, Any]) -> None:
    """A state.json whose digest is right, whatever it says."""
    state.pop("sha256", None)
    state["sha256"] = checkpoint._digest(state)
    (folder / "state.json").write_text(json.dumps(state))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value stands in JSON: every key, and the first of every list."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and value:
        items = [(0, value[0])]
    for key, below in items:
        yield (*path, key)
        yield from places(below, (*path, key))


RANDOM = ("data", "planner", "rng")
WRONG: list[Any] = [None, [], {}, "x", True, -1, 1.5, 2**70, -(2**70), math.nan, math.inf]


def test_a_state_of_the_wrong_types_is_damage_whatever_its_digest(
    pretrain: Run, resume: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain("run", "--max-steps 2 --validation-fraction 0 --precision fp16")
    folder = step_folder(run, 2)
    text = (folder / "state.json").read_text()
    found = [
        path for path in places(json.loads(text)) if path[0] not in ("sha256", "files", "format")
    ]
    assert len(found) > 100
    told = 0
    for path in found:
        for wrong in (*WRONG, *(("missing",) if isinstance(path[-1], str) else ())):
            state = json.loads(text)
            place = state
            for key in path[:-1]:
                place = place[key]
            if wrong == "missing":
                del place[path[-1]]
            else:
                place[path[-1]] = wrong
            # A setting may be of any value in its bounds (but is compared with the run's own), a
            # random state any number, and nothing may wait.
            free = path[0] in ("recipe", "sizes", "loss_scale") or path[:3] == RANDOM
            free |= path in (("window", 0), ("data", "pending"), ("data", "planner", "balance"))
            free |= path == ("data", "shape", "data") and wrong == "missing"
            said = checkpoint.what_is_wrong(state)
            assert said or free, (path, wrong)
            told += bool(said)
            assert len(said) < 300
    assert told > 800

    capsys.readouterr()
    cases: list[tuple[str, Any]] = [("tokens", "x"), ("data", []), ("sizes", {}), ("step", 10**30)]
    cases += [("format", []), ("files", None), ("files", {"weights.safetensors": 1})]
    for name, value in cases:
        rewritten(folder, {**json.loads(text), name: value})
        for asked in ("auto", str(folder)):
            resume("run", f"--resume {asked}", exit_code=2)
            assert capsys.readouterr().err.count("\n") == 1
    state = json.loads(text)
    state["data"]["planner"]["open"][0][1] = 10**6  # behind its document's end
    rewritten(folder, state)
    resume("run", exit_code=2)
    assert "data position lies behind document" in capsys.readouterr().err.splitlines()[-1]


def test_a_config_that_is_not_as_the_run_wrote_it(
    pretrain: Run, resume: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain("run", "--max-steps 2 --save-steps 1 --validation-fraction 0")
    path = run / "config.toml"
    whole = path.read_text()
    weights = (run / "hf/model.safetensors").read_bytes()
    changed = whole.replace("max_steps = 2\n", "max_steps = 3\n")
    for content in (changed, whole[: len(whole) // 2], whole.rpartition("#")[0], "", whole + "\n"):
        path.write_text(content)
        capsys.readouterr()
        resume("run", exit_code=2)
        assert capsys.readouterr().err == (
            f"fastbert: error: {path}: was damaged or changed since the run wrote it: put it back "
            f"or, if that was you, give it as --config {path}\n"
        )
    path.write_bytes(b"\xff\xfe" + whole.encode("utf-16-le"))
    resume("run", exit_code=2)
    assert "it looks like UTF-16" in capsys.readouterr().err
    path.write_text(whole)
    resume("run")
    assert (run / "hf/model.safetensors").read_bytes() == weights
    path.write_text(changed)
    resume("run", f"--resume auto --config {path}")
    assert step_folder(run, 3).is_dir()
    resume("run")  # it is sealed anew


def test_metrics_of_anything_at_a_resume(pretrain: Run, resume: Run) -> None:
    run = pretrain("run", "--max-steps 4 --stop-at-step 2 --validation-fraction 0")
    path = run / "metrics.jsonl"
    rows = path.read_bytes()
    assert rows.count(b"\n") == 2
    others = [b"\x80\xff\0\n", b"[" * 100_000 + b"\n", b'{"step": true, "loss": 1}\n', b"[1]\n"]
    others += [b'{"step": 1, "loss": "x"}\n', b'{"step": 1, "loss": NaN}\n', b"{}\n", b"\n"]
    others += [
        b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n",
        b'{"step": null}\n',
        b'{"step": 2, "lo',
    ]
    path.write_bytes(rows + b"".join(others))
    resume("run")
    assert path.read_bytes().startswith(rows)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_when_every_checkpoint_is_damaged(
    pretrain: Run, resume: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain("run", "--max-steps 2 --save-steps 1 --validation-fraction 0")
    for folder in (run / "checkpoints").iterdir():
        cut_short(folder / "optimizer.safetensors")
    before = (run / "metrics.jsonl").read_text()
    capsys.readouterr()
    resume("run", exit_code=2)
    shown = capsys.readouterr().err
    assert shown.startswith("fastbert: error: resume: none of the 2 checkpoints in")
    assert shown.endswith("start a new run with another --out\n") and shown.count("\n") == 1
    assert (run / "metrics.jsonl").read_text() == before


def test_no_pickle_and_no_more_checkpoints_than_asked(pretrain: Run) -> None:
    options = "--max-steps 8 --save-steps 2 --save-total-limit 3 --report-to tensorboard"
    run = pretrain("run", options)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000006", "step-000008"]
    for path in run.rglob("*"):
        if path.is_file():
            start = path.read_bytes()[:2]
            assert start != b"PK" and start[:1] != b"\x80", path  # torch.save's zip, pickle
            assert path.suffix not in (".pt", ".pth", ".bin", ".pkl") or path.parent.name == "data"


def test_what_a_run_cannot_change_half_way(
    pretrain: Run,
    resume: Run,
    corpus: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = pretrain("run", "--max-steps 4 --save-steps 2")
    other = pretrain("other", "--max-steps 2 --vocab-size 120")
    config = (run / "config.toml").read_bytes()
    changed = tmp_path / "changed.txt"
    changed.write_text(corpus.read_text() + "One more sentence.\n")
    refused = {
        "--learning-rate 5e-4": "learning_rate = 0.0005 differs from 0.001 in the checkpoint of",
        "--seed 1": "seed = 1 differs from 42 in the checkpoint of step 4",
        "--no-nsp": "nsp = False differs from True",
        "--hidden-dropout-prob 0.2": "hidden_dropout_prob = 0.2 differs from None",
        f"--data {changed}": f"data = '{changed}' has changed since the run in {run} began",
        f"--tokenizer {other}/tokenizer": f"tokenizer = '{other}/tokenizer' is not the one in",
    }
    capsys.readouterr()
    for options, message in refused.items():
        resume("run", f"--resume auto {options}", exit_code=2)
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith(f"fastbert: error: {message}"), options
        assert [line for line in lines[:-1] if not line.startswith("resume: ")] == [], options
        assert (run / "config.toml").read_bytes() == config, options

    sizes = json.loads(model.read_text())
    model.write_text(json.dumps(sizes | {"hidden_act": "gelu_new"}))
    resume("run", exit_code=2)
    assert "has hidden_act = gelu_new, but had gelu at" in capsys.readouterr().err
    model.write_text(json.dumps(sizes))
    corpus.write_text(changed.read_text())
    resume("run", exit_code=2)
    assert f"data = '{corpus}' has changed since" in capsys.readouterr().err
    assert (run / "config.toml").read_bytes() == config


def test_resume_that_names_the_wrong_thing(
    pretrain: Run, resume: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain("run", "--max-steps 1 --validation-fraction 0")
    other = pretrain("other", "--max-steps 1 --validation-fraction 0")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/plan.md").touch()
    refused = {
        ("other", f"--resume {step_folder(run, 1)}"): f"out = '{other}' is not the run of resume =",
        ("run", f"--resume {run}"): f"resume = '{run}' is a run, not a checkpoint",
        ("run", f"--resume {run}/hf"): f"resume = '{run}/hf' is not a whole checkpoint",
        ("notes", "--resume auto"): f"out = '{tmp_path}/notes' already holds other files",
    }
    capsys.readouterr()
    for (name, options), message in refused.items():
        resume(name, options, exit_code=2)
        shown = capsys.readouterr().err
        assert shown.startswith(f"fastbert: error: {message}") and shown.count("\n") == 1


def test_resume_without_a_checkpoint_begins(
    pretrain: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain("run", "--resume auto --max-steps 2")
    assert f"resume: {run} has no checkpoint yet, starting at step 0" in capsys.readouterr().err
    assert step_folder(run, 2).is_dir()
