"""The groups that an account belongs to, for what it may read."""

import sqlalchemy as sa
from alembic import op

revision = "accounts_0003"
down_revision = "accounts_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("accounts", sa.Column("groups", sa.Text, nullable=False, server_default="[]"))
