"""Keys, pseudonyms, the audit log that cannot be changed, consents, accounts, sessions and tokens."""

import sqlalchemy as sa
from alembic import op

revision = "privacy_0001"
down_revision = None
branch_labels = ("privacy",)
depends_on = None

SAYS = "the audit log is only added to"


def upgrade() -> None:
    op.create_table(
        "master_keys",
        sa.Column("id", sa.String(32), nullable=False), sa.Column("proof", sa.LargeBinary, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_master_keys"),
    )  # fmt: skip
    op.create_table(
        "customer_keys",
        sa.Column("customer", sa.String(200), nullable=False), sa.Column("version", sa.Integer, nullable=False),
        sa.Column("master", sa.String(32), nullable=False), sa.Column("wrapped", sa.LargeBinary, nullable=False),
        sa.Column("made_at", sa.Float, nullable=False), sa.Column("destroyed_at", sa.Float),
        sa.PrimaryKeyConstraint("customer", "version", name="pk_customer_keys"),
    )  # fmt: skip
    op.create_table(
        "pseudonyms",
        sa.Column("customer", sa.String(200), nullable=False), sa.Column("pseudonym", sa.String(40), nullable=False),
        sa.Column("value", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("customer", "pseudonym", name="pk_pseudonyms"),
    )  # fmt: skip
    op.create_table(
        "audit",
        sa.Column("seq", sa.Integer, nullable=False, autoincrement=False), sa.Column("at", sa.Float, nullable=False),
        sa.Column("actor", sa.String(200), nullable=False), sa.Column("action", sa.String(80), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False), sa.Column("detail", sa.Text, nullable=False),
        sa.Column("link", sa.LargeBinary(32), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_audit"),
    )  # fmt: skip
    op.create_index("ix_audit_actor", "audit", ["actor"])
    op.create_index("ix_audit_subject", "audit", ["subject"])
    op.create_table(
        "consents",
        sa.Column("id", sa.Integer, nullable=False), sa.Column("customer", sa.String(200), nullable=False),
        sa.Column("purpose", sa.String(80), nullable=False), sa.Column("what", sa.String(16), nullable=False),
        sa.Column("wording", sa.String(80), nullable=False), sa.Column("at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_consents"),
    )  # fmt: skip
    op.create_index("ix_consents_customer", "consents", ["customer"])
    op.create_table(
        "accounts",
        sa.Column("name", sa.String(200), nullable=False), sa.Column("role", sa.String(16), nullable=False),
        sa.Column("password", sa.String(300), nullable=False), sa.Column("totp", sa.LargeBinary, nullable=False),
        sa.Column("totp_last", sa.Integer, nullable=False), sa.Column("subject", sa.String(300), nullable=False),
        sa.Column("failures", sa.Integer, nullable=False), sa.Column("locked_until", sa.Float, nullable=False),
        sa.Column("made_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_accounts"),
    )  # fmt: skip
    op.create_index("ix_accounts_subject", "accounts", ["subject"])
    op.create_table(
        "logins",
        sa.Column("secret", sa.String(64), nullable=False), sa.Column("account", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False), sa.Column("label", sa.String(80), nullable=False),
        sa.Column("scopes", sa.String(400), nullable=False), sa.Column("csrf", sa.String(64), nullable=False),
        sa.Column("made_at", sa.Float, nullable=False), sa.Column("used_at", sa.Float, nullable=False),
        sa.Column("until", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("secret", name="pk_logins"),
        sa.ForeignKeyConstraint(["account"], ["accounts.name"], name="fk_logins_account", ondelete="CASCADE"),
    )  # fmt: skip
    op.create_index("ix_logins_account", "logins", ["account"])
    op.create_index("ix_logins_until", "logins", ["until"])
    if op.get_context().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_is_never_{verb.lower()}d BEFORE {verb} ON audit "
                f"BEGIN SELECT RAISE(ABORT, '{SAYS}'); END"
            )
    else:
        op.execute(
            "CREATE FUNCTION audit_is_only_added_to() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"RAISE EXCEPTION '{SAYS}'; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_is_only_added_to BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
            "FOR EACH STATEMENT EXECUTE FUNCTION audit_is_only_added_to()"
        )
