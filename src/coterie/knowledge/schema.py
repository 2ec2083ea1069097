"""The tables of a database as people and models read them: columns, types, keys, comments and samples."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Engine, inspect
from sqlalchemy.exc import SQLAlchemyError

from coterie.errors import CoterieError, SourceError, first_line

SAMPLES = 3  # values shown of a column
WIDTH = 24  # characters of one


@dataclass(frozen=True)
class Column:
    """One column. `refers`: table and column it is a key of, or "". `samples`: values that a reader may see."""

    name: str
    type: str
    comment: str = ""
    key: bool = False
    refers: str = ""
    samples: tuple[str, ...] = ()


@dataclass(frozen=True)
class TableSchema:
    """One table, its name as the database spells it."""

    name: str
    columns: tuple[Column, ...]
    comment: str = ""


def read_schema(engine: Engine, wanted: Mapping[str, str]) -> dict[str, TableSchema]:
    """The tables (or views) `wanted`, with descriptions that go before the database's comments; by lower-case name.

    Raises SourceError for a database that cannot be read, CoterieError for a table that is not there.
    """
    try:
        seen = inspect(engine)
        there = {n.lower(): n for n in [*seen.get_table_names(), *seen.get_view_names()]}
        out = {}
        for asked, description in wanted.items():
            name = there.get(asked.lower())
            if name is None:
                raise CoterieError(f"there is no table {asked!r}; there are {', '.join(sorted(there.values()))[:500]}")
            keys = set(seen.get_pk_constraint(name)["constrained_columns"])
            refers = {
                a: f"{f['referred_table']}.{b}"
                for f in seen.get_foreign_keys(name)
                for a, b in zip(f["constrained_columns"], f["referred_columns"], strict=False)
            }
            columns = tuple(
                Column(
                    c["name"], _type(c["type"]), c.get("comment") or "", c["name"] in keys, refers.get(c["name"], "")
                )
                for c in seen.get_columns(name)
            )
            try:
                comment = seen.get_table_comment(name)["text"] or ""
            except NotImplementedError:  # SQLite has none
                comment = ""
            out[name.lower()] = TableSchema(name, columns, description or comment)
        return out
    except SQLAlchemyError as error:
        raise SourceError(f"the database cannot be read ({first_line(error)})") from error


def _type(kind: object) -> str:
    try:
        return str(kind).split("(")[0].lower()
    except SQLAlchemyError:  # a type that SQLAlchemy has no name for
        return ""


def describe(tables: Mapping[str, TableSchema], samples: bool = True) -> str:
    """The tables as a model reads them, one a line, names in lower case: city (city_name, population, ...)."""
    lines = []
    for table in tables.values():
        cells = []
        for c in table.columns:
            shown = f" [{'; '.join(c.samples)}]" if samples and c.samples else ""
            about = f" -- {c.comment}" if c.comment else ""
            refers = f" = {c.refers.lower()}" if c.refers else ""
            cells.append(f"{c.name.lower()}{refers}{shown}{about}")
        about = f": {table.comment}" if table.comment else ""
        lines.append(f"{table.name.lower()} ({', '.join(cells)}){about}")
    return "\n".join(lines)
