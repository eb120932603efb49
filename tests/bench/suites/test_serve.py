"""`fastbert bench serve`: processes that serve, clients that ask, and what is told of both."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.cli import main
from fastbert.errors import RunError
from fastbert_bench.measure import load
from fastbert_bench.measure import result as results
from fastbert_bench.measure.load import Load, ask_once, post, run_clients
from fastbert_bench.suites import serve, services


@contextmanager
def answering(*answers: bytes) -> Iterator[tuple[str, int]]:
    """Whoever connects gets these, one a request, over and over; b"" closes the connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    place = 0
    lock = threading.Lock()

    def serve_one(connection: socket.socket) -> None:
        nonlocal place
        with connection, suppress(ConnectionError):  # a client that ends has read no more
            while connection.recv(65536):
                with lock:
                    answer = answers[place % len(answers)]
                    place += 1
                if not answer:
                    return
                connection.sendall(answer)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def answer(status: int, body: bytes = b"{}") -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def test_clients_count_answers_and_refusals() -> None:
    with answering(answer(200), answer(200), answer(429)) as address:
        found = run_clients(address, [post("/x", b"{}")], 3, 0.3)
    assert len(found.latencies) > 10
    assert abs(found.refused - len(found.latencies) / 2) <= 3
    assert 0 < found.in_time <= len(found.latencies)
    assert found.rate == found.in_time / 0.3


@pytest.mark.parametrize(
    ("given", "message"), [(answer(500), "status 500"), (b"", "has closed a connection")]
)
def test_clients_end_with_an_error(given: bytes, message: str) -> None:
    with answering(given) as address:
        with pytest.raises(RunError, match=message):
            run_clients(address, [post("/x", b"{}")], 2, 0.3)
        with pytest.raises(RunError, match=message):
            ask_once(address, post("/x", b"{}"))


def test_one_answer_is_read_as_json() -> None:
    with answering(answer(200, b'{"a": [1]}')) as address:
        assert ask_once(address, post("/x", b"{}")) == {"a": [1]}


@pytest.mark.slow
def test_every_service_is_a_row_for_each_number_of_clients(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "SERVICES", ("fastbert", "hf-padded"))
    sizes = {
        "model_type": "bert", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    out = tmp_path / "serve.json"
    options = {"model": tmp_path, "name": "small", "clients": "1,4", "rounds": 2, "seconds": 0.2}
    given = [f"--{name}={value}" for name, value in options.items()]
    assert main(["bench", "serve", *given, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    results.check(result)
    assert result["settings"]["model"] == "small" and str(tmp_path) not in out.read_text()
    names = ["fastbert", "hf-padded"]
    assert [(row["clients"], row["contender"]) for row in result["rows"]] == [
        *((1, name) for name in [*names, "transformers"]),
        *((4, name) for name in names),
    ]
    for row in result["rows"]:
        assert row["name"] in printed
        assert 0 < row["latency_ms_p50"] <= row["latency_ms_p99"]
        assert len(row["rates_of_rounds"]) == 2
        assert row["sequences_per_second"] == pytest.approx(np.median(row["rates_of_rounds"]))
        assert (row["ratio"] == 1.0) == (row["contender"] == "fastbert")
    assert main(["bench", "report", str(out), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "Service under load" in page and "hf-padded" in page


def test_contenders_that_answer_otherwise_are_not_compared() -> None:
    def one(name: str, value: float) -> serve.Contender:
        return serve.Contender(name, (1,), lambda clients: None, lambda text: value)  # type: ignore[arg-type, return-value]

    ours = one("fastbert", 0.5)
    gaps = serve.check_same([ours, one("fastbert-bf16", 0.501), one("hf-padded", 0.50001)], ["a"])
    assert gaps == pytest.approx({"fastbert-bf16": 0.001, "hf-padded": 0.00001})
    for other in (one("hf-padded", 0.501), one("fastbert-bf16", 0.6), one("x", float("nan"))):
        with pytest.raises(RunError, match="not comparable"):
            serve.check_same([ours, other], ["a"])


def test_ratios_are_taken_round_by_round() -> None:
    def loads(*rates: int) -> list[Load]:
        return [Load(1.0, np.full(rate, 0.01), rate, 0) for rate in rates]

    ours = serve.Contender("fastbert", (8,), None, None, {8: loads(100, 200, 300)})  # type: ignore[arg-type]
    theirs = serve.Contender("hf-padded", (8,), None, None, {8: loads(50, 50, 100)})  # type: ignore[arg-type]
    rows = serve.summary([ours, theirs], 10.0)
    assert [row["ratio"] for row in rows] == [1.0, 3.0]
    assert [row["sequences_per_second"] for row in rows] == [200.0, 50.0]
    assert rows[0]["real_tokens_per_second"] == 2000.0
    assert rows[0]["latency_ms_p50"] == pytest.approx(10.0)


def test_a_service_that_does_not_begin_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match="the service fastbert has not begun to listen"),
        services.service("fastbert", str(tmp_path / "none")),
    ):
        pass


def test_lengths_are_natural() -> None:
    rng = np.random.default_rng(0)
    short, even = (serve.text_lengths(kind, 512, rng) for kind in ("short", "even"))
    for lengths in (short, even):
        assert lengths.min() == 5 and lengths.max() >= 250 and lengths.max() <= 256
    assert 28 <= np.median(short) <= 36 and 110 <= np.median(even) <= 150
    assert serve.text_lengths("short", 40, rng).max() == 40
    assert load.post("/x", b"ab").endswith(b"content-length: 2\r\n\r\nab")
