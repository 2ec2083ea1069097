"""The widget's side of the desk: what a visitor's page may ask. Mounted at /widget, with its own CORS rules."""

import asyncio
from collections.abc import AsyncIterator
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse
from pydantic import BaseModel as Record
from pydantic import Field
from starlette.exceptions import HTTPException

from coterie.desk.desk import Desk
from coterie.desk.first_words import first_words
from coterie.desk.message import LONGEST_KEY, Conversation, Message, NoConversation
from coterie.privacy.access import Limit
from coterie.web.access import visits
from coterie.web.door import Door
from coterie.web.events import Streams, event, next_news
from coterie.web.problem import handle_errors
from coterie.web.schema import Text
from coterie.web.witness import Witness

STATIC = Path(__file__).parent / "static"
FILES = ("widget.js", "visit.js", "strings.js", "widget.css", "tokens.css", "render.js")
Number = Annotated[int, Field(ge=0, le=2**31 - 1)]  # of an entry, as a database can hold it
SAYS, VISITS = Limit(30, 60), Limit(120, 60)  # messages of a visitor, new visits from one address
PAGES = 10  # that one visitor may have open
PIECE_S = 0.05  # from one piece of an answer to the next, which has all that was written meanwhile
ACTS = Limit(60, 60)  # what else a visitor does: buttons, thumbs, consents, streams that are opened


class Visit(Record):
    """POST /widget/visits: `identity` is the site's word for who this is, `token` the visit before."""

    identity: str = Field("", max_length=4000)
    token: str = Field("", max_length=4000)
    language: Text = Field("", max_length=40, description="that the widget speaks, such as ar")


class Agreed(Record):
    """POST /widget/consents: to what they agree, or no longer; `version` is that of the text that they saw."""

    purpose: Text = Field(max_length=80)
    version: Text = Field(max_length=64)
    agreed: bool


class Begin(Record):
    key: str = Field(min_length=1, max_length=LONGEST_KEY)


class Said(Record):
    text: Text
    key: str = Field(min_length=1, max_length=LONGEST_KEY)
    start: str = Field("", max_length=40, description="the procedure whose button was pressed")
    asked: Number | None = Field(None, description="the question whose button was pressed")

    def pressed(self) -> dict[str, Any]:
        """What goes with the words of a button."""
        return ({"start": self.start} if self.start else {}) | ({} if self.asked is None else {"asked": self.asked})


class Rating(Record):
    seq: Number
    good: bool
    reason: Text = Field("", max_length=2000)


def widget_app(desk: Desk, door: Door, witness: Witness) -> FastAPI:
    """The routes under /widget. `witness`: who writes down what visitors are told, and what they try."""
    app = FastAPI(
        title="Coterie's widget", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(visits(door))]
    )
    app.add_middleware(
        CORSMiddleware, allow_origins=sorted(door.origins), allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"], expose_headers=["Retry-After"], max_age=3600,
    )  # fmt: skip
    handle_errors(app)
    talks, streams, consents = desk.conversations, Streams(PAGES), desk.business.config.privacy.consents

    def mine(request: Request, id: str) -> Conversation:
        """The visitor's own conversation; another's reads as if there were none, and goes on record."""
        customer = door.visitor(request)
        try:
            return talks.get(id, customer)
        except NoConversation:
            whose = talks.get(id).customer  # raises again where there is none at all
            witness.refused(customer, id, whose)
            raise

    def acting(request: Request, id: str) -> Conversation:
        """`mine`, for what is done with a button. Raises Busy."""
        found = mine(request, id)
        ACTS.count(found.customer)
        return found

    @app.post("/visits")
    def visit(body: Visit, request: Request) -> dict[str, Any]:
        site = door.site(request)
        VISITS.count(request.client.host if request.client else "")
        customer, token = door.admit(site, body.identity, body.token)
        disclosure, greeting = first_words(desk.spec, body.language)
        witness.told(customer, disclosure, body.language)
        last = next(iter(talks.listed(customer=customer, limit=1)), None)
        return {
            "token": token, "business": desk.business.config.business.name, "disclosure": disclosure,
            "greeting": greeting, "conversation": last.id if last else None,
            "offers": desk.procedures.offers() if desk.procedures else [],
            "consents": witness.asked(customer, consents),
        }  # fmt: skip

    @app.post("/consents")
    def agree(body: Agreed, request: Request) -> dict[str, Any]:
        customer = door.visitor(request)
        ACTS.count(customer)
        witness.agreed(customer, consents, body.purpose, body.version, body.agreed)
        return {"consents": witness.asked(customer, consents)}

    @app.post("/conversations")
    def begin(body: Begin, request: Request) -> dict[str, Any]:
        customer = door.visitor(request)
        SAYS.count(customer)
        return {"id": talks.open(customer, "web", body.key).id}

    @app.post("/conversations/{id}/messages")
    def say(id: str, body: Said, request: Request) -> dict[str, Any]:
        SAYS.count(mine(request, id).customer)
        message = talks.say(id, body.text, body.key, body.pressed())
        desk.wake(id)
        return {"seq": message.seq}

    @app.post("/conversations/{id}/stop")
    def stop(id: str, request: Request) -> dict[str, Any]:
        desk.stop(acting(request, id).id)
        return {}

    @app.post("/conversations/{id}/person")
    def person(id: str, request: Request) -> dict[str, Any]:
        return state_of(talks.ask_for_person(acting(request, id).id))

    @app.post("/conversations/{id}/bot")
    def bot(id: str, request: Request) -> dict[str, Any]:
        now = talks.back_to_bot(acting(request, id).id)
        desk.wake(id)
        return state_of(now)

    @app.post("/conversations/{id}/ratings")
    def rate(id: str, body: Rating, request: Request) -> dict[str, Any]:
        talks.rate(acting(request, id).id, body.seq, body.good, body.reason)
        return {}

    @app.get("/conversations/{id}/events")
    def events(id: str, request: Request, after: Number = 0) -> Response:
        customer = mine(request, id).customer
        ACTS.count(customer)
        return streams.stream(customer, _events(desk, id, after))

    @app.get("/static/{name}")
    def file(name: str) -> Response:
        """Files that pages of any site may import: there is nothing secret in them."""
        if name not in FILES:
            raise HTTPException(404, "Not Found")
        where = STATIC / "widget" if (STATIC / "widget" / name).exists() else STATIC
        return FileResponse(where / name, headers={"Access-Control-Allow-Origin": "*"})

    return app


async def _events(desk: Desk, id: str, after: int) -> AsyncIterator[str]:
    """All that the customer may see, from the entry after `after` on, as it happens."""
    talks, before, draft = desk.conversations, None, False
    with desk.live.subscribed(id) as news:
        came: list[dict[str, Any]] = [{"event": "changed"}]
        while True:
            for written, some in groupby(came, lambda n: n["event"] in ("piece", "writing")):
                if written:
                    draft = True
                    yield event("piece", {"text": "".join(n["text"] for n in some)})
                    await asyncio.sleep(PIECE_S)
                elif draft and any(n["event"] == "ended" for n in some):
                    draft = False
                    yield event("ended", {})
            if not came or any(n["event"] == "changed" for n in came):
                stands, messages = await asyncio.to_thread(talks.since, id, after)
                for message in messages:
                    after = message.seq
                    yield event("entry", public(message))
                now = state_of(stands)
                yield event("state", now) if now != before else ": the line is open\n\n"
                before = now
            came = await next_news(news)


def state_of(c: Conversation) -> dict[str, Any]:
    """What a customer may know of where their conversation stands."""
    return {"state": c.state, "answering": c.answering is not None, "with": _name(c.owner)}


def public(m: Message) -> dict[str, Any]:
    """An entry as its customer may see it."""
    shown: dict[str, Any] = {"seq": m.seq, "kind": m.kind, "author": m.author.partition(":")[0], "at": m.at}
    if m.kind == "event":
        return shown | {"state": m.data.get("state"), "with": _name(m.data.get("to", ""))}
    sources = [
        {"source": s["source"], "where": s["where"], "text": s["text"], "link": s.get("link", "")}
        for s in m.data.get("sources", [])
    ]
    shown |= {"text": m.text, "name": _name(m.author), "sources": sources, "stopped": "stopped" in m.data}
    return shown | ({"procedure": m.data["procedure"]} if "procedure" in m.data else {})


def _name(owner: str) -> str:
    """Of an agent; "" for the bot and the queue."""
    return owner.partition(":")[2]
