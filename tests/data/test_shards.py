"""Token shards: everything arrives once; what is damaged or half written is seen."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fastbert.data import shards as shards_module
from fastbert.data.shards import (
    Shards,
    build_shards,
    examine_shards,
    files_digest,
    fingerprint,
    read_meta,
)
from fastbert.data.tokenize import WordPiece
from fastbert.errors import RunError, UserError


def build(source, wordpiece, folder, **changes):
    settings = {"validation_fraction": 0.2, "seed": 1, "progress": False, **changes}
    return build_shards(str(source), wordpiece, folder, **settings)


def documents_of(shards):
    """Token ids by document and sentence."""
    found = []
    for d in range(shards.num_documents):
        first, last = shards.document_offsets[d : d + 2]
        offsets = shards.sentence_offsets[first : last + 1]
        found.append([shards.tokens(a, b).tolist() for a, b in pairwise(offsets)])
    return found


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "corpus.txt"
    sentences = ["the quick fox jumps", "over the lazy dog", "again and again", "brown, the dog"]
    documents = ["\n".join(sentences[n % 4 :] + sentences[: n % 3]) for n in range(50)]
    path.write_text("\n\n".join(documents))
    return path


def test_everything_arrives_once(tmp_path, source, wordpiece):
    stats = build(source, wordpiece, tmp_path / "shards")
    expected = []
    for document in source.read_text().split("\n\n"):
        sentences = [s for s in document.split("\n") if s]
        expected.append(wordpiece.encode_batch(sentences))
    opened = {split: Shards.open(tmp_path / "shards", split) for split in ("train", "validation")}
    found = [d for shards in opened.values() for d in documents_of(shards)]
    assert sorted(found) == sorted(expected)
    for split, shards in opened.items():
        assert stats.documents[split] == shards.num_documents
        assert stats.sentences[split] == shards.num_sentences == len(shards.sentence_lengths)
        assert stats.tokens[split] == shards.num_tokens == shards.sentence_lengths.sum()
        flat = [i for d in documents_of(shards) for s in d for i in s]
        V = wordpiece.vocab_size
        assert shards.token_counts(V).tolist() == np.bincount(flat, minlength=V).tolist()
    assert 3 <= stats.documents["validation"] <= 20
    assert stats.unknown == 0
    assert stats.source_bytes == source.stat().st_size


def test_same_seed_same_shards_other_seed_other_split(tmp_path, source, wordpiece):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build(source, wordpiece, tmp_path / name, seed=seed)
    a, b, c = (documents_of(Shards.open(tmp_path / n, "validation")) for n in "abc")
    assert a == b != c


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_two_documents_give_one_to_each_split(tmp_path, wordpiece, seed, fraction):
    (tmp_path / "a.txt").write_text("the fox\n\nthe dog")
    stats = build(
        tmp_path / "a.txt", wordpiece, tmp_path / "s", seed=seed, validation_fraction=fraction
    )
    assert stats.documents == {"train": 1, "validation": 1}


def test_one_document_is_divided(tmp_path, wordpiece):
    (tmp_path / "a.txt").write_text("the fox\n" * 10)
    stats = build(tmp_path / "a.txt", wordpiece, tmp_path / "s")
    assert stats.documents == {"train": 1, "validation": 1}
    assert stats.sentences == {"train": 8, "validation": 2}
    (tmp_path / "b.txt").write_text("the fox\nthe dog")
    assert build(tmp_path / "b.txt", wordpiece, tmp_path / "s").sentences["validation"] == 1


def test_one_sentence_is_too_small(tmp_path, wordpiece):
    (tmp_path / "a.txt").write_text("the fox")
    with pytest.raises(UserError, match="single sentence cannot be split"):
        build(tmp_path / "a.txt", wordpiece, tmp_path / "s")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_no_validation(tmp_path, wordpiece):
    (tmp_path / "a.txt").write_text("the fox")
    build(tmp_path / "a.txt", wordpiece, tmp_path / "s", validation_fraction=0)
    assert Shards.open(tmp_path / "s", "train").num_documents == 1
    empty = Shards.open(tmp_path / "s", "validation")
    assert (empty.num_documents, empty.num_sentences, empty.num_tokens) == (0, 0, 0)
    assert empty.token_counts(9).sum() == 0
    with pytest.raises(UserError, match="validation_fraction = 1"):
        build(tmp_path / "a.txt", wordpiece, tmp_path / "s", validation_fraction=1)


def test_skips_are_reported_and_kept(tmp_path, wordpiece):
    (tmp_path / "a.txt").write_bytes(b"the fox\n\nbad \xff\n\n\xe2\x80\x8b\n\nthe dog\n")
    stats = build(tmp_path / "a.txt", wordpiece, tmp_path / "s")
    assert stats.skipped == [
        f"skipped 1 line with invalid UTF-8, first at {tmp_path / 'a.txt'}:3",
        f"skipped 1 document without a token, first at document 2 of {tmp_path / 'a.txt'}",
    ]
    meta = json.loads((tmp_path / "s" / "meta.json").read_text())
    assert meta["stats"]["skipped"] == stats.skipped
    (tmp_path / "b.txt").write_bytes(b"\xe2\x80\x8b\n")
    with pytest.raises(UserError, match="no document gives a token"):
        build(tmp_path / "b.txt", wordpiece, tmp_path / "s")


def test_several_shards_and_wide_ids(tmp_path, source, wordpiece, monkeypatch):
    build(source, wordpiece, tmp_path / "whole")
    monkeypatch.setattr(shards_module, "SHARD_TOKENS", 100)
    build(source, wordpiece, tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("train-*.bin"))) > 3
    whole, parts = (Shards.open(tmp_path / name, "train") for name in ("whole", "parts"))
    assert documents_of(whole) == documents_of(parts)
    assert (whole.token_counts(100) == parts.token_counts(100)).all()
    assert whole.tokens(0, 1).dtype == np.uint16
    vocab = tmp_path / "vocab.txt"
    filler = "".join(f"unused{n}\n" for n in range(70_000))
    vocab.write_text(f"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n{filler}the\nfox\n")
    build(source, WordPiece.load(vocab), tmp_path / "wide")
    wide = Shards.open(tmp_path / "wide", "train")
    assert wide.tokens(0, 1).dtype == np.uint32
    assert wide.token_counts(70_007)[70_005] > 0


def test_fingerprint(tmp_path, source, wordpiece):
    settings = {"validation_fraction": 0.2, "seed": 1}
    key = fingerprint(str(source), wordpiece, **settings)
    build(source, wordpiece, tmp_path / "s")
    assert read_meta(tmp_path / "s")["fingerprint"] == key
    assert fingerprint(str(source), wordpiece, **settings) == key
    assert fingerprint(str(source), wordpiece, validation_fraction=0.2, seed=2) != key
    other = WordPiece.train(["the fox"], 100)
    assert fingerprint(str(source), other, **settings) != key
    moved = source.rename(tmp_path / "moved.txt")
    assert fingerprint(str(moved), wordpiece, **settings) == key
    moved.rename(source)
    source.write_text(source.read_text().replace("fox", "dog", 1))
    assert fingerprint(str(source), wordpiece, **settings) != key
    builtin = fingerprint("builtin", wordpiece, **settings)
    assert builtin == fingerprint("builtin", wordpiece, **settings) != key


def test_sources_are_read_again_only_if_touched(tmp_path, source, wordpiece, monkeypatch):
    settings = {"validation_fraction": 0.2, "seed": 1, "folder": tmp_path / "s"}
    read, digest = [], shards_module.content_digest
    monkeypatch.setattr(
        shards_module, "content_digest", lambda path: read.append(path) or digest(path)
    )
    build(source, wordpiece, tmp_path / "s")
    key = read_meta(tmp_path / "s")["fingerprint"]
    for touched in (False, True, False):
        if touched:
            os.utime(source, ns=(1, 1))
        assert fingerprint(str(source), wordpiece, **settings) == key
        assert len(read) == touched
        read.clear()
    content, times = source.read_bytes(), source.stat()
    source.write_bytes(content.replace(b"fox", b"dog", 1))  # size and mtime as they were
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(str(source), wordpiece, **settings) != key
    source.write_bytes(content)
    cache = tmp_path / "s" / "sources.json"
    cache.write_text(cache.read_text().replace('"size"', "3").replace("1", "2"))
    assert fingerprint(str(source), wordpiece, **settings) == key  # damaged: not believed
    cache.unlink()
    assert fingerprint(str(source), wordpiece, **settings) == key


def test_folders_count_by_the_names_and_contents_of_what_is_read(tmp_path, wordpiece):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("the fox")
    (folder / "b.txt").write_bytes(b"\x1f\x8b" + bytes(100))
    keys = []

    def key():
        settings = {"validation_fraction": 0.2, "seed": 1}
        return fingerprint(str(folder), wordpiece, **settings)

    for change in (
        lambda: (folder / "c.txt").write_text("the dog"),
        lambda: (folder / "c.txt").write_text("the fox"),
        lambda: (folder / "c.txt").rename(folder / "d.txt"),
        lambda: (folder / "b.txt").write_bytes(b"the dog"),
        lambda: (folder / "a.txt").unlink(),
    ):
        change()
        keys.append(key())
    (folder / "image.png").write_bytes(b"no matter")
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]


def test_shards_are_replaced_but_nothing_else(tmp_path, source, wordpiece):
    folder = tmp_path / "s"
    folder.mkdir()
    build(source, wordpiece, folder)
    build(source, wordpiece, folder, seed=2)
    assert sorted(os.listdir(tmp_path)) == ["corpus.txt", "s"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for precious in (tmp_path / "mine", source):
        with pytest.raises(UserError, match="exists and holds no shards"):
            build(source, wordpiece, precious)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("code", "message"), [(errno.ENOSPC, "no space left"), (errno.EIO, "cannot be written")]
)
def test_full_disk(tmp_path, source, wordpiece, monkeypatch, code, message):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shards_module.np, "save", fail)
    with pytest.raises(RunError, match=f"{tmp_path / 's'}: {message}"):
        build(source, wordpiece, tmp_path / "s")
    assert os.listdir(tmp_path) == ["corpus.txt"]


def test_killed_half_way_leaves_nothing_that_looks_whole(tmp_path, wordpiece):
    wordpiece.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("the quick brown fox\n\n" * 1_000_000)
    code = (
        "from fastbert.data.shards import build_shards; from fastbert.data.tokenize import "
        "WordPiece; build_shards('a.txt', WordPiece.load('tokenizer'), 's', "
        "validation_fraction=0.1, seed=1, progress=False)"
    )
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".s.tmp-*/train-*.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "s").exists()
    assert list(tmp_path.glob(".s.tmp-*"))
    (tmp_path / "a.txt").write_text("the fox\n\nthe dog")
    build(tmp_path / "a.txt", wordpiece, tmp_path / "s")
    assert not list(tmp_path.glob(".s.*"))
    assert Shards.open(tmp_path / "s", "train").num_documents == 1


NAMES = ["train-00000.bin", "train-sentences.npy", "train-documents.npy", "meta.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["missing", "short", "empty", "noise"])
def test_damage_is_told(tmp_path, source, wordpiece, name, damage):
    build(source, wordpiece, tmp_path / "s")
    path: Path = tmp_path / "s" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content[:-2])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(os.urandom(len(content) + 1))
    with pytest.raises(RunError, match=name):
        Shards.open(tmp_path / "s", "train")


@pytest.mark.parametrize("bit", range(0, 40_000, 2_003))
def test_every_flipped_bit_is_found(tmp_path_factory, bit, wordpiece, flippable):
    folder, files = flippable
    assert not examine_shards(folder).damage
    path = folder / sorted(files)[bit % len(files)]
    content = bytearray(files[path.name])
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)
    found = examine_shards(folder)
    path.write_bytes(files[path.name])
    assert str(path) in found.damage
    assert (found.meta is None) == (path.name == "meta.json")


@pytest.fixture(scope="module")
def flippable(tmp_path_factory, wordpiece):
    folder = tmp_path_factory.mktemp("flippable")
    (folder / "a.txt").write_text("\n\n".join(["the quick fox\nthe dog"] * 300))
    build(folder / "a.txt", wordpiece, folder / "s")
    names = [name for name in os.listdir(folder / "s") if name != "sources.json"]
    return folder / "s", {name: (folder / "s" / name).read_bytes() for name in names}


def test_what_examination_says(tmp_path, source, wordpiece):
    folder = tmp_path / "s"
    assert examine_shards(folder) is None
    folder.mkdir()
    assert examine_shards(folder) is None
    build(source, wordpiece, folder)
    found = examine_shards(folder)
    assert found.digest == files_digest(found.meta["files"]) == Shards.open(folder, "train").digest
    tokens = folder / "train-00000.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2])
    size = len(content)
    assert examine_shards(folder).damage == f"{tokens} has {size - 2} bytes of {size}"
    tokens.unlink()
    assert examine_shards(folder).damage == f"{tokens} is missing"
    tokens.write_bytes(content)
    (folder / "meta.json").unlink()
    assert examine_shards(folder) == (None, f"{folder}/meta.json is missing", found.digest)
    with pytest.raises(UserError, match="does not give the tokens again that"):
        build(source, wordpiece, folder, seed=2, expected=found.digest)
    assert tokens.read_bytes() == content
    build(source, wordpiece, folder, expected=found.digest)
    assert examine_shards(folder)[1:] == ("", found.digest)


def test_damaged_offsets_and_other_formats(tmp_path, source, wordpiece):
    build(source, wordpiece, tmp_path / "s")
    path = tmp_path / "s" / "train-sentences.npy"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"{'descr'", b"{\ndescr'"))  # no exception of numpy's own
    with pytest.raises(RunError, match="is damaged or cut short"):
        Shards.open(tmp_path / "s", "train")
    path.write_bytes(content)
    offsets = np.load(path)
    offsets[3] = offsets[5]
    np.save(path, offsets)
    with pytest.raises(RunError, match=r"is damaged or cut short; delete .*/s so that"):
        Shards.open(tmp_path / "s", "train")
    meta = tmp_path / "s" / "meta.json"
    content = json.loads(meta.read_text())
    for changes, message in (
        ({"format": 99}, "has format 99, this version reads 2"),
        ({"vocab_size": 99}, "is damaged"),
        ({"format": []}, "is damaged"),
    ):
        meta.write_text(json.dumps({**content, **changes}))
        with pytest.raises(RunError, match=message):
            Shards.open(tmp_path / "s", "train")
    meta.write_text("[" * 100_000)
    with pytest.raises(RunError, match="is damaged"):
        Shards.open(tmp_path / "s", "train")


def test_ids_beyond_the_vocabulary_are_told(tmp_path, source, wordpiece):
    build(source, wordpiece, tmp_path / "s")
    path = tmp_path / "s" / "train-00000.bin"
    ids = np.fromfile(path, dtype=np.uint16)
    ids[7] = 60_000
    ids.tofile(path)
    with pytest.raises(RunError, match="train tokens hold id 60000"):
        Shards.open(tmp_path / "s", "train").token_counts(wordpiece.vocab_size)


def test_progress_bar_goes_to_stderr(tmp_path, source, wordpiece, capsys):
    build(source, wordpiece, tmp_path / "s", progress=True)
    captured = capsys.readouterr()
    assert not captured.out
    assert "B/s" in captured.err
    assert "tokens/s" in captured.err
    build(source, wordpiece, tmp_path / "s")
    assert not capsys.readouterr().err


def share_held_out(tmp_path, wordpiece, documents, **changes):
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    build(tmp_path / "a.txt", wordpiece, tmp_path / "s", **changes)
    train, validation = (Shards.open(tmp_path / "s", split) for split in ("train", "validation"))
    tokens = [token for shards in (train, validation) for d in documents_of(shards) for token in d]
    texts = [sentence for document in documents for sentence in document.split("\n")]
    assert sorted(tokens) == sorted(wordpiece.encode_batch(texts))
    return validation.num_tokens / (train.num_tokens + validation.num_tokens), train, validation


SENTENCE = "the fox again"


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("fraction", [0.05, 0.4, 0.9])
@pytest.mark.parametrize(
    "sizes",
    [
        [1] * 30,
        [100, *[1] * 20],  # one is most of the corpus
        [*[1] * 20, 100, 30],
        [1_200, 1_000, 1_100],  # books
        [1_500],
        [*range(1, 40)],
    ],
    ids=["equal", "giant first", "giant", "books", "book", "ascending"],
)
def test_the_share_held_out_is_near_what_was_asked(tmp_path, wordpiece, sizes, fraction, seed):
    documents = ["\n".join([SENTENCE] * size) for size in sizes]
    settings = {"validation_fraction": fraction, "seed": seed}
    share, *splits = share_held_out(tmp_path, wordpiece, documents, **settings)
    assert fraction / 2 <= share <= fraction * 2
    assert (1 - fraction) / 2 <= 1 - share <= 2 * (1 - fraction)
    if fraction == 0.05 and not seed:
        again = share_held_out(tmp_path, wordpiece, documents, **settings)
        assert [documents_of(a) for a in splits] == [documents_of(b) for b in again[1:]]


@pytest.mark.parametrize("sizes", [[3, 3], [4, 5, 6, 7], [40, 50, 60], [10] * 9])
def test_small_documents_stay_whole(tmp_path, wordpiece, sizes):
    documents = ["\n".join([SENTENCE] * size) for size in sizes]
    _, train, validation = share_held_out(tmp_path, wordpiece, documents, validation_fraction=0.01)
    whole = [len(d) for shards in (train, validation) for d in documents_of(shards)]
    assert sorted(whole) == sizes
    assert len(documents_of(validation)) == 1


def test_one_line_of_a_whole_corpus(tmp_path, wordpiece, monkeypatch):
    monkeypatch.setattr("fastbert.data.corpus.MAX_DOCUMENT", 10_000)
    for documents in (["The quick fox. " * 2_500], ["The fox. " * 9_000, "The dog."]):
        (tmp_path / "a.txt").write_text("\n\n".join(documents))
        stats = build(tmp_path / "a.txt", wordpiece, tmp_path / "s", validation_fraction=0.05)
        held = stats.tokens["validation"] / sum(stats.tokens.values())
        assert held == pytest.approx(0.05, rel=0.02)
        assert stats.documents["train"] > 2
        assert "the end of document 1 is held out: whole ones are too large" in stats.skipped
