"""Files as tables: CSV, Parquet and Excel, asked in SQL through DuckDB behind the same guard as a database.

Notable: the files are read while DuckDB may still read files, into tables in memory; then external access is closed
for good (`enable_external_access`, `lock_configuration`), so that no statement reaches a file, whatever it says.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from coterie.errors import SourceError, first_line
from coterie.knowledge.database import Database, open_database, stamp
from coterie.knowledge.schema import Column, TableSchema
from coterie.knowledge.specs import DatabaseSpec, RowsSpec, TablesSpec

MEMORY = "1GB"
COLUMNS = 2_000  # of one file; a table of a million columns is refused
EXCEL_ROWS = 200_000  # openpyxl reads cell by cell
LARGEST = 2 << 30  # bytes of a file


class Files:
    """The files of one declaration, loaded; read again where one of them changed."""

    def __init__(self, name: str, spec: TablesSpec, root: Path) -> None:
        self.name, self.spec, self.root = name, spec, root
        self.problems: dict[str, str] = {}  # file: why it is not among the tables
        self._loaded: tuple[object, duckdb.DuckDBPyConnection] | None = None
        self._lock = threading.Lock()

    def connection(self) -> duckdb.DuckDBPyConnection:
        """Locked down, with every file that could be read."""
        with self._lock:
            now = self.mark()
            if self._loaded is None or self._loaded[0] != now:
                connection = duckdb.connect(":memory:", config={"memory_limit": MEMORY, "threads": 2})
                self.problems = {}
                for table, file in self.spec.files.items():
                    try:
                        _load(connection, table, self.root / file)
                    except SourceError as error:
                        self.problems[file] = str(error)
                for setting in ("enable_external_access=false", "lock_configuration=true"):
                    connection.execute(f"SET {setting}")
                self._loaded = now, connection
            return self._loaded[1]

    def mark(self) -> tuple[object, ...]:
        """Another one where a file changed."""
        return tuple((f, stamp(self.root / f)) for f in self.spec.files.values())

    def tables(self) -> dict[str, TableSchema]:
        out = {}
        for table in self.spec.files:
            found = self.connection().cursor().execute(
                "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = ? "
                "ORDER BY ordinal_position", [table],
            ).fetchall()  # fmt: skip
            if found:
                about = self.spec.tables[table].description if table in self.spec.tables else ""
                out[table.lower()] = TableSchema(
                    table, tuple(Column(n, k.split("(")[0].lower()) for n, k in found), about
                )
        if not out:
            raise SourceError(f"{self.name}: no file could be read: {'; '.join(self.problems.values())}")
        return out

    def fetch(self, sql: str, limit: int) -> tuple[Sequence[str], list[Any], bool]:
        cursor = self.connection().cursor()
        clock = threading.Timer(self.spec.timeout_s, cursor.interrupt)
        clock.start()
        try:
            cursor.execute(sql)
            names = [d[0] for d in cursor.description or ()]
            rows = cursor.fetchmany(limit + 1)
        except duckdb.InterruptException as error:
            raise SourceError(f"{self.name}: stopped after {self.spec.timeout_s:g} s; ask for less") from error
        except duckdb.Error as error:
            raise SourceError(f"{self.name}: {first_line(error)}") from error
        finally:
            clock.cancel()
            cursor.close()
        return names, rows[:limit], len(rows) > limit


def open_tables(name: str, spec: TablesSpec, root: Path) -> tuple[Database, Files]:
    """The tables that `spec` declares; a file that cannot be read is among the problems of the second."""
    files = Files(name, spec, root)
    specs = {table: rows_of(spec, table) for table in spec.files}
    return Database(name, "duckdb", files.tables, specs, files.fetch, spec.rows, files.mark), files


def rows_of(spec: TablesSpec, table: str) -> RowsSpec:
    """Who may read a table, and what of it: everyone all, where the declaration does not say."""
    return spec.tables.get(table, RowsSpec.model_validate({}))


def open_tabular(name: str, spec: DatabaseSpec | TablesSpec, root: Path) -> Database:
    """What is asked in SQL: a database, or files as tables. Raises CoterieError where an address cannot be used."""
    return open_database(name, spec, root) if isinstance(spec, DatabaseSpec) else open_tables(name, spec, root)[0]


def _load(connection: duckdb.DuckDBPyConnection, table: str, file: Path) -> None:
    """Make `table` of a file. Raises SourceError."""
    kind, name = file.suffix.lower(), '"' + table.replace('"', '""') + '"'
    if not file.is_file():
        raise SourceError(f"{file}: no such file")
    if file.stat().st_size > LARGEST:
        raise SourceError(f"{file}: over {LARGEST >> 30} GB; put it into a database")
    try:
        if kind == ".csv":
            found = connection.read_csv(str(file), header=True)
        elif kind == ".parquet":
            found = connection.read_parquet(str(file))
        elif kind == ".xlsx":
            _load_excel(connection, name, file)
            return
        else:
            raise SourceError(f"{file}: tables are .csv, .parquet or .xlsx")
        if len(found.columns) > COLUMNS:
            raise SourceError(f"{file}: {len(found.columns)} columns; the most is {COLUMNS}")
        connection.register("incoming", found)
        connection.execute(f"CREATE TABLE {name} AS SELECT * FROM incoming")
        connection.unregister("incoming")
    except duckdb.Error as error:
        raise SourceError(f"{file}: cannot be read ({first_line(error)})") from error


def headings(first: Sequence[Any], width: int) -> list[str]:
    """A name for each of `width` columns, in place: `column_3` where the first row names none, `price_1` for the second
    that is called `price`, as DuckDB reads a CSV. Names that differ in case alone are one name in SQL."""
    taken: set[str] = set()
    out = []
    for number in range(width):
        said = first[number] if number < len(first) else None
        name = plain = str(said) if said is not None else f"column_{number + 1}"
        again = 0
        while name.casefold() in taken:
            again += 1
            name = f"{plain}_{again}"
        taken.add(name.casefold())
        out.append(name)
    return out


def _cut(row: Sequence[Any]) -> Sequence[Any]:
    """A row without the empty cells at its end."""
    end = len(row)
    while end and row[end - 1] is None:
        end -= 1
    return row[:end]


def _load_excel(connection: duckdb.DuckDBPyConnection, name: str, file: Path) -> None:
    """The first sheet, its first row as the columns' names; see `headings` for names that are missing or repeated."""
    import openpyxl
    import pyarrow as pa

    try:
        sheet = openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets[0]
        rows = sheet.iter_rows(values_only=True)
        first, cells = _cut(next(rows, ())), []
        for row in map(_cut, rows):
            if row:
                cells.append(row)
            if len(row) > COLUMNS:
                break
            if len(cells) > EXCEL_ROWS:
                raise SourceError(f"{file}: over {EXCEL_ROWS} rows; save it as .parquet or .csv")
        width = max(map(len, [first, *cells]))
        if not first or width > COLUMNS:
            raise SourceError(f"{file}: its first row must name the columns, {COLUMNS} at most")
    except SourceError:
        raise
    except Exception as error:  # openpyxl lets errors of zip, XML and its own through
        raise SourceError(f"{file}: not an Excel file ({type(error).__name__}: {str(error)[:100]})") from error
    columns = {}
    for i, title in enumerate(headings(first, width)):
        column = [row[i] if i < len(row) else None for row in cells]
        if (i >= len(first) or first[i] is None) and all(c is None for c in column):
            continue  # a gap between two columns
        columns[title] = _array(column)
    connection.register("incoming", pa.table(columns))
    connection.execute(f"CREATE TABLE {name} AS SELECT * FROM incoming")
    connection.unregister("incoming")


def _array(cells: list[Any]) -> Any:
    """A column of a sheet for DuckDB; as text where its cells are of several kinds, or its numbers too large."""
    import pyarrow as pa

    kinds = {type(c) for c in cells if c is not None}
    try:
        if kinds == {int, float}:
            return pa.array([None if c is None else float(c) for c in cells])
        if len(kinds) <= 1:
            return pa.array(cells)
    except (OverflowError, pa.ArrowException):
        pass
    return pa.array([None if c is None else str(c) for c in cells])
