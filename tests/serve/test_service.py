"""What a service answers: what the same model says offline, or a clear refusal."""

import base64
import json
import logging
import random
import shutil
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastbert
from fastbert.errors import RunError
from fastbert.hf.fill_mask import MaskFiller
from fastbert.serve.config import ServeConfig
from fastbert.serve.gate import JsonLines
from fastbert.serve.models import load
from fastbert.serve.work import FillMask, Predict

from . import served
from .served import Running, saved, serving


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def classify(root: Path) -> Any:
    with serving(saved(root, "classify")) as running:
        yield running


@pytest.fixture(scope="module")
def masked(root: Path) -> Any:
    with serving(saved(root, "masked")) as running:
        yield running


def texts(count: int, longest: int = 80, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(served.WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Makes every batch take so much longer."""
    compute = Predict.compute

    def slowly(self: Predict, sequences: Any) -> Any:
        time.sleep(seconds)
        return compute(self, sequences)

    monkeypatch.setattr(Predict, "compute", slowly)


def close(found: Any, wanted: Any) -> bool:
    """Equal but for rounding, which depends on what is computed together."""
    if isinstance(wanted, float):
        return abs(found - wanted) < 2e-5
    if isinstance(wanted, dict):
        same = found.keys() == wanted.keys()
        return same and all(close(found[name], wanted[name]) for name in wanted)
    if isinstance(wanted, list):
        same = len(found) == len(wanted)
        return same and all(close(a, b) for a, b in zip(found, wanted, strict=True))
    return bool(found == wanted)


INPUTS: dict[str, list[Any]] = {
    "classify": [*texts(20), *({"text": text, "text_pair": served.TEXT} for text in texts(9))],
    "several": texts(20),
    "score": texts(20),
    "tag": [*texts(20, 200), {"tokens": ["Ada", "sat", "in", "London", "."]}, {"text": "Ada!"}],
    "answer": [
        {"question": "who wrote", "context": text} for text in texts(20, 200) if text.strip()
    ],
    "choose": [
        {"question": "who wrote", "choices": texts(2 + n % 3, 20, n)} for n in range(10)
    ] + [{"question": "who", "context": served.TEXT, "choices": texts(3)}],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(INPUTS))
def test_predictions_are_those_of_the_pipeline(root: Path, kind: str) -> None:
    pipe = fastbert.pipeline(None, saved(root, kind))
    with serving(saved(root, kind), max_batch_tokens=100) as running:
        assert running.ask("/info")[1]["task"] == pipe.task.name
        for one in INPUTS[kind]:
            given = dict(one) if isinstance(one, dict) else one
            words = isinstance(one, dict) and "tokens" in one
            found = running.right("/predict", {"inputs": given})
            wanted = pipe(tuple(one["tokens"]) if words else one)
            assert close(found["predictions"], [wanted]), one
        # All at once, of whichever kinds they are.
        found = running.right("/predict", {"inputs": INPUTS[kind]})
        for one, given in zip(INPUTS[kind], found["predictions"], strict=True):
            words = isinstance(one, dict) and "tokens" in one
            assert close(given, pipe(tuple(one["tokens"]) if words else one))


def test_masks_are_filled_as_by_the_command(root: Path, masked: Running) -> None:
    fill = MaskFiller(saved(root, "masked"))
    asked = ["the [MASK] sat", "[MASK] wrote to [MASK] in London", "a [MASK]"]
    found = masked.right("/fill-mask", {"inputs": asked, "top_k": 3})["predictions"]
    wanted = iter(fill(asked, 3))
    for text, one in zip(asked, found, strict=True):
        assert len(one["masks"]) == text.count("[MASK]")
        for guesses in one["masks"]:
            given = [(g["token_str"], g["token"], g["score"]) for g in guesses]
            for (a, b, c), (x, y, z) in zip(given, next(wanted).guesses, strict=True):
                assert (a, b) == (x, y) and abs(c - z) < 1e-5
    alone = masked.right("/fill-mask", {"inputs": asked[0]})["predictions"]
    assert [len(guesses) for guesses in alone[0]["masks"]] == [5]


@pytest.mark.parametrize("kind", ["embed", "classify", "masked", "pretrained", "tag"])
def test_vectors_are_those_of_encode(root: Path, kind: str) -> None:
    asked = texts(30)
    wanted = fastbert.encode(asked, saved(root, kind), max_length=64)
    assert isinstance(wanted, np.ndarray)
    with serving(saved(root, kind)) as running:
        found = running.right("/embed", {"inputs": asked})
        assert np.abs(np.array(found["embeddings"]) - wanted).max() < 1e-5
        units = running.right("/embed", {"inputs": asked[0], "normalize": True})["embeddings"]
        assert np.abs(units[0] - wanted[0] / np.linalg.norm(wanted[0])).max() < 1e-5


def test_openai_clients_get_what_they_expect(root: Path) -> None:
    with serving(saved(root, "embed"), served_model_name="tiny") as running:
        vectors = np.array(running.right("/embed", {"inputs": texts(3)})["embeddings"])
        request = {"input": texts(3), "model": "tiny"}
        found = running.right("/v1/embeddings", request)
        assert (found["object"], found["model"]) == ("list", "tiny")
        assert [one["index"] for one in found["data"]] == [0, 1, 2]
        assert np.abs(np.array([one["embedding"] for one in found["data"]]) - vectors).max() < 1e-6
        assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 6
        coded = running.right("/v1/embeddings", request | {"encoding_format": "base64"})
        bytes_ = base64.b64decode(coded["data"][2]["embedding"])
        assert np.abs(np.frombuffer(bytes_, "<f4") - vectors[2]).max() < 1e-6
        assert "no model of that name" in running.wrong(
            "/v1/embeddings", request | {"model": "other"}, 404
        )
        (model,) = running.ask("/v1/models")[1]["data"]
        assert (model["id"], model["object"]) == ("tiny", "model")


def test_a_model_is_called_as_its_folder_or_its_run(root: Path, tmp_path: Path) -> None:
    for given, name in (
        (saved(root, "embed"), "embed-64-2"),
        (str(shutil.copytree(saved(root, "embed"), tmp_path / "other" / "hf")), "other"),
    ):
        assert load(ServeConfig(model=given)).name == name


def test_lists_of_tokens_are_texts_too(root: Path) -> None:
    with serving(saved(root, "embed"), served_model_name="tiny") as running:
        tokenizer = running.service.served.works["embed"].pipe.task.tokenizer  # type: ignore[attr-defined]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts(4, 20)]
        ask = {"model": "tiny"}
        of_text = running.right("/v1/embeddings", ask | {"input": texts(4, 20)})
        of_tokens = running.right("/v1/embeddings", ask | {"input": ids})
        alone = running.right("/v1/embeddings", ask | {"input": ids[1]})
        vectors, same, one = (
            np.array([item["embedding"] for item in found["data"]])
            for found in (of_text, of_tokens, alone)
        )
        assert np.abs(vectors - same).max() < 1e-6
        assert np.abs(vectors[1] - one[0]).max() < 1e-6
        assert of_text["usage"] == of_tokens["usage"]
        size = len(tokenizer)
        assert f"input[1][0]: input should be less than {size}" in running.wrong(
            "/v1/embeddings", ask | {"input": [[1], [size]]}
        )


def test_texts_and_tokens_share_a_batch(root: Path) -> None:
    works = load(ServeConfig(model=saved(root, "embed"))).works
    texts_, tokens = (works["embed"].prepare(one, {}).sequences for one in (["a cat"], [[7, 8, 9]]))
    alone = [works["embed"].compute(one)[0] for one in (texts_, tokens)]
    for both, wanted in (([*texts_, *tokens], alone), ([*tokens, *texts_], alone[::-1])):
        found = works["embed"].compute(both)
        assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(found, wanted, strict=True))


def test_two_thousand_requests_of_many_clients_are_answered_as_offline(root: Path) -> None:
    pipe = fastbert.pipeline(None, saved(root, "classify"))
    asked = texts(2000, 60)
    wanted = pipe(asked)
    with serving(saved(root, "classify"), max_batch_tokens=512) as running:

        def one(text: str) -> Any:
            return running.right("/predict", {"inputs": text})["predictions"][0]

        with ThreadPoolExecutor(64) as clients:
            found = list(clients.map(one, asked))
    for a, b in zip(found, wanted, strict=True):
        assert close(a, b)


def test_texts_that_are_too_long_are_cut_and_counted_or_refused(root: Path) -> None:
    long = " ".join(["cat"] * 100)
    with serving(saved(root, "classify")) as running:
        found = running.right("/predict", {"inputs": ["cat", long, long]})
        assert (found["truncated"], found["tokens"]) == (2, 3 + 64 + 64)
    with serving(saved(root, "classify"), truncate=False) as running:
        message = running.wrong("/predict", {"inputs": ["cat", long]})
        assert message.startswith("inputs[1]: has more than 64 tokens")
        message = running.wrong("/embed", {"inputs": long})
        assert message.startswith("inputs[0]: has more than 64 tokens")
        assert running.right("/predict", {"inputs": "cat"})["truncated"] == 0


def test_a_text_that_is_read_in_windows_is_read_as_far_as_allowed(root: Path) -> None:
    long = " ".join(["ada in london"] * 100)
    with serving(saved(root, "tag"), max_text_tokens=200) as running:
        found = running.right("/predict", {"inputs": [long, "ada"]})
        assert found["truncated"] == 1
        assert found["tokens"] <= 200 + 3
    with serving(saved(root, "tag"), max_text_tokens=200, truncate=False) as running:
        assert "inputs[1]: has more than 200 tokens" in running.wrong(
            "/predict", {"inputs": ["ada", long]}
        )


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 422, "body: field required"),
        (b"{", 400, "no JSON"),
        (b'{"inputs": "a"', 400, "no JSON"),
        (b'{"inputs": "\xff"}', 400, "no JSON"),
        (b'{"inputs": "a\x00b"}', 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"\x1f\x8b\x08\x00", 400, "no JSON"),
        (b'{"inputs": "\\ud800"}', 422, "inputs"),
        (b'{"inputs": ["a", "\\udc00 b"]}', 422, "inputs[1]"),
        (b'{"inputs": "a\\u0000b"}', 422, "inputs: holds a NUL character"),
        (b'{"inputs": ""}', 422, "inputs: is empty"),
        (b'{"inputs": ["a", " \\n\\u3000"]}', 422, "inputs[1]: is empty"),
        (b'{"inputs": []}', 422, "inputs: list should have at least 1 item"),
        (b'{"inputs": 3}', 422, "inputs: input should be"),
        (b'{"inputs": null}', 422, "inputs: input should be"),
        (b'{"inputs": true}', 422, "inputs: input should be"),
        (b'{"inputs": [["a"]]}', 422, "inputs[0]: input should be"),
        (b'{"inputs": [{"text": 1}]}', 422, "inputs[0].text: input should be"),
        (b'{"inputs": [{"text_pair": "a"}]}', 422, "inputs[0].text: field required"),
        (b'{"inputs": "a", "more": 1}', 422, "more: extra inputs are not permitted"),
        (b'{"inputs": "a", "top_k": 0}', 422, "top_k"),
        (b'{"inputs": "a", "top_k": 1.5}', 422, "top_k"),
        (b'{"inputs": "a", "top_k": "3"}', 422, "top_k"),
        (b'{"inputs": "a", "top_k": true}', 422, "top_k"),
        (b'{"inputs": "a", "top_k": 1e400}', 422, "top_k"),
        (b"{}", 422, "inputs: field required"),
        (b"null", 422, "body"),
        (b"3", 422, "body"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(
    classify: Running, body: bytes, status: int, message: str
) -> None:
    found = classify.wrong("/predict", body, status)
    assert message in found
    assert "\n" not in found and len(found) < 300
    assert classify.right("/predict", {"inputs": "a cat"})


def test_an_integer_may_be_written_with_a_point(classify: Running) -> None:
    (found,) = classify.right("/predict", {"inputs": "a", "top_k": 2.0})["predictions"]
    assert len(found["probabilities"]) == 2


def test_an_error_names_the_field(classify: Running) -> None:
    _, found, _ = classify.ask("/predict", {"inputs": ["a", 3]})
    message = found["error"].pop("message")
    assert message.startswith("inputs[1]: ")
    assert found["error"] == {"type": "invalid_request", "param": "inputs[1]", "code": None}


def test_guesses_of_a_request_are_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    with serving(saved(root, "masked")) as running:
        fill = running.service.served.works["fill-mask"].fill  # type: ignore[attr-defined]
        most = len(fill.tokenizer)
        found = running.wrong("/fill-mask", {"inputs": ["[MASK]" * 40] * 30, "top_k": most})
        assert f"inputs: {40 * 30 * most:,} guesses" in found
        words = fill.words
        monkeypatch.setattr(fill, "words", lambda one: decoded.append(len(one[0])) or words(one))
        inputs = {"inputs": ["a [MASK]"] * 100}
        with ThreadPoolExecutor(2) as pool:  # only what was asked for, whatever shares its batch
            list(pool.map(lambda k: running.right("/fill-mask", inputs | {"top_k": k}), [1, 50]))
        assert sorted({*decoded}) == [1, 50]


def test_a_trace_in_the_log_holds_no_message() -> None:
    try:
        raise ValueError("Lovelace")
    except ValueError:
        record = logging.LogRecord("x", 40, "", 0, "failed", (), sys.exc_info())
    line = JsonLines().format(record)
    assert "Lovelace" not in line
    told = json.loads(line)
    assert told["error"] == "ValueError" and __file__ in told["trace"][-1]


def test_too_many_texts_or_bytes_are_refused(classify: Running) -> None:
    assert "at most 2048 items" in classify.wrong("/predict", {"inputs": ["a"] * 10_000})
    assert "1,048,576 bytes" in classify.wrong("/predict", {"inputs": "a" * 10_000_000}, 413)
    assert classify.right("/predict", {"inputs": ["a"] * 2048})["tokens"] == 3 * 2048


def test_a_body_without_a_length_is_counted_as_it_comes(classify: Running) -> None:
    with socket.create_connection(classify.address, timeout=20) as sender:
        sender.sendall(
            b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        part = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        for _ in range(40):
            sender.sendall(part)
        sender.sendall(b"0\r\n\r\n")
        assert sender.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-encoding": "gzip"}, 415),
        ({"content-encoding": "br, gzip"}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-encoding": "identity"}, 200),
    ],
)
def test_a_body_is_json_and_not_compressed(
    classify: Running, headers: dict[str, str], status: int
) -> None:
    body = json.dumps({"inputs": "a"}).encode()
    assert classify.ask("/predict", body, headers=headers)[0] == status


def test_paths_and_methods_that_are_not_there(classify: Running) -> None:
    assert classify.ask("/nothing")[0] == 404
    assert classify.ask("/fill-mask", {"inputs": "a [MASK]"})[0] == 404  # it has no such head
    status, found, headers = classify.ask("/predict")
    assert (status, headers["allow"]) == (405, "POST")
    assert found["error"]["type"] == "method_not_allowed"


def test_a_client_that_has_gone_is_forgotten(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, 0.05)
    with serving(saved(root, "classify"), max_batch_tokens=64) as running:
        body = json.dumps({"inputs": texts(500, 50)}).encode()
        head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with socket.create_connection(running.address) as client:
            client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            while running.service.batcher.inputs < 500:
                time.sleep(0.005)
        began = time.perf_counter()
        while running.service.in_flight:
            assert time.perf_counter() - began < 5
            time.sleep(0.005)
        assert running.service.batcher.inputs == running.service.batcher.tokens == 0
        with socket.create_connection(running.address) as client:  # amid its body
            client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body[:100])
        assert running.right("/predict", {"inputs": "a"})
        page = running.ask("/metrics")[1]
        assert 'fastbert_requests_total{endpoint="/predict",status="499"} 2.0' in page


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_allowed(root: Path) -> None:
    with serving(saved(root, "classify"), timeout=0.3) as running:
        for part in (b"", b'{"inp'):
            with socket.create_connection(running.address, timeout=20) as client:
                client.sendall(
                    b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    b"content-length: 100\r\n\r\n" + part
                )
                began = time.perf_counter()
                assert client.recv(100).startswith(b"HTTP/1.1 408 ")
                assert time.perf_counter() - began < 3


def test_a_request_that_takes_too_long_is_told_so(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch, 0.4)
    with serving(saved(root, "classify"), timeout=0.2) as running:
        assert "too long" in running.wrong("/predict", {"inputs": "a"}, 504)
        monkeypatch.undo()
        time.sleep(0.4)
        assert running.right("/predict", {"inputs": "a"})


def test_only_the_guilty_request_of_a_batch_fails(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Predict.compute

    def broken(self: Predict, sequences: Any) -> Any:
        time.sleep(0.01)
        if any(len(one.inputs[0]["input_ids"]) == 13 for one in sequences):
            raise RunError("the model's output is not finite")
        return compute(self, sequences)

    monkeypatch.setattr(Predict, "compute", broken)
    with serving(saved(root, "classify")) as running, ThreadPoolExecutor(24) as clients:
        asked = [" ".join(["cat"] * (1 + n % 24)) for n in range(120)]
        answers = list(clients.map(lambda text: running.ask("/predict", {"inputs": text}), asked))
        for text, (status, found, _) in zip(asked, answers, strict=True):
            if len(text.split()) == 11:
                assert status == 500
                assert found["error"]["message"] == "the model's output is not finite"
            else:
                assert status == 200


@torch.no_grad()
def test_outputs_that_are_not_finite_are_no_answer(root: Path, tmp_path: Path) -> None:
    for kind, path, text in (("classify", "/predict", "a"), ("masked", "/fill-mask", "[MASK] a")):
        with serving(saved(root, kind)) as running:
            work: Any = running.service.served.works[path[1:]]
            model = work.fill.model if isinstance(work, FillMask) else work.pipe.model
            next(p for n, p in model.named_parameters() if n.endswith("0.output.dense.weight"))[
                0, 0
            ] = float("nan")
            assert "not finite" in running.wrong(path, {"inputs": text}, 500)


def test_a_full_queue_says_when_to_come_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(monkeypatch, 0.2)
    settings = {"max_queue": 8, "max_texts": 8, "max_batch_tokens": 8}
    with serving(saved(root, "classify"), **settings) as running, ThreadPoolExecutor(30) as clients:
        answers = list(clients.map(lambda _: running.ask("/predict", {"inputs": "a"}), range(30)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 8
        for status, found, headers in answers:
            if status == 429:
                assert int(headers["retry-after"]) >= 1
                assert found["error"]["type"] == "too_many_requests"
        assert running.right("/predict", {"inputs": "a"})


def test_too_many_requests_at_once_are_refused_unread(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(saved(root, "classify"), max_requests=2) as running:
        head = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        waiting = [socket.create_connection(running.address) for _ in range(2)]
        for client in waiting:
            client.sendall(head + b"content-length: 100\r\n\r\n")
        while running.service.in_flight < 2:
            time.sleep(0.005)
        status, _, headers = running.ask("/predict", {"inputs": "a"})
        assert (status, headers["retry-after"]) == (429, "1")
        assert running.ask("/health")[0] == running.ask("/ready")[0] == 200
        for client in waiting:
            client.close()


def test_a_token_is_asked_for_where_there_is_one(root: Path) -> None:
    tokens = ["correct-horse-battery", "another-one-of-those"]
    with serving(saved(root, "classify"), tokens) as running:
        body = {"inputs": "a"}
        for wrong in ("", "Bearer", "Bearer wrong", f"Basic {tokens[0]}", tokens[0]):
            headers = {"authorization": wrong} if wrong else {}
            status, found, given = running.ask("/predict", body, headers=headers)
            assert (status, given["www-authenticate"]) == (401, "Bearer")
            assert "token" in found["error"]["message"]
        for right in (*(f"Bearer {token}" for token in tokens), f"bearer  {tokens[0]}"):
            assert running.ask("/predict", body, headers={"authorization": right})[0] == 200
        assert [running.ask(path)[0] for path in ("/health", "/ready", "/")] == [200] * 3
        for path in ("/metrics", "/openapi.json", "/info", "/v1/models", "/nothing"):
            assert running.ask(path)[0] == 401
        status, document, _ = running.ask(
            "/openapi.json", headers={"authorization": f"Bearer {tokens[1]}"}
        )
        assert document["security"] == [{"token": []}]


def test_metrics_tell_what_was_done(root: Path) -> None:
    with serving(saved(root, "classify")) as running:
        running.right("/predict", {"inputs": ["a", "cat", " ".join(["cat"] * 100)]})
        running.wrong("/predict", {"inputs": 1})
        _, page, headers = running.ask("/metrics")
        assert headers["content-type"].startswith("text/plain")
        for line in (
            'fastbert_requests_total{endpoint="/predict",status="200"} 1.0',
            'fastbert_requests_total{endpoint="/predict",status="422"} 1.0',
            'fastbert_texts_total{work="predict"} 3.0',
            "fastbert_texts_truncated_total 1.0",
            'fastbert_tokens_total{work="predict"} 70.0',
            "fastbert_queue_texts 0.0",
            "fastbert_queue_tokens 0.0",
            "fastbert_requests_in_flight 1.0",
            "fastbert_batch_tokens_sum 70.0",
            'fastbert_request_seconds_count{endpoint="/predict"} 2.0',
        ):
            assert f"{line}\n" in page, line


def test_a_log_line_tells_of_a_request_but_not_its_texts(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("INFO", "fastbert.serve"),
        serving(saved(root, "classify"), access_log=True) as running,
    ):
        secret = "lovelace engines"
        _, _, headers = running.ask(
            "/predict", {"inputs": secret}, headers={"x-request-id": "abc-1"}
        )
        assert headers["x-request-id"] == "abc-1"
        running.ask("/predict", b'{"inputs": "lovelace')
        running.ask("/lovelace")
        _, _, headers = running.ask("/info", headers={"x-request-id": "lovelace\t<b>"})
        assert headers["x-request-id"] != "lovelace\t<b>"
    told: list[dict[str, Any]] = [vars(record).get("told", {}) for record in caplog.records]
    assert "lovelace" not in json.dumps(told)
    assert told[0] | {"ms": 0, "queue_ms": 0, "compute_ms": 0} == {
        "request": "abc-1", "client": "127.0.0.1", "method": "POST", "path": "/predict",
        "status": 200, "ms": 0, "work": "predict", "texts": 1, "tokens": told[0]["tokens"],
        "truncated": 0, "queue_ms": 0, "compute_ms": 0,
    }  # fmt: skip
    assert [one["status"] for one in told[1:]] == [400, 404, 200]


def test_a_slow_or_endless_head_ends_its_connection(
    classify: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbert.serve.server._HEAD_SECONDS", 0.2)
    for begin in (b"", b"POST /pre", b"GET / HTTP/1.1\r\nhost: x\r\n"):
        with socket.create_connection(classify.address, timeout=20) as client:
            client.sendall(begin)
            assert client.recv(1000).startswith(b"HTTP/1.1 408 ")
            assert client.recv(1000) == b""
    monkeypatch.setattr("fastbert.serve.server._HEAD_SECONDS", 20.0)
    with socket.create_connection(classify.address, timeout=20) as client:
        answer = b""
        with suppress(ConnectionError):  # it may close before all is sent
            client.sendall(b"GET / HTTP/1.1\r\n" + b"x: " + b"a" * 10**8)
        with suppress(ConnectionError):
            answer = client.recv(100)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
    assert classify.right("/predict", {"inputs": "a"})
