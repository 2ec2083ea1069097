"""Alembic's migrations, run by `coterie.store.database.migrate` at each start. Forward only."""
