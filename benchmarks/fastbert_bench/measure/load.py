"""Clients that ask a service over HTTP, each its next question once it has its answer.

As light as can be, because they run on the cores that the service needs: requests are bytes that
were made before, and of an answer only status and length are looked at.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from fastbert.errors import RunError


@dataclass(frozen=True)
class Load:
    """What clients have met.

    Attributes:
        seconds: for which they asked.
        latencies: (n,) seconds of each answer, in the order in which they came.
        in_time: answers that came while they asked; the others came after.
        refused: answers with status 429.
    """

    seconds: float
    latencies: np.ndarray
    in_time: int
    refused: int

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.in_time / self.seconds


def post(path: str, body: bytes, host: str = "localhost") -> bytes:
    """A request as it is sent."""
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def run_clients(
    address: tuple[str, int], requests: Sequence[bytes], clients: int, seconds: float
) -> Load:
    """Asks for some time.

    Args:
        address: host and port.
        requests: see `post`; each client takes the next one, and the first follows the last.
        clients: that ask at once.
        seconds: after which no question is asked any more; answers are waited for.

    Raises:
        RunError: the service closes a connection, or answers with another error than 429.
    """
    return asyncio.run(_run(address, requests, clients, seconds))


async def _run(
    address: tuple[str, int], requests: Sequence[bytes], clients: int, seconds: float
) -> Load:
    places, latencies = count(), list[float]()
    in_time = refused = 0
    began = time.perf_counter()
    until = began + seconds

    def next_request() -> Iterator[bytes]:
        while time.perf_counter() < until:
            yield requests[next(places) % len(requests)]

    async def client() -> None:
        nonlocal in_time, refused
        reader, writer = await asyncio.open_connection(*address)
        try:
            for request in next_request():
                asked = time.perf_counter()
                writer.write(request)
                status, _ = await _answer(reader)
                if status == 200:
                    latencies.append(time.perf_counter() - asked)
                    in_time += time.perf_counter() < until
                elif status == 429:
                    refused += 1
                else:
                    raise RunError(f"{address[0]}:{address[1]}: answered with status {status}")
        finally:
            writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return Load(seconds, np.array(latencies), in_time, refused)


def ask_once(address: tuple[str, int], request: bytes) -> Any:
    """The JSON of one answer.

    Raises:
        RunError: it is an error.
    """

    async def ask() -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(request)
            return await _answer(reader)
        finally:
            writer.close()

    status, body = asyncio.run(ask())
    if status != 200:
        raise RunError(f"{address[0]}:{address[1]}: answered with status {status}: {body[:200]!r}")
    return json.loads(body)


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of an answer."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        raise RunError("the service has closed a connection") from None
    lines = head.lower().split(b"\r\n")
    length = next(line[15:] for line in lines if line.startswith(b"content-length:"))
    return int(head[9:12]), await reader.readexactly(int(length))
