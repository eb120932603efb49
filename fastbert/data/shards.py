"""Tokenized documents on disk, memory-mapped; written to a temporary folder and renamed when whole.

A folder holds meta.json and, for each split, the tokens ({split}-00000.bin, ...), where each
sentence starts among them ({split}-sentences.npy), and where each document starts among the
sentences ({split}-documents.npy). Both offsets end with the total. meta.json holds the CRC-32 of
each of these files and a digest of itself; sources.json spares reading sources that lie untouched.
"""

import bisect
import contextlib
import errno
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbert.data.corpus import (
    BUILTIN,
    NO_TOKENS,
    Content,
    Contents,
    Skipped,
    content_digest,
    corpus_bytes,
    corpus_files,
    read_pieces,
)
from fastbert.data.parallel import available_cores
from fastbert.data.sentences import AUTO
from fastbert.data.tokenize import WordPiece
from fastbert.errors import RunError, UserError
from fastbert.progress import progress_bar

FORMAT = 2
SPLITS = ("train", "validation")
SHARD_TOKENS = 2**28
"""Tokens after which a new file begins, at the next document."""
ENCODE_CHARS = 2**20
"""Characters given to the tokenizer at once."""
BOUND = 2
"""Factor by which the share of tokens held out may miss what was asked for, where documents allow.
The hash of documents alone gives 3 times the share in one of 20 corpora of 20 equal documents."""
CUT_SENTENCES = 1_000
"""Sentences of a document, a book, that may be divided where whole documents are too large."""
VERIFY_CHUNK = 2**24
"""Bytes of a file whose sum is taken between two updates of the bar."""


@dataclass(frozen=True)
class ShardStats:
    """What was written.

    Attributes:
        documents, sentences, tokens: counts by split.
        unknown: tokens that are [UNK].
        characters: of all sentences.
        unknown_characters: of the words that became [UNK].
        source_bytes: bytes of text read.
        seconds: wall-clock time it took.
        skipped: what was left out, one line each.
    """

    documents: dict[str, int]
    sentences: dict[str, int]
    tokens: dict[str, int]
    unknown: int
    characters: int
    unknown_characters: int
    source_bytes: int
    seconds: float
    skipped: list[str]


def fingerprint(
    source: str,
    tokenizer: WordPiece,
    *,
    validation_fraction: float,
    seed: int,
    splitter: str = AUTO,
    folder: str | os.PathLike[str] | None = None,
) -> str:
    """Returns a hash of all that decides what `build_shards` writes.

    Files count by their content. One is read unless `folder`, built from it earlier, knows its
    content for the size and the times that it still has.

    Raises:
        UserError: the source is missing or unreadable.
    """
    contents: Contents = {}
    if source != BUILTIN:
        known = {} if folder is None else _known_contents(folder)
        for path in corpus_files(source):
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be read ({error.strerror})") from None
            stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns
            old = known.get(_name(path, source))
            digest = old.digest if old and old[:3] == stamp else content_digest(path)
            contents[path] = Content(*stamp, digest)
        found = {_name(path, source): content for path, content in contents.items()}
        touched = found != known and (not known or _digests(found) == _digests(known))
        if folder is not None and touched:
            with contextlib.suppress(OSError):  # they would only be read again the next time
                _write_contents(os.fspath(folder), contents, source)
    return _fingerprint(source, contents, tokenizer, validation_fraction, seed, splitter)


def _digests(contents: Contents) -> dict[str, str]:
    return {name: content.digest for name, content in contents.items()}


def _fingerprint(
    source: str,
    contents: Contents,
    tokenizer: WordPiece,
    validation_fraction: float,
    seed: int,
    splitter: str,
) -> str:
    if source == BUILTIN:
        files = [
            (os.path.basename(path), os.path.getsize(path), "") for path in corpus_files(source)
        ]
    else:
        files = [
            (_name(path, source), found.size, found.digest) for path, found in contents.items()
        ]
    version = sys.version if source == BUILTIN else ""
    decisive = [
        FORMAT,
        version,
        sorted(files),
        tokenizer.digest,
        validation_fraction,
        seed,
        splitter,
    ]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def _name(path: str, source: str) -> str:
    """A file by its name within the source; of a single one only the suffix tells anything."""
    if os.path.isdir(source):
        return os.path.relpath(path, source)
    return os.path.splitext(path)[1].lower()


def _write_contents(folder: str, contents: Contents, source: str) -> None:
    files = {_name(path, source): list(found) for path, found in contents.items()}
    temporary = os.path.join(folder, ".sources.json.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(_signed({"files": files}), file)
    os.replace(temporary, os.path.join(folder, "sources.json"))


def _known_contents(folder: str | os.PathLike[str]) -> Contents:
    """Returns what sources.json tells, nothing where it is missing or damaged."""
    try:
        with open(os.path.join(folder, "sources.json"), encoding="utf-8") as file:
            known = json.load(file)
        if known != _signed(known):
            return {}
        return {name: Content(*found) for name, found in known["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _signed(content: dict[str, Any]) -> dict[str, Any]:
    """Returns an object for a JSON file with a digest of itself."""
    content = {name: value for name, value in content.items() if name != "digest"}
    text = json.dumps(content, sort_keys=True)
    return {**content, "digest": hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()}


class Found(NamedTuple):
    """The shards in a folder, every byte of which has been looked at.

    Attributes:
        meta: the content of meta.json, None where that is missing, damaged or of another format.
        damage: what is wrong, "" where nothing is.
        digest: of the files as they are.
    """

    meta: dict[str, Any] | None
    damage: str
    digest: str


Files = dict[str, list[Any]]
"""Name of a file -> its bytes and its CRC-32 in hexadecimal."""


def files_digest(files: Files) -> str:
    """Returns a digest of all tokens and offsets by the sums of their files, "" without files."""
    if not files:
        return ""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def examine_shards(folder: str | os.PathLike[str]) -> Found | None:
    """Compares every file with what was written; None where nothing is.

    A CRC-32 finds every flip of up to two bits and every burst of 32, and leaves one of 4 billion
    other damages undiscovered. It takes a core 0.4 s for 1 GB here, SHA-256 0.7 s; files are read
    side by side.

    Raises:
        RunError: a file cannot be read.
    """
    folder = os.fspath(folder)
    try:
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    except OSError as error:
        raise RunError(f"{folder}: cannot be read ({error.strerror})") from None
    if not names:
        return None
    path = os.path.join(folder, "meta.json")
    meta, damage = None, ""
    try:
        meta = read_meta(folder)
    except DamagedShardsError as error:
        damage = error.what
    if not os.path.exists(path):
        damage = f"{path} is missing"
    expected: Files = meta["files"] if meta else {}
    present = [
        name
        for name in names
        if _IS_DATA.fullmatch(name) and os.path.isfile(os.path.join(folder, name))
    ]
    files = _sums(folder, present)
    for name, (size, crc) in expected.items():
        path = os.path.join(folder, name)
        if name not in files:
            damage = damage or f"{path} is missing"
        elif files[name][0] != size:
            damage = damage or f"{path} has {files[name][0]:,} bytes of {size:,}"
        elif files[name][1] != crc:
            damage = damage or f"{path} is damaged: its bytes are not those that were written"
    return Found(meta, damage, files_digest(files))


_IS_DATA = re.compile(r"(?:train|validation)-(?:[0-9]{5,}\.bin|(?:sentences|documents)\.npy)")


def _sums(folder: str, names: list[str]) -> Files:
    paths = [os.path.join(folder, name) for name in names]
    try:
        total = sum(map(os.path.getsize, paths))
        with (
            progress_bar(total=total, unit="B", unit_scale=True, desc="verifying")
            if total >= 2**31
            else contextlib.nullcontext()
        ) as bar:

            def summed(path: str) -> list[Any]:
                crc, size = 0, os.path.getsize(path)
                if size:
                    with (
                        open(path, "rb") as file,
                        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
                    ):
                        for start in range(0, size, VERIFY_CHUNK):
                            with memoryview(content) as view, view[start:][:VERIFY_CHUNK] as chunk:
                                crc = zlib.crc32(chunk, crc)
                                if bar is not None:
                                    bar.update(len(chunk))
                return [size, f"{crc:08x}"]

            with ThreadPoolExecutor(min(available_cores(), 8)) as pool:
                return dict(zip(names, pool.map(summed, paths), strict=True))
    except OSError as error:
        raise RunError(f"{error.filename}: cannot be read ({error.strerror})") from None


def build_shards(
    source: str,
    tokenizer: WordPiece,
    folder: str | os.PathLike[str],
    *,
    validation_fraction: float,
    seed: int,
    progress: bool,
    splitter: str = AUTO,
    expected: str = "",
) -> ShardStats:
    """Reads, tokenizes and splits a corpus, and puts the shards in `folder`.

    A document goes to validation by a hash of its index and the seed. Where that misses the share
    of tokens by more than `BOUND`, documents are chosen by their sizes, in the order of their
    hashes. Only a document that is most of the corpus, or a book where whole ones are too large,
    is divided, its last sentences validating.

    Args:
        source: as in `read_corpus`.
        tokenizer: makes the ids.
        folder: replaced if it holds shards; nothing appears under this name before all is written.
        validation_fraction: share of tokens held out, in [0, 1); 0 holds out none.
        seed: of the split.
        progress: whether to show a bar on stderr.
        splitter: of lines into sentences, as in `split_sentences`.
        expected: `files_digest` that the files must have, where they were there before.

    Raises:
        UserError: nothing usable in the source, too small to be split, not what `expected` says,
            or `folder` holds something else.
        RunError: the disk is full or refuses to be written.
    """
    folder = os.path.abspath(folder)
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction = {validation_fraction} must be at least 0, below 1")
    if os.path.lexists(folder) and not _replaceable(folder):
        raise UserError(f"{folder}: exists and holds no shards; name another folder or remove it")
    started = time.perf_counter()
    parent, name = os.path.split(folder)
    work = os.path.join(parent, f".{name}.tmp-{os.getpid()}")
    try:
        os.makedirs(parent, exist_ok=True)
        _remove_stale(parent, name)
        os.mkdir(work)
        stats = _write(
            source, tokenizer, work, validation_fraction, seed, progress, splitter, started
        )
        if expected and files_digest(read_meta(work)["files"]) != expected:
            raise UserError(
                f"{source}: does not give the tokens again that {folder} held: put it back as it "
                "was, or start a new run with another --out"
            )
        _publish(work, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"{folder}: no space left on the disk; free some and start again"
            ) from None
        raise RunError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return stats


def _replaceable(folder: str) -> bool:
    if not os.path.isdir(folder):
        return False
    names = os.listdir(folder)
    return not names or any(name == "meta.json" or _IS_DATA.fullmatch(name) for name in names)


def _remove_stale(parent: str, name: str) -> None:
    """Removes what builds that were killed left behind."""
    for entry in os.listdir(parent):
        for mark in (f".{name}.tmp-", f".{name}.old-"):
            owner = entry.removeprefix(mark)
            if entry != owner and owner.isdigit() and not _runs_elsewhere(int(owner)):
                shutil.rmtree(os.path.join(parent, entry), ignore_errors=True)


def _runs_elsewhere(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _publish(work: str, folder: str) -> None:
    """Renames `work` to `folder`; a kill in between leaves either shards that are whole or none."""
    old = f"{os.path.dirname(work)}/.{os.path.basename(folder)}.old-{os.getpid()}"
    if os.path.isdir(folder) and os.listdir(folder):
        os.replace(folder, old)
    os.replace(work, folder)
    shutil.rmtree(old, ignore_errors=True)


Document = list[list[int]]
"""Token ids by sentence."""


class _SummedFile:
    """A file written from front to back, and the CRC-32 of what was written."""

    def __init__(self, path: str) -> None:
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115
        self._size = self._crc = 0

    def write(self, content: bytes) -> int:
        self._crc = zlib.crc32(content, self._crc)
        self._size += len(content)
        return self._file.write(content)

    def close(self) -> None:
        self._file.close()

    @property
    def sums(self) -> list[Any]:
        return [self._size, f"{self._crc:08x}"]


class _SplitWriter:
    def __init__(self, folder: str, split: str, dtype: np.dtype[Any]) -> None:
        self._folder, self._split = folder, split
        self._dtype = dtype
        self._file: _SummedFile | None = None
        self._sentence_file = open(self._path("sentences.raw"), "wb")  # noqa: SIM115
        self._document_file = open(self._path("documents.raw"), "wb")  # noqa: SIM115
        self.shards: list[int] = []
        self.tokens = self.sentences = self.documents = 0
        self.files: Files = {}
        """Of what is whole."""

    def _path(self, end: str) -> str:
        return os.path.join(self._folder, f"{self._split}-{end}")

    def add(self, document: Document) -> None:
        lengths = np.array([len(sentence) for sentence in document], dtype=np.int64)
        ids = np.fromiter(chain.from_iterable(document), self._dtype, int(lengths.sum()))
        self.add_ids(ids, lengths)

    def add_ids(self, ids: NDArray[Any], lengths: NDArray[np.int64]) -> None:
        """Adds a document of `lengths` tokens by sentence."""
        if self._file is None or self.shards[-1] >= SHARD_TOKENS:
            self._next_shard()
        assert self._file is not None
        self._file.write(ids.tobytes())
        self._sentence_file.write((self.tokens + np.cumsum(lengths) - lengths).tobytes())
        self._document_file.write(np.int64(self.sentences).tobytes())
        self.shards[-1] += len(ids)
        self.tokens += len(ids)
        self.sentences += len(lengths)
        self.documents += 1

    def _next_shard(self) -> None:
        self._end_shard()
        self._file = _SummedFile(self._path(f"{len(self.shards):05d}.bin"))
        self.shards.append(0)

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            self.files[f"{self._split}-{len(self.shards) - 1:05d}.bin"] = self._file.sums

    def close(self) -> None:
        """Closes the files whatever state they are in; `finish` is what makes them whole."""
        for file in (self._file, self._sentence_file, self._document_file):
            if file is not None:
                file.close()

    def finish(self) -> None:
        self._sentence_file.write(np.int64(self.tokens).tobytes())
        self._document_file.write(np.int64(self.sentences).tobytes())
        self._end_shard()
        self.close()
        for kind in ("sentences", "documents"):
            raw, path = self._path(f"{kind}.raw"), self._path(f"{kind}.npy")
            offsets = np.memmap(raw, dtype=np.int64, mode="r")
            with contextlib.closing(_SummedFile(path)) as file:
                np.save(file, offsets, allow_pickle=False)
            self.files[os.path.basename(path)] = file.sums
            os.remove(raw)


@contextlib.contextmanager
def _split_writers(folder: str, dtype: np.dtype[Any]) -> Iterator[dict[str, _SplitWriter]]:
    """A writer for each split; what they have written is whole once the block ends."""
    with contextlib.ExitStack() as stack:
        writers = {split: _SplitWriter(folder, split, dtype) for split in SPLITS}
        for writer in writers.values():
            stack.callback(writer.close)
        yield writers
        for writer in writers.values():
            writer.finish()


def _write(
    source: str,
    tokenizer: WordPiece,
    work: str,
    validation_fraction: float,
    seed: int,
    progress: bool,
    splitter: str,
    started: float,
) -> ShardStats:
    report = Skipped()
    contents: Contents = {}
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    total = corpus_bytes(source)
    bar = progress_bar(
        total=total,
        unit="B",
        unit_scale=True,
        desc="tokenizing",
        disable=not progress,
    )
    counts: Counter[str] = Counter()

    def counted() -> Generator[tuple[Document, bool], None, None]:
        tokens = 0
        documents = read_pieces(source, report, bar.update, splitter=splitter, contents=contents)
        for document, continues in _encoded(documents, tokenizer, report, source, counts):
            tokens += sum(map(len, document))
            rate = tokens / (time.perf_counter() - started)
            bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
            yield document, continues

    with bar, contextlib.closing(counted()) as documents:
        division = _Division(work, dtype, validation_fraction, seed, source, report)
        writers = _split(documents, division)
    stats = ShardStats(
        documents={split: writers[split].documents for split in SPLITS},
        sentences={split: writers[split].sentences for split in SPLITS},
        tokens={split: writers[split].tokens for split in SPLITS},
        unknown=counts["unknown"],
        characters=counts["characters"],
        unknown_characters=counts["unknown_characters"],
        source_bytes=total,
        seconds=time.perf_counter() - started,
        skipped=report.summary(),
    )
    meta = {
        "dtype": dtype.name,
        "shards": {split: writers[split].shards for split in SPLITS},
        "vocab_size": tokenizer.vocab_size,
        "vocab_digest": tokenizer.digest,
        "fingerprint": _fingerprint(
            source, contents, tokenizer, validation_fraction, seed, splitter
        ),
        "stats": asdict(stats),
        "files": {name: sums for split in SPLITS for name, sums in writers[split].files.items()},
    }
    write_meta(work, meta)
    _write_contents(work, contents, source)
    return stats


def write_meta(folder: str | os.PathLike[str], meta: dict[str, Any]) -> None:
    """Writes meta.json with the format and a digest of itself."""
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as file:
        json.dump(_signed({"format": FORMAT, **meta}), file, indent=2)


def _encoded(
    documents: Iterable[tuple[list[str], bool]],
    tokenizer: WordPiece,
    report: Skipped,
    source: str,
    counts: Counter[str],
) -> Iterator[tuple[Document, bool]]:
    """Yields documents as ids, many small ones encoded together, and whether one continues."""
    waiting: list[tuple[list[str], bool]] = []
    chars = count = 0
    begun = False

    def flush() -> Iterator[tuple[Document, bool]]:
        nonlocal count, begun
        texts = [sentence for document, _ in waiting for sentence in document]
        ids = _encode(texts, tokenizer, counts)
        for document, continues in waiting:
            count += not continues
            begun = begun and continues
            sentences = [next(ids) for _ in document]
            sentences = [sentence for sentence in sentences if sentence]
            if sentences:
                yield sentences, begun
                begun = True
            else:
                report.skip(NO_TOKENS, f"document {count} of {source}")
        waiting.clear()

    for document, continues in documents:
        waiting.append((document, continues))
        chars += sum(map(len, document))
        if chars >= ENCODE_CHARS:
            yield from flush()
            chars = 0
    yield from flush()


def _encode(
    sentences: list[str], tokenizer: WordPiece, counts: Counter[str]
) -> Iterator[list[int]]:
    start = chars = 0
    for end, sentence in enumerate(sentences, start=1):
        chars += len(sentence)
        if chars >= ENCODE_CHARS or end == len(sentences):
            texts = sentences[start:end]
            encoded = tokenizer.encode_batch(texts)
            unk = tokenizer.unk_id
            found = [(text, ids.count(unk)) for text, ids in zip(texts, encoded, strict=True)]
            unknown = [text for text, count in found if count]
            counts["characters"] += chars
            counts["unknown"] += sum(count for _, count in found)
            counts["unknown_characters"] += tokenizer.unknown_characters(unknown)
            yield from encoded
            start, chars = end, 0


def _hash(index: int, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _near(validation: float, train: float, validation_fraction: float) -> bool:
    """Whether each split has what was asked for, up to a factor of `BOUND`."""
    total = validation + train
    asked = (validation_fraction * total, (1 - validation_fraction) * total)
    return all(
        want / BOUND <= tokens <= want * BOUND
        for want, tokens in zip(asked, (validation, train), strict=True)
    )


@dataclass(frozen=True)
class _Division:
    """Where the splits are written, and how documents are divided among them."""

    work: str
    dtype: np.dtype[Any]
    validation_fraction: float
    seed: int
    source: str
    report: Skipped

    def holds_out(self, index: int) -> bool:
        """Whether a document is for validation, as far as its number tells."""
        return _hash(index, self.seed) < self.validation_fraction * 2**64


def _split(
    pieces: Iterator[tuple[Document, bool]], division: _Division
) -> dict[str, _SplitWriter]:
    """Writes each document to its split, and all anew where their sizes ask for another division.

    The first document comes last, so that it can go to a split left empty.
    """
    fraction = division.validation_fraction
    index_of = {split: array("q") for split in SPLITS}  # document of each piece written
    with _split_writers(division.work, division.dtype) as writers:

        def put(piece: Document, index: int, held_out: bool) -> None:
            split = SPLITS[held_out]
            writers[split].add(piece)
            index_of[split].append(index)

        first = next(pieces, None)
        if first is None:
            raise UserError(f"{division.source}: no document gives a token with this vocabulary")
        index = 0
        for piece, continues in pieces:
            if continues and index == 0 and first is not None:
                put(first[0], 0, division.holds_out(0))
                first = None
            index += not continues
            put(piece, index, division.holds_out(index))
        train, validation = writers["train"], writers["validation"]
        if first is not None:
            held_out = division.holds_out(0)
            if fraction and bool(train.documents) != bool(validation.documents):
                held_out = not validation.documents
            put(first[0], 0, held_out)
    if not fraction or (train.tokens and _near(validation.tokens, train.tokens, fraction)):
        return writers
    return _divided(writers, index_of, division)


def _divided(
    written: dict[str, _SplitWriter], index_of: dict[str, "array[int]"], division: _Division
) -> dict[str, _SplitWriter]:
    """Writes all documents anew, in the order of the source, divided by their sizes."""
    work, dtype = division.work, division.dtype
    old = [
        _map_split(work, split, dtype, writer.shards, writer.sentences, writer.documents)
        for split, writer in written.items()
    ]
    index = np.concatenate([np.asarray(index_of[split], dtype=np.int64) for split in SPLITS])
    place = np.repeat([0, 1], [len(index_of[split]) for split in SPLITS])
    number = np.concatenate([np.arange(len(index_of[split])) for split in SPLITS])
    sentences = np.concatenate([np.diff(shards.document_offsets) for shards in old])
    tokens = np.concatenate(
        [np.diff(shards.sentence_offsets[shards.document_offsets]) for shards in old]
    )
    held_out, cut, keep = _plan(
        np.bincount(index, weights=tokens),
        np.bincount(index, weights=sentences),
        division,
    )
    if cut >= 0:
        note = f"the end of document {cut + 1:,} is held out: whole ones are too large"
        division.report.note(note)
    last = np.flatnonzero(index == cut)[-1:].tolist()  # its last piece
    new = os.path.join(work, "divided")
    os.mkdir(new)
    with _split_writers(new, dtype) as writers:
        train, validation = writers["train"], writers["validation"]
        at_least = 1  # sentence of the divided document for training, and one for validation
        for piece in np.lexsort((number, index)).tolist():
            ids, lengths = old[place[piece]].document(int(number[piece]))
            if index[piece] != cut:
                writers[SPLITS[int(held_out[index[piece]])]].add_ids(ids, lengths)
                continue
            kept = int(np.searchsorted(np.cumsum(lengths), keep, side="right"))
            kept = min(max(kept, at_least), len(lengths) - ([piece] == last))
            split_at = int(lengths[:kept].sum())
            if kept:
                train.add_ids(ids[:split_at], lengths[:kept])
            if kept < len(lengths):
                validation.add_ids(ids[split_at:], lengths[kept:])
            keep -= len(ids)  # below 0 behind the cut
            at_least = 0
    for writer in written.values():
        for name in writer.files:
            os.remove(os.path.join(work, name))
    for writer in writers.values():
        for name in writer.files:
            os.replace(os.path.join(new, name), os.path.join(work, name))
    os.rmdir(new)
    return writers


def _plan(
    sizes: NDArray[Any],  # tokens of each document
    sentences: NDArray[Any],
    division: _Division,
) -> tuple[NDArray[np.bool_], int, float]:
    """Returns which documents are held out, and one that is divided (-1: none) behind how many
    tokens. Documents for the smaller split are taken by their hashes as far as they fit."""
    total, count = float(sizes.sum()), len(sizes)
    fraction = division.validation_fraction
    small = min(fraction, 1 - fraction)
    target = small * total
    order = sorted(range(count), key=lambda index: _hash(index, division.seed))
    chosen: set[int] = set()
    taken = 0.0
    for index in order:
        if taken + sizes[index] <= 1.25 * target:
            chosen.add(index)
            taken += sizes[index]
            if taken >= target / 1.25:
                break

    cut = -1
    if not _near(taken, total - taken, small):
        rest = [index for index in order if index not in chosen]
        sums = ((index, taken + sizes[index]) for index in rest)
        fits = next((index for index, both in sums if _near(both, total - both, small)), -1)
        largest = int(np.argmax(sizes))
        book = sizes[largest] > total / 2 or sentences[largest] >= CUT_SENTENCES
        if fits >= 0:
            chosen.add(fits)
        elif book and sentences[largest] > 1:
            cut = largest
        elif count == 1:
            raise UserError(
                f"{division.source}: a single sentence cannot be split into training and "
                "validation; give more text"
            )
        else:
            smallest = min(rest, key=lambda index: sizes[index])
            if not chosen or (taken + sizes[smallest]) * taken < target * target:  # nearer
                chosen.add(smallest)
    held_out = np.zeros(count, dtype=bool)
    held_out[list(chosen)] = True
    if fraction > 0.5:
        held_out = ~held_out
    trained = float(sizes[~held_out].sum()) - (sizes[cut] if cut >= 0 and not held_out[cut] else 0)
    return held_out, cut, (1 - fraction) * total - trained


class DamagedShardsError(RunError):
    """Shards of another format, or not as they were written; `what` without what to do."""

    def __init__(self, what: str, folder: str) -> None:
        super().__init__(f"{what}; delete {folder} so that it is built again")
        self.what = what


_META = {
    **{"dtype": str, "shards": dict, "vocab_size": int},
    **{"fingerprint": str, "stats": dict, "files": dict},
}


def read_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the meta.json of shards.

    Raises:
        RunError: it is missing, damaged, or of another format.
    """
    folder = os.fspath(folder)
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        if meta["format"] != FORMAT and isinstance(meta["format"], int):
            what = f"{path}: has format {meta['format']}, this version reads {FORMAT}"
            raise DamagedShardsError(what, folder)
        whole = meta == _signed(meta) and all(
            isinstance(meta[name], kind) for name, kind in _META.items()
        )
        if not whole:
            raise _damaged(path)
    except OSError as error:
        raise DamagedShardsError(f"{path}: cannot be read ({error.strerror})", folder) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damaged(path) from None
    return dict(meta)


def _damaged(path: str) -> RunError:
    return DamagedShardsError(f"{path}: is damaged or cut short", os.path.dirname(path))


@dataclass(frozen=True, eq=False)
class Shards:
    """One split of a folder of shards, memory-mapped.

    Attributes:
        folder: where it lies.
        split: "train" or "validation".
        vocab_size: V of the vocabulary that made the tokens.
        sentence_offsets: (num_sentences + 1,) int64, in tokens.
        document_offsets: (num_documents + 1,) int64, in sentences.
        meta: the content of meta.json.
    """

    folder: str
    split: str
    vocab_size: int
    sentence_offsets: NDArray[np.int64]
    document_offsets: NDArray[np.int64]
    meta: dict[str, Any] = field(repr=False)
    _shards: list[NDArray[Any]] = field(repr=False)
    _starts: list[int] = field(repr=False)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], split: str) -> "Shards":
        """Opens a split without reading its tokens; `examine_shards` does.

        Raises:
            RunError: a file is missing, damaged or cut short.
        """
        folder = os.fspath(folder)
        meta = read_meta(folder)
        try:
            sizes = [int(size) for size in meta["shards"][split]]
            counts = [int(meta["stats"][kind][split]) for kind in ("sentences", "documents")]
            dtype = np.dtype(meta["dtype"])
            vocab_size = int(meta["vocab_size"])
        except (KeyError, TypeError, ValueError):
            raise _damaged(os.path.join(folder, "meta.json")) from None
        return _map_split(folder, split, dtype, sizes, counts[0], counts[1], vocab_size, meta)

    @property
    def digest(self) -> str:
        """Of all tokens and offsets of both splits, "" where none was kept."""
        return files_digest(self.meta.get("files", {}))

    @property
    def num_documents(self) -> int:
        return len(self.document_offsets) - 1

    @property
    def num_sentences(self) -> int:
        return len(self.sentence_offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.sentence_offsets[-1])

    @property
    def sentence_lengths(self) -> NDArray[np.int64]:
        """(num_sentences,) tokens of each sentence."""
        return np.diff(self.sentence_offsets)

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Returns the ids of a document, and the tokens of each of its sentences."""
        first, last = self.document_offsets[index : index + 2].tolist()
        offsets = self.sentence_offsets[first : last + 1]
        return self.tokens(int(offsets[0]), int(offsets[-1])), np.diff(offsets)

    def tokens(self, start: int, end: int) -> NDArray[Any]:
        """Returns the ids of tokens `start` to `end` of one document, uint16 or uint32."""
        index = bisect.bisect_right(self._starts, start) - 1 if len(self._starts) > 1 else 0
        base = self._starts[index]
        return self._shards[index][start - base : end - base]

    def token_counts(self, V: int) -> NDArray[np.int64]:
        """Returns how often each id occurs, (V,) int64.

        Raises:
            RunError: an id is not below V, so a file is damaged or V belongs to other shards.
        """
        counts = np.zeros(V, dtype=np.int64)
        for shard in self._shards:
            for start in range(0, len(shard), 2**24):
                found = np.bincount(shard[start : start + 2**24], minlength=V)
                if len(found) > V:
                    raise self.damaged_id(len(found) - 1, V)
                counts += found
        return counts

    def damaged_id(self, found: int, V: int) -> RunError:
        """Returns the error for an id outside the vocabulary."""
        return RunError(
            f"{self.folder}: {self.split} tokens hold id {found}, but the vocabulary ends at "
            f"{V - 1}; delete the folder so that it is built again"
        )


def _map_split(
    folder: str,
    split: str,
    dtype: np.dtype[Any],
    sizes: list[int],  # tokens of each .bin file
    sentences: int,
    documents: int,
    vocab_size: int = 0,
    meta: dict[str, Any] | None = None,
) -> Shards:
    prefix = os.path.join(folder, split)
    paths = [f"{prefix}-{index:05d}.bin" for index in range(len(sizes))]
    shards = [_map_tokens(path, dtype, size) for path, size in zip(paths, sizes, strict=True)]
    sentence_offsets = _map_offsets(f"{prefix}-sentences.npy", sentences, sum(sizes))
    document_offsets = _map_offsets(f"{prefix}-documents.npy", documents, sentences)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return Shards(
        *(folder, split, vocab_size, sentence_offsets, document_offsets), meta or {}, shards, starts
    )


def _map_tokens(path: str, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    try:
        if os.path.getsize(path) != size * dtype.itemsize:
            raise _damaged(path)
        return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
    except FileNotFoundError:
        raise _damaged(path) from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None


def _map_offsets(path: str, count: int, total: int) -> NDArray[np.int64]:
    try:
        offsets = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise _damaged(path) from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception:  # the header is parsed as Python, and fails in as many ways
        raise _damaged(path) from None
    whole = offsets.shape == (count + 1,) and offsets.dtype == np.int64
    # ascending strictly: an empty sentence or document is never written
    if not whole or offsets[0] != 0 or offsets[-1] != total or not np.all(np.diff(offsets) > 0):
        raise _damaged(path)
    return np.asarray(offsets)
