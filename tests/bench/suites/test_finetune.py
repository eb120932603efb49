"""`fastbert bench finetune`: real Trainers on a little BERT and made data of the same formats."""

import importlib.util
import json

import pytest

from fastbert.cli import main
from fastbert.errors import RunError, UserError
from fastbert.finetune import yardsticks
from fastbert_bench.config import FinetuneBenchConfig
from fastbert_bench.measure import result as results
from fastbert_bench.report import build as report
from fastbert_bench.report import files as report_files
from fastbert_bench.report import readme as report_readme
from fastbert_bench.suites import finetune

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate"
)
OURS, THEIRS = "fastbert", "hf-trainer"
GOOD, BAD = ("a fine phone indeed", "we like it"), ("a bad phone indeed", "we hate it a lot")
NAMES, REST = ("Ada", "Max"), ("we", "like", "phone", "it", "indeed")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = sorted({word for text in (*GOOD, *BAD) for word in text.split()} | {"who", "?", ".", "sees"}
               | {name.lower() for name in NAMES})  # fmt: skip


def sentiment(count):
    lines = [
        f"{'it ' * (place % 5)}{texts[place % 2]}\t{label}"
        for place in range(count)
        for texts, label in ((GOOD, "positive"), (BAD, "negative"))
    ]
    return "\n".join(["text\tlabel", *lines, ""])


def entities(count):
    made = []
    for place in range(count):
        words = [(word, "O") for word in REST[: 1 + place % 5]]
        words.insert(place % 2, (NAMES[place % 2], "B-person"))
        made.append("".join(f"{word}\t{tag}\n" for word, tag in words))
    return "\n".join(made)


def questions(count):
    paragraphs = []
    for place in range(count):
        name = NAMES[place % 2]
        text = f"{'We like it. ' * (place % 4)}{name} sees a phone."
        found = {"text": name, "answer_start": text.index(name)}
        asked = {"id": str(place), "question": "Who sees a phone?", "answers": [found]}
        paragraphs.append({"context": text, "qas": [asked]})
    return json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_bert):
    """A model and the three data sets."""
    path = tmp_path_factory.mktemp("bench")
    save_bert(path / "model", [*SPECIAL, *WORDS], 64)
    for part, count in (("train", 19), ("eval", 6)):
        (path / f"sentiment-{part}.tsv").write_text(sentiment(count))
        (path / f"entities-{part}.conll").write_text(entities(2 * count))
        (path / f"questions-{part}.json").write_text(questions(2 * count))
    return path


def config(folder, **more):
    return FinetuneBenchConfig(model=str(folder / "model"), data=str(folder), **more)


def test_three_data_sets_are_rows_of_a_file_that_the_report_shows(folder, tmp_path, capsys):
    out = tmp_path / "results" / "here" / "finetune.json"
    out.parent.mkdir(parents=True)
    options = ["--model", str(folder / "model"), "--data", str(folder), "--name", "little",
               "--seeds", "2", "--against", THEIRS]  # fmt: skip
    assert main(["bench", "finetune", *options, "--json", str(out)]) == 0
    said = capsys.readouterr()
    assert "train_runtime" not in said.out
    result = json.loads(out.read_text())
    results.check(result)
    assert not result["rehearsal"]
    assert (result["settings"]["model"], result["settings"]["data"]) == ("little", folder.name)
    for name in finetune.SETS:
        same = result["same_losses"][name]
        assert same["steps"] == 20 and 0 <= same["difference"] <= 1e-4
        rows = {row["contender"]: row for row in result["rows"] if row["task"] == name}
        sticks = [yardsticks.OVERLAP] if name == "questions" else ["bag-of-words", "majority"]
        assert list(rows) == [OURS, THEIRS, *sticks]
        for row in rows.values():
            assert row["name"] == f"{name}, {row['contender']}" and row["name"] in said.out
            values = row["metric_of_rounds"]
            assert row["metric_mean"] == pytest.approx(sum(values) / len(values))
            assert 0 <= row["metric_mean"] <= 100
        for row in (rows[OURS], rows[THEIRS]):
            assert len(row["rounds_ms"]) == len(row["metric_of_rounds"]) == 2
            times = zip(row["rounds_ms"], rows[OURS]["rounds_ms"], strict=True)
            assert row["ratio"] == pytest.approx(sum(a / b for a, b in times) / 2)
            assert row["sequences_per_second"] * row["ms"] == pytest.approx(38e3 * 3)
        assert rows[sticks[0]]["metric_deviation"] is None and "ms" not in rows[sticks[0]]
    missing = {one["name"]: one["why"] for one in result["missing"]}
    assert missing["questions, majority"] == "spans of a paragraph are no classes"

    page = report.page_of(*report_files.load([str(out)])).html()
    assert "sentiment, bag-of-words" in page and "A rehearsal" not in page
    lines = "\n".join(report_readme.section(tmp_path / "results"))
    row = result["rows"][1]
    shown = (
        f"| {row['name']} | {row['metric_mean']:.1f} ± {row['metric_deviation']:.1f}% accuracy, "
    )
    assert "| fine-tuning: little, 2 seeds, float32; [finetune](" in lines
    assert shown in lines
    assert "| questions, sentence-overlap | 50.0% F1 |" in lines


def test_yardsticks_learn_what_can_be_learnt(folder):
    found = {}
    for name in finetune.SETS:
        given = finetune.read(config(folder), name)
        for stick, evaluation in yardsticks.YARDSTICKS[given.task.name](given.data):
            if not isinstance(evaluation, str):
                found[name, stick] = finetune.told(given, stick, [evaluation])["metric_mean"]
    assert found == {
        ("sentiment", "bag-of-words"): 100.0,
        ("sentiment", "majority"): 50.0,
        ("entities", "bag-of-words"): 100.0,
        ("entities", "majority"): 0.0,
        ("questions", "sentence-overlap"): 50.0,  # the name, of "Ada sees phone"
    }


@pytest.mark.parametrize(
    ("setting", "spoilt"),
    [("learning_rate", 6e-5), ("weight_decay", 100.0), ("max_grad_norm", 1e-3), ("seed", 43)],
)
def test_a_loop_that_trains_otherwise_is_refused(folder, monkeypatch, setting, spoilt):
    ours = finetune.train_ours

    def other(given, asked, path):
        return ours(given, finetune.dataclasses.replace(asked, **{setting: spoilt}), path)

    monkeypatch.setitem(finetune.CONTENDERS, OURS, other)
    with pytest.raises(RunError, match="not comparable: on entities, losses of fastbert and hf-"):
        finetune.run(config(folder, sets="entities", seeds=1))


def test_a_rehearsal_says_so_and_the_allocator_changes_only_time(folder):
    asked = config(folder, sets="questions", seeds=3, max_steps=2)
    result = finetune.run(asked)
    assert result["rehearsal"] and result["same_losses"]["questions"]["steps"] == 2
    assert "a rehearsal of 2 steps" in finetune.asked(asked, result)
    ours, plain, kept, _ = result["rows"]
    assert [row["contender"] for row in (ours, plain, kept)] == [OURS, THEIRS, f"{THEIRS}+malloc"]
    assert [len(row["rounds_ms"]) for row in (ours, plain, kept)] == [3, 1, 3]
    assert plain["metric_of_rounds"] == kept["metric_of_rounds"][:1]
    assert plain["ratio"] == pytest.approx(plain["ms"] / ours["rounds_ms"][0])
    assert plain["metric_deviation"] is None and kept["metric_deviation"] is not None


def test_what_a_training_sees_is_counted(folder):
    given = finetune.read(config(folder, max_steps=4), "sentiment")  # 38 texts, 3 batches an epoch
    tokens, sequences = finetune.seen(given)
    lengths = [one.length for one in given.task.features(given.data.train, True)]
    assert sequences == 38 + 16
    second = finetune.loop.epoch_order(38, 42, 1)[:16]
    assert tokens == sum(lengths) + sum(lengths[place] for place in second)


def test_bad_requests_are_one_line(folder, tmp_path, capsys):
    elsewhere = FinetuneBenchConfig(model=str(folder / "model"), data=str(tmp_path))
    with pytest.raises(UserError, match=r"holds no entities-train\.conll"):
        finetune.read(elsewhere, "entities")
    for options, told in (
        ([], "model = '': give --model DIR, the folder of a pre-trained model"),
        (["--model", "x"], "data = '': give --data DIR, the folder of the data sets"),
        (["--model", "no/x", "--data", "."], "model = 'no/x': no such file or folder"),
        (["--model", ".", "--data", ".", "--sets", "glue"], "sets = 'glue' must be one of"),
        (["--model", ".", "--data", ".", "--against", "none"], "against = 'none' must be one of"),
    ):
        assert main(["bench", "finetune", *options]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fastbert: error: {told}")
