"""A declared source as a list shows it: what a reader may see of it, how fresh it is, what went wrong with it.

Notable: nothing is asked but what lies beside the index (record.py), so a page of sources costs the same whether a
database is large, slow or dead.
"""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from coterie.errors import CoterieError
from coterie.knowledge import documents
from coterie.knowledge.database import DIALECTS
from coterie.knowledge.documents_spec import DocumentsSpec
from coterie.knowledge.evidence import EVERYONE, Reader
from coterie.knowledge.graph import Graph
from coterie.knowledge.graph_learn import permissions_mark
from coterie.knowledge.record import Record, read_record
from coterie.knowledge.specs import DatabaseSpec, GraphSpec, RowsSpec, TablesSpec
from coterie.knowledge.sqlguard import view_of
from coterie.knowledge.tables import rows_of

Spec = DocumentsSpec | GraphSpec | DatabaseSpec | TablesSpec
log = logging.getLogger(__name__)


def readers_of(name: str, declared: Mapping[str, Spec]) -> set[str]:
    """The groups that may read something of a source: who is told that it failed as a whole."""
    spec = declared[name]
    if isinstance(spec, DocumentsSpec):
        return {*spec.readers, *(r for rule in spec.permissions for r in rule.readers)}
    if isinstance(spec, GraphSpec):
        held = [*(part.readers for part in spec.parts), *(table.readers for table in spec.tables)]
        held += [list(readers_of(spec.extract.documents, declared))] if spec.extract else []
        return {r for readers in held or [*spec.endpoint_graphs.values(), spec.readers] for r in readers}
    return {r for table in _tables(spec) for r in _groups(_rows(spec, table))}


def _groups(rows: RowsSpec) -> Collection[str]:
    """The groups that may read rows of a table."""
    return rows.rows.keys() if rows.rows and EVERYONE in rows.readers else rows.readers


def told(spec: DatabaseSpec | TablesSpec, part: str) -> list[Collection[str]]:
    """Who may know what is wrong with a table, or with a file: whoever may read one of its tables."""
    files = spec.files if isinstance(spec, TablesSpec) else {}
    tables = [table for table, file in files.items() if file == part] or [part]
    return [{r for table in tables for r in _groups(_rows(spec, table))}]


def overview(name: str, declared: Mapping[str, Spec], folder: Path, reader: Reader) -> dict[str, Any]:
    """The source with what the reader may see of it: its files, named graphs or tables, freshness and errors."""
    spec, record, mine = declared[name], read_record(folder), bool(readers_of(name, declared) & reader.may)
    if isinstance(spec, DocumentsSpec):
        found = documents.overview(name, spec, folder, reader)
        failed = found["errors"] if mine else []
        return found | {"errors": [*record.told(reader), *failed], "live": False}
    live = isinstance(spec, GraphSpec) and bool(spec.endpoint)
    errors = record.told(reader)
    if not live and not record.at and not errors and mine:
        errors = [f"{name}: not learned yet; run `coterie learn`"]
    try:
        parts = _graphs(spec, folder, record, reader) if isinstance(spec, GraphSpec) else _seen(spec, record, reader)
    except Exception as error:  # whatever is wrong with one source, the others are listed
        log.warning("%s: cannot be listed", name, exc_info=error)
        why = str(error) if isinstance(error, CoterieError) else f"{name}: cannot be listed ({type(error).__name__})"
        parts, errors = [], [*errors, *([why] if mine else [])]
    return {
        "name": name, "kind": spec.kind, "description": spec.description, "files": parts, "live": live,
        "unit": "triples" if isinstance(spec, GraphSpec) else "columns",
        "passages": sum(part["passages"] for part in parts), "indexed": record.at or None, "errors": errors,
    }  # fmt: skip


def _graphs(spec: GraphSpec, folder: Path, record: Record, reader: Reader) -> list[dict[str, Any]]:
    if spec.endpoint:
        graphs = spec.endpoint_graphs or {spec.endpoint: spec.readers}
        mine = {graph: readers for graph, readers in graphs.items() if set(readers) & reader.may}
        return [_part(graph, f"at {spec.endpoint}", 0, None, readers) for graph, readers in mine.items()]
    graph = Graph(folder, spec.timeout_s, permissions_mark(spec))
    seen = graph.seen(reader)
    sources = [s for s in graph.sources() if s.graph in seen]
    return [_part(s.name, "triples", s.triples, record.parts.get(s.name), s.readers) for s in sources]


def _seen(spec: DatabaseSpec | TablesSpec, record: Record, reader: Reader) -> list[dict[str, Any]]:
    dialect, declared = _dialect(spec), {table.lower(): table for table in _tables(spec)}
    out = []
    for key, columns in record.columns.items():
        if key in declared:  # else it was declared when it was learned
            view = view_of(declared[key], columns, _rows(spec, declared[key]), reader, dialect)
            if view:
                out.append(_part(key, ", ".join(view.columns), len(view.columns), record.parts.get(key), ()))
    return out


def _tables(spec: DatabaseSpec | TablesSpec) -> Collection[str]:
    return spec.files if isinstance(spec, TablesSpec) else spec.tables


def _rows(spec: DatabaseSpec | TablesSpec, table: str) -> RowsSpec:
    """Who may read a table; of a database's that is not declared, nobody."""
    if isinstance(spec, TablesSpec):
        return rows_of(spec, table)
    return {t.lower(): rows for t, rows in spec.tables.items()}.get(table.lower()) or RowsSpec(readers=[])


def _dialect(spec: DatabaseSpec | TablesSpec) -> str:
    if isinstance(spec, TablesSpec):
        return "duckdb"
    try:
        return DIALECTS.get(make_url(spec.url).get_backend_name(), "")
    except ArgumentError:  # learning says so
        return ""


def _part(path: str, title: str, size: int, indexed: str | None, readers: Collection[str]) -> dict[str, Any]:
    return {
        "path": path, "title": title, "passages": size, "indexed": indexed, "readers": sorted(readers), "error": None
    }  # fmt: skip
