"""The agents' side of the desk: its page, and what it asks of the server. Nothing here that `desk/` does not decide."""

import asyncio
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse
from jinja2 import Environment
from pydantic import BaseModel as Record
from pydantic import Field
from sqlalchemy import select

from coterie.desk.desk import Desk
from coterie.desk.live import EVERY
from coterie.desk.message import LONGEST_KEY, Conversation, Message, State
from coterie.errors import CoterieError
from coterie.privacy.access import LOCAL, MAY, PASSER, ROLES, Forbidden, NotSignedIn
from coterie.privacy.tables import AccountRow
from coterie.recent import Recent
from coterie.store.database import reading
from coterie.web.door import COOKIE, INVITED_S, Agent, Door, open_door
from coterie.web.events import Streams, event, next_news
from coterie.web.procedures import approvals_router
from coterie.web.schema import Text
from coterie.web.widget import STATIC, widget_app
from coterie.web.witness import Witness

ALL = ("message", "note", "suggestion", "event")
VIEWS: dict[str, tuple[State, ...]] = {
    "waiting": ("waiting",), "mine": ("person", "snoozed"), "people": ("person",), "bot": ("bot",),
    "snoozed": ("snoozed",), "resolved": ("resolved",), "approvals": ("bot",), "all": (),
}  # fmt: skip
Before = Annotated[int | None, Query(ge=1, le=2**31 - 1)]  # the id of an entry
PAGES = 20  # that one agent may have open
PRESENT_S = 20.0  # an agent's page says this often, or more so, where they look
LOOKED_AT = 1000  # conversations at once; beyond that, the oldest look is not shown to others


class Words(Record):
    text: Text
    key: str | None = Field(None, max_length=LONGEST_KEY)


class Taking(Record):
    seen: str | None = Field(None, max_length=200, description="the owner that the agent saw")
    to: str | None = Field(None, max_length=100, description="somebody who works at the desk; default: oneself")


class Releasing(Record):
    queue: str = Field("", max_length=80, description="a declared queue; default: the one that it came from")


class Snoozing(Record):
    minutes: float = Field(gt=0, le=60 * 24 * 90)


class Looking(Record):
    typing: bool = False


class _Presence:
    """Who looks at which conversation. Of this process only; it is a courtesy, the database decides."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at = Recent[str, dict[str, tuple[float, bool]]](LOOKED_AT, PRESENT_S)

    def look(self, id: str, agent: str, typing: bool) -> bool:
        """Note it; whether that is news."""
        with self._lock:
            here = self._here(id)
            self._at.put(id, here | {agent: (time.monotonic(), typing)})
        return agent not in here or here[agent][1] != typing

    def others(self, id: str, agent: str) -> list[dict[str, Any]]:
        return [{"name": a, "typing": typing} for a, (_, typing) in self._here(id).items() if a != agent]

    def _here(self, id: str) -> dict[str, tuple[float, bool]]:
        since = time.monotonic() - PRESENT_S
        return {a: v for a, v in (self._at.get(id) or {}).items() if v[0] > since}


def add_desk(
    app: FastAPI, desk: Desk, pages: Environment, door: Door | None = None, witness: Witness | None = None
) -> None:
    """Routes of desk and widget. `witness`: who writes down who saw whose words, and what visitors were told."""
    door, witness = door or open_door(desk.business.folder, desk.spec.origins), witness or Witness()
    app.mount("/widget", widget_app(desk, door, witness))
    app.include_router(_router(desk, door, pages, witness))
    app.include_router(approvals_router(desk, door, witness))

    @app.get("/widget.js")
    def script() -> Response:
        return FileResponse(STATIC / "widget" / "embed.js", headers={"Access-Control-Allow-Origin": "*"})


def _router(desk: Desk, door: Door, pages: Environment, witness: Witness) -> APIRouter:
    router, talks, presence, streams = APIRouter(), desk.conversations, _Presence(), Streams(PAGES)
    seen = set[str]()  # agents who have been here since this process began

    def working(agent: Annotated[Agent, Depends(door.agent)]) -> Agent:
        seen.add(agent.name)
        return agent

    ByAgent = Annotated[Agent, Depends(working)]

    def queues() -> list[str]:
        return ["general", *sorted({rule.queue for rule in desk.spec.rules} - {"general"})]

    def people() -> list[str]:
        """Everybody whom a conversation can be given to."""
        return sorted(seen | set(talks.owners()) | _accounts(desk), key=str.casefold)

    @router.get("/desk", response_class=HTMLResponse)
    def page(request: Request, invite: str = "") -> Response:
        if invite:
            if door.invited(invite) is None:
                raise NotSignedIn("this link has expired or was ended; sign in, or ask for a new one")
            into = RedirectResponse("desk", 303)
            secure = request.url.scheme == "https"
            into.set_cookie(COOKIE, invite, INVITED_S, httponly=True, samesite="strict", secure=secure)
            return into
        try:
            agent = door.agent(request)
        except NotSignedIn:
            accounts = request.state.person not in (LOCAL, PASSER)
            return HTMLResponse(pages.get_template("desk_closed.html").render(accounts=accounts), 401)
        return HTMLResponse(
            pages.get_template("desk.html").render(agent=agent, canned=desk.spec.canned, person=request.state.person)
        )

    @router.get("/desk/api/conversations")
    def listed(agent: ByAgent, view: Literal[*VIEWS] = "waiting", queue: str = "") -> dict[str, Any]:  # type: ignore[valid-type]
        owner = f"agent:{agent.name}" if view == "mine" else ""
        wanted = [w["conversation"] for w in desk.procedures.runs.waiting()] if desk.procedures else []
        if view == "approvals":
            found = [c for c in map(talks.get, wanted) if queue in ("", c.queue)]
        else:
            found = talks.listed(VIEWS[view], owner, queue=queue)
        mine = len(talks.listed(VIEWS["mine"], f"agent:{agent.name}"))
        last = talks.last_messages([c.id for c in found])
        witness.listed(agent.name, "list", [(c.id, c.customer) for c in found if c.id in last])
        return {
            "conversations": [_row(c) | {"last": _short(last.get(c.id))} for c in found],
            "counts": talks.counts() | {"mine": mine, "approvals": len(wanted)},
            "queues": dict.fromkeys(queues(), 0) | talks.queues(), "people": people(),
        }  # fmt: skip

    @router.get("/desk/api/conversations/{id}")
    def one(id: str, agent: ByAgent) -> dict[str, Any]:
        c = talks.get(id)
        witness.read(agent.name, id, c.customer)
        try:
            profile, trouble = dict(desk.parts.profile(c.customer)), ""
        except Exception:  # the conversation goes on without it
            profile, trouble = {}, "The customer's profile could not be read."
        others = [o for o in talks.listed(customer=c.customer, limit=20) if o.id != id]
        return {
            "conversation": _row(c), "entries": [asdict(m) for m in talks.messages(id, kinds=ALL)],
            "profile": profile, "trouble": trouble, "others": [_row(o) for o in others],
            "disliked": talks.disliked(id), "present": presence.others(id, agent.name),
            "approvals": desk.procedures.runs.waiting(id) if desk.procedures else [],
        }  # fmt: skip

    @router.post("/desk/api/conversations/{id}/take")
    def take(id: str, body: Taking, agent: ByAgent) -> dict[str, Any]:
        if body.to and body.to != agent.name and body.to not in people():
            raise CoterieError(f"to: nobody named {body.to!r} works at the desk")
        return _row(talks.assign(id, agent.name, body.to or agent.name, body.seen))

    @router.post("/desk/api/conversations/{id}/release")
    def release(id: str, agent: ByAgent, body: Releasing | None = None) -> dict[str, Any]:
        queue = body.queue if body else ""
        if queue and queue not in queues():
            raise CoterieError(f"queue: there is no {queue!r}; declared are {', '.join(queues())}")
        return _row(talks.release(id, agent.name, queue))

    @router.post("/desk/api/conversations/{id}/snooze")
    def snooze(id: str, body: Snoozing, agent: ByAgent) -> dict[str, Any]:
        return _row(talks.snooze(id, agent.name, talks.clock() + body.minutes * 60))

    @router.post("/desk/api/conversations/{id}/resolve")
    def resolve(id: str, agent: ByAgent) -> dict[str, Any]:
        return _row(talks.resolve(id, agent.name))

    @router.post("/desk/api/conversations/{id}/bot")
    def back(id: str, agent: ByAgent) -> dict[str, Any]:
        now = talks.back_to_bot(id, by=agent.name)
        desk.wake(id)
        return _row(now)

    @router.post("/desk/api/conversations/{id}/replies")
    def reply(id: str, body: Words, agent: ByAgent) -> dict[str, Any]:
        return asdict(talks.reply(id, agent.name, body.text, body.key))

    @router.post("/desk/api/conversations/{id}/notes")
    def note(id: str, body: Words, agent: ByAgent) -> dict[str, Any]:
        return asdict(talks.note(id, agent.name, body.text, body.key))

    @router.post("/desk/api/conversations/{id}/looking")
    def looking(id: str, body: Looking, agent: ByAgent) -> dict[str, Any]:
        talks.get(id)
        if presence.look(id, agent.name, body.typing):
            desk.live.changed(id)
        return {}

    @router.get("/desk/api/search")
    def search(q: str, agent: ByAgent, before: Before = None) -> dict[str, Any]:
        """Among the newest messages, or those `before` one. Its own `before`: where to go on; None: that was all."""
        if not q.strip():
            raise CoterieError("q: what to search for")
        found, further = talks.search(q, before=before)
        witness.searched(agent.name, q, [(c.id, c.customer) for c, _ in found])
        return {"conversations": [_row(c) | {"last": _short(m)} for c, m in found], "before": further}

    @router.get("/desk/api/state")
    def state(agent: ByAgent) -> dict[str, Any]:
        """For supervisors: queues, people, and how the assistant does."""
        if agent.role != "supervisor":
            raise Forbidden("only supervisors see this")
        waiting = talks.listed(("waiting",), limit=1000)
        running, queued = desk.answerer.engine.load_numbers()
        people = Counter(c.owner.partition(":")[2] for c in talks.listed(("person",), limit=1000))
        return {
            "counts": talks.counts(), "people": dict(people.most_common()),
            "queues": talks.queues(),
            "longest_wait_s": max((talks.clock() - (c.waiting_since or talks.clock()) for c in waiting), default=0),
            "reasons": talks.reasons(talks.clock() - 24 * 3600), "ratings": talks.ratings(talks.clock() - 24 * 3600),
            "assistant": {
                "alive": desk.answerer.engine.alive, "writing": desk.working, "running": running, "queued": queued,
                "calibrated": asdict(desk.confidence) if desk.confidence else None,
            },
        }  # fmt: skip

    @router.get("/desk/api/events")
    def events(agent: ByAgent) -> Response:
        return streams.stream(agent.name, _news(desk))

    return router


async def _news(desk: Desk) -> AsyncIterator[str]:
    """Which conversations have changed, as it happens; after a silence, which have changed in other processes."""
    with desk.live.subscribed(EVERY) as news:
        seen = await asyncio.to_thread(_versions, desk)
        yield event("ready", {})
        while True:
            came = await next_news(news)
            changed = {str(n["id"]) for n in came}
            if not came:
                now = await asyncio.to_thread(_versions, desk)
                changed = {id for id, version in now.items() if seen.get(id) != version}
                seen = now
            yield event("changed", {"ids": sorted(changed)}) if changed else ": the line is open\n\n"


def _versions(desk: Desk) -> dict[str, int]:
    return {c.id: c.version for c in desk.conversations.listed(("bot", "waiting", "person", "snoozed"), limit=1000)}


def _accounts(desk: Desk) -> set[str]:
    """Who may sign in and speak to customers."""
    with reading(desk.conversations.database) as session:
        may = [role for role in ROLES if "converse" in MAY[role]]
        return set(session.scalars(select(AccountRow.name).where(~AccountRow.disabled, AccountRow.role.in_(may))))


def _row(c: Conversation) -> dict[str, Any]:
    return asdict(c)


def _short(m: Message | None) -> dict[str, Any] | None:
    """A message on one line, without the signs of its Markdown."""
    if m is None:
        return None
    flat = " ".join(re.sub(r"\*\*|`|^\s*#+\s", "", m.text, flags=re.MULTILINE).split())
    return {"author": m.author, "text": flat[:140], "at": m.at}
