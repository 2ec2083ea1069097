"""E-mail: what came, what goes out, files, and how far a mailbox was read."""

import sqlalchemy as sa
from alembic import op

revision = "mail_0001"
down_revision = None
branch_labels = ("mail",)
depends_on = "desk_0001"


def upgrade() -> None:
    op.create_table(
        "mails",
        sa.Column("mark", sa.String(64), nullable=False), sa.Column("message_id", sa.String(64), nullable=False),
        sa.Column("conversation_id", sa.String(64)), sa.Column("sender", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False), sa.Column("at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("mark", name="pk_mails"),
        sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"], name="fk_mails_conversation_id"),
    )  # fmt: skip
    op.create_index("ix_mails_message_id", "mails", ["message_id"])
    op.create_index("ix_mails_conversation_id", "mails", ["conversation_id"])
    op.create_index("ix_mails_sender_at", "mails", ["sender", "at"])
    op.create_table(
        "outbox",
        sa.Column("message_id", sa.Integer, nullable=False),
        sa.Column("conversation_id", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False), sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("next_at", sa.Float, nullable=False), sa.Column("error", sa.String(300), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("message_id", name="pk_outbox"),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"], name="fk_outbox_message_id"),
        sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"], name="fk_outbox_conversation_id"),
        sa.CheckConstraint("state IN ('due', 'sent', 'failed', 'bounced')", name=op.f("ck_outbox_state")),
    )  # fmt: skip
    op.create_index("ix_outbox_conversation_id", "outbox", ["conversation_id"])
    op.create_index("ix_outbox_state_next_at", "outbox", ["state", "next_at"])
    op.create_table(
        "mailboxes",
        sa.Column("name", sa.String(500), nullable=False), sa.Column("validity", sa.BigInteger, nullable=False),
        sa.Column("uid", sa.BigInteger, nullable=False), sa.Column("since", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_mailboxes"),
    )  # fmt: skip
    op.create_table(
        "attachments",
        sa.Column("id", sa.String(32), nullable=False), sa.Column("conversation_id", sa.String(64), nullable=False),
        sa.Column("about", sa.LargeBinary, nullable=False), sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_attachments"),
        sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"], name="fk_attachments_conversation_id"),
    )  # fmt: skip
    op.create_index("ix_attachments_conversation_id", "attachments", ["conversation_id"])
