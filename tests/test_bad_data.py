"""Damaged data through the command: what was prepared is looked at before it is trained on.

A prepared file whose bytes have changed is told and made again; a run that goes on gets the very
same bytes or is refused. `FASTBERT_FUZZ` mutations are tried on corpora and on prepared files, so
many as fit into the nightly time; a few without it.
"""

import gzip
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastbert.cli import main
from fastbert.data.shards import examine_shards

pytestmark = pytest.mark.usefixtures("undrawn")
CASES = int(os.environ.get("FASTBERT_FUZZ", "20"))
TEXT = "\n\n".join(
    "\n".join(f"Sentence {line} of document {page} tells of time and people." for line in range(5))
    for page in range(12)
)
SIZES = {
    "model_type": "bert",
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}


class Command:
    """`fastbert pretrain` in a folder, of one step or two."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.corpus, self.model, self.out = path / "c.txt", path / "model.json", path / "run"
        self.corpus.write_text(TEXT)
        self.model.write_text(json.dumps(SIZES))

    def run(self, capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[int, list[str]]:
        """Exit code, and the lines on stderr without those of progress bars."""
        settings = {
            **{"data": self.corpus, "model": self.model, "out": self.out, "max_steps": 1},
            **{"max_seq_length": 32, "tokens_per_batch": 128, "vocab_size": 150, "num_threads": 1},
            **{"device": "cpu", "precision": "fp32", "torch_compile": "off", "report_to": "none"},
            **options,
        }
        flags = ((f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items())
        capsys.readouterr()
        status = main(["pretrain", *(word for flag in flags for word in flag)])
        lines = [line.split("\r")[-1] for line in capsys.readouterr().err.splitlines()]
        bars = ("it/s]", "B/s", "?B/s")
        return status, [line for line in lines if line and not any(bar in line for bar in bars)]

    @property
    def weights(self) -> bytes:
        return (self.out / "hf/model.safetensors").read_bytes()


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path)


class Begun(Command):
    """A run of two steps that was stopped after the first, and what it gives undisturbed."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__(path)
        self.options = {"max_steps": 2, "save_steps": 1}
        assert self.run(capsys, **self.options, stop_at_step=1)[0] == 0
        self.kept = path / "kept"
        self.out.rename(self.kept)
        assert self.resume(capsys)[0] == 0
        self.undisturbed = self.weights

    def resume(self, capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[int, list[str]]:
        """Goes on with the run as it is, or as it was where nothing has been put there."""
        if not self.out.exists():
            self.put_back()
        return self.run(capsys, **self.options, **options, resume="auto")

    def put_back(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.kept, self.out)

    @property
    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.kept / "data").iterdir()}


_begun: list[Begun] = []


@pytest.fixture
def begun(tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]) -> Begun:
    """The one run of this module, put back as it was."""
    if not _begun:
        _begun.append(Begun(tmp_path_factory.mktemp("begun"), capsys))
    _begun[0].put_back()
    _begun[0].corpus.write_text(TEXT)
    return _begun[0]


# What was prepared


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a token": ("train-00000.bin", flip, "is damaged: its bytes are not those that were written"),
    "an offset": ("validation-sentences.npy", flip, "is damaged"),
    "a header": (
        "train-documents.npy",
        lambda path: path.write_bytes(path.read_bytes().replace(b"{'descr'", b"(\ndescr'")),
        "is damaged",
    ),
    "cut": (
        "validation-00000.bin",
        lambda path: os.truncate(path, 6),
        "has 6 bytes of",
    ),
    "gone": ("train-sentences.npy", Path.unlink, "is missing"),
    "no meta": ("meta.json", Path.unlink, "is missing"),
    "meta": ("meta.json", flip, "is damaged or cut short"),
    "meta's types": ("meta.json", lambda path: path.write_text('{"format": 2}'), "is damaged"),
    "format": ("meta.json", lambda path: path.write_text('{"format": 1}'), "has format 1, this"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_mended(
    begun: Begun,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    path = begun.out / "data" / name
    damage(path)
    status, lines = begun.resume(capsys)
    assert status == 0
    told = next(line for line in lines if "prepared again" in line)
    assert told.startswith(f"data: {path}")
    assert message in told
    assert told.endswith(f"; prepared again from {begun.corpus}")
    assert begun.weights == begun.undisturbed
    found = examine_shards(begun.out / "data")
    assert found is not None
    assert not found.damage


def test_a_touched_source_is_no_change(begun: Begun, capsys: pytest.CaptureFixture[str]) -> None:
    os.utime(begun.corpus, (1, 1))
    status, lines = begun.resume(capsys)
    assert status == 0
    assert not any("prepared again" in line or "documents" in line for line in lines)
    assert begun.weights == begun.undisturbed


@pytest.mark.parametrize("damage", ["none", "a token", "no meta", "all"])
def test_other_data_is_refused(
    begun: Begun, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    times = begun.corpus.stat()
    begun.corpus.write_text(TEXT.replace("time", "mice", 1))
    os.utime(begun.corpus, ns=(times.st_atime_ns, times.st_mtime_ns))
    data = begun.out / "data"
    if damage == "all":
        shutil.rmtree(data)
    elif damage != "none":
        DAMAGES[damage][1](data / DAMAGES[damage][0])
    kept = [*data.rglob("*"), begun.out / "config.toml"]
    before = {path: path.read_bytes() for path in kept}
    status, lines = begun.resume(capsys, logging_steps=7)
    assert status == 2
    known = damage in ("none", "a token")
    expected = "has changed since" if known else "does not give the tokens again that"
    assert lines[-1].startswith("fastbert: error: ")
    assert expected in lines[-1]
    assert "put it back as it was, or start a new run with another --out" in lines[-1]
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(data.rglob("*"))) == len(before) - 1
    begun.corpus.write_text(TEXT)
    assert begun.resume(capsys)[0] == 0
    assert begun.weights == begun.undisturbed


# Corpora


def test_json_is_read_whatever_its_name(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"text": page} for page in TEXT.split("\n\n")]
    assert command.run(capsys)[0] == 0
    expected = command.weights
    for name, content in (
        ("lines.txt", "\n".join(map(json.dumps, records))),
        ("array.json", json.dumps(records, indent=2)),
        ("strings", json.dumps([record["text"] for record in records])),
        ("utf16.txt", TEXT.encode("utf-16")),
        ("mac.txt", TEXT.replace("\n", "\r")),
        ("mark.txt", "\ufeff" + TEXT.replace("\n", "\r\n")),
    ):
        path = command.path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        command.out = command.path / f"run-{name}"
        status, lines = command.run(capsys, data=path)
        assert status == 0
        assert any(line.startswith("data: 12 documents") for line in lines)
        assert command.weights == expected, name


def test_what_is_no_text_is_refused(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    latin = TEXT.replace("time", "größe").encode("latin-1")
    for content, message in (
        (gzip.compress(TEXT.encode()), "looks like gzip; unpack it first, e.g. with gunzip"),
        (random.Random(0).randbytes(9_999), "looks like binary data"),
        (TEXT.encode("utf-16-be"), "looks like UTF-16BE without a byte order mark"),
        (
            latin + TEXT[:999].encode(),
            "of it would be skipped (skipped 60 lines with invalid UTF-8",
        ),
        (b'[{"body": "x"}]', 'JSON records should be strings or objects with a string "text"'),
    ):
        command.corpus.write_bytes(content)
        status, lines = command.run(capsys)
        assert (status, len(lines)) == (2, 1)
        assert lines[0].startswith(f"fastbert: error: {command.corpus}: ")
        assert message in lines[0]
        assert not command.out.exists()


def test_labels_of_one_kind_are_refused(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, message in (
        ("Two short\nsentences here", 'so every label is "is next"; give more text, or leave next'),
        ("word\n\n" * 9, "no document of the train split has two tokens"),
    ):
        command.corpus.write_text(text)
        status, lines = command.run(capsys)
        assert status == 2
        assert message in lines[-1]
        assert "--no-nsp" in lines[-1]
        assert not command.out.exists()


# Mutations


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Returns a file after an accident."""
    new = bytearray(content)
    place, other = (rng.randrange(max(len(new) - 8, 1)) for _ in range(2))
    kind = rng.randrange(9)
    if kind < 3 and new:
        new[place] ^= 1 << rng.randrange(8)
    elif kind == 3:
        del new[place:]
    elif kind == 4:
        new[place : place + rng.randrange(64)] = rng.randbytes(rng.randrange(64))
    elif kind == 5:
        new[place : place + 8], new[other : other + 8] = (
            new[other : other + 8],
            new[place : place + 8],
        )
    elif kind == 6:
        new[place:place] = bytes(rng.randrange(4_096))
    elif kind == 7:
        new += new[place:]
    else:
        new = bytearray(rng.randbytes(rng.randrange(2_000)))
    return bytes(new)


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """Returns JSON one value of which is another, or gone."""
    value = json.loads(content)
    inner = value
    while True:
        key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.3:
            break
        inner = inner[key]
    others = (None, True, -1, 2**70, 1e308, "x", "\ud800", [], {}, [[]], "../../x", "uint8")
    if isinstance(inner, dict) and rng.random() < 0.2:
        del inner[key]
    else:
        inner[key] = rng.choice(others)
    return json.dumps(value).encode()


def mutate_data(rng: random.Random, files: dict[str, bytes]) -> dict[str, bytes | None]:
    """Returns those of a folder's files that an accident changes; None where one is lost."""
    name, other = rng.choice(sorted(files)), rng.choice(sorted(files))
    kind = rng.randrange(10)
    if kind == 0:
        return {name: None}
    if kind == 1:
        return {name: files[other], other: files[name]}
    if kind == 2:
        return {name: None, f"{name}.bak": files[name]}
    if kind < 5 and "meta.json" in files:
        return {"meta.json": mutate_json(rng, files["meta.json"])}
    return {name: mutate_bytes(rng, files[name])}


def is_told(status: int, lines: list[str]) -> bool:
    """Whether a run ended well, or with one line that says why."""
    if any("Traceback" in line or "failed: " in line for line in lines):
        return False
    errors = [line for line in lines if line.startswith("fastbert: error: ")]
    return status == 0 or (status in (1, 2) and errors == lines[-1:])


def test_mutated_prepared_files(begun: Begun, capsys: pytest.CaptureFixture[str]) -> None:
    for case in range(CASES // 2):
        begun.put_back()
        changes = mutate_data(random.Random(case), begun.files)
        for name, content in changes.items():
            path = begun.out / "data" / name
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
        started = time.monotonic()
        status, lines = begun.resume(capsys)
        assert time.monotonic() - started < 60, case
        assert is_told(status, lines), (case, lines)
        assert status == 0, (case, lines)  # the source is there
        assert begun.weights == begun.undisturbed, case


def test_mutated_corpora(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"text": page} for page in TEXT.split("\n\n")]
    bases = {
        "c.txt": TEXT.encode(),
        "c.json": json.dumps(records, indent=1).encode(),
        "c.jsonl": "\n".join(map(json.dumps, records)).encode(),
        "c": TEXT.encode("utf-16"),
    }
    for case in range(CASES - CASES // 2):
        rng = random.Random(case)
        folder = command.path / f"{case}"
        folder.mkdir()
        contents: dict[str, bytes | None] = dict(bases)
        for _ in range(rng.randint(1, 4)):
            contents |= mutate_data(rng, {n: c for n, c in contents.items() if c is not None})
        for name, content in contents.items():
            if content is not None:
                (folder / name).write_bytes(content)
        command.out = command.path / f"run-{case}"
        data = folder if rng.random() < 0.4 else rng.choice(sorted(folder.iterdir()))
        started = time.monotonic()
        status, lines = command.run(capsys, data=data)
        assert time.monotonic() - started < 60, case
        assert is_told(status, lines), (case, lines)
        assert command.out.exists() == (status == 0), case
