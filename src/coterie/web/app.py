"""The HTTP API, OpenAI-compatible, and the chat page.

Notable: a request's pieces come from the engine's thread through an asyncio queue. Whoever stops reading, streamed
or not, cancels the generation, so that its slot is free at the engine's next step.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, select_autoescape
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from coterie.answer import Answer, Answerer
from coterie.desk.attachment import Attachments
from coterie.desk.desk import Desk
from coterie.engine.engine import Engine
from coterie.engine.request import Generation, Piece, TokenChoice
from coterie.errors import CoterieError
from coterie.experts.library import RESERVED, ExpertFacts
from coterie.grounding import Grounding
from coterie.privacy.house import House
from coterie.privacy.once import Once, detector_of, mask_once
from coterie.privacy.rights import Room
from coterie.privacy.vault import Masked
from coterie.web.access import Gate, add_access
from coterie.web.desk import add_desk
from coterie.web.door import open_door
from coterie.web.experts import router as experts_router
from coterie.web.files import router as files_router
from coterie.web.knowledge import Ground, Shelf
from coterie.web.knowledge import router as knowledge_router
from coterie.web.problem import Guard, broken_off, handle_errors
from coterie.web.route import router as route_router
from coterie.web.schema import ChatRequest, CompletionRequest
from coterie.web.witness import Witness

HERE = Path(__file__).parent
EXPERTS = "X-Coterie-Experts"
Start = Callable[[Callable[[Piece], None]], Answer]


def create_app(
    answerer: Answerer, desk: Desk | None = None, house: House | None = None,
    rooms: Callable[[], list[Room]] = list, grounding: Grounding | None = None, mask: Once | None = None,
) -> FastAPI:  # fmt: skip
    """The application over one business, with its desk where it is open.

    house: who may do what. rooms: who holds customers' data. grounding: the open sources, where the desk has them too.
    mask: hides what is private in a request, by [privacy]; without one it is made of the engine's base model.
    """
    shelf = Shelf(grounding or Grounding.of(answerer))
    ended = house.accounts.invitation_ended if house else None
    door = open_door(answerer.business.folder, desk.spec.origins, ended) if desk else None
    gate = Gate(house, [*([] if desk else ["/desk"]), *([] if shelf.declared else ["/knowledge"])], door)
    app = FastAPI(title="Coterie", docs_url=None, redoc_url=None, dependencies=[Depends(gate)])
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    pages = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=select_autoescape())
    pages.globals |= {"nav": gate.pages, "business": answerer.business.config.business}
    mask = mask or partial(mask_once, detector_of(answerer.engine.base))
    registry = CollectorRegistry()
    registry.register(_EngineMetrics(answerer.engine))
    business, started = answerer.business, int(time.time())
    app.add_middleware(Guard)
    handle_errors(app)
    add_access(app, gate, pages, rooms)
    if desk and door:
        witness = Witness(house)
        add_desk(app, desk, pages, door, witness)
        if house:
            app.include_router(files_router(Attachments(house), door, witness))
    app.include_router(knowledge_router(shelf, business, pages, *([house.audit.record] if house else [])))
    app.include_router(experts_router(business, pages))
    app.include_router(route_router(answerer, _on_learned(house)))

    @app.get("/", response_class=HTMLResponse)
    def page(request: Request) -> str:
        return pages.get_template("chat.html").render(
            person=request.state.person,
            base=answerer.engine.base.name,
            experts=business.library.shelf(),
            knowledge=shelf.declared,
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
        return {"object": "list", "data": [_model("base"), _model("auto"), *map(_expert, business.library.shelf())]}

    @app.get("/v1/models/{name}")
    def model(name: str) -> dict[str, Any]:
        return _model(name) if name in RESERVED else _expert(business.library.facts(name))

    def _model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "coterie",
                "root": business.config.business.base}  # fmt: skip

    def _expert(facts: ExpertFacts) -> dict[str, Any]:
        return {**_model(facts.name), "parent": "base", "version": facts.version, "kind": facts.kind,
                "description": facts.description}  # fmt: skip

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        messages = [m.plain() for m in body.messages]
        sampling, channel = body.settings(), _channel(request)
        hide = masking()
        ground = await asyncio.to_thread(shelf.gather, messages, request, hide) if body.knowledge else None
        if ground and not ground.answerable:
            return ground.unknown(body.stream)
        masked = await asyncio.to_thread(hide, [m["content"] for m in messages]) if hide and not ground else None
        texts = masked.texts if masked else [m["content"] for m in messages]
        seen = [{**m, "content": text} for m, text in zip(messages, texts, strict=True)]

        def start(to: Callable[[Piece], None]) -> Answer:
            if ground:
                return ground.ask(body.model, sampling, to, channel)
            return answerer.chat(body.model, seen, sampling, to, channel)

        return await _reply(request, body, start, _ChatShape(), ground, masked)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        sampling = body.settings()
        channel, hide = _channel(request), masking()
        prompts, masked = body.prompt, list[Masked | None]([None] * len(body.prompt))
        if hide:
            if not all(isinstance(prompt, str) for prompt in prompts):
                raise CoterieError("prompt: private data in tokens cannot be hidden from the model; send text")
            masked = [await asyncio.to_thread(hide, [prompt]) for prompt in prompts]
            prompts = [m.texts[0] for m in masked if m]
        starts: list[Start] = [
            partial(answerer.complete, body.model, prompt, sampling, channel=channel) for prompt in prompts
        ]
        if len(starts) == 1:
            return await _reply(request, body, starts[0], _TextShape(), masked=masked[0])
        if body.stream:
            raise CoterieError("stream: several prompts cannot be streamed; send them one by one")
        return await _reply_all(request, body.model, starts, _TextShape(), masked)

    def masking() -> Once | None:
        """What hides private data from the models, where [privacy] wants that now."""
        rule = business.config.privacy.mask
        return mask if rule == "always" or (rule == "accounts" and gate.closed()) else None

    return app


def _on_learned(house: House | None) -> Callable[[str, str, int], None]:
    """Says in the audit log who taught the router which expert."""
    return lambda who, name, count: house.audit.record(who, "route.learn", name, inputs=count) if house else None


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
        def entry(text: str, logprob: float | None) -> dict[str, Any]:
            part = "\ufffd" in text  # of a character that takes several tokens
            return {"token": text, "logprob": logprob, "bytes": None if part else list(text.encode())}

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
            "top_logprobs": [None if t.logprob is None else dict(t.top) for t in tokens],
        }  # fmt: skip
        return {"text": text, "logprobs": log_probs if tokens else None}

    all = part


def _handing_over(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[Piece]) -> Callable[[Piece], None]:
    """What the engine's thread calls with a piece, to put it in line for the event loop."""

    def arrived(piece: Piece) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, piece)

    return arrived


async def _reply(
    request: Request, body: ChatRequest | CompletionRequest, start: Start, shape: _ChatShape | _TextShape,
    ground: Ground | None = None, masked: Masked | None = None,
) -> Response:  # fmt: skip
    """Start the generation and answer with all of it, or with a stream of events; checked, where it has a ground, and
    with what was `masked` in it again."""
    restored = _restoring(masked)
    pieces = asyncio.Queue[Piece]()
    answer = await asyncio.to_thread(start, _handing_over(asyncio.get_running_loop(), pieces))
    generation = answer.generation
    head = {
        "id": shape.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": answer.expert or "base",
        "coterie": {**_told(answer), **(ground.head() if ground else {})},
    }  # fmt: skip
    who = {EXPERTS: _shares([answer])}

    def usage() -> dict[str, Any]:
        return _usage([generation])

    async def events() -> AsyncIterator[str]:
        def event(choices: list[dict[str, Any]], **more: Any) -> str:
            choices = [{"index": 0, "finish_reason": None, **c} for c in choices]
            return f"data: {json.dumps({**head, 'object': shape.chunk, 'choices': choices, **more})}\n\n"

        opening = shape.opening()
        if opening:
            yield event([opening])
        finish = None
        while not finish:
            piece = await pieces.get()
            if failed := broken_off(piece):
                yield f"data: {bytes(failed.body).decode()}\n\n"
                return
            finish = piece.finish
            if not ground:
                yield event([{**shape.part(restored(piece), list(piece.tokens)), "finish_reason": finish}])
            elif (said := await ground.pass_on(piece.text, bool(finish))) or finish:
                if finish:
                    head["coterie"] |= ground.tail()  # type: ignore[operator]
                yield event([{**shape.part(said, []), "finish_reason": finish}])
        if body.stream_options.include_usage:
            yield event([], usage=usage())
        yield "data: [DONE]\n\n"

    if body.stream:
        return _Events(events(), generation, who)
    watch = asyncio.create_task(_cancel_when_left(request, [answer]))
    text, tokens, finish = "", list[TokenChoice](), None
    try:
        while not finish:
            piece = await pieces.get()
            if failed := broken_off(piece):
                return failed
            said = await ground.pass_on(piece.text, bool(piece.finish)) if ground else restored(piece)
            text, finish = text + said, piece.finish
            tokens += [] if ground else piece.tokens
    finally:
        watch.cancel()
        generation.cancel()  # does nothing once it is finished
    if ground:
        head["coterie"] |= ground.tail()  # type: ignore[operator]
    choice = {"index": 0, "finish_reason": finish, **shape.all(text, tokens)}
    return JSONResponse({**head, "object": shape.whole, "choices": [choice], "usage": usage()}, headers=who)


def _told(answer: Answer) -> dict[str, Any]:
    """Who answered, and how sure they were."""
    return {"expert": answer.expert, "version": answer.version, "routed": answer.routed,
            "similarity": answer.similarity,
            "experts": [{"name": n, "version": v, "weight": round(w, 4)} for n, v, w in answer.experts],
            **(answer.verdict.json() if answer.verdict else {})}  # fmt: skip


def _shares(answers: list[Answer]) -> str:
    """Who answered, each with its share of all the answers: a list as in RFC 8941."""
    shares: dict[str, float] = {}
    for answer in answers:
        for who, share in [(f'"{n}";version={v}', w) for n, v, w in answer.experts] or [('"base"', 1.0)]:
            shares[who] = shares.get(who, 0.0) + share / len(answers)
    if shares.keys() == {'"base"'}:
        return '"base"'
    return ", ".join(f"{who};weight={share:.3f}" for who, share in shares.items())


def _usage(generations: list[Generation]) -> dict[str, Any]:
    """Tokens read and written, and those of the prompts that were found read: in all layers, or in the trunk only."""
    asked, said, cached, trunk = (
        sum(counted) for counted in zip(*((len(g.prompt), len(g.generated), g.cached, g.trunk) for g in generations),
                                        strict=True)
    )  # fmt: skip
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said,
            "prompt_tokens_details": {"cached_tokens": cached, "trunk_tokens": trunk}}  # fmt: skip


def _channel(request: Request) -> str:
    """Where a request came from, for the rules of coterie.toml."""
    return request.headers.get("x-coterie-channel", "")


def _restoring(masked: Masked | None) -> Callable[[Piece], str]:
    """The text of a piece with what was masked in it; of a pseudonym that is cut in two, the beginning waits."""
    restorer = masked.restoring() if masked else None

    def restored(piece: Piece) -> str:
        if restorer is None:
            return piece.text
        return restorer.take(piece.text, bool(piece.finish))

    return restored


async def _reply_all(
    request: Request, asked: str, starts: list[Start], shape: _TextShape, masked: list[Masked | None]
) -> Response:
    """Start several generations and answer with all of them, in the order of their prompts, each saying who gave it."""
    loop, arrived = asyncio.get_running_loop(), [asyncio.Queue[Piece]() for _ in starts]
    answers: list[Answer] = []
    choices: list[dict[str, Any]] = []
    watch = asyncio.create_task(_cancel_when_left(request, answers))
    try:
        for start, pieces in zip(starts, arrived, strict=True):
            answers.append(await asyncio.to_thread(start, _handing_over(loop, pieces)))
        for index, pieces in enumerate(arrived):
            text, tokens, finish, restored = "", list[TokenChoice](), None, _restoring(masked[index])
            while not finish:
                piece = await pieces.get()
                if failed := broken_off(piece):
                    return failed
                text, finish = text + restored(piece), piece.finish
                tokens += piece.tokens
            told = _told(answers[index])
            choices.append({"index": index, "finish_reason": finish, **shape.all(text, tokens), "coterie": told})
    finally:
        watch.cancel()
        for answer in answers:
            answer.generation.cancel()
    usage, names = _usage([a.generation for a in answers]), {a.expert or "base" for a in answers}
    return JSONResponse({"id": shape.prefix + uuid.uuid4().hex, "created": int(time.time()), "object": shape.whole,
                         "model": names.pop() if len(names) == 1 else asked, "choices": choices, "usage": usage},
                        headers={EXPERTS: _shares(answers)})  # fmt: skip


class _Events(StreamingResponse):
    """Server-sent events. However the response ends, even before its first event, the generation ends too."""

    def __init__(self, events: AsyncIterator[str], generation: Generation, headers: dict[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"} | headers)
        self.generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.generation.cancel()


async def _cancel_when_left(request: Request, answers: list[Answer]) -> None:
    """Cancel the answers when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    for answer in answers:
        answer.generation.cancel()


class _EngineMetrics:
    """The engine's counters, read when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        s, (running, waiting) = self.engine.stats, self.engine.load_numbers()
        yield GaugeMetricFamily("coterie_requests_running", "Requests being generated", running)
        yield GaugeMetricFamily("coterie_requests_waiting", "Requests in the queue", waiting)
        in8 = self.engine.step.in8
        yield GaugeMetricFamily("coterie_int8_bytes", "Memory that matrices in 8 bits take", in8)
        for name, about, value in (
            ("requests", "Requests accepted", s.requests), ("rejected", "Requests refused with 429", s.rejected),
            ("prompt_tokens", "Tokens read", s.prompt_tokens),
            ("generated_tokens", "Tokens written", s.generated_tokens),
            ("cached_tokens", "Tokens of prompts found read in all layers", s.cached_tokens),
            ("trunk_tokens", "Tokens of prompts found read in the trunk only", s.trunk_tokens),
            ("decode_steps", "Steps of the engine", s.steps), ("busy_seconds", "Seconds computing", s.busy_seconds),
        ):  # fmt: skip
            yield CounterMetricFamily(f"coterie_{name}", about, value)
        recent = sorted(s.first_token_seconds)
        if recent:
            yield GaugeMetricFamily("coterie_first_token_seconds_median", "Of the last 1,000", recent[len(recent) // 2])
