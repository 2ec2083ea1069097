"""Tables of the desk: conversations, what was said in them, and what visitors thought of it.

Notable: what must never happen is refused by the database itself, whatever a program does. A state has exactly one
kind of owner; an answer is owed by the bot only while the bot owns; messages are numbered without doubles; a client's
key is used once; and a trigger (migration 0001) lets nobody but the customer and the owner speak.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    CheckConstraint,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    UniqueConstraint,
    func,
    select,
)
from sqlalchemy.orm import Mapped, Session, mapped_column

from coterie.store.base import Base

OWNED = (
    "(state = 'bot' AND owner = 'bot') OR (state = 'waiting' AND owner = 'queue')"
    " OR (state IN ('person', 'snoozed') AND owner LIKE 'agent:_%')"
    " OR (state = 'resolved' AND (owner = 'bot' OR owner LIKE 'agent:_%'))"
)


class ConversationRow(Base):
    """One conversation. Times are seconds since 1970."""

    __tablename__ = "conversations"
    __table_args__ = (
        CheckConstraint(OWNED, name="one_owner"),
        CheckConstraint("answering IS NULL OR state = 'bot'", name="bot_answers_what_it_owns"),
        CheckConstraint("(state = 'snoozed') = (wake_at IS NOT NULL)", name="snoozed_wakes"),
        UniqueConstraint("customer", "client_key"),
        Index(None, "state", "changed_at"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    customer: Mapped[str] = mapped_column(String(200), index=True)
    channel: Mapped[str] = mapped_column(String(40))
    state: Mapped[str] = mapped_column(String(16))
    owner: Mapped[str] = mapped_column(String(200))
    version: Mapped[int] = mapped_column()
    last_seq: Mapped[int]
    turn: Mapped[int]  # of the customer: each of their messages to the bot begins one
    answering: Mapped[int | None]  # the turn that the bot owes an answer to
    lease_until: Mapped[float | None] = mapped_column(Float)  # a worker is at it until then
    wake_at: Mapped[float | None] = mapped_column(Float)
    waiting_since: Mapped[float | None] = mapped_column(Float)
    queue: Mapped[str] = mapped_column(String(80))
    reason: Mapped[str] = mapped_column(String(200))  # why it was last handed over
    opened_at: Mapped[float] = mapped_column(Float)
    changed_at: Mapped[float] = mapped_column(Float)
    client_key: Mapped[str | None] = mapped_column(String(80))

    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012, SQLAlchemy reads it: every UPDATE compares and sets


class MessageRow(Base):
    """One entry of a conversation: something said, a private note, a suggested reply, or an event."""

    __tablename__ = "messages"
    __table_args__ = (
        UniqueConstraint("conversation_id", "seq"),
        UniqueConstraint("conversation_id", "author", "client_key"),
        CheckConstraint("kind IN ('message', 'note', 'suggestion', 'event')", name="kind"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id"))
    seq: Mapped[int]
    author: Mapped[str] = mapped_column(String(200))  # "customer", "bot", "agent:NAME" or "system"
    kind: Mapped[str] = mapped_column(String(16))
    body: Mapped[bytes] = mapped_column(LargeBinary)  # sealed
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    at: Mapped[float] = mapped_column(Float)
    client_key: Mapped[str | None] = mapped_column(String(80))


def newest_entry(session: Session) -> int:
    """The id of the newest entry of all conversations; 0 where there is none."""
    return session.scalar(select(func.max(MessageRow.id))) or 0


class RatingRow(Base):
    """A visitor's thumb on one message, with the reason they gave (sealed)."""

    __tablename__ = "ratings"
    __table_args__ = (UniqueConstraint("conversation_id", "seq"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id"))
    seq: Mapped[int]
    good: Mapped[bool]
    reason: Mapped[bytes] = mapped_column(LargeBinary)
    at: Mapped[float] = mapped_column(Float)
