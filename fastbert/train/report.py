"""What a run tells: one progress bar, metrics.jsonl, TensorBoard, the loss curve as a picture."""

import json
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastbert.errors import RunError
from fastbert.progress import progress_bar


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one cut short, or else no row of numbers, is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if (
                isinstance(row, dict)
                and type(row.get("step")) is int
                and all(map(_drawn, row.values()))
            ):
                rows.append(row)
    return rows


def _drawn(value: Any) -> bool:
    """Whether a picture can show it."""
    return type(value) in (int, float) and abs(value) < 2.0**1000


class Reporter:
    """Writes a run's metrics, and shows its progress on stderr.

    Args:
        run: the run's folder.
        done: optimizer steps already done; metrics of later steps (of a run that died) are dropped.
        max_steps: where the progress bar ends.
        tensorboard: whether to write `tensorboard/` beside metrics.jsonl.
        name: of the bar.
        again: what is typed to go on after a failure.
    """

    def __init__(
        self,
        run: Path,
        done: int,
        max_steps: int,
        tensorboard: bool,
        name: str = "pretrain",
        again: str = "--resume auto",
    ) -> None:
        self._again = again
        self._path = run / "metrics.jsonl"
        self._run = run
        try:
            kept = [row for row in read_metrics(self._path) if row["step"] <= done]
            temporary = self._path.with_name(".metrics.jsonl.tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(temporary, self._path)
            self._file = self._path.open("a", encoding="utf-8")
            self._board = _Board(run / "tensorboard", done) if tensorboard else None
        except OSError as error:
            raise RunError(f"{self._path}: cannot be written: {error.strerror}") from None
        # A run that goes on from its last step would evaluate that one again.
        self._logged = {(row["step"], key) for row in kept if row["step"] == done for key in row}
        self._bar = progress_bar(total=max_steps, initial=done, unit="step", desc=name)

    def advance(self, loss: float | None, tokens_per_second: float | None) -> None:
        """Moves the bar by one step."""
        if loss is not None and tokens_per_second is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tok/s", False)
        self._bar.update()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl and the same scalars to TensorBoard, each only once."""
        if metrics.keys() <= {key for logged, key in self._logged if logged == step}:
            return
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
            if self._board is not None:
                self._board.write(step, metrics)
        except OSError as error:
            raise RunError(
                f"{self._path}: cannot be written: {error.strerror}; go on with {self._again} once "
                "it can"
            ) from None

    def say(self, line: str) -> None:
        """Prints a line on stderr without tearing the bar."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Ends the bar and closes the files."""
        self._bar.close()
        with suppress(OSError):  # each write was flushed: what failed then was told then
            self._file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()

    def draw(self) -> Path:
        """Draws training and held-out loss over steps into loss.png."""
        return draw_loss(self._run)


class _Board:
    """A TensorBoard event file of scalars.

    torch's SummaryWriter writes in a thread of its own, which meets a full disk with a traceback.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        now = time.time_ns()
        path = folder / f"events.out.tfevents.{now // 10**9}.{platform.node()}.{now}"
        self._records = RecordWriter(path.open("wb"))
        self._append(Event(file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)  # steps from here on replace earlier ones
        self._append(Event(step=done + 1, session_log=start))

    def _append(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]
        self._append(self._event(step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._records.close()


def draw_loss(run: Path) -> Path:
    """Draws a run's metrics.jsonl as loss.png: training loss, held-out MLM loss, the baseline."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's choice

    rows = read_metrics(run / "metrics.jsonl")

    def series(key: str) -> tuple[list[int], list[float]]:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]

    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    axes.plot(*series("loss"), color="#9aa5b1", linewidth=1, label="training loss (MLM + NSP)")
    axes.plot(*series("eval/mlm_loss"), "o-", color="#0b6e4f", label="held-out MLM loss")
    steps, unigram = series("eval/unigram_loss")
    if steps:
        axes.axhline(unigram[-1], color="#c1121f", linestyle="--", label="unigram baseline")
    axes.set_xlabel("step")
    axes.set_ylabel("nats")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path = run / "loss.png"
    temporary = path.with_name(".loss.tmp.png")
    try:
        figure.savefig(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path
