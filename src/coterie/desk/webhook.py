"""Webhooks: everything that happens at the desk, told to other systems, signed, in order and at least once.

Notable: the entries of conversations are the queue, and a webhook is a mark in it: it moves on when the receiver has
taken an entry, and `replay` moves it back. What is no entry (ratings, steps of procedures, erasures) has a queue and a
mark of the same kind, written in the transaction of the deed. So nothing can be told that did not happen, and nothing
that happened can be left out.

The signature is that of the time and the body, HMAC-SHA256 under a secret that both sides know, as `t=...,v1=...` in
`X-Coterie-Signature`. A receiver refuses what is older than some minutes, and an `id` that it has seen: see `verify`.
"""

import hashlib
import hmac
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from coterie.desk.conversation import Conversations
from coterie.errors import CoterieError
from coterie.store.conversation import ConversationRow, MessageRow, RatingRow, newest_entry
from coterie.store.database import reading, writing
from coterie.store.webhook import HappeningRow, WebhookRow

TIMEOUT_S, LONGEST_PAUSE_S = 5.0, 3600.0
TOLERANCE_S = 300.0
SETTLED_S = 1.0  # entries younger than this may still be joined by one with a lower id, from another process
AT_ONCE = 100  # entries told in one go
KINDS = ("message", "event", "rating", "action", "erasure")
Mark = Literal["told", "happened"]  # of WebhookRow
Post = Callable[[str, bytes, dict[str, str]], int]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Webhook:
    """Where, the secret, which kinds ("message", "event", ... of entries; "rating", "action", "erasure"), and whether
    texts are told too."""

    url: str
    secret: str = field(repr=False)
    kinds: Sequence[str] = KINDS
    texts: bool = False


def sign(secret: str, body: bytes, now: float) -> str:
    """The value of X-Coterie-Signature."""
    stamp = str(int(now))
    mark = hmac.new(secret.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return f"t={stamp},v1={mark}"


def verify(secret: str, header: str, body: bytes, now: float, tolerance_s: float = TOLERANCE_S) -> bool:
    """For a receiver: whether the body is ours and is not being replayed from long ago."""
    found = re.fullmatch(r"t=(\d{1,12}),v1=([0-9a-f]{64})", header)
    if not found or abs(now - int(found[1])) > tolerance_s:
        return False
    return hmac.compare_digest(sign(secret, body, int(found[1])), header)


def _post(url: str, body: bytes, headers: dict[str, str]) -> int:
    return httpx.post(url, content=body, headers=headers, timeout=TIMEOUT_S, follow_redirects=False).status_code


def standing(database: Engine) -> list[dict[str, Any]]:
    """How far each address was told: its last entry, how much of any kind is behind that, what went wrong."""
    entries = select(func.count()).select_from(MessageRow).where(MessageRow.id > WebhookRow.told).scalar_subquery()
    others = select(func.count()).where(HappeningRow.id > WebhookRow.happened).scalar_subquery()
    with reading(database) as session:
        return [
            {"url": w.url, "told": w.told, "waiting": n, "failed": w.failed, "next_at": w.next_at, "error": w.error}
            for w, n in session.execute(select(WebhookRow, entries + others).order_by(WebhookRow.url))
        ]


def replay(database: Engine, url: str, since: float | None = None, entry: int | None = None) -> int:
    """Tell an address again from a time, or from an entry on; how much that is. Raises CoterieError for an
    address or an entry that there is not."""
    with writing(database) as session:
        row = session.get(WebhookRow, url, with_for_update=True)
        if row is None:
            raise CoterieError(f"there is no webhook {url!r}")
        if entry is not None:
            from_entry = session.get(MessageRow, entry)
            if from_entry is None:
                raise CoterieError(f"there is no entry {entry}; X-Coterie-Event has the ids of those that were told")
            since = from_entry.at
        first = entry
        if entry is None and since is not None:
            first = session.scalars(select(func.min(MessageRow.id)).where(MessageRow.at >= since)).first()
        other = session.scalars(select(func.min(HappeningRow.id)).where(HappeningRow.at >= since)).first()
        told, happened = row.told, row.happened
        row.told = told if first is None else min(told, first - 1)
        row.happened = happened if other is None else min(happened, other - 1)
        row.failed, row.next_at = 0, 0.0
        again = select(func.count()).select_from(MessageRow).where(MessageRow.id > row.told, MessageRow.id <= told)
        others = select(func.count()).where(HappeningRow.id > row.happened, HappeningRow.id <= happened)
        return (session.scalar(again) or 0) + (session.scalar(others) or 0)


class Webhooks:
    """Tells each address what it has not been told. `deliver` is called now and then, by one process at a time."""

    def __init__(
        self, talks: Conversations, hooks: Sequence[Webhook], clock: Callable[[], float] = time.time, post: Post = _post
    ) -> None:  # fmt: skip
        self.talks, self.hooks, self.clock, self.post = talks, hooks, clock, post

    def deliver(self) -> int:
        """Tell what is due; how many entries were taken."""
        return sum(self._deliver(hook) for hook in self.hooks)

    def _deliver(self, hook: Webhook) -> int:
        """Entries first, then what happened beside them; each in its own order."""
        row = self._mark(hook)
        if row.next_at > self.clock():
            return 0
        taken, going = self._tell(hook, "told", row.told, self._entries(hook, row.told))
        if going:
            more, _ = self._tell(hook, "happened", row.happened, self._happenings(hook, row.happened))
            taken += more
        return taken

    def _tell(self, hook: Webhook, mark: Mark, told: int, due: list[tuple[int, str, bytes]]) -> tuple[int, bool]:
        """How many were taken, and whether all went well."""
        taken = 0
        for id, name, body in due:
            headers = {
                "Content-Type": "application/json", "X-Coterie-Event": name,
                "X-Coterie-Signature": sign(hook.secret, body, self.clock()),
            }  # fmt: skip
            try:
                status = self.post(hook.url, body, headers)
                problem = "" if 200 <= status < 300 else f"it answered {status}"
            except httpx.HTTPError as error:
                problem = type(error).__name__
            if not self._note(hook.url, mark, told, id, problem):
                return taken, False
            told = id
            if problem:
                log.warning("webhook %s: event %s was not taken: %s", hook.url, name, problem)
                return taken, False
            taken += 1
        return taken, True

    def replay(self, url: str, since: float) -> int:
        """Tell an address again all that happened since a time: see `replay`."""
        return replay(self.talks.database, url, since=since)

    def _mark(self, hook: Webhook) -> WebhookRow:
        """Where the address stands; a new one is told what happens from now on."""
        with writing(self.talks.database) as session:
            row = session.get(WebhookRow, hook.url)
            if row is None:
                happened = session.scalar(select(func.max(HappeningRow.id))) or 0
                row = WebhookRow(
                    url=hook.url, told=newest_entry(session), happened=happened, failed=0, next_at=0.0, error=""
                )  # fmt: skip
                session.add(row)
                session.flush()
            return row

    def _note(self, url: str, mark: Mark, before: int, id: int, problem: str) -> bool:
        """Move the mark on from `before`, or rest after a problem. False: somebody has moved the mark meanwhile, as a
        replay does, and it is begun anew from there."""
        with writing(self.talks.database) as session:
            row = session.get(WebhookRow, url, with_for_update=True)
            if row is None or getattr(row, mark) != before:
                return False
            row.failed = row.failed + 1 if problem else 0
            row.error = problem[:300]
            row.next_at = self.clock() + min(2.0**row.failed, LONGEST_PAUSE_S) if problem else 0.0
            if not problem:  # an entry that was erased meanwhile gives its id to the next one, which is not told yet
                setattr(row, mark, min(id, newest_entry(session)) if mark == "told" else id)
            return True

    def _happenings(self, hook: Webhook, told: int) -> list[tuple[int, str, bytes]]:
        due = (
            select(HappeningRow)
            .where(HappeningRow.id > told, HappeningRow.kind.in_(hook.kinds))
            .where(HappeningRow.at <= self.clock() - SETTLED_S).order_by(HappeningRow.id).limit(AT_ONCE)
        )  # fmt: skip
        with reading(self.talks.database) as session:
            return [(h.id, f"{h.kind}-{h.id}", self._happening(session, hook, h)) for h in session.scalars(due)]

    def _happening(self, session: Session, hook: Webhook, h: HappeningRow) -> bytes:
        told = {"id": f"{h.kind}-{h.id}", "conversation": h.conversation_id, "customer": h.customer, "kind": h.kind,
                "at": h.at, **h.data}  # fmt: skip
        if hook.texts and h.kind == "rating":
            rated = select(RatingRow.reason).filter_by(conversation_id=h.conversation_id, seq=h.data["seq"])
            reason = session.scalars(rated).first()
            told["text"] = self.talks.unseal(h.customer, reason) if reason is not None else ""
        return json.dumps(told, separators=(",", ":")).encode()

    def _entries(self, hook: Webhook, told: int) -> list[tuple[int, str, bytes]]:
        entries = (
            select(MessageRow, ConversationRow)
            .join(ConversationRow, ConversationRow.id == MessageRow.conversation_id)
            .where(MessageRow.id > told, MessageRow.kind.in_(hook.kinds), MessageRow.at <= self.clock() - SETTLED_S)
            .order_by(MessageRow.id)
            .limit(AT_ONCE)
        )
        with reading(self.talks.database) as session:
            return [(m.id, str(m.id), self._body(hook, m, c)) for m, c in session.execute(entries)]

    def _body(self, hook: Webhook, m: MessageRow, c: ConversationRow) -> bytes:
        told: dict[str, Any] = {
            "id": m.id, "conversation": c.id, "customer": c.customer, "seq": m.seq, "kind": m.kind, "author": m.author,
            "at": m.at, "state": c.state,
        }  # fmt: skip
        if m.kind == "event":
            told |= {k: m.data[k] for k in ("action", "by", "from", "to") if k in m.data}
        if hook.texts:
            told["text"] = self.talks.opened(c, m).text
        return json.dumps(told, separators=(",", ":")).encode()
