"""A CRM that is any SQL database: four statements of the business's own, with named parameters.

    find   = "SELECT id FROM customers WHERE email = :customer"
    read   = "SELECT name, tier FROM customers WHERE id = :id"
    case   = "INSERT INTO cases (contact, subject, text, key) VALUES (:id, :subject, :text, :key)"
    note   = "INSERT INTO notes (case_id, text, key) VALUES (:case, :text, :key)"

A unique `key` in the last two tables makes a second try harmless: `case_of` and `note_of` then say which row it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from coterie.desk.crm import Case, Contact
from coterie.errors import CrmError


@dataclass(frozen=True)
class SqlCrm:
    """Parameters are bound, never pasted: what a customer writes is never SQL."""

    database: Engine
    find_sql: str
    read_sql: str
    case_sql: str = ""
    case_of_sql: str = "SELECT id FROM cases WHERE key = :key"
    note_sql: str = ""
    note_of_sql: str = "SELECT id FROM notes WHERE key = :key"

    def find(self, customer: str) -> str | None:
        row = self._row(self.find_sql, {"customer": customer})
        return str(next(iter(row.values()))) if row else None

    def read(self, id: str) -> Contact:
        row = self._row(self.read_sql, {"id": id})
        if row is None:
            raise CrmError(f"the CRM has no contact {id!r}")
        return Contact(id, row)

    def open_case(self, id: str, case: Case) -> str:
        given = {"id": id, "subject": case.subject, "text": case.text, "key": case.key}
        return self._write(self.case_sql, self.case_of_sql, given)

    def write_note(self, case_id: str, text: str, key: str) -> str:
        return self._write(self.note_sql, self.note_of_sql, {"case": case_id, "text": text, "key": key})

    def _row(self, statement: str, given: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            with self.database.connect() as connection:
                row = connection.execute(text(statement), given).mappings().first()
        except SQLAlchemyError as error:
            raise CrmError(f"the CRM's database failed: {_said(error)}") from error
        return dict(row) if row else None

    def _write(self, statement: str, of: str, given: Mapping[str, Any]) -> str:
        if not statement:
            raise CrmError("this CRM is only read: no statement to write with is declared")
        try:
            with self.database.begin() as connection:
                connection.execute(text(statement), given)
        except IntegrityError as error:
            found = self._row(of, {"key": given["key"]})
            if found is None:  # it is another rule of theirs that refuses
                raise CrmError(f"the CRM's database refused it: {error.orig}") from error
        except SQLAlchemyError as error:
            raise CrmError(f"the CRM's database failed: {_said(error)}") from error
        row = self._row(of, {"key": given["key"]})
        if row is None:
            raise CrmError("the CRM's database took it and cannot find it again: check case_of and note_of")
        return str(next(iter(row.values())))


def _said(error: SQLAlchemyError) -> str:
    """The database's own sentence, without the statement and what was bound to it."""
    return str(getattr(error, "orig", None) or type(error).__name__).partition("\n")[0]
