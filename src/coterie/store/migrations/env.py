"""Alembic's entry point: it runs on the connection, and in the transaction, that `migrate` has opened."""

from alembic import context

from coterie.store.base import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, transactional_ddl=False)
context.run_migrations()
