"""SQLite that runs what a model or a stranger wrote: reading only, within a time, no long values."""

import sqlite3
import time

READING = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION})


def cage(connection: sqlite3.Connection, seconds: float, longest: int, allowed: frozenset[int] = READING) -> None:
    """From now on `connection` does nothing but `allowed` (no ATTACH, no PRAGMA, no writing, no load_extension), gives
    no value over `longest` characters, and interrupts a statement `seconds` from now."""
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest)
    connection.set_authorizer(
        lambda action, a, b, *_: (
            sqlite3.SQLITE_OK if action in allowed and "load_extension" not in (a, b) else sqlite3.SQLITE_DENY
        )
    )
    end = time.monotonic() + seconds
    connection.set_progress_handler(lambda: int(time.monotonic() > end), 1000)
