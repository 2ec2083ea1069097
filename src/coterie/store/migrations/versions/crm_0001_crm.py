"""The CRM: cases and notes to be written."""

import sqlalchemy as sa
from alembic import op

revision = "crm_0001"
down_revision = None
branch_labels = ("crm",)
depends_on = "mail_0001"  # how far it was filled stands in mailboxes


def upgrade() -> None:
    op.create_table(
        "crm_writes",
        sa.Column("message_id", sa.Integer, nullable=False),
        sa.Column("conversation_id", sa.String(64), nullable=False), sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False), sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("next_at", sa.Float, nullable=False), sa.Column("error", sa.String(300), nullable=False),
        sa.Column("written", sa.String(200), nullable=False), sa.Column("at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("message_id", name="pk_crm_writes"),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"], name="fk_crm_writes_message_id"),
        sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"], name="fk_crm_writes_conversation_id"),
        sa.CheckConstraint("kind IN ('case', 'note')", name=op.f("ck_crm_writes_kind")),
        sa.CheckConstraint("state IN ('due', 'sent', 'failed')", name=op.f("ck_crm_writes_state")),
    )  # fmt: skip
    op.create_index("ix_crm_writes_conversation_id", "crm_writes", ["conversation_id"])
    op.create_index("ix_crm_writes_state_next_at", "crm_writes", ["state", "next_at"])
