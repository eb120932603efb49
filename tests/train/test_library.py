"""`fastbert.pretrain`: a run from Python, what its callbacks hear, and how they end it."""

import json
import math
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import fastbert
from fastbert.errors import RunError, UserError
from fastbert.train.report import draw_loss, read_metrics

from .conftest import write_corpus

Told = list[tuple[Any, ...]]

pytestmark = pytest.mark.usefixtures("undrawn")
_draw_loss = draw_loss  # before `undrawn` replaces it


class Recorder(fastbert.Callback):
    """Notes what it is told; does what `then` says of it."""

    def __init__(self, then: Callable[[str, int], Any] = lambda event, step: None) -> None:
        self.told: Told = []
        self.then = then

    def on_train_begin(self, config: fastbert.PretrainConfig, folder: Path) -> Any:
        self.told.append(("begin", config, folder))
        return self.then("begin", 0)

    def on_log(self, step: int, metrics: dict[str, float]) -> Any:
        self.told.append(("log", step, metrics))
        return self.then("log", step)

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> Any:
        self.told.append(("evaluate", step, metrics))
        return self.then("evaluate", step)

    def on_save(self, step: int, folder: Path) -> Any:
        self.told.append(("save", step, (folder / "state.json").is_file()))
        return self.then("save", step)

    def on_train_end(self, result: fastbert.PretrainResult) -> None:
        self.told.append(("end", result))
        self.then("end", result.steps)

    def steps(self, event: str) -> list[int]:
        return [one[1] for one in self.told if one[0] == event]


Make = Callable[..., fastbert.PretrainConfig]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    write_corpus(folder / "corpus.txt")
    sizes = {
        "model_type": "bert", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(sizes))
    return folder


def make_config(place: Path, out: Path, **changes: Any) -> fastbert.PretrainConfig:
    small: dict[str, Any] = {
        "data": str(place / "corpus.txt"), "model": str(place / "model.json"), "max_seq_length": 32,
        "tokens_per_batch": 256, "vocab_size": 300, "validation_fraction": 0.1, "max_steps": 8,
        "warmup_steps": 2, "logging_steps": 2, "eval_steps": 3, "save_steps": 4,
        "precision": "fp32", "device": "cpu", "torch_compile": "off", "report_to": "none",
        "out": str(out),
    }  # fmt: skip
    return fastbert.PretrainConfig(**small | changes)


@pytest.fixture
def config(place: Path, tmp_path: Path) -> Make:
    """Settings of a small run, changed by keywords."""
    return partial(make_config, place, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(place: Path, few_samples: None) -> tuple[fastbert.PretrainResult, Recorder]:
    """What a run of 8 steps found, and what it told."""
    heard = Recorder()
    callbacks = iter([heard, fastbert.Callback()])
    return fastbert.pretrain(make_config(place, place / "whole"), callbacks), heard


def test_a_run_tells_what_it_logs_and_returns_what_it_found(
    whole: tuple[fastbert.PretrainResult, Recorder], place: Path
) -> None:
    result, heard = whole
    run = place / "whole"
    rows = read_metrics(run / "metrics.jsonl")
    assert [one[0] for one in heard.told] == [
        *("begin", "log", "evaluate", "log", "save", "log", "evaluate", "log", "save"),
        *("evaluate", "end"),
    ]
    events = [one for one in heard.told if one[0] in ("log", "evaluate")]
    assert [{"step": step, **metrics} for _, step, metrics in events] == rows
    assert heard.steps("save") == [4, 8] and all(one[2] for one in heard.told if one[0] == "save")
    _, resolved, folder = heard.told[0]
    assert folder == run and resolved.learning_rate == 2e-3 * 128 / 32
    assert heard.told[-1] == ("end", result)

    assert (result.folder, result.hf) == (run, run / "hf")
    logged = [row for row in rows if "loss" in row]
    assert (result.steps, result.skipped_steps, result.stopped) == (8, 0, False)
    assert (result.loss, result.tokens) == (logged[-1]["loss"], logged[-1]["tokens"])
    assert result.evaluation is not None
    assert result.evaluation.metrics().items() <= rows[-1].items()
    rates = [row["tokens_per_second"] for row in logged]
    assert min(rates) < result.tokens_per_second < max(rates)


def test_a_callback_stops_a_run_which_then_goes_on_bit_for_bit(
    config: Make,
    whole: tuple[fastbert.PretrainResult, Recorder],
    capsys: pytest.CaptureFixture[str],
) -> None:
    heard = Recorder(lambda event, step: event == "evaluate")
    result = fastbert.pretrain(config(), callbacks=[heard])
    assert (result.stopped, result.steps) == (True, 3)
    assert "step 3: stopped by Recorder" in capsys.readouterr().err
    assert heard.steps("save") == [3] and heard.steps("evaluate") == [3]
    assert result.evaluation is not None and (result.hf / "model.safetensors").exists()
    settings = fastbert.PretrainConfig.load(result.folder / "config.toml", resume="auto")
    resumed = fastbert.pretrain(settings)
    assert (resumed.steps, resumed.stopped) == (8, False)
    assert (resumed.evaluation, resumed.tokens) == (whole[0].evaluation, whole[0].tokens)
    weights = [(one.hf / "model.safetensors").read_bytes() for one in (resumed, whole[0])]
    assert weights[0] == weights[1]


def test_it_can_be_stopped_before_it_begins(config: Make) -> None:
    result = fastbert.pretrain(config(), [Recorder(lambda event, step: event == "begin")])
    assert (result.stopped, result.steps, result.tokens) == (True, 0, 0)
    assert result.tokens_per_second == 0 and math.isnan(result.loss)


def test_what_a_run_begins_with_is_saved_once(
    config: Make, whole: tuple[fastbert.PretrainResult, Recorder]
) -> None:
    first = whole[0].folder
    heard = Recorder(lambda event, step: event == "begin")
    begun = config(model="auto", init_from=first)
    assert begun.init_from == str(first), "as text"
    assert config(model="auto", init_from=first, add_tokens=2).add_tokens == "2"
    result = fastbert.pretrain(begun, [heard])
    assert (result.stopped, result.steps, heard.steps("save")) == (True, 0, [0])


def test_callbacks_take_no_time_of_the_steps(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waited = time.perf_counter, [0.0]

    def wait(event: str, step: int) -> None:
        waited[0] += 1000 * (event == "log")

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + waited[0])
    result = fastbert.pretrain(config(max_steps=3, logging_steps=1), [Recorder(wait)])
    assert waited[0] == 3000 and result.tokens / result.tokens_per_second < 500


@pytest.mark.parametrize("event", ["log", "evaluate"])
def test_what_a_callback_raises_comes_after_a_checkpoint(config: Make, event: str) -> None:
    def fail(name: str, step: int) -> None:
        if name == event:
            raise ZeroDivisionError("of mine")

    heard, behind = Recorder(fail), Recorder()
    with pytest.raises(ZeroDivisionError, match="of mine") as raised:
        fastbert.pretrain(config(max_steps=2, logging_steps=1), [heard, behind])
    assert traceback.extract_tb(raised.value.__traceback__)[-1].name == "fail"
    folder = heard.told[0][2]
    _, step, *_ = heard.told[-1]
    assert step == {"log": 1, "evaluate": 2}[event]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"step-{step:06d}"]
    assert not (folder / "run.lock").exists() and not (folder / "hf").exists()
    assert len(behind.told) == len(heard.told) - 1, "none hears what came after"


def test_in_a_thread_beside_the_program(config: Make) -> None:
    found: list[Any] = []

    def work() -> None:
        stop_at_the_last = Recorder(lambda event, step: step == 2)
        found.append(fastbert.pretrain(config(max_steps=2), [stop_at_the_last]))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (found[0].steps, found[0].stopped) == (2, False)


def test_errors_are_the_commands(config: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data = 'missing': no such file or folder"):
        fastbert.pretrain(config(data="missing"))
    with pytest.raises(UserError, match=r"config must be a fastbert\.PretrainConfig"):
        fastbert.pretrain({"data": "builtin"})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown setting 'lr': did you mean 'learning_rate'"):
        fastbert.PretrainConfig(lr=1e-3)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="unknown setting 'hidden': did you mean"):
        fastbert.ModelConfig(hidden=3)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="max_steps = 0 must be at least 1"):
        config(max_steps=0)
    with pytest.raises(UserError, match=r"none\.toml: cannot be read"):
        fastbert.PretrainConfig.load(tmp_path / "none.toml")
    assert issubclass(fastbert.UserError, fastbert.FastbertError) and RunError is fastbert.RunError
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("callbacks", "told"),
    [
        (fastbert.Callback(), "callbacks must be a list"),
        (3, "callbacks must be a list"),
        ([fastbert.Callback], r"Callback is a class: give an object, with \(\)"),
        ([print], r"a builtin_function_or_method is no fastbert\.Callback: derive it from that"),
    ],
)
def test_what_is_no_callback_is_refused(
    config: Make, tmp_path: Path, callbacks: Any, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        fastbert.pretrain(config(), callbacks)
    assert not (tmp_path / "run").exists()


def test_settings_errors_and_callbacks_wait_for_no_torch() -> None:
    code = (
        "import sys, fastbert\n"
        "fastbert.PretrainConfig(), fastbert.Callback, fastbert.pretrain, fastbert.UserError\n"
        "fastbert.model_config('base', vocab_size=9)\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    for name in fastbert.__all__:
        assert getattr(fastbert, name) is not None
    assert set(fastbert.__all__) <= set(dir(fastbert))


def test_a_picture_leaves_the_programs_backend_alone(
    whole: tuple[fastbert.PretrainResult, Recorder],
) -> None:
    import matplotlib

    backend = matplotlib.rcParams._get_backend_or_none()
    assert _draw_loss(whole[0].folder).stat().st_size > 5000
    assert matplotlib.rcParams._get_backend_or_none() == backend
