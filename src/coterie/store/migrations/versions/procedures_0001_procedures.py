"""Runs of procedures, and the actions that were begun in them."""

import sqlalchemy as sa
from alembic import op

revision = "procedures_0001"
down_revision = None
branch_labels = ("procedures",)
depends_on = "desk_0001"

STATUSES = "('asking', 'approving', 'done', 'stopped', 'declined', 'refused', 'ended', 'handed_over', 'left')"
ACTIVE = sa.text("status IN ('asking', 'approving')")


def upgrade() -> None:
    op.create_table(
        "procedure_runs",
        sa.Column("id", sa.String(80), nullable=False), sa.Column("conversation_id", sa.String(64), nullable=False),
        sa.Column("customer", sa.String(200), nullable=False), sa.Column("name", sa.String(40), nullable=False),
        sa.Column("version", sa.String(32), nullable=False), sa.Column("status", sa.String(16), nullable=False),
        sa.Column("state", sa.LargeBinary, nullable=False), sa.Column("wants", sa.String(16), nullable=False),
        sa.Column("decision", sa.String(16), nullable=False), sa.Column("decided_by", sa.String(200), nullable=False),
        sa.Column("began_at", sa.Float, nullable=False), sa.Column("changed_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_procedure_runs"),
        sa.ForeignKeyConstraint(["conversation_id"], ["conversations.id"], name="fk_procedure_runs_conversation_id"),
        sa.CheckConstraint(f"status IN {STATUSES}", name=op.f("ck_procedure_runs_status")),
        sa.CheckConstraint("decision IN ('', 'approved', 'refused')", name=op.f("ck_procedure_runs_decision")),
        sa.CheckConstraint("(decision = '') = (decided_by = '')", name=op.f("ck_procedure_runs_somebody_decides")),
    )  # fmt: skip
    op.create_index("ix_procedure_runs_conversation_id", "procedure_runs", ["conversation_id"])
    op.create_index("uq_procedure_runs_active", "procedure_runs", ["conversation_id"], unique=True,
                    sqlite_where=ACTIVE, postgresql_where=ACTIVE)  # fmt: skip
    op.create_table(
        "procedure_actions",
        sa.Column("key", sa.String(130), nullable=False), sa.Column("run_id", sa.String(80), nullable=False),
        sa.Column("name", sa.String(40), nullable=False), sa.Column("status", sa.String(16), nullable=False),
        sa.Column("writes", sa.Boolean, nullable=False), sa.Column("arguments", sa.LargeBinary, nullable=False),
        sa.Column("result", sa.LargeBinary, nullable=False), sa.Column("needs_agreement", sa.Boolean, nullable=False),
        sa.Column("needs_approval", sa.Boolean, nullable=False), sa.Column("agreed_seq", sa.Integer),
        sa.Column("approved_by", sa.String(200), nullable=False), sa.Column("begun_at", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float),
        sa.PrimaryKeyConstraint("key", name="pk_procedure_actions"),
        sa.ForeignKeyConstraint(["run_id"], ["procedure_runs.id"], name="fk_procedure_actions_run_id"),
        sa.CheckConstraint("status IN ('begun', 'done', 'failed', 'unknown')",
                           name=op.f("ck_procedure_actions_status")),
        sa.CheckConstraint("NOT needs_agreement OR agreed_seq IS NOT NULL", name=op.f("ck_procedure_actions_agreed")),
        sa.CheckConstraint("NOT needs_approval OR approved_by <> ''", name=op.f("ck_procedure_actions_approved")),
    )  # fmt: skip
    op.create_index("ix_procedure_actions_run_id", "procedure_actions", ["run_id"])
