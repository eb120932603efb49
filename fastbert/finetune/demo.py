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
    found = Path("runs").glob("pretrain-*/hf/config.json")
    runs = sorted(found, key=lambda path: (len(path.parts[1]), path))  # 1000 is after 999
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
            data.notes.append(f"There is no {name}: {evaluation}.")
        else:
            found[name] = evaluation.metrics
    return found


def verdict(
    metric: str, ours: Mapping[str, float], baselines: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """A table as lines; the last says whether pre-training paid, and what is better all the same.

    Args:
        metric: by which all are judged; a yardstick may have none of it.
        ours: metrics of the fine-tuned model.
        baselines: name -> metrics; those of `RANDOM` among them.
    """
    rows = {"fine-tuned": ours, **baselines}
    width = max(map(len, rows))
    shown = {
        name: f"{found[metric]:.4g}" if metric in found else "—" for name, found in rows.items()
    }
    sign = -1 if metric in LESS_IS_BETTER else 1
    ahead = sign * (ours[metric] - baselines[RANDOM][metric])
    paid = "pre-training paid" if ahead > 0 else "pre-training did NOT pay"
    said = f"{paid}: {metric} {ahead:+.4g} beside the same network from random weights"
    better = [
        f"{name} ({shown[name]})"
        for name, found in baselines.items()
        if name != RANDOM and metric in found and sign * (found[metric] - ours[metric]) > 0
    ]
    if better:
        said += f"; better than the fine-tuned model: {', '.join(better)}"
    table = [f"{name:<{width}}  {value}" for name, value in shown.items()]
    return [f"{'':<{width}}  {metric}", *table, said]
