"""The process: uvicorn around a service, that ends without losing what it has let in."""

import asyncio
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import httptools
import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from fastbert.errors import RunError
from fastbert.serve.app import Service
from fastbert.serve.config import ServeConfig
from fastbert.serve.gate import JsonLines, problem
from fastbert.train.interrupts import SIGNALS

_MOST_HEAD = 65_536  # bytes of a request's first line and headers, or of trailers
_HEAD_SECONDS = 10.0  # in which they must come
_IGNORED = 2**26  # bytes of a body that was refused, which are still read: else the client, which
# is writing, would see a broken connection rather than the answer
_STALLED_SECONDS = 20.0  # in which a client must have read something of its answer
_LINGER_SECONDS = 0.25  # for which, at the end, what was sent on idle connections is still read


class _Protocol(HttpToolsProtocol):
    """HTTP/1.1 whose clients cannot hold memory by what they send, or fail to read, for ever."""

    _timer: asyncio.TimerHandle | None = None  # runs while a head is awaited
    _reader: asyncio.TimerHandle | None = None  # runs while an answer is being read
    _is_whole = False  # whether the request at hand has come to its end
    _is_deaf = False  # whether what comes is dropped, as the connection ends
    _apart = 0  # bytes since the last ones of a body: a head, chunk sizes, trailers
    _ignored = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_head()
        if self._reader is not None:
            self._reader.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._apart += len(data)
        if self._apart > _MOST_HEAD + len(data):
            self._close(431, "headers are too large")
            return
        if self._is_whole:
            self._wait_for_head()
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as error:
            self.data_received(self._without_upgrade() + data[error.args[0] :])
        except httptools.HttpParserError:
            self._close(400, "this is no request of HTTP/1.1")

    def _without_upgrade(self) -> bytes:
        # Java's client asks for HTTP/2 with each request: RFC 9110 lets us ignore that, but the
        # parser then takes the body for the other protocol. So it reads the head once more.
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % one for one in self.headers if one[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        return b"\r\n".join([*lines, b"", b""])

    def _is_upgrade(self) -> bool:
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._ignored = self._apart = 0
        self._is_whole = False
        self._wait_for_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._timer is not None:  # else a trailer, which is not to be taken for a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if not self._is_upgrade():
            self._has_head()
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._apart = 0
        if self.cycle.response_complete:
            self._ignored += len(body)
            if self._ignored > _IGNORED:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_upgrade():
            self._apart = 0
            self._is_whole = True
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._reader is None:
            self._wait_for_reader()

    def shutdown(self) -> None:
        """Ends the connection once what was sent before is answered."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(_LINGER_SECONDS, super().shutdown)
        else:
            super().shutdown()

    def _wait_for_head(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(
                _HEAD_SECONDS, self._close, 408, f"no headers within {_HEAD_SECONDS:g} s"
            )

    def _has_head(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait_for_reader(self, before: float = math.inf) -> None:
        left = self.transport.get_write_buffer_size()
        self._reader = None
        if left >= before:
            self.transport.abort()
        elif left:
            self._reader = self.loop.call_later(_STALLED_SECONDS, self._wait_for_reader, left)

    def _close(self, status: int, message: str) -> None:
        self._has_head()
        self._is_deaf = True
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            cycle.keep_alive = False  # the request before this one is answered first
        elif not self.transport.is_closing():
            content = orjson.dumps(problem(status, message))
            lines = [STATUS_LINE[status] + b"content-type: application/json", b"connection: close"]
            lines += [b"content-length: %d" % len(content), b"", content]
            self.transport.write(b"\r\n".join(lines))
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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops listening, and answers what was sent before."""
        waiting = []
        for server in self.servers:
            for listener in server.sockets:
                # Whom the kernel has let in, and closing would reset.
                with socket.socket(fileno=os.dup(listener.fileno())) as twin:
                    twin.setblocking(False)
                    with suppress(OSError):
                        while True:
                            waiting.append(twin.accept()[0])
            server.close()
        for connection in waiting:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        await super().shutdown(sockets)

    def _protocol(self) -> _Protocol:
        return _Protocol(self.config, self.server_state, self.lifespan.state)

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
    for name in ("fastbert.serve", "uvicorn.error", "asyncio"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO if name.startswith("fastbert") else logging.WARNING)
    try:
        Server(service, config).run()
    except (SystemExit, UnicodeError):  # uvicorn has logged why; or it is no name of a host
        raise RunError(f"cannot listen at {config.host}:{config.port}") from None
    finally:
        service.close()
