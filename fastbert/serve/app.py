"""The HTTP service: endpoints of what a model can be asked for, and its OpenAPI document."""

import asyncio
import base64
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException

from fastbert import __version__
from fastbert.errors import FastbertError, UserError
from fastbert.serve import schemas
from fastbert.serve.batcher import Answered, Batcher, ClosedError, QueueFullError
from fastbert.serve.config import ServeConfig
from fastbert.serve.gate import GONE, Call, Gate, GoneError, RefusedError, refusal
from fastbert.serve.metrics import Metrics
from fastbert.serve.models import Served
from fastbert.serve.page import page
from fastbert.serve.schemas import Requests, listed

logger = logging.getLogger("fastbert.serve")

_LONGEST_NAME = 64  # of a field that a message repeats
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Refusal, "description": what}
    for status, what in {
        400: "The body is no JSON",
        401: "A bearer token is needed",
        404: "No such model",
        408: "The body did not come in time",
        413: "The body is too large",
        415: "The body is compressed, or no JSON",
        422: "The body is JSON, but no request: the message says why",
        429: "Too many requests: wait as Retry-After says",
        500: "It failed, and no other request with it",
        503: "Shutting down",
        504: "It took too long",
    }.items()
}


class Service(Gate):
    """An ASGI application that answers for a model.

    Args:
        served: what it can be asked for.
        config: its settings.
        tokens: bearer tokens, one of which a request must bear; none: it need not.

    Attributes:
        batcher: what computes; to be closed at the end.
        metrics: what Prometheus is told.
    """

    def __init__(self, served: Served, config: ServeConfig, tokens: Sequence[str] = ()) -> None:
        metrics = Metrics()
        self.served = served
        self.batcher = Batcher(
            served.batch_tokens,
            max_wait=config.max_wait_ms / 1e3,
            max_queue=config.max_queue,
            observer=metrics,
            device=served.device,
        )
        api = _Api(served, config, self.batcher, metrics, self, bool(tokens))
        super().__init__(api.app, config, metrics, tokens, api.paths)
        metrics.watch(self.batcher, lambda: self.in_flight)

    def close(self) -> None:
        """Ends its threads, once what was asked is answered."""
        self.batcher.close()


class _Api:
    """The endpoints."""

    def __init__(
        self,
        served: Served,
        config: ServeConfig,
        batcher: Batcher,
        metrics: Metrics,
        gate: Gate,
        needs_token: bool,
    ) -> None:
        self.served, self.config, self.batcher, self.metrics = served, config, batcher, metrics
        self.gate, self.needs_token = gate, needs_token
        self.began = int(time.time())
        self.app = FastAPI(
            title=f"fastbert: {served.name}",
            version=__version__,
            docs_url=None,  # their scripts are another host's
            redoc_url=None,
            redirect_slashes=False,  # to whatever host a request names
            responses={401: _REFUSALS[401], 429: _REFUSALS[429]},
        )
        requests = Requests(served, config)
        if "predict" in served.works:
            self._add_predict(requests)
        if "fill-mask" in served.works:
            self._add_fill_mask(requests)
        if "embed" in served.works:
            self._add_embed(requests)
        self._add_others()
        for kind, handler in (
            (RequestValidationError, _invalid),
            (HTTPException, _of_http),
            (FastbertError, _of_ours),
            (TimeoutError, _too_late),
            (Exception, _unexpected),
        ):
            self.app.add_exception_handler(kind, handler)  # type: ignore[arg-type]
        routes: Any = self.app.routes
        self.paths = {route.path: route.methods for route in routes}
        if needs_token:
            document = self.app.openapi()  # kept, and given from now on
            parts = document.setdefault("components", {})
            parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"token": []}]

    async def ask(
        self, request: Request, work: str, inputs: Sequence[Any], options: Mapping[str, Any]
    ) -> Answered:
        """What the model says.

        Raises:
            FastbertError: what reading the inputs raises, no room, or nobody who waits.
            TimeoutError: it took too long.
        """
        call: Call = request.scope["fastbert"]
        call.told |= {"work": work, "texts": len(inputs)}
        job = self.batcher.submit(self.served.works[work], inputs, options)

        def give_up(error: Exception) -> None:
            self.batcher.cancel(job)
            if not job.future.done():
                job.future.set_exception(error)

        call.on_gone = lambda: give_up(GoneError("the client has gone"))
        late = job.loop.call_later(call.deadline - time.perf_counter(), give_up, TimeoutError())
        try:
            found = await job.future
        except asyncio.CancelledError:
            self.batcher.cancel(job)
            raise
        finally:
            late.cancel()
            call.on_gone = None
        self.metrics.texts.labels(work).inc(len(inputs))
        self.metrics.truncated.inc(found.truncated)
        self.metrics.queue_seconds.observe(found.waited)
        call.told |= {
            "tokens": found.tokens,
            "truncated": found.truncated,
            "queue_ms": round(1e3 * found.waited, 2),
            "compute_ms": round(1e3 * found.computed, 2),
        }
        return found

    def _add_predict(self, requests: Requests) -> None:
        @self._post("/predict", requests.predictions, f"What the model ({self.served.task}) says")
        async def predict(body: requests.predict, request: Request) -> Response:  # type: ignore[name-defined]
            options = {"top_k": getattr(body, "top_k", None)}
            found = await self.ask(request, "predict", listed(body.inputs), options)
            return _answer({"predictions": found.answers, **_usage(found)})

    def _add_fill_mask(self, requests: Requests) -> None:
        @self._post("/fill-mask", schemas.Fillings, "What the model would say for each mask")
        async def fill_mask(body: requests.fill_mask, request: Request) -> Response:  # type: ignore[name-defined]
            found = await self.ask(request, "fill-mask", listed(body.inputs), {"top_k": body.top_k})
            return _answer({"predictions": found.answers, **_usage(found)})

    def _add_embed(self, requests: Requests) -> None:
        @self._post("/embed", schemas.Embeddings, "A vector for each text")
        async def embed(body: requests.embed, request: Request) -> Response:  # type: ignore[name-defined]
            options = {"normalize": body.normalize}
            found = await self.ask(request, "embed", listed(body.inputs), options)
            return _answer({"embeddings": found.answers, **_usage(found)})

        @self._post("/v1/embeddings", schemas.OpenAIEmbeddings, "The same as OpenAI's API has it")
        async def openai_embed(body: requests.openai_embed, request: Request) -> Response:  # type: ignore[name-defined]
            if body.model != self.served.name:
                raise RefusedError(404, f"no model of that name: this is {self.served.name}")
            inputs = listed(body.input)
            if isinstance(inputs[0], int):  # tokens of one text
                inputs = [inputs]
            found = await self.ask(request, "embed", inputs, {})
            as_text = body.encoding_format == "base64"
            data = [
                {
                    "object": "embedding",
                    "index": place,
                    "embedding": _base64(vector) if as_text else vector,
                }
                for place, vector in enumerate(found.answers)
            ]
            usage = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
            model = self.served.name
            return _answer({"object": "list", "data": data, "model": model, "usage": usage})

        @self.app.get("/v1/models", response_model=schemas.OpenAIModels)
        async def models() -> Response:
            """The one model, as OpenAI's API lists it."""
            one = {"id": self.served.name, "object": "model", "created": self.began}
            return _answer({"object": "list", "data": [one | {"owned_by": "fastbert"}]})

    def _post(self, path: str, answer: Any, summary: str) -> Any:
        refusals = {status: what for status, what in _REFUSALS.items() if status != 404}
        if path.startswith("/v1/"):
            refusals = _REFUSALS
        return self.app.post(path, response_model=answer, summary=summary, responses=refusals)

    def _add_others(self) -> None:
        served, config = self.served, self.config

        @self.app.get("/info", response_model=schemas.Info)
        async def info() -> Response:
            """What is served, and its limits."""
            names = ("task", "labels", "mask_token", "max_seq_length", "hidden_size", "dtype")
            limits = ("max_texts", "max_body_kb", "truncate")
            return _answer(
                {
                    "model": served.name,
                    "version": __version__,
                    "endpoints": sorted(f"/{name}" for name in served.works),
                    **{name: getattr(served, name) for name in names},
                    "device": str(served.device),
                    "max_batch_tokens": self.batcher.batch_tokens,
                    **{name: getattr(config, name) for name in limits},
                }
            )

        @self.app.get("/health", responses={503: _REFUSALS[503]})
        async def health() -> Response:
            """Whether the process works: if not, it should be started anew."""
            if self.batcher.broken:
                raise RefusedError(503, "the batcher broke down")
            return _answer({"status": "ok"})

        @self.app.get("/ready", responses={503: _REFUSALS[503]})
        async def ready() -> Response:
            """Whether new requests should come here."""
            if self.gate.draining or self.batcher.broken:
                raise RefusedError(503, "shutting down", retry_after="5")
            return _answer({"status": "ready"})

        @self.app.get("/metrics", response_class=PlainTextResponse)
        async def metrics() -> Response:
            """Counters and histograms for Prometheus."""
            return Response(self.metrics.page(), media_type="text/plain; version=0.0.4")

        @self.app.get("/", include_in_schema=False)
        async def root() -> Response:
            return page(served, self.needs_token)


def _answer(content: Any) -> Response:
    return Response(
        orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
    )


def _usage(found: Answered) -> dict[str, int]:
    return {"tokens": found.tokens, "truncated": found.truncated}


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


# Errors


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    """Says where and what, and repeats nothing of what was sent."""
    errors = error.errors()
    if any(one["type"] == "json_invalid" for one in errors):
        place = errors[0]["loc"][-1]
        return refusal(400, f"the body is no JSON: character {place}")
    # Of the kinds that an input may be, the one of which most was right.
    nearest = max(errors, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    where = _where(nearest["loc"])
    return refusal(422, f"{where}: {_what(nearest)}", field=where)


def _where(loc: Sequence[Any]) -> str:
    """Returns "inputs[3].text" for a path that holds names of the kinds tried as well."""
    fields = [one for one in loc[1:] if isinstance(one, int) or _is_field(one)]
    text = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in fields)
    return text.removeprefix(".") or "body"


def _is_field(name: str) -> bool:
    is_name = name.isidentifier() and name.islower() and len(name) <= _LONGEST_NAME
    return is_name and name not in ("str", "int", "bool")


def _what(error: Mapping[str, Any]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


async def _of_http(request: Request, error: HTTPException) -> Response:
    message = str(error.detail)
    if error.status_code == 400:  # FastAPI: bytes that are no text, or too deep
        message = "the body is no JSON"
    return refusal(error.status_code, message, error.headers)


async def _of_ours(request: Request, error: FastbertError) -> Response:
    if isinstance(error, RefusedError):
        return refusal(error.status, str(error), error.headers)
    if isinstance(error, GoneError):
        return Response(status_code=GONE)
    if isinstance(error, QueueFullError):
        return refusal(429, str(error), {"retry-after": str(error.retry_after)})
    if isinstance(error, ClosedError):
        return refusal(503, str(error), {"retry-after": "5", "connection": "close"})
    if isinstance(error, UserError):
        return refusal(422, str(error))
    logger.error("failed", extra={"told": {"error": str(error)}})
    return refusal(500, str(error))


async def _too_late(request: Request, error: TimeoutError) -> Response:
    return refusal(504, "it took too long: the service is busy, or the request too large")


async def _unexpected(request: Request, error: Exception) -> Response:
    """A mistake of ours, which the gate puts into the log."""
    return refusal(500, f"failed: {type(error).__name__}")
