import json
import os
import random
import resource
import sys
import time
from contextlib import nullcontext
from itertools import islice

import pytest

from fastbert.data import corpus
from fastbert.data.corpus import Skipped, corpus_bytes, read_corpus
from fastbert.data.sentences import split_sentences
from fastbert.errors import UserError


def read(path, report=None):
    return list(read_corpus(str(path), report if report is not None else Skipped()))


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ("It cost 3.5 or less. 7 did.", ["It cost 3.5 or less.", "7 did."]),
        ("e.g. Rome, i.e. Italy. Mr. Smith and Dr. No met.", None),
        ("so it goes. and on", None),
        ("J. R. R. Tolkien wrote.", None),
        ("Wait... What?!  Yes.", ["Wait...", "What?!", "Yes."]),
        ("\u4f60\u597d\u3002\u518d\u89c1\u3002", ["\u4f60\u597d\u3002", "\u518d\u89c1\u3002"]),
        ("   ", []),
    ],
)
def test_sentences(text, sentences):
    if sentences is None:
        pieces = split_sentences(text)
        assert " ".join(pieces) == text
        assert len(pieces) == 1 + ("Italy. Mr" in text)
    else:
        assert split_sentences(text) == sentences


def test_splitting_is_linear():
    for text in ("." * 10**6, '."' * 10**6, ". " * 10**6, "a" + " " * 10**6 + ".", "! \t" * 10**6):
        started = time.perf_counter()
        split_sentences(text)
        assert time.perf_counter() - started < 5


def test_blank_lines_separate_documents(tmp_path):
    path = write(tmp_path / "a.txt", "\n\nOne. Two.\nThree\r\n \t\r\n\nFour\n\n")
    assert read(path) == [["One.", "Two.", "Three"], ["Four"]]


def test_any_extension_is_text(tmp_path):
    assert read(write(tmp_path / "wiki", "a b")) == [["a b"]]


def test_jsonl_is_one_document_per_record(tmp_path):
    records = [{"text": "One. Two.\n\nThree", "id": 1}, {"text": "Four"}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    assert read(path) == [["One.", "Two.", "Three"], ["Four"]]


def test_broken_records_are_counted(tmp_path):
    lines = [
        b'{"text": "Good."}' + b" " * 200_000,
        b"{broken",
        b'{"text": 3}',
        b"[" * 100_000,
        b'"text"',
        b"",
        b'{"text": "half \\ud800 pair"}',
        b'{"text": "nul \\u0000 byte"}',
        b'{"text": "\xff"}',
    ]
    report = Skipped()
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    assert read(path, report) == [["Good."], ["text"]]
    assert report.counts == {corpus.NO_TEXT: 3, corpus.INVALID_UTF8: 2, corpus.NUL_BYTE: 1}
    assert report.first[corpus.NO_TEXT] == f"{path}:2"


def test_only_broken_records_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", "{}\n[]\n")
    with pytest.raises(UserError, match=r"holds no text \(skipped 2 JSON records .*a\.jsonl:1\)"):
        read(path)


def test_too_long_record(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_RECORD", 100)
    monkeypatch.setattr(corpus, "CHUNK", 16)
    short = b'{"text": "Short."}\n'
    path = write(tmp_path / "a.jsonl", b'{"text": "%s"}\n' % (b"x" * 500) + short * 40)
    report = Skipped()
    assert read(path, report) == [["Short."]] * 40
    assert report.counts == {corpus.LONG_RECORD: 1}


def test_folder_is_read_recursively_and_sorted(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / "b" / "x.md", "second")
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "c.jsonl", '{"text": "third"}')
    write(tmp_path / ".secret.txt", "no")
    write(tmp_path / ".hidden" / "y.txt", "no")
    write(tmp_path / "z.bin", "no")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    report = Skipped()
    assert sorted(read(tmp_path, report)) == [["first"], ["second"], ["third"]]
    assert read(tmp_path) == read(tmp_path)
    assert report.counts == {corpus.OTHER_FILE: 1}


def test_files_of_a_folder_are_separate_documents(tmp_path):
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "b.txt", "two")
    assert read(tmp_path) == [["one"], ["two"]]


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n", b"\xef\xbb\xbf", b"\xff\n\xfe\xfa\n"])
def test_nothing_to_read_is_an_error(tmp_path, content):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(UserError, match="holds no text"):
        read(path)


def test_missing_and_unsuited_sources(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt: does not exist; give"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match=r"holds no \.txt"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        read(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"holds no \.txt"):
        read(tmp_path)


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        read(path)


def test_bad_lines_are_counted_with_their_place(tmp_path):
    path = write(tmp_path / "a.txt", b"good line\nbad \xff\nnul \0\n\nbad \xc3\nlast line")
    report = Skipped()
    assert read(path, report) == [["good line"], ["last line"]]
    assert report.summary() == [
        f"skipped 2 lines with invalid UTF-8, first at {path}:2",
        f"skipped 1 line with a NUL byte, first at {path}:3",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_byte_order_marks(tmp_path, monkeypatch, encoding):
    monkeypatch.setattr(corpus, "CHUNK", 7)  # no character's size divides it
    text = "Größe \U0001f600 и 中文.\r\nTwo.\n\nThree."
    path = write(tmp_path / "a.txt", ("\ufeff" + text).encode(encoding))
    first, second = ("".join(document).replace(" ", "") for document in read(path))
    assert (first, second) == ("Größe\U0001f600и中文.Two.", "Three.")
    records = [{"text": "Größe."}, {"text": "Two."}]
    for content in (json.dumps(records, indent=1), "\n".join(map(json.dumps, records))):
        write(path, ("\ufeff" + content).encode(encoding))
        assert read(path) == [["Größe."], ["Two."]]


def test_invalid_utf_16_is_counted(tmp_path):
    lone, cut = "\ud800".encode("utf-16-le", "surrogatepass"), b"a"
    good = "Good lines.\n".encode("utf-16-le")
    path = write(tmp_path / "a.txt", b"\xff\xfe" + good * 9 + lone + b"\n\0" + good + cut)
    report = Skipped()
    assert read(path, report) == [["Good lines."] * 10]
    assert report.counts == {corpus.INVALID_UTF8: 2}


def test_long_sentence_is_cut_at_whitespace(tmp_path):
    words = ["w" * random.Random(n).randint(1, 30) for n in range(2_000)]
    pieces = read(write(tmp_path / "a.txt", " ".join(words)))[0]
    assert max(map(len, pieces)) <= 2_000
    assert " ".join(pieces) == " ".join(words)


def test_unbroken_run_is_skipped(tmp_path):
    path = write(tmp_path / "a.txt", f"before {'x' * 2_001} after\n{'y' * 2_000}")
    report = Skipped()
    assert read(path, report) == [["before", "after", "y" * 2_000]]
    assert report.counts == {corpus.UNBROKEN: 1}


@pytest.mark.parametrize("unit", [b"word ", "\u4e2d\u6587\u5b57".encode(), b"x"])
def test_line_of_20_megabytes(tmp_path, unit):
    path = write(tmp_path / "a.txt", b"Start. " + unit * (20_000_000 // len(unit)) + b"\nEnd.")
    report = Skipped()
    started = time.perf_counter()
    characters = 0
    with nullcontext() if unit == b"word " else pytest.raises(UserError, match="100% of it would"):
        for document in read_corpus(str(path), report):
            assert max(map(len, document)) <= 2_000
            characters += sum(map(len, document))
    assert time.perf_counter() - started < 4
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    assert peak < 2_000  # MiB, of the whole test process
    if unit == b"word ":
        assert characters > 19_600_000 * 0.99
        assert not report.counts
    else:
        assert report.counts == {corpus.UNBROKEN: 1}


def test_line_pieces_keep_every_character(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 256)
    rng = random.Random(0)
    words = ["\u00e9\u4e2d\U0001f600a"[rng.randrange(4)] * rng.randint(1, 20) for _ in range(999)]
    path = write(tmp_path / "a.txt", " ".join(words) + "\n" + " " * 300 + "\nnext")
    report = Skipped()
    assert " ".join(" ".join(d) for d in read(path, report)) == " ".join([*words, "next"])
    assert not report.counts


def test_endless_document_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT", 1_000)
    path = write(tmp_path / "a.txt", "ten chars.\n" * 1_000)
    report = Skipped()
    documents = read(path, report)
    assert len(documents) == 10
    assert "cut in two" in report.summary()[0]


def test_progress_is_the_bytes_read(tmp_path):
    path = write(tmp_path / "a.txt", "Some text.\n\nMore.\n")
    seen = []
    list(read_corpus(str(path), Skipped(), seen.append))
    assert sum(seen) == corpus_bytes(str(path)) == 18


def test_builtin_is_english_and_deterministic():
    report = Skipped()
    seen = []
    started = time.perf_counter()
    documents = list(read_corpus("builtin", report, seen.append))
    assert time.perf_counter() - started < 20
    assert sum(seen) == corpus_bytes("builtin")
    assert sum(len(s) for d in documents for s in d) > 1_500_000
    assert len(documents) > 300
    assert not report.notes
    assert not any(s.strip("=-~*^ ") == "" or s[:3] == ">>>" for d in documents for s in d)
    assert documents[:200] == list(islice(read_corpus("builtin", Skipped()), 200))


def test_builtin_without_topics_or_docstrings(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    write(tmp_path / "a.py", '"""Doc of a.\n\nMore.\n"""\ndef f():\n    """Doc of f."""\n')
    write(tmp_path / "b.py", "def not python")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    report = Skipped()
    assert read("builtin", report) == [["Doc of a.", "More.", "Doc of f."]]
    assert report.counts == {corpus.NO_SYNTAX: 1}
    assert "without pydoc_data.topics" in report.notes[0]
    (tmp_path / "a.py").unlink()
    with pytest.raises(UserError, match="neither topics nor docstrings"):
        read("builtin")
    monkeypatch.undo()
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "no")})
    report = Skipped()
    assert len(read("builtin", report)) > 50
    assert "without library sources" in report.notes[0]
