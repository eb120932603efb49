"""`fastbert fill-mask`: the words of transformers' pipeline, and mistakes in one line."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import BertModel, pipeline

from fastbert.cli import main

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("the", "cat", "sat", "on", "mat", "dog", "##s"),
]
ONE, TWO = "the [MASK] sat", "the [MASK] sat on the mat, the dog on the [MASK]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_bert: Callable[..., Path]) -> Path:
    return save_bert(tmp_path_factory.mktemp("model"), WORDS, 32)


def lines_of(capsys: pytest.CaptureFixture[str], *argv: object) -> list[str]:
    assert main(["fill-mask", *map(str, argv)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_run_stands_for_its_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "run/hf")
    assert lines_of(capsys, tmp_path / "run", ONE) == lines_of(capsys, folder, ONE)


def test_as_transformers_pipeline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = pipeline("fill-mask", model=str(folder), device="cpu", top_k=4)
    expected = [theirs(ONE), *theirs(TWO)]
    found = [json.loads(line) for line in lines_of(capsys, folder, ONE, TWO, "--top-k=4", "--json")]
    assert [(one["text"], one["mask"]) for one in found] == [(ONE, 1), (TWO, 1), (TWO, 2)]
    for ours, guesses in zip(found, expected, strict=True):
        assert [g["token"] for g in ours["guesses"]] == [g["token"] for g in guesses]
        assert [g["token_str"] for g in ours["guesses"]] == [g["token_str"] for g in guesses]
        assert [g["score"] for g in ours["guesses"]] == pytest.approx([g["score"] for g in guesses])


def test_texts_from_a_file_and_from_standard_input(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "texts"
    file.write_text(f"{ONE}\n\n{TWO}\n")
    from_file = lines_of(capsys, folder, "--file", file, "--top-k", 2)
    assert len(from_file) == 3
    assert from_file[0].startswith(f"{ONE}: ")
    assert from_file[0].count("%") == 2
    assert from_file[2].startswith(f"{TWO} (mask 2 of 2): ")
    monkeypatch.setattr("sys.stdin", io.StringIO(file.read_text()))
    assert lines_of(capsys, folder, "--top-k", 2) == from_file


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["{folder}", "the cat"], "text 1 holds no [MASK]: 'the cat'"),
        (["{folder}", ONE, "cat " * 40 + "[MASK]"], "text 2 has 43 tokens: the model takes 32"),
        (["{folder}", ONE, "--top-k", "13"], "--top-k 13: must be from 1 to 12"),
        (["{folder}", ONE, "--top-k", "many"], "--top-k many: must be an integer"),
        (["{folder}", ONE, "--file", "{folder}"], "--file stands instead of texts"),
        (["{folder}/none", ONE], "no such file or folder"),
        (["{headless}", ONE], " weights, cls.predictions."),
        (["{wordless}", ONE], "holds no tokenizer (tokenizer.json or vocab.txt)"),
        (["{weightless}", ONE], "no model to load"),
    ],
)
def test_mistakes_in_one_line(
    folder: Path,
    tmp_path: Path,
    argv: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"folder": folder}
    for name in ("headless", "wordless", "weightless"):
        places[name] = tmp_path / name
        if any(name in word for word in argv):
            shutil.copytree(folder, places[name])
    if places["headless"].exists():
        BertModel.from_pretrained(folder).save_pretrained(places["headless"])
    if places["wordless"].exists():
        for file in places["wordless"].glob("tokenizer*"):
            file.unlink()
    if places["weightless"].exists():
        (places["weightless"] / "model.safetensors").unlink()
    assert main(["fill-mask", *(word.format(**places) for word in argv)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("fastbert: error: ")
    assert says in said
