"""When invitations to the desk were ended."""

import sqlalchemy as sa
from alembic import op

revision = "accounts_0002"
down_revision = "accounts_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "invitations_ended",
        sa.Column("name", sa.String(200), nullable=False), sa.Column("at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_invitations_ended"),
    )  # fmt: skip
