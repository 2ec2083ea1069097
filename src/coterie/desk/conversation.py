"""Conversations and all that may be done to them: a state machine with exactly one owner at any time.

Notable: an action is one transaction that locks the conversation's row, looks up the next state in `NEXT`, appends
what was said with the next number, and lets the database compare the version as it writes. So actions on one
conversation happen one after another, whoever does them and wherever they run. Handing over is an action, never a
phrase in a text; and what the bot finishes after a person took over becomes a suggestion in that same transaction.
"""

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from sqlalchemy import Engine, Table, bindparam, exists, insert, select
from sqlalchemy.orm import Session

from coterie.desk.message import (
    Changed,
    Conversation,
    Kind,
    Message,
    NoConversation,
    NotAllowed,
    State,
    Turn,
    check_key,
    clean,
)
from coterie.desk.record import SEALED, Record, Seal, Unseal, from_the_clear, in_the_clear, plain
from coterie.errors import CoterieError
from coterie.store.conversation import ConversationRow, MessageRow, RatingRow
from coterie.store.database import reading, writing
from coterie.store.procedure import RunRow
from coterie.store.webhook import HappeningRow

Action = Literal["say", "ask", "back", "hand_over", "take", "release", "snooze", "wake", "resolve"]
# What an action makes of a state. What is not here is not allowed.
NEXT: dict[tuple[State, Action], State] = {
    ("bot", "say"): "bot", ("waiting", "say"): "waiting", ("person", "say"): "person", ("snoozed", "say"): "person",
    ("resolved", "say"): "bot",
    ("bot", "ask"): "waiting", ("waiting", "ask"): "waiting", ("person", "ask"): "person", ("snoozed", "ask"): "person",
    ("resolved", "ask"): "waiting",
    ("bot", "back"): "bot", ("waiting", "back"): "bot", ("person", "back"): "bot", ("snoozed", "back"): "bot",
    ("resolved", "back"): "bot",
    ("bot", "hand_over"): "waiting",
    ("bot", "take"): "person", ("waiting", "take"): "person", ("person", "take"): "person",
    ("snoozed", "take"): "person", ("resolved", "take"): "person",
    ("person", "release"): "waiting", ("snoozed", "release"): "waiting",
    ("person", "snooze"): "snoozed", ("snoozed", "snooze"): "snoozed",
    ("snoozed", "wake"): "person",
    ("bot", "resolve"): "resolved", ("waiting", "resolve"): "resolved", ("person", "resolve"): "resolved",
    ("snoozed", "resolve"): "resolved",
}  # fmt: skip
LEASE_S = 15.0  # a worker says this often, or more so, that it is still at an answer
_APPROVING = exists().where(RunRow.conversation_id == ConversationRow.id, RunRow.status == "approving")
_SENT = select(MessageRow).where(
    MessageRow.conversation_id == bindparam("id"), MessageRow.author == bindparam("author"),
    MessageRow.client_key == bindparam("key"),
)  # fmt: skip
_APPEND = insert(cast(Table, MessageRow.__table__))
Outcome = Literal["sent", "suggested", "discarded"]


@dataclass(frozen=True)
class Handoff:
    """Why a person is needed, and what helps them: shown beside the conversation, never to the customer."""

    reason: str
    detail: str = ""
    summary: str = ""
    suggestion: str = ""
    evidence: tuple[dict[str, Any], ...] = ()
    confidence: float | None = None
    queue: str = "general"


class Beside(Protocol):
    """What else is under way in a conversation, and changes with it in the same transaction: procedures."""

    def left(self, session: Session, row: ConversationRow) -> str:
        """The bot does not own it any more. What a person must know; "" for nothing."""
        ...

    def decided(self, session: Session, conversation: str) -> bool:
        """Whether there is a decision that the bot has not acted on."""
        ...


# session, actor, action, customer, detail: writes into the audit log, in the transaction of the deed
Audited = Callable[[Session, str, str, str, Mapping[str, Any]], None]


def unaudited(_session: Session, _actor: str, _action: str, _customer: str, _detail: Mapping[str, Any]) -> None:
    """Without an audit log."""


class Conversations(Record):
    """All conversations of one business, in its database.

    seal, unseal: what encrypts a text under its customer's key. clock: seconds since 1970. told: called with a
    conversation's id after each change is in the database. audited: writes down what people at the desk do.
    """

    def __init__(
        self, database: Engine, seal: Seal = in_the_clear, unseal: Unseal = from_the_clear,
        clock: Callable[[], float] = time.time, told: Callable[[str], None] = lambda _: None,
        beside: Beside | None = None, audited: Audited = unaudited,
    ) -> None:  # fmt: skip
        super().__init__(database, unseal)
        self.seal, self.clock, self.told, self.beside, self.audited = seal, clock, told, beside, audited

    # What customers do

    def open(self, customer: str, channel: str = "web", key: str | None = None) -> Conversation:
        """Begin a conversation, with the bot. The same customer and `key` give the same one again."""
        with writing(self.database) as session:
            if check_key(key):
                same = select(ConversationRow).filter_by(customer=customer, client_key=key)
                if found := session.scalars(same).first():
                    return plain(found)
            now = self.clock()
            row = ConversationRow(
                id=uuid.uuid4().hex, customer=customer, channel=channel, state="bot", owner="bot", last_seq=0, turn=0,
                queue="general", reason="", opened_at=now, changed_at=now, client_key=key,
            )  # fmt: skip
            session.add(row)
            session.flush()
            opened = plain(row)
        self.told(opened.id)
        return opened

    def say(self, id: str, text: str, key: str | None = None, data: dict[str, Any] | None = None) -> Message:
        """The customer writes. What this has returned is kept; sent again with its key it is not doubled. `data`: of a
        button that they pressed."""
        text = clean(text)
        with self._act(id) as (session, row):
            if same := self._sent_before(session, row, "customer", key):
                return same
            self._move(session, row, "say", by="customer")
            if row.state == "bot":
                _owe(row)
            return self._append(session, row, "customer", "message", text, key, data)

    def ask_for_person(self, id: str, queue: str = "general") -> Conversation:
        """The customer wants a person. Does nothing where one is coming, or there, already."""
        with self._act(id) as (session, row):
            if row.state in ("bot", "resolved"):
                row.reason, row.queue = "asked_for_a_person", queue
            self._move(session, row, "ask", by="customer")
            return self._now(session, row)

    def back_to_bot(self, id: str, by: str = "customer") -> Conversation:
        """The customer, or the agent who owns it, gives the conversation to the bot, which answers what is open."""
        with self._act(id) as (session, row):
            if by != "customer":
                _must_own(row, by)
            if row.state != "bot":
                self._move(session, row, "back", by=by if by == "customer" else f"agent:{by}")
                if _open_question(session, row):
                    _owe(row)
            return self._now(session, row)

    def rate(self, id: str, seq: int, good: bool, reason: str = "") -> None:
        """The customer's thumb on a message of the bot or of a person. A second one replaces the first."""
        with writing(self.database) as session:
            row = self._row(session, id)
            of = select(MessageRow).filter_by(conversation_id=id, seq=seq, kind="message")
            rated = session.scalars(of).first()
            if rated is None or rated.author == "customer":
                raise NoConversation(f"conversation {id!r} has no answer {seq}")
            found = session.scalars(select(RatingRow).filter_by(conversation_id=id, seq=seq)).first()
            found = found or RatingRow(conversation_id=id, seq=seq)
            found.good, found.at = good, self.clock()
            found.reason = self.seal(row.customer, reason[:2000])
            session.add(found)
            session.add(HappeningRow(
                at=found.at, kind="rating", customer=row.customer, conversation_id=id, data={"seq": seq, "good": good},
            ))  # fmt: skip
        self.told(id)

    # What the bot does

    def claim(self, id: str) -> Turn | None:
        """The answer that the bot owes here, if it owes one that no other worker is at. Tell `hold` now and then."""
        with writing(self.database) as session:
            row, now = self._row(session, id), self.clock()
            if row.answering is None or (row.lease_until or 0) > now:
                return None
            row.lease_until = now + LEASE_S
            session.flush()
            messages = tuple(self._messages(session, row, ("message",)))
            return Turn(plain(row), row.answering, messages)

    def hold(self, turn: Turn) -> bool:
        """Say that the answer is still being worked on; False: it is no longer wanted."""
        with writing(self.database) as session:
            row = self._row(session, turn.conversation.id)
            if row.answering != turn.number:
                return False
            row.lease_until = self.clock() + LEASE_S
            return True

    def let_go(self, turn: Turn) -> None:
        """Leave the answer to whoever comes next; it is still owed."""
        with writing(self.database) as session:
            row = self._row(session, turn.conversation.id)
            if row.answering == turn.number:
                row.lease_until = None

    def finish(
        self, turn: Turn, text: str, data: dict[str, Any] | None = None, handoff: Handoff | None = None,
        keep: Callable[[Session], None] | None = None,
    ) -> Outcome:  # fmt: skip
        """End a turn with the bot's words, or with a handoff, or both, and do `keep` in the same transaction.

        Where a person owns the conversation by now the words become a suggestion; where the customer has written
        meanwhile, or the bot has been given the conversation anew, they are discarded.
        """
        with self._act(turn.conversation.id) as (session, row):
            if row.state == "bot" and row.answering == turn.number:
                if keep:
                    keep(session)
                row.answering = row.lease_until = None
                if text:
                    self._append(session, row, "bot", "message", text, f"turn:{turn.number}", data)
                if handoff:
                    row.reason, row.queue = handoff.reason[:200], handoff.queue
                    self._move(session, row, "hand_over", by="bot")
                    self._brief(session, row, handoff)
                elif self.beside and self.beside.decided(session, row.id):
                    _owe(row)
                return "sent"
            words = text or (handoff.suggestion if handoff else "")
            if row.state in ("waiting", "person", "snoozed") and row.turn == turn.number and words:
                self._append(session, row, "bot", "suggestion", words, f"turn:{turn.number}", data)
                return "suggested"
            return "discarded"

    def owed(self) -> list[str]:
        """Conversations with an answer under way that no worker is at: those of a process that has died, too."""
        with reading(self.database) as session:
            free = ConversationRow.lease_until.is_(None) | (ConversationRow.lease_until <= self.clock())
            wanted = select(ConversationRow.id).where(ConversationRow.answering.is_not(None), free)
            return list(session.scalars(wanted.order_by(ConversationRow.changed_at)))

    # What people do. `agent` is a name; `seen` the owner that they saw, where two may want the same thing at once

    def take(self, id: str, agent: str, seen: str | None = None) -> Conversation:
        """Own the conversation. Raises Changed where another took it since the agent saw its owner, `seen`."""
        return self.assign(id, agent, agent, seen)

    def assign(self, id: str, agent: str, to: str, seen: str | None = None) -> Conversation:
        """Give the conversation to an agent, whoever owns it."""
        _check_agent(to)
        with self._act(id) as (session, row):
            if seen not in (None, row.owner, f"agent:{to}"):
                raise Changed(f"conversation {id!r} has changed meanwhile: its owner is {row.owner} now")
            if row.owner != f"agent:{to}" or row.state != "person":
                self._move(session, row, "take", by=f"agent:{agent}", owner=f"agent:{to}")
            return self._now(session, row)

    def reply(self, id: str, agent: str, text: str, key: str | None = None) -> Message:
        """The agent who owns the conversation writes to the customer."""
        text = clean(text)
        with self._act(id) as (session, row):
            if same := self._sent_before(session, row, f"agent:{agent}", key):
                return same
            _must_own(row, agent)
            if row.state == "snoozed":
                self._move(session, row, "wake", by=f"agent:{agent}")
            if row.state != "person":
                raise NotAllowed(f"conversation {id!r} is {row.state}; take it before you reply")
            return self._append(session, row, f"agent:{agent}", "message", text, key)

    def note(self, id: str, agent: str, text: str, key: str | None = None) -> Message:
        """A private note, in any state; customers and models never see it."""
        text = clean(text)
        with self._act(id) as (session, row):
            same = self._sent_before(session, row, f"agent:{agent}", key)
            return same or self._append(session, row, f"agent:{agent}", "note", text, key)

    def decide(self, id: str, agent: str, what: Callable[[Session], None], note: str = "") -> None:
        """A person decides something for the bot, `what`, and the bot goes on. Raises NotAllowed where it may not."""
        with self._act(id) as (session, row):
            if row.state != "bot":
                raise NotAllowed(f"conversation {id!r} is {row.state}: the assistant does nothing in it now")
            what(session)
            if note:
                self._append(session, row, f"agent:{agent}", "note", clean(note))
            if row.answering is None:
                _owe(row)

    def release(self, id: str, agent: str, queue: str = "") -> Conversation:
        """Back to the queue that it came from, or to another one, for another person."""
        with self._act(id) as (session, row):
            _must_own(row, agent)
            row.queue = queue or row.queue
            self._move(session, row, "release", by=f"agent:{agent}")
            return self._now(session, row)

    def snooze(self, id: str, agent: str, until: float) -> Conversation:
        """Out of sight until then, or until the customer writes."""
        if until <= self.clock():
            raise CoterieError("until: must lie in the future")
        with self._act(id) as (session, row):
            _must_own(row, agent)
            self._move(session, row, "snooze", by=f"agent:{agent}", until=until)
            return self._now(session, row)

    def resolve(self, id: str, by: str) -> Conversation:
        """It is done; the customer's next message opens it again. `by`: an agent's name, "customer" or "system"."""
        with self._act(id) as (session, row):
            if row.state != "resolved":
                who = by if by in ("customer", "system") else f"agent:{by}"
                self._move(session, row, "resolve", by=who)
            return self._now(session, row)

    def pass_time(self, idle_s: float = 24 * 3600.0) -> list[str]:
        """Wake what was snoozed until now, and resolve what the bot answered and nobody wrote to for `idle_s`."""
        now, moved = self.clock(), list[str]()
        with reading(self.database) as session:
            due = session.scalars(select(ConversationRow.id).where(ConversationRow.wake_at <= now)).all()
            idle = session.scalars(
                select(ConversationRow.id).where(
                    ConversationRow.state == "bot", ConversationRow.answering.is_(None),
                    ConversationRow.last_seq > 0, ConversationRow.changed_at <= now - idle_s, ~_APPROVING,
                )
            ).all()  # fmt: skip
        for id, action in [(i, "wake") for i in due] + [(i, "resolve") for i in idle]:
            with self._act(id) as (session, row):
                still = row.wake_at is not None and row.wake_at <= now if action == "wake" else (
                    row.state == "bot" and row.answering is None and row.changed_at <= now - idle_s
                )  # fmt: skip
                if still:
                    self._move(session, row, cast(Action, action), by="system")
                    moved.append(id)
        return moved

    # How it is done

    @contextmanager
    def _act(self, id: str) -> Iterator[tuple[Session, ConversationRow]]:
        with writing(self.database) as session:
            yield session, self._row(session, id)
        self.told(id)

    def _move(
        self, session: Session, row: ConversationRow, action: Action, by: str, owner: str = "",
        until: float | None = None,
    ) -> None:  # fmt: skip
        """Into the next state, with its owner; writes down that it happened where something changed."""
        old_state, old_owner = cast(State, row.state), row.owner
        if (old_state, action) not in NEXT:
            raise NotAllowed(f"conversation {row.id!r} is {old_state}: it cannot be done now ({action})")
        row.state = NEXT[old_state, action]
        if row.state in ("bot", "waiting"):
            row.owner = "bot" if row.state == "bot" else "queue"
        elif owner:
            row.owner = owner
        elif row.owner == "queue":  # resolved while it waited
            row.owner = by if by.startswith("agent:") else "bot"
        row.wake_at = until
        if row.state != "bot":
            row.answering = row.lease_until = None
        if row.state != "waiting":
            row.waiting_since = None
        elif row.waiting_since is None:
            row.waiting_since = self.clock()
        if (row.state, row.owner) != (old_state, old_owner) or action == "snooze":
            facts = {"action": action, "by": by, "from": old_owner, "to": row.owner, "state": row.state}
            self._append(session, row, "system", "event", "", data=facts | ({"until": until} if until else {}))
        if old_state == "bot" and row.state != "bot" and self.beside and (known := self.beside.left(session, row)):
            about: dict[str, Any] = {
                "reason": row.reason or "procedure_left",
                "detail": known,
                "evidence": [],
                "confidence": None,
            }
            self._append(session, row, "bot", "note", "", data=about)

    def _brief(self, session: Session, row: ConversationRow, handoff: Handoff) -> None:
        """For the agent: why, in short what happened, what is known, and what could be said."""
        facts = {
            "reason": handoff.reason, "detail": handoff.detail, "evidence": list(handoff.evidence),
            "confidence": handoff.confidence,
        }  # fmt: skip
        self._append(session, row, "bot", "note", handoff.summary, data=facts)
        if handoff.suggestion:
            self._append(session, row, "bot", "suggestion", handoff.suggestion)

    def _append(
        self, session: Session, row: ConversationRow, author: str, kind: Kind, text: str, key: str | None = None,
        data: dict[str, Any] | None = None,
    ) -> Message:  # fmt: skip
        row.last_seq += 1
        row.changed_at = self.clock()
        message = Message(row.last_seq, author, kind, text, row.changed_at, data or {})
        entry = {
            "conversation_id": row.id, "seq": message.seq, "author": author, "kind": kind, "at": message.at,
            "data": self._data_kept(row.customer, kind, message.data),
            "body": self.seal(row.customer, text), "client_key": key,
        }  # fmt: skip
        session.connection().execute(_APPEND, entry)
        by = str(message.data.get("by", "")) if kind == "event" else author
        if by.startswith("agent:"):
            deed = message.data["action"] if kind == "event" else {"message": "reply"}.get(kind, kind)
            to = {"to": message.data["to"]} if deed == "take" else {}
            self.audited(session, by, f"conversation.{deed}", row.customer, {"id": row.id, "seq": message.seq} | to)
        return message

    def _sent_before(self, session: Session, row: ConversationRow, author: str, key: str | None) -> Message | None:
        if not check_key(key):
            return None
        found = session.scalars(_SENT, {"id": row.id, "author": author, "key": key}).first()
        return self.opened(row, found) if found else None

    def _data_kept(self, customer: str, kind: Kind, data: dict[str, Any]) -> dict[str, Any]:
        """What goes with a text is sealed as the text is: evidence may quote a customer's record. Events hold none."""
        if not data or kind == "event" or self.seal is in_the_clear:
            return data
        return {SEALED: base64.b64encode(self.seal(customer, json.dumps(data))).decode()}

    def _now(self, session: Session, row: ConversationRow) -> Conversation:
        session.flush()
        return plain(row)


def _owe(row: ConversationRow) -> None:
    """The bot owes an answer: a new turn, so that what is still being written for an older one is not wanted."""
    row.turn += 1
    row.answering, row.lease_until = row.turn, None


def _check_agent(name: str) -> None:
    if not 1 <= len(name) <= 100 or not name.isprintable():
        raise CoterieError("agent: a name of 1 to 100 printable characters")


def _must_own(row: ConversationRow, agent: str) -> None:
    if row.owner != f"agent:{agent}":
        raise NotAllowed(f"conversation {row.id!r} is not yours: its owner is {row.owner}")


def _open_question(session: Session, row: ConversationRow) -> bool:
    """Whether the customer spoke last."""
    said = select(MessageRow.author).filter_by(conversation_id=row.id, kind="message")
    return session.scalars(said.order_by(MessageRow.seq.desc()).limit(1)).first() == "customer"
