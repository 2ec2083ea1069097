"""The database: SQLite on one machine, PostgreSQL beyond it, with the same models and the same migrations."""
