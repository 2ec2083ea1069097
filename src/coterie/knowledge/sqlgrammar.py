"""The SQL that a model may write about some tables, as a grammar: their names and no others, SELECT and nothing else.

It is the common form that plainsql.py writes: one space between words, words of SQL in upper case, names in lower
case. What it lets through still passes sqlguard.py; the grammar only keeps a small model from writing in vain.
"""

import re
from collections.abc import Iterable

from coterie.errors import CoterieError
from coterie.knowledge.schema import TableSchema
from coterie.model.constrain import Constraint

# Words that cannot stand as a name without quotes; a few more than each database reserves do no harm.
_WORDS = """
all and any as asc between by case cast check column constraint create cross current_date default desc
distinct else end except exists false for foreign from full group having in index inner intersect into is
join key left like limit natural not null offset on or order outer primary references right select set some
table then to true union unique update user using values when where window with
"""
RESERVED = frozenset(_WORDS.split())
GRAMMAR = r"""
start: select (" UNION " select | " EXCEPT " select | " INTERSECT " select)?
select: "SELECT " ("DISTINCT ")? item (", " item)* " FROM " source join* (" WHERE " cond)? group? order? limit?
item: "*" | expr (" AS " ALIAS)?
group: " GROUP BY " expr (", " expr)* (" HAVING " cond)?
order: " ORDER BY " expr (" DESC")? (", " expr (" DESC")?)*
limit: " LIMIT " INT
source: TABLE (" AS " ALIAS)? | "(" select ") AS " ALIAS
join: " CROSS JOIN " source | " JOIN " source " ON " cond | " LEFT JOIN " source " ON " cond
cond: pred ((" AND " | " OR ") pred)*
pred: "NOT " test | test
test: expr OP expr | expr " IN (" (select | expr (", " expr)*) ")" | expr LIKE STRING | expr " IS NULL"
    | expr " BETWEEN " expr " AND " expr | "EXISTS(" select ")" | "(" cond ")" | expr " IS NOT NULL"
expr: term ((" + " | " - " | " * " | " / ") term)*
term: column | NUMBER | STRING | "COUNT(" ("*" | ("DISTINCT ")? expr) ")" | FUNCTION ("DISTINCT ")? expr ")"
    | "(" select ")" | date | "CAST(" expr " AS " TYPE ")" | "(" expr ")"
    | "ALL (" select ")"
column: (QUALIFIER ".")? (COLUMN | ALIAS)
OP: " = " | " <> " | " > " | " < " | " >= " | " <= "
FUNCTION: "SUM(" | "AVG(" | "MIN(" | "MAX(" | "ROUND(" | "ABS(" | "LOWER(" | "UPPER(" | "LENGTH("
STRING: /'([^'\n]|''){0,80}'/
NUMBER: /-?[0-9]{1,12}(\.[0-9]{1,8})?/
INT: /[0-9]{1,4}/
ALIAS: /[a-z][a-z_]{0,20}[0-9]{1,2}/
"""
SQLITE = r"""
date: "STRFTIME(" STRING ", " expr ")"
LIKE: " LIKE "
TYPE: "REAL" | "INTEGER" | "TEXT" | "DATE"
"""
STANDARD = r"""
date: "EXTRACT(" PART " FROM " expr ")" | "DATE_TRUNC('" UNIT "', " expr ")"
PART: "YEAR" | "QUARTER" | "MONTH" | "WEEK" | "DAY" | "DOW" | "HOUR"
UNIT: "year" | "quarter" | "month" | "week" | "day" | "hour"
LIKE: " LIKE " | " ILIKE "
TYPE: "REAL" | "INTEGER" | "TEXT" | "DATE" | "TIMESTAMP"
"""
OWN = {"sqlite": SQLITE, "postgres": STANDARD, "duckdb": STANDARD}  # what the databases write in different ways


def quoted(name: str) -> str:
    """A name as it stands in the common form: lower case, in quotes where it must be."""
    low = name.lower()
    return low if re.fullmatch(r"[a-z_][a-z0-9_]*", low) and low not in RESERVED else '"' + low.replace('"', '""') + '"'


def sql_grammar(tables: Iterable[TableSchema], dialect: str) -> Constraint:
    """SELECT over `tables` as `dialect` (sqlglot's name) has it. Raises CoterieError where there are none."""
    tables = list(tables)
    names = sorted({quoted(t.name) for t in tables})
    columns = sorted({quoted(c.name) for t in tables for c in t.columns})
    if not columns:
        raise CoterieError("there are no tables to write SQL for")
    rules = f"TABLE: {_either(names)}\nCOLUMN: {_either(columns)}\n"
    rules += f"QUALIFIER: {_either(names)} | /[a-z][a-z_]{{0,20}}[0-9]{{1,2}}/\n"
    return Constraint(f"%llguidance {{}}\n{GRAMMAR}{OWN[dialect]}{rules}")


def _either(names: Iterable[str]) -> str:
    return " | ".join('"' + n.replace("\\", "\\\\").replace('"', '\\"') + '"' for n in names)
