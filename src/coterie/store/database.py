"""Open the database, bring it to the newest version of its tables, and write to it.

Notable: on SQLite a transaction that will write takes the write lock at its beginning (BEGIN IMMEDIATE). Without
that, two readers that both turn into writers block each other and one of them fails at once, busy timeout or not.
Threads of one process wait for that lock in a queue of their own: SQLite lets whoever waits sleep and ask again, longer
each time, so that under load some come last again and again.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session

from coterie.errors import CoterieError, StorageError

BUSY_TIMEOUT_S = 30
MIGRATING = 0x636F7465  # of PostgreSQL's advisory lock: one process migrates, the others wait
_turns_lock, _turns = threading.Lock(), WeakKeyDictionary[Dialect, "threading.RLock"]()
_WRITES = "coterie_writes"  # execution option of a connection that begins with the write lock


def located(url: str, folder: Path) -> str:
    """`url`, with a relative SQLite file looked for in `folder`."""
    lead = "sqlite:///"
    relative = url.startswith(lead) and not url.startswith(lead + "/") and url != lead + ":memory:"
    return f"{lead}{folder.resolve() / url.removeprefix(lead)}" if relative else url


def open_database(url: str) -> Engine:
    """A pool of connections, its tables brought up to date. `url`: as SQLAlchemy reads it; sqlite or postgresql.

    Raises CoterieError for a URL that is none of ours, StorageError where the database cannot be opened.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise CoterieError("database: not a URL such as sqlite:///desk.db or postgresql://user@host/name") from error
    family = parsed.get_backend_name()
    if family == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    elif family != "sqlite":
        raise CoterieError(f"database: {family} is not supported; use sqlite or postgresql")
    elif parsed.database and parsed.database != ":memory:":
        _make_folder(Path(parsed.database).parent)
    try:
        engine = create_engine(parsed, **_options(parsed))
        if family == "sqlite":
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        migrate(engine)
    except NoSuchModuleError as error:
        raise CoterieError(f"database: {family} needs a driver that is not installed ({error})") from error
    except DBAPIError as error:
        raise StorageError(f"{parsed.render_as_string()}: the database cannot be opened ({error.orig})") from error
    return engine


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from error


def _options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() != "sqlite":
        return {"pool_size": 16, "max_overflow": 16, "pool_pre_ping": True}
    connect = {"timeout": BUSY_TIMEOUT_S, "isolation_level": None, "check_same_thread": False}
    if url.database in (None, "", ":memory:"):
        return {"connect_args": connect}
    # Opening one takes as long as a transaction, so those of a busy desk stay open; the latest used is taken first, as
    # each that is used holds up to 2 MiB of the database.
    return {"connect_args": connect, "pool_size": 32, "max_overflow": 96, "pool_use_lifo": True}


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    """Of each new connection. Without an isolation level, transactions begin where we say so (`_begin_sqlite`)."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")  # what was accepted outlives a power cut, not only a killed process
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(_WRITES) else "BEGIN")


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """A session in one transaction that writes: all of it, or nothing where the block raises."""
    with (
        _turn(engine),
        engine.connect().execution_options(**{_WRITES: True}) as connection,
        connection.begin(),
        Session(connection, expire_on_commit=False) as session,
    ):
        yield session
        session.flush()


def _turn(engine: Engine) -> AbstractContextManager[Any]:
    """This thread's turn to write, where one at a time can. The same thread may write in two databases."""
    if engine.dialect.name != "sqlite":
        return nullcontext()
    with _turns_lock:
        return _turns.setdefault(engine.dialect, threading.RLock())


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A session that sees one state of the database and writes nothing."""
    with engine.connect() as connection, Session(connection, expire_on_commit=False) as session:
        yield session


def migrate(engine: Engine) -> None:
    """Bring the tables to the newest version, in one transaction. Raises StorageError for those of a newer coterie."""
    config = Config()
    config.set_main_option("script_location", "coterie.store:migrations")
    with engine.connect().execution_options(**{_WRITES: True}) as connection, connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATING})
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "heads")
        except CommandError as error:
            raise StorageError(
                f"{engine.url.render_as_string()}: made by a newer version of coterie ({error}); install that version"
            ) from error
