"""What the desk writes to the CRM: one row for each event of a conversation that a rule of [desk.crm] names."""

from sqlalchemy import CheckConstraint, Float, ForeignKey, Index, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from coterie.store.base import Base


class CrmWriteRow(Base):
    """A case to open, or a note in the conversation's case. `next_at`: when it is tried; meanwhile whoever claimed it
    is at it. `written`: the CRM's id of it, once it is there. `reason`: why it is not, masked and sealed."""

    __tablename__ = "crm_writes"
    __table_args__ = (
        CheckConstraint("kind IN ('case', 'note')", name="kind"),
        CheckConstraint("state IN ('due', 'sent', 'failed')", name="state"),
        Index(None, "state", "next_at"),
    )

    message_id: Mapped[int] = mapped_column(ForeignKey("messages.id"), primary_key=True)
    conversation_id: Mapped[str] = mapped_column(ForeignKey("conversations.id"), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    tries: Mapped[int]
    next_at: Mapped[float] = mapped_column(Float)
    reason: Mapped[bytes | None] = mapped_column(LargeBinary)
    written: Mapped[str] = mapped_column(String(200))
    at: Mapped[float] = mapped_column(Float)
