"""The learning rate of a step: warm-up, then one of four shapes, as transformers' schedulers."""

import math

from fastbert.config import PretrainConfig


def learning_rate(config: PretrainConfig, step: int) -> float:
    """The learning rate of update `step`, counted from 0.

    `linear` and `cosine` fall to 0 at `max_steps`; `constant` stays; `warmup_stable_decay` stays,
    then falls to 0 along a half cosine over its last `stable_decay_steps`. All rise linearly from
    0 over `warmup_steps`. These are transformers' get_{linear,cosine,constant,wsd}_schedule.
    """
    peak = config.learning_rate
    assert peak is not None, "the configuration must be resolved"
    if step < config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return peak
    start, length = config.warmup_steps, max(1, config.max_steps - config.warmup_steps)
    if config.lr_scheduler_type == "warmup_stable_decay":
        length = config.stable_decay_steps
        start = config.max_steps - length
    progress = min(max((step - start) / length, 0.0), 1.0)
    if config.lr_scheduler_type == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
