"""Tables of the privacy room: keys, pseudonyms, the audit log, consents, accounts, sessions and tokens.

Notable: nothing here holds a secret as it is. Keys are wrapped by the master key, pseudonyms' values are sealed under
their customer's key, passwords and tokens are kept as hashes. Times are seconds since 1970.
"""

from sqlalchemy import Float, ForeignKey, Index, LargeBinary, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from coterie.store.base import Base


class MasterRow(Base):
    """A master key that keys were wrapped by: its fingerprint, and a text sealed under it that proves the right key."""

    __tablename__ = "master_keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    proof: Mapped[bytes] = mapped_column(LargeBinary)
    since: Mapped[float] = mapped_column(Float)


class KeyRow(Base):
    """One data key of one customer, wrapped by the master key; empty once it is destroyed, and then under a keyed hash
    of the customer's id."""

    __tablename__ = "customer_keys"

    customer: Mapped[str] = mapped_column(String(200), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    master: Mapped[str] = mapped_column(String(32))
    wrapped: Mapped[bytes] = mapped_column(LargeBinary)
    made_at: Mapped[float] = mapped_column(Float)
    destroyed_at: Mapped[float | None] = mapped_column(Float)
    retired_at: Mapped[float | None] = mapped_column(Float)  # since then, nothing new is sealed under it


class PseudonymRow(Base):
    """A pseudonym of one customer's vault, and its value, sealed."""

    __tablename__ = "pseudonyms"

    customer: Mapped[str] = mapped_column(String(200), primary_key=True)
    pseudonym: Mapped[str] = mapped_column(String(40), primary_key=True)
    value: Mapped[bytes] = mapped_column(LargeBinary)


class AuditRow(Base):
    """One line of the audit log; a trigger of the database refuses to change or delete it."""

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[float] = mapped_column(Float)
    actor: Mapped[str] = mapped_column(String(200), index=True)
    action: Mapped[str] = mapped_column(String(80))
    subject: Mapped[str] = mapped_column(String(200), index=True)
    detail: Mapped[str] = mapped_column(Text)  # JSON; never what somebody said or is called
    link: Mapped[bytes] = mapped_column(LargeBinary(32))  # over this line and the link before it


class ConsentRow(Base):
    """What a customer was told (a disclosure) or agreed to, or took back."""

    __tablename__ = "consents"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str] = mapped_column(String(200), index=True)
    purpose: Mapped[str] = mapped_column(String(80))
    what: Mapped[str] = mapped_column(String(16))  # told, agreed, withdrawn
    wording: Mapped[str] = mapped_column(String(80))  # the digest of the text that they saw
    at: Mapped[float] = mapped_column(Float)


class WordingRow(Base):
    """A text of the business that customers were told, or agreed to; kept as long as anybody's record may name it."""

    __tablename__ = "wordings"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)  # SHA-256 of language and text, in hex
    text: Mapped[str] = mapped_column(Text)
    language: Mapped[str] = mapped_column(String(40))
    since: Mapped[float] = mapped_column(Float)


class AccountRow(Base):
    """Somebody who works with coterie."""

    __tablename__ = "accounts"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    role: Mapped[str] = mapped_column(String(16))
    password: Mapped[str] = mapped_column(String(300))  # argon2; empty: only by OIDC
    totp: Mapped[bytes] = mapped_column(LargeBinary)  # the second factor's secret, sealed; empty: none
    totp_last: Mapped[int]  # the last time step used, so that no code works twice
    subject: Mapped[str] = mapped_column(String(300), index=True)  # issuer and subject of OIDC; empty: none
    failures: Mapped[int]  # wrong passwords in a row
    locked_until: Mapped[float] = mapped_column(Float)
    made_at: Mapped[float] = mapped_column(Float)
    disabled: Mapped[bool] = mapped_column(default=False)  # keeps its name and its lines in the audit log
    groups: Mapped[str] = mapped_column(Text, default="[]")  # JSON: what sources are read by, beside the role


class InvitationsEndedRow(Base):
    """Invitations to the desk that were made until then let nobody in: those of a name, or with "" all."""

    __tablename__ = "invitations_ended"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    at: Mapped[float] = mapped_column(Float)


class LoginRow(Base):
    """A session of a browser, or an API token: what is kept is the hash of its secret."""

    __tablename__ = "logins"
    __table_args__ = (Index(None, "until"),)

    secret: Mapped[str] = mapped_column(String(64), primary_key=True)  # SHA-256 in hex
    account: Mapped[str] = mapped_column(ForeignKey("accounts.name", ondelete="CASCADE"), index=True)
    kind: Mapped[str] = mapped_column(String(16))  # session or token
    label: Mapped[str] = mapped_column(String(80))
    scopes: Mapped[str] = mapped_column(String(400))  # of a token, with spaces between; "*": all that the role may
    csrf: Mapped[str] = mapped_column(String(64))
    made_at: Mapped[float] = mapped_column(Float)
    used_at: Mapped[float] = mapped_column(Float)
    until: Mapped[float] = mapped_column(Float)
