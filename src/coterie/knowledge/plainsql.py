"""SQL in its shortest common form: what a small expert learns to write, and what a person reads beside an answer."""

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError
from sqlglot.optimizer.scope import Scope, traverse_scope


def simplify(sql: str, dialect: str = "sqlite", quoted_values: bool = False) -> str:
    """`sql` without the aliases it can do without, names in lower case, words of SQL in upper case.

    A table that stands alone in its FROM needs no alias; one beside others is called by its own name, unless the same
    table stands twice in reach. With `quoted_values`, "words" in double quotes are values, as MySQL and old SQLite
    take them. The meaning stays; what cannot be parsed comes back as it was.
    """
    try:
        tree = sqlglot.parse_one(sql, dialect=dialect)
        if quoted_values:
            for column in list(tree.find_all(exp.Column)):
                if column.this.args.get("quoted") and not column.table:
                    column.replace(exp.Literal.string(column.name))
        for identifier in tree.find_all(exp.Identifier):
            if not identifier.args.get("quoted"):
                identifier.set("this", identifier.name.lower())
        for join in tree.find_all(exp.Join):
            if join.side and join.kind == "OUTER":  # LEFT JOIN says it all
                join.set("kind", None)
        for scope in traverse_scope(tree):
            _shorten(scope)
    except SqlglotError:
        return sql
    return tree.sql(dialect=dialect)


def _shorten(scope: Scope) -> None:
    outside = {c.table for c in scope.external_columns}  # names of a query around this one
    tables = {alias: source for alias, source in scope.sources.items() if isinstance(source, exp.Table)}
    names = [table.name for table in tables.values()]
    for number, (alias, table) in enumerate(tables.items(), 1):
        columns = [c for c in scope.columns if c.table == alias]
        inner = [c for s in scope.subquery_scopes for c in s.external_columns if c.table == alias]
        if names.count(table.name) > 1 or inner or table.name in outside:
            short = f"{table.name[0]}{number}"
            if alias != table.name and not inner and short not in outside:
                table.set("alias", exp.TableAlias(this=exp.to_identifier(short)))
                for column in columns:
                    column.set("table", exp.to_identifier(short))
            continue
        for column in columns:
            alone = len(scope.sources) == 1 and not outside
            column.set("table", None if alone else exp.to_identifier(table.name))
        table.set("alias", None)
