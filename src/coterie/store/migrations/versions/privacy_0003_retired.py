"""Keys under which nothing new is sealed."""

import sqlalchemy as sa
from alembic import op

revision = "privacy_0003"
down_revision = "privacy_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("customer_keys", sa.Column("retired_at", sa.Float))
