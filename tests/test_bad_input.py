"""Bad input through the command: one line says what, where and what to do; nothing is left.

After each refusal the same `--out` must still be usable: the mistake is repaired and the run done.
"""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastbert.cli import main

pytestmark = pytest.mark.usefixtures("undrawn")
ROOT = Path(__file__).parent.parent
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


class Folder:
    """A good corpus and model in a folder of their own, and the command with short options."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path, self.capsys = path, capsys
        self.out = path / "run"
        self.write("good.txt", TEXT)
        self.write("model.json", json.dumps(SIZES))

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def argv(self, **options: Any) -> list[str]:
        settings = {
            "data": self.path / "good.txt",
            "model": self.path / "model.json",
            "out": self.out,
            **{"max_seq_length": 32, "tokens_per_batch": 128, "vocab_size": 150, "max_steps": 1},
            **{"device": "cpu", "precision": "fp32", "torch_compile": "off", "report_to": "none"},
            **{"num_threads": 1, **options},
        }
        flags = ((f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items())
        return ["pretrain", *(word for flag in flags for word in flag)]

    def run(self, **options: Any) -> tuple[int, list[str]]:
        """Exit code, and the lines on stderr without those of progress bars."""
        self.capsys.readouterr()
        status = main(self.argv(**options))
        shown = self.capsys.readouterr()
        lines = [line.split("\r")[-1] for line in shown.err.splitlines()]
        return status, [line for line in lines if line and "/s]" not in line]

    def refused(self, *words: str, **options: Any) -> None:
        """Exit code 2, one line with these words in it, and --out as it was."""
        before = sorted(self.path.rglob("*"))
        status, lines = self.run(**options)
        assert status == 2, lines
        line = lines[-1]
        assert line.startswith("fastbert: error: ") and len(line) < 500, line
        for word in words:
            assert word in line, line
        # What the tokenizer said before the mistake could be known is all there may be besides.
        assert all(line.startswith("tokenizer: ") for line in lines[:-1]), lines
        assert sorted(self.path.rglob("*")) == before

    def succeeds(self, **options: Any) -> list[str]:
        status, lines = self.run(**options)
        assert status == 0, lines
        assert (Path(options.get("out", self.out)) / "hf/model.safetensors").exists()
        return lines


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Folder:
    return Folder(tmp_path, capsys)


# The corpus


BAD_CORPORA: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("c.txt", "", "holds no text; it should hold sentences in UTF-8"),
    "blank only": ("c.txt", " \n\n\t\n \n", "holds no text"),
    "byte order mark only": ("c.txt", b"\xef\xbb\xbf", "holds no text"),
    "bad UTF-8 only": ("c.txt", b"\xff\xfd bad\n\xc3\x28 worse\n", "2 lines with invalid UTF-8"),
    "NUL only": ("c.txt", b"a\0b\n\0\n", "2 lines with a NUL byte, first at"),
    "UTF-16": ("c.txt", TEXT.encode("utf-16-le"), "UTF-16LE without a byte order mark; convert it"),
    "UTF-32": ("c.txt", TEXT.encode("utf-32-be"), "UTF-32BE without a byte order mark; convert it"),
    "an archive": ("c.txt", b"PK\x03\x04\0\0\0\x08" + bytes(100), "looks like zip"),
    "broken JSONL": ("c.jsonl", '{"text": "cut sh\n[1]\n', "2 JSON records without a string"),
    "JSONL without text": ("c.jsonl", '{"body": "words"}\n{"text": 5}\n', 'a string "text"'),
    "one sentence": ("c.txt", "Only one sentence of words.", "a single sentence cannot be split"),
    "no words": ("c.txt", "\u200b\n\u200b \u200b\n", "holds no word"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_CORPORA.values(), ids=BAD_CORPORA)
def test_unusable_corpus(folder: Folder, name: str, content: str | bytes, message: str) -> None:
    path = folder.write(name, content)
    folder.refused(message, data=path)
    path.write_text(TEXT if name.endswith("txt") else json.dumps({"text": TEXT}) + "\n")
    folder.succeeds(data=path)


@pytest.mark.parametrize(
    "content", ["", "\n \n", "Only one sentence of words.", "\u200b", b"\xff\xfe\xfa\n"]
)
def test_unusable_corpus_with_a_given_tokenizer(folder: Folder, content: str | bytes) -> None:
    folder.succeeds(out=folder.path / "first")
    path = folder.write("c.txt", content)
    tokenizer = folder.path / "first/tokenizer"
    folder.refused(str(path), data=path, tokenizer=tokenizer)
    folder.succeeds(tokenizer=tokenizer)


def test_missing_and_unreadable_data(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.refused("data = ", "nowhere.txt", "no such file or folder", data="nowhere.txt")
    folder.refused("did you mean 'builtin'?", data="bultin")
    (folder.path / "empty").mkdir()
    folder.refused("the folder holds no .txt, .text, .md, .json", data=folder.path / "empty")
    folder.write("binary/x.bin", b"\0\1")
    folder.refused("the folder holds no .txt", data=folder.path / "binary")
    os.mkfifo(folder.path / "pipe")
    folder.refused("is neither a file nor a folder", data=folder.path / "pipe")
    if os.geteuid():
        folder.path.joinpath("good.txt").chmod(0)
        folder.refused("good.txt: cannot be read (Permission denied)")


def test_what_can_be_skipped_is_counted(folder: Folder) -> None:
    lines = TEXT.encode().splitlines()
    lines[3:3] = [b"bad \xff line", b"nul \0 line", b"worse \xc3\x28 line", b"\xa0"]
    folder.write("good.txt", b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\n")
    said = folder.succeeds()
    assert [line for line in said if line.startswith("data: skipped")] == [
        f"data: skipped 3 lines with invalid UTF-8, first at {folder.path}/good.txt:4",
        f"data: skipped 1 line with a NUL byte, first at {folder.path}/good.txt:5",
    ]
    assert "\ufeff" not in (folder.out / "tokenizer/vocab.txt").read_text()


def test_broken_jsonl_lines_are_counted(folder: Folder) -> None:
    records = [json.dumps({"text": page}) for page in TEXT.split("\n\n")]
    records[2:2] = ['{"text": "cut sh', '{"title": "no text"}', '{"text": null}', "[]", ""]
    path = folder.write("c.jsonl", "\n".join(records))
    said = folder.succeeds(data=path)
    assert (f'data: skipped 4 JSON records without a string "text", first at {path}:3') in said
    assert any(line.startswith("data: 12 documents") for line in said)


def test_a_line_of_10_megabytes(folder: Folder) -> None:
    unbroken, words = b"x" * 9_000_000, b"many words without an end " * 40_000
    path = folder.write("c.txt", TEXT.encode() + b"\n\n" + unbroken + b" " + words + b"\n")
    started = time.process_time()
    said = folder.succeeds(data=path)
    assert time.process_time() - started < 12
    assert (
        "data: skipped part of 1 line: over 2,000 characters without whitespace, first at "
        f"{path}:73"
    ) in said


# Tokenizer and model


def test_bad_tokenizers(folder: Folder) -> None:
    vocab = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + "\n".join("abcdefghijklmnopqrstuvwxyz")
    vocab += "\n" + "\n".join(f"##{char}" for char in "abcdefghijklmnopqrstuvwxyz") + "\n"
    without = folder.write("vocab.txt", vocab.replace("[MASK]\n", ""))
    folder.refused(str(without), "[MASK] is missing", tokenizer=without)
    broken = folder.write("tokenizer.json", '{"model": {"type": "BPE"}}')
    folder.refused(str(broken), "its model is BPE; BERT needs WordPiece", tokenizer=broken)
    cut = folder.write("cut/tokenizer.json", '{"model": {"ty')
    folder.refused(str(cut), "is not a tokenizer", tokenizer=cut.parent)
    folder.refused("tokenizer = ", "no such file", tokenizer="nowhere/vocab.txt")
    (folder.path / "empty").mkdir()
    folder.refused("holds neither tokenizer.json nor vocab.txt", tokenizer=folder.path / "empty")
    without.write_text(vocab)
    folder.succeeds(tokenizer=without)


def test_bad_models(folder: Folder) -> None:
    folder.refused("'bsae' is not a preset: did you mean 'base'?", "presets: tiny", model="bsae")
    folder.refused("no such file or folder", model="nowhere/config.json")
    path = folder.write("m.json", json.dumps(SIZES | {"max_position_embeddings": 16}))
    folder.refused(
        "max_seq_length = 32 must be at most 16", "max_position_embeddings", str(path), model=path
    )
    long = {"max_seq_length": 513, "tokens_per_batch": 513}
    folder.refused("max_seq_length = 513 must be at most 512", model="tiny", **long)
    path.write_text('{"model_type": "bert", "hidden_size": ')
    folder.refused(f"{path}:1:", "not JSON", model=path)
    path.write_text(json.dumps(SIZES | {"model_type": "roberta"}))
    folder.refused('model_type = "roberta" must be "bert"', model=path)
    path.write_text(json.dumps(SIZES | {"num_attention_heads": 3}))
    folder.refused("hidden_size = 16 must be a multiple of num_attention_heads = 3", model=path)
    path.write_text(json.dumps(SIZES | {"type_vocab_size": 1}))
    folder.refused("type_vocab_size = 1: sentence pairs need 2", model=path)
    path.write_text(json.dumps(SIZES))
    folder.succeeds(model=path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 10**7}, "hidden_size = 10000000 must be at least 1 and at most 65536"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000 must be at least 1 and at"),
        ({"vocab_size": 10**9}, "vocab_size = 1000000000 must be at least 1 and at most"),
        (
            {"hidden_size": 2**16, "num_hidden_layers": 100},
            "M parameters x 16 bytes of weights, gradients and moments), but",
        ),
        ({"hidden_size": 2**14, "num_hidden_layers": 1000}, " GiB are free on cpu: give a smaller"),
    ],
)
def test_a_model_that_cannot_be(folder: Folder, sizes: dict[str, int], message: str) -> None:
    path = folder.write("m.json", json.dumps(SIZES | sizes))
    started = time.process_time()
    folder.refused(str(path), message, model=path)
    assert time.process_time() - started < 5


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1e-3}, "learning_rate = -0.001 must be more than 0"),
        ({"learning_rate": "inf"}, "learning_rate = inf must be a finite number"),
        ({"learning_rate": "fast"}, "--learning-rate fast: must be a number"),
        ({"mlm_probability": 1.5}, "mlm_probability = 1.5 must be more than 0 and less than 1"),
        ({"max_steps": 0}, "max_steps = 0 must be at least 1"),
        ({"tokens_per_batch": 16}, "tokens_per_batch = 16 must be at least max_seq_length = 32"),
        ({"vocab_size": 5}, "vocab_size = 5 must be at least 100"),
        ({"num_threads": 10**6}, "num_threads = 1000000 must be at least 0 and at most 1024"),
        ({"dataloader_num_workers": 10**20}, f"{10**20} must be at least 0 and at most 256"),
        ({"max_eval_batches": 10**20}, f"{10**20} must be at least 1 and at most 100000"),
        ({"tokens_per_batch": 2**31}, "tokens_per_batch = 2147483648 must be at least 8 and at"),
        (
            {"gradient_accumulation_steps": 2**16, "tokens_per_batch": 2**24},
            "tokens_per_batch = 16777216 with gradient_accumulation_steps = 65536",
        ),
        ({"hidden_dropout_prob": 1 - 1e-9}, "must be at least 0 and at most 0.99"),
        ({"device": "cuda:128"}, "device = 'cuda:128' must be auto, cpu, cuda or cuda:N"),
        ({"device": "gpu"}, "device = 'gpu' must be auto, cpu, cuda or cuda:N"),
        ({"resume": "nowhere"}, "resume = 'nowhere': no such file or folder"),
        ({"config": "nowhere.toml"}, "nowhere.toml: cannot be read"),
        ({"lr_scheduler_typ": "linear"}, "did you mean --lr-scheduler-type?"),
    ],
)
def test_bad_settings(folder: Folder, options: dict[str, Any], message: str) -> None:
    folder.refused(message, **options)


def test_unknown_key_of_a_config_names_the_nearest(folder: Folder) -> None:
    path = folder.write("run.toml", "learning_rte = 1e-3\n")
    folder.refused(
        f"{path}: unknown setting 'learning_rte': did you mean 'learning_rate'?", config=path
    )


def test_a_missing_gpu_is_told_before_the_work(folder: Folder) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, lines = folder.run(device="cuda")
    assert status == 2
    assert lines == [
        "fastbert: error: device = 'cuda': this torch sees no GPU; use device = 'cpu' or 'auto'"
    ]
    assert not folder.out.exists()


# The output folder


def test_an_output_folder_that_is_taken(folder: Folder) -> None:
    folder.succeeds()
    folder.refused(f"out = '{folder.out}' already holds another run", "--resume auto")
    folder.write("notes/plan.md", "Do not touch.")
    folder.refused("already holds other files: name another folder", out=folder.path / "notes")
    file = folder.write("file", "x")
    folder.refused(f"out = '{file}' is a file", out=file)
    folder.refused("cannot be written: Not a directory", out=file / "run")
    folder.refused("File name too long", out=folder.path / ("x" * 300))
    assert (folder.path / "notes/plan.md").read_text() == "Do not touch."
    (folder.path / "empty").mkdir()
    folder.out = folder.path / "empty"
    folder.succeeds()


def test_an_output_folder_that_cannot_be_written(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    place: Path = folder.path / "locked"
    place.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere
        if not Path("/proc/sys").exists():
            pytest.skip("no place that root cannot write")
        place = Path("/proc/sys")
    folder.refused(
        f"out = '{place}/run' cannot be written", "name another folder", out=place / "run"
    )


def test_folders_made_for_a_refused_run_go_again(folder: Folder) -> None:
    path = folder.write("c.txt", "Only one sentence of words.")
    folder.refused("a single sentence", data=path, out=folder.path / "a/b/run")
    (folder.path / "empty").mkdir()
    folder.refused("a single sentence", data=path, out=folder.path / "empty")


def test_an_interrupt_while_preparing_leaves_nothing(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastbert.train import prepare

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "build_shards", interrupted)
        status, lines = folder.run()
    assert (status, lines[-1]) == (130, "fastbert: interrupted")
    assert not folder.out.exists()
    folder.succeeds()


# A full disk


def full_disk(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_full_before_the_first_step(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbert.data import shards
    from fastbert.data.tokenize import WordPiece

    for target, name in [(WordPiece, "save"), (shards, "_write"), (Path, "write_text")]:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full_disk)
            status, lines = folder.run()
        assert status == 1
        assert lines[-1].startswith(f"fastbert: error: {folder.out}"), name
        assert "no space left on" in lines[-1].lower(), name
        assert not folder.out.exists(), name
    folder.succeeds()


def test_a_disk_full_at_a_checkpoint_keeps_the_last_whole_one(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastbert.train import checkpoint

    save_file, calls = checkpoint.save_file, []

    def fills_up(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 4:  # the second file of the second checkpoint
            path.write_bytes(b"half")
            full_disk()
        save_file(tensors, path)

    options = {"max_steps": 6, "save_steps": 2, "save_total_limit": 1}
    monkeypatch.setattr(checkpoint, "save_file", fills_up)
    status, lines = folder.run(**options)
    checkpoints = folder.out / "checkpoints"
    assert status == 1
    assert lines[-1] == (
        f"fastbert: error: {checkpoints}/step-000004: cannot write the checkpoint: No space left "
        "on device; make room and go on with --resume auto (the newest whole checkpoint is "
        f"{checkpoints}/step-000002)"
    )
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    said = folder.succeeds(**options, resume="auto")
    assert said[0] == "resume: going on from step 2"


def test_a_disk_full_at_the_end(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.figure

    monkeypatch.undo()  # the picture is drawn

    from fastbert.hf import weights

    for target, name, what in [
        (weights, "save_file", "hf"),
        (matplotlib.figure.Figure, "savefig", "loss.png"),
    ]:
        folder.out = folder.path / name
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full_disk)
            status, lines = folder.run()
        assert status == 1
        assert lines[-1].startswith(f"fastbert: error: {folder.out}/{what}: "), lines
        assert "No space left on device" in lines[-1]
        assert not list(folder.out.rglob(".*"))
        folder.succeeds(resume="auto")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["metrics", "tensorboard"])
def test_a_disk_full_between_checkpoints(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from fastbert.train import report
    from fastbert.train.loop import _Trainer

    one_step = _Trainer._one_step

    def fills_up(self: _Trainer) -> Any:
        if self.step == 3:
            full = open("/dev/full", "w" if name == "metrics" else "wb")  # noqa: SIM115
            if name == "metrics":
                self.reporter._file.close()
                self.reporter._file = full  # type: ignore[assignment]
            else:
                self.reporter._board.close()
                self.reporter._board._records._writer = full
        return one_step(self)

    options: dict[str, Any] = {"max_steps": 6, "save_steps": 2, "logging_steps": 1}
    options["report_to"] = "tensorboard"
    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "_one_step", fills_up)
        status, lines = folder.run(**options)
    assert status == 1
    assert lines[-1] == (
        f"fastbert: error: {folder.out}/metrics.jsonl: cannot be written: No space left on device; "
        "go on with --resume auto once it can"
    )
    folder.succeeds(**options, resume="auto")
    rows = report.read_metrics(folder.out / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


# As a user meets it: the process, its exit code, and no traceback


def test_the_process_itself(folder: Folder) -> None:
    path = folder.write("c.txt", "")
    done = subprocess.run(
        [
            *(sys.executable, "-c", "import sys; from fastbert.cli import main; sys.exit(main())"),
            *folder.argv(data=path),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"fastbert: error: {path}: holds no text")
    assert not folder.out.exists()


def test_checkpoints_cut_short(folder: Folder) -> None:
    folder.succeeds(max_steps=4, save_steps=2)
    newest = folder.out / "checkpoints/step-000004"
    weights: Callable[[], bytes] = (newest / "weights.safetensors").read_bytes
    (newest / "weights.safetensors").write_bytes(weights()[:1000])
    argv = ["pretrain", "--out", str(folder.out), "--resume"]
    folder.capsys.readouterr()
    assert main([*argv, str(newest)]) == 2
    assert folder.capsys.readouterr().err == (
        f"fastbert: error: {newest}: damaged checkpoint: weights.safetensors is cut short or "
        "changed; --resume auto takes the newest whole one\n"
    )
    assert main([*argv, "auto"]) == 0
    assert folder.capsys.readouterr().err.splitlines()[0] == (
        f"passed over: {newest}: damaged checkpoint: weights.safetensors is cut short or changed"
    )
