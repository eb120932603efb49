"""What pre-training is worth, shown without any download: a model beside its own random weights.

And beside what needs no network at all: the commonest class, counted words.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from fastbert.errors import UserError
from fastbert.finetune.config import DEMO, FinetuneConfig
from fastbert.finetune.data import Data
from fastbert.finetune.metrics import LESS_IS_BETTER
from fastbert.finetune.yardsticks import YARDSTICKS

RANDOM = "random weights"


def newest_model() -> str:
    """The newest run of pre-training in runs/ that has ended.

    Raises:
        UserError: there is none.
    """
    runs = sorted(Path("runs").glob("pretrain-*/hf/config.json"))
    if not runs:
        raise UserError(
            f"model = '': {DEMO} takes the model of make demo, and runs/ holds none: run it, or "
            "give --model DIR"
        )
    return str(runs[-1].parent.parent)


def yardsticks(
    config: FinetuneConfig, data: Data, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """What simpler means find on the same examples, by their names."""
    found = {}
    for name, evaluation in YARDSTICKS[config.task](data):
        if isinstance(evaluation, str):
            say(f"{name}: none: {evaluation}")
        else:
            found[name] = evaluation.metrics
    return found


def verdict(
    metric: str, ours: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """A table as lines; the last says whether pre-training paid."""
    rows = {"fine-tuned": ours, **baselines}
    width = max(map(len, rows))
    shown = [f"{name:<{width}}  {found[metric]:.4g}" for name, found in rows.items()]
    sign = -1 if metric in LESS_IS_BETTER else 1
    ahead = sign * (ours[metric] - baselines[RANDOM][metric])
    paid = "pre-training paid" if ahead > 0 else "pre-training did NOT pay"
    begun = "the same network from random weights"
    return [f"{'':<{width}}  {metric}", *shown, f"{paid}: {metric} {ahead:+.4g} beside {begun}"]
