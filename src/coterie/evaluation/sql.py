"""Execution match for text-to-SQL: do two queries give the same rows? Runs what a model wrote, so it runs it caged.

What the cage is: the database is opened read-only and immutable; an authorizer lets through reading and functions
only (no ATTACH, no PRAGMA, no writing, no load_extension); a clock stops a query that takes too long, and a limit one
that returns too much. SQLite's own code runs in this process: a flaw in SQLite itself is not guarded against.
"""

import math
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from coterie.errors import DataError
from coterie.store.sqlite import READING, cage

SECONDS, ROWS, LENGTH = 2.0, 10_000, 10_000  # of one query: time, rows taken, characters of text or blob
ALLOWED = READING | {33}  # SQLITE_RECURSIVE
Row = tuple[Any, ...]


class QueryFailed(Exception):
    """A query that cannot be run, or not within the limits."""


def rows_of(database: Path, query: str, seconds: float = SECONDS) -> list[Row]:
    """What `query` gives. Raises QueryFailed, or DataError where the database itself cannot be opened."""
    if not database.is_file():
        raise DataError(f"{database}: no such database")
    connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    try:
        try:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.DatabaseError as error:
            raise DataError(f"{database}: not a SQLite database ({error})") from error
        cage(connection, seconds, 10 * LENGTH, ALLOWED)
        try:
            cursor = connection.execute(query.strip().rstrip(";"))
            if cursor.description is None:  # nothing, or a comment: no rows is not what it answered
                raise QueryFailed("not a query")
            found: list[Row] = cursor.fetchmany(ROWS + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            raise QueryFailed(str(error)) from error
        if len(found) > ROWS:
            raise QueryFailed(f"more than {ROWS} rows")
        return found
    finally:
        connection.close()


def execution_match(database: Path, query: str, wanted: str) -> float:
    """1 where both queries give the same rows, as a bag, or in order where `wanted` orders them (Zhong et al. 2017).

    A query that fails scores 0. Raises DataError where the wanted query itself fails.
    """
    try:
        gold = rows_of(database, wanted)
    except QueryFailed as error:
        raise DataError(f"the wanted query cannot be run on {database}: {error}: {wanted}") from error
    try:
        found = rows_of(database, query)
    except QueryFailed:
        return 0.0
    a, b = ([tuple(map(_plain, row)) for row in rows] for rows in (found, gold))
    return float(a == b if "order by" in wanted.lower() else Counter(a) == Counter(b))


def _plain(cell: Any) -> Any:
    """Numbers compare by value to 9 digits, whether stored as whole or floating ones."""
    if isinstance(cell, int | float) and math.isfinite(cell):
        return float(f"{cell:.9g}")
    return cell


def same_query(query: str, wanted: str) -> float:
    """1 where the texts agree but for space, case, quotes and a closing semicolon: all that can be told where a data
    set has no table contents (WikiSQL here). Stricter than execution: another wording of the same query scores 0."""

    def plain(text: str) -> str:
        spaced = "".join(f" {c} " if c in "(),=<>;" else c for c in text.lower().replace('"', "'"))
        return " ".join(spaced.split()).replace("< =", "<=").replace("> =", ">=").rstrip("; ")

    return float(plain(query) == plain(wanted))
