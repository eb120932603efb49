"""`fastbert finetune`: whole runs, killed and resumed, seeds, searches, curves, and mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert.cli import main
from fastbert.finetune.config import CONFIGS
from fastbert.finetune.loop import Trainer
from fastbert.hf.load import load_head
from fastbert.settings import settings

from . import tiny

QUICK = ("--per-device-train-batch-size=4", "--learning-rate=5e-3", "--report-to=none")
QUICK = (*QUICK, "--device=cpu", "--num-threads=1", "--logging-steps=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    tiny.save(root / "model")
    tiny.labelled(root / "train.jsonl", 24, 3)
    tiny.labelled(root / "eval.jsonl", 9, 3, seed=1)
    return root


def argv(root: Path, out: Path | str, *more: object, task: str = "classify") -> list[str]:
    files = (
        "--model",
        root / "model",
        "--train",
        root / "train.jsonl",
        "--eval",
        root / "eval.jsonl",
    )
    return ["finetune", task, *map(str, (*files, "--out", out, *QUICK, *more))]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path, *names: str) -> list[tuple[Any, ...]]:
    """Steps and values that no clock has touched."""
    told = (*names, "loss", "grad_norm", "learning_rate", "eval/loss", "eval/accuracy")
    return [(row["step"], *(row.get(name) for name in told)) for row in rows_of(run)]


def refused(capsys: pytest.CaptureFixture[str], *given: object) -> str:
    """The one line of a bad request."""
    capsys.readouterr()
    assert main(list(map(str, given))) == 2
    said = capsys.readouterr().err.splitlines()
    assert "Traceback" not in "".join(said)
    assert said[-1].startswith("fastbert: error: "), said
    return said[-1].removeprefix("fastbert: error: ")


# Killed, stopped, resumed

SLOW = (
    *("--num-train-epochs=3", "--hidden-dropout-prob=0.1", "--save-steps=4", "--eval-steps=6"),
    "--metric-for-best-model=loss",  # each evaluation is the best so far
)


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """24 examples by 4: 18 steps without a pause; dropout draws from the generator."""
    assert main(argv(root, root / "whole", *SLOW)) == 0
    return root / "whole"


_DYING = """
import os, signal, sys
from fastbert.cli import main
from fastbert.finetune.loop import Trainer

at = int(sys.argv[1])
step = Trainer._one_step

def one_step(self):
    found = step(self)
    if self.step == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

Trainer._one_step = one_step
sys.exit(main(sys.argv[2:]))
"""


def killed(at: int, *given: object) -> int:
    """The return code of a process that a signal kills after a step."""
    command = [sys.executable, "-c", _DYING, str(at), *map(str, given)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)
    return done.returncode


def after(at: int, act: Callable[[], None], *given: object) -> int:
    """The exit code of a command, in this process, to which something befalls after a step."""
    step = Trainer._one_step

    def one_step(self: Trainer) -> float:
        found = step(self)
        if self.step == at:
            act()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_one_step", one_step)
        return main([str(one) for one in given])


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise RuntimeError("as a kill would, this leaves everything as it is")


def assert_same(run: Path, whole: Path) -> None:
    ours, wanted = tiny.weights_of(run), tiny.weights_of(whole)
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(ours[name], value), name
    assert curve(run) == curve(whole)
    one, other = (json.loads((path / "eval.json").read_text())["metrics"] for path in (run, whole))
    assert one == other


def test_killed_and_resumed_to_the_last_bit(
    root: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert killed(10, *argv(root, run, *SLOW)) == -signal.SIGKILL
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000008"]
    assert rows_of(run)[-1]["step"] >= 9
    assert main(["finetune", "classify", "--resume", "--out", str(run)]) == 0
    assert "resume: goes on at step 8" in capsys.readouterr().err
    assert_same(run, whole)
    assert not (run / "checkpoints").exists()
    assert main(["finetune", "classify", "--resume", "--out", str(run)]) == 0
    assert f"{run}: is done" in capsys.readouterr().err


def test_stopped_by_sigterm_and_resumed(
    root: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "a run"
    assert after(7, sigterm, *argv(root, run, *SLOW)) == 1
    said = capsys.readouterr().err.splitlines()
    (line,) = [one for one in said if one.startswith("fastbert: ")]
    assert line.startswith("fastbert: error: stopped by SIGTERM at step 7; everything is saved: ")
    typed = line.rpartition("go on with fastbert ")[2]
    assert typed == f"finetune classify --resume --out '{run}'"
    assert main([*typed.partition(" --out ")[0].split(), "--out", str(run)]) == 0
    assert_same(run, whole)


def test_a_kill_while_the_best_model_is_replaced(
    root: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def torn(folder: Path, *_: Any) -> None:
        if folder.exists():  # the second time: the old one is aside, no new one in its place
            os.replace(folder, folder.with_name(".hf.old"))
            raise KeyboardInterrupt
        saved(folder, *_)

    from fastbert.finetune import loop

    saved = loop.save_model
    monkeypatch.setattr(loop, "save_model", torn)
    assert main(argv(root, run, *SLOW)) in (130, 1)
    assert not (run / "hf").exists()
    monkeypatch.undo()
    assert main(["finetune", "classify", "--resume", "--out", str(run)]) == 0
    assert_same(run, whole)
    assert not (run / ".hf.old").exists()


def test_the_best_model_is_the_checkpoints_whatever_a_resumed_run_finds(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it finds other numbers than before, as other threads would: never another in hf/."""
    accuracies = {2: 0.1, 4: 0.5, 6: 0.2}
    evaluation = Trainer._evaluation

    def told(self: Trainer) -> Any:
        found, predictions = evaluation(self)
        found.metrics["accuracy"] = accuracies[self.step]
        return found, predictions

    monkeypatch.setattr(Trainer, "_evaluation", told)
    run = tmp_path / "run"
    asked = ("--max-steps=6", "--eval-steps=2", "--save-steps=3")
    assert after(5, fail, *argv(root, run, *asked)) == 1
    best = tiny.weights_of(run)
    accuracies[4] = accuracies[6] = 0.0
    assert main(["finetune", "classify", "--resume", "--out", str(run)]) == 0
    result = json.loads((run / "result.json").read_text())
    assert (result["best_step"], result["metrics"]["accuracy"]) == (4, 0.5)
    for name, value in tiny.weights_of(run).items():
        assert torch.equal(value, best[name])


@pytest.mark.parametrize("more", [(), ("--lora-r=2",)])
def test_a_kill_between_a_checkpoint_and_its_best_model(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Any
) -> None:
    asked = ("--max-steps=4", "--eval-steps=2", *more)
    assert main(argv(root, tmp_path / "whole", *asked)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_keep", lambda self: fail())
        assert main(argv(root, tmp_path / "run", *asked)) == 1
    assert not (tmp_path / "run/hf").exists()
    assert main(["finetune", "classify", "--resume", "--out", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_what_a_run_cannot_change_half_way(
    root: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a checkpoint, without one yet, and when it is done."""
    again = ("finetune", "classify", "--resume", "--out")
    changed = f"learning_rate = 0.1 differs from 0.005 of the run in {whole}: leave it out"
    assert changed in refused(capsys, *again, whole, "--learning-rate=0.1")
    early = tmp_path / "early"
    assert after(2, fail, *argv(root, early, *SLOW)) == 1
    assert not (early / "checkpoints").exists()
    assert "eval_steps = 5 differs from 6" in refused(capsys, *again, early, "--eval-steps=5")
    text = refused(capsys, "finetune", "tag", "--resume", "--out", whole)
    assert text == f"{whole} is a run of fastbert finetune classify, not of tag"
    other = tiny.labelled(tmp_path / "other.jsonl", 24, 3, seed=5)
    begun = tmp_path / "begun"
    assert after(5, fail, *argv(root, begun, *SLOW)) == 1
    assert "do not hold what the run in" in refused(capsys, *again, begun, "--train", other)
    moved = shutil.copy(root / "train.jsonl", tmp_path / "moved.jsonl")
    assert main([*again[:3], "--out", str(begun), "--train", str(moved)]) == 0
    nowhere = refused(capsys, *again, tmp_path / "none")
    assert nowhere == f"resume: {tmp_path}/none holds no run of fastbert finetune"
    assert "already holds another run" in refused(capsys, *argv(root, whole))


def test_what_changes_under_a_run_that_was_killed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's folder, of which only the trained weights are in a checkpoint; then examples."""
    model, train = tmp_path / "model", tmp_path / "train.jsonl"
    shutil.copytree(root / "model", model)
    shutil.copy(root / "train.jsonl", train)
    asked = ("--model", model, "--train", train, "--seeds=2", "--freeze-layers=1", "--save-steps=2")
    run = tmp_path / "run"
    again = ("finetune", "classify", "--resume", "--out", run)
    assert after(3, fail, *argv(root, run, *asked, "--max-steps=5")) == 1
    tiny.save(model, seed=5)
    there = f"the run in {run}/seed-42 began with: put that back, or name another --out"
    assert refused(capsys, *again) == f"{model} is not the model that {there}"
    moved = shutil.copytree(root / "model", tmp_path / "moved")
    assert main([str(one) for one in (*again, "--model", moved)]) == 0
    shutil.rmtree(run / "seed-43")  # and seed 42 is done
    assert refused(capsys, *again, "--model", model) == f"{model} is not the model that {there}"
    tiny.labelled(train, 24, 3, seed=5)
    line = refused(capsys, *again)
    assert line == f"{train} and {root}/eval.jsonl do not hold what {there}"
    line = refused(capsys, *again, "--seeds=1")
    assert line.startswith(f"seeds = 1: the run in {run} was begun with 2")


# Several runs


@pytest.fixture(scope="module")
def seeds(root: Path) -> Path:
    run = root / "seeds"
    assert (
        main(argv(root, run, "--seeds=3", "--num-train-epochs=2", "--metric-for-best-model=loss"))
        == 0
    )
    return run


def test_seeds(seeds: Path) -> None:
    runs = [seeds / f"seed-{seed}" for seed in (42, 43, 44)]
    found = [json.loads((run / "result.json").read_text())["metrics"] for run in runs]
    written = json.loads((seeds / "eval.json").read_text())["seeds"]
    for name in ("loss", "accuracy", "macro_f1"):
        values = [one[name] for one in found]
        assert written[name]["mean"] == pytest.approx(np.mean(values))
        assert written[name]["deviation"] == pytest.approx(np.std(values, ddof=1))
        assert written[name]["values"] == values
    assert len({one["loss"] for one in found}) == 3
    best = min(range(3), key=lambda place: found[place]["loss"])
    kept = tiny.weights_of(seeds)
    for place, run in enumerate(runs):
        weights = tiny.weights_of(run)
        same = all(torch.equal(kept[name], weights[name]) for name in kept)
        assert same == (place == best)


def test_seeds_that_are_done_are_not_done_again(
    root: Path, seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "half"
    given = ("--seeds=3", "--num-train-epochs=2", "--metric-for-best-model=loss")
    shutil.copytree(seeds, run)
    shutil.rmtree(run / "seed-44")
    shutil.rmtree(run / "hf")
    (run / "report.html").unlink()
    before = {path: path.stat().st_mtime_ns for path in run.glob("seed-4[23]/**/*")}
    assert main(["finetune", "classify", "--resume", "--out", str(run)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("is done") == 2
    assert re.search(r"^loss: \S+ ± \S+$", captured.out, re.MULTILINE)
    assert {path: path.stat().st_mtime_ns for path in run.glob("seed-4[23]/**/*")} == before
    for name, value in tiny.weights_of(seeds).items():
        assert torch.equal(tiny.weights_of(run)[name], value)
    # A signal amid a seed names the folder of the whole.
    assert after(3, sigterm, *argv(root, tmp_path / "stopped", *given)) == 1
    assert f"--resume --out {tmp_path}/stopped\n" in capsys.readouterr().err


def test_a_search(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--search=3", "--search-epochs=1,2", "--search-batch-sizes=4,8")
    given = (*given, "--search-learning-rate=1e-4,1e-2", "--seed=4294967296")

    def proposals() -> list[str]:
        said = capsys.readouterr().err
        return re.findall(r"^trial \d: (.*)$", said, re.MULTILINE)

    assert main(argv(root, tmp_path / "one", *given)) == 0
    first = proposals()
    assert len(first) == len(set(first)) == 3
    notes = " ".join(json.loads((tmp_path / "one/eval.json").read_text())["notes"])
    values = {}
    for number, shown in enumerate(first):
        run = tmp_path / f"one/trial-{number:03d}"
        values[number] = json.loads((run / "result.json").read_text())["metrics"]["accuracy"]
        assert f"Trial {number}: {shown}: accuracy {values[number]:.4g}" in notes
    best = max(values, key=lambda number: values[number])
    assert f"The best: {first[best]}" in notes
    assert tiny.weights_of(tmp_path / "one").keys()
    kept = tiny.weights_of(tmp_path / f"one/trial-{best:03d}")
    assert all(torch.equal(kept[n], v) for n, v in tiny.weights_of(tmp_path / "one").items())
    shutil.rmtree(tmp_path / "one/trial-002")
    assert main(["finetune", "classify", "--resume", "--out", str(tmp_path / "one")]) == 0
    assert proposals() == first


def test_a_trial_that_diverges_is_one_of_the_search(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, bad = Trainer._loss, {"trial-001"}

    def none(self: Trainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return loss(self, batch) * (float("nan") if self.folder.name in bad else 1.0)

    monkeypatch.setattr(Trainer, "_loss", none)
    given = ("--search=3", "--search-epochs=1", "--search-batch-sizes=4")
    assert main(argv(root, tmp_path / "run", *given)) == 0
    notes = " ".join(json.loads((tmp_path / "run/eval.json").read_text())["notes"])
    assert re.search(r"Trial 0: .*: accuracy .* Trial 1: [^:]*: diverged. Trial 2: .*acc", notes)
    bad |= {"trial-000", "trial-002"}
    assert main(argv(root, tmp_path / "none", *given)) == 1
    assert "each trial diverged" in capsys.readouterr().err


# Where curves go


def test_tensorboard_has_the_scalars(root: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    assert main(argv(root, run, "--max-steps=3", "--report-to=tensorboard")) == 0
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert {"loss", "learning_rate", "eval/accuracy", "eval/loss"} <= {*board.Tags()["scalars"]}
    losses = {one.step: one.value for one in board.Scalars("loss")}
    wanted = {row["step"]: row["loss"] for row in rows_of(run) if "loss" in row}
    assert losses == pytest.approx(wanted)
    assert len(wanted) == 3


def test_no_board_where_none_is_asked_for(whole: Path) -> None:
    assert not (whole / "tensorboard").exists()


def test_wandb_offline(root: Path, tmp_path: Path) -> None:
    """In a process of its own: wandb starts another, which nothing but its end ends."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "fastbert",
        *argv(root, run, "--max-steps=2", "--report-to=wandb"),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "WANDB_MODE": "offline", "WANDB_SILENT": "true",
        "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9",
        "HOME": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    (log,) = run.glob("wandb/offline-run-*/*.wandb")
    content = log.read_bytes()
    assert b"eval/accuracy" in content and b"learning_rate" in content


def test_wandb_without_a_login(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nobody:
        errors = type("errors", (), {"Error": type("Error", (Exception,), {})})

        @staticmethod
        def init(**_: Any) -> None:
            raise Nobody.errors.Error("No API key configured.")

    monkeypatch.setattr("fastbert.finetune.tracking.needs", lambda _: Nobody)
    line = refused(capsys, *argv(root, tmp_path / "run", "--report-to=wandb"))
    assert line == "report_to = 'wandb': No API key configured. (or set WANDB_MODE=offline)"
    assert not (tmp_path / "run").exists()


# Bad requests

GOOD = [{"text": f"good film {n}", "label": "ab"[n % 2]} for n in range(8)]


def test_labels_and_heads_that_do_not_fit(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = tiny.write_rows(tmp_path / "two.jsonl", GOOD)
    out = tmp_path / "out"
    quick = (*QUICK, "--out", out, "--max-steps=1")

    def given(model: Path, train: Path, *more: object) -> tuple[object, ...]:
        return ("finetune", "classify", "--model", model, "--train", train, *quick, *more)

    bad = tiny.write_rows(tmp_path / "bad.jsonl", [*GOOD, {"text": "x", "label": "z"}])
    assert f"{bad}:9: label 'z' is none of training's: a, b" in refused(
        capsys, *given(root / "model", two, "--eval", bad)
    )
    assert not out.exists()
    three = root / "train.jsonl"
    assert main(list(map(str, given(root / "model", two)))) == 0
    headed = tmp_path / "headed"
    out.rename(headed)
    text = refused(capsys, *given(headed, three))
    assert text == (
        f"{headed} was trained for 2 labels (a, b), and the data has 3 labels (a, b, c): give "
        "--new-head to begin with a fresh one"
    )
    assert not out.exists()  # so the same command with --new-head does not meet a run there
    assert main(list(map(str, given(headed, three, "--new-head")))) == 0
    assert "classifier.weight" in capsys.readouterr().err
    assert load_head(out / "hf", "SequenceClassification").num_labels == 3
    shutil.rmtree(out)
    # The same labels in the head's order: training goes on.
    flipped = tmp_path / "flipped"
    shutil.copytree(headed, flipped)
    path = flipped / "hf/config.json"
    path.write_text(
        path.read_text().replace('"0": "a"', '"0": "b"').replace('"1": "a"', '"1": "b"')
        .replace('"1": "b"', '"1": "a"')
    )  # fmt: skip
    assert main(list(map(str, given(flipped, two, "--class-weight=balanced")))) == 0
    assert load_head(out / "hf", "SequenceClassification").config.id2label == {0: "b", 1: "a"}


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"text": "x y", "label": "a"}] * 4, (), "all 3 examples have the label 'a'"),
        ([], (), "is empty"),
        (GOOD, ("--problem-type=regression",), "label 'a' must be a number"),
        (GOOD, ("--text-column=txt",), "--text-column txt: "),
        (GOOD, ("--text-pair-column=pair",), "--text-pair-column pair: "),
        (GOOD, ("--label-column=lable",), "has no column 'lable': did you mean 'label'?"),
        (GOOD, ("--max-seq-length=67",), "max_seq_length = 67: the model takes at most 66"),
        (GOOD, ("--metric-for-best-model=f2",), "metric_for_best_model = 'f2' must be one of auto"),
        (GOOD, ("--metric-for-best-model=pearson",), "such labels are judged by accuracy"),
        (GOOD, ("--freeze-layers=3",), "freeze_layers = 3: the model has 2 layers"),
        (GOOD, ("--lora-r=2", "--freeze-layers=1"), "leave freeze_* out"),
        (GOOD, ("--fgm-epsilon=1", "--freeze-embeddings"), "fgm_epsilon moves embeddings"),
        (GOOD, ("--lora-r=2", "--layerwise-lr-decay=.9"), "layerwise_lr_decay: adapters of LoRA"),
        (GOOD, ("--search=2", "--max-steps=9"), "max_steps: a search tries num_train_epochs"),
        (GOOD, ("--search=2", "--seeds=2"), "search and seeds"),
        (GOOD, ("--search=2", "--search-epochs=two"), "must be numbers with commas between"),
        (GOOD, ("--search=2", "--search-learning-rate=1"), "must be LOW,HIGH"),
        (GOOD, ("--eval=1.5",), "a share must be more than 0 and less than 1"),
        (GOOD, ("--eval=nowhere.tsv",), "nowhere.tsv"),
        (GOOD, ("--precision=fp16",), "precision = 'fp16' needs a GPU"),
        (GOOD, ("--lr=1e-3",), "unknown option --lr: did you mean --learning-rate?"),
        (GOOD, ("--epochs=3",), "did you mean --num-train-epochs?"),
        (GOOD, ("--batch-size", "8"), "did you mean --per-device-train-batch-size?"),
        (GOOD, ("--learning-rat=1",), "did you mean --learning-rate?"),
        (GOOD, ("--output_dir=x",), "did you mean --out?"),
        (GOOD, ("--fp16",), "did you mean --precision fp16?"),
        (GOOD, ("--learning-rate=-1",), "learning_rate = -1.0 must be"),
        (GOOD, ("--seeds=0",), "seeds = 0"),
        (GOOD, ("--seeds=two",), "--seeds two: must be an integer"),
        (GOOD, ("--classifier-dropout=1",), "classifier_dropout = 1.0"),
        (GOOD, ("extra",), "unexpected argument 'extra'"),
        (GOOD, ("--doc-stride=3",), "unknown option --doc-stride"),
        (GOOD, ("--out=",), "out"),
        (GOOD, ("--eval=",), "eval = '': give fastbert finetune classify --model DIR"),
    ],
    ids=lambda value: "" if isinstance(value, list) else None,
)
def test_one_line_each(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: Any, more: Any, said: str
) -> None:
    train = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    given = ["finetune", "classify", "--model", root / "model", "--train", train, *QUICK]
    assert said in refused(capsys, *given, "--out", out, *more)
    assert not out.exists()


@pytest.mark.parametrize(
    ("task", "row", "flags"),
    [
        ("tag", {"tokens": ["a"], "tags": ["O"]}, ("tokens", "tags")),
        (
            "answer",
            {"question": "a", "context": "b", "answers": {"text": [], "answer_start": []}},
            ("question", "context", "answers"),
        ),
        (
            "choose",
            {"question": "a", "choices": ["b", "c"], "label": 0},
            ("context", "question", "choices", "label"),
        ),
        ("embed", {"text": "a", "text_pair": "b"}, ("text", "text-pair", "negative", "score")),
    ],
)
def test_columns_that_are_not_there(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, row: Any, flags: Any
) -> None:
    train = tiny.write_rows(tmp_path / "rows.jsonl", [row] * 4)
    for name in flags:
        flag = f"--{name}-column{'s' if name == 'choices' else ''}"
        given = ("--model", root / "model", "--train", train, "--out", tmp_path / "out")
        text = refused(capsys, "finetune", task, *given, flag, "nothing")
        assert text.startswith(f"{flag} nothing: {train} has no column 'nothing'"), text


def test_models_that_are_none(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    train = tiny.write_rows(tmp_path / "rows.jsonl", GOOD)

    def told(model: object) -> str:
        given = ("finetune", "classify", "--model", model, "--train", train, *QUICK)
        text = refused(capsys, *given, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return text

    assert told("bert-base-uncased") == "model = 'bert-base-uncased': no such file or folder"
    (tmp_path / "empty").mkdir()
    assert told(tmp_path / "empty").startswith(f"{tmp_path}/empty: no ")
    assert str(train) in told(train)
    bare = tmp_path / "bare"
    tiny.model().save_pretrained(bare)
    assert told(bare) == f"{bare}: holds no tokenizer (tokenizer.json or vocab.txt)"
    other = tmp_path / "gpt"
    config = transformers.GPT2Config(
        vocab_size=120, n_embd=32, n_layer=1, n_head=2, n_positions=32, pad_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    assert told(other).startswith(f"{other}: ")


def test_settings_are_printed_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    for task in ("classify", "embed"):
        assert main(["finetune", task, "--print-config", "--seed", "7"]) == 0
        printed = capsys.readouterr().out
        assert tomllib.loads(printed)["seed"] == 7
        assert 'model = ""' in printed


def test_requests_without_what_they_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    right = "give fastbert finetune tag --model DIR --train FILE"
    assert right in refused(capsys, "finetune", "tag")
    assert right in refused(capsys, "finetune", "tag", "--model", ".")
    names = "classify, tag, answer, choose, embed"
    assert refused(capsys, "finetune") == (
        f"finetune needs one of {names}: fastbert finetune classify"
    )
    assert "did you mean 'classify'?" in refused(capsys, "finetune", "clasify")
    assert names in refused(capsys, "finetune", "--model", "x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    full = ("--model", ".", "--train", ".", "--out", "notes")
    assert "already holds other files" in refused(capsys, "finetune", "tag", *full)
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(capsys, "finetune", "tag", *full[:4], "--out", "file")
    assert not (tmp_path / "runs").exists()


def test_an_eval_file_that_is_the_train_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tiny.write_rows(tmp_path / "rows.jsonl", GOOD)
    given = ["finetune", "classify", "--model", root / "model", "--train", train, "--eval", train]
    run = tmp_path / "run"
    assert main(list(map(str, [*given, *QUICK, "--out", run, "--max-steps=1"]))) == 0
    line = f"warning: 8 of the 8 examples of {train} stand in {train} as well"
    assert line in capsys.readouterr().err
    assert line in " ".join(json.loads((run / "eval.json").read_text())["notes"])


def test_few_examples(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One to evaluate with, one of each class to train with."""
    for number, count in enumerate((3, 4)):
        train = tiny.write_rows(tmp_path / f"{number}.jsonl", GOOD[:count])
        run = tmp_path / str(number)
        given = ["--model", root / "model", "--train", train, "--out", run, "--max-steps=2"]
        assert main(["finetune", "classify", *map(str, [*given, *QUICK])]) == 0
        kept = json.loads((run / "eval.json").read_text())
        assert kept["metrics"].keys() >= {"accuracy", "loss"}
        assert "1 for evaluation" in capsys.readouterr().err
    lonely = tiny.write_rows(tmp_path / "lonely.jsonl", GOOD[:2])
    given = ["finetune", "classify", "--model", root / "model", "--train", lonely, "--out", "x"]
    assert "of 2 examples none can be split off" in refused(capsys, *given)


# Files of settings


@pytest.mark.parametrize("task", CONFIGS)
def test_settings_are_in_help_and_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    assert main(["finetune", task, "--help"]) == 0
    told = capsys.readouterr().out
    for one in settings(CONFIGS[task]):
        assert re.search(rf"(^|[\s\[]){one.flag}\b", told), one.flag
    given = ["finetune", task, "--model", "m", "--train", "t", "--print-config"]
    changed = ["--learning-rate=0.25", "--seeds=3", "--max-seq-length=64", "--no-unpad"]
    assert main([*given, *changed]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "run.toml"
    path.write_text(text)
    assert main(["finetune", task, "--config", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == text
    assert main(["finetune", task, "--config", str(path), "--seeds=1", "--print-config"]) == 0
    assert capsys.readouterr().out == text.replace("seeds = 3", "seeds = 1")
    path.write_text("learning_rat = 1\n")
    line = refused(capsys, "finetune", task, "--config", path)
    assert line == f"{path}: unknown setting 'learning_rat': did you mean 'learning_rate'?"


def test_what_a_finished_run_prints(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "classify", "--resume", "--out", str(whole)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^accuracy: [\d.]+$", out, re.MULTILINE)
    assert f"report: {whole}/report.html\n" in out
    assert f"fastbert predict --model {whole} --input FILE" in out


@pytest.mark.parametrize(
    ("asked", "said"), [((), "fp32 (auto on a CPU)"), (("--precision=fp32",), "fp32 (asked for)")]
)
def test_what_chose_the_precision_is_said(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    asked: tuple[str, ...],
    said: str,
) -> None:
    assert main(argv(root, tmp_path / "run", "--max-steps=1", *asked)) == 0
    assert f"device: cpu, precision: {said}\n" in capsys.readouterr().err
