"""Encryption at rest: each customer's data under a key of its own, wrapped by the master key.

Notable: destroying a customer's key makes all that was sealed under it unreadable, in the database, its log and every
copy of them; so keys live in a database of their own (`keys.db`), which need not be in each backup. That also lets a
first key be made in the middle of another transaction. The house's own keys lie beside them under names that begin with
RESERVED, which nothing takes for a customer's: erasing one cannot break the audit log. Sealed bytes: version of the
form (1), version of the key (4), nonce (12), AES-256-GCM of the text; customer and purpose are authenticated, so
nothing opens in another's name.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import ColumnElement, Engine, func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coterie.errors import CoterieError
from coterie.privacy.master import NONCE, KeyLost, MasterKey
from coterie.privacy.tables import KeyRow, MasterRow
from coterie.recent import Recent
from coterie.store.database import reading, writing

FORM = b"\x01"
HEADER = 1 + 4 + NONCE  # bytes before the encrypted text
PROOF = b"this is the right master key"
RESERVED = "coterie:"  # how the names of keys begin that are no customer's
ERASED = "coterie:erased"  # whose secret hashes the ids of customers whose keys are destroyed
RETIRED_S = 3600.0  # until a key that nobody seals with any more may be destroyed: far longer than KEPT_S
PAGE = 500  # customers at once
KEPT = 4096  # open keys in memory, 1 KiB each: a search of the desk opens those of the newest 5,000 messages
KEPT_S = 60.0  # seconds until another process's destruction is noticed
ROTATED = "the master key was rotated while this was running; start it again with the new one"


class Erased(CoterieError):
    """The customer was erased: the key is destroyed, and what was sealed under it is gone for good."""

    status = 410
    code = "erased"


class NoCustomer(CoterieError):
    """A customer's id that is a name of the house's own."""

    code = "invalid_customer"


def check_customer(customer: str) -> None:
    """Raises NoCustomer."""
    if customer.startswith(RESERVED):
        raise NoCustomer(f"customer {customer!r}: ids that begin with {RESERVED!r} are the house's own")


class Unreadable(CoterieError):
    """Sealed bytes that were changed, cut short, or are somebody else's."""

    status = 500
    code = "unreadable"


@dataclass(frozen=True)
class _Open:
    """A key unwrapped. Its cipher is made at each use, in 2 µs: one that is kept holds 3 KiB of OpenSSL's."""

    version: int
    key: bytes = field(repr=False)

    def cipher(self) -> AESGCM:
        return AESGCM(self.key)


class Keys:
    """The keys of all customers. Safe to use from several threads and processes."""

    def __init__(self, database: Engine, master: MasterKey, clock: Callable[[], float] = time.time) -> None:
        """Raises KeyLost, and writes nothing, where the database belongs to another master key."""
        self.database, self.master, self.clock = database, master, clock
        self._open = Recent[tuple[str, int], _Open](KEPT, KEPT_S, clock)
        self._current = Recent[str, int](KEPT, KEPT_S, clock)  # the version of each customer's newest key
        with reading(database) as session:
            found = session.scalars(select(MasterRow).order_by(MasterRow.since.desc())).first()
        if found is None:
            self._first_use()
        else:
            _prove(found, master)

    def _first_use(self) -> None:
        row = MasterRow(id=self.master.id, proof=self.master.wrap(PROOF, b"proof"), since=self.clock())
        try:
            with writing(self.database) as session:
                if session.scalar(select(func.count()).select_from(KeyRow)):
                    raise KeyLost("there are customers' keys, but no record of their master key; nothing was changed")
                if other := session.scalars(select(MasterRow)).first():
                    _prove(other, self.master)
                else:
                    session.add(row)
        except IntegrityError:  # another process was quicker, with the same key
            pass

    def seal(self, customer: str, plain: str, purpose: str = "") -> bytes:
        """`plain` under the customer's newest key; where there is none yet, it is made."""
        return self.seal_bytes(customer, plain.encode(), purpose)

    def seal_bytes(self, customer: str, plain: bytes, purpose: str = "") -> bytes:
        """The same for a file."""
        check_customer(customer)
        return self._seal(customer, plain, purpose)

    def unseal(self, customer: str, sealed: bytes, purpose: str = "") -> str:
        """What was sealed. Raises Erased, Unreadable."""
        return self.unseal_bytes(customer, sealed, purpose).decode()

    def unseal_bytes(self, customer: str, sealed: bytes, purpose: str = "") -> bytes:
        """The same for a file."""
        check_customer(customer)
        return self._unseal(customer, sealed, purpose)

    def seal_own(self, name: str, plain: str, purpose: str = "") -> bytes:
        """The same for something of the house's own, whose name begins with RESERVED."""
        return self._seal(_own(name), plain.encode(), purpose)

    def unseal_own(self, name: str, sealed: bytes, purpose: str = "") -> str:
        """What was sealed. Raises Unreadable."""
        return self._unseal(_own(name), sealed, purpose).decode()

    def _seal(self, whose: str, plain: bytes, purpose: str) -> bytes:
        key = self._newest(whose)
        nonce = secrets.token_bytes(NONCE)
        head = FORM + key.version.to_bytes(4, "big")
        return head + nonce + key.cipher().encrypt(nonce, plain, _about(whose, purpose, head))

    def _unseal(self, whose: str, sealed: bytes, purpose: str) -> bytes:
        if len(sealed) < HEADER + 16 or sealed[:1] != FORM:
            raise Unreadable(f"data of customer {whose!r} was cut short, or was never encrypted")
        head, nonce = sealed[:5], sealed[5:HEADER]
        cipher = self._key(whose, int.from_bytes(head[1:], "big")).cipher()
        try:
            return cipher.decrypt(nonce, sealed[HEADER:], _about(whose, purpose, head))
        except InvalidTag:
            raise Unreadable(f"data of customer {whose!r} was changed, or belongs to somebody else") from None

    def secret(self, name: str) -> bytes:
        """32 bytes of its own for something that is no customer, such as the audit log; the same for good. `name`
        begins with RESERVED."""
        name = _own(name)
        first = self._newest(name) if not self._has(name) else self._key(name, 1)
        return hashlib.blake2b(b"secret", key=first.key, digest_size=32).digest()

    def _has(self, name: str) -> bool:
        with reading(self.database) as session:
            return session.get(KeyRow, (name, 1)) is not None

    def current(self, customer: str) -> int:
        """The version of the customer's newest key; after an erasure it is another one."""
        check_customer(customer)
        return self._newest(customer).version

    def destroy(self, customer: str) -> int:
        """Destroy all keys of a customer: what was sealed under them cannot be read again, by nobody. How many.

        On SQLite the place is overwritten and the log emptied, so that no old page has the wrapped key.
        """
        check_customer(customer)
        return self._destroy(KeyRow.customer == customer)

    def customers(self) -> Iterator[list[str]]:
        """All customers who have a key, page by page."""
        last = ""
        while True:
            more = (KeyRow.customer > last) & KeyRow.destroyed_at.is_(None)
            with reading(self.database) as session:
                page = session.scalars(
                    select(KeyRow.customer).where(more).distinct().order_by(KeyRow.customer).limit(PAGE)
                ).all()
            if not page:
                return
            yield [customer for customer in page if not customer.startswith(RESERVED)]
            last = page[-1]

    def retire(self, customers: Sequence[str]) -> int:
        """For customers of whom nothing is kept any more, PAGE at most: nothing new is sealed under the keys that they
        have, and those that were retired RETIRED_S ago are destroyed; how many.

        In two steps, as one of them may come back just now: until RETIRED_S have passed, another process may have
        begun to seal under a key that it has in memory.
        """
        for customer in customers:
            check_customer(customer)
        theirs, now = KeyRow.customer.in_(customers), self.clock()
        with writing(self.database) as session:
            in_use = theirs & KeyRow.destroyed_at.is_(None) & KeyRow.retired_at.is_(None)
            session.execute(update(KeyRow).where(in_use).values(retired_at=now))
        for customer in customers:
            self._current.drop(customer)
        return self._destroy(theirs & (KeyRow.retired_at < now - RETIRED_S))

    def _destroy(self, which: ColumnElement[bool]) -> int:
        hashing = self.secret(ERASED)  # before the transaction: it may make a key
        sqlite = self.database.dialect.name == "sqlite"
        with writing(self.database) as session:
            if sqlite:
                session.execute(text("PRAGMA secure_delete = ON"))
            found = session.scalars(select(KeyRow).where(which, KeyRow.destroyed_at.is_(None))).all()
            gone = [(row.customer, row.version) for row in found]
            for row in found:
                row.wrapped, row.destroyed_at = b"", self.clock()
            session.flush()
            named = KeyRow.destroyed_at.is_not(None) & ~KeyRow.customer.startswith(RESERVED)
            for row in session.scalars(select(KeyRow).where(named).with_for_update(skip_locked=True)).all():
                row.customer = _hashed(row.customer, hashing)  # also where an older coterie destroyed it
        for customer, version in gone:
            self._current.drop(customer)  # only now: earlier, a reader would have put it back before it was destroyed
            self._open.drop((customer, version))
        if sqlite and gone:
            with self.database.connect() as connection:
                connection.exec_driver_sql("COMMIT")  # a checkpoint cannot run inside a transaction
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
                connection.exec_driver_sql("BEGIN")
        return len(gone)

    def _names(self, customer: str) -> list[str]:
        """Under what there may be keys of a customer: their id, and what destroyed ones are kept under."""
        if customer == ERASED or not self._has(ERASED):  # nobody's key was destroyed yet
            return [customer]
        return [customer, _hashed(customer, self.secret(ERASED))]

    def rewrap(self, new: MasterKey) -> int:
        """Wrap every key by `new` instead, all or none; from then on only `new` opens the database. How many."""
        with writing(self.database) as session:
            session.scalars(select(MasterRow).with_for_update()).all()  # who makes a key meanwhile waits
            self._still_the_master(session)
            rows = session.scalars(select(KeyRow).where(KeyRow.destroyed_at.is_(None))).all()
            for row in rows:
                about = _of_key(row.customer, row.version)
                row.wrapped = new.wrap(self.master.unwrap(row.wrapped, about), about)
                row.master = new.id
            for old in session.scalars(select(MasterRow)):
                session.delete(old)
            session.flush()
            session.add(MasterRow(id=new.id, proof=new.wrap(PROOF, b"proof"), since=self.clock()))
        self.master = new
        return len(rows)

    def _newest(self, customer: str) -> _Open:
        version = self._current.get(customer)
        if version is None:
            usable = KeyRow.destroyed_at.is_(None) & KeyRow.retired_at.is_(None)
            query = select(KeyRow.version).where(KeyRow.customer == customer, usable)
            with reading(self.database) as session:
                found = session.scalars(query.order_by(KeyRow.version.desc())).first()
            version = found if found is not None else self._make(customer)
            self._current.put(customer, version)
        return self._key(customer, version)

    def _key(self, customer: str, version: int) -> _Open:
        if kept := self._open.get((customer, version)):
            return kept
        with reading(self.database) as session:
            row = session.get(KeyRow, (customer, version))
        if row is None:
            *_, last = self._names(customer)
            with reading(self.database) as session:
                row = session.get(KeyRow, (last, version))
        if row is None:
            raise Unreadable(f"data of customer {customer!r} is sealed under a key that is not in the database")
        if row.destroyed_at is not None:
            raise Erased(f"customer {customer!r} was erased; what was sealed then cannot be read")
        if row.master != self.master.id:
            raise KeyLost(ROTATED)
        key = self.master.unwrap(row.wrapped, _of_key(customer, version))
        opened = _Open(version, key)
        self._open.put((customer, version), opened)
        return opened

    def _still_the_master(self, session: Session) -> None:
        """Raises KeyLost where another process has rotated the master key since: what is wrapped by the old one now
        would be lost. A rotation waits for the transaction of `session`, and it for a rotation."""
        row = session.scalars(select(MasterRow).with_for_update(read=True)).first()
        if row is None or row.id != self.master.id:
            raise KeyLost(ROTATED)

    def _make(self, customer: str) -> int:
        """A new key, after all that there were. Its version."""
        for _ in range(10):
            with reading(self.database) as session:
                theirs = KeyRow.customer.in_(self._names(customer))
                last = session.scalar(select(func.max(KeyRow.version)).where(theirs)) or 0
            version, key = last + 1, AESGCM.generate_key(256)
            wrapped = self.master.wrap(key, _of_key(customer, version))
            try:
                with writing(self.database) as session:
                    self._still_the_master(session)
                    session.add(KeyRow(customer=customer, version=version, master=self.master.id, wrapped=wrapped,
                                       made_at=self.clock(), destroyed_at=None, retired_at=None))  # fmt: skip
                return version
            except IntegrityError:  # somebody made one meanwhile
                continue
        raise CoterieError(f"no key could be made for customer {customer!r}: too many at once; try again")


def _prove(row: MasterRow, master: MasterKey) -> None:
    if row.id != master.id:
        raise KeyLost(
            f"the master key is not the one that this database was encrypted with (its fingerprint begins with "
            f"{row.id[:8]}, the given one's with {master.id[:8]}); nothing was changed: give the right key"
        )
    if master.unwrap(row.proof, b"proof") != PROOF:
        raise KeyLost("the record of the master key in the database was changed; nothing was written")


def refuse_without(database: Engine) -> None:
    """Raise KeyLost where the database is encrypted and no master key was given."""
    with reading(database) as session:
        found = session.scalars(select(MasterRow)).first()
    if found:
        raise KeyLost(
            f"this database is encrypted (master key {found.id[:8]}...), and no master key is given; set "
            "COTERIE_MASTER_KEY_FILE, COTERIE_MASTER_KEY or COTERIE_MASTER_KEY_COMMAND; nothing was changed"
        )


def _own(name: str) -> str:
    assert name.startswith(RESERVED), name
    return name


def _hashed(customer: str, key: bytes) -> str:
    return f"{ERASED}:{hmac.new(key, customer.encode(), hashlib.sha256).hexdigest()[:32]}"


def _about(customer: str, purpose: str, head: bytes) -> bytes:
    return head + len(customer.encode()).to_bytes(4, "big") + customer.encode() + purpose.encode()


def _of_key(customer: str, version: int) -> bytes:
    return b"customer key\0" + version.to_bytes(4, "big") + customer.encode()
