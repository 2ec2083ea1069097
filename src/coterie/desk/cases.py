"""Cases and notes in the CRM: what happens in a conversation, written down where the business keeps its customers.

Notable: nobody at the desk waits for it. Events of conversations fill an outbox in the database, and what is due there
is tried until it is in the CRM. The keys are made of the conversation and the entry, so a case that was opened just
before a crash, and is tried again, is found and not opened twice. A conversation has one case, whatever happens in it;
notes wait until it is open.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from coterie.config import CrmSpec
from coterie.desk import handoff
from coterie.desk.conversation import Conversations
from coterie.desk.crm import Case, Crm
from coterie.desk.message import Message
from coterie.errors import CrmError
from coterie.store.conversation import ConversationRow, MessageRow
from coterie.store.crm import CrmWriteRow
from coterie.store.database import reading, writing
from coterie.store.mail import MailboxRow

MARK, NOTED_BY = "crm", "crm"
SETTLED_S = 1.0  # as in webhook.py: a younger entry may still be joined by one with a lower id
CLAIM_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, GIVE_UP_S = 300.0, 30.0, 3600.0, 4 * 24 * 3600.0
AT_ONCE = 100
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
    """Writes to a CRM by the rules of its declaration. `told`: puts each writing into the audit log."""

    def __init__(
        self, crm: Crm, spec: CrmSpec, talks: Conversations, told: Told = _untold,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.crm, self.spec, self.talks, self.told, self.clock = crm, spec, talks, told, clock

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
            mark = session.get(MailboxRow, MARK, with_for_update=True)
            if mark is None:  # what happens from now on
                newest = session.scalar(select(func.max(MessageRow.id))) or 0
                session.add(MailboxRow(name=MARK, validity=0, uid=newest, since=self.clock()))
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
                    error="", written="", at=self.clock(),
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
                        row.state, row.error = "failed", "its case could not be opened"
                    if opened.state != "sent":
                        continue
                    case = opened.written
                row.next_at, row.tries = self.clock() + CLAIM_S, row.tries + 1
                return self._told_of(session, row, case)
        return None

    def _told_of(self, session: Session, row: CrmWriteRow, case: str) -> _Write:
        c, event = session.get(ConversationRow, row.conversation_id), session.get(MessageRow, row.message_id)
        assert c, "a foreign key"
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
        with writing(self.talks.database) as session:
            row = session.get(CrmWriteRow, write.id)
            if row is None:  # its conversation was deleted meanwhile
                return not problem
            gone = forever or self.clock() - row.at > GIVE_UP_S
            row.state = "failed" if problem and gone else "due" if problem else "sent"
            row.error, row.written = problem.partition(":")[0][:300], written[:200]  # no word of the customer
            pause = min(FIRST_PAUSE_S * 2.0 ** min(row.tries - 1, 20), LONGEST_PAUSE_S)
            row.next_at = self.clock() + pause if problem else 0.0
            if not problem or gone:
                detail = {"conversation": write.conversation, "entry": write.seq, "state": row.state, "id": written}
                self.told(session, "coterie", f"crm.{write.kind}", write.customer, detail)
            first = row.tries == 1
        if problem:
            log.warning("CRM: entry %d was not written: %s", write.id, problem.partition(":")[0])
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


def _when(event: Mapping[str, Any]) -> When | None:
    """Which rule's event this is: the conversation came to people, or it is done."""
    if event.get("state") == "resolved":
        return "resolved"
    came = event.get("action") in ("hand_over", "ask") or (event.get("action") == "take" and event.get("from") == "bot")
    return "handoff" if came else None


def standing(talks: Conversations, customer: str = "") -> list[dict[str, Any]]:
    """What was written and what is not yet, oldest first; of one customer where that is given."""
    wanted = select(CrmWriteRow).order_by(CrmWriteRow.message_id)
    if customer:
        wanted = wanted.join(ConversationRow, ConversationRow.id == CrmWriteRow.conversation_id)
        wanted = wanted.where(ConversationRow.customer == customer)
    with reading(talks.database) as session:
        return [
            {"conversation": r.conversation_id, "kind": r.kind, "state": r.state, "tries": r.tries,
             "id": r.written, "error": r.error} for r in session.scalars(wanted)
        ]  # fmt: skip
