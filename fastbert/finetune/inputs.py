"""Files of labelled or unlabelled data to rows; what a file is, its content says, then its name.

CSV, TSV, JSON lines, JSON, Parquet, CoNLL, SQuAD's JSON, lines of text, and a folder with one
subfolder per class. Values of CSV and TSV stay strings until a task reads them.
"""

import csv
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from itertools import chain, islice
from typing import Any, BinaryIO

from fastbert.data.formats import HEAD, sniff
from fastbert.errors import UserError, did_you_mean
from fastbert.finetune.needs import needs
from fastbert.settings import show

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet", "conll", "text")
"""What `format` may be; SQuAD's JSON is "json", a folder of classes is seen by itself."""
STDIN = "-"
MAX_LINE = 2**26
"""Bytes of the longest line, and characters of the longest field of a CSV file."""
MAX_SENTENCE = 100_000
"""Tokens of a CoNLL file without a blank line beyond which it has none, and memory no bound."""

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".conll": "conll",
    ".conllu": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".bio": "conll",
    ".txt": "text",
}
_SAMPLE = 200  # lines that decide on delimiter, quoting and header
_TAG = re.compile(r"O|[BIESLU]-\S+")
_RANGE = re.compile(r"\d+[-.]\d+")  # of CoNLL-U: a token of several words, or one that is not there

_Lines = Iterator[tuple[int, str]]
"""Numbers from 1, and lines with their ends."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of an input.

    Attributes:
        values: by column. A sentence of a CoNLL file holds lists (`tokens`, `tags`, and each column
            by its number from 1 where there are more than two), and beside its columns `lines`,
            the line of each token.
        where: "reviews.tsv:17", for a record of several lines the first; "file.json#ID" of a
            question of SQuAD; "file.parquet row 17"; of a folder of classes the text's path.
    """

    values: dict[str, Any]
    where: str


@dataclass
class Skipped:
    """Rows that were left out: how many for each reason, and where that was met first."""

    counts: dict[str, int] = field(default_factory=dict)
    """By reason, such as "without a label"."""
    first: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, where: str) -> None:
        """Counts one more."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    @property
    def total(self) -> int:
        """Of all reasons."""
        return sum(self.counts.values())

    def line(self, source: str, kind: str = "row") -> str:
        """Returns "skipped 3 rows of train.tsv: 2 without a label (first: train.tsv:17), ..."."""
        whys = [f"{n:,} {why} (first: {self.first[why]})" for why, n in self.counts.items()]
        s = "" if self.total == 1 else "s"
        return f"skipped {self.total:,} {kind}{s} of {source}: {', '.join(whys)}"


@dataclass(frozen=True)
class Table:
    """Rows of one request.

    Attributes:
        path: the file, folder or glob as it was given.
        columns: names; "1", "2" ... where a file has no header.
        rows: in the order of the files' names.
        format: one of `FORMATS`, "squad" or "folders"; several files may have several.
        skipped: files of a folder that are not read.
        classes: of a column of a Parquet file of `datasets` whose numbers stand for classes, their
            names in this order; rows hold the names.
    """

    path: str
    columns: tuple[str, ...]
    rows: list[Row]
    format: str
    skipped: Skipped = field(default_factory=Skipped)
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reader:
    """A file that was looked at, and is read when its rows are asked for."""

    path: str
    format: str
    columns: tuple[str, ...] | None  # None: each record names its own
    rows: Iterator[Row]
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)


def read_table(
    paths: str | os.PathLike[str],
    role: str,
    *,
    format: str | None = None,
    header: bool | None = None,
) -> Table:
    """Reads all rows of a request.

    Args:
        paths: a file, a folder (all files below it that have a suffix of a format, sorted; or one
            subfolder per class with .txt files), or a glob.
        role: the setting's name, for messages: "train", "eval", "input".
        format: one of `FORMATS`; None: seen by the content, then by the name.
        header: whether CSV and TSV files begin with the names of their columns; None: they do
            where the first line holds names that are no numbers and no values of their columns.

    Raises:
        UserError: nothing is there, or it cannot be read; it is empty, compressed or binary; a line
            is broken; a column stands there twice; files differ in their columns.
    """
    path = os.fspath(paths)
    skipped = Skipped()
    rows: list[Row] = []
    formats: list[str] = []
    columns: tuple[str, ...] = ()
    classes: dict[str, Sequence[str]] = {}
    first = ""
    for reader in _readers(path, role, format, header, skipped):
        begin = len(rows)
        rows.extend(reader.rows)
        classes |= {name: names for name, names in reader.classes.items() if name not in classes}
        found = reader.columns
        if found is None:
            found = tuple(dict.fromkeys(chain.from_iterable(row.values for row in rows[begin:])))
        if not first:
            first, columns = reader.path, found
        _check_agree(first, columns, reader.path, found)
        if reader.format not in formats:
            formats.append(reader.format)
    return Table(path, columns, rows, ", ".join(formats), skipped, classes)


def stream_rows(
    path: str | os.PathLike[str],
    *,
    role: str = "input",
    format: str | None = None,
    header: bool | None = None,
) -> Iterator[Row]:
    """Reads rows one after the other, in bounded memory but for JSON that is not of lines.

    A blank line of a text is a row with an empty text, unless only blank lines follow.

    Args:
        path: as `read_table` takes; or "-": standard input, JSON lines if its first line that is
            not blank is a JSON object, else lines of text, unless `format` says otherwise.
        role, format, header: as in `read_table`.

    Raises:
        UserError: as in `read_table`, some of it only as rows are asked for.
    """
    source = os.fspath(path)
    if source == STDIN:
        return _stdin(format, header).rows
    return _streamed(_readers(source, role, format, header, Skipped()))


def _streamed(readers: Iterator[_Reader]) -> Iterator[Row]:
    first: _Reader | None = None
    for reader in readers:
        first = first or reader
        if first.columns is not None and reader.columns is not None:
            _check_agree(first.path, first.columns, reader.path, reader.columns)
        yield from reader.rows


def peek(rows: Iterator[Row], path: str, count: int = 1000) -> tuple[Table, Iterator[Row]]:
    """Returns a table of the first `count` rows, and all rows from the first on.

    Raises:
        UserError: reading the first failed; with another, what is raised follows the rows before.
    """
    ahead: list[Row] = []
    try:
        ahead.extend(islice(rows, count))  # keeps what came before an error
    except UserError as error:
        if not ahead:
            raise
        rows = _raising(error)
    names = dict.fromkeys(chain.from_iterable(row.values for row in ahead))
    columns = tuple(name for name in names if name != "lines" or "tokens" not in names)
    return Table(path, columns, ahead, "stream"), chain(ahead, rows)


def _raising(error: UserError) -> Iterator[Row]:
    yield from ()
    raise error


def _check_agree(first: str, columns: tuple[str, ...], path: str, found: tuple[str, ...]) -> None:
    if set(columns) != set(found):
        raise UserError(
            f"{path}: its columns are {listed(found)}, but those of {first} are {listed(columns)}: "
            f"files of one request must have the same"
        )


def listed(names: Iterable[str]) -> str:
    """Returns "a, b, c", cut after twelve names."""
    names = list(names)
    shown = ", ".join(name[:60] for name in names[:12])
    return shown if len(names) <= 12 else f"{shown} ... ({len(names)})"


def _check_columns(path: str, columns: Iterable[str]) -> None:
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise UserError(
            f"{path}: several columns are named {listed(map(repr, twice))}: rename them"
        )


# What is to be read


def _readers(
    path: str, role: str, format: str | None, header: bool | None, skipped: Skipped
) -> Iterator[_Reader]:
    if format is not None and format not in FORMATS:
        raise UserError(f"format = {show(format)}: must be one of {', '.join(FORMATS)}")
    if os.path.isdir(path):
        classes = _classes(path, role, skipped) if format is None else []
        if classes:
            return iter([_Reader(path, "folders", ("text", "label"), _class_rows(classes))])
    files = _files(path, role, format, skipped)
    return (_reader(file, role, format, header) for file in files)


def _files(path: str, role: str, format: str | None, skipped: Skipped) -> list[str]:
    if os.path.isdir(path):
        files = []
        for file in _below(path):
            if format is not None or os.path.splitext(file)[1].lower() in _SUFFIXES:
                files.append(file)
            else:
                skipped.skip("of other kinds", file)
        if not files:
            raise UserError(f"{role} = {path!r}: the folder holds no {listed(_SUFFIXES)} file")
        return files
    if os.path.exists(path):
        if not os.path.isfile(path):  # a pipe's beginning can be looked at only once
            raise UserError(f"{role} = {path!r}: is no file: write what comes from there to one")
        return [path]
    if any(char in path for char in "*?["):
        files = sorted(file for file in glob(path, recursive=True) if os.path.isfile(file))
        if not files:
            raise UserError(f"{role} = {path!r}: no file has such a name")
        return files
    folder, name = os.path.split(path)
    near = ""
    if os.path.isdir(folder or "."):
        near = did_you_mean(name, os.listdir(folder or "."))
    raise UserError(f"{role} = {path!r}: no such file or folder{near}")


def _below(folder: str) -> Iterator[str]:
    seen: set[str] = set()  # a link may lead back
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(parent, n) for n in sorted(names) if not n.startswith("."))


def _classes(folder: str, role: str, skipped: Skipped) -> list[tuple[str, str]]:
    """Each text's path and class where a folder holds a folder of texts per class, else none."""
    texts: list[tuple[str, str]] = []
    beside, deep = [], ""
    for path in _below(folder):
        label, _, name = os.path.relpath(path, folder).partition(os.sep)
        suffix = os.path.splitext(path)[1].lower()
        if name and suffix == ".txt":
            texts.append((path, label))
            deep = deep or (path if os.sep in name else "")
        elif suffix in _SUFFIXES and suffix != ".txt":
            return []
        else:
            beside.append(path)
    if deep and role != "input":  # whose labels are not asked for
        raise UserError(
            f"{folder}: {deep} stands more than one folder deep: give the folder whose folders "
            f"are the classes, such as {os.path.dirname(os.path.dirname(deep))}"
        )
    for path in beside if texts else ():
        skipped.skip("beside the texts of the classes", path)
    return texts


def _class_rows(texts: list[tuple[str, str]]) -> Iterator[Row]:
    for path, label in texts:
        text = "".join(line for _, line in _lines_of(path))
        yield Row({"text": text.strip(), "label": label}, path)


# What a file is


def _reader(path: str, role: str, format: str | None, header: bool | None) -> _Reader:
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise UserError(f"{role} = {path!r}: cannot be read: {error.strerror}") from None
    if not head.strip():
        raise UserError(f"{path}: is empty")
    if head.startswith(b"PAR1") and format in (None, "parquet"):
        return _parquet(path)
    _check_text(path, head)
    whole = len(head) < HEAD
    lines = head.decode("utf-8-sig", "replace").split("\n")
    if not whole and len(lines) > 1:
        lines.pop()  # cut in two
    format = format or _format_of(lines, os.path.splitext(path)[1].lower(), whole)
    if format == "parquet":
        raise UserError(f"{path}: is not Parquet, which begins with PAR1")
    if format == "json":
        return _json(path)
    return _of_lines(path, format, header, lines, _lines_of(path))


def _stdin(format: str | None, header: bool | None) -> _Reader:
    name = "standard input"
    if format in ("json", "parquet"):
        raise UserError(f"{name}: {format} is read from a file only: give its name")
    raw = _raw_lines(sys.stdin.buffer)
    begin = []
    for line in raw:
        begin.append(line)
        if line.strip():
            break
    else:
        raise UserError(f"{name}: is empty")
    first = begin[-1]
    _check_text(name, first)
    lines = _decoded(chain(begin, raw), name)
    if format is None:
        is_object = isinstance(_parsed(first.decode("utf-8-sig", "replace")), dict)
        format = "jsonl" if is_object else "text"
    ahead = list(islice(lines, _SAMPLE if format in ("csv", "tsv", "conll") else 1))
    return _of_lines(name, format, header, [line for _, line in ahead], chain(ahead, lines))


def _of_lines(
    path: str, format: str, header: bool | None, sample: list[str], lines: _Lines
) -> _Reader:
    columns: tuple[str, ...] | None
    if format == "jsonl":
        columns, rows = None, _json_rows(path, lines)
    elif format == "text":
        columns, rows = ("text",), _text_rows(path, lines)
    elif format == "conll":
        layout = _conll_layout(sample)
        columns, rows = layout.columns, _conll_rows(path, lines, layout)
    else:
        delimited = _delimited_layout(path, format, header, sample)
        _check_columns(path, delimited.columns)
        columns, rows = delimited.columns, _delimited_rows(path, lines, delimited)
    return _Reader(path, format, columns, _some(path, rows))


def _some(path: str, rows: Iterator[Row]) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: holds no row")
    yield first
    yield from rows


def _check_text(path: str, head: bytes) -> None:
    found = sniff(head, path)
    if not found.kind:
        raise UserError(f"{path}: looks like {found.looks_like}: {found.remedy}")
    if found.encoding != "utf-8":
        raise UserError(
            f"{path}: is {found.encoding.upper()}: convert it to UTF-8, e.g. with "
            f"iconv -f {found.encoding[:6].upper()} -t UTF-8"
        )


def _raw_lines(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.readline(MAX_LINE + 1), b"")


def _decoded(raw: Iterable[bytes], path: str) -> _Lines:
    for number, line in enumerate(raw, 1):
        if len(line) > MAX_LINE:
            raise UserError(f"{path}:{number}: a line of more than {MAX_LINE >> 20} MiB")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8: convert the "
                f"file, e.g. with iconv"
            ) from None
        yield number, text.removeprefix("\ufeff") if number == 1 else text


def _lines_of(path: str) -> _Lines:
    try:
        with open(path, "rb") as file:
            yield from _decoded(_raw_lines(file), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _format_of(lines: list[str], suffix: str, whole: bool) -> str:
    named = _SUFFIXES.get(suffix)
    filled = [line.strip("\r\n") for line in lines if line.strip()]
    start = filled[0].lstrip()
    if start[0] in "{[" and (kind := _json_format(filled, named, whole)):
        return kind
    if named in ("json", "jsonl", "csv", "parquet"):
        return named
    if named == "conll" or _is_conll(filled):
        return "conll"
    if named == "tsv":
        return named
    if len(filled) > 1 and "\t" in start and _agree(filled, "\t"):
        return "tsv"
    names = start.split(",")
    if named is None and len(names) > 1 and all(map(_is_name, names)) and _agree(filled, ","):
        return "csv"
    return "text"


def _json_format(filled: list[str], named: str | None, whole: bool) -> str | None:
    first, alone = filled[0].lstrip(), len(filled) == 1
    if first[0] == "[":
        return "json" if re.match(r"\[\s*(\{|\]|$)", first) else None
    value = _parsed(first)
    if isinstance(value, dict):
        return "json" if alone and whole and isinstance(value.get("data"), list) else "jsonl"
    if not alone and filled[1].lstrip().startswith("{"):
        return "jsonl"  # of which the first line is broken
    if named == "jsonl":
        return named
    return "json" if re.match(r'\{\s*($|"[^"]*"\s*:)', first) else None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_conll(filled: list[str]) -> bool:
    lines = (line for line in filled[:_SAMPLE] if not line.startswith(("#", "-DOCSTART-")))
    tokens = [line.split("\t" if "\t" in line else None) for line in lines]
    tagged = [f[-1] for f in tokens if len(f) > 1 and _TAG.fullmatch(f[-1])]
    # a line that is broken is to be named as such
    return len(tagged) > 0.9 * len(tokens) and any(tag != "O" for tag in tagged)


# CSV and TSV


@dataclass(frozen=True)
class _Delimited:
    delimiter: str
    quoted: bool
    header: bool
    columns: tuple[str, ...]


def _delimited_layout(path: str, format: str, header: bool | None, sample: list[str]) -> _Delimited:
    sample = [line.rstrip("\r\n") for line in sample[:_SAMPLE]]
    delimiter = "\t" if format == "tsv" else _delimiter(sample)
    quoted = format == "csv" or _is_quoted(sample, delimiter)
    records = _records_of(sample, delimiter) if quoted else None
    if records is None:
        records = [line.split(delimiter) for line in sample if line]
    first = records[0] if records else [""]
    if header is None:
        header = _has_header(first, records[1:])
    numbers = [str(number) for number in range(1, len(first) + 1)]
    names = [n.strip() or number for n, number in zip(first, numbers, strict=True)]
    return _Delimited(delimiter, quoted, header, tuple(names if header else numbers))


def _delimiter(sample: list[str]) -> str:
    """Of a CSV file: what cuts every record into equally many fields, else the first line most."""
    for delimiter in (",", ";", "\t"):
        if delimiter in sample[0] and _agree(sample, delimiter):
            return delimiter
    return max(",;\t", key=sample[0].count)


def _agree(lines: list[str], delimiter: str) -> bool:
    counts = {len(line.split(delimiter)) for line in lines[:_SAMPLE] if line}
    if len(counts) == 1:
        return True
    records = _records_of(lines[:_SAMPLE], delimiter)
    return records is not None and len({len(record) for record in records}) == 1


def _records_of(lines: list[str], delimiter: str) -> list[list[str]] | None:
    """The records of quoted lines but one that the last line may have cut; None: badly quoted."""
    records: list[list[str]] = []
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    try:
        records.extend(record for record in reader if record)
    except csv.Error:
        if reader.line_num < len(lines):
            return None
    return records


def _is_quoted(sample: list[str], delimiter: str) -> bool:
    """Whether quotes of a TSV file are quoting: all of the first line is, or a field needs them."""
    records = _records_of(sample, delimiter)
    if not records or len({len(record) for record in records}) > 1:
        return False
    if all(len(f) > 1 and f[0] == f[-1] == '"' for f in sample[0].split(delimiter)):
        return True
    if len({len(line.split(delimiter)) for line in sample if line}) > 1:
        return True  # a field holds the delimiter, or a line's end
    doubled = re.compile(r'"[^"]*""(?:[^"]|"")*"')
    return any(doubled.fullmatch(f) for line in sample for f in line.split(delimiter))


def _is_name(text: str) -> bool:
    text = text.strip()
    if not 0 < len(text) <= 60 or len(text.split()) > 4 or text[-1] in ".!?,;":
        return False
    return not is_number(text)


def is_number(text: str) -> bool:
    """Whether a field of CSV or TSV is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _has_header(first: list[str], rest: list[list[str]]) -> bool:
    # what writes tables with an index leaves the first name empty
    names = first[1:] if len(first) > 1 and not first[0] else first
    if not all(map(_is_name, names)):
        return False
    return not any(
        name and name == value
        for record in rest
        for name, value in zip(first, record, strict=False)
    )


def _delimited_rows(path: str, lines: _Lines, layout: _Delimited) -> Iterator[Row]:
    records = _quoted(path, lines, layout) if layout.quoted else _unquoted(lines, layout)
    if layout.header:
        next(records, None)
    columns = layout.columns
    for number, fields in records:
        if len(fields) != len(columns):
            s = "" if len(fields) == 1 else "s"
            told = ""
            if layout.quoted and len(fields) > len(columns):
                told = f"; a field that holds {layout.delimiter!r} must stand in quotes"
            raise UserError(
                f"{path}:{number}: {len(fields)} field{s}, but {len(columns)} "
                f"columns ({listed(columns)}){told}"
            )
        yield Row(dict(zip(columns, fields, strict=True)), f"{path}:{number}")


def _unquoted(lines: _Lines, layout: _Delimited) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        if line := line.rstrip("\r\n"):
            yield number, line.split(layout.delimiter)


def _quoted(path: str, lines: _Lines, layout: _Delimited) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    reader = csv.reader((line for _, line in lines), delimiter=layout.delimiter, strict=True)
    number = 1
    try:
        for fields in reader:
            if fields:
                yield number, fields
            number = reader.line_num + 1
    except csv.Error as error:
        open_quote = "unexpected end of data" in str(error) or "field limit" in str(error)
        why = "a quote is opened and never closed" if open_quote else f"not CSV: {error}"
        if "new-line character" in str(error):
            why = "a line ends with \\r alone: convert the file, e.g. with tr '\\r' '\\n'"
        raise UserError(f"{path}:{number}: {why}") from None


# JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise UserError(f"several values are named {listed(map(repr, twice))}: rename them")
    return values


def _loaded(text: str, where: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_unique)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if "\n" in text.strip() else ""
        raise UserError(f"{where}{line}: not JSON: {error.msg} (column {error.colno})") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    return value


def _json_rows(path: str, lines: _Lines) -> Iterator[Row]:
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}:{number}"
        value = _loaded(line.strip(), where)
        if not isinstance(value, dict):
            raise UserError(f"{where}: {show(value)} must be a JSON object, {{...}}")
        yield Row(value, where)


def _json(path: str) -> _Reader:
    content = _loaded("".join(line for _, line in _lines_of(path)), path)
    records = content.get("data") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise UserError(f'{path}: must be JSON lines, an array of objects, or {{"data": [...]}}')
    if any(isinstance(record, dict) and "paragraphs" in record for record in records):
        columns = ("id", "title", "question", "context", "answers", "is_impossible")
        return _Reader(path, "squad", columns, _some(path, _squad_rows(path, records)))
    return _Reader(path, "json", None, _some(path, _array_rows(path, records)))


def _array_rows(path: str, records: list[Any]) -> Iterator[Row]:
    for number, value in enumerate(records, 1):
        if not isinstance(value, dict):
            raise UserError(f"{path} row {number}: {show(value)} must be a JSON object, {{...}}")
        yield Row(value, f"{path} row {number}")


def _squad_rows(path: str, articles: list[Any]) -> Iterator[Row]:
    for a, article in enumerate(articles):
        paragraphs = _member(path, f"data[{a}]", article, "paragraphs", list)
        for p, paragraph in enumerate(paragraphs):
            place = f"data[{a}].paragraphs[{p}]"
            context = _member(path, place, paragraph, "context", str)
            questions = _member(path, place, paragraph, "qas", list)
            for q, entry in enumerate(questions):
                place_of = f"{place}.qas[{q}]"
                question = _member(path, place_of, entry, "question", str)
                answers = entry.get("answers") or []
                texts = [_member(path, place_of, answer, "text", str) for answer in answers]
                starts = [
                    _member(path, place_of, answer, "answer_start", int) for answer in answers
                ]
                impossible = bool(entry.get("is_impossible", False))
                if impossible and texts:
                    raise UserError(
                        f"{path}#{entry.get('id', place_of)}: is_impossible, but has answers"
                    )
                name = str(entry.get("id", place_of))
                values = {
                    "id": name,
                    "title": article.get("title", ""),
                    "question": question,
                    "context": context,
                    "answers": {"text": texts, "answer_start": starts},
                    "is_impossible": impossible,
                }
                yield Row(values, f"{path}#{name}")


def _member(path: str, place: str, record: Any, name: str, kind: type) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        told = {list: "a list", str: "text", int: "an integer"}[kind]
        found = "is missing" if value is None else f"is {show(value)}"
        raise UserError(f"{path}: {place}.{name} {found}: must be {told}, as in SQuAD")
    return value


# Parquet, CoNLL, text


def _parquet(path: str) -> _Reader:
    parquet = needs("pyarrow.parquet")
    # a damaged one may fail anywhere: ValueError is text that is not UTF-8
    errors = (needs("pyarrow").ArrowException, OSError, ValueError)
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = tuple(schema.names)
            classes = _classes_of(schema.metadata or {})
    except errors as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from None
    _check_columns(path, columns)
    rows = _parquet_rows(path, parquet, errors)
    if classes:
        rows = _with_names(rows, classes)
    return _Reader(path, "parquet", columns, _some(path, rows), classes)


def _classes_of(metadata: Mapping[bytes, bytes]) -> dict[str, Sequence[str]]:
    """Names of classes by column, as `datasets` writes its ClassLabel, alone or in a list."""
    told = _parsed(metadata.get(b"huggingface", b"").decode("utf-8", "replace"))
    for name in ("info", "features"):
        told = told.get(name) if isinstance(told, dict) else None
    found: dict[str, Sequence[str]] = {}
    for column, feature in told.items() if isinstance(told, dict) else ():
        if isinstance(feature, list) and len(feature) == 1:
            feature = {"feature": feature[0]}
        while isinstance(feature, dict) and "feature" in feature:
            feature = feature["feature"]
        names = feature.get("names") if isinstance(feature, dict) else None
        if isinstance(names, list) and feature.get("_type") == "ClassLabel":
            found[column] = [str(name) for name in names]
    return found


def _with_names(rows: Iterator[Row], classes: Mapping[str, Sequence[str]]) -> Iterator[Row]:
    for row in rows:
        for column, names in classes.items():
            if column in row.values:
                row.values[column] = _named(row.values[column], names, f"{row.where}: {column}")
        yield row


def _named(value: Any, names: Sequence[str], what: str) -> Any:
    """The name of a class, or of each of a list; None of -1, which says that none is known."""
    if isinstance(value, list):
        return [_named(one, names, what) for one in value]
    if not isinstance(value, int) or 0 <= value < len(names):
        return names[value] if isinstance(value, int) else value
    if value == -1:
        return None
    raise UserError(f"{what} = {value}, but the file has {len(names)} classes ({listed(names)})")


def _parquet_rows(path: str, parquet: Any, errors: tuple[type[Exception], ...]) -> Iterator[Row]:
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path} row {number}")
    except errors as error:
        raise UserError(f"{path}: cannot be read after row {number}: {error}") from None


@dataclass(frozen=True)
class _Conll:
    separator: str | None  # None: any whitespace
    count: int
    of_entities: bool  # whether the last column holds O, B-x and such

    @property
    def universal(self) -> bool:
        """CoNLL-U, whose first column is a number and whose last is no tag."""
        return self.count == 10 and self.separator == "\t"

    @property
    def columns(self) -> tuple[str, ...]:
        numbers = tuple(str(number) for number in range(1, self.count + 1))
        if self.universal:
            return numbers
        return (("tokens",), ("tokens",), ("tokens", "tags"))[min(self.count, 2)] + (
            numbers if self.count > 2 else ()
        )

    def fields(self, line: str) -> list[str] | None:
        """None: no token."""
        if line.startswith("-DOCSTART-"):
            return None
        fields = line.split(self.separator)
        if line.startswith("#"):
            if self.separator and len(fields) == 1 < self.count:
                return None
            odd = len(fields) != self.count or "=" in fields[-1]
            odd |= self.of_entities and not _TAG.fullmatch(fields[-1])
            if not self.separator and self.count > 1 and fields[0] == "#" and odd:
                return None
        if self.universal and _RANGE.fullmatch(fields[0]):
            return None
        return fields


def _conll_layout(sample: list[str]) -> _Conll:
    tokens = [line.strip("\r\n") for line in sample if line.strip()]
    tokens = [line for line in tokens if not line.startswith(("#", "-DOCSTART-"))] or tokens
    separator = "\t" if any("\t" in line for line in tokens) else None
    counts = Counter(len(line.split(separator)) for line in tokens)
    return _Conll(separator, counts.most_common(1)[0][0], _is_conll(tokens))


def _conll_rows(path: str, lines: _Lines, layout: _Conll) -> Iterator[Row]:
    tokens: list[list[str]] = []
    numbers: list[int] = []
    for number, line in chain(lines, [(0, "")]):
        line = line.rstrip("\r\n")
        if line.strip():
            fields = layout.fields(line)
            if fields is None:
                continue
            if len(fields) != layout.count:
                s = "" if len(fields) == 1 else "s"
                raise UserError(
                    f"{path}:{number}: {len(fields)} column{s}, but the file has {layout.count}: "
                    f"a token and its tag a line"
                )
            tokens.append(fields)
            numbers.append(number)
            if len(tokens) > MAX_SENTENCE:
                raise UserError(
                    f"{path}:{number}: {MAX_SENTENCE:,} tokens without a blank line, which "
                    f"must stand between sentences"
                )
        elif tokens:
            yield Row(_sentence(tokens, numbers, layout), f"{path}:{numbers[0]}")
            tokens, numbers = [], []


def _sentence(tokens: list[list[str]], numbers: list[int], layout: _Conll) -> dict[str, Any]:
    columns = [list(column) for column in zip(*tokens, strict=True)]
    values: dict[str, Any] = {}
    for name in layout.columns:
        if name in ("tokens", "tags"):
            values[name] = columns[0 if name == "tokens" else -1]
        else:
            values[name] = columns[int(name) - 1]
    return values | {"lines": numbers}


def _text_rows(path: str, lines: _Lines) -> Iterator[Row]:
    blank: list[int] = []
    for number, line in lines:
        text = line.rstrip("\r\n")
        if not text.strip():
            blank.append(number)
            continue
        yield from (Row({"text": ""}, f"{path}:{empty}") for empty in blank)
        blank.clear()
        yield Row({"text": text}, f"{path}:{number}")
