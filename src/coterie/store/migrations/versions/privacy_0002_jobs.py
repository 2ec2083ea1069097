"""Jobs that run by themselves: when each is due, and who is at it."""

import sqlalchemy as sa
from alembic import op

revision = "privacy_0002"
down_revision = "privacy_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("name", sa.String(40), nullable=False), sa.Column("next_at", sa.Float, nullable=False),
        sa.Column("worker", sa.String(40), nullable=False), sa.Column("until", sa.Float, nullable=False),
        sa.Column("failed", sa.Integer, nullable=False), sa.Column("error", sa.String(300), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_jobs"),
    )  # fmt: skip
