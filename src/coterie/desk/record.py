"""What is kept of conversations, read: as they stand, what was said in them, and how many there are of which kind.

Notable: nothing here changes anything. Texts are unsealed as they are read, so what is looked for in them is looked for
here and not in the database.
"""

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, cast

from sqlalchemy import Engine, Row, bindparam, func, select
from sqlalchemy.orm import Session

from coterie.desk.message import Conversation, Kind, Message, NoConversation, State
from coterie.store.conversation import ConversationRow, MessageRow, RatingRow
from coterie.store.database import reading

PUBLIC = ("message", "event")
AT_ONCE = 5000  # messages that a search looks through in one go
SEALED = "sealed"  # the only field of data that is
# What each message asks for many times: built once, and read as columns, which takes a third of the time of objects.
_FIELDS = [getattr(ConversationRow, f.name) for f in fields(Conversation)]
_STANDS = select(*_FIELDS).where(ConversationRow.id == bindparam("id"))
_ROW = select(ConversationRow).where(ConversationRow.id == bindparam("id")).with_for_update()
_ENTRIES = (
    select(MessageRow.seq, MessageRow.author, MessageRow.kind, MessageRow.body, MessageRow.at, MessageRow.data)
    .where(
        MessageRow.conversation_id == bindparam("id"), MessageRow.seq > bindparam("after"),
        MessageRow.kind.in_(bindparam("kinds", expanding=True)),
    ).order_by(MessageRow.seq)
)  # fmt: skip
_DISLIKED = (
    select(RatingRow.seq, RatingRow.reason, ConversationRow.customer)
    .join(ConversationRow, ConversationRow.id == RatingRow.conversation_id)
    .where(RatingRow.conversation_id == bindparam("id"), RatingRow.good.is_(False))
)
Seal = Callable[[str, str], bytes]  # customer, text -> what is kept
Unseal = Callable[[str, bytes], str]


def in_the_clear(_customer: str, text: str) -> bytes:
    """The seal of a business without encryption at rest."""
    return text.encode()


def from_the_clear(_customer: str, kept: bytes) -> str:
    return kept.decode()


class Record:
    """All conversations of one business, in its database. unseal: what decrypts a text of its customer's."""

    def __init__(self, database: Engine, unseal: Unseal = from_the_clear) -> None:
        self.database, self.unseal = database, unseal

    def get(self, id: str, customer: str | None = None) -> Conversation:
        """As it stands. Raises NoConversation; also where it is another customer's, and `customer` is given."""
        with reading(self.database) as session:
            found = self._stands(session, id)
        if customer not in (None, found.customer):
            raise _none(id)
        return found

    def messages(self, id: str, after: int = 0, kinds: Sequence[str] = PUBLIC) -> list[Message]:
        """Entries numbered above `after`, in order; by default those that the customer may see."""
        return self.since(id, after, kinds)[1]

    def since(self, id: str, after: int, kinds: Sequence[str] = PUBLIC) -> tuple[Conversation, list[Message]]:
        """A conversation as it stands, and its entries numbered above `after`, in order."""
        with reading(self.database) as session:
            stands = self._stands(session, id)
            return stands, list(self._messages(session, stands, kinds, after))

    def listed(
        self, states: Sequence[State] = (), owner: str = "", customer: str = "", limit: int = 200, queue: str = ""
    ) -> list[Conversation]:
        """Conversations, those that wait longest first, then the latest changed."""
        wanted = select(ConversationRow).order_by(
            func.coalesce(ConversationRow.waiting_since, 9e12), ConversationRow.changed_at.desc()
        )
        if states:
            wanted = wanted.where(ConversationRow.state.in_(states))
        if owner:
            wanted = wanted.where(ConversationRow.owner == owner)
        if customer:
            wanted = wanted.where(ConversationRow.customer == customer)
        if queue:
            wanted = wanted.where(ConversationRow.queue == queue)
        with reading(self.database) as session:
            return [plain(row) for row in session.scalars(wanted.limit(limit))]

    def search(
        self, words: str, before: int | None = None, at_once: int = AT_ONCE, limit: int = 50
    ) -> tuple[list[tuple[Conversation, Message]], int | None]:
        """The newest message of each conversation that holds all `words`, among `at_once` messages: the newest ones, or
        those `before` one. And from where to go on; None: there is nothing older.

        Texts are sealed in the database, so they are opened here and looked through.
        """
        wanted = [w.casefold() for w in words.split()]
        found: dict[str, tuple[Conversation, Message]] = {}
        with reading(self.database) as session:
            pairs = (
                select(MessageRow, ConversationRow)
                .join(ConversationRow, ConversationRow.id == MessageRow.conversation_id)
                .where(MessageRow.kind != "event")
            )
            if before is not None:
                pairs = pairs.where(MessageRow.id < before)
            looked = 0
            for message, row in session.execute(pairs.order_by(MessageRow.id.desc()).limit(at_once)):
                looked, before = looked + 1, message.id
                if row.id in found:
                    continue
                opened = self.opened(row, message)
                text = f"{opened.text} {row.customer}".casefold()
                if all(w in text for w in wanted):
                    found[row.id] = (plain(row), opened)
                    if len(found) == limit:
                        break
        return list(found.values()), before if looked == at_once or len(found) == limit else None

    def last_messages(self, ids: Sequence[str]) -> dict[str, Message]:
        """The latest message of each of these conversations."""
        newest = (
            select(func.max(MessageRow.id)).where(MessageRow.conversation_id.in_(ids), MessageRow.kind == "message")
            .group_by(MessageRow.conversation_id)
        )  # fmt: skip
        pairs = (
            select(MessageRow, ConversationRow).join(ConversationRow, ConversationRow.id == MessageRow.conversation_id)
            .where(MessageRow.id.in_(newest))
        )  # fmt: skip
        with reading(self.database) as session:
            return {row.id: self.opened(row, message) for message, row in session.execute(pairs)}

    def reasons(self, since: float) -> dict[str, int]:
        """Why conversations that changed since then were handed over, the last time for each; commonest first."""
        grouped = (
            select(ConversationRow.reason, func.count()).where(
                ConversationRow.reason != "", ConversationRow.changed_at >= since
            ).group_by(ConversationRow.reason).order_by(func.count().desc())
        )  # fmt: skip
        with reading(self.database) as session:
            return {reason: int(n) for reason, n in session.execute(grouped)}

    def ratings(self, since: float) -> dict[str, int]:
        """Thumbs since then: how many up and how many down."""
        with reading(self.database) as session:
            grouped = select(RatingRow.good, func.count()).where(RatingRow.at >= since).group_by(RatingRow.good)
            found = {bool(good): int(n) for good, n in session.execute(grouped)}
        return {"up": found.get(True, 0), "down": found.get(False, 0)}

    def counts(self) -> dict[str, int]:
        """How many conversations are in each state."""
        with reading(self.database) as session:
            grouped = select(ConversationRow.state, func.count()).group_by(ConversationRow.state)
            return {state: int(n) for state, n in session.execute(grouped)}

    def queues(self) -> dict[str, int]:
        """How many conversations wait in each queue."""
        with reading(self.database) as session:
            waiting = select(ConversationRow.queue, func.count()).where(ConversationRow.state == "waiting")
            return {queue: int(n) for queue, n in session.execute(waiting.group_by(ConversationRow.queue))}

    def owners(self) -> list[str]:
        """The names of all agents who own a conversation that is not resolved."""
        with reading(self.database) as session:
            held = ConversationRow.state.in_(("person", "snoozed"))  # few, and found by the index
            owned = select(ConversationRow.owner).where(held).distinct()
            return [owner.partition(":")[2] for owner in session.scalars(owned)]

    def disliked(self, id: str) -> dict[int, str]:
        """The messages that the customer put a thumb down on, and the reasons they gave."""
        with reading(self.database) as session:
            found = session.execute(_DISLIKED, {"id": id}).all()
        return {seq: self.unseal(customer, reason) for seq, reason, customer in found}

    def _messages(
        self, session: Session, of: Conversation | ConversationRow, kinds: Sequence[str], after: int = 0
    ) -> Iterator[Message]:
        wanted = {"id": of.id, "after": after, "kinds": list(kinds)}
        return (self.opened(of, m) for m in session.execute(_ENTRIES, wanted).all())

    def opened(self, row: Conversation | ConversationRow, m: MessageRow | Row[Any]) -> Message:
        """An entry with its text unsealed."""
        data = m.data
        if SEALED in data:
            data = json.loads(self.unseal(row.customer, base64.b64decode(data[SEALED])))
        return Message(m.seq, m.author, cast(Kind, m.kind), self.unseal(row.customer, m.body), m.at, data)

    def _stands(self, session: Session, id: str) -> Conversation:
        found = session.execute(_STANDS, {"id": id}).first()
        if found is None:
            raise _none(id)
        return Conversation(*found)

    def _row(self, session: Session, id: str) -> ConversationRow:
        """Locked, to be changed."""
        row = session.scalars(_ROW, {"id": id}).first()
        if row is None:
            raise _none(id)
        return row


def _none(id: str) -> NoConversation:
    return NoConversation(f"there is no conversation {id!r}")


def plain(row: ConversationRow) -> Conversation:
    return Conversation(**{f.name: getattr(row, f.name) for f in fields(Conversation)})
