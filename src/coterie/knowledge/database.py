"""A SQL database (SQLite or PostgreSQL) that is only read, and only what the asking reader may see of it.

Notable: three walls stand one behind the other. The statement is rewritten by sqlguard.py; the connection is read
only; and SQLite's authorizer, or PostgreSQL's read-only transaction, refuses the rest. A clock stops what takes long.
"""

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool
from sqlglot import exp

from coterie.errors import CoterieError, SourceError, Unreachable, first_line
from coterie.knowledge.evidence import Reader
from coterie.knowledge.schema import SAMPLES, WIDTH, TableSchema, read_schema
from coterie.knowledge.specs import DatabaseSpec, RowsSpec
from coterie.knowledge.sqlguard import View, guard, view_of
from coterie.recent import Recent
from coterie.store.sqlite import cage

DIALECTS = {"sqlite": "sqlite", "postgresql": "postgres", "duckdb": "duckdb"}  # SQLAlchemy's name: sqlglot's
LONGEST = 1_000_000  # characters of a cell, SQLite
LOOKED_AT = 20_000  # rows of a table, for its values
VALUES = 1_000  # different ones of a column
VALUE = 80  # characters of one: the grammar lets a model write no more
FRESH_S = 60.0  # for which a database that does not say when it changed is taken as it was read
COLUMNS = 2_000  # whose values are kept, each as one group of readers sees it


@dataclass(frozen=True)
class Answer:
    """What a statement gave. `sql` is what was asked, `ran` what the database got; `cut`: there were more rows."""

    sql: str
    ran: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    cut: bool

    def line(self, row: tuple[Any, ...]) -> str:
        """One of the rows as evidence says it."""
        return ", ".join(f"{c}: {'' if v is None else v}" for c, v in zip(self.columns, row, strict=True))


class Database:
    """The tables that `specs` names, of the database behind `fetch`; see `open_database` and tables.py."""

    def __init__(
        self, name: str, dialect: str, tables: Callable[[], dict[str, TableSchema]], specs: dict[str, RowsSpec],
        fetch: Callable[[str, int], tuple[Sequence[str], list[Any], bool]], rows: int,
        mark: Callable[[], object] = lambda: int(time.monotonic() / FRESH_S),
    ) -> None:  # fmt: skip
        """`mark` is another one where the content may be: what was read under the former is read again then."""
        self.name, self.dialect, self.rows = name, dialect, rows
        self._specs = {t.lower(): s for t, s in specs.items()}
        self._fetch, self._read, self._mark = fetch, tables, mark
        self._tables: tuple[object, dict[str, TableSchema]] | None = None
        self._values = Recent[tuple[View, str], tuple[object, tuple[str, ...]]](COLUMNS, 3600)

    def tables(self) -> dict[str, TableSchema]:
        """All tables, without samples. Raises SourceError where they cannot be read; the next call tries again."""
        mark, kept = self._mark(), self._tables
        if kept is None or kept[0] != mark:
            self._tables = kept = mark, self._read()
        return kept[1]

    def views(self, reader: Reader) -> dict[str, View]:
        """What `reader` may see, by table in lower case."""
        found = {
            key: view_of(table.name, [c.name for c in table.columns], self._specs[key], reader, self.dialect)
            for key, table in self.tables().items()
        }
        return {key: view for key, view in found.items() if view}

    def schema(self, reader: Reader) -> dict[str, TableSchema]:
        """The same, with types, comments, and samples of the rows that this reader may see."""
        tables = self.tables()
        return {key: self._sample(tables[key], view) for key, view in self.views(reader).items() if key in tables}

    def run(self, sql: str, reader: Reader) -> Answer:
        """Raises QueryRefused before anything is run, SourceError where running it fails."""
        ran = self._guarded(sql, reader)
        columns, rows, cut = self._fetch(ran, self.rows)
        return Answer(sql, ran, tuple(columns), tuple(tuple(r) for r in rows), cut)

    def _guarded(self, sql: str, reader: Reader) -> str:
        return guard(sql, self.views(reader), self.dialect, self.rows + 1)

    def values(self, view: View, column: str) -> tuple[str, ...]:
        """Different short values of a text column, of the rows that `view` shows. Empty where it cannot be read.

        Kept for all who have this view, until the database changes. Raises Unreachable.
        """
        mark, key = self._mark(), (view, column.lower())
        kept = self._values.get(key)
        if kept is None or kept[0] != mark:
            self._values.put(key, kept := (mark, self._read_values(view, column.lower())))
        return kept[1]

    def _read_values(self, view: View, column: str) -> tuple[str, ...]:
        name, table = (exp.to_identifier(n, quoted=True).sql(self.dialect) for n in (column, view.table.lower()))
        inner = f"SELECT {name} FROM {table} WHERE LENGTH(CAST({name} AS TEXT)) <= {VALUE} LIMIT {LOOKED_AT}"
        sql = f"SELECT DISTINCT {name} FROM ({inner}) AS looked LIMIT {VALUES}"
        try:
            found = self._fetch(guard(sql, {view.table.lower(): view}, self.dialect, VALUES), VALUES)[1]
        except Unreachable:
            raise
        except CoterieError:
            return ()
        return tuple(r[0] for r in found if isinstance(r[0], str))

    def _sample(self, table: TableSchema, view: View) -> TableSchema:
        kept = set(view.columns)
        sampled = []
        for column in table.columns:
            if column.name in kept:
                seen = self.values(view, column.name)[: SAMPLES * 4]
                short = [v for v in seen if len(v) <= WIDTH and v.isprintable()][:SAMPLES]
                sampled.append(replace(column, samples=tuple(short)))
        return replace(table, columns=tuple(sampled))


def open_database(name: str, spec: DatabaseSpec, root: Path) -> Database:
    """The database that `spec` declares. Raises CoterieError where its address cannot be used; it need not be alive."""
    try:
        url = make_url(spec.url)
        backend = url.get_backend_name()
    except ArgumentError as error:
        raise CoterieError(f"knowledge.{name}.url: {spec.url!r} is no SQLAlchemy address") from error
    gone: type[SourceError] = SourceError
    marks: list[Callable[[], object]] = []
    if backend == "sqlite":
        file = root / (url.database or "")
        if not url.database or url.query:
            raise CoterieError(f"knowledge.{name}.url: name a file: sqlite:///shop.db")
        engine, run = sqlite_engine(file), _run_sqlite
        marks = [lambda: (stamp(file), stamp(Path(f"{file}-wal")))]
    elif backend == "postgresql":
        engine, run, gone = postgresql_engine(f"knowledge.{name}", url, spec.timeout_s), _run_postgresql, Unreachable
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")  # each statement begins its own transaction
    else:
        raise CoterieError(f"knowledge.{name}.url: {backend} is not known; sqlite and postgresql are")
    wanted = {table: rows.description for table, rows in spec.tables.items()}

    def fetch(sql: str, limit: int) -> tuple[Sequence[str], list[Any], bool]:
        try:
            with engine.connect() as connection:
                raw = connection.connection.dbapi_connection
                assert raw is not None
                columns, rows = run(raw, sql, limit + 1, spec.timeout_s)
        except SourceError as error:
            raise type(error)(f"{name}: {error}") from error
        except SQLAlchemyError as error:
            raise gone(f"{name}: the database cannot be reached ({first_line(error)})") from error
        return columns, rows[:limit], len(rows) > limit

    def read() -> dict[str, TableSchema]:
        try:
            return read_schema(engine, wanted)
        except SourceError as error:
            raise gone(f"{name}: {error}") from error
        except CoterieError as error:
            raise CoterieError(f"knowledge.{name}: {error}") from error

    return Database(name, DIALECTS[backend], read, spec.tables, fetch, spec.rows, *marks)


def stamp(file: Path) -> tuple[int, int]:
    """Size and time of change of a file; another pair where its content changed, (0, 0) where there is none."""
    try:
        about = file.stat()
    except OSError:
        return 0, 0
    return about.st_size, about.st_mtime_ns


def sqlite_engine(file: Path) -> Engine:
    """Of a file that is only read, and not made where it is missing."""

    def connect() -> sqlite3.Connection:
        if not file.is_file():
            raise sqlite3.OperationalError(f"{file.name}: no such file")
        return sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)

    return create_engine("sqlite://", creator=connect, poolclass=NullPool)


def _run_sqlite(raw: Any, sql: str, most: int, timeout_s: float) -> tuple[list[str], list[Any]]:
    connection: sqlite3.Connection = raw
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    cage(connection, timeout_s, LONGEST)
    try:
        cursor = connection.execute(sql)
        return [d[0] for d in cursor.description or ()], cursor.fetchmany(most)
    except sqlite3.OperationalError as error:
        slow = "interrupted" in str(error)
        raise SourceError(f"stopped after {timeout_s:g} s; ask for less" if slow else str(error)) from error
    except (sqlite3.Error, OverflowError, MemoryError) as error:
        raise SourceError(str(error)) from error


def postgresql_engine(where: str, url: URL, timeout_s: float) -> Engine:
    """Of a PostgreSQL that is only read. Raises CoterieError, naming `where` it is declared."""
    how = {"connect_timeout": max(2, round(timeout_s)), "options": "-c default_transaction_read_only=on"}
    try:
        return create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool, connect_args=how)
    except ImportError as error:
        raise CoterieError(f"{where}: pip install 'coterie[postgres]' to read it") from error


def _run_postgresql(raw: Any, sql: str, most: int, timeout_s: float) -> tuple[list[str], list[Any]]:
    import psycopg

    try:
        with raw.cursor() as cursor:
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            cursor.execute(f"SET LOCAL statement_timeout = {round(timeout_s * 1000)}")
            cursor.execute(sql.encode())  # without parameters: psycopg leaves percent signs alone
            names = [d.name for d in cursor.description or ()]
            rows = cursor.fetchmany(most)
            cursor.execute("ROLLBACK")
            return names, rows
    except psycopg.errors.QueryCanceled as error:
        raise SourceError(f"stopped after {timeout_s:g} s; ask for less") from error
    except psycopg.Error as error:
        raise (Unreachable if raw.broken else SourceError)(first_line(error)) from error
