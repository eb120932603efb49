"""Learning rates against transformers' schedulers, at every step."""

import math

import pytest
import torch
from transformers import get_scheduler

from fastbert.config import PretrainConfig
from fastbert.train.schedule import learning_rate

THEIRS = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "warmup_stable_decay": "warmup_stable_decay",
}
SHAPES = [(20, 0), (20, 5), (20, 19), (20, 20), (20, 50), (1, 0), (1, 1), (2, 1), (97, 13)]


@pytest.mark.parametrize("decay_steps", [0, 1, 7, 20])
@pytest.mark.parametrize(("max_steps", "warmup_steps"), SHAPES)
@pytest.mark.parametrize("kind", THEIRS)
def test_equals_transformers(
    kind: str, max_steps: int, warmup_steps: int, decay_steps: int
) -> None:
    if kind != "warmup_stable_decay" and decay_steps:
        return
    config = PretrainConfig(
        lr_scheduler_type=kind,
        max_steps=max_steps,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        learning_rate=3e-4,
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    specific = None
    if kind == "warmup_stable_decay":
        falls = decay_steps or math.ceil(max_steps / 10)
        specific = {"num_decay_steps": falls}
    theirs = get_scheduler(THEIRS[kind], optimizer, warmup_steps, max_steps, specific)
    for step in range(max_steps):
        want = theirs.get_last_lr()[0]
        assert math.isclose(learning_rate(config, step), want, rel_tol=1e-9, abs_tol=1e-15), step
        optimizer.step()
        theirs.step()


def test_decay_steps_belong_to_one_schedule() -> None:
    assert PretrainConfig(max_steps=95).stable_decay_steps == 10
    config = PretrainConfig(lr_scheduler_type="warmup_stable_decay", decay_steps=3)
    assert config.stable_decay_steps == 3


@pytest.mark.parametrize("decay_type", ["cosine", "linear", "1-sqrt"])
@pytest.mark.parametrize("max_steps", [1, 33, 101])
def test_shares_and_forms_of_the_fall_are_theirs(decay_type: str, max_steps: int) -> None:
    from transformers import TrainingArguments, get_wsd_schedule

    config = PretrainConfig(
        lr_scheduler_type="warmup_stable_decay",
        decay_type=decay_type,
        max_steps=max_steps,
        warmup_steps=0.06,
        decay_steps=0.4,
        learning_rate=3e-4,
    )
    theirs = TrainingArguments(warmup_steps=0.06, use_cpu=True).get_warmup_steps(max_steps)
    assert config.rising_steps == theirs
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    schedule = get_wsd_schedule(
        optimizer,
        num_warmup_steps=theirs,
        num_decay_steps=math.ceil(0.4 * max_steps),
        num_training_steps=max_steps,
        decay_type=decay_type,
    )
    for step in range(max_steps):
        want = schedule.get_last_lr()[0]
        assert math.isclose(learning_rate(config, step), want, rel_tol=1e-9, abs_tol=1e-15), step
        optimizer.step()
        schedule.step()
