"""Tables of the desk's e-mail: mails taken in, mails to be sent, files that came with them, how far a mailbox was read.

Notable: no address and no Message-ID stands here as it is, only keyed hashes of them; what a mail says is sealed with
its message. A mail's `mark` stays when its conversation is deleted, so that it is never taken twice.
"""

from sqlalchemy import BigInteger, CheckConstraint, Float, ForeignKey, Index, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from coterie.store.base import Base

OUTWARD = OUT, CRM = "out", "crm"


class MailRow(Base):
    """A mail that came. `kind`: "person", "automatic", "bounce", or "unread": it could not be taken apart."""

    __tablename__ = "mails"
    __table_args__ = (Index(None, "sender", "at"),)

    mark: Mapped[str] = mapped_column(String(64), primary_key=True)  # of its Message-ID, sender and words
    message_id: Mapped[str] = mapped_column(String(64), index=True)  # hash; others name the mail by it
    conversation_id: Mapped[str | None] = mapped_column(ForeignKey("conversations.id"), index=True)
    sender: Mapped[str] = mapped_column(String(64))  # hash
    kind: Mapped[str] = mapped_column(String(16))
    at: Mapped[float] = mapped_column(Float)


class OutboxRow(Base):
    """An entry of a conversation that goes out by e-mail. `next_at`: when it is tried; meanwhile whoever claimed it
    is at it."""

    __tablename__ = "outbox"
    __table_args__ = (
        CheckConstraint("state IN ('due', 'sent', 'failed', 'bounced')", name="state"),
        Index(None, "state", "next_at"),
    )

    message_id: Mapped[int] = mapped_column(ForeignKey("messages.id"), primary_key=True)
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id"), index=True)
    state: Mapped[str] = mapped_column(String(16))
    tries: Mapped[int]
    next_at: Mapped[float] = mapped_column(Float)
    error: Mapped[str] = mapped_column(String(300))
    at: Mapped[float] = mapped_column(Float)


class MailboxRow(Base):
    """How far a folder was read (`uid`, valid while its UIDVALIDITY is `validity`, since the time `since`), and, under
    the names of OUTWARD, up to which entry of `messages` the outbox and what goes to the CRM were filled."""

    __tablename__ = "mailboxes"

    name: Mapped[str] = mapped_column(String(500), primary_key=True)
    validity: Mapped[int] = mapped_column(BigInteger)
    uid: Mapped[int] = mapped_column(BigInteger)
    since: Mapped[float] = mapped_column(Float)


class AttachmentRow(Base):
    """A file that came with a message: its name, kind and bytes are sealed under the customer's key."""

    __tablename__ = "attachments"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id"), index=True)
    about: Mapped[bytes] = mapped_column(LargeBinary)  # JSON: name, type, size
    body: Mapped[bytes] = mapped_column(LargeBinary)
    at: Mapped[float] = mapped_column(Float)
