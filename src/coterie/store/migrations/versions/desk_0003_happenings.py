"""What happens beside the entries of conversations, for other systems to be told: ratings, actions, erasures."""

import sqlalchemy as sa
from alembic import op

revision = "desk_0003"
down_revision = "desk_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "happenings",
        sa.Column("id", sa.Integer, nullable=False), sa.Column("at", sa.Float, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False), sa.Column("customer", sa.String(200), nullable=False),
        sa.Column("conversation_id", sa.String(64), nullable=True), sa.Column("data", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_happenings"),
        sqlite_autoincrement=True,
    )  # fmt: skip
    op.create_index("ix_happenings_customer", "happenings", ["customer"])
    op.create_index("ix_happenings_conversation_id", "happenings", ["conversation_id"])
    op.add_column("webhooks", sa.Column("happened", sa.Integer, nullable=False, server_default="0"))
