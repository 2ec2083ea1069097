"""Tables of procedures: each run of one in a conversation, and each action that was begun in it.

Notable: an action's row is written before the action is done, under the key that goes with it; the database takes no
row of an action that needs the customer's agreement, or an approval, without it; and a conversation has one run at a
time.
"""

from sqlalchemy import CheckConstraint, Float, ForeignKey, Index, LargeBinary, String, text
from sqlalchemy.orm import Mapped, mapped_column

from coterie.store.base import Base

ACTIVE = ("asking", "approving")
STATUSES = (*ACTIVE, "done", "stopped", "declined", "refused", "ended", "handed_over", "left")
_ACTIVE = text("status IN ('asking', 'approving')")


class RunRow(Base):
    """One run. `state` is sealed. `wants`: who must approve, while it waits for that; `decision`: what they said."""

    __tablename__ = "procedure_runs"
    __table_args__ = (
        CheckConstraint(f"status IN {STATUSES}", name="status"),
        CheckConstraint("decision IN ('', 'approved', 'refused')", name="decision"),
        CheckConstraint("(decision = '') = (decided_by = '')", name="somebody_decides"),
        Index("uq_procedure_runs_active", "conversation_id", unique=True, sqlite_where=_ACTIVE,
              postgresql_where=_ACTIVE),
    )  # fmt: skip

    id: Mapped[str] = mapped_column(String(80), primary_key=True)  # conversation, and the message that began it
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id"), index=True)
    customer: Mapped[str] = mapped_column(String(200))
    name: Mapped[str] = mapped_column(String(40))
    version: Mapped[str] = mapped_column(String(32))  # of the procedure's file
    status: Mapped[str] = mapped_column(String(16))
    state: Mapped[bytes] = mapped_column(LargeBinary)
    wants: Mapped[str] = mapped_column(String(16))
    decision: Mapped[str] = mapped_column(String(16))
    decided_by: Mapped[str] = mapped_column(String(200))
    began_at: Mapped[float] = mapped_column(Float)
    changed_at: Mapped[float] = mapped_column(Float)


class ActionRow(Base):
    """One action: begun, then done, failed (nothing changed) or unknown. Arguments and results are sealed."""

    __tablename__ = "procedure_actions"
    __table_args__ = (
        CheckConstraint("status IN ('begun', 'done', 'failed', 'unknown')", name="status"),
        CheckConstraint("NOT needs_agreement OR agreed_seq IS NOT NULL", name="agreed"),
        CheckConstraint("NOT needs_approval OR approved_by <> ''", name="approved"),
    )

    key: Mapped[str] = mapped_column(String(130), primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("procedure_runs.id"), index=True)
    name: Mapped[str] = mapped_column(String(40))
    status: Mapped[str] = mapped_column(String(16))
    writes: Mapped[bool]
    arguments: Mapped[bytes] = mapped_column(LargeBinary)
    result: Mapped[bytes] = mapped_column(LargeBinary)  # or why it failed
    needs_agreement: Mapped[bool]
    needs_approval: Mapped[bool]
    agreed_seq: Mapped[int | None]  # the customer's message
    approved_by: Mapped[str] = mapped_column(String(200))
    begun_at: Mapped[float] = mapped_column(Float)
    ended_at: Mapped[float | None] = mapped_column(Float)
