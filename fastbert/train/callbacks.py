"""What a caller of `fastbert.pretrain` hears of a run while it goes on, and how they stop it.

Callbacks are called only where the loop itself has read the device: where it logs, evaluates and
saves. No step waits for them otherwise.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastbert.config import PretrainConfig
from fastbert.errors import UserError

if TYPE_CHECKING:
    from fastbert.train.evaluate import Evaluation


@dataclass(frozen=True)
class PretrainResult:
    """What a run found; counts and `loss` include what it did before it was resumed."""

    folder: Path
    """The run's folder: config.toml, metrics.jsonl, checkpoints/, loss.png …"""
    hf: Path
    """The trained model and its tokenizer, for transformers' `from_pretrained`."""
    steps: int
    """Optimizer steps done, those whose update was skipped included."""
    skipped_steps: int
    """Steps whose gradient was not finite, so that the weights stayed as they were."""
    tokens: int
    """Tokens trained on, [PAD] not counted."""
    loss: float
    """Training loss, MLM + next-sentence, nats, as logged last: the mean of `logging_steps` steps.
    NaN where no step was logged."""
    evaluation: "Evaluation | None"
    """Held-out losses in nats beside the unigram baseline, and accuracies; None without a held-out
    part."""
    tokens_per_second: float
    """Tokens of this call by the time of its steps: compiling counts, evaluating and saving do not.
    """
    stopped: bool
    """Whether a callback ended it before its last step."""


class Callback:
    """What a run tells; override what you need. A method that returns True stops the run.

    The run then saves a checkpoint, evaluates, writes `hf/` and returns, with `stopped` in its
    result. An exception ends it, too: after the checkpoint, and without the rest, it reaches the
    caller of `pretrain`.
    """

    def on_train_begin(self, config: PretrainConfig, folder: Path) -> bool | None:
        """Before the first step: all settings of the run, and its folder."""
        return None

    def on_log(self, step: int, metrics: dict[str, float]) -> bool | None:
        """Every `logging_steps` steps, and after the last.

        Args:
            step: optimizer steps done.
            metrics: `loss` (nats, the mean since the last time), `learning_rate`, `grad_norm`,
                `tokens_per_second`, `tokens` (in all) and `skipped_steps` (in all); one that is
                not finite is left out.
        """
        return None

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> bool | None:
        """Every `eval_steps` steps, and at the end, where a part of the data is held out.

        Args:
            step: optimizer steps done.
            metrics: `eval/mlm_loss` and `eval/unigram_loss` (nats), `eval/mlm_accuracy` and, with
                next-sentence prediction, `eval/nsp_accuracy` (shares).
        """
        return None

    def on_save(self, step: int, folder: Path) -> bool | None:
        """Every `save_steps` steps, and at the end: the whole checkpoint lies in `folder`."""
        return None

    def on_train_end(self, result: PretrainResult) -> None:
        """After a run that has come to its end, or that a callback stopped; `hf/` is written."""


class Callbacks:
    """Those of a run, called in their order.

    Attributes:
        stopped_by: the class of the one that has asked for a stop, or failed; "" before.

    Raises:
        UserError: something else than `Callback`s was given.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
            raise UserError("callbacks must be a list of fastbert.Callback objects")
        self._all = list(callbacks)
        given: list[object] = [*self._all]
        for one in given:
            if isinstance(one, type) and issubclass(one, Callback):
                raise UserError(f"callbacks: {one.__name__} is a class: give an object, with ()")
            if not isinstance(one, Callback):
                kind = type(one).__name__
                raise UserError(f"callbacks: a {kind} is no fastbert.Callback: derive it from that")
        self.stopped_by = ""
        self._error: Exception | None = None

    def call(self, event: Callable[[Callback], bool | None]) -> None:
        """Tells all of them; one that fails is the last that hears anything."""
        for one in self._all:
            if self._error is not None:
                return
            try:
                stop = event(one)
            except Exception as error:
                self._error, stop = error, True
            if stop and not self.stopped_by:
                self.stopped_by = type(one).__name__

    def raise_error(self) -> None:
        """Raises what one of them has raised."""
        if self._error is not None:
            raise self._error
