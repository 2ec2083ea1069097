"""A customer's rights: to everything about them, to be forgotten; how long things are kept; what they were told.

Notable: each room that holds customers' data gives a `Room`, three plain functions; whoever opens the house lists them.
Erasing destroys the customer's key first, so that even where a later step fails nothing can be read; then each room
deletes what it has. It may be run again until it succeeds.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from sqlalchemy import Engine, delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coterie.errors import CoterieError
from coterie.privacy.audit import Audit
from coterie.privacy.keys import Keys, check_customer
from coterie.privacy.tables import ConsentRow, WordingRow
from coterie.store.database import reading, writing

DAY_S = 86400.0
EXPIRED_AT_ONCE = 200  # that a room deletes in one transaction, which holds up who writes

Noted = Callable[[Session, int], None]


@dataclass(frozen=True)
class Room:
    """A place with customers' data. export: all of one customer, as JSON can hold it. erase: delete it, and say how
    much that was. expire: delete some of what is older than a time (seconds since 1970), call `Noted` in the same
    transaction with how much that was, and say it; 0: nothing is left that old."""

    name: str
    export: Callable[[str], Any]
    erase: Callable[[str], Any]
    expire: Callable[[float, Noted], int] | None = None


class NotErased(CoterieError):
    """Some room failed; what could be erased is erased, and the key is destroyed. Run it again. `done`: as
    `erase_customer` would have given it, said in the message too: run again, it finds only what was left."""

    exit_code = 1
    status = 500
    code = "not_erased"

    def __init__(self, customer: str, failed: Iterable[str], done: Mapping[str, Any]) -> None:
        told = json.dumps({name: what for name, what in done.items() if what}, ensure_ascii=False, default=str)
        super().__init__(f"customer {customer!r}: not erased from {'; '.join(failed)}; run it again (done: {told})")
        self.done = done


def export_customer(rooms: Iterable[Room], audit: Audit, customer: str, by: str) -> dict[str, Any]:
    """Everything about a customer, by room. The audit log says who exported it. Raises NoCustomer."""
    check_customer(customer)
    audit.record(by, "customer.export", customer)
    found = {room.name: room.export(customer) for room in rooms}
    return {"customer": customer, "exported_at": time.time(), **found, "audit": audit.export(customer)}


def erase_customer(rooms: Iterable[Room], keys: Keys, audit: Audit, customer: str, by: str) -> dict[str, Any]:
    """Forget a customer: what each room deleted. Raises NotErased, which names the rooms that failed; NoCustomer."""
    check_customer(customer)
    audit.record(by, "customer.erase", customer)  # before the deed: an attempt that fails is on record too
    done: dict[str, Any] = {"keys": keys.destroy(customer)}
    failed: list[str] = []
    for room in rooms:
        try:
            done[room.name] = room.erase(customer)
        except Exception as error:  # whatever it is, the other rooms go on
            failed.append(f"{room.name} ({type(error).__name__}: {error})")
    audit.record(by, "customer.erased", customer, failed=[f.split(" ")[0] for f in failed])
    if failed:
        raise NotErased(customer, failed, done)
    return done


def keep_only(
    rooms: Iterable[Room], days: Mapping[str, float], audit: Audit, now: float | None = None,
    hold: Callable[[Session], None] = lambda _: None,
) -> dict[str, int]:  # fmt: skip
    """Delete what is older than its room's days: how much, by room. Raises CoterieError: a rule that fits no room.

    Part by part, each with its line in the audit log in one transaction, which `hold` may refuse: whatever stops it
    midway, what is gone is on record, and what is not is still there.
    """
    by_name, now = check_rules(rooms, days), time.time() if now is None else now
    done: dict[str, int] = {}
    for name, limit in days.items():
        expire = by_name[name].expire
        assert expire, "checked above"

        def noted(session: Session, count: int, name: str = name, limit: float = limit) -> None:
            hold(session)
            audit.record_in(session, "retention", "retention", "", room=name, days=limit, deleted=count)

        done[name] = 0
        while part := expire(now - limit * DAY_S, noted):
            done[name] += part
    return done


def check_rules(rooms: Iterable[Room], days: Mapping[str, float]) -> dict[str, Room]:
    """The rooms by name. Raises CoterieError for a rule that fits none, or is no time."""
    by_name = {room.name: room for room in rooms}
    for name, limit in days.items():
        if name not in by_name or by_name[name].expire is None:
            can = ", ".join(sorted(n for n, r in by_name.items() if r.expire)) or "none"
            raise CoterieError(f"retention: {name!r} keeps nothing that expires; there are: {can}")
        if not limit > 0:
            raise CoterieError(f"retention: {name} = {limit}: days must be more than 0")
    return by_name


What = Literal["told", "agreed", "withdrawn"]


def check_what(said: str) -> What:
    """Raises CoterieError for what can not be recorded."""
    for what in get_args(What):
        if said == what:
            return cast(What, what)
    raise CoterieError(f"{said!r}: must be one of {', '.join(get_args(What))}")


def version_of(text: str, language: str = "") -> str:
    """Tells one wording from another: the beginning of its digest."""
    return _digest(text, language)[:12]


def _digest(text: str, language: str) -> str:
    return hashlib.sha256(f"{language}\n{text}".encode()).hexdigest()


@dataclass(frozen=True)
class Consents:
    """What customers were told and agreed to, in which words, in which language, and when."""

    database: Engine
    clock: Callable[[], float] = field(default=time.time)

    def record(self, customer: str, purpose: str, what: What, wording: str, language: str = "") -> None:
        """Add to the record; nothing of it is ever changed. `wording`: the text that they saw."""
        digest = self._kept(wording, language)
        with writing(self.database) as session:
            session.add(ConsentRow(customer=customer, purpose=purpose[:80], what=what, wording=digest,
                                   at=self.clock()))  # fmt: skip

    def tell(self, customer: str, purpose: str, wording: str, language: str = "", again_s: float = DAY_S) -> None:
        """They are shown this text now. Shown again within `again_s`, as a page that is loaded anew does, it is one."""
        query = select(ConsentRow).filter_by(customer=customer, purpose=purpose, what="told")
        with reading(self.database) as session:
            last = session.scalars(query.order_by(ConsentRow.id.desc()).limit(1)).first()
        if last is None or last.wording != _digest(wording, language) or last.at <= self.clock() - again_s:
            self.record(customer, purpose, "told", wording, language)

    def _kept(self, wording: str, language: str) -> str:
        """The digest of a text that is in the database."""
        digest = _digest(wording, language)
        with reading(self.database) as session:
            known = session.get(WordingRow, digest) is not None
        if not known:
            with suppress(IntegrityError), writing(self.database) as session:  # another process may do so as well
                session.add(WordingRow(digest=digest, text=wording, language=language[:40], since=self.clock()))
        return digest

    def agreed(self, customer: str, purpose: str) -> bool:
        """Whether the customer agrees now: the last word counts, and silence is no."""
        query = select(ConsentRow.what).where(
            ConsentRow.customer == customer, ConsentRow.purpose == purpose, ConsentRow.what != "told"
        )
        with reading(self.database) as session:
            return session.scalars(query.order_by(ConsentRow.id.desc()).limit(1)).first() == "agreed"

    def of(self, customer: str) -> list[dict[str, Any]]:
        """The whole record of a customer, the oldest first, with the texts as they stood."""
        query = (
            select(ConsentRow, WordingRow).outerjoin(WordingRow, WordingRow.digest == ConsentRow.wording)
            .where(ConsentRow.customer == customer).order_by(ConsentRow.id)
        )  # fmt: skip
        with reading(self.database) as session:
            return [
                {"purpose": r.purpose, "what": r.what, "at": r.at, "version": r.wording[:12],
                 "text": w.text if w else r.wording, "language": w.language if w else ""}
                for r, w in session.execute(query)
            ]  # fmt: skip

    def expire(self, before: float, noted: Noted) -> int:
        """Delete EXPIRED_AT_ONCE whole records whose last entry is older: who agreed there does no longer."""
        old = (
            select(ConsentRow.customer).group_by(ConsentRow.customer).having(func.max(ConsentRow.at) < before)
            .limit(EXPIRED_AT_ONCE)
        )  # fmt: skip
        with writing(self.database) as session:
            customers = session.scalars(old).all()
            if customers:
                of = ConsentRow.customer.in_(customers) & (ConsentRow.at < before)  # not what they say just now
                session.execute(delete(ConsentRow).where(of))
                noted(session, len(customers))
        return len(customers)

    def erase(self, customer: str) -> int:
        """Delete the record of a customer."""
        with writing(self.database) as session:
            found = len(session.scalars(select(ConsentRow.id).where(ConsentRow.customer == customer)).all())
            session.execute(delete(ConsentRow).where(ConsentRow.customer == customer))
        return found
