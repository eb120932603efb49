"""A signal ends a service in three steps: not ready, not listening, all answered."""

import http.client
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .served import saved

ROOT = Path(__file__).parents[2]


@contextmanager
def process(model: str, *settings: str) -> Iterator[tuple[Any, tuple[str, int]]]:
    """`fastbert serve` and its address."""
    path = os.pathsep.join(str(ROOT / one) for one in (".", "kernels", "benchmarks"))
    command = [sys.executable, "-m", "fastbert", "serve", "--model", model, "--port", "0"]
    running = subprocess.Popen(
        [*command, *settings],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stdout is not None
        assert select.select([running.stdout], [], [], 60)[0], "it has not begun to listen"
        line = running.stdout.readline()
        host, port = re.search(r"http://([\d.]+):(\d+)", line).groups()  # type: ignore[union-attr]
        yield running, (host, int(port))
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate()


def ask(address: tuple[str, int], path: str, content: Any = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*address, timeout=30)
    try:
        body = None if content is None else json.dumps(content)
        kind = {"content-type": "application/json"} if body else {}
        connection.request("POST" if body else "GET", path, body, kind)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


class Client(threading.Thread):
    """Asks over one kept connection, and over a new one each time that the service closes it."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__()
        self.address, self.answered, self.lost = address, 0, 0
        self.start()

    def run(self) -> None:
        """Until nobody listens any more."""
        while True:
            connection = http.client.HTTPConnection(*self.address, timeout=30)
            try:
                connection.connect()
            except ConnectionRefusedError:
                return
            try:
                self.use(connection)
            except (ConnectionError, http.client.HTTPException):
                self.lost += 1
            finally:
                connection.close()

    def use(self, connection: http.client.HTTPConnection) -> None:
        while True:
            body = json.dumps({"inputs": ["the cat sat on a mat"] * 20})
            connection.request("POST", "/predict", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            content = json.loads(answer.read())
            assert answer.status == 200 and len(content["predictions"]) == 20
            self.answered += 1
            if answer.getheader("connection") == "close":
                return


def test_sigterm_under_load_loses_no_request(tmp_path: Path) -> None:
    model = saved(tmp_path, "classify", layers=4)
    with process(model, "--shutdown-delay", "1", "--no-access-log") as (running, address):
        clients = [Client(address) for _ in range(16)]
        time.sleep(1.0)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert ask(address, "/ready")[0] == 503
        assert ask(address, "/health")[0] == 200
        for client in clients:
            client.join(30)
            assert not client.is_alive()
        assert running.wait(30) == 0
        assert sum(client.answered for client in clients) > 50
        assert sum(client.lost for client in clients) == 0
        assert "Traceback" not in running.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_without_requests_it_ends_at_once(tmp_path: Path, number: int) -> None:
    model = saved(tmp_path, "masked")
    with process(model, "--shutdown-delay", "0") as (running, address):
        assert ask(address, "/fill-mask", {"inputs": "a [MASK]"})[0] == 200
        began = time.monotonic()
        running.send_signal(number)
        assert running.wait(20) == 0
        assert time.monotonic() - began < 5
        assert "Traceback" not in running.stderr.read()


def test_a_second_signal_ends_the_wait(tmp_path: Path) -> None:
    with process(saved(tmp_path, "masked"), "--shutdown-delay", "60") as (running, address):
        running.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert ask(address, "/fill-mask", {"inputs": "a [MASK]"})[0] == 200
        assert ask(address, "/ready")[0] == 503
        began = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 0
        assert time.monotonic() - began < 5
