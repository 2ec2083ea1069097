"""E-mail as a channel of the desk: a mail becomes a message of its conversation, and what is answered goes out.

Notable: taking a mail is a row of steps of which each, done twice, is done once: its conversation is opened and its
words are said under a key that is the mail's own mark. So a process may die anywhere, the mail is fetched again, and
nothing is lost or doubled. A conversation is found by a signed token in our address and our Message-IDs, or by the
Message-ID of another mail in it, never by subject; and only where the mail is of that conversation's customer.

Who the customer is: an address that our own mail server has verified, where `identify` says so; any other sender is a
name made of a keyed hash of the address, that no record is found for. Answers go to the address that the conversation
is with, never to one that a mail asks for.
"""

import base64
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from coterie.config import EmailSpec
from coterie.desk.attachment import Attachments
from coterie.desk.conversation import Conversations
from coterie.desk.message import LONGEST, Message, clean
from coterie.desk.mime import Incoming, read_mail
from coterie.errors import CoterieError, StorageError
from coterie.privacy.deidentify import Detector
from coterie.privacy.house import House
from coterie.privacy.vault import Vault, loggable
from coterie.store.conversation import ConversationRow, MessageRow
from coterie.store.database import reading, writing
from coterie.store.mail import OUT, MailboxRow, MailRow, OutboxRow

CHANNEL, NOTED_BY = "email", "e-mail"
SETTLED_S = 1.0  # as in webhook.py: a younger entry may still be joined by one with a lower id
CLAIM_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, GIVE_UP_S = 300.0, 30.0, 3600.0, 4 * 24 * 3600.0
AT_ONCE = 100
_TOKEN = re.compile(r"[a-z2-7]{42}")
_OURS = re.compile(r"<?([a-z2-7]{42})\.(\d{1,9})@")
Taken = Literal["new", "continued", "noted", "ignored", "again", "unread"]
Send = Callable[[EmailMessage, str, str], None]  # mail, from, to; raises Refused, OSError
log = logging.getLogger(__name__)


class Refused(Exception):
    """The server will not take a mail, now or later (a status of 500 and above)."""


@dataclass(frozen=True)
class _Letter:
    """An entry that goes out, and what it answers."""

    entry: Message
    conversation: str
    customer: str
    first: bool  # of the assistant's in this conversation: begins with the disclosure
    answers: dict[str, Any]


class MailDesk:
    """Takes mails in and sends answers. `send`: hands one mail to the mail server. `wake`: told where one was taken."""

    def __init__(
        self, spec: EmailSpec, house: House, talks: Conversations, send: Send, disclosure: str = "", business: str = "",
        wake: Callable[[str], None] = lambda _: None, clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.spec, self.house, self.talks, self.send, self.wake, self.clock = spec, house, talks, send, wake, clock
        self.disclosure, self.shown = disclosure, spec.name or business
        self.files = Attachments(house)
        self._secret = house.keys.secret("coterie:mail")
        self._vault = Vault(Detector(), house.database, house.keys)

    # Coming in

    def take(self, raw: bytes, cut: bool = False) -> Taken:
        """One mail, whole or only its beginning. Raises StorageError and the database's own errors: then fetch it
        again; a mail that cannot be used is told in the log and left alone."""
        try:
            mail = read_mail(raw, self.spec.authserv)
            mark = self._hash("mail", mail.message_id, mail.sender, mail.text, mail.quoted)
        except Exception:
            log.exception("a mail could not be taken apart; it stays in its folder")
            return "unread"
        with reading(self.house.database) as session:
            if session.get(MailRow, mark):
                return "again"
        try:
            done, id = self._take(mail, mark, cut)
        except (DBAPIError, StorageError, OSError):
            raise
        except Exception:
            log.exception("a mail could not be taken; it stays in its folder")
            done, id = "unread", None
        with writing(self.house.database) as session:
            session.add(MailRow(
                mark=mark, message_id=self._hash("id", mail.message_id), sender=self._of(mail), conversation_id=id,
                kind="unread" if done == "unread" else mail.kind, at=self.clock(),
            ))  # fmt: skip
        if id and done in ("new", "continued"):
            self.wake(id)
        return done

    def _take(self, mail: Incoming, mark: str, cut: bool) -> tuple[Taken, str | None]:
        if mail.kind == "bounce":
            return self._bounced(mail, mark)
        if mail.sender == self.spec.address or not mail.sender:
            return "ignored", None
        customer = self.customer(mail)
        id, wants_person = self._thread(mail, customer)
        if mail.kind == "automatic":  # an absence notice is worth knowing; answering it would begin a loop
            if id:
                self.talks.note(id, NOTED_BY, f"An automatic reply came: {_some(mail)}", f"mail:{mark[:70]}")
            return ("noted", id) if id else ("ignored", None)
        done: Taken = "continued" if id else "new"
        c = self.talks.get(id) if id else self.talks.open(customer, CHANNEL, f"mail:{mark[:70]}")
        files = self.files.keep(c.customer, c.id, mark, mail.files, self.clock())
        about = {"from": mail.sender, "name": mail.name, "subject": mail.subject, "id": mail.message_id,
                 "references": list(mail.answers[:20]), "verified": mail.verified, "cut": cut}  # fmt: skip
        data = {"email": about, "files": files, "quoted": mail.quoted[:LONGEST]}
        self.talks.say(c.id, _words(mail), f"mail:{mark[:70]}", data)
        if wants_person or self._too_many(mail):
            self.talks.ask_for_person(c.id)
        return done, c.id

    def customer(self, mail: Incoming) -> str:
        """Who it is from, as the desk names customers."""
        return mail.sender if self.spec.identify and mail.verified else "mail:" + self._of(mail)[:24]

    def _thread(self, mail: Incoming, customer: str) -> tuple[str | None, bool]:
        """The conversation that the mail belongs to, if it is this customer's; whether it asks for a person."""
        name, _, host = self.spec.address.lower().partition("@")
        found, person = list[str](), False
        for address in mail.to:
            local, _, at = address.partition("@")
            token = local.removeprefix(name + "+")
            if at == host and token != local:
                id = self.opened(token.removesuffix("-person"))
                found += [id] if id else []
                person = person or bool(id and token.endswith("-person"))
        found += [id for m in mail.answers if (ours := _OURS.match(m)) and (id := self.opened(ours[1]))]
        others = [self._hash("id", m) for m in mail.answers[:50]]
        with reading(self.house.database) as session:
            if others:
                named = (
                    select(MailRow.conversation_id).where(MailRow.message_id.in_(others)).order_by(MailRow.at.desc())
                )
                found += [id for id in session.scalars(named) if id]
            for id in found:
                row = session.get(ConversationRow, id)
                if row is not None and row.customer == customer:
                    return id, person
        return None, False

    def _too_many(self, mail: Incoming) -> bool:
        """Whether this sender writes more often than people do: then no program answers it."""
        since = self.clock() - 3600
        with reading(self.house.database) as session:
            of = select(func.count()).select_from(MailRow).where(MailRow.sender == self._of(mail), MailRow.at > since)
            return (session.scalar(of) or 0) >= self.spec.per_hour

    def _bounced(self, mail: Incoming, mark: str) -> tuple[Taken, str | None]:
        """A report that a mail of ours was not delivered: noted where it can be told which."""
        report = b"\n".join(f.body for f in mail.files).decode("utf-8", "replace")[:200_000]
        for found in _OURS.finditer(report + mail.quoted + mail.text):
            id = self.opened(found[1])
            if id is None:
                continue
            codes = [re.search(rf"(?im)^{name}:\s*(.{{1,200}})", report) for name in ("Diagnostic-Code", "Status")]
            why = next((code[1].strip() for code in codes if code), _some(mail))
            if re.search(r"(?im)^Action:\s*(delayed|relayed|delivered|expanded)", report):
                return "ignored", None
            error = self._loggable(self.talks.get(id).customer, why)
            with writing(self.house.database) as session:
                row = session.scalars(
                    select(OutboxRow).join(MessageRow, MessageRow.id == OutboxRow.message_id)
                    .where(MessageRow.conversation_id == id, MessageRow.seq == int(found[2]))
                ).first()  # fmt: skip
                if row is None:
                    continue
                row.state, row.error = "bounced", error[:300]
            said = f"Message {found[2]} was not delivered: {why}"
            self.talks.note(id, NOTED_BY, said, f"mail:{mark[:70]}")
            return "noted", id
        return "ignored", None

    # Going out

    def send_due(self) -> int:
        """Fill the outbox with what was said since, then send what is due; how many went out."""
        self._fill()
        sent = 0
        for _ in range(AT_ONCE):
            letter = self._claim()
            if letter is None:
                break
            sent += self._send(*letter)
        return sent

    def _fill(self) -> None:
        with writing(self.house.database) as session:
            mark = session.get(MailboxRow, OUT, with_for_update=True)
            if mark is None:
                mark = MailboxRow(name=OUT, validity=0, uid=0, since=self.clock())
                session.add(mark)
            entries = (
                select(MessageRow.id, MessageRow.conversation_id, MessageRow.kind, MessageRow.author, MessageRow.data,
                       ConversationRow.channel)
                .join(ConversationRow, ConversationRow.id == MessageRow.conversation_id)
                .where(MessageRow.id > mark.uid, MessageRow.at <= self.clock() - SETTLED_S)
                .order_by(MessageRow.id).limit(5000)
            )  # fmt: skip
            for id, conversation, kind, author, data, channel in session.execute(entries):
                mark.uid = id
                called = kind == "event" and data.get("action") == "hand_over" and self.spec.handed_over
                if channel == CHANNEL and ((kind == "message" and author != "customer") or called):
                    row = OutboxRow(message_id=id, conversation_id=conversation, state="due", tries=0, error="")
                    row.next_at, row.at = 0.0, self.clock()
                    session.add(row)

    def _claim(self) -> tuple[int, _Letter] | None:
        """The next letter that is due; nobody else takes it for CLAIM_S."""
        with writing(self.house.database) as session:
            due = select(OutboxRow).where(OutboxRow.state == "due", OutboxRow.next_at <= self.clock())
            due = due.order_by(OutboxRow.message_id).limit(AT_ONCE).with_for_update(skip_locked=True)
            for row in session.scalars(due):
                if letter := self._letter(session, row):
                    row.next_at, row.tries = self.clock() + CLAIM_S, row.tries + 1
                    return row.message_id, letter
                row.state, row.error = "failed", "no mail of the customer is left to answer"
        return None

    def _letter(self, session: Session, row: OutboxRow) -> _Letter | None:
        c, m = session.get(ConversationRow, row.conversation_id), session.get(MessageRow, row.message_id)
        assert c, "a foreign key"
        assert m, "a foreign key"
        mine = select(MessageRow).where(MessageRow.conversation_id == c.id, MessageRow.kind == "message")
        asked = mine.where(MessageRow.author == "customer", MessageRow.seq <= m.seq).order_by(MessageRow.seq.desc())
        told = mine.where(MessageRow.author == "bot", MessageRow.seq < m.seq)
        for said in session.scalars(asked.limit(20)):
            if about := self.talks.opened(c, said).data.get("email"):
                first = m.author in ("bot", "system") and session.scalars(told.limit(1)).first() is None
                return _Letter(self.talks.opened(c, m), c.id, c.customer, first, about)
        return None

    def _send(self, row: int, letter: _Letter) -> int:
        problem, forever = "", False
        try:
            self.send(self.letter(letter), self._address(letter.conversation), letter.answers["from"])
        except Refused as error:
            problem, forever = str(error), True
        except OSError as error:  # smtplib's errors are, too
            problem = str(error) or type(error).__name__
        shown = self._loggable(letter.customer, problem, letter.answers) if problem else ""
        with writing(self.house.database) as session:
            out = session.get(OutboxRow, row)
            if out is None:
                return 0
            gone = forever or self.clock() - out.at > GIVE_UP_S
            out.state = "failed" if problem and gone else "due" if problem else "sent"
            out.error = shown[:300]
            pause = min(FIRST_PAUSE_S * 2.0 ** min(out.tries, 20), LONGEST_PAUSE_S)
            out.next_at = self.clock() + pause if problem else 0.0
        if problem:
            log.warning("e-mail: entry %d was not sent: %s", row, shown)
            if gone:
                said = f"Message {letter.entry.seq} could not be sent: {problem[:300]}"
                self.talks.note(letter.conversation, NOTED_BY, said, f"out:{row}")
        return 0 if problem else 1

    def _loggable(self, customer: str, said: str, about: Mapping[str, Any] = {}) -> str:
        """What a mail server said, without the address and the name of whom it speaks."""
        known = {"email": [customer, about.get("from", "")], "name": [about.get("name", "")]}
        return loggable(lambda c, texts, _: self._vault.mask(c, texts, known), customer, said)

    def letter(self, letter: _Letter) -> EmailMessage:
        """The mail as it goes out. Its Message-ID is the entry's, the same however often it is tried."""
        entry, asked, token = letter.entry, letter.answers, self.token(letter.conversation)
        host = self.spec.address.partition("@")[2]
        by_program = not entry.author.startswith("agent:")
        mail = EmailMessage(SMTP)
        mail["From"] = Address(self.shown, addr_spec=self.spec.address)
        mail["To"] = asked["from"]
        subject = " ".join(asked["subject"].split()) or "Your message"
        mail["Subject"] = subject if re.match(r"(?i)re\s*:", subject) else f"Re: {subject}"
        mail["Date"] = format_datetime(datetime.fromtimestamp(entry.at, UTC))
        mail["Message-ID"] = f"<{token}.{entry.seq}@{host}>"
        chain = [m for m in [*reversed(asked["references"]), asked["id"]] if re.fullmatch(r"[\x21-\x7e]{1,500}", m)]
        if asked["id"] and chain:
            mail["In-Reply-To"] = f"<{chain[-1]}>"
        if chain:
            mail["References"] = " ".join(f"<{m}>" for m in dict.fromkeys(chain))
        if self.spec.plus:
            mail["Reply-To"] = Address(self.shown, addr_spec=self._address(letter.conversation))
        if by_program:
            mail["Auto-Submitted"] = "auto-replied"
            mail["X-Auto-Response-Suppress"] = "All"
        mail.set_content(self._text(letter, by_program))
        return mail

    def _text(self, letter: _Letter, by_program: bool) -> str:
        entry = letter.entry
        if entry.kind == "event":
            return self.spec.handed_over + "\n"
        parts = [self.disclosure] if letter.first and self.disclosure else []
        parts.append(entry.text)
        if by_program and self.spec.plus:
            parts.append(f"-- \nTo write to a person: {self._address(letter.conversation, '-person')}")
        elif not by_program:
            parts.append(f"-- \n{entry.author.partition(':')[2]}, {self.shown}")
        return "\n\n".join(parts) + "\n"

    def _address(self, conversation: str, suffix: str = "") -> str:
        name, _, host = self.spec.address.partition("@")
        return f"{name}+{self.token(conversation)}{suffix}@{host}" if self.spec.plus else self.spec.address

    # Names that say nothing and cannot be made up

    def token(self, conversation: str) -> str:
        """A conversation's id and our signature, in letters that survive any mail server: 16 and 10 bytes."""
        id = bytes.fromhex(conversation)
        return base64.b32encode(id + self._sign(id)).decode().rstrip("=").lower()

    def opened(self, token: str) -> str | None:
        """The conversation of a token that is ours."""
        if not _TOKEN.fullmatch(token):
            return None
        raw = base64.b32decode(token.upper() + "=" * (-len(token) % 8))
        return raw[:16].hex() if hmac.compare_digest(raw[16:], self._sign(raw[:16])) else None

    def _sign(self, id: bytes) -> bytes:
        return hmac.new(self._secret, b"token" + id, hashlib.sha256).digest()[:10]

    def _of(self, mail: Incoming) -> str:
        return self._hash("sender", mail.sender)

    def _hash(self, what: str, *parts: str) -> str:
        said = "\0".join((what, *parts)).encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, said, hashlib.sha256).hexdigest()


def _words(mail: Incoming) -> str:
    """What the mail says, as a message may be; too long a text is cut, and what it holds beside words is named."""
    text = mail.text.encode("utf-8", "replace").decode()
    if mail.subject and not mail.answers:
        text = f"{mail.subject}\n\n{text}"
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    try:
        return clean(text)
    except CoterieError:
        names = ", ".join(f.name for f in mail.files)
        return f"(a mail without words{': ' + names if names else ''})"[:LONGEST]


def _some(mail: Incoming) -> str:
    try:
        return clean(f"{mail.subject}\n{mail.text[:500]}")
    except CoterieError:
        return "no words"
