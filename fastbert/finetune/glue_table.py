"""What GLUE's tasks found, as a table: Markdown, JSON and a page."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.errors import UserError
from fastbert.finetune.glue_config import OF_DISTRIBUTIONS, TASKS, GlueConfig
from fastbert.finetune.glue_task import RECORD
from fastbert.finetune.metrics import Spread
from fastbert.finetune.report import bullets, cell, page, table, write_file
from fastbert.settings import read_json, settings

_HEAD = ("task", "metric", "mean ± deviation", "examples", "training", "energy")


@dataclass(frozen=True)
class TaskResult:
    """What a task found.

    Attributes:
        metrics: the official ones over the seeds, each at most 1.
        score: their mean over the seeds.
        examples: for training.
        seconds: of training, over all runs that count here: those of the seeds.
        joules: of the same runs, evaluations included; None where it was not measured.
        why_no_joules: what was missing.
        setting: learning rate, batch size, epochs.
        tried: the settings of a grid, each with its score.
        reports: of the runs, from the folder of all.
    """

    metrics: dict[str, Spread]
    score: Spread
    examples: int
    seconds: float
    joules: float | None
    why_no_joules: str
    setting: dict[str, float]
    tried: list[dict[str, float]]
    reports: list[str]


@dataclass(frozen=True)
class GlueResult:
    """What a command found.

    Attributes:
        folder: of all runs.
        tasks: by name.
        average: of the tasks' scores, over the seeds; None where no task is done.
        failed: why a task has no result.
        missing: tasks that were asked for and are not in the data.
    """

    folder: Path
    tasks: dict[str, TaskResult]
    average: Spread | None
    failed: dict[str, str]
    missing: list[str]

    @property
    def markdown(self) -> str:
        """The table."""
        rows = [_HEAD, *_rows(self)]
        widths = [max(3, *(len(row[place]) for row in rows)) for place in range(len(_HEAD))]
        lines = [
            f"| {' | '.join(one.ljust(w) for one, w in zip(row, widths, strict=True))} |"
            for row in rows
        ]
        return "\n".join([lines[0], f"|{'|'.join('-' * (w + 2) for w in widths)}|", *lines[1:]])


def collect(
    config: GlueConfig, names: Sequence[str], failed: dict[str, str], missing: list[str]
) -> GlueResult:
    """Reads what the tasks wrote.

    Raises:
        UserError: it is damaged.
    """
    folder = Path(config.out)
    tasks = {name: _task(folder / name / RECORD) for name in names if name not in failed}
    average = None
    if tasks:
        each = np.mean([one.score.values for one in tasks.values()], axis=0)
        average = _spread([float(value) for value in each])
    return GlueResult(folder, tasks, average, failed, missing)


def _task(path: Path) -> TaskResult:
    found = read_json(str(path))
    try:
        runs = found["runs"]
        why_not = next((one["why_no_joules"] for one in runs if one["joules"] is None), "")
        return TaskResult(
            {
                key: _spread([one["metrics"][key] for one in runs])
                for key in TASKS[found["task"]].metrics
            },
            _spread([one["score"] for one in runs]),
            found["train"],
            sum(one["seconds"] for one in runs),
            None if why_not else sum(one["joules"] for one in runs),
            why_not,
            found["setting"],
            found["tried"],
            [one["report"] for one in runs],
        )
    except (KeyError, TypeError):
        raise UserError(f"{path}: is damaged: delete it, and run again with --resume") from None


def _spread(values: list[float]) -> Spread:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation, values)


def write_tables(config: GlueConfig, result: GlueResult) -> None:
    """Writes glue.json, glue.md and report.html.

    Raises:
        RunError: one cannot be written.
    """
    known = {one.name: getattr(config, one.name) for one in settings(GlueConfig)}
    content = {**asdict(result), "folder": str(result.folder), "settings": known}
    files = {
        "glue.json": json.dumps(content, indent=1) + "\n",
        "glue.md": "\n".join([result.markdown, "", *(f"- {one}" for one in notes(config, result))])
        + "\n",
        "report.html": _page(config, result, known),
    }
    for name, text in files.items():
        write_file(result.folder / name, text.encode("utf-8", "replace"))


def notes(config: GlueConfig, result: GlueResult) -> list[str]:
    """What a reader of the table should know."""
    said = [
        "In percent, on the development sets, by the official metrics; a task's score is the mean "
        "of its two where it has two, and the average is that of the tasks' scores, MNLI's two "
        "sets being one task. WNLI and AX are not run.",
        f"{config.seeds} seed{'' if config.seeds == 1 else 's'} from {config.seed} on"
        + ("; ± is the deviation of the sample." if config.seeds > 1 else ": no deviation.")
        + " Each run is evaluated once, after its last step.",
    ]
    if config.max_steps > 0:
        said.append(f"Each run took max_steps = {config.max_steps}, whatever its epochs.")
    if config.grid != "none":
        said.append(
            f"Each task's settings are the best of {len(config.settings_tried)} on the examples "
            "that it is evaluated with, by the first seed: its numbers are optimistic."
        )
    said.append(
        "Training is the time of all optimizer steps of the seeds' runs; energy is that of the GPU "
        "over the same runs, evaluations included."
    )
    whys = {one.why_no_joules for one in result.tasks.values() if one.why_no_joules}
    said += [f"Energy was not measured: {why}." for why in sorted(whys)]
    if result.missing:
        said.append(f"Not in the data, and left out: {', '.join(result.missing)}.")
    without = [what for name, what in OF_DISTRIBUTIONS.items() if getattr(config, name)]
    if without and "STS-B" in result.tasks:
        ways = " and ".join(without)
        said.append(f"STS-B was trained without {ways}, for a score has no distribution.")
    return said


def _rows(result: GlueResult) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in TASKS:
        if name in result.failed:
            rows.append((name, f"failed: {result.failed[name]}", "", "", "", ""))
        elif name in result.tasks:
            one = result.tasks[name]
            rows.append(
                (
                    name,
                    " / ".join(TASKS[name].metrics.values()),
                    " / ".join(_percent(spread) for spread in one.metrics.values()),
                    f"{one.examples:,}",
                    _time(one.seconds),
                    _energy(one.joules),
                )
            )
    if result.average is not None:
        done = result.tasks.values()
        all_joules = [one.joules for one in done if one.joules is not None]
        joules = sum(all_joules) if len(all_joules) == len(done) else None
        rows.append(
            (
                "average",
                f"of {len(done)} task{'' if len(done) == 1 else 's'}",
                _percent(result.average),
                f"{sum(one.examples for one in done):,}",
                _time(sum(one.seconds for one in done)),
                _energy(joules),
            )
        )
    return rows


def _percent(spread: Spread) -> str:
    mean = f"{100 * spread.mean:.1f}"
    return mean if spread.deviation is None else f"{mean} ± {100 * spread.deviation:.1f}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _energy(joules: float | None) -> str:
    return "not measured" if joules is None else f"{joules / 3600:.3g} Wh"


def _page(config: GlueConfig, result: GlueResult, known: dict[str, Any]) -> str:
    title = f"GLUE: {config.model}"
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="dim">{escape(config.data)}</p>']
    if result.average is not None:
        over = f"<small>of {len(result.tasks)} tasks</small>"
        shown = escape(_percent(result.average))
        parts.append(f'<dl class="cards"><div><dt>average</dt><dd>{shown}{over}</dd></div></dl>')
    parts.append(table(_HEAD, [[cell(one) for one in row] for row in _rows(result)]))
    parts.append(bullets(notes(config, result)))
    parts.append("<h2>Runs</h2>")
    head = ("task", "learning rate", "batch", "epochs", "scores", "reports")
    parts.append(table(head, [_runs(name, one) for name, one in result.tasks.items()]))
    grids = {name: one for name, one in result.tasks.items() if one.tried}
    if grids:
        parts.append("<h2>Settings tried</h2>")
        rows = [
            [cell(name), *(cell(f"{value:g}") for value in [*tried.values()][:3]),
             cell(f"{100 * tried['score']:.1f}")]
            for name, one in grids.items() for tried in one.tried
        ]  # fmt: skip
        parts.append(table((*head[:4], "score"), rows))
    rows = [[cell(name), cell(str(value))] for name, value in known.items()]
    parts += ["<h2>Settings</h2>", table(("setting", "value"), rows, "settings")]
    return page(title, parts)


def _runs(name: str, one: TaskResult) -> list[str]:
    links = " ".join(
        f'<a href="{escape(path)}">{escape(Path(path).parent.name)}</a>' for path in one.reports
    )
    scores = ", ".join(f"{100 * value:.1f}" for value in one.score.values)
    setting = (cell(f"{value:g}") for value in one.setting.values())
    return [cell(name), *setting, cell(scores), f"<td>{links}</td>"]
