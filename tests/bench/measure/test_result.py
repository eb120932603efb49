"""Result files: what fits the schema, and where figures go that do not fit or find no room."""

import builtins
import copy
import errno
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert.commands.checks import check_output
from fastbert.errors import RunError, UserError
from fastbert_bench.measure import energy, schema
from fastbert_bench.measure import result as results
from fastbert_bench.report import files as report_files
from fastbert_bench.suites import convergence

ROOT = Path(__file__).parents[3]


@pytest.fixture
def result():
    row = {
        "name": "fastbert", "ms": 2.5, "rounds_ms": [2.0, 3], "mfu": None, "sizes": {"T": 4},
        "direction": "forward", "bound": None, "same_work": True, "peak_memory_bytes": 7,
        "kernels": [{"name": "k", "origin": "ours", "calls": 1, "ms": 1.0}], "eval_steps": [0, 5],
    }  # fmt: skip
    missing = [{"name": "energy", "why": "no counter"}]
    return results.make("step", {"model": "tiny"}, torch.device("cpu"), [row], missing)


def places(value, place=()):
    """Every place in a value, the value itself first."""
    yield place
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        yield from places(value[key], (*place, key))


def put(value, place, new):
    """A copy of `value` with another one at `place`, or without it where `new` is `put`."""
    if not place:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if new is put:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return value


# The schema


def test_it_agrees_with_jsonschema(result):
    """About 900 variants of a result, each with one value replaced or left out."""
    jsonschema = pytest.importorskip("jsonschema")
    judge = jsonschema.Draft202012Validator(schema.SCHEMA)
    verdicts = set()
    for place in places(result):
        for new in (None, True, 0, 1, 1.0, -1, 0.5, "", "cpu", [], [None], {}, [{}], put):
            variant = put(result, place, new) if place or new is not put else result
            fits = judge.is_valid(variant)
            verdicts.add(fits)
            if fits:
                schema.check(variant)
            else:
                with pytest.raises(schema.MisfitError):
                    schema.check(variant)
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("place", "new", "line"),
    [
        (("rows", 0, "ms"), 0, "rows/0/ms: 0 is not more than 0"),
        (("rows", 0, "ms"), "fast", "rows/0/ms: 'fast' is not of type number"),
        (("rows", 0, "eval_steps", 1), 0.5, "rows/0/eval_steps/1: 0.5 is not of type integer"),
        (("conditions", "date"), put, "conditions: 'date' is a required property"),
        (("missing", 0, "why"), "", "missing/0/why: '' is shorter than 1"),
        ((), [], "the file: [] is not of type object"),
    ],
)
def test_a_misfit_says_where_and_why(result, place, new, line):
    with pytest.raises(schema.MisfitError) as raised:
        schema.check(put(result, place, new))
    assert str(raised.value) == line


def test_a_keyword_that_is_not_known_is_no_keyword_that_holds():
    with pytest.raises(KeyError):
        schema.check({}, {"patternProperties": {}})


# Writing


def test_a_result_is_written_whole_and_can_be_read(result, tmp_path):
    results.write(result, tmp_path / "step.json")
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]
    assert json.loads((tmp_path / "step.json").read_text()) == result
    (read,) = report_files.load([str(tmp_path)])[0]
    assert read.kind == "step"


def test_a_result_that_does_not_fit_keeps_its_figures(result, tmp_path):
    good = tmp_path / "step.json"
    results.write(result, good)
    before = good.read_bytes()
    bad = put(result, ("rows", 0, "ms"), -1)
    with pytest.raises(RunError) as raised:
        results.write(bad, good)
    kept = tmp_path / "step.json.unfit"
    assert str(raised.value) == (
        "the result does not fit schema.json: rows/0/ms: -1 is not more than 0; "
        f"its figures are in {kept}"
    )
    assert json.loads(kept.read_text()) == bad and good.read_bytes() == before
    # `bench report` takes the folder's other file only
    found, refused = report_files.load([str(tmp_path)])
    assert [one.file for one in found] == [str(good)] and refused == []


def test_what_json_cannot_hold_is_kept_in_words(result, tmp_path):
    result |= {"array": np.arange(2), ("a", 1): {torch.float32: Path("x")}, "number": np.int64(3)}
    with pytest.raises(RunError, match="does not fit"):
        results.write(result, tmp_path / "step.json")
    kept = json.loads((tmp_path / "step.json.unfit").read_text())
    assert kept["array"] == [0, 1] and kept["number"] == 3
    assert kept["('a', 1)"] == {"torch.float32": repr(Path("x"))}
    assert kept["rows"] == result["rows"]


@pytest.fixture
def disk(monkeypatch):
    """A set of folders that are full."""
    full: set[Path] = set()
    replace = os.replace

    def replace_or_fail(source, target):
        if any(Path(target).is_relative_to(folder) for folder in full):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_or_fail)
    return full


@pytest.mark.parametrize("fits", [True, False])
def test_without_room_the_figures_go_elsewhere(result, fits, tmp_path, disk, monkeypatch, capsys):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    result["rows"][0]["ms"] = 1.5 if fits else -1.5
    disk.add(here)
    with pytest.raises(RunError) as raised:
        results.write(result, here / "step.json")
    (kept,) = (path for path in elsewhere.rglob("*") if path.is_file())
    assert str(raised.value).endswith(f"; its figures are in {kept}")
    assert ("No space left on device" in str(raised.value)) == fits
    assert json.loads(kept.read_text()) == result
    assert list(here.iterdir()) == []
    assert kept.name == ("step.json" if fits else "step.json.unfit")

    disk.add(elsewhere)
    with pytest.raises(RunError, match="its figures are what was printed last"):
        results.write(result, here / "step.json")
    assert json.loads(capsys.readouterr().out) == result


def test_any_benchmark_ends_with_its_file_its_conditions_and_its_table(result, tmp_path, capsys):
    results.finish(result, str(tmp_path / "step.json"), "tiny, 4 sequences", "the table")
    assert json.loads((tmp_path / "step.json").read_text()) == result
    told = result["conditions"]
    line = f"{told['device']}, {told['threads']} threads, torch {told['torch']}"
    assert capsys.readouterr().out == f"{line}; tiny, 4 sequences\nthe table\n"
    results.finish(result | {"cores": 3, "dtype": "float32"}, "", "tiny", "")
    printed = capsys.readouterr().out
    assert ", 3 cores, torch" in printed and ", float32; tiny" in printed


def test_writing_imports_nothing(result, tmp_path, monkeypatch):
    """What a write needs is there before the measurement, or the measurement is lost."""
    load = builtins.__import__

    def refuse(name, variables=None, *arguments):
        assert not (variables or {}).get("__name__", "").startswith("fastbert"), name
        return load(name, variables, *arguments)

    row = result["rows"][0] | {"seconds": [1.0], "losses": [2.0], "eval_losses": [2.0]}
    drawn = result | {"rows": [row | {"eval_seconds": [1.0]}], "target_loss": 2.0, "dtype": "fp32"}
    drawn["settings"] = {"model": "tiny", "max_steps": 1, "tokens_per_batch": 8}
    monkeypatch.setattr(builtins, "__import__", refuse)
    results.write(result, tmp_path / "step.json")
    convergence.draw(drawn, tmp_path / "loss.png")


def test_columns_of_a_table_stand_apart(result):
    long = {"name": "n" * 70, "ms": 123456789.5, "ms_p20": 123456789.5, "ms_p80": 123456789.5}
    result["rows"].append(long | {"real_tokens_per_second": 1e15, "sequences_per_second": 1e12})
    result["missing"] = [{"name": "m" * 80, "why": "none here"}]
    loss = {"loss": lambda row: "12345678.123"}
    text = results.table(result, "a step", loss, ("first is", lambda row: "0.50x"))
    heads, *rows, missing = text.splitlines()
    assert missing == f"{'m' * 80}  missing: none here"
    assert rows[1].split() == [
        "n" * 70, *["123456789.500"] * 3, "1,000,000,000,000,000", "1,000,000,000,000",
        "-", "-", "-", "-", "12345678.123", "0.50x",
    ]  # fmt: skip
    assert len(rows[0]) == len(rows[1]) and heads.index("first is") == rows[0].index("0.50x")


# Before anything is measured


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    benches = ("step", "kernels", "data", "inference", "convergence", "dropin")
    commands = [f"bench {name}" for name in benches]
    commands += ["profile step", "profile kernel adamw", "estimate"]
    too_long = "x" * 251 + ".json"  # and what it is called before it is renamed
    refused = {
        "no/x.json": "no such folder", "folder": "is no file: give the path of one",
        too_long: "cannot be written: File name too long",
    }  # fmt: skip
    requests = [f"{command} --json {path}" for command in commands for path in refused]
    requests += ["bench convergence --png no/x.png", "profile kernel adamw --png no/x.png",
                 "profile step --trace folder"]  # fmt: skip
    code = (
        "import sys; from fastbert.cli import main\n"
        "for argv in sys.argv[1:]:\n"
        "    assert main(argv.split()) == 2, argv\n"
        "    assert not {'torch', 'numpy'} & set(sys.modules), argv\n"
    )
    places = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "benchmarks")))
    done = subprocess.run(
        [sys.executable, "-c", code, *requests], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": places},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(requests)
    for request, line in zip(requests, lines, strict=True):
        option, path = request.split("--")[1].split()
        shown = f"fastbert: error: {option} = {path!r}"
        assert line.startswith(shown), request
        assert line.endswith(refused.get(path, "no such folder")), request
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_check_leaves_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("new.json", "old.json"):
        check_output("json", path)
        (tmp_path / "old.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "{}"
    with pytest.raises(UserError, match="is no file"):
        check_output("json", "/dev/null")


# Energy


class FakeNvml(types.ModuleType):
    """A counter that rises by 2 J a reading, and fails once `left` readings were taken."""

    def __init__(self, left):
        super().__init__("pynvml")
        self.left, self.millijoules = left, 0

    def nvmlInit(self): ...  # noqa: N802

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        if self.left == 0:
            raise ValueError("GPU is lost")
        self.left, self.millijoules = self.left - 1, self.millijoules + 2000
        return self.millijoules


@pytest.fixture
def meter(monkeypatch):
    """An energy meter of a GPU, given what `import pynvml` finds."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="u")
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def make(found):
        monkeypatch.setitem(sys.modules, "pynvml", found)  # None: cannot be imported
        return energy.EnergyMeter(torch.device("cuda"))

    return make


def spent(meter):
    return meter.measure(lambda index: None, 0.03, 0.01)


def test_energy_is_read_where_there_is_a_counter(meter):
    found = meter(FakeNvml(left=9))
    assert found.why_not == "" and spent(found).joules == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (None, "nvidia-ml-py is not installed"),
        (FakeNvml(left=0), "NVML: GPU is lost"),
        (types.ModuleType("pynvml"), "NVML: module 'pynvml' has no attribute 'nvmlInit'"),
    ],
)
def test_without_a_counter_energy_is_null_and_says_why(meter, module, why):
    found = meter(module)
    assert (found.why_not, found.joules(), spent(found)) == (why, 0.0, None)


def test_a_counter_that_fails_later_costs_energy_only(meter):
    found = meter(FakeNvml(left=2))
    assert spent(found) is None
    assert found.why_not == "NVML: GPU is lost" and spent(found) is None
    rows = [{"name": "a", "ms": 1.0, "watts": None}]
    assert results.gaps(rows, {"watts": ""}) == [{"name": "energy", "why": "it could not be read"}]
