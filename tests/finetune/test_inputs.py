"""Files to rows: every format told by its content, every broken file named with its line."""

import csv
import gzip
import io
import json
import os
import random
import tracemalloc
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fastbert.errors import UserError
from fastbert.finetune import inputs
from fastbert.finetune.columns import TASKS, detect, usable
from fastbert.finetune.inputs import (
    Skipped,
    Table,
    peek,
    read_table,
    stream_rows,
)
from fastbert.finetune.values import read_answers, read_choices, read_tagged


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(path: Path | str, **more: Any) -> list[dict[str, Any]]:
    return [row.values for row in read_table(path, "train", **more).rows]


def refusal(path: Path | str, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_table(path, "train", **more)
    return str(caught.value)


def piped(monkeypatch: pytest.MonkeyPatch, content: str | bytes) -> None:
    content = content.encode() if isinstance(content, str) else content
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "Ada met Bob",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Who?",
                            "answers": [{"text": "Ada", "answer_start": 0}],
                        },
                        {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}
GOOD = {"text": "a fine film", "label": "good"}
BAD = {"text": 'so "bad", I left', "label": "bad"}
CONLL = "-DOCSTART- O\n\nAda B-per\nran O\n\n\nBob B-per\n"
SENTENCES = [
    {"tokens": ["Ada", "ran"], "tags": ["B-per", "O"], "lines": [3, 4]},
    {"tokens": ["Bob"], "tags": ["B-per"], "lines": [7]},
]


@pytest.mark.parametrize(
    ("name", "content", "format", "rows"),
    [
        ("x.csv", 'text,label\na fine film,good\n"so ""bad"", I left",bad\n', "csv", [GOOD, BAD]),
        ("x.csv", 'text;label\na fine film;good\nso "bad", I left;bad\n', "csv", [GOOD, BAD]),
        ("x.csv", 'text\tlabel\r\na fine film\tgood\r\nso "bad", I left\tbad', "csv", [GOOD, BAD]),
        ("x", 'text,label\na fine film,good\n"so ""bad"", I left",bad\n', "csv", [GOOD, BAD]),
        ("x.tsv", 'text\tlabel\na fine film\tgood\nso "bad", I left\tbad\n', "tsv", [GOOD, BAD]),
        ("x.txt", 'text\tlabel\na fine film\tgood\n\nso "bad", I left\tbad\n', "tsv", [GOOD, BAD]),
        ("x.tsv", '\ufefftext\tlabel\na fine film\tgood\n"so ""bad"", I left"\tbad\n', "tsv",
         [GOOD, BAD]),
        ("x.jsonl", f"{json.dumps(GOOD)}\n\n{json.dumps(BAD)}\n", "jsonl", [GOOD, BAD]),
        ("x.txt", f"{json.dumps(GOOD)}\r\n{json.dumps(BAD)}", "jsonl", [GOOD, BAD]),
        ("x.json", json.dumps([GOOD, BAD]), "json", [GOOD, BAD]),
        ("x.json", json.dumps({"data": [GOOD, BAD]}), "json", [GOOD, BAD]),
        ("x", json.dumps({"version": 1, "data": [GOOD, BAD]}, indent=1), "json", [GOOD, BAD]),
        ("x.conll", CONLL, "conll", SENTENCES),
        ("x.txt", CONLL.replace(" ", "\t"), "conll", SENTENCES),
        ("x.tsv", CONLL.replace(" ", "\t").replace("-DOC", "# a comment\n-DOC").replace(
            "\n\nAda", "\nAda"), "conll", SENTENCES),
        ("x.txt", "Hello, world\n\n Yes, sir\n\n\n", "text",
         [{"text": "Hello, world"}, {"text": ""}, {"text": " Yes, sir"}]),
        ("x.txt", "[music] a song\n{sic}\n", "text", [{"text": "[music] a song"},
                                                      {"text": "{sic}"}]),
        ("x.txt", "{sic}\n", "text", [{"text": "{sic}"}]),
    ],
)  # fmt: skip
def test_content_tells_the_format(
    tmp_path: Path, name: str, content: str, format: str, rows: list[dict[str, Any]]
) -> None:
    table = read_table(written(tmp_path, name, content), "train")
    assert table.format == format
    assert [row.values for row in table.rows] == rows
    assert table.columns == tuple(name for name in rows[0] if name != "lines")
    assert [row.values for row in stream_rows(tmp_path / name)] == rows


def test_rows_know_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", 'text,label\n"two\nlines",a\n\nb,c\n')
    assert [row.where for row in read_table(path, "train").rows] == [f"{path}:2", f"{path}:5"]
    path = written(tmp_path, "x.jsonl", '\n{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.where for row in read_table(path, "train").rows] == [f"{path}:2", f"{path}:4"]
    path = written(tmp_path, "x.json", '[{"text": "a"}, {"text": "b"}]')
    assert [row.where for row in read_table(path, "t").rows] == [f"{path} row 1", f"{path} row 2"]
    path = written(tmp_path, "x.conll", CONLL)
    assert [row.where for row in read_table(path, "train").rows] == [f"{path}:3", f"{path}:7"]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        # one field that begins and one that ends with a quote are none: GLUE's files
        ('a\tb\n"Yes\t1\nno"\t0\n"so" he said\t1\n', [['"Yes', "1"], ['no"', "0"],
                                                      ['"so" he said', "1"]]),
        ('a\tb\n"whole"\t1\nno\t0\n', [['"whole"', "1"], ["no", "0"]]),
        ('"a"\t"b"\n"whole"\t1\n', [["whole", "1"]]),
        ('a\tb\n"a\ttab"\t1\nno\t0\n', [["a\ttab", "1"], ["no", "0"]]),
        ('a\tb\n"two\nlines"\t1\nno\t0\n', [["two\nlines", "1"], ["no", "0"]]),
        ("a\tb\nan old\rmac\t1\n", [["an old\rmac", "1"]]),
    ],
)  # fmt: skip
def test_quotes_of_tsv_are_quoting_only_where_they_have_to_be(
    tmp_path: Path, content: str, rows: list[list[str]]
) -> None:
    path = written(tmp_path, "x.tsv", content)
    assert values(path) == [dict(zip("ab", row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("gj04\t1\t\tOur friends.\nab\t0\t*\tThey.\n", "1 2 3 4"),  # as CoLA's
        ("a film\tgood\nbooks\tgood\n", "1 2"),  # a name is a value of its column
        ("It was fine.\tgood\nbooks\tbad\n", "1 2"),  # a sentence
        ("\ttext\tlabel\n0\ta\tb\n", "1 text label"),  # an index without a name
        ("#1 ID\t#1 String\n5\ta\n", "#1_ID #1_String"),
    ],
)
def test_a_first_line_of_names_is_a_header(tmp_path: Path, content: str, columns: str) -> None:
    table = read_table(written(tmp_path, "x.tsv", content), "train")
    assert [name.replace(" ", "_") for name in table.columns] == columns.split()
    assert len(table.rows) == content.count("\n") - (not columns.startswith("1 2"))


def test_header_may_be_told(tmp_path: Path) -> None:
    path = written(tmp_path, "x.tsv", "1\t2\n3\t4\n")
    assert values(path) == [{"1": "1", "2": "2"}, {"1": "3", "2": "4"}]
    assert values(path, header=True) == [{"1": "3", "2": "4"}]
    path = written(tmp_path, "x.csv", "text,label\na,b\n")
    assert values(path, header=False)[0] == {"1": "text", "2": "label"}


def test_what_csv_writes_is_read_back(tmp_path: Path) -> None:
    texts = ['"', '""', ",", "\n", "\r\n", " a ", "tab\there", 'a,b\n"c"', "ü 東京", "'"]
    for name, delimiter in (("x.csv", ","), ("y.csv", ";"), ("z.tsv", "\t")):
        path = tmp_path / name
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["text", "label"], *([text, "x1"] for text in texts)])
        assert [row["text"] for row in values(path)] == texts


def test_squad_is_flattened(tmp_path: Path) -> None:
    for indent in (None, 2):
        path = written(tmp_path, "x.json", json.dumps(SQUAD, indent=indent))
        table = read_table(path, "train")
        assert table.format == "squad"
        assert [row.where for row in table.rows] == [f"{path}#q1", f"{path}#q2"]
        assert table.rows[0].values == {
            "id": "q1",
            "title": "T",
            "question": "Who?",
            "context": "Ada met Bob",
            "answers": {"text": ["Ada"], "answer_start": [0]},
            "is_impossible": False,
        }
        assert table.rows[1].values["answers"] == {"text": [], "answer_start": []}
        assert table.rows[1].values["is_impossible"] is True


def test_squad_that_is_not(tmp_path: Path) -> None:
    def told(change: Any) -> str:
        squad = json.loads(json.dumps(SQUAD))
        change(squad["data"][0]["paragraphs"][0])
        return refusal(written(tmp_path, "x.json", json.dumps(squad)))

    assert "data[0].paragraphs[0].context is missing: must be text" in told(
        lambda paragraph: paragraph.pop("context")
    )
    assert "data[0].paragraphs[0].qas[1].question is 5: must be text" in told(
        lambda paragraph: paragraph["qas"][1].update(question=5)
    )
    assert "qas[0].answer_start is '0': must be an integer" in told(
        lambda paragraph: paragraph["qas"][0]["answers"][0].update(answer_start="0")
    )
    assert "x.json#q1: is_impossible, but has answers" in told(
        lambda paragraph: paragraph["qas"][0].update(is_impossible=True)
    )


def test_conll_with_more_columns(tmp_path: Path) -> None:
    path = written(tmp_path, "x.txt", "# id = 5\nAda NNP B-per\n# SYM O\nran VB O\n")
    table = read_table(path, "train")
    assert table.columns == ("tokens", "tags", "1", "2", "3")
    assert table.rows[0].values == {
        "tokens": ["Ada", "#", "ran"],
        "tags": ["B-per", "O", "O"],
        "1": ["Ada", "#", "ran"],
        "2": ["NNP", "SYM", "VB"],
        "3": ["B-per", "O", "O"],
        "lines": [2, 3, 4],
    }


def test_a_comment_may_have_as_many_words_as_a_token(tmp_path: Path) -> None:
    path = written(tmp_path, "x.txt", "# Ada\n# O O\nAda B-per\n# O\n")
    assert values(path)[0]["tokens"] == ["Ada", "#"]
    path = written(tmp_path, "y.conll", "# NOUN\nAda NOUN\n")
    assert values(path)[0]["tokens"] == ["#", "Ada"]


def test_a_broken_line_of_conll_is_named_whatever_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "x.txt", "Ada\tB-per\nran\tO\n\n" * 10 + "Bob\n")
    assert refusal(path).startswith(f"{path}:31: 1 column, but the file has 2")


def test_conll_u_has_numbers_and_no_tags(tmp_path: Path) -> None:
    def line(number: str, form: str) -> str:
        return "\t".join([number, form, *"_" * 8]) + "\n"

    words = line("1-2", "zum") + line("1", "zu") + line("2", "dem") + line("2.1", "x")
    path = written(tmp_path, "x.conllu", f"# text = zum\n{words}\n")
    table = read_table(path, "train")
    assert table.columns == tuple(map(str, range(1, 11)))
    assert table.rows[0].values["2"] == ["zu", "dem"]
    assert table.rows[0].values["lines"] == [3, 4]


def test_conll_without_tags_and_with_others(tmp_path: Path) -> None:
    path = written(tmp_path, "x.conll", "Ada\nran\n\n#\n")
    assert [row["tokens"] for row in values(path)] == [["Ada", "ran"], ["#"]]
    path = written(tmp_path, "y.conll", "Ada NOUN\nran VERB\n")
    assert values(path)[0]["tags"] == ["NOUN", "VERB"]


def test_parquet_in_row_groups(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    rows = [{"text": f"t{n}", "tags": ["a", "b"], "n": n} for n in range(10)]
    path = tmp_path / "x.bin"
    parquet.write_table(arrow.Table.from_pylist(rows), path, row_group_size=3)
    table = read_table(path, "train")
    assert table.format == "parquet" and table.columns == ("text", "tags", "n")
    assert [row.values for row in table.rows] == rows
    assert table.rows[9].where == f"{path} row 10"

    twice = arrow.Table.from_arrays([arrow.array([1]), arrow.array([2])], names=["a", "a"])
    parquet.write_table(twice, path)
    assert "several columns are named 'a'" in refusal(path)
    path.write_bytes(b"PAR1" + b"\0" * 40)
    assert refusal(path).startswith(f"{path}: cannot be read as Parquet: ")
    assert "is not Parquet" in refusal(written(tmp_path, "y.parquet", "a text\n"))


def test_a_folder_of_classes(tmp_path: Path) -> None:
    written(tmp_path, "pos/2.txt", "fine\nfilm\n")
    written(tmp_path, "pos/10.txt", "good")
    written(tmp_path, "neg/1.txt", "\ufeffbad\n")
    written(tmp_path, "README.md", "what this is")
    written(tmp_path, ".hidden/1.txt", "no")
    table = read_table(tmp_path, "train")
    assert table.format == "folders" and table.columns == ("text", "label")
    assert [(row.values["text"], row.values["label"]) for row in table.rows] == [
        ("bad", "neg"),
        ("good", "pos"),
        ("fine\nfilm", "pos"),
    ]
    assert table.rows[0].where == str(tmp_path / "neg" / "1.txt")
    assert table.skipped.line("it", "file") == (
        f"skipped 1 file of it: 1 beside the texts of the classes (first: {tmp_path}/README.md)"
    )


def test_folders_of_classes_that_stand_deeper(tmp_path: Path) -> None:
    for part in ("train", "test"):
        written(tmp_path, f"{part}/pos/1.txt", "good")
        written(tmp_path, f"{part}/neg/1.txt", "bad")
    assert refusal(tmp_path) == (
        f"{tmp_path}: {tmp_path}/test/neg/1.txt stands more than one folder deep: give the folder "
        f"whose folders are the classes, such as {tmp_path}/test"
    )
    assert len(read_table(tmp_path, "input").rows) == 4
    assert len(values(tmp_path / "train")) == 2


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    written(tmp_path, "far/1.txt", "good")
    written(tmp_path, "data/neg/1.txt", "bad")
    (tmp_path / "data/pos").symlink_to(tmp_path / "far")
    (tmp_path / "data/again").symlink_to(tmp_path / "data")
    assert [row["label"] for row in values(tmp_path / "data")] == ["neg", "pos"]


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "pipe"
    told = f"train = '{path}': is no file: write what comes from there to one"
    assert refusal(path) == told


def test_folders_and_globs_of_files(tmp_path: Path) -> None:
    written(tmp_path, "b.csv", "label,text\ny,2\n")
    written(tmp_path, "a/x.jsonl", '{"text": "1", "label": "x"}\n')
    written(tmp_path, "c.md", "no")
    written(tmp_path, ".d.csv", "no")
    table = read_table(tmp_path, "train")
    assert [row.values["text"] for row in table.rows] == ["2", "1"]
    assert table.format == "csv, jsonl" and set(table.columns) == {"text", "label"}
    assert table.skipped.counts == {"of other kinds": 1}
    assert values(f"{tmp_path}/*/*.jsonl") == [{"text": "1", "label": "x"}]
    assert len(values(f"{tmp_path}/**/*.[cj]s*")) == 2
    assert [row.values["text"] for row in stream_rows(tmp_path)] == ["2", "1"]
    odd = written(tmp_path, "odd[1].csv", "text\na\n")
    assert values(odd) == [{"text": "a"}]


def test_files_must_agree_in_columns(tmp_path: Path) -> None:
    written(tmp_path, "a.csv", "text,label\na,b\n")
    path = written(tmp_path, "b.csv", "text,class\na,b\n")
    told = (
        f"{path}: its columns are text, class, but those of {tmp_path}/a.csv are text, label: "
        "files of one request must have the same"
    )
    assert refusal(tmp_path) == told
    with pytest.raises(UserError, match="its columns are text, class"):
        list(stream_rows(f"{tmp_path}/*.csv"))


def test_objects_may_lack_a_value(tmp_path: Path) -> None:
    path = written(tmp_path, "x.jsonl", '{"text": "a"}\n{"label": "b", "text": "c"}\n')
    assert read_table(path, "train").columns == ("text", "label")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.csv", "", ": is empty"),
        ("x.csv", "\n \n", ": is empty"),
        ("x.csv", "text,label\n", ": holds no row"),
        ("x.csv", "text,label,text\na,b,c\n", ": several columns are named 'text': rename them"),
        ("x.csv", "text,label\na,b\nc\n", ":3: 1 field, but 2 columns (text, label)"),
        ("x.csv", "text,label\na,b\nc, d,e\n", ":3: 3 fields, but 2 columns (text, label); a "
         "field that holds ',' must stand in quotes"),
        ("x.tsv", "text\tlabel\na\tb\nc\td\te\n", ":3: 3 fields, but 2 columns (text, label)"),
        ("x.csv", 'text,label\na,b\n"c,d\ne,f\n', ":3: a quote is opened and never closed"),
        ("x.csv", 'text,label\na,b\n"c"c,d\n', ":3: not CSV: ',' expected after '\"'"),
        ("x.csv", "text,label\ra,b\rc,d\r", ":1: a line ends with \\r alone: convert the file"),
        ("x.csv", b"text,label\na,b\n\xff,c\n", ":3: byte 1 of the line is not UTF-8: convert "
         "the file, e.g. with iconv"),
        ("x.jsonl", '{"a": 1}\n{"a": 1,}\n', ":2: not JSON: "),
        ("x.jsonl", '{"a": 1,}\n{"a": 1}\n', ":1: not JSON: "),
        ("x.jsonl", '{"a": 1}\n[1]\n', ":2: [1] must be a JSON object"),
        ("x.jsonl", '{"a": 1, "b": 2, "a": 3}\n', ":1: several values are named 'a'"),
        ("x.jsonl", '{"a": "\\ud800"}\n', ":1: holds half of a surrogate pair"),
        ("x.jsonl", f'{{"a": {"[" * 100_000}\n', ":1: not JSON: "),
        ("x.json", '[{"a": 1},\n{"a" 2}]', ":2: not JSON: Expecting ':' delimiter (column 6)"),
        ("x.json", '[{"a": 1}, 5]', " row 2: 5 must be a JSON object"),
        ("x.json", '"a"', ": must be JSON lines, an array of objects, or"),
        ("x.json", "[]", ": holds no row"),
        ("x.conll", "Ada B-per\nran\n", ":2: 1 column, but the file has 2"),
        ("x.conll", "-DOCSTART- O\n\n", ": holds no row"),
        ("x.csv", gzip.compress(b"text,label\n" * 9, mtime=0), ": looks like gzip: unpack it"),
        ("x.tsv", "text\tlabel\n".encode("utf-16"), ": is UTF-16-LE: convert it to UTF-8, e.g. "
         "with iconv -f UTF-16 -t UTF-8"),
        ("x.txt", bytes(range(256)) * 9, ": looks like binary data"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line(
    tmp_path: Path, name: str, content: str | bytes, told: str
) -> None:
    path = written(tmp_path, name, content)
    assert refusal(path).startswith(f"{path}{told}")
    with pytest.raises(UserError) as caught:
        list(stream_rows(path))
    assert str(caught.value).startswith(f"{path}{told}")


def test_nothing_there(tmp_path: Path) -> None:
    written(tmp_path, "train.tsv", "a\tb\n")
    missing = tmp_path / "trian.tsv"
    assert refusal(missing) == (
        f"train = '{missing}': no such file or folder: did you mean 'train.tsv'?"
    )
    assert refusal("no/such/place") == "train = 'no/such/place': no such file or folder"
    assert refusal(f"{tmp_path}/*.csv").endswith("no file has such a name")
    (tmp_path / "empty").mkdir()
    assert "the folder holds no .csv, .tsv" in refusal(tmp_path / "empty")
    assert refusal(tmp_path / "train.tsv", format="xml").startswith("format = 'xml': must be one")
    with pytest.raises(UserError, match=r"^input = 'nowhere': no such file"):
        stream_rows("nowhere")


FILES = (
    ("x.csv", 'text,label\na fine film,good\n"so ""bad"", I left",bad\n'),
    ("x.tsv", 'text\tlabel\na fine film\tgood\nso "bad", I left\tbad\n'),
    ("x.jsonl", '{"question": "q", "choices": ["a", "b"], "label": 1}\n{"text": "a"}\n'),
    ("x.jsonl", '{"text": "Ada ran", "entities": [{"start": 0, "end": 3, "type": "x"}]}\n'),
    ("x.json", json.dumps(SQUAD, indent=1)),
    ("x.conll", CONLL),
    ("x", "lines\nof text, and\n"),
)
PIECES = ["\0", '"', "\n", "\t", ",", "{", "[", "}", "]", "\r", "#", "null", "NaN", "1e999", ":"]
PIECES += ["\\ud800", "9" * 5000, "-1", "\u2028", "\x85", "\ufeff", '"data"', "PAR1", "true"]


@pytest.mark.parametrize("seed", range(5))
def test_a_file_changed_at_random_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        name, content = draw.choice(FILES)
        for _ in range(draw.randrange(1, 4)):
            begin = draw.randrange(len(content) + 1)
            end = begin + draw.choice([0, 0, 1, 3, 20])
            content = content[:begin] + draw.choice(PIECES) + content[end:]
        path = written(tmp_path, name, content)
        for task in TASKS:
            with suppress(UserError):
                use(read_table(path, "train"), task)


def use(table: Table, task: str) -> None:
    assert table.rows and table.columns
    columns = detect(table, task, {}, with_labels=task in ("tag", "answer", "choose"))
    for row in usable(table, columns)[0]:
        if task == "tag":
            read_tagged(row, columns)
        elif task == "answer":
            read_answers(row, columns)
        elif task == "choose":
            read_choices(row, columns)


@pytest.mark.parametrize(
    ("content", "format", "rows"),
    [
        ('\n{"text": "a"}\n{"text": "b"}\n', None, [{"text": "a"}, {"text": "b"}]),
        ("a\n\nb,c\n", None, [{"text": "a"}, {"text": ""}, {"text": "b,c"}]),
        ("\na\n", None, [{"text": ""}, {"text": "a"}]),
        ('{"text": "a"}\n', "text", [{"text": '{"text": "a"}'}]),
        ("text,label\na,b\n", "csv", [{"text": "a", "label": "b"}]),
        ("a\t1\nb\t2\n", "tsv", [{"1": "a", "2": "1"}, {"1": "b", "2": "2"}]),
        ("Ada\nran\n\nBob\n", "conll", [{"tokens": ["Ada", "ran"], "lines": [1, 2]},
                                       {"tokens": ["Bob"], "lines": [4]}]),
    ],
)  # fmt: skip
def test_standard_input(
    monkeypatch: pytest.MonkeyPatch, content: str, format: str | None, rows: list[dict[str, Any]]
) -> None:
    piped(monkeypatch, content)
    assert [row.values for row in stream_rows("-", format=format)] == rows


@pytest.mark.parametrize(
    ("content", "format", "told"),
    [
        ("\n\n", None, "standard input: is empty"),
        (gzip.compress(b"a" * 99, mtime=0), None, "standard input: looks like gzip"),
        (b"a\nb\xff\n", None, "standard input:2: byte 2 of the line is not UTF-8"),
        ('{"a": 1}\nno\n', None, "standard input:2: not JSON: "),
        ("a", "parquet", "standard input: parquet is read from a file only"),
    ],
)
def test_standard_input_that_is_broken(
    monkeypatch: pytest.MonkeyPatch, content: str | bytes, format: str | None, told: str
) -> None:
    piped(monkeypatch, content)
    with pytest.raises(UserError) as caught:
        list(stream_rows("-", format=format))
    assert str(caught.value).startswith(told)


def test_standard_input_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Typed(io.BytesIO):
        asked = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            self.asked += 1
            return super().readline(-1 if size is None else size)

    typed = Typed(b"one\ntwo\nthree\nfour\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed))
    rows = stream_rows("-")
    assert next(rows).values == {"text": "one"} and typed.asked == 1
    assert next(rows).values == {"text": "two"} and typed.asked == 2


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("x.jsonl", '{"text": "some text of a line", "label": "a"}\n'),
        ("x.csv", "some text of a line,a\n"),
        ("x.tsv", "some text of a line\ta\n"),
        ("x.txt", "some text of a line\n"),
        ("x.conll", "some O\n\n"),
    ],
)
def test_streaming_takes_no_memory_of_the_lines(tmp_path: Path, name: str, line: str) -> None:
    path = written(tmp_path, name, line * 20_000)  # kept, its rows would take 5 MB and more
    tracemalloc.start()
    try:
        assert sum(1 for _ in stream_rows(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_lines_and_sentences_without_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MAX_LINE", 2**20)
    path = written(tmp_path, "x.txt", "short\n" + "a " * 2**20)
    assert refusal(path) == f"{path}:2: a line of more than 1 MiB"
    monkeypatch.setattr(inputs, "MAX_SENTENCE", 50)
    path = written(tmp_path, "x.conll", "a O\n" * 60)
    assert refusal(path).startswith(f"{path}:51: 50 tokens without a blank line")


def test_peek_gives_all_rows_back(tmp_path: Path) -> None:
    path = written(tmp_path, "x.conll", "Ada O\n\n" * 10)
    table, rows = peek(stream_rows(path), str(path), 3)
    assert len(table.rows) == 3 and table.columns == ("tokens", "tags")
    assert [row.where for row in islice(rows, 4)] == [f"{path}:{n}" for n in (1, 3, 5, 7)]
    assert sum(1 for _ in rows) == 6


def test_skipped_rows_in_a_line() -> None:
    skipped = Skipped()
    for n in range(2000):
        skipped.skip("without a label", f"x.tsv:{n + 5}")
    skipped.skip("with an empty text", "x.tsv:9")
    assert skipped.total == 2001
    assert skipped.line("x.tsv") == (
        "skipped 2,001 rows of x.tsv: 2,000 without a label (first: x.tsv:5), "
        "1 with an empty text (first: x.tsv:9)"
    )
