"""Demonstrations: the data that every Python carries is right, and pre-training is seen to pay."""

import json
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastbert.cli import main
from fastbert.finetune import demo_data
from fastbert.finetune.demo import RANDOM, newest_model, verdict
from fastbert.finetune.demo_data import write_demo

from . import tiny


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model"), max_position_embeddings=130))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    found = {}
    for task in ("classify", "tag", "answer"):
        paths = write_demo(task, tmp_path_factory.mktemp(task), 42)
        found[task] = tuple(path.read_text("utf-8") for path in paths)
    return found


def _rows(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_families_are_all_there_and_no_text_is_on_both_sides(made) -> None:
    train, held_out = map(_rows, made["classify"])
    assert len(train) > 1000 and len(held_out) > 200
    for part in (train, held_out):
        counts = Counter(row["label"] for row in part)
        assert counts.keys() == demo_data.FAMILIES.keys()
        assert min(counts.values()) > len(part) / 50
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
    assert not {row["source"] for row in train} & {row["source"] for row in held_out}


def test_definitions_stand_where_they_say(made) -> None:
    for row in (row for part in made["answer"] for row in _rows(part)):
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        assert row["context"][start : start + len(text)] == text
        name = re.fullmatch(r"What does (\w+) do\?", row["question"])[1]
        assert row["context"][:start].endswith(f"{name}: ")


def test_nothing_is_asked_twice(made) -> None:
    for task, key in (("classify", ("text",)), ("answer", ("question", "answers"))):
        rows = [str([row[name] for name in key]) for part in made[task] for row in _rows(part)]
        assert [text for text, count in Counter(rows).items() if count > 1] == [], task
    lines = [part.split("\n\n") for part in made["tag"]]
    assert not set(lines[0]) & set(lines[1]) - {""}


def test_what_nearly_stands_in_training_is_not_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Read nine or ten bytes", "Write all of a long file"]
    held_out = [
        texts[0], "Read nine or ten bytes.", "READ nine OR ten bytes!", "Write all of a file now"
    ]  # fmt: skip
    (tmp_path / "json").mkdir()
    for name, said in (("a", texts[:1]), ("b", texts[1:]), ("c", held_out)):  # by their size
        source = "\n".join(f'def f{at}():\n    """{one}"""' for at, one in enumerate(said))
        (tmp_path / "json" / f"{name}.py").write_text(source)
    monkeypatch.setattr(demo_data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    train, other = (_rows(path.read_text()) for path in write_demo("classify", tmp_path, 0))
    assert sorted(row["text"] for row in train) == texts
    assert [row["text"] for row in other] == held_out[3:]


def test_tokens_are_tagged_by_their_kind() -> None:
    line = 'def f(x, y=2):  # two of them\n    return x.name + "a b"\n'
    found = demo_data._tagged_lines(line)
    assert found[1] == [
        *(("def", "B-keyword"), ("f", "B-function"), ("(", "O"), ("x", "O"), (",", "O")),
        *(("y", "O"), ("=", "O"), ("2", "B-number"), (")", "O"), (":", "O"), ("#", "B-comment")),
        *(("two", "I-comment"), ("of", "I-comment"), ("them", "I-comment")),
    ]
    assert [tag for _, tag in found[2]] == [
        *("B-keyword", "O", "O", "B-attribute", "O"),
        *("B-string", "I-string", "I-string", "I-string"),
    ]


def test_lines_of_strings_that_are_many_tokens_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = ["a = 1\n", 'f"b\n', 'c"\n', "d = 2\n"]
    found = demo_data._tagged_lines("".join((lines[0], lines[3])))
    assert [word for line in found.values() for word, _ in line] == ["a", "=", "1", "d", "=", "2"]

    def tokens(readline: object) -> Iterator[tokenize.TokenInfo]:  # as Python 3.12 and later do
        many, name = 999, tokenize.NAME
        for kind, word, start, end in (
            (name, "a", (1, 0), (1, 1)), (many, "b\nc", (2, 2), (3, 1)),
            (name, "c", (3, 1), (3, 2)), (name, "d", (4, 0), (4, 1)),
        ):  # fmt: skip
            yield tokenize.TokenInfo(kind, word, start, end, lines[start[0] - 1])

    monkeypatch.setitem(tokenize.tok_name, 999, "FSTRING_MIDDLE")
    monkeypatch.setattr(demo_data.tokenize, "generate_tokens", tokens)
    assert [*demo_data._tagged_lines("")] == [1, 4]


def test_the_same_seed_makes_the_same_data(tmp_path: Path, made) -> None:
    paths = write_demo("tag", tmp_path, 42)
    assert tuple(path.read_text("utf-8") for path in paths) == made["tag"]
    other, _ = write_demo("tag", tmp_path, 43)
    assert other.read_text("utf-8") != made["tag"][0]


def test_the_verdict_may_be_against_us() -> None:
    ours, others = {"accuracy": 0.5, "loss": 0.2}, {RANDOM: {"accuracy": 0.6, "loss": 0.3}}
    assert "did NOT pay: accuracy -0.1" in verdict("accuracy", ours, others)[-1]
    assert "pre-training paid: loss +0.1" in verdict("loss", ours, others)[-1]
    assert "did NOT pay: accuracy +0 " in verdict("accuracy", ours, {RANDOM: ours})[-1]


def test_the_verdict_names_what_is_better_all_the_same() -> None:
    ours, random = {"accuracy": 0.5, "loss": 0.2}, {"accuracy": 0.25, "loss": 0.3}
    others = {"words": {"accuracy": 0.75}, "majority": {"accuracy": 0.125}, RANDOM: random}
    said = verdict("accuracy", ours, others)
    assert said[-1] == (
        "pre-training paid: accuracy +0.25 beside the same network from random weights; "
        "better than the fine-tuned model: words (0.75)"
    )
    found = verdict("loss", ours, others)  # which counted words do not have
    assert re.fullmatch(r"words +—", found[2])
    assert found[-1].endswith("random weights")


def test_the_newest_model_that_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="make demo"):
        newest_model()
    for name in ("pretrain-001", "pretrain-002", "pretrain-999", "pretrain-1000"):
        (tmp_path / "runs" / name / "hf").mkdir(parents=True)
    for name in ("pretrain-001", "pretrain-002"):
        (tmp_path / "runs" / name / "hf" / "config.json").write_text("{}")
    assert newest_model() == "runs/pretrain-002"
    for name in ("pretrain-999", "pretrain-1000"):
        (tmp_path / "runs" / name / "hf" / "config.json").write_text("{}")
    assert newest_model() == "runs/pretrain-1000"


def test_the_command_shows_what_pre_training_is_worth(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(demo_data, "_MOST_EXAMPLES", {"classify": 100, "tag": 60, "answer": 40})
    out = tmp_path / "run"
    asked = ["finetune", "classify", "--demo", "--model", tiny_model, "--out", str(out)]
    assert main([*asked, "--max-steps", "4", "--report-to", "none"]) == 0
    said = capsys.readouterr().out
    for name in ("fine-tuned", "bag-of-words", "majority", RANDOM, "beside the same network"):
        assert name in said
    kept = json.loads((out / "eval.json").read_text("utf-8"))
    assert kept["baselines"].keys() == {"bag-of-words", "majority", RANDOM}
    assert any("beside the same network" in note for note in kept["notes"])
    assert "beside the same network" in (out / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--train", "demo", "--seeds", "3"], "one run"),
        (["--train", "demo", "--search", "3"], "one run"),
    ],
)
def test_what_a_demonstration_is_not(
    asked: list[str], told: str, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", "classify", "--model", tiny_model, *asked]) == 2
    assert told in capsys.readouterr().err
    assert main(["finetune", "embed", "--model", tiny_model, "--train", "demo"]) == 2
    assert "classify, tag, answer" in capsys.readouterr().err
