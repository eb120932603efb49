"""Raw text to documents to sentences, streamed; what cannot be used is counted, never silent.

Text files follow https://github.com/google-research/bert: a blank line ends a document, a line
holds one or more sentences. A JSON file holds documents, as strings or as objects with a string
`text`. Which of them a file is, its first bytes say. One process cuts files into blocks at line
ends; the blocks become sentences in as many processes as there are cores, and come back in order.
"""

import ast
import codecs
import hashlib
import importlib
import json
import os
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from inspect import cleandoc
from itertools import chain
from typing import BinaryIO, NamedTuple, TypeVar

from fastbert.data.formats import HEAD, JSON, JSON_LINES, TEXT, Format, sniff
from fastbert.data.parallel import MAX_WORKERS, available_cores, ordered_map
from fastbert.data.sentences import AUTO, LANGUAGES, LINE, OURS, script_of, split_sentences
from fastbert.errors import UserError

BUILTIN = "builtin"
SUFFIXES = (".txt", ".text", ".md", ".json", ".jsonl", ".ndjson")
"""Of the files of a folder that are read, besides those without a suffix."""
MAX_SENTENCE = 2_000
"""Characters of the longest sentence; a longer one is cut at whitespace."""
MAX_DOCUMENT = 2**24
"""Characters after which a document is cut in two, so that memory stays bounded."""
MAX_RECORD = 2**28
"""Bytes of the longest JSON record."""
CHUNK = 2**20
"""Bytes read at once and given to a worker; a longer line is worked on in pieces."""
PARALLEL = 2**23
"""Bytes of a corpus from which on workers read it; 8 MB take one core a second."""
MAX_LOST = 0.5
"""Share of a corpus, in lines that cannot be read, beyond which it is refused: the encoding is not
what it should be, and what is left is no sample of the text."""
MAX_UNBROKEN = 0.95
"""The same with what has no whitespace, of which a corpus may hold long pieces (encoded images)."""
ENOUGH = 2**26
"""Bytes of a single file after which it is refused at once if so nearly all of them are lost."""

INVALID_UTF8 = "{} line{s} with invalid UTF-8"
NUL_BYTE = "{} line{s} with a NUL byte"
UNBROKEN = f"part of {{}} line{{s}}: over {MAX_SENTENCE:,} characters without whitespace"
NO_TEXT = '{} JSON record{s} without a string "text"'
LONG_RECORD = "{} JSON record{s} of more than 256 MiB"
BROKEN_JSON = "the rest of {} file{s} after invalid JSON"
FOREIGN = "{} file{s} without text"
OTHER_FILE = "{} file{s} of other kinds than " + ", ".join(SUFFIXES)
NO_SYNTAX = "{} source file{s} that Python cannot parse"
NO_TOKENS = "{} document{s} without a token"

Progress = Callable[[int], None]
"""Called with the number of bytes just read."""
_Result = TypeVar("_Result")


@dataclass
class Skipped:
    """What was left out of a corpus and why, and what else its user should know."""

    counts: dict[str, int] = field(default_factory=dict)
    """By reason, a template such as `INVALID_UTF8`."""
    first: dict[str, str] = field(default_factory=dict)
    """Where each reason was met first, as file:line."""
    notes: list[str] = field(default_factory=list)
    read: int = 0
    """Bytes that were looked at."""
    lost: int = 0
    """Bytes of them in lines and records that were skipped whole."""
    unbroken: int = 0
    """Bytes of them in `UNBROKEN` parts."""
    _last: dict[str, str] = field(default_factory=dict, repr=False)

    def skip(self, reason: str, where: str, lost: int = 0) -> None:
        """Counts one more of `reason`, once per place, and the bytes that it costs."""
        self.lost += lost
        if self._last.get(reason) == where:
            return
        self._last[reason] = where
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def note(self, message: str) -> None:
        """Keeps a message of one line, once."""
        if message not in self.notes:
            self.notes.append(message)

    def add(self, later: "Skipped") -> None:
        """Adds what was left out of the part that follows."""
        for reason, count in later.counts.items():
            same = self._last.get(reason) == later.first[reason]  # a line in two parts
            self.counts[reason] = self.counts.get(reason, 0) + count - same
            self.first.setdefault(reason, later.first[reason])
        self._last.update(later._last)
        for message in later.notes:
            self.note(message)
        self.read += later.read
        self.lost += later.lost
        self.unbroken += later.unbroken

    def losses(self) -> list[str]:
        """Returns one line per reason."""
        lines = []
        for reason, count in self.counts.items():
            what = reason.format(f"{count:,}", s="" if count == 1 else "s")
            lines.append(f"skipped {what}, first at {self.first[reason]}")
        return lines

    def summary(self) -> list[str]:
        """Returns one line per reason, then the notes."""
        return self.losses() + self.notes


class Content(NamedTuple):
    """A file of a corpus as it was read. `digest` is of its bytes, or of the first of what is
    skipped for them; the rest is of its status and spares reading it again."""

    size: int
    mtime_ns: int
    ctime_ns: int
    digest: str


Contents = dict[str, Content]
"""By path."""


def read_corpus(
    source: str,
    report: Skipped,
    progress: Progress | None = None,
    workers: int | None = None,
    splitter: str = AUTO,
) -> Iterator[list[str]]:
    """Yields documents, each a list of non-blank sentences, in an order that never varies.

    Args:
        source: "builtin", a file, or a folder whose files with one of `SUFFIXES` or without a
            suffix are read, recursively in sorted order, hidden ones left out. The first bytes of
            each say whether it is text or JSON.
        report: filled as the corpus is read.
        progress: told of bytes as they are read, out of `corpus_bytes`.
        workers: processes that read; None takes the cores there are if the corpus is large.
        splitter: of lines into sentences, as in `split_sentences`.

    Raises:
        UserError: the source is missing, unreadable, no text, or nearly all of it was skipped.
        RunError: a worker died.
    """
    for document, _ in read_pieces(source, report, progress, workers, None, splitter):
        yield document


def read_pieces(
    source: str,
    report: Skipped,
    progress: Progress | None = None,
    workers: int | None = None,
    contents: Contents | None = None,
    splitter: str = AUTO,
) -> Iterator[tuple[list[str], bool]]:
    """Yields documents as `read_corpus`, and whether each continues the one before.

    Args:
        contents: filled with each file as it has been read.
        source, report, progress, workers, splitter, Raises: as in `read_corpus`.
    """
    parsed = _parsed(source, report, _groups, progress, workers, splitter, contents)
    yield from _documents(parsed, report)


def map_corpus(
    source: str,
    report: Skipped,
    function: Callable[[list[str]], _Result],
    progress: Progress | None = None,
    workers: int | None = None,
    splitter: str = AUTO,
) -> Iterator[_Result]:
    """Yields `function` of some MB of sentences at a time, in order, called by the workers.

    Args:
        function: of the top level of a module.
        source, report, progress, workers, splitter, Raises: as in `read_corpus`.
    """
    flat = partial(_flat, function)
    yield from _parsed(source, report, flat, progress, workers, splitter, None)


def _groups(groups: list[list[str]]) -> list[list[str]]:
    return groups


def _flat(function: Callable[[list[str]], _Result], groups: list[list[str]]) -> _Result:
    return function([sentence for group in groups for sentence in group])


def _parsed(
    source: str,
    report: Skipped,
    function: Callable[[list[list[str]]], _Result],
    progress: Progress | None,
    workers: int | None,
    splitter: str,
    contents: Contents | None,
) -> Iterator[_Result]:
    """Yields `function` of sentences in groups, between which a document ends, block by block."""
    advance = progress or (lambda count: None)
    found = False
    if splitter == LINE:
        report.note("each line was taken as one sentence")
    elif splitter not in (AUTO, OURS):
        told = "" if splitter in LANGUAGES else ", which has no rules of its own for it"
        report.note(f"sentences were split by sentencex{told}, for the language {splitter!r}")
    if source == BUILTIN:
        for groups in _builtin(report, advance):
            found = True
            yield function(groups)
    else:
        files = corpus_files(source, report)
        alone = files == [source]
        if workers is None:
            cores = min(available_cores(), MAX_WORKERS)
            large = cores > 1 and sum(map(os.path.getsize, files)) >= PARALLEL
            workers = cores if large else 0
        kinds: Counter[str] = Counter()
        blocks = _batched(_files(files, alone, advance, contents, kinds))
        for result, any_text, part in ordered_map(
            partial(_parse, function, splitter), blocks, workers
        ):
            report.add(part)
            if any_text:
                found = True
            yield result
            if alone and report.read >= ENOUGH:
                _refuse_if_lost(source, report, MAX_UNBROKEN)
        _note_kinds(files, kinds, report)
    why = "; ".join(report.losses())
    if not found:
        records = 'JSON records should be strings or objects with a string "text"'
        lines = "it should hold sentences in UTF-8, documents separated by blank lines"
        raise UserError(
            f"{source}: holds no text{f' ({why})' if why else ''}; "
            f"{records if NO_TEXT in report.counts else lines}"
        )
    _refuse_if_lost(source, report, MAX_LOST)


def _refuse_if_lost(source: str, report: Skipped, max_lost: float) -> None:
    lost, unbroken = report.lost, report.lost + report.unbroken
    if lost <= max_lost * report.read and unbroken <= MAX_UNBROKEN * report.read:
        return
    encoded = report.counts.get(INVALID_UTF8, 0) > 0
    advice = "convert it to UTF-8, e.g. with iconv" if encoded else "mend it or leave it out"
    share = (lost if lost > max_lost * report.read else unbroken) / report.read
    why = "; ".join(report.losses())
    raise UserError(f"{source}: {share:.0%} of it would be skipped ({why}); {advice}")


def _note_kinds(files: list[str], kinds: Counter[str], report: Skipped) -> None:
    if len(files) > 1:
        told = (f"{kinds[kind]:,} as {kind}" for kind in (TEXT, JSON_LINES, JSON) if kinds[kind])
        report.note(f"{kinds.total():,} files read: {', '.join(told)}")
        return
    suffix = os.path.splitext(files[0])[1].lower()
    said = {".json": {JSON, JSON_LINES}, ".jsonl": {JSON_LINES}, ".ndjson": {JSON_LINES}}
    for kind in kinds:
        if kind not in said.get(suffix, {TEXT}):
            report.note(f"{files[0]}: read as {kind}, for that is what it holds")


def corpus_files(source: str, report: Skipped | None = None) -> list[str]:
    """Returns the files of a corpus, sorted.

    Args:
        source: as in `read_corpus`; "builtin" gives the standard library's source files.
        report: counts the files that are not text.

    Raises:
        UserError: there is no such file or folder, or no text file in it.
    """
    if source == BUILTIN:
        return list(stdlib_files())
    if os.path.isfile(source):
        return [source]
    if not os.path.isdir(source):
        wrong = "is neither a file nor a folder" if os.path.exists(source) else "does not exist"
        raise UserError(f"{source}: {wrong}; give a text file, a folder of them, or {BUILTIN}")
    report = report or Skipped()
    files = list(_walk(source, report))
    if not files:
        seen = report.first.get(OTHER_FILE)
        raise UserError(
            f"{source}: the folder holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, nor "
            f"one without a suffix{f', but e.g. {seen}' if seen else ''}"
        )
    return files


def corpus_bytes(source: str) -> int:
    """Returns the bytes that reading `source` will report as progress.

    Raises:
        UserError: as in `corpus_files`.
    """
    return sum(os.path.getsize(path) for path in corpus_files(source))


def content_digest(path: str) -> str:
    """Returns the digest of a file as `read_pieces` gives it.

    Raises:
        UserError: the file is unreadable.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
            if not sniff(head, path).kind:
                return _digest_of_head(head)
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _digest_of_head(head: bytes) -> str:
    return f"head {hashlib.sha256(head).hexdigest()}"


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
            is_read = os.path.splitext(name)[1].lower() in ("", *SUFFIXES)
            if is_read and os.path.isfile(path):
                yield path
            else:
                report.skip(OTHER_FILE, path)


class _Block(NamedTuple):
    """A piece of a file that becomes sentences without a look at the others."""

    path: str
    line: int
    """Number of its first line."""
    kind: str
    """`TEXT`, `JSON_LINES`, `JSON`, `_FILE_END`, or the reason why the file's next `size` bytes are
    skipped."""
    size: int
    lines: bytes = b""
    records: tuple[tuple[int, int, str | None], ...] = ()
    """Of `JSON`: line number, size, and text if there is one."""
    starts_inside: bool = False
    """Whether the first line has begun in the block before."""
    ends_inside: bool = False


_FILE_END = "end of file"


def _batched(blocks: Iterable[_Block]) -> Iterator[list[_Block]]:
    """Yields blocks of small files together: a worker's turn costs as much as 1 kB of text."""
    batch: list[_Block] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += block.size
        if size >= CHUNK // 2:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _files(
    paths: Iterable[str],
    alone: bool,
    progress: Progress,
    contents: Contents | None,
    kinds: Counter[str],
) -> Iterator[_Block]:
    for path in paths:
        try:
            with open(path, "rb") as file:
                yield from _blocks(path, file, alone, progress, contents, kinds)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        yield _Block(path, 0, _FILE_END, 0)


def _blocks(
    path: str,
    file: BinaryIO,
    alone: bool,
    progress: Progress,
    contents: Contents | None,
    kinds: Counter[str],
) -> Iterator[_Block]:
    status = os.fstat(file.fileno())
    stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    head = file.read(HEAD)
    found = sniff(head, path)
    if not found.kind:
        if alone:
            raise UserError(f"{path}: looks like {found.looks_like}; {found.remedy}")
        yield _Block(f"{path} ({found.looks_like})", 0, FOREIGN, 0)
        progress(status.st_size)
        if contents is not None:
            contents[path] = Content(*stamp, _digest_of_head(head))
        return
    kinds[found.kind] += 1
    file.seek(0)
    raw = _Raw(file, progress, contents is not None)
    chunks = _line_ends(_as_utf8(raw.chunks(found.mark), found), found.kind)
    if found.kind == JSON:
        yield from _json_blocks(path, chunks)
    else:
        yield from _line_blocks(path, found.kind, chunks)
    if contents is not None:
        contents[path] = Content(*stamp, raw.digest.hexdigest())


class _Raw:
    def __init__(self, file: BinaryIO, progress: Progress, hashed: bool) -> None:
        self._file, self._progress, self._hashed = file, progress, hashed
        self.digest = hashlib.sha256()

    def chunks(self, mark: int) -> Iterator[bytes]:
        """Yields the file from behind its byte order mark."""
        while chunk := self._file.read(CHUNK):
            self._progress(len(chunk))
            if self._hashed:
                self.digest.update(chunk)
            yield chunk[mark:]
            mark = max(mark - len(chunk), 0)


def _invalid(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error("fastbert.invalid", _invalid)


def _as_utf8(chunks: Iterator[bytes], found: Format) -> Iterator[bytes]:
    """Yields UTF-16 and UTF-32 as UTF-8; what is invalid stays so, for its line to be counted."""
    if found.encoding == "utf-8":
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(found.encoding)("fastbert.invalid")
    for chunk in chunks:
        yield decoder.decode(chunk).encode("utf-8", "surrogateescape")
    yield decoder.decode(b"", True).encode("utf-8", "surrogateescape")


_RETURNS = re.compile(rb"\r++\n?")
_NEWLINES = re.compile("[\r\x85\u2028\u2029]")
_UNICODE_ENDS = tuple(end.encode() for end in "\x85\u2028\u2029")  # NEL, LS, PS
_HALF_ENDS = (b"\xe2\x80", b"\xe2", b"\xc2")


def _line_ends(chunks: Iterator[bytes], kind: str) -> Iterator[bytes]:
    """Yields text whose line ends are all one byte: CRLF; CR alone, as old Macs wrote; Unicode's.

    In JSON the last are characters like any other.
    """
    held = b""
    for chunk in chain(chunks, (b"",)):
        whole = held + chunk
        kept, held = whole, b""
        if chunk:
            kept = whole.rstrip(b"\r")
            if len(kept) == len(whole) and kind == TEXT:
                half = next((end for end in _HALF_ENDS if whole.endswith(end)), b"")
                kept = whole[: len(whole) - len(half)]
            held = whole[len(kept) :]  # the rest of a line end may follow
            if len(held) > CHUNK:
                kept, held = whole, b""
        if b"\r" in kept:
            kept = kept.replace(b"\r\n", b"\n")
        if b"\r" in kept:
            kept = _RETURNS.sub(_one_or_many, kept)
        for end in _UNICODE_ENDS if kind == TEXT else ():
            kept = kept.replace(end, b"\n")
        if kept:
            yield kept


def _one_or_many(returns: re.Match[bytes]) -> bytes:
    run = returns.group()
    return b"\n" if run.endswith(b"\n") else b"\n" * len(run)


def _line_blocks(path: str, kind: str, chunks: Iterator[bytes]) -> Iterator[_Block]:
    line, inside, dropping = 1, False, False
    limit = CHUNK if kind == TEXT else MAX_RECORD
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        if dropping:
            start = chunk.find(b"\n") + 1
            if not start:
                yield _Block(f"{path}:{line}", line, LONG_RECORD, len(chunk))
                continue
            chunk, line, dropping = chunk[start:], line + 1, False
        end = chunk.rfind(b"\n") + 1
        if end:
            lines = b"".join([*parts, chunk[:end]])
            yield _Block(path, line, kind, len(lines), lines, starts_inside=inside)
            line += lines.count(b"\n")
            inside, parts, size = False, [], 0
        parts.append(chunk[end:])
        size += len(chunk) - end
        if size < limit:
            continue
        if kind == TEXT:
            piece = b"".join(parts)
            cut = _last_break(piece)
            yield _Block(path, line, kind, cut, piece[:cut], (), inside, True)
            inside, parts, size = True, [piece[cut:]], len(piece) - cut
        else:
            yield _Block(f"{path}:{line}", line, LONG_RECORD, size)
            dropping, parts, size = True, [], 0
    if size:
        yield _Block(path, line, kind, size, b"".join(parts), starts_inside=inside)


def _last_break(piece: bytes) -> int:
    cut = max(piece.rfind(b" "), piece.rfind(b"\t"))
    if cut > 0:
        return cut
    for start in range(len(piece) - 1, len(piece) - 4, -1):  # of the last character
        if piece[start] & 0xC0 != 0x80:
            return start
    return len(piece)


_SEPARATORS = re.compile(r"[\s,]*+")


def _json_blocks(path: str, chunks: Iterator[bytes]) -> Iterator[_Block]:
    """Cuts an array, or values one after another, into records; one that breaks ends the file."""
    pieces = codecs.iterdecode(chunks, "utf-8", "surrogateescape")
    decode = json.JSONDecoder().raw_decode
    text, at, line, inside, whole = "", 0, 1, False, False
    records: list[tuple[int, int, str | None]] = []
    size = 0
    while True:
        start = at
        match = _SEPARATORS.match(text, at)
        assert match is not None
        at = match.end()
        value, end = None, -1
        if at < len(text):
            bracket = "[" if not inside else "]"
            if text[at] == bracket:
                inside = not inside
                line += text.count("\n", start, at)
                at += 1
                continue
            try:
                value, end = decode(text, at)
            except ValueError:
                pass
            except RecursionError:
                break
        line += text.count("\n", start, at)
        if end >= 0 and (end < len(text) or whole):
            records.append((line, end - at, _text_of(value)))
            size += end - at
            line += text.count("\n", at, end)
            at = end
            if size >= CHUNK // 2:
                yield _Block(path, line, JSON, size, b"", tuple(records))
                records, size = [], 0
            continue
        if whole or len(text) - at > MAX_RECORD:
            break
        more = list(_about(pieces, max(CHUNK, len(text) - at)))
        text, at, whole = "".join([text[at:], *more]), 0, not more
    if records:
        yield _Block(path, line, JSON, size, b"", tuple(records))
    if at < len(text) or inside:
        rest = len(text) - at + sum(map(len, pieces))
        yield _Block(f"{path}:{line}", line, BROKEN_JSON, rest)


def _about(pieces: Iterator[str], size: int) -> Iterator[str]:
    for piece in pieces:
        yield piece
        size -= len(piece)
        if size <= 0:
            return


def _text_of(record: object) -> str | None:
    text = record.get("text") if isinstance(record, dict) else record
    return text if isinstance(text, str) else None


def _parse(
    function: Callable[[list[list[str]]], _Result], splitter: str, blocks: list[_Block]
) -> tuple[_Result, bool, Skipped]:
    """What a worker does: returns `function` of the blocks' groups, and what was left out."""
    report = Skipped()
    groups: list[list[str]] = [[]]
    for block in blocks:
        report.read += block.size
        if block.kind == TEXT:
            _text(block, groups, report, splitter)
        elif block.kind == JSON_LINES:
            for number, raw in enumerate(block.lines.split(b"\n"), block.line):
                if raw and not raw.isspace():
                    text = _record_text(raw, f"{block.path}:{number}", report)
                    _record(text, len(raw), f"{block.path}:{number}", groups, report, splitter)
        elif block.kind == JSON:
            for number, size, text in block.records:
                where = f"{block.path}:{number}"
                if text is None:
                    report.skip(NO_TEXT, where, size)
                _record(text, size, where, groups, report, splitter)
        elif block.kind == _FILE_END:
            groups.append([])
        else:
            report.skip(block.kind, block.path, block.size)
    return function(groups), any(groups), report


def _text(block: _Block, groups: list[list[str]], report: Skipped, splitter: str) -> None:
    lines = _decoded_lines(block, report)
    last = block.line + len(lines) - 1
    for number, line in enumerate(lines, block.line):
        if line is None:
            continue
        whole = not (
            (block.starts_inside and number == block.line) or (block.ends_inside and number == last)
        )
        if line and not line.isspace():
            _append(line, f"{block.path}:{number}", groups[-1], report, splitter)
        elif whole and (groups[-1] or len(groups) == 1):
            groups.append([])


def _decoded_lines(block: _Block, report: Skipped) -> list[str | None]:
    raw = block.lines[:-1] if block.lines.endswith(b"\n") else block.lines
    if b"\0" not in raw:
        try:
            return list(raw.decode("utf-8").split("\n"))
        except UnicodeDecodeError:
            pass
    lines = enumerate(raw.split(b"\n"), block.line)
    return [_decoded(line, f"{block.path}:{number}", report) for number, line in lines]


def _decoded(raw: bytes, where: str, report: Skipped) -> str | None:
    if b"\0" in raw:
        report.skip(NUL_BYTE, where, len(raw) + 1)
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        report.skip(INVALID_UTF8, where, len(raw) + 1)
        return None


def _record_text(raw: bytes, where: str, report: Skipped) -> str | None:
    line = _decoded(raw, where, report)
    if line is None:
        return None
    try:
        text = _text_of(json.loads(line))
    except (ValueError, RecursionError):
        text = None
    if text is None:
        report.skip(NO_TEXT, where, len(raw) + 1)
    return text


def _record(
    text: str | None,
    size: int,
    where: str,
    groups: list[list[str]],
    report: Skipped,
    splitter: str,
) -> None:
    groups.append([])
    if text is None:
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # an escaped half of a surrogate pair
        report.skip(INVALID_UTF8, where, size)
        return
    for line in _NEWLINES.sub("\n", text).split("\n"):
        if "\0" in line:
            report.skip(NUL_BYTE, where, len(line))
        elif line and not line.isspace():
            _append(line, where, groups[-1], report, splitter)


def _documents(
    parsed: Iterable[list[list[str]]], report: Skipped
) -> Iterator[tuple[list[str], bool]]:
    document: list[str] = []
    size, continues = 0, False
    for groups in parsed:
        for number, group in enumerate(groups):
            if number:
                if document:
                    yield document, continues
                document, size, continues = [], 0, False
            length = sum(map(len, group))
            if size + length < MAX_DOCUMENT:
                document += group
                size += length
                continue
            for sentence in group:
                document.append(sentence)
                size += len(sentence)
                if size >= MAX_DOCUMENT:
                    report.note(
                        f"documents of more than {MAX_DOCUMENT:,} characters were cut in two"
                    )
                    yield document, continues
                    document, size, continues = [], 0, True
    if document:
        yield document, continues


def _append(text: str, where: str, group: list[str], report: Skipped, splitter: str) -> None:
    """Adds the sentences of a text."""
    if splitter == AUTO:
        splitter, script = script_of(text)
        if script:
            report.note(f"{script} text was split into sentences by sentencex")
    for sentence in split_sentences(text, splitter):
        if len(sentence) <= MAX_SENTENCE:
            group.append(sentence)
        else:
            group.extend(_cut(" ".join(sentence.split()), where, report))


def _cut(sentence: str, where: str, report: Skipped) -> Iterator[str]:
    start = 0
    while len(sentence) - start > MAX_SENTENCE:
        end = sentence.rfind(" ", start, start + MAX_SENTENCE + 1)
        if end > start:
            yield sentence[start:end]
        else:
            report.skip(UNBROKEN, where)
            end = sentence.find(" ", start + MAX_SENTENCE)
            report.unbroken += len(sentence[start : end if end >= 0 else None].encode())
            if end < 0:
                return
        start = end + 1
    yield sentence[start:]


# The corpus that every Python brings along: its language reference and its docstrings.

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_NOT_LIBRARY |= {"pydoc_data"}  # its one file is the topics, which are read as such


def stdlib_files() -> Iterator[str]:
    """Sources of the standard library, sorted; none where Python came without them."""
    for parent, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
        folders[:] = sorted(name for name in folders if name not in _NOT_LIBRARY)
        yield from (os.path.join(parent, name) for name in sorted(names) if name.endswith(".py"))


def _builtin(report: Skipped, progress: Progress) -> Iterator[list[list[str]]]:
    topics = _topics()
    for name in sorted(topics):
        yield [list(_prose(topics[name], f"topic {name}", report)), []]
    found = False
    for path in stdlib_files():
        docstrings = _docstrings(path, report, progress)
        found = found or bool(docstrings)
        yield [[s for docstring in docstrings for s in _prose(docstring, path, report)], []]
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
            sentences: list[str] = []
            _append(" ".join(paragraph), where, sentences, report, OURS)
            yield from sentences
            paragraph = []
        if not ends:
            paragraph.append(line)
