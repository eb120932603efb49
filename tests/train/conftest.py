"""A corpus of half a page times sixty, a model of two layers by 32, and the command in-process."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbert.cli import main
from fastbert.train.report import read_metrics

TEXT = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work government "
    "number night point home water room mother area money story fact month lot right study book"
)


def write_corpus(path: Path, documents: int = 60, seed: int = 0) -> None:
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(TEXT.split(), k=rng.randint(4, 14))).capitalize() + "."

    texts = ["\n".join(sentence() for _ in range(rng.randint(4, 9))) for _ in range(documents)]
    path.write_text("\n\n".join(texts) + "\n")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    write_corpus(path)
    return path


def write_model(path: Path) -> None:
    sizes = {
        "model_type": "bert",
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    path.write_text(json.dumps(sizes))


def options_of(corpus: Path, model: Path) -> list[str]:
    text = (
        f"--data {corpus} --model {model} --max-seq-length 32 --tokens-per-batch 256 "
        "--vocab-size 300 --validation-fraction 0.1 --max-steps 20 --warmup-steps 5 "
        "--learning-rate 1e-3 --lr-scheduler-type linear --mlm-probability 0.15 --seed 42 "
        "--logging-steps 1 --eval-steps 10 --save-steps 5 --save-total-limit 10 --precision fp32 "
        "--device cpu --torch-compile off --report-to none --num-threads 1"
    )
    return text.split()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.json"
    write_model(path)
    return path


@pytest.fixture
def settings(corpus: Path, model: Path) -> list[str]:
    """Options of a small run; later ones win."""
    return options_of(corpus, model)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, few_samples: None) -> Path:
    """A run as `settings` has it; nobody writes into it."""
    folder = tmp_path_factory.mktemp("plain")
    write_corpus(folder / "corpus.txt")
    write_model(folder / "model.json")
    settings = options_of(folder / "corpus.txt", folder / "model.json")
    assert main(["pretrain", *settings, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def pretrain(settings: list[str], tmp_path: Path) -> Callable[..., Path]:
    """Runs `fastbert pretrain` with extra options and returns the run's folder."""

    def run(name: str, options: str = "", exit_code: int = 0) -> Path:
        out = tmp_path / name
        assert main(["pretrain", *settings, *options.split(), "--out", str(out)]) == exit_code
        return out

    return run


@pytest.fixture
def resume(tmp_path: Path) -> Callable[..., Path]:
    """Continues a run with nothing but `--resume auto` and extra options."""

    def run(name: str, options: str = "--resume auto", exit_code: int = 0) -> Path:
        out = tmp_path / name
        assert main(["pretrain", *options.split(), "--out", str(out)]) == exit_code
        return out

    return run


@pytest.fixture
def losses() -> Callable[[Path], list[tuple[int, float]]]:
    """(step, loss) of every training row, exactly as written."""

    def read(run: Path) -> list[tuple[int, float]]:
        rows = read_metrics(run / "metrics.jsonl")
        return [(row["step"], row["loss"]) for row in rows if "loss" in row]

    return read
