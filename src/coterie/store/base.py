"""What every table of the house inherits from. Constraints have names, so that migrations can change them."""

from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s", "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s", "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}  # fmt: skip


class Base(DeclarativeBase):
    """Root of the models of every room."""

    metadata = MetaData(naming_convention=NAMES)
