"""The texts that customers were told, or agreed to, as they stood."""

import sqlalchemy as sa
from alembic import op

revision = "consents_0001"
down_revision = None
branch_labels = ("consents",)
depends_on = "privacy_0001"


def upgrade() -> None:
    op.create_table(
        "wordings",
        sa.Column("digest", sa.String(64), nullable=False), sa.Column("text", sa.Text, nullable=False),
        sa.Column("language", sa.String(40), nullable=False), sa.Column("since", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_wordings"),
    )  # fmt: skip
