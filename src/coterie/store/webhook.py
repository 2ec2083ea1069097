"""How far each webhook has been told, and when it is tried again; what it is told beside entries of conversations."""

from typing import Any

from sqlalchemy import JSON, Float, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from coterie.store.base import Base


class WebhookRow(Base):
    """One address. `told`: the id of the last entry of `messages` that it has taken; `happened`: of `happenings`."""

    __tablename__ = "webhooks"

    url: Mapped[str] = mapped_column(String(500), primary_key=True)
    told: Mapped[int] = mapped_column(Integer)
    happened: Mapped[int] = mapped_column(Integer, default=0)
    failed: Mapped[int] = mapped_column(Integer)  # times in a row
    next_at: Mapped[float] = mapped_column(Float)
    error: Mapped[str] = mapped_column(String(300))


class HappeningRow(Base):
    """A rating, a step of a procedure, or an erasure: written in the transaction of the deed, and without any text."""

    __tablename__ = "happenings"
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012, SQLAlchemy reads it: no id is given twice

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float] = mapped_column(Float)
    kind: Mapped[str] = mapped_column(String(16))  # rating, action, erasure
    customer: Mapped[str] = mapped_column(String(200), index=True)
    conversation_id: Mapped[str | None] = mapped_column(String(64), index=True)  # None: gone, or not of one
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
