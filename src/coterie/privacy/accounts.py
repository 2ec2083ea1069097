"""Accounts with a role, their sessions and API tokens, and a second factor.

Notable: passwords are kept as argon2 hashes, the secrets of sessions and tokens as SHA-256 (they are random, so need
no slow hash), the second factor's secret sealed. A wrong name, password or code gives one and the same answer, in the
same time; each code works once; wrong passwords in a row lock an account for longer and longer, an hour at most.
"""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

import pyotp
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy import Engine, delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from coterie.errors import CoterieError
from coterie.privacy.access import MAY, PERMISSIONS, ROLES, Forbidden, NotSignedIn, Person, Role
from coterie.privacy.audit import Audit
from coterie.privacy.keys import RESERVED, Erased, Keys, Unreadable
from coterie.privacy.tables import AccountRow, InvitationsEndedRow, LoginRow
from coterie.store.database import reading, writing

NAME = re.compile(r"[\w.@+-]{1,120}")
GROUP = re.compile(r"(?!\*$)(?!\s)[^\x00-\x1f,]{1,80}(?<!\s)")
SHORTEST = 12  # letters of a password (NIST SP 800-63B-4 asks for 15 where it is the only factor, 8 beside another)
LONGEST = 256
SESSION_S, IDLE_S = 12 * 3600, 2 * 3600
FREE_FAILURES = 5  # wrong passwords before an account is locked, for 30 s, 60 s, ...
STEP_S = 30  # of the second factor's clock
WRONG = "name, password or code is wrong"
HASHER = PasswordHash((Argon2Hasher(time_cost=2, memory_cost=19456, parallelism=1),))  # OWASP's smallest for argon2id
T = TypeVar("T")
_NOBODY = HASHER.hash("a password that nobody has")


class AccountError(CoterieError):
    """An account that cannot be made or changed in this way."""

    code = "invalid_account"


@dataclass(frozen=True)
class Account:
    name: str
    role: Role
    second_factor: bool
    locked: bool
    disabled: bool = False
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Login:
    """A fresh session or token: the only time that its secret is seen."""

    secret: str
    csrf: str
    until: float


class Accounts:
    """The accounts in one database."""

    def __init__(self, database: Engine, keys: Keys, audit: Audit, clock: Callable[[], float] = time.time) -> None:
        self.database, self.keys, self.audit, self.clock = database, keys, audit, clock

    def any(self) -> bool:
        """Whether there is an account: from then on, everybody signs in."""
        with reading(self.database) as session:
            return session.scalars(select(AccountRow.name).limit(1)).first() is not None

    def add(self, name: str, role: str, password: str = "", by: str = "cli", groups: Iterable[str] = ()) -> None:
        """A new account; without a password, it is for OIDC only. The first must be an owner's. Raises AccountError."""
        if not NAME.fullmatch(name):
            raise AccountError(f"{name!r}: a name has 1 to 120 letters, digits, '.', '@', '+', '-', '_'")
        row = AccountRow(name=name, role=_role(role), password=_hashed(password) if password else "", totp=b"",
                         totp_last=0, subject="", failures=0, locked_until=0.0, made_at=self.clock(),
                         disabled=False, groups=_groups(groups))  # fmt: skip
        try:
            with writing(self.database) as session:
                first = session.scalars(select(AccountRow.name).limit(1)).first() is None
                if first and role != "owner":
                    raise AccountError("the first account must be an owner's: --role owner")
                session.add(row)
                session.flush()
                self.audit.record_in(session, by, "account.add", name, role=role, groups=json.loads(row.groups))
                if first:  # which closes the door to whoever was let in without one
                    self._end_invitations(session, "")
        except IntegrityError as error:
            raise AccountError(f"there is an account {name!r} already") from error

    def remove(self, name: str, by: str = "cli") -> None:
        """Delete an account with its sessions and tokens. Raises AccountError: unknown, or the last owner's."""
        with writing(self.database) as session:
            row = _row(session, name)
            _not_the_last(session, row)
            session.delete(row)
            session.execute(delete(LoginRow).where(LoginRow.account == name))
            self._end_invitations(session, name)
            self.audit.record_in(session, by, "account.remove", name)

    def change(
        self, name: str, role: str | None = None, password: str | None = None, by: str = "cli",
        disabled: bool | None = None, groups: Iterable[str] | None = None,
    ) -> None:  # fmt: skip
        """Another role or password, other groups, or nobody signs in with it any more; every session and token of the
        account ends. Raises AccountError."""
        with writing(self.database) as session:
            row = _row(session, name)
            if role is not None:
                if role != "owner":
                    _not_the_last(session, row)
                row.role = _role(role)
            if password is not None:
                row.password, row.failures, row.locked_until = _hashed(password), 0, 0.0
            if disabled is not None:
                if disabled:
                    _not_the_last(session, row)
                row.disabled = disabled
            if groups is not None:
                row.groups = _groups(groups)
            session.execute(delete(LoginRow).where(LoginRow.account == name))
            self.audit.record_in(
                session, by, "account.change", name, role=row.role, password=password is not None,
                disabled=row.disabled, groups=json.loads(row.groups),
            )  # fmt: skip

    def all(self) -> list[Account]:
        """All accounts, by name."""
        with reading(self.database) as session:
            return [self._shown(row) for row in session.scalars(select(AccountRow).order_by(AccountRow.name))]

    def get(self, name: str) -> Account | None:
        """One account."""
        with reading(self.database) as session:
            row = session.get(AccountRow, name)
        return self._shown(row) if row else None

    def _shown(self, row: AccountRow) -> Account:
        locked = row.locked_until > self.clock()
        groups = tuple(json.loads(row.groups))
        return Account(row.name, cast(Role, row.role), bool(row.totp), locked, row.disabled, groups)

    # Signing in

    def login(self, name: str, password: str, code: str = "") -> Login:
        """A session. Raises NotSignedIn."""
        return self._proven(name, password, code, self._begin)

    def check(self, name: str, password: str, code: str | None = None) -> None:
        """That this is the password of somebody who is signed in already, and where `code` is given, that it is one of
        their second factor, if they have one. Wrong ones count as when signing in. Raises Forbidden."""
        try:
            self._proven(name, password, code, lambda _session, _name: None)
        except NotSignedIn:
            raise Forbidden("password or code is wrong, or too many were: then wait a while") from None

    def _proven(self, name: str, password: str, code: str | None, then: Callable[[Session, str], T]) -> T:
        """`then` for whoever knows the password and, unless it is None, the code. Raises NotSignedIn."""
        with reading(self.database) as session:
            row = session.get(AccountRow, name)
        now = self.clock()
        known = row is not None and bool(row.password)
        right, better = HASHER.verify_and_update(password[:LONGEST], row.password if row and known else _NOBODY)
        step = None if row is None else row.totp_last if code is None else self._step(row, code)
        with writing(self.database) as session:
            row = session.get(AccountRow, name)
            shut = row is None or row.disabled or row.locked_until > now
            if row is None or shut or not known or not right or step is None or step < row.totp_last:
                if row is not None and row.locked_until <= now:
                    row.failures += 1
                    late = row.failures - FREE_FAILURES
                    row.locked_until = now + min(3600, 30 * 2**late) if late >= 0 else 0.0
                if row is not None:  # a wrong name may be a password in the wrong field: it is not written down
                    self.audit.record_in(session, name, "login.refused", name)
                failed = True
            else:
                row.failures, row.locked_until, failed = 0, 0.0, False
                if code is not None:
                    row.totp_last = step + 1 if row.totp else 0
                row.password = better or row.password
                done = then(session, name)
        if failed:
            raise NotSignedIn(WRONG)
        return done

    def login_oidc(self, subject: str, email: str, groups: Iterable[str] | None = None) -> Login:
        """A session for whom an identity provider vouches: known by `subject`, or the first time by an account named
        as their verified e-mail address. `groups`: what the provider says of them, in place of what was known; None
        where it is not asked. Raises NotSignedIn."""
        with writing(self.database) as session:
            row = session.scalars(select(AccountRow).where(AccountRow.subject == subject)).first()
            if row is None and email:
                row = session.get(AccountRow, email)
                if row is not None and row.subject:
                    row = None  # it belongs to another identity
            if row is None or row.disabled:
                raise NotSignedIn("there is no account for this identity; an owner adds it with its e-mail address")
            row.subject = subject
            if groups is not None and (told := _groups(groups, strict=False)) != row.groups:
                row.groups = told
                self.audit.record_in(session, "oidc", "account.groups", row.name, groups=json.loads(told))
            return self._begin(session, row.name)

    def _begin(self, session: Session, name: str) -> Login:
        now = self.clock()
        login = Login("cs_" + secrets.token_urlsafe(32), secrets.token_urlsafe(24), now + SESSION_S)
        session.execute(delete(LoginRow).where(LoginRow.until < now))
        session.add(_login_row(login, name, "session", "", "*", now))
        self.audit.record_in(session, name, "login", name)
        return login

    def token(self, name: str, label: str, scopes: Iterable[str], days: int) -> Login:
        """An API token of at most what the account's role allows. Raises AccountError."""
        wanted = sorted(set(scopes))
        if unknown := [s for s in wanted if s not in PERMISSIONS]:
            raise AccountError(f"scope {unknown[0]!r}: not one of {', '.join(sorted(PERMISSIONS))}")
        if not 1 <= days <= 3650:
            raise AccountError("days: a token holds for 1 to 3650 days")
        now = self.clock()
        login = Login("ct_" + secrets.token_urlsafe(32), "", now + days * 86400)
        with writing(self.database) as session:
            row = _row(session, name)
            if row.disabled:
                raise AccountError(f"{name!r} is disabled")
            if beyond := [s for s in wanted if s not in MAY[cast(Role, row.role)]]:
                raise AccountError(f"scope {beyond[0]!r}: the role {row.role} does not have it")
            session.add(_login_row(login, name, "token", label[:80], " ".join(wanted), now))
            self.audit.record_in(session, name, "token.add", name, label=label[:80], scopes=wanted)
        return login

    def tokens(self, name: str) -> list[dict[str, str | float]]:
        """An account's tokens; `id` is the beginning of the hash, which ends it (`revoke`)."""
        query = select(LoginRow).where(LoginRow.account == name, LoginRow.kind == "token").order_by(LoginRow.made_at)
        with reading(self.database) as session:
            return [{"id": r.secret[:16], "label": r.label, "scopes": r.scopes, "until": r.until, "used_at": r.used_at}
                    for r in session.scalars(query)]  # fmt: skip

    def revoke(self, name: str, id: str) -> None:
        """End a token. Raises AccountError."""
        with writing(self.database) as session:
            query = select(LoginRow).where(LoginRow.account == name, LoginRow.kind == "token")
            found = [r for r in session.scalars(query) if len(id) == 16 and r.secret.startswith(id)]
            if not found:
                raise AccountError(f"{name!r} has no token {id!r}")
            session.delete(found[0])
            self.audit.record_in(session, name, "token.revoke", name, token=id)

    def who(self, secret: str) -> Person | None:
        """Whose session or token this is; None for one that is unknown or over."""
        now = self.clock()
        with reading(self.database) as session:
            row = session.get(LoginRow, _digest(secret))
            idle = row is not None and row.kind == "session" and row.used_at < now - IDLE_S
            if row is None or row.until < now or idle:
                return None
            account = session.get(AccountRow, row.account)
        if account is None or account.disabled:
            return None
        if row.used_at < now - 60:
            with writing(self.database) as session:
                if used := session.get(LoginRow, row.secret):
                    used.used_at = now
        scopes = None if row.kind == "session" else frozenset(row.scopes.split())
        return Person.of(account.name, cast(Role, account.role), scopes, frozenset(json.loads(account.groups)))

    def csrf(self, secret: str) -> str:
        """What a page of ours sends along to show that the session's own page asks."""
        with reading(self.database) as session:
            row = session.get(LoginRow, _digest(secret))
        return row.csrf if row else ""

    def logout(self, secret: str) -> None:
        """End a session."""
        with writing(self.database) as session:
            if row := session.get(LoginRow, _digest(secret)):
                self.audit.record_in(session, row.account, "logout", row.account)
                session.delete(row)

    # Invitations to the desk, which are links signed by its door

    def invite(self, name: str, role: str, by: str = "cli") -> None:
        """Write down that somebody is invited. Raises AccountError for who has an account: they sign in."""
        with writing(self.database) as session:
            if self._known(session, name):
                raise AccountError(f"{name!r} has an account; an invitation would not ask for what it asks for")
            self.audit.record_in(session, by, "invitation.add", name, role=role)

    def end_invitations(self, name: str = "", by: str = "cli") -> None:
        """From now on, no invitation of `name`, or of anybody, that was made until now lets them in."""
        with writing(self.database) as session:
            self._end_invitations(session, name)
            self.audit.record_in(session, by, "invitation.end", name)

    def invitation_ended(self, name: str, made_at: float) -> bool:
        """Whether an invitation lets nobody in any more: it was ended, or who it names has an account, whatever has
        become of that: disabled, or with a second factor."""
        query = select(func.max(InvitationsEndedRow.at)).where(InvitationsEndedRow.name.in_(["", _folded(name)]))
        with reading(self.database) as session:
            return made_at <= (session.scalar(query) or 0.0) or self._known(session, name)

    def _known(self, session: Session, name: str) -> bool:
        return _folded(name) in map(_folded, session.scalars(select(AccountRow.name)))

    def _end_invitations(self, session: Session, name: str) -> None:
        session.merge(InvitationsEndedRow(name=_folded(name), at=self.clock()))

    # The second factor (TOTP, RFC 6238)

    def offer_second_factor(self, name: str) -> tuple[str, str]:
        """A fresh secret, and its address for an authenticator's picture; nothing holds until `take_second_factor`."""
        secret = pyotp.random_base32()
        return secret, pyotp.TOTP(secret).provisioning_uri(name=name, issuer_name="Coterie")

    def take_second_factor(
        self, name: str, secret: str, code: str, password: str | None = None, current: str = ""
    ) -> None:
        """From now on, a code is asked for. `password`, where given, is theirs, and `current` a code of the second
        factor that they have so far, if any. Raises AccountError where `code` is wrong, Forbidden where those are."""
        step = _step_of(secret, code, self.clock())
        if step is None:
            raise AccountError("the code does not fit the secret; check your device's clock, and try the next code")
        if password is not None:  # only now, as it uses `current` up
            self.check(name, password, current)
        sealed = self.keys.seal_own(_totp_of(name), secret, "totp")  # before the transaction: it may make a key
        with writing(self.database) as session:
            row = _row(session, name)
            row.totp, row.totp_last = sealed, step + 1
            self.audit.record_in(session, name, "second_factor.take", name)

    def drop_second_factor(self, name: str, by: str = "cli") -> None:
        """No code is asked for any more. Raises AccountError."""
        with writing(self.database) as session:
            row = _row(session, name)
            row.totp, row.totp_last = b"", 0
            self.audit.record_in(session, by, "second_factor.drop", name)

    def _step(self, row: AccountRow, code: str) -> int | None:
        """The time step that a code belongs to, one to either side of now; 0 where none is asked; None: wrong."""
        if not row.totp:
            return 0
        return _step_of(self.keys.unseal_own(_totp_of(row.name), row.totp, "totp"), code, self.clock())

    def apart(self) -> None:
        """Seal anew the second factors that an older coterie sealed under "account:NAME", as if that were a customer:
        erasing a customer of that name would have destroyed them. One that was destroyed so waits for a reset."""
        with reading(self.database) as session:
            found = [(row.name, row.totp) for row in session.scalars(select(AccountRow)) if row.totp]
        for name, sealed in found:
            try:
                self.keys.unseal_own(_totp_of(name), sealed, "totp")
            except Unreadable:
                self._apart(name, sealed)

    def _apart(self, name: str, sealed: bytes) -> None:
        try:
            secret = self.keys.unseal(f"account:{name}", sealed, "totp")
        except (Erased, Unreadable):
            return
        anew = self.keys.seal_own(_totp_of(name), secret, "totp")
        with writing(self.database) as session:
            row = session.get(AccountRow, name)
            if row is not None and row.totp == sealed:  # nobody has changed it meanwhile
                row.totp = anew


def _step_of(secret: str, code: str, now: float) -> int | None:
    try:
        totp = pyotp.TOTP(secret)
        for step in (int(now) // STEP_S + ahead for ahead in (0, -1, 1)):
            if secrets.compare_digest(totp.at(step * STEP_S).encode(), code.strip().encode()):
                return step
    except (ValueError, TypeError):  # not a secret
        pass
    return None


def _folded(name: str) -> str:
    """Bea and bea are one person, as far as invitations go."""
    return name.casefold()[:200]


def _totp_of(name: str) -> str:
    return f"{RESERVED}account:{name}"


def _login_row(login: Login, name: str, kind: str, label: str, scopes: str, now: float) -> LoginRow:
    return LoginRow(secret=_digest(login.secret), account=name, kind=kind, label=label, scopes=scopes, csrf=login.csrf,
                    made_at=now, used_at=now, until=login.until)  # fmt: skip


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _hashed(password: str) -> str:
    if not SHORTEST <= len(password) <= LONGEST:
        raise AccountError(f"a password has {SHORTEST} to {LONGEST} letters")
    return HASHER.hash(password)


def _role(role: str) -> str:
    if role not in ROLES or role == "visitor":
        raise AccountError(f"{role!r}: not a role of an account; use {', '.join(r for r in ROLES if r != 'visitor')}")
    return role


def _groups(groups: Iterable[str], strict: bool = True) -> str:
    """Names of groups as they are kept. Raises AccountError where one cannot be a group; not strict: leaves it out."""
    kept = set()
    for group in groups:
        if GROUP.fullmatch(group) and group not in ROLES:  # whoever has a role belongs to its group by that alone
            kept.add(group)
        elif strict:
            raise AccountError(f"{group!r}: a group has 1 to 80 letters, is no role's name, and not '*'")
    return json.dumps(sorted(kept))


def _row(session: Session, name: str) -> AccountRow:
    row = session.get(AccountRow, name)
    if row is None:
        raise AccountError(f"there is no account {name!r}")
    return row


def _not_the_last(session: Session, row: AccountRow) -> None:
    owner = (AccountRow.role == "owner") & AccountRow.disabled.is_(False)
    owners = session.scalar(select(func.count()).select_from(AccountRow).where(owner))
    if row.role == "owner" and not row.disabled and owners == 1:
        raise AccountError(f"{row.name!r} is the last owner; make another one first")
