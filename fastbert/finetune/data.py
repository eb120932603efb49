"""From what a request names to examples for training and evaluation; what was found is said."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, fields
from typing import Any

from fastbert.finetune.columns import Columns, detect, usable
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.inputs import Row, Table, overlap, read_table, split
from fastbert.finetune.tasks.base import Example, Task
from fastbert.finetune.tasks.classify import Classify

_ROLES = {"score_column": "label", "choices_columns": "choices"}
_TEXTS = ("text", "text_pair", "tokens", "question", "context")


@dataclass
class Data:
    """Examples, and what is to be said of them."""

    train: list[Example]
    eval: list[Example]
    notes: list[str] = field(default_factory=list)


def named_columns(config: Any) -> dict[str, str]:
    """What the flags of a task say, by role."""
    given = {
        _ROLES.get(one.name, one.name.removesuffix("_column")): getattr(config, one.name)
        for one in fields(config)
        if one.name.endswith(("_column", "_columns"))
    }
    return {role: name for role, name in given.items() if name}


def read_data(config: FinetuneConfig, task: Task, say: Callable[[str], None]) -> Data:
    """Reads what `train` and `eval` name; the task learns its labels from the first.

    Args:
        config: of the task.
        task: without labels yet.
        say: gets a line for each thing that was found.

    Raises:
        UserError: a file or column that is not there, a broken row, an unknown label in `eval`,
            no example or one class only.
    """
    told: list[str] = []

    def note(line: str) -> None:
        told.append(line)
        say(line)

    table, columns, rows = _read(config, config.train, "train", named_columns(config), note)
    share = config.eval_share
    if share is not None:
        rows, held_out = _split(config, columns, rows, share)
        note(f"eval: {len(held_out)} of {table.path} split off, {len(rows)} stay")
        eval_columns = columns
    else:
        named = {role: name for role, name in columns.of.items() if role != "id"}
        if columns.choices:
            named["choices"] = ",".join(columns.choices)
        _, eval_columns, held_out = _read(config, config.eval, "eval", named, note)
        same = overlap(rows, held_out, _texts_of(columns))
        if same:
            note(
                f"warning: {same} of the {len(held_out)} examples of {config.eval} stand in "
                f"{config.train} as well: what is found on them says little"
            )
    if isinstance(task, Classify):
        task.separator = getattr(config, "label_separator", "")
    train = [task.example(row, columns, True) for row in rows]
    task.learn(train, config)
    held = [task.example(row, eval_columns, True) for row in held_out]
    task.check(held)
    return Data(train, held, told)


def _read(
    config: FinetuneConfig,
    path: str,
    role: str,
    named: dict[str, str],
    note: Callable[[str], None],
) -> tuple[Table, Columns, list[Row]]:
    format = None if config.format == "auto" else config.format
    table = read_table(path, role, format=format)
    columns = detect(table, config.task, named)
    rows, skipped = usable(table, columns)
    note(f"{role}: {path}: {len(rows)} rows ({table.format}), {columns.line()}")
    for one, kind in ((table.skipped, "file"), (skipped, "row")):
        if one.total:
            note(one.line(path, kind))
    return table, columns, rows


def _split(
    config: FinetuneConfig, columns: Columns, rows: list[Row], share: float
) -> tuple[list[Row], list[Row]]:
    """By classes where there are few; questions of a paragraph stay together."""
    if config.task == "answer":
        of_context: dict[Hashable, list[Row]] = {}
        for row in rows:
            of_context.setdefault(columns.value(row, "context"), []).append(row)
        parts = split([questions[0] for questions in of_context.values()], share, config.seed)
        kept, held_out = (
            [row for first in part for row in of_context[columns.value(first, "context")]]
            for part in parts
        )
        return kept, held_out
    labels = [repr(columns.value(row, "label")) for row in rows] if "label" in columns else []
    if config.task != "classify" or len(set(labels)) > max(2, len(rows) // 10):
        return split(rows, share, config.seed)
    return split(rows, share, config.seed, lambda row: repr(columns.value(row, "label")))


def _texts_of(columns: Columns) -> Callable[[Row], Hashable]:
    return lambda row: repr([columns.value(row, role) for role in _TEXTS])
