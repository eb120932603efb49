"""What a file is, by its first bytes, whatever its name."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import random
import sqlite3
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from fastbert.data.formats import HEAD, JSON, JSON_LINES, TEXT, sniff

PROSE = "\n".join(f"Sentence {n} tells of time, people and places." for n in range(40))
RECORDS = [{"id": n, "text": PROSE} for n in range(3)]
LINES = "\n".join(map(json.dumps, RECORDS))
ARRAY = json.dumps(RECORDS)

KINDS = {
    TEXT: [
        *("", "\n", PROSE, "# Title\n\n" + PROSE, "{{Infobox}}\n" + PROSE, "{\\bf Title} x"),
        *("[1] Smith wrote.\n", "[1, 2] show it.\n", "[Link](http://x)\n", "[[1984 (novel)]] is\n"),
        *('"Hello," he said.\n', '["Quoted" text]\n', "[section]\nkey=3\n", "{ int x; }\n"),
        *("[ ] buy milk\n", "ORCHARDS and\n", "PARENTS of\n", "The ftyp box\n", "RIFF RAFF\n"),
        *(
            "'Tis true.\n",
            "- [x] done\n",
            "null and void\n",
            "<doc id=1>\nText\n</doc>",
            "ID3 v2\n",
        ),
        *("BM25 ranks.\n", "MZ opens\n", "\x1b[1mBold\x1b[0m text\n" * 9, "\fPage\v two\t\n" * 20),
        PROSE + "\n" + LINES.split("\n")[0],
        "# Manual\n" + PROSE[:400] + json.dumps({str(n): n for n in range(60)}, indent=1),
        '"Yes": so he spoke.\n' + PROSE,
    ],
    JSON_LINES: [
        *(LINES, "\n\n" + LINES, LINES.replace("\n", "\r\n"), "{broken\n" + LINES),
        *('cut"}\n' + LINES, json.dumps({"text": PROSE * 90}) + "\n" + LINES, "{}\n{}\n"),
        "\n".join(json.dumps(record["text"]) for record in RECORDS),
    ],
    JSON: [
        *(
            ARRAY,
            json.dumps(RECORDS, indent=2),
            ARRAY[:-40],
            "[\n" + LINES.replace("\n", ",\n") + "]",
        ),
        *(json.dumps([PROSE, PROSE]), json.dumps([PROSE * 90, "x"]), json.dumps([[PROSE]]), "[]"),
        *(json.dumps(RECORDS[0], indent=1), "\n".join(json.dumps(r, indent=1) for r in RECORDS)),
        *(
            LINES.replace("\n", ",\n"),
            json.dumps(list(range(40_000))),
            json.dumps([[1, -2.5]] * 9_000),
        ),
        *(json.dumps({"text": PROSE * 90}, indent=1), "{\n" + '"text": "x"}'),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_json(kind: str) -> None:
    for content in KINDS[kind]:
        found = sniff(content.encode()[:HEAD], "corpus.txt")
        assert (found.kind, found.mark) == (kind, 0), content[:60]
        for mark, encoding in ((3, "utf-8"), (2, "utf-16-le"), (4, "utf-32-be")):
            found = sniff(f"\ufeff{content}".encode(encoding)[:HEAD], "corpus.txt")
            if len(content) < HEAD // 4:
                assert (found.kind, found.encoding, found.mark) == (kind, encoding, mark)


@pytest.mark.parametrize("name", ["c.json", "c.JSONL", "c.ndjson"])
def test_the_name_tells_only_broken_json_from_text(name: str) -> None:
    assert sniff(b'{"text": "cut sh\n[1]\n', "c.txt").kind == JSON_LINES
    for content in (b"{broken", b'"one string"', b"[1\n", b"null\n"):
        assert sniff(content, "c.txt").kind == TEXT
        assert sniff(content, name).kind == JSON_LINES
    assert sniff(PROSE.encode(), name).kind == TEXT


def archives() -> dict[str, bytes]:
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a.txt", PROSE)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(PROSE)
        archive.addfile(member, io.BytesIO(PROSE.encode()))
    return {"zip": zipped.getvalue(), "tar": tarred.getvalue()}


def test_what_is_foreign(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "x.db")
    database.execute("create table a(b)")
    database.commit()
    array = io.BytesIO()
    np.save(array, np.arange(9))
    noise, text = random.Random(0).randbytes(HEAD), PROSE.encode()
    chinese = "\u4e2d\u6587\u53e5\u5b50\u3002\n" * 50
    russian = "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440.\n" * 50
    samples = [
        *(
            ("gzip", gzip.compress(text)),
            ("bzip2", bz2.compress(text)),
            ("xz", lzma.compress(text)),
        ),
        *archives().items(),
        *(("pickle", pickle.dumps(RECORDS, protocol)) for protocol in range(6)),
        *(("NumPy", array.getvalue()), ("safetensors", save({"a": np.zeros(9)}))),
        *(("zstd", b"\x28\xb5\x2f\xfd" + noise), ("Parquet", b"PAR1\x15\0" + text)),
        *(("Arrow", b"ARROW1\0\0" + noise), ("PDF", b"%PDF-1.7\n" + text), ("ORC", b"ORC\x11\0")),
        *(("SQLite", (tmp_path / "x.db").read_bytes()), ("ELF", b"\x7fELF\2\1\1" + bytes(99))),
        *(
            ("PNG", b"\x89PNG\r\n\x1a\n"),
            ("JPEG", b"\xff\xd8\xff\xe0\0\x10JFIF"),
            ("GIF", b"GIF89a\1\0"),
        ),
        *(("HTML", b"<!DOCTYPE html><p>" + text), ("XML", b'\xef\xbb\xbf<?xml version="1.0"?>')),
        *(("Git LFS", b"version https://git-lfs.github.com/spec/v1\n"), ("RTF", b"{\\rtf1 x}")),
        *(("binary", noise), ("binary", bytes(999)), ("binary", text + bytes(9_999))),
        ("binary", np.arange(5, 3000, dtype=np.uint16).tobytes()),
        ("binary", np.random.default_rng(0).normal(size=999).astype("f4").tobytes()),
        *(
            ("Python's", "\n".join(map(repr, RECORDS)).encode()),
            ("Python's", repr(RECORDS).encode()),
        ),
        ("Python's", repr([PROSE, PROSE]).encode()),
        *((f"{code}LE without", PROSE.encode(f"{code}-le")) for code in ("UTF-16", "UTF-32")),
        *((f"{code}BE without", PROSE.encode(f"{code}-be")) for code in ("UTF-16", "UTF-32")),
        *(("UTF-16LE", other.encode("utf-16-le")) for other in (chinese, russian)),
        ("JSON that does not", b"// exported\n" + ARRAY.encode()),
        ("JSON that does not", json.dumps(RECORDS * 4, indent=1).encode()[7:]),
        ("program", Path(sys.executable).read_bytes()[:HEAD]),
    ]
    for name, content in samples:
        found = sniff(content[:HEAD], "corpus.txt")
        assert not found.kind, name
        assert name in found.looks_like
        assert found.remedy


@pytest.mark.parametrize(
    "unit", [" ", "\r", "\n", "[", "{", '"', '\\"', "{'", '["', '"a":', "[1,", "< "]
)
def test_sniffing_is_linear(unit: str) -> None:
    head = (unit * HEAD)[:HEAD].encode()
    started = time.process_time()
    for start in (b"", b"{", b"[", b'"'):
        sniff((start + head)[:HEAD], "corpus.json")
    assert time.process_time() - started < 1
