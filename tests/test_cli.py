"""The command: what it hands over, what it refuses in one line, and how fast it does either."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

import fastbert
from fastbert import cli
from fastbert.commands import doctor
from fastbert.config import PretrainConfig, model_config
from fastbert.errors import RunError, UserError
from fastbert.ops import REFERENCE
from fastbert.settings import load_config, sealed_toml, settings
from fastbert_bench.config import StepBenchConfig

ROOT = Path(__file__).parent.parent
HOMES = (ROOT, ROOT / "kernels", ROOT / "benchmarks")
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, HOMES))}
COMMAND = "import sys; from fastbert.cli import main; sys.exit(main())"


def run(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *argv],
        text=True,
        timeout=60,
        check=False,
        **{"capture_output": True, "env": ENV, **options},
    )


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stands in for the rooms that import torch; `calls` is what they were handed."""
    found = types.SimpleNamespace(calls=[], error=None)

    def receive(*args: Any, **kwargs: Any) -> None:
        found.calls.append((args, kwargs))
        if found.error:
            raise found.error

    def stand_in(name: str, **attributes: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    found.export_run, found.check_tokenizer = object(), object()
    door = {"export_run": found.export_run, "check_tokenizer": found.check_tokenizer}
    stand_in("fastbert.hf.export", **door)
    found.read_initial = object()
    stand_in("fastbert.hf.initial", read_initial=found.read_initial)
    stand_in("fastbert.train", __path__=[])
    stand_in("fastbert.train.loop", pretrain=receive)
    said = {"asked": lambda *_: "", "table": lambda _: ""}
    stand_in("fastbert_bench.suites.step", run=receive, **said)
    stand_in("fastbert_bench.measure.result", finish=lambda *_: None)
    return found


def test_pretrain_hands_over_the_config_and_the_export(
    rooms: types.SimpleNamespace, tmp_path: Path
) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text("max_steps = 500\nseed = 1\nnsp = true\n")
    argv = ["--config", str(toml), "--seed", "7", "--no-nsp", "--whole-word-mask"]
    argv += ["--hidden-dropout-prob", "none", "--learning-rate", "5e-4", "--model=mini"]
    assert cli.main(["pretrain", *argv]) == 0
    ((config, *handed), options) = rooms.calls[0]
    assert config == PretrainConfig(
        max_steps=500, seed=7, nsp=False, whole_word_mask=True, learning_rate=5e-4, model="mini"
    )
    doors = [rooms.export_run, rooms.check_tokenizer, rooms.read_initial]
    assert (handed, options) == ([*doors, ()], {})


def test_bench_step_hands_over_its_config(rooms: types.SimpleNamespace) -> None:
    assert cli.main(["bench", "step", "--rounds", "3", "--against", "hf-sdpa"]) == 0
    (((given,), _),) = rooms.calls
    assert given == StepBenchConfig(rounds=3, against="hf-sdpa")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("data = 'x' is\nempty"), 2, "error: data = 'x' is empty"),
        (RunError("loss is nan at step 3"), 1, "error: loss is nan at step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ValueError("a\nb"),
            1,
            "failed: ValueError: a b (run again with --debug for the traceback)",
        ),
        (
            MemoryError(),
            1,
            "error: out of memory: give smaller sizes (MemoryError)",
        ),
        # A pipe to a worker, not stdout: that is a failure like any other.
        (
            BrokenPipeError(errno.EPIPE, "Broken pipe"),
            1,
            "failed: BrokenPipeError: [Errno 32] Broken pipe "
            "(run again with --debug for the traceback)",
        ),
    ],
)
def test_errors_are_one_line(
    rooms: types.SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    rooms.error = error
    assert cli.main(["pretrain"]) == status
    assert capsys.readouterr().err == f"fastbert: {line}\n"
    with pytest.raises(type(error)):
        cli.main(["pretrain", "--debug"])


class PanicException(BaseException):
    """As a library in Rust raises it."""


def test_a_panic_is_one_line(
    rooms: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    rooms.error = PanicException("index out of\nbounds")
    assert cli.main(["pretrain"]) == 1
    assert capsys.readouterr().err == (
        "fastbert: failed: a library broke down: index out of bounds (--debug shows where)\n"
    )
    with pytest.raises(PanicException):
        cli.main(["pretrain", "--debug"])


BAD_REQUESTS = [
    ("pretrian", "unknown command 'pretrian': did you mean 'pretrain'? (pretrain, finetune,"),
    ("--seed 1 pretrain", "--seed stands before the command: write fastbert COMMAND --seed"),
    ("bench", "bench needs one of step, kernels, data, inference, convergence, dropin"),
    ("bench stp", "unknown bench 'stp': did you mean 'step'? (step, kernels,"),
    ("bench report", "bench report needs files or folders: fastbert bench report"),
    ("bench report no/such", "no/such: no such file or folder"),
    ("bench data --num-workers 1,x", "num_workers = '1,x' must be integers of at least 0"),
    ("bench kernels --op gelu", "op = 'gelu' must be one of attention, dropout"),
    ("bench inference --against hf", "against = 'hf' must be one of hf-eager, hf-sdpa,"),
    ("bench dropin --task mlm,nsp", "task = 'mlm,nsp': 'nsp' must be one of mlm, classification"),
    ("bench convergence --data no/such", "data = 'no/such': no such file or folder"),
    ("bench convergence --png no/such/x.png", "png = 'no/such/x.png': no such folder"),
    ("bench convergence --png x.json", "png = 'x.json' must end in one of .png, .svg, .pdf,"),
    ("bench convergence --target-loss 0", "target_loss = 0.0 must be more than 0"),
    (
        "bench step --against hf",
        "against = 'hf' must be one of hf-eager, hf-sdpa, hf-sdpa-cudnn, hf-flash,",
    ),
    ("bench step --max-seq-length 513", "max_seq_length = 513 must be at most 512, max_position"),
    ("estimate --gpu h10", "gpu = 'h10' must be one of h100, h200, a100-80gb, a100-40gb, cpu: did"),
    ("estimate --gpu h100,h200", "gpu = 'h100,h200' must be one of h100, h200, a100-80gb,"),
    ("estimate --tokens 1.2.3B", "--tokens 1.2.3B: must be a number"),
    ("pretrain --lerning-rate 1", "unknown option --lerning-rate: did you mean --learning-rate?"),
    ("pretrain --lerning-rate=1", "unknown option --lerning-rate: did you mean --learning-rate?"),
    ("pretrain --max_steps 1", "unknown option --max_steps: did you mean --max-steps?"),
    ("pretrain --learning 1", "unknown option --learning"),
    ("pretrain --lr 1", "unknown option --lr: did you mean --learning-rate?"),
    ("pretrain --batch-size=9", "unknown option --batch-size: did you mean --tokens-per-batch?"),
    ("pretrain --epochs 3", "unknown option --epochs: did you mean --max-steps?"),
    ("pretrain --num-train-epochs 3", "unknown option --num-train-epochs: did you mean --max-st"),
    ("pretrain --fp16", "unknown option --fp16: did you mean --precision fp16?"),
    ("pretrain --bf16", "unknown option --bf16: did you mean --precision bf16?"),
    ("pretrain --amp", "unknown option --amp: did you mean --precision?"),
    ("bench convergence --lr 1", "unknown option --lr: did you mean --learning-rate?"),
    ("bench step --lr 1", "unknown option --lr: fastbert bench step has no learning rate"),
    (
        "bench step --batch-ramp-steps 1",
        "unknown option --batch-ramp-steps: fastbert bench step has"
        " no batch ramp steps: did you mean --batch-size?",
    ),
    ("doctor --he", "unknown option --he: did you mean --help?"),
    ("doctor --lr 1", "unknown option --lr: fastbert doctor has no learning rate"),
    ("pretrain --max-seq-length 100000", "max_seq_length = 100000 must be at most 512, max_posit"),
    ("bench convergence --max-seq-length 100000", "max_seq_length = 100000 must be at most 512,"),
    ("estimate --max-seq-length 9000 --tokens-per-batch 64", "max_seq_length = 9000 must be at m"),
    ("pretrain --no-npg", "unknown option --no-npg: did you mean --no-nsp?"),
    ("doctor --jsn", "unknown option --jsn: did you mean --json?"),
    ("pretrain now", "unexpected argument 'now'"),
    ("pretrain --max-steps abc", "--max-steps abc: must be an integer"),
    ("pretrain --max-steps 1e3", "--max-steps 1e3: must be an integer"),
    ("pretrain --max-steps none", "--max-steps none: must be an integer"),
    ("pretrain --max-steps", "--max-steps: expected one argument"),
    ("pretrain --learning-rate x", "--learning-rate x: must be a number"),
    ("pretrain --learning-rate -1e-3", "learning_rate = -0.001 must be more than 0"),
    ("pretrain --learning-rate nan", "learning_rate = nan must be a finite number"),
    ("pretrain --seed -1", "seed = -1 must be at least 0"),
    ("pretrain --precision fp8", "precision = 'fp8' must be auto, fp32, tf32, bf16 or fp16"),
    ("pretrain --data no/such", "data = 'no/such': no such file or folder"),
    ("pretrain --data bultin", "data = 'bultin': no such file or folder: did you mean 'builtin'?"),
    ("pretrain --tokenizer no/such", "tokenizer = 'no/such': no such file or folder"),
    ("pretrain --resume no/such", "resume = 'no/such': no such file or folder"),
    ("pretrain --config no.toml", "no.toml: cannot be read: No such file or directory"),
    ("pretrain --model bsae", "model = 'bsae' is not a preset: did you mean 'base'?"),
    ("pretrain --max-seq-length 1024", "max_seq_length = 1024 must be at most 512"),
    (f"pretrain --out {__file__}", f"out = {__file__!r} is a file: give a folder"),
]


def test_what_is_typed_at_a_resume_is_judged_beside_the_runs_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = PretrainConfig(gradient_accumulation_steps=4, max_seq_length=32, tokens_per_batch=64)
    (tmp_path / "config.toml").write_text(sealed_toml(config))
    argv = ["pretrain", "--resume", "auto", "--out", str(tmp_path), "--batch-ramp-steps", "2"]
    assert cli.main([*argv, "--tokens-per-batch", "32", "--print-config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "batch_ramp_steps = 2" in lines and "tokens_per_batch = 32" in lines
    assert "gradient_accumulation_steps = 4" in lines
    assert cli.main([*argv, "--tokens-per-batch", "16"]) == 2
    assert "tokens_per_batch = 16 must be at least max_seq_length = 32" in capsys.readouterr().err


def test_weights_are_no_model(
    rooms: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").touch()
    assert cli.main(["pretrain", "--model", str(tmp_path / "model.safetensors")]) == 2
    assert f"is a file of weights: give its folder, {str(tmp_path)!r}" in capsys.readouterr().err
    folder = tmp_path / "named.bin"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 3}')
    assert model_config(str(folder)).num_hidden_layers == 3


def test_a_setting_of_another_program_is_known_in_a_file(
    rooms: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text("lr = 1e-4\n")
    assert cli.main(["pretrain", "--config", str(tmp_path / "run.toml")]) == 2
    assert "unknown setting 'lr': did you mean 'learning_rate'?" in capsys.readouterr().err


def test_training_runs_whatever_befalls_the_bench(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "left_of_a_bench" / "__pycache__").mkdir(parents=True)
    (tmp_path / "broken_bench").mkdir()
    (tmp_path / "broken_bench" / "__init__.py").touch()
    (tmp_path / "broken_bench" / "commands.py").write_text("raise RuntimeError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "BENCH", "left_of_a_bench")
    assert cli.main(["--help"]) == 0
    assert "pretrain" in capsys.readouterr().out
    assert cli.main(["bench", "step"]) == 2
    assert "needs the package left_of_a_bench, which is not installed" in capsys.readouterr().err
    monkeypatch.setattr(cli, "BENCH", "broken_bench")
    assert cli.main(["pretrain", "--print-config"]) == 0
    assert cli.main(["doctor", "--jsn"]) == 2
    assert "did you mean --json?" in capsys.readouterr().err


def test_two_files_of_one_name_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one = str(tmp_path / "a.json")
    assert cli.main(["profile", "step", "--json", one, "--trace", one]) == 2
    assert f"trace = {one!r} is the file of json: give another" in capsys.readouterr().err


def test_without_the_bench_its_commands_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "BENCH", "fastbert_no_bench")
    for command in ("bench step", "profile step", "estimate"):
        assert cli.main(command.split()) == 2
        told = "needs the package fastbert_no_bench, which is not installed"
        assert told in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "pretrain" in shown and "doctor" in shown and "bench" not in shown


@pytest.mark.parametrize(("argv", "line"), BAD_REQUESTS)
def test_bad_requests_are_one_line_and_exit_2(
    rooms: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], argv: str, line: str
) -> None:
    assert cli.main(argv.split()) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"fastbert: error: {line}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert rooms.calls == []


def test_help_and_mistakes_never_import_torch() -> None:
    requests = [argv.split() for argv, _ in BAD_REQUESTS]
    requests += [[], ["--help"], ["--version"], ["pretrain", "--help"], ["bench", "step", "-h"]]
    requests += [["pretrain", "--print-config"]]
    code = (
        "import json, sys\n"
        "import fastbert\n"
        "from fastbert.cli import main\n"
        "for argv in json.loads(sys.argv[1]):\n"
        "    main(argv)\n"
        "    slow = {'torch', 'transformers', 'triton', 'numpy'} & set(sys.modules)\n"
        "    assert not slow, (argv, slow)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(requests)],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("argv", [[], ["--version"], ["pretrain", "--help"], ["pretrain", "--x"]])
def test_help_and_mistakes_answer_within_a_second(argv: list[str]) -> None:
    seconds = []
    for _ in range(3):  # the best of three, because the machine may be busy
        start = time.perf_counter()
        run(*argv)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 1:
            return
    pytest.fail(f"took {min(seconds):.2f} s")


def test_help_shows_every_setting_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert cli.main(["pretrain", "--help"]) == 0
    shown = capsys.readouterr().out
    for setting in settings(PretrainConfig):
        assert f"  {setting.flag}" in shown
        assert setting.help in shown
    for line in ("run: ", "model: ", "data: ", "train: ", "logs: "):
        assert f"\n{line}" in shown
    assert "optimizer steps of the whole run (default: 2400)" in shown
    assert "--nsp, --no-nsp" in shown
    assert "(default: true)" in shown


def test_bare_command_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "pretrain" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastbert {fastbert.__version__}\n"


def test_print_config_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["pretrain", "--seed", "3", "--learning-rate", "1e-7", "--print-config"]) == 0
    path = tmp_path / "run.toml"
    path.write_text(capsys.readouterr().out)
    assert load_config(PretrainConfig, path, {}) == PretrainConfig(seed=3, learning_rate=1e-7)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_left_is_no_error(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run(
        *("pretrain", "--print-config"),
        stdout=writer,
        stderr=subprocess.PIPE,
        capture_output=False,
        env={**ENV, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = run(
            "pretrain", "--print-config", stdout=full, stderr=subprocess.PIPE, capture_output=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith("fastbert: failed: OSError: [Errno 28] No space left on device")
    assert done.stderr.count("\n") == 1


def test_doctor_answers_one_line_per_item(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = {"python", "torch", "triton", "transformers", "flash-attn", "apex", "C++ compiler"}
    assert expected <= set(report)
    known = [field.name for field in dataclasses.fields(REFERENCE)]
    found = [item.removeprefix("op ") for item in report if item.startswith("op ")]
    assert found == [name for name in known if callable(getattr(REFERENCE, name))]
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == list(report)


def test_doctor_knows_nvidias_apex_from_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not doctor._has_nvidia_apex()
    (tmp_path / "apex" / "optimizers").mkdir()
    (tmp_path / "apex" / "optimizers" / "__init__.py").touch()
    assert doctor._has_nvidia_apex()


def test_lazy_names_of_the_package() -> None:
    assert {"Batch", "BertModel"} <= set(dir(fastbert))
    with pytest.raises(AttributeError, match="no attribute 'BertModle'"):
        _ = fastbert.BertModle
