"""How far each webhook has been told."""

import sqlalchemy as sa
from alembic import op

revision = "desk_0002"
down_revision = "desk_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "webhooks",
        sa.Column("url", sa.String(500), nullable=False), sa.Column("told", sa.Integer, nullable=False),
        sa.Column("failed", sa.Integer, nullable=False), sa.Column("next_at", sa.Float, nullable=False),
        sa.Column("error", sa.String(300), nullable=False), sa.PrimaryKeyConstraint("url", name="pk_webhooks"),
    )  # fmt: skip
