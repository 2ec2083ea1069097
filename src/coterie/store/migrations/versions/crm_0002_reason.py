"""Why the CRM did not take something: sealed, as a CRM may quote what the customer wrote."""

import sqlalchemy as sa
from alembic import op

revision = "crm_0002"
down_revision = "crm_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("crm_writes", sa.Column("reason", sa.LargeBinary, nullable=True))
    op.drop_column("crm_writes", "error")
