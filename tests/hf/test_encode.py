"""fastbert.encode: the vectors of sentence-transformers, of any number of texts, in their order."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

import fastbert
from fastbert.errors import UserError
from fastbert.hf import encode as encode_module

WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *("the", "cat", "sat", "on", "mat", "dog", "ran", "far"),
]
TEXTS = ["the cat", "", "dog ran far [PAD] the mat", "the dog sat on the mat", "far " * 80, "cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_bert: Callable[..., Path]) -> str:
    return str(save_bert(tmp_path_factory.mktemp("model"), WORDS, 64))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_as_sentence_transformers(folder: str, pooling: str, normalize: bool) -> None:
    st = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    words = modules.Transformer(folder)
    stack = [words, modules.Pooling(words.get_word_embedding_dimension(), pooling_mode=pooling)]
    stack += [modules.Normalize()] if normalize else []
    theirs = st.SentenceTransformer(modules=stack, device="cpu").encode(TEXTS)
    ours = fastbert.encode(TEXTS, folder, pooling=pooling, normalize=normalize)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_outputs_that_a_configuration_asks_for_are_not_made(folder: str) -> None:
    asking = BertModel.from_pretrained(folder, output_attentions=True, output_hidden_states=True)
    tokenizer = BertTokenizer.from_pretrained(folder)
    np.testing.assert_array_equal(
        fastbert.encode(TEXTS, asking, tokenizer), fastbert.encode(TEXTS, folder)
    )


def test_threads_share_a_model(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BertModel.from_pretrained(folder).train()
    tokenizer = BertTokenizer.from_pretrained(folder)
    want = fastbert.encode(TEXTS, folder)
    calls = encode_module._Encode._vectors
    monkeypatch.setattr(  # each waits for the others
        encode_module._Encode, "_vectors", lambda *args: (time.sleep(0.002), calls(*args))[1]
    )
    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(fastbert.encode, TEXTS, model, tokenizer) for _ in range(40)]
        for task in tasks:
            np.testing.assert_allclose(task.result(), want, atol=1e-6)
    assert type(model) is BertModel
    assert all(module.training for module in model.modules())


def by_transformers(folder: str, text: str, pooling: str) -> np.ndarray:
    tokenizer = BertTokenizer.from_pretrained(folder)
    inputs = tokenizer([text], truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        states = BertModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0]
    return (states.mean(0) if pooling == "mean" else states[0]).numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("tokens_per_batch", [1, 20, 10_000])
def test_batches_of_any_size_in_the_order_given(
    folder: str, pooling: str, tokens_per_batch: int
) -> None:
    ours = fastbert.encode(TEXTS, folder, pooling=pooling, tokens_per_batch=tokens_per_batch)
    theirs = [by_transformers(folder, text, pooling) for text in TEXTS]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("family", ["Roberta", "Electra", "DistilBert"])
def test_relatives(folder: str, family: str) -> None:
    kind = getattr(transformers, f"{family}Config")
    sizes = BertConfig.from_pretrained(folder).to_dict()
    names = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers")
    torch.manual_seed(0)
    # RoBERTa's padding is 1, the id of unknown words here: it counts positions past them.
    model = getattr(transformers, f"{family}Model")(
        kind(**{name: sizes[name] for name in names}, max_position_embeddings=66)
    ).eval()
    tokenizer = BertTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "the unknown dog sat"]
    for pooling in ("mean", "cls"):
        ours = fastbert.encode(texts, model, tokenizer, pooling=pooling, max_length=64)
        for vector, text in zip(ours, texts, strict=True):
            inputs = tokenizer([text], truncation=True, max_length=64, return_tensors="pt")
            del inputs["token_type_ids"]
            with torch.no_grad():
                states = model(**inputs).last_hidden_state[0]
            theirs = states.mean(0) if pooling == "mean" else states[0]
            np.testing.assert_allclose(vector, theirs, atol=1e-5)


def test_an_iterator_is_read_a_window_at_a_time(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "WINDOW", 4)
    read: list[str] = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    found = fastbert.encode(texts(), folder)
    assert not isinstance(found, np.ndarray)
    first = next(found)
    assert len(first) == len(read) == 4
    np.testing.assert_array_equal(
        np.concatenate([first, *found]), fastbert.encode(np.array(TEXTS), folder)
    )


def test_no_texts(folder: str) -> None:
    assert fastbert.encode([], folder).shape == (0, 32)
    assert list(fastbert.encode(iter([]), folder)) == []


def test_what_is_cut_is_counted(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    exact = "cat " * 8
    with caplog.at_level(logging.WARNING, "fastbert"):
        fastbert.encode([exact, exact + "cat", "cat"], folder, max_length=10)
    assert caplog.messages[-1] == "1 of 3 texts were cut to 10 tokens"


def test_a_model_is_left_as_it_was(folder: str) -> None:
    model = BertForMaskedLM.from_pretrained(folder).train()
    model.cls.eval()
    kinds = [type(module) for module in model.modules()]
    training = [module.training for module in model.modules()]
    tokenizer = BertTokenizer.from_pretrained(folder)
    found = fastbert.encode(TEXTS, model, tokenizer)
    np.testing.assert_array_equal(found, fastbert.encode(TEXTS, folder))
    low = fastbert.encode(TEXTS, model, tokenizer, dtype="bf16")
    assert low.dtype == np.float32
    assert 0 < np.abs(low - found).max() < 0.1
    assert kinds == [type(module) for module in model.modules()]
    assert training == [module.training for module in model.modules()]
    assert model.dtype == torch.float32
    ours = fastbert.accelerate(model)
    fastbert.encode(TEXTS, ours, tokenizer)
    assert isinstance(ours, fastbert.BertForMaskedLM)


def test_what_is_refused(folder: str, tmp_path) -> None:
    with pytest.raises(TypeError, match=r"texts\[1\] is no string: int"):
        fastbert.encode(["a", 1], folder)
    with pytest.raises(TypeError, match="one string: give a list"):
        fastbert.encode("a", folder)
    with pytest.raises(ValueError, match='"mean" or "cls"'):
        fastbert.encode(["a"], folder, pooling="max")
    with pytest.raises(ValueError, match="dtype = 'int8': must be one of fp32"):
        fastbert.encode(["a"], folder, dtype="int8")
    with pytest.raises(ValueError, match="max_length = 2: must be at least 3"):
        fastbert.encode(["a"], folder, max_length=2)
    with pytest.raises(ValueError, match="tokens_per_batch = 0"):
        fastbert.encode(["a"], folder, tokens_per_batch=0)
    with pytest.raises(ValueError, match="a model that is no folder needs one"):
        fastbert.encode(["a"], BertModel.from_pretrained(folder))
    with pytest.raises(UserError, match="no model to load"):
        fastbert.encode(["a"], tmp_path)
    model = BertModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no tokenizer"):
        fastbert.encode(["a"], tmp_path)
    state = model.state_dict()
    del state["encoder.layer.1.output.dense.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lacks 1 weights, encoder\.layer\.1\.output\.dense"):
        fastbert.encode(["a"], tmp_path)
