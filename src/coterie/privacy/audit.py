"""The audit log: who saw, changed, exported, erased what. A chain of lines, each linked to the one before.

Notable: a line's link is a hash over the line and the link before it, keyed where a key is given: whoever can write to
the database but lacks the key cannot make a chain that verifies. Lines cut off at the end leave a chain that
is whole, so note the head (`coterie audit head`) elsewhere now and then, and verify against it. Lines name accounts and
customers by id and never hold what somebody said: they outlive an erasure.
Source: Schneier and Kelsey 1999, "Secure audit logs to support computer forensics", section 4.
"""

import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from coterie.errors import CoterieError
from coterie.privacy.tables import AuditRow
from coterie.store.database import reading, writing

START = bytes(32)  # what the first line is linked to
OF_ACCOUNTS = {"account", "login", "logout", "token", "second_factor", "invitation"}  # what such actions begin with
PAGE = 1000  # lines read at once
LOCK = 0x61756469  # of PostgreSQL: one line at a time


class Tampered(CoterieError):
    """The audit log is not as it was written."""

    exit_code = 1
    status = 500
    code = "audit_tampered"


@dataclass(frozen=True)
class Line:
    """One line. `link` in hex."""

    seq: int
    at: float
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]
    link: str


class Audit:
    """The log in one database."""

    def __init__(self, database: Engine, key: bytes = b"", clock: Callable[[], float] = time.time) -> None:
        self.database, self.clock = database, clock
        self._key = key

    def record(self, actor: str, action: str, subject: str = "", **detail: Any) -> None:
        """Add a line, in a transaction of its own."""
        with writing(self.database) as session:
            self.record_in(session, actor, action, subject, **detail)

    def record_all(self, actor: str, lines: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        """Add several lines (action, subject, detail) in one transaction of their own."""
        with writing(self.database) as session:
            self._add(session, actor, lines)

    def record_in(self, session: Session, actor: str, action: str, subject: str = "", **detail: Any) -> None:
        """Add a line to a transaction that writes: the deed and its line are both kept, or neither."""
        self._add(session, actor, [(action, subject, detail)])

    def _add(self, session: Session, actor: str, lines: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
        if session.get_bind().dialect.name == "postgresql":
            session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
        last = session.scalars(select(AuditRow).order_by(AuditRow.seq.desc()).limit(1)).first()
        (before, link), now = (last.seq, last.link) if last else (0, START), round(self.clock(), 6)
        for seq, (action, subject, detail) in enumerate(lines, before + 1):
            row = AuditRow(
                seq=seq, at=now, actor=actor[:200], action=action[:80], subject=subject[:200],
                detail=json.dumps(detail, sort_keys=True, ensure_ascii=False),
            )  # fmt: skip
            row.link = link = self._link(row, link)
            session.add(row)
        session.flush()

    def _link(self, row: AuditRow, before: bytes) -> bytes:
        parts = [row.seq, repr(row.at), row.actor, row.action, row.subject, row.detail]
        line = json.dumps(parts, ensure_ascii=False, separators=(",", ":")).encode()
        if self._key:
            return hmac.new(self._key, before + line, hashlib.sha256).digest()
        return hashlib.sha256(before + line).digest()

    def verify(self, head: str = "") -> tuple[int, str]:
        """Walk the chain. The number of lines and the last link; `head`, one noted earlier, must be on the way.

        Raises Tampered, which names the first line that is wrong.
        """
        before, count, seen = START, 0, head in ("", START.hex())
        for row in self._rows():
            if row.seq != count + 1:
                raise Tampered(f"audit log: line {count + 1} is missing; lines were deleted")
            if not hmac.compare_digest(row.link, self._link(row, before)):
                raise Tampered(
                    f"audit log: line {row.seq} is not as it was written, or was written under another master key"
                )
            before, count = row.link, row.seq
            seen = seen or row.link.hex() == head
        if not seen:
            raise Tampered(
                f"audit log: no line has the link {head[:16]}... that was noted: lines were cut off or redone"
            )
        return count, before.hex()

    def head(self) -> str:
        """The last link, in hex: to be noted where nobody can change it."""
        with reading(self.database) as session:
            link = session.scalars(select(AuditRow.link).order_by(AuditRow.seq.desc()).limit(1)).first()
        return (link or START).hex()

    def lines(self, subject: str = "", actor: str = "", limit: int = 100) -> list[Line]:
        """The newest lines, the last first, of a subject or an actor or all."""
        query = select(AuditRow).order_by(AuditRow.seq.desc()).limit(limit)
        query = query.where(AuditRow.subject == subject) if subject else query
        query = query.where(AuditRow.actor == actor) if actor else query
        with reading(self.database) as session:
            return [
                Line(r.seq, r.at, r.actor, r.action, r.subject, json.loads(r.detail), r.link.hex())
                for r in session.scalars(query)
            ]

    def export(self, customer: str) -> list[dict[str, Any]]:
        """Every line about a customer, the oldest first; none about an account that happens to be named like them."""
        found = reversed(self.lines(subject=customer, limit=1_000_000))
        return [asdict(line) for line in found if line.action.partition(".")[0] not in OF_ACCOUNTS]

    def _rows(self) -> Iterator[AuditRow]:
        last = -(2**31)
        with reading(self.database) as session:
            while rows := session.scalars(
                select(AuditRow).where(AuditRow.seq > last).order_by(AuditRow.seq).limit(PAGE)
            ).all():
                yield from rows
                last = rows[-1].seq
                session.expunge_all()
