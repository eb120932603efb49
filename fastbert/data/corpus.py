"""Raw text to documents to sentences, streamed; what cannot be used is counted, never silent.

Text files follow https://github.com/google-research/bert: a blank line ends a document, a line
holds one or more sentences. A .jsonl file holds one document per line, in its field `text`.
"""

import ast
import importlib
import json
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from inspect import cleandoc
from typing import BinaryIO

from fastbert.errors import UserError

BUILTIN = "builtin"
SUFFIXES = (".txt", ".md", ".jsonl")
MAX_SENTENCE = 2_000
"""Characters of the longest sentence; a longer one is cut at whitespace."""
MAX_DOCUMENT = 2**24
"""Characters after which a document is cut in two, so that memory stays bounded."""
MAX_RECORD = 2**28
"""Bytes of the longest JSONL record."""
CHUNK = 2**20
"""Bytes read at once; a longer line is worked on in pieces."""

INVALID_UTF8 = "{} line{s} with invalid UTF-8"
NUL_BYTE = "{} line{s} with a NUL byte"
UNBROKEN = f"part of {{}} line{{s}}: over {MAX_SENTENCE:,} characters without whitespace"
NO_TEXT = '{} JSONL line{s} without an object that has a string "text"'
LONG_RECORD = "{} JSONL line{s} of more than 256 MiB"
OTHER_FILE = "{} file{s} that are not " + ", ".join(SUFFIXES)
NO_SYNTAX = "{} source file{s} that Python cannot parse"
NO_TOKENS = "{} document{s} without a token"

Progress = Callable[[int], None]
"""Called with the number of bytes just read."""


@dataclass
class Skipped:
    """What was left out of a corpus and why, and what else its user should know."""

    counts: dict[str, int] = field(default_factory=dict)
    """By reason, a template such as `INVALID_UTF8`."""
    first: dict[str, str] = field(default_factory=dict)
    """Where each reason was met first, as file:line."""
    notes: list[str] = field(default_factory=list)
    _last: dict[str, str] = field(default_factory=dict, repr=False)

    def skip(self, reason: str, where: str) -> None:
        """Counts one more of `reason`, once per place."""
        if self._last.get(reason) == where:
            return
        self._last[reason] = where
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def note(self, message: str) -> None:
        """Keeps a message of one line, once."""
        if message not in self.notes:
            self.notes.append(message)

    def summary(self) -> list[str]:
        """Returns one line per reason, then the notes."""
        lines = []
        for reason, count in self.counts.items():
            what = reason.format(f"{count:,}", s="" if count == 1 else "s")
            lines.append(f"skipped {what}, first at {self.first[reason]}")
        return lines + self.notes


def read_corpus(
    source: str, report: Skipped, progress: Progress | None = None
) -> Iterator[list[str]]:
    """Yields documents, each a list of non-blank sentences, in an order that never varies.

    Args:
        source: "builtin", a file (.jsonl, anything else is read as text), or a folder of .txt, .md
            and .jsonl files, searched recursively in sorted order, hidden ones left out.
        report: filled as the corpus is read.
        progress: told of bytes as they are read, out of `corpus_bytes`.

    Raises:
        UserError: the source is missing, unreadable, not UTF-8, or holds no text.
    """
    advance = progress or (lambda count: None)
    sentences: Iterator[str | None]
    if source == BUILTIN:
        sentences = _builtin(report, advance)
    else:
        sentences = _files(corpus_files(source, report), report, advance)
    found = False
    for document in _documents(sentences, report):
        found = True
        yield document
    if not found:
        why = "; ".join(report.summary())
        raise UserError(
            f"{source}: holds no text{f' ({why})' if why else ''}; it should hold sentences in "
            "UTF-8, documents separated by blank lines"
        )


def corpus_files(source: str, report: Skipped | None = None) -> list[str]:
    """Returns the files of a corpus, sorted.

    Args:
        source: as in `read_corpus`; "builtin" gives the standard library's source files.
        report: counts the files that are not text.

    Raises:
        UserError: there is no such file or folder, or no text file in it.
    """
    if source == BUILTIN:
        return list(_stdlib_files())
    if os.path.isfile(source):
        return [source]
    if not os.path.isdir(source):
        wrong = "is neither a file nor a folder" if os.path.exists(source) else "does not exist"
        raise UserError(f"{source}: {wrong}; give a text file, a folder of them, or {BUILTIN}")
    files = list(_walk(source, report or Skipped()))
    if not files:
        raise UserError(f"{source}: the folder holds no {', '.join(SUFFIXES[:-1])} or .jsonl file")
    return files


def corpus_bytes(source: str) -> int:
    """Returns the bytes that reading `source` will report as progress.

    Raises:
        UserError: as in `corpus_files`.
    """
    return sum(os.path.getsize(path) for path in corpus_files(source))


def _walk(folder: str, report: Skipped) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    visited = set()  # linked folders are followed, but each only once
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = os.path.join(parent, name)
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES) and os.path.isfile(path):
                yield path
            else:
                report.skip(OTHER_FILE, path)


def _files(paths: Iterable[str], report: Skipped, progress: Progress) -> Iterator[str | None]:
    for path in paths:
        try:
            with open(path, "rb") as file:
                _check_encoding(path, file)
                if path.lower().endswith(".jsonl"):
                    yield from _jsonl(path, file, report, progress)
                else:
                    yield from _text(path, file, report, progress)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        yield None


_FOREIGN_MARKS = {  # the longer marks first: UTF-32's begins with UTF-16's
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def _check_encoding(path: str, file: BinaryIO) -> None:
    start = file.read(4)
    for mark, name in _FOREIGN_MARKS.items():
        if start.startswith(mark):
            raise UserError(
                f"{path}: is {name}; convert it to UTF-8, e.g. with iconv -f {name} -t UTF-8"
            )
    file.seek(3 if start.startswith(b"\xef\xbb\xbf") else 0)


def _text(path: str, file: BinaryIO, report: Skipped, progress: Progress) -> Iterator[str | None]:
    for number, raw, whole in _pieces(file, progress):
        where = f"{path}:{number}"
        text = _decoded(raw, where, report)
        if text is None:
            continue
        if text.isspace():
            if whole:
                yield None
        else:
            yield from _short_sentences(text, where, report)


def _pieces(file: BinaryIO, progress: Progress) -> Iterator[tuple[int, bytes, bool]]:
    """Yields (line number, bytes, whether they are the whole line)."""
    number, carry, inside = 0, b"", False
    while chunk := file.readline(CHUNK):
        progress(len(chunk))
        number += not inside
        piece = carry + chunk
        ended = len(chunk) < CHUNK or chunk.endswith(b"\n")
        cut = len(piece) if ended else _last_break(piece)
        carry = piece[cut:]
        yield number, piece[:cut], ended and not inside
        inside = not ended
    if carry:
        yield number, carry, False


def _last_break(piece: bytes) -> int:
    cut = max(piece.rfind(b" "), piece.rfind(b"\t"))
    if cut > 0:
        return cut
    for start in range(len(piece) - 1, len(piece) - 4, -1):  # of the last character
        if piece[start] & 0xC0 != 0x80:
            return start
    return len(piece)


def _decoded(raw: bytes, where: str, report: Skipped) -> str | None:
    if b"\0" in raw:
        report.skip(NUL_BYTE, where)
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        report.skip(INVALID_UTF8, where)
        return None


def _jsonl(path: str, file: BinaryIO, report: Skipped, progress: Progress) -> Iterator[str | None]:
    number = 0
    while raw := file.readline(MAX_RECORD):
        number += 1
        progress(len(raw))
        where = f"{path}:{number}"
        if len(raw) == MAX_RECORD and not raw.endswith(b"\n"):
            report.skip(LONG_RECORD, where)
            while (rest := file.readline(CHUNK)) and not rest.endswith(b"\n"):
                progress(len(rest))
            continue
        if raw.isspace():
            continue
        for line in _record_text(raw, where, report).splitlines():
            if "\0" in line:
                report.skip(NUL_BYTE, where)
            elif not line.isspace():
                yield from _short_sentences(line, where, report)
        yield None


def _record_text(raw: bytes, where: str, report: Skipped) -> str:
    line = _decoded(raw, where, report)
    if line is None:
        return ""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        report.skip(NO_TEXT, where)
        return ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # an escaped half of a surrogate pair
        report.skip(INVALID_UTF8, where)
        return ""
    return text


def _documents(sentences: Iterable[str | None], report: Skipped) -> Iterator[list[str]]:
    document: list[str] = []
    size = 0
    for sentence in sentences:
        if sentence is not None:
            document.append(sentence)
            size += len(sentence)
            if size < MAX_DOCUMENT:
                continue
            report.note(f"documents of more than {MAX_DOCUMENT:,} characters were cut in two")
        if document:
            yield document
            document, size = [], 0
    if document:
        yield document


# A sentence ends after .!? and closing quotes, before whitespace; or after its CJK counterpart.
# Possessive repeats and the look-behind keep this linear on a megabyte of dots.
_QUOTES = "\"'\u201c\u2018\u00ab"
_CLOSING = "\"'\u201d\u2019\u00bb"
_OPENING = _QUOTES + "([\u00bf\u00a1"
_END = re.compile(
    rf"(?<![.!?])[.!?]++[{_CLOSING})\]]*+\s++"
    rf"|[\u3002\uff01\uff1f]++[{_CLOSING}\u300d\u300f\uff09]*+\s*+"
)
_ABBREVIATION = re.compile(
    rf"(?:^|[\s(\[{_QUOTES}])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|"
    r"Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Rev|Hon|vs|cf|al|Fig|Eq|No|Vol|pp)\.$"
)


def split_sentences(text: str) -> list[str]:
    """Returns the sentences of a text, each stripped and non-empty.

    A sentence ends after `.`, `!` or `?` and closing quotes, where whitespace and a capital, a
    digit or an opening quote follow, unless that full stop belongs to an abbreviation.
    """
    sentences = []
    start = 0
    for end in _END.finditer(text):
        stop = end.end()
        if stop < len(text) and end.group()[0] in ".!?":
            following = text[stop]
            if not (following.isupper() or following.isdigit() or following in _OPENING):
                continue
            before = text[max(start, end.start() - 12) : end.start() + 1]
            if end.group().rstrip() == "." and _ABBREVIATION.search(before):
                continue
        sentences.append(text[start:stop].strip())
        start = stop
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


def _short_sentences(text: str, where: str, report: Skipped) -> Iterator[str]:
    for sentence in split_sentences(text):
        if len(sentence) <= MAX_SENTENCE:
            yield sentence
        else:
            yield from _cut(" ".join(sentence.split()), where, report)


def _cut(sentence: str, where: str, report: Skipped) -> Iterator[str]:
    start = 0
    while len(sentence) - start > MAX_SENTENCE:
        end = sentence.rfind(" ", start, start + MAX_SENTENCE + 1)
        if end > start:
            yield sentence[start:end]
        else:
            report.skip(UNBROKEN, where)
            end = sentence.find(" ", start + MAX_SENTENCE)
            if end < 0:
                return
        start = end + 1
    yield sentence[start:]


# The corpus that every Python brings along: its language reference and its docstrings.

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_NOT_LIBRARY |= {"pydoc_data"}  # its one file is the topics, which are read as such


def _stdlib_files() -> Iterator[str]:
    for parent, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = sorted(name for name in folders if name not in _NOT_LIBRARY)
        yield from (os.path.join(parent, name) for name in sorted(names) if name.endswith(".py"))


def _builtin(report: Skipped, progress: Progress) -> Iterator[str | None]:
    topics = _topics()
    for name in sorted(topics):
        yield from _prose(topics[name], f"topic {name}", report)
        yield None
    found = False
    for path in _stdlib_files():
        docstrings = _docstrings(path, report, progress)
        found = found or bool(docstrings)
        for docstring in docstrings:
            yield from _prose(docstring, path, report)
        yield None
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    if not topics:
        report.note(f"{version} comes without pydoc_data.topics: read its docstrings only")
    if not found:
        report.note(f"{version} comes without library sources: read pydoc_data.topics only")
    if not topics and not found:
        raise UserError(
            f"{BUILTIN}: this {version} comes with neither topics nor docstrings; give a text file"
        )


def _topics() -> dict[str, str]:
    try:
        return dict(importlib.import_module("pydoc_data.topics").topics)
    except (ImportError, AttributeError):
        return {}


def _docstrings(path: str, report: Skipped, progress: Progress) -> list[str]:
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError:
        report.skip(NO_SYNTAX, path)
        return []
    progress(len(source))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the library's own strings
            module = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        report.skip(NO_SYNTAX, path)
        return []
    return [cleandoc(docstring) for docstring in _raw_docstrings(module)]


def _raw_docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _raw_docstrings(child)


_UNDERLINE = re.compile(r"[=\-~*^\"'`#+._:|\s]+")
_BULLET = re.compile(r"(?:[*+\-•]|\(?[0-9]+[.)])\s")


def _prose(text: str, where: str, report: Skipped) -> Iterator[str]:
    """Yields the sentences of wrapped text: joins lines, drops underlines and doctest input."""
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        line = line.strip()
        code = line.startswith((">>>", "... ")) or line == "..."
        ends = code or not line or _UNDERLINE.fullmatch(line)
        if (ends or _BULLET.match(line)) and paragraph:
            yield from _short_sentences(" ".join(paragraph), where, report)
            paragraph = []
        if not ends:
            paragraph.append(line)
