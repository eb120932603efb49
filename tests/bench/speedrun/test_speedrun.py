"""`fastbert speedrun`: what a track fixes, what is measured, and what a killed one goes on with."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from fastbert.cli import main
from fastbert.config import PretrainConfig, model_config
from fastbert.errors import RunError, UserError
from fastbert_bench.speedrun import corpus, race, rows, run, tracks
from fastbert_bench.speedrun.corpus import PARTS, Corpus
from fastbert_bench.speedrun.race import Point
from fastbert_bench.speedrun.tracks import TRACKS, Track

SYLLABLES = [f"{a}{b}" for a in "bdfgklmn" for b in "aeiou"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A speedrun's folder with the text of the corpus `small` in it."""
    folder = tmp_path_factory.mktemp("speedrun")
    rng = np.random.default_rng(0)
    text = folder / "corpora" / "small"
    text.mkdir(parents=True)
    for part, count in (("train", 120), ("choose", 30), ("report", 30)):
        documents = [
            "\n".join(
                " ".join("".join(rng.choice(SYLLABLES[:12], 2)) for _ in range(9)) + "."
                for _ in range(8)
            )
            for _ in range(count)
        ]
        (text / f"{part}.txt").write_text("\n\n".join(documents) + "\n")
    sizes = {
        "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 64, "max_position_embeddings": 32,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


@pytest.fixture
def small(home):
    text = home / "corpora" / "small"
    digests = {part: corpus._digest(text / f"{part}.txt") for part in PARTS}
    return Corpus("small", "made up", (), digests, {})


@pytest.fixture
def sprint(home, monkeypatch):
    """A track of 20 steps of 256 tokens."""
    monkeypatch.setattr(race, "EVALUATED", 2)
    monkeypatch.setattr(race, "BATCH", 256)
    return Track(
        "sprint", "a test", {"model": str(home / "config.json"), "vocab_size": 150,
        "max_seq_length": 32}, "cpu", tokens=20 * 256, classic={"tokens_per_batch": 256,
        "warmup_steps": 2, "initializer_range": "auto"}, steps={"fast": 10},
    )  # fmt: skip


def sped(track, corpus, home, table="", seeds=2, note="", **given):
    return run.speedrun(
        track, corpus, {"out": str(home), "num_threads": 1, **given}, seeds=seeds, packages="",
        table=str(table), note=note,
    )  # fmt: skip


def test_classic_sets_the_target_and_fast_is_timed_to_it(
    sprint, small, home, tmp_path, undrawn, capsys
):
    table = tmp_path / "deep" / "SPEEDRUN.md"
    classic = sped(sprint, small, home, table)
    assert classic["target"] is None and list(classic["points"]) == ["1", "2"]
    points = [Point(**one) for one in classic["points"]["1"]]
    assert [one.step for one in points] == list(range(2, 22, 2))
    assert 0 < points[0].seconds < points[-1].seconds and points[-1].tokens > 4000
    assert classic["points"]["1"] != classic["points"]["2"]
    assert all(3 < one.report < 6 and one.report != one.choose for one in points)

    target = max(classic["points"][seed][-1]["report"] for seed in "12")
    raced = Track(**{**vars(sprint), "targets": {"small": target}})
    fast = sped(raced, small, home, table, recipe="fast", note="twice as quick | hopefully")
    assert fast["max_steps"] == 10 and fast["recipe"] == "fast" and fast["given"] == {}
    lines = table.read_text().splitlines()
    assert len([line for line in lines if line.startswith("| 20")]) == 2
    assert lines[-1].count("|") - lines[-1].count("\\|") == len(rows.HEADINGS) + 1
    assert "twice as quick \\| hopefully" in lines[-1]
    folder = home / fast["label"]
    assert (folder / "curves.png").stat().st_size > 10_000
    assert json.loads((folder / "result.json").read_text()) == fast
    kept = table.parent / "speedruns" / f"{fast['label']}.json"
    assert kept.read_text() == (folder / "result.json").read_text()
    assert f"[{fast['label']}](speedruns/{kept.name})" in lines[-1]
    assert fast["config"]["optim"] == "muon" and len(fast["config"]) > 60  # all there are
    assert str(home / "corpora") not in kept.read_text()  # where it was run is nobody's business
    assert sorted(path.name for path in (folder / "seed-1").iterdir() if path.is_dir()) == [
        "checkpoints", "hf", "tokenizer",
    ]  # fmt: skip

    # What was run is not run again, and a row says the share of classic's time.
    capsys.readouterr()
    again = sped(raced, small, home, table, recipe="fast")
    told = capsys.readouterr()
    assert "seed-1 was run before" in told.err and again["points"] == fast["points"]
    assert again["conditions"] == fast["conditions"]  # of when it was run
    cells = rows.row(again, run._classic(home, again))
    hits = [
        rows.reached([Point(**one) for one in some], target) for some in again["points"].values()
    ]
    if all(hits):
        theirs = np.mean([some[-1]["seconds"] for some in classic["points"].values()])
        share = np.mean([hit.seconds for hit in hits]) / theirs
        assert cells["of classic's"] == f"{share:.2f}"
    else:
        assert cells["M tokens to the target"].endswith("of 2 seeds")
    assert f"loss: {cells['loss']}" in told.out


def test_a_killed_seed_goes_on_and_keeps_its_points(sprint, small, home, undrawn, monkeypatch):
    whole = sped(sprint, small, home, seeds=1, weight_decay=0.02)["points"]["1"]
    shutil.rmtree(home / run.label(_config(sprint, home, weight_decay=0.02)))

    measure, calls = race.measured, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return measure(*args)

    monkeypatch.setattr(race, "measured", killed)
    with pytest.raises(RuntimeError, match="killed"):
        sped(sprint, small, home, seeds=1, weight_decay=0.02)
    again = sped(sprint, small, home, seeds=1, weight_decay=0.02)["points"]["1"]
    assert [one["step"] for one in again] == [2, 4, 6, *range(10, 22, 2)]
    losses = {one["step"]: one["report"] for one in whole}
    assert all(one["report"] == losses[one["step"]] for one in again)
    assert [one["tokens"] for one in again] == [one["tokens"] for one in whole if one["step"] != 8]
    times = [one["seconds"] for one in again]
    assert times == sorted(times)


def _config(track, home, **given):
    asked = {**track.settings({"num_threads": 1, **given}), "max_steps": 20}
    asked |= {"data": str(home / "corpora" / "small" / "train.txt"), "validation_fraction": 0.0}
    asked |= {"eval_steps": 0, "save_total_limit": 1, "report_to": "none"}
    return PretrainConfig(**{**asked, "save_steps": 2, "logging_steps": 2})


def test_a_run_that_fails_leaves_a_row(sprint, small, home, tmp_path, undrawn, monkeypatch):
    def fails(*args):
        raise RunError("three gradients in a row are not finite")

    monkeypatch.setattr(race, "run_seed", fails)
    table = tmp_path / "T.md"
    with pytest.raises(RunError, match="not finite"):
        sped(sprint, small, home, table, learning_rate=0.5)
    assert "| seed 1 failed: three gradients in a row are not finite |" in table.read_text()

    def stopped(*args):
        raise RunError("stopped by SIGTERM at step 3; everything is saved: go on with: fastbert x")

    monkeypatch.setattr(race, "run_seed", stopped)
    with pytest.raises(RunError, match=r"seed 1 stopped by SIGTERM at step 3; the same command"):
        sped(sprint, small, home, table, learning_rate=0.5)
    assert len(table.read_text().splitlines()) == 9


def test_another_tokenizer_is_refused(sprint, small, home, undrawn):
    wrong = Corpus(**{**vars(small), "tokenizers": {"150": "0" * 64}})
    with pytest.raises(RunError, match=r"digest \w+ instead of 0000"):
        sped(sprint, wrong, home)


def test_a_checkpoint_that_is_not_berts_is_refused(sprint, small, home, undrawn, monkeypatch):
    monkeypatch.setattr(race, "PARITY", 0.0)
    monkeypatch.setattr(race, "parity", lambda *args: (10.0, 1e-3))
    with pytest.raises(RunError, match=r"logits in transformers are 1\.0e-03 apart from ours"):
        sped(sprint, small, home, seeds=1, max_steps=2, weight_decay=0.03)


@pytest.mark.parametrize("track", TRACKS.values(), ids=list(TRACKS))
@pytest.mark.parametrize("recipe", ["classic", "fast"])
def test_every_track_makes_settings(track, recipe):
    asked = track.settings({"recipe": recipe})
    asked["device"] = "cpu"
    config = PretrainConfig(**asked)
    assert model_config(config.sizes_from).max_position_embeddings >= config.max_seq_length
    assert config.max_steps * config.tokens_per_batch <= track.tokens
    assert config.recipe == recipe and config.nsp is (recipe == "classic")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "speedrun needs a track: cpu-tiny, cpu-mini, h100-base, h100-large"),
        (("cpu-tinny",), "no track 'cpu-tinny': did you mean 'cpu-tiny'?"),
        (("cpu-tiny", "--model", "base"), "model is the track's: tiny; nobody changes it"),
        (("cpu-tiny", "--data", "x"), "data is the track's; nobody changes it"),
        (("cpu-tiny", "--seed", "3"), "seed is set by the speedrun itself: leave it out"),
        (("cpu-tiny", "--eval-steps", "3"), "eval_steps is set by the speedrun itself"),
        (("cpu-tiny", "--max-steps", "4001"), "more than the budget of cpu-tiny, 8,192,000 tokens"),
        (("cpu-tiny", "--tokens-per-batch", "4096", "--max-steps", "2001"), "2000 at most"),
        (("cpu-tiny", "--seeds", "0"), "--seeds 0: must be at least 1"),
        (("cpu-tiny", "--seeds", "x"), "--seeds: invalid int value: 'x'"),
        (("cpu-tiny", "--corpus", "web"), "no corpus 'web' (corpora: manuals, addresses)"),
        (("cpu-tiny", "--packages", "gone"), "packages = 'gone'"),
        (("cpu-tiny", "--recipe", "fst"), "recipe = 'fst' is not a recipe: did you mean 'fast'?"),
        (("cpu-tiny", "--learnin-rate", "1"), "did you mean --learning-rate?"),
        (("h100-base", "--device", "cuda:99"), "cuda:99"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_the_work(options, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["speedrun", *options]) == 2
    told = capsys.readouterr().err
    assert complaint in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_of_ones_own_keeps_its_batch_and_steps(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text(
        "tokens_per_batch = 1024\nmax_steps = 300\nlearning_rate = 0.01\n"
        "sentence_splitter = 'line'\nmax_seq_length = 64\n"
    )
    config = PretrainConfig(**TRACKS["cpu-tiny"].settings({"recipe": str(mine)}))
    assert (config.tokens_per_batch, config.max_steps, config.learning_rate) == (1024, 300, 0.01)
    assert (config.sentence_splitter, config.max_seq_length) == ("auto", 128)  # the track's
    assert config.initializer_range == "model"  # what classic was tuned to is its own
    with pytest.raises(UserError, match="8000 at most"):
        TRACKS["cpu-tiny"].settings({"recipe": str(mine), "max_steps": 8001})
    mine.write_text("gradient_accumulation_steps = 4\nmax_steps = 100000\n")
    config = PretrainConfig(**TRACKS["cpu-tiny"].settings({"recipe": str(mine)}))
    assert (config.tokens_per_batch, config.max_steps) == (2048, 1000)


def _point(step, report):
    return Point(step, step * 100, step / 10, None, report, report)


def test_the_target_is_reached_by_a_checkpoint():
    points = [_point(10, 5.0), _point(20, 4.0), _point(30, 3.0)]
    assert rows.reached(points, 4.0) == points[1]
    assert rows.reached(points, 3.999) == points[2]
    assert rows.reached(points, 2.9) is None and rows.reached(points, None) is None


def _result(points, target, **more):
    conditions = {"date": "2026-11-29T00:00:00+00:00", "commit": "abc", "device": "A CPU",
                  "device_type": "cpu", "threads": 1}  # fmt: skip
    told = {seed: [one._asdict() for one in some] for seed, some in points.items()}
    return {"track": "t", "corpus": "c", "recipe": "fast", "label": "fast-1", "given": {},
            "note": "", "max_steps": 30, "budget": 10_000, "target": target,
            "conditions": conditions, "points": told, **more}  # fmt: skip


def test_a_row_tells_mean_and_deviation_only_where_all_seeds_arrive():
    both = {"1": [_point(10, 5.0), _point(20, 4.0)], "2": [_point(10, 4.0), _point(20, 3.0)]}
    classic = _result({"1": [_point(100, 4.0)], "2": [_point(50, 4.0)]}, None)
    cells = rows.row(_result(both, 4.0), classic)
    assert cells["M tokens to the target"] == "0.00 ± 0.00"
    assert cells["of the budget"] == "0.15" and cells["s to the target"] == "2 ± 1"
    assert cells["of classic's"] == "0.20" and cells["loss"] == "3.500 ± 0.707"
    assert cells["kJ"] == "-" and cells["on"] == "A CPU, 1 threads"
    cells = rows.row(_result(both, 3.5), classic)
    assert cells["M tokens to the target"] == "1 of 2 seeds"
    assert cells["s to the target"] == cells["of classic's"] == "-"
    heated = {"1": [_point(10, 3.0)._replace(joules=2500.0)]}
    assert rows.row(_result(heated, 3.0), None)["kJ"] == "2.5"


def test_only_classic_as_tuned_is_the_measure(tmp_path):
    def put(label, **more):
        (tmp_path / label).mkdir()
        told = _result({"1": [_point(10, 5.0)]}, None, **more)
        (tmp_path / label / "result.json").write_text(json.dumps(told))
        return told

    asked = _result({}, None)
    assert run._classic(tmp_path, asked) is None
    put("classic-1", given={"learning_rate": 1.0})
    put("classic-2", failed="seed 1 failed")
    put("classic-3", corpus="other")
    put("fast-4")
    assert run._classic(tmp_path, asked) is None
    right = put("classic-5")
    assert run._classic(tmp_path, asked) == right


def test_what_may_be_set_is_what_a_recipe_may_hold():
    free = tracks._free()
    assert {"learning_rate", "optim", "curriculum", "tokens_per_batch", "device", "nsp"} <= free
    assert not free & {"seed", "data", "model", "save_steps", "resume", "max_eval_batches"}
    with pytest.raises(UserError, match="nobody changes it"):
        TRACKS["cpu-tiny"].settings({"max_seq_length": 64})


def test_settings_and_texts_have_folders_of_their_own(sprint, home):
    one = _config(sprint, home)
    labels = {
        run.label(config)
        for config in (
            one,
            dataclasses.replace(one, weight_decay=0.05),
            dataclasses.replace(one, num_threads=2),  # other times
            dataclasses.replace(one, data=str(home / "corpora" / "other" / "train.txt")),
        )
    }
    assert len(labels) == 4
    moved = dataclasses.replace(one, data="elsewhere/corpora/small/train.txt", out="there")
    assert run.label(moved) == run.label(one)
