"""Documents and sentences out of text files, JSON and folders, odd and damaged ones too."""

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
    path.parent.mkdir(exist_ok=True)
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


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n", "\x85", "\u2028", "\u2029"])
@pytest.mark.parametrize("chunk", [3, 2**20])
def test_line_ends(tmp_path, monkeypatch, end, chunk):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    path = write(tmp_path / "a.txt", end.join(["a b", "c", "", "", "d", ""]))
    assert [" ".join(document) for document in read(path)] == ["a b c", "d"]
    report = Skipped()
    path = write(tmp_path / "a.txt", end.join(["some words", "", "more words"]).encode() + b"\r\0")
    assert len(read(path, report)) == 2
    assert report.first[corpus.NUL_BYTE] == f"{path}:4"
    line = json.dumps({"text": end.join(["a b", "", "c"])}, ensure_ascii=False)
    path = write(tmp_path / "a.jsonl", line + "\r\n" + line)
    assert read(path) == [["a b", "c"]] * 2


def test_many_returns_take_linear_time(tmp_path):
    path = write(tmp_path / "a.txt", b"One." + b"\r" * 400_000 + b"\nTwo." + b"\r" * 400_000)
    started = time.process_time()
    assert [" ".join(document) for document in read(path)] in (["One.", "Two."], ["One. Two."])
    assert time.process_time() - started < 5


RECORDS = [{"text": "One. Two.", "id": 1}, {"text": "Three."}, {"id": 3}, {"text": "Four."}]
READ = [["One.", "Two."], ["Three."], ["Four."]]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [5, 2**20])
def test_json_arrays_and_records_over_several_lines(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    strings = [record["text"] for record in RECORDS if "text" in record]
    many = "\n".join(json.dumps(record, indent=2) for record in RECORDS)
    for content in (json.dumps(RECORDS, indent=indent), json.dumps(strings, indent=indent), many):
        for name in ("a.txt", "a.json", "a"):
            report = Skipped()
            path = write(tmp_path / name, content)
            assert read(path, report) == READ
            if content[0] == "[" and "id" in content:
                assert report.first == {corpus.NO_TEXT: f"{path}:{1 if indent is None else 9}"}


def test_an_array_that_breaks_off(tmp_path):
    text = json.dumps([{"text": f"Sentence {n}."} for n in range(9)], indent=0)
    path = write(tmp_path / "a.json", text[:-20])
    report = Skipped()
    assert read(path, report) == [[f"Sentence {n}."] for n in range(8)]
    assert report.first == {corpus.BROKEN_JSON: f"{path}:26"}
    write(path, text.replace("},", "}!,", 1))
    with pytest.raises(UserError, match=r"skipped the rest of 1 file after invalid JSON, first at"):
        read(path)
    write(path, "[" * 100_000)
    with pytest.raises(UserError, match="holds no text"):
        read(path)


def test_what_json_without_text_is_told(tmp_path):
    for content in ('{"data": [{"text": "x"}]}', '[{"body": "x"}]', "[[1], [2]]", '{"text": []}'):
        path = write(tmp_path / "a.txt", content)
        with pytest.raises(UserError, match="JSON records should be strings or objects with a"):
            read(path)


def test_foreign_files_are_refused_alone_and_counted_in_a_folder(tmp_path):
    foreign = write(tmp_path / "b.txt", b"\x1f\x8b\x08" + bytes(99))
    with pytest.raises(
        UserError, match=r"b\.txt: looks like gzip; unpack it first, e\.g\. with gun"
    ):
        read(foreign)
    with pytest.raises(UserError, match=r"holds no text \(skipped 1 file without text, first"):
        read(tmp_path)
    write(tmp_path / "a.md", "Text.")
    write(tmp_path / "README", "No suffix.")
    write(tmp_path / "c.json", "[]")
    write(tmp_path / "d.csv", "no")
    report = Skipped()
    assert read(tmp_path, report) == [["No suffix."], ["Text."]]
    assert report.summary() == [
        "skipped 1 file of other kinds than .txt, .text, .md, .json, .jsonl, .ndjson, first at "
        f"{tmp_path}/d.csv",
        f"skipped 1 file without text, first at {foreign} (gzip)",
        "3 files read: 2 as text, 1 as JSON",
    ]


def test_most_of_a_corpus_skipped_is_refused(tmp_path):
    good, bad = b"A good line.\n", b"\xe4 bad line.\n"
    read(write(tmp_path / "a.txt", good * 60 + bad * 40))
    with pytest.raises(
        UserError, match=r"a\.txt: 58% of it would be skipped \(skipped 60 lines wi"
    ):
        read(write(tmp_path / "a.txt", good * 40 + bad * 60))
    write(tmp_path / "b.txt", good * 200)
    assert len(read(tmp_path)) == 2


def test_a_large_file_is_refused_before_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "ENOUGH", 1_000)
    monkeypatch.setattr(corpus, "CHUNK", 500)
    path = write(tmp_path / "a.txt", b"A good line.\n" + b"\xe4 bad line.\n" * 900)
    read_so_far = []
    with pytest.raises(UserError, match=r"9\d% of it would be skipped"):
        list(read_corpus(str(path), Skipped(), read_so_far.append))
    assert sum(read_so_far) < 3_000


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder of every kind of file, with damage, long lines and documents over many blocks."""
    folder, rng = tmp_path_factory.mktemp("mixture"), random.Random(0)
    words = [
        "fox",
        "dog",
        "Gr\u00f6\u00dfe",
        "\u4e2d\u6587",
        "end.",
        "so!\n",
        "x\n\n",
        "\U0001f600",
        "Then",
    ]

    def text(count):
        return " ".join(rng.choices(words, k=count))

    damaged = bytearray(text(4_000).encode())
    for _ in range(30):
        damaged[rng.randrange(len(damaged))] = rng.choice(b"\0\xff\r")
    records = [rng.choice([{"text": text(50)}, {"id": 3}, text(9)]) for _ in range(60)]
    write(folder / "a.txt", bytes(damaged))
    write(folder / "b.txt", text(3_000).encode("utf-16"))
    write(folder / "c.txt", "One line " * 2_000 + "x" * 3_000 + "\r\nNext.\r\n")
    write(folder / "d.jsonl", "\n".join(map(json.dumps, records)) + "\n{broken\n")
    write(folder / "e.json", json.dumps(records, indent=1)[:-20])
    write(folder / "f.txt", b"%PDF-1.7\n")
    for n in range(50):
        write(folder / f"small/{n:02d}", text(5))
    return folder


@pytest.mark.parametrize("chunk", [256, 4_096])
def test_workers_change_nothing(mixture, monkeypatch, chunk):
    monkeypatch.setattr(corpus, "CHUNK", chunk)
    monkeypatch.setattr(corpus, "MAX_DOCUMENT", 3_000)
    found = []
    for workers in (0, 1, 3):
        report, bytes_read, contents = Skipped(), [], {}
        pieces = list(
            corpus.read_pieces(str(mixture), report, bytes_read.append, workers, contents)
        )
        assert sum(bytes_read) == corpus_bytes(str(mixture))
        assert contents == {
            path: (*contents[path][:3], corpus.content_digest(path))
            for path in corpus.corpus_files(str(mixture))
        }
        found.append((pieces, report, contents))
    assert found[0] == found[1] == found[2]
    pieces, report, _ = found[0]
    assert len(report.counts) == 5 + (chunk > 2_000)
    assert any(continues for _, continues in pieces)
    counts = list(corpus.map_corpus(str(mixture), Skipped(), len, workers=2))
    assert sum(counts) == sum(len(document) for document, _ in pieces)


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
