"""SQL that may be run: one SELECT over allowed tables, each replaced by what this reader may see of it.

Notable: the statement is parsed, checked node by node against lists of what is allowed (whatever is not listed is
refused), rewritten, and written out again from the tree: the database never gets the text that was asked. Each table
becomes a subquery of its allowed columns and rows, so that a hidden column or row is not there to be asked for,
wherever in the statement the table stands. Comments go, and a second statement is refused. sqlglot reads some short
statements again and again (joins without ON, types called as functions), and writes some functions several times over,
each time twice as much: the steps of both are counted, and it is stopped.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlglot
from sqlglot import exp
from sqlglot.dialects.dialect import Dialect
from sqlglot.errors import SqlglotError

from coterie.errors import CoterieError, QueryRefused
from coterie.knowledge.evidence import Reader
from coterie.knowledge.specs import RowsSpec

LONGEST = 8_000  # characters of a statement
PARTS = 2_000  # nodes of its tree
TABLES = 12  # tables it may name, counting repeats
DEEPEST = 60  # brackets inside one another: the parser descends
STEPS = 10  # of reading for each token, and of writing for each part, beside FREE: plain SQL takes up to 2, and up to 4
FREE = 1_000
INVOLVED = "the SQL is too involved; write it in a plainer way"

NODES: frozenset[type[exp.Expression]] = frozenset({
    exp.Select, exp.Union, exp.Intersect, exp.Except, exp.Subquery, exp.With, exp.CTE, exp.From, exp.Join, exp.Where,
    exp.Group, exp.Having, exp.Order, exp.Ordered, exp.Limit, exp.Offset, exp.Distinct, exp.Table, exp.TableAlias,
    exp.Alias, exp.Column, exp.Identifier, exp.Star, exp.Literal, exp.Null, exp.Boolean, exp.Paren, exp.Tuple, exp.And,
    exp.Or, exp.Not, exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Is, exp.In, exp.Between, exp.Like,
    exp.ILike, exp.Escape, exp.Exists, exp.All, exp.Any, exp.Add, exp.Sub, exp.Mul, exp.Div, exp.IntDiv, exp.Mod,
    exp.Neg, exp.DPipe, exp.Case, exp.If, exp.Cast, exp.DataType, exp.DataTypeParam, exp.Window, exp.Var,
})  # fmt: skip
FUNCTIONS: frozenset[type[exp.Expression]] = frozenset({
    exp.Count, exp.Sum, exp.Avg, exp.Min, exp.Max, exp.Abs, exp.Round, exp.Floor, exp.Ceil, exp.Lower, exp.Upper,
    exp.Length, exp.Substring, exp.Trim, exp.Coalesce, exp.Nullif, exp.Extract, exp.Year, exp.Month, exp.Day,
    exp.CurrentDate, exp.TimeToStr, exp.Date, exp.RowNumber, exp.Rank, exp.DenseRank, exp.TsOrDsToTimestamp,
    exp.TsOrDsToDate, exp.Greatest, exp.Least, exp.Replace, exp.GroupConcat, exp.TimestampTrunc, exp.DateTrunc,
    exp.StrPosition,
})  # fmt: skip
NAMED = frozenset({"julianday", "total", "unaccent"})  # functions that sqlglot has no class for
TYPES = frozenset({
    "INT", "BIGINT", "SMALLINT", "TINYINT", "FLOAT", "DOUBLE", "DECIMAL", "TEXT", "VARCHAR", "CHAR", "DATE",
    "TIMESTAMP", "TIMESTAMPNTZ", "TIMESTAMPTZ", "DATETIME", "BOOLEAN", "UNKNOWN",
})  # fmt: skip
HIDDEN = frozenset({  # columns that a database adds of its own
    "rowid", "oid", "_rowid_", "ctid", "xmin", "xmax", "cmin", "cmax", "tableoid", "file_row_number", "filename",
})  # fmt: skip
TABLE_ARGS = frozenset({"this", "alias", "joins"})


@dataclass(frozen=True)
class View:
    """What one reader may see of one table. `condition` is SQL on the table itself, "" for all of its rows."""

    table: str  # as the database spells it
    columns: tuple[str, ...]
    condition: str = ""


def view_of(table: str, columns: Sequence[str], spec: RowsSpec, reader: Reader, dialect: str) -> View | None:
    """What `reader` may see of a table that has `columns`; None for nothing. Raises CoterieError for a bad spec.

    Where `spec.rows` has conditions, a row is seen that one of the reader's groups may see; a group that has none
    there sees no row.
    """
    if not set(spec.readers) & reader.may:
        return None
    known = {c.lower(): c for c in columns}
    for column in spec.columns:
        if column.lower() not in known:
            raise CoterieError(f"table {table}: there is no column {column!r}; there are {', '.join(columns)}")
    kept = tuple(known[c.lower()] for c in spec.columns) or tuple(columns)
    if not spec.rows:
        return View(table, kept)
    mine = [_condition(table, spec.rows[g], known, reader, dialect) for g in sorted(reader.may & spec.rows.keys())]
    return View(table, kept, " OR ".join(f"({c})" for c in mine)) if mine else None


def _condition(table: str, text: str, known: Mapping[str, str], reader: Reader, dialect: str) -> str:
    """The declared condition, with the reader's name in place of :reader."""
    try:
        tree = sqlglot.parse_one(text, dialect=dialect, into=exp.Condition)
    except SqlglotError as error:
        raise CoterieError(f"table {table}: rows: {text!r} is no SQL condition") from error
    for column in tree.find_all(exp.Column):  # one that is not there could mean another of the asked query
        if column.find_ancestor(exp.Select) is None and column.name.lower() not in known:
            raise CoterieError(f"table {table}: rows: {text!r} names {column.name!r}, which is no column of it")
    for place in list(tree.find_all(exp.Placeholder)):
        if place.name != "reader":
            raise CoterieError(f"table {table}: rows: {text!r} has :{place.name}; only :reader is known")
        name = exp.Literal.string(reader.name) if reader.name else exp.Null()  # a stranger is nobody, not ''
        tree = name if place is tree else tree
        place.replace(name)
    return tree.sql(dialect=dialect, comments=False)


def guard(sql: str, views: Mapping[str, View], dialect: str, limit: int) -> str:
    """`sql` as it may be run: with at most `limit` rows. `views` by their tables' names in lower case.

    Raises QueryRefused, saying why; nothing has been run then.
    """
    tree = _parse(sql, dialect)
    _check_nodes(tree)
    known = {c.lower() for view in views.values() for c in view.columns}
    ctes = _check_names(tree, views, known)
    for identifier in tree.find_all(exp.Identifier):
        identifier.set("this", identifier.name.lower())  # each subquery gives its columns in lower case
        identifier.set("quoted", True)
    tables = [t for t in tree.find_all(exp.Table) if t.name.lower() not in ctes]
    if len(tables) > TABLES:
        raise QueryRefused(f"the SQL names {len(tables)} tables; the most is {TABLES}")
    for table in tables:
        table.replace(_subquery(table, views[table.name.lower()], dialect))
    if asked := tree.args.get("limit"):
        if not isinstance(asked.expression, exp.Literal) or not asked.expression.is_int:
            raise QueryRefused("LIMIT takes a whole number")
        limit = min(limit, int(asked.expression.name))
    tree = tree.limit(limit, copy=False)  # type: ignore[attr-defined]
    return _write(tree, dialect)


def _write(tree: exp.Expression, dialect: str) -> str:
    known = Dialect.get_or_raise(dialect)
    writer = _counted(known.generator_class, "sql")(dialect=known, comments=False)
    writer.left = FREE + STEPS * sum(1 for _ in tree.walk())
    try:
        written: str = writer.generate(tree, copy=False)
    except RecursionError as error:
        raise QueryRefused(INVOLVED) from error
    return written


@cache
def _counted(kind: type, method: str) -> type[Any]:
    """`kind`, of which `method` may be called `left` times; then it raises QueryRefused."""
    once = getattr(kind, method)

    def counted(self: Any, *args: Any, **more: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise QueryRefused(INVOLVED)
        return once(self, *args, **more)

    return type(kind.__name__, (kind,), {method: counted})


def _parse(sql: str, dialect: str) -> exp.Expression:
    if len(sql) > LONGEST:
        raise QueryRefused(f"SQL of {len(sql)} characters; the most is {LONGEST}")
    if "\x00" in sql:
        raise QueryRefused("SQL with a zero byte")
    depth = deepest = 0
    for c in sql:
        depth += (c == "(") - (c == ")")
        deepest = max(depth, deepest)
    if deepest > DEEPEST or sql.lower().count("not ") > 200 or sql.count("-") > 400:
        raise QueryRefused(f"the SQL nests more than {DEEPEST} deep")
    try:
        known = Dialect.get_or_raise(dialect)
        tokens, parser = known.tokenize(sql), _counted(known.parser_class, "_advance")(dialect=known)
        parser.left = FREE + STEPS * len(tokens)
        found = [s for s in parser.parse(tokens, sql) if s is not None]
    except (SqlglotError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise QueryRefused(f"this is no SQL that can be run: {(str(error).splitlines() or [''])[0][:200]}") from error
    if len(found) != 1:
        raise QueryRefused(f"one statement may be run, not {len(found)}")
    tree = found[0]
    if not isinstance(tree, exp.Select | exp.SetOperation):
        raise QueryRefused(f"only SELECT may be run, not {tree.key.upper()}")
    return tree


def _nodes(tree: exp.Expression) -> Iterator[exp.Expr]:
    for number, node in enumerate(tree.walk()):
        if number > PARTS:
            raise QueryRefused(f"SQL of more than {PARTS} parts")
        yield node


def _check_nodes(tree: exp.Expression) -> None:
    """Every part of the statement is of a kind that is listed."""
    for node in _nodes(tree):
        kind = type(node)
        if kind is exp.Anonymous:
            if node.name.lower() not in NAMED:
                raise QueryRefused(f"the function {node.name[:40]} is not allowed")
        elif kind is exp.DataType:
            if node.this.name not in TYPES:  # a cast to regclass asks the catalogue
                raise QueryRefused(f"the type {node.sql()[:40]} is not allowed")
        elif kind is exp.With and node.args.get("recursive"):
            raise QueryRefused("WITH RECURSIVE is not allowed")
        elif kind is exp.Select and (node.args.get("into") or node.args.get("locks") or node.args.get("hint")):
            raise QueryRefused("INTO, FOR UPDATE and hints are not allowed")
        elif kind is exp.Cast and not isinstance(node.args.get("to"), exp.DataType):
            raise QueryRefused("this cast is not allowed")
        elif kind not in NODES and kind not in FUNCTIONS:
            what = "function" if isinstance(node, exp.Func) else "SQL"
            raise QueryRefused(f"the {what} {node.key.upper()} is not allowed")


def _check_names(tree: exp.Expression, views: Mapping[str, View], known: set[str]) -> set[str]:
    """Tables, columns and names made up in the statement; gives the names of its WITH parts."""
    ctes = [c.alias.lower() for c in tree.find_all(exp.CTE)]
    if len(set(ctes)) != len(ctes) or set(ctes) & views.keys():
        raise QueryRefused("a WITH part may not have the name of a table, or of another part")
    for table in tree.find_all(exp.Table):
        extra = {k for k, v in table.args.items() if v} - TABLE_ARGS
        if extra or not isinstance(table.this, exp.Identifier):
            raise QueryRefused(f"{table.sql()[:60]} is not a plain table; name one of {_listed(views)}")
        if table.name.lower() not in views and table.name.lower() not in ctes:
            raise QueryRefused(f"there is no table {table.name[:60]!r} to ask; there are {_listed(views)}")
        if alias := table.args.get("alias"):
            if alias.args.get("columns"):
                raise QueryRefused("columns of a table may not be renamed where it is named")
            if alias.name.lower() in views and alias.name.lower() != table.name.lower():
                raise QueryRefused("a table may not be called by the name of another")
    for name in (i.name.lower() for join in tree.find_all(exp.Join) for i in join.args.get("using") or ()):
        if name not in known:
            raise QueryRefused(f"there is no column {name[:60]!r} to ask")
    made = {a.alias.lower() for a in tree.find_all(exp.Alias) if a.this.name.lower() != a.alias.lower()}
    made |= {i.name.lower() for a in tree.find_all(exp.TableAlias) for i in a.args.get("columns") or ()}
    for column in tree.find_all(exp.Column):
        name = column.name.lower()
        if column.args.get("db") or column.args.get("catalog"):
            raise QueryRefused(f"{column.sql()[:60]}: name a column as column, or table.column")
        if not isinstance(column.this, exp.Star) and (name in HIDDEN - known or name not in known | made):
            raise QueryRefused(f"there is no column {column.name[:60]!r} to ask")
    return set(ctes)


def _listed(views: Mapping[str, View]) -> str:
    return ", ".join(sorted(views)) or "none"


def _subquery(table: exp.Table, view: View, dialect: str) -> exp.Subquery:
    """(SELECT allowed columns FROM table WHERE condition) AS the name by which the statement calls it."""
    cells = (exp.alias_(exp.column(exp.to_identifier(c, quoted=True)), c.lower(), quoted=True) for c in view.columns)
    inner = exp.select(*cells)
    inner = inner.from_(exp.Table(this=exp.to_identifier(view.table, quoted=True)))
    if view.condition:
        inner = inner.where(sqlglot.parse_one(view.condition, dialect=dialect, into=exp.Condition))
    name = exp.to_identifier((table.alias or table.name).lower(), quoted=True)
    out = exp.Subquery(this=inner, alias=exp.TableAlias(this=name))
    if joins := table.args.get("joins"):
        out.set("joins", joins)
    return out
