"""`fastbert predict`: a JSON line for each row of a file or of standard input, or a report of all.

Rows are read, answered and written a window at a time: their number is bounded by nothing.
"""

import json
import math
import os
import sys
import time
from argparse import Namespace
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from glob import glob
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from fastbert.commands.checks import check_folder, check_output, check_path
from fastbert.commands.options import Commands, given
from fastbert.config import device_setting, num_threads_setting, precision_setting
from fastbert.errors import FastbertError, RunError, UserError, did_you_mean
from fastbert.finetune.config import CONFIGS
from fastbert.progress import progress_bar
from fastbert.settings import LONGEST, Config, Group, check_fields, setting
from fastbert.train.interrupts import held_signals

if TYPE_CHECKING:
    from fastbert.finetune.columns import Columns
    from fastbert.finetune.inputs import Row
    from fastbert.finetune.predict import Pipeline

RUN = Group("run", "what is read, by which model, and where answers go")
COLUMNS = Group("columns", "which one is what (empty = found by name or content, and said)")

_STDIN = "-"
_LABELS = ("label_column", "tags_column", "answers_column", "negative_column", "score_column")
_MOST_COUNTED = 2**31  # bytes of a file whose lines are counted for the bar: a second


def column(what: str) -> str:
    """A setting that names a column."""
    return setting("", f"column of {what}", COLUMNS)


@dataclass(frozen=True)
class PredictConfig(Config):
    """What `fastbert predict` can be told.

    Raises:
        UserError: a value is out of bounds, or two do not fit together.
    """

    command: ClassVar[str] = "predict"

    model: str = setting(
        "",
        "folder of a fine-tuned model, or of its run",
        RUN,
        aka=("model_name_or_path", "model_name", "checkpoint"),
    )
    input: str = setting(
        "", "file, folder or glob of rows; - = standard input", RUN, aka=("file", "data", "test")
    )
    output: str = setting(
        "", "file of JSON lines (empty = standard output)", RUN, aka=("out", "output_file")
    )
    task: str = setting(
        "auto", "what the model does (auto = as its folder says)", RUN, choices=("auto", *CONFIGS)
    )
    format: str = setting(
        "auto",
        "of the input (auto = by content)",
        RUN,
        choices=("auto", "csv", "tsv", "jsonl", "json", "parquet", "conll", "text"),
    )
    keep: str = setting(
        "", "columns of the input that stand in the output as well: a,b or all", RUN
    )
    report: str = setting(
        "", "the rows have labels: print metrics, and write the report into this folder", RUN,
        aka=("evaluate", "eval"),
    )  # fmt: skip
    threshold: float | None = setting(
        None, "of several labels: probability from which one is given (none = the model's)", RUN,
        more_than=0, less_than=1,
    )  # fmt: skip
    top_k: int | None = setting(
        None, "of classify: so many probabilities, the largest first (none = all)", RUN, at_least=1
    )
    max_seq_length: int | None = setting(
        None, "longest sequence, tokens (none = as the model was trained)", RUN, at_least=8,
        at_most=LONGEST, aka=("max_length", "max_len", "seq_length"),
    )  # fmt: skip
    precision: str = precision_setting(
        RUN, ("auto", "fp32", "bf16", "fp16"), of="weights and activations",
        otherwise=", on a CPU fp32",
    )  # fmt: skip
    device: str = device_setting(RUN)
    num_threads: int = num_threads_setting(RUN)

    text_column: str = column("the text")
    text_pair_column: str = column("a second text, for pairs")
    tokens_column: str = column("the words, a list")
    question_column: str = column("the question")
    context_column: str = column("the paragraph")
    choices_columns: str = column("the list of choices, or columns of one each: a,b,c")
    id_column: str = column("what names a row in the output")
    label_column: str = column("the label, for a report")
    label_separator: str = setting("", "between several labels in a field of text", COLUMNS)
    tags_column: str = column("the tags, for a report")
    answers_column: str = column("the answers, for a report")
    negative_column: str = column("a text that does not belong, for a report")
    score_column: str = column("the similarity, for a report")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.model:
            raise UserError("model = '': give --model DIR, the folder of a fine-tuned model")
        if not self.input:
            raise UserError("input = '': give --input FILE, or --input - for standard input")
        if self.report and (self.output or self.keep):
            one = "output" if self.output else "keep"
            raise UserError(f"{one}: a report writes no rows: leave --report or --{one} out")
        if self.report and self.input == _STDIN:
            raise UserError("report: needs --input FILE: all rows are compared at once")
        for name in (*_LABELS, "label_separator"):
            if getattr(self, name) and not self.report:
                raise UserError(f"{name}: labels are read for a report only: give --report DIR")


def add(commands: Commands) -> None:
    """Adds the command."""
    commands.add(
        "predict",
        "say what a fine-tuned model says of each row, as JSON lines",
        run,
        PredictConfig,
        "--model DIR --input FILE|-",
    )


def run(args: Namespace) -> None:
    """Writes a line for each row, or a report.

    Raises:
        UserError: a bad request, or a broken file.
        RunError: the disk is full, or the model's outputs are not finite.
    """
    config: PredictConfig = given(args)
    check_path("model", config.model, words=())
    _check_files(config)
    with held_signals():
        import torch

        from fastbert.finetune.predict import pipeline
        from fastbert.train.device import keep_freed_memory
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    pipe = pipeline(
        None if config.task == "auto" else config.task,
        config.model,
        device=config.device,
        dtype=config.precision,
        max_seq_length=config.max_seq_length,
        threshold=config.threshold,
        top_k=config.top_k,
    )
    if pipe.device.type == "cpu":
        keep_freed_memory()
    _say(f"model: {config.model}: {_described(pipe)}")
    if config.report:
        _report(config, pipe)
    else:
        _predict(config, pipe)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _described(pipe: "Pipeline") -> str:
    labels = pipe.task.labels if pipe.task.name in ("classify", "tag") else []
    shown = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
    among = f" {len(labels)} labels ({shown})," if labels else ""
    dtype = str(pipe.dtype).removeprefix("torch.")
    return f"{pipe.task.name},{among} {dtype} on {pipe.device}"


def _check_files(config: PredictConfig) -> None:
    if config.report:
        check_folder("report", config.report)
    check_output("output", config.output)
    if config.input == _STDIN and sys.stdin is None:
        raise UserError("input = '-': standard input is closed")
    if not (config.output or config.report) and sys.stdout is None:
        raise UserError("output = '': standard output is closed: give --output FILE")
    if not config.output or config.input == _STDIN:
        return
    output = Path(config.output).resolve()
    read = [config.input, *glob(config.input, recursive=True)]
    if any(output == (path := Path(one).resolve()) or path in output.parents for one in read):
        raise UserError(f"output = {config.output!r}: is what --input reads: name another file")


def named(config: Any, task: str) -> dict[str, str]:
    """What the flags of columns say, by role.

    Args:
        config: with a `model`, and settings of the group `COLUMNS`.
        task: that the model is for.

    Raises:
        UserError: a flag of another task.
    """
    from fastbert.finetune.data import named_columns

    ours = {one.name for one in fields(CONFIGS[task])} | {"id_column"}
    if task == "tag":
        ours.add("text_column")
    for one in fields(config):
        is_column = one.metadata.get("group") is COLUMNS
        if is_column and getattr(config, one.name) and one.name not in ours:
            raise UserError(f"{one.name}: {config.model} is for {task}, which has none")
    return named_columns(config)


def _predict(config: PredictConfig, pipe: "Pipeline") -> None:
    from fastbert.finetune.columns import detect
    from fastbert.finetune.inputs import peek, stream_rows

    name = "standard input" if config.input == _STDIN else config.input
    format = None if config.format == "auto" else config.format
    table, rows = peek(stream_rows(config.input, format=format), name)
    columns = detect(table, pipe.task.name, named(config, pipe.task.name), with_labels=False)
    if pipe.task.name == "embed":
        columns = _without_pair(columns)
    keep = _kept(config.keep, table.columns)
    _say(f"input: {name}: {columns.line()}")
    began, done, wrong = time.perf_counter(), 0, _Wrong()
    total = _count(config, table.rows[0])
    to_terminal = not config.output and sys.stdout.isatty()  # whose lines are progress enough
    with (
        open(config.output, "wb", buffering=0)
        if config.output
        else nullcontext(sys.stdout.buffer) as out,
        nullcontext()
        if to_terminal
        else progress_bar(total=total, desc="predict", unit="row") as bar,
    ):
        try:
            for window in pipe.windows(rows, columns, bar):
                lines = []
                for row, answer in window:
                    wrong.see(answer)
                    lines.append(_line(row, columns, keep, answer))
                _write(out, lines, config.output)
                done += len(window)
        except FastbertError as error:
            raise type(error)(f"{error} ({done:,} rows are done)") from None
    seconds = time.perf_counter() - began
    _say(
        f"{done:,} rows in {seconds:.1f} s ({done / max(seconds, 1e-9):,.0f} rows/s)"
        + (f": {config.output}" if config.output else "")
    )
    if pipe.task.cut:
        _say(_long(pipe))
    if wrong.count:
        _say(f"{wrong.count:,} of {done:,} rows have an error instead; the first: {wrong.first}")


class _Wrong:
    """Counts rows that could not be read."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def see(self, answer: dict[str, Any]) -> None:
        """Looks at one answer."""
        if "error" in answer:
            self.count += 1
            self.first = self.first or answer["error"]


def _long(pipe: "Pipeline") -> str:
    from fastbert.finetune.predict import READ_IN_WINDOWS

    how = "were read in windows" if pipe.task.name in READ_IN_WINDOWS else "were cut"
    return f"{pipe.task.cut:,} texts of more than {pipe.task.max_length} tokens {how}"


def _without_pair(columns: "Columns") -> "Columns":
    """Of a table of pairs the first texts: a vector is that of one text."""
    from fastbert.finetune.columns import Columns

    of = {role: name for role, name in columns.of.items() if role in ("text", "id")}
    return Columns(columns.task, of, columns.choices, columns.among)


def _kept(asked: str, columns: tuple[str, ...]) -> tuple[str, ...]:
    if asked in ("", "all"):
        return columns if asked else ()
    names = tuple(asked.split(","))
    for name in names:
        if name not in columns:
            meant = did_you_mean(name, columns) or f": there are {', '.join(columns)}"
            raise UserError(f"keep: no column {name!r} in the input{meant}")
    return names


def _line(row: "Row", columns: "Columns", keep: tuple[str, ...], answer: dict[str, Any]) -> bytes:
    """{"id": ..., "input": {...}, and the answer}, as one line of JSON."""
    content: dict[str, Any] = {}
    number = columns.value(row, "id")
    if number is not None:
        content["id"] = number
    if keep:
        content["input"] = {name: row.values.get(name) for name in keep}
    content |= answer
    try:
        text = _JSON.encode(content)
    except ValueError:  # a number that JSON has not
        text = _JSON.encode(_plain(content))
    return f"{text}\n".encode("utf-8", "backslashreplace")


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str)  # of dates: a string


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return value


def _write(out: BinaryIO | FileIO, lines: list[bytes], path: str) -> None:
    """Whole lines, whatever signal comes meanwhile, and none where they do not all fit."""
    content = b"".join(lines)
    if not path:
        with held_signals():
            out.write(content)
            out.flush()
        return
    begin = written = out.tell()
    try:
        with held_signals():
            while written < begin + len(content):
                written += out.write(content[written - begin :]) or 0
    except OSError as error:
        with suppress(OSError):
            out.truncate(begin)
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def _count(config: PredictConfig, first: "Row") -> int | None:
    """Rows of a file whose lines are rows, where counting them costs nothing beside the work."""
    path, _, line = first.where.rpartition(":")
    if path != config.input or not line.isdecimal() or "lines" in first.values:
        return None
    if os.path.getsize(path) > _MOST_COUNTED:
        return None
    lines, last, quoted = 0, b"\n", False
    with open(path, "rb") as file:
        is_json = file.read(1) == b"{"
        file.seek(0)
        while block := file.read(2**20):
            lines += block.count(b"\n")
            quoted |= b'"' in block
            last = block
    if quoted and not is_json and first.values.keys() != {"text"}:  # a record of several lines
        return None
    return lines + (not last.endswith(b"\n")) - int(line) + 1


def _report(config: PredictConfig, pipe: "Pipeline") -> None:
    from fastbert.finetune.columns import detect, usable
    from fastbert.finetune.data import class_order
    from fastbert.finetune.inputs import read_table
    from fastbert.finetune.tasks.classify import Classify

    format = None if config.format == "auto" else config.format
    table = read_table(config.input, "input", format=format)
    columns = detect(table, pipe.task.name, named(config, pipe.task.name))
    pipe.task.order = class_order(table, columns)
    if isinstance(pipe.task, Classify):
        pipe.task.separator = config.label_separator
    rows, skipped = usable(table, columns)
    notes = [f"input: {config.input}: {len(rows):,} rows ({table.format}), {columns.line()}"]
    for one, kind in ((table.skipped, "file"), (skipped, "row")):
        if one.total:
            notes.append(one.line(config.input, kind))
    for line in notes:
        _say(line)
    shown = {one.name: getattr(config, one.name) for one in fields(config)}
    with progress_bar(total=len(rows), desc="predict", unit="row") as bar:
        found = pipe.evaluate(
            rows,
            columns,
            config.report,
            title=f"{pipe.task.name}: {config.input}",
            settings=shown,
            notes=notes,
            progress=bar,
        )
    if pipe.task.cut:
        _say(_long(pipe))
    for name, value in found.metrics.items():
        print(f"{name}: {value:.4g}")
    print(f"report: {Path(config.report) / 'report.html'}")
