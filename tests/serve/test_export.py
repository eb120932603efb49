"""`fastbert export`: graphs that say what torch says, folders as others read them, in one line why
not.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

import fastbert
from fastbert import cli
from fastbert.errors import RunError
from fastbert.finetune.predict import pipeline
from fastbert.hf import onnx as graphs

from . import served

TEXTS = ["the cat sat on a mat", "Ada Lovelace wrote", "a", "engines in London while the cat sat"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def family(folder: Path, name: str, head: str, **changes: Any) -> str:
    """The folder of a tiny random model of another family."""
    where = folder / f"{name}-{head}"
    if where.exists():
        return str(where)
    torch.manual_seed(4)
    kinds = {
        "Roberta": {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        "Electra": {"embedding_size": 16},
        "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    }
    values: dict[str, Any] = {"vocab_size": len(served.VOCABULARY), "max_position_embeddings": 34}
    if name != "DistilBert":
        values |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        values |= {"intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(**values | kinds[name] | changes)
    getattr(transformers, f"{name}{head}")(config).save_pretrained(where)
    ids = {word: number for number, word in enumerate(served.VOCABULARY)}
    if name == "Roberta":
        ids["[PAD]"], ids["[UNK]"] = 1, 0
    transformers.BertTokenizer(vocab=ids).save_pretrained(where)
    return str(where)


def export(model: str, to: str, out: Path, *options: str, status: int = 0) -> Path:
    asked = ["export", "--model", model, "--to", to, "--out", str(out), *options]
    assert cli.main(asked) == status
    return out


def refused(capsys: pytest.CaptureFixture[str], model: str, to: str, out: Path, *more: str) -> str:
    """The one line that a bad request gets; nothing is written."""
    before = sorted(out.parent.iterdir())
    export(model, to, out, *more, status=2)
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("fastbert: error: ")
    assert sorted(out.parent.iterdir()) == before
    return said[-1]


def runs(folder: Path, name: str = "model.onnx") -> Any:
    path = folder / "onnx" / name
    onnx.checker.check_model(str(path))
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def rows(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in content), encoding="utf-8")
    return path


# Graphs


KINDS: dict[str, tuple[Callable[[Path], str], str, list[str]]] = {
    "choose": (lambda f: served.saved(f, "choose"), "MultipleChoice", ["logits"]),
    "pretrained": (lambda f: served.saved(f, "pretrained"), "MaskedLM", ["logits"]),
    "roberta": (
        lambda f: family(f, "Roberta", "ForQuestionAnswering"),
        "QuestionAnswering",
        ["start_logits", "end_logits"],
    ),
    "electra": (
        lambda f: family(f, "Electra", "ForTokenClassification"),
        "TokenClassification",
        ["logits"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_says_what_torch_says(
    kind: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, head, outputs = KINDS[kind]
    where = make(models)
    folder = export(where, "onnx", tmp_path / "out")
    said = capsys.readouterr().out
    assert float(re.findall(r"largest difference from torch: (\S+)", said)[0]) < 1e-4

    run = runs(folder)
    takes = {one.name: (one.type, one.shape) for one in run.get_inputs()}
    names = ["input_ids", "attention_mask"]
    if kind != "roberta":
        names.append("token_type_ids")
    axes = ["batch", *(["choices"] if kind == "choose" else []), "sequence"]
    assert takes == dict.fromkeys(names, ("tensor(int64)", axes))
    assert [one.name for one in run.get_outputs()] == outputs
    assert all(one.shape[0] == "batch" for one in run.get_outputs())

    auto = getattr(transformers, f"AutoModelFor{head}")
    theirs = auto.from_pretrained(where).eval()
    for shape in ((1, 3), (5, 11)):  # none of those that it was made and checked with
        given = batch(theirs.config, shape, names, choices=2 if kind == "choose" else 0)
        with torch.no_grad():
            wanted = theirs(**given)
        found = run.run(outputs, {name: one.numpy() for name, one in given.items()})
        real = given["attention_mask"].bool().numpy()
        for name, one in zip(outputs, found, strict=True):
            there = wanted[name if name in wanted else "logits"].numpy()
            of_tokens = there.shape[:2] == real.shape
            np.testing.assert_allclose(
                one[real] if of_tokens else one, there[real] if of_tokens else there,
                rtol=0, atol=1e-5,
            )  # fmt: skip

    text = (folder / "onnx" / "model.onnx").read_bytes()
    assert b"site-packages" not in text and str(tmp_path).encode() not in text
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == [type(theirs).__name__]
    assert set(transformers.AutoTokenizer.from_pretrained(folder)("a")) == {*names}


def batch(
    config: Any, shape: tuple[int, int], names: list[str], choices: int = 0
) -> dict[str, torch.Tensor]:
    """Random tokens, a part of them padding."""
    rows_, length = shape[0] * max(choices, 1), shape[1]
    ids = torch.randint(5, config.vocab_size, (rows_, length))
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows_, 1))).long()
    given = {"input_ids": ids.where(mask.bool(), torch.tensor(config.pad_token_id))}
    given["attention_mask"] = mask
    if "token_type_ids" in names:
        given["token_type_ids"] = torch.randint(0, 2, ids.shape) * mask
    if choices:
        given = {name: one.view(shape[0], choices, length) for name, one in given.items()}
    return given


def test_a_graph_of_an_encoder_pools_as_encode_does(models: Path, tmp_path: Path) -> None:
    where = family(models, "DistilBert", "Model")
    folder = export(
        where, "onnx", tmp_path / "out", "--pooling", "cls", "--normalize", "--opset", "20"
    )
    model = onnx.load(folder / "onnx" / "model.onnx")
    assert [one.version for one in model.opset_import if not one.domain] == [20]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(TEXTS, padding=True, return_tensors="np")
    states, vectors = runs(folder).run(["last_hidden_state", "sentence_embedding"], dict(given))
    wanted = fastbert.encode(TEXTS, where, pooling="cls", normalize=True)
    np.testing.assert_allclose(vectors, wanted, rtol=0, atol=1e-5)
    assert states.shape == (*given["input_ids"].shape, 32)
    assert tei_pooling(folder) == "cls" and (folder / "2_Normalize").is_dir()


def test_a_graph_that_says_something_else_is_not_left(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def write(exported: graphs.Exported, path: Path, opset: int) -> None:
        encoder = exported.model.base_model.encoder
        bias = encoder.layer[1].output.dense.bias
        with torch.no_grad():
            bias[3] += 0.01
            graphs.write_graph(exported, path, opset)
            bias[3] -= 0.01

    monkeypatch.setattr("fastbert.serve.export.write_graph", write)
    export(served.saved(models, "score"), "onnx", tmp_path / "out", status=1)
    assert "logits differs from torch's by" in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_no_number_is_seen(models: Path, tmp_path: Path) -> None:
    class Broken:
        def run(self, names: list[str], given: dict[str, Any]) -> list[np.ndarray]:
            return [np.full((len(given["input_ids"]), 3), np.nan, np.float32)]

    model = transformers.BertForSequenceClassification.from_pretrained(
        served.saved(models, "several")
    )
    exported = graphs.Exported(model.eval(), "SequenceClassification", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "session", lambda path: Broken())
        with pytest.raises(RunError, match="differs from torch's by nan"):
            graphs.check_graph(exported, tmp_path, 8, 1e-4)


# int8


def compared(text: str) -> dict[str, tuple[float, float, float]]:
    found = re.findall(r"^([\w ]+): (\S+) fp32, (\S+) int8 \((\S+)\)$", text, re.M)
    return {name: (float(a), float(b), float(c)) for name, a, b, c in found}


def test_int8_says_what_a_task_loses(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = served.saved(models, "classify")
    asked = [" ".join(served.WORDS[n : n + 3 + n % 4]) for n in range(12)]
    given = [one["label"] for one in pipeline(None, where)(asked)]
    labels = [name if place % 4 else "good" for place, name in enumerate(given)]
    right = sum(a == b for a, b in zip(given, labels, strict=True)) / len(given)
    path = rows(
        tmp_path / "rows.jsonl",
        [{"text": text, "label": label} for text, label in zip(asked, labels, strict=True)],
    )
    folder = export(where, "onnx", tmp_path / "out", "--quantize", "int8", "--eval", str(path))
    said = capsys.readouterr()
    fp32, int8, loss = compared(said.out)["accuracy"]
    assert fp32 == pytest.approx(right, abs=1e-4) and loss == pytest.approx(int8 - fp32, abs=1e-4)
    assert {"macro_f1", "roc_auc"} & {*compared(said.out)}
    assert "12 rows (jsonl), text = 'text', label = 'label'" in said.err

    sizes = [(folder / "onnx" / f"{name}.onnx").stat().st_size for name in ("model", QUANTIZED)]
    assert sizes[1] < 0.7 * sizes[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = dict(tokenizer(asked, padding=True, return_tensors="np"))
    (logits,) = runs(folder, f"{QUANTIZED}.onnx").run(["logits"], inputs)
    names = [["bad", "fair", "good"][number] for number in logits.argmax(1)]
    said_right = sum(a == b for a, b in zip(names, labels, strict=True)) / len(labels)
    assert int8 == pytest.approx(said_right, abs=1e-4)
    types = {one.op_type for one in onnx.load(folder / "onnx" / f"{QUANTIZED}.onnx").graph.node}
    assert "MatMulInteger" in types


QUANTIZED = "model_quantized"


def test_int8_says_what_vectors_and_masked_words_lose(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    more = ("--quantize", "int8", "--eval", str(path))
    folder = export(served.saved(models, "embed"), "onnx", tmp_path / "vectors", *more)
    mean, least, count = re.findall(
        r"cosine of int8 to fp32: mean (\S+), least (\S+) \((\d+) texts\)", capsys.readouterr().out
    )[0]
    assert int(count) == len(TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    each = [dict(tokenizer([text], return_tensors="np")) for text in TEXTS]
    fp32, int8 = (
        np.concatenate([run.run(["sentence_embedding"], one)[0] for one in each])
        for run in (runs(folder), runs(folder, f"{QUANTIZED}.onnx"))
    )
    wanted = fastbert.encode(TEXTS, served.saved(models, "embed"))
    np.testing.assert_allclose(fp32, wanted, rtol=0, atol=1e-5)
    cosines = (fp32 * int8).sum(1) / np.linalg.norm(fp32, axis=1) / np.linalg.norm(int8, axis=1)
    assert 0.9 < float(least) <= float(mean) < 1  # an activation's scale is that of its batch
    assert float(mean) == pytest.approx(cosines.mean(), abs=5e-3)

    where = served.saved(models, "masked")
    export(where, "onnx", tmp_path / "words", *more)
    said = compared(capsys.readouterr().out)
    words = sum(max(1, round(0.15 * len(text.split()))) for text in TEXTS)
    assert said["masked words"][:2] == (words, words)
    loss, accuracy = said["loss"], said["accuracy"]
    assert 0 <= accuracy[0] <= 1 and 0 < abs(loss[2]) < 0.2 * loss[0]


# Folders


def tei_pooling(folder: Path) -> str:
    """How text-embeddings-inference reads a folder's pooling: fields of its `PoolConfig`."""
    content = json.loads((folder / "1_Pooling" / "config.json").read_text())
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    on = {name: content[f"pooling_mode_{name}"] for name in names}
    assert all(isinstance(one, bool) for one in on.values())
    assert isinstance(content["word_embedding_dimension"], int)
    return "cls" if on["cls_token"] else "mean" if on["mean_tokens"] else "none"


def tei_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json that it cannot do without, by the types it gives them."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert all(isinstance(one, str) for one in content["architectures"])
    numbers = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("intermediate_size", "max_position_embeddings", "type_vocab_size", "pad_token_id"),
    )
    assert all(type(content[name]) is int for name in numbers)
    shares = ("hidden_dropout_prob", "initializer_range", "layer_norm_eps")
    assert all(isinstance(content[name], float | int) for name in shares)
    assert content.get("position_embedding_type", "absolute") == "absolute"
    assert content["model_type"] == "bert" and content["hidden_act"] == "gelu"
    if content["architectures"][0].endswith("Classification"):
        assert all(isinstance(one, str) for one in content["id2label"].values())
        assert all(type(one) is int for one in content["label2id"].values())
        assert len(content["id2label"]) == len(content["label2id"])
    return content


@pytest.mark.parametrize("normalize", [False, True])
def test_sentence_transformers_and_its_like_load_a_folder(
    normalize: bool, models: Path, tmp_path: Path
) -> None:
    where = served.saved(models, "embed")
    pooling = "cls" if normalize else "mean"
    options = ("--pooling", pooling, *(["--normalize"] if normalize else []))
    folder = export(where, "hf", tmp_path / "out", *options)
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs.max_seq_length == 64 and len(theirs) == 2 + normalize
    wanted = fastbert.encode(TEXTS, where, pooling=pooling, normalize=normalize)  # type: ignore[arg-type]
    np.testing.assert_allclose(theirs.encode(TEXTS), wanted, rtol=0, atol=1e-5)
    answers = pipeline(None, folder)(TEXTS)
    np.testing.assert_allclose([one["embedding"] for one in answers], wanted, rtol=0, atol=1e-5)

    assert tei_pooling(folder) == pooling
    content = tei_config(folder)
    assert content["architectures"] == ["BertModel"]
    layout = json.loads((folder / "sentence_bert_config.json").read_text())
    assert layout["max_seq_length"] == 64
    prompts = json.loads((folder / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {}
    names = {*load_file(folder / "model.safetensors")}
    assert "embeddings.word_embeddings.weight" in names and "pooler.dense.weight" in names
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = (folder / "vocab.txt").read_text().splitlines()
    assert [tokenizer.id_to_token(number) for number in range(len(words))] == words
    assert words == served.VOCABULARY


def test_what_stands_before_texts_is_kept(models: Path, tmp_path: Path) -> None:
    source = export(served.saved(models, "embed"), "hf", tmp_path / "source", "--normalize")
    path = source / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": "query: "}, "default_prompt_name": "query"}))
    folder = export(str(source), "hf", tmp_path / "out")
    assert (folder / path.name).read_text() == path.read_text()
    assert (folder / "2_Normalize").is_dir()  # as the folder says
    assert not (
        export(str(source), "hf", tmp_path / "no", "--no-normalize") / "2_Normalize"
    ).exists()


@pytest.mark.parametrize("kind", ["classify", "pretrained"])
def test_a_head_stays_unless_vectors_are_asked_for(kind: str, models: Path, tmp_path: Path) -> None:
    where = served.saved(models, kind)
    folder = export(where, "hf", tmp_path / "whole")
    auto = {"classify": "SequenceClassification", "pretrained": "PreTraining"}[kind]
    kinds = getattr(transformers, f"AutoModelFor{auto}")
    a, b = (kinds.from_pretrained(one).state_dict() for one in (where, folder))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    content = tei_config(folder)
    assert content["architectures"] == [f"BertFor{auto}"] and "fastbert" not in content
    assert not (folder / "modules.json").exists()

    folder = export(where, "hf", tmp_path / "vectors", "--task", "embed")
    found = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, fastbert.encode(TEXTS, where), rtol=0, atol=1e-5)
    assert tei_config(folder)["architectures"] == ["BertModel"]


def test_two_labels_without_names_are_written_out(models: Path, tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(
        served.saved(models, "classify"), num_labels=2, ignore_mismatched_sizes=True
    )
    model.config.id2label, model.config.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {}
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(served.saved(models, "classify")).save_pretrained(
        tmp_path / "model"
    )
    assert "id2label" not in json.loads((tmp_path / "model" / "config.json").read_text())
    folder = export(str(tmp_path / "model"), "hf", tmp_path / "out")
    assert tei_config(folder)["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_a_file_of_weights(dtype: str, models: Path, tmp_path: Path) -> None:
    where = served.saved(models, "masked")
    path = export(where, "safetensors", tmp_path / "x.safetensors", "--dtype", dtype)
    kind = {"auto": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    wanted = load_file(Path(where) / "model.safetensors")
    found = load_file(path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name].to(kind)) for name in wanted)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["source"] == "masked-64-2"
    assert metadata["architecture"] == "BertForMaskedLM"
    folder = export(where, "hf", tmp_path / "hf", "--dtype", dtype)
    assert load_file(folder / "model.safetensors")["bert.embeddings.LayerNorm.bias"].dtype == kind


def test_a_run_is_found_by_its_folder(models: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "hf").symlink_to(served.saved(models, "tag"))
    path = export(str(run), "safetensors", tmp_path / "x.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata()["source"] == "run"


# What is refused


def test_what_cannot_be_is_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classify, masked = served.saved(models, "classify"), served.saved(models, "masked")
    path = rows(tmp_path / "texts.jsonl", [{"text": "a", "label": "unheard"}] * 3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    out, full = tmp_path / "out", tmp_path / "full"

    def line(model: str, to: str, where: Path, *more: str) -> str:
        return refused(capsys, model, to, where, *more)

    assert "no such file or folder" in line(str(tmp_path / "none"), "hf", out)
    assert "no model to load" in line(str(full), "hf", out)
    assert "already holds files: name another folder" in line(classify, "onnx", full)
    assert "is a file: give a folder" in line(classify, "hf", path)
    assert "is a folder: give the path of a file" in line(classify, "safetensors", full)
    assert "is there already" in line(classify, "safetensors", path)
    assert "to = 'pickle' must be onnx, hf or safetensors" in line(classify, "pickle", out)
    assert "give --eval FILE" in line(classify, "onnx", out, "--quantize", "int8")
    assert "quantize: is for --to onnx" in line(classify, "hf", out, "--quantize", "int8")
    assert "to = '' must be onnx, hf or safetensors" in line(classify, "", out)
    assert "is of the rows of --eval" in line(classify, "onnx", out, "--text-column", "text")
    assert "text_column: is for --to onnx" in line(classify, "hf", out, "--text-column", "text")
    assert "give --quantize int8" in line(classify, "onnx", out, "--eval", str(path))
    assert "must be 18 or more" in line(classify, "onnx", out, "--opset", "11")
    assert "a graph is fp32" in line(classify, "onnx", out, "--dtype", "fp16")
    assert "holds a model for classify" in line(classify, "hf", out, "--task", "tag")
    assert "vectors need --task embed" in line(masked, "hf", out, "--pooling", "cls")
    int8 = ("--quantize", "int8", "--eval", str(path))
    assert "label 'unheard' is none of training's" in line(classify, "onnx", out, *int8)
    assert "name it with --question-column" in line(
        served.saved(models, "answer"), "onnx", out, *int8
    )
    more = (*int8, "--tags-column", "label")
    assert "tags_column: " in line(classify, "onnx", out, *more)
    assert (full / "kept.txt").read_text() == "kept"


def test_other_architectures_are_one_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = Path(family(models, "Electra", "ForPreTraining"))
    assert "ElectraForPreTraining cannot be exported with its head" in refused(
        capsys, str(where), "onnx", tmp_path / "out"
    )
    other = tmp_path / "other"
    transformers.GPT2Config(n_embd=8, n_head=1, n_layer=1).save_pretrained(other)
    assert "gpt2 cannot be exported: it must be one of bert, " in refused(
        capsys, str(other), "hf", tmp_path / "out"
    )


def test_weights_that_fp16_cannot_hold_are_named(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformers.BertModel.from_pretrained(served.saved(models, "embed"))
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[1] = 1e6
    model.save_pretrained(tmp_path / "model")
    name = "tokenizer.json"
    (tmp_path / "model" / name).write_bytes(
        (Path(served.saved(models, "embed")) / name).read_bytes()
    )
    line = refused(capsys, str(tmp_path / "model"), "hf", tmp_path / "out", "--dtype", "fp16")
    assert "encoder.layer.0.output.dense.bias is not finite as fp16" in line
    export(str(tmp_path / "model"), "hf", tmp_path / "out", "--dtype", "bf16")


@pytest.mark.parametrize("module", ["onnx", "onnxscript", "onnxruntime"])
def test_what_is_not_installed_is_asked_for(
    module: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fastbert.finetune import needs

    def without(name: str) -> Any:
        if name == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(needs, "import_module", without)
    line = refused(capsys, served.saved(models, "tag"), "onnx", tmp_path / "out")
    assert f'{module} is not installed: pip install "fastbert-engine[export]"' in line
