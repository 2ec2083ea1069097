"""The HTTP API, OpenAI-compatible, and the chat page."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, select_autoescape
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from coterie.answer import Answer, Answerer
from coterie.engine.engine import Engine
from coterie.engine.request import Piece, TokenChoice
from coterie.errors import Busy, CoterieError
from coterie.experts.library import RESERVED
from coterie.web.schema import ChatRequest, CompletionRequest

HERE = Path(__file__).parent
LARGEST_BODY = 8 << 20  # bytes
ANSWER_TOKENS = 1024  # of a chat answer whose request does not say
Start = Callable[[Callable[[Piece], None]], Answer]


def create_app(answerer: Answerer) -> FastAPI:
    """The application over one business."""
    app = FastAPI(title="Coterie", docs_url=None, redoc_url=None)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    pages = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=select_autoescape())
    registry = CollectorRegistry()
    registry.register(_EngineMetrics(answerer.engine))
    business, started = answerer.business, int(time.time())
    _handle_errors(app)

    @app.middleware("http")
    async def guard(request: Request, following: Callable[[Request], Awaitable[Response]]) -> Response:
        if int(request.headers.get("content-length") or 0) > LARGEST_BODY:
            return _error(413, f"the body is larger than {LARGEST_BODY >> 20} MiB", "request_too_large")
        response = await following(request)
        response.headers["Content-Security-Policy"] = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'"
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        library = business.library
        experts = [library.facts(name) for name in library.names()]
        return pages.get_template("chat.html").render(
            business=business.config.business, base=answerer.engine.base.name, experts=experts
        )

    @app.get("/healthz")
    def healthz() -> JSONResponse:
        running, waiting = answerer.engine.load_numbers()
        alive = answerer.engine.alive
        body = {"status": "ok" if alive else "the engine has stopped", "running": running, "waiting": waiting}
        return JSONResponse(body, 200 if alive else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model("base"), _model("auto"), *map(_model, business.library.names())]}

    @app.get("/v1/models/{name}")
    def model(name: str) -> dict[str, Any]:
        if name not in RESERVED:
            business.library.folder(name)
        return _model(name)

    def _model(name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": started, "owned_by": "coterie"}
        if name in RESERVED:
            return {**about, "root": business.config.business.base}
        facts = business.library.facts(name)
        return {**about, "parent": "base", "version": facts.version, "kind": facts.kind,
                "description": facts.description}  # fmt: skip

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        messages = [m.plain() for m in body.messages]
        sampling = body.settings(ANSWER_TOKENS)
        return await _reply(
            request, body, lambda to: answerer.chat(body.model, messages, sampling, to, _channel(request)), _ChatShape()
        )

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        sampling = body.settings(ANSWER_TOKENS)
        return await _reply(
            request, body, lambda to: answerer.complete(body.model, body.prompt, sampling, to, _channel(request)),
            _TextShape(),
        )  # fmt: skip

    return app


class _ChatShape:
    """How OpenAI writes a chat completion."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, text: str, tokens: list[TokenChoice]) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, **self._logprobs(tokens)}

    def all(self, text: str, tokens: list[TokenChoice]) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}, **self._logprobs(tokens)}

    def _logprobs(self, tokens: list[TokenChoice]) -> dict[str, Any]:
        def entry(text: str, logprob: float) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = [{**entry(t.text, t.logprob), "top_logprobs": [entry(*other) for other in t.top]} for t in tokens]
        return {"logprobs": {"content": content} if content else None}


class _TextShape:
    """How OpenAI writes a plain completion, whole or in part."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def opening(self) -> dict[str, Any] | None:
        return None

    def part(self, text: str, tokens: list[TokenChoice]) -> dict[str, Any]:
        log_probs = {
            "tokens": [t.text for t in tokens], "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [dict(t.top) for t in tokens], "text_offset": [],
        }  # fmt: skip
        return {"text": text, "logprobs": log_probs if tokens else None}

    all = part


async def _reply(
    request: Request, body: ChatRequest | CompletionRequest, start: Start, shape: _ChatShape | _TextShape
) -> Response:
    """Start the generation and answer with all of it, or with a stream of events."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()

    def arrived(piece: Piece) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    answer = await asyncio.to_thread(start, arrived)
    head = {
        "id": shape.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": answer.expert or "base",
        "coterie": {"expert": answer.expert, "version": answer.version, "routed": answer.routed,
                    "similarity": answer.similarity,
                    "experts": [{"name": n, "version": v, "weight": round(w, 4)} for n, v, w in answer.experts]},
    }  # fmt: skip
    # A structured field list (RFC 8941), in which an expert's name is a token or a string.
    shares = ", ".join(f'"{n}";version={v};weight={w:.3f}' for n, v, w in answer.experts) or '"base"'
    said = {"X-Coterie-Experts": shares}

    def usage() -> dict[str, int]:
        asked, said = len(answer.generation.prompt), len(answer.generation.generated)
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}

    async def events() -> AsyncIterator[str]:
        def event(choices: list[dict[str, Any]], **more: Any) -> str:
            choices = [{"index": 0, "finish_reason": None, **c} for c in choices]
            return f"data: {json.dumps({**head, 'object': shape.chunk, 'choices': choices, **more})}\n\n"

        try:
            opening = shape.opening()
            if opening:
                yield event([opening])
            while True:
                piece = await pieces.get()
                if piece.error:
                    yield f"data: {json.dumps(_error_body(str(piece.error), 'engine', 'server_error'))}\n\n"
                    break
                yield event([{**shape.part(piece.text, list(piece.tokens)), "finish_reason": piece.finish}])
                if piece.finish:
                    break
            if body.stream_options.include_usage:
                yield event([], usage=usage())
            yield "data: [DONE]\n\n"
        finally:
            answer.generation.cancel()  # does nothing once it is finished

    if body.stream:
        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"} | said)
    text, tokens = "", list[TokenChoice]()
    try:
        while True:
            try:
                piece = await asyncio.wait_for(pieces.get(), 0.5)
            except TimeoutError:
                if await request.is_disconnected():
                    return Response(status_code=499)
                continue
            if piece.error:
                return _error(500, f"generation failed: {piece.error}", "engine", "server_error")
            text, tokens = text + piece.text, [*tokens, *piece.tokens]
            if piece.finish:
                break
    finally:
        answer.generation.cancel()
    choice = {"index": 0, "finish_reason": piece.finish, **shape.all(text, tokens)}
    return JSONResponse({**head, "object": shape.whole, "choices": [choice], "usage": usage()}, headers=said)


def _channel(request: Request) -> str:
    """Where a request came from, for the rules of coterie.toml."""
    return request.headers.get("x-coterie-channel", "")


def _error_body(
    message: str, code: str, kind: str = "invalid_request_error", param: str | None = None
) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _error(
    status: int, message: str, code: str, kind: str = "invalid_request_error", param: str | None = None
) -> JSONResponse:
    return JSONResponse(_error_body(message, code, kind, param), status)


def _handle_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(CoterieError)
    async def ours(_request: Request, error: CoterieError) -> JSONResponse:
        response = _error(error.status, str(error), error.code)
        if isinstance(error, Busy):
            response.headers["Retry-After"] = str(error.retry_after_s)
        return response

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        if first["type"] == "json_invalid":
            return _error(400, f"the body is not valid JSON: {first['ctx']['error']}", "invalid_json")
        return _error(400, f"{place}: {first['msg'].lower()}", "invalid_request", param=place)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), "not_found" if error.status_code == 404 else "http")

    @app.exception_handler(Exception)
    async def fault(_request: Request, _error_: Exception) -> JSONResponse:
        return _error(500, "a fault of ours; the server's log says more", "internal", "server_error")


class _EngineMetrics:
    """The engine's counters, read when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        s, (running, waiting) = self.engine.stats, self.engine.load_numbers()
        yield GaugeMetricFamily("coterie_requests_running", "Requests being generated", running)
        yield GaugeMetricFamily("coterie_requests_waiting", "Requests in the queue", waiting)
        for name, about, value in (
            ("requests", "Requests accepted", s.requests), ("rejected", "Requests refused with 429", s.rejected),
            ("prompt_tokens", "Tokens read", s.prompt_tokens),
            ("generated_tokens", "Tokens written", s.generated_tokens),
            ("decode_steps", "Steps of the engine", s.steps), ("busy_seconds", "Seconds computing", s.busy_seconds),
        ):  # fmt: skip
            yield CounterMetricFamily(f"coterie_{name}", about, value)
        recent = sorted(s.first_token_seconds)
        if recent:
            yield GaugeMetricFamily("coterie_first_token_seconds_median", "Of the last 1,000", recent[len(recent) // 2])
