"""Knowledge over HTTP: the sources, a passage of one, and what a grounded chat completion adds to the plain one."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from jinja2 import Environment
from pydantic import BaseModel as Record
from pydantic import Field

from coterie import facts
from coterie.answer import Answer
from coterie.business import Business
from coterie.choose import question
from coterie.data.read import Message
from coterie.engine.request import Callback, Sampling
from coterie.errors import CoterieError
from coterie.grounding import Grounded, Grounding, Writer
from coterie.knowledge.evidence import Reader
from coterie.privacy.once import Once
from coterie.sources import overview


class NoPassage(CoterieError):
    """A passage that is not there, or not for this reader: which of the two is not told."""

    status = 404
    code = "not_found"


def reader_of(request: Request) -> Reader:
    """Who asks. Whoever signs people in puts a Reader into `request.state`; without that, all are strangers, and
    nothing that a request says of itself gives it a group."""
    reader = getattr(request.state, "reader", None)
    return reader if isinstance(reader, Reader) else Reader()


class Shelf:
    """The knowledge of the business that is served."""

    def __init__(self, grounding: Grounding) -> None:
        self._grounding = grounding

    @property
    def declared(self) -> bool:
        return bool(self._grounding.spec.sources)

    def grounding(self) -> Grounding:
        """Raises CoterieError where no source is declared."""
        if not self.declared:
            raise CoterieError("knowledge: this business declares no [knowledge.NAME] in coterie.toml")
        return self._grounding

    def gather(self, messages: list[Message], request: Request, hide: Once | None = None) -> "Ground":
        """The evidence for a conversation. It is looked for with the words as they are; what then goes before the model
        is masked with `hide`, where it is given. Raises MaskingFailed."""
        grounding = self.grounding()
        grounded = grounding.gather(messages, reader_of(request))
        if not hide:
            return Ground(grounding, grounded, grounding.writer(grounded, question(messages)), messages)
        found = grounded.evidence
        masked = hide([*(m["content"] for m in messages), *(e.text for e in found), *(e.where for e in found)])
        said, at = masked.texts[: len(messages)], masked.texts[len(messages) :]
        messages = [{**m, "content": text} for m, text in zip(messages, said, strict=True)]
        places = zip(found, at[: len(found)], at[len(found) :], strict=True)
        seen = replace(grounded, evidence=[replace(e, text=text, where=where) for e, text, where in places])
        writer = grounding.writer(seen, question(messages))
        return Ground(grounding, grounded, writer, messages, masked.restore)


class Ground:
    """What one grounded answer stands on, and its text as it is checked.

    messages: the conversation as the model sees it. restore: puts back what was hidden from the model.
    """

    def __init__(
        self, grounding: Grounding, grounded: Grounded, writer: Writer, messages: list[Message],
        restore: Callable[[str], str] = str,
    ) -> None:  # fmt: skip
        self.grounding, self.grounded, self.writer = grounding, grounded, writer
        self.messages, self.restore = messages, restore

    def ask(self, who: str, sampling: Sampling, to: Callback, channel: str) -> Answer:
        """Let the expert answer."""
        return self.grounding.ask(who, self.messages, self.writer.grounded, sampling, to, channel)

    @property
    def answerable(self) -> bool:
        return self.grounded.known or self.grounding.spec.missing == "answer"

    def head(self) -> dict[str, Any]:
        """Known before the first word."""
        return {"known": self.grounded.known, "sources": self.grounded.sources(), "problems": self.grounded.problems}

    def tail(self) -> dict[str, Any]:
        """Known after the last."""
        said = self.writer.grounded.sentences
        return {"sentences": [asdict(s) | {"text": self.restore(s.text)} for s in said]}

    async def pass_on(self, text: str, last: bool) -> str:
        """The part of the answer that is checked and can go out."""
        if not text and not last:
            return ""
        out = await asyncio.to_thread(self.writer.feed, text)
        if last:
            out += await asyncio.to_thread(self.writer.end)
            if not self.writer.said:
                out += self.grounding.spec.unknown
        return self.restore(out)  # whole sentences: no pseudonym is cut in two

    def unknown(self, stream: bool) -> Response:
        """The answer where no source has anything to say: no model is asked."""
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": "knowledge",
                "coterie": {"expert": None, "version": None, "routed": False, "similarity": None, "experts": [],
                            **self.head(), **self.tail()}}  # fmt: skip
        text = self.grounding.spec.unknown
        if not stream:
            choice = {"index": 0, "finish_reason": "stop", "logprobs": None,
                      "message": {"role": "assistant", "content": text, "refusal": None}}  # fmt: skip
            usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
            return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

        async def events() -> AsyncIterator[str]:
            for delta, finish in (({"role": "assistant", "content": text}, None), ({}, "stop")):
                choice = {"index": 0, "finish_reason": finish, "delta": delta}
                yield f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


class Decision(Record):
    """What a person says to facts that a model proposes."""

    ids: list[str] = Field(min_length=1, max_length=1000)
    accept: bool


def router(
    shelf: Shelf, business: Business, pages: Environment, on_record: Callable[..., None] = lambda *_, **__: None
) -> APIRouter:
    """The routes: /knowledge (the page), and under it sources, passage, picture, search, facts.

    on_record: told who decided which facts, for the audit log.
    """
    routes = APIRouter()

    def waiting(request: Request) -> list[dict[str, Any]]:
        return [{"id": p.id, "graph": graph, **asdict(p)} for graph, p in facts.listed(business, reader_of(request))]

    @routes.get("/knowledge", response_class=HTMLResponse)
    def page(request: Request) -> str:
        found = overview(business, reader_of(request))
        person = request.state.person
        return pages.get_template("knowledge.html").render(
            sources=found, person=person, facts=waiting(request) if "review" in person.may else []
        )

    @routes.get("/knowledge/sources")
    def sources(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": overview(business, reader_of(request))}

    @routes.get("/knowledge/passage")
    def passage(source: str, where: str, request: Request, query: str = "") -> dict[str, Any]:
        found = shelf.grounding().knowledge.open(source, where, reader_of(request), query)
        if found is None:
            raise NoPassage(f"{source}: there is no passage, row or triple {where!r} that you may read")
        return {"source": found.source, "where": found.where, "text": found.text, "query": found.query,
                "link": found.link, "thing": found.thing}  # fmt: skip

    @routes.get("/knowledge/picture")
    def picture(source: str, thing: str, request: Request) -> Response:
        drawn = shelf.grounding().knowledge.picture(source, thing, reader_of(request))
        if drawn is None:
            raise NoPassage(f"{source}: there is nothing about {thing!r} that you may read")
        return Response(drawn, media_type="image/svg+xml")

    @routes.get("/knowledge/facts")
    def proposed(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": waiting(request)}

    @routes.post("/knowledge/facts")
    def decide(body: Decision, request: Request) -> dict[str, int]:
        person = request.state.person
        changed = facts.decide(business, body.ids, body.accept, person.name, reader_of(request))
        if changed:
            what = "facts.accept" if body.accept else "facts.reject"
            on_record(person.name, what, "knowledge", ids=body.ids, changed=changed)
        return {"changed": changed}

    @routes.get("/knowledge/search")
    def search(q: str, request: Request) -> dict[str, Any]:
        problems: list[str] = []
        found = shelf.grounding().knowledge.gather(q, reader_of(request), tell=problems.append)
        return {"object": "list", "data": Grounded(found, bool(found), []).sources(), "problems": problems}

    return routes
