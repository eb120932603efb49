"""The learning rate of a step: warm-up, then one of four shapes, as transformers' schedulers."""

import math

from fastbert.config import PretrainConfig


def learning_rate(config: PretrainConfig, step: int) -> float:
    """The learning rate of update `step`, counted from 0.

    `linear` and `cosine` fall to 0 at `max_steps`; `constant` stays; `warmup_stable_decay` stays,
    then falls to 0 over its last `stable_decay_steps`, as `decay_type` says. All rise linearly from
    0 over `rising_steps`. These are transformers' get_{linear,cosine,constant,wsd}_schedule.
    """
    peak = config.learning_rate
    assert peak is not None, "the configuration must be resolved"
    start = config.rising_steps
    if step < start:
        return peak * step / start
    form, length = config.lr_scheduler_type, config.max_steps - start
    if form == "warmup_stable_decay":
        form, length = config.decay_type, config.stable_decay_steps
        start = config.max_steps - length
    return peak * _left(form, (step - start) / max(1, length))


def share_of_peak(form: str, step: int, rising_steps: int, max_steps: int) -> float:
    """The learning rate of update `step`, counted from 0, over its peak.

    Args:
        form: "linear", "cosine" or "constant", after the rise.
        step: of the update.
        rising_steps: of the linear warm-up.
        max_steps: of the whole run.
    """
    if step < rising_steps:
        return step / rising_steps
    return _left(form, (step - rising_steps) / max(1, max_steps - rising_steps))


def _left(form: str, progress: float) -> float:
    progress = min(max(progress, 0.0), 1.0)
    if form == "constant":
        return 1.0
    if form == "linear":
        return 1.0 - progress
    if form == "1-sqrt":
        return 1.0 - math.sqrt(progress)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
