"""What goes wrong, in OpenAI's words: every error has the same shape, and none tells our secrets."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coterie.engine.request import Piece
from coterie.errors import Busy, CoterieError, Stopped

LARGEST_BODY = 8 << 20  # bytes
log = logging.getLogger(__name__)
SECURITY = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
}


def _error(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


def _told(error: CoterieError) -> JSONResponse:
    response = _error(error.status, str(error), error.code)
    if isinstance(error, Busy):
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


def broken_off(piece: Piece) -> JSONResponse | None:
    """What to answer where a generation broke off; None while it goes well."""
    if isinstance(piece.error, CoterieError):
        return _told(piece.error)
    if piece.error:
        return _error(500, "the generation failed; the server's log says more", "internal")
    return _told(Stopped("the engine has stopped")) if piece.finish == "cancelled" else None


def handle_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(CoterieError)
    async def ours(_request: Request, error: CoterieError) -> JSONResponse:
        return _told(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        if first["type"] == "json_invalid":
            return _error(400, f"the body is not valid JSON: {first['ctx']['error']}", "invalid_json")
        return _error(400, f"{place}: {first['msg'].lower()}", "invalid_request", param=place)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
        message = f"{request.method} {request.url.path}: {error.detail}"
        response = _error(error.status_code, message, codes.get(error.status_code, "invalid_request"))
        response.headers.update(error.headers or {})
        return response


class Guard:
    """Around the whole application: no body over LARGEST_BODY, SECURITY headers, and our words for our faults."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        taken, begun = 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > LARGEST_BODY:
                raise HTTPException(413, f"the body is larger than {LARGEST_BODY >> 20} MiB")
            return message

        async def secured(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)  # a route may be stricter
            await send(message)

        try:
            await self.app(scope, counted, secured)
        except Exception:
            if begun:
                raise  # nothing can be said any more: the server logs it and breaks off
            log.exception("%s %s failed by a fault of ours", scope["method"], scope["path"])
            await _error(500, "a fault of ours; the server's log says more", "internal")(scope, receive, secured)
