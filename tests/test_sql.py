"""SQL under guard: what may be run gives what this reader may see, and everything else is refused before it is run."""

import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, text

from coterie.errors import CoterieError, QueryRefused, SourceError, Unreachable
from coterie.knowledge import database
from coterie.knowledge.database import Database, open_database
from coterie.knowledge.evidence import Reader
from coterie.knowledge.schema import Column, TableSchema, describe
from coterie.knowledge.specs import DatabaseSpec, RowsSpec, TablesSpec
from coterie.knowledge.sqlguard import View, guard, view_of
from coterie.knowledge.tables import COLUMNS, LARGEST, open_tables

ANYONE, NORTH, BOSS = Reader("eve"), Reader("ada", frozenset({"north"})), Reader("bob", frozenset({"boss"}))
CREATE = [
    'CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, "Region" TEXT, secret TEXT)',
    "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER REFERENCES customers(id), total REAL, day TEXT)",
    "CREATE TABLE salaries (who TEXT, pay INTEGER)",
    "INSERT INTO customers VALUES (1, 'Ann', 'north', 's3cret-1'), (2, 'Ben', 'south', 's3cret-2'), "
    "(3, 'O''Neil 100%', 'north', 's3cret-3')",
    "INSERT INTO orders VALUES (1, 1, 10.5, '2024-01-05'), (2, 2, 99, '2024-02-01'), (3, 3, 7, '2024-02-09')",
    "INSERT INTO salaries VALUES ('ada', 900), ('bob', 901)",
]
TABLES = {
    "customers": {
        "columns": ["id", "name", "Region"], "rows": {"north": "Region = 'north'", "boss": "1 = 1"},
        "readers": ["*"], "description": "who buys",
    },
    "orders": {"rows": {"north": "customer IN (SELECT id FROM customers WHERE Region = 'north')", "boss": "1 = 1"}},
}  # fmt: skip
QUOTED = {"Region": '"Region"'}  # PostgreSQL folds what is not in quotes


def fill(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as c:
        for statement in CREATE:
            c.execute(text(statement.replace(" 100%", " 100%")))
    engine.dispose()


@pytest.fixture(scope="module")
def postgres(new_postgres: Callable[..., str]) -> str:
    """The same tables in PostgreSQL."""
    uri = new_postgres()
    fill(uri)
    return uri


@pytest.fixture(scope="module", params=["sqlite", "postgresql", "duckdb"])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Database:
    """The same tables in each of the three."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "duckdb":
        (folder / "customers.csv").write_text(
            "id,name,Region,secret\n1,Ann,north,s3cret-1\n2,Ben,south,s3cret-2\n3,O'Neil 100%,north,s3cret-3\n"
        )
        (folder / "orders.csv").write_text(
            "id,customer,total,day\n1,1,10.5,2024-01-05\n2,2,99,2024-02-01\n3,3,7,2024-02-09\n"
        )
        (folder / "salaries.csv").write_text("who,pay\nada,900\nbob,901\n")
        files = {n: f"{n}.csv" for n in ("customers", "orders", "salaries")}
        tables = {**TABLES, "salaries": {"readers": ["nobody"]}}
        spec = TablesSpec.model_validate({"files": files, "tables": tables, "timeout_s": 2})
        return open_tables("shop", spec, folder)[0]
    if request.param == "sqlite":
        fill(f"sqlite:///{folder}/shop.db")
        url, tables = "sqlite:///shop.db", TABLES
    else:
        url = request.getfixturevalue("postgres")
        tables = json.loads(json.dumps(TABLES).replace("Region = 'north'", "\\\"Region\\\" = 'north'"))
    return open_database("shop", DatabaseSpec.model_validate({"url": url, "tables": tables, "timeout_s": 2}), folder)


ANSWERS = [
    ("SELECT name FROM customers ORDER BY id", [("Ann",), ("O'Neil 100%",)], [("Ann",), ("Ben",), ("O'Neil 100%",)]),
    ("select count(*) from Customers", [(2,)], [(3,)]),
    ("SELECT c.name, o.total FROM customers c JOIN orders AS o ON o.customer = c.id WHERE o.total > 8 ORDER BY total",
     [("Ann", 10.5)], [("Ann", 10.5), ("Ben", 99)]),
    ("SELECT name FROM customers WHERE name LIKE '%100%'", [("O'Neil 100%",)], [("O'Neil 100%",)]),
    ("WITH q AS (SELECT customer, SUM(total) AS t FROM orders GROUP BY customer) SELECT MAX(t) FROM q",
     [(10.5,)], [(99,)]),
    ("SELECT name FROM customers WHERE id IN (SELECT customer FROM orders WHERE total > 50)", [], [("Ben",)]),
    ("SELECT id FROM customers UNION SELECT id FROM orders ORDER BY 1", [(1,), (3,)], [(1,), (2,), (3,)]),
    ("SELECT \"region\", COUNT(*) AS n FROM customers GROUP BY \"region\" ORDER BY n DESC, 1", [("north", 2)],
     [("north", 2), ("south", 1)]),
    ("SELECT name FROM customers c WHERE EXISTS (SELECT 1 FROM orders WHERE customer = c.id AND total < 8)",
     [("O'Neil 100%",)], [("O'Neil 100%",)]),
]  # fmt: skip


@pytest.mark.parametrize(("sql", "north", "boss"), ANSWERS)
def test_a_reader_gets_the_rows_that_are_theirs(
    shop: Database, sql: str, north: list[object], boss: list[object]
) -> None:
    assert list(shop.run(sql, NORTH).rows) == north
    assert list(shop.run(sql, BOSS).rows) == boss
    with pytest.raises(QueryRefused):  # no group of theirs may see any row
        shop.run(sql, ANYONE)


def test_all_columns_are_the_allowed_ones(shop: Database) -> None:
    assert shop.run("SELECT * FROM customers", BOSS).columns == ("id", "name", "region")
    assert shop.run("SELECT c.* FROM customers c", NORTH).columns == ("id", "name", "region")


INJECTIONS = {
    "stacked": "SELECT 1; DROP TABLE customers",
    "stacked after a comment": "SELECT name FROM customers -- x\n; DELETE FROM customers",
    "stacked select": "SELECT 1; SELECT * FROM salaries",
    "drop": "DROP TABLE customers",
    "delete": "DELETE FROM customers",
    "update": "UPDATE customers SET name = 'x'",
    "insert": "INSERT INTO customers (id) VALUES (9)",
    "insert returning": "INSERT INTO customers (id) VALUES (9) RETURNING *",
    "create": "CREATE TABLE x AS SELECT * FROM customers",
    "select into": "SELECT * INTO x FROM customers",
    "writable cte": "WITH d AS (DELETE FROM customers RETURNING *) SELECT * FROM d",
    "writable cte, update": "WITH d AS (UPDATE customers SET name='' RETURNING name) SELECT name FROM d",
    "hidden table": "SELECT * FROM salaries",
    "hidden table, other case": "SELECT * FROM SALARIES",
    "hidden table in quotes": 'SELECT * FROM "salaries"',
    "hidden table in brackets": "SELECT * FROM [salaries]",
    "hidden table in backticks": "SELECT * FROM `salaries`",
    "hidden table by union": "SELECT name FROM customers UNION SELECT who FROM salaries",
    "hidden table by union all, commented": "SELECT name FROM customers UNION/**/ALL/**/SELECT who FROM salaries",
    "hidden table in a subquery": "SELECT (SELECT MAX(pay) FROM salaries) FROM customers",
    "hidden table in exists": "SELECT name FROM customers WHERE EXISTS (SELECT 1 FROM salaries WHERE pay > 900)",
    "hidden table in a join": "SELECT 1 FROM customers JOIN salaries ON 1=1",
    "hidden table in a lateral": "SELECT 1 FROM customers, LATERAL (SELECT * FROM salaries) s",
    "hidden table in order": "SELECT name FROM customers ORDER BY (SELECT pay FROM salaries LIMIT 1)",
    "hidden table in limit": "SELECT name FROM customers LIMIT (SELECT MAX(pay) FROM salaries)",
    "hidden table in a cte": "WITH q AS (SELECT * FROM salaries) SELECT * FROM q",
    "hidden table in values": "VALUES ((SELECT MAX(pay) FROM salaries))",
    "table statement": "TABLE salaries",
    "from first": "FROM salaries",
    "schema qualified": "SELECT * FROM main.customers",
    "schema qualified, public": "SELECT * FROM public.salaries",
    "schema qualified column": "SELECT main.customers.secret FROM customers",
    "catalogue, sqlite": "SELECT sql FROM sqlite_master",
    "catalogue, sqlite schema": "SELECT * FROM sqlite_schema",
    "catalogue, temp": "SELECT * FROM sqlite_temp_master",
    "catalogue, postgres": "SELECT * FROM pg_catalog.pg_tables",
    "catalogue, pg_shadow": "SELECT * FROM pg_shadow",
    "catalogue, information_schema": "SELECT * FROM information_schema.tables",
    "catalogue, duckdb": "SELECT * FROM duckdb_tables()",
    "catalogue by cast": "SELECT 'salaries'::regclass::oid FROM customers",
    "catalogue by cast, name": "SELECT CAST('salaries' AS regclass) FROM customers",
    "hidden column": "SELECT secret FROM customers",
    "hidden column, other case": "SELECT SECRET FROM customers",
    "hidden column in quotes": 'SELECT "secret" FROM customers',
    "hidden column, qualified": "SELECT customers.secret FROM customers",
    "hidden column in where": "SELECT name FROM customers WHERE secret LIKE 's3cret-1%'",
    "hidden column in order": "SELECT name FROM customers ORDER BY secret",
    "hidden column in using": "SELECT a.name FROM customers a JOIN customers b USING (secret)",
    "hidden column behind an alias": "SELECT secret AS secret FROM customers",
    "hidden column by position of a renamed table": "SELECT d FROM customers AS t(a, b, c, d)",
    "whole row": "SELECT customers FROM customers",
    "whole row as text": "SELECT c::text FROM customers c",
    "rowid": "SELECT rowid FROM customers",
    "rowid behind an alias": "SELECT rowid, 1 AS rowid FROM customers",
    "ctid": "SELECT ctid FROM customers",
    "tableoid": "SELECT tableoid, 1 AS tableoid FROM customers",
    "cte by the name of a table": "WITH customers AS (SELECT 1 AS id) SELECT * FROM customers",
    "cte by the name of a table, quoted": 'WITH "Customers" AS (SELECT 1 AS id) SELECT * FROM customers',
    "cte by the name of another cte": "WITH q AS (SELECT 1 AS a) SELECT * FROM (WITH q AS (SELECT 2 AS a) SELECT 1) r",
    "cte by the name of a hidden table": "WITH orders AS (SELECT * FROM salaries) SELECT * FROM orders",
    "alias by the name of a table": "SELECT orders.id FROM customers AS orders",
    "recursive": "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT * FROM r",
    "file, duckdb csv": "SELECT * FROM read_csv('/etc/passwd')",
    "file, duckdb auto": "SELECT * FROM read_csv_auto('/etc/passwd')",
    "file, duckdb text": "SELECT * FROM read_text('/etc/passwd')",
    "file, duckdb by name": "SELECT * FROM '/etc/passwd'",
    "file, duckdb glob": "SELECT * FROM glob('/etc/*')",
    "file, sqlite": "SELECT readfile('/etc/passwd')",
    "file, postgres": "SELECT pg_read_file('/etc/passwd')",
    "file, postgres ls": "SELECT * FROM pg_ls_dir('/')",
    "file, postgres large object": "SELECT lo_import('/etc/passwd')",
    "copy": "COPY customers TO '/tmp/x'",
    "copy program": "COPY customers TO PROGRAM 'id'",
    "attach": "ATTACH DATABASE '/tmp/x.db' AS x",
    "detach": "DETACH DATABASE main",
    "pragma": "PRAGMA table_info(salaries)",
    "pragma as a table": "SELECT * FROM pragma_table_info('salaries')",
    "load extension": "SELECT load_extension('/tmp/x.so')",
    "install": "INSTALL httpfs",
    "load": "LOAD httpfs",
    "set": "SET enable_external_access = true",
    "reset": "RESET ALL",
    "set role": "SET ROLE postgres",
    "show": "SHOW ALL",
    "explain": "EXPLAIN SELECT * FROM customers",
    "vacuum": "VACUUM INTO '/tmp/x.db'",
    "begin": "BEGIN",
    "do": "DO $$ BEGIN PERFORM 1; END $$",
    "call": "CALL x()",
    "sleep": "SELECT pg_sleep(60) FROM customers",
    "sleep, mysql": "SELECT SLEEP(60)",
    "settings": "SELECT current_setting('data_directory')",
    "set_config": "SELECT set_config('statement_timeout', '0', false)",
    "settings, duckdb": "SELECT * FROM duckdb_settings()",
    "user": "SELECT current_user FROM customers",
    "version": "SELECT version()",
    "query to xml": "SELECT query_to_xml('select * from salaries', true, true, '')",
    "table to xml": "SELECT table_to_xml('salaries', true, true, '')",
    "dblink": "SELECT * FROM dblink('host=x', 'SELECT 1') AS t(a int)",
    "random blob": "SELECT randomblob(1000000000)",
    "zero blob": "SELECT zeroblob(1000000000)",
    "padding": "SELECT printf('%1000000000d', 1)",
    "repeat": "SELECT repeat('x', 1000000000) FROM customers",
    "series": "SELECT * FROM generate_series(1, 1000000000)",
    "range": "SELECT * FROM range(1000000000)",
    "unnest": "SELECT UNNEST([1, 2, 3])",
    "json": "SELECT * FROM json_each('[1]')",
    "regular expression": "SELECT name FROM customers WHERE name ~ '(a+)+$'",
    "for update": "SELECT name FROM customers FOR UPDATE",
    "table sample": "SELECT name FROM customers TABLESAMPLE SYSTEM (10)",
    "parameter": "SELECT ? FROM customers",
    "named parameter": "SELECT :reader FROM customers",
    "dollar quotes": "SELECT $$x$$; DROP TABLE customers",
    "nested comment": "SELECT /* /* */ name FROM customers */ FROM salaries",
    "mysql comment": "SELECT name /*!50000 , secret */ , secret FROM customers",
    "zero byte": "SELECT name FROM customers\x00 UNION SELECT who FROM salaries",
    "full width letters": "SELECT \uff53ecret FROM customers",
    "nothing": "",
    "a comment": "-- nothing",
    "words": "What does Ann earn?",
    "unclosed quote": "SELECT 'abc FROM customers",
    "very deep": "SELECT " + "(" * 3000 + "1" + ")" * 3000,
    "many nots": "SELECT 1 WHERE " + "NOT " * 3000 + "TRUE",
    "many minuses": "SELECT " + "- " * 3000 + "1",
    "very long": "SELECT '" + "x" * 10_000 + "'",
    "very wide": "SELECT " + ", ".join("1" for _ in range(2500)),
    "many tables": "SELECT 1 FROM " + ", ".join(f"customers c{i}" for i in range(20)),
    "joins without ON, read twice each": "SELECT 1 FROM customers" + " JOIN customers" * 11,
    "joins without ON, many": "SELECT 1 FROM customers" + " LEFT JOIN customers" * 200,
    "types called as functions, read twice each": "SELECT " + "date(" * 10 + "'2024-01-01'" + ")" * 10,
    "types called as functions, many": "SELECT " + "decimal(" * 55 + "1" + ")" * 55,
    "functions written twice each": "SELECT " + "strpos(" * 10 + "name" + ", 'a', 2)" * 10 + " FROM customers",
}  # fmt: skip


@pytest.mark.parametrize("sql", INJECTIONS.values(), ids=INJECTIONS)
def test_what_is_not_plain_reading_of_allowed_tables_is_refused(shop: Database, sql: str) -> None:
    with pytest.raises(QueryRefused):
        shop.run(sql, BOSS)
    assert len(shop.run("SELECT id FROM customers", BOSS).rows) == 3


# Statements that are allowed, but aim at rows of others; none may give a row that is not the reader's.
ROW_REACHES = [
    "SELECT name FROM customers WHERE 1 = 1 OR region = 'south'",
    "SELECT name FROM customers WHERE name = '' OR 1 = 1 --'",
    "SELECT b.name FROM customers a RIGHT JOIN customers b ON a.id = -b.id",
    "SELECT b.name FROM customers a FULL JOIN customers b ON 1 = 0",
    "SELECT name FROM customers EXCEPT SELECT name FROM customers WHERE region = 'north'",
    "SELECT MAX(name) FROM customers WHERE region = 'south'",
    "SELECT o.id FROM orders o LEFT JOIN customers c ON c.id = o.customer WHERE c.id IS NULL",
    "SELECT x.name FROM (SELECT * FROM customers WHERE region <> 'north') AS x",
    "WITH q AS (SELECT * FROM customers) SELECT name FROM q WHERE region = 'south'",
]


@pytest.mark.parametrize("sql", ROW_REACHES)
def test_no_statement_reaches_another_groups_rows(shop: Database, sql: str) -> None:
    found = str(shop.run(sql, NORTH).rows)
    assert "Ben" not in found
    assert "2" not in found


COLUMN = st.sampled_from(["id", "name", "region", "c.id", "c.name", "COUNT(*)", "MAX(name)", "UPPER(region)", "*"])
PREDICATE = st.sampled_from([
    "region = 'south'", "region <> 'north'", "id = 2", "NOT region = 'north'", "name LIKE 'B%'", "id IS NOT NULL",
    "id IN (SELECT id FROM customers)", "EXISTS (SELECT 1 FROM customers d WHERE d.id = 2)", "1 = 1",
    "id BETWEEN 1 AND 3",
    "id IN (SELECT customer FROM orders WHERE total > 50)", "region = (SELECT MAX(region) FROM customers)",
])  # fmt: skip
JOIN = st.sampled_from([
    "", "JOIN orders o ON o.customer = c.id", "LEFT JOIN orders o ON 1 = 1", "CROSS JOIN orders AS o",
    "LEFT JOIN (SELECT id AS oid2 FROM customers WHERE id > 1) AS o ON 1 = 1",
])  # fmt: skip


@st.composite
def statements(draw: st.DrawFn) -> str:
    """Statements over the allowed tables, most of which can be run."""
    where = draw(st.lists(PREDICATE, max_size=3))
    joined = draw(st.sampled_from([" AND ", " OR "])).join(f"({p})" for p in where)
    one = f"SELECT {draw(COLUMN)} FROM customers c {draw(JOIN)}" + (f" WHERE {joined}" if joined else "")
    shape = draw(st.sampled_from(["{}", "SELECT * FROM ({}) AS s", "WITH w AS ({}) SELECT * FROM w", "{} UNION {}"]))
    return shape.format(one, one)


@given(statement=statements())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_rows_of_others_make_no_difference_to_any_answer(statement: str, two_shops: tuple[Database, Database]) -> None:
    """Two databases that differ only in rows that the reader may not see answer every statement alike."""
    answers = []
    for shop in two_shops:
        try:
            answers.append(sorted(map(str, shop.run(statement, NORTH).rows)))
        except (QueryRefused, SourceError) as error:
            answers.append([type(error).__name__])
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def two_shops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Database, Database]:
    shops = []
    for n in range(2):
        folder = tmp_path_factory.mktemp("two")
        fill(f"sqlite:///{folder}/shop.db")
        if n:
            engine = create_engine(f"sqlite:///{folder}/shop.db")
            with engine.begin() as c:
                c.execute(text("DELETE FROM orders WHERE customer = 2"))
                c.execute(text("UPDATE customers SET name = 'Zed', id = 77, secret = 'x' WHERE id = 2"))
                c.execute(text("INSERT INTO customers VALUES (50, 'More', 'east', 'y')"))
                c.execute(text("INSERT INTO salaries VALUES ('zed', 1)"))
        shops.append(
            open_database("shop", DatabaseSpec.model_validate({"url": "sqlite:///shop.db", "tables": TABLES}), folder)
        )
    return shops[0], shops[1]


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_is_refused_or_answered_and_never_an_error_of_ours(statement: str) -> None:
    views = {"customers": View("customers", ("id", "name"), "Region = 'north'")}
    for sql in (
        statement,
        f"SELECT {statement} FROM customers",
        f"SELECT id FROM customers WHERE name = '{statement}'",
    ):
        try:
            ran = guard(sql, views, "sqlite", 10)
        except QueryRefused:
            continue
        assert "Region = 'north'" in ran or "customers" not in ran


@given(name=st.text(max_size=30))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_readers_name_is_a_value_and_nothing_else(name: str, owned: Database) -> None:
    reader = Reader(name)
    assert {row[0] for row in owned.run("SELECT who FROM notes", reader).rows} <= {name}


@pytest.fixture(scope="module")
def owned(tmp_path_factory: pytest.TempPathFactory) -> Database:
    folder = tmp_path_factory.mktemp("owned")
    engine = create_engine(f"sqlite:///{folder}/n.db")
    with engine.begin() as c:
        c.execute(text("CREATE TABLE notes (who TEXT, note TEXT)"))
        c.execute(text("INSERT INTO notes VALUES ('eve', 'hers'), ('ada', 'own'), ('', 'nobody'), ('''', 'quote')"))
    tables = {"notes": {"rows": {"*": "who = :reader"}}}
    return open_database("n", DatabaseSpec.model_validate({"url": "sqlite:///n.db", "tables": tables}), folder)


def test_a_reader_sees_their_own_rows(owned: Database) -> None:
    assert owned.run("SELECT note FROM notes", Reader("ada")).rows == (("own",),)
    assert owned.run("SELECT note FROM notes", Reader("' OR '1'='1")).rows == ()
    assert owned.run("SELECT note FROM notes", Reader("'")).rows == (("quote",),)
    assert owned.run("SELECT note FROM notes", Reader()).rows == ()  # a stranger owns no row, not those without owner


def test_samples_are_of_rows_that_the_reader_may_see(shop: Database) -> None:
    north, boss = describe(shop.schema(NORTH)), describe(shop.schema(BOSS))
    assert "Ben" in boss
    assert "Ben" not in north
    assert "secret" not in boss
    assert "salaries" not in boss
    assert "customers (id" in north
    assert "who buys" in north
    assert describe(shop.schema(ANYONE)) == ""


def test_comments_of_postgresql_are_read_and_a_description_goes_before_them(new_postgres: Callable[..., str]) -> None:
    url = new_postgres()
    fill(url)
    engine = create_engine(url)
    with engine.begin() as c:
        c.execute(text("COMMENT ON TABLE orders IS 'what was bought'"))
        c.execute(text("COMMENT ON TABLE customers IS 'who is known'"))
        c.execute(text("COMMENT ON COLUMN orders.total IS 'in pounds'"))
        c.execute(text("COMMENT ON COLUMN customers.secret IS 'for nobody'"))
    engine.dispose()
    tables = {"orders": {}, "customers": {"columns": ["id", "name"], "description": "who buys"}}
    db = open_database("shop", DatabaseSpec.model_validate({"url": url, "tables": tables}), Path())
    assert describe(db.schema(ANYONE), samples=False).splitlines() == [
        "orders (id, customer = customers.id, total -- in pounds, day): what was bought",
        "customers (id, name): who buys",
    ]
    assert db.tables()["orders"].columns[0].key


@pytest.fixture(params=["sqlite", "sqlite, WAL", "duckdb"])
def changing(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Database, Callable[[str, list[str]], None]]:
    """A table `t`, and what writes it anew: its columns, and one value of the first in each row."""
    wal, kind = "WAL" in request.param, request.param.split(",")[0]

    def write(columns: str, values: list[str]) -> None:
        rows = [[v, *["x"] * columns.count(",")] for v in values]
        if kind == "duckdb":
            (tmp_path / "t.csv").write_text("\n".join([columns, *(",".join(r) for r in rows)]) + "\n")
            return
        with closing(sqlite3.connect(tmp_path / "t.db")) as db, db:
            if wal:
                db.execute("PRAGMA journal_mode=WAL")
            db.execute("DROP TABLE IF EXISTS t")
            db.execute(f"CREATE TABLE t ({columns.replace(',', ' TEXT,')} TEXT)")
            db.executemany(f"INSERT INTO t VALUES ({','.join('?' * (columns.count(',') + 1))})", rows)

    write("a", ["secret", "open"])
    if kind == "duckdb":
        return open_tables("t", TablesSpec.model_validate({"files": {"t": "t.csv"}}), tmp_path)[0], write
    spec = DatabaseSpec.model_validate({"url": "sqlite:///t.db", "tables": {"t": {}}})
    return open_database("t", spec, tmp_path), write


def test_what_was_read_is_read_again_when_the_database_changed(
    changing: tuple[Database, Callable[[str, list[str]], None]],
) -> None:
    """New columns can be asked for, and deleted rows leave the samples."""
    db, write = changing
    assert describe(db.schema(ANYONE)) == "t (a [secret; open])"
    write("a,b", ["open"])
    assert describe(db.schema(ANYONE)) == "t (a [open], b [x])"
    assert db.run("SELECT b FROM t", ANYONE).rows == (("x",),)


def test_a_database_that_does_not_say_when_it_changed_is_read_again_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(database, "FRESH_S", 0.05)
    now, asked = {"t": TableSchema("t", (Column("a", "text"),))}, list[str]()

    def fetch(sql: str, _limit: int) -> tuple[list[str], list[tuple[str]], bool]:
        asked.append(sql)
        return ["a"], [("secret",)], False

    db = Database("t", "postgres", lambda: dict(now), {"t": RowsSpec.model_validate({})}, fetch, 10)
    time.sleep(0.06)
    assert {describe(db.schema(Reader(f"customer {n}"))) for n in range(3)} == {"t (a [secret])"}
    assert len(asked) <= 2  # whoever asks, but for the time being over in between
    now["t"] = TableSchema("t", (Column("b", "text"),))
    time.sleep(0.06)
    assert describe(db.schema(ANYONE)).startswith("t (b")


def test_a_dead_postgresql_is_told_from_a_statement_that_fails() -> None:
    spec = DatabaseSpec.model_validate({"url": "postgresql://nobody@127.0.0.1:9/none", "tables": {"t": {}}})
    db = open_database("far", spec, Path())
    with pytest.raises(Unreachable, match="far: the database cannot be read"):
        db.tables()
    with pytest.raises(Unreachable, match="far: "):
        db.values(View("t", ("a",)), "a")


def test_a_slow_statement_is_stopped_and_the_next_one_answers(shop: Database) -> None:
    many = ", ".join(f"customers AS c{i}" for i in range(1, 12))
    product = " + ".join(f"c{i}.id" for i in range(1, 12))
    slow = (
        f"WITH q AS (SELECT {product} AS s FROM {many}) SELECT COUNT(*), SUM(a.s * b.s) FROM q a, q b WHERE a.s > b.s"
    )
    start = time.monotonic()
    with pytest.raises(SourceError, match="stopped after 2 s"):
        shop.run(slow, BOSS)
    assert time.monotonic() - start < 60
    assert shop.run("SELECT COUNT(*) FROM customers", BOSS).rows == ((3,),)


def test_more_rows_than_the_limit_are_cut_and_said_so(tmp_path: Path) -> None:
    fill(f"sqlite:///{tmp_path}/shop.db")
    spec = DatabaseSpec.model_validate({"url": "sqlite:///shop.db", "tables": {"orders": {}}, "rows": 2})
    answer = open_database("shop", spec, tmp_path).run("SELECT id FROM orders LIMIT 1000000", ANYONE)
    assert (len(answer.rows), answer.cut) == (2, True)


def test_a_database_is_asked_for_no_more_rows_than_the_limit(shop: Database) -> None:
    """PostgreSQL's driver takes all rows that come, however many are read of them."""
    most = f" LIMIT {shop.rows + 1}"
    plain = ["SELECT id FROM orders", "SELECT id FROM orders UNION SELECT id FROM customers"]
    for sql in [*plain, *(f"{p} LIMIT 999999999" for p in plain)]:
        assert shop.run(sql, BOSS).ran.endswith(most)
    assert len(shop.run("SELECT id FROM orders LIMIT 2", BOSS).rows) == 2
    assert shop.run("SELECT id FROM orders ORDER BY id LIMIT 999999999 OFFSET 1", BOSS).rows == ((2,), (3,))
    for number in ("-1", "(SELECT 5)", "1 + 1", "NULL"):
        with pytest.raises(QueryRefused, match="LIMIT takes a whole number"):
            shop.run(f"SELECT id FROM orders LIMIT {number}", BOSS)


def test_the_database_itself_refuses_to_write(tmp_path: Path, postgres: str) -> None:
    """The walls behind the guard, tried without it."""
    fill(f"sqlite:///{tmp_path}/shop.db")
    for url in ("sqlite:///shop.db", postgres):
        db = open_database("shop", DatabaseSpec.model_validate({"url": url, "tables": {"orders": {}}}), tmp_path)
        for sql in ("DELETE FROM orders", "CREATE TABLE x (a INTEGER)", "DROP TABLE salaries"):
            with pytest.raises(SourceError):
                db._fetch(sql, 10)
        assert len(db._fetch("SELECT * FROM orders", 10)[1]) == 3


def test_duckdb_itself_reads_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    db, _ = open_tables("t", TablesSpec.model_validate({"files": {"a": "a.csv"}}), tmp_path)
    db.run("SELECT x FROM a", ANYONE)
    for sql in ("SELECT * FROM read_csv('/etc/passwd')", "SET enable_external_access = true", "COPY a TO '/tmp/co_x'",
                "ATTACH '/tmp/coterie_x.db'", "INSTALL httpfs"):  # fmt: skip
        with pytest.raises(SourceError):
            db._fetch(sql, 10)


BAD_SPECS = [
    ({"url": "sqlite:///none.db", "tables": {"orders": {}}}, SourceError, "shop: "),
    ({"url": "sqlite:///shop.db", "tables": {"order": {}}}, CoterieError, "no table 'order'; there are customers"),
    ({"url": "sqlite:///shop.db", "tables": {"orders": {"columns": ["totl"]}}}, CoterieError, "no column 'totl'"),
    ({"url": "sqlite:///shop.db", "tables": {"orders": {"rows": {"*": "totl > 1"}}}}, CoterieError, "'totl', which"),
    ({"url": "sqlite:///shop.db", "tables": {"orders": {"rows": {"*": "total >"}}}}, CoterieError, "no SQL condition"),
    ({"url": "sqlite:///shop.db", "tables": {"orders": {"rows": {"*": "id = :user"}}}}, CoterieError, "only :reader"),
    ({"url": "sqlite://", "tables": {"orders": {}}}, CoterieError, "name a file"),
    ({"url": "mysql://x/y", "tables": {"orders": {}}}, CoterieError, "mysql is not known"),
    ({"url": "nonsense", "tables": {"orders": {}}}, CoterieError, "no SQLAlchemy address"),
    ({"url": "postgresql://127.0.0.1:9/x", "tables": {"orders": {}}, "timeout_s": 1}, SourceError, "cannot be re"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "kind", "said"), BAD_SPECS)
def test_what_cannot_work_is_said_in_one_sentence(
    tmp_path: Path, spec: dict[str, object], kind: type[CoterieError], said: str
) -> None:
    fill(f"sqlite:///{tmp_path}/shop.db")
    with pytest.raises(kind, match=said):
        open_database("shop", DatabaseSpec.model_validate(spec), tmp_path).run("SELECT id FROM orders", ANYONE)


def test_a_view_is_the_union_of_what_a_readers_groups_may_see() -> None:
    spec = RowsSpec.model_validate({"rows": {"a": "x = 1", "b": "x = 2 OR y = 3"}})
    both = view_of("t", ["x", "y"], spec, Reader("", frozenset({"a", "b"})), "sqlite")
    assert both
    assert both.condition == "(x = 1) OR (x = 2 OR y = 3)"
    assert view_of("t", ["x", "y"], spec, Reader(), "sqlite") is None


SHEETS: dict[str, tuple[list[list[Any]], list[dict[str, Any]]]] = {
    "a heading is missing in the middle": (
        [["city", None, "people"], ["Oslo", "x", 7]], [{"city": "Oslo", "column_2": "x", "people": 7}],
    ),
    "an empty column in the middle": ([["city", None, "people"], ["Oslo", None, 7]], [{"city": "Oslo", "people": 7}]),
    "a heading is missing at the end": ([["city"], ["Oslo", 7], ["Rome"]], [
        {"city": "Oslo", "column_2": 7}, {"city": "Rome", "column_2": None},
    ]),
    "the same heading twice": ([["price", "Price", "price"], [1, 2, 3]], [{"price": 1, "price_1": 2, "price_2": 3}]),
    "a heading that looks like a made-up one": (
        [["column_2", None], ["a", "b"]], [{"column_2": "a", "column_2_1": "b"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sheet", "rows"), SHEETS.values(), ids=SHEETS)
def test_every_cell_of_a_sheet_stays_under_its_own_heading(
    tmp_path: Path, sheet: list[list[Any]], rows: list[dict[str, Any]]
) -> None:
    openpyxl_of(sheet).save(tmp_path / "a.xlsx")
    db, loaded = open_tables("t", TablesSpec.model_validate({"files": {"a": "a.xlsx"}}), tmp_path)
    found = db.run("SELECT * FROM a", ANYONE)
    assert not loaded.problems
    assert [dict(zip(found.columns, row, strict=True)) for row in found.rows] == rows


def test_an_account_number_of_twenty_digits_in_a_sheet_is_text(tmp_path: Path) -> None:
    """Excel itself writes no such number, other programs do."""
    openpyxl_of([["account", "n"], [77777, 1.5], [8, 2]]).save(tmp_path / "7.xlsx")
    with ZipFile(tmp_path / "7.xlsx") as plain, ZipFile(tmp_path / "a.xlsx", "w") as large:
        for name in plain.namelist():
            large.writestr(name, plain.read(name).replace(b"77777", b"12345678901234567890"))
    db, loaded = open_tables("t", TablesSpec.model_validate({"files": {"a": "a.xlsx"}}), tmp_path)
    assert db.run("SELECT account, n FROM a", ANYONE).rows == (("12345678901234567890", 1.5), ("8", 2))
    assert not loaded.problems


def wide(file: Path, columns: int) -> None:
    """A table of so many columns and one row."""
    import duckdb
    import openpyxl

    names = [f"c{i}" for i in range(columns)]
    if file.suffix == ".csv":
        file.write_text(f"{','.join(names)}\n{','.join('1' for _ in names)}\n")
    elif file.suffix == ".parquet":
        duckdb.sql(f"SELECT {', '.join(f'1 AS {n}' for n in names)}").write_parquet(str(file))
    else:
        book = openpyxl.Workbook(write_only=True)
        sheet = book.create_sheet()
        sheet.append(names)
        sheet.append([1] * columns)
        book.save(file)


@pytest.mark.parametrize("kind", ["csv", "parquet", "xlsx"])
def test_a_table_has_as_many_columns_as_the_limit_says_and_not_one_more(tmp_path: Path, kind: str) -> None:
    files = {"fits": f"fits.{kind}", "over": f"over.{kind}"}
    wide(tmp_path / files["fits"], COLUMNS)
    wide(tmp_path / files["over"], COLUMNS + 1)
    db, loaded = open_tables("t", TablesSpec.model_validate({"files": files}), tmp_path)
    assert len(db.run("SELECT * FROM fits", ANYONE).columns) == COLUMNS
    assert list(loaded.problems) == [files["over"]]
    assert f"{COLUMNS}" in loaded.problems[files["over"]]


def test_a_million_columns_and_a_huge_file_are_named_and_the_rest_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide(tmp_path / "junk.csv", 1_000_000)
    wide(tmp_path / "wide.csv", 100_000)
    with (tmp_path / "huge.parquet").open("wb") as file:
        file.truncate(LARGEST + 1)  # of nothing, so that the disk has room for it
    (tmp_path / "good.csv").write_text("city\nOslo\n")
    monkeypatch.setattr("coterie.knowledge.tables.EXCEL_ROWS", 3)  # 200,000 take long to write
    files = {"junk": "junk.csv", "wide": "wide.csv", "huge": "huge.parquet", "good": "good.csv"}
    for rows in (3, 4):
        files[f"rows{rows}"] = f"rows{rows}.xlsx"
        book = openpyxl_of([["n"], *([n] for n in range(rows))])
        book.save(tmp_path / f"rows{rows}.xlsx")
    db, loaded = open_tables("t", TablesSpec.model_validate({"files": files}), tmp_path)
    assert db.run("SELECT city FROM good", ANYONE).rows == (("Oslo",),)
    assert set(loaded.problems) == {"junk.csv", "wide.csv", "huge.parquet", "rows4.xlsx"}
    assert "over 2 GB" in loaded.problems["huge.parquet"]
    assert "over 3 rows" in loaded.problems["rows4.xlsx"]


def openpyxl_of(rows: list[list[Any]]) -> Any:
    import openpyxl

    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    return book


def test_csv_parquet_and_excel_are_tables_and_a_broken_file_is_named(tmp_path: Path) -> None:
    import duckdb
    import openpyxl

    (tmp_path / "a.csv").write_text("city,people\nOslo,7\nBergen,3\n")
    duckdb.sql("SELECT 'Oslo' AS city, 1.5 AS area").write_parquet(str(tmp_path / "b.parquet"))
    book = openpyxl.Workbook()
    for row in (["city", "since", "mixed"], ["Oslo", 1040, 1], ["Bergen", 1070, "x"], [None, None, None]):
        book.active.append(row)
    book.save(tmp_path / "c.xlsx")
    (tmp_path / "d.xlsx").write_bytes(b"no zip")
    (tmp_path / "e.parquet").write_bytes(b"PAR1")
    (tmp_path / "wide.csv").write_text(",".join(f"c{i}" for i in range(5000)) + "\n")
    files = {
        "a": "a.csv",
        "b": "b.parquet",
        "c": "c.xlsx",
        "d": "d.xlsx",
        "e": "e.parquet",
        "w": "wide.csv",
        "n": "no.csv",
    }
    db, loaded = open_tables("t", TablesSpec.model_validate({"files": files}), tmp_path)
    sql = "SELECT a.city, a.people, b.area, c.since, c.mixed FROM a JOIN b ON a.city = b.city JOIN c ON c.city = a.city"
    assert [(*r[:2], float(r[2]), *r[3:]) for r in db.run(sql, ANYONE).rows] == [("Oslo", 7, 1.5, 1040, "1")]
    assert set(loaded.problems) == {"d.xlsx", "e.parquet", "wide.csv", "no.csv"}
    assert "5000 columns" in loaded.problems["wide.csv"]
    (tmp_path / "a.csv").write_text("city,people\nOslo,8\n")
    assert db.run("SELECT people FROM a", ANYONE).rows == ((8,),)
