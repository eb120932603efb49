"""A run that begins with a checkpoint: weights, tokenizer, new words; and how it goes on."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertForPreTraining

from fastbert.cli import main
from fastbert.data.batch import Batch
from fastbert.data.tokenize import WordPiece
from fastbert.hf.weights import to_hf
from fastbert.train.report import read_metrics
from fastbert.train.step import TrainStep

pytestmark = pytest.mark.usefixtures("undrawn")
Run = Callable[..., Path]
Texts = pytest.CaptureFixture[str]
PADDED = 4
"""Rows of the checkpoint that no token has."""


@pytest.fixture
def given(corpus: Path, model: Path, tmp_path: Path) -> Path:
    """A checkpoint of transformers' with a tokenizer beside it."""
    folder = tmp_path / "given"
    tokenizer = WordPiece.train(corpus.read_text().splitlines(), 100)
    config = BertConfig.from_dict(json.loads(model.read_text()))
    config.vocab_size = tokenizer.vocab_size + PADDED
    BertForPreTraining(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/weights.safetensors")


def loss_of(theirs: BertForPreTraining, batch: Batch) -> float:
    """Transformers' loss of a packed batch, sequence by sequence."""
    words, sentences = [], []
    for index in range(batch.num_sequences):
        start, end = batch.cu_seqlens[index : index + 2].tolist()
        found = theirs(
            batch.input_ids[None, start:end], token_type_ids=batch.token_type_ids[None, start:end]
        )
        words.append(found.prediction_logits[0])
        sentences.append(found.seq_relationship_logits)
    mlm = F.cross_entropy(torch.cat(words)[batch.masked_positions], batch.masked_labels)
    labels = batch.next_sentence_labels[: batch.num_sequences]
    return (mlm + F.cross_entropy(torch.cat(sentences), labels)).item()


NO_DROPOUT = "--hidden-dropout-prob 0 --attention-probs-dropout-prob 0"
ONE_STEP = (
    "--validation-fraction 0 --max-steps 1 --warmup-steps 0 --learning-rate 1e-9 --weight-decay 0"
)


def test_the_first_loss_is_that_of_the_checkpoint(
    pretrain: Run, given: Path, monkeypatch: pytest.MonkeyPatch, capsys: Texts
) -> None:
    seen: list[Batch] = []
    call = TrainStep.__call__

    def spy(self: TrainStep, batches: Sequence[Batch]) -> None:
        seen.extend(batches)
        call(self, batches)

    monkeypatch.setattr(TrainStep, "__call__", spy)
    run = pretrain("run", f"--init-from {given} --model auto {ONE_STEP} {NO_DROPOUT}")
    shown = capsys.readouterr().err
    assert f"\ninit: 46 weights of {given}; new, set at random: none\n" in shown
    rows = WordPiece.load(given).vocab_size + PADDED
    assert f"tokenizer: {rows - PADDED} tokens, and {rows} rows in the word embedding\n" in shown

    theirs = BertForPreTraining.from_pretrained(given).eval()
    (batch,) = seen
    assert batch.num_sequences > 4
    loss = read_metrics(run / "metrics.jsonl")[0]["loss"]
    assert loss == pytest.approx(loss_of(theirs, batch), abs=1e-5)

    sizes = json.loads((run / "hf/config.json").read_text())
    assert sizes["vocab_size"] == rows and sizes["num_hidden_layers"] == 2
    trained = BertForPreTraining.from_pretrained(run / "hf").state_dict()
    for name, tensor in theirs.state_dict().items():
        assert (trained[name] - tensor).abs().max() < 1e-7, name
    assert (run / "tokenizer/vocab.txt").read_text() == (given / "vocab.txt").read_text()

    # And on from there: a run is a checkpoint, its hf/ is meant.
    again = pretrain("again", f"--init-from {run} --model auto --no-nsp {ONE_STEP}")
    shown = capsys.readouterr().err
    assert f"init: 42 weights of {run}/hf; new, set at random: none; not used: bert.pool" in shown
    saved = load_file(run / "hf/model.safetensors")
    for name, tensor in to_hf(weights(again, 0), _layers(2)).items():
        assert torch.equal(tensor, saved[name]), name


def _layers(count: int) -> Any:
    from fastbert.config import ModelConfig

    return ModelConfig(num_hidden_layers=count)


PLANTED = "Ferroglyph time people. A ferroglyph way of day.\n"


def test_new_words_and_a_run_that_goes_on_without_what_it_began_with(
    pretrain: Run, resume: Run, given: Path, corpus: Path, tmp_path: Path, capsys: Texts
) -> None:
    corpus.write_text(corpus.read_text() + "\n" + PLANTED * 4)
    words = tmp_path / "words.txt"
    words.write_text("ferroglyph\ntime\n")
    base = WordPiece.load(given)
    options = f"--init-from {given} --model auto --add-tokens {words} --max-steps 4"
    options += " --validation-fraction 0"
    whole = pretrain("whole", options)
    assert "tokenizer: 2 words added, 'ferroglyph', 'time' of" in capsys.readouterr().err
    # Not more tokens than the embedding has rows: the first of those that stood empty.
    old = load_file(given / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    new = weights(whole, 0)["embeddings.word"]
    pieces = base.encode_batch(["ferroglyph", "time"])
    V = base.vocab_size
    assert new.shape == old.shape == (V + PADDED, 32)
    assert torch.equal(new[:V], old[:V]) and torch.equal(new[V + 2 :], old[V + 2 :])
    for index, ids in enumerate(pieces):
        assert len(ids) > 1 and torch.equal(new[V + index], old[ids].mean(0))
    tokenizer = AutoTokenizer.from_pretrained(whole / "hf")
    ids = tokenizer("Ferroglyph time, way", add_special_tokens=False)["input_ids"]
    assert ids == [V, V + 1, *base.encode_batch([", way"])[0]]
    assert BertForMaskedLM.from_pretrained(whole / "hf").config.vocab_size == V + PADDED

    pretrain("parts", f"{options} --stop-at-step 2")
    pretrain("early", f"{options} --stop-at-step 1 --save-steps 0")
    shutil.rmtree(tmp_path / "early/checkpoints/step-000001")  # as if killed in its first step
    shutil.rmtree(given)
    words.unlink()
    for name in ("parts", "early"):
        run = resume(name)
        for file in ("weights.safetensors", "optimizer.safetensors"):
            a, b = (load_file(r / "checkpoints/step-000004" / file) for r in (whole, run))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        assert (run / "hf/model.safetensors").read_bytes() == (
            whole / "hf/model.safetensors"
        ).read_bytes()
    capsys.readouterr()
    for typed, message in (
        ("--add-tokens 3", "add_tokens = '3' differs from '"),
        ("--init-from x", "init_from = 'x' differs from '"),
        ("--model tiny", "model = 'tiny' differs from 'auto' in the checkpoint of step 4"),
    ):
        resume("parts", f"--resume auto {typed}", exit_code=2)
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"fastbert: error: {message}")


def test_words_are_learnt_and_rows_are_added(
    pretrain: Run, given: Path, corpus: Path, tmp_path: Path, capsys: Texts
) -> None:
    corpus.write_text(corpus.read_text() + "\n" + PLANTED * 40)
    base = WordPiece.load(given)
    run = pretrain("run", f"--init-from {given} --add-tokens {PADDED + 3} --max-steps 1")
    shown = capsys.readouterr().err
    assert f"tokenizer: {PADDED + 3} words added, 'ferroglyph', '" in shown
    assert "; the text has " in shown and " without them (-" in shown
    V = base.vocab_size + PADDED + 3
    config = json.loads((run / "hf/config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(run / "hf")
    assert config["vocab_size"] == len(tokenizer) == V
    assert tokenizer("FERROGLYPH", add_special_tokens=False)["input_ids"] == [base.vocab_size]
    old = load_file(given / "model.safetensors")["cls.predictions.bias"]
    new = weights(run, 0)["mlm.bias"]
    assert new.shape == (V,) and torch.equal(new[: base.vocab_size], old[: base.vocab_size])
    assert weights(run, 0)["embeddings.word"].shape == (V, 32)


def test_what_a_run_cannot_begin_with_is_one_line(
    settings: list[str], given: Path, corpus: Path, tmp_path: Path, capsys: Texts
) -> None:
    def copy(name: str, *without: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(given, folder)
        for file in without:
            (folder / file).unlink()
        return folder

    no_words = copy("no-words", "vocab.txt", "tokenizer.json", "tokenizer_config.json")
    no_weights, no_config = copy("no-weights", "model.safetensors"), copy("no", "config.json")
    (tmp_path / "unfinished/checkpoints").mkdir(parents=True)
    larger = tmp_path / "vocab.txt"
    tokens = (given / "vocab.txt").read_text() + "".join(f"more{i}\n" for i in range(5))
    larger.write_text(tokens)
    V, start = len(tokens.splitlines()), f"--init-from {given}"
    R = V - 1
    shown = f"init_from = '{given}'"
    cases = {
        "--init-from nowhere": "init_from = 'nowhere': no such folder (nothing is downloaded)",
        f"{start}/model.safetensors": f"is a file: give its folder, '{given}'",
        f"--init-from {no_weights}": "the folder holds neither model.safetensors nor pytorch_mod",
        f"--init-from {no_config}": "the folder holds no config.json",
        f"--init-from {tmp_path}/unfinished": "is a run without hf/, which is there once the run",
        f"--init-from {no_words}": "the folder holds neither tokenizer.json nor vocab.txt: give",
        f"{start} --tokenizer {larger}": f"has {V} tokens, but {shown} has word embeddings of {R}",
        f"{start} --tokenizer train": "leave tokenizer = 'train' out",
        f"{start} --model mini": f"model = 'mini' has hidden_size = 256, but {shown} has 32",
        f"{start} --max-seq-length 128": "max_seq_length = 128 must be at most 64",
        f"{start} --add-tokens nowhere": "add_tokens = 'nowhere': no such file or folder",
        f"{start} --add-tokens 0": "add_tokens = '0' must be at least 1 and at most 1000000",
        "--add-tokens 7": "add_tokens = '7' needs init_from",
        f"--model-name-or-path {given}": "did you mean --init-from?",
    }
    base = [value for value in settings if value != "--model"]
    base.remove(str(tmp_path / "model.json"))
    for index, (typed, message) in enumerate(cases.items()):
        out = tmp_path / f"out{index}"
        assert main(["pretrain", *base, *typed.split(), "--out", str(out)]) == 2, typed
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("fastbert: error: ") and message in last, (typed, last)
        assert not out.exists(), typed


def test_weights_beside_sizes_are_not_used_and_the_log_says_so(
    pretrain: Run, given: Path, capsys: Texts
) -> None:
    run = pretrain("run", f"--model {given} --max-steps 1 --validation-fraction 0")
    assert (
        f"model = '{given}': its sizes are taken, not its weights; --init-from {given} begins with "
        "them\n"
    ) in capsys.readouterr().err
    assert not (run / "model.json").exists()
