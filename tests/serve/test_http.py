"""What clients of HTTP may send, and fail to do: one connection at a time, byte by byte."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fastbert.serve.config import ServeConfig
from fastbert.serve.schemas import Requests

from .served import Running, saved, serving

BODY = b'{"inputs": "the cat sat"}'
HEAD = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n\r\n" % len(BODY)


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(saved(tmp_path_factory.mktemp("models"), "embed")) as running:
        yield running


def talk(running: Running, *parts: bytes, answers: int = 1) -> tuple[list[bytes], bool]:
    """Sends parts one by one; heads of the answers, and whether the connection was closed then."""
    with socket.create_connection(running.address, timeout=20) as client:
        for part in parts:
            with suppress(ConnectionError):  # it may have been closed before all was sent
                client.sendall(part)
            time.sleep(0.02)
        client.settimeout(5)
        found, closed = b"", False
        with suppress(ConnectionError):
            while found.count(b"HTTP/1.1 ") < answers or not found.endswith(b"}"):
                piece = client.recv(65536)
                closed = not piece
                if closed:
                    break
                found += piece
            client.settimeout(0.2)
            with suppress(TimeoutError):
                closed = not client.recv(100)
        return [part.split(b"\r\n\r\n")[0] for part in found.split(b"HTTP/1.1 ")[1:]], closed


UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


@pytest.mark.parametrize(
    "parts",
    [
        [HEAD + UPGRADE + LENGTH + BODY + HEAD + LENGTH + BODY],
        [HEAD + UPGRADE + LENGTH, BODY, HEAD + LENGTH + BODY],
        [HEAD[:9], HEAD[9:] + UPGRADE[:50], UPGRADE[50:] + LENGTH + BODY[:3], BODY[3:] + HEAD,
         LENGTH + BODY],
    ],
)  # fmt: skip
def test_http_2_that_is_offered_is_ignored(embed: Running, parts: Sequence[bytes]) -> None:
    heads, closed = talk(embed, *parts, answers=2)
    assert [head[:3] for head in heads] == [b"200", b"200"]
    assert not closed


def test_a_tunnel_is_none_of_ours(embed: Running) -> None:
    heads, closed = talk(embed, b"CONNECT a:443 HTTP/1.1\r\nhost: a\r\n\r\n")
    assert heads[0].startswith(b"400 ") and closed


def test_trailers_are_no_headers(embed: Running) -> None:
    chunked = HEAD + b"x-request-id: mine\r\ntransfer-encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    ((head,), closed) = talk(embed, chunked + b"x-request-id: other\r\n\r\n")
    assert b"x-request-id: mine" in head and not closed
    heads, closed = talk(embed, chunked, *[b"x: " + b"y" * 30_000 + b"\r\n"] * 9)
    assert closed and (not heads or heads[0].startswith(b"431 "))


@pytest.mark.parametrize("hosts", [b"", b"host: a\r\nhost: b\r\n"])
def test_a_request_names_one_host(embed: Running, hosts: bytes) -> None:
    ((head,), _) = talk(embed, b"GET /health HTTP/1.1\r\n" + hosts + b"\r\n")
    assert head.startswith(b"400 ")


def test_head_is_a_get_without_its_body(embed: Running) -> None:
    for path, status in ((b"/health", b"200"), (b"/embed", b"405")):
        with socket.create_connection(embed.address, timeout=20) as client:
            client.sendall(b"HEAD %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % path)
            found = b"".join(iter(lambda: client.recv(65536), b""))
        assert found.startswith(b"HTTP/1.1 " + status) and b"content-length: " in found
        assert found.endswith(b"\r\n\r\n")


def test_a_path_with_one_slash_more_is_another(embed: Running) -> None:
    status, _, headers = embed.ask("/embed/", {"inputs": "a"})
    assert status == 404 and "location" not in headers


def test_what_is_no_http_is_told_so_after_what_was(embed: Running) -> None:
    heads, closed = talk(embed, HEAD + LENGTH + BODY + b"GARBAGE\r\n\r\n")
    assert [head[:3] for head in heads] == [b"200"] and closed
    heads, closed = talk(embed, b"\x16\x03\x01\x02\x00")
    assert heads[0].startswith(b"400 ") and b"application/json" in heads[0] and closed


def test_lines_between_requests_keep_no_connection(
    embed: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbert.serve.server._HEAD_SECONDS", 0.3)
    heads, closed = talk(embed, HEAD + LENGTH + BODY, b"\r\n", answers=2)
    assert [head[:3] for head in heads] == [b"200", b"408"] and closed


def test_a_client_that_does_not_read_its_answer_is_left(
    embed: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbert.serve.server._STALLED_SECONDS", 0.3)
    body = json.dumps({"inputs": ["a"] * 512}).encode()
    request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    connections = embed.server.server_state.connections
    clients = []
    for _ in range(2):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(embed.address)
        clients.append(client)
    stalled, slow = clients
    with stalled, slow:
        while len(connections) < 2:
            time.sleep(0.01)
        for one in [*connections]:  # so that the system's own buffers do not take the whole answer
            one.transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, 8192
            )
        stalled.sendall(request * 9)  # the second answer waits until the first one was read
        slow.sendall(request)
        read = b""
        while not read.endswith(b"}"):
            read += slow.recv(8192)
            time.sleep(0.01)
        assert len(read) > 150_000 and read.startswith(b"HTTP/1.1 200 ")
        limit = time.monotonic() + 10
        while len(connections) > 1 and time.monotonic() < limit:
            time.sleep(0.02)
        assert len(connections) == 1
        assert embed.service.in_flight == 0


@pytest.mark.parametrize("kept", [False, True])
def test_what_was_sent_before_the_end_is_answered(tmp_path: Path, kept: bool) -> None:
    with (
        serving(saved(tmp_path, "embed")) as running,
        socket.create_connection(running.address, timeout=20) as old,
        socket.socket() as new,
    ):
        old.sendall(HEAD + LENGTH + BODY)
        assert old.recv(65536).startswith(b"HTTP/1.1 200 ")
        (connection,) = running.server.server_state.connections
        client = old if kept else new

        async def end() -> None:  # nothing is accepted or read amid it, as while answers are made
            if not kept:
                new.settimeout(20)
                new.connect(running.address)
            client.sendall(HEAD + LENGTH + BODY)
            await running.server.shutdown()

        ending = asyncio.run_coroutine_threadsafe(end(), connection.loop)
        ending.result(20)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_the_errors_of_a_body_are_few(embed: Running) -> None:
    requests = Requests(embed.service.served, ServeConfig(model="m"))
    for inputs in ([""] * 200_000, [[""]] * 150_000, [[]] * 200_000):
        with pytest.raises(ValidationError) as refused:
            requests.openai_embed.model_validate({"model": "m", "input": inputs})
        assert refused.value.error_count() < 10  # one for each took 2.4 s
        assert embed.wrong("/v1/embeddings", {"model": "m", "input": inputs})
    more: dict[str, Any] = {f"k{number}": 1 for number in range(80_000)}
    assert "has 80001 fields" in embed.wrong("/embed", {"inputs": "a"} | more)
    assert len(embed.wrong("/embed", {"inputs": "a", "k" * 500_000: 1})) < 100
