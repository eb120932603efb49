"""Tokenized documents on disk, memory-mapped; written to a temporary folder and renamed when whole.

A folder holds meta.json and, for each split, the tokens ({split}-00000.bin, ...), where each
sentence starts among them ({split}-sentences.npy), and where each document starts among the
sentences ({split}-documents.npy). Both offsets end with the total.
"""

import bisect
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fastbert.data.corpus import (
    BUILTIN,
    NO_TOKENS,
    Skipped,
    corpus_bytes,
    corpus_files,
    read_corpus,
)
from fastbert.data.tokenize import WordPiece
from fastbert.errors import RunError, UserError

FORMAT = 1
SPLITS = ("train", "validation")
SHARD_TOKENS = 2**28
"""Tokens after which a new file begins, at the next document."""
ENCODE_CHARS = 2**20
"""Characters given to the tokenizer at once."""


@dataclass(frozen=True)
class ShardStats:
    """What was written.

    Attributes:
        documents, sentences, tokens: counts by split.
        unknown: tokens that are [UNK].
        source_bytes: bytes of text read.
        seconds: wall-clock time it took.
        skipped: what was left out, one line each.
    """

    documents: dict[str, int]
    sentences: dict[str, int]
    tokens: dict[str, int]
    unknown: int
    source_bytes: int
    seconds: float
    skipped: list[str]


def fingerprint(source: str, tokenizer: WordPiece, *, validation_fraction: float, seed: int) -> str:
    """Returns a hash of all that decides what `build_shards` writes.

    Files count by name within the source, size and time of change, and are not read.

    Raises:
        UserError: the source is missing or unreadable.
    """
    root = source if os.path.isdir(source) else os.path.dirname(source)
    files = []
    for path in corpus_files(source):
        status = os.stat(path)
        if source == BUILTIN:
            files.append((os.path.basename(path), status.st_size, 0))
        else:
            files.append((os.path.relpath(path, root or "."), status.st_size, status.st_mtime_ns))
    version = sys.version if source == BUILTIN else ""
    decisive = [FORMAT, version, files, tokenizer.digest, validation_fraction, seed]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def shards_fingerprint(folder: str | os.PathLike[str]) -> str | None:
    """Returns the fingerprint of the shards in a folder, None where there are none.

    Raises:
        RunError: the folder's meta.json is damaged.
    """
    if not os.path.exists(os.path.join(folder, "meta.json")):
        return None
    return str(read_meta(folder)["fingerprint"])


def build_shards(
    source: str,
    tokenizer: WordPiece,
    folder: str | os.PathLike[str],
    *,
    validation_fraction: float,
    seed: int,
    progress: bool,
) -> ShardStats:
    """Reads, tokenizes and splits a corpus, and puts the shards in `folder`.

    A document goes to validation by a hash of its index and the seed. Where there are at least two
    documents, each split gets one; a single document is divided, its last sentences validating.

    Args:
        source: as in `read_corpus`.
        tokenizer: makes the ids.
        folder: replaced if it holds shards; nothing appears under this name before all is written.
        validation_fraction: share of documents held out, in [0, 1); 0 holds out none.
        seed: of the split.
        progress: whether to show a bar on stderr.

    Raises:
        UserError: nothing usable in the source, too small to be split, or `folder` holds
            something else.
        RunError: the disk is full or refuses to be written.
    """
    folder = os.path.abspath(folder)
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction = {validation_fraction} must be at least 0, below 1")
    if os.path.lexists(folder) and not _replaceable(folder):
        raise UserError(f"{folder}: exists and holds no shards; name another folder or remove it")
    started = time.perf_counter()
    key = fingerprint(source, tokenizer, validation_fraction=validation_fraction, seed=seed)
    parent, name = os.path.split(folder)
    work = os.path.join(parent, f".{name}.tmp-{os.getpid()}")
    try:
        os.makedirs(parent, exist_ok=True)
        _remove_stale(parent, name)
        os.mkdir(work)
        stats = _write(source, tokenizer, work, validation_fraction, seed, progress, key, started)
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
    return not os.listdir(folder) or os.path.exists(os.path.join(folder, "meta.json"))


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


class _SplitWriter:
    def __init__(self, folder: str, split: str, dtype: np.dtype[Any]) -> None:
        self._prefix = os.path.join(folder, split)
        self._dtype = dtype
        self._file: BinaryIO | None = None
        self._sentence_file = open(f"{self._prefix}-sentences.raw", "wb")  # noqa: SIM115
        self._document_file = open(f"{self._prefix}-documents.raw", "wb")  # noqa: SIM115
        self.shards: list[int] = []
        self.tokens = self.sentences = self.documents = 0

    def add(self, document: Document) -> None:
        if self._file is None or self.shards[-1] >= SHARD_TOKENS:
            self._next_shard()
        assert self._file is not None
        lengths = np.array([len(sentence) for sentence in document], dtype=np.int64)
        ids = np.fromiter(chain.from_iterable(document), self._dtype, int(lengths.sum()))
        self._file.write(ids.tobytes())
        self._sentence_file.write((self.tokens + np.cumsum(lengths) - lengths).tobytes())
        self._document_file.write(np.int64(self.sentences).tobytes())
        self.shards[-1] += len(ids)
        self.tokens += len(ids)
        self.sentences += len(document)
        self.documents += 1

    def _next_shard(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = open(f"{self._prefix}-{len(self.shards):05d}.bin", "wb")  # noqa: SIM115
        self.shards.append(0)

    def close(self) -> None:
        """Closes the files whatever state they are in; `finish` is what makes them whole."""
        for file in (self._file, self._sentence_file, self._document_file):
            if file is not None:
                file.close()

    def finish(self) -> None:
        self._sentence_file.write(np.int64(self.tokens).tobytes())
        self._document_file.write(np.int64(self.sentences).tobytes())
        self.close()
        for kind in ("sentences", "documents"):
            raw = f"{self._prefix}-{kind}.raw"
            offsets = np.memmap(raw, dtype=np.int64, mode="r")
            np.save(f"{self._prefix}-{kind}.npy", offsets, allow_pickle=False)
            os.remove(raw)


def _write(
    source: str,
    tokenizer: WordPiece,
    work: str,
    validation_fraction: float,
    seed: int,
    progress: bool,
    key: str,
    started: float,
) -> ShardStats:
    report = Skipped()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    writers = {split: _SplitWriter(work, split, dtype) for split in SPLITS}
    total = corpus_bytes(source)
    bar = tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="tokenizing",
        disable=not progress,
        file=sys.stderr,
    )
    unknown = 0

    def counted() -> Iterator[Document]:
        nonlocal unknown
        tokens = 0
        documents = read_corpus(source, report, bar.update)
        for document in _encoded(documents, tokenizer, report, source):
            tokens += sum(map(len, document))
            unknown += sum(sentence.count(tokenizer.unk_id) for sentence in document)
            rate = tokens / (time.perf_counter() - started)
            bar.set_postfix_str(f"{rate / 1e6:.2f}M tokens/s", refresh=False)
            yield document

    try:
        with bar:
            _split(counted(), writers, validation_fraction, seed, source)
        for writer in writers.values():
            writer.finish()
    finally:
        for writer in writers.values():
            writer.close()
    stats = ShardStats(
        documents={split: writers[split].documents for split in SPLITS},
        sentences={split: writers[split].sentences for split in SPLITS},
        tokens={split: writers[split].tokens for split in SPLITS},
        unknown=unknown,
        source_bytes=total,
        seconds=time.perf_counter() - started,
        skipped=report.summary(),
    )
    meta = {
        "format": FORMAT,
        "dtype": dtype.name,
        "shards": {split: writers[split].shards for split in SPLITS},
        "vocab_size": tokenizer.vocab_size,
        "vocab_digest": tokenizer.digest,
        "fingerprint": key,
        "stats": asdict(stats),
    }
    with open(os.path.join(work, "meta.json"), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=2)
    return stats


def _encoded(
    documents: Iterable[list[str]], tokenizer: WordPiece, report: Skipped, source: str
) -> Iterator[Document]:
    """Yields documents as ids, many small ones encoded together."""
    waiting: list[list[str]] = []
    chars = count = 0

    def flush() -> Iterator[Document]:
        nonlocal count
        ids = _encode([sentence for document in waiting for sentence in document], tokenizer)
        for document in waiting:
            count += 1
            sentences = [next(ids) for _ in document]
            sentences = [sentence for sentence in sentences if sentence]
            if sentences:
                yield sentences
            else:
                report.skip(NO_TOKENS, f"document {count} of {source}")
        waiting.clear()

    for document in documents:
        waiting.append(document)
        chars += sum(map(len, document))
        if chars >= ENCODE_CHARS:
            yield from flush()
            chars = 0
    yield from flush()


def _encode(sentences: list[str], tokenizer: WordPiece) -> Iterator[list[int]]:
    start = chars = 0
    for end, sentence in enumerate(sentences, start=1):
        chars += len(sentence)
        if chars >= ENCODE_CHARS or end == len(sentences):
            yield from tokenizer.encode_batch(sentences[start:end])
            start, chars = end, 0


def _held_out(index: int, validation_fraction: float, seed: int) -> bool:
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < validation_fraction * 2**64


def _split(
    documents: Iterator[Document],
    writers: dict[str, _SplitWriter],
    validation_fraction: float,
    seed: int,
    source: str,
) -> None:
    """Writes each document to its split; the first waits until the end, for a split left empty."""
    first = next(documents, None)
    if first is None:
        raise UserError(f"{source}: no document gives a token with this vocabulary")
    train, validation = writers["train"], writers["validation"]
    for index, document in enumerate(documents, start=1):
        held_out = _held_out(index, validation_fraction, seed)
        (validation if held_out else train).add(document)
    if validation_fraction == 0 or (validation.documents and not train.documents):
        train.add(first)
    elif not validation.documents and train.documents:
        validation.add(first)
    elif train.documents:
        (validation if _held_out(0, validation_fraction, seed) else train).add(first)
    elif len(first) < 2:
        raise UserError(
            f"{source}: a single sentence cannot be split into training and validation; "
            "give more text"
        )
    else:
        tokens = np.cumsum([len(sentence) for sentence in first])
        cut = int(np.searchsorted(tokens, (1 - validation_fraction) * tokens[-1], side="right"))
        cut = min(max(cut, 1), len(first) - 1)
        train.add(first[:cut])
        validation.add(first[cut:])


def read_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the meta.json of shards.

    Raises:
        RunError: it is missing, damaged, or of another format.
    """
    path = os.path.join(folder, "meta.json")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        if meta["format"] != FORMAT:
            raise RunError(
                f"{path}: has format {meta['format']}, this version reads {FORMAT}; "
                f"delete {os.fspath(folder)} so that it is built again"
            )
        if not {"dtype", "shards", "vocab_size", "fingerprint", "stats"} <= set(meta):
            raise KeyError
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _damaged(path) from None
    return dict(meta)


def _damaged(path: str) -> RunError:
    folder = os.path.dirname(path)
    return RunError(f"{path}: is damaged or cut short; delete {folder} so that it is built again")


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
        """Opens a split without reading its tokens.

        Raises:
            RunError: a file is missing, damaged or cut short.
        """
        folder = os.fspath(folder)
        meta = read_meta(folder)
        prefix = os.path.join(folder, split)
        try:
            sizes = [int(size) for size in meta["shards"][split]]
            counts = [int(meta["stats"][kind][split]) for kind in ("sentences", "documents")]
            dtype = np.dtype(meta["dtype"])
            vocab_size = int(meta["vocab_size"])
        except (KeyError, TypeError, ValueError):
            raise _damaged(os.path.join(folder, "meta.json")) from None
        paths = [f"{prefix}-{index:05d}.bin" for index in range(len(sizes))]
        shards = [_map_tokens(path, dtype, size) for path, size in zip(paths, sizes, strict=True)]
        sentences = _map_offsets(f"{prefix}-sentences.npy", counts[0], sum(sizes))
        documents = _map_offsets(f"{prefix}-documents.npy", counts[1], counts[0])
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return cls(folder, split, vocab_size, sentences, documents, meta, shards, starts)

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
    except (ValueError, EOFError, FileNotFoundError):
        raise _damaged(path) from None
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from None
    whole = offsets.shape == (count + 1,) and offsets.dtype == np.int64
    # ascending strictly: an empty sentence or document is never written
    if not whole or offsets[0] != 0 or offsets[-1] != total or not np.all(np.diff(offsets) > 0):
        raise _damaged(path)
    return np.asarray(offsets)
