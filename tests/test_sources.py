"""All kinds of source in one coterie.toml: learned, listed and asked together, each under its permissions."""

import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coterie import sources
from coterie.business import Business
from coterie.cli.main import app
from coterie.errors import CoterieError, Unreachable
from coterie.knowledge.asksql import SqlSource, Written
from coterie.knowledge.evidence import Reader
from coterie.knowledge.support import Checker
from coterie.sources import Knowledge, learn, overview
from knowledge_support import WordEmbedder

TOML = """
[knowledge.rules]
kind = "documents"
path = "docs"
[knowledge.music]
kind = "graph"
base = "urn:music:"
[[knowledge.music.tables]]
file = "albums.csv"
id = "album/{title}"
type = "album"
label = "{title}"
links = { singer = "artist/{artist}" }
[[knowledge.music.tables]]
file = "artists.csv"
id = "artist/{artist}"
type = "artist"
label = "{artist}"
[knowledge.shop]
kind = "database"
url = "sqlite:///shop.db"
[knowledge.shop.tables.orders]
rows = { staff = "1 = 1", "*" = "customer = :reader" }
[knowledge.stock]
kind = "tables"
files = { stock = "stock.csv" }
[knowledge.stock.tables.stock]
readers = ["staff"]
"""


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "returns.md").write_text("# Returns\n\nThings may be returned within 30 days.\n")
    (tmp_path / "albums.csv").write_text("title,artist\nSatchmo,Louis Armstrong\n")
    (tmp_path / "artists.csv").write_text("artist\nLouis Armstrong\n")
    (tmp_path / "stock.csv").write_text("thing,count\nkettle,3\n")
    with sqlite3.connect(tmp_path / "shop.db") as db:
        db.execute("CREATE TABLE orders (id INTEGER, customer TEXT, thing TEXT)")
        db.executemany("INSERT INTO orders VALUES (?, ?, ?)", [(1, "ada", "kettle"), (2, "bob", "lamp")])
    (tmp_path / "coterie.toml").write_text(f'[business]\nbase = "{tiny}"\n{TOML}')
    return tmp_path


def test_each_kind_is_learned_listed_and_learned_again_without_work(folder: Path) -> None:
    business, by = Business.open(folder), WordEmbedder()
    first = {done.source: done for done in learn(business, by=by)}
    assert {name: bool(done.errors) for name, done in first.items()} == dict.fromkeys(
        ("rules", "music", "shop", "stock"), False
    )
    assert (first["rules"].indexed, first["music"].indexed, first["shop"].passages) == (1, 2, 1)
    again = {done.source: done for done in learn(business, by=by)}
    assert (again["rules"].indexed, again["music"].indexed, again["music"].kept) == (0, 0, 2)
    listed = {s["name"]: s for s in overview(business, Reader("ada"))}
    assert [f["path"] for f in listed["shop"]["files"]] == ["orders"]
    assert listed["stock"]["files"] == []
    assert [f["path"] for f in overview(business, Reader("eve", frozenset({"staff"})))[3]["files"]] == ["stock"]


def test_a_question_is_put_to_documents_and_graph_alike(folder: Path) -> None:
    business, by = Business.open(folder), WordEmbedder()
    list(learn(business, by=by))
    knowledge = Knowledge(business, by)
    try:
        (fact,) = [e for e in knowledge.source("music").search("Who is the singer of Satchmo?", Reader())][:1]
        assert "Louis Armstrong" in fact.text
        assert "SELECT" in fact.query
        found = knowledge.gather("Who is the singer of Satchmo?", Reader(), tell=lambda _: None)
        assert any(e.source == "music" for e in found)
        opened = knowledge.open("music", fact.where, Reader())
        assert opened
        assert opened.text == fact.text
    finally:
        knowledge.close()


def test_the_database_shows_a_reader_their_own_rows(folder: Path) -> None:
    """Whatever the model writes; here it is given the statement."""
    business = Business.open(folder)
    knowledge = Knowledge(business, WordEmbedder())
    try:
        shop = knowledge.source("shop")
        run = shop.db.run  # type: ignore[attr-defined]
        assert run("SELECT id FROM orders", Reader("ada")).rows == ((1,),)
        assert run("SELECT id FROM orders", Reader("eve", frozenset({"staff"}))).rows == ((1,), (2,))
    finally:
        knowledge.close()


def test_a_source_that_cannot_be_read_is_told_and_the_others_are_learned(folder: Path) -> None:
    (folder / "shop.db").write_text("not a database, by far")
    done = {d.source: d for d in learn(Business.open(folder), by=WordEmbedder())}
    assert done["shop"].errors
    assert not done["rules"].errors
    listed = {s["name"]: s for s in overview(Business.open(folder), Reader())}
    assert listed["shop"]["errors"]
    assert listed["music"]["passages"] > 0


HIDDEN = """
[knowledge.payroll]
kind = "database"
url = "postgresql://payer@127.0.0.1:9/pay"
[knowledge.payroll.tables.pay]
readers = ["hr"]
[knowledge.bonus]
kind = "database"
url = "sqlite:///bonus.db"
[knowledge.bonus.tables.bonus]
rows = { hr = "1 = 1" }
[knowledge.secret]
kind = "documents"
path = "secret"
readers = ["hr"]
[knowledge.drawn]
kind = "graph"
[knowledge.drawn.extract]
documents = "secret"
relations = ["made by"]
"""


def test_what_goes_wrong_with_a_source_is_told_to_those_who_may_read_it_and_to_the_log(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (folder / "coterie.toml").open("a") as file:
        file.write(HIDDEN)
    business, hr = Business.open(folder), Reader("eve", frozenset({"hr"}))
    names = ["payroll", "bonus", "secret", "drawn"]

    def said(reader: Reader) -> tuple[list[str], dict[str, list[str]]]:
        told = list[str]()
        knowledge = Knowledge(business, WordEmbedder())
        assert knowledge.gather("Who is the singer of Satchmo?", reader, tell=told.append)
        knowledge.close()
        listed = {s["name"]: s["errors"] for s in overview(business, reader) if s["name"] in names}
        return [line for line in told if line.startswith(tuple(names))], listed

    list(learn(business, ["rules", "music", "shop", "stock"], by=WordEmbedder()))
    assert said(Reader("ada")) == ([], {name: [] for name in names})
    told, listed = said(hr)
    assert {"payroll: gives no answer", "bonus: cannot be asked"} < set(told)
    assert "secret: is not learned, or not as it is declared now; run `coterie learn`" in told
    assert all(len(errors) == 1 for errors in listed.values())
    list(learn(business, names, by=WordEmbedder()))
    assert said(Reader("ada"))[1] == {name: [] for name in names}
    shown = str(said(hr))
    assert "127.0.0.1" not in shown
    assert "payer" not in shown
    assert "there is no such folder" in shown
    assert any("payroll" in line and "127.0.0.1" in line for line in caplog.messages), "for whoever can act"


def breaks(*_a: object, **_k: object) -> None:
    raise RuntimeError("of no use to a user")


def test_what_nobody_foresaw_in_a_source_stops_no_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    business, told = Business.open(folder), list[str]()
    with monkeypatch.context() as broken:
        broken.setattr("coterie.knowledge.database.Database.tables", breaks)
        done = {d.source: d for d in learn(business, by=WordEmbedder(), tell=told.append)}
    why = "failed by a fault of ours (RuntimeError); the log says more"
    assert done["shop"].errors == (("shop", why),)
    assert f"shop: {why}" in told
    assert not done["rules"].errors
    assert any(r.exc_info and "shop" in r.getMessage() for r in caplog.records)
    told.clear()
    knowledge = Knowledge(business, WordEmbedder())
    monkeypatch.setattr("coterie.knowledge.documents.Documents.search", breaks)
    assert knowledge.gather("Who is the singer of Satchmo?", Reader(), tell=told.append)
    assert "rules: failed (RuntimeError)" in told
    knowledge.close()
    monkeypatch.setattr("coterie.knowledge.graph.Graph.sources", breaks)
    listed = {s["name"]: s for s in overview(business, Reader())}
    assert listed["music"]["errors"] == ["music: cannot be listed (RuntimeError)"]


def test_without_the_embedding_model_the_sources_answer_by_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    business = Business.open(folder)
    list(learn(business, by=WordEmbedder()))
    tried, now, told = [], [1000.0], list[str]()

    def dead(*_a: object) -> WordEmbedder:
        tried.append(1)
        raise Unreachable("http://secret.invalid/embeddings: gives no embeddings")

    monkeypatch.setattr(sources, "embedder", dead)
    monkeypatch.setattr(sources.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(SqlSource, "write", lambda *_: [Written("SELECT thing FROM orders", -1.0)])
    knowledge = Knowledge(business)
    for question, source, text in (
        ("May things be returned within days?", "rules", "returned within 30 days"),
        ("Who is the singer of Satchmo?", "music", "Louis Armstrong"),
        ("Which orders has the customer ada?", "shop", "thing: kettle"),
    ):
        told.clear()
        found = knowledge.gather(question, Reader("ada"), tell=told.append)
        assert (found[0].source, text in found[0].text) == (source, True)
        assert len(told) == 1
        assert told[0].endswith("sources are searched by words alone")
        assert "secret.invalid" not in told[0]
        assert Checker([e.text for e in found], knowledge.comparing).check(found[0].text).by == 0
        assert knowledge.open(source, found[0].where, Reader("ada"), found[0].query)
    assert len(tried) == 1, "it is left alone for a while"
    assert knowledge.gather("zebra quantum?", Reader("ada")) == []
    done = {d.source: d for d in learn(business)}
    assert "gives no embeddings" in done["rules"].errors[0][1]
    assert [bool(done[name].errors) for name in ("music", "shop", "stock")] == [False] * 3
    now[0] += sources.REST_S
    monkeypatch.setattr(sources, "embedder", lambda *_: WordEmbedder())
    assert knowledge.gather("Who is the singer of Satchmo?", Reader("ada"), tell=pytest.fail)
    assert isinstance(knowledge.comparing, WordEmbedder)
    knowledge.close()


def test_a_table_whose_file_cannot_be_read_is_named_to_those_who_may_read_it(folder: Path) -> None:
    toml = folder / "coterie.toml"
    toml.write_text(
        toml.read_text().replace("files = { stock =", 'files = { more = "more.csv", gone = "gone.csv", stock =')
    )
    (folder / "more.csv").write_text("thing\nlamp\n")
    (folder / "stock.csv").write_bytes(b"\xff\xfe\x00\xd8")
    business, staff = Business.open(folder), Reader("eve", frozenset({"staff"}))
    (done,) = learn(business, ["stock"])
    assert {file for file, _ in done.errors} == {"stock.csv", "gone.csv"}
    assert done.passages == 1
    strangers, of_staff = (overview(business, who)[3]["errors"] for who in (Reader("ada"), staff))
    assert [("gone.csv" in e, "stock.csv" in e) for e in strangers] == [(True, False)]
    assert len(of_staff) == 2
    (folder / "more.csv").unlink()
    (done,) = learn(business, ["stock"])
    assert {file for file, _ in done.errors} == {"more.csv", "stock.csv", "gone.csv"}
    assert not any("stock.csv" in e for e in overview(business, Reader("ada"))[3]["errors"])


def test_the_list_of_sources_asks_none_of_them_and_says_when_each_was_learned(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    business, staff = Business.open(folder), Reader("eve", frozenset({"staff"}))
    never = {s["name"]: s for s in overview(business, staff)}
    assert [never[n]["indexed"] for n in ("music", "shop", "stock")] == [None] * 3
    assert "run `coterie learn`" in never["shop"]["errors"][0]
    list(learn(business, by=WordEmbedder()))
    (folder / "stock.csv").unlink()
    (folder / "shop.db").write_text("dead by now")

    def asked(*_a: object, **_k: object) -> None:
        raise AssertionError("the list asked a source")

    with monkeypatch.context() as closed:
        for place in ("duckdb.connect", "coterie.knowledge.database.Database.tables",
                      "coterie.knowledge.graph.Graph.select"):  # fmt: skip
            closed.setattr(place, asked)
        listed = {s["name"]: s for s in overview(business, staff)}
    assert [s["unit"] for s in listed.values()] == ["passages", "triples", "columns", "columns"]
    assert [s["passages"] for s in listed.values()] == [1, listed["music"]["passages"], 3, 2]
    assert all(s["indexed"] and not s["errors"] for s in listed.values())
    assert all(f["indexed"] for s in listed.values() for f in s["files"])
    assert listed["shop"]["files"][0]["title"] == "id, customer, thing"
    list(learn(business, ["shop"]))
    (failed,) = (s for s in overview(business, staff) if s["name"] == "shop")
    assert "not a database" in failed["errors"][0]
    assert failed["files"] == listed["shop"]["files"], "what was known of it stands"


def test_what_a_graph_could_not_read_is_kept_for_whoever_may_read_it(folder: Path) -> None:
    toml = (folder / "coterie.toml").read_text()
    part = '[[knowledge.music.parts]]\nfiles = "deals.nt"\nreaders = ["staff"]\n[knowledge.shop]'
    (folder / "coterie.toml").write_text(toml.replace("[knowledge.shop]", part, 1))
    (folder / "deals.nt").write_text("no triple")
    business = Business.open(folder)
    list(learn(business, ["music"]))
    errors = [overview(business, who)[1]["errors"] for who in (Reader("ada"), Reader("eve", frozenset({"staff"})))]
    assert [("deals.nt" in str(e)) for e in errors] == [False, True]
    (folder / "deals.nt").write_text("")
    list(learn(business, ["music"]))
    assert overview(business, Reader("eve", frozenset({"staff"})))[1]["errors"] == []


@pytest.mark.parametrize(("declared", "readers"), [
    ('readers = ["staff"]', {"eve": 1, "ada": 0}),
    ('endpoint_graphs = { "urn:open" = "*", "urn:deals" = "staff" }', {"eve": 2, "ada": 1}),
])  # fmt: skip
def test_an_endpoint_is_listed_for_those_who_may_ask_it(folder: Path, declared: str, readers: dict[str, int]) -> None:
    (folder / "coterie.toml").write_text(
        f'[knowledge.far]\nkind = "graph"\nendpoint = "http://far.invalid/sparql"\n{declared}\n'
    )
    business = Business.open(folder)
    groups = {"eve": frozenset({"staff"}), "ada": frozenset[str]()}
    for name, count in readers.items():
        listed = overview(business, Reader(name, groups[name]))
        assert len(listed[0]["files"]) == count
        assert ("far.invalid" in json.dumps(listed)) == bool(count)
        assert name == "eve" or "deals" not in json.dumps(listed)


def test_the_command_line_lists_them_all(folder: Path) -> None:
    list(learn(Business.open(folder), by=WordEmbedder()))
    said = CliRunner().invoke(app, ["sources", str(folder), "--json"])
    assert [s["kind"] for s in json.loads(said.stdout)] == ["documents", "graph", "database", "tables"]


def test_an_unknown_kind_is_named(folder: Path) -> None:
    (folder / "coterie.toml").write_text('[knowledge.x]\nkind = "oracle"\n')
    with pytest.raises(CoterieError, match=r"knowledge\.x\.kind: must be 'documents', .*'tables', not 'oracle'"):
        Business.open(folder)
