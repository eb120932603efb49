"""GLUE's folders to examples: TSV files as GLUE gives them, and data sets of Hugging Face's hub.

The latter as `save_to_disk` writes them, or a Parquet file a split. Test sets have no labels
and are not read.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.errors import UserError
from fastbert.finetune.glue_config import TASKS, GlueTask, plain
from fastbert.finetune.inputs import Row, Skipped
from fastbert.finetune.needs import needs
from fastbert.finetune.tasks.base import Example
from fastbert.settings import read_json, show

_FOLDER_OF_TABLE = "dataset_info.json"
_MOST_SCORE = 5.0  # of STS-B
_MALFORMED = ("QQP", "MNLI")  # whose files in circulation have lines that break off
_PARAPHRASES = "msr_paraphrase_train.txt"  # MRPC as Microsoft gives it; GLUE adds the next
_HELD_OUT = "dev_ids.tsv"


@dataclass
class GlueData:
    """The examples of a task.

    Attributes:
        task: which.
        folder: where they were found.
        train: for training.
        evals: by what stands behind "dev": "" alone, or "_matched" and "_mismatched" of MNLI.
        notes: what is to be said.
    """

    task: GlueTask
    folder: Path
    train: list[Example]
    evals: dict[str, list[Example]]
    notes: list[str] = field(default_factory=list)

    @property
    def characters(self) -> int:
        """Of the training texts: what a run's time goes with."""
        texts = (one.fields.get(role, "") for one in self.train for role in ("text", "text_pair"))
        return sum(map(len, texts))

    @property
    def digest(self) -> str:
        """Of all texts and labels: the same for the same examples, whatever they were read from."""
        found = hashlib.sha256()
        for part in (self.train, *self.evals.values()):
            for one in part:
                found.update(repr([*one.fields.values()]).encode("utf-8", "surrogatepass"))
            found.update(b"\0")
        return found.hexdigest()


def task_folders(data: str, names: Sequence[str]) -> dict[str, Path]:
    """Where the folders of tasks are; one that is missing is not in it.

    Raises:
        UserError: no such folder, none of the tasks in it, or a task twice.
    """
    try:
        below = sorted(one for one in Path(data).iterdir() if one.is_dir())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"data = {show(data)}: {why}: give the folder of GLUE's folders") from None
    found: dict[str, Path] = {}
    for name in names:
        mine = [one for one in below if plain(one.name) in TASKS[name].folders]
        if len(mine) > 1:
            raise UserError(f"{mine[0]} and {mine[1]} are both {name}: move one of them away")
        if mine:
            found[name] = mine[0]
    if not found:
        raise UserError(
            f"data = {show(data)}: has no folder {' or '.join(names)}: give the folder that holds "
            "those of GLUE's tasks"
        )
    return found


def other_folders(data: str) -> list[str]:
    """Names of folders that are none of the tasks', such as WNLI."""
    known = {folder for task in TASKS.values() for folder in task.folders}
    names = sorted(one.name for one in Path(data).iterdir() if one.is_dir())
    return [name for name in names if plain(name) not in known and not name.startswith(".")]


def read_task(name: str, folder: Path) -> GlueData:
    """All examples of a task; what is left out is counted and noted.

    Raises:
        UserError: a file is missing or broken, a label is none of the task's, or a class has no
            example to learn from.
    """
    task = TASKS[name]
    made = GlueData(task, folder, [], {})
    made.train = _examples(task, _rows(task, folder, "train"), made.notes)
    for split in task.splits:
        made.evals[split] = _examples(task, _rows(task, folder, f"dev{split}"), made.notes)
    missing = [one for one in task.labels if one not in {e.fields["label"] for e in made.train}]
    if missing:
        raise UserError(f"{folder}: no example for training has the label {missing[0]!r}")
    return made


@dataclass
class _Rows:
    """Of one split, with the columns to read and what was left out."""

    source: str
    columns: tuple[str, str, str]
    rows: Iterator[Row]
    skipped: Skipped = field(default_factory=Skipped)


def _rows(task: GlueTask, folder: Path, split: str) -> _Rows:
    """The rows of "train" or "dev..." in whichever form they are there."""
    tsv = folder / f"{split}.tsv"
    if tsv.is_file():
        skipped = Skipped()
        return _Rows(str(tsv), task.tsv, _tsv(task, tsv, skipped), skipped)
    if task.name == "MRPC" and (folder / _PARAPHRASES).is_file():
        skipped = Skipped()
        rows = _paraphrases(task, folder, split == "dev", skipped)
        return _Rows(str(folder / _PARAPHRASES), task.tsv, rows, skipped)
    hub = split.replace("dev", "validation")
    saved = folder / hub
    if (saved / _FOLDER_OF_TABLE).is_file():
        return _Rows(str(saved), task.hub, _saved(task, saved))
    parquet = sorted(
        one for one in folder.glob(f"{hub}*.parquet")
        if one.name.removeprefix(hub)[:1] in (".", "-")
    )  # fmt: skip
    if parquet:
        return _Rows(str(folder / f"{hub}*.parquet"), task.hub, _parquet(task, parquet))
    raise UserError(
        f"{folder}: {task.name} has no {split}.tsv there, nor {hub}/ or {hub}.parquet of a data set"
    )


def _examples(task: GlueTask, found: _Rows, notes: list[str]) -> list[Example]:
    text, pair, label = found.columns
    roles = {"text": text, "text_pair": pair} if pair else {"text": text}
    made = []
    for row in found.rows:
        texts = {role: row.values[column] for role, column in roles.items()}
        wrong = next((one for one in texts.values() if not isinstance(one, str | None)), None)
        if wrong is not None:
            raise UserError(f"{row.where}: {show(wrong)} must be a text")
        if any(not (one or "").strip() for one in texts.values()):
            found.skipped.skip("with an empty text", row.where)
            continue
        said = row.values[label]
        if task.left_out and said in (task.left_out, -1):
            found.skipped.skip(f"with {label} {said}", row.where)
            continue
        made.append(Example(row.where, {**texts, "label": _label(task, said, row.where)}))
    if found.skipped.total:
        notes.append(f"{task.name}: {found.skipped.line(found.source)}")
    if not made:
        raise UserError(f"{found.source}: holds no example")
    return made


def _label(task: GlueTask, said: Any, where: str) -> str:
    """As the TSV files have it; of STS-B a number as Python writes it."""
    if task.labels:
        if said not in task.labels:
            raise UserError(
                f"{where}: label {show(said)} is none of {task.name}'s: {', '.join(task.labels)}"
            )
        return str(said)
    try:
        score = float(said)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= _MOST_SCORE:
        raise UserError(f"{where}: score {show(said)} must be a number from 0 to 5")
    return repr(score)


# TSV


def _tsv(task: GlueTask, path: Path, skipped: Skipped) -> Iterator[Row]:
    """Rows by column; CoLA has no header: its columns are "1" to "4"."""
    columns: list[str] = ["1", "2", "3", "4"] if task.name == "CoLA" else []
    for where, fields in _lines(path):
        if not columns:
            columns = _header(task, fields, where)
        elif len(fields) == len(columns):
            yield Row(dict(zip(columns, fields, strict=True)), where)
        elif task.name in _MALFORMED:
            skipped.skip("malformed", where)
        else:
            raise UserError(
                f"{where}: {len(fields)} fields, but {task.name} has {len(columns)} there"
            )


def _paraphrases(task: GlueTask, folder: Path, held_out: bool, skipped: Skipped) -> Iterator[Row]:
    """Of all pairs, those whose ids GLUE lists for evaluation, or the others."""
    path = folder / _HELD_OUT
    if not path.is_file():
        raise UserError(
            f"{folder}: {_PARAPHRASES} without {_HELD_OUT}, which lists the pairs of GLUE's "
            "development set: put it there, or give train.tsv and dev.tsv"
        )
    listed = {tuple(fields) for _, fields in _lines(path)}
    for row in _tsv(task, folder / _PARAPHRASES, skipped):
        if ((row.values.get("#1 ID"), row.values.get("#2 ID")) in listed) == held_out:
            yield row


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Where a line is, and its fields; quotes are characters."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                try:
                    cells = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{where}: not UTF-8, at byte {error.start + 1}") from None
                yield where, cells.rstrip("\r\n").split("\t")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _header(task: GlueTask, fields: list[str], where: str) -> list[str]:
    for column in filter(None, task.tsv):
        if fields.count(column) != 1:
            shown = ", ".join(fields)[:200]
            raise UserError(
                f"{where}: {task.name} has one column {column!r}, but the first line is {shown}"
            )
    return fields


# Data sets of the hub


def _saved(task: GlueTask, folder: Path) -> Iterator[Row]:
    """Rows of one split that `datasets` has saved: Arrow's stream format."""
    ipc = needs("pyarrow.ipc")
    info = read_json(str(folder / _FOLDER_OF_TABLE))
    names = _names_of(task, info, str(folder / _FOLDER_OF_TABLE))
    files = sorted(folder.glob("*.arrow"))
    state = folder / "state.json"
    if state.is_file():
        content = read_json(str(state))
        if content.get("_indices_data_files"):
            raise UserError(f"{state}: its rows are chosen by indices: flatten_indices() it, again")
        listed = content.get("_data_files")
        if isinstance(listed, list) and all(isinstance(one, dict) for one in listed):
            files = [folder / os.path.basename(str(one.get("filename"))) for one in listed]
    if not files:
        raise UserError(f"{folder}: holds no file of Arrow")
    for path in files:
        with _reading(path), path.open("rb") as file:
            table = ipc.open_stream(file).read_all()
        yield from _table_rows(task, table, names, path)


def _parquet(task: GlueTask, files: list[Path]) -> Iterator[Row]:
    parquet = needs("pyarrow.parquet")
    for path in files:
        with _reading(path):
            table = parquet.read_table(path)
            about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        info = about.get("info") if isinstance(about, dict) else None
        names = _names_of(task, info if isinstance(info, dict) else {}, str(path))
        yield from _table_rows(task, table, names, path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Makes one line of what a library says of a file that it cannot read."""
    try:
        yield
    except (OSError, ValueError) as error:  # pyarrow's own are of these
        raise UserError(f"{path}: cannot be read: {str(error)[:200]}") from None


def _names_of(task: GlueTask, info: dict[str, Any], where: str) -> tuple[str, ...]:
    """The labels by number, as the data set says, in the words of the TSV files."""
    features = info.get("features")
    label = features.get(task.hub[2]) if isinstance(features, dict) else None
    names = label.get("names") if isinstance(label, dict) else None
    if names is None or not task.labels:
        return task.labels
    to_tsv = dict(zip(task.names, task.labels, strict=True)) | {one: one for one in task.labels}
    if not isinstance(names, list) or sorted(map(str, names)) not in (
        sorted(task.names),
        sorted(task.labels),
    ):
        raise UserError(f"{where}: labels {show(names)} are not {task.name}'s: {task.names}")
    return tuple(to_tsv[one] for one in names)


def _table_rows(task: GlueTask, table: Any, names: tuple[str, ...], path: Path) -> Iterator[Row]:
    columns = [one for one in task.hub if one]
    for column in columns:
        if column not in table.column_names:
            has = ", ".join(table.column_names)
            raise UserError(f"{path}: {task.name} has a column {column!r}, but there are {has}")
    label = task.hub[2]
    rows = zip(*(_cells(table.column(column)) for column in columns), strict=True)
    for number, cells in enumerate(rows, 1):
        values = dict(zip(columns, cells, strict=True))
        said = values[label]
        if task.labels and type(said) is int and 0 <= said < len(names):
            values[label] = names[said]
        yield Row(values, f"{path} row {number}")


def _cells(column: Any) -> list[Any]:
    values: list[Any] = column.to_pylist()
    if str(column.type) != "float":
        return values
    # Of 32 bits: 3.8 as it was, not what is nearest to it there.
    return [one if one is None else float(f"{one:.7g}") for one in values]
