"""A whole small run through the command: what it leaves behind, and that it is what it says."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastbert
from fastbert.cli import main
from fastbert.config import PretrainConfig
from fastbert.data.pack import Packer, evaluation_batches
from fastbert.data.shards import Shards
from fastbert.data.tokenize import WordPiece
from fastbert.settings import load_config
from fastbert.train.report import draw_loss, read_metrics

pytestmark = pytest.mark.usefixtures("undrawn")
Run = Callable[..., Path]
_draw_loss = draw_loss  # before `undrawn` replaces it

ROWS = {"step", "loss", "learning_rate", "tokens_per_second"}
EVALUATION = {"step", "eval/mlm_loss", "eval/mlm_accuracy", "eval/nsp_accuracy"}
EVALUATION |= {"eval/unigram_loss"}


@pytest.fixture
def drawn(undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastbert.train.report.draw_loss", _draw_loss)


def test_a_whole_run(pretrain: Run, drawn: None, capsys: pytest.CaptureFixture[str]) -> None:
    run = pretrain("run", "--report-to tensorboard")
    shown = capsys.readouterr()
    left = {path.name for path in run.iterdir()}
    assert left == {
        *("config.toml", "metrics.jsonl", "tensorboard", "checkpoints", "loss.png", "hf"),
        *("tokenizer", "data"),
    }
    assert not list(run.rglob(".*"))
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert steps == ["step-000005", "step-000010", "step-000015", "step-000020"]

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval/mlm_loss" in row]
    assert len(training) + len(evaluations) == len(rows)
    assert [row["step"] for row in training] == list(range(1, 21))
    assert [row["step"] for row in evaluations] == [10, 20]
    assert all(row.keys() >= ROWS for row in training)
    assert all(row.keys() == EVALUATION for row in evaluations)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["tokens_per_second"] > 0 for row in training)
    assert [row["learning_rate"] for row in training[:6]] == pytest.approx(
        [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]
    )
    assert training[-1]["loss"] < training[0]["loss"]

    picture = (run / "loss.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture[16:24])
    assert 600 <= width <= 2000 and 300 <= height <= 2000
    assert len(picture) > 5000

    assert shown.out.count("[MASK]") == 4 and shown.out.count("it was: ") == 4
    assert str(run / "loss.png") in shown.out and str(run / "hf") in shown.out
    # Reading, tokenizing and training each have their bar, with a rate.
    for bar in ("reading: 100%", "tokenizing: 100%", "pretrain: 100%"):
        assert bar in shown.err
    assert "tokens/s" in shown.err and "tok/s" in shown.err
    assert "step 20: held-out MLM loss" in shown.err


def test_tensorboard_holds_the_same_numbers(pretrain: Run, resume: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain("run", "--report-to tensorboard --stop-at-step 8 --eval-steps 5")
    run = resume("run")
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    rows = read_metrics(run / "metrics.jsonl")
    for name in (ROWS | EVALUATION) - {"step"}:
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted], name
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted])


@pytest.mark.parametrize("nsp", [True, False])
def test_hf_folder_loads_and_computes_the_same(pretrain: Run, nsp: bool) -> None:
    run = pretrain("run", "--max-steps 3" if nsp else "--max-steps 3 --no-nsp")
    trained_as = "BertForPreTraining" if nsp else "BertForMaskedLM"
    assert json.loads((run / "hf/config.json").read_text())["architectures"] == [trained_as]
    of_its_class = getattr(
        transformers, "AutoModelForPreTraining" if nsp else "AutoModelForMaskedLM"
    )
    classes = {of_its_class, transformers.AutoModelForMaskedLM}
    models = {}
    for auto in classes:
        model, info = auto.from_pretrained(run / "hf", output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"], auto
        assert auto is not of_its_class or not info["unexpected_keys"]
        models[type(model).__name__] = model.eval()
    assert trained_as in models and "BertForMaskedLM" in models

    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "hf")
    ours = WordPiece.load(run / "tokenizer")
    text = "The family of a student, at home. [MASK] problem!"
    ids = tokenizer(text)["input_ids"]
    assert ids[1:-1] == ours.encode_batch([text], parse_special=True)[0]
    assert (ids[0], ids[-1], tokenizer.mask_token_id) == (ours.cls_id, ours.sep_id, ours.mask_id)
    assert len(tokenizer) == ours.vocab_size == models[trained_as].config.vocab_size

    batch = {"input_ids": torch.tensor([ids])}
    mine = fastbert.BertForMaskedLM.from_pretrained(run / "hf").eval()
    with torch.no_grad():
        found, want = mine(**batch).logits, models["BertForMaskedLM"](**batch).logits
        assert (found - want).abs().max() < 1e-5
        if nsp:
            both = fastbert.BertForPreTraining.from_pretrained(run / "hf")(**batch)
            theirs = models["BertForPreTraining"](**batch)
            difference = both.seq_relationship_logits - theirs.seq_relationship_logits
            assert difference.abs().max() < 1e-5
    if not nsp:
        rows = read_metrics(run / "metrics.jsonl")
        assert not any("eval/nsp_accuracy" in row for row in rows)


def evaluation_data(run: Path) -> tuple[list[Any], Shards, WordPiece]:
    config = load_config(PretrainConfig, run / "config.toml", {})
    tokenizer = WordPiece.load(run / "tokenizer")
    train = Shards.open(run / "data", "train")
    packing: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            *("tokens_per_batch", "max_seq_length", "nsp", "short_seq_prob", "mlm_probability"),
            *("whole_word_mask", "seed"),
        )
    }
    slots = Packer(train, tokenizer.ids, **packing).N
    held_out = Shards.open(run / "data", "validation")
    found = evaluation_batches(
        held_out, tokenizer.ids, max_batches=config.max_eval_batches, num_slots=slots, **packing
    )
    return found, train, tokenizer


def test_evaluation_by_hugging_faces_model(pretrain: Run) -> None:
    """The last row against transformers' model of hf/, sequence by sequence, and plain counting."""
    run = pretrain("run", "--learning-rate 5e-3 --warmup-steps 2")
    batches, train, tokenizer = evaluation_data(run)
    row = read_metrics(run / "metrics.jsonl")[-1]
    model = transformers.AutoModelForPreTraining.from_pretrained(run / "hf").eval()

    counts = [1] * tokenizer.vocab_size
    for id_ in train.tokens(0, train.num_tokens).tolist():
        counts[id_] += 1
    special = set(tokenizer.special_ids.tolist())
    total = sum(count for id_, count in enumerate(counts) if id_ not in special)

    mlm = unigram = 0.0
    hits = masked = nsp_hits = pairs = 0
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        for index in range(batch.num_sequences):
            start, end = bounds[index : index + 2]
            inside = (batch.masked_positions >= start) & (batch.masked_positions < end)
            inside &= batch.masked_labels != -100
            with torch.no_grad():
                out = model(
                    input_ids=batch.input_ids[None, start:end],
                    token_type_ids=batch.token_type_ids[None, start:end],
                )
            for position, label in zip(
                batch.masked_positions[inside].tolist(),
                batch.masked_labels[inside].tolist(),
                strict=True,
            ):
                scores = torch.log_softmax(out.prediction_logits[0, position - start], -1)
                mlm -= scores[label].item()
                hits += int(scores.argmax()) == label
                unigram -= math.log(counts[label] / total)
                masked += 1
            label = int(batch.next_sentence_labels[index])
            if label != -100:
                nsp_hits += int(out.seq_relationship_logits.argmax()) == label
                pairs += 1
    assert masked > 50 and pairs > 10
    assert row["eval/mlm_loss"] == pytest.approx(mlm / masked, rel=1e-5)
    assert row["eval/mlm_accuracy"] == pytest.approx(hits / masked)
    assert row["eval/nsp_accuracy"] == pytest.approx(nsp_hits / pairs)
    assert row["eval/unigram_loss"] == pytest.approx(unigram / masked, rel=1e-5)


def test_evaluation_is_the_same_whenever_it_is_made(pretrain: Run) -> None:
    often = pretrain("often", "--max-steps 6 --eval-steps 1")
    seldom = pretrain("seldom", "--max-steps 6 --eval-steps 0")
    all_rows = read_metrics(often / "metrics.jsonl")
    assert all_rows[-1] == read_metrics(seldom / "metrics.jsonl")[-1]
    assert [row["step"] for row in all_rows if "eval/mlm_loss" in row] == [1, 2, 3, 4, 5, 6]
    # Evaluating leaves no trace in the training.
    weights = [(run / "hf/model.safetensors").read_bytes() for run in (often, seldom)]
    assert weights[0] == weights[1]


def test_the_config_of_a_run_repeats_it(
    pretrain: Run, losses: Callable[..., Any], tmp_path: Path
) -> None:
    run = pretrain("run", "--max-steps 6 --no-nsp --hidden-dropout-prob 0.2 --seed 3")
    again = tmp_path / "again"
    assert main(["pretrain", "--config", str(run / "config.toml"), "--out", str(again)]) == 0
    assert losses(again) == losses(run)
    texts = [(folder / "config.toml").read_text() for folder in (run, again)]
    texts = [text.rpartition("\n# SHA-256 of what stands above: ")[0] for text in texts]
    assert texts[0].replace(str(run), str(again)) == texts[1] != ""


def test_learning_beats_the_unigram_baseline(
    settings: list[str], corpus: Path, tmp_path: Path
) -> None:
    # Each document says one word over and over: a unigram model cannot know which.
    words = corpus.read_text().split()[:12]
    lines = [" ".join([words[index % 12]] * 12) + "\n\n" for index in range(400)]
    corpus.write_text("".join(lines))
    out = tmp_path / "run"
    options = "--max-steps 90 --learning-rate 1e-2 --warmup-steps 10 --no-nsp --eval-steps 0"
    options += " --vocab-size 100 --save-steps 0 --hidden-dropout-prob 0"
    assert main(["pretrain", *settings, *options.split(), "--out", str(out)]) == 0
    row = read_metrics(out / "metrics.jsonl")[-1]
    assert row["eval/mlm_loss"] < row["eval/unigram_loss"] - 0.8
    assert row["eval/mlm_accuracy"] > 0.5


def test_without_a_held_out_split(
    pretrain: Run, drawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pretrain("run", "--max-steps 2 --validation-fraction 0")
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert "[MASK]" not in capsys.readouterr().out
    assert (run / "loss.png").exists()


def test_long_sentences_get_a_prediction_too(
    pretrain: Run, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = corpus.read_text().replace(".", "").replace("\n", " ").lower().split()
    parts = [" ".join(words[i : i + 60]) for i in range(0, 1800, 60)]
    corpus.write_text("\n\n".join(parts))
    pretrain("run", "--max-steps 1")
    assert capsys.readouterr().out.count("[MASK]") >= 1


def test_gradient_accumulation_counts_all_tokens(pretrain: Run) -> None:
    run = pretrain("run", "--max-steps 3 --gradient-accumulation-steps 3")
    tokens = [row["tokens"] for row in read_metrics(run / "metrics.jsonl") if "tokens" in row]
    assert len(tokens) == 3
    assert all(0.98 * 768 * (i + 1) <= count <= 768 * (i + 1) for i, count in enumerate(tokens))


@pytest.mark.parametrize("name", ["model.json", "folder"])
def test_model_from_a_config_json(
    settings: list[str], model: Path, tmp_path: Path, name: str
) -> None:
    path = model
    if name == "folder":
        path = tmp_path / "sizes"
        path.mkdir()
        (path / "config.json").write_text(model.read_text())
    out = tmp_path / "run"
    options = ["--model", str(path), "--max-steps", "1", "--out", str(out)]
    assert main(["pretrain", *settings, *options]) == 0
    written = json.loads((out / "hf/config.json").read_text())
    asked = json.loads(model.read_text())
    assert {key: written[key] for key in asked} == asked | {"vocab_size": written["vocab_size"]}


def test_a_preset(settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = f"--model tiny --max-steps 1 --out {out}"
    assert main(["pretrain", *settings, *options.split()]) == 0
    written = json.loads((out / "hf/config.json").read_text())
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    assert [written[name] for name in names] == [2, 128, 2, 512]


def test_runs_are_numbered(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = [*settings, "--max-steps", "2", "--validation-fraction", "0"]
    assert main(["pretrain", *short, "--stop-at-step", "1"]) == 0
    assert main(["pretrain", *short, "--stop-at-step", "1"]) == 0
    assert [path.name for path in sorted((tmp_path / "runs").iterdir())] == [
        "pretrain-001",
        "pretrain-002",
    ]
    assert main(["pretrain", "--resume", "auto"]) == 0  # the newest
    assert not (tmp_path / "runs/pretrain-001/checkpoints/step-000002").exists()
    assert (tmp_path / "runs/pretrain-002/checkpoints/step-000002").exists()
