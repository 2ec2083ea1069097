"""Which sources a question is put to, what of their findings counts, and what a source that gives no answer costs."""

import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from coterie import sources
from coterie.business import Business
from coterie.knowledge.asksql import SqlSource, Written
from coterie.knowledge.evidence import Evidence, Reader
from coterie.knowledge.graph_source import UNSURE
from coterie.sources import Knowledge, in_turn, learn
from knowledge_support import WordEmbedder

TOML = """
[knowledge.rules]
kind = "documents"
path = "docs"
[knowledge.shop]
kind = "database"
url = "sqlite:///shop.db"
expert = "sql"
[knowledge.shop.tables.orders]
rows = { staff = "1 = 1", "*" = "customer = :reader" }
[knowledge.shop.tables.phones]
readers = ["staff"]
"""
STAFF = Reader("eve", frozenset({"staff"}))
ORDERS = "How many orders has ada placed?"
RETURNS = "Which orders of ada may be returned?"


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "returns.md").write_text("# Returns\n\nThings may be returned within 30 days.\n")
    with sqlite3.connect(tmp_path / "shop.db") as db:
        db.execute("CREATE TABLE orders (id INTEGER, customer TEXT, thing TEXT)")
        db.executemany("INSERT INTO orders VALUES (?, 'ada', ?)", [(n, f"kettle{n}") for n in range(30)])
        db.execute("CREATE TABLE phones (who TEXT, number TEXT)")
        db.execute("INSERT INTO phones VALUES ('zoe', '555')")
    (tmp_path / "coterie.toml").write_text(f'[business]\nbase = "{tiny}"\n{TOML}')
    return tmp_path


class Words(WordEmbedder):
    """Wide enough that no two words of these tests share a place."""

    width = 4096


class Scribe:
    """Writes the SQL that it is given, whatever is asked, and keeps what it was asked."""

    def __init__(self) -> None:
        self.sql, self.asked = "SELECT COUNT(*) FROM orders WHERE customer = 'ada'", list[str]()

    def write(self, _source: SqlSource, question: str, _reader: Reader, _drawn: int = 0) -> list[Written]:
        self.asked.append(question)
        return [Written(self.sql, -1.0)]


@pytest.fixture
def scribe(monkeypatch: pytest.MonkeyPatch) -> Scribe:
    it = Scribe()
    monkeypatch.setattr(SqlSource, "write", lambda *args: it.write(*args))
    return it


@pytest.fixture
def knowledge(folder: Path) -> Iterator[Knowledge]:
    business = Business.open(folder)
    list(learn(business, by=Words()))
    it = Knowledge(business, Words())
    yield it
    it.close()


PUT_TO = {
    ORDERS: {"shop"},
    "Which customer is ada?": {"shop"},  # a column, and a value
    RETURNS: {"shop", "rules"},
    "May things be returned within 30 days?": {"rules"},
    "zebra quantum?": set(),
}


@pytest.mark.parametrize("question", PUT_TO)
def test_a_model_writes_sql_only_where_the_question_is_about_the_database(
    knowledge: Knowledge, scribe: Scribe, question: str
) -> None:
    found = knowledge.gather(question, STAFF, tell=pytest.fail)
    assert {e.source for e in found} == PUT_TO[question]
    assert bool(scribe.asked) is ("shop" in PUT_TO[question])


def test_what_a_reader_may_not_see_makes_no_question_fit(knowledge: Knowledge, scribe: Scribe) -> None:
    scribe.sql = "SELECT number FROM phones WHERE who = 'zoe'"
    question = "What number has the phone of zoe?"
    assert [e.text for e in knowledge.gather(question, STAFF)] == ["number: 555"]
    asked = len(scribe.asked)
    assert knowledge.gather(question, Reader("ada")) == []
    assert len(scribe.asked) == asked


def test_rows_never_push_documents_out(knowledge: Knowledge, scribe: Scribe) -> None:
    scribe.sql = "SELECT * FROM orders"
    found = knowledge.gather(RETURNS, STAFF)
    assert len(found) == sources.EACH
    assert {e.source for e in found[:2]} == {"rules", "shop"}
    few = knowledge.gather(RETURNS, STAFF, limit=2)
    assert {e.source for e in few} == {"rules", "shop"}


@pytest.mark.parametrize("sql", [
    "SELECT id FROM orders WHERE id > 99", "SELECT MAX(id) FROM orders WHERE id > 99",
    "SELECT number FROM phones", "SELECT nothing FROM nowhere",
])  # fmt: skip
def test_no_rows_and_rows_about_something_else_are_no_evidence(knowledge: Knowledge, scribe: Scribe, sql: str) -> None:
    scribe.sql = sql
    assert knowledge.gather(ORDERS, STAFF) == []
    assert scribe.asked


MUSIC = """
[knowledge.music]
kind = "graph"
[[knowledge.music.tables]]
file = "albums.csv"
id = "album/{title}"
type = "album"
label = "{title}"
"""


@pytest.mark.parametrize(("probability", "kept"), [(UNSURE / 2, False), (0.9, True)])
def test_a_path_that_was_hardly_asked_for_must_be_near_the_question(
    folder: Path, monkeypatch: pytest.MonkeyPatch, probability: float, kept: bool
) -> None:
    (folder / "albums.csv").write_text("title\nSatchmo\n")
    (folder / "coterie.toml").write_text(MUSIC)
    business = Business.open(folder)
    list(learn(business, by=Words()))
    knowledge = Knowledge(business, Words())
    found = [Evidence("music", "", "Lullabies: 3", probability, "SELECT DISTINCT ?x1 { }")]
    monkeypatch.setattr(type(knowledge.source("music")), "search", lambda *_: found)
    assert bool(knowledge.gather("zebra quantum?", Reader())) is kept
    knowledge.close()


def test_the_best_of_each_source_goes_first() -> None:
    def ranked(source: str, *nears: float) -> list[tuple[float, Evidence]]:
        return [(near, Evidence(source, "", f"{source}{n}", near)) for n, near in enumerate(nears)]

    found = in_turn({"a": ranked("a", 1.0, 1.0, 1.0), "b": ranked("b", 0.3), "c": ranked("c", 0.5, 0.4)})
    assert [e.text for e in found] == ["a0", "c0", "b0", "a1", "c1", "a2"]


def test_the_expert_that_writes_sql_is_the_one_that_answers_now(
    knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = 1

    def facts(_library: object, name: str) -> SimpleNamespace:
        return SimpleNamespace(kind="lora", name=name, version=version)

    monkeypatch.setattr(type(knowledge.business.library), "facts", facts)
    shop = knowledge.source("shop")
    assert isinstance(shop, SqlSource)
    assert shop.adapter() == ("sql", 1)
    version = 2  # fit again
    assert shop.adapter() == ("sql", 2)


@pytest.fixture
def hanging() -> Iterator[str]:
    """Takes connections, and never says a word."""
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        it.listen(64)
        yield f"http://127.0.0.1:{it.getsockname()[1]}/sparql"


def test_sources_that_hang_cost_one_wait_together_and_then_rest(
    folder: Path, hanging: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with (folder / "coterie.toml").open("a") as file:
        for n in range(4):
            file.write(f'\n[knowledge.far{n}]\nkind = "graph"\nendpoint = "{hanging}"\ntimeout_s = 1\n')
    business = Business.open(folder)
    list(learn(business, by=Words()))
    knowledge, told = Knowledge(business, Words()), list[str]()

    def timed() -> float:
        told.clear()
        start = time.monotonic()
        assert knowledge.gather("May things be returned within 30 days?", Reader(), tell=told.append)
        return time.monotonic() - start

    assert timed() < 3  # not four times one second
    assert [t.split(":")[0] for t in told] == ["far0", "far1", "far2", "far3"]
    assert all(t.endswith(": gives no answer") for t in told), told
    assert [f"{hanging}: no answer in 1 s" in line for line in caplog.messages] == [True] * 4, "for whoever can act"
    assert timed() < 0.5
    assert all("not asked for another" in t for t in told)
    assert "127.0.0.1" not in str(told)
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + sources.REST_S)
    timed()
    assert all("not asked" not in t for t in told)
    assert {rest.seconds for rest in knowledge._rests.values()} == {2 * sources.REST_S}
    knowledge.close()
