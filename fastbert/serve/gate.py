"""What stands before every request: who may ask, how much, how long; and one line of log for it.

An ASGI application around another one, which gets a whole body or none.
"""

import asyncio
import hmac
import json
import logging
import os
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import Response

from fastbert.errors import FastbertError
from fastbert.serve.config import ServeConfig
from fastbert.serve.metrics import Metrics

logger = logging.getLogger("fastbert.serve")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ALWAYS = ("/health", "/ready", "/")
"""Answered without a token and however many requests there are: they compute nothing."""
GONE = 499
"""As nginx logs a client that has not waited."""
_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)


class GoneError(FastbertError):
    """The client has closed its connection."""


class RefusedError(FastbertError):
    """A request that is answered without looking at what it asks.

    Attributes:
        status: of HTTP.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass
class Call:
    """One request on its way, as its log line tells it.

    Attributes:
        id: given by the client, or drawn.
        deadline: on the clock of `time.perf_counter`.
        on_gone: is called when the client has closed its connection.
        told: what the line holds beside the usual.
    """

    id: str
    deadline: float
    on_gone: Callable[[], None] | None = None
    gone: bool = False
    told: dict[str, Any] = field(default_factory=dict)


class Gate:
    """Lets through what may be answered.

    Args:
        app: what answers; finds its `Call` as scope["fastbert"].
        config: its limits.
        metrics: are told of each request.
        tokens: one of which a request must bear; none: it need not.
        endpoints: paths that metrics name, and their methods; others are one.
    """

    def __init__(
        self,
        app: Any,
        config: ServeConfig,
        metrics: Metrics,
        tokens: Sequence[str],
        endpoints: Mapping[str, Collection[str]],
    ) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.tokens = [token.encode() for token in tokens]
        self.endpoints = endpoints
        self.in_flight = 0
        self.draining = False
        """Whether the service is shutting down: connections are not kept."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        name = asked if _ID.fullmatch(asked) else os.urandom(8).hex()
        call = Call(name, began + self.config.timeout)
        # A HEAD is a GET of which uvicorn, whose scope stays as it is, sends no body.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "fastbert": call, "method": method}
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", name.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    *([(b"connection", b"close")] if self.draining else ()),
                ]
            await send(message)

        self.in_flight += 1
        try:
            body = await self._let_in(scope, headers, receive, call)
            await self._answer(scope, receive, answer, body, call)
        except GoneError:
            status = GONE
        except RefusedError as error:
            await refusal(error.status, str(error), error.headers)(scope, receive, answer)
        except Exception as error:  # a mistake of ours, which the application has answered
            _note(error, call)
        finally:
            self.in_flight -= 1
            self._tell(scope, GONE if call.gone else status, time.perf_counter() - began, call)

    async def _let_in(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, call: Call
    ) -> bytes:
        path, method = scope["path"], scope["method"]
        hosts = sum(name == b"host" for name, _ in scope["headers"])
        if hosts > 1 or (not hosts and scope["http_version"] == "1.1"):
            raise RefusedError(400, f"has {hosts} headers named host, not one")
        if path not in ALWAYS:
            if self.in_flight > self.config.max_requests:
                raise RefusedError(429, f"{self.in_flight} requests at once", retry_after="1")
            self._check_token(headers.get(b"authorization", b""))
        if method != "POST" or method not in self.endpoints.get(path, ()):
            return b""
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise RefusedError(415, "a body must not be compressed", accept_encoding="identity")
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise RefusedError(415, "a body must be application/json")
        return await self._read(headers, receive, call)

    def _check_token(self, header: bytes) -> None:
        if not self.tokens:
            return
        scheme, _, given = header.partition(b" ")
        # Each of them, and each in constant time.
        found = [hmac.compare_digest(given.strip(), token) for token in self.tokens]
        if scheme.lower() != b"bearer" or not any(found):
            raise RefusedError(401, "a bearer token is needed", www_authenticate="Bearer")

    async def _read(self, headers: dict[bytes, bytes], receive: Receive, call: Call) -> bytes:
        most = self.config.max_body_kb * 1024
        too_large = RefusedError(413, f"a body must not have more than {most:,} bytes")
        told = headers.get(b"content-length", b"")
        if told.isdigit() and int(told[:20]) > most:
            raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(call.deadline - time.perf_counter()):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        call.gone = True
                        raise GoneError("before its body was whole")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise RefusedError(
                408, f"the body did not come within {self.config.timeout:g} s", connection="close"
            ) from None
        return b"".join(parts)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, body: bytes, call: Call
    ) -> None:
        whole = [{"type": "http.request", "body": body, "more_body": False}]

        async def read() -> Message:
            return whole.pop() if whole else await receive()

        def look(watch: "asyncio.Task[Message]") -> None:
            if not watch.cancelled() and watch.exception() is None and status_open:
                call.gone = True
                if call.on_gone is not None:
                    call.on_gone()

        status_open = True
        watch = None
        if body:
            watch = asyncio.ensure_future(receive())  # nothing but the end can come
            watch.add_done_callback(look)
        try:
            await self.app(scope, read, send)
        finally:
            status_open = False
            if watch is not None:
                watch.cancel()

    def _tell(self, scope: Scope, status: int, seconds: float, call: Call) -> None:
        path = scope["path"]
        endpoint = path if path in self.endpoints else "other"
        self.metrics.requests.labels(endpoint, str(status)).inc()
        self.metrics.seconds.labels(endpoint).observe(seconds)
        if self.config.access_log and path not in ALWAYS:
            client = scope.get("client")
            line = {
                "request": call.id,
                "client": client[0] if client else None,
                "method": scope["method"],
                "path": endpoint,
                "status": status,
                "ms": round(1e3 * seconds, 2),
                **call.told,
            }
            logger.info("request", extra={"told": line})


def _note(error: Exception, call: Call) -> None:
    logger.error("failed", extra={"told": {"request": call.id, **_outline(error)}})


def _outline(error: BaseException) -> dict[str, Any]:
    """Tells where, and nothing that might be a text, as a message might."""
    frames = [f"{one.filename}:{one.lineno}" for one in traceback.extract_tb(error.__traceback__)]
    return {"error": type(error).__name__, "trace": frames[-8:]}


_KINDS = {
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    415: "unsupported_media_type",
    429: "too_many_requests",
    503: "unavailable",
    504: "timeout",
}


def problem(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """The body of an answer that is none; clients of OpenAI's API look for `param` and `code`."""
    kind = _KINDS.get(status, "invalid_request" if status < 500 else "internal_error")
    return {"error": {"type": kind, "message": message, "param": field, "code": None}}


def refusal(
    status: int, message: str, headers: Mapping[str, str] | None = None, field: str | None = None
) -> Response:
    """An answer that is none, see `problem`."""
    content = orjson.dumps(problem(status, message, field))
    return Response(content, status, headers, media_type="application/json")


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns time, level, event and what the record was told."""
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}"
            f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "told", {}),
        }
        if record.exc_info and record.exc_info[1]:
            line |= _outline(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False)
