"""Cases and notes in the CRM: what happens in a conversation, written down where the business keeps its customers.

Notable: nobody at the desk waits for it. Events of conversations fill an outbox in the database, and what is due there
is tried until it is in the CRM. The keys are made of the conversation and the entry, so a case that was opened just
before a crash, and is tried again, is found and not opened twice. A conversation has one case, whatever happens in it;
notes wait until it is open.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from coterie.config import CrmSpec
from coterie.desk import handoff
from coterie.desk.conversation import Conversations
from coterie.desk.crm import Case, Crm
from coterie.desk.message import Message
from coterie.errors import CoterieError, CrmError
from coterie.privacy.keys import Erased
from coterie.privacy.vault import Masking, as_it_is, loggable
from coterie.store.conversation import ConversationRow, MessageRow, newest_entry
from coterie.store.crm import CrmWriteRow
from coterie.store.database import reading, writing
from coterie.store.mail import CRM, MailboxRow

NOTED_BY = "crm"
SETTLED_S = 1.0  # as in webhook.py: a younger entry may still be joined by one with a lower id
CLAIM_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, GIVE_UP_S = 300.0, 30.0, 3600.0, 4 * 24 * 3600.0
AT_ONCE = 100
STATES = ("due", "sent", "failed")
When = Literal["handoff", "resolved"]
Told = Callable[[Session, str, str, str, Mapping[str, Any]], None]  # session, actor, action, customer, detail
log = logging.getLogger(__name__)


def _untold(_session: Session, _actor: str, _action: str, _customer: str, _detail: Mapping[str, Any]) -> None:
    """Without an audit log."""


@dataclass(frozen=True)
class _Write:
    """A row that was claimed, with all that the CRM is to be told."""

    id: int
    kind: str
    conversation: str
    customer: str
    seq: int
    case: str  # the CRM's id of the conversation's case, for a note
    subject: str
    text: str


class Cases:
    """Writes to a CRM by the rules of its declaration. `told`: puts each writing into the audit log. `mask`: hides what
    is private in a CRM's complaint, which may quote the customer, before it is listed or logged."""

    def __init__(
        self, crm: Crm, spec: CrmSpec, talks: Conversations, told: Told = _untold,
        clock: Callable[[], float] = time.time, mask: Masking = as_it_is,
    ) -> None:  # fmt: skip
        self.crm, self.spec, self.talks, self.told, self.clock, self.mask = crm, spec, talks, told, clock, mask

    def write_due(self) -> int:
        """Fill the outbox with what happened since, then write what is due; how many were written.

        After a failure the rest waits for the next call: a CRM that is down is not asked for each of them.
        """
        self._fill()
        done = 0
        while done < AT_ONCE and (write := self._claim()):
            if not self._write(write):
                break
            done += 1
        return done

    def _fill(self) -> None:
        with writing(self.talks.database) as session:
            mark = session.get(MailboxRow, CRM, with_for_update=True)
            if mark is None:  # what happens from now on
                session.add(MailboxRow(name=CRM, validity=0, uid=newest_entry(session), since=self.clock()))
                return
            events = (
                select(MessageRow.id, MessageRow.conversation_id, MessageRow.kind, MessageRow.data)
                .where(MessageRow.id > mark.uid, MessageRow.at <= self.clock() - SETTLED_S)
                .order_by(MessageRow.id).limit(5000)
            )  # fmt: skip
            for id, conversation, kind, data in session.execute(events):
                mark.uid = id
                when = _when(data) if kind == "event" else None
                if when is None:
                    continue
                of = select(CrmWriteRow.message_id).filter_by(conversation_id=conversation, kind="case").limit(1)
                has_case = session.scalars(of).first() is not None
                if when in self.spec.case_on and not has_case:
                    what = "case"
                elif when in self.spec.note_on and has_case:
                    what = "note"
                else:
                    continue
                session.add(CrmWriteRow(
                    message_id=id, conversation_id=conversation, kind=what, state="due", tries=0, next_at=0.0,
                    written="", at=self.clock(),
                ))  # fmt: skip
                session.flush()

    def _claim(self) -> _Write | None:
        """The next that is due; nobody else takes it for CLAIM_S. Notes wait for their case, and end with it."""
        with writing(self.talks.database) as session:
            due = select(CrmWriteRow).where(CrmWriteRow.state == "due", CrmWriteRow.next_at <= self.clock())
            due = due.order_by(CrmWriteRow.message_id).limit(AT_ONCE).with_for_update(skip_locked=True)
            for row in session.scalars(due):
                case = ""
                if row.kind == "note":
                    of = select(CrmWriteRow).filter_by(conversation_id=row.conversation_id, kind="case")
                    opened = session.scalars(of).one()
                    if opened.state == "failed":
                        row.state = "failed"
                        row.reason = self.talks.seal(_talk(session, row).customer, "its case could not be opened")
                    if opened.state != "sent":
                        continue
                    case = opened.written
                row.next_at, row.tries = self.clock() + CLAIM_S, row.tries + 1
                try:
                    return self._told_of(session, row, case)
                except Erased:  # half of an erasure that is to be run again: others' cases do not wait for it
                    row.state, row.reason = "failed", None
        return None

    def _told_of(self, session: Session, row: CrmWriteRow, case: str) -> _Write:
        c, event = _talk(session, row), session.get(MessageRow, row.message_id)
        assert event, "a foreign key"
        said = select(MessageRow).where(
            MessageRow.conversation_id == c.id, MessageRow.kind == "message", MessageRow.seq < event.seq
        )
        messages = [self.talks.opened(c, m) for m in session.scalars(said.order_by(MessageRow.seq))]
        asked = [m for m in messages if m.author == "customer"]
        subject = " ".join(asked[0].text.split())[:120] if asked else f"Conversation by {c.channel}"
        return _Write(
            row.message_id, row.kind, c.id, c.customer, event.seq, case, subject, self._text(c, event.data, messages)
        )

    def _text(self, c: ConversationRow, event: Mapping[str, Any], messages: list[Message]) -> str:
        by = str(event.get("by", "")).removeprefix("agent:")
        if event.get("state") == "resolved":
            parts = [f"Resolved by {by}."]
            answered = [m for m in messages if m.author != "customer"]
            parts += [f"Last answer: {handoff.summary_of(answered[-1].text)}"] if answered else []
        else:
            parts = [f"Handed over by {by}" + (f": {c.reason}." if c.reason else ".")]
        if words := handoff.summary(messages):
            parts.append(f"The customer wrote:\n{words}")
        if self.spec.link:
            parts.append(f"{self.spec.link.rstrip('/')}/desk#c={c.id}")
        return "\n\n".join(parts)

    def _write(self, write: _Write) -> bool:
        """Into the CRM, and what became of it into the outbox, the audit log and a note for the agent."""
        written, problem, forever = "", "", False
        try:
            if write.kind == "note":
                written = self.crm.write_note(write.case, write.text, f"{write.conversation}-{write.seq}")
            elif contact := self.crm.find(write.customer):
                written = self.crm.open_case(contact, Case(write.subject, write.text, write.conversation))
            else:
                problem, forever = "the CRM knows no such customer", True
        except CrmError as error:
            problem = str(error)
        except Exception as error:  # another's library: whatever it raises, the outbox goes on
            problem = f"the CRM failed: {type(error).__name__}"
        reason = loggable(self.mask, write.customer, problem) if problem else ""
        with writing(self.talks.database) as session:
            row = session.get(CrmWriteRow, write.id)
            if row is None:  # its conversation was deleted meanwhile, or it was dropped
                if written:  # the one place that still says what is to be deleted in the CRM
                    detail = {"conversation": write.conversation, "entry": write.seq, "state": "sent", "id": written}
                    self.told(session, "coterie", f"crm.{write.kind}", write.customer, detail)
                return not problem
            gone = forever or self.clock() - row.at > GIVE_UP_S
            row.state = "failed" if problem and gone else "due" if problem else "sent"
            row.reason = self.talks.seal(write.customer, reason[:1000]) if reason else None
            row.written = written[:200]
            pause = min(FIRST_PAUSE_S * 2.0 ** min(row.tries - 1, 20), LONGEST_PAUSE_S)
            row.next_at = self.clock() + pause if problem else 0.0
            if not problem or gone:
                detail = {"conversation": write.conversation, "entry": write.seq, "state": row.state, "id": written}
                self.told(session, "coterie", f"crm.{write.kind}", write.customer, detail)
            first = row.tries == 1
        if problem:
            log.warning(
                "CRM: entry %d was not written: %s", write.id, reason.partition(":")[0]
            )  # no word of the customer
        self._say(write, written, problem, gone, first)
        return not problem or forever

    def _say(self, write: _Write, written: str, problem: str, gone: bool, first: bool) -> None:
        """To the agent, once for each outcome."""
        what = "case was not opened" if write.kind == "case" else "note was not written"
        if problem and gone:
            said, outcome = f"The CRM's {what}: {problem}", "failed"
        elif problem:
            said, outcome = f"The CRM's {what} yet; it is tried again: {problem}", "later"
            if not first:
                return
        elif write.kind == "case":
            said, outcome = f"A case was opened in the CRM: {written}", "sent"
        else:
            return
        self.talks.note(write.conversation, NOTED_BY, said[:1000], f"crm:{write.id}:{outcome}")


def _talk(session: Session, row: CrmWriteRow) -> ConversationRow:
    found = session.get(ConversationRow, row.conversation_id)
    assert found, "a foreign key"
    return found


def _when(event: Mapping[str, Any]) -> When | None:
    """Which rule's event this is: the conversation came to people, or it is done."""
    if event.get("state") == "resolved":
        return "resolved"
    came = event.get("action") in ("hand_over", "ask") or (event.get("action") == "take" and event.get("from") == "bot")
    return "handoff" if came else None


def standing(talks: Conversations, customer: str = "", states: Sequence[str] = STATES) -> list[dict[str, Any]]:
    """What was written and what is not yet, oldest first; of one customer where that is given."""
    of = ConversationRow.id == CrmWriteRow.conversation_id
    wanted = select(CrmWriteRow, ConversationRow.customer).join(ConversationRow, of)
    wanted = wanted.where(CrmWriteRow.state.in_(states)).order_by(CrmWriteRow.message_id)
    if customer:
        wanted = wanted.where(ConversationRow.customer == customer)
    with reading(talks.database) as session:
        return [
            {"entry": r.message_id, "conversation": r.conversation_id, "kind": r.kind, "state": r.state,
             "tries": r.tries, "next_at": r.next_at, "id": r.written,
             "reason": _reason(talks, whose, r.reason)} for r, whose in session.execute(wanted)
        ]  # fmt: skip


def _reason(talks: Conversations, customer: str, kept: bytes | None) -> str:
    try:
        return talks.unseal(customer, kept) if kept else ""
    except Erased:  # what hangs on the row is still to be listed, and deleted
        return "its customer was erased"


def retry(talks: Conversations, entry: int | None, now: float, told: Told, by: str) -> list[int]:
    """Have an entry, or with None all that wait or failed, tried anew from now on, with all that was not written of the
    same conversation, as notes go where their case is; which. Raises CoterieError for an entry that is not there, or
    written already."""
    with writing(talks.database) as session:
        only = None if entry is None else _row(session, entry).conversation_id
        rows = [r for r in _unwritten(session) if only in (None, r.conversation_id)]
        for row in rows:
            row.state, row.next_at, row.tries, row.at = "due", 0.0, 0, now
            _tell_of(session, told, by, "crm.retry", row)
        return [r.message_id for r in rows]


def drop(talks: Conversations, entry: int, told: Told, by: str) -> list[int]:
    """Give an entry up: it is written to the CRM no more. A case takes the notes with it that wait for it; which.
    Raises CoterieError for an entry that is not there, or written already."""
    with writing(talks.database) as session:
        row = _row(session, entry)
        rows = [row]
        if row.kind == "case":
            rows = [r for r in _unwritten(session) if r.conversation_id == row.conversation_id]
        for row in rows:
            _tell_of(session, told, by, "crm.drop", row)
            session.delete(row)
        return [r.message_id for r in rows]


def _unwritten(session: Session) -> list[CrmWriteRow]:
    wanted = select(CrmWriteRow).where(CrmWriteRow.state != "sent").order_by(CrmWriteRow.message_id)
    return list(session.scalars(wanted.with_for_update()))


def _row(session: Session, entry: int) -> CrmWriteRow:
    row = session.get(CrmWriteRow, entry, with_for_update=True)
    if row is None:
        raise CoterieError(f"the outbox of the CRM has no entry {entry}; `coterie desk crm list` prints those it has")
    if row.state == "sent":
        raise CoterieError(f"entry {entry} is in the CRM already, as {row.written}; change it there")
    return row


def _tell_of(session: Session, told: Told, by: str, action: str, row: CrmWriteRow) -> None:
    detail = {"conversation": row.conversation_id, "entry": row.message_id, "kind": row.kind, "state": row.state}
    told(session, by, action, _talk(session, row).customer, detail)
