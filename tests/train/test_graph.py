"""The bookkeeping of recorded steps, with a recorder that repeats the work itself.

What only a GPU can show (that the work can be captured) is checked by `python -m
fastbert_bench.gpu`.
"""

import pytest
import torch

from fastbert.config import PretrainConfig
from fastbert.model.bert import Bert
from fastbert.schedules import Phase
from fastbert.train.graph import WARM_UP, GraphedStep, Work, launcher
from fastbert.train.phases import use_dropout
from fastbert.train.step import TrainStep

from .test_step import SIZES, S, packed, sequences

DROPOUT = 0.1


def build(**changes: object) -> TrainStep:
    import dataclasses

    torch.manual_seed(3)
    sizes = dataclasses.replace(
        SIZES, hidden_dropout_prob=DROPOUT, attention_probs_dropout_prob=DROPOUT
    )
    config = PretrainConfig(learning_rate=1e-3, warmup_steps=2, max_steps=50, **changes)  # type: ignore
    return TrainStep(Bert(sizes), config, torch.float32)


class Repeat:
    """A recorder whose recordings do the work itself again."""

    def __init__(self) -> None:
        self.recordings = self.forgotten = 0

    def __call__(self, work: Work) -> Work:
        self.recordings += 1
        return work

    def forget(self) -> None:
        self.forgotten += 1


def batches(steps: int, micro_batches: int, slots: int = 12) -> list[list]:  # type: ignore[type-arg]
    generator = torch.Generator().manual_seed(0)
    return [
        [
            packed(sequences([S, 3, 17, int(n)], generator), 96, slots, 60)
            for n in torch.randint(1, S + 1, (micro_batches,), generator=generator)
        ]
        for _ in range(steps)
    ]


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_recorded_steps_are_the_eager_ones(micro_batches: int) -> None:
    """Two shapes in turn, as a curriculum has them; bit for bit with one micro-batch."""
    eager, recorded = build(), build()
    record = Repeat()
    graphed = GraphedStep(recorded, micro_batches > 1, record)
    one, other = batches(5, micro_batches), batches(5, micro_batches, slots=13)
    for step in [*one, *other, other[0], one[0], *other[:3]]:
        eager(step)
        graphed(step)
        ours, theirs = recorded.read(), eager.read()
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert ours.updates == theirs.updates
    assert record.recordings == 3 * (1 + (micro_batches > 1))  # the single step is too short
    assert record.forgotten == 4
    assert WARM_UP == 2
    same = torch.equal if micro_batches == 1 else torch.allclose
    assert same(recorded.flat.master, eager.flat.master)
    assert torch.equal(recorded.model.dropout_state, eager.model.dropout_state)


def test_another_dropout_is_recorded_anew() -> None:
    """A phase may change nothing else: what is recorded holds the dropout as a constant."""
    phases = [Phase(S, 0.15, p, None, 50) for p in (0.2, 0.0)]
    eager, recorded, record = build(), build(), Repeat()
    graphed = GraphedStep(recorded, False, record)
    recordings = []
    for index, step in enumerate(batches(8, 1)):
        for one in (eager, recorded):
            use_dropout(one.model, phases[index >= 4])
        eager(step)
        graphed(step)
        recordings.append(record.recordings)
    assert recordings == [0, 0, 1, 1, 1, 1, 2, 2] and record.forgotten == 2
    assert torch.equal(recorded.flat.master, eager.flat.master)


def test_a_ramp_uses_fewer_micro_batches_than_recorded() -> None:
    eager, recorded = build(), build()
    graphed = GraphedStep(recorded, True, Repeat())
    for step, count in zip(batches(7, 3), (1, 1, 1, 2, 2, 3, 3), strict=True):
        eager(step[:count])
        graphed(step[:count])
        assert recorded.read().loss == pytest.approx(eager.read().loss, rel=1e-6)
    assert torch.allclose(recorded.flat.master, eager.flat.master, atol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_recording_that_runs_out_of_memory_can_be_abandoned(micro_batches: int) -> None:
    """The next step draws the dropout bits that the broken one would have."""

    class Full(Repeat):
        def __call__(self, work: Work) -> Work:
            raise torch.OutOfMemoryError("CUDA out of memory")

    step = build()
    graphed = GraphedStep(step, micro_batches > 1, Full())
    *whole, last = batches(3, micro_batches)
    for one in whole:
        graphed(one)
    with pytest.raises(torch.OutOfMemoryError):
        graphed(last)
    step.abandon()
    assert step.state_dict()["counters"]["micro_batches"] == 2 * micro_batches
    assert step.model.dropout_state[:, 1].unique().tolist() == [2 * micro_batches]


def test_eager_needs_no_gpu() -> None:
    step = build()
    assert launcher(step, graph=False, accumulates=True) == step.eager
