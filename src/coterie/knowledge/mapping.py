"""Rows of tables as triples, as a declaration says: an address, a type, a name, values and links to other rows."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyoxigraph as ox
from sqlalchemy import Engine, MetaData, Table, select
from sqlalchemy.exc import NoSuchTableError, SQLAlchemyError

from coterie.errors import SourceError, first_line
from coterie.knowledge.specs import MappingSpec

XSD, RDFS = "http://www.w3.org/2001/XMLSchema#", "http://www.w3.org/2000/01/rdf-schema#"
TYPE = ox.NamedNode("http://www.w3.org/1999/02/22-rdf-syntax-ns#type")
LABEL = ox.NamedNode(RDFS + "label")
ALIAS = ox.NamedNode("http://www.w3.org/2004/02/skos/core#altLabel")
Row = Mapping[str, Any]


def relation(base: str, name: str) -> ox.NamedNode:
    """The IRI of a relation or a type that is declared as plain words."""
    return ox.NamedNode(f"{base}{quote(name.strip().replace(' ', '_'), safe='')}")


def map_rows(spec: MappingSpec, rows: Iterable[Row], base: str) -> Iterator[ox.Triple]:
    """The triples of `rows`. An empty cell says nothing; a row whose address lacks a cell is left out.

    Raises SourceError where the declaration names a column that is not there, or makes an address that is no IRI.
    """
    where = spec.table or spec.file
    try:
        yield from _map_rows(spec, rows, base, where)
    except ValueError as error:
        raise SourceError(f"{where}: cannot be mapped ({first_line(error)})") from error


def _map_rows(spec: MappingSpec, rows: Iterable[Row], base: str, where: str) -> Iterator[ox.Triple]:
    kind = relation(base, spec.type[:1].upper() + spec.type[1:])  # a relation of the same name is another thing
    words = {kind: spec.type, **{relation(base, n): n for n in (*spec.properties, *spec.links)}}
    yield from (ox.Triple(node, LABEL, ox.Literal(name)) for node, name in words.items())
    for row in rows:
        address = _fill(spec.id, row, where, quote_cells=True)
        if address is None:
            continue
        subject = ox.NamedNode(base + address)
        yield ox.Triple(subject, TYPE, kind)
        for predicate, template in ((LABEL, spec.label), *((ALIAS, alias) for alias in spec.aliases)):
            if template and (name := _fill(template, row, where)):
                yield ox.Triple(subject, predicate, ox.Literal(name))
        for name, column in spec.properties.items():
            if (value := literal(_cell(row, column, where))) is not None:
                yield ox.Triple(subject, relation(base, name), value)
        for name, template in spec.links.items():
            if (target := _fill(template, row, where, quote_cells=True)) is not None:
                yield ox.Triple(subject, relation(base, name), ox.NamedNode(base + target))


def _cell(row: Row, column: str, where: str) -> Any:
    if column not in row:
        raise SourceError(f"{where}: there is no column {column!r}; there are {', '.join(map(str, row))[:500]}")
    return row[column]


def _fill(template: str, row: Row, where: str, quote_cells: bool = False) -> str | None:
    """The template with this row's cells; None where one of them is empty."""
    cells = {c: _cell(row, c, where) for c in re.findall(r"\{([^{}]+)\}", template)}
    if any(v is None or v == "" for v in cells.values()):
        return None
    for column, value in cells.items():
        template = template.replace(f"{{{column}}}", quote(str(value), safe="") if quote_cells else str(value))
    return template.strip()


def literal(value: Any) -> ox.Literal | None:
    """A cell as a literal of its kind; None for an empty one, and for bytes, which say nothing to a reader."""
    if value is None or value == "" or isinstance(value, bytes | bytearray | memoryview):
        return None
    kinds: dict[type, str] = {bool: "boolean", int: "integer", float: "double", Decimal: "decimal",
                              datetime: "dateTime", date: "date"}  # fmt: skip
    kind = kinds.get(type(value))
    if kind is None:
        return ox.Literal(str(value))
    text = str(value).lower() if kind == "boolean" else value.isoformat() if hasattr(value, "isoformat") else str(value)
    return ox.Literal(text, datatype=ox.NamedNode(XSD + kind))


def csv_rows(file: Path) -> Iterator[Row]:
    """The rows of a CSV file. Raises SourceError, naming file and line."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as f:
            for row in csv.DictReader(f):
                row.pop(None, None)  # cells beyond the header
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{file}: cannot be read as UTF-8 CSV ({error})") from error


def table_rows(engine: Engine, name: str) -> Iterator[Row]:
    """The rows of a database table, a thousand at a time. Raises SourceError."""
    try:
        table = Table(name, MetaData(), autoload_with=engine)
        with engine.connect().execution_options(stream_results=True, yield_per=1000) as connection:
            yield from map(dict, connection.execute(select(table)).mappings())
    except NoSuchTableError as error:
        raise SourceError(f"table {name}: there is no such table") from error
    except (SQLAlchemyError, ValueError, TypeError, ArithmeticError) as error:  # a text where the type says a date
        raise SourceError(f"table {name}: cannot be read ({first_line(error)})") from error
