"""Schedules in whole runs: what is masked and dropped when, and that a run may die among them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastbert.config import PretrainConfig
from fastbert.data.batch import Batch
from fastbert.model.bert import Bert
from fastbert.schedules import Phase
from fastbert.train import checkpoint, loop
from fastbert.train.phases import dropout_in_use, is_of_another
from fastbert.train.prepare import say_of_warmup
from fastbert.train.step import TrainStep

from .test_resume import assert_same, run_killed, step_folder

pytestmark = pytest.mark.usefixtures("undrawn")
Run = Callable[..., Path]

ALL = (
    "--max-steps 12 --save-steps 3 --validation-fraction 0 --curriculum 1/2:0.5 "
    "--mlm-probability 0.3:0.25,0.2:0.5,0.15 --hidden-dropout-prob 0:0.75,0.1 "
    "--attention-probs-dropout-prob 0.1:0.5,0.2:0.5 --lr-scheduler-type warmup_stable_decay "
    "--decay-type 1-sqrt --warmup-steps 0.25 --decay-steps 0.5 --gradient-accumulation-steps 2 "
    "--batch-ramp-steps 4"
)


def masked_share(batches: list[Batch]) -> float:
    """Of the real tokens, all in all."""
    masked = sum(int((batch.masked_labels != -100).sum()) for batch in batches)
    return masked / sum(batch.num_tokens for batch in batches)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """(longest sequence, M, dropout of hidden states, of attention, batches) of each step."""
    steps: list[tuple[Any, ...]] = []
    call = TrainStep.eager

    def spy(self: TrainStep, batches: list[Batch]) -> None:
        call(self, batches)
        shape = batches[0].max_seqlen, len(batches[0].masked_positions)
        steps.append((*shape, *dropout_in_use(self.model), len(batches)))

    monkeypatch.setattr(TrainStep, "eager", spy)
    return steps


def test_all_schedules_at_once_killed_and_resumed(
    pretrain: Run,
    resume: Run,
    settings: list[str],
    losses: Callable[..., Any],
    seen: list[tuple[Any, ...]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = pretrain("whole", ALL)
    said = capsys.readouterr().err
    assert [(longest, hidden, attention) for longest, _, hidden, attention, _ in seen] == (
        [(16, 0.0, 0.1)] * 6 + [(32, 0.0, 0.2)] * 3 + [(32, 0.1, 0.2)] * 3
    )
    M = [masked for _, masked, *_ in seen]
    assert M[2] > M[3] and M[8] > M[9] and M[:3] == [M[0]] * 3 and M[9:] == [M[9]] * 3
    assert [count for *_, count in seen] == [1, 1, 2, 2] + [2] * 8
    changed = [line for line in said.splitlines() if line.endswith(" from here")]
    assert changed == [
        "step 3: 20% masked from here",
        "step 6: sequences of up to 32 tokens, dropout of attention 0.2 from here",
        "step 9: 15% masked, dropout of hidden states 0.1 from here",
    ]
    # What is exported, and kept in checkpoints, is the model's own.
    state = json.loads((step_folder(whole, 12) / "state.json").read_text())
    exported = json.loads((whole / "hf/config.json").read_text())
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        assert state["sizes"][name] == exported[name] == 0.1

    killed = whole.parent / "killed"
    run_killed(10, *settings, *ALL.split(), "--out", str(killed))
    assert [path.name for path in sorted((killed / "checkpoints").iterdir())][-1] == "step-000009"
    seen.clear()
    resume("killed")  # at the very end of a phase
    assert len(seen) == 3
    assert_same(whole, killed, 12)
    assert losses(whole) == losses(killed)


def test_another_max_steps_moves_the_masks(
    pretrain: Run, resume: Run, seen: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--mlm-probability 0.3:0.5,0.15 --warmup-steps 0.5 --validation-fraction 0"
    pretrain("run", f"{options} --max-steps 4 --stop-at-step 3")
    masked = [M for _, M, *_ in seen]
    seen.clear()
    capsys.readouterr()
    resume("run", "--resume auto --max-steps 8 --stop-at-step 5")
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resume: ")]
    assert told == [
        "resume: max_steps is now 8, was 4",
        "resume: step 3 of 8 is in another phase: 30% masked from here",
        "resume: the warm-up ends at step 4 of 8, was 2 of 4",
        "resume: going on from step 3",
    ]
    assert masked[0] == masked[1] > masked[2]
    assert [M for _, M, *_ in seen] == [masked[0], masked[2]]  # steps 3 and 4 of now 4 + 4


def test_a_packers_shape_is_of_a_phase() -> None:
    phases = (Phase(64, 0.3, None, None, 5), Phase(128, 0.15, None, None, 9))
    shape = {"tokens_per_batch": 1024, "num_slots": 16, "max_seq_length": 64, "max_masked": 312}
    assert not is_of_another(shape, phases[0], phases)
    assert is_of_another(shape, phases[1], phases)
    assert is_of_another({**shape, "max_masked": 160}, phases[0], phases)  # moved by rounding
    for strange in ({"max_masked": 168}, {"max_seq_length": 32}):
        assert not is_of_another({**shape, **strange}, phases[0], phases)


def test_evaluation_masks_15_percent_whatever_is_trained(
    pretrain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, accumulate = loop.evaluate, TrainStep.accumulate
    held_out: list[Batch] = []
    trained: list[Batch] = []

    def evaluated(model: Bert, batches: Any, unigram: Any) -> Any:
        held_out.extend(batches)
        return evaluate(model, batches, unigram)

    def accumulated(self: TrainStep, batch: Batch) -> None:
        trained.append(batch)
        accumulate(self, batch)

    monkeypatch.setattr(loop, "evaluate", evaluated)
    monkeypatch.setattr(TrainStep, "accumulate", accumulated)
    pretrain("run", "--mlm-probability 0.5 --max-steps 2 --eval-steps 0")
    assert 0.4 < masked_share(trained) < 0.5
    assert 0.1 < masked_share(held_out) < 0.16


def test_an_older_checkpoint_kept_the_dropout_that_was_trained(
    pretrain: Run, resume: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--hidden-dropout-prob 0.2 --max-steps 2 --validation-fraction 0"
    run = pretrain("run", f"{options} --stop-at-step 1")
    path = step_folder(run, 1) / "state.json"
    for name, code in (("hidden_dropout_prob", 0), ("attention_probs_dropout_prob", 2)):
        state = json.loads(path.read_text())
        del state["sha256"], state["recipe"]["decay_type"]  # there was none
        state["sizes"][name] = 0.2
        state["sha256"] = checkpoint._digest(state)
        again = shutil.copytree(run, run.parent / name)
        (step_folder(again, 1) / "state.json").write_text(json.dumps(state))
        capsys.readouterr()
        resume(name, exit_code=code)
        if code:
            assert "has attention_probs_dropout_prob = 0.1, but had 0.2" in capsys.readouterr().err


# The stable part of warmup_stable_decay


def test_a_stable_run_is_prolonged_without_loss(
    pretrain: Run, resume: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--lr-scheduler-type warmup_stable_decay --decay-type linear --decay-steps 3 "
        "--warmup-steps 2 --save-steps 2 --validation-fraction 0"
    )
    whole = pretrain("whole", f"{options} --max-steps 12")
    run = pretrain("run", f"{options} --max-steps 8")  # falls from step 5 on, the sixth is whole
    capsys.readouterr()
    resume("run", "--resume auto --max-steps 12 --stop-at-step 8")
    assert (
        "resume: the learning rate fell from step 5 on, and rises again with max_steps = 12: "
        f"--resume {step_folder(run, 6)} goes on from before its fall\n"
    ) in capsys.readouterr().err
    resume("run", f"--resume {step_folder(run, 6)} --max-steps 12")
    assert "rises again" not in capsys.readouterr().err
    assert_same(whole, run, 12)


def test_no_checkpoint_from_before_the_fall(
    pretrain: Run, resume: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--lr-scheduler-type warmup_stable_decay --decay-steps 0.9 --warmup-steps 0"
    pretrain("run", f"{options} --max-steps 4 --validation-fraction 0")
    assert "overlap" not in capsys.readouterr().err
    resume("run", "--resume auto --max-steps 5 --stop-at-step 4")
    said = capsys.readouterr().err
    assert "fell from step 0 on, and rises again with max_steps = 5: no checkpoint is from" in said


def test_a_warm_up_that_ends_within_the_fall_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    wsd = {"lr_scheduler_type": "warmup_stable_decay", "decay_steps": 0.4, "max_steps": 10}
    for warmup, overlaps in ((6, False), (7, True)):
        say_of_warmup(PretrainConfig(warmup_steps=warmup, **wsd))  # type: ignore[arg-type]
        assert capsys.readouterr().err == overlaps * (
            "the warm-up of 7 steps and the fall of 4 overlap in max_steps = 10: the learning rate "
            "leaps down from one to the other\n"
        )
