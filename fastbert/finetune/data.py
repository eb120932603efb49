"""From what a request names to examples for training and evaluation; what was found is said."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from fastbert.errors import UserError, did_you_mean
from fastbert.finetune.columns import Columns, detect, usable
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.inputs import Table, listed, read_table
from fastbert.finetune.split import split
from fastbert.finetune.tasks.base import Example, Task
from fastbert.finetune.tasks.classify import Classify

_ROLES = {"score_column": "label", "choices_columns": "choices"}
_SHOWN = 12  # classes, in a line


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

    if isinstance(task, Classify):
        task.separator = getattr(config, "label_separator", "")
    table, columns, train = _read(config, config.train, "train", task, note)
    task.order = class_order(table, columns)
    share = config.eval_share
    if share is None:
        held = _read(config, config.eval, "eval", task, note, columns)[2]
        known = {_input(task, one) for one in train}
        if same := sum(_input(task, one) in known for one in held):
            note(
                f"warning: {same} of the {len(held)} examples of {config.eval} stand in "
                f"{config.train} as well: what is found on them says little"
            )
    else:
        train, held, same = _split(config, task, train, share)
        note(f"eval: {len(held)} of {table.path} split off, {len(train)} stay")
        if same:
            what = "paragraph" if task.name == "answer" else "text"
            note(
                f"warning: {same} of the {len(held)} have the {what} of one that stays, for there "
                f"are few different ones: what is found on them says little"
            )
    task.learn(train, config)
    task.check(held)
    for line in _of_classes(task, task.classes(train, config), task.classes(held, config)):
        note(line)
    return Data(train, held, told)


def _read(
    config: FinetuneConfig,
    path: str,
    role: str,
    task: Task,
    note: Callable[[str], None],
    like: Columns | None = None,
) -> tuple[Table, Columns, list[Example]]:
    """The examples of a request; where columns are given, they must be those."""
    format = None if config.format == "auto" else config.format
    header = {"yes": True, "no": False}.get(config.header)
    table = read_table(path, role, format=format, header=header)
    named = named_columns(config) if like is None else _same_columns(config, table, like)
    columns = detect(table, config.task, named)
    rows, skipped = usable(table, columns)
    note(f"{role}: {path}: {len(rows)} rows ({table.format}), {columns.line()}")
    for one, kind in ((table.skipped, "file"), (skipped, "row")):
        if one.total:
            note(one.line(path, kind))
    return table, columns, [task.example(row, columns, True) for row in rows]


def _split(
    config: FinetuneConfig, task: Task, examples: list[Example], share: float
) -> tuple[list[Example], list[Example], int]:
    """What stays, what is split off, and how many of the latter have a text that stays as well.

    That is none, unless texts that come again are too many for about the share to be split off.
    """
    inputs = [_input(task, one) for one in examples]
    apart: list[list[Hashable]] = [inputs, list(range(len(examples)))]
    if task.name == "answer":
        apart.insert(0, [one.fields["context"] for one in examples])
    classes = task.classes(examples, config)
    wanted = max(1.0, share * len(examples))
    for texts in apart:
        stays, held = split(texts, classes, share, config.seed)
        if wanted / 2 <= len(held) <= 2 * wanted:
            break
    if not held:
        raise UserError(
            f"eval = {config.eval}: of {len(examples)} examples none can be split off, for what "
            "stays must have each label: give --eval a file"
        )
    known = {apart[0][place] for place in stays}
    same = sum(apart[0][place] in known for place in held)
    return [examples[place] for place in stays], [examples[place] for place in held], same


def _same_columns(config: FinetuneConfig, table: Table, like: Columns) -> dict[str, str]:
    named = {role: name for role, name in like.of.items() if role != "id"}
    for role, name in (*named.items(), *(("choices", name) for name in like.choices)):
        if name not in table.columns:
            near = did_you_mean(name, table.columns)
            raise UserError(
                f"{table.path}: has no column {name!r}, which is the {role} of {config.train}"
                f"{near or f': its columns are {listed(table.columns)}'}"
            )
    return named | ({"choices": ",".join(like.choices)} if like.choices else {})


def class_order(table: Table, columns: Columns) -> Sequence[str]:
    """Names of the labels or tags in the order of the file's numbers, where it tells them."""
    return table.classes.get(columns.of.get("tags") or columns.of.get("label", ""), ())


def _input(task: Task, one: Example) -> Hashable:
    """What equal examples have in common, spaces aside."""
    return tuple(" ".join(str(one.fields.get(role)).split()) for role in task.roles)


def _of_classes(
    task: Task, train: Sequence[Sequence[str]], held: Sequence[Sequence[str]]
) -> list[str]:
    """How many examples each class has, and what is odd about that."""
    of_train, of_eval = (Counter(name for one in part for name in one) for part in (train, held))
    names = sorted(of_train | of_eval)
    counts = ", ".join(f"{name[:60]} {of_train[name]} + {of_eval[name]}" for name in names[:_SHOWN])
    more = f", ... ({len(names)})" if len(names) > _SHOWN else ""
    lines = [f"examples for training + evaluation: {counts}{more}"] if len(names) > 1 else []
    for part, counted in (("training", of_train), ("evaluation", of_eval)):
        if missing := [name for name in names if not counted[name]]:
            lines.append(f"warning: {part} has no example of {listed(missing)}")
    plain: dict[str, list[str]] = {}
    for name in names:
        plain.setdefault(" ".join(name.casefold().split()), []).append(name)
    for twins in plain.values():
        if len(twins) > 1:
            lines.append(
                f"warning: labels {listed(map(repr, twins))} differ in case or spaces alone, and "
                "are learnt as different ones"
            )
    known = {"O", *names}
    unused = [one for one in task.order if not known & {one, one.partition("-")[2]}]
    if unused:
        lines.append(f"warning: of the file's classes there is no example of {listed(unused)}")
    return lines
