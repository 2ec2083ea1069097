"""How far each webhook has been told, and when it is tried again."""

from sqlalchemy import Float, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from coterie.store.base import Base


class WebhookRow(Base):
    """One address. `told`: the id of the last entry of `messages` that it has taken."""

    __tablename__ = "webhooks"

    url: Mapped[str] = mapped_column(String(500), primary_key=True)
    told: Mapped[int] = mapped_column(Integer)
    failed: Mapped[int] = mapped_column(Integer)  # times in a row
    next_at: Mapped[float] = mapped_column(Float)
    error: Mapped[str] = mapped_column(String(300))
