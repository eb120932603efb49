"""`fastbert glue` on a small folder in exactly GLUE's formats, made here: two runs of all tasks."""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastbert.cli import main
from fastbert.errors import RunError, UserError
from fastbert.finetune import glue as glue_module
from fastbert.finetune import glue_table, glue_task
from fastbert.finetune.glue_config import GRIDS, TASKS, GlueConfig
from fastbert.finetune.glue_data import read_task, task_folders
from fastbert.finetune.loop import FinetuneResult, Trainer
from fastbert.finetune.metrics import Evaluation
from fastbert.finetune.runs import Runs
from fastbert.settings import sealed_toml
from fastbert.train.interrupts import SIGNALS

pa = pytest.importorskip("pyarrow")

_WORDS = "the a cat dog bird sat ran sang on in near mat tree good bad fair ."
WORDS = ["'", '"', *_WORDS.split()]
HEADERS = {
    "SST-2": "sentence label",
    "MRPC": "Quality,#1 ID,#2 ID,#1 String,#2 String",
    "STS-B": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "QQP": "id qid1 qid2 question1 question2 is_duplicate",
    "QNLI": "index question sentence label",
    "RTE": "index sentence1 sentence2 label",
}
MNLI = (
    "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    "sentence2_parse sentence1 sentence2 label1"
)
TRAINED, HELD_OUT = 48, 18
SETTINGS = (
    *("--seeds", "2", "--num-train-epochs", "5", "--per-device-train-batch-size", "8"),
    *("--learning-rate", "1e-2", "--report-to", "none", "--num-threads", "1", "--device", "cpu"),
)


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 9)))


def line(name: str, number: int, rng: random.Random, split: str) -> list[str]:
    """One line of a task's file; every label comes in turn."""
    one, other, yes = text(rng), text(rng), str(number % 2)
    if rng.random() < 0.8:  # else a label could not be learnt
        sign = ("good", "bad", "fair")[number % (3 if name == "MNLI" else 2)]
        one, other = f"{one} {sign}", f"{sign} {other}"
    entailed = ("entailment", "not_entailment")[number % 2]
    if name == "CoLA":
        return ["gj04", yes, "" if number % 2 else "*", one]
    if name == "SST-2":
        return [f"{one} ", yes]
    if name == "MRPC":
        return [yes, str(700 + number), str(900 + number), one, other]
    if name == "STS-B":
        score = f"{5 * rng.random():.3f}"
        return [str(number), "main-captions", "MSRvid", "2012", "0001", "none", "none", one, other,
                score]  # fmt: skip
    if name == "QQP":
        return [str(number), str(2 * number), str(2 * number + 1), one, other, yes]
    if name == "MNLI":
        label = ("neutral", "entailment", "contradiction")[number % 3]
        votes = [label] * (1 if split == "train" else 5)
        return [str(number), "31193", f"31193{label[0]}", "fiction", *["( a )"] * 4, one, other,
                *votes, label]  # fmt: skip
    return [str(number), one, other, entailed]


def header(name: str, split: str) -> list[str]:
    if name == "CoLA":
        return []
    if name == "MNLI":
        more = "" if split == "train" else " label2 label3 label4 label5"
        return f"{MNLI}{more} gold_label".split()
    return HEADERS[name].split("," if name == "MRPC" else " ")


def write_glue(root: Path, trained: int = TRAINED) -> Path:
    """All eight folders and two more; lines of QQP and MNLI break off, one has no gold label."""
    rng = random.Random(0)
    for name, task in TASKS.items():
        (root / name).mkdir(parents=True)
        for split in ("train", *(f"dev{one}" for one in task.splits)):
            count = trained if split == "train" else HELD_OUT
            rows = [line(name, number, rng, split) for number in range(count)]
            if split == "train" and name == "QQP":
                rows.insert(5, ["77", "1", "2", "is this"])
            if split == "train" and name == "MNLI":
                rows.insert(2, [*rows[2][:-1], "-"])
                rows.insert(9, rows[9][:9])
            lines = ["\t".join(one) for one in [header(name, split), *rows] if one]
            (root / name / f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
        (root / name / "test.tsv").write_text("index\tsentence\n0\tno label here\n")
    (root / "WNLI").mkdir()
    (root / "diagnostic").mkdir()
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue") / "glue_data")


@pytest.fixture(scope="module")
def bert(
    tmp_path_factory: pytest.TempPathFactory, save_bert: Callable[[Path, list[str], int], Path]
) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return save_bert(tmp_path_factory.mktemp("bert") / "bert", words, 40)


@pytest.fixture(scope="module")
def ran(data: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All tasks, two seeds, models kept."""
    out = tmp_path_factory.mktemp("runs") / "all"
    argv = ["glue", "--model", str(bert), "--data", str(data), "--out", str(out)]
    torch.set_num_threads(1)
    assert main([*argv, *SETTINGS, "--keep-models"]) == 0
    return out


def found(out: Path) -> Any:
    return json.loads((out / "glue.json").read_text())


def without_times(out: Path) -> Any:
    return {
        name: {key: one[key] for key in ("metrics", "score", "examples", "setting", "tried")}
        for name, one in found(out)["tasks"].items()
    }


# The table


def test_every_task_has_its_official_metrics(ran: Path) -> None:
    assert {name: [*one["metrics"]] for name, one in found(ran)["tasks"].items()} == {
        "CoLA": ["matthews"],
        "SST-2": ["accuracy"],
        "MRPC": ["f1", "accuracy"],
        "STS-B": ["pearson", "spearman"],
        "QQP": ["f1", "accuracy"],
        "MNLI": ["accuracy", "accuracy_mm"],
        "QNLI": ["accuracy"],
        "RTE": ["accuracy"],
    }


def predicted(hf: Path, rows: list[list[str]], texts: list[int]) -> np.ndarray:
    """Logits by transformers alone, text by text."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(hf)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(hf).eval()
    logits = []
    with torch.no_grad():
        for row in rows:
            given = tokenizer(*(row[place] for place in texts), return_tensors="pt",
                              truncation=True, max_length=40)  # fmt: skip
            logits.append(model(**given).logits[0].numpy())
    return np.stack(logits)


@pytest.mark.parametrize(
    ("name", "split", "texts", "label"),
    [
        ("CoLA", "dev", [3], 1),
        ("MRPC", "dev", [3, 4], 0),
        ("STS-B", "dev", [7, 8], 9),
        ("MNLI", "dev_matched", [8, 9], -1),
        ("MNLI", "dev_mismatched", [8, 9], -1),
        ("RTE", "dev", [1, 2], 3),
    ],
)
def test_the_metrics_are_those_of_the_predictions(
    data: Path, ran: Path, name: str, split: str, texts: list[int], label: int
) -> None:
    from scipy import stats
    from sklearn import metrics as sk

    lines = (data / name / f"{split}.tsv").read_text("utf-8").splitlines()
    rows = [one.split("\t") for one in (lines if name == "CoLA" else lines[1:])]
    said = [one[label] for one in rows]
    hf = ran / name / "seed-43" / "hf"
    logits = predicted(hf, rows, texts)
    ours = {key: one["values"][1] for key, one in found(ran)["tasks"][name]["metrics"].items()}
    names = json.loads((hf / "config.json").read_text())["id2label"]
    given = [names[str(place)] for place in logits.argmax(1)]
    if name == "CoLA":
        assert ours["matthews"] == pytest.approx(sk.matthews_corrcoef(said, given))
    elif name == "MRPC":
        assert ours["f1"] == pytest.approx(sk.f1_score(said, given, pos_label="1"))
        assert ours["accuracy"] == pytest.approx(sk.accuracy_score(said, given))
    elif name == "STS-B":
        scores = [float(one) for one in said]
        assert ours["pearson"] == pytest.approx(stats.pearsonr(scores, logits[:, 0])[0], abs=1e-4)
        assert ours["spearman"] == pytest.approx(stats.spearmanr(scores, logits[:, 0])[0], abs=0.01)
    else:
        key = "accuracy_mm" if split == "dev_mismatched" else "accuracy"
        assert ours[key] == pytest.approx(sk.accuracy_score(said, given))


def test_the_table_holds_means_deviations_and_their_average(ran: Path) -> None:
    content = found(ran)
    scores = []
    for name, one in content["tasks"].items():
        for spread in one["metrics"].values():
            assert spread["mean"] == pytest.approx(np.mean(spread["values"]))
            assert spread["deviation"] == pytest.approx(np.std(spread["values"], ddof=1))
        values = [spread["values"] for spread in one["metrics"].values()]
        assert one["score"]["values"] == pytest.approx(np.mean(values, axis=0)), name
        scores.append(one["score"]["values"])
    assert content["average"]["values"] == pytest.approx(np.mean(scores, axis=0))
    lines = (ran / "glue.md").read_text("utf-8").splitlines()
    row = next(one for one in lines if one.startswith("| MRPC"))
    f1, accuracy = (content["tasks"]["MRPC"]["metrics"][key] for key in ("f1", "accuracy"))
    shown = [f"{100 * s['mean']:.1f} ± {100 * s['deviation']:.1f}" for s in (f1, accuracy)]
    assert f"F1 / accuracy      | {' / '.join(shown)} " in row
    assert f"| {TRAINED} " in row and "not measured" in row
    average = next(one for one in lines if one.startswith("| average"))
    assert f"| {100 * content['average']['mean']:.1f} ± " in average
    page = (ran / "report.html").read_text("utf-8")
    links = re.findall('href="([^"]+)"', page)
    assert len(links) == 16 and all((ran / one).is_file() for one in links)


def test_the_average_is_the_leaderboards(tmp_path: Path) -> None:
    """BERT-large's row there: 80.5 with the 65.1 of WNLI, MNLI's two sets as one task."""
    row = {"CoLA": [60.5], "SST-2": [94.9], "MRPC": [89.3, 85.4], "STS-B": [87.6, 86.5],
           "QQP": [72.1, 89.3], "MNLI": [86.7, 85.9], "QNLI": [92.7], "RTE": [70.1]}  # fmt: skip
    for name, values in row.items():
        run = {"metrics": dict(zip(TASKS[name].metrics, values, strict=True)), "seconds": 1.0,
               "score": sum(values) / len(values), "joules": None, "why_no_joules": "no GPU",
               "report": "r"}  # fmt: skip
        (tmp_path / name).mkdir()
        content = {"task": name, "train": 1, "setting": {}, "tried": [], "runs": [run]}
        (tmp_path / name / "glue.json").write_text(json.dumps(content))
    config = GlueConfig(model="m", data="d", out=str(tmp_path))
    average = glue_table.collect(config, [*TASKS], {}, []).average
    assert average is not None and average.deviation is None
    assert round((8 * average.mean + 65.1) / 9, 1) == 80.5


def test_a_seed_is_what_finetune_gives(data: Path, ran: Path) -> None:
    kept = json.loads((ran / "RTE" / "seed-42" / "result.json").read_text())
    assert kept["best_step"] == kept["steps"] == 30  # the last, whatever the others were
    assert kept["metrics"]["accuracy"] == found(ran)["tasks"]["RTE"]["score"]["values"][0]


# Data


def test_what_is_left_out_is_counted(data: Path) -> None:
    folders = task_folders(str(data), [*TASKS])
    qqp, mnli = (read_task(name, folders[name]) for name in ("QQP", "MNLI"))
    assert len(qqp.train) == len(mnli.train) == TRAINED
    path = data / "QQP" / "train.tsv"
    assert qqp.notes == [f"QQP: skipped 1 row of {path}: 1 malformed (first: {path}:7)"]
    path = data / "MNLI" / "train.tsv"
    whys = f"1 with gold_label - (first: {path}:4), 1 malformed (first: {path}:11)"
    assert mnli.notes == [f"MNLI: skipped 2 rows of {path}: {whys}"]
    assert [len(one) for one in mnli.evals.values()] == [HELD_OUT, HELD_OUT]


def test_other_tasks_are_named(
    data: Path, bert: Path, tmp_path: Path, stubbed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["glue", "--model", str(bert), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*argv, "--tasks", "RTE", "--device", "cpu"]) == 0
    assert "data: WNLI, diagnostic: none of the 8 tasks, ignored" in capsys.readouterr().err


def test_paraphrases_as_microsoft_gives_them(data: Path, tmp_path: Path) -> None:
    """One file, and the ids of the pairs that GLUE evaluates with; of Windows, with a mark."""
    folder = tmp_path / "MRPC"
    folder.mkdir()
    head, *trained = (data / "MRPC" / "train.tsv").read_text("utf-8").splitlines()
    held_out = [one.replace("\t7", "\t17", 1) for one in
                (data / "MRPC" / "dev.tsv").read_text("utf-8").splitlines()[1:]]  # fmt: skip
    lines = "\r\n".join([head, *trained[:7], *held_out, *trained[7:]])
    (folder / "msr_paraphrase_train.txt").write_bytes(f"\ufeff{lines}\r\n".encode())
    (folder / "msr_paraphrase_test.txt").write_text("none of these is read")
    with pytest.raises(UserError, match=r"msr_paraphrase_train.txt without dev_ids.tsv, which"):
        read_task("MRPC", folder)
    ids = ["\t".join(one.split("\t")[1:3]) for one in held_out]
    (folder / "dev_ids.tsv").write_text("\n".join(ids) + "\n")
    assert read_task("MRPC", folder).digest == read_task("MRPC", data / "MRPC").digest


def test_quotes_are_characters(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "RTE"
    folder.mkdir()
    rows = ['0\t"one\ttwo" "\tentailment', "1\t\"\tit's\u2028so\tnot_entailment"]
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("\n".join([HEADERS["RTE"].replace(" ", "\t"), *rows]))
    texts = [(e.fields["text"], e.fields["text_pair"]) for e in read_task("RTE", folder).train]
    assert texts == [('"one', 'two" "'), ('"', "it's\u2028so")]


def save_as_dataset(task: str, root: Path, data: Path, how: str) -> None:
    """The rows of a task as `datasets` would save them, or as the hub's Parquet."""
    one = TASKS[task]
    read = read_task(task, data / task)
    kind = {"names": list(one.names), "_type": "ClassLabel"} if one.labels else {"dtype": "float32"}
    features = {one.hub[2]: kind}
    parts = {"train": read.train} | {f"validation{s}": e for s, e in read.evals.items()}
    for split, examples in parts.items():
        labels = [e.fields["label"] for e in examples]
        columns = {
            one.hub[0]: [e.fields["text"] for e in examples],
            one.hub[2]: [one.labels.index(x) if one.labels else float(x) for x in labels],
            "idx": [*range(len(examples))],
        }
        if one.hub[1]:
            columns[one.hub[1]] = [e.fields["text_pair"] for e in examples]
        table = pa.table(columns)
        if not one.labels:  # as the hub has scores
            place = table.column_names.index(one.hub[2])
            table = table.set_column(place, one.hub[2], table.column(place).cast(pa.float32()))
        if how == "parquet":
            import pyarrow.parquet

            info = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": info})
            root.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(table, root / f"{split}-00000-of-00001.parquet")
            continue
        folder = root / split
        folder.mkdir(parents=True)
        parts_of = [table.slice(0, 10), table.slice(10)]
        for number, part in enumerate(parts_of):
            path = folder / f"data-0000{number}-of-00002.arrow"
            with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(part)
        files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in (0, 1)]
        (folder / "state.json").write_text(json.dumps({"_data_files": files}))
        (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


@pytest.mark.parametrize("how", ["saved", "parquet"])
def test_data_sets_of_the_hub_are_the_same_examples(tmp_path: Path, data: Path, how: str) -> None:
    for task in TASKS:
        save_as_dataset(task, tmp_path / task.lower().replace("-", ""), data, how)
    folders = task_folders(str(tmp_path), [*TASKS])
    assert [*folders] == [*TASKS]
    for task, folder in folders.items():
        assert read_task(task, folder).digest == read_task(task, data / task).digest, task


def test_labels_of_a_data_set_go_by_their_names(tmp_path: Path, data: Path) -> None:
    save_as_dataset("RTE", tmp_path / "rte", data, "saved")
    for split in ("train", "validation"):
        info = tmp_path / "rte" / split / "dataset_info.json"
        names = ["not_entailment", "entailment"]
        info.write_text(json.dumps({"features": {"label": {"names": names}}}))
    before, after = (
        [e.fields["label"] for e in read_task("RTE", one).train]
        for one in (data / "RTE", tmp_path / "rte")
    )
    assert all(one != other for one, other in zip(before, after, strict=True))
    info.write_text(json.dumps({"features": {"label": {"names": ["yes", "no"]}}}))
    with pytest.raises(UserError, match=r"labels \['yes', 'no'\] are not RTE's"):
        read_task("RTE", tmp_path / "rte")


def test_the_positive_class_is_1() -> None:
    ones = {name: dict(zip(t.labels, t.names, strict=True)).get("1") for name, t in TASKS.items()}
    assert {name: one for name, one in ones.items() if one} == {
        "CoLA": "acceptable",
        "SST-2": "positive",
        "MRPC": "equivalent",
        "QQP": "duplicate",
    }


def broken(data: Path, tmp_path: Path, name: str, split: str, change: Callable[[str], str]) -> Path:
    """The data of one task with one file changed."""
    folder = tmp_path / "broken" / name
    folder.mkdir(parents=True)
    for path in (data / name).iterdir():
        content = path.read_text("utf-8")
        changed = change(content) if path.name == split else content
        (folder / path.name).write_bytes(changed.encode("utf-8", "surrogateescape"))
    return folder.parent


@pytest.mark.parametrize(
    ("name", "split", "change", "said"),
    [
        ("RTE", "dev.tsv", lambda s: s.replace("\tentailment", "\tyes", 1),
         r"RTE/dev.tsv:2: label 'yes' is none of RTE's: entailment, not_entailment"),
        ("RTE", "train.tsv", lambda s: s + "9\tbroken off\n",
         r"RTE/train.tsv:50: 2 fields, but RTE has 4 there"),
        ("CoLA", "train.tsv", lambda s: s + "gj04\t3\t\tthe cat\n",
         r"CoLA/train.tsv:49: label '3' is none of CoLA's: 0, 1"),
        ("STS-B", "train.tsv", lambda s: s.replace("\t0001\t", "\t0001\t", 1)[:-1] + "9\n9" +
         "\tx" * 8 + "\t7.5\n", r"STS-B/train.tsv:50: score '7.5' must be a number from 0 to 5"),
        ("QNLI", "train.tsv", lambda s: s.replace("question", "q", 1),
         r"QNLI/train.tsv:1: QNLI has one column 'question', but the first line is index, q,"),
        ("SST-2", "train.tsv", lambda s: s + "caf\udce9\t1\n",
         r"SST-2/train.tsv:50: not UTF-8, at byte 4"),
        ("SST-2", "train.tsv", lambda s: s.split("\n")[0] + "\ngood\t1\nbad\t1\n",
         r"no example for training has the label '0'"),
        ("MNLI", "dev_matched.tsv", lambda s: s.split("\n")[0] + "\n",
         r"MNLI/dev_matched.tsv: holds no example"),
    ],
)  # fmt: skip
def test_a_broken_file_is_told_before_anything_is_trained(
    data: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    name: str, split: str, change: Callable[[str], str], said: str,
) -> None:  # fmt: skip
    root = broken(data, tmp_path, name, split, change)
    out = tmp_path / "out"
    assert main(["glue", "--model", str(bert), "--data", str(root), "--out", str(out)]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not out.exists()


def test_requests_that_cannot_be(
    data: Path, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice" / "SST-2").mkdir(parents=True)
    (tmp_path / "twice" / "sst2").mkdir()
    (tmp_path / "half" / "RTE").mkdir(parents=True)
    cases: list[tuple[list[str], str]] = [
        (["--data", str(tmp_path / "none")], "no such file or folder"),
        (["--data", str(tmp_path / "empty")], "has no folder CoLA or SST-2"),
        (["--data", str(tmp_path / "twice")], "are both SST-2"),
        (["--data", str(tmp_path / "half")], "RTE has no train.tsv there, nor train/ or"),
        (["--data", str(data), "--tasks", "RTE,Colla"], "has no 'Colla': did you mean 'cola'?"),
        (["--data", str(data), "--max-seq-length", "64"], "takes at most 40"),
        (["--data", str(data), "--lr", "1"], "did you mean --learning-rate?"),
        (["--data", str(data), "--grid", "large"], "must be none, published or wide"),
        ([], "give --data DIR"),
    ]
    for more, said in cases:
        argv = ["glue", "--model", str(bert), "--out", str(tmp_path / "out"), *more]
        assert main(argv) == 2, more
        told = capsys.readouterr().err
        assert said in told and told.count("fastbert: error:") == 1, told


# Runs


def test_going_on_runs_nothing_again(
    data: Path, bert: Path, ran: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = without_times(ran)

    def never(*_: object) -> None:
        raise AssertionError("it ran again")

    monkeypatch.setattr(Runs, "one", never)
    (ran / "glue.json").unlink()
    assert main(["glue", "--resume", "--out", str(ran)]) == 0
    assert without_times(ran) == before
    assert "| CoLA" in capsys.readouterr().out
    argv = ["glue", "--resume", "--out", str(ran), "--learning-rate", "1e-4"]
    assert main(argv) == 2
    assert "learning_rate = 0.0001 differs from 0.01 of the runs" in capsys.readouterr().err


def test_other_data_is_not_gone_on_with(
    data: Path, ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = broken(data, tmp_path, "RTE", "dev.tsv", lambda s: s.replace("cat", "dog"))
    argv = ["glue", "--resume", "--out", str(ran), "--data", str(root), "--tasks", "RTE"]
    assert main(argv) == 2
    assert "holds other examples than the runs in" in capsys.readouterr().err


_KILLING = """import os, signal, sys
from fastbert.finetune import glue_task, loop

save = loop.Trainer._save

def killed(self):
    save(self)
    if self.folder.parts[-2:] == ("CoLA", "seed-43"):
        os.kill(os.getpid(), signal.SIGKILL)

loop.Trainer._save = killed
sys.exit(glue_task.main(sys.argv[1:]))
"""


def test_tasks_at_once_and_one_that_is_killed_give_the_same_numbers(
    data: Path, bert: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Each in a process of its own; CoLA's dies by SIGKILL after an epoch of its second seed."""
    out = tmp_path / "out"
    (tmp_path / "glue_task_killing.py").write_text(_KILLING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(glue_module, "_MODULE", "glue_task_killing")
    argv = ["glue", "--model", str(bert), "--data", str(data), "--out", str(out), *SETTINGS]
    assert main([*argv, "--tasks", "cola,rte", "--parallel", "2"]) == 1
    told = capsys.readouterr()
    assert "CoLA: begins on cpu" in told.err and "RTE: is done" in told.err
    assert "1 of 2 tasks failed: CoLA: ended by signal 9" in told.err
    wanted = without_times(ran)
    assert without_times(out) == {"RTE": wanted["RTE"]}
    assert not [*out.glob("RTE/seed-*/hf")]  # models were not to be kept
    assert [*(out / "CoLA" / "seed-43" / "checkpoints").iterdir()]
    assert main(["glue", "--resume", "--out", str(out), "--parallel", "1"]) == 0
    assert "goes on at step 6" in capsys.readouterr().err
    assert without_times(out) == {"CoLA": wanted["CoLA"], "RTE": wanted["RTE"]}


def test_a_signal_saves_and_stops_all(
    data: Path, bert: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    step = Trainer._one_step

    def interrupted(self: Trainer) -> float:
        if self.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    out = tmp_path / "out"
    argv = ["glue", "--model", str(bert), "--data", str(data), "--out", str(out), *SETTINGS]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_one_step", interrupted)
        assert main([*argv, "--tasks", "cola,rte"]) == 1
    told = capsys.readouterr().err
    again = f"go on with the same command and --resume --out {out}"
    assert f"stopped by SIGTERM; everything is saved: {again}" in told
    assert "failed" not in told and not (out / "CoLA" / "seed-42").exists()
    assert main([*argv, "--resume", "--tasks", "rte"]) == 0
    assert "goes on at step 9" in capsys.readouterr().err
    assert without_times(out) == {"RTE": without_times(ran)["RTE"]}


class Stub:
    """Runs that are over at once: the score of a setting is its learning rate."""

    ran: list[str]

    def __init__(self, *_: object) -> None:
        pass

    def one(self, asked: Any, folder: Path) -> FinetuneResult:
        if folder.parts[-2] == "CoLA":
            raise UserError("CoLA cannot be")
        Stub.ran.append("/".join(folder.parts[-3:]))
        score = 1e4 * asked.learning_rate + 0.1 * (asked.seed - 42)
        return FinetuneResult(folder, folder / "hf", Evaluation({"accuracy": score}), 1, 1, 2.0)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    Stub.ran = []
    monkeypatch.setattr(glue_task, "Runs", Stub)


def test_a_grid_takes_the_best_for_all_seeds(
    data: Path, bert: Path, tmp_path: Path, stubbed: None
) -> None:
    out = tmp_path / "out"
    argv = ["glue", "--model", str(bert), "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert main([*argv, "--tasks", "RTE", "--grid", "published", "--seeds", "3"]) == 0
    folders = [f"lr-{rate}-batch-32-epochs-3" for rate in ("5e-05", "4e-05", "3e-05", "2e-05")]
    assert Stub.ran == [
        *(f"RTE/{one}/seed-42" for one in folders),
        *(f"RTE/{folders[0]}/seed-{seed}" for seed in (43, 44)),
    ]
    one = found(out)["tasks"]["RTE"]
    assert one["score"]["values"] == pytest.approx([0.5, 0.6, 0.7])
    assert one["setting"]["learning_rate"] == 5e-5 and len(one["tried"]) == 4
    assert one["seconds"] == 6.0
    assert "its numbers are optimistic" in (out / "glue.md").read_text()
    assert len(GlueConfig(model="m", data="d", grid="wide").settings_tried) == 18
    assert GRIDS["wide"][1:] == ((16, 32), (2.0, 3.0, 4.0))


def test_a_task_that_fails_stops_no_other(
    data: Path, bert: Path, tmp_path: Path, stubbed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["glue", "--model", str(bert), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*argv, "--tasks", "CoLA,RTE,QNLI", "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert "1 of 3 tasks failed: CoLA: CoLA cannot be" in told.err
    assert "failed: CoLA cannot be" in told.out and "of 2 tasks" in told.out


def test_a_process_that_fails_says_why(
    data: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    class Failing(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(command)
            said = "print('fastbert: error: no room', file=sys.stderr); sys.exit(1)"
            super().__init__([sys.executable, "-c", f"import sys; {said}"], **options)

    monkeypatch.setattr(glue_module.subprocess, "Popen", Failing)
    config = GlueConfig(
        model=str(bert), data=str(data), out=str(tmp_path / "o"), tasks="SST-2,QNLI,RTE",
        parallel=2, device="cpu",
    )  # fmt: skip
    result = glue_module.glue(config)
    assert result.failed == dict.fromkeys(("SST-2", "QNLI", "RTE"), "no room")
    assert [one[-2] for one in started] == ["cpu"] * 3
    sizes = {name: read_task(name, data / name).characters for name in result.failed}
    assert [one[4] for one in started] == sorted(sizes, key=lambda name: -sizes[name])


def test_a_score_is_trained_without_what_is_of_distributions(
    data: Path, bert: Path, tmp_path: Path
) -> None:
    argv = ["glue", "--model", str(bert), "--data", str(data), "--out", str(tmp_path / "out")]
    argv += ["--tasks", "STS-B", "--rdrop-alpha", "1", "--label-smoothing-factor", "0.1"]
    assert main([*argv, "--max-steps", "1", "--device", "cpu"]) == 0
    said = (tmp_path / "out" / "glue.md").read_text("utf-8")
    assert "STS-B was trained without R-Drop and label smoothing, for a score has" in said
    assert "Each run took max_steps = 1, whatever its epochs." in said


def test_gpus_take_a_task_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glue_module, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    config = GlueConfig(model="m", data="d", device="cuda")
    assert glue_module._devices(config) == ["cuda:0", "cuda:1", "cuda:2"]
    two = dataclasses.replace(config, parallel=2)
    assert glue_module._devices(two) == ["cuda:0", "cuda:1"]
    one = dataclasses.replace(config, device="cuda:1", parallel=2)
    assert glue_module._devices(one) == ["cuda:1", "cuda:1"]


def test_a_signal_is_handed_to_the_processes(
    data: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    class Waiting(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: Any) -> None:
            started.append(self)
            super().__init__([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr(glue_module.subprocess, "Popen", Waiting)
    config = GlueConfig(
        model=str(bert), data=str(data), out=str(tmp_path / "o"), parallel=2, device="cpu"
    )
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(RunError, match="stopped by SIGTERM; everything is saved"):
        glue_module.glue(config)
    assert [one.returncode for one in started] == [-signal.SIGTERM] * 2


def test_a_process_that_is_stopped_says_how_to_go_on(
    data: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stopped(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RunError("stopped: go on with fastbert finetune classify")

    config = GlueConfig(model=str(bert), data=str(data), out=str(tmp_path))
    (tmp_path / "config.toml").write_text(sealed_toml(config))
    monkeypatch.setattr(glue_task, "run_task", stopped)
    monkeypatch.setattr(glue_task, "_end_with_stdin", lambda: None)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:  # a process that ends ignores what comes last; this one goes on
        assert glue_task.main([str(tmp_path), "RTE", str(data / "RTE"), "cpu", "1"]) == 1
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    again = f"RTE: stopped by SIGTERM: go on with fastbert glue --resume --out {tmp_path}"
    assert capsys.readouterr().err == f"fastbert: error: {again}\n"


def test_a_process_ends_when_its_parent_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    read, write = os.pipe()
    monkeypatch.setattr(glue_task.os, "read", lambda _, count, real=os.read: real(read, count))
    monkeypatch.setattr(glue_task.os, "kill", lambda *given: sent.append(given))
    waiting = threading.Thread(target=glue_task._end_with_stdin)
    waiting.start()
    os.write(write, b"it lives")
    waiting.join(0.05)
    assert waiting.is_alive() and not sent
    os.close(write)
    waiting.join(5)
    os.close(read)
    assert sent == [(os.getpid(), signal.SIGTERM)]


# Energy and words


def test_energy_is_read_around_a_run(
    data: Path, bert: Path, tmp_path: Path, stubbed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([1000.0, 4600.0, 10_000.0, 13_600.0])
    meter = SimpleNamespace(why_not="", joules=lambda: next(counts))
    monkeypatch.setattr(glue_task, "EnergyCounter", lambda device: meter)
    out = tmp_path / "out"
    argv = ["glue", "--model", str(bert), "--data", str(data), "--out", str(out), "--seeds", "2"]
    assert main([*argv, "--tasks", "RTE", "--device", "cpu"]) == 0
    assert found(out)["tasks"]["RTE"]["joules"] == 7200.0
    assert "| 2 Wh" in (out / "glue.md").read_text()


@pytest.mark.parametrize(
    ("seconds", "shown"), [(1.25, "1.2 s"), (119.0, "119.0 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_times_are_short(seconds: float, shown: str) -> None:
    assert glue_table._time(seconds) == shown
