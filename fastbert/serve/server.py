"""The process: uvicorn around a service, that ends without losing what it has let in."""

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastbert.errors import RunError
from fastbert.serve.app import Service
from fastbert.serve.config import ServeConfig
from fastbert.serve.gate import JsonLines
from fastbert.train.interrupts import SIGNALS

_MOST_HEAD = 65_536  # bytes of a request's first line and headers
_HEAD_SECONDS = 10.0  # in which they must come
_IGNORED = 2**26  # bytes of a body that was refused, which are still read: else the client, which
# is writing, would see a broken connection rather than the answer


class _Protocol(HttpToolsProtocol):
    """HTTP/1.1 whose heads are bounded in size and time."""

    _timer: asyncio.TimerHandle | None = None
    _head = 0
    _ignored = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._timer is not None:
            self._head += len(data)
            if self._head > _MOST_HEAD + len(data):
                self._close(b"431 Request Header Fields Too Large")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._ignored = 0
        self._wait_for_head()

    def on_headers_complete(self) -> None:
        self._has_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self._ignored += len(body)
            if self._ignored > _IGNORED:
                self.transport.close()
        super().on_body(body)

    def _wait_for_head(self) -> None:
        if self._timer is None:
            self._head = 0
            self._timer = self.loop.call_later(_HEAD_SECONDS, self._close, b"408 Request Timeout")

    def _has_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self, status: bytes) -> None:
        self._has_head()
        if not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, which a signal ends in three steps: not ready, not listening, all answered.

    A second signal ends the first step at once, a third one everything.
    """

    def __init__(self, service: Service, config: ServeConfig) -> None:
        super().__init__(
            uvicorn.Config(
                service,
                host=config.host,
                port=config.port,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(config.timeout) + 5,
            )
        )
        self.service, self.delay = service, config.shutdown_delay
        self._stop_at: float | None = None
        self.address = "", 0
        """Where it listens, once it does."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end."""
        if self.should_exit:
            self.force_exit = True
        elif self._stop_at is not None:
            self.should_exit = True
        else:
            self.service.draining = True
            self._stop_at = time.monotonic() + (self.delay if sig == signal.SIGTERM else 0.0)

    async def on_tick(self, counter: int) -> bool:
        """Tells ten times a second whether to stop listening."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals, and raises none of them again: to have ended so is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        handled = [number for number, old in before.items() if old is not signal.SIG_IGN]
        for number in handled:
            signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number in handled:
                signal.signal(number, before[number])

    def _log_started_message(self, listeners: Any) -> None:
        host, port = listeners[0].getsockname()[:2]
        self.address = host, port
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        served = self.service.served
        works = ", ".join(served.works)
        print(f"{served.name} ({works}) at {where}: Ctrl-C ends it", flush=True)


def serve(service: Service, config: ServeConfig) -> None:
    """Serves until a signal.

    Raises:
        RunError: the address cannot be had.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("fastbert.serve", "uvicorn.error"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO if name.startswith("fastbert") else logging.WARNING)
    try:
        Server(service, config).run()
    except SystemExit:  # uvicorn has logged why
        raise RunError(f"cannot listen at {config.host}:{config.port}") from None
    finally:
        service.close()
