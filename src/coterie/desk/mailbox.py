"""The lines to the mail servers: a folder read by IMAP, letters handed over by SMTP, and the task that does both.

Notable: how far the folder was read is kept by UID in the database, not in the folder's flags, so that people may read
it too; and it moves on only after a mail was taken. The first look begins with what comes from then on. A password
crosses no network in the clear.
"""

import imaplib
import logging
import os
import smtplib
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from email.message import EmailMessage
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from imap_tools import BaseMailBox, MailBox, MailBoxStartTls, MailBoxUnencrypted
from imap_tools.errors import ImapToolsError

from coterie.config import EmailSpec
from coterie.desk.conversation import Conversations
from coterie.desk.mail import MailDesk, Refused
from coterie.errors import CoterieError
from coterie.privacy.house import House
from coterie.store.database import writing
from coterie.store.mail import MailboxRow

if TYPE_CHECKING:  # it loads torch
    from coterie.business import Business

TIMEOUT_S = 30.0
BEGINNING = 300_000  # bytes of a mail that is too large
SEND_S = 2.0  # between two looks at the outbox
LONGEST_REST_S = 600.0
PORTS = {"imaps": 993, "imap+starttls": 143, "imap": 143, "smtps": 465, "smtp+starttls": 587, "smtp": 25}
log = logging.getLogger(__name__)


class MailError(CoterieError):
    """A mail server that cannot be reached, or refuses us."""

    status = 502
    code = "mail_unavailable"


@dataclass(frozen=True)
class Server:
    """Where, and how the line is secured: "imaps", "imap+starttls", "imap", and the same of smtp."""

    scheme: str
    host: str
    port: int


def server_of(url: str, field: str) -> Server:
    """Raises CoterieError for what is no address, and for a password in the clear to another machine."""
    try:
        parts = urlsplit(url)
        found = Server(parts.scheme, parts.hostname or "", parts.port or PORTS[parts.scheme])
    except (ValueError, KeyError) as error:
        raise CoterieError(f"desk.email.{field}: {url!r} is no address such as {field}s://mail.example") from error
    if not found.host or parts.username or parts.path.strip("/"):
        raise CoterieError(f"desk.email.{field}: {url!r} must be a host, such as {field}s://mail.example")
    if found.scheme in ("imap", "smtp") and found.host not in ("localhost", "127.0.0.1", "::1"):
        raise CoterieError(f"desk.email.{field}: {url!r} would send the password in the clear; use {field}s:// or "
                           f"{field}+starttls://")  # fmt: skip
    return found


def password_of(spec: EmailSpec) -> str:
    """Raises CoterieError where it is not in the environment."""
    found = os.environ.get(spec.password_env, "")
    if not found:
        raise CoterieError(f"desk.email: the environment has no {spec.password_env}, the password of {spec.address}")
    return found


class Post:
    """Hands letters to the SMTP server, each on a line of its own."""

    def __init__(self, spec: EmailSpec) -> None:
        self.spec, self.server, self.password = spec, server_of(spec.smtp, "smtp"), password_of(spec)

    def __call__(self, mail: EmailMessage, sender: str, to: str) -> None:
        """Raises Refused for what the server will never take, OSError (smtplib's errors are) for what it may later."""
        try:
            with self._line() as line:
                if line.has_extn("auth"):
                    line.login(self.spec.user or self.spec.address, self.password)
                line.send_message(mail, sender, [to])
        except smtplib.SMTPRecipientsRefused as error:
            code, said = next(iter(error.recipients.values()))
            raise (Refused if code >= 500 else OSError)(f"{code} {_words(said)}") from error
        except smtplib.SMTPAuthenticationError:
            raise  # of the password, not of this letter: it may be mended
        except (smtplib.SMTPSenderRefused, smtplib.SMTPDataError) as error:
            kind = Refused if error.smtp_code >= 500 else OSError
            raise kind(f"{error.smtp_code} {_words(error.smtp_error)}") from error

    def _line(self) -> smtplib.SMTP:
        s, context = self.server, ssl.create_default_context()
        line: smtplib.SMTP
        if s.scheme == "smtps":
            line = smtplib.SMTP_SSL(s.host, s.port, timeout=TIMEOUT_S, context=context)
        else:
            line = smtplib.SMTP(s.host, s.port, timeout=TIMEOUT_S)
        try:
            if s.scheme == "smtp+starttls":
                line.starttls(context=context)
            line.ehlo_or_helo_if_needed()  # only now is it known whether the server wants us to sign in
        except BaseException:
            line.close()
            raise
        return line


def _words(said: bytes | str) -> str:
    return said if isinstance(said, str) else said.decode("utf-8", "replace")


class Folder:
    """A line to the folder. Raises MailError, OSError, imaplib's errors."""

    def __init__(self, spec: EmailSpec) -> None:
        s, context = server_of(spec.imap, "imap"), ssl.create_default_context()
        self.spec = spec
        self.box: BaseMailBox
        try:
            if s.scheme == "imaps":
                self.box = MailBox(s.host, s.port, TIMEOUT_S, ssl_context=context)
            elif s.scheme == "imap+starttls":
                self.box = MailBoxStartTls(s.host, s.port, TIMEOUT_S, ssl_context=context)
            else:
                self.box = MailBoxUnencrypted(s.host, s.port, TIMEOUT_S)
            self.box.login(spec.user or spec.address, password_of(spec), spec.folder)
            self.box.folder.set(spec.folder, readonly=True)
            _, capabilities = self.box.client.capability()
        except ImapToolsError as error:
            who = spec.user or spec.address
            raise MailError(f"desk.email: {s.host} does not let {who} at {spec.folder!r}: {error}") from error
        self.idles = b"IDLE" in b" ".join(capabilities).upper().split()

    def state(self) -> tuple[int, int]:
        """UIDVALIDITY and UIDNEXT."""
        found = self.box.folder.status(self.spec.folder, ["UIDVALIDITY", "UIDNEXT"])
        return int(found["UIDVALIDITY"]), int(found["UIDNEXT"])

    def uids(self, after: int, since: float) -> list[int]:
        """Of mails above `after`; where that is 0, of those that arrived since a time (the day of it)."""
        asked = [f"UID {after + 1}:*"] if after else ["SINCE", time.strftime("%d-%b-%Y", time.gmtime(since - 86400))]
        status, data = self.box.client.uid("SEARCH", *asked)
        if status != "OK":
            raise MailError(f"desk.email: the folder cannot be searched: {data!r}")
        found = sorted(int(n) for n in (data[0] or b"").split())
        return [n for n in found if n > after]

    def fetch(self, uid: int) -> tuple[bytes, float, bool] | None:
        """A mail, when it arrived, and whether this is only its beginning; None where it has gone."""
        facts = self._fetch(uid, "(RFC822.SIZE INTERNALDATE)")
        if facts is None:
            return None
        head = facts[0]
        size = int(head.upper().partition(b"RFC822.SIZE ")[2].split(b" ")[0].rstrip(b")") or 0)
        arrived = imaplib.Internaldate2tuple(head)
        cut = size > self.spec.most_mib * 2**20
        body = self._fetch(uid, f"(BODY.PEEK[]<0.{BEGINNING}>)" if cut else "(BODY.PEEK[])")
        return None if body is None else (body[1], time.mktime(arrived) if arrived else 0.0, cut)

    def _fetch(self, uid: int, what: str) -> tuple[bytes, bytes] | None:
        status, data = self.box.client.uid("FETCH", str(uid), what)
        if status != "OK":
            raise MailError(f"desk.email: mail {uid} cannot be fetched: {data!r}")
        for part in data:  # a server may tell of flags in between, unasked
            head, body = part if isinstance(part, tuple) else (part, b"")
            if head and (b"RFC822.SIZE" in head.upper() or b"BODY[]" in head.upper()):
                return bytes(head), bytes(body)
        return None

    def wait(self, seconds: float, over: threading.Event) -> None:
        """Until something comes, where the server tells; else, and at most, so long."""
        until = time.monotonic() + min(seconds, 1500.0)  # servers end a silent line after 29 minutes
        if not self.idles:
            over.wait(max(0.0, until - time.monotonic()))
            return
        with self.box.idle as idle:
            while not over.is_set() and time.monotonic() < until:
                if idle.poll(timeout=1.0):
                    return

    def close(self) -> None:
        try:
            self.box.logout()
        except (OSError, imaplib.IMAP4.error, ImapToolsError):
            log.debug("the mail server had hung up")


def take_new(desk: MailDesk, folder: Folder) -> dict[str, int]:
    """Take what came to the folder since the last look: how many mails, by what became of them."""
    name = f"{desk.spec.imap} {desk.spec.user or desk.spec.address} {desk.spec.folder}"[:500]
    validity, following = folder.state()
    with writing(desk.house.database) as session:
        mark = session.get(MailboxRow, name)
        if mark is None:
            mark = MailboxRow(name=name, validity=validity, uid=following - 1, since=desk.clock())
            session.add(mark)
        elif mark.validity != validity:  # the server has numbered its mails anew: what was taken is known by its mark
            mark.validity, mark.uid = validity, 0
        after, since = mark.uid, mark.since
    done: dict[str, int] = {}
    for uid in folder.uids(after, since):
        found = folder.fetch(uid)
        if found and (after or found[1] >= since - 60):
            became = desk.take(found[0], found[2])
            done[became] = done.get(became, 0) + 1
        with writing(desk.house.database) as session:
            mark = session.get(MailboxRow, name)
            if mark and mark.validity == validity:
                mark.uid = max(mark.uid, uid)
    return done


class MailTask:
    """Both ways, in two threads, until `close`. `wake`: see MailDesk."""

    def __init__(self, desk: MailDesk) -> None:
        server_of(desk.spec.imap, "imap")
        self.desk, self._over = desk, threading.Event()
        self._threads = [
            threading.Thread(target=self._again_and_again, args=(run,), name=name, daemon=True)
            for name, run in (("mail-in", self._read), ("mail-out", self._write))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(5.0)

    def _again_and_again(self, run: Callable[[], Iterator[None]]) -> None:
        rest = 1.0
        while not self._over.is_set():
            try:
                for _ in run():
                    rest = 1.0
                    if self._over.is_set():
                        return
            except (OSError, imaplib.IMAP4.error, ImapToolsError, CoterieError) as error:
                log.warning("e-mail: %s; trying again in %.0f s", error, rest)
            except Exception:
                log.exception("e-mail: a fault of ours; trying again in %.0f s", rest)
            self._over.wait(rest)
            rest = min(2 * rest, LONGEST_REST_S)

    def _read(self) -> Iterator[None]:
        with closing(Folder(self.desk.spec)) as folder:
            while True:
                take_new(self.desk, folder)
                yield
                folder.wait(self.desk.spec.poll_s, self._over)

    def _write(self) -> Iterator[None]:
        while True:
            self.desk.send_due()
            yield
            self._over.wait(SEND_S)


def open_mail(
    business: "Business", house: House, talks: Conversations, wake: Callable[[str], None] = lambda _: None
) -> MailDesk:
    """The channel as the business declares it. Raises CoterieError for what cannot be used, before anything is sent."""
    spec = business.config.desk.email
    assert spec, "the caller has looked"
    server_of(spec.imap, "imap")
    desk, named = business.config.desk, business.config.business.name
    return MailDesk(spec, house, talks, Post(spec), desk.disclosure, named, wake, talks.clock)
