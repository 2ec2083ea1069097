"""Conversations, messages, ratings; and the trigger that lets only the owner speak to the customer."""

import sqlalchemy as sa
from alembic import op

revision = "desk_0001"
down_revision = None
branch_labels = ("desk",)
depends_on = None

OWNED = (
    "(state = 'bot' AND owner = 'bot') OR (state = 'waiting' AND owner = 'queue')"
    " OR (state IN ('person', 'snoozed') AND owner LIKE 'agent:_%')"
    " OR (state = 'resolved' AND (owner = 'bot' OR owner LIKE 'agent:_%'))"
)
SPEAKS = (
    "NEW.kind = 'message' AND NEW.author <> 'customer'"
    " AND NEW.author <> (SELECT owner FROM conversations WHERE id = NEW.conversation_id)"
)
SAYS = "only the owner of a conversation speaks in it"


def upgrade() -> None:
    op.create_table(
        "conversations",
        sa.Column("id", sa.String(64), nullable=False), sa.Column("customer", sa.String(200), nullable=False),
        sa.Column("channel", sa.String(40), nullable=False), sa.Column("state", sa.String(16), nullable=False),
        sa.Column("owner", sa.String(200), nullable=False), sa.Column("version", sa.Integer, nullable=False),
        sa.Column("last_seq", sa.Integer, nullable=False), sa.Column("turn", sa.Integer, nullable=False),
        sa.Column("answering", sa.Integer), sa.Column("lease_until", sa.Float), sa.Column("wake_at", sa.Float),
        sa.Column("waiting_since", sa.Float), sa.Column("queue", sa.String(80), nullable=False),
        sa.Column("reason", sa.String(200), nullable=False), sa.Column("opened_at", sa.Float, nullable=False),
        sa.Column("changed_at", sa.Float, nullable=False), sa.Column("client_key", sa.String(80)),
        sa.PrimaryKeyConstraint("id", name="pk_conversations"),
        sa.UniqueConstraint("customer", "client_key", name="uq_conversations_customer_client_key"),
        sa.CheckConstraint(OWNED, name=op.f("ck_conversations_one_owner")),
        sa.CheckConstraint("answering IS NULL OR state = 'bot'",
                           name=op.f("ck_conversations_bot_answers_what_it_owns")),
        sa.CheckConstraint("(state = 'snoozed') = (wake_at IS NOT NULL)", name=op.f("ck_conversations_snoozed_wakes")),
    )  # fmt: skip
    op.create_index("ix_conversations_customer", "conversations", ["customer"])
    op.create_index("ix_conversations_state_changed_at", "conversations", ["state", "changed_at"])
    op.create_table(
        "messages",
        sa.Column("id", sa.Integer, nullable=False), sa.Column("conversation_id", sa.String(64), nullable=False),
        sa.Column("seq", sa.Integer, nullable=False), sa.Column("author", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False), sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("data", sa.JSON, nullable=False), sa.Column("at", sa.Float, nullable=False),
        sa.Column("client_key", sa.String(80)),
        sa.PrimaryKeyConstraint("id", name="pk_messages"),
        sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"], name="fk_messages_conversation_id"),
        sa.UniqueConstraint("conversation_id", "seq", name="uq_messages_conversation_id_seq"),
        sa.UniqueConstraint("conversation_id", "author", "client_key",
                            name="uq_messages_conversation_id_author_client_key"),
        sa.CheckConstraint("kind IN ('message', 'note', 'suggestion', 'event')", name=op.f("ck_messages_kind")),
    )  # fmt: skip
    op.create_table(
        "ratings",
        sa.Column("id", sa.Integer, nullable=False), sa.Column("conversation_id", sa.String(64), nullable=False),
        sa.Column("seq", sa.Integer, nullable=False), sa.Column("good", sa.Boolean, nullable=False),
        sa.Column("reason", sa.LargeBinary, nullable=False), sa.Column("at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_ratings"),
        sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"], name="fk_ratings_conversation_id"),
        sa.UniqueConstraint("conversation_id", "seq", name="uq_ratings_conversation_id_seq"),
    )  # fmt: skip
    if op.get_context().dialect.name == "sqlite":
        op.execute(
            f"CREATE TRIGGER only_the_owner_speaks BEFORE INSERT ON messages WHEN {SPEAKS} "
            f"BEGIN SELECT RAISE(ABORT, '{SAYS}'); END"
        )
    else:
        op.execute(
            "CREATE FUNCTION only_the_owner_speaks() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF {SPEAKS} THEN RAISE EXCEPTION '{SAYS}'; END IF; RETURN NEW; END $$"
        )
        op.execute(
            "CREATE TRIGGER only_the_owner_speaks BEFORE INSERT ON messages "
            "FOR EACH ROW EXECUTE FUNCTION only_the_owner_speaks()"
        )
